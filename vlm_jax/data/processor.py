# SPDX-License-Identifier: Apache-2.0
"""Turns an example into token ids with their loss mask, and an image into normalised pixels.

Shapes: T text tokens, Tq question tokens, S pixels of the encoder's side.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_jax.data.example import IMAGE_MARK, Example

# openai/clip-vit-large-patch14-336/preprocessor_config.json
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MEAN_COLOUR = (122, 116, 104)  # CLIP_MEAN of 255, cut to whole numbers: the padding of LLaVA-1.5

SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
KNOWN_TEXTS = 50_000  # tokenised texts that are remembered
NO_IMAGE_QUESTION = "image"  # what a question-reading compressor reads for a row without an image


@dataclass(frozen=True)
class Template:
    """How turns become text.

    start: opens the row. user, answer: one turn, with {image}, {question} and {answer}; only
    `answer` is supervised. eos: whether the end-of-sequence token closes each answer. image: what
    stands for the image in the first turn, IMAGE_MARK included. joined: tokenise all text between
    images as one string, as published models were trained, instead of each part on its own.
    """

    start: str
    user: str
    answer: str
    eos: bool
    image: str
    joined: bool


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
      ValueError: for "prefix" with a template whose question does not stand before the image, or
        with lengths that leave no room behind it.
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
        if config.data.question_length >= config.data.text_length:
            raise ValueError(
                f"compressor.query='prefix' keeps data.question_length="
                f"{config.data.question_length} of data.text_length={config.data.text_length} "
                "tokens for the text before the image: raise data.text_length by what follows the "
                "image, the answer and its end included"
            )
    return query


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex("▁?[a-z]+|."), "isolated")


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A small tokenizer that loses nothing: a token per word of `texts`, else characters.

    Words are of lower-case letters. Digits, capitals and words outside the vocabulary are spelled
    in characters; only a character that `texts` never shows (other than ASCII letters and digits)
    becomes <unk>. The same texts in any order give the same ids. decode(encode(text)) == text for
    text without a space at its start.

    Args:
      texts: all questions and answers of the training split.
      vocab: most tokens; the most frequent words are kept.
    Raises:
      ValueError: where `vocab` does not even hold the characters.
    """
    words = Counter()
    characters = set("▁0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    for text, times in Counter(texts).items():
        text = re.sub("^(?=[a-z])", "▁", text.replace(" ", "▁"))
        characters.update(text)
        for word in re.findall("▁[a-z]+", text):
            words[word] += times
    fixed = [*SPECIALS.values(), *sorted(characters)]
    if vocab < len(fixed):
        raise ValueError(
            f"a vocabulary of {vocab} does not hold the {len(fixed)} special tokens and "
            f"characters of the texts: raise llm.vocab to {len(fixed) + len(words)} for all words"
        )
    ranked = sorted(words, key=lambda w: (-words[w], w))[: vocab - len(fixed)]
    ids = {token: k for k, token in enumerate(fixed + ranked)}
    # Greedy longest match: a known word is one token, an unknown one falls apart into characters.
    tokenizer = Tokenizer(
        models.WordPiece(
            ids,
            unk_token=SPECIALS["unk_token"],
            continuing_subword_prefix="",
            max_input_chars_per_word=200,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex("^(?=[a-z])"), "▁")]
    )
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIALS
    )


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer saved in a folder; nothing is downloaded.

    Raises:
      FileNotFoundError: where there is no such folder.
      ValueError: where it holds no tokenizer that transformers can load with character offsets.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"no tokenizer folder {path}: give data.tokenizer a folder that holds "
            "tokenizer.json or tokenizer.model, or leave it empty to train one"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{path} holds no tokenizer that transformers can load: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer in {path} has no fast form (tokenizer.json), which is needed to tell "
            "which tokens belong to an answer: save it once with transformers' fast class"
        )
    return tokenizer


