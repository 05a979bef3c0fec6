# SPDX-License-Identifier: Apache-2.0
"""A run that trains adapters: broken, continued, merged, exported, and refused another's."""

import json

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax.__main__ import main
from vlm_jax.data import sources
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.models import lora
from vlm_jax.training import optimizer, stages, workdir
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.log import Log
from vlm_jax.weights import folder
from vlm_jax.weights import sources as sources_of

pytestmark = [
    # Orbax leaves coroutines behind when a read of it fails.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def config(**changes):
    return tiny.config(lora=dict(rank=2, alpha=6.0), **changes)


@pytest.fixture(scope="module")
def inputs():
    c = config()
    source = sources.open_source(Origin.of(c), "train")
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    return stages.Inputs(source, Processor(train_tokenizer(texts, c.llm.vocab), RowFormat.of(c)))


SHORT = dict(
    encoder=dict(steps=0), align=dict(steps=1), finetune=dict(steps=4, compressor_rate=0.5)
)


@pytest.fixture(scope="module")
def unbroken(inputs, mesh1, tmp_path_factory):
    """A short run's folder, and the model that it returned."""
    path, c = tmp_path_factory.mktemp("lora"), config(**SHORT)
    inputs.processor.tokenizer.save_pretrained(path / "tokenizer")
    with jax.set_mesh(mesh1), workdir.claim(path, c) as claimed:
        claimed.begin()
        model = stages.train(tiny.recipe(c), path, inputs)
    return path, model


def test_a_run_broken_between_checkpoints_ends_bit_identical(
    unbroken, inputs, mesh1, tmp_path, monkeypatch
):
    c, note = config(**SHORT), Log.__call__

    def die(self, step, metrics, newest):
        note(self, step, metrics, newest)
        if self.name == "finetune" and step == 3:
            raise KeyboardInterrupt

    with jax.set_mesh(mesh1):
        monkeypatch.setattr(Log, "__call__", die)
        with pytest.raises(KeyboardInterrupt):
            stages.train(tiny.recipe(c), tmp_path, inputs)
        monkeypatch.undo()
        # Adapters of another seed stand ready, and those of the checkpoint take their place.
        model = stages.train(tiny.recipe(c), tmp_path, inputs)
    steps = [json.loads(line)["step"] for line in (tmp_path / "finetune/metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    for ours, theirs in zip(*map(jax.tree.leaves, (model, unbroken[1])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_base_is_where_it_began_and_the_adapters_are_not(unbroken, mesh1):
    path, returned = unbroken
    c = config(**SHORT)
    with jax.set_mesh(mesh1):
        before = literal_models.of(tiny.created(c))
        adapted = workdir.finished(path, tiny.recipe(c), merge=False)
        after = {n.replace(".base.", "."): x for n, x in literal_models.of(adapted).items()}
        for name in (n for n in before if not n.startswith("compressor")):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
        moved = [n for n, x in after.items() if n.endswith("lora_b") and (x != 0).any()]
        assert len(moved) == len(lora.TARGETS)
        merged = workdir.finished(path, tiny.recipe(c))
    for ours, theirs in zip(*map(jax.tree.leaves, (merged, returned)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_is_converted_and_exported_without_loss(unbroken, tmp_path, mesh1):
    path, returned = unbroken
    c = config(**SHORT)
    assert main(["convert", f"--from={path}", f"--to={tmp_path}/merged"]) == 0
    assert main(["convert", f"--from={path}", "--to-peft", f"--to={tmp_path}/peft"]) == 0
    merged = folder.read(tmp_path / "merged").tensors
    with jax.set_mesh(mesh1):
        base = tiny.created(c)
        for name, expected in folder.tensors_of(returned).items():
            np.testing.assert_array_equal(merged[name].read(), expected, err_msg=name)
        folder.write(sources_of.of_run(path, c, base), tmp_path / "base")
    # The adapter and what lies beside it make the merged model of the base.
    made = ["--adapter-from", f"{tmp_path}/peft", f"--to={tmp_path}/again"]
    assert main(["convert", f"--from={tmp_path}/base", *made]) == 0
    for name, tensor in folder.read(tmp_path / "again").tensors.items():
        np.testing.assert_allclose(tensor.read(), merged[name].read(), atol=1e-6, err_msg=name)


WRITTEN = "finetune/4 was written with LoRA of rank 2, alpha 6 on q_proj, k_proj, .* says "


def test_a_run_with_other_adapters_stops_before_its_first_step(
    unbroken, inputs, mesh1, monkeypatch
):
    monkeypatch.setattr(optimizer, "make_step", None)  # not even built
    c = config(**SHORT)
    c.lora.rank = 3
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=f"{WRITTEN}LoRA of rank 3, alpha 6"):
        stages.train(tiny.recipe(c), unbroken[0], inputs)


@pytest.mark.parametrize("changes, said", [
    (dict(targets=["q_proj", "up_proj"]), "rank 2, alpha 6 on q_proj, up_proj: give the same"),
    (dict(alpha=4.5), "LoRA of rank 2, alpha 4.5 on q_proj"),
    (None, "no LoRA: give the same"),
])  # fmt: skip
def test_a_checkpoint_of_other_adapters_is_refused_with_both_named(changes, said, unbroken):
    ours = dict(rank=2, alpha=6.0, targets=list(lora.TARGETS))
    described = ours | changes if changes else None
    nothing = optimizer.State(jnp.zeros((), jnp.int32), nnx.State({}), nnx.State({}), ())
    with pytest.raises(ValueError, match=WRITTEN + f"(LoRA of )?{said}"):
        Checkpoints(unbroken[0] / "finetune").restore(nothing, lora=described)


# --- Errors before the first step -----------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    (dict(targets=("q_proj", "query")), r"lora.targets names \['query'\]: choose from \['q_proj'"),
    (dict(targets=("q_proj", "q_proj")), "names a layer twice"),
    (dict(rank=0, targets=("q_proj",)), "lora.rank=0 makes no adapters: set lora.rank"),
    (dict(rank=-1), "lora.rank=-1: 0 trains without"),
    (dict(alpha=0.0), "lora.alpha=0.0: it scales"),
])  # fmt: skip
def test_adapters_that_cannot_be_are_refused(change, words, mesh1):
    c = config()
    c.lora.update(change)
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        stages.check(tiny.recipe(c))


def test_adapters_without_a_stage_that_trains_them_are_refused(mesh1):
    c = config(finetune=dict(steps=0))
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="but finetune.steps=0"):
        stages.check(tiny.recipe(c))
