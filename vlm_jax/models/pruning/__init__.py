# SPDX-License-Identifier: Apache-2.0
"""The table of prunings: ways of leaving visual tokens out between the layers of the LLM, or, of
clips, before it.

Descriptions need no JAX; what they do to a row is in `cuts.py` and `../dropped.py`, the pass in
`../pruned.py`.
"""

from typing import Any

from vlm_jax.models.pruning.description import NONE, Pruning, Read
from vlm_jax.models.pruning.description import Run as Run
from vlm_jax.models.pruning.evs import EVS
from vlm_jax.models.pruning.fastv import FastV
from vlm_jax.models.pruning.pyramiddrop import PyramidDrop
from vlm_jax.models.pruning.tokencarve import TokenCarve

PRUNINGS: dict[str, type[Pruning]] = {
    pruning.kind: pruning for pruning in (EVS, FastV, PyramidDrop, TokenCarve)
}


def describe(section: Any, read: Read) -> Pruning | None:
    """The pruning that a `pruning` section describes for a model that reads `read`; None for none.

    ValueError for an unknown kind, a field that its kind does not read, and what cannot be pruned.
    """
    kind = section["kind"]
    fields = {name: section[name] for name in NONE if name != "kind"}
    if not prunes(section):
        if ignored := [name for name, value in fields.items() if tuple_of(value) != NONE[name]]:
            raise ValueError(
                f"pruning.{ignored[0]}={fields[ignored[0]]}, but pruning.kind='none' prunes "
                f"nothing: choose one of {sorted(PRUNINGS)}, or set pruning.{ignored[0]}="
                f"{NONE[ignored[0]]}"
            )
        return None
    if kind not in PRUNINGS:
        raise ValueError(f"pruning.kind={kind!r}: choose one of {['none', *sorted(PRUNINGS)]}")
    return PRUNINGS[kind].of({name: tuple_of(value) for name, value in fields.items()}, read)


def prunes(section: Any) -> bool:
    """Whether a `pruning` section leaves anything out."""
    return section["kind"] != NONE["kind"]


def tuple_of(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(value) if isinstance(value, list) else value


def parse(text: str) -> dict[str, Any]:
    """The section that a flag writes as "fastv:tokens=64", "tokencarve:tokens=64:weight=0.7" or
    "evs:dropped=0.7".

    ValueError for anything else, and for a field that there is not.
    """
    kind, *parts = text.split(":")
    section = NONE | dict(kind=kind)
    for part in parts:
        name, _, value = part.partition("=")
        try:
            if name in ("weight", "dropped"):
                section[name] = float(value)
            elif name in ("layers", "tokens"):
                section[name] = tuple(int(number) for number in value.split(","))
            else:
                raise ValueError(name)
        except ValueError:
            raise ValueError(
                f"--pruning={text}: {part!r} is none of layers=N,N, tokens=N,N, weight=W and "
                "dropped=Q, as in fastv:layers=2:tokens=64"
            ) from None
    return section
