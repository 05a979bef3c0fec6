# SPDX-License-Identifier: Apache-2.0
"""One line per interval for people, one JSON object per line for machines, and a stop at NaN."""

import io
import json
import re
import sys

import pytest

from vlm_jax.training import log as logs
from vlm_jax.training.log import Diverged, Log
from vlm_jax.training.optimizer import Metrics

LINE = re.compile(
    r"align (\d+)/6  loss (\d+\.\d{4})  \d+ examples/s  \d+ tokens/s  eta \d+:[0-5]\d:[0-5]\d\n"
)


def metrics(loss=1.5, norm=2.0):
    return Metrics(loss=loss, accuracy=0.25, gradient_norm=norm, tokens=20)


def run(folder, *, first=0, last=6, every=2, losses=None, **options):
    """A log of the steps behind `first`, closed."""
    progress = Log(
        folder, "align", first=first, last=last, every=every, batch=8, patience=2, **options
    )
    for step in range(first + 1, last + 1):
        progress(step, metrics((losses or {}).get(step, step / 10)), lambda: "runs/align/4")
    progress.close()


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def test_lines_come_at_the_interval_and_at_the_end(tmp_path, capsys):
    run(tmp_path, every=4)
    found = LINE.findall(capsys.readouterr().err)
    assert found == [("4", "0.4000"), ("6", "0.6000")]
    assert steps(tmp_path) == [4, 6]


def test_a_line_and_its_json_say_the_same(tmp_path, capsys):
    run(tmp_path)
    err = capsys.readouterr().err
    assert LINE.sub("", err) == ""
    for (step, loss), line in zip(
        LINE.findall(err), (tmp_path / "metrics.jsonl").open(), strict=True
    ):
        values = json.loads(line)
        assert (str(values["step"]), f"{values['loss']:.4f}") == (step, loss)
        assert values.keys() == {
            "loss",
            "accuracy",
            "gradient_norm",
            "tokens",
            "step",
            "examples_per_s",
            "tokens_per_s",
        }
        # 20 supervised tokens for 8 examples in every step.
        assert values["tokens_per_s"] / values["examples_per_s"] == pytest.approx(20 / 8)


def test_rates_are_counts_over_the_time_since_the_last_line(tmp_path, monkeypatch, capsys):
    # The log begins at 100; the first step, which is compiled, is there at 150 and counts for none.
    clock = iter([100.0, 150.0, 152.0, 153.0, 155.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    run(tmp_path)
    rates = [json.loads(line)["examples_per_s"] for line in (tmp_path / "metrics.jsonl").open()]
    assert rates == [1 * 8 / 2, 2 * 8 / 1, 2 * 8 / 2]
    assert re.findall(r"eta (\S+)", capsys.readouterr().err) == ["0:00:08", "0:00:01", "0:00:00"]


def test_a_bar_only_on_a_terminal(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    run(tmp_path)
    assert "\r" not in capsys.readouterr().err
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(tmp_path)
    assert "\r" in terminal.getvalue() and not LINE.search(terminal.getvalue())


@pytest.mark.parametrize(
    "loss, norm", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))]
)
def test_what_is_not_finite_stops_with_step_and_checkpoint(loss, norm, tmp_path):
    # Also between two lines of the log.
    progress = Log(tmp_path, "align", first=0, last=8, every=2, batch=8, patience=2)
    for step in (1, 3, 5, 7):  # none of these is behind another
        progress(step, metrics(loss, norm), lambda: "it is runs/align/2")
        progress(step + 1, metrics(), lambda: "it is runs/align/2")
    progress(7, metrics(loss, norm), lambda: "it is runs/align/2")
    with pytest.raises(
        Diverged,
        match="align step 8: .*, 2 in a row .*; it is runs/align/2; lower align.lear",
    ):
        progress(8, metrics(loss, norm), lambda: "it is runs/align/2")
    progress.close()
    assert [x["skipped_updates"] for x in map(json.loads, (tmp_path / "metrics.jsonl").open())] == [
        1, 2, 3, 4,
    ]  # fmt: skip


def test_a_restart_drops_what_is_behind_its_step_and_a_torn_line(tmp_path):
    run(tmp_path, every=1, last=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(tmp_path, first=3, every=1, last=6, losses={4: 9.0})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [x["loss"] for x in lines] == [0.1, 0.2, 0.3, 9.0, 0.5, 0.6]


def test_tensorboard_holds_what_the_jsonl_holds(tmp_path):
    run(tmp_path, tensorboard=True)
    events = list(tmp_path.glob("events.out.tfevents.*"))
    assert len(events) == 1
    content = events[0].read_bytes()
    for key in json.loads((tmp_path / "metrics.jsonl").open().readline()):
        assert f"align/{key}".encode() in content


def test_tensorboard_without_its_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'vlm_jax\[tensorboard\]', or turn it off"):
        run(tmp_path, tensorboard=True)
