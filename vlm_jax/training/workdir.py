# SPDX-License-Identifier: Apache-2.0
"""A run's folder: one process group at a time, one configuration for good, the finished model."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from vlm_jax import __version__, files, hosts
from vlm_jax.models import lora, vlm
from vlm_jax.models.vlm import VLM
from vlm_jax.training import fields, fingerprint, lease, memory, optimizer, precision
from vlm_jax.training.checkpoint import Checkpoints, numbered
from vlm_jax.training.fields import Change
from vlm_jax.training.recipe import Recipe

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
# What each hash of a run describes; others are described by their names.
CONTENT = dict(data="training data", tokenizer="tokenizer", evaluation="evaluation data")


@dataclass
class Claim:
    """A work folder that this process group holds, and its recorded configuration.

    The configuration is recorded when there is something to keep (`begin`): an attempt that failed
    before that claims nothing.

    Args:
      recorded: the configuration of what is kept there, nested; None if nothing is.
      places: path fields that differ from it.
      other: its sections that differ now and have no results yet.
    """

    folder: PurePath
    config: ConfigDict
    recorded: dict[str, Any] | None = None
    places: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    content: dict[str, str] = field(default_factory=dict)

    def first(self) -> ConfigDict:
        """The recorded configuration, with the sections that have no results yet as they are now.

        It differs from `config` in nothing that a result depends on.
        """
        if self.recorded is None:
            return self.config
        now = self.config.to_dict()
        return of_json(self.recorded | {name: now[name] for name in self.other})

    def reads(self, **hashes: str) -> None:
        """Compares hashes of what the run reads (CONTENT) with the recorded ones.

        Raises:
          ValueError: if something differs, or was moved and cannot be compared.
        """
        self.content = hashes
        hosts.check_same("data or tokenizer", hashes)
        hosts.from_writer(self._compare_content)

    def _compare_content(self) -> None:
        if self.recorded is None:
            return
        path = self.folder / "content.json"
        then = json.loads(path.read_text()) if path.exists() else {}
        named = fields.changes(self.places, fields.flat(self.recorded), flat(self.config))
        for name, value in self.content.items():
            if name in then and then[name] != value:
                raise ValueError(
                    f"{self.folder} was started with another {CONTENT.get(name, name)} "
                    f"({named + '; ' if named else ''}its hash was {then[name][:12]}, is "
                    f"{value[:12]}): training cannot continue with it; restore the first, or "
                    "choose another --workdir"
                )
        if self.places and not then:
            raise ValueError(another(self.folder, named))

    def begin(self) -> None:
        """Records the configuration: from now on the folder belongs to this run."""
        if not hosts.is_writer():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.recorded is None or self.other:
            self.recorded, self.other = self.first().to_dict(), []
            files.write_json(self.folder / "config.json", self.recorded)
            if self.content:
                files.write_json(self.folder / "content.json", self.content)


@contextmanager
def claim(
    workdir: PurePath, config: ConfigDict, *, grid: bool = False, wait: bool = False
) -> Iterator[Claim]:
    """Holds `workdir` for this process; refuses a second run, a different run, a bad disk.

    A run is different if its configuration differs in a field that its results depend on
    (`vlm_jax/training/fields.py`), of a `grid` or of one training. With `wait` a second run waits
    for the first instead of being refused.
    """
    hosts.check_same("configuration or --workdir", [str(workdir), digest(config)])
    above = workdir.parent.parent
    if workdir.parent.name == "cells" and (above / "config.json").exists():
        raise ValueError(
            f"--workdir={workdir} is a cell of the grid in {above}, which `vlm-jax grid` trains: "
            "choose another --workdir (config.start_from takes a cell to start from)"
        )
    with lock(workdir, wait=wait):
        claimed = Claim(workdir, config)

        def read() -> dict[str, Any]:
            if (path := workdir / "config.json").exists():
                tree = run_config(path)
                if kept(workdir):
                    claimed.recorded = of_json(tree).to_dict()
                    compare(claimed, grid=grid)
            return dict(recorded=claimed.recorded, places=claimed.places, other=claimed.other)

        state = hosts.from_writer(read)
        if state["recorded"] is not None and not hosts.is_writer():
            claimed.recorded = of_json(state["recorded"]).to_dict()
            claimed.places, claimed.other = state["places"], state["other"]
        yield claimed


def run_config(path: PurePath) -> dict[str, Any]:
    """The configuration in a run's config.json; ValueError for a file of something else."""
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or not {*fields.STAGES} <= tree.keys():
        raise ValueError(
            f"{path} is not of a training, but of a model folder or something else: choose "
            "another --workdir"
        )
    return tree


def kept(folder: PurePath) -> bool:
    """Whether a folder has results that depend on its configuration."""
    folders = [folder / name for name in ("features", "cells")]
    return any(path.is_dir() for path in folders) or len(untouched(folder)) < len(fields.STAGES)


@contextmanager
def lock(folder: PurePath, what: str = "a run", *, wait: bool = False) -> Iterator[None]:
    """Holds `folder` for all processes of this run (`lease.held`); one of them does it."""
    with ExitStack() as stack:
        hosts.from_writer(lambda: stack.enter_context(lease.held(folder, what, wait=wait)))
        # The others read what one process writes, so the disk must be the same.
        if not all(hosts.collected((folder / lease.NAME).exists())):
            raise ValueError(
                f"--workdir={folder} is not the same folder for every process: choose one on a "
                "disk that all hosts share, or in a bucket"
            )
        yield


