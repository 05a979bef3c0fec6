# SPDX-License-Identifier: Apache-2.0
"""One windowed model for several V: each step runs one of them, and each is a model of that V."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax import compressors, mesh
from vlm_jax.__main__ import main
from vlm_jax.compressors.elastic import Elastic, rectangles
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.window import window_order
from vlm_jax.compressors.windowed import by_window
from vlm_jax.data import loader, prefixes, sources
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.planning import choices
from vlm_jax.rows import records
from vlm_jax.server.choices import Choices
from vlm_jax.serving.decoder import Decoder
from vlm_jax.training import memory, objective, optimizer, stages
from vlm_jax.training.cells import cells_of, stage_flops
from vlm_jax.weights import folder, start

V = (1, 4, 16)  # all that 4 x 4 patches can give
ELASTIC = dict(kind="token_packer", tokens=4, heads=2, elastic=V)


def model_of(**changes):
    c = tiny.config(compressor=ELASTIC, **changes)
    return c, tiny.roughened(tiny.created(c), scale=0.2)


def alone(model, tokens):
    """The model of one V with the weights of `model`."""
    one = tiny.created(tiny.config(compressor=ELASTIC | dict(tokens=tokens, elastic=())))
    return jax.tree.unflatten(jax.tree.structure(one), jax.tree.leaves(model))


# --- The module -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        dict(kind="pool"),
        dict(kind="token_packer", heads=2),
        dict(kind="quecc", heads=2, query="separate", downsample="pool"),
    ],
    ids=lambda section: section["kind"],
)
def test_at_each_v_it_is_the_compressor_of_that_v(section, mesh1):
    between = Interface(side=4, width=16, levels=2, llm_width=8)
    draw = np.random.default_rng(0)
    levels = draw.normal(size=(3, 16, 32)).astype(np.float32)
    question = jnp.array(draw.normal(size=(3, 8)), jnp.float32)
    with jax.set_mesh(mesh1):
        several = compressors.describe(section | dict(tokens=16, elastic=V))
        assert isinstance(several, Elastic) and several.serves_several
        assert several.parameters(between) == several.at(1).parameters(between)
        made = tiny.roughened(several.build(between, rngs=nnx.Rngs(0)))
        assert made.window == 1 and made.buckets == V and made.fold() is made
        found = []
        for tokens in V:
            one = compressors.describe(section | dict(tokens=tokens)).build(
                between, rngs=nnx.Rngs(0)
            )
            assert one.window == 4 // tokens**0.5 and not one.buckets
            one = jax.tree.unflatten(jax.tree.structure(one), jax.tree.leaves(made))
            ordered = jnp.array(levels[:, window_order(4, one.window)])
            at = made.at(tokens)
            ours, theirs = at(jnp.array(levels), question), one(ordered, question)
            assert ours.shape == (3, tokens, 8)
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
            if hasattr(at, "attention"):
                assert at.attention.absorbed == one.attention.absorbed
                found.append(at.attention.absorbed)
        # The choice of a form follows V, in the copy alone.
        assert found in ([], [True, True, False])
        with pytest.raises(ValueError, match="gives the V of compressor.elastic=.1, 4, 16., not 9"):
            made.at(9)


def test_patches_are_sorted_as_the_encoder_orders_them(mesh8):
    x = np.arange(4 * 36 * 4, dtype=np.float32).reshape(4, 36, 4)
    with jax.set_mesh(mesh8):
        spread = mesh.spread(x, mesh8, "batch")
        for window in (1, 2, 3, 6):
            found = by_window(spread, 6, window, window)
            np.testing.assert_array_equal(found, x[:, window_order(6, window)])
            assert jax.typeof(found).sharding == jax.typeof(spread).sharding


def test_windows_may_be_rectangles(mesh1):
    assert rectangles(6) == {
        1: (6, 6), 2: (6, 3), 3: (6, 2), 4: (3, 3), 6: (3, 2), 9: (2, 2), 12: (3, 1), 18: (2, 1),
        36: (1, 1),
    }  # fmt: skip
    between = Interface(side=6, width=16, levels=1, llm_width=8)
    grid = np.random.default_rng(0).normal(size=(2, 6, 6, 16)).astype(np.float32)
    levels = jnp.array(grid.reshape(2, 36, 16))
    fields = dict(heads=2, tokens=36, elastic=tuple(rectangles(6)))
    with jax.set_mesh(mesh1):
        pool, packer = (
            tiny.roughened(compressors.describe(kind | fields).build(between, rngs=nnx.Rngs(0)))
            for kind in (dict(kind="pool"), dict(kind="token_packer"))
        )
        for tokens, (rows, columns) in rectangles(6).items():
            cut = [
                grid[:, r : r + rows, c : c + columns]
                for r in range(0, 6, rows)
                for c in range(0, 6, columns)
            ]
            means = jnp.array(np.stack([window.mean((1, 2)) for window in cut], axis=1))
            np.testing.assert_allclose(pool.at(tokens)(levels), pool.projector(means), atol=1e-5)
            made = packer.at(tokens)
            middles = [
                window[:, (rows - 1) // 2 : rows // 2 + 1, (columns - 1) // 2 : columns // 2 + 1]
                for window in cut
            ]
            centers = np.stack([middle.mean((1, 2)) for middle in middles], axis=1)
            found = made.downsample(made.window_major(levels))
            np.testing.assert_allclose(found, centers, atol=1e-6)
            # Patches of the first window enter the first token alone.
            changed = grid.copy()
            changed[:, :rows, :columns] += np.linspace(-1, 1, 16)
            before, after = made(levels), made(jnp.array(changed.reshape(2, 36, 16)))
            moved = np.abs(before - after).max((0, 2))
            assert len(moved) == tokens and moved[0] > 1e-3 and (moved[1:] < 1e-6).all()


def test_requests_run_at_each_of_its_v(mesh1):
    with jax.set_mesh(mesh1):
        c, model = model_of()
        made = tiny.batch(c)
        batch = tiny.placed({k: v for k, v in made.items() if k != "loss_mask"})
        answer = Decoder(model, stop_ids=())
        for tokens in (1, 4):
            one = Decoder(alone(model, tokens), stop_ids=())
            found = answer(batch, tokens, new_tokens=2)
            np.testing.assert_array_equal(found, one(batch, new_tokens=2))
        with pytest.raises(ValueError, match="gives the V of compressor.elastic=.1, 4, 16., not 9"):
            answer(batch, 9, new_tokens=2)


# --- Training -------------------------------------------------------------------------------------


def slots(batch, tokens):
    return batch | dict(slots=np.zeros((len(batch["ids"]), tokens), bool))


def test_a_step_runs_the_v_of_its_batch_and_is_that_of_a_model_of_that_v(mesh1):
    with jax.set_mesh(mesh1):
        c, model = model_of()
        batch = tiny.batch(c, rows=16)
        tx = optimizer.optimizer(tiny.stage(c.finetune))

        def stepped(model, batch, **options):
            graph, state = optimizer.start(jax.tree.map(jnp.copy, model), "finetune", tx)
            of = objective.of_stage("finetune", model.compressor, chunk=0)
            step = optimizer.make_step(graph, tx, of, **options)
            state, metrics = step(state, tiny.placed(batch))
            return optimizer.finish(graph, state), metrics

        for tokens, accumulate in ((1, 2), (16, 1)):
            given = tiny.placed(slots(batch, tokens))
            row = objective.drawn_model(model, given).assemble(given).x
            assert row.shape[1] == c.data.text_length + tokens
            # All micro-batches of a step have its V.
            ours = stepped(model, slots(batch, tokens), accumulate=accumulate)
            theirs = stepped(alone(model, tokens), batch)
            np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)
            for a, b in zip(*map(jax.tree.leaves, (ours[0], theirs[0])), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)
            assert ours[0].compressor.tokens == 4  # as it was


@pytest.fixture(scope="module")
def setting(mesh1):
    """A configuration, its inputs and a model."""
    c = tiny.config(compressor=ELASTIC, align=dict(steps=7), checkpoint=dict(every=2))
    source = sources.open_source(Origin.of(c), "train")
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    inputs = stages.Inputs(source, Processor(train_tokenizer(texts, c.llm.vocab), RowFormat.of(c)))
    with jax.set_mesh(mesh1):
        return c, inputs, tiny.created(c)


def drawn(setting, mesh, *, kind=prefixes.DrawnTokens):
    c, inputs, _ = setting
    plain = loader.Batches(inputs.source, inputs.processor, batch=8, seed=3, mesh=mesh, visual=16)
    return kind(plain, V, seed=3)


def test_what_a_step_draws_depends_on_its_position_alone(setting, mesh1, mesh8):
    first = drawn(setting, mesh1)
    seen = [next(first) for _ in range(7)]
    found = [batch["slots"].shape for batch in seen]
    # Each V once in each round.
    assert {n for _, n in found[:3]} == {n for _, n in found[3:6]} == set(V)
    assert len({tuple(first.tokens(3 * r + k) for k in range(3)) for r in range(50)}) == 6
    again = drawn(setting, mesh8)
    again.position = 5
    for k in (5, 6):
        batch = next(again)
        assert batch["slots"].shape == found[k] and again.position == k + 1
        np.testing.assert_array_equal(batch["ids"], seen[k]["ids"])
        assert batch["slots"].sharding == batch["length"].sharding
    # What is computed counts at the V that is run.
    usage, rows, text = first.batches.usage, 8, setting[0].data.text_length
    assert usage.tokens_computed == sum(rows * (text + n) for _, n in found)
    first.close(), again.close()


def test_a_batch_of_text_has_no_v_of_its_own(setting, monkeypatch):
    made = drawn(setting, None)
    text = dict(ids=jnp.zeros((8, 4), jnp.int32))
    monkeypatch.setattr(loader.Batches, "__next__", lambda self: text)
    found, model = next(made), setting[2]
    assert found is text and objective.drawn_model(model, found) is model


@pytest.mark.slow
def test_a_run_that_is_continued_ends_as_an_unbroken_one(setting, mesh1, tmp_path):
    c, _, model = setting

    class Broken(prefixes.DrawnTokens):
        def __next__(self):
            if self.position == 3:
                raise RuntimeError("stopped here")
            return super().__next__()

    def run(name, kind=prefixes.DrawnTokens):
        of = objective.of_stage("align", model.compressor, chunk=0)
        batches = drawn(setting, mesh1, kind=kind)
        try:
            given = jax.tree.map(jnp.copy, model)
            ended = stages.run_stage("align", given, batches, tiny.recipe(c), tmp_path / name, of)
        finally:
            batches.close()
        return jax.tree.map(np.asarray, ended)

    with jax.set_mesh(mesh1):
        unbroken = run("unbroken")
        with pytest.raises(RuntimeError, match="stopped here"):
            run("broken", Broken)
        continued = run("broken")
    for a, b in zip(*map(jax.tree.leaves, (unbroken, continued)), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [tiny.losses(tmp_path / name / "align") for name in ("unbroken", "broken")]
    assert lines[0] == lines[1] and len(lines[0]) == 7


def test_costs_and_memory_are_those_of_what_is_run(mesh1):
    c = tiny.config(compressor=ELASTIC)
    recipe = tiny.recipe(c)
    for stage in ("align", "finetune"):
        each = [stage_flops(recipe.fixed(n), stage, cached=True) for n in V]
        assert stage_flops(recipe, stage, cached=True) == pytest.approx(sum(each) / 3)
        short = [stage_flops(recipe.fixed(n), stage, cached=True, text=9.5) for n in V]
        assert stage_flops(recipe, stage, cached=True, text=9.5) == sum(short) / 3 < sum(each) / 3
        for tokens in V:  # the V of requests changes nothing
            other = tiny.recipe(tiny.config(compressor=ELASTIC | dict(tokens=tokens)))
            assert stage_flops(other, stage, cached=True) == sum(each) / 3
            with jax.set_mesh(mesh1):
                assert memory.of_stage(other, stage) == memory.of_stage(recipe.largest, stage)
    one = tiny.recipe(tiny.config(compressor=ELASTIC | dict(elastic=())))
    assert one.largest is one and not one.drawn and recipe.row[2] == c.data.text_length + 16


# --- What a user asks for -------------------------------------------------------------------------

GRID = (
    "--config=tests/one_size.py", "--config.encoder.steps=2", "--config.align.steps=2",
    "--config.finetune.steps=3", "--config.compressor.elastic=(1, 4)",
    "--config.grid.tokens=(1, 4)", "--config.grid.baselines=(('blind', 1),)",
)  # fmt: skip


def test_a_grid_trains_one_model_for_all_its_v(tmp_path, capsys):
    done = tiny.run("grid", *GRID, f"--workdir={tmp_path}/run", before=tiny.UNDRAWN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finetune: each step runs one of 1, 4 visual tokens") == 3
    rows = {row.cell: row for row in records.read(tmp_path / "run/rows.jsonl")}
    names = ["only-v1-token_packer-s0", "only-v4-token_packer-s0", "only-v1-blind-s0"]
    assert sorted(rows) == sorted(names)
    small, large, blind = (rows[name] for name in names)
    assert small.trained_with == large.trained_with == "only-token_packer-s0"
    assert blind.trained_with == "only-blind-s0" and blind.blind
    assert small.method == "token_packer, elastic" and (small.V, large.V) == (1, 4)
    assert small.train == large.train and small.flops["prefill"] < large.flops["prefill"]
    cells = tmp_path / "run/cells"
    assert (cells / "only-token_packer-s0/finetune/3").is_dir()
    assert not (cells / names[0] / "finetune").exists()
    # A cell is evaluated at another V that the model gives, and at no other.
    asked = ["evaluate", f"--workdir={cells / names[0]}"]
    assert main([*asked, "--config.compressor.tokens=4"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores.keys() - {"settings"} == large.tasks.keys()
    for task, score in large.tasks.items():
        assert scores[task]["score"] == pytest.approx(score["score"])
    assert main([*asked, "--config.compressor.tokens=16"]) == 2
    assert "compressor.elastic=(1, 4), not 16" in capsys.readouterr().err


@pytest.mark.parametrize("verb, fields, words", [
    ("train", dict(kind="pixel_unshuffle"), "has weights that depend on V"),
    ("train", dict(kind="downsample"), "encodes another image for each V"),
    ("train", dict(kind="m3"), "serves several V as it is; set compressor.elastic=()"),
    ("train", dict(kind="quecc"), "set compressor.downsample='pool'"),
    ("train", dict(tokens=16), "compressor.elastic=(1, 4), not 16: choose one of them"),
    ("train", dict(elastic=(1, 9), tokens=1), "token_packer cannot make 9 visual tokens"),
    ("train", dict(elastic=(4, 1)), "compressor.elastic=(4, 1): give V in ascending order"),
    ("train", {"data.row_length": 80}, "sort rows by data.buckets"),
    ("grid", {"grid.tokens": (1, 16)}, "grid.tokens, cell small-v16-token_packer-s0: V=16 is not"),
    ("grid", {"grid.baselines": (("mqt", 4),)}, "compressor.kind='mqt' serves several V as it is"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_its_field(verb, fields, words, tmp_path, capsys):
    given = {"elastic": (1, 4), "tokens": 4, "grid.baselines": ()} | fields
    if verb == "train":
        del given["grid.baselines"]
    named = {k if "." in k else f"compressor.{k}": v for k, v in given.items()}
    more = [f"--config.{name}={value}" for name, value in named.items()]
    assert main([verb, "--config=tests/tiny.py", f"--workdir={tmp_path}/run", *more]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_baseline_of_one_v_stands_beside_it():
    c = tiny.config(compressor=ELASTIC)
    c.grid.baselines = (("mqt", 4, {"elastic": ()}), ("pool", 4))
    found = {cell.name: cell.model for cell in cells_of(c) if cell.llm == "small"}
    assert found["small-v4-mqt-none-s0"] == "small-mqt-none-s0"
    assert found["small-v4-pool-s0"] == "small-pool-s0"  # elastic, as the grid is


def test_a_server_and_a_plan_offer_the_v_that_the_model_gives():
    size = tiny.size(tiny.config(compressor=ELASTIC | dict(elastic=(1, 16), tokens=16)))
    found = Choices.of(size)
    assert (found.supported, found.default, found.low, found.high) == ((1, 16), 16, 1, 16)
    with pytest.raises(ValueError, match="--low=4: choose one of 1, 16"):
        Choices.of(size, low=4)
    elastic = {"token_packer": (1, 16)}
    assert choices.supports("token_packer", 4, 16, elastic)
    assert not choices.supports("token_packer", 4, 4, elastic)
    assert choices.supports("pool", 4, 4, elastic)


def test_a_model_of_one_v_may_go_on_as_one_of_several_and_not_back():
    one = folder.PLAIN | dict(kind="token_packer", tokens=16, heads=2)
    several = one | dict(elastic=list(V))
    assert not start.matters("elastic", one, several)
    assert not start.matters("tokens", one, several)
    assert start.matters("tokens", one, one)
    assert start.matters("elastic", several, one)
