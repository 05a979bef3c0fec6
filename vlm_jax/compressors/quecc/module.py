# SPDX-License-Identifier: Apache-2.0
"""QueCC: queries from patches and question attend to windows of patches (arXiv 2411.03312).

B batch  P patches, window-major (raster if it is elastic)  V visual tokens
W patches under one convolution window  Z = levels x E  E vit width  D llm width
"""

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlm_jax import cpu, mesh
from vlm_jax.compressors.method import Interface, window_side
from vlm_jax.compressors.projector import MLP, KeysAndValues
from vlm_jax.compressors.quecc import QueCCMethod
from vlm_jax.compressors.window import WindowAttention, window_order, windows
from vlm_jax.compressors.windowed import Windowed
from vlm_jax.layers import LayerNorm, Linear, uniform, weight

EPS = 1e-6  # of every LayerNorm here, as published


class QueCC(Windowed):
    """Windowed cross-attention whose queries are a depthwise convolution of patches plus question.

    The question's feature (last token, after the LLM's final norm) is projected and added to every
    patch of the last level; an MLP, a norm and a strided depthwise convolution make one query per
    window; keys and values come from all levels. `query` is the source of the feature: "separate",
    a pass of the LLM over the question alone (published); "prefix", the LLM's own pass over the
    text before the image; "none" leaves the question out and has no weights for it.

    `kernel` and `stride` of the convolution are the window's side by default; the attention's
    windows always tile the grid. `downsample="pool"` replaces the convolution by the mean of each
    window, without weights: not published, it shows what the convolution contributes.

    Source: `mm_projector` type quecc of locuslab/llava-token-compression at bdedebdf.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.quecc import QueCCMethod
        >>> method = QueCCMethod(tokens=4, heads=4, query="separate")
        >>> between = Interface(side=12, width=32, levels=2, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     quecc, levels = method.build(between, rngs=nnx.Rngs(0)), jnp.ones((2, 144, 64))
        ...     jax.jit(lambda m, *x: m(*x))(quecc, levels, jnp.ones((2, 64))).shape
        (2, 4, 64)
        >>> quecc.window
        6
    """

    def __init__(
        self,
        method: QueCCMethod,
        interface: Interface,
        *,
        rngs: nnx.Rngs,
        kernels: str = "auto",
        kernel: int | None = None,
        stride: int | None = None,
    ):
        super().__init__(method, interface)
        conv = method.downsample == "conv"
        if not conv and (kernel or stride):
            raise ValueError(
                f"quecc: kernel={kernel} and stride={stride} are the convolution's, and "
                "downsample='pool' has none: leave both out, or choose downsample='conv'"
            )
        tokens, side, width = self.tokens, interface.side, interface.width
        llm_width = interface.llm_width
        span = window_side(tokens, side)
        self.kernel, self.stride = kernel or span, stride or span
        if conv:
            check_convolution(side, self.kernel, self.stride, tokens)
        self.text = (
            Linear(
                "BD,DE->BE",
                (llm_width, width),
                dims=("embed", "none"),
                out=("batch", "feature"),
                rngs=rngs,
            )
            if self.reads_question
            else None
        )
        self.text_norm = LayerNorm(width, eps=EPS, rngs=rngs) if self.reads_question else None
        self.query = MLP(width, width, width, rngs=rngs)
        self.query_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        # torch's default for a depthwise convolution: U(+-1/kernel), one row of taps per offset.
        init, taps = uniform(1 / self.kernel), (self.kernel**2, width)
        self.taps = weight(rngs, taps, ("none", "none"), init) if conv else None
        self.taps_bias = weight(rngs, (width,), ("none",), init) if conv else None
        self.keys_values = KeysAndValues(interface.levels * width, width, rngs=rngs)
        self.key_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.value_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.attention = WindowAttention(
            width,
            method.heads,
            tokens=tokens,
            patches=interface.patches,
            kernels=kernels,
            rngs=rngs,
        )
        self.projector = MLP(width, llm_width, llm_width, rngs=rngs)

    def __call__(
        self,
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V D"]:
        """One visual token per window, windows in raster order."""
        levels = self.window_major(levels)
        return self.projector(self.compress(levels[..., -self.width :], levels, question))

    def compress(
        self,
        feature: Float[Array, "B P E"],
        levels: Float[Array, "B P Z"],
        question: Float[Array, "B D"] | None = None,
    ) -> Float[Array, "B V E"]:
        """The visual tokens before the projector, from the query's feature and the keys' levels."""
        text = None
        if self.reads_question:
            if question is None:
                raise ValueError(
                    "this QueCC reads the question: pass its feature [B D], "
                    "or build with query='none'"
                )
            text = self.text_norm(self.text(question.astype(feature.dtype)))
        query = self.downsample(self.query_norm(self.query(feature, text)))
        keys, values = self.keys_values(levels)
        return self.attention(query, self.key_norm(keys), self.value_norm(values))

    def downsample(self, x: Float[Array, "B P E"]) -> Float[Array, "B V E"]:
        """The strided depthwise convolution, as a weighted sum over the patches under each.

        Without taps, the mean of each window.
        """
        if self.taps is None:
            return windows(x, self.tokens).mean(2)
        if self.kernel == self.stride == self.window:
            under = windows(x, self.tokens)
        else:
            index = fields(self.side, self.window, self.kernel, self.stride)
            under = x.at[:, index].get(out_sharding=mesh.spec("batch", "len", "len", "feature"))
        taps, bias = self.taps[...].astype(x.dtype), self.taps_bias[...].astype(x.dtype)
        return cpu.sum_of_windows(under * taps) + bias


def check_convolution(side: int, kernel: int, stride: int, tokens: int) -> None:
    """Raises ValueError unless an unpadded convolution gives `tokens` outputs on the grid."""
    outputs = (side - kernel) // stride + 1 if 1 <= kernel <= side and stride >= 1 else 0
    if outputs**2 != tokens:
        raise ValueError(
            f"quecc: kernel={kernel} with stride={stride} gives {outputs}x{outputs} queries on a "
            f"{side}x{side} patch grid, not {tokens}: leave both out, or choose them such that "
            f"(({side} - kernel) // stride + 1)^2 = {tokens}"
        )


def fields(side: int, window: int, kernel: int, stride: int) -> np.ndarray:
    """Window-major index of each patch under each output of the convolution, int [V kernel^2]."""
    position = np.argsort(window_order(side, window)).reshape(side, side)
    covered = np.lib.stride_tricks.sliding_window_view(position, (kernel, kernel))[
        ::stride, ::stride
    ]
    return covered.reshape(-1, kernel**2)
