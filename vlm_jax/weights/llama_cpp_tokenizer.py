# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and chat template that a GGUF file describes, in the files that transformers reads.

transformers makes the tokenizer (`integrations/gguf`); what its maker passes over is done here as
llama.cpp does it (`src/llama-vocab.cpp`), or refused by name: `--tokenizer=DIR` is the way out.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import gguf_tokenizer_mapping as maker

from vlm_jax.weights import ends, llama_cpp
from vlm_jax.weights.classes import allow, within
from vlm_jax.weights.values import text, value_text

START = "tokenizer.ggml."
LONGEST_TOKEN = 1024  # characters; making merges of a token takes the square of its length
# As transformers' maker has it -> as the file has it.
MADE_OF = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
}
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp ends an answer at each
# What changes no id: other tokens that are named, for other uses.
UNREAD = (
    "eot_token_id", "eom_token_id", "seperator_token_id", "mask_token_id", "cls_token_id",
    "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id",
    "fim_rep_token_id", "fim_sep_token_id", "prefix_token_id", "suffix_token_id",
    "middle_token_id", "token_type_count",
)  # fmt: skip
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "add_sep_token",
         "remove_extra_whitespaces")  # fmt: skip
# Values of `pre` that split as GPT-2 does; the second line takes digits apart first.
AS_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt", "trillion", "gigachat", "mellum")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Those that begin a text with a token unless told otherwise, and take a known word whole.
AS_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
             "lfm2", "tekken")  # fmt: skip


def write(metadata: dict[str, Any], folder: Path) -> None:
    """Writes tokenizer, chat template and stop tokens of a file into a folder.

    Raises:
      ValueError: where the metadata describes no tokenizer, or one that is not supported.
    """
    about = {k.removeprefix(START): v for k, v in metadata.items() if k.startswith(START)}
    try:
        with within("its tokenizer"):
            check(about)
            tokenizer = made(about, metadata)
    except ValueError as error:
        raise ValueError(f"{error}; or give --tokenizer=DIR, that of the original model") from None
    tokenizer.save_pretrained(folder)
    stops = [llama_cpp.token(metadata, START + name) for name in STOPS]
    fields = dict(
        eos_token_id=[k for k in dict.fromkeys(stops) if k is not None],
        **{k: v for k, v in llama_cpp.special(metadata).items() if k != "eos_token_id"},
    )
    (folder / ends.GENERATION).write_text(json.dumps(fields, indent=1))


def check(about: dict[str, Any]) -> None:
    """Raises ValueError for what this file does not read."""
    ids = [f"{name}_token_id" for name in NAMED.values()]
    known = {*MADE_OF.values(), *ids, *UNREAD, *FLAGS}
    if unknown := sorted(about.keys() - known):
        raise ValueError(
            f"{unknown[0]}={value_text(about[unknown[0]])} is not supported: it may change the ids "
            f"of a text; known are {', '.join(sorted(known))}"
        )
    allow("model", kind := about.get("model"), ("gpt2", "llama"))
    for name in FLAGS:
        allow(name, about.get(name, False), (True, False))
    allow("add_space_prefix", about.get("add_space_prefix", kind == "llama"), (kind == "llama",))
    for name in ("add_sep_token", "remove_extra_whitespaces"):
        allow(name, about.get(name, False), (False,))
    if kind == "gpt2":
        known_splits = (*AS_GPT2, *DIGITS_APART, *maker.GGUF_PRE_TOKENIZER_SPLITS)
        allow("pre", about.get("pre"), known_splits)
    for name, of, needed in (
        ("tokens", str, True), ("merges", str, kind == "gpt2"), ("token_type", int, False),
        ("scores", float, kind == "llama" and "merges" not in about),
    ):  # fmt: skip
        value = about.get(name)
        if (value is None and needed) or (
            value is not None
            and not (isinstance(value, list) and all(type(part) is of for part in value))
        ):
            raise ValueError(f"{name}={value_text(value)}: a list of {of.__name__} is needed")
    tokens = about["tokens"]
    for name in ("token_type", "scores"):
        if name in about and len(about[name]) != len(tokens):
            raise ValueError(f"it has {len(tokens)} tokens and {len(about[name])} {name}")
    if len(set(tokens)) != len(tokens) or not tokens:
        raise ValueError(f"of its {len(tokens)} tokens {len(set(tokens))} are different")
    if (longest := max(map(len, tokens))) > LONGEST_TOKEN:
        raise ValueError(f"a token has {longest} characters: at most {LONGEST_TOKEN} are supported")


def made(about: dict[str, Any], metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of checked metadata, with its chat template."""
    kind, pre, tokens = about["model"], about.get("pre"), about["tokens"]
    fields = {field: about[name] for field, name in MADE_OF.items() if name in about}
    try:
        backend, _ = maker.convert_gguf_tokenizer(metadata["general.architecture"], fields)
    # The Rust library raises plain exceptions.
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"transformers cannot make it ({said[:200]})") from None
    begins = kind == "llama"
    if kind == "gpt2" and pre in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    if kind == "gpt2" and pre in AS_LLAMA3:
        backend.model.ignore_merges = begins = True
    named = {}
    for field, name in NAMED.items():
        number = llama_cpp.token(metadata, f"{START}{name}_token_id")
        if number is not None and number >= len(tokens):
            raise ValueError(f"{name}_token_id={number}, and it has {len(tokens)} tokens")
        named[f"{field}_token"] = None if number is None else tokens[number]
    flags = dict(
        add_bos_token=about.get("add_bos_token", begins) and named["bos_token"] is not None,
        add_eos_token=about.get("add_eos_token", False) and named["eos_token"] is not None,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named, **flags)
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        tokenizer.chat_template = text("tokenizer.chat_template", template)
    return tokenizer
