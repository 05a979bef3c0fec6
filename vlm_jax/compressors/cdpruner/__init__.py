# SPDX-License-Identifier: Apache-2.0
"""CDPruner: patches that differ from each other, weighted by the question.

V visual tokens (`tokens`)  P patches  E vit width  D llm width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Number, linear, projector_parameters
from vlm_jax.compressors.selection import Selection, pairs_flops
from vlm_jax.compressors.tensors import CLIP_BLOCK, Table, Tensor, norm, stacked
from vlm_jax.compressors.tensors import linear as linear_tensors

MLP = 4  # times the width of every CLIP's text tower


@dataclass(frozen=True)
class CDPrunerMethod(Selection):
    """A determinantal point process over the patches, weighted by CLIP's text tower (2506.10967).

    The fields are the sizes of that tower, of openai/clip-vit-large-patch14-336 by default.
    """

    kind: ClassVar[str] = "cdpruner"
    query = "clip"
    projected: ClassVar[bool] = False
    clip: ClassVar[bool] = True
    projects_all: ClassVar[bool] = True
    clip_width: int = 768  # of the space in which images and texts are compared
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_vocab: int = 49408
    text_length: int = 77

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.cdpruner.module import CDPruner

        return CDPruner

    def parameters(self, interface: Interface) -> int:
        width, between = self.text_width, self.clip_width
        mlp = linear(width, MLP * width) + linear(MLP * width, width)
        block = 4 * linear(width, width) + mlp + 4 * width
        tables = (self.text_vocab + self.text_length) * width
        tower = tables + self.text_depth * block + 2 * width + width * between
        image = 2 * interface.width + interface.width * between
        return projector_parameters(interface) + tower + image

    def choice(self, interface: Interface) -> Number:
        """Similarities of the patches, the way of patches and question into CLIP's space, and V
        steps of a Cholesky factorization."""
        P, between = interface.patches, self.clip_width
        alike = pairs_flops(P, interface.llm_width)
        image = 2 * P * interface.width * between + 2 * P * between
        return alike + image + self.text_flops + 2 * self.tokens**2 * P

    @property
    def text_flops(self) -> int:
        """FLOPs of the text tower over one question of all its places."""
        T, width = self.text_length, self.text_width
        block = 2 * T * (4 + 2 * MLP) * width**2 + 4 * T**2 * width
        return self.text_depth * block + 2 * width * self.clip_width

    def published(self) -> Table:
        """LLaVA's projector, and the tensors of HF's CLIPModel that it reads."""
        embeddings, encoder = "text_model.embeddings.", "text_model.encoder.layers."
        blocks = (
            stacked(f"{encoder}{k}.", k, CLIP_BLOCK, "clip", "text") for k in range(self.text_depth)
        )
        return (
            super().published()
            | norm("post_layernorm", "clip", "norm")
            | linear_tensors("visual_projection", "clip", "image", bias=False)
            | {
                f"{embeddings}token_embedding.weight": Tensor(
                    (("clip", "text", "words"),), unchanged=True
                ),
                f"{embeddings}position_embedding.weight": Tensor(
                    (("clip", "text", "position"),), unchanged=True
                ),
            }
            | {name: row for table in blocks for name, row in table.items()}
            | norm("text_model.final_layer_norm", "clip", "text", "norm")
            | linear_tensors("text_projection", "clip", "text", "out", bias=False)
        )
