# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and chat template of a converted model, here and in transformers' form."""

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

# Conversations for comparing two ways of tokenizing them.
TURNS = (("What is shown?", "A red cat, small."), ("is it old?\n(yes or no)", "no"))
TEXTS = ("", "a", " b  c\n", "\n\nWhat?", "é 日本", "USER: no. </s><s> x")
ENDS = ("bos", "eos", "pad")


def find_tokenizer(model: Model, *, published: Path | None, tokenizer: Path | None) -> None:
    """Finds and checks the tokenizer of a model that is converted, and names its template.

    Args:
      model: is changed in place.
      published: the folder of the weights, if it is one of transformers.
      tokenizer: a folder to use in place of its own tokenizer.
    Raises:
      ValueError: for a given folder without a tokenizer, damaged files, ids for which the model has
        no embedding, and a chat template that cannot be used.
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
    loaded, facts = load_tokenizer(model.tokenizer), model.facts
    check_vocabulary(loaded, model.llm["vocab"], image=facts.get("image_token"))
    fields = {} if published is None else read_json(published / "config.json")
    if fields.get("model_type") == folder.MODEL_TYPE:
        fields = {}  # a model folder records its own template
    if fields and tokenizer is not None:
        facts["template"] = sources.template(tokenizer, architectures.read(published))
        facts["image_token"] = loaded.get_vocab().get(IMAGE_MARK)
    if facts.get("template") == "checkpoint":
        mark, text = mark_of(loaded, facts.get("image_token")), loaded.chat_template
        if fields and isinstance(text, str) and (name := jinja.template_name(text, mark=mark)):
            facts["template"] = name
        else:
            TEMPLATES["checkpoint"].of(loaded, mark)


def export(model: Model, fresh: Path, *, add_image_token: bool) -> tuple[int, str] | None:
    """Writes tokenizer and chat template of a model into a folder of transformers.

    Returns: the number and the name of the image token; None for a model without a tokenizer.

    Raises:
      ValueError: if the tokenizer has no image token and none may be added.
    """
    if model.tokenizer is None:
        return None
    folder.copy_tokenizer(model.tokenizer, fresh)
    if not folder.has_tokenizer(model.tokenizer):
        return None
    # The class that reads a tokenizer depends on the model next to it.
    (fresh / "config.json").write_text(json.dumps(dict(model_type="llava")))
    tokenizer = load_tokenizer(model.tokenizer)
    name = mark_of(tokenizer, model.facts.get("image_token"))
    image_id = tokenizer.get_vocab().get(name)
    if image_id is None:
        if not add_image_token:
            raise ValueError(
                f"the tokenizer has no image token {name}, which a llava-hf folder needs: repeat "
                "with --add-image-token to give it one"
            )
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [name]}, replace_extra_special_tokens=False
        )
    if image_id is None or not _alike(tokenizer, load_tokenizer(fresh)):
        tokenizer.save_pretrained(fresh)
    hf_tokenizer = load_tokenizer(fresh)
    try:
        own_processor = processors.processor_of(model)
    except ValueError as error:
        model.notes["chat_template"] = f"no chat template was written: {error}"
        return hf_tokenizer.get_vocab()[name], name
    if model.facts.get("ends", dict(trained=True)).get("trained"):
        _name_ends(model, fresh, hf_tokenizer, own_processor)
    if (text := _chat_template(model, own_processor, hf_tokenizer, name)) is not None:
        _write_chat_template(fresh, text)
    return hf_tokenizer.get_vocab()[name], name


def _name_ends(model: Model, fresh: Path, hf_tokenizer: Any, own_processor: Any) -> None:
    """Writes the special tokens of a model trained here, and the tokens that end its answers."""
    ends_fact = model.facts.get("ends", {})
    fields = ends_fact.get("text") or {
        f"{kind}_token_id": getattr(hf_tokenizer, f"{kind}_token_id") for kind in ENDS
    }
    stop = list(own_processor.stop_ids)
    model.facts["ends"] = dict(outer=ends_fact.get("outer", {}), text=fields, stop=stop)
    path = fresh / ends.GENERATION
    generation = read_json(path) if path.is_file() else dict(fields)
    path.write_text(json.dumps(generation | dict(eos_token_id=stop or None), indent=1) + "\n")


def _alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids."""
    first, second = Encoder(one), Encoder(other)
    return (first.before, first.behind) == (second.before, second.behind) and (
        one.get_vocab() == other.get_vocab()
        and all(first(text).ids == second(text).ids for text in TEXTS)
    )


def _chat_template(model: Model, own_processor: Any, hf_tokenizer: Any, mark: str) -> str | None:
    """The chat template that gives the ids the model was trained on, or the most of them.

    None if the tokenizer has several templates, which then stay.
    """
    name = model.facts.get("template", "vicuna_v1")
    if name == "checkpoint":
        return hf_tokenizer.chat_template if isinstance(hf_tokenizer.chat_template, str) else None
    best, most, equal = None, -1, []
    for form in jinja.FORMS:
        if form.begins and hf_tokenizer.bos_token is None:
            continue
        hf_tokenizer.chat_template = jinja.chat_template(TEMPLATES[name], form, mark=mark)
        equal = list(_compared(own_processor, hf_tokenizer, mark))
        if sum(equal) > most:
            best, most = hf_tokenizer.chat_template, sum(equal)
        if all(equal):
            break
    if most < len(equal):
        why = "" if own_processor.template.joined else ", which tokenizes each part by itself"
        model.notes["chat_template"] = (
            f"transformers tokenizes {len(equal) - most} of {len(equal)} conversations that were "
            f"tried in another way than this model was trained (template {name}{why}): prepare "
            "those here"
        )
    return best


def _compared(own_processor: Any, hf_tokenizer: Any, mark: str) -> Iterator[bool]:
    """Whether transformers gives the same ids for prompts and rows, with and without an image.

    Its tokenizers add no token before a chat; its processors add one if the chat does not begin
    with it. Both cases have to be right.
    """
    image = hf_tokenizer.get_vocab()[mark]
    for count in (1, 2):
        for with_image in (True, False):
            for answer in (False, True):
                turns = TURNS[:count]
                example = Example("", 0 if with_image else None, turns, "", "")
                try:
                    row = own_processor.tokens(example, answer=answer)
                except ValueError:  # a tokenizer that does not know these words
                    continue
                ids = list(row.ids)
                for place in reversed(row.places):
                    ids.insert(place, image)
                messages = []
                for k, (question, reply) in enumerate(turns):
                    parts = [{"type": "image"}] * (with_image and k == 0)
                    content = [*parts, {"type": "text", "text": question}]
                    messages.append({"role": "user", "content": content})
                    messages.append({"role": "assistant", "content": reply})
                messages = messages if answer else messages[:-1]
                text = hf_tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=not answer
                )
                bare = hf_tokenizer(text, add_special_tokens=False).input_ids
                has_bos = hf_tokenizer.bos_token is not None and text.startswith(
                    hf_tokenizer.bos_token
                )
                yield bare == ids
                yield hf_tokenizer(text, add_special_tokens=not has_bos).input_ids == ids


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
