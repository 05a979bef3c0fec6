# SPDX-License-Identifier: Apache-2.0
"""The tokens of a model that its configuration names: where a text begins and ends, and padding."""

from pathlib import Path
from typing import Any

from vlm_jax.weights.files import read_json
from vlm_jax.weights.values import table

FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# eos_token_id of the configuration classes of transformers that have one; the others have none.
DEFAULT_END = {"llama": 2, "mistral": 2}
GENERATION = "generation_config.json"


def of(folder: Path, family: str) -> dict[str, Any]:
    """What the files of a published model say of its tokens, as a model folder keeps it.

    `family` is the model_type of its language model.

    Returns: `outer` and `text`, the fields of config.json and of its text_config that name tokens;
    `stop`, the tokens at which transformers ends generation: those of generation_config.json where
    there is one, else those of config.json, else those of the class of the language model.

    Raises:
      ValueError: for a field that names no token.
    """
    fields = read_json(folder / "config.json")
    text = fields.get("text_config")
    text = text if isinstance(text, dict) else {}
    outer, inner = (_named(some, f"{folder}/config.json: ") for some in (fields, text))
    stop = stops(folder)
    if stop is None:
        own = inner if "text_config" in fields else outer
        stop = _listed(outer.get("eos_token_id"))
        stop = stop or _listed(own.get("eos_token_id", DEFAULT_END.get(family)))
    if "text_config" not in fields:
        outer, inner = {}, outer
    return dict(outer=outer, text=inner, stop=stop)


def of_run(start: str) -> dict[str, Any]:
    """The same for a model that was trained here from the model folder `start`, or from none ("").

    It is `trained`: where its answers end is for its template to say, too.
    """
    path = Path(start) / "config.json"
    facts = read_json(path).get("facts") if start and path.is_file() else None
    ends = facts.get("ends") if isinstance(facts, dict) else None
    return dict(ends or dict(outer={}, text={}, stop=[]), trained=True)


def stops(folder: Path) -> list[int] | None:
    """The tokens at which the generation_config.json of a folder ends; None where it has none.

    Raises:
      ValueError: where it is no JSON object, or names no tokens.
    """
    path = folder / GENERATION
    if not path.is_file():
        return None
    return _listed(_named(read_json(path), f"{path}: ").get("eos_token_id"))


def check(ends: dict[str, Any]) -> None:
    """ValueError unless this is what `of` gives."""
    for part in ("outer", "text"):
        _named(table(f"facts.ends.{part}", ends.get(part, {})), f"facts.ends.{part}.")
    if not isinstance(stop := ends.get("stop", []), list):
        raise ValueError(f"facts.ends.stop={stop!r:.80}: a list of tokens is needed")
    _named({"eos_token_id": stop}, "facts.ends.stop, ")


def _named(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that name tokens, checked."""
    found = {name: fields[name] for name in FIELDS if name in fields}
    for name, value in found.items():
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int for token in several):
            raise ValueError(
                f"{where}{name}={value!r:.80}: it has to be the number of a token"
                f"{', or a list of them' if name == 'eos_token_id' else ''}; correct or remove it"
            )
    return found


def _listed(tokens: int | list[int] | None) -> list[int]:
    """Tokens as a list; a negative number stands for none."""
    tokens = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    return [token for token in tokens if token >= 0]
