# SPDX-License-Identifier: Apache-2.0
"""All tensors of a folder of weights, in any supported file format; only headers are read."""

import json
from pathlib import Path, PurePath
from typing import Any

from vlm_jax import files
from vlm_jax.weights import llama_cpp
from vlm_jax.weights.pickles import read_torch
from vlm_jax.weights.stored import Stored, read_safetensors
from vlm_jax.weights.values import depth, table, value_text

READERS = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".pt": read_torch,
    ".pth": read_torch,
    ".gguf": llama_cpp.read_tensors,
}
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin", llama_cpp.NAME)
DEEPEST = 50  # objects and lists of JSON inside each other
LONGEST_JSON = 16 * 2**20  # bytes; the index of 90,000 tensors has 9 MB


def read_json(path: PurePath) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError or ValueError with the file's name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a checkpoint: it has no {path.name}")
    if (size := files.size(path)) > LONGEST_JSON:
        raise ValueError(f"{path} has {size} bytes: no such file is longer than {LONGEST_JSON}")
    try:
        value = json.loads(path.read_bytes().decode())
        nested = depth(value, DEEPEST)
    except RecursionError:
        nested = DEEPEST
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or download it again") from None
    if nested >= DEEPEST:
        raise ValueError(f"{path} is nested {DEEPEST} deep or deeper: copy or download it again")
    return table(str(path), value)


def read_tensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of one file, or of a folder with an index, a single file, or several.

    Raises:
      FileNotFoundError: if there is nothing to read, or a shard is missing.
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
        if (path / name).is_file():
            places = read_json(path / name).get("weight_map")
            return _indexed(path, places, name)
    for name in SINGLES:
        if (path / name).is_file():
            return READERS[Path(name).suffix](path / name)
    if shards := sorted(p for p in path.glob("*.safetensors") if p.is_file()):
        return _together(shards)
    listing = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise FileNotFoundError(
        f"{path} is not a checkpoint: it has none of {', '.join([*INDICES, *SINGLES])}, only "
        f"{listing}"
    )


def _indexed(folder: Path, places: Any, index: str) -> dict[str, Stored]:
    where = f"{folder / index}: weight_map"
    for tensor, name in table(where, places).items():
        # An index must not name files elsewhere on this machine.
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ValueError(
                f"{where} places {value_text(tensor)} in {value_text(name)}: it may name files of "
                "its own folder only"
            )
        if Path(name).suffix not in READERS:
            raise ValueError(
                f"{where} names {value_text(name)}: weights are files of {', '.join(READERS)}"
            )
    if not places:
        raise ValueError(f"{where} names no tensors: copy or download it again")
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} is incomplete: {index} names {', '.join(missing[:3])}, which "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    tensors = _together([folder / name for name in files])
    if missing := [name for name in places if name not in tensors]:
        raise ValueError(f"{folder}: {index} names tensors that no file has: {missing[:3]}")
    return tensors


def _together(files: list[Path]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        in_file = READERS[file.suffix](file)
        if repeated := sorted(tensors.keys() & in_file.keys()):
            raise ValueError(f"{file.parent} has {repeated[0]} twice: in {file.name} and before it")
        tensors |= in_file
    return tensors
