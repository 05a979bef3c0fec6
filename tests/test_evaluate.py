# SPDX-License-Identifier: Apache-2.0
"""Greedy answers equal those of full passes; every example is answered once, on any devices."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.data import loader, sources
from vlm_jax.data.processor import Processor, RowFormat, load_tokenizer
from vlm_jax.data.sources import Origin
from vlm_jax.evals import embedded
from vlm_jax.serving import predict as predictions
from vlm_jax.serving.decoder import Decoder

NEW = 4


@pytest.fixture(scope="module")
def setting(trained, mesh1):
    """Configuration, test split, processor, and a model whose answers differ from row to row."""
    c = tiny.get_config()
    source = sources.open_source(Origin.of(c), "test")
    with jax.set_mesh(mesh1):
        model = tiny.roughened(tiny.created(c), scale=0.3)
    return c, source, Processor(load_tokenizer(trained / "tokenizer"), RowFormat.of(c)), model


@pytest.fixture(scope="module")
def batch(setting, mesh1):
    c, source, processor, _ = setting
    with jax.set_mesh(mesh1):
        made = next(loader.evaluation_batches(source, processor, batch=8, mesh=mesh1))
    return {k: v for k, v in made.items() if k not in ("valid", "index")}


@pytest.fixture(scope="module")
def greedy(setting, batch, mesh1):
    """Greedy ids [8, NEW] by one full pass per token, no cache and no end."""
    with jax.set_mesh(mesh1):
        logits = jax.jit(lambda m, b: m.logits(b))
        rows, now = np.arange(8), {k: np.asarray(v) for k, v in batch.items()}
        text = now["ids"].shape[1]
        assert now["length"].max() + NEW <= text
        for _ in range(NEW):
            # Scores of a token that is not there yet: its slot holds padding, which comes later.
            scores = np.asarray(logits(setting[3], tiny.placed(now)))[rows, now["length"]]
            ids = now["ids"].copy()
            ids[rows, now["length"]] = scores.argmax(-1)
            now |= dict(ids=ids, length=now["length"] + 1)
    start = now["length"] - NEW
    return np.stack([now["ids"][rows, start + k] for k in range(NEW)], axis=1)


def test_answers_are_the_greedy_choices_of_full_passes(setting, batch, greedy, mesh1):
    assert len({tuple(row) for row in greedy}) > 2
    with jax.set_mesh(mesh1):
        answer = Decoder(setting[3], stop_ids=(-1,))
        for _ in range(2):
            np.testing.assert_array_equal(answer(batch, new_tokens=NEW), greedy)
    assert answer.first._cache_size() == answer.following._cache_size() == 1


def test_decoding_stops_when_every_row_has_ended(setting, batch, greedy, mesh1):
    # The token that ends must be one that all rows say; where there is none, the first of row 0.
    with jax.set_mesh(mesh1):
        eos = int(greedy[0, 0])
        ends = [list(row).index(eos) if eos in row else NEW for row in greedy]
        found = Decoder(setting[3], stop_ids=(eos,))(batch, new_tokens=NEW)
    assert found.shape == (8, min(NEW, max(ends) + 1))
    np.testing.assert_array_equal(found, greedy[:, : found.shape[1]])


def test_every_example_is_answered_once_in_order(setting, mesh1):
    c, source, processor, model = setting
    c = tiny.config(evaluate=dict(batch=20))
    assert len(source) % 20
    with jax.set_mesh(mesh1):
        records = list(predictions.predict(c, model, source, processor))
    assert [r["id"] for r in records] == [source[i].id for i in range(len(source))]
    for i, record in enumerate(records):
        assert record["answer"] == source[i].turns[-1][1] and record["task"] == source[i].task
        assert processor.tokenizer.eos_token not in record["prediction"]


def test_a_clock_times_every_batch_but_the_first(setting, mesh1):
    _, source, processor, model = setting
    clock = predictions.Clock()
    with jax.set_mesh(mesh1):
        config = tiny.config(evaluate=dict(batch=20))
        list(predictions.predict(config, model, source, processor, clock=clock))
    assert len(clock.seconds) == -(-len(source) // 20) and clock.batch == 20
    clock.seconds[0] = 1e9  # the first batch compiles
    timing = clock.timing()
    assert timing["batch"] == 20 and 1 <= timing["new_tokens"] <= config.evaluate.max_new_tokens
    assert timing["seconds_per_example"] == pytest.approx(np.median(clock.seconds[1:]) / 20)
    alone = predictions.Clock()
    alone.note(1.0, (8, 3))
    assert alone.timing() == {}


def test_the_answer_is_not_in_the_prompt(setting, mesh1):
    c, source, processor, _ = setting
    made = next(loader.evaluation_batches(source, processor, batch=8))
    for i, (ids, length) in enumerate(zip(made["ids"], made["length"], strict=True)):
        whole = processor.text(source[i])
        assert length == whole["loss_mask"].argmax()
        np.testing.assert_array_equal(ids[:length], whole["ids"][:length])


def test_answers_end_before_the_end_token(setting, mesh1, monkeypatch):
    c, source, processor, model = setting
    word, eos = processor.tokenizer.encode("7", add_special_tokens=False)[-1], processor.eos_id
    fixed = np.tile(np.array([word, eos, word, word], np.int32), (c.evaluate.batch, 1))
    monkeypatch.setattr(Decoder, "__call__", lambda self, batch, new_tokens: fixed)
    with jax.set_mesh(mesh1):
        records = list(predictions.predict(c, model, source, processor))
    assert {r["prediction"] for r in records} == {"7"}


def test_what_errs_together_is_one_cluster():
    def cluster(**fields):
        return sources.Example(**{**dict(turns=(), family="text", task="word"), **fields}).cluster

    assert cluster(id="test-000004-1", image=4) == "4"
    assert cluster(id="poem-7", image=None) == "poem-7"
    assert cluster(id="4030-2-1", image=9, cluster="4030") == "4030"


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The same trained run evaluated on one device in its own process, and its printed scores."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, folder)
    done = tiny.run("evaluate", "--config=tests/tiny.py", f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_verb_writes_predictions_and_their_scores(evaluated):
    folder, printed = evaluated
    records = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    assert len(records) == len(sources.open_source(Origin.of(tiny.get_config()), "test"))
    assert (
        printed
        == json.loads((folder / "scores.json").read_text())
        == json.loads(json.dumps(embedded.score("embedded", records)))
    )


def test_a_checkpoint_of_one_device_answers_alike_on_eight(evaluated, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert main(["evaluate", "--config=tests/tiny.py", f"--workdir={tmp_path}/run"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == evaluated[1].keys()
    ours, theirs = (
        [json.loads(x) for x in (folder / "predictions.jsonl").open()]
        for folder in (tmp_path / "run", evaluated[0])
    )
    same = np.mean([a["prediction"] == b["prediction"] for a, b in zip(ours, theirs, strict=True)])
    assert [a["id"] for a in ours] == [b["id"] for b in theirs]
    assert same > 0.95  # two nearly equal scores may change places


def test_evaluating_what_was_not_trained_says_what_to_do(tmp_path, capsys):
    assert main(["evaluate", "--config=tests/tiny.py", f"--workdir={tmp_path}"]) == 2
    assert "holds no trained model" in (err := capsys.readouterr().err)
    assert "vlm-jax train" in err and "Traceback" not in err


@pytest.mark.parametrize("steps", [0, 4])
def test_what_is_not_finished_is_not_evaluated(steps, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/finetune/6")
    if steps == 0:
        shutil.rmtree(tmp_path / "run/finetune/4")
    assert main(["evaluate", "--config=tests/tiny.py", f"--workdir={tmp_path}/run"]) == 2
    assert f"finetune holds {steps} of 6 steps: repeat" in capsys.readouterr().err
