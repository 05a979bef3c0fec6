# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, damaged or poisoned ends as the unbroken one, or stops and says why."""

import json
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import mesh as meshes
from vlm_jax.__main__ import main
from vlm_jax.data import loader, sources, tokenizer
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.training import objective, optimizer, stages
from vlm_jax.training.checkpoint import Checkpoints, named
from vlm_jax.training.log import Diverged

pytestmark = [
    # Orbax leaves coroutines behind when a read or write of it fails.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
COMMAND = ("train", "--config=tests/tiny.py")

# Statements that make a child process kill itself: while a checkpoint is being written, ...
IN_A_WRITE = """
from vlm_jax.training.checkpoint import Checkpoints
save = Checkpoints.save
def die(self, state, notes):
    save(self, state, notes)
    if notes["stage"] == "{stage}" and int(state.step) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = die
"""
# ... and between two checkpoints.
AT_A_STEP = """
from vlm_jax.training.log import Log
note = Log.__call__
def die(self, step, metrics, newest):
    note(self, step, metrics, newest)
    if self.name == "{stage}" and step == {step}:
        newest()  # an earlier checkpoint may still be under way
        os.kill(os.getpid(), signal.SIGKILL)
Log.__call__ = die
"""


def weights_of(folder):
    """The newest checkpoint of a finetuned run, by name."""
    c = tiny.get_config()
    with jax.set_mesh(meshes.make(devices=jax.devices()[:1])):
        tx = optimizer.optimizer(tiny.stage(c.finetune))
        _, like = optimizer.start(tiny.created(c), "finetune", tx)
        state, notes = Checkpoints(folder / "finetune").restore(like)
    return {name: np.asarray(x) for name, x in named(state).items()}, notes


KILLS = [
    (IN_A_WRITE.format(stage="align", step=2), -9),
    (AT_A_STEP.format(stage="align", step=3).replace("SIGKILL", "SIGTERM"), 42),
    (AT_A_STEP.format(stage="finetune", step=3), -9),
]


@pytest.mark.parametrize("kills", [KILLS[1:], pytest.param(KILLS, marks=pytest.mark.slow)])
def test_a_killed_run_ends_bit_identical_to_an_unbroken_one(kills, trained, tmp_path):
    folder = tmp_path / "run"
    for before, code in kills:
        killed = tiny.run(*COMMAND, f"--workdir={folder}", before=before)
        assert killed.returncode == code, killed.stderr
        if code == 42:
            words = (
                "vlm-jax train: SIGTERM: align is saved at step 4 of 4; the same command continues"
            )
            assert words in killed.stderr
    assert not (folder / "finetune/6").exists()
    finished = tiny.run(*COMMAND, f"--workdir={folder}")
    assert finished.returncode == 0, finished.stderr
    assert "[transformers]" not in finished.stderr  # the libraries below have nothing to say
    # The finished stages were read back: no step of theirs was done again.
    assert not re.search(r"(encoder|align) \d", finished.stderr)
    assert "finetune 3/6" in finished.stderr and "finetune 2/6" not in finished.stderr
    for stage, steps in (("encoder", 3), ("align", 4), ("finetune", 6)):
        ours, theirs = tiny.losses(folder / stage), tiny.losses(trained / stage)
        assert ours == theirs and [s for s, *_ in ours] == list(range(1, steps + 1))
    (ours, notes), (theirs, expected) = weights_of(folder), weights_of(trained)
    assert notes == expected == {"position": 6, "stage": "finetune"}
    for name, weights in theirs.items():
        np.testing.assert_array_equal(ours[name], weights, err_msg=name)


# --- One stage in this process --------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(mesh1):
    """A configuration, its inputs, and the model before its first stage."""
    c = tiny.config(align=dict(steps=6), checkpoint=dict(every=2), log=dict(every=2))
    source = sources.open_source(Origin.of(c), "train")
    texts = [text for i in range(len(source)) for turn in source[i].turns for text in turn]
    inputs = stages.Inputs(source, Processor(train_tokenizer(texts, c.llm.vocab), RowFormat.of(c)))
    with jax.set_mesh(mesh1):
        return c, inputs, tiny.created(c)


def stage(setting, folder, *, poisoned=(), poison=jnp.nan, most=3):
    """The align stage in `folder`; batches whose number is poisoned have no finite loss, and
    `most` of them in a row end it."""
    c, inputs, model = setting
    c = c.copy_and_resolve_references()
    c.align.max_nonfinite = most

    class Poisoned(loader.Batches):
        def __next__(self):
            number = self.position
            batch = super().__next__()
            return batch | {"bad": jnp.full(c.align.batch, number in poisoned)}

    def loss(model, batch):
        sums = objective.next_token(model, batch)
        return sums._replace(nll=sums.nll * jnp.where(batch["bad"].any(), poison, 1))

    batches = Poisoned(
        inputs.source, inputs.processor, batch=c.align.batch, seed=0, mesh=jax.sharding.get_mesh()
    )
    # The model is shared by tests and a stage gives its weights away.
    model = jax.tree.map(jnp.copy, model)
    try:
        return stages.run_stage("align", model, batches, tiny.recipe(c), folder, loss)
    finally:
        batches.close()


@pytest.fixture(scope="module")
def unbroken(setting, mesh1, tmp_path_factory):
    with jax.set_mesh(mesh1):
        return jax.tree.map(np.asarray, stage(setting, tmp_path_factory.mktemp("unbroken")))


def assert_same(model, other):
    for a, b in zip(*map(jax.tree.leaves, (model, other)), strict=True):
        np.testing.assert_array_equal(a, b)


# Batch k makes step k + 1; steps 2, 4 and 6 are saved.
@pytest.mark.parametrize("poison", [jnp.nan, pytest.param(jnp.inf, marks=pytest.mark.slow)])
def test_an_update_that_is_not_finite_is_never_made(
    poison, setting, unbroken, tmp_path, mesh1, capsys
):
    with jax.set_mesh(mesh1):
        # The third in a row ends the run, and what was saved between them is what was before them.
        words = "align step 5: loss (nan|inf), .* 3 in a row .* is .*align/4; lower"
        with pytest.raises(Diverged, match=words):
            stage(setting, tmp_path, poisoned=[2, 3, 4], poison=poison)
        before, after = (saved_arrays(tmp_path / "align" / step) for step in "24")
        assert before.keys() == after.keys()
        for name, x in before.items():
            np.testing.assert_array_equal(x, after[name], err_msg=name)
        err = capsys.readouterr().err
        assert "align step 3: " in err and "the update is skipped, number 1 of this stage" in err
        # The same command goes on behind them, and still says how many there were.
        model = stage(setting, tmp_path)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(model))
        lines = [json.loads(x) for x in (tmp_path / "align/metrics.jsonl").open()]
        assert [x.get("skipped_updates") for x in lines] == [None, 2, 2]
        assert lines[1]["loss"] is None and np.isfinite(lines[2]["loss"])
        # Where none is poisoned none is skipped.
        with pytest.raises(AssertionError):
            assert_same(model, unbroken)


