# SPDX-License-Identifier: Apache-2.0
"""Sizes, counts and durations as people write them."""


def parameters_text(billions: int | float) -> str:
    """A parameter count as people write it: 2.5e-5 (billions) is "25k", 7 is "7B"."""
    # 0.5B, not 500M: published sizes are called so.
    for least, factor, unit in ((0.0995, 1.0, "B"), (0.9995e-3, 1e-3, "M"), (0.9995e-6, 1e-6, "k")):
        if billions >= least:
            return f"{billions / factor:.3g}{unit}"
    return f"{billions * 1e9:.0f}"


def llm_text(billions: int | float) -> str:
    """A language model's size for a legend, two digits or the whole part: "9.8 k parameters"."""
    for factor, unit in ((1.0, "B"), (1e-3, "M"), (1e-6, "k")):
        value = billions / factor
        if value >= (0.0995 if unit == "B" else 0.9995):
            return (
                f"{value:.0f} {unit} parameters"
                if value >= 99.5
                else f"{value:.2g} {unit} parameters"
            )
    return f"{billions * 1e9:.0f} parameters"


def amount_text(value: int | float) -> str:
    """A count with a metric prefix and three digits: 1.23e9 is "1.23 G"."""
    for power, prefix in zip((18, 15, 12, 9, 6, 3), "EPTGMk", strict=True):
        factor = 10.0**power
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def seconds_text(seconds: int | float) -> str:
    """A duration with the unit that fits: "3 h 05 min", "2 min 10 s", "4.1 s", "12 ms"."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 100:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
