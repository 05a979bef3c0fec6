# SPDX-License-Identifier: Apache-2.0
"""Published weights under their published names, to and from the parameters of a compressor."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from vlm_jax.compressors.compressor import Compressor


def shapes(module: Compressor) -> dict[str, tuple[int, ...]]:
    """The published tensors that `module` takes; it may be abstract (from `jax.eval_shape`)."""
    ours = dict(nnx.to_flat_state(nnx.state(module)))
    return {
        name: row.shape([row.one(ours[path].shape) for path in row.paths])
        for name, row in module.method.published().items()
    }


def load(module: Compressor, published: Mapping[str, np.ndarray]) -> Compressor:
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
    for name, row in module.method.published().items():
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


def export(module: Compressor) -> dict[str, np.ndarray]:
    """The published tensors of `module`, in the order of the published module."""
    ours = dict(nnx.to_flat_state(nnx.state(module)))
    return {
        name: row.join([row.taken(ours[path][...]) for path in row.paths])
        for name, row in module.method.published().items()
    }
