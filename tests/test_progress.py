# SPDX-License-Identifier: Apache-2.0
"""A command that is silent for long says what it does, how far it is, and what is left."""

import subprocess
import sys

import pytest
import tiny

from vlm_jax import progress
from vlm_jax.progress import Voice, duration


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_silence_is_broken_by_what_is_being_done_and_for_how_long(clock, capsys):
    voice = Voice(clock=clock)
    with voice.doing("cell 3 of 18"), voice.doing("evaluation", 200) as task:
        task.note(0)
        for seconds in range(1, 41):
            clock.now += 1
            task.note(seconds)
            if seconds == 20:
                voice.say("a line of somebody else")
            voice.beat()
    assert capsys.readouterr().err.splitlines() == [
        "cell 3 of 18: evaluation: 15 of 200, 0:00:15 so far, about 0:03:05 to go",
        "a line of somebody else",
        "cell 3 of 18: evaluation: 35 of 200, 0:00:35 so far, about 0:02:45 to go",
    ]


def test_what_cannot_be_counted_says_its_time_alone(clock, capsys):
    voice = Voice(clock=clock)
    with voice.doing("reading the weights"):
        clock.now += 61
        voice.beat()
    clock.now += 100
    voice.beat()  # nothing is being done
    assert capsys.readouterr().err == "reading the weights, 0:01:01 so far\n"


def test_what_was_there_before_is_not_counted_as_speed(clock, capsys):
    """A stage that goes on at step 90 of 100 has made none of them yet."""
    voice = Voice(clock=clock)
    with voice.doing("align", 100) as task:
        task.note(90)
        clock.now += 20
        voice.beat()
        task.note(92)
        clock.now += 20
        voice.beat()
    assert capsys.readouterr().err.splitlines() == [
        "align: 90 of 100, 0:00:20 so far",
        "align: 92 of 100, 0:00:40 so far, about 0:02:40 to go",
    ]


def test_waiting_for_a_person_is_no_work(clock, capsys):
    voice = Voice(clock=clock)
    with voice.doing("a conversation"), voice.listening():
        clock.now += 100
        voice.beat()
    voice.beat()
    assert not capsys.readouterr().err


def test_a_task_that_fails_is_over(clock, capsys):
    voice = Voice(clock=clock)
    with pytest.raises(ValueError), voice.doing("this"):
        raise ValueError
    clock.now += 100
    voice.beat()
    assert not capsys.readouterr().err


def test_the_thread_speaks_while_the_body_is_busy_and_ends_with_it():
    program = (
        "import time\nfrom vlm_jax import progress\n"
        "assert not progress.VOICE.tasks\n"
        "progress.VOICE.every = 1.0\n"
        "with progress.speaking('starting'):\n"
        "    with progress.speaking('at work'): time.sleep(2.5)\n"
        "    time.sleep(2.5)\n"
        "time.sleep(2.5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True
    )
    lines = done.stderr.splitlines()
    said = [line.partition(", 0:00:0")[0] for line in lines]
    assert 2 <= len(lines) <= 5 and said == sorted(said) and set(said) == {"at work", "starting"}


def test_times_are_hours_minutes_and_seconds():
    assert [duration(s) for s in (0, 65.4, 3600, 90_061)] == ["0:00:00", "0:01:05", "1:00:00",
                                                               "25:01:01"]  # fmt: skip
    assert progress.EVERY < 20