class Processor:
    """Prepares examples for one model: its tokenizer, template, lengths and encoder size.

    Args:
      tokenizer: a fast transformers tokenizer.
      config: the whole configuration; `data`, `vit.image_size` and the compressor's query are read.
    Raises:
      ValueError: for an unknown template or image_fit, a tokenizer without the eos token it needs,
        or a template without a question before the image where the compressor reads that.
    """

    def __init__(self, tokenizer: Any, config: Any):
        data = config.data
        self.template, self.query = template_of(config), query_of(config)
        if data.image_fit not in ("pad", "crop"):
            raise ValueError(f"data.image_fit={data.image_fit!r}: choose pad or crop")
        self.tokenizer = tokenizer
        self.text_length, self.question_length = data.text_length, data.question_length
        self.image_size, self.image_fit = config.vit.image_size, data.image_fit
        self.blind = data.blind
        if self.template.eos and tokenizer.eos_token is None:
            raise ValueError(
                f"template {data.template!r} closes answers with an end-of-sequence token, and the "
                "tokenizer has none: set its eos_token, or choose data.template=plain"
            )
        self.eos_id = tokenizer.eos_token_id
        self.stop_ids = (tokenizer.eos_token_id,)
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else tokenizer.unk_token_id or 0
        self._known: dict[str, tuple[list[int], list[int]]] = {}

    def reading_as(self, config: Any) -> "Processor":
        """This processor for a model of the same data whose compressor reads as `config` says."""
        other = copy.copy(self)
        other.query = query_of(config)
        return other

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and at which of its characters each token begins."""
        # Questions and answers of small benchmarks come many times.
        if (known := self._known.get(text)) is None:
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            known = encoding.ids, [start for start, _ in encoding.offsets]
            if len(self._known) < KNOWN_TEXTS:
                self._known[text] = known
        return known

    def _parts(self, example: Example, answer: bool) -> list[tuple[str, bool]]:
        """The row as text parts, each with whether it is supervised."""
        template, parts = self.template, [(self.template.start, False)]
        eos = self.tokenizer.eos_token if template.eos else ""
        for k, (question, reply) in enumerate(example.turns):
            mark = template.image if k == 0 and example.image is not None else ""
            parts.append((template.user.format(image=mark, question=question), False))
            if answer or k < len(example.turns) - 1:
                parts.append((template.answer.format(answer=reply), True))
                parts.append((eos, True))
        return [(text, supervised) for text, supervised in parts if text]

    def _tokens(self, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Ids and supervision of parts without an image mark."""
        ids, mask = [], []
        if not self.template.joined:
            for text, supervised in parts:
                part = [self.eos_id] if text == self.tokenizer.eos_token else self._encode(text)[0]
                ids += part
                mask += [supervised] * len(part)
            return ids, mask
        found, starts = self._encode("".join(text for text, _ in parts))
        # A token belongs to the part in which its text begins.
        ends = np.cumsum([len(text) for text, _ in parts])
        owners = np.searchsorted(ends, starts, side="right")
        supervised = [flag for _, flag in parts]
        return list(found), [supervised[min(k, len(parts) - 1)] for k in owners]

    def text(self, example: Example, *, answer: bool = True) -> dict[str, np.ndarray]:
        """The example as ids; with answer=False the prompt up to where the last answer starts.

        Returns: ids int32 [T], right padded; loss_mask bool [T], True where the id is a target of
        the loss; length int32, ids that are not padding; image_at int32, before which id the visual
        tokens belong (T where there is no image); question int32 [Tq] and question_length int32:
        what a question-reading compressor reads, never of an answer; cut bool, whether a training
        row was longer than its room and lost the end.

        The question is that of the first turn, after the begin-of-sequence token: alone if it is
        empty. With query="prefix" it is all text before the image, at most Tq tokens, and behind
        the image is room for T - Tq; a row without an image is one text, cut after Tq tokens.

        Raises:
          ValueError: for a prompt or question that does not fit (a training row is cut), an image
            place that does not, or a question of no token at all where one is read.
        """
        ids, mask, image_at = self._row(example, answer)
        has_image, first = example.image is not None, self.question_length
        if self.query == "prefix" and has_image:
            room = self.text_length - first
            fits, question = image_at <= first and len(ids) - image_at <= room, ids[:image_at]
            problem = (
                f"its prompt has {image_at} tokens before the image and {len(ids) - image_at} "
                f"behind it; data.question_length={first} and data.text_length={self.text_length} "
                f"leave {first} and {room}"
            )
            ids, mask = (r[: min(image_at, first)] + r[image_at:][:room] for r in (ids, mask))
            image_at = min(image_at, first)
        else:
            fits = len(ids) <= self.text_length
            problem = f"its prompt has {len(ids)} tokens, data.text_length is {self.text_length}"
            question = ids if self.query == "prefix" else self._question(example)
            if self.query == "separate" and has_image and len(question) > first:
                fits = False
                problem += f", its question {len(question)}, data.question_length is {first}"
        if not fits and (not answer or has_image and image_at > self.text_length):
            raise ValueError(f"example {example.id}: {problem}: raise it, or shorten the question")
        if self.query != "none" and has_image and not question:
            raise ValueError(
                f"example {example.id}: compressor.query={self.query!r} reads the question, which "
                "is empty (the plain template drops it), and the tokenizer has no "
                "begin-of-sequence token to be read in its place: drop the example, or choose "
                "compressor.query='none'"
            )
        return {
            "ids": self._padded(ids, self.text_length, np.int32, self.pad_id),
            "loss_mask": self._padded(mask, self.text_length, bool, False),
            "length": np.int32(min(len(ids), self.text_length)),
            "image_at": np.int32(image_at),
            "question": self._padded(question, first, np.int32, self.pad_id),
            "question_length": np.int32(min(len(question), first)),
            "cut": np.bool_(not fits),
        }

    def _row(self, example: Example, answer: bool) -> tuple[list[int], list[bool], int]:
        """Ids and supervision of the whole row, and before which id the image belongs (or T)."""
        parts = self._parts(example, answer)
        ids, mask, image_at = list(self.bos), [False] * len(self.bos), self.text_length
        for k, (text, supervised) in enumerate(parts):
            if IMAGE_MARK in text and example.image is not None:
                before, _, after = text.partition(IMAGE_MARK)
                head = [*parts[:k], (before, supervised)]
                parts = [(after, supervised), *parts[k + 1 :]]
                self._append(ids, mask, head)
                image_at = len(ids)
                break
        self._append(ids, mask, parts)
        return ids, mask, image_at

    def _question(self, example: Example) -> list[int]:
        """The ids of the question for a pass of its own, as published for QueCC."""
        # As published, the plain template drops the instruction and so leaves nothing to be read.
        read = example.turns[0][0] if "{question}" in self.template.user else ""
        read = read if example.image is not None else NO_IMAGE_QUESTION
        return [*self.bos, *self._encode(read)[0]]

    def _append(self, ids: list[int], mask: list[bool], parts: list[tuple[str, bool]]) -> None:
        parts = [part for part in parts if part[0]]
        if parts:
            more_ids, more_mask = self._tokens(parts)
            ids += more_ids
            mask += more_mask

    @staticmethod
    def _padded(values: list, length: int, dtype: Any, pad: Any) -> np.ndarray:
        row = np.full(length, pad, dtype)
        row[: len(values)] = values[:length]
        return row

    def square(self, image: np.ndarray) -> np.ndarray:
        """The image made square and resized by PIL's bicubic, as published; uint8 [S, S, 3]."""
        size = self.image_size
        height, width = image.shape[:2]
        if self.blind:
            return np.full((size, size, 3), MEAN_COLOUR, np.uint8)
        if height == width == size:
            return image
        picture = Image.fromarray(image)
        if self.image_fit == "pad":
            side = max(height, width)
            if height != width:
                canvas = Image.new("RGB", (side, side), MEAN_COLOUR)
                canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
                picture = canvas
            return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        # The short side to `size`, the long one cut after it.
        short, long = min(height, width), int(size * max(height, width) / min(height, width))
        wide, high = (size, long) if width == short else (long, size)
        left, top = (wide - size) // 2, (high - size) // 2
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
        return np.asarray(picture.crop((left, top, left + size, top + size)))

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """An RGB image uint8 [H, W, 3] as the encoder sees it: float32 [S, S, 3], normalised."""
        return normalise(self.square(image))


def normalise(image: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] to float32 of the same shape: CLIP's mean and deviation."""
    return (_UNIT[image] - CLIP_MEAN) / CLIP_STD


# Rescaled in float64, then rounded, as published.
_UNIT = (np.arange(256) * (1 / 255)).astype(np.float32)
