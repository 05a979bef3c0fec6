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
from jaxtyping import Array, Float, Shaped

from vlm_jax import mesh
from vlm_jax.compressors.hashing import halves, image_ids
from vlm_jax.compressors.window import check_window, window_order
from vlm_jax.layers import (
    ACTIVATIONS,
    Block,
    LayerNorm,
    Linear,
    layer,
    normal,
    remat,
    stack,
    weight,
)
from vlm_jax.models.sizes import ViTSize

HIDDEN = ("batch", "len", "feature")
# What `reads` asks about the block whose output is the last level.
OWN_BLOCK = ("own_attention", "own_keys")


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
        reads: str = "",
        sizes: Shaped[Array, "B 2"] | None = None,
    ) -> Float[Array, "B P Y"]:
        """The levels of every patch, concatenated over channels (Y = Z = levels x E); the class
        token is dropped, or with `keep_class` comes before them (P is then one more).

        Patches come window by window (windows of `window` x `window` patches, raster inside and
        over windows); `window=1` is raster order. The transformer does not depend on it: only the
        split of the image and the rows of the position table follow the order.

        `shrink` makes the image that many times smaller on each side, and takes the position table
        at the center of the area that each larger patch covers. ValueError if it does not exist.

        `reads` adds channels behind those of the levels, and makes all float32; ValueError for what
        the encoder does not have:
          "keys", from the block after the last level: the key of each patch (E channels), and the
            class token's attention to it, out of a softmax over all patches and the class token.
          "own_attention", from the block whose output is the last level: that attention, the mean
            over the heads (1 channel).
          "own_keys": the class token as a row before the patches; from the same block the mean of a
            row's keys over the heads (H channels) and that attention (1).
          "image_id": a number from the pixels of each image, as two halves (2 channels).
          "image_size": `sizes`, each image's width and height before it was padded (2 channels).
        """
        size, whole = self.size, self.size.side
        size.check_reads(reads)
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
        # What the last level's block reads is kept for those that ask about its attention.
        stops = {*size.levels} | ({size.levels[-1] - 1} if reads in OWN_BLOCK else set())
        kept, before = [], x
        for start, stop in itertools.pairwise(sorted({0} | stops)):
            before = x
            blocks = jax.tree.map(lambda w, a=start, b=stop: w[a:b], self.blocks)
            x, _ = lax.scan(step, x, blocks)
            if stop in size.levels:
                kept.append(x[:, size.first - size.rows_before(reads) :])
        if size.final_norm:
            kept[-1] = self.post_norm(kept[-1])
        if not reads:
            return jnp.concatenate(kept, axis=-1)
        if reads in ("image_id", "image_size"):
            if reads == "image_size" and sizes is None:
                raise ValueError('reads="image_size" needs the images\' sizes')
            numbers = halves(image_ids(pixels)) if reads == "image_id" else sizes
            rows = (*kept[-1].shape[:2], 2)
            numbers = jax.sharding.reshard(numbers.astype(jnp.float32), mesh.spec("batch"))
            more = jnp.broadcast_to(numbers[:, None], rows)
        else:
            more = self.attended(before if reads in OWN_BLOCK else x, reads)
        return jnp.concatenate([*(y.astype(jnp.float32) for y in kept), more], axis=-1)

    def attended(self, x: Float[Array, "B S E"], reads: str) -> Float[Array, "B R Y"]:
        """The channels that `reads` adds, from the input of the block that it asks about."""
        own = reads in OWN_BLOCK
        block = layer(self.blocks, self.size.levels[-1] - own)
        # In float32: otherwise rounding would decide between nearly equal patches.
        keys, query = block.attention.keys(block.norm1(x.astype(jnp.float32)))
        if not own:
            return jnp.concatenate([keys[:, 1:], class_attention(query, keys)[..., None]], axis=-1)
        attention = head_attention(query, keys, self.size.heads)[..., None]
        if reads == "own_attention":
            return attention
        heads = (*keys.shape[:2], self.size.heads, -1)
        means = jnp.reshape(keys, heads, out_sharding=mesh.spec("batch", *["none"] * 3)).mean(2)
        # The class token's attention to itself is not read.
        return jnp.concatenate([means, jnp.pad(attention, ((0, 0), (1, 0), (0, 0)))], axis=-1)

    def order(self, window: int, shrink: int = 1, reads: str = "") -> np.ndarray:
        """For each row of a level in window-major order, its row in raster order, int [P]."""
        order = window_order(self.size.side // self.check_shrink(shrink), window)
        before = self.size.rows_before(reads)
        return np.concatenate([np.arange(before), before + order])

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


def head_attention(
    query: Float[Array, "B E"], keys: Float[Array, "B S E"], heads: int
) -> Float[Array, "B S-1"]:
    """How much the class token attends to each patch, the mean over the heads, in float32.

    The first of `keys` is the class token's, as for `class_attention`. Published VisionZip
    (arXiv 2412.04467) adds the heads, which ranks the patches alike; VisPruner (arXiv 2412.01818)
    averages them.
    """
    batch, tokens, width = keys.shape
    whole = mesh.spec("batch", "none", "none", "none")
    scores = jnp.einsum(
        "BNH,BSNH->BNS",
        jnp.reshape(query, (batch, heads, width // heads), out_sharding=mesh.spec("batch")),
        jnp.reshape(keys, (batch, tokens, heads, width // heads), out_sharding=whole),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jax.nn.softmax(scores * (width // heads) ** -0.5).mean(1)[:, 1:]


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