def saved_arrays(step):
    """The arrays of a checkpoint but for its number, as orbax reads them."""
    import orbax.checkpoint as ocp

    arrays = ocp.StandardCheckpointer().restore(step / "state")
    return {name: np.asarray(x) for name, x in arrays.items() if name != "step"}


def test_nan_before_the_first_checkpoint_says_that_there_is_none(setting, tmp_path, mesh1):
    with (
        jax.set_mesh(mesh1),
        pytest.raises(Diverged, match="step 2: .*; no checkpoint was written before"),
    ):
        stage(setting, tmp_path, poisoned=[0, 1], most=2)


def test_a_finished_stage_is_read_back_without_a_step(
    setting, unbroken, tmp_path, mesh1, monkeypatch
):
    with jax.set_mesh(mesh1):
        stage(setting, tmp_path)
        monkeypatch.setattr(optimizer, "make_step", None)  # not even built
        assert_same(stage(setting, tmp_path), unbroken)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    setting, unbroken, tmp_path, mesh1, caplog
):
    with jax.set_mesh(mesh1):
        stage(setting, tmp_path)
        for path in (tmp_path / "align/6/state").rglob("d/*"):
            path.write_bytes(b"")
        assert_same(stage(setting, tmp_path), unbroken)
        assert "align/6 cannot be used" in caplog.text
        caplog.clear()
        # And the damaged step was written anew: a third start finds it whole.
        assert_same(stage(setting, tmp_path), unbroken)
    assert not caplog.text
    steps = [json.loads(x)["step"] for x in (tmp_path / "align/metrics.jsonl").open()]
    assert steps == [2, 4, 6]


