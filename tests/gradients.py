# SPDX-License-Identifier: Apache-2.0
"""Loss and gradients of every compressor on meshes over several processes, into a file.

    python tests/gradients.py OUT.npz [--coordinator=HOST:PORT --processes=N --process=I]

tests/test_hosts_gradients.py compares them. The keys are CASE/MESH/NAME.
"""

import argparse
import functools

import jax
import numpy as np
import tiny
from flax import nnx

from vlm_jax import hosts, mesh
from vlm_jax.training.objective import next_token

CASES = {
    "none": dict(kind="none", tokens=16),
    "pool": dict(kind="pool", tokens=4),
    "downsample": dict(kind="downsample", tokens=4),
    "token_packer": dict(kind="token_packer", tokens=4),
    "quecc none": dict(kind="quecc", tokens=4, query="none"),
    "quecc separate": dict(kind="quecc", tokens=4, query="separate"),
    "quecc prefix": dict(kind="quecc", tokens=4, query="prefix"),
    "quecc pool": dict(kind="quecc", tokens=4, query="separate", downsample="pool"),
    "mqt": dict(kind="mqt", tokens=4, queries=16),
    "m3": dict(kind="m3", tokens=4, scales=(1, 4, 16)),
    "prumerge": dict(kind="prumerge", tokens=4),
    "prumerge of an image": dict(kind="prumerge", tokens=0),
    "prumerge_plus": dict(kind="prumerge_plus", tokens=5),
}
EVERY = ((8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2))
# A program is compiled for each: all meshes for one case, for the others those that cut weights.
FULL = "quecc separate"
CUTS = ((2, 2, 2), (1, 4, 2))


def meshes_of(case):
    """The meshes on which a case is computed, by the number of devices there are."""
    if jax.device_count() == 1:
        return ((1, 1, 1),)
    return EVERY if case == FULL else CUTS


def computed(case, shape):
    """Name -> loss, tokens and every gradient, whole."""
    c = tiny.config(compressor=CASES[case])
    if "prumerge" in case:
        c.vit.depth = 3
    with jax.set_mesh(mesh.make(*shape)) as now:
        model = tiny.created(c)
        # Encoder and all only where all meshes are; cached features otherwise.
        given = tiny.batch(c, levels=case != FULL and "prumerge" not in case)
        batch = mesh.spread(given, now or jax.sharding.get_mesh(), "batch")
        graph, state = nnx.split(model)

        @functools.partial(jax.jit)
        @jax.value_and_grad
        def loss(state, batch):
            sums = next_token(nnx.merge(graph, state), batch)
            return sums.nll / batch["loss_mask"].sum()

        value, grads = hosts.fetched(loss(state, batch))
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    found = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}
    return found | {"loss": value}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    hosts.join(given.coordinator, given.processes, given.process)
    jax.config.update("jax_default_matmul_precision", "highest")
    made = {}
    for case in CASES:
        for shape in meshes_of(case):
            text = "x".join(map(str, shape))
            made |= {f"{case}/{text}/{name}": x for name, x in computed(case, shape).items()}
    if hosts.is_writer():
        np.savez(given.out, **made)
    hosts.barrier("all is written")


if __name__ == "__main__":
    main()
