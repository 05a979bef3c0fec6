# SPDX-License-Identifier: Apache-2.0
"""How the turns of a conversation become the text of a row, with the places of its images.

A row is a list of parts, each with whether it is supervised: the answers, and what closes them.
"""

from dataclasses import dataclass, replace
from typing import Any

from vlm_jax.data.chat import Chat, Turn
from vlm_jax.data.example import IMAGE_MARK, Example

Part = tuple[str, bool]


@dataclass(frozen=True)
class Template:
    """How turns become text.

    Attributes:
      start: opens the row.
      user, answer: one turn, with {image}, {question} and {answer}; only `answer` is supervised.
      eos: whether the end-of-sequence token closes each answer.
      image: the text of {image} for each image without a mark in the question, with IMAGE_MARK.
      joined: tokenize all text between images as one string, as published models were trained,
        instead of each part separately.
      end: closes each answer in place of the end-of-sequence token.
      gap: follows the end, unsupervised.
      system: the part of `start` that the instructions of a system message replace; "" if the
        template has no place for any.
    """

    start: str
    user: str
    answer: str
    eos: bool
    image: str
    joined: bool
    end: str = ""
    gap: str = ""
    system: str = ""

    def saying(self, system: str) -> "Template":
        """This template with the text of a system message.

        Raises:
          ValueError: if it has no place for one.
        """
        if not self.system:
            raise ValueError(
                "this model's template has no place for a system message: put the instructions "
                "into the first question"
            )
        return replace(self, start=self.start.replace(self.system, system), system=system)

    def of(self, tokenizer: Any, mark: str = IMAGE_MARK) -> "Template":
        """This template for rows of one tokenizer, whose texts have `mark` for an image."""
        return self

    def closing(self, tokenizer: Any) -> str:
        """The text of the token that ends an answer; "" if there is none."""
        return self.end or (tokenizer.eos_token if self.eos else "")

    def begins_itself(self, tokenizer: Any, parts: list[Part]) -> bool:
        """Whether the tokenizer's leading tokens must not be added to a row."""
        return False

    def parts(self, example: Example, tokenizer: Any, *, answer: bool) -> list[Part]:
        """The whole row; without `answer` up to where the last answer starts."""
        parts, last = [(self.start, False)], len(example.turns) - 1
        for k, (images, question) in enumerate(example.questions()):
            if example.images and "{question}" not in self.user:
                # The question is dropped, and its images are not.
                images += question.count(IMAGE_MARK)
            text = self.user.format(image=self.image * images, question=question)
            parts.append((text, False))
            if answer or k < last:
                parts.append((self.answer.format(answer=example.turns[k][1]), True))
                parts.append((self.closing(tokenizer), True))
                parts.append((self.gap, False))
        return [part for part in parts if part[0]]


@dataclass(frozen=True)
class OwnTemplate(Template):
    """The tokenizer's own chat template (jinja), rendered by transformers.

    chat: that of the tokenizer; None in the table.
    """

    chat: Chat | None = None

    def of(self, tokenizer: Any, mark: str = IMAGE_MARK) -> "OwnTemplate":
        """With the chat template of `tokenizer`. Raises ValueError for none or an invalid one."""
        if not tokenizer.chat_template:
            choices = ", ".join(name for name in TEMPLATES if name != "checkpoint")
            raise ValueError(
                "data.template='checkpoint' is the tokenizer's own chat template, and this "
                f"tokenizer has none: choose one of {choices}"
            )
        return replace(self, chat=Chat(tokenizer, mark))

    def saying(self, system: str) -> "OwnTemplate":
        """With a system message in every conversation; `parts` raises if it is not written."""
        return replace(self, system=system)

    def closing(self, tokenizer: Any) -> str:
        """The text that the chat template writes after an answer, without spaces."""
        return self.chat.closing

    def parts(self, example: Example, tokenizer: Any, *, answer: bool) -> list[Part]:
        """The rendered row; its answers and their closing text are supervised."""
        turns = turns_of(example)
        if not answer:
            return [(self.chat.prompt(turns, self.system), False)]
        text, spans = self.chat.row(turns)
        parts, at = [], 0
        for start, end in spans:
            parts += [(text[at:start], False), (text[start:end], True)]
            at = end
        return [part for part in (*parts, (text[at:], False)) if part[0]]

    def begins_itself(self, tokenizer: Any, parts: list[Part]) -> bool:
        """As in transformers: a first token that the template writes is tokenized with the rest."""
        return bool(tokenizer.bos_token) and parts[0][0].startswith(tokenizer.bos_token)


