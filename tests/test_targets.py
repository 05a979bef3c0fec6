# SPDX-License-Identifier: Apache-2.0
"""Training on nothing does not succeed: rows whose answers are all cut away are counted before."""

import json
import re

import jax
import pytest
import tiny
from PIL import Image

from vlm_jax import mesh
from vlm_jax.__main__ import main
from vlm_jax.data import targets
from vlm_jax.data.example import BadExample
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin, open_source
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.training import stages
from vlm_jax.training.log import Log
from vlm_jax.training.optimizer import Metrics

WORDS = "what is it and why a red cat".split()


def write(folder, questions, answers=("a cat",)):
    """Rows with a question of so many words each."""
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    rows = []
    for k, words in enumerate(questions):
        text = " ".join(WORDS[(k + n) % len(WORDS)] for n in range(words))
        said = [{"from": "human", "value": f"<image>\n{text}"}]
        for more, answer in enumerate(answers):
            said += [{"from": "human", "value": "and?"}] * bool(more)
            said += [{"from": "gpt", "value": answer}]
        rows.append({"id": str(k), "image": "one.png", "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows))


def opened(folder, *, compressor=(), **data):
    changes = dict(source="llava", path=f"{folder}/rows.json", images=str(folder))
    c = tiny.config(data=changes | data, compressor=dict(compressor))
    source = open_source(Origin.of(c), "train")
    return source, Processor(train_tokenizer([*WORDS, "and?"], 256), RowFormat.of(c))


def survey(folder, **how):
    return targets.survey(*opened(folder, **how), skip=False)


# Template -> its lengths; the first rows have a target in them, and the last have not.
TEMPLATES = {
    "bare": dict(text_length=24, question_length=12),
    "vicuna_v1": dict(text_length=200, question_length=12),
    "plain": dict(text_length=3, question_length=2),
    "vicuna_question_first": dict(text_length=208, question_length=190),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_counted_by_what_is_left_of_them_when_they_are_cut(name, tmp_path):
    write(tmp_path, range(3, 40))
    lengths = TEMPLATES[name]
    compressor = dict(kind="quecc", query="prefix") if name == "vicuna_question_first" else {}
    source, processor = opened(tmp_path, template=name, compressor=compressor, **lengths)
    found = targets.survey(source, processor, skip=False)
    made = [processor.text(source[i]) for i in range(len(source))]
    without = sum(not row["loss_mask"].any() for row in made)
    assert (found.rows, found.without) == (37, without)
    if name in ("bare", "vicuna_v1"):
        length, question = found.lengths[0]
        data = dict(template=name, text_length=length, question_length=question)
        longer = Processor(processor.tokenizer, RowFormat.of(tiny.config(data=data)))
        assert 0 < without < 37 and targets.survey(source, longer, skip=False).without == 0
        longer.text_length -= 8  # what is advised is rounded up to a multiple of 8
        assert targets.survey(source, longer, skip=False).without > 0


def test_behind_an_image_is_a_length_of_its_own(tmp_path):
    write(tmp_path, [3] * 5)
    how = dict(template="vicuna_question_first", compressor=dict(kind="quecc", query="prefix"))
    # One token is left behind the image, where "ASSISTANT:" stands in front of the answer.
    source, processor = opened(tmp_path, text_length=201, question_length=200, **how)
    with pytest.raises(ValueError, match="none of 5 rows .*data.question_length=200 keep"):
        targets.check(source, processor, skip=False)
    (length, question), _ = targets.survey(source, processor, skip=False).lengths
    source, processor = opened(tmp_path, text_length=length, question_length=question, **how)
    assert targets.check(source, processor, skip=False) == ""


def test_an_early_answer_is_enough(tmp_path):
    write(tmp_path, [4] * 3, answers=["a cat", "red " * 60])
    assert survey(tmp_path, text_length=12).without == 0


def test_rows_that_are_short_for_sure_are_not_tokenized(tmp_path, monkeypatch):
    write(tmp_path, [5] * 6 + [400])
    whole, seen = Processor.tokens, set()

    def tokens(self, example, *, answer):
        seen.add(example.id)
        return whole(self, example, answer=answer)

    monkeypatch.setattr(Processor, "tokens", tokens)
    found = survey(tmp_path, text_length=200)
    assert (found.doubtful, found.looked_at, found.without) == (1, 1, 1) and seen == {"6"}


def test_of_many_doubtful_rows_an_even_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "LOOKED_AT", 10)
    write(tmp_path, [5, 90, 90, 90] * 10)
    source, processor = opened(tmp_path, text_length=32)
    found = targets.survey(source, processor, skip=False)
    assert found.looked_at == 10 < found.doubtful == 40 and abs(found.share - 0.75) < 0.16
    assert re.search(
        r"about \d+.00% of 40 rows \(an even sample of 10", targets.warning(found, processor)
    )


@pytest.mark.parametrize("bad, level", [(1, "print"), (2, "warning"), (9, "warning")])
def test_more_than_one_in_a_hundred_is_a_warning(bad, level, tmp_path, caplog):
    write(tmp_path, [60] * bad + [5] * (100 - bad))
    source, processor = opened(tmp_path, text_length=32, question_length=28)
    said = targets.check(source, processor, skip=False)
    text = said if level == "print" else caplog.text
    assert f"{bad} of 100 rows ({bad}.00%)" in text and bool(said) == (level == "print")
    assert "data.text_length=64 and data.question_length=28 keep all" in text


def test_one_long_row_does_not_set_the_length_that_is_advised(tmp_path):
    write(tmp_path, [60] * 5 + [900] + [5] * 94)
    found = survey(tmp_path, text_length=32)
    assert [lengths[0] for lengths in found.lengths] == [904, 64]


def test_a_row_that_does_not_fit_at_all_is_refused_or_counted(tmp_path):
    write(tmp_path, [5, 60, 5])
    source, processor = opened(tmp_path, template="question_first", text_length=32)
    with pytest.raises(BadExample, match="example 1: its prompt has .*=skip; 1 of 3 .*_length=64"):
        targets.check(source, processor, skip=False)
    assert targets.survey(source, processor, skip=True).without == 1


def flags(folder, *more):
    return [
        "--config=tests/tiny.py",
        f"--config.data.path={folder}/rows.json",
        f"--config.data.images={folder}",
        "--config.data.source=llava",
        "--config.encoder.steps=0",
        f"--workdir={folder}/run",
        *more,
    ]


@pytest.mark.parametrize("verb", ["train", "skip"])
def test_a_run_in_which_no_row_has_a_target_is_refused(verb, tmp_path, capsys):
    write(tmp_path, range(40, 60))
    more = ["--config.data.on_bad_example=skip"] if verb == "skip" else []
    assert main(["train", *flags(tmp_path, *more)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "none of 20 rows has a token of an answer within data.text_length=32" in last
    assert "data.text_length=64 and data.question_length=28 keep all of them" in last
    assert not (tmp_path / "run" / "align").exists()


def test_a_stage_that_supervised_nothing_is_no_success(tmp_path, capsys):
    def step(tokens):
        return Metrics(loss=0.0, accuracy=0.0, gradient_norm=0.0, tokens=tokens)

    progress = Log(tmp_path, "align", first=0, last=3, every=1, batch=8, patience=3)
    progress(1, step(0), lambda: None)
    progress(2, step(0), lambda: None)
    with pytest.raises(ValueError, match="align: not one of 3 steps.*data.text_length"):
        progress(3, step(0), lambda: None)
    progress.close()
    assert "align 2/3  no supervised token" in capsys.readouterr().err
    progress = Log(tmp_path, "align", first=0, last=3, every=1, batch=8, patience=3)
    for k, tokens in enumerate((0, 5, 0), 1):
        progress(k, step(tokens), lambda: None)
    progress.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["tokens"] for line in lines] == [0, 5, 0]
    assert [line["steps_without_tokens"] for line in lines] == [1, 1, 2]


def test_more_rows_in_a_batch_than_in_the_data_is_said(tmp_path, caplog, monkeypatch):
    write(tmp_path, [3, 4, 5])
    source, processor = opened(tmp_path)
    monkeypatch.setattr(stages, "run_stage", lambda name, model, *rest, **how: model)
    c = tiny.config(encoder=dict(steps=0))
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        stages.train(tiny.recipe(c), tmp_path, stages.Inputs(source, processor))
    assert "align.batch=8 is more than the 3 examples" in caplog.text
