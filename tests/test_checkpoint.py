# SPDX-License-Identifier: Apache-2.0
"""What is read back is what was there when it was saved, or it is not used."""

import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import mesh as meshes
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.optimizer import State

SHAPE = (16, 32)
# Orbax leaves coroutines behind when a read or write of it fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step, mesh, *, size=SHAPE):
    """A state whose numbers belong to its step, cut over the mesh in every way there is."""
    draw = np.random.default_rng(step)
    put = lambda x, *dims: jax.device_put(x, meshes.sharding(mesh, *dims))  # noqa: E731
    return State(
        step=put(np.int32(step)),
        trained={"kernel": put(draw.normal(size=size).astype("f4"), "embed", "mlp"),
                 "bias": put(draw.normal(size=size[1:]).astype("f4"), "mlp")},
        frozen={"table": put(draw.normal(size=size).astype("f4"), "vocab", "none")},
        optimizer=(put(np.int32(step)),
                   {"m": put(draw.normal(size=size).astype("f4"), "embed", "mlp")}),
    )  # fmt: skip


def assert_is(found, step, mesh):
    for ours, theirs in zip(*map(jax.tree.leaves, (found, state(step, mesh))), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype


def saved(folder, mesh, steps=(1, 2, 3), keep=3):
    """A folder with these steps, closed."""
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(state(step, mesh), {"position": 10 * step, "stage": "align"})
    checkpoints.close()
    return folder


def restored(folder, mesh):
    """(step, position) of what a new process would find, checked to the bit."""
    checkpoints = Checkpoints(folder, keep=3)
    found = checkpoints.restore(state(99, mesh))
    checkpoints.close()
    if found is None:
        return None
    assert_is(found[0], int(found[0].step), mesh)
    assert found[1] == {"position": 10 * int(found[0].step), "stage": "align"}
    return int(found[0].step), found[1]["position"]


@pytest.mark.parametrize("to", ["mesh1", "mesh8"])
@pytest.mark.parametrize("of", ["mesh1", "mesh8"])
def test_a_state_is_read_back_to_the_bit_on_any_devices(of, to, request, tmp_path):
    saved(tmp_path, request.getfixturevalue(of))
    assert restored(tmp_path, request.getfixturevalue(to)) == (3, 30)


def test_nothing_saved_is_nothing_found(tmp_path, mesh1):
    assert restored(tmp_path / "new", mesh1) is None


def test_only_the_newest_are_kept(tmp_path, mesh1):
    saved(tmp_path, mesh1, steps=(1, 2, 3, 4), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["3", "4"]


def test_the_values_are_those_at_the_save_whatever_is_donated_after_it(tmp_path, mesh8):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    # Large enough for the write to be under way while the buffers are used again.
    large = state(1, mesh8, size=(1024, 1024))
    expected = [np.array(x) for x in jax.tree.leaves(large)]
    checkpoints.save(large, {"position": 10})
    with jax.set_mesh(mesh8):
        for _ in range(3):
            large = step(large)
    checkpoints.close()
    found, _ = Checkpoints(tmp_path, keep=1).restore(large)
    for ours, theirs in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # And what was restored is its own: donating it twice must not read freed memory.
    with jax.set_mesh(mesh8):
        assert float(step(step(found)).trained["bias"].max()) == -1


# --- Damage ---------------------------------------------------------------------------------------


def data_files(step):
    return [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]


def truncate(step):
    path = max(data_files(step), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(step):
    """One bit in the middle of the largest data file: orbax itself would not notice."""
    path = max(data_files(step), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_notes(step):
    shutil.rmtree(step / "notes")


def lose_data(step):
    for path in data_files(step):
        path.unlink()


DAMAGE = [truncate, flip, lose_notes, lose_data]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_reported_and_the_one_before_it_is_used(damage, tmp_path, mesh1, caplog):
    saved(tmp_path, mesh1)
    damage(tmp_path / "3")
    with caplog.at_level(logging.WARNING):
        assert restored(tmp_path, mesh1) == (2, 20)
    assert any(
        f"{tmp_path}/3 cannot be used" in r.message and "falling back" in r.message
        for r in caplog.records
    )


def test_training_goes_on_behind_a_damaged_step(tmp_path, mesh1):
    # The damaged number is reached again and must then hold the new state.
    saved(tmp_path, mesh1)
    truncate(tmp_path / "3")
    (tmp_path / "10").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert int(checkpoints.restore(state(99, mesh1))[0].step) == 2
    checkpoints.save(state(3, mesh1), {"position": 30, "stage": "align"})
    checkpoints.close()
    assert restored(tmp_path, mesh1) == (3, 30)


def test_a_step_that_is_not_written_is_not_taken_for_written(tmp_path, mesh1):
    saved(tmp_path, mesh1)
    with pytest.raises(RuntimeError, match="step 2 was not written"):
        Checkpoints(tmp_path, keep=3).save(state(2, mesh1), {"position": 20, "stage": "align"})


def test_empty_and_foreign_folders_are_passed_over(tmp_path, mesh1):
    saved(tmp_path, mesh1)
    (tmp_path / "10").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()  # what a killed write leaves
    assert restored(tmp_path, mesh1) == (3, 30)


def test_if_all_are_damaged_nothing_is_started_over_silently(tmp_path, mesh1):
    saved(tmp_path, mesh1)
    for step in (1, 2, 3):
        flip(tmp_path / str(step))
    with pytest.raises(
        RuntimeError, match=r"steps \[3, 2, 1\] are all damaged; move the folder away"
    ):
        restored(tmp_path, mesh1)


def test_a_state_of_other_shapes_is_not_mixed_in(tmp_path, mesh1):
    saved(tmp_path, mesh1, steps=(1,))
    with pytest.raises(RuntimeError, match="no usable checkpoint"):
        Checkpoints(tmp_path, keep=3).restore(state(1, mesh1, size=(32, 32)))


def test_a_full_disk_is_reported_and_what_was_finished_stays(tmp_path, mesh1):
    # A limit on the size of a file stands for the full disk: the write itself fails, in its thread.
    saved(tmp_path, mesh1, steps=(1,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, keep=3)
    draw = np.random.default_rng(0)  # not to be compressed
    large = state(2, mesh1)._replace(frozen={"table": jnp.asarray(draw.normal(size=(512, 512)))})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        words = f"could not be written to {tmp_path} .*File too large.*: make room and repeat"
        with pytest.raises(OSError, match=words):
            checkpoints.save(large, {"position": 20, "stage": "align"})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert restored(tmp_path, mesh1) == (1, 10)
