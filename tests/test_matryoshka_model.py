# SPDX-License-Identifier: Apache-2.0
"""One model, any number of visual tokens: how it is trained, asked, evaluated and put in a grid."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax import mesh
from vlm_jax.__main__ import main
from vlm_jax.cost import flops as cost
from vlm_jax.data import loader, prefixes, sources
from vlm_jax.data.processor import Processor, RowFormat, load_tokenizer
from vlm_jax.data.sources import Origin
from vlm_jax.models import vlm
from vlm_jax.rows import records
from vlm_jax.serving.decoder import Decoder
from vlm_jax.training import objective, optimizer
from vlm_jax.training.cells import train_flops

# --- Prefixes as data, all scales at once, requests of any size -----------------------------------


def model_of(kind, tokens, **changes):
    c = tiny.config(compressor=dict(kind=kind, tokens=tokens, heads=2), **changes)
    return c, tiny.roughened(tiny.created(c), scale=0.2)


def test_a_limit_on_all_queries_is_the_model_of_so_many(mesh1):
    with jax.set_mesh(mesh1):
        c, model = model_of("mqt", 16)
        batch = tiny.batch(c)
        run = jax.jit(lambda m, b: m.logits(b))
        real = np.arange(batch["ids"].shape[1]) < batch["length"][:, None]
        for tokens in (1, 3, 16):
            limit = np.full(len(real), tokens, np.int32)
            ours = np.asarray(run(model, tiny.placed(batch | dict(limit=limit))))
            theirs = np.asarray(run(model.at(tokens), tiny.placed(batch)))
            np.testing.assert_allclose(ours[real], theirs[real], atol=2e-5)
        # One program for every limit; one for each model of its own.
        assert run._cache_size() == 1 + 3
        # Each row of a batch may be shown another number.
        limit = np.arange(8, dtype=np.int32) + 1
        mixed = np.asarray(run(model, tiny.placed(batch | dict(limit=limit))))
        row = np.asarray(run(model.at(4), tiny.placed(batch)))[3]
        np.testing.assert_allclose(mixed[3][real[3]], row[real[3]], atol=2e-5)


@pytest.mark.slow
def test_every_scale_is_the_mean_of_each_from_one_pass(mesh1, monkeypatch):
    def each(model, batch):
        sums = [objective.next_token(model.at(n), batch) for n in model.compressor.scales]
        return jax.tree.map(lambda *parts: sum(parts) / len(parts), *sums)

    with jax.set_mesh(mesh1):
        c, model = model_of("m3", 1)
        assert model.compressor.scales == (1, 4, 16)
        batch = tiny.placed(tiny.batch(c, levels=False))
        found, passes = [], []
        encode = vlm.VLM.encode
        monkeypatch.setattr(vlm.VLM, "encode", lambda *x: passes.append(0) or encode(*x))
        for run in (objective.every_scale, each):
            graph, parts, rest = nnx.split(model, optimizer.TRAINED["finetune"], ...)

            def loss(parts, rest, graph=graph, run=run):
                sums = run(nnx.merge(graph, parts, rest), batch)
                return sums.nll / 100, sums

            gradients, sums = jax.jit(jax.grad(loss, has_aux=True))(parts, rest)
            found.append((sums, gradients))
        assert len(passes) == 1 + 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mqt", "m3"])
def test_requests_of_any_size_from_one_model_compile_once_for_each_bucket(kind, mesh1):
    with jax.set_mesh(mesh1):
        c, model = model_of(kind, 16)
        made = tiny.batch(c)
        batch = tiny.placed({k: v for k, v in made.items() if k != "loss_mask"})
        answer = Decoder(model, stop_ids=())
        asked = model.compressor.method.supported(4)
        found = {tokens: answer(batch, tokens, new_tokens=2) for tokens in asked}
        buckets = model.compressor.buckets
        assert len(asked) == {"mqt": 16, "m3": 3}[kind]
        assert answer.first._cache_size() == answer.following._cache_size() == len(buckets) == 3
        for tokens in asked[:: len(asked) // 3]:
            alone = Decoder(model.at(tokens), stop_ids=())
            np.testing.assert_array_equal(found[tokens], alone(batch, new_tokens=2))
        with pytest.raises(ValueError, match="cannot make 17 visual tokens"):
            answer(batch, 17, new_tokens=2)


def test_a_model_of_one_size_is_not_asked_for_another(mesh1):
    with jax.set_mesh(mesh1):
        c, model = model_of("token_packer", 4)
        with pytest.raises(ValueError, match="TokenPacker was trained for 4 visual tokens, not 9"):
            Decoder(model, stop_ids=())(tiny.placed(tiny.batch(c)), 9, new_tokens=2)


# --- Training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches(trained, mesh8):
    """Training batches of 8 rows, and how to draw prefixes for them."""
    c = tiny.get_config()
    source = sources.open_source(Origin.of(c), "train")
    processor = Processor(load_tokenizer(trained / "tokenizer"), RowFormat.of(c))

    def draw(mesh, **options):
        plain = loader.Batches(source, processor, batch=8, seed=3, mesh=mesh)
        return prefixes.RandomPrefixes(plain, (2, 4, 6, 8), seed=3, **options)

    return draw


def test_what_a_step_shows_depends_on_its_position_alone(batches, mesh1, mesh8):
    first = batches(mesh1)
    seen = [next(first) for _ in range(6)]
    limits = np.stack([np.asarray(b["limit"]) for b in seen])
    assert limits.dtype == np.int32 and (limits == limits[:, :1]).all()
    again = batches(mesh8)
    again.position = 4
    for k in (4, 5):
        batch = next(again)
        assert again.position == k + 1
        np.testing.assert_array_equal(batch["limit"], limits[k])
        np.testing.assert_array_equal(batch["ids"], seen[k]["ids"])
        assert batch["limit"].sharding == batch["length"].sharding


def test_every_prefix_is_drawn_alike_one_for_each_micro_batch(batches):
    drawn = batches(None, accumulate=4)
    limits = np.stack([drawn.limit(k) for k in range(500)])
    np.testing.assert_array_equal(limits[:, :4], limits[:, 4:])
    numbers, counts = np.unique(limits[:, :4], return_counts=True)
    assert list(numbers) == [2, 4, 6, 8] and (abs(counts - 500) < 80).all()
    assert len({tuple(row) for row in limits[:, :4]}) > 100
    # Micro-batches are cut as the step cuts them.
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        cut = optimizer.micro_batches({"limit": jnp.array(limits[0])}, 4)["limit"]
    assert (np.asarray(cut) == limits[0, :4, None]).all()


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_positions_move_in_the_first_stage_alone_and_steps_compile_once(stage, batches, mesh1):
    with jax.set_mesh(mesh1):
        c, model = model_of("mqt", 16)
        tx = optimizer.optimizer(tiny.stage(c[stage]))
        graph, state = optimizer.start(model, stage, tx)
        before = np.array(model.compressor.position[...]), np.array(model.compressor.query[...])
        step, data = optimizer.make_step(graph, tx, objective.next_token), batches(mesh1)
        for _ in range(3):
            state, metrics = step(state, next(data))
        assert np.isfinite(metrics.loss) and step.programs[0]._cache_size() == 1
        after = optimizer.finish(graph, state).compressor
        assert (np.asarray(after.position[...]) != before[0]).any() == (stage == "align")
        assert (np.asarray(after.query[...]) != before[1]).any()


@pytest.mark.parametrize("kind", ["mqt", pytest.param("m3", marks=pytest.mark.slow)])
def test_a_step_on_eight_devices_in_micro_batches_is_one_on_one(kind, mesh1, mesh8):
    run = {"mqt": objective.next_token, "m3": objective.every_scale}[kind]
    found = []
    for meshes, accumulate in ((mesh1, 1), (mesh8, 2)):
        with jax.set_mesh(meshes):
            c, model = model_of(kind, 16)
            tx = optimizer.optimizer(tiny.stage(c.finetune))
            graph, state = optimizer.start(model, "finetune", tx)
            batch = tiny.batch(c, rows=16)
            if kind == "mqt":
                batch["limit"] = np.resize(np.array([2, 14], np.int32), 16)
            step = optimizer.make_step(graph, tx, run, accumulate=accumulate)
            found.append(step(state, tiny.placed(batch))[1])
    np.testing.assert_allclose(found[1].loss, found[0].loss, rtol=1e-5)
    np.testing.assert_allclose(found[1].gradient_norm, found[0].gradient_norm, rtol=1e-4)


# --- From the command line: one training, a row or an evaluation for every V ----------------------

SHORT = ("--config=tests/tiny.py", "--config.finetune.steps=3", "--config.align.steps=2",
         "--config.encoder.steps=2", "--config.compressor.kind=mqt")  # fmt: skip
GRID = ("--config=tests/one_size.py", *SHORT[1:], "--config.grid.tokens=(1, 9)",
        "--config.grid.baselines=(('m3', 4), ('m3', 16))",
        "--config.compressor.scales=(1, 4, 16)")  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of a grid, by name, and its folder."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    done = tiny.run("grid", *GRID, f"--workdir={folder}", before=tiny.UNDRAWN)
    assert done.returncode == 0, done.stderr
    return folder, {row.cell: row for row in records.read(folder / "rows.jsonl")}


def test_a_grid_trains_once_for_all_rows_of_a_matryoshka_method(rows):
    folder, found = rows
    names = ["only-v1-mqt-s0", "only-v9-mqt-s0", "only-v4-m3-s0", "only-v16-m3-s0"]
    assert sorted(found) == sorted(names)
    for name, row in found.items():
        assert row.trained_with == name.replace(f"-v{row.V}-", "-")
        assert not (folder / "cells" / name / "finetune").exists()
        assert (folder / "cells" / row.trained_with / "finetune" / "3").is_dir()
        assert len((folder / "cells" / name / "predictions.jsonl").read_text().splitlines()) > 10
    for one, other in (names[:2], names[2:]):
        assert found[one].train == found[other].train
        assert found[one].compressor_parameters == found[other].compressor_parameters
        # What a request costs is of its own V.
        assert found[one].flops["prefill"] < found[other].flops["prefill"]
    assert found[names[0]].train["flops"] != found[names[2]].train["flops"]


def test_what_training_costs_is_what_is_run(mesh1):
    def steps(kind, tokens, **fields):
        c = tiny.config(compressor=dict(kind=kind, tokens=tokens, **fields))
        with jax.set_mesh(mesh1):
            return c, train_flops(tiny.recipe(c))

    # MQT: all queries in every step. M3: every patch at first, then the sum of its scales, which
    # read the features once.
    assert steps("mqt", 1)[1] == steps("mqt", 16)[1]
    c, total = steps("m3", 1)
    assert total == steps("m3", 4)[1]
    size = tiny.size(c)
    vit, compressor, llm = size.vit, size.compressor, size.llm

    def of(stage, tokens):
        made = dataclasses.replace(compressor, tokens=tokens)
        return cost.train_step_flops(
            True, made, llm, vit=vit, stage=stage, tokens=c.data.text_length + tokens,
            logits=c.data.text_length, batch=8)  # fmt: skip

    reading = 2 * 2 * vit.patches * vit.width * llm.width
    finetune = sum(of("finetune", n) for n in (1, 4, 16)) - 2 * reading
    assert total == 8 * (c.align.steps * of("align", 16) + c.finetune.steps * finetune)


@pytest.mark.slow
def test_one_checkpoint_is_evaluated_at_several_v(rows, tmp_path, capsys):
    del rows  # first: it fills the cache
    folder = tmp_path / "run"
    command = [*SHORT, f"--workdir={folder}"]
    done = tiny.run("train", *command, "--config.compressor.tokens=16")
    assert done.returncode == 0 and "up to 16 visual tokens" in done.stderr, done.stderr
    for tokens, name in ((16, ""), (1, "-v1")):
        assert main(["evaluate", *command, f"--config.compressor.tokens={tokens}"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert json.loads((folder / f"scores{name}.json").read_text()) == scores
        assert (folder / f"predictions{name}.jsonl").exists()
    for change, said in (
        ("compressor.tokens=17", "choose any of 1 to 16"),
        ("compressor.kind=m3", "compressor.kind was mqt, is m3"),
    ):
        assert main(["evaluate", *command, f"--config.{change}"]) == 2
        assert said in capsys.readouterr().err
