# SPDX-License-Identifier: Apache-2.0
"""Loss and gradients of every compressor on meshes over several processes, into a file of each.

    python tests/gradients.py FOLDER [--case=NAME]...
        [--coordinator=HOST:PORT --processes=N --process=I]

tests/test_hosts_gradients.py compares them. The files are FOLDER/PROCESS.npz, the keys
CASE/MESH/NAME, and NaN is what only other processes have.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import processes
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
MESHES = ((8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2))
# With several processes, which trace every program: all meshes for one case, for the others those
# that cut weights both ways.
FULL = "quecc separate"
CUTS = ((2, 2, 2), (1, 4, 2))


def meshes_of(case, *, processes, devices):
    """The meshes on which a case is computed by so many processes, on so many devices in all."""
    if devices == 1:
        return ((1, 1, 1),)
    return MESHES if processes == 1 or case == FULL else CUTS


def compiled(function, *given):
    """The program of a function. Process 0 compiles it, the others read it from the cache of
    tests/conftest.py: compiling is most of what this costs."""
    lowered = jax.jit(function).lower(*given)
    if not hosts.is_writer():
        hosts.barrier("process 0 has compiled it")
        return lowered.compile()
    program = lowered.compile()
    hosts.barrier("process 0 has compiled it")
    return program


def here(x):
    """The parts of an array that this process has, in their places; NaN in all others."""
    found = np.full(x.shape, np.nan, x.dtype)
    for shard in x.addressable_shards:
        found[shard.index] = shard.data
    return found


def computed(case, shape):
    """Name -> loss and every gradient, as far as this process has them."""
    c = tiny.config(compressor=CASES[case])
    if "prumerge" in case:
        c.vit.depth = 3
    with jax.set_mesh(mesh.make(*shape)) as now:
        model = tiny.created(c)
        # The encoder is in the program where it must be, and of one other case.
        given = tiny.batch(c, levels=case != FULL and "prumerge" not in case)
        batch = mesh.spread(given, now or jax.sharding.get_mesh(), "batch")
        graph, state = nnx.split(model)

        @jax.value_and_grad
        def loss(state, batch):
            sums = next_token(nnx.merge(graph, state), batch)
            return sums.nll / batch["loss_mask"].sum()

        value, grads = compiled(loss, state, batch)(state, batch)
        flat, _ = jax.tree_util.tree_flatten_with_path(grads)
        found = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}
        return {name: here(x) for name, x in (found | {"loss": value}).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    hosts.join(given.coordinator, given.processes, given.process)
    jax.config.update("jax_default_matmul_precision", "highest")
    processes.share_programs()
    made, of_all = {}, dict(processes=jax.process_count(), devices=jax.device_count())
    for case in given.case or CASES:
        for shape in meshes_of(case, **of_all):
            text = "x".join(map(str, shape))
            made |= {f"{case}/{text}/{name}": x for name, x in computed(case, shape).items()}
    given.folder.mkdir(exist_ok=True)
    np.savez(given.folder / f"{jax.process_index()}.npz", **made)
    hosts.barrier("all is written")


if __name__ == "__main__":
    main()
