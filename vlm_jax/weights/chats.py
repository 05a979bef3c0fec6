# SPDX-License-Identifier: Apache-2.0
"""How a converted model reads and writes conversations: its tokenizer, its template, and both as
transformers has them.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_jax.data import jinja
from vlm_jax.data.example import IMAGE_MARK, Example
from vlm_jax.data.templates import TEMPLATES
from vlm_jax.data.tokenizer import Encoder, check_vocabulary, load_tokenizer, mark_of
from vlm_jax.weights import architectures, ends, folder, processors, sources
from vlm_jax.weights.files import read_json
from vlm_jax.weights.folder import Model

# Conversations by which two ways of writing them are compared.
TURNS = (("What is shown?", "A red cat, small."), ("is it old?\n(yes or no)", "no"))
TEXTS = ("", "a", " b  c\n", "\n\nWhat?", "é 日本", "USER: no. </s><s> x")
ENDS = ("bos", "eos", "pad")


def settle(model: Model, *, published: Path | None, tokenizer: Path | None) -> None:
    """Finds the tokenizer of a model that is converted, checks it, and names its template.

    published: the folder that the weights came from, where it is one of transformers.
    tokenizer: the folder that was given in place of its own.

    Raises:
      ValueError: for a folder without a tokenizer where one was given, files that are damaged,
        ids for which the model has no embedding, and a chat template that cannot be used.
    """
    if tokenizer is not None:
        if not folder.has_tokenizer(tokenizer):
            raise ValueError(
                f"--tokenizer={tokenizer} holds no tokenizer ({', '.join(folder.WORDS)}): give the "
                "folder of one"
            )
        model.tokenizer = tokenizer
    if model.tokenizer is None or not folder.has_tokenizer(model.tokenizer):
        return
    words, facts = load_tokenizer(model.tokenizer), model.facts
    check_vocabulary(words, model.llm["vocab"], image=facts.get("image_token"))
    fields = {} if published is None else read_json(published / "config.json")
    if fields.get("model_type") == folder.MODEL_TYPE:
        fields = {}  # a model folder says itself what it was trained on
    if fields and tokenizer is not None:
        facts["template"] = sources.template(tokenizer, architectures.read(published))
        facts["image_token"] = words.get_vocab().get(IMAGE_MARK)
    if facts.get("template") == "checkpoint":
        mark, text = mark_of(words, facts.get("image_token")), words.chat_template
        if fields and isinstance(text, str) and (name := jinja.named(text, mark=mark)):
            facts["template"] = name
        else:
            TEMPLATES["checkpoint"].of(words, mark)


def export(model: Model, fresh: Path, *, add_image_token: bool) -> tuple[int, str] | None:
    """Puts tokenizer and chat template of a model into a folder of transformers.

    Returns: the token of an image, its number and its name; None for a model without a tokenizer.

    Raises:
      ValueError: where the tokenizer has no token for images and may be given none.
    """
    if model.tokenizer is None:
        return None
    folder.copy_tokenizer(model.tokenizer, fresh)
    if not folder.has_tokenizer(model.tokenizer):
        return None
    # Which class reads a tokenizer depends on what the model beside it is.
    (fresh / "config.json").write_text(json.dumps(dict(model_type="llava")))
    words = load_tokenizer(model.tokenizer)
    name = mark_of(words, model.facts.get("image_token"))
    had = words.get_vocab().get(name)
    if had is None:
        if not add_image_token:
            raise ValueError(
                f"the tokenizer has no image token {name}, which a llava-hf folder needs: repeat "
                "with --add-image-token to give it one"
            )
        words.add_special_tokens(
            {"extra_special_tokens": [name]}, replace_extra_special_tokens=False
        )
    if had is None or not _alike(words, load_tokenizer(fresh)):
        words.save_pretrained(fresh)
    theirs = load_tokenizer(fresh)
    try:
        ours = processors.processor_of(model)
    except ValueError as error:
        model.notes["chat_template"] = f"no chat template was written: {error}"
        return theirs.get_vocab()[name], name
    if model.facts.get("ends", dict(trained=True)).get("trained"):
        _name_ends(model, fresh, theirs, ours)
    if (text := _chat_template(model, ours, theirs, name)) is not None:
        _write_chat_template(fresh, text)
    return theirs.get_vocab()[name], name


def _name_ends(model: Model, fresh: Path, theirs: Any, ours: Any) -> None:
    """Names the tokens of a model that was trained here, and where its answers end."""
    known = model.facts.get("ends", {})
    fields = known.get("text") or {
        f"{kind}_token_id": getattr(theirs, f"{kind}_token_id") for kind in ENDS
    }
    stop = list(ours.stop_ids)
    model.facts["ends"] = dict(outer=known.get("outer", {}), text=fields, stop=stop)
    path = fresh / ends.GENERATION
    found = read_json(path) if path.is_file() else dict(fields)
    path.write_text(json.dumps(found | dict(eos_token_id=stop or None), indent=1) + "\n")


def _alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids."""
    first, second = Encoder(one), Encoder(other)
    return (first.before, first.behind) == (second.before, second.behind) and (
        one.get_vocab() == other.get_vocab()
        and all(first(text).ids == second(text).ids for text in TEXTS)
    )


