# SPDX-License-Identifier: Apache-2.0
"""How the turns of a conversation become the text of a row, and where its image stands.

A row is a list of parts, each with whether it is supervised: the answers, and what closes them.
"""

from dataclasses import dataclass
from typing import Any

from vlm_jax.data.example import IMAGE_MARK, Example

Part = tuple[str, bool]


@dataclass(frozen=True)
class Template:
    """How turns become text.

    start: opens the row. user, answer: one turn, with {image}, {question} and {answer}; only
    `answer` is supervised. eos: whether the end-of-sequence token closes each answer; end: what
    does in its place; gap: what follows that, unsupervised. image: what {image} becomes for each
    image that has no mark in the question, IMAGE_MARK included. joined: tokenise all text between
    images as one string, as published models were trained, instead of each part on its own.
    """

    start: str
    user: str
    answer: str
    eos: bool
    image: str
    joined: bool
    end: str = ""
    gap: str = ""

    def closing(self, tokenizer: Any) -> str:
        """The text of the token that ends an answer; "" where none does."""
        return self.end or (tokenizer.eos_token if self.eos else "")

    def begins_itself(self, tokenizer: Any, parts: list[Part]) -> bool:
        """Whether no begin-of-sequence token is to be put before a row, though there is one."""
        return False

    def parts(self, example: Example, tokenizer: Any, *, answer: bool) -> list[Part]:
        """The whole row; without `answer` up to where the last answer starts."""
        parts, last = [(self.start, False)], len(example.turns) - 1
        for k, (shown, question) in enumerate(example.questions()):
            if example.images and "{question}" not in self.user:
                # The question is dropped, and its images are not.
                shown += question.count(IMAGE_MARK)
            text = self.user.format(image=self.image * shown, question=question)
            parts.append((text, False))
            if answer or k < last:
                parts.append((self.answer.format(answer=example.turns[k][1]), True))
                parts.append((self.closing(tokenizer), True))
                parts.append((self.gap, False))
        return [part for part in parts if part[0]]


@dataclass(frozen=True)
class OwnTemplate(Template):
    """The tokenizer's own chat template (jinja), rendered by transformers."""

    def closing(self, tokenizer: Any) -> str:
        """Its end of sequence; what the chat template writes behind an answer is supervised too."""
        return tokenizer.eos_token or ""

    def parts(self, example: Example, tokenizer: Any, *, answer: bool) -> list[Part]:
        """The rendered row, cut where the rendering of a shorter conversation ends."""
        if not tokenizer.chat_template:
            known = ", ".join(name for name in TEMPLATES if name != "checkpoint")
            raise ValueError(
                "data.template='checkpoint' is the tokenizer's own chat template, and this "
                f"tokenizer has none: choose one of {known}"
            )
        turns, last, parts, seen = example.turns, len(example.turns) - 1, [], ""
        for k in range(len(turns)):
            asked = self.render(tokenizer, example, k, answered=False)
            if not asked.startswith(seen):
                raise ValueError(
                    "this chat template writes earlier turns in another way once more follow, so "
                    "that answers cannot be told from the rest: choose another data.template"
                )
            parts.append((asked[len(seen) :], False))
            seen = asked
            if answer or k < last:
                seen = self.render(tokenizer, example, k, answered=True)
                said = seen[len(asked) :]
                parts += [(said.rstrip(), True), (said[len(said.rstrip()) :], False)]
        return [part for part in parts if part[0]]

    def begins_itself(self, tokenizer: Any, parts: list[Part]) -> bool:
        """As in transformers: a first token that the template writes is tokenised with the rest,
        and added only for a tokenizer that adds it to any text."""
        opening = tokenizer.bos_token
        return parts[0][0].startswith(opening) or opening not in tokenizer.tokenize(
            "", add_special_tokens=True
        )

    def render(self, tokenizer: Any, example: Example, k: int, *, answered: bool) -> str:
        """The first k turns and question k, and its answer or what invites it."""
        questions, replies = example.questions()[: k + 1], [reply for _, reply in example.turns]
        images = sum(shown + text.count(IMAGE_MARK) for shown, text in questions)
        images *= bool(example.images)
        opening = pieces(questions[0][1], images)[0]

        def said(structured: bool) -> str:
            messages = []
            for (shown, question), reply in zip(questions, replies, strict=False):
                text = f"{IMAGE_MARK}\n" * shown + question
                content = [{"type": "image"}] * shown
                for j, piece in enumerate(pieces(question, images)):
                    content += [{"type": "image"}] * (j > 0)
                    content += [{"type": "text", "text": piece}] * bool(piece or not question)
                messages.append({"role": "user", "content": content if structured else text})
                content = [{"type": "text", "text": reply}]
                messages.append({"role": "assistant", "content": content if structured else reply})
            messages = messages if answered else messages[:-1]
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not answered
            )

        # Templates of vision language models take a list of contents, others text alone.
        try:
            text = said(structured=True)
        except Exception:  # whatever a jinja program may raise
            text = ""
        if "'type'" in text or text.count(IMAGE_MARK) != images or opening not in text:
            text = said(structured=False)
        if text.count(IMAGE_MARK) != images:
            raise ValueError(
                f"this chat template does not say where the image stands ({IMAGE_MARK}): choose "
                "another data.template"
            )
        return text


