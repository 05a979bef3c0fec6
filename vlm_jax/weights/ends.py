# SPDX-License-Identifier: Apache-2.0
"""The special tokens that a model's configuration names: begin and end of text, and padding."""

from pathlib import Path
from typing import Any

from vlm_jax.weights.files import read_json
from vlm_jax.weights.values import table

FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# eos_token_id of the configuration classes of transformers that have one; the others have none.
DEFAULT_END = {"llama": 2, "mistral": 2}
GENERATION = "generation_config.json"


def of(folder: Path, family: str) -> dict[str, Any]:
    """The special tokens in the files of a published model, as a model folder stores them.

    `family` is the model_type of its language model.

    Returns: `outer` and `text`, the fields of config.json and of its text_config that name tokens;
    `stop`, the tokens at which transformers ends generation: those of generation_config.json if it
    exists, else those of config.json, else those of the class of the language model.

    Raises:
      ValueError: for a field that is not a token number.
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
    """As `of`, for a model trained here from the model folder `start`, or from none ("").

    It is marked `trained`: its template also defines where its answers end.
    """
    path = Path(start) / "config.json"
    facts = read_json(path).get("facts") if start and path.is_file() else None
    ends = facts.get("ends") if isinstance(facts, dict) else None
    return dict(ends or dict(outer={}, text={}, stop=[]), trained=True)


def stops(folder: Path) -> list[int] | None:
    """The stop tokens in the generation_config.json of a folder; None if there is no such file.

    Raises:
      ValueError: if it is not a JSON object, or a field is not a token number.
    """
    path = folder / GENERATION
    if not path.is_file():
        return None
    return _listed(_named(read_json(path), f"{path}: ").get("eos_token_id"))


def check(ends: dict[str, Any]) -> None:
    """Raises ValueError unless this has the form that `of` returns."""
    for part in ("outer", "text"):
        _named(table(f"facts.ends.{part}", ends.get(part, {})), f"facts.ends.{part}.")
    if not isinstance(stop := ends.get("stop", []), list):
        raise ValueError(f"facts.ends.stop={stop!r:.80}: a list of tokens is needed")
    _named({"eos_token_id": stop}, "facts.ends.stop, ")


def _named(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that name tokens, checked."""
    tokens = {name: fields[name] for name in FIELDS if name in fields}
    for name, value in tokens.items():
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int for token in several):
            raise ValueError(
                f"{where}{name}={value!r:.80}: the number of a token is needed"
                f"{', or a list of them' if name == 'eos_token_id' else ''}; correct or remove it"
            )
    return tokens


def _listed(tokens: int | list[int] | None) -> list[int]:
    """Tokens as a list; a negative number stands for none."""
    tokens = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    return [token for token in tokens if token >= 0]
