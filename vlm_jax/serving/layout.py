# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a row the caches of each layer hold, where a model leaves some out.

V visual tokens of an image
"""

from dataclasses import dataclass

from vlm_jax.models.vlm import VLM


@dataclass(frozen=True)
class Layout:
    """The caches of a model's layers, beside those of the layers that hold fewest tokens of a row.

    Attributes:
      more: slots that each layer has besides: it holds tokens that later layers have left out.
      kept: visual tokens of an image that all layers hold, at most; None: all that were read.
      runs: runs of layers that have left out the same tokens; 0 for a model that leaves out none.
    """

    more: tuple[int, ...]
    kept: int | None = None
    runs: int = 0

    @classmethod
    def of(cls, model: VLM, visual_tokens: int) -> "Layout":
        """That of a model of which an image has `visual_tokens` at most."""
        llm, method = model.llm, model.compressor.method
        if llm.pruning is None:
            none = (0,) * llm.depth
            return cls(none, int(method.tokens), 1) if method.summarizes else cls(none)
        runs = llm.pruning.runs(llm.depth, visual_tokens)
        fewest = int(runs[-1].tokens)
        more = (
            0 if llm.pruning.forgets else int(run.tokens) - fewest
            for run in runs
            for _ in range(run.first, run.end)
        )
        return cls(tuple(more), fewest, len(runs))

    def held(self, visual_tokens: int) -> int:
        """Of so many visual tokens, those that every layer holds."""
        return visual_tokens if self.kept is None else min(visual_tokens, self.kept)
