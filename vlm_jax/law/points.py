# SPDX-License-Identifier: Apache-2.0
"""The measurements that a law is fitted to; bad values are refused at construction.

N LLM parameters in billions   V visual tokens   Q text tokens   error = 1 - score, a fraction
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Points:
    """n measured errors and where they were measured; every array is float64[n].

    N is in billions of LLM parameters, V and Q in tokens, error and stderr are fractions; stderr is
    nan where it is unknown. `label` names the LLM of each point, `model` the trained model: points
    of one model share its deviation ("" is a model of its own; empty: every point is). `frames`
    float64[n] are those of a video, each of V tokens; None is one image. Raises ValueError for
    lengths that differ, NaN, N or V that is not positive, a negative Q, fewer than one frame, and
    an error outside 0..1.
    """

    N: np.ndarray
    V: np.ndarray
    Q: np.ndarray
    error: np.ndarray
    stderr: np.ndarray
    label: list[str]
    model: list[str] = field(default_factory=list)
    frames: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name)) for name in ("N", "V", "Q", "error", "stderr", "label")
        }
        if self.frames is not None:
            lengths["frames"] = len(self.frames)
            if not np.all(self.frames >= 1):
                raise ValueError(f"frames must be 1 or more, got {np.min(self.frames):g}")
        if self.model:
            lengths["model"] = len(self.model)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"points need columns of one length, got {lengths}")
        for name in ("N", "V", "Q", "error"):
            column = np.asarray(getattr(self, name), dtype=np.float64)
            if bad := np.flatnonzero(~np.isfinite(column)).tolist():
                raise ValueError(
                    f"{name} is not a finite number in {self._where(bad)}: remove those cells or "
                    "measure them again"
                )
        rules = (
            ("N", self.N > 0, "LLM parameters in billions must be positive"),
            (
                "V",
                self.V > 0,
                "visual tokens must be positive (a blind run has no V)",
            ),
            ("Q", self.Q >= 0, "text tokens cannot be negative"),
            ("error", (self.error >= 0) & (self.error <= 1), "error = 1 - score must lie in 0..1"),
        )
        for name, good, rule in rules:
            if not np.all(good):
                bad = np.flatnonzero(~good).tolist()
                values = ", ".join(f"{v:g}" for v in getattr(self, name)[bad][:5])
                raise ValueError(f"{rule}, got {name} = {values} in {self._where(bad)}")

    @property
    def place(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """N, V, Q and frames, float64[n] each."""
        frames = np.ones(len(self)) if self.frames is None else self.frames
        return self.N, self.V, self.Q, frames

    def __len__(self) -> int:
        return len(self.error)

    def where(self, keep: np.ndarray) -> "Points":
        """The points whose `keep` (bool[n]) is true."""
        columns = {k: getattr(self, k)[keep] for k in ("N", "V", "Q", "error", "stderr")}
        names = {
            k: [name for name, kept in zip(getattr(self, k), keep, strict=True) if kept]
            for k in ("label", "model")
            if getattr(self, k)
        }
        frames = None if self.frames is None else self.frames[keep]
        return Points(**columns, **({"label": []} | names), frames=frames)

    def _where(self, indices: list[int]) -> str:
        places = ", ".join(
            f"{i + 1} ({self.label[i] or 'N=' + format(self.N[i], 'g')}, V={self.V[i]:g})"
            for i in indices[:5]
        )
        return f"point{'s' if len(indices) > 1 else ''} {places}" + (
            f" and {len(indices) - 5} more" if len(indices) > 5 else ""
        )


@dataclass(frozen=True)
class Cell:
    """One measured cell: where it stands, and family -> (error, stderr), fractions.

    `model` names the trained model if several cells may share it, `method` its compressor if known.
    """

    N: float
    V: float
    Q: float
    label: str
    seed: int
    errors: dict[str, tuple[float, float]]
    model: str = ""
    method: str = ""
    frames: float = 1.0


def of_cells(cells: Sequence[Cell], family: str | None = None) -> Points:
    """The points of one family, or of the unweighted mean over all families when it is None.

    Standard errors of families are combined as independent. Raises ValueError if a cell lacks the
    family, and if cells have different families, because their means could not be compared.
    """
    if not cells:
        raise ValueError("no cells: there is nothing to fit")
    names = sorted({name for cell in cells for name in cell.errors})
    chosen = names if family is None else [family]
    if family is not None and family not in names:
        raise ValueError(
            f"no family or task {family!r} in these rows; they have {', '.join(names)}"
        )
    for cell in cells:
        if missing := [name for name in chosen if name not in cell.errors]:
            raise ValueError(
                f"cell {cell.label} (N={cell.N:g}, V={cell.V:g}, seed {cell.seed}) has no score "
                f"for {', '.join(missing)}: evaluate it, or fit one family with --family"
            )
    values = np.array([[cell.errors[name] for name in chosen] for cell in cells], dtype=np.float64)
    return Points(
        N=np.array([cell.N for cell in cells], dtype=np.float64),
        V=np.array([cell.V for cell in cells], dtype=np.float64),
        Q=np.array([cell.Q for cell in cells], dtype=np.float64),
        error=values[:, :, 0].mean(1),
        stderr=np.sqrt((values[:, :, 1] ** 2).sum(1)) / len(chosen),
        label=[cell.label for cell in cells],
        model=[cell.model for cell in cells] if any(cell.model for cell in cells) else [],
        frames=np.array([cell.frames for cell in cells])
        if any(cell.frames != 1 for cell in cells)
        else None,
    )
