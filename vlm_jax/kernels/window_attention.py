# SPDX-License-Identifier: Apache-2.0
"""Windowed cross-attention: one query per window over the keys and values of that window.

B batch  V windows  S keys of one window  N heads  H head size  E width of what is not projected
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax import mesh
from vlm_jax.kernels import absorbed_tpu, unprojected_tpu, window_tpu
from vlm_jax.mesh import platform

FORMS = ("pallas", "xla")


def form(kernels: str) -> str:
    """The form that `config.kernels` selects for the current mesh: "pallas" or "xla".

    The only place of this choice: "auto" is the Pallas kernels on a TPU and XLA elsewhere. Raises
    ValueError for unknown values, and for "pallas" without a TPU.
    """
    if kernels not in ("auto", *FORMS):
        raise ValueError(f"kernels={kernels!r}: choose one of {['auto', *FORMS]}")
    device = platform()
    if kernels == "pallas" and device != "tpu":
        raise ValueError(
            f"kernels='pallas' needs a TPU and the devices are of platform {device!r}: "
            "choose 'auto' or 'xla'"
        )
    return kernels if kernels != "auto" else "pallas" if device == "tpu" else "xla"


def window_attention(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S N H"],
    values: Float[Array, "B V S N H"],
    *,
    form: str,
) -> Float[Array, "B V N H"]:
    """Softmax attention inside every window, scores scaled by 1/sqrt(H) and softmax in float32."""
    if form == "pallas":
        patches = ("batch", "len", "len", "heads", "head")
        return _sharded(window_tpu.attend, ("batch", "len", "heads", "head"), patches)(
            query, keys, values
        )
    scores = jnp.einsum("BVNH,BVSNH->BVNS", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5).astype(values.dtype)
    return jnp.einsum("BVNS,BVSNH->BVNH", weights, values)


def absorbed_attention(
    query: Float[Array, "B V N E"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    *,
    scale: float,
    form: str,
) -> Float[Array, "B V N E"]:
    """`window_attention` with keys and values that all heads share, scores times `scale`."""
    if form == "pallas":
        patches = ("batch", "len", "len", "feature")
        return _sharded(
            lambda *x: absorbed_tpu.attend(*x, scale), ("batch", "len", "heads", "feature"), patches
        )(query, keys, values)
    scores = jnp.einsum("BVNE,BVSE->BVNS", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * scale).astype(values.dtype)
    return jnp.einsum("BVNS,BVSE->BVNE", weights, values)


def unprojected_attention(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    key_kernel: Float[Array, "E N H"],
    value_kernel: Float[Array, "E N H"],
    *,
    form: str,
) -> Float[Array, "B V N H"]:
    """`window_attention` to unprojected keys and values, without projecting every patch.

    Each head attends to the patches with W_k q and projects the result, W_v (weighted sum of
    patches).
    """
    if form == "pallas":
        patches = mesh.spec("batch", "len", "len", "feature")
        queries = mesh.spec("batch", "len", "heads", "head")
        weights = mesh.spec("heads", "none", "none")
        return jax.shard_map(
            unprojected_tpu.attend,
            in_specs=(queries, patches, patches, weights, weights),
            out_specs=queries,
            check_vma=False,
        )(
            query,
            keys,
            values,
            jax.sharding.reshard(key_kernel.transpose(1, 2, 0), weights),
            jax.sharding.reshard(value_kernel.transpose(1, 0, 2), weights),
        )
    full_query = jnp.einsum(
        "BVNH,ENH->BVNE",
        query,
        key_kernel,
        out_sharding=mesh.spec("batch", "len", "heads", "feature"),
    )
    mixed = absorbed_attention(full_query, keys, values, scale=query.shape[-1] ** -0.5, form=form)
    return jnp.einsum(
        "BVNE,ENH->BVNH",
        mixed,
        value_kernel,
        out_sharding=mesh.spec("batch", "len", "heads", "head"),
    )


def _sharded(attend, queries: tuple[str, ...], patches: tuple[str, ...]):
    """`attend` on the images and heads of each device: the compiler cannot partition a kernel."""
    queries, patches = mesh.spec(*queries), mesh.spec(*patches)
    return jax.shard_map(
        attend, in_specs=(queries, patches, patches), out_specs=queries, check_vma=False
    )
