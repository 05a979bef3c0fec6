# SPDX-License-Identifier: Apache-2.0
"""Does each form of vlm_jax/cpu.py still pay, against the plain form in the same process?

    python benchmarks/cpu.py [--rounds=30] [--threads=2] [--only=NAME,...] [--out=FILE]

The two forms take turns; the table has the medians and their ratio (above 1, the form is faster).
A form that no longer pays is one to delete. Memory that is kept (`vlm_jax/heap.py`) and the
options of a training step change a whole process: benchmarks/train_step.py times these.
"""

import argparse
import statistics
import time

import facts


def cases(jax, jnp, cpu, mesh):
    """Name -> (form, plain form, inputs), at the shapes that the form was made for."""
    from vlm_jax.models.cache import KV, Cache
    from vlm_jax.models.llm import mix

    mask = jnp.ones((8, 1, 512), bool)

    def draw(*shape, dtype="float32"):
        return jax.random.normal(jax.random.key(len(shape)), shape).astype(dtype)

    def gradient(product):
        return jax.grad(lambda x, w: jnp.square(product(x, w)).sum(), argnums=1)

    def convolution(total):
        return lambda x, taps, w: total(x * taps) @ w

    def sharded(x):  # as an encoder gives it
        return jax.sharding.reshard(x, mesh.spec("batch", "len", "feature"))

    def by_token(*kv):  # as they are computed
        return (x.astype("bfloat16").transpose(0, 2, 1, 3) for x in kv)

    attend, mlp, wide = "BVNP,BPE->BVNE", ("batch", "len", "mlp"), draw(1024, 8192)
    return {
        "project: weight gradient [64 48 96] x [96 256]": (
            gradient(lambda x, w: cpu.project(x, w, 1, mlp)),
            gradient(lambda x, w: jnp.einsum("BTD,DF->BTF", x, w)),
            [draw(64, 48, 96), draw(96, 256)],
        ),
        "two_rows: [1 1 2048] x [2048 5504], bfloat16": (
            lambda x, w: cpu.project(x, w, 1, mlp),
            lambda x, w: jnp.einsum("BTD,DF->BTF", x, w),
            [draw(1, 1, 2048, dtype="bfloat16"), draw(2048, 5504, dtype="bfloat16")],
        ),
        "project_output_first: [16 1 1024] x [1024 8192]": (
            lambda x, w, turned: cpu.project_output_first(x, turned, w.shape[1:], mlp),
            lambda x, w, turned: cpu.project(x, w, 1, mlp),
            [draw(16, 1, 1024), wide, wide.T],
        ),
        "sum_of_windows: [8 36 16 1024] x [1024 1024]": (
            convolution(cpu.sum_of_windows),
            convolution(lambda x: x.sum(2)),
            [draw(8, 36, 16, 1024), draw(16, 1024), draw(1024, 1024)],
        ),
        "for_every_image: [16 16 576] x [4 576 1024]": (
            lambda s, x: jnp.einsum(attend, cpu.for_every_image(s, len(x)), sharded(x)),
            lambda s, x: jnp.einsum("NVP,BPE->BVNE", s, x),
            [draw(16, 16, 576), draw(4, 576, 1024)],
        ),
        "cache by head, float32: a token over [8 512 32 64], bfloat16": (
            lambda q, k, v: mix(q, Cache(k, v), mask),
            lambda q, k, v: mix(q, KV(*by_token(k, v)), mask),
            [draw(8, 1, 32, 64, dtype="bfloat16"), draw(8, 32, 512, 64), draw(8, 32, 512, 64)],
        ),
    }


def taking_turns(form, plain, inputs, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each call of the two programs, in alternating order."""
    times = ([], [])
    for number in range(-3, rounds):  # three rounds to warm up
        for side in ((0, 1), (1, 0))[number % 2]:
            start = time.perf_counter()
            (form, plain)[side](*inputs).block_until_ready()
            if number >= 0:
                times[side].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="beginnings of names, comma-separated")
    parser.add_argument("--out", help="file of results; default: a dated one")
    args = parser.parse_args()
    facts.use_threads(args.threads)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vlm_jax import cpu, mesh

    rows = []
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        for name, (form, plain, inputs) in cases(jax, jnp, cpu, mesh).items():
            if args.only and not name.startswith(tuple(args.only.split(","))):
                continue
            forms = [jax.jit(form), jax.jit(plain)]
            ours, theirs = (np.asarray(f(*inputs), "float32") for f in forms)
            np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.05 * np.abs(theirs).max())
            ours, theirs = (
                1e3 * statistics.median(side)
                for side in taking_turns(*forms, inputs, rounds=args.rounds)
            )
            rows.append(dict(form=name, form_ms=ours, plain_ms=theirs, ratio=theirs / ours))
            print(f"{name:70} {ours:8.3f} ms, plain {theirs:8.3f} ms: {theirs / ours:.2f}x")
    head = facts.of_run("does each form for a CPU pay?", threads=args.threads, packages=("jax",))
    print(facts.write(head | dict(rows=rows), "cpu", args.out))


if __name__ == "__main__":
    main()