def test_a_disk_that_fills_up_loses_nothing_finished(
    setting, unbroken, tmp_path, mesh1, monkeypatch
):
    # A limit on the size of files stands for the full disk: the write itself fails.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    def fill(self, state, notes):
        if int(state.step) == 4:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        save(self, state, notes)

    monkeypatch.setattr(Checkpoints, "save", fill)
    with jax.set_mesh(mesh1):
        try:
            with pytest.raises(
                OSError, match="could not be written to .*align .*: free some space and repeat"
            ):
                stage(setting, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in (tmp_path / "align").iterdir() if p.name.isdigit()] == ["2"]
        monkeypatch.undo()
        assert_same(stage(setting, tmp_path), unbroken)


def test_the_encoder_given_is_the_encoder_kept(setting, tmp_path, mesh1):
    c, inputs, model = setting
    c = tiny.config(align=dict(steps=1), finetune=dict(steps=0))
    with jax.set_mesh(mesh1):
        given = tiny.roughened(model.vit)
        kept = [np.asarray(x) for x in jax.tree.leaves(given)]
        trained = stages.train(tiny.recipe(c), tmp_path, inputs, encoder=given)
        assert_same(trained.vit, kept)
        # The LLM is not trained here: it is drawn as it is with an encoder of its own.
        drawn = [np.asarray(x) for x in jax.tree.leaves(tiny.created(c).llm)]
        assert_same(trained.llm, drawn)


# --- Errors before the first step -----------------------------------------------------------------


