# SPDX-License-Identifier: Apache-2.0
"""Writes the templates of this package as chat templates of transformers, and recognizes them."""

import string
from collections.abc import Iterator
from dataclasses import dataclass

from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.data.templates import TEMPLATES, OwnTemplate, Template

# A question in `ns`: the number of images at the template's place (`shown`) and its text. One image
# moves to the template's place, several stay where they are between the words.
QUESTION = """\
{%- set ns = namespace(shown=0, said='', words=false, inside=false) -%}
{%- if message['content'] is string -%}
{%- set ns.said = message['content'] -%}
{%- set ns.inside = true -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set ns.said = ns.said ~ MARK -%}
{%- set ns.inside = ns.inside or ns.words -%}
{%- elif part['type'] == 'text' -%}
{%- set ns.said = ns.said ~ part['text'] -%}
{%- set ns.words = true -%}
{%- else -%}
{{- raise_exception('this model reads text and images, not ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set images = ns.said.split(MARK) | length - 1 -%}
{%- if images and not ns.inside -%}
{%- set ns.shown = images -%}
{%- set ns.said = ns.said.replace(MARK, '') -%}
{%- elif images == 1 -%}
{%- set ns.shown = 1 -%}
{%- set ns.said = ns.said.replace(MARK, '') | trim -%}
{%- endif -%}
"""
ANSWER = """\
{%- set ns = namespace(said='') -%}
{%- if message['content'] is string -%}
{%- set ns.said = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set ns.said = ns.said ~ part['text'] -%}
{%- endfor -%}
{%- endif -%}
"""


# Writes a text with a space before each piece after an image, or at the beginning.
SAY = """\
{%- macro say(state, text) -%}
{%- for piece in text.split(MARK) -%}
{%- if not loop.first -%}
{{- MARK -}}
{%- set state.fresh = true -%}
{%- endif -%}
{%- if piece -%}
{{- ' ' if state.fresh and piece[0] != ' ' else '' -}}
{{- piece -}}
{%- set state.fresh = false -%}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
"""


@dataclass(frozen=True)
class Form:
    """How a template is written for one kind of tokenizer; the model reads the same text.

    Attributes:
      begins: whether the template writes the first token, instead of the tokenizer.
      spaced: whether the template writes a space before each piece of text between images. A
        tokenizer that adds a space before a text, but not after a special token, needs this for
        models whose texts between images were tokenized separately.
    """

    begins: bool = False
    spaced: bool = False


FORMS = (Form(True), Form(), Form(True, True), Form(False, True))


def chat_template(template: Template, form: Form, *, mark: str = IMAGE_MARK) -> str:
    """`template` as a chat template in the form `form`, with `mark` for an image.

    It refuses system texts and roles that do not alternate, for which the model was not trained.
    """
    images = _quoted(template.image.replace(IMAGE_MARK, mark)) + " * ns.shown"
    question = []
    for literal, name, _, _ in string.Formatter().parse(template.user):
        question += [_quoted(literal)] if literal else []
        question += {"image": [f"({images})"], "question": ["ns.said"]}.get(name, [])
    before, _, behind = template.answer.partition("{answer}")
    close = _quoted(template.end) if template.end else "eos_token" * template.eos
    answer = [_quoted(before) * bool(before), "ns.said", _quoted(behind) * bool(behind)]

    def say(*parts: str) -> str:
        text = " ~ ".join(part for part in parts if part)
        return f"{{{{- say(state, {text}) -}}}}" if form.spaced else f"{{{{- {text} -}}}}"

    lines = ["{{- bos_token -}}"] * form.begins
    if form.spaced:
        # Where nothing is written in front, the tokenizer puts the first space there itself.
        lines.append(SAY.replace("MARK", _quoted(mark)).rstrip("\n"))
        lines.append(f"{{%- set state = namespace(fresh={str(form.begins).lower()}) -%}}")
    if template.start:
        lines.append(say(_quoted(template.start)))
    lines += [
        "{%- for message in messages -%}",
        "{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}",
        "{{- raise_exception('this model was trained on user and assistant in turn, user first, "
        "and on no other system text') -}}",
        "{%- endif -%}",
        "{%- if message['role'] == 'user' -%}",
        QUESTION.replace("MARK", _quoted(mark)).rstrip("\n"),
    ]
    if "{question}" not in template.user:  # which is dropped, and its images are not
        lines.append("{%- set ns.shown = images -%}")
    lines += [say(*question), "{%- else -%}", ANSWER.rstrip("\n"), say(*answer)]
    lines += [
        f"{{{{- {text} -}}}}" for text in (close, _quoted(template.gap)) if text not in ("", "''")
    ]
    return "\n".join([*lines, "{%- endif -%}", "{%- endfor -%}"])


def template_name(text: str, *, mark: str = IMAGE_MARK) -> str | None:
    """The name of the template that `chat_template` wrote as this text; None for other texts."""
    for name, template in builtin():
        if any(text.strip() == chat_template(template, form, mark=mark) for form in FORMS):
            return name
    return None


def builtin() -> Iterator[tuple[str, Template]]:
    """The templates of this package, with their names."""
    for name, template in TEMPLATES.items():
        if not isinstance(template, OwnTemplate):
            yield name, template


def _quoted(text: str) -> str:
    """A text as a jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
