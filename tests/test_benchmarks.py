# SPDX-License-Identifier: Apache-2.0
"""Answers to public benchmarks: a line for every question, the same in any batch, after any stop.

One small model with random weights answers the examples of tests/published/benchmarks.
"""

import functools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tiny

from vlm_jax import mesh as meshes
from vlm_jax import preemption
from vlm_jax.__main__ import main
from vlm_jax.evals import scoring
from vlm_jax.evals.task import numbered
from vlm_jax.evals.tasks import TASKS
from vlm_jax.models.vlm import parameters
from vlm_jax.rows import scores
from vlm_jax.serving import answer_files, asking, benchmarks
from vlm_jax.serving.answer_cache import AnswerCache
from vlm_jax.serving.greedy import Greedy, Said
from vlm_jax.verbs import cli
from vlm_jax.weights import folder, sources

EXAMPLES = Path(__file__).parent / "published" / "benchmarks"
SHORT = dict(max_new_tokens=5)
OCR = EXAMPLES / "ocrbench" / "annotations"


def made(path, trained, *, max_length=2048, **changes):
    """A model folder whose answers differ from prompt to prompt and image to image."""
    c = tiny.config(**changes)
    with jax.set_mesh(meshes.make(devices=jax.devices()[:1])):
        model = tiny.roughened(tiny.created(c), scale=0.4)
        stored = sources.of_run(trained, c, model)
        stored.facts["max_length"] = max_length
        folder.write(stored, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    return made(tmp_path_factory.mktemp("benchmarks") / "model", trained)


@pytest.fixture(scope="module")
def opened(checkpoint, mesh1):
    return benchmarks.opened(checkpoint, dtype=None, mesh=mesh1)


def evaluated(opened, out, *, cache=None, tasks=("ocrbench",), annotations=OCR, **request):
    """The reports of an evaluation into `out`."""
    model, identity = opened
    given = benchmarks.Request(
        tasks, request.pop("protocol", "official"), annotations, **SHORT | request
    )
    asked = benchmarks.read_tasks(given)
    return list(
        benchmarks.evaluate(model, identity, given, asked, out, model_id="tiny", cache=cache)
    )


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(opened, tmp_path_factory):
    """The answers to all questions of OCRBench's example: report and lines."""
    (report,) = evaluated(opened, tmp_path_factory.mktemp("whole"))
    return report, lines(report["file"])


def test_every_question_has_a_line_of_llava_s_fields_in_the_order_of_the_questions(whole):
    report, rows = whole
    questions = TASKS["ocrbench"].read(OCR).questions
    assert [row["question_id"] for row in rows] == [q.id for q in questions]
    for row, question in zip(rows, questions, strict=True):
        assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert row["prompt"] == question.text and row["text"] == row["text"].strip()
        assert row["metadata"]["visual_tokens"] == 4 and row["model_id"] == "tiny"
    assert len({row["text"] for row in rows}) > 5
    assert len({row["answer_id"] for row in rows}) == report["questions"] == len(questions)
    assert (report["failed"], report["answered_before"], report["shortened"]) == (0, 0, 0)


def test_the_score_is_that_of_the_verb_score(whole, capsys):
    report, _ = whole
    flags = [f"--predictions={report['file']}", f"--annotations={OCR}"]
    assert main(["score", "--task=ocrbench", *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report["score"]
    about = Path(report["file"]).with_suffix(".json")
    assert json.loads(about.read_text()) == json.loads(json.dumps(report))


def test_a_fit_reads_the_report_with_the_columns_of_its_model(whole, opened):
    report, _ = whole
    (point,) = scores.read([Path(report["file"]).parent]).tasks.values()
    assert point.N[0] == parameters(opened[0].decoder.model.llm) / 1e9
    assert (point.V[0], point.Q[0], point.label) == (4, report["Q"], ["tiny"])
    assert 1 - point.error[0] == report["score"]["value"] / report["score"]["n"]


@pytest.mark.parametrize("batch, shape", [(1, None), (7, None), (16, (2, 2, 2))])
def test_the_file_is_the_same_for_any_batch_and_any_devices(
    batch, shape, whole, opened, checkpoint, tmp_path
):
    model = opened
    if shape:
        model = benchmarks.opened(checkpoint, dtype=None, mesh=meshes.make(*shape))
    (report,) = evaluated(model, tmp_path, batch=batch)
    assert Path(report["file"]).read_bytes() == Path(whole[0]["file"]).read_bytes()
    assert report["settings"] == whole[0]["settings"]


def copied(whole, folder):
    """A copy of the answers to all questions, and its file of lines."""
    path = Path(whole[0]["file"])
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    return folder / path.name


def test_a_file_that_was_cut_in_a_line_is_continued(whole, opened, tmp_path, monkeypatch):
    path = copied(whole, tmp_path)
    text = path.read_text()
    ends = [i for i, c in enumerate(text) if c == "\n"]
    path.write_text(text[: ends[3] + 40])
    asked = []
    rows = benchmarks.rows_of
    monkeypatch.setattr(benchmarks, "rows_of", lambda *a, **k: asked.append(a[1]) or rows(*a, **k))
    (report,) = evaluated(opened, tmp_path)
    assert path.read_text() == text and report["answered_before"] == 4
    assert sorted(asked) == list(range(4, 10))


def test_after_sigterm_the_same_command_continues(whole, opened, tmp_path, monkeypatch, capsys):
    decoded, signals = Greedy.decoded, iter([0, signal.SIGTERM])  # 0 is no signal

    def stopped(self, rows):
        os.kill(os.getpid(), next(signals, 0))
        return decoded(self, rows)

    monkeypatch.setattr(Greedy, "decoded", stopped)
    body = functools.partial(evaluated, opened, tmp_path, batch=7)
    assert cli.report_errors("evaluate", body) == preemption.STATUS
    path = tmp_path / "ocrbench-official.jsonl"
    words = f"SIGTERM: {path} has the answers so far, the same command continues"
    assert words in capsys.readouterr().err
    (report,) = body()
    assert report["answered_before"] == 8 and lines(path) == whole[1]


def test_what_could_not_be_answered_is_tried_again(whole, opened, tmp_path):
    path = copied(whole, tmp_path)
    rows = lines(path)
    del rows[2]["text"]
    rows[2]["error"] = "the disk was away"
    path.write_text("".join(answer_files.line_of(row) + "\n" for row in rows))
    (report,) = evaluated(opened, tmp_path)
    assert report["answered_before"] == 9 and lines(path) == whole[1]


def test_answers_of_other_settings_are_refused_with_both(whole, opened, tmp_path):
    path = copied(whole, tmp_path)
    with pytest.raises(ValueError, match=r"there max_new_tokens=5; now max_new_tokens=6"):
        evaluated(opened, tmp_path, max_new_tokens=6)
    with pytest.raises(ValueError, match='there model="e?.*"; now model="0"'):
        evaluated((opened[0], "0"), tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="no ocrbench-official.json with its settings"):
        evaluated(opened, tmp_path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        evaluated(opened, tmp_path)


def test_answers_come_from_the_cache_and_only_to_the_same_question(whole, opened, tmp_path, capsys):
    cache = AnswerCache(tmp_path / "cache", fits=Said.fits)
    (first,) = evaluated(opened, tmp_path / "1", cache=cache)
    (second,) = evaluated(opened, tmp_path / "2", cache=cache)
    (other,) = evaluated(opened, tmp_path / "3", cache=cache, max_new_tokens=4)
    assert [r["cache_hits"] for r in (first, second, other)] == [0, 10, 0]
    assert lines(first["file"]) == lines(second["file"]) == whole[1]
    for path in (tmp_path / "cache").glob("*/*.json"):
        path.write_text(path.read_text()[:20])
    (third,) = evaluated(opened, tmp_path / "4", cache=cache)
    assert (third["cache_hits"], third["cache_damaged"]) == (0, 10)
    assert lines(third["file"]) == whole[1]
    assert "10 entries of --cache were damaged" in capsys.readouterr().err


def test_a_key_depends_on_all_that_the_answer_depends_on(opened):
    model, identity = opened
    question = TASKS["ocrbench"].read(OCR).questions[0]
    same = asking.Way(identity, None, "", 5)
    ways = [
        same,
        asking.Way("other weights", None, "", 5),
        asking.Way(identity, 1, "", 5),
        asking.Way(identity, None, "blind", 5),
        asking.Way(identity, None, "downsampled", 5),
        asking.Way(identity, None, "", 6),
    ]
    keys = [asking.Asker(model, way).row(0, question, "what?").key for way in ways]
    keys.append(asking.Asker(model, same).row(0, question, "what is it?").key)
    keys.append(asking.Asker(model, same).row(0, replace(question, images=()), "what?").key)
    before = model.processor.stop_ids
    model.processor.stop_ids = ()
    keys.append(asking.Asker(model, same).row(0, question, "what?").key)
    model.processor.stop_ids = before
    assert len(set(keys)) == len(keys) and "" not in keys
    assert asking.Asker(model, same).row(7, question, "what?").key == keys[0]


def test_a_blind_model_sees_no_image_and_a_reduced_one_less(whole, opened, tmp_path):
    blind, less = evaluated(opened, tmp_path, views=("blind", "downsampled"))
    assert [Path(r["file"]).name for r in (blind, less)] == [
        "ocrbench-official-blind.jsonl",
        "ocrbench-official-downsampled.jsonl",
    ]
    same = [row["text"] for row in lines(blind["file"]) if row["prompt"] == whole[1][0]["prompt"]]
    assert len(same) == 6 and len(set(same)) == 1
    seen = [row["text"] for row in whole[1]]
    assert seen != [row["text"] for row in lines(less["file"])]
    # 4 of 16 patches: half of the side of 32 pixels.
    assert less["settings"]["image_side"] == 16 and blind["settings"]["view"] == "blind"


@pytest.fixture
def spoilt(tmp_path):
    """OCRBench's example with image 1 gone and image 2 damaged."""
    home = tmp_path / "spoilt"
    shutil.copytree(OCR, home)
    (table,) = home.rglob("OCRBench.json")
    names = [row["image_path"] for row in json.loads(table.read_text())]
    images = table.parent / "OCRBench_Images", table.parent.parent / "OCRBench_Images"
    folder_of_images = next(x for x in images if x.is_dir())
    (folder_of_images / names[1]).unlink()
    (folder_of_images / names[2]).write_bytes(b"no picture")
    return home


def test_what_cannot_be_answered_is_an_error_in_its_line(whole, opened, spoilt, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="1 of .* images are not there, the first is"):
        evaluated(opened, tmp_path / "out", annotations=spoilt)
    (report,) = evaluated(opened, tmp_path / "out", annotations=spoilt, on_missing_image="record")
    rows = lines(report["file"])
    assert [i for i, row in enumerate(rows) if "error" in row] == [1, 2]
    assert "there is no image" in rows[1]["error"] and "cannot be decoded" in rows[2]["error"]
    assert [r for i, r in enumerate(rows) if i not in (1, 2)] == [
        r for i, r in enumerate(whole[1]) if i not in (1, 2)
    ]
    assert report["failed"] == report["score"]["failed"] == 2 and report["score"]["n"] == 10
    assert "2 of 10 questions were not answered" in capsys.readouterr().err
    # Nobody looks at the images of a blind model.
    (blind,) = evaluated(opened, tmp_path / "blind", annotations=spoilt, views=("blind",))
    assert blind["failed"] == 0


def test_a_prompt_that_leaves_no_room_is_an_error_and_little_room_is_counted(
    opened, tmp_path, monkeypatch
):
    model, _ = opened
    lengths = [
        len(model.tokens(q.text, images=1).ids) for q in TASKS["ocrbench"].read(OCR).questions
    ]
    monkeypatch.setattr(model, "max_length", max(lengths) + 4)
    (report,) = evaluated(opened, tmp_path)
    longest = lengths.count(max(lengths))
    assert report["failed"] == longest and "this model was made for" in report["errors"][0]
    assert report["shortened"] == sum(max(lengths) - 5 < n < max(lengths) for n in lengths)
    monkeypatch.setattr(model, "max_length", 5)
    with pytest.raises(ValueError, match="none of 10 questions was answered"):
        evaluated(opened, tmp_path / "none")


def test_some_of_the_questions_have_a_file_of_their_own(whole, opened, tmp_path):
    (report,) = evaluated(opened, tmp_path, offset=3, limit=4, samples=True)
    assert Path(report["file"]).name == "ocrbench-official-offset3-limit4.jsonl"
    assert lines(report["file"]) == whole[1][3:7]
    assert report["score"]["n"] == 4 and "4 of 10 questions" in report["score"]["notes"][-1]
    (path,) = tmp_path.glob("*_samples_ocrbench.jsonl")
    logged = lines(path)
    assert [x["doc_id"] for x in logged] == [3, 4, 5, 6]
    assert [x["resps"] for x in logged] == [[row["text"]] for row in whole[1][3:7]]
    assert sum(x["points"] for x in logged) == report["score"]["value"]
    with pytest.raises(ValueError, match="beyond the end: ocrbench has 10 questions"):
        evaluated(opened, tmp_path, offset=10)


def test_without_answers_in_the_annotations_there_is_no_score(opened, tmp_path, monkeypatch):
    task = TASKS["ocrbench"]

    def read(path):
        given = task.read(path)
        return replace(given, questions=tuple(replace(q, answers=()) for q in given.questions))

    monkeypatch.setitem(TASKS, "ocrbench", replace(task, read=read))
    (report,) = evaluated(opened, tmp_path, limit=2)
    assert report["score"] is None and "as in a test split" in report["not_scored"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A folder with one subfolder for each task, as --annotations wants it for several."""
    home = tmp_path_factory.mktemp("annotations")
    for name in TASKS:
        (home / name).symlink_to(EXAMPLES / name / "annotations")
    return home


def test_every_benchmark_is_answered_and_scored(opened, examples, tmp_path):
    names = tuple(name for name in TASKS if (EXAMPLES / name).is_dir())
    assert len(names) >= 17
    # One row at a time: few programs to compile.
    how = dict(max_new_tokens=2, batch=1)
    reports = evaluated(opened, tmp_path, tasks=names, annotations=examples, **how)
    for name, report in zip(names, reports, strict=True):
        given = scoring.score(name, "official", Path(report["file"]), examples / name)
        assert report["failed"] == 0 and report["score"] == given.described, name


def test_a_file_for_each_v_by_the_verb(trained, tmp_path, capsys):
    where = made(tmp_path / "m3", trained, compressor=dict(kind="m3", tokens=16, scales=(1, 4, 16)))
    argv = ["evaluate", f"--workdir={where}", "--tasks=ocrbench", f"--annotations={OCR}",
            "--limit=2", "--max-new-tokens=3", f"--cache={tmp_path / 'cache'}"]  # fmt: skip
    assert main([*argv, "--visual-tokens=1,4", "--predict-only"]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(r["file"]).name for r in reports] == [
        "ocrbench-official-v1-limit2.jsonl",
        "ocrbench-official-v4-limit2.jsonl",
    ]
    assert all(r["cache_hits"] == 0 and "score" not in r for r in reports)
    seen = [[row["metadata"]["visual_tokens"] for row in lines(r["file"])] for r in reports]
    assert seen == [[1, 1], [4, 4]]
    assert main([*argv, "--visual-tokens=5"]) == 2
    assert "5" in (err := capsys.readouterr().err) and "16" in err and "Traceback" not in err


@pytest.mark.parametrize("flags, said", [
    (["--tasks=ocrbnch"], "unknown task 'ocrbnch', did you mean ocrbench?"),
    (["--tasks=ocrbench", "--protocol=paper"], "ocrbench has no protocol 'paper': choose"),
    (["--tasks=ocrbench", "--limit=0"], "--limit=0: give 1 or more"),
    (["--tasks=ocrbench", "--offset=-1"], "--offset=-1: give 0 or more"),
    (["--tasks=ocrbench", "--offset=99"], "--offset=99 is beyond the end: ocrbench has 10"),
    (["--tasks=ocrbench", "--visual-tokens=4,x"], "--visual-tokens: 'x' is no whole number"),
    (["--tasks=ocrbench,ocrbench"], "--tasks=ocrbench,ocrbench: name each once"),
    (["--tasks=ocrbench", "--predict-only", "--log-samples"], "goes without --predict-only"),
    (["--tasks=ocrbench", "--config.seed=1"], "--config.seed=1 goes without --tasks"),
    (["--protocol=official"], "--protocol goes with --tasks=TASKS"),
    (["--tasks=ocrbench"], "holds no trained model"),
])  # fmt: skip
def test_a_wrong_word_is_refused_in_one_line(flags, said, tmp_path, capsys):
    argv = ["evaluate", f"--workdir={tmp_path}", f"--annotations={OCR}", *flags]
    if not flags[0].startswith("--tasks"):
        argv.pop(2)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_model_without_a_tokenizer_and_a_task_without_a_folder_are_named(
    checkpoint, tmp_path, capsys
):
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    argv = ["evaluate", f"--workdir={tmp_path / 'model'}", "--tasks=ocrbench"]
    assert main([*argv, f"--annotations={OCR}"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    argv[-1] = "--tasks=ocrbench,docvqa"
    assert main([*argv, f"--annotations={tmp_path}"]) == 2
    assert f"--annotations={tmp_path} has no folder ocrbench" in capsys.readouterr().err


def test_questions_with_one_id_and_prompt_are_continued_apart(opened, tmp_path, monkeypatch):
    task = TASKS["ocrbench"]

    def read(path):
        given = task.read(path)
        pair = [
            replace(q, id=0, text="what?", key=k)
            for q, k in zip(given.questions[:2], "00", strict=True)
        ]
        return replace(given, questions=numbered(pair))

    monkeypatch.setitem(TASKS, "ocrbench", replace(task, read=read))
    (report,) = evaluated(opened, tmp_path)
    path, rows = Path(report["file"]), lines(report["file"])
    assert rows[0]["text"] != rows[1]["text"] and report["score"]["n"] == 2
    path.write_text(answer_files.line_of(rows[1]) + "\n")
    (report,) = evaluated(opened, tmp_path)
    assert report["answered_before"] == 1 and lines(path) == rows
