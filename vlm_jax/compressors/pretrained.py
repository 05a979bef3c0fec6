# SPDX-License-Identifier: Apache-2.0
"""Published weights, by their published names, to and from the parameters of a compressor."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from vlm_jax.compressors.compressor import Compressor


def shapes(module: Compressor) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the published tensors of `module`, which may be from `jax.eval_shape`."""
    parameters = dict(nnx.to_flat_state(nnx.state(module)))
    return {
        name: row.shape([row.item_shape(parameters[path].shape) for path in row.paths])
        for name, row in module.method.published().items()
    }


def load(module: Compressor, published: Mapping[str, np.ndarray]) -> Compressor:
    """`module` with every parameter from `published`, cast and sharded as in `module`.

    `module` may be abstract. Raises one ValueError that lists all missing tensors, surplus tensors
    and wrong shapes.
    """
    expected = shapes(module)
    problems = [f"missing {name}" for name in expected if name not in published]
    problems += [f"surplus {name}" for name in published if name not in expected]
    problems += [
        f"{name} has shape {tuple(published[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in published and tuple(published[name].shape) != shape
    ]
    if problems:
        raise ValueError(
            f"these tensors do not make this {type(module).__name__}: " + "; ".join(problems)
        )
    definition, state = nnx.split(module)
    parameters, stacked = dict(nnx.to_flat_state(state)), {}
    for name, row in module.method.published().items():
        current = [parameters[path] for path in row.paths]
        parts = row.split(
            np.asarray(published[name]), [row.item_shape(parameter.shape) for parameter in current]
        )
        for path, parameter, part in zip(row.paths, current, parts, strict=True):
            part = part.astype(parameter.dtype)
            if row.layer is not None:
                stacked.setdefault(path, {})[row.layer] = part
                if len(stacked[path]) < parameter.shape[row.axis]:
                    continue
                part = np.stack([x for _, x in sorted(stacked[path].items())], row.axis)
            parameters[path] = parameter.replace(jax.device_put(part, parameter.sharding.spec))
    return nnx.merge(definition, nnx.from_flat_state(parameters))


def export(module: Compressor) -> dict[str, np.ndarray]:
    """The published tensors of `module`, in the order of the published module."""
    parameters = dict(nnx.to_flat_state(nnx.state(module)))
    return {
        name: row.join([row.item(parameters[path][...]) for path in row.paths])
        for name, row in module.method.published().items()
    }
