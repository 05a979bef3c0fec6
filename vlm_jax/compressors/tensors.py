# SPDX-License-Identifier: Apache-2.0
"""Published tensors: their names, the parameters of this package they hold, and their layout.

A table has one row per published tensor. torch stores a kernel as (outputs, inputs); kernels here
have the inputs first and may split either into heads, so a conversion is a transpose and reshapes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Path = tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """One published tensor: the parameters of this package stacked in its rows, and its layout.

    Attributes:
      paths: the parameters that it holds.
      outputs: number of trailing dimensions of the parameters that are outputs; 0 for vectors.
      square: a depthwise convolution, published as [E 1 K K] and kept as taps [K^2 E].
      patches: a convolution that cuts an image into patches, published as [E 3 K K] and kept as
        [K^2 x 3, E].
      unchanged: published in the layout of the parameter.
      layer: its index in a parameter that is stacked along `axis` (blocks of a model, or kernels
        that share their input); None if it is not stacked.
    """

    paths: tuple[Path, ...]
    outputs: int = 0
    square: bool = False
    patches: bool = False
    unchanged: bool = False
    layer: int | None = None
    axis: int = 0

    def item_shape(self, shape: Sequence) -> tuple:
        """The shape (or the axes' names) of one item of a stacked parameter."""
        return tuple(x for i, x in enumerate(shape) if self.layer is None or i != self.axis)

    def item(self, parameter: Any) -> np.ndarray:
        """The part of a parameter, a numpy or JAX array, that the tensor holds."""
        if self.layer is None:
            return np.asarray(parameter)
        return np.asarray(parameter[(slice(None),) * self.axis + (self.layer,)])

    def split(self, published: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """The parameters in a published array, of these `shapes`."""
        if self.patches:
            return [published.transpose(2, 3, 1, 0).reshape(shapes[0])]
        parts = np.split(published, len(self.paths))
        if self.outputs:
            parts = [part.reshape(part.shape[0], -1).T for part in parts]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The published shape for parameters of these `shapes`."""
        if self.unchanged:
            return shapes[0]
        if self.patches:
            side = math.isqrt(shapes[0][0] // 3)
            return (shapes[0][1], 3, side, side)
        if not self.outputs:
            return (sum(math.prod(shape) for shape in shapes),)
        inputs = math.prod(shapes[0][: -self.outputs])
        rows = sum(math.prod(shape[-self.outputs :]) for shape in shapes)
        return (rows, 1, math.isqrt(inputs), math.isqrt(inputs)) if self.square else (rows, inputs)

    def join(self, parameters: list[np.ndarray]) -> np.ndarray:
        """The published array of these parameters."""
        shapes = [part.shape for part in parameters]
        if self.unchanged:
            return parameters[0]
        if self.patches:
            width, _, side, _ = self.shape(shapes)
            return parameters[0].reshape(side, side, 3, width).transpose(3, 2, 0, 1)
        if self.outputs:
            columns = [math.prod(shape[-self.outputs :]) for shape in shapes]
            parameters = [
                part.reshape(-1, n).T for part, n in zip(parameters, columns, strict=True)
            ]
        return np.concatenate([part.reshape(len(part), -1) for part in parameters]).reshape(
            self.shape(shapes)
        )


Table = dict[str, Tensor]


def linear(name: str, *path: str, bias: bool = True, outputs: int = 1) -> Table:
    """The tensors of one linear layer."""
    kernel = {f"{name}.weight": Tensor(((*path, "kernel"),), outputs=outputs)}
    return kernel | ({f"{name}.bias": Tensor(((*path, "bias"),))} if bias else {})


def norm(name: str, *path: str) -> Table:
    """The tensors of one LayerNorm."""
    return {
        f"{name}.weight": Tensor(((*path, "scale"),)),
        f"{name}.bias": Tensor(((*path, "bias"),)),
    }


def attention(name: str, *path: str) -> Table:
    """The tensors of torch's MultiheadAttention: query, key and value stacked in that order."""
    inward = [(*path, part) for part in ("query", "key", "value")]
    return {
        f"{name}.in_proj_weight": Tensor(tuple((*p, "kernel") for p in inward), outputs=2),
        f"{name}.in_proj_bias": Tensor(tuple((*p, "bias") for p in inward)),
        **linear(f"{name}.out_proj", *path, "out"),
    }


def mlp(first: str, second: str, *path: str) -> Table:
    """The tensors of a two-layer MLP."""
    return linear(first, *path, "up") | linear(second, *path, "down")


def joined_mlp(first: str, second: str, part: str) -> Table:
    """The tensors of the keys' or the values' MLP, whose first layers are one parameter."""
    up, layer = ("keys_values", "up"), ("key", "value").index(part)
    return {
        f"{first}.weight": Tensor(((*up, "kernel"),), outputs=1, layer=layer, axis=1),
        f"{first}.bias": Tensor(((*up, "bias"),), layer=layer),
        **linear(second, "keys_values", part),
    }


# Names of haotian-liu/LLaVA (c121f043); `pool` and `m3` have them too.
LLAVA = mlp("0", "2", "projector")

# One block of HF's CLIP and SigLIP towers, of images and of texts (`layers.Block`).
CLIP_BLOCK = {
    **linear("self_attn.q_proj", "attention", "query", outputs=2),
    **linear("self_attn.k_proj", "attention", "key", outputs=2),
    **linear("self_attn.v_proj", "attention", "value", outputs=2),
    **linear("self_attn.out_proj", "attention", "out"),
    **norm("layer_norm1", "norm1"),
    **norm("layer_norm2", "norm2"),
    **linear("mlp.fc1", "up"),
    **linear("mlp.fc2", "down"),
}


def stacked(prefix: str, layer: int, block: Table, *path: str) -> Table:
    """The table of one block, as layer `layer` of a stack called `blocks` at `path`."""
    return {
        prefix + name: Tensor(
            tuple((*path, "blocks", *of) for of in row.paths), outputs=row.outputs, layer=layer
        )
        for name, row in block.items()
    }
