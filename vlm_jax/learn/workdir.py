# SPDX-License-Identifier: Apache-2.0
"""A run's folder: one process group at a time, one configuration for its life, what came of it."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import __version__
from vlm_jax.learn import optimizer
from vlm_jax.learn.checkpoint import Checkpoints
from vlm_jax.models import lora, vlm
from vlm_jax.models.compressors import serves_any_tokens
from vlm_jax.models.vlm import VLM

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")

# Fields that came after results were published and folders were begun, with the value at which all
# is as it was without them.
LATER = {
    "data.images_per_row": 1,
    "data.image_resize": (),
    "data.image_rescale": 1 / 255,
    "data.image_normalize": True,
    "data.image_exif": "ignore",
    "compressor.queries": 0,
}


@contextmanager
def claim(workdir: Path, config: ConfigDict):
    """Holds `workdir` for this process; refuses a second run, another configuration, a bad disk."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise OSError(
            f"cannot write to --workdir={workdir}: {error.strerror}; choose a folder on a "
            "disk with space that you may write to"
        ) from None
    with lock:
        if jax.process_index() == 0:
            try:
                # The kernel drops the lock when its holder dies, however it dies.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is at work in {workdir}: wait for it, or choose another --workdir"
                ) from None
            same_config(workdir / "config.json", config)
        yield


def same_config(path: Path, config: ConfigDict) -> None:
    """Writes the configuration, or compares it with the one that the folder was begun with.

    V may change where one training serves any.
    """
    now = flat(config.to_dict())
    if path.exists():
        then = flat(json.loads(path.read_text()))
        free = {"compressor.tokens"} if serves_any_tokens(now.get("compressor.kind")) else set()
        born = flat({name: LATER[name] for name in LATER.keys() & now.keys()})
        then = born | then
        names = (now.keys() | then.keys()) - free
        if changed := sorted(k for k in names if now.get(k) != then.get(k)):
            shown = "; ".join(f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:4])
            raise ValueError(
                f"{path.parent} was begun with another configuration ({shown}): repeat "
                "the first command, or choose another --workdir"
            )
    else:
        write_json(path, config.to_dict())


def digest(config: ConfigDict) -> str:
    """Sixteen hex digits that change whenever any field does.

    A field of LATER counts only where it changes something: rows keep their digests.
    """
    fields = config.to_dict()
    for name, value in LATER.items():
        section, _, field = name.partition(".")
        if fields[section].get(field) == value:
            del fields[section][field]
    text = json.dumps(fields, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(workdir: Path, config: ConfigDict, *, merge: bool = True) -> VLM:
    """The model that `vlm-jax train` left in `workdir`, on the current mesh.

    Adapters are merged into its LLM unless `merge` is off. ValueError where training has not come
    to its end.
    """
    model = lora.adapt(vlm.create(config, seed=config.seed), config.lora, seed=config.seed)
    adapters = lora.described(model)
    graph, like = optimizer.start(model, "finetune", optimizer.optimizer(config.finetune))
    restored = Checkpoints(workdir / "finetune").restore(like, lora=adapters)
    steps = int(restored[0].step) if restored else 0
    if steps != config.finetune.steps:
        raise ValueError(
            f"{workdir}/finetune holds {steps} of {config.finetune.steps} steps: repeat the "
            "`vlm-jax train` command to finish it"
        )
    model = optimizer.finish(graph, restored[0])
    return lora.merge(model) if merge else model


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names, as JSON would give them back."""
    if isinstance(tree, dict) and (tree or not prefix):
        return {
            k: v
            for key, sub in tree.items()
            for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: json.loads(json.dumps(tree))}


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    fresh = path.with_suffix(f".tmp{os.getpid()}")
    with fresh.open("w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def commit(root: Path) -> str:
    """The commit of the checkout at `root`; of an installed package, which has none, its version.

    A package may lie somewhere below a checkout of something else, whose commit says nothing.
    """
    described = ""
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        # Without git there is no answer, and no error either.
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
        machine=f"{jax.device_count()} x {device.device_kind} ({platform.machine()}, "
        f"{os.cpu_count()} CPU cores), {kernels} kernels",
    )