def message(capsys, tmp_path, *overrides, config=COMMAND[1]):
    """The error line of a run that must end with status 2."""
    assert main(["train", config, f"--workdir={tmp_path}/run", *overrides]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return next(line for line in err.splitlines() if line.startswith("vlm-jax train: "))


@pytest.mark.parametrize("override, words", [
    (["--config.finetune.accumulate=3"], "finetune.accumulate=3 does not divide finetune.batch=8"),
    (["--config.align.batch=12"], "align.batch=12 .* does not split over the 8 .*multiple of 8"),
    (["--config.align.accumulate=2"], "batch=8 / accumulate=2 does not split over the 8"),
    (["--config.mesh.tensor=3"], "tensor=3.* does not fit 8 devices"),
    (["--config.mesh.tensor=8"], "'heads' of 2 .* does not split over mesh.tensor=8: choose"),
    (["--config.remat=dot"], "remat='dot': choose one of"),
    (["--config.compressor.tokens=3"],
     "cannot make 3 visual tokens from a 4x4 patch grid: choose one of"),
    (["--config.compressor.heads=3"], "compressor.heads=3 does not divide"),
    (["--config.vit.heads=3"], "vit.heads=3 does not divide vit.width=16"),
    (["--config.llm.kv_heads=3"], "kv_heads=3 does not divide"),
    (["--config.llm.vocab=30"], "vocabulary of 30 does not hold .*raise llm.vocab to"),
    (["--config.data.source=coco"], "data.source='coco': choose one of"),
])  # fmt: skip
def test_an_impossible_configuration_is_refused_with_the_way_out(override, words, capsys, tmp_path):
    assert re.search(words, message(capsys, tmp_path, *override))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(trained, capsys, tmp_path):
    line = message(
        capsys, tmp_path, f"--config.data.tokenizer={trained}/tokenizer", "--config.llm.vocab=100"
    )
    assert re.search(r"ids up to \d+ .*only llm.vocab=100: .*raise llm.vocab to \d+", line)


def test_a_source_that_does_not_know_its_patches_makes_no_encoder(setting, tmp_path, mesh1):
    c, inputs, _ = setting

    class Plain:
        """A source, and no more than that."""

        def __init__(self, source):
            self.name, self.split, self.data_hash = "llava", "train", ""
            self.protocol = "embedded"
            self.images, self.describe = source.images, source.describe
            self.left_out, self.notes = source.left_out, source.notes

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return inputs.source[index]

    plain = stages.Inputs(Plain(inputs.source), inputs.processor)
    with (
        jax.set_mesh(mesh1),
        pytest.raises(ValueError, match="does not know .*set encoder.steps=0"),
    ):
        stages.pretrain_encoder(tiny.recipe(c), tmp_path, plain)


def test_another_configuration_in_the_same_folder_is_refused(trained, capsys, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    line = message(capsys, tmp_path, "--config.seed=1", "--config.data.template=plain")
    assert "another configuration (data.template was bare, is plain; seed was 0, is 1)" in line


def test_a_typo_does_not_claim_the_folder(capsys, tmp_path):
    """A first attempt that failed before its first step leaves the folder to the second."""
    failed = message(capsys, tmp_path, "--config.data.source=llava", "--config.data.path=typo.json")
    assert "typo.json" in failed and not (tmp_path / "run/config.json").exists()
    assert not (tmp_path / "run/tokenizer").exists()
    # The second is stopped by other words than "another configuration".
    assert "data.source" in message(capsys, tmp_path, "--config.data.source=coco")


@pytest.mark.slow
def test_what_is_kept_can_go_on_with_another_log_and_other_workers(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = json.loads((tmp_path / "run/config.json").read_text())
    done = tiny.run(*COMMAND, f"--workdir={tmp_path}/run", "--config.log.every=5",
                    "--config.data.workers=1", "--config.checkpoint.keep=1")  # fmt: skip
    assert done.returncode == 0, done.stderr  # finished: it is read back
    assert json.loads((tmp_path / "run/config.json").read_text()) == before


def test_another_encoder_does_not_replace_the_one_that_is_started_from(trained, capsys, tmp_path):
    line = message(capsys, tmp_path, f"--config.start_from={trained}")
    assert re.search(
        "encoder.steps=3: a new encoder would replace .*start_from=.*set encoder.steps=0", line
    )


def test_a_run_of_no_step_is_no_run(capsys, tmp_path):
    nothing = ("--config.align.steps=0", "--config.finetune.steps=0")
    assert "such a run trains no model" in message(capsys, tmp_path, *nothing)


def test_a_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "run").write_text("")
    assert "cannot write to the folder " in message(capsys, tmp_path)


def test_a_half_written_tokenizer_is_not_taken_for_one(setting, tmp_path, monkeypatch):
    c, inputs, _ = setting
    kind = type(inputs.processor.tokenizer)
    save, kept = kind.save_pretrained, tmp_path / "tokenizer"

    def die(self, folder):
        save(self, folder)
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "save_pretrained", die)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.keep_tokenizer(inputs.processor.tokenizer, kept)
    monkeypatch.undo()
    assert not kept.exists()
    made = stages.tokenizer_of(c.data.tokenizer, c.llm.vocab, kept, inputs.source)
    tokenizer.keep_tokenizer(made, kept)
    again = stages.tokenizer_of(c.data.tokenizer, c.llm.vocab, kept, inputs.source)
    assert made.get_vocab() == again.get_vocab() == inputs.processor.tokenizer.get_vocab()
    assert tokenizer.hash_of(made) == tokenizer.hash_of(again)