def _chat_template(model: Model, ours: Any, theirs: Any, mark: str) -> str | None:
    """The chat template that writes what a model was trained on, in the form whose ids are its own;
    None where the tokenizer's several are to stay."""
    name = model.facts.get("template", "vicuna_v1")
    if name == "checkpoint":
        return theirs.chat_template if isinstance(theirs.chat_template, str) else None
    best, most, same = None, -1, []
    for form in jinja.FORMS:
        if form.begins and theirs.bos_token is None:
            continue
        theirs.chat_template = jinja.written(TEMPLATES[name], form, mark=mark)
        same = list(_compared(ours, theirs, mark))
        if sum(same) > most:
            best, most = theirs.chat_template, sum(same)
        if all(same):
            break
    if most < len(same):
        why = "" if ours.template.joined else ", which tokenizes each part by itself"
        model.notes["chat_template"] = (
            f"transformers tokenizes {len(same) - most} of {len(same)} conversations that were "
            f"tried in another way than this model was trained (template {name}{why}): prepare "
            "those here"
        )
    return best


def _compared(ours: Any, theirs: Any, mark: str) -> Iterator[bool]:
    """Whether transformers gives our ids to prompts and rows, with and without an image.

    Its tokenizers put nothing in front of a chat, its processors do where the chat does not begin
    so: both have to be right.
    """
    image = theirs.get_vocab()[mark]
    for count in (1, 2):
        for shown in (True, False):
            for answer in (False, True):
                turns = TURNS[:count]
                example = Example("", 0 if shown else None, turns, "", "")
                try:
                    row = ours.tokens(example, answer=answer)
                except ValueError:  # a tokenizer that does not know these words
                    continue
                ids = list(row.ids)
                for place in reversed(row.places):
                    ids.insert(place, image)
                messages = []
                for k, (question, reply) in enumerate(turns):
                    parts = [{"type": "image"}] * (shown and k == 0)
                    asked = [*parts, {"type": "text", "text": question}]
                    messages.append({"role": "user", "content": asked})
                    messages.append({"role": "assistant", "content": reply})
                messages = messages if answer else messages[:-1]
                text = theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=not answer
                )
                bare = theirs(text, add_special_tokens=False).input_ids
                begun = theirs.bos_token is not None and text.startswith(theirs.bos_token)
                yield bare == ids
                yield theirs(text, add_special_tokens=not begun).input_ids == ids


def _write_chat_template(fresh: Path, text: str) -> None:
    """Makes `text` the one chat template of a folder."""
    (fresh / "chat_template.jinja").write_text(text, encoding="utf-8")
    (fresh / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(fresh / "additional_chat_templates", ignore_errors=True)
    path = fresh / "tokenizer_config.json"
    if path.is_file():
        fields = read_json(path)
        if fields.pop("chat_template", None) is not None:
            path.write_text(json.dumps(fields, indent=1, ensure_ascii=False), encoding="utf-8")
