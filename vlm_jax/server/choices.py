# SPDX-License-Identifier: Apache-2.0
"""The numbers of visual tokens that a served model gives.

V visual tokens of an image
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_jax.models.sizes import VLMSize


@dataclass(frozen=True)
class Choices:
    """The V that a model serves: all of them, the one without a wish, and those of "low" and
    "high"."""

    supported: tuple[int, ...]
    default: int
    low: int
    high: int

    @classmethod
    def of(
        cls,
        size: VLMSize,
        *,
        default: int | None = None,
        low: int | None = None,
        high: int | None = None,
    ) -> "Choices":
        """Those of a model's compressor, with the operator's choices.

        By default "low" and "high" are the smallest and the largest V at which requests run.

        Raises:
          ValueError: for a V that the model does not serve.
        """
        method, side, own = size.compressor, size.interface.side, int(size.visual_tokens)
        if not method.serves_several:
            for name, V in (("visual-tokens", default), ("low", low), ("high", high)):
                if V not in (None, own):
                    raise ValueError(f"--{name}={V}: {method.kind} of this model gives V={own} "
                                     "alone; leave it out")  # fmt: skip
            return cls((own,), own, own, own)
        supported = tuple(method.given(side))
        if method.selects:  # each V is a program, compiled at the start
            offered = {*method.planned(side), own, default, low, high}
            supported = tuple(v for v in supported if v in offered)
        buckets = [v for v in method.buckets(side) if v in supported] or list(supported)
        found = cls(
            supported,
            own if default is None else default,
            min(buckets) if low is None else low,
            max(buckets) if high is None else high,
        )
        for name, V in (("visual-tokens", found.default), ("low", found.low), ("high", found.high)):
            if V not in supported:
                raise ValueError(f"--{name}={V}: choose one of {listed(supported)}")
        if found.low > found.high:
            raise ValueError(f"--low={found.low} is more than --high={found.high}")
        return found

    @property
    def one(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.supported) == 1


def listed(values: Sequence[int]) -> str:
    """Numbers for a message; a range in place of many."""
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))
