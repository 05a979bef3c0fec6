# SPDX-License-Identifier: Apache-2.0
"""What is shown of benchmarks/serving_http.py: a picture, and the table of docs/serving.md.

python benchmarks/serving_load.py benchmarks/results/DATE-serving_http.json [more: of other sizes]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent
DRAWN, PAGE = HOME / "docs/serving_load.png", HOME / "docs/serving.md"
MARKS = r"(<!-- load: [^\n]*-->\n).*?(<!-- end of load -->)"


def together(paths: list[str]) -> dict[str, Any]:
    """The results of several runs on one machine, each of other sizes, as one.

    Raises:
      ValueError: for runs that differ in anything else.
    """
    runs = [json.loads(Path(path).read_text()) for path in paths]
    facts = [
        (run["machine"]["cpu"], run["machine"]["threads"], run["versions"], run["slots"],
         run["seconds"])
        for run in runs
    ]  # fmt: skip
    if any(fact != facts[0] for fact in facts):
        raise ValueError(f"these runs differ in machine, versions, slots or seconds: {facts}")
    return runs[0] | dict(
        rows=[line for run in runs for line in run["rows"]],
        sizes={name: said for run in runs for name, said in run["sizes"].items()},
    )


def drawn(results: dict[str, Any], path: Path) -> None:
    """Requests a second and the 95th percentile of the whole answer against clients, at few and
    at all visual tokens, of the largest size of a result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name = list(results["sizes"])[-1]
    rows = [line for line in results["rows"] if line["size"] == name and line["clients"]]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    series = sorted(
        {
            (line["side"], line["visual_tokens"])
            for line in rows
            if line["side"] != "vlm_jax, one slot"
        }
    )
    for side, V in series:
        mine = [line for line in rows if (line["side"], line["visual_tokens"]) == (side, V)]
        mine.sort(key=lambda line: line["clients"])
        style = dict(marker="o", label=f"{side}, V = {V}", ls="-" if side == "vlm_jax" else "--")
        clients = [line["clients"] for line in mine]
        panels[0].plot(clients, [line["requests_per_second"] for line in mine], **style)
        panels[1].plot(clients, [line["response"]["p95_ms"] / 1e3 for line in mine], **style)
    names = ("requests / s", "95 % of answers are complete after, s")
    for panel, label in zip(panels, names, strict=True):
        panel.set(xlabel="clients", ylabel=label, xscale="log")
        panel.set_xticks(sorted({line["clients"] for line in rows}))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0)
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False)
    read = f"{results['prompt']} tokens of text, {results['new']} new"
    figure.suptitle(f"{name}, {read}, {results['machine']['cpu']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(results: dict[str, Any]) -> list[str]:
    """The lines of the table of docs/serving.md."""
    lines = [
        "| size | server | V | clients, or requests that come per second | requests/s | first "
        "token, ms | token, ms | whole answer, ms | p95 measured over `plan`'s, by cost model, by "
        "batches | wrong, failed of |",
        "|---|---|---:|---:|---:|---|---|---|---|---:|",
    ]
    for line in results["rows"]:
        who = line["clients"] or f"{line['rate']:g} by themselves"
        ways = [line.get("plan", {}).get(way) for way in ("cost_model", "measured_batches")]
        plan = ", ".join(
            "" if way is None else "overload" if way["p95_ms"] is None
            else f"{way['measured_over_predicted']:g}"
            for way in ways
        )  # fmt: skip
        times = (
            ", ".join(milliseconds(line[part][f"p{p}_ms"]) for p in (50, 95, 99))
            for part in ("first_token", "token", "response")
        )
        lines.append(
            f"| {line['size']} | {line['side']} | {line['visual_tokens']} | {who} | "
            f"{line['requests_per_second']:,.3g} | {' | '.join(times)} | "
            f"{'' if plan == ', ' else plan} | {line['wrong']}, {line['failed']} of "
            f"{line['asked']:,} |"
        )
    return lines


def milliseconds(ms: float) -> str:
    """Three digits or more, no powers of ten."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def on_page(text: str, results: dict[str, Any], name: str) -> str:
    """A page with the table and the picture of a result. ValueError for one without their place."""
    machine = results["machine"]
    body = "\n".join(
        [
            "",
            f"![requests a second and times against clients]({name})",
            "",
            f"{machine['cpu']}, {machine['threads']} threads for server and clients together, "
            f"{results['seconds']:g} s with the most clients and of requests that come by "
            f"themselves, a third of it else, {results['created'][:10]}. Times are the 50th, 95th "
            "and 99th percentile.",
            "",
            *table(results),
            "",
            *(
                f"- {size}, {one['clients']} clients: V few against all saves "
                f"{one['prompt_tokens_saved']:.0%} of the prompt's tokens and "
                f"{one['seconds_saved']:.3g} s of an answer (median); {one['ratio']:g} times the "
                "requests."
                for size, said in results["sizes"].items()
                for one in said["saved"]
            ),
            "",
            "",
        ]
    )
    text, count = re.subn(MARKS, lambda found: found[1] + body + found[2], text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"a page has one place for the load, between marks, not {count}")
    return text


def main(argv: list[str]) -> int:
    """Writes both for the results of these files."""
    results = together(argv)
    drawn(results, DRAWN)
    PAGE.write_text(on_page(PAGE.read_text(), results, DRAWN.name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
