# SPDX-License-Identifier: Apache-2.0
"""How much of the demo is compilation, and of which programs?

    python benchmarks/compilation.py [--cells=NAME,...] [--threads=2] [--out=FILE]

Runs all cells of the demo with an empty cache of programs, few steps and few images: every program
of the demo is compiled, and little else is done. The table has CPU seconds of this process by kind
(tracing, lowering, XLA) and by program, without what is nested in it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import facts  # noqa: E402

KINDS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "XLA",
}
# Everything that is compiled is compiled; the rest of the demo is short.
SHORT = (
    "--config.encoder.steps=6",
    "--config.align.steps=4",
    "--config.finetune.steps=6",
    "--config.data.train_images=800",
    "--config.data.test_images=150",
)


class Listener:
    """CPU seconds and calls by (kind, program), without nested ones, and hits of the cache."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
        self.hits, self._open = 0, []

    def listen(self) -> None:
        """Notes what JAX compiles in this process from now on."""
        import jax.monitoring

        jax.monitoring.register_scalar_listener(self.begins)
        jax.monitoring.register_event_duration_secs_listener(self.ends)
        jax.monitoring.register_event_listener(self.happens)

    def begins(self, event: str, value: float, **_: object) -> None:
        if event in KINDS:
            self._open.append([time.process_time(), 0.0])

    def ends(self, event: str, seconds: float, *, fun_name: str = "", **_: object) -> None:
        if event not in KINDS:
            return
        then, nested = self._open.pop()
        took = time.process_time() - then
        if self._open:
            self._open[-1][1] += took
        entry = self.found[KINDS[event], fun_name.removeprefix("jit(").removesuffix(")")]
        entry[0] += 1
        entry[1] += took - nested

    def happens(self, event: str, **_: object) -> None:
        self.hits += event.endswith("/cache_hits")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--cells", help="comma-separated; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="default: benchmarks/results/DATE-compilation.json")
    args = parser.parse_args(argv)
    facts.use_threads(args.threads)
    listener = Listener()
    listener.listen()
    from vlm_jax.__main__ import main as command

    cells = [f"--cell={name}" for name in args.cells.split(",")] if args.cells else []
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_CACHE_HOME"] = home
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        then = time.process_time()
        code = command(
            ["grid", "--config=configs/demo.py", f"--workdir={home}/run", *SHORT, *cells]
        )
        total = time.process_time() - then
    if code:
        return code
    programs = [
        dict(kind=kind, program=name, calls=calls, cpu_s=round(seconds, 2))
        for (kind, name), (calls, seconds) in sorted(
            listener.found.items(), key=lambda item: -item[1][1]
        )
    ]
    kinds = {
        kind: round(sum(p["cpu_s"] for p in programs if p["kind"] == kind), 1)
        for kind in KINDS.values()
    }
    for each in programs[:20]:
        print(f"{each['kind']:10} {each['program']:24} {each['calls']:5} {each['cpu_s']:8.2f}")
    print(*(f"{kind} {seconds} s" for kind, seconds in kinds.items()), f"all {total:.1f} s",
          f"{listener.hits} programs read from the cache", sep=", ")  # fmt: skip
    facts.write(
        facts.of_run(
            "CPU seconds of compilation in a short form of the demo, empty cache",
            threads=args.threads,
            packages=("jax", "jaxlib", "flax", "optax"),
        )
        | dict(cells=args.cells or "all", cpu_s=kinds, all_cpu_s=round(total, 1),
               read_from_cache=listener.hits, programs=programs),
        "compilation",
        args.out,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
