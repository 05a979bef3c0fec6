# SPDX-License-Identifier: Apache-2.0
"""A benchmark at several V in one pass: an image is encoded once, answers are those of each V."""

import json
import os
import signal
from pathlib import Path

import jax
import pytest
import test_benchmarks

from vlm_jax import mesh as meshes
from vlm_jax import preemption
from vlm_jax.evals.tasks import TASKS
from vlm_jax.serving import asked, benchmarks
from vlm_jax.serving.answer_cache import AnswerCache
from vlm_jax.serving.greedy import Greedy, Said
from vlm_jax.verbs import cli

VS = (1, 4, 16)
M3 = dict(kind="m3", tokens=16, scales=VS)
# It reads the sizes of the images and the words of the question, and changes with V.
MMTOK = dict(kind="mmtok", tokens=4)


@pytest.fixture(
    scope="module",
    params=[pytest.param(M3, marks=pytest.mark.slow), MMTOK],
    ids=lambda section: section["kind"],
)
def opened(request, trained, tmp_path_factory, mesh1):
    path = test_benchmarks.made(
        tmp_path_factory.mktemp("several") / "model", trained, compressor=request.param
    )
    return benchmarks.opened(path, dtype=None, mesh=mesh1)


@pytest.fixture(scope="module")
def alone(opened, tmp_path_factory):
    """The file of each V, answered by a command of its own."""
    folder = tmp_path_factory.mktemp("alone")
    found = [test_benchmarks.evaluated(opened, folder, visual_tokens=(V,)) for V in VS]
    return {V: report for V, (report,) in zip(VS, found, strict=True)}


def together(opened, out, **how):
    return test_benchmarks.evaluated(opened, out, visual_tokens=VS, **how)


def same(report, other):
    assert Path(report["file"]).read_bytes() == Path(other["file"]).read_bytes()
    assert report["settings"] == other["settings"] and report["score"] == other["score"]
    assert [report[k] for k in "NVQ"] == [other[k] for k in "NVQ"]


@pytest.fixture
def encoded(opened, monkeypatch):
    """How many images the encoder was given, batch by batch."""
    decoder, found = opened[0].decoder, []
    levels = decoder.levels

    def counting(model, batch):
        found.append(batch["pixels"].shape[0])
        return levels(model, batch)

    monkeypatch.setattr(decoder, "levels", counting)
    start = decoder.start
    # No program that answers may encode again.
    monkeypatch.setattr(
        decoder, "start", lambda batch, **how: ("levels" in batch or found.append("again"))
        and start(batch, **how)
    )  # fmt: skip
    return found


def test_one_pass_gives_the_files_of_each_v_alone(opened, alone, encoded, tmp_path):
    reports = together(opened, tmp_path, batch=4)
    assert [Path(r["file"]).name for r in reports] == [f"ocrbench-official-v{V}.jsonl" for V in VS]
    for V, report in zip(VS, reports, strict=True):
        same(report, alone[V])
        assert report["together"] == list(VS) and report["settings"]["visual_tokens"] == V
        about = Path(report["file"]).with_suffix(".json")
        assert json.loads(about.read_text()) == json.loads(json.dumps(report))
        assert alone[V]["together"] == [V]
    assert "again" not in encoded and sum(encoded) <= 16  # of 10 questions in batches of 4
    texts = [Path(r["file"]).read_text() for r in reports]
    assert len(set(texts)) == len(VS)


def test_what_one_file_has_is_not_asked_again(opened, alone, encoded, tmp_path):
    first = together(opened, tmp_path, batch=4)
    paths = [Path(r["file"]) for r in first]
    texts = [path.read_text() for path in paths]
    paths[1].unlink()
    paths[1].with_suffix(".json").unlink()
    paths[2].write_text("".join(line + "\n" for line in texts[2].splitlines()[3:]))
    del encoded[:]
    reports = together(opened, tmp_path, batch=4)
    assert [path.read_text() for path in paths] == texts
    assert [r["answered_before"] for r in reports] == [10, 0, 7]
    assert [r["together"] for r in reports] == [[4, 16]] * 3
    (more,) = test_benchmarks.evaluated(opened, tmp_path, visual_tokens=(1,))
    assert more["answered_before"] == 10 and paths[0].read_text() == texts[0]


