# SPDX-License-Identifier: Apache-2.0
"""What is skipped is told: how many, once each, which first and why, wherever numbers are given."""

import itertools
import json

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax.data.example import Images
from vlm_jax.data.loader import Batches, evaluation_batches, not_answered
from vlm_jax.data.patches import PatchBatches
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.skips import Skip, Skips
from vlm_jax.data.sources import BadExample, Origin, open_source
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.evals import embedded
from vlm_jax.training import features

COLORS = ("red", "green", "blue")
BAD = (1, 4, 6, 7)  # images that are cut short; that of row 9 is not there
FLAGS = ("--config.data.source=llava", "--config.encoder.steps=0")


def write(folder, split, *, rows=12, bad=BAD, gone=(9,), **changed):
    """Rows about pictures of one color, as {split}.json; `changed` holds fields by row."""
    (folder / "images").mkdir(exist_ok=True)
    made = []
    for k in range(rows):
        name = f"{split}{k}.png"
        said = [("human", "<image>\nwhat colour is it?"), ("gpt", COLORS[k % 3])]
        said = [{"from": who, "value": text} for who, text in said]
        made.append({"id": name[:-4], "image": name, "conversations": said})
        made[k] |= changed.get(f"row{k}", {})
        path = folder / "images" / name
        if k not in gone:
            Image.new("RGB", (20 + k, 16), COLORS[k % 3]).save(path)
        if k in bad:
            path.write_bytes(path.read_bytes()[:50])
    (folder / f"{split}.json").write_text(json.dumps(made))


def flags(folder, *more):
    return [
        "--config=tests/tiny.py",
        f"--config.data.path={folder}/{{split}}.json",
        f"--config.data.images={folder}/images",
        *FLAGS,
        *more,
    ]


