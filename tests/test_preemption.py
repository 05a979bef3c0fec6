# SPDX-License-Identifier: Apache-2.0
"""A run that SIGTERM stops ends with status 42, and goes on as if it had not been stopped."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from vlm_jax import preemption
from vlm_jax.data import loader, sources
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.training import objective, stages
from vlm_jax.training.checkpoint import numbered

# A child that is sent SIGTERM once it has said that it is ready; `seconds` are made short.
CHILD = """
import ctypes, signal, sys, time
from vlm_jax import preemption
from vlm_jax.verbs import cli
preemption.ONE_NOTICE, preemption.PATIENCE = 0.3, 0.6
def body():
{body}
sys.exit(cli.report_errors("train", body))
"""
HELD = """
    with preemption.held():
        print("ready", flush=True)
        {loop}
"""


@pytest.fixture(scope="module")
def setting(mesh1):
    """A configuration, its inputs, and the model before its first stage."""
    c = tiny.config(align=dict(steps=6), checkpoint=dict(every=4))
    source = sources.open_source(Origin.of(c), "train")
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    inputs = stages.Inputs(source, Processor(train_tokenizer(texts, c.llm.vocab), RowFormat.of(c)))
    with jax.set_mesh(mesh1):
        return c, inputs, tiny.created(c)


def stage(setting, folder, *, term=None):
    """The align stage in `folder`; SIGTERM comes while the batch of step `term` is being made."""
    c, inputs, model = setting

    class Batches(loader.Batches):
        def __next__(self):
            if self.position == (term or 0) - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    mesh = jax.sharding.get_mesh()
    batches = Batches(inputs.source, inputs.processor, batch=c.align.batch, seed=0, mesh=mesh)
    # The model is shared by tests and a stage gives its weights away.
    model = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x), jax.NamedSharding(mesh, x.sharding.spec)), model
    )
    try:
        with preemption.listening():
            recipe = tiny.recipe(c)
            return stages.run_stage("align", model, batches, recipe, folder, objective.next_token)
    finally:
        batches.close()


@pytest.fixture(scope="module")
def unbroken(setting, mesh1, tmp_path_factory):
    """The folder of an unbroken stage, and its weights."""
    folder = tmp_path_factory.mktemp("unbroken")
    with jax.set_mesh(mesh1):
        return folder, jax.tree.map(np.asarray, stage(setting, folder))


@pytest.mark.parametrize(
    "term", [1, 3, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 6))]
)
def test_a_stage_is_saved_at_the_step_that_was_under_way(term, setting, unbroken, tmp_path, mesh1):
    with jax.set_mesh(mesh1):
        with pytest.raises(preemption.Preempted):
            stage(setting, tmp_path, term=term)
        # Of the first step there is nothing to save before it is compiled.
        assert numbered(tmp_path / "align")[-1:] == ([term] if term > 1 else [])
        ended = stage(setting, tmp_path)
    for a, b in zip(*map(jax.tree.leaves, (ended, unbroken[1])), strict=True):
        np.testing.assert_array_equal(a, b)
    assert tiny.losses(tmp_path / "align") == tiny.losses(unbroken[0] / "align")


@pytest.mark.slow
def test_a_stopped_stage_goes_on_on_another_mesh(setting, unbroken, tmp_path, mesh1, mesh8):
    with jax.set_mesh(mesh1), pytest.raises(preemption.Preempted):
        stage(setting, tmp_path, term=3)
    with jax.set_mesh(mesh8):
        ended = stage(setting, tmp_path)
    ours, theirs = (jax.tree_util.tree_leaves_with_path(x) for x in (ended, unbroken[1]))
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # It moves all keys of an image alike, which a softmax over them does not see: its gradient
        # is the rounding of 0 (1e-11), and Adam's steps do not depend on a gradient's size.
        unseen = name == "compressor.key_norm.bias.value"
        np.testing.assert_allclose(a, b, atol=2e-4 if unseen else 1e-7, err_msg=name)
    ours, theirs = (np.array(tiny.losses(x / "align")) for x in (tmp_path, unbroken[0]))
    np.testing.assert_array_equal(ours[:3], theirs[:3])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def child(body, *, again=()):
    """The exit status and stderr of a process that is sent SIGTERM, and again `again` s later."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tiny.ROOT,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    for seconds in again:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_a_process_with_nothing_to_save_stops_at_once():
    code, err = child("    print('ready', flush=True); time.sleep(60)")
    assert code == preemption.STATUS
    assert err.endswith("vlm-jax train: SIGTERM: there was nothing to save\n")


def test_a_process_stops_while_it_compiles():
    # The main thread is away in C: the signal goes to another thread, and no sleep is interrupted.
    away = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
    code, err = child(f"    {away}; print('ready', flush=True); time.sleep(60)")
    assert code == preemption.STATUS and err.endswith("SIGTERM: there was nothing to save\n")


def test_what_is_held_is_finished_and_then_the_process_stops():
    code, err = child(HELD.format(loop="time.sleep(1.5); print('saved', file=sys.stderr)"))
    assert code == preemption.STATUS and "saved\nvlm-jax train: SIGTERM: the work" in err


def test_a_loop_stops_where_it_asks():
    loop = "while not preemption.reached(): time.sleep(0.01)"
    code, err = child(HELD.format(loop=loop))
    assert code == preemption.STATUS and "Traceback" not in err


def test_a_second_signal_ends_a_process_at_once():
    # Sent more than once: a busy machine may take its time with the first.
    assert child(HELD.format(loop="time.sleep(50)"), again=[1.0] * 5)[0] == -signal.SIGTERM


def test_a_signal_sent_twice_is_one():
    code, err = child(HELD.format(loop="time.sleep(1.5)"), again=[0.02])
    assert code == preemption.STATUS and "Traceback" not in err