def test_a_pass_that_was_stopped_is_continued_at_every_v(opened, alone, tmp_path, monkeypatch):
    decoded, signals = Greedy.decoded, iter([0, signal.SIGTERM])  # 0 is no signal

    def stopped(self, questions):
        os.kill(os.getpid(), next(signals, 0))
        return decoded(self, questions)

    monkeypatch.setattr(Greedy, "decoded", stopped)
    body = lambda: together(opened, tmp_path, batch=4)  # noqa: E731
    assert cli.report_errors("evaluate", body) == preemption.STATUS
    for V, report in zip(VS, body(), strict=True):
        assert 4 <= report["answered_before"] < 10
        same(report, alone[V])


def test_each_v_has_entries_of_its_own_in_the_cache(opened, alone, tmp_path):
    cache = AnswerCache(tmp_path / "cache", fits=Said.fits)
    test_benchmarks.evaluated(opened, tmp_path / "1", visual_tokens=(4,), cache=cache)
    reports = together(opened, tmp_path / "2", cache=cache)
    assert [r["cache_hits"] for r in reports] == [0, 10, 0]
    for V, report in zip(VS, reports, strict=True):
        same(report, alone[V])
    assert [r["cache_hits"] for r in together(opened, tmp_path / "3", cache=cache)] == [10] * 3


def test_a_prompt_may_fit_at_one_v_alone(opened, tmp_path, monkeypatch):
    model, _ = opened
    questions = TASKS["ocrbench"].read(test_benchmarks.OCR).questions
    lengths = [len(model.tokens(q.text, images=1).ids) for q in questions]
    monkeypatch.setattr(model, "max_length", min(lengths) + 16 + 1)
    reports = together(opened, tmp_path)
    short = lengths.count(min(lengths))
    assert [(r["failed"], r["shortened"]) for r in reports[::2]] == [(0, 0), (10 - short, short)]
    assert reports[1]["failed"] == 0 < short < 10
    assert "16 of the image" in reports[2]["errors"][0]


def test_images_reduced_to_v_patches_are_others_at_each_v(opened, tmp_path):
    reports = test_benchmarks.evaluated(
        opened, tmp_path, visual_tokens=(1, 4), views=("downsampled",), limit=2
    )
    assert [r["together"] for r in reports] == [[1], [4]]
    assert [r["settings"]["image_side"] for r in reports] == [8, 16]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_several_images_and_devices_change_nothing(shape, trained, tmp_path):
    """MMMU's questions have up to several images, also beside those of one."""
    path = test_benchmarks.made(tmp_path / "model", trained, compressor=M3)
    annotations = test_benchmarks.EXAMPLES / "mmmu" / "annotations"
    how = dict(tasks=("mmmu",), annotations=annotations, max_new_tokens=3)
    one = benchmarks.opened(path, dtype=None, mesh=meshes.make(devices=jax.devices()[:1]))
    alone = [
        test_benchmarks.evaluated(one, tmp_path / "1", visual_tokens=(V,), **how)[0] for V in (1, 4)
    ]
    many = benchmarks.opened(path, dtype=None, mesh=meshes.make(*shape))
    reports = test_benchmarks.evaluated(many, tmp_path / "2", visual_tokens=(1, 4), **how)
    for report, other in zip(reports, alone, strict=True):
        same(report, other)


def test_a_v_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="--visual-tokens=4,4: name each once"):
        asked.Request(("ocrbench",), "official", test_benchmarks.OCR, visual_tokens=(4, 4))
