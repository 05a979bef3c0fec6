# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP towers: pixels to the outputs of chosen blocks, patches in window-major order.

B batch  P patches  S = P + 1 (class token first; without one S = P)  E vit width  F mlp width
N heads  H head size
C = 3 patch_size^2 numbers of one patch  I = image side in pixels
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from vlm_jax import mesh
from vlm_jax.compressors.window import check_window, window_order
from vlm_jax.layers import ACTIVATIONS, LayerNorm, Linear, layer, normal, remat, stack, weight
from vlm_jax.models.sizes import ViTSize

HIDDEN = ("batch", "len", "feature")


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens, every projection with a bias."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        size = width // heads
        inward = dict(dims=("embed", "heads", "head"), out=("batch", "len", "heads", "head"))
        self.query = Linear("BSE,ENH->BSNH", (width, heads, size), rngs=rngs, **inward)
        self.key = Linear("BSE,ENH->BSNH", (width, heads, size), rngs=rngs, **inward)
        self.value = Linear("BSE,ENH->BSNH", (width, heads, size), rngs=rngs, **inward)
        self.out = Linear(
            "BSNH,NHE->BSE",
            (heads, size, width),
            rngs=rngs,
            dims=("heads", "head", "embed"),
            out=HIDDEN,
        )

    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        query = self.query(x)
        scores = jnp.einsum(
            "BTNH,BSNH->BNTS", query, self.key(x), preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5).astype(x.dtype)
        return self.out(jnp.einsum("BNTS,BSNH->BTNH", weights, self.value(x)))

    def keys(self, x: Float[Array, "B S E"]) -> tuple[Float[Array, "B S E"], Float[Array, "B E"]]:
        """The keys of all tokens and the query of the first, their heads side by side."""
        flat = mesh.spec("batch", "len", "feature")
        keys, query = self.key(x), self.query(x[:, :1])
        # Heads may be on several devices: each needs all of them to compare whole keys.
        keys, query = (
            jnp.reshape(
                jax.sharding.reshard(y, mesh.spec("batch", "len", "none", "none")),
                (*y.shape[:2], x.shape[2]),
                out_sharding=flat,
            )
            for y in (keys, query)
        )
        return keys, query[:, 0]


