# SPDX-License-Identifier: Apache-2.0
"""Parses the values of flags: numbers, shares such as reasoning:0.3,ocr:0.7, and law files."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.cost.flops import Number
from vlm_jax.cost.roofline import Stored
from vlm_jax.law.answer import Answer
from vlm_jax.law.law import SCHEMA, Law
from vlm_jax.planning.mixture import Mixture


def shares(text: str, flag: str) -> dict[str, float]:
    """Parses "a:1,b:3" as name -> share; shares sum to 1. Raises ValueError with the flag."""
    try:
        pairs = [item.rsplit(":", 1) for item in text.split(",")]
        weights = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise ValueError(f"{flag}={text}: expected name:weight,name:weight") from None
    total = sum(weights.values())
    if len(weights) < len(pairs) or min(weights.values()) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"{flag}={text}: weights must be positive, each name once")
    return {name: weight / total for name, weight in weights.items()}


def number(text: str | Number, flag: str, *, least: float = 0.0) -> float:
    """A finite number of at least `least`. Raises ValueError with the name of the flag."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ValueError(f"{flag}: {str(text)!r} is not a number of at least {least:g}")
    return value


def texts(text: str) -> dict[Number, Number]:
    """Parses "50" or "25:0.5,100:0.5" as Q -> its share of the requests."""
    if ":" not in text:
        return {number(text, "--text-tokens"): 1.0}
    return {number(q, "--text-tokens"): share for q, share in shares(text, "--text-tokens").items()}


def sizes(text: str | None) -> list[str] | list[Number] | str | None:
    """LLMs by name or by billions of parameters, or "continuous"; None if there is no flag."""
    if text is None or text == "continuous":
        return text
    names = [name.strip() for name in text.split(",")]
    if all(re.fullmatch(r"[\d.eE+-]+", name) for name in names):
        return [number(name, "--llms", least=1e-9) for name in names]
    return names


def counts(text: str | None) -> list[Number] | str | None:
    """A list of V, or "continuous"; None if there is no flag."""
    if text is None or text == "continuous":
        return text
    return [number(v, "--tokens", least=1.0) for v in text.split(",")]


def stored(weights: str | None, cache: str | None, products: str | None) -> Stored:
    """Types of the LLM's weights, cache and products; the chip's own without a flag."""
    return Stored(weights or "", cache or "", products or "")


def efficiency(text: str | None) -> float | dict[str, float] | None:
    """Parses "0.5" or "prefill:0.6,decode:0.8", fractions of the roofline that are reached."""
    if not text:
        return None
    if ":" not in text:
        return number(text, "--efficiency")
    pairs = [item.split(":", 1) for item in text.split(",")]
    if bad := [":".join(pair) for pair in pairs if len(pair) < 2]:
        raise ValueError(f"--efficiency: {', '.join(bad)} is not phase:fraction")
    return {phase: number(value, "--efficiency") for phase, value in pairs}


def read_laws(text: str, mix: str | None) -> Mixture:
    """The law of a file, of the families in it, or of several files, with the weights of `mix`."""
    if Path(text).is_file() or ":" not in text:
        fields = law_fields(Path(text))
        if mix is None:
            of_methods = {
                name: mixture({"all": (section, f"{text} methods.{name}")}, {"all": 1.0}, name)
                for name, section in fields.get("methods", {}).items()
            }
            first = mixture({"all": (fields, text)}, {"all": 1.0}, fields.get("method"))
            return dataclasses.replace(first, others=of_methods)
        named = {
            family: (section, f"{text} families.{family}")
            for family, section in fields.get("families", {}).items()
        }
        methods = {fields.get("method")}
        if not named:
            raise ValueError(
                f"--mix={mix} needs a law with families, and {text} has none: "
                "fit rows of several families, or pass --law=family:FILE,family:FILE"
            )
    else:
        paths = dict(item.split(":", 1) for item in text.split(","))
        named = {family: (law_fields(Path(path)), path) for family, path in paths.items()}
        methods = {fields.get("method") for fields, _ in named.values()}
        if len(several := sorted(method for method in methods if method)) > 1:
            raise ValueError(
                f"--law={text}: the laws are of different methods, {' and '.join(several)}: "
                "mix families of one"
            )
    weights = {family: 1 / len(named) for family in named} if mix is None else shares(mix, "--mix")
    if unknown := [family for family in weights if family not in named]:
        raise ValueError(f"--mix: no law for {', '.join(unknown)}; there are {', '.join(named)}")
    return mixture(named, weights, next(iter(methods - {None}), None))


def read_families(text: str) -> Mixture | None:
    """The families of a file, or several files, at equal weights; None for less than two."""
    if Path(text).is_file() or ":" not in text:
        names = list(law_fields(Path(text)).get("families", {}))
    else:
        names = [item.split(":", 1)[0] for item in text.split(",")]
    return read_laws(text, ",".join(f"{name}:1" for name in names)) if len(names) > 1 else None


def law_name(text: str) -> str:
    """What the law of a file without --mix answers for."""
    if not Path(text).is_file() and ":" in text:
        return "all families, at equal weights"
    return str(law_fields(Path(text)).get("family") or "the law of the file")


def mixture(
    named: Mapping[str, tuple[Mapping[str, Any], str]],
    weights: dict[str, float],
    method: str | None,
) -> Mixture:
    """The mixture of parsed laws; name -> (fields, place)."""
    laws = {name: law_of(fields, place) for name, (fields, place) in named.items()}
    answers = {name: answer_of(fields, place) for name, (fields, place) in named.items()}
    return Mixture(laws, weights, answers, method)


def answer_of(fields: Mapping[str, Any], place: str) -> Answer:
    """Who answers by parsed JSON: its forms that fit, its cells, or a law of before answers."""
    try:
        return Answer.from_dict({"sse": 0.0, "rmse": 0.0, "n": 0} | dict(fields))
    except (ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"{place}: {problem}") from None


def law_fields(path: Path) -> dict[str, Any]:
    """The parsed JSON of a law.json, or of the folder that holds one."""
    if path.is_dir():
        path = path / "law.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a law: it holds a {type(fields).__name__}")
    if (schema := fields.get("schema", 1)) not in range(1, SCHEMA + 1):
        raise ValueError(
            f"{path} has schema {schema!r:.40}, and 1 to {SCHEMA} are read: fit it again, or use "
            "the version of vlm_jax that wrote it"
        )
    return fields


def law_of(fields: Mapping[str, Any], place: str) -> Law:
    """The law in parsed JSON; without residuals and draws it has no interval."""
    try:
        return Law.from_dict({"sse": 0.0, "rmse": 0.0, "n": 0} | dict(fields))
    except (ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"{place}: {problem}") from None
