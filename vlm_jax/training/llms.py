# SPDX-License-Identifier: Apache-2.0
"""The LLMs of a grid: their sizes, what they start from, and how their training differs.

An entry of config.grid.llms holds the fields of `llm` that differ. Beside them it may have
`start_from`, a folder whose LLM and tokenizer its cells start from (the encoder is the grid's), and
dicts with fields of `data`, `lora`, `align` and `finetune` (OWN), which hold for its cells alone.
"""

from collections.abc import Collection

from ml_collections import ConfigDict

# What an entry may set besides fields of llm, by section; () is every field.
OWN: dict[str, tuple[str, ...]] = {
    "data": ("tokenizer", "template", "text_length", "question_length", "buckets"),
    "lora": (),
    "align": (),
    "finetune": (),
}
TRAINING = {"start_from", "lora", "align", "finetune"}


def check(config: ConfigDict, name: str) -> None:
    """Raises ValueError for what the LLM `name` of a grid cannot set."""
    for field, value in config.grid.llms[name].to_dict().items():
        named = f"grid.llms.{name}.{field}"
        if isinstance(value, dict):
            allowed = OWN.get(field)
            if allowed is None:
                raise ValueError(
                    f"{named}: an LLM of a grid sets fields of llm, start_from, and fields of "
                    f"{', '.join(OWN)} in dicts; the rest is shared by all cells"
                )
            allowed = allowed or tuple(config[field])
            if unknown := sorted(value.keys() - set(allowed)):
                raise ValueError(f"{named}.{unknown[0]}: choose of {', '.join(sorted(allowed))}")
        elif field != "start_from" and field not in config.llm:
            raise ValueError(
                f"{named}: no such field; an LLM of a grid sets {', '.join(sorted(config.llm))}, "
                f"start_from, and fields of {', '.join(OWN)} in dicts"
            )


def applied(config: ConfigDict, name: str) -> ConfigDict:
    """The configuration of the cells with this LLM: without `grid`, and with what it sets.

    ValueError for what it cannot set.
    """
    check(config, name)
    c = config.copy_and_resolve_references()
    with c.unlocked():
        del c.grid
    for field, value in config.grid.llms[name].to_dict().items():
        if isinstance(value, dict):
            c[field].update(value)
        elif field == "start_from":
            c.start_from = value
        else:
            c.llm[field] = value
    return c


def weights(entry: Collection[str], config: ConfigDict) -> str:
    """How the LLM of an entry comes by its weights, where the entry says so, else "".

    Rows with other words are of another training and are not mixed: "pretrained, frozen" (align
    alone), "pretrained, LoRA", "pretrained" (finetuned as a whole), "LoRA" or "frozen".

    Args:
      entry: the fields that it sets. config: that of its cells.
    """
    if not TRAINING & set(entry):
        return ""
    words = ["pretrained"] if config.start_from else []
    if not config.finetune.steps:
        words.append("frozen")
    elif config.lora.rank:
        words.append("LoRA")
    return ", ".join(words)
