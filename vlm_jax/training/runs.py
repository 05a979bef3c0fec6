# SPDX-License-Identifier: Apache-2.0
"""What a folder is: a trained model, a cell of a grid, a model folder, or none of them.

    WORKDIR/config.json, WORKDIR/finetune/...      of `vlm-jax train`
    GRID/config.json, GRID/cells/NAME/finetune/... of `vlm-jax grid`: GRID/cells/NAME is a model
    DIR/config.json with a model_type, tensors     of `vlm-jax convert`

Cells that differ in V alone share one model where the compressor serves any V; its checkpoints lie
in a folder beside theirs, which is a model too.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePath

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import files, mesh, progress
from vlm_jax.models import vlm
from vlm_jax.models.sizes import VLMSize
from vlm_jax.models.vlm import VLM
from vlm_jax.training import memory
from vlm_jax.training.cells import cells_of
from vlm_jax.training.checkpoint import numbered
from vlm_jax.training.fields import STAGES
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.workdir import finished, of_json
from vlm_jax.weights import folder, names, sections, sources
from vlm_jax.weights.classes import within
from vlm_jax.weights.files import read_json
from vlm_jax.weights.values import table


@dataclass(frozen=True)
class Run:
    """One trained model: its folder and configuration, where its checkpoints and tokenizer lie.

    `root` is the folder of its training or grid. A cell of a grid lies below it, and has the grid's
    predictions in `folder`.
    """

    folder: PurePath
    config: ConfigDict
    home: PurePath
    root: PurePath

    @property
    def grid(self) -> bool:
        """Whether it is a cell of one."""
        return self.root != self.folder

    @property
    def tokenizer(self) -> PurePath:
        """Where the tokenizer lies."""
        named = self.config.data.tokenizer
        return files.path_of(named) if named else self.root / "tokenizer"

    def content(self) -> dict[str, str]:
        """Hashes of what it was trained on; none of a run of an earlier version."""
        path = self.root / "content.json"
        return read_json(path) if path.is_file() else {}


def is_run(path: str | PurePath) -> bool:
    """Whether a folder belongs to a training or a grid; one of weights has a model_type."""
    path = files.path_of(path)
    if (path / "config.json").is_file():
        fields = read_json(path / "config.json")
        return "model_type" not in fields and "finetune" in fields
    return bool({"cells", *STAGES} & {path.name, path.parent.name})


def of(path: str | PurePath, flag: str) -> Run:
    """The trained model of a folder; `flag` is how the command calls it.

    Raises:
      FileNotFoundError, ValueError: for a folder that is none, saying what it is instead.
    """
    named = f"{flag}={path}"
    path = files.path_of(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {named}")
    if path.name in STAGES and numbered(path):
        raise ValueError(f"{named} is one stage of a training: give {flag}={path.parent}")
    if path.name.isdigit() and path.parent.name in STAGES:
        raise ValueError(f"{named} is one checkpoint: give {flag}={path.parent.parent}")
    if path.parent.name == "cells" and (path.parent.parent / "config.json").is_file():
        return cell(path, named)
    grid = path.parent if path.name == "cells" else path
    trained = any(numbered(path / stage) for stage in STAGES[1:])
    if (grid / "cells").is_dir() and not trained:
        models = finished_cells(grid)
        raise ValueError(
            f"{named} is a grid of many models: give one of its cells, such as "
            f"{flag}={grid}/cells/{models[0] if models else 'NAME'}"
            + (f" (there are {', '.join(models)})" if models else "; none is finished yet")
        )
    if not (path / "config.json").is_file() or not trained:
        raise FileNotFoundError(
            f"{named} holds no trained model: neither the config.json of a model folder (`vlm-jax "
            "convert` makes one) nor the checkpoints of a training (`vlm-jax train` or a cell of "
            "`vlm-jax grid`)"
        )
    config = config_of(path)
    return Run(path, config, path, path)


def config_of(folder: PurePath) -> ConfigDict:
    """The configuration of a run's folder; ValueError with the field that no model can have."""
    found = read_json(folder / "config.json")
    with within(f"{folder}/config.json"):
        for name in ("vit", "llm", "compressor", "data", "lora", *STAGES):
            table(name, found.get(name))
        config = of_json(found)
        sections.check_model(config.to_dict())
    return config


