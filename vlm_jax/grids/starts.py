# SPDX-License-Identifier: Apache-2.0
"""The folders that LLMs of a grid start from: their sizes, their tokenizers, their digests."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax import hosts, progress
from vlm_jax.models.sizes import LLMSize
from vlm_jax.training import first_weights, llms, runs


def adopted(config: ConfigDict) -> ConfigDict:
    """The configuration of a grid in which every LLM that starts from a folder has that folder's
    size, and its tokenizer unless it names one.

    Raises:
      FileNotFoundError, ValueError: for a folder without a model, for a size beside `start_from`
        that is another one, and for what an LLM of a grid cannot set.
    """
    config = config.copy_and_resolve_references()
    for name, entry in config.grid.llms.items():
        llms.check(config, name)
        if not entry.get("start_from"):
            continue
        flag = f"grid.llms.{name}.start_from"
        model = runs.described(entry.start_from, flag)
        size = dataclasses.asdict(LLMSize.of(model.llm))
        if other := [k for k, v in size.items() if k in entry and not alike(entry[k], v)]:
            said = ", ".join(f"{k}={size[k]} and not {entry[k]}" for k in other)
            raise ValueError(
                f"{flag}={entry.start_from} holds an LLM with {said}: leave its sizes out, or name "
                "another folder"
            )
        with config.unlocked(), config.grid.unlocked(), config.grid.llms.unlocked():
            values: dict[str, Any] = dict(size)
            own = entry.get("data", {})
            if not own.get("tokenizer") and model.tokenizer:
                values["data"] = dict(own) | dict(tokenizer=str(model.tokenizer))
            config.grid.llms[name] = ConfigDict(entry.to_dict() | values)
    return config


def alike(ours: Any, theirs: Any) -> bool:
    """Whether two fields of a size are equal, numbers in the 32 bits that files hold them in."""
    if isinstance(theirs, float):
        return bool(np.float32(ours) == np.float32(theirs))
    return ours == theirs


def digests(config: ConfigDict) -> dict[str, str]:
    """Folder -> digest of its LLM, for every folder that LLMs of a grid start from."""
    found: dict[str, str] = {}
    for name, entry in config.grid.llms.items():
        path = entry.get("start_from")
        if path and path not in found:
            with progress.doing(f"reading the LLM in {path}"):
                flag = f"grid.llms.{name}.start_from"
                found[path] = hosts.from_writer(
                    lambda path=path, flag=flag: first_weights.llm_digest(path, flag)
                )
    return found
