# SPDX-License-Identifier: Apache-2.0
"""What is read back is what was there when it was saved, or it is not used."""

import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import mesh as meshes
from vlm_jax.__main__ import main
from vlm_jax.training import checkpoint
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


def flip_notes(step):
    """Another number that is as good a number."""
    path = step / "notes" / "metadata"
    path.write_text(path.read_text().replace(": 30", ": 31"))


def lose_digests(step):
    next((step / "digests").glob("*.json")).unlink()


def flip_names(step):
    """Still JSON, with other keys."""
    path = step / "state" / "_METADATA"
    path.write_text(path.read_text().replace("key_metadata", "key_metadat`"))


def flip_digests(step):
    path = next((step / "digests").glob("*.json"))
    path.write_text(path.read_text().replace("pieces", "piecer"))


def lose_all_digests(step):
    shutil.rmtree(step / "digests")


DAMAGE = [
    truncate, flip, lose_notes, lose_data, flip_notes, lose_digests, lose_all_digests, flip_names,
    flip_digests,
]  # fmt: skip


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


def test_what_one_process_cannot_read_none_uses(tmp_path, mesh1, monkeypatch, caplog):
    saved(tmp_path, mesh1)
    told = iter(["its disk is gone", ""])
    both = lambda mine: [mine, mine | {"why": next(told)}]  # noqa: E731
    monkeypatch.setattr(checkpoint.hosts, "collected", both)
    assert restored(tmp_path, mesh1) == (2, 20)
    assert f"{tmp_path}/3 cannot be used (its disk is gone)" in caplog.text


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
        words = f"could not be written to {tmp_path} .*File too large.*: free some space and repeat"
        with pytest.raises(OSError, match=words):
            checkpoints.save(large, {"position": 20, "stage": "align"})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert restored(tmp_path, mesh1) == (1, 10)


# --- Without restoring ----------------------------------------------------------------------------


def verified(capsys, folder):
    """Exit status and steps of `vlm-jax checkpoint verify`, and its table."""
    code = main(["checkpoint", "verify", str(folder)])
    said = capsys.readouterr()
    return code, {s["step"].rpartition("/")[2]: s for s in json.loads(said.out)["steps"]}, said.err


def test_whole_steps_are_verified_as_whole(tmp_path, mesh8, capsys):
    saved(tmp_path, mesh8)
    code, steps, table = verified(capsys, tmp_path)
    assert (code, {s["result"] for s in steps.values()}) == (0, {"whole"})
    like = jax.tree.leaves(state(1, mesh8))
    for step in steps.values():
        assert (step["arrays"], step["bytes"]) == (len(like), sum(x.nbytes for x in like))
    assert f"{tmp_path}/3 " in table and "whole" in table
    assert list(verified(capsys, tmp_path / "2")[1]) == ["2"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_verification_finds_what_a_restore_would(damage, tmp_path, mesh1, capsys):
    saved(tmp_path, mesh1)
    damage(tmp_path / "3")
    code, steps, _ = verified(capsys, tmp_path)
    assert code == 1
    assert [s["result"] for s in steps.values()] == ["whole", "whole", "damaged"]
    assert steps["3"]["problems"]


def test_the_piece_that_is_damaged_is_named(tmp_path, mesh8, capsys):
    saved(tmp_path, mesh8, steps=(1,))
    # One number of one piece is another one: rewritten as a whole file, as orbax would read it.
    import tensorstore as ts

    base = f"file://{tmp_path}/1/state/"
    kvstore = {"driver": "ocdbt", "base": base, "path": "trained.kernel/"}
    x = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    x[9, 20] = 7.0
    code, steps, table = verified(capsys, tmp_path)
    # 16 x 32 over 2 x 2 devices, each half of the copies cut once more by orbax or not at all.
    assert (code, len(steps["1"]["problems"])) == (1, 1)
    assert steps["1"]["problems"][0] == {
        "array": "trained.kernel", "piece": "[8:16, 16:32]", "what": "its digest differs",
    }  # fmt: skip
    assert "trained.kernel[8:16, 16:32] its digest differs" in table


def test_a_checkpoint_of_an_earlier_version_is_read_and_compared(tmp_path, mesh1, capsys):
    """They had a crc32 of each array in their notes, or none where processes shared it."""
    import orbax.checkpoint as ocp

    for step, known in ((1, True), (2, True), (3, False)):
        arrays = checkpoint.named(state(step, mesh1))
        sums = {name: checkpoint.checksum(x) if known else None for name, x in arrays.items()}
        notes = {"position": 10 * step, "stage": "align", "crc32": sums}
        with ocp.CheckpointManager(tmp_path, item_names=("state", "notes")) as manager:
            args = dict(state=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes))
            manager.save(step, args=ocp.args.Composite(**args))
    assert restored(tmp_path, mesh1) == (3, 30)
    code, steps, _ = verified(capsys, tmp_path)
    assert code == 0
    assert [s["result"] for s in steps.values()] == ["whole", "whole", "unchecked"]
    flip(tmp_path / "2")
    shutil.rmtree(tmp_path / "3")
    assert restored(tmp_path, mesh1) == (1, 10)
    assert verified(capsys, tmp_path)[0] == 1


def test_where_there_is_nothing_to_verify_the_way_out_is_said(tmp_path, capsys):
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    assert f"there are no checkpoints in {tmp_path}: give the folder" in capsys.readouterr().err