def compare(claimed: Claim, *, grid: bool) -> None:
    """Raises ValueError if the configuration describes a different run than the recorded one."""
    then, now = fields.flat(claimed.recorded), flat(claimed.config)
    later = [] if grid else untouched(claimed.folder)
    refused = []
    for name in fields.differing(then, now):
        change = fields.change_of(name, then, now)
        section = name.partition(".")[0]
        if ("finetune" if section == "lora" else section) in later:
            claimed.other.append(section)
        elif change is Change.PLACE:
            claimed.places.append(name)
        elif change is Change.CELLS and grid:
            claimed.other.append(section)
        elif change in (Change.RUN, Change.SHOWN) or (grid and change is Change.ANSWERS):
            refused.append(name)
    if steps := [name for name in refused if name.endswith(".steps")]:
        raise ValueError(prolonged(claimed.folder, steps[0], then, now, grid=grid))
    if refused:
        raise ValueError(another(claimed.folder, fields.changes(refused, then, now)))


def another(folder: PurePath, named: str) -> str:
    """The message that these fields make it a different run, with the ways out."""
    return (
        f"{folder} was started with another configuration ({named}): repeat "
        "the first command, or choose another --workdir"
    )


def flat(config: ConfigDict) -> dict[str, Any]:
    """A configuration's fields by their dotted names."""
    return fields.flat(config.to_dict())


def untouched(folder: PurePath) -> list[str]:
    """The stages after the last one that has a checkpoint."""
    started = [bool(numbered(folder / stage)) for stage in fields.STAGES]
    first = max((i + 1 for i, some in enumerate(started) if some), default=0)
    return list(fields.STAGES[first:])


def prolonged(folder: PurePath, name: str, then: dict, now: dict, *, grid: bool) -> str:
    """The message for a different number of steps, with a way to train on."""
    stage = name.partition(".")[0]
    was, is_now = then.get(name), now[name]
    why = (
        f"{name} was {was}, is {is_now}: the learning rate of {folder} falls along a cosine to 0 "
        f"at step {was}, so other steps are another run from the first one on"
    )
    if grid:
        return f"{why}; choose another --workdir, where every cell is trained again"
    if is_now < was or stage != "finetune":
        return f"{why}; choose another --workdir"
    return (
        f"{why}. To continue training a finished run, start a new one from its weights, with its "
        f"own warm-up and cosine: vlm-jax train --config=FILE --workdir=NEW "
        f"--config.start_from={folder} --config.encoder.steps=0 --config.align.steps=0 "
        f"--config.finetune.steps={is_now - was}"
    )


def of_json(tree: dict[str, Any]) -> ConfigDict:
    """The configuration in a file; JSON has lists where a configuration has tuples.

    A field that is newer than the file gets the value at which nothing changes.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    config = ConfigDict(tuples(tree))
    for name, value in fields.LATER.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            if section not in fields.LATER_SECTIONS or "data" not in config:
                continue
            config[section] = ConfigDict()
        home = config[section] if section else config
        if leaf not in home:
            home[leaf] = value
    return config


def digest(config: ConfigDict) -> str:
    """Sixteen hex digits that change with any field.

    A field of LATER counts only if it changes something, so that older rows keep their digests.
    """
    tree = config.to_dict()
    for name, value in fields.LATER.items():
        section, _, leaf = name.rpartition(".")
        home = tree.get(section, {}) if section else tree  # a cell has no `grid`
        if home.get(leaf) == value:
            del home[leaf]
    for section in fields.LATER_SECTIONS:
        if not tree[section]:
            del tree[section]
    text = json.dumps(tree, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(workdir: PurePath, recipe: Recipe, *, merge: bool = True) -> VLM:
    """The model that `vlm-jax train` wrote to `workdir`, on the current mesh.

    Adapters are merged into its LLM unless `merge` is False. ValueError if training is not
    finished.
    """
    stage = recipe.last
    graphs: list[tuple] = []

    def abstract_state() -> optimizer.State:
        model = vlm.build(recipe.model, nnx.Rngs(recipe.seed))
        if stage == "finetune":
            model = lora.adapt(model, recipe.lora, seed=recipe.seed)
        model = precision.narrowed(model, stage, recipe.frozen_dtype)
        graph, state = optimizer.start(model, stage, optimizer.optimizer(recipe.stage(stage)))
        graphs.append((graph, lora.described(model)))
        return state._replace(optimizer=())

    # Nothing is computed, and only the model's arrays are read.
    like = memory.placed(jax.eval_shape(abstract_state))
    memory.check(
        memory.of_model(like, f"the model in {workdir}"),
        "spread it over more devices (mesh.fsdp, mesh.tensor), or use a machine with more memory",
    )
    ((graph, adapters),) = graphs
    restored = None
    if numbered(workdir / stage):
        restored = Checkpoints(workdir / stage).restore(like, lora=adapters)
    steps = int(restored[0].step) if restored else 0
    if steps != (wanted := recipe.stage(stage).steps):
        raise ValueError(
            f"{workdir}/{stage} holds {steps} of {wanted} steps: repeat the command "
            "that trains it (`vlm-jax train` or `vlm-jax grid`) to finish it"
        )
    model = precision.widened(optimizer.finish(graph, restored[0]))
    return lora.merge(model) if merge else model


def commit(root: Path) -> str:
    """The commit of the checkout at `root`; the version for an installed package.

    An installed package may be inside the checkout of another project, whose commit is irrelevant.
    """
    described = ""
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        # Without git: no answer, but no error either.
        with suppress(OSError):
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
            described = done.stdout.strip()
    return described or f"vlm_jax {__version__}"


def provenance(kernels: str) -> dict[str, Any]:
    """Commit, package versions, machine and form of the kernels that a result was made with."""
    device = jax.devices()[0]
    return dict(
        commit=commit(Path(__file__).resolve().parents[2]),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        machine=f"{jax.device_count()} x {device.device_kind} ({fingerprint.processor()}), "
        f"{kernels} kernels",
    )
