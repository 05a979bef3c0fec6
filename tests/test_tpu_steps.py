# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler makes of whole steps of a small model, on a machine without a TPU."""

import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from vlm_jax import mesh
from vlm_jax.__main__ import main
from vlm_jax.aot import counted, programs, report, topology
from vlm_jax.models import cache, vlm
from vlm_jax.serving import programs as engine
from vlm_jax.serving.decoder import Sampling
from vlm_jax.training import compiler, memory

pytestmark = pytest.mark.tpu_compiler


@pytest.fixture(scope="module", autouse=True)
def products_of_bfloat16():
    """Mosaic refuses the precision that the other tests ask for with bfloat16."""
    with jax.default_matmul_precision("default"):
        yield


def small(**changes):
    """A model whose dimensions fill the tiles of a TPU, with as little of it as possible."""
    c = tiny.config(remat="full", compute_dtype="bfloat16", mesh=dict(data=1, fsdp=-1))
    c.vit.update(dict(image_size=112, patch_size=14, depth=2, width=256, mlp=512, levels=(1,)))
    c.llm.update(
        dict(width=512, mlp=1024, heads=4, kv_heads=4, head_size=128, vocab=1024, qkv_bias=False)
    )
    c.compressor.update(dict(kind="none", tokens=64))
    c.data.update(dict(text_length=64, question_length=16))
    for name, section in changes.items():
        c[name].update(section)
    return c


@pytest.fixture(scope="module")
def made():
    topology.prepare()
    return report.of_config(small(), "finetune", topology.named("v5e:2x2"))


def test_memory_by_kind_adds_up_and_the_state_is_donated(made):
    hbm = made["hbm_bytes"]
    kinds = [size for kind, size in hbm.items() if kind not in ("total", "usable")]
    assert sum(kinds) == hbm["total"] <= hbm["usable"] and made["fits"]
    assert made["programs"][0]["donated_bytes"] >= hbm["weights"] + hbm["optimizer"]
    assert hbm["optimizer"] >= 2 * hbm["weights"]  # two moments in float32


def test_the_compilers_flops_are_ours_when_loops_are_multiplied(made):
    flops = made["flops"]
    assert made["programs"][0]["unread_loops"] == []
    # Of causal attention it leaves out some of what is hidden, of the scores of text none.
    assert 0.85 < flops["compiler"] / flops["program"] < 1.1
    assert flops["model"] < flops["program"]


def test_what_does_not_fit_ends_with_3_and_says_what_would_help(capsys, tmp_path):
    path = tmp_path / "large.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n"
        "    c = base.get_config()\n    c.compressor.update(dict(kind='none', tokens=576))\n"
        "    c.llm.depth, c.vit.depth, c.vit.levels = 4, 2, (1,)\n"
        "    c.mesh.data, c.mesh.fsdp = 4, 1\n    c.data.text_length = 2048\n    return c\n"
    )
    assert main(["compile", f"--config={path}", "--topology=v5e:2x2"]) == 3
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert not found["fits"] and found["estimate"] is None
    assert "DOES NOT FIT" in err and "mesh.fsdp=4" in err
    assert found["programs"][0]["largest"]


