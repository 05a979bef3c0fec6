# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler makes of the window-attention kernels and of what they replace.

    python benchmarks/kernels.py     # needs libtpu (extra aot), no TPU; writes a file of results

Every program is compiled ahead of time for one chip at the published width: 64 images of 576
patches, 1024 channels, 8 heads of 128, bfloat16. docs/kernels.md says what the numbers mean.
"""

import argparse
import datetime
import glob
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BATCH, PATCHES, WIDTH, HEADS = 64, 576, 1024, 8
TOKENS = (1, 4, 16, 36, 144)
KERNELS = ("window_attention", "window_attention_gradient", "unprojected_attention",
           "absorbed_attention", "absorbed_attention_gradient")  # fmt: skip
RESULTS = Path(__file__).parent / "results"
# What a process must say before libtpu is loaded where there is no TPU.
WITHOUT_TPU = dict(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """One JAX device: topology, GHz (from its peak; v7x assumed), HBM GB/s, tensor cores."""

    topology: str
    clock: float
    bandwidth: float
    cores: int = 1


CHIPS = {
    "v5e": Chip("v5e:1x1", 1.5, 819),
    "v5p": Chip("v5p:1x1x1", 1.75, 2765, cores=2),
    "v6e": Chip("v6e:1x1", 1.75, 1638),
    "tpu7x": Chip("tpu7x:1x1x1", 2.2, 3690),  # a device is half a chip
}


def devices(topology: str, **settings) -> list:
    """The devices of a topology that is not there; needs libtpu."""
    os.environ.update(WITHOUT_TPU)
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices


def single(chip: str):
    """A mesh of one device of `chip`; the compiler may choose how to cut what is whole anyway."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from vlm_jax.mesh import AXES

    one = devices(CHIPS[chip].topology, chips_per_host_bounds=(1, 1, 1))[:1]
    return Mesh(np.reshape(one, (1, 1, 1)), AXES, axis_types=(AxisType.Auto,) * 3)


def programs(tokens: int, batch: int = BATCH, dtype: str = "bfloat16") -> dict:
    """Name -> function and shapes of its arguments.

    Those named as in KERNELS are the kernels alone; `xla` and `literal` compute the same as the
    first. The others go from unprojected queries, keys and values through the output projection:
    `projected_*` project them, `absorbed_*` do not, `absorbed_steps` as a training step does it.
    """
    import jax
    import jax.numpy as jnp

    from vlm_jax.kernels import unprojected_tpu
    from vlm_jax.kernels.window_attention import absorbed_attention, window_attention

    per, size, side = PATCHES // tokens, WIDTH // HEADS, math.isqrt(PATCHES // tokens)
    image = (batch, tokens, WIDTH)
    patches, weight = (batch, PATCHES, WIDTH), (WIDTH, WIDTH)

    def heads(x):
        return x.reshape(batch, -1, HEADS, size)

    def windows(x):
        return x.reshape(batch, tokens, per, *x.shape[2:])

    def windows_of_raster(x):
        n = math.isqrt(tokens)
        x = x.reshape(batch, n, side, n, side, *x.shape[2:])
        return jnp.moveaxis(x, 3, 2).reshape(batch, tokens, per, *x.shape[5:])

    def core(query, keys, values, form="pallas", cut=windows):
        keys, values = cut(heads(keys)), cut(heads(values))
        return window_attention(heads(query), keys, values, form=form).reshape(image)

    def absorbed(query, keys, values, form="pallas"):
        query = jnp.moveaxis(query, 0, 2)  # the layout that a product over heads gives
        out = absorbed_attention(query, windows(keys), windows(values), scale=size**-0.5, form=form)
        return jnp.moveaxis(out, 2, 0)

    def gradient(f):
        def run(toward, *inputs):
            return jax.vjp(f, *inputs)[1](toward)

        return run

    def projected(form, cut=windows):
        def run(x, keys, values, w_q, w_k, w_v, w_o):
            return core(x @ w_q, keys @ w_k, values @ w_v, form, cut) @ w_o

        return run

    def unprojected(query, keys, values, w_k, w_v):
        keys, values = windows(keys), windows(values)
        return unprojected_tpu.attend(heads(query), keys, values, w_k, w_v).reshape(image)

    def whole_absorbed(form):
        def run(x, keys, values, w_q, w_k, w_v, w_o):
            w_k, w_v = (w.reshape(WIDTH, HEADS, size) for w in (w_k, w_v))
            query, keys, values = heads(x @ w_q), windows(keys), windows(values)
            if form == "xla":
                query = jnp.einsum("BVNH,ENH->BVNE", query, w_k)
                out = absorbed_attention(query, keys, values, scale=size**-0.5, form=form)
                out = jnp.einsum("BVNE,ENH->BVNH", out, w_v)
            else:
                weights = w_k.transpose(1, 2, 0), w_v.transpose(1, 0, 2)
                f = unprojected_tpu.attend if form == "pallas" else unprojected_tpu.in_steps
                out = f(query, keys, values, *weights)
            return out.reshape(image) @ w_o

        return run

    wide = (HEADS, *image)
    core_in, wide_in = (image, patches, patches), (wide, patches, patches)
    whole_in = (image, patches, patches, weight, weight, weight, weight)
    found = {
        "window_attention": (core, core_in),
        "window_attention_gradient": (gradient(core), (image, *core_in)),
        "xla": (lambda *x: core(*x, form="xla"), core_in),
        "literal": (lambda *x: core(*x, form="xla", cut=windows_of_raster), core_in),
        "absorbed_attention": (absorbed, wide_in),
        "absorbed_attention_gradient": (gradient(absorbed), (wide, *wide_in)),
        "unprojected_attention": (
            unprojected,
            (*core_in, (HEADS, size, WIDTH), (HEADS, WIDTH, size)),
        ),
        "projected_literal": (projected("xla", windows_of_raster), whole_in),
        "projected_kernel": (projected("pallas"), whole_in),
        "absorbed_xla": (whole_absorbed("xla"), whole_in),
        "absorbed_steps": (whole_absorbed("steps"), whole_in),
        "absorbed_kernel": (whole_absorbed("pallas"), whole_in),
    }
    return {name: (f, [(shape, dtype) for shape in shapes]) for name, (f, shapes) in found.items()}