class Block(nnx.Module):
    """One pre-norm block: attention, then an MLP with the activation that is named."""

    def __init__(
        self, width: int, mlp: int, heads: int, *, eps: float, activation: str, rngs: nnx.Rngs
    ):
        self.activation = activation
        self.norm1 = LayerNorm(width, eps=eps, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps, rngs=rngs)
        self.up = Linear(
            "BSE,EF->BSF",
            (width, mlp),
            dims=("embed", "mlp"),
            out=("batch", "len", "mlp"),
            rngs=rngs,
        )
        self.down = Linear(
            "BSF,FE->BSE", (mlp, width), dims=("mlp", "embed"), out=HIDDEN, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        with jax.named_scope("attention"):
            x = x + self.attention(self.norm1(x))
        with jax.named_scope("mlp"):
            return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class ViT(nnx.Module):
    """CLIP's or SigLIP's vision tower, without the blocks after the last requested level.

    Levels are counted from 1 as in HF's `hidden_states`: level b is the output of block b, without
    a final norm unless `final_norm` asks for it. Architectures: arXiv 2103.00020 and
    openai/clip-vit-large-patch14-336; arXiv 2303.15343 and google/siglip-so400m-patch14-384, which
    has neither class token nor first norm, and whose last pixels no patch covers (`cut_border`).
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        rngs: nnx.Rngs,
        remat_policy: str = "none",
        dtype: str = "float32",
    ):
        if size.activation not in ACTIVATIONS:
            raise ValueError(
                f"vit.activation={size.activation!r}: choose one of {sorted(ACTIVATIONS)}"
            )
        self.size, self.remat_policy, self.dtype = size, remat_policy, dtype
        width, eps = size.width, size.norm_eps
        std = width**-0.5
        self.patch = Linear(
            "BPC,CE->BPE",
            (3 * size.patch_size**2, width),
            dims=("none", "embed"),
            out=HIDDEN,
            bias=size.patch_bias,
            rngs=rngs,
        )
        self.class_token = (
            weight(rngs, (width,), ("none",), normal(std)) if size.class_token else None
        )
        rows = size.first + size.patches
        self.position = weight(rngs, (rows, width), ("none", "none"), normal(std))
        self.pre_norm = LayerNorm(width, eps=eps, rngs=rngs) if size.pre_norm else None
        self.blocks = stack(
            lambda r: Block(
                width, size.mlp, size.heads, eps=eps, activation=size.activation, rngs=r
            ),
            size.depth,
            rngs,
        )
        # Always present, though only used by `final_norm`: a tower converts back whole.
        self.post_norm = LayerNorm(width, eps=eps, rngs=rngs)

    def __call__(
        self,
        pixels: Float[Array, "B I I 3"],
        *,
        window: int = 1,
        shrink: int = 1,
        keys: bool = False,
    ) -> Float[Array, "B P Y"]:
        """The levels of every patch, concatenated over channels (Y = Z = levels x E); the class
        token is dropped, or with `keep_class` comes before them (P is then one more).

        Patches come window by window (windows of `window` x `window` patches, raster inside and
        over windows); `window=1` is raster order. The transformer does not depend on it: only the
        split of the image and the rows of the position table follow the order.

        `shrink` makes the image that many times smaller on each side, and takes the position table
        at the center of the area that each larger patch covers. `keys` adds what PruMerge reads
        from the block after the last level: the key of each patch (E channels), and the class
        token's attention to it, out of a softmax over all patches and the class token (Y = Z + E +
        1, all in float32). ValueError if that block or that shrinking does not exist.
        """
        size, whole = self.size, self.size.side
        order = window_order(whole // self.check_shrink(shrink), window)
        covered = whole * size.patch_size
        x = shrunk(pixels[:, :covered, :covered].astype(self.dtype), shrink)
        x = self.patch(patchify(x, size.patch_size, window))
        position = self.position[...].astype(x.dtype)
        x = x + middles(position[size.first :], whole, shrink)[order]
        if self.class_token is not None:
            first = jnp.broadcast_to(
                self.class_token[...].astype(x.dtype) + position[0],
                (x.shape[0], 1, x.shape[2]),
                out_sharding=mesh.spec("batch", "len", "feature"),
            )
            x = jnp.concatenate([first, x], axis=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        step = remat(self.remat_policy)(lambda x, block: (block(x), None))
        kept = []
        for start, stop in itertools.pairwise((0, *size.levels)):
            blocks = jax.tree.map(lambda w, a=start, b=stop: w[a:b], self.blocks)
            x, _ = lax.scan(step, x, blocks)
            kept.append(x[:, size.first - size.kept :])
        if size.final_norm:
            kept[-1] = self.post_norm(kept[-1])
        if not keys:
            return jnp.concatenate(kept, axis=-1)
        size.check_keys()
        # In float32: otherwise rounding would decide between nearly equal patches.
        next_block = layer(self.blocks, size.levels[-1])
        patch_keys, query = next_block.attention.keys(next_block.norm1(x.astype(jnp.float32)))
        attention = class_attention(query, patch_keys)[..., None]
        kept = [y.astype(jnp.float32) for y in kept]
        return jnp.concatenate([*kept, patch_keys[:, 1:], attention], axis=-1)

    def order(self, window: int, shrink: int = 1) -> np.ndarray:
        """For each row of a level in window-major order, its row in raster order, int [P]."""
        order = window_order(self.size.side // self.check_shrink(shrink), window)
        return np.concatenate([np.arange(self.size.kept), self.size.kept + order])

    def check_shrink(self, shrink: int) -> int:
        """`shrink`; raises unless the patches of the shrunk image tile it."""
        side = self.size.side
        if shrink < 1 or side % shrink:
            raise ValueError(
                f"an image of {side}x{side} patches cannot be shrunk {shrink} times: "
                f"choose one of {[k for k in range(1, side + 1) if side % k == 0]}"
            )
        return shrink


def class_attention(
    query: Float[Array, "B E"], keys: Float[Array, "B S E"]
) -> Float[Array, "B S-1"]:
    """How much the class token attends to each patch, all heads as one, in float32.

    The first of `keys` is the class token's: it counts in the softmax and is left out of the
    result. Only the class token's row of scores is computed. As published for PruMerge
    (arXiv 2403.15388).
    """
    scores = jnp.einsum(
        "BE,BSE->BS",
        query,
        keys,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jax.nn.softmax(scores * query.shape[-1] ** -0.5)[:, 1:]


def shrunk(pixels: Float[Array, "B I I 3"], times: int) -> Float[Array, "B J J 3"]:
    """The mean of each `times` x `times` square of pixels."""
    if times == 1:
        return pixels
    batch, side = pixels.shape[0], pixels.shape[1] // times
    cut = mesh.spec("batch", *["len"] * 4, "none")
    x = jnp.reshape(pixels, (batch, side, times, side, times, 3), out_sharding=cut)
    return x.mean((2, 4))


def middles(table: Float[Array, "P E"], side: int, times: int) -> Float[Array, "R E"]:
    """Bilinear interpolation of a raster table at the middle of each `times` x `times` square.

    One row where `times` is odd, the mean of the middle four where it is even.
    """
    if times == 1:
        return table
    grid = table.reshape(side // times, times, side // times, times, -1)
    middle = slice((times - 1) // 2, times // 2 + 1)
    return grid[:, middle, :, middle].mean((1, 3)).reshape((side // times) ** 2, -1)


def patchify(pixels: Float[Array, "B I I 3"], patch: int, window: int = 1) -> Float[Array, "B P C"]:
    """Patches as rows of numbers (y, x, color), in window-major order; a reshape and one
    transpose."""
    batch, side = pixels.shape[0], pixels.shape[1] // patch
    check_window(side, window)
    n = side // window
    cut = mesh.spec("batch", *["len"] * 6, "none")
    x = jnp.reshape(pixels, (batch, n, window, patch, n, window, patch, 3), out_sharding=cut)
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return jnp.reshape(
        x, (batch, side**2, 3 * patch**2), out_sharding=mesh.spec("batch", "len", "none")
    )