def test_every_serving_program_is_compiled(capsys):
    argv = [f"--config={tiny.ROOT}/tests/tiny.py", "--config.compute_dtype=bfloat16",
            "--config.mesh.data=-1", "--topology=v6e:1x1", "--mode=evaluate"]  # fmt: skip
    assert main(["compile", *argv]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["programs"]] == ["prefill", "decode"]
    prefill, decode = (one["hbm_bytes"] for one in found["programs"])
    assert "cache" not in prefill and decode["cache"] > 0
    # Of the whole mode, what the larger of the two needs.
    assert found["hbm_bytes"]["total"] == max(prefill["total"], decode["total"])
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("slice_", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_a_step_of_decoding_moves_its_weights_and_its_cache_once(slice_):
    c = small(mesh=dict(fsdp=1), data=dict(text_length=2000), evaluate=dict(batch=64))
    c.llm.vocab = 8192
    topology.prepare()
    found = report.of_config(c, "decode", topology.named(slice_))["programs"][0]
    once = found["hbm_bytes"]["frozen"] + found["hbm_bytes"]["cache"]
    assert 0.9 < found["hbm_traffic_bytes"] / once < 1.15
    assert found["unread_loops"] == []


@pytest.mark.parametrize("kind, tokens", [
    ("fastv", (9,)), ("pyramiddrop", (9,)), ("tokencarve", (9,)),
])  # fmt: skip
def test_a_model_that_prunes_is_compiled_and_decodes_from_shorter_caches(kind, tokens):
    pruning = dict(kind=kind, layers=(1,), tokens=tokens)
    topology.prepare()
    shorter, whole = (
        report.of_config(small(**changes), "evaluate", topology.named("v5e:2x2"))
        for changes in (dict(pruning=pruning), {})
    )
    prefill, decode = shorter["programs"]
    assert prefill["flops_per_device"] < whole["programs"][0]["flops_per_device"]
    assert decode["hbm_bytes"]["cache"] < whole["programs"][1]["hbm_bytes"]["cache"]


def test_what_an_engine_runs_is_compiled_and_writes_into_its_caches():
    """A chunk of a row, its slot among four others, and a step of all, over four chips."""
    c = small(vit=dict(heads=4))
    topology.prepare()
    with jax.set_mesh(mesh.make(1, 1, 4, devices=topology.named("v5e:2x2").devices())):
        shapes = memory.placed(vlm.shapes(tiny.size(c)).llm)
        narrow = lambda m: jax.tree.map(lambda x: x.astype("bfloat16"), m)  # noqa: E731
        llm = memory.placed(jax.eval_shape(lambda m: narrow(m).unrolled(), shapes))

        def slots(rows):
            kv = [cache.kept(engine.empty(llm, 250), 250) for _ in range(llm.depth)]
            one = jnp.zeros(1, jnp.int32, out_sharding=mesh.spec("batch"))
            drawn = Sampling(one.astype("float32"), one.astype("float32"), one.astype("uint32"))
            zeros = jnp.zeros(rows, jnp.int32)
            return engine.of_rows(engine.Slots(kv, one, one, drawn), zeros, jnp.dtype("bfloat16"))

        many = memory.placed(jax.eval_shape(lambda: slots(4)))
        # A kernel writes whole tiles.
        assert many.caches[0].keys.shape == (4, 4, 256, 128)
        made = lambda: [engine.empty(llm, 384) for _ in range(llm.depth)]  # noqa: E731
        row = memory.placed(jax.eval_shape(made))
        text = [jax.ShapeDtypeStruct((1, 128), dtype) for dtype in ("int32", "bool")]
        at = jax.ShapeDtypeStruct((1,), "int32")
        drawn = Sampling(*(jax.ShapeDtypeStruct((1,), x.dtype) for x in many.sampling))
        visual = jax.ShapeDtypeStruct((1, 128, 512), "bfloat16")
        read = llm, row, text[0], visual, text[1], at, at, drawn
        placed = many, row, jax.ShapeDtypeStruct((), "int32"), at, at, drawn
        for f, given, donated in (
            (engine.chunk, read, 1),
            (engine.insert, placed, 0),
            (engine.step, (llm, many), 1),
        ):
            compiled = jax.jit(f, donate_argnums=donated).trace(*given).lower().compile()
            of_caches = memory.in_shards(given[donated])
            assert compiled.memory_analysis().alias_size_in_bytes >= of_caches, f.__name__
            if f is engine.step:
                assert "write" in compiled.as_text() and "tpu_custom_call" in compiled.as_text()


# What a chip's compiler makes asynchronous of a step's gathers, at least.
SLICES = [("v5p:4x4x4", 4, 16, 0.2), ("v6e:8x8", 8, 8, 0.0), ("v5e:8x8", 4, 16, 0.1)]


@pytest.mark.parametrize("slice_, data, fsdp, overlapped", SLICES)
def test_weights_are_gathered_and_their_gradients_scattered(slice_, data, fsdp, overlapped):
    """Embedding, two blocks and output layer on 64 chips: values and gradients.

    An all-reduce of a whole weight, or of a table, fails: of what a device sends around, only the
    shards are reduced over data, and what has no shards (docs/pods.md, "Collectives").
    """
    c = small()
    c.kernels = "xla"
    c.llm.update(dict(width=1024, mlp=2816, heads=8, kv_heads=8, vocab=4096))
    topology.prepare()
    devices = topology.named(slice_).devices()
    with jax.set_mesh(mesh.make(data, fsdp, 1, devices=devices)):
        llm = memory.placed(vlm.shapes(tiny.size(c)).llm)
        ids = programs.shape_of((64, 128), jnp.int32, "batch")
        options = mesh.known(compiler.step_options())
        step = jax.jit(jax.grad(lambda llm, ids: jnp.square(llm.logits(llm(llm.embed(ids)))).sum()))
        text = step.trace(llm, ids).lower().compile(compiler_options=options).as_text()
    sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
    found = counted.facts(text).collectives
    for collective in found:
        sent[collective.kind] = sent.get(collective.kind, 0) + collective.bytes * collective.times
    blocks, table = 2 * (4 * 1024**2 + 3 * 1024 * 2816), 4096 * 1024
    # All in bfloat16; the blocks are gathered for the forward and for the backward pass.
    assert sent["all-gather"] > 0.9 * (2 * blocks + table) * 2
    assert 0.99 < sent["reduce-scatter"] / ((blocks + table) * 2) < 1.1
    # Shards of blocks and output layer, those of the embedding in float32, norms.
    shards = (blocks + table) * 2 / fsdp + table * 4 / fsdp
    assert sent["all-reduce"] < 1.1 * shards
    beside = sum(c.bytes * c.times for c in found if c.kind == "all-gather" and c.asynchronous)
    assert beside >= overlapped * sent["all-gather"]


def test_a_stage_that_the_configuration_does_not_have_is_refused(capsys):
    argv = [f"--config={tiny.ROOT}/tests/tiny.py", "--config.align.steps=0", "--mode=align"]
    assert main(["compile", "--topology=v5e:2x2", *argv]) == 2
    assert "align.steps=0" in capsys.readouterr().err