SKIP = ("--config.data.on_bad_example=skip", "--config.data.workers=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The data, the run's folder, and what training and evaluation printed; a worker reads."""
    folder = tmp_path_factory.mktemp("own")
    write(folder, "train")
    write(folder, "test", bad=(2,), gone=())
    said = {}
    for verb in ("train", "evaluate"):
        argv = flags(folder, *SKIP, f"--workdir={folder}/run")
        said[verb] = tiny.run(verb, *argv)
        assert said[verb].returncode == 0, said[verb].stderr
    return folder, said


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_stage_tells_in_its_end_what_it_skipped(run, stage):
    folder, said = run
    err = said["train"].stderr
    # Six steps of eight rows are four epochs of eleven: each bad one was met often.
    assert err.count(f"{stage}: 4 of 11 examples were skipped") == 1
    after = err.split(f"{stage}: 4 of 11")[1].splitlines()
    assert [f"train{k}.png" in after[1 + n] for n, k in enumerate((1, 4, 6))] == [True] * 3
    assert "cannot be decoded" in after[1] and str(folder / "run" / stage) in after[4]
    lines = (folder / "run" / stage / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert (last["skipped"], last["left_out"]) == (4, 1)
    assert [skip["image"][-10:] for skip in last["first_skipped"]] == [
        "train1.png", "train4.png", "train6.png"]  # fmt: skip
    noted = [json.loads(x) for x in (folder / "run" / stage / "skipped.jsonl").open()]
    assert sorted(skip["id"] for skip in noted) == ["train1", "train4", "train6", "train7"]


def test_what_is_left_out_when_the_data_is_opened_is_told(run):
    err = run[1]["train"].stderr
    assert "1 of 12 rows are left out (missing_image 1)" in err and "train9.png" in err


def test_an_evaluation_of_fewer_examples_says_so(run):
    folder, said = run
    scores = json.loads((folder / "run" / "scores.json").read_text())["llava"]
    assert scores == json.loads(said["evaluate"].stdout)["llava"]
    assert (scores["n"], scores["of"], scores["skipped"]) == (11, 12, 1)
    assert [skip["id"] for skip in scores["first_skipped"]] == ["test2"]
    assert len((folder / "run" / "predictions.jsonl").read_text().splitlines()) == 11
    err = said["evaluate"].stderr
    assert "1 of 12 were skipped, the score is of 11" in err and "test2.png" in err


def test_a_bad_image_that_a_worker_meets_is_one_line(tmp_path):
    write(tmp_path, "train", gone=())
    argv = flags(tmp_path, f"--workdir={tmp_path}/run", "--config.data.workers=1")
    done = tiny.run("train", *argv)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot be decoded" in last and "data.on_bad_example=skip" in last


def test_a_run_of_which_no_image_can_be_read_is_refused(tmp_path):
    write(tmp_path, "train", bad=range(12), gone=())
    argv = flags(tmp_path, f"--workdir={tmp_path}/run", "--config.data.on_bad_example=skip")
    done = tiny.run("train", *argv)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "not one of 12 examples can be used; the last: " in done.stderr.splitlines()[-1]


def test_each_is_counted_once_and_a_restart_goes_on_counting(tmp_path):
    path = tmp_path / "skipped.jsonl"
    first = Skips()
    first.keep(path)
    for number in (7, 3, 7, 9, 5, 3):
        first.add(number, "image", Skip(f"r{number}", f"{number}.jpg", "cut short"))
    with path.open("a") as file:
        file.write('{"number": 8, "ki')  # killed while it wrote
    second = Skips()
    second.keep(path)
    second.add(1, "text", Skip("r1", "", "too long"))
    second.add(9, "image", Skip("r9", "9.jpg", "cut short"))
    assert (len(first), len(second)) == (4, 5)
    assert [skip.id for skip in second.first.values()] == ["r1", "r3", "r5"]
    assert second.fields()["skipped_reasons"] == {"image": 4, "text": 1}
    assert "5 of 20 rows (image 4, text 1); the first:\n  too long\n  3.jpg: cut" in second.summary(
        20, "rows"
    )
    assert not Skips() and Skips().fields() == {}
    third = Skips()
    third.keep(path)
    assert len(third) == 5


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A source of twelve sound rows of which the question of row 5 is too long for its place."""
    folder = tmp_path_factory.mktemp("llava")
    long = [{"from": "human", "value": "what " * 60 + "<image>"}, {"from": "gpt", "value": "red"}]
    write(folder, "train", bad=(), gone=(), row5=dict(conversations=long))
    changes = dict(source="llava", path=f"{folder}/train.json", images=f"{folder}/images")
    c = tiny.config(data=dict(**changes, template="question_first"))
    source = open_source(Origin.of(c), "train")
    return source, Processor(train_tokenizer(["what colour is it?", *COLORS], 256), RowFormat.of(c))


@pytest.mark.parametrize("table", [True, False])
def test_an_example_whose_text_cannot_be_used_is_skipped_too(table, llava, monkeypatch):
    source, processor = llava
    if not table:
        monkeypatch.setattr("vlm_jax.data.texts.TABLE_BYTES", 0)
    with pytest.raises(ValueError, match="example train5: its prompt has"):
        list(itertools.islice(Batches(source, processor, batch=6, seed=0), 2))
    batches = Batches(source, processor, batch=6, seed=0, skip=True)
    seen = [int(i) for b in itertools.islice(batches, 4) for i in b["index"]]
    assert 5 not in seen and batches.skipped == 1 and batches.skips.kinds == {"text": 1}
    faults = {}
    made = evaluation_batches(source, processor, batch=5, skip=True, faults=faults)
    valid = np.concatenate([b["valid"] for b in made])
    assert valid.tolist() == [k != 5 for k in range(12)] + [False] * 3
    (left,) = not_answered(source, faults)
    assert left["id"] == "train5" and "its prompt has" in left["reason"]


def test_images_without_features_are_skipped_where_features_are_used(llava):
    source, processor = llava
    cached = np.ones((len(source.images), 16, 4), np.float32)
    cached[[2, 3]] = np.nan
    batches = Batches(source, processor, batch=6, seed=0, skip=True, features=cached)
    for batch in itertools.islice(batches, 4):
        assert np.isfinite(batch["levels"]).all()
        assert not {2, 3, 5} & set(batch["index"].tolist())
    assert [skip.id for skip in batches.skips.first.values()] == ["train2", "train3", "train5"]
    assert "train2.png could not be read when its features" in batches.skips.first[2].reason


def torn(source, bad):
    """`source`, of which images of some numbers cannot be read."""
    images = source.images

    def read(index):
        if index in bad:
            raise BadExample(f"image {index} cannot be decoded")
        return images[index]

    source.images = Images(read, len(images))
    return source


def test_an_encoder_is_trained_on_the_images_that_can_be_read(llava, mesh1, tmp_path):
    c = tiny.get_config()
    source, processor = torn(open_source(Origin.of(c), "train"), {0, 7}), llava[1]
    with pytest.raises(BadExample):
        list(itertools.islice(PatchBatches(source, processor, batch=8, seed=0, side=4), 5))
    batches = PatchBatches(source, processor, batch=8, seed=0, side=4, skip=True)
    for _ in range(10):
        next(batches)
    batches.close()
    assert batches.skipped == 2 and batches.fields()["first_skipped"][0]["image"] == "image 0"
    with jax.set_mesh(mesh1):
        encoder = tiny.created(c).vit
        made = features.features_of(
            encoder, source, processor, features.Sight(), tmp_path, skip=True
        )
    assert np.flatnonzero(np.isnan(made).any((1, 2))).tolist() == [0, 7]


def test_scores_say_of_how_many_they_are():
    def record(k, cluster):
        return dict(task="nlvr", family="nlvr", prediction="true", answer="true", cluster=cluster)

    records = [record(k, "ab"[k // 3]) for k in range(5)]
    skipped = [dict(id="b-2", image="b2.png", reason="cut short", task="nlvr", cluster="b")]
    scores = embedded.score("nlvr", records, skipped)
    assert [scores["nlvr"][key] for key in ("n", "of", "skipped")] == [5, 6, 1]
    # Of a sentence with an image that could not be read it is not known whether all are right.
    whole = scores["nlvr_consistency"]
    assert [whole[key] for key in ("n", "of", "skipped")] == [1, 2, 1]
    assert "nlvr: 1 of 6 were skipped, the score is of 5" in embedded.summary(scores)
    assert "b2.png: cut short" in embedded.summary(scores) and embedded.summary({}) == ""
    whole = embedded.score("nlvr", records)
    assert (whole["nlvr"]["skipped"], embedded.summary(whole)) == (0, "")
    with pytest.raises(ValueError, match="no example was answered of 1; the first: cut short"):
        embedded.score("nlvr", [], skipped)
    with pytest.raises(ValueError, match="no example of task 'x' was answered: cut short"):
        embedded.score("embedded", records, [skipped[0] | dict(task="x")])
