# SPDX-License-Identifier: Apache-2.0
"""Published weights under their published names, to and from the parameters of our modules.

A table has one row per published tensor: its name, the parameters of ours that it holds, and its
layout. torch writes a kernel as (outputs, inputs); ours have the inputs first and may cut either
into heads, so every conversion is one transpose and reshapes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from vlm_jax.compressors import (
    M3,
    MQT,
    AveragePool,
    Downsample,
    Projector,
    PruMerge,
    PruMergePlus,
    QueCC,
    TokenPacker,
)

Path = tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """One published tensor: the parameters of ours stacked in its rows, and its layout.

    `outputs` counts the trailing dimensions of our kernels that are outputs; 0 is for vectors.
    `square` is for a depthwise convolution, published as [E 1 K K] and kept as taps [K^2 E];
    `patches` for one that cuts an image, published as [E 3 K K] and kept as [K^2 x 3, E]; `ours`
    for a tensor that is published in our own layout. `layer` is its place in what is stacked in
    ours along `axis`: the blocks of a model, or kernels that share their input.
    """

    paths: tuple[Path, ...]
    outputs: int = 0
    square: bool = False
    patches: bool = False
    ours: bool = False
    layer: int | None = None
    axis: int = 0

    def one(self, shape: Sequence) -> tuple:
        """The shape (or the axes' names) of one of what is stacked, where it is."""
        return tuple(x for i, x in enumerate(shape) if self.layer is None or i != self.axis)

    def taken(self, ours: np.ndarray | jax.Array) -> np.ndarray:
        """The part of an array of ours that the tensor holds."""
        if self.layer is None:
            return np.asarray(ours)
        return np.asarray(ours[(slice(None),) * self.axis + (self.layer,)])

    def split(self, published: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Our arrays, from the published one."""
        if self.patches:
            return [published.transpose(2, 3, 1, 0).reshape(shapes[0])]
        parts = np.split(published, len(self.paths))
        if self.outputs:
            parts = [part.reshape(part.shape[0], -1).T for part in parts]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The published shape, from ours."""
        if self.ours:
            return shapes[0]
        if self.patches:
            side = math.isqrt(shapes[0][0] // 3)
            return (shapes[0][1], 3, side, side)
        if not self.outputs:
            return (sum(math.prod(shape) for shape in shapes),)
        inputs = math.prod(shapes[0][: -self.outputs])
        rows = sum(math.prod(shape[-self.outputs :]) for shape in shapes)
        return (rows, 1, math.isqrt(inputs), math.isqrt(inputs)) if self.square else (rows, inputs)

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        """The published array, from ours."""
        shapes = [part.shape for part in ours]
        if self.ours:
            return ours[0]
        if self.patches:
            width, _, side, _ = self.shape(shapes)
            return ours[0].reshape(side, side, 3, width).transpose(3, 2, 0, 1)
        if self.outputs:
            columns = [math.prod(shape[-self.outputs :]) for shape in shapes]
            ours = [part.reshape(-1, n).T for part, n in zip(ours, columns, strict=True)]
        return np.concatenate([part.reshape(len(part), -1) for part in ours]).reshape(
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
    """The tensors of the keys' or the values' MLP, whose first layers are one parameter of ours."""
    up, layer = ("keys_values", "up"), ("key", "value").index(part)
    return {
        f"{first}.weight": Tensor(((*up, "kernel"),), outputs=1, layer=layer, axis=1),
        f"{first}.bias": Tensor(((*up, "bias"),), layer=layer),
        **linear(second, "keys_values", part),
    }


LLAVA = mlp("0", "2", "projector")


def table(module: nnx.Module) -> Table:
    """The published tensors of a compressor, named after `mm_projector.`; MQT's, after
    `query_abstractor.`.

    Names: haotian-liu/LLaVA (c121f043), locuslab/llava-token-compression (bdedebdf),
    CircleRadon/TokenPacker (771a16e7), gordonhu608/MQT-LLaVA (92c35d06). `pool` and `m3` have
    LLaVA's own projector.
    """
    return TABLES[type(module)](module)


def quecc(module: QueCC) -> Table:
    """QueCC is the first of a sequence whose others are LLaVA's projector."""
    taps = {
        "0.q_downsample.weight": Tensor((("taps",),), outputs=1, square=True),
        "0.q_downsample.bias": Tensor((("taps_bias",),)),
    }
    text = linear("0.text_projection.0", "text") | norm("0.text_projection.1", "text_norm")
    paths = mlp("0.q_proj.0", "0.q_proj.2", "query") | norm("0.q_proj.3", "query_norm")
    for letter, part in (("k", "key"), ("v", "value")):
        paths |= joined_mlp(f"0.{letter}_proj.0", f"0.{letter}_proj.2", part)
        paths |= norm(f"0.{letter}_proj.3", f"{part}_norm")
    return (
        attention("0.clip_attn", "attention")
        | paths
        | (taps if module.taps is not None else {})
        | (text if module.reads_question else {})
        | mlp("1", "3", "projector")
    )


def token_packer(module: TokenPacker) -> Table:
    """TokenPacker is the whole `mm_projector`, its MLP included."""
    return (
        linear("q_proj_1", "query", bias=False)
        | joined_mlp("k_proj_1.0", "k_proj_1.2", "key")
        | joined_mlp("v_proj_1.0", "v_proj_1.2", "value")
        | norm("ln_q_1", "query_norm")
        | norm("ln_k_1", "key_norm")
        | norm("ln_v_1", "value_norm")
        | attention("clip_attn", "attention")
        | mlp("mlp.0", "mlp.2", "projector")
    )


def mqt(module: MQT) -> Table:
    """MQT multiplies by `proj` from the right: no transpose, and no bias."""
    del module
    ours = {"pos_embed": ("position",), "query": ("query",), "proj": ("projector", "kernel")}
    return (
        {name: Tensor((path,), ours=True) for name, path in ours.items()}
        | attention("attn", "attention")
        | norm("ln_q", "query_norm")
        | norm("ln_k", "key_norm")
        | norm("ln_v", "value_norm")
    )


TABLES: dict[type[nnx.Module], Callable[[nnx.Module], Table]] = {
    Projector: lambda module: LLAVA,
    AveragePool: lambda module: LLAVA,
    Downsample: lambda module: LLAVA,
    M3: lambda module: LLAVA,
    MQT: mqt,
    PruMerge: lambda module: LLAVA,
    PruMergePlus: lambda module: LLAVA,
    QueCC: quecc,
    TokenPacker: token_packer,
}


def shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The published tensors that `module` takes; it may be abstract (from `jax.eval_shape`)."""
    ours = dict(nnx.to_flat_state(nnx.state(module)))
    return {
        name: row.shape([row.one(ours[path].shape) for path in row.paths])
        for name, row in table(module).items()
    }


def load(module: nnx.Module, published: Mapping[str, np.ndarray]) -> nnx.Module:
    """`module` with every parameter taken from `published`, cast and sharded as it was
    (or would be) on the current mesh.

    `module` may be abstract. Missing tensors, surplus ones and wrong shapes are all listed in one
    ValueError.
    """
    wanted = shapes(module)
    complaints = [f"missing {name}" for name in wanted if name not in published]
    complaints += [f"surplus {name}" for name in published if name not in wanted]
    complaints += [
        f"{name} has shape {tuple(published[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in published and tuple(published[name].shape) != shape
    ]
    if complaints:
        raise ValueError(
            f"these tensors do not make this {type(module).__name__}: " + "; ".join(complaints)
        )
    definition, state = nnx.split(module)
    ours, stacked = dict(nnx.to_flat_state(state)), {}
    for name, row in table(module).items():
        olds = [ours[path] for path in row.paths]
        parts = row.split(np.asarray(published[name]), [row.one(old.shape) for old in olds])
        for path, old, part in zip(row.paths, olds, parts, strict=True):
            part = part.astype(old.dtype)
            if row.layer is not None:
                stacked.setdefault(path, {})[row.layer] = part
                if len(stacked[path]) < old.shape[row.axis]:
                    continue
                part = np.stack([x for _, x in sorted(stacked[path].items())], row.axis)
            ours[path] = old.replace(jax.device_put(part, old.sharding.spec))
    return nnx.merge(definition, nnx.from_flat_state(ours))


def export(module: nnx.Module) -> dict[str, np.ndarray]:
    """The published tensors of `module`, in the order of the published module."""
    ours = dict(nnx.to_flat_state(nnx.state(module)))
    return {
        name: row.join([row.taken(ours[path][...]) for path in row.paths])
        for name, row in table(module).items()
    }
