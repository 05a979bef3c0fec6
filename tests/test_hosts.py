# SPDX-License-Identifier: Apache-2.0
"""Several processes are one run: the same numbers, one writer, and no process that waits for ever.

Processes are slow to start and compile for themselves: one pair of them trains and evaluates
(`two`), and what more is asked of several is marked slow.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import tiny

from vlm_jax import hosts
from vlm_jax.__main__ import main
from vlm_jax.serving.model import VLM

CONFIG = f"--config={tiny.ROOT}/tests/tiny.py"
# One stage of a model that is there: as few programs as a training has.
SHORT = [CONFIG, "--config.encoder.steps=0", "--config.align.steps=0", "--config.finetune.steps=3"]
GRID = [CONFIG, "--config.grid.tokens=(4,)", "--config.grid.baselines=()"]
EXAMPLE = f"{tiny.ROOT}/tests/published/benchmarks/ocrbench/annotations"
BENCHMARK = ["evaluate", "--tasks=ocrbench", f"--annotations={EXAMPLE}", "--max-new-tokens=3"]
PROMPTS = ["what is there ?", "how many circles are there ?", "which word is written ?"]


def files_of(folder):
    """Every file below a folder, but for those of a checkpoint's arrays, which each process has."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(str(p) for p in found if not {"state", "digests"} & {*p.parts})


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """A file of requests, the second of which names an image that is not there."""
    path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    lines = [{"prompt": prompt} for prompt in PROMPTS] + [{"prompt": "?", "image": "none.png"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """A copy of the run: what an evaluation writes there must not reach other tests."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("hosts") / "run"))


@pytest.fixture(scope="module")
def two(finished, tmp_path_factory):
    """What 2 processes of 4 devices made of a training and an evaluation."""
    folder = tmp_path_factory.mktemp("two")
    commands = [
        ["train", *SHORT, f"--config.start_from={finished}", f"--workdir={folder / 'run'}"],
        ["evaluate", f"--workdir={finished}", "--config.evaluate.split=val"],
    ]
    done = processes.finish(processes.start(commands, processes=2, devices=4))
    assert [code for code, _, _ in done] == [0, 0], done[0][2] + done[1][2]
    return folder, done


@pytest.fixture(scope="module")
def two_that_answer(finished, requests, tmp_path_factory):
    """The folder in which 2 processes of 4 devices answered a benchmark and a file of requests."""
    folder = tmp_path_factory.mktemp("answers")
    commands = [
        [*BENCHMARK, f"--workdir={finished}", f"--out={folder / 'answers'}",
         f"--cache={folder / 'cache'}"],
        ["generate", f"--checkpoint={finished}", f"--requests={requests}",
         f"--out={folder / 'answers.jsonl'}", "--max-new-tokens=6", "--mesh=tensor=2"],
    ]  # fmt: skip
    done = processes.finish(processes.start(commands, processes=2, devices=4))
    # The last command could not answer one request.
    assert [code for code, _, _ in done] == [2, 2], done[0][2] + done[1][2]
    # One of them speaks.
    assert '"settings"' in done[0][1] and not done[1][1].replace("command 0\n", "")
    assert "requests" not in done[1][2]
    return folder


def test_two_processes_train_as_one(two, finished, tmp_path):
    argv = ["train", *SHORT, f"--config.start_from={finished}", f"--workdir={tmp_path / 'run'}"]
    assert main(argv) == 0
    one, both = (tiny.losses(f / "run/finetune") for f in (tmp_path, two[0]))
    np.testing.assert_allclose(both, one, rtol=1e-5)
    assert files_of(two[0] / "run") == files_of(tmp_path / "run")


def test_two_processes_answer_every_example_once_and_as_one(two, finished, tmp_path):
    both = (finished / "predictions-val.jsonl").read_text()
    scores = (finished / "scores-val.json").read_text()
    (finished / "scores-val.json").unlink()
    assert main(["evaluate", f"--workdir={finished}", "--config.evaluate.split=val"]) == 0
    assert (finished / "predictions-val.jsonl").read_text() == both
    assert (finished / "scores-val.json").read_text() == scores
    ids = [json.loads(line)["id"] for line in both.splitlines()]
    assert len(ids) == len(set(ids)) > 8


@pytest.mark.slow
def test_two_processes_answer_a_benchmark_as_one_each_with_its_own_images(
    two_that_answer, finished, tmp_path
):
    assert main([*BENCHMARK, f"--workdir={finished}", f"--out={tmp_path}"]) == 0
    name = "ocrbench-official.jsonl"
    both = (two_that_answer / "answers" / name).read_text()
    assert both == (tmp_path / name).read_text() and both.count('"text"') > 5
    assert len(list((two_that_answer / "cache").glob("*/*.json"))) == both.count('"text"')


@pytest.mark.slow
def test_a_model_over_two_processes_and_two_parts_gives_the_tokens_of_one_device(
    two_that_answer, finished, mesh1
):
    lines = (two_that_answer / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    model = VLM.from_checkpoint(finished, mesh=mesh1)
    alone = model.generate(None, PROMPTS, max_new_tokens=6)
    said = [(a["text"], a["new_tokens"]) for a in answers if "text" in a]
    assert said == [(a.text, len(a.ids)) for a in alone]
    (refused,) = [a for a in answers if "error" in a]
    assert refused["line"] == 4 and "none.png" in refused["error"]


def test_one_process_speaks(two):
    (_, out, err), (_, other_out, other_err) = two[1]
    assert "2 processes x 4 devices (cpu) = 8 devices" in err
    assert "finetune 3/3" in err and '"skipped"' in out
    assert not other_out.replace("command 0\n", "")
    assert not any(word in other_err for word in ("3/3", "data:"))


@pytest.mark.parametrize("flags, said", [
    (dict(coordinator="a:1"), "--coordinator without --processes and --process"),
    (dict(processes=2), "--processes without --coordinator and --process"),
    (dict(coordinator="a:1", processes=2), "without --process: give all three"),
    (dict(coordinator="a:1", processes=2, process=2), "--process=2 of --processes=2"),
    (dict(coordinator="a", processes=2, process=0), "--coordinator=a: give HOST:PORT"),
    (dict(coordinator="a:1", processes=0, process=0), "--processes=0"),
    (dict(join_timeout=0), "--join-timeout=0"),
])  # fmt: skip
def test_half_of_an_address_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        hosts.join(**flags)


def test_a_run_of_one_process_agrees_with_itself():
    assert hosts.from_writer(lambda: (1, "a")) == (1, "a")
    assert hosts.collected({"a": 1}) == [{"a": 1}] and not hosts.joined()
    hosts.check_same("configuration", object())  # not even looked at
    with pytest.raises(ValueError, match="no"):
        hosts.from_writer(lambda: [][1:] or (_ for _ in ()).throw(ValueError("no")))


def ended(started, within):
    """Seconds until each process ended by itself, and what `finish` gives."""
    begun, seconds = time.monotonic(), {}
    while len(seconds) < len(started) and time.monotonic() - begun < within:
        for i, process in enumerate(started):
            if i not in seconds and process.poll() is not None:
                seconds[i] = time.monotonic() - begun
        time.sleep(0.1)
    assert len(seconds) == len(started), "a process hangs"
    return seconds, processes.finish(started)


def test_what_one_process_raises_ends_the_others(tmp_path):
    """The two have another --workdir: each finds out; nobody waits for ever."""
    argv = [["train", *SHORT]]
    port = f"--coordinator=localhost:{processes.free_port()}"
    started = [
        processes.start(
            [[*argv[0], f"--workdir={tmp_path / str(i)}", port, "--processes=2", f"--process={i}"]],
            processes=1,
            devices=1,
        )[0]
        for i in range(2)
    ]
    _, done = ended(started, 120)
    assert [code for code, _, _ in done] == [2, 2]
    assert all("configuration or --workdir of process" in err for _, _, err in done)
    assert not list(tmp_path.glob("*/config.json"))


@pytest.mark.slow
def test_a_coordinator_that_is_not_there_is_said_in_time():
    flags = ["--join-timeout=5", f"--coordinator=localhost:{processes.free_port()}"]
    for process, said in ((1, "nothing answers at localhost"), (0, "not all processes joined")):
        argv = ["train", CONFIG, "--dry-run", *flags, "--processes=2", f"--process={process}"]
        _, ((code, _, err),) = ended(processes.start([argv], processes=1, devices=1), 60)
        assert code == 2 and said in err and "within 5 s" in err


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_takes_the_others_with_it(killed, tmp_path):
    argv = ["train", CONFIG, f"--workdir={tmp_path}", "--config.encoder.steps=100000"]
    started = processes.start([argv], processes=2, devices=1, flags=["--heartbeat-timeout=10"])
    metrics, until = tmp_path / "encoder/metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.2)
    os.kill(started[killed].pid, signal.SIGKILL)
    seconds, done = ended(started, 60)
    assert done[1 - killed][0] not in (0, None) and max(seconds.values()) < 40
    # Whether that is noticed in a step or while a checkpoint is written.
    assert done[1 - killed][0] in (134, -signal.SIGABRT)


@pytest.mark.slow
def test_the_rows_of_a_grid_are_bit_equal_on_one_and_on_two_processes(tmp_path):
    for count in (1, 2):
        argv = ["grid", *GRID, f"--workdir={tmp_path / str(count)}"]
        processes.run([argv], processes=count, devices=8 // count, timeout=3000)
    assert tiny.rows(tmp_path / "1") == tiny.rows(tmp_path / "2")
    cells = [sorted((tmp_path / str(n) / "cells").glob("*/predictions.jsonl")) for n in (1, 2)]
    assert cells[0] and [p.read_text() for p in cells[0]] == [p.read_text() for p in cells[1]]
