# SPDX-License-Identifier: Apache-2.0
"""The reports of `vlm-jax compile` as tables for people."""

from typing import Any

GIB = 2**30


def of_report(result: dict[str, Any]) -> str:
    """One compiled mode."""
    mesh = " x ".join(f"{name}={size}" for name, size in result["mesh"].items())
    lines = [f"{result['mode']} on {result['topology']} ({result['chips']} chips, mesh {mesh})"]
    hbm = dict(result["hbm_bytes"])
    usable, total = hbm.pop("usable"), hbm.pop("total")
    for kind, size in hbm.items():
        lines.append(f"  {kind.replace('_', ' '):22}{size / GIB:10.3f} GiB")
    fits = "fits" if result["fits"] else "DOES NOT FIT"
    # The compiler stops before it has placed everything.
    known = "" if result["estimate"] else " at least"
    lines.append(
        f"  {'HBM of a device':22}{total / GIB:10.3f} GiB of {usable / GIB:.2f} usable "
        f"({total / usable:.0%}{known}): {fits}"
    )
    flops = result["flops"]
    lines.append(
        f"  FLOPs of a run         model {flops['model']:.4g}, program {flops['program']:.4g}, "
        f"compiler {'unknown' if flops['compiler'] is None else format(flops['compiler'], '.4g')}"
    )
    for c in result["collectives"]:
        how = "async" if c["asynchronous"] else "sync"
        lines.append(
            f"  {c['program']:9}{c['kind']:19}{how:6}{c['count']:7,}   {c['bytes'] / 1e9:9.3f} GB, "
            f"{c['sent_bytes'] / 1e9:.3f} GB sent per device"
        )
    for one in result["programs"]:
        if one["unread_loops"]:
            lines.append(f"  {one['name']}: loops counted once: {', '.join(one['unread_loops'])}")
    lines += times(result) if result["estimate"] else failure(result)
    lines.append(f"  compiled in {result['compile_seconds']:.0f} s")
    return "\n".join(lines)


def times(result: dict[str, Any]) -> list[str]:
    """The estimated times."""
    t, epoch = result["estimate"], result["epoch"]
    lines = [
        f"  estimated: {t['step_seconds'] * 1e3:.1f} ms ({t['compute_seconds'] * 1e3:.1f} compute, "
        f"{t['collective_seconds'] * 1e3:.1f} communication, of that "
        f"{t['synchronous_seconds'] * 1e3:.1f} waited for)",
        f"             MFU {t['mfu']:.1%}, {t['mfu_without_communication']:.1%} without "
        f"communication; {t['tokens_per_second']:,.0f} tokens/s, "
        f"{t['tokens_per_second_per_chip']:,.0f} per chip",
        f"             {epoch['rows']:,} rows: {epoch['hours']:.2f} hours, "
        f"{epoch['chip_hours']:.1f} chip hours"
        + ("" if epoch["dollars"] is None else f", {epoch['dollars']:,.0f} dollars"),
        f"             ({t['how']})",
    ]
    cycles: dict[str, int] = {}
    for one in result["programs"]:
        for part, count in one["cycles"].items():
            cycles[part] = cycles.get(part, 0) + count
    total = sum(cycles.values()) or 1
    shares = [f"{part} {count / total:.0%}" for part, count in cycles.items()]
    return [*lines, f"             cycles: {', '.join(shares)}"]


def failure(result: dict[str, Any]) -> list[str]:
    """Why it does not fit, and what would help."""
    lines = []
    for one in result["programs"]:
        if one.get("message"):
            lines.append(f"  {one['name']}: {one['message']}")
        for tensor in one["largest"][:5]:
            lines.append(
                f"    {tensor['bytes'] / GIB:8.3f} GiB  {tensor['type'][:60]}  {tensor['scope']}"
            )
    return [*lines, f"  what would help: {'; '.join(result['helps'])}"]


def of_search(result: dict[str, Any]) -> str:
    """The candidates that a search compiled, the best first."""
    lines = [f"{result['mode']} on {result['topology']}: {len(result['tried'])} compiled, of "
             f"{result['possible']} possible"]  # fmt: skip
    for one in result["tried"]:
        changes = ", ".join(f"{name}={value}" for name, value in one["fields"].items())
        if one.get("error"):
            lines.append(f"  refused: {changes}: {one['error']}")
            continue
        share = f"{one['hbm_share']:.0%} of HBM"
        if not one["fits"]:
            lines.append(f"  does not fit ({share}): {changes}")
            continue
        lines.append(
            f"  {one['step_seconds'] * 1e3:9.1f} ms  MFU {one['mfu']:.1%}  {share:12}  {changes}"
        )
    return "\n".join(lines)
