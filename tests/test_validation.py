# SPDX-License-Identifier: Apache-2.0
"""Validation is of examples that are not trained on, changes no number, and misses no step."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax.data import loader, sources, subset
from vlm_jax.data.example import Example, Images
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.skips import Skips
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.models import lora
from vlm_jax.models.vlm import VLM
from vlm_jax.reports import loss_figure
from vlm_jax.serving import validation as answering
from vlm_jax.training import optimizer
from vlm_jax.training.cells import cells_of
from vlm_jax.training.first_weights import first_model
from vlm_jax.training.objective import next_token
from vlm_jax.training.recipe import ValidationSize
from vlm_jax.training.validation import Outside, Validation
from vlm_jax.training.workdir import digest, of_json

EVERY = ("--config.encoder.steps=0", "--config.align.steps=0")


class Made:
    """A source whose examples show these images."""

    name, split, protocol, data_hash = "made", "train", "embedded", "0" * 64

    def __init__(self, shown):
        self.examples = [
            Example(f"{k}", images or None, (("what?", "this"),), "made", "made")
            for k, images in enumerate(shown)
        ]
        self.images = Images(lambda i: np.zeros((4, 4, 3), np.uint8), 99)
        self.left_out = Skips()

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def describe(self):
        return {"source": "made", "examples": len(self)}

    def notes(self):
        return []


@pytest.mark.parametrize("count", [1, 5, 9])
def test_no_image_is_in_training_and_in_what_is_held_out(count):
    rng = np.random.default_rng(count)
    source = Made([tuple({*rng.integers(0, 30, 1 + k % 2).tolist()}) for k in range(20)] + [()] * 8)
    kept, held = subset.hold_out(source, count)
    assert len(held) >= count and len(kept) + len(held) == len(source)
    seen = [{image for k in range(len(one)) for image in one[k].images} for one in (kept, held)]
    assert not seen[0] & seen[1]
    again = subset.hold_out(source, count)
    assert [e.id for e in again[1]] == [e.id for e in held] and again[0].data_hash == kept.data_hash
    assert kept.data_hash != held.data_hash and held.describe()["examples"] == len(held)


def test_too_much_cannot_be_held_out():
    with pytest.raises(ValueError, match="hold_out=1: .* 4 of 4 examples"):
        subset.hold_out(Made([(0, 1), (1, 2), (2, 3), (3, 0)]), 1)
    with pytest.raises(ValueError, match="hold_out=9"):
        subset.hold_out(Made([(k,) for k in range(10)]), 9)


def test_a_sample_is_even_and_of_no_more_than_there_is():
    source = Made([(k,) for k in range(10)])
    assert [e.id for e in subset.sample(source, 4)] == ["0", "2", "5", "7"]
    assert subset.sample(source, 10) is source and subset.sample(source, 99) is source


def test_examples_are_not_held_out_for_nothing():
    config = tiny.config(validation=dict(hold_out=5))
    with pytest.raises(ValueError, match="hold_out=5, but eval_every=0"):
        ValidationSize.of(config)
    with pytest.raises(ValueError, match="eval_every=2: a grid"):
        cells_of(tiny.config(eval_every=2))


@pytest.fixture(scope="module")
def val():
    config = tiny.config(data=dict(val_images=5))
    source = sources.open_source(sources.Origin.of(config), "val")
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    return source, Processor(train_tokenizer(texts, 256), RowFormat.of(config))


def state_of(config):
    model = lora.adapt(first_model(tiny.recipe(config), None, seed=0), config_lora(config), seed=0)
    return optimizer.start(model, "finetune", optimizer.optimizer(tiny.stage(config.finetune)))


def config_lora(config):
    return tiny.recipe(config).lora


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "adapters"])
def test_the_loss_is_that_of_all_tokens_and_weights_stay_as_they_are(rank, val, mesh8, tmp_path):
    source, processor = val
    config = tiny.config(eval_every=3, lora=dict(rank=rank), evaluate=dict(batch=8))
    (tmp_path / "finetune").mkdir()
    drawn = []

    def answers(*of):
        return answering.answers(config, *of)

    with jax.set_mesh(mesh8):
        graph, state = state_of(config)
        before = jax.tree.map(np.array, (state.trained, state.frozen))
        made = Validation("finetune", source, processor, tiny.recipe(config), tmp_path,
                          Outside(answers, drawn.append))  # fmt: skip
        made.resume(0)
        assert made.due(0) and not made.due(1)
        made(0, graph, state)
        assert not made.due(0) and made.due(3) and made.due(config.finetune.steps)
        after = jax.tree.map(np.array, (state.trained, state.frozen))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        model: VLM = nnx.merge(graph, state.trained, state.frozen)
        nll, count = 0.0, 0
        for batch in loader.evaluation_batches(source, processor, batch=4, answer=True, mesh=mesh8):
            valid, _ = batch.pop("valid"), batch.pop("index")
            batch["loss_mask"] = batch["loss_mask"] & valid[:, None]
            nll += float(next_token(model, batch).nll)
            count += int(batch["loss_mask"].sum())
    (line,) = map(json.loads, (tmp_path / "finetune/validation.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx(nll / count, rel=1e-5) and line["tokens"] == count
    assert (line["step"], line["examples"], line["skipped"]) == (0, len(source), 0)
    assert sum(score["n"] for score in line["scores"].values()) == len(source)
    assert drawn == [tmp_path / "finetune"]


def test_lines_after_the_step_that_is_resumed_are_made_again(val, tmp_path):
    config = tiny.config(eval_every=2)
    path = tmp_path / "align/validation.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (0, 2, 4)))
    made = Validation("align", *val, tiny.recipe(config), tmp_path, None)
    made.resume(3)
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [0, 2]
    assert [step for step in range(3, 5) if made.due(step)] == [4]
    made.resume(0)
    assert not path.read_text() and made.due(0)


def test_the_figure_shows_both_curves_and_scores(tmp_path):
    folder = tmp_path / "finetune"
    folder.mkdir()
    lines = [{"step": k, "loss": 3.0 / k} for k in range(1, 9)] + [{"step": 9, "loss": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    score = {"vqa": {"score": 0.5, "stderr": 0.1, "n": 4, "skipped": 0}}
    checked = [{"step": k, "loss": 2.0, "scores": score} for k in (0, 4, 8)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(x) + "\n" for x in checked))
    curves, scores = loss_figure.draw(folder)
    rows = curves.csv.read_text().splitlines()
    assert sum(row.startswith("training,line") for row in rows) == 8
    assert sum(row.startswith("validation,point") for row in rows) == 3
    assert sum(row.startswith("vqa,point") for row in scores.csv.read_text().splitlines()) == 3
    assert Path(curves.png).stat().st_size > 1000


@pytest.mark.slow
def test_a_validated_run_trains_the_same_and_goes_on_where_it_was_stopped(tmp_path):
    plain = ["train", "--config=tests/tiny.py", *EVERY]
    checked = [*plain, "--config.eval_every=2", "--config.validation.answers=8"]
    for name, argv in (("plain", plain), ("checked", checked)):
        done = tiny.run(*argv, f"--workdir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "checked/finetune"
    assert tiny.losses(folder) == tiny.losses(tmp_path / "plain/finetune")

    def lines():
        found = map(json.loads, (folder / "validation.jsonl").read_text().splitlines())
        return [{key: x[key] for key in x if key != "seconds"} for x in found]

    unbroken = lines()
    assert [line["step"] for line in unbroken] == [0, 2, 4, 6]
    assert "validation: loss" in done.stderr and (folder / "curves.png").exists()
    shutil.rmtree(folder / "6")
    again = tiny.run(*checked, f"--workdir={tmp_path}/checked")
    assert again.returncode == 0, again.stderr
    assert lines() == unbroken


def test_a_folder_of_before_there_was_validation_is_read():
    config = tiny.config()
    tree = json.loads(config.to_json())
    del tree["validation"], tree["eval_every"]
    read = of_json(tree)
    assert read.validation.to_dict() == config.validation.to_dict() and read.eval_every == 0
    assert digest(read) == digest(config) != digest(tiny.config(eval_every=2))