def pieces(text: str, images: int) -> list[str]:
    """A question cut at its image marks; one piece where there are no images to mark."""
    return text.split(IMAGE_MARK) if images else [text]


# vicuna_v1 and plain: llava/conversation.py and llava/train/train.py in haotian-liu/LLaVA.
TEMPLATES = {
    "vicuna_v1": Template(
        start="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: {image}{question} ASSISTANT:",
        answer=" {answer}",
        eos=True,
        image="<image>\n",
        joined=True,
    ),
    "plain": Template("", "{image}", "{answer}\n", eos=False, image="<image>", joined=True),
    # Qwen's own: the system text of the Qwen1.5 chat models, and a line break behind each turn.
    "chatml": Template(
        start="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user="<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n",
        answer="{answer}",
        eos=False,
        image="<image>\n",
        joined=True,
        end="<|im_end|>",
        gap="\n",
    ),
    "checkpoint": OwnTemplate(
        "", "{image}{question}", "{answer}", eos=True, image="<image>", joined=True
    ),
    "bare": Template("", "{image}{question}", "{answer}", eos=True, image="<image>", joined=False),
    # The visual tokens are read in the light of the question, at a fixed distance from the answer.
    "question_first": Template(
        "", "{question}{image}", "{answer}", eos=True, image="<image>", joined=False
    ),
    # The same order in Vicuna's words; no published model was trained so.
    "vicuna_question_first": Template(
        start="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: {question}{image} ASSISTANT:",
        answer=" {answer}",
        eos=True,
        image="\n<image>",
        joined=True,
    ),
}


def template_of(config: Any) -> Template:
    """The template that `config.data.template` names. ValueError for an unknown one."""
    if config.data.template not in TEMPLATES:
        raise ValueError(
            f"data.template={config.data.template!r}: choose one of {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[config.data.template]


def query_of(config: Any) -> str:
    """Who reads the question for the compressor: "none", "separate" or "prefix" (QueCC alone).

    Raises:
      ValueError: for "prefix" with a template whose question does not stand before the image, with
        several images in a row, or with lengths that leave no room behind it.
    """
    query = config.compressor.query if config.compressor.kind == "quecc" else "none"
    if query == "prefix":
        before, mark, _ = template_of(config).user.partition("{image}")
        if not mark or "{question}" not in before:
            good = [name for name, t in TEMPLATES.items() if "{question}{image}" in t.user]
            raise ValueError(
                "compressor.query='prefix' reads the question that stands before the image, and "
                f"data.template={config.data.template!r} has none there: choose one of "
                f"{', '.join(good)}, or compressor.query='separate'"
            )
        if config.data.images_per_row > 1:
            raise ValueError(
                "compressor.query='prefix' reads the text before the one image of a row once; "
                f"data.images_per_row={config.data.images_per_row} goes with "
                "compressor.query='separate' or 'none'"
            )
        if config.data.question_length >= config.data.text_length:
            raise ValueError(
                f"compressor.query='prefix' keeps data.question_length="
                f"{config.data.question_length} of data.text_length={config.data.text_length} "
                "tokens for the text before the image: raise data.text_length by what follows the "
                "image, the answer and its end included"
            )
    return query
