# SPDX-License-Identifier: Apache-2.0
"""All tensors of a folder of weights, whatever its files are called; only headers are read."""

import json
from pathlib import Path
from typing import Any

from vlm_jax.weights.pickles import read_torch
from vlm_jax.weights.stored import Stored, read_safetensors

READERS = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".pt": read_torch,
    ".pth": read_torch,
}
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FileNotFoundError or ValueError say which file it should have been."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def read_tensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of one file, or of a folder with an index, a single file, or several.

    Raises:
      FileNotFoundError: where there is nothing to read, or a shard is missing.
      ValueError: for a file that is cut off or unsafe, and an index that does not fit its files.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path}: weights are files of {', '.join(READERS)}")
        return READERS[path.suffix](path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    for name in INDICES:
        if (path / name).exists():
            return _indexed(path, read_json(path / name).get("weight_map", {}), name)
    for name in SINGLES:
        if (path / name).exists():
            return read_tensors(path / name)
    if found := sorted(path.glob("*.safetensors")):
        return _together(found)
    held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise FileNotFoundError(
        f"{path} is no checkpoint: it has none of {', '.join([*INDICES, *SINGLES])}, only {held}"
    )


def _indexed(folder: Path, places: dict[str, str], index: str) -> dict[str, Stored]:
    files = sorted(set(places.values()))
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} is not whole: {index} names {', '.join(absent[:3])}, which "
            f"{'is' if len(absent) == 1 else 'are'} not there"
        )
    found = _together([folder / name for name in files])
    if absent := [name for name in places if name not in found]:
        raise ValueError(f"{folder}: {index} names tensors that no file has: {absent[:3]}")
    return found


def _together(files: list[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        more = READERS[file.suffix](file)
        if twice := sorted(found.keys() & more.keys()):
            raise ValueError(f"{file.parent} has {twice[0]} twice: in {file.name} and before it")
        found |= more
    return found
