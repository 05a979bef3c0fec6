# SPDX-License-Identifier: Apache-2.0
"""TokenPacker: the downsampled last level asks, every window of all levels answers.

V visual tokens (`tokens`)  P patches  E vit width
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.elastic import Elastic
from vlm_jax.compressors.method import (
    LEVELS,
    Interface,
    Method,
    Products,
    keys_and_values_parameters,
    linear,
    projector_parameters,
    window_attention_flops,
)
from vlm_jax.compressors.tensors import Table, attention, joined_mlp, mlp, norm
from vlm_jax.compressors.tensors import linear as linear_tensors

HEADS = 8  # in the published code, at width 1024


@dataclass(frozen=True)
class TokenPackerMethod(Elastic):
    """Windowed cross-attention whose queries are the downsampled last level (arXiv 2407.02392)."""

    kind: ClassVar[str] = "token_packer"
    marks: ClassVar = ("q_proj_1.", "clip_attn.", "ln_q_1.")
    named_by: ClassVar = (
        ("mm_vision_token_compression_type", "token-packer"),
        ("mm_projector_type", "tokenpacker"),
    )
    checks_projector_type: ClassVar[bool] = False
    heads: int

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.token_packer.module import TokenPacker

        return TokenPacker

    def parameters(self, interface: Interface) -> int:
        width = interface.width
        query = width * width + 2 * width
        attend = 4 * linear(width, width)
        reader = keys_and_values_parameters(interface)
        return query + reader + attend + projector_parameters(interface)

    def products(self, interface: Interface, form: str) -> Products:
        V, P, square = self.tokens, interface.patches, interface.square
        read = 2 * P * interface.levels * square  # first layer of keys and of values
        write = 2 * P * square  # their second layer
        attend = window_attention_flops(V, interface, self.heads, form)
        return Products(
            reading=read + V * square,
            other=write + attend + V * (interface.up + interface.down),
        )

    def published(self) -> Table:
        """TokenPacker is the whole `mm_projector`, its MLP included.

        Names: CircleRadon/TokenPacker (771a16e7).
        """
        return (
            linear_tensors("q_proj_1", "query", bias=False)
            | joined_mlp("k_proj_1.0", "k_proj_1.2", "key")
            | joined_mlp("v_proj_1.0", "v_proj_1.2", "value")
            | norm("ln_q_1", "query_norm")
            | norm("ln_k_1", "key_norm")
            | norm("ln_v_1", "value_norm")
            | attention("clip_attn", "attention")
            | mlp("mlp.0", "mlp.2", "projector")
        )

    @classmethod
    def of_published(cls, llava: Any) -> tuple[Method, tuple[int, ...]]:
        """The field of the window's side was renamed, and before it had a name it was 2."""
        side = llava.side
        names = ("scale_factor", "down_rate", "token_packer_down_rate")
        name = next((n for n in names if llava.fields.get(n) is not None), names[0])
        factor = llava.whole(name, llava.fields.get(name, 2))
        if side % factor:
            raise ValueError(f"{name}={factor} does not divide the {side}x{side} grid of the tower")
        levels = llava.levels_of("k_proj_1.0.weight", LEVELS)
        return cls((side // factor) ** 2, llava.heads(cls.kind, HEADS)), levels
