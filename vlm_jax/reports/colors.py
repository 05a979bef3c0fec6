# SPDX-License-Identifier: Apache-2.0
"""What a color means in all figures of a run: one table, so that it never means two things.

Language models have viridis, dark to light by size, each with a marker of its own, the same in
every figure of a run. Lengths of the question have copper. A request's phases, methods and curves
of training have fixed colors from Okabe & Ito. Gray and black belong to no language model: the
best choice, the frontier, a level.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# Okabe & Ito, "Color Universal Design" (2008): eight colors that color-blind readers tell apart.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
# None is close to a color of viridis, so that a phase is not taken for a language model.
PHASES = {"encoder": "#999999", "compressor": "#E69F00", "question": "#CC79A7",
          "prefill": "#D55E00", "decode": "#F0E442"}  # fmt: skip
NO_LLM = "0.25"  # of all language models, or of none
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
HATCHES = ("", "///", "\\\\\\", "xx", "++", "--", "||", "//")
MOST_SIZES = 12  # neighbors in a table of more colors cannot be told apart


@dataclass(frozen=True)
class Look:
    """The color, marker and hatch of one language model."""

    color: tuple[float, ...]
    marker: str
    hatch: str


Looks = Mapping[float, Look]


class TooManySizes(ValueError):
    """More LLM sizes than can be told apart."""


def of_sizes(sizes: Iterable[int | float]) -> dict[float, Look]:
    """N (in any unit) -> its look, of all sizes that the figures of a run have together.

    Raises TooManySizes for more than can be told apart.
    """
    sizes = sorted(set(map(float, sizes)))
    if len(sizes) > MOST_SIZES:
        raise TooManySizes(
            f"{len(sizes)} LLM sizes cannot be told apart by color (at most {MOST_SIZES}): fit "
            "rows of fewer sizes to see them"
        )
    return {
        n: Look(color, MARKERS[i % len(MARKERS)], HATCHES[i % len(HATCHES)])
        for i, (n, color) in enumerate(zip(sizes, _between("viridis", 0.8, sizes), strict=True))
    }


def of_lengths(lengths: Iterable[int | float]) -> dict[float, Look]:
    """Text tokens Q -> its look."""
    lengths = sorted(set(map(float, lengths)))
    return {
        q: Look(color, MARKERS[i % len(MARKERS)], "")
        for i, (q, color) in enumerate(zip(lengths, _between("copper", 0.85, lengths), strict=True))
    }


def _between(name: str, lightest: float, of: list[float]) -> list[tuple[float, ...]]:
    """Colors from the dark end to `lightest`, beyond which a line is too pale on white."""
    colormaps = require_matplotlib().colormaps
    return [colormaps[name](x) for x in np.linspace(0.0, lightest, len(of))]


def require_matplotlib():
    """The matplotlib module. Raises ModuleNotFoundError, with the way to install it."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.backends.backend_svg
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.lines
    except ImportError as error:
        raise ModuleNotFoundError(
            'figures need matplotlib: pip install "vlm_jax[report]"', name="matplotlib"
        ) from error
    return matplotlib
