# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by orbax: written while training continues, verified when read, with older ones as a
fallback.

Orbax restores flipped bits without an error, so every step has a digest of each piece of each
array, from every process (`arrays.py`). All processes fall back to the same step.
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
    """Orbax's manager without its own check for preemption, which the training loop makes.

    JAX's service needs increasing numbers from a single caller.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class OtherAdapters(ValueError):
    """A checkpoint whose model has different adapters: intact, but not usable here."""


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
        """Starts writing step `state.step`; OSError if it cannot, or if the previous write
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
        """Returns when no write is in progress; OSError if the last one failed."""
        with self.naming_failures():
            self.manager.wait_until_finished()

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Turns any exception of a write into an OSError that says where, why and what to do."""
        try:
            yield
        # Orbax passes on what its storage raised: OSError, ValueError or a bare Exception.
        except Exception as error:
            way_out = "free some space"
            if hosts.joined():  # a lost process is noticed here too, as a bare ValueError
                way_out = "see whether another process has ended or space is lacking,"
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({first_line(error)}); "
                f"earlier ones are intact: {way_out} and repeat the command"
            ) from error

    def set_aside(self) -> None:
        """Renames unusable steps: otherwise orbax would not write them, or earlier ones, again."""
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
        """The newest intact checkpoint with its notes, sharded like `like`; None if there is none.

        `like` may hold shapes with shardings. If it has no optimizer state, none is read.

        A damaged step is reported and the one before it is used.

        Raises:
          RuntimeError: if steps exist and all are damaged; starting over would lose work.
          OtherAdapters: for a model with different adapters than `lora` describes.
        """
        present, steps = hosts.from_writer(lambda: (digits(self.folder), numbered(self.folder)))
        steps.reverse()
        self.unusable = [n for n in present if n not in steps]
        for step in steps:
            result, why = None, ""
            try:
                result = self.read(step, like, lora)
            except OtherAdapters as error:
                why = f"other adapters: {error}"
            # Damaged, and whatever a library raises for files that it cannot read.
            except Exception as error:
                why = first_line(error)
            reports = hosts.collected({"why": why, "sums": result[1] if result else {}})
            if others := [x["why"] for x in reports if x["why"].startswith("other adapters: ")]:
                raise OtherAdapters(others[0].removeprefix("other adapters: "))
            why = next((x["why"] for x in reports if x["why"]), "")
            if result and not why:
                state, _, expected, notes = result
                del result
                # A process may read the whole state by itself, as for conversion, or only a part.
                own = all(x.sharding.is_fully_addressable for x in named(like).values())
                sums = [x["sums"] for x in reports]
                if not own:
                    sums = [{n: digest.total([x[n] for x in sums]) for n in expected}]
                if not (bad := [n for n, s in expected.items() if any(x[n] != s for x in sums)]):
                    return state, notes
                why = f"the digest differs of {', '.join(bad[:3])}"
            result = None
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
        """Step `step`: the state, the digest of this process's part of each array, the expected
        digests of the whole arrays, and the notes.

        Waits for no other process. Raises Damaged, OtherAdapters.
        """
        folder = self.folder / str(step)
        notes = read_notes(folder)
        if (written := notes.get("lora")) != lora:
            raise OtherAdapters(
                f"checkpoint {folder} was written with {adapters_text(written)}, and the "
                f"configuration says {adapters_text(lora)}: give the same, or choose another folder"
            )
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in named(like).items()
        }
        on_disk = stored.Arrays(folder / "state")
        if missing := sorted(wanted.keys() - on_disk.names):
            raise Damaged(f"it has no {', '.join(missing[:3])}")
        if jax.tree.leaves(like.optimizer) and (more := sorted(on_disk.names - wanted.keys())):
            raise Damaged(f"it also has {', '.join(more[:3])}, which nothing here is")
        manifest = stored.Manifest.read(folder)
        older = notes.pop("crc32", None)  # of versions without digests of pieces
        if manifest is None and older is None:
            raise Damaged("it has no digests")
        leaves, sums = {}, {}
        for name, x, sums[name] in stored.restore(on_disk, wanted):
            if older and older[name] is not None and checksum(x) not in (None, older[name]):
                raise Damaged(f"the checksum differs of {name}")
            # A copy, because restored buffers may belong to the reader and are donated later.
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
        """Waits for a write in progress; OSError if it failed."""
        self.wait()
        self.manager.close()


def of_notes(notes: dict[str, Any]) -> int:
    """crc32 of notes as JSON."""
    return zlib.crc32(json.dumps(notes, sort_keys=True).encode())


def read_notes(step: epath.Path) -> dict[str, Any]:
    """The notes of a step's folder; Damaged if they are not those that were written."""
    notes = stored.read_json(step / "notes" / "metadata")
    if not isinstance(notes, dict):
        raise Damaged(f"{step}/notes are not notes")
    written = notes.pop("crc32_of_notes", None)
    if written is not None and of_notes(notes) != written:
        raise Damaged(f"the checksum of {step}/notes differs")
    return notes


def digits(folder: epath.PathLike) -> list[int]:
    """The entries of a folder whose names are numbers, as those of steps are."""
    folder = epath.Path(folder)
    if not folder.is_dir():  # in a bucket an empty folder does not exist
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def numbered(folder: epath.PathLike) -> list[int]:
    """The steps that have a finished checkpoint in a stage's folder, ascending; none without it.

    On a disk the folder of a step is renamed when it is complete. A bucket cannot rename: there the
    last file written shows that the others exist.
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
    """crc32 of an array's bytes; None if other processes hold a part of it."""
    return checksum_of(np.asarray(x)) if x.is_fully_addressable else None


def checksum_of(x: np.ndarray) -> int:
    """crc32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1))