def turns_of(example: Example) -> list[Turn]:
    """The turns of an example, with questions split at the images inside them."""
    cut = bool(example.images)
    return [
        Turn(shown, tuple(text.split(IMAGE_MARK) if cut else [text]), reply)
        for (shown, text), (_, reply) in zip(example.questions(), example.turns, strict=True)
    ]


# vicuna_v1 and plain: llava/conversation.py and llava/train/train.py in haotian-liu/LLaVA.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
QWEN = "You are a helpful assistant."
TEMPLATES = {
    "vicuna_v1": Template(
        start=f"{VICUNA} ",
        user="USER: {image}{question} ASSISTANT:",
        answer=" {answer}",
        eos=True,
        image="<image>\n",
        joined=True,
        system=VICUNA,
    ),
    "plain": Template("", "{image}", "{answer}\n", eos=False, image="<image>", joined=True),
    # Qwen's own: the system text of the Qwen1.5 chat models, and a line break after each turn.
    "chatml": Template(
        start=f"<|im_start|>system\n{QWEN}<|im_end|>\n",
        user="<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n",
        answer="{answer}",
        eos=False,
        image="<image>\n",
        joined=True,
        end="<|im_end|>",
        gap="\n",
        system=QWEN,
    ),
    "checkpoint": OwnTemplate(
        "", "{image}{question}", "{answer}", eos=False, image="<image>", joined=True
    ),
    "bare": Template("", "{image}{question}", "{answer}", eos=True, image="<image>", joined=False),
    # The visual tokens are read in the light of the question, at a fixed distance from the answer.
    "question_first": Template(
        "", "{question}{image}", "{answer}", eos=True, image="<image>", joined=False
    ),
    # The same order in Vicuna's words; no published model was trained so.
    "vicuna_question_first": Template(
        start=f"{VICUNA} ",
        user="USER: {question}{image} ASSISTANT:",
        answer=" {answer}",
        eos=True,
        image="\n<image>",
        joined=True,
        system=VICUNA,
    ),
}


def named(name: str) -> Template:
    """The template of this name. ValueError, with the choices, for an unknown one."""
    if name not in TEMPLATES:
        raise ValueError(f"data.template={name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def check_prefix(name: str) -> None:
    """Raises ValueError for a template whose question is not before the image."""
    before, mark, _ = named(name).user.partition("{image}")
    if not mark or "{question}" not in before:
        good = [name for name, t in TEMPLATES.items() if "{question}{image}" in t.user]
        raise ValueError(
            "compressor.query='prefix' reads the question before the image, and "
            f"data.template={name!r} has none there: choose one of "
            f"{', '.join(good)}, or compressor.query='separate'"
        )


def check_image_first(name: str) -> None:
    """Raises ValueError for a template that writes text before the image, which the text behind a
    summary of the image does not see."""
    template = named(name)
    before, mark, _ = template.user.partition("{image}")
    if template.start or before or not mark:
        good = [k for k, t in TEMPLATES.items() if not t.start and t.user.startswith("{image}")]
        raise ValueError(
            f"data.template={name!r} writes text before the image, and text behind a summary "
            f"(compressor.kind='voco') sees nothing that stands before it: choose one of "
            f"{', '.join(good)}"
        )