def lowered(mesh, f, shapes: list):
    """The program of f for the one device of `mesh`."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    here = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*(jax.ShapeDtypeStruct(*s, sharding=here) for s in shapes))


# --- Reading a compiled program -------------------------------------------------------------------

TYPE = r"\w+\[[\d,]*\]\{[^}]*\}"
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
NO_TRAFFIC = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant"}


def type_bytes(shape: str) -> int:
    """Bytes in HBM of an array of an HLO type, padded to its tile; 0 for one that lives in VMEM."""
    dtype, dims, layout = re.match(r"(\w+)\[([\d,]*)\]\{([^}]*)\}", shape).groups()
    order, _, tiling = layout.partition(":")
    if dtype not in BYTES or re.search(r"S\([12]\)", tiling):
        return 0
    sizes = [int(n) for n in dims.split(",") if n]
    physical = [sizes[int(i)] for i in order.split(",") if i]  # fastest first
    tile = re.match(r"T\((\d+),(\d+)\)", tiling)
    if tile and len(physical) > 1:
        rows, lanes = int(tile[1]), int(tile[2])
        physical[:2] = [math.ceil(physical[0] / lanes) * lanes,
                        math.ceil(physical[1] / rows) * rows]  # fmt: skip
    return BYTES[dtype] * math.prod(physical)


def traffic(text: str) -> dict[str, int]:
    """HBM bytes of an optimized program, those of its kernels, cycles estimated for the rest.

    Bytes are operands and results of every operation of ENTRY, those in VMEM left out; what an
    asynchronous copy moves is counted once.
    """
    entry = text[text.index("ENTRY") :].split("\n}")[0].splitlines()[1:]
    types, moved, by_kernels, cycles = {}, 0, 0, 0
    for line in entry:
        found = re.match(rf"\s*(?:ROOT )?%(\S+) = (\(.*?\)|{TYPE}) ([\w-]+)\((.*?)\)", line)
        if not found:
            continue
        name, result, operation, arguments = found.groups()
        types[name] = result
        if operation in NO_TRAFFIC or operation.endswith("-done"):
            continue
        read = [types[a] for a in re.findall(r"%([\w.-]+)", arguments) if a in types]
        touched = read[:1] if operation == "copy-start" else [*read, result]
        size = sum(type_bytes(t) for each in touched for t in re.findall(TYPE, each))
        moved += size
        by_kernels += size * (operation == "custom-call")
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        cycles += int(estimate[1]) if estimate else 0
    return dict(hbm_bytes=moved, kernel_bytes=by_kernels, xla_cycles=cycles)


def block_bytes(jaxpr) -> dict[str, tuple[int, int]]:
    """Kernel -> bytes of all blocks that its grid copies, and its grid steps."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            mapping = equation.params["grid_mapping"]
            steps, moved, kept = math.prod(mapping.grid), 0, 0
            for block in mapping.block_mappings:
                *outer, rows, lanes = (n.block_size for n in block.block_shape)
                rows = math.ceil(rows / 8) * 8 if rows > 4 else 2 ** math.ceil(math.log2(rows))
                size = math.prod((*outer, rows, lanes)) * block.array_aval.dtype.itemsize
                # A block that is the whole array is copied once, not at every step.
                whole = size >= block.array_aval.size * block.array_aval.dtype.itemsize
                moved, kept = moved + size * (not whole), kept + size * whole
            found[equation.params["name"]] = (steps * moved + kept, steps)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= block_bytes(inner)
    return found


def schedule(folder: str, kernel: str) -> dict:
    """Static bundles, register spills and matrix-unit slots of a kernel from libtpu's dump."""
    pattern = f"*-{kernel}.*-final_hlo-static-per-bundle-utilization.txt"
    (path,) = [p for p in glob.glob(f"{folder}/{pattern}") if "-pre-" not in p]
    rows = [line.split() for line in Path(path).read_text().splitlines()]
    # The first row of numbers is what one bundle could hold.
    counts = [list(map(int, row)) for row in rows if row and all(x.isdigit() for x in row)][1:]
    columns = [sum(column) for column in zip(*counts, strict=True)]
    return dict(bundles=len(counts), spills=columns[8], fills=columns[6], mxu=columns[0])