def cell(path: PurePath, named: str) -> Run:
    """The cell of a grid whose folder is `path`, or the model that several share."""
    grid = path.parent.parent
    config = config_of(grid)
    cells = cells_of(config)
    found = [c for c in cells if c.name == path.name]
    # Of a shared model, the cell that asks for most.
    found = found or sorted(
        (c for c in cells if c.model == path.name), key=lambda c: -c.config.compressor.tokens
    )
    if not found:
        raise ValueError(
            f"{named} is no cell of the grid in {grid}: choose one of "
            f"{', '.join(c.name for c in cells)}"
        )
    one = found[0]
    return Run(path, one.config, path.parent / one.model, grid)


def finished_cells(grid: PurePath) -> list[str]:
    """The names of a grid's cells that have a row."""
    return sorted(path.parent.name for path in (grid / "cells").glob("*/row.json"))


def trained_here(path: str | PurePath, flag: str) -> bool:
    """Whether a folder is a training's and no model folder.

    FileNotFoundError where it is neither.
    """
    path = files.path_of(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {flag}={path}")
    return is_run(path) or not (path / "config.json").is_file()


def described(path: str | PurePath, flag: str) -> folder.Model:
    """The model of a folder without its weights: of a trained run no tensor is read."""
    if not trained_here(path, flag):
        return folder.read(path)
    run = of(path, flag)
    with one_device():
        return sources.described_run(run.root, run.config)


def read(path: str | PurePath, flag: str) -> folder.Model:
    """The model of a trained run, a cell or a model folder, on one device.

    Raises:
      FileNotFoundError, ValueError: for a folder that is none, saying what it is instead.
    """
    if not trained_here(path, flag):
        return folder.read(path)
    run = of(path, flag)
    if run.config.data.blind:
        progress.say(f"{path} was trained blind: images say nothing to it (data.blind=True)")
    with one_device():
        return trained(run)


def load(
    stored: folder.Model, size: VLMSize, *, dtype: str | None = None, what: str = "the model"
) -> VLM:
    """A folder's model on the current mesh, every tensor read straight into its shards.

    Args:
      stored: as `read` gives it, checked (`stored.check()`).
      size: what is built of it: `stored.size()`, or the same computed otherwise.
      dtype: of the parameters, float32 or bfloat16; as stored unless given.
      what: how a message about memory calls it.
    Raises:
      ValueError: where it is larger than the memory that is there.
    """
    dtype = dtype or stored.dtype()
    shapes = vlm.shapes(size)
    need = memory.Need(what, memory.in_shards(shapes) // 4 * np.dtype(dtype).itemsize)
    memory.check(need, "load it as bfloat16, or over more devices (mesh.fsdp, mesh.tensor)")
    return folder.place(shapes, names.model_table(shapes), stored.tensors, dtype=dtype)


def trained(run: Run) -> folder.Model:
    """The model of a finished run, adapters merged into its LLM."""
    return sources.of_run(run.root, run.config, finished(run.home, Recipe.of(run.config)))


def adapted(path: str | PurePath | None, flag: str) -> tuple[VLM, folder.Model]:
    """The model of a finished training with its adapters apart, and what its folder is about.

    ValueError for a folder that is no training, or one without adapters.
    """
    if path is None or not is_run(path):
        raise ValueError(
            f"--to-peft needs {flag}=WORKDIR, the folder of a `vlm-jax train` with "
            f"config.lora.rank, and got {path}"
        )
    run = of(path, flag)
    if not run.config.lora.rank:
        raise ValueError(f"{path} has no adapters to export: it was trained with lora.rank=0")
    return finished(run.home, Recipe.of(run.config), merge=False), described(path, flag)


def one_device() -> AbstractContextManager:
    """The mesh on which weights pass through, one of each process."""
    return jax.set_mesh(mesh.make(devices=jax.local_devices()[:1]))
