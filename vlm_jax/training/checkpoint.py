# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by orbax: written while training goes on, verified when read, older ones as a way
back.

Orbax restores flipped bits without a word, so every step carries a checksum per array.
"""

import logging
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vlm_jax.training.optimizer import State

log = logging.getLogger(__name__)


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves it to the loop to ask whether the machine is taken back.

    The service behind that wants the rising numbers of one asker.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class OtherAdapters(ValueError):
    """A checkpoint whose model has other adapters: whole, and of no use here."""


class Checkpoints:
    """The numbered checkpoints of one stage in one folder, the newest `keep` of them."""

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.manager = Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
            item_names=("state", "notes"),
        )
        self.unusable: list[int] = []

    def save(self, state: State, notes: dict[str, Any]) -> None:
        """Starts writing step `state.step`; OSError if it cannot, or if the write before it
        failed."""
        self.wait()
        self.set_aside()
        arrays = named(state)
        notes = dict(notes, crc32={name: checksum(x) for name, x in arrays.items()})
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes)
        )
        with self.naming_failures():
            started = self.manager.save(int(state.step), args=args)
        if not started:
            raise RuntimeError(
                f"step {int(state.step)} was not written to {self.folder}: it holds that "
                "step or a later one; move the folder away to start this stage again"
            )

    def wait(self) -> None:
        """Returns when no write is under way; OSError if the last one failed."""
        with self.naming_failures():
            self.manager.wait_until_finished()

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Turns whatever a write raises into an OSError that says where, why and what to do."""
        try:
            yield
        # Orbax hands on what its storage raised: OSError, ValueError or a bare Exception.
        except Exception as error:
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({first_line(error)}); those "
                "before it are whole: make room and repeat the command"
            ) from error

    def set_aside(self) -> None:
        """Renames steps that cannot be used: orbax would not write them, nor any before them,
        again."""
        if self.unusable and jax.process_index() == 0:
            for step in self.unusable:
                aside = self.folder / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
        if self.unusable:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self.manager.reload()
        self.unusable = []

    def restore(
        self, like: State, *, lora: dict[str, Any] | None = None
    ) -> tuple[State, dict[str, Any]] | None:
        """The newest whole checkpoint with its notes, laid out like `like`; None if there is none.

        `like` may hold shapes with shardings. Without an optimizer's state, none is read.

        A damaged step is reported and the one before it is taken; if steps exist and none is whole,
        RuntimeError: starting over silently would throw work away. ValueError for a checkpoint of
        a model with other adapters than `lora` describes.
        """
        found = {int(p.name): p for p in self.folder.iterdir() if p.name.isdigit()}
        steps = sorted(numbered(self.folder), reverse=True)
        self.unusable = [n for n in found if n not in steps]
        for step in steps:
            try:
                return self.read(step, like, lora)
            except OtherAdapters:
                raise
            # Orbax raises bare Exceptions, KeyErrors and ValueErrors for one and the same cause.
            except Exception as error:
                log.warning(
                    "checkpoint %s/%d cannot be used (%s): falling back to the one before",
                    self.folder,
                    step,
                    first_line(error),
                )
                self.unusable.append(step)
        if steps:
            raise RuntimeError(
                f"no usable checkpoint in {self.folder}: steps {steps} are all damaged; "
                "move the folder away to start this stage again"
            )
        return None

    def read(
        self, step: int, like: State, lora: dict[str, Any] | None
    ) -> tuple[State, dict[str, Any]]:
        """Step `step`, each array compared with its checksum."""
        args = ocp.args.Composite(notes=ocp.args.JsonRestore())
        notes = self.manager.restore(step, args=args)["notes"]
        if (theirs := notes.get("lora")) != lora:
            raise OtherAdapters(
                f"checkpoint {self.folder}/{step} was written with {adapters_text(theirs)}, and "
                "the "
                f"configuration says {adapters_text(lora)}: give the same, or choose another folder"
            )
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), named(like)
        )
        if jax.tree.leaves(like.optimizer):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            arrays = self.manager.restore(step, args=args)["state"]
        else:
            arrays = part(self.folder / str(step) / "state", wanted)
        sums = notes.pop("crc32")
        if bad := [n for n, x in arrays.items() if sums[n] is not None and checksum(x) != sums[n]]:
            raise ValueError(f"checksum differs for {', '.join(bad[:3])}")
        # A copy, because the restored buffers may be borrowed from the reader and are donated
        # later.
        leaves = [jax.numpy.copy(arrays.pop(name)) for name in named(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), notes

    def newest(self) -> str:
        """A sentence on the newest finished step, for messages."""
        self.wait()
        step = self.manager.latest_step()
        if step is None:
            return "no checkpoint was written before it"
        return f"the last good checkpoint is {self.folder}/{step}"

    def close(self) -> None:
        """Waits for a write under way; OSError if it failed."""
        self.wait()
        self.manager.close()


def part(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Those arrays of a stored state that are `wanted`; the others are not read."""
    args = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(path, args=args)


def numbered(folder: Path) -> list[int]:
    """The steps that a stage's folder has a checkpoint of, ascending; none without a folder."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and any(p.iterdir()))


def adapters_text(lora: dict[str, Any] | None) -> str:
    """The adapters of a model, for a message."""
    if lora is None:
        return "no LoRA"
    return f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g} on {', '.join(lora['targets'])}"


def first_line(error: Exception) -> str:
    """What an error says, cut to one line."""
    return str(error).strip().partition("\n")[0] or repr(error)


def named(state: State) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """The arrays of a state under readable names: `trained.llm.embedding.value` and so on."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def checksum(x: jax.Array) -> int | None:
    """crc32 of an array's bytes; None where other processes hold a part of it."""
    if not x.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(np.asarray(x)).view(np.uint8).reshape(-1))
