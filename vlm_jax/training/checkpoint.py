# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by orbax: written while training goes on, verified when read, older ones as a way
back.

Orbax restores flipped bits without a word, so every step carries a digest of each piece of each
array, of every process (`arrays.py`). All processes go back to the same step.
"""

import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax import hosts
from vlm_jax.training import arrays as stored
from vlm_jax.training import digest
from vlm_jax.training.arrays import Damaged, first_line
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

    def __init__(self, folder: epath.PathLike, *, keep: int = 2):
        self.folder = epath.Path(folder)
        if "://" not in str(folder):
            self.folder = epath.Path(self.folder.absolute())
        self.manager = Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
            item_names=("state", "notes", stored.DIGESTS),
        )
        self.unusable: list[int] = []

    def save(self, state: State, notes: dict[str, Any]) -> None:
        """Starts writing step `state.step`; OSError if it cannot, or if the write before it
        failed."""
        self.wait()
        self.set_aside()
        arrays = named(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            notes=ocp.args.JsonSave(dict(notes, crc32_of_notes=of_notes(notes))),
            digests=stored.Save(stored.pieces_of(arrays)),
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
        if self.unusable:
            hosts.from_writer(self.rename_unusable)
            self.manager.reload()
        self.unusable = []

    def rename_unusable(self) -> None:
        for step in self.unusable:
            aside = self.folder / f"{step}.damaged"
            if aside.exists():
                aside.rmtree()
            (self.folder / str(step)).rename(aside)

    def restore(
        self, like: State, *, lora: dict[str, Any] | None = None
    ) -> tuple[State, dict[str, Any]] | None:
        """The newest whole checkpoint with its notes, laid out like `like`; None if there is none.

        `like` may hold shapes with shardings. Without an optimizer's state, none is read.

        A damaged step is reported and the one before it is taken; if steps exist and none is whole,
        RuntimeError: starting over silently would throw work away. ValueError for a checkpoint of
        a model with other adapters than `lora` describes.
        """
        found, steps = hosts.from_writer(lambda: (digits(self.folder), numbered(self.folder)))
        steps.reverse()
        self.unusable = [n for n in found if n not in steps]
        for step in steps:
            got, why = None, ""
            try:
                got = self.read(step, like, lora)
            except OtherAdapters as error:
                why = f"other adapters: {error}"
            # Besides what is known to be damage, whatever a library raises at what it cannot read.
            except Exception as error:
                why = first_line(error)
            said = hosts.collected({"why": why, "sums": got[1] if got else {}})
            if others := [x["why"] for x in said if x["why"].startswith("other adapters: ")]:
                raise OtherAdapters(others[0].removeprefix("other adapters: "))
            why = next((x["why"] for x in said if x["why"]), "")
            if got and not why:
                state, _, expected, notes = got
                del got
                # A process may read all of it for itself, as to convert it, or a part.
                own = all(x.sharding.is_fully_addressable for x in named(like).values())
                sums = [x["sums"] for x in said]
                if not own:
                    sums = [{n: digest.total([x[n] for x in sums]) for n in expected}]
                if not (bad := [n for n, s in expected.items() if any(x[n] != s for x in sums)]):
                    return state, notes
                why = f"the digest differs of {', '.join(bad[:3])}"
            got = None
            log.warning(
                "checkpoint %s/%d cannot be used (%s): falling back to the one before",
                self.folder,
                step,
                why,
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
    ) -> tuple[State, dict[str, int], dict[str, int], dict[str, Any]]:
        """Step `step`: the state, digests of what this process read of each array, those that all
        processes together should come to, and the notes.

        Waits for no other process. Raises Damaged, OtherAdapters.
        """
        folder = self.folder / str(step)
        notes = read_notes(folder)
        if (theirs := notes.get("lora")) != lora:
            raise OtherAdapters(
                f"checkpoint {folder} was written with {adapters_text(theirs)}, and the "
                f"configuration says {adapters_text(lora)}: give the same, or choose another folder"
            )
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in named(like).items()
        }
        found = stored.Arrays(folder / "state")
        if missing := sorted(wanted.keys() - found.names):
            raise Damaged(f"it has no {', '.join(missing[:3])}")
        if jax.tree.leaves(like.optimizer) and (more := sorted(found.names - wanted.keys())):
            raise Damaged(f"it also has {', '.join(more[:3])}, which nothing here is")
        manifest = stored.Manifest.read(folder)
        older = notes.pop("crc32", None)  # of versions before there were digests of pieces
        if manifest is None and older is None:
            raise Damaged("it has no digests")
        leaves, sums = {}, {}
        for name, x, sums[name] in stored.restore(found, wanted):
            if older and older[name] is not None and checksum(x) not in (None, older[name]):
                raise Damaged(f"the checksum differs of {name}")
            # A copy, because the restored buffers may be borrowed from the reader and are donated
            # later.
            leaves[name] = jax.numpy.copy(x)
        expected = {} if manifest is None else {name: manifest.total(name) for name in wanted}
        state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])
        return state, sums, expected, notes

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


def of_notes(notes: dict[str, Any]) -> int:
    """crc32 of notes, as JSON keeps them."""
    return zlib.crc32(json.dumps(notes, sort_keys=True).encode())


def read_notes(step: epath.Path) -> dict[str, Any]:
    """The notes of a step's folder; Damaged where they are not those that were written."""
    notes = stored.read_json(step / "notes" / "metadata")
    if not isinstance(notes, dict):
        raise Damaged(f"{step}/notes are not notes")
    written = notes.pop("crc32_of_notes", None)
    if written is not None and of_notes(notes) != written:
        raise Damaged(f"the checksum of {step}/notes differs")
    return notes


def digits(folder: epath.PathLike) -> list[int]:
    """Whatever in a folder is called as a step is."""
    folder = epath.Path(folder)
    if not folder.is_dir():  # in a bucket an empty one is not there
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def numbered(folder: epath.PathLike) -> list[int]:
    """The steps that a stage's folder has a checkpoint of, ascending; none without a folder.

    A folder of a disk is renamed when it is whole. In a bucket nothing is renamed: the last file
    that is written says that the others are there.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    if "://" in str(folder):
        return [n for n in digits(folder) if (folder / str(n) / "commit_success.txt").exists()]
    return [n for n in digits(folder) if any((folder / str(n)).iterdir())]


def adapters_text(lora: dict[str, Any] | None) -> str:
    """The adapters of a model, for a message."""
    if lora is None:
        return "no LoRA"
    return f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g} on {', '.join(lora['targets'])}"


def named(state: State) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """The arrays of a state under readable names: `trained.llm.embedding.value` and so on."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def checksum(x: jax.Array) -> int | None:
    """crc32 of an array's bytes; None where other processes hold a part of it."""
    return checksum_of(np.asarray(x)) if x.is_fully_addressable else None


def checksum_of(x: np.ndarray) -> int:
    """crc32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1))
