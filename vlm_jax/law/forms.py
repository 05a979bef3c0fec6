# SPDX-License-Identifier: Apache-2.0
"""The forms of the law: each is a sum of power-law terms plus a floor D, so one solver fits all.

N LLM parameters in billions   V visual tokens, of one frame if there are several
Q text tokens   frames of a video   T the tokens a form counts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = int | float | np.number | np.ndarray | Sequence[Any]  # one place, or many

# What an exponent multiplies inside exp(-...): T is V, or Q+V for the forms that say so.
REGRESSORS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "lnN": lambda log_n, log_t, log_frames: log_n,
    "-lnN": lambda log_n, log_t, log_frames: -log_n,
    "lnT": lambda log_n, log_t, log_frames: log_t,
    "lnN lnT": lambda log_n, log_t, log_frames: log_n * log_t,
    "lnframes": lambda log_n, log_t, log_frames: log_frames,
    "-lnframes": lambda log_n, log_t, log_frames: -log_frames,
}


@dataclass(frozen=True)
class Form:
    """error = sum over terms of coefficient * exp(-sum of exponent * regressor) + D.

    `terms` maps each coefficient to its {exponent: regressor}; a parameter vector holds the
    coefficients, then D, then the exponents, in `names` order.
    """

    formula: str
    why: str
    terms: dict[str, dict[str, str]]
    total_tokens: bool = False  # T = Q+V instead of V
    reads_frames: bool = False  # rows of one number of frames have no such law, others no other

    @property
    def coefficients(self) -> list[str]:
        """Names of the coefficients, one per term."""
        return list(self.terms)

    @property
    def exponents(self) -> list[str]:
        """Names of the exponents, each once."""
        return list(dict.fromkeys(e for term in self.terms.values() for e in term))

    @property
    def names(self) -> list[str]:
        """Names of all parameters in the order of a parameter vector."""
        return [*self.coefficients, "D", *self.exponents]

    def design(self, N: Numbers, V: Numbers, Q: Numbers, frames: Numbers = 1.0) -> np.ndarray:
        """The regressor of each exponent in each term at n places, float64[terms, exponents, n]."""
        log_n = np.log(np.asarray(N, dtype=np.float64))
        tokens = np.asarray(V, dtype=np.float64) + (
            np.asarray(Q, dtype=np.float64) if self.total_tokens else 0.0
        )
        log_t = np.log(tokens)
        log_frames = np.log(np.asarray(frames, dtype=np.float64))
        log_n, log_t, log_frames = np.broadcast_arrays(log_n, log_t, log_frames)
        design = np.zeros((len(self.terms), len(self.exponents), log_n.size))
        for k, term in enumerate(self.terms.values()):
            for exponent, regressor in term.items():
                design[k, self.exponents.index(exponent)] = REGRESSORS[regressor](
                    log_n, log_t, log_frames
                ).ravel()
        return design


FORMS = {
    "multiplicative": Form(
        "A N^-alpha V^-beta + D",
        "the paper's law as its code fits it: T is the visual tokens alone",
        {"A": {"alpha": "lnN", "beta": "lnT"}},
    ),
    "multiplicative_total": Form(
        "A N^-alpha (Q+V)^-beta + D",
        "the paper's law as its text states it: T is all input tokens",
        {"A": {"alpha": "lnN", "beta": "lnT"}},
        total_tokens=True,
    ),
    "interaction": Form(
        "A N^-alpha V^-(beta + gamma ln N) + D",
        "the multiplicative law with a ln N ln V term: gamma > 0 means larger LLMs gain more from "
        "tokens",
        {"A": {"alpha": "lnN", "beta": "lnT", "gamma": "lnN lnT"}},
    ),
    "additive": Form(
        "A N^-alpha + B V^-beta + D",
        "the errors left by the LLM's size and by the tokens add up",
        {"A": {"alpha": "lnN"}, "B": {"beta": "lnT"}},
    ),
    # arXiv 2505.18855: sum_k a_k x_k^-alpha_k + sum_k b_k x_k^beta_k n^-d + c n^-d + e, where n is
    # the amount of training data. A grid here has one n, which makes n^-d a constant and leaves no
    # interaction at all, so V takes the place of n and x is N alone: its second sum becomes
    # C N^gamma V^-beta, its third term B V^-beta.
    "add_interact": Form(
        "A N^-alpha + (B + C N^gamma) V^-beta + D",
        "the video paper's add-interact law with V in the place of its training data and N as its "
        "only x",
        {"A": {"alpha": "lnN"}, "B": {"beta": "lnT"}, "C": {"gamma": "-lnN", "beta": "lnT"}},
    ),
    # The same law with both x of a video, N and its frames: a sum over the two, and their
    # interactions with V, which again takes the place of the training data.
    "frames": Form(
        "A N^-alpha + F frames^-tau + (B + C N^gamma + G frames^delta) V^-beta + D",
        "the video paper's add-interact law of LLM size, frames and tokens of a frame",
        {
            "A": {"alpha": "lnN"}, "F": {"tau": "lnframes"}, "B": {"beta": "lnT"},
            "C": {"gamma": "-lnN", "beta": "lnT"}, "G": {"delta": "-lnframes", "beta": "lnT"},
        },
        reads_frames=True,
    ),
}  # fmt: skip