# --- The table ------------------------------------------------------------------------------------


def measure(chip: str, tokens: int, names: list[str], dump: str | None) -> dict:
    """Facts of some of the programs on one chip; with a dump the schedule of their kernels."""
    import jax

    mesh, facts, wanted = single(chip), {}, programs(tokens)
    for name in names:
        f, shapes = wanted[name]
        program = lowered(mesh, f, shapes).compile()
        facts[name] = traffic(program.as_text())
        facts[name]["temporaries"] = program.memory_analysis().temp_size_in_bytes
        with jax.set_mesh(mesh):
            kernels = block_bytes(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(*s) for s in shapes)))
        if name in kernels:
            facts[name] |= dict(zip(("block_bytes", "steps"), kernels[name], strict=True))
            if dump:
                facts[name] |= schedule(dump, name)
    return facts


def floor(tokens: int, kernel: str) -> int:
    """Bytes that a kernel cannot avoid: every operand and result once."""
    rows = tokens * (HEADS if "absorbed" in kernel else 1)
    of_rows, of_patches = (3, 4) if "gradient" in kernel else (2, 2)
    weights = 2 * WIDTH * WIDTH if "unprojected" in kernel else 0
    return 2 * (BATCH * WIDTH * (of_rows * rows + of_patches * PATCHES) + weights)


def row(chip: str, tokens: int) -> dict:
    """All facts of one chip and V: kernels and XLA's programs, each lot in a process of its own."""
    facts = {}
    for names in (KERNELS, [n for n in programs(tokens) if n not in KERNELS]):
        with tempfile.TemporaryDirectory() as dump:
            flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            command = [sys.executable, __file__, f"--chip={chip}", f"--tokens={tokens}",
                       f"--programs={','.join(names)}"]  # fmt: skip
            extra = dict(PYTHONPATH=str(Path(__file__).parents[1]))
            if names is KERNELS:
                command.append(f"--dump={dump}")
                extra["LIBTPU_INIT_ARGS"] = flags
            done = subprocess.run(
                command, env=os.environ | WITHOUT_TPU | extra, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            facts |= json.loads(done.stdout.splitlines()[-1])
    return dict(chip=chip, tokens=tokens, programs=facts | derived(chip, tokens, facts))


def derived(chip: str, tokens: int, facts: dict) -> dict:
    """Floors and times of the kernels, and estimated cycles of the two whole forms."""
    of, found = CHIPS[chip], {}
    for name in KERNELS:
        kernel = facts[name]
        issued = kernel["bundles"] * kernel["steps"] / of.cores
        moving = kernel["block_bytes"] / of.bandwidth * of.clock
        found[name] = kernel | dict(
            floor_bytes=floor(tokens, name), bundle_cycles=issued, dma_cycles=moving
        )
    for name, inner in (
        ("projected_kernel", "window_attention"),
        ("absorbed_steps", "absorbed_attention"),
        ("absorbed_kernel", "unprojected_attention"),
    ):
        # What the compiler keeps in VMEM between two operations costs the kernel no DMA.
        moving = facts[name]["kernel_bytes"] / of.bandwidth * of.clock
        kernel = max(found[inner]["bundle_cycles"], moving)
        found[name] = facts[name] | dict(cycles=facts[name]["xla_cycles"] + kernel)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, help="this chip only")
    parser.add_argument("--tokens", type=int, choices=TOKENS, help="this V only")
    parser.add_argument("--programs", help=argparse.SUPPRESS)
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.programs:
        names = given.programs.split(",")
        print(json.dumps(measure(given.chip, given.tokens, names, given.dump)))
        return
    rows = []
    for chip in [given.chip] if given.chip else CHIPS:
        for tokens in [given.tokens] if given.tokens else TOKENS:
            rows.append(row(chip, tokens))
            print(line(rows[-1]), flush=True)
    if not given.chip and not given.tokens:
        today = datetime.date.today().isoformat()
        versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
        path = RESULTS / f"{today}-kernels.json"
        path.write_text(
            json.dumps(dict(versions=versions, batch=BATCH, rows=rows), indent=1) + "\n"
        )
        print(f"wrote {path}")


def line(found: dict) -> str:
    """One row for people."""
    p = found["programs"]
    said = [f"{found['chip']:6} V={found['tokens']:<4}"]
    for name in ("window_attention", "unprojected_attention"):
        kernel = p[name]
        said.append(
            f"{name}: bytes/floor {kernel['block_bytes'] / kernel['floor_bytes']:.2f}, "
            f"bundles/DMA {kernel['bundle_cycles'] / kernel['dma_cycles']:.2f}, "
            f"spills {kernel['spills']};"
        )
    cycles = [p[f"{name}_kernel"]["cycles"] for name in ("projected", "absorbed")]
    return " ".join(said) + f" cycles projected/absorbed {cycles[0] / cycles[1]:.2f}"


if __name__ == "__main__":
    main()
