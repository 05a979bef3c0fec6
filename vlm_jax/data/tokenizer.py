# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as their files describe them, and the ids that they give to a text.

What a tokenizer does is asked of it, not read from fields of its files: those may say one thing in
tokenizer_config.json and another in tokenizer.json.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from vlm_jax import files
from vlm_jax.data import word_tokenizer
from vlm_jax.data.example import IMAGE_MARK

KNOWN_TEXTS = 50_000  # tokenized texts that are remembered


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer saved in a folder; nothing is downloaded, no code of the folder is run.

    Truncation and padding that tokenizer.json stores are switched off: they belong to the program
    that stored them, and every text has to keep all of its tokens here.

    Raises:
      FileNotFoundError: where there is no such folder.
      ValueError: where it holds no tokenizer that transformers can load with character offsets.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"no tokenizer folder {path}: give data.tokenizer a folder that holds "
            "tokenizer.json or tokenizer.model, or leave it empty to train one"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    # The Rust library raises errors of no class of their own, and panics outside of Exception.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(
            f"{path} holds no tokenizer that transformers can load ({_said(error)}): copy "
            "tokenizer.json and tokenizer_config.json again, or save them once more with "
            "transformers"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer in {path} has no fast form (tokenizer.json), which is needed to tell "
            "which tokens belong to an answer: save it once with transformers' fast class"
        )
    # Where older processors of transformers keep the template; its tokenizers do not look there.
    older = Path(path) / "chat_template.json"
    if older.is_file() and not (Path(path) / "chat_template.jinja").is_file():
        try:
            tokenizer.chat_template = json.loads(older.read_text("utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{older} holds no chat template: {{"chat_template": TEXT}} was expected; correct '
                "it, or remove it for the tokenizer's own"
            ) from error
    given = tokenizer.chat_template
    named = list(given.values()) if isinstance(given, dict) else [given or ""]
    if not all(isinstance(text, str) for text in named):
        raise ValueError(
            f"{path} has a chat_template that is no text, but {given!r:.60}: correct or remove it"
        )
    # transformers asks for the number of such a token again and again.
    if (unknown := tokenizer.unk_token) is not None and unknown not in tokenizer.get_vocab():
        raise ValueError(
            f"{path}/tokenizer_config.json: unk_token={unknown!r:.60} is no token of its words: "
            "correct or remove it"
        )
    if unnamed := _unnamed(tokenizer.backend_tokenizer):
        raise ValueError(
            f"{path}/tokenizer.json puts {unnamed[0]!r} around a text, which its post_processor "
            "does not list under special_tokens: copy it again"
        )
    _plain(tokenizer.backend_tokenizer)
    word_tokenizer.completed(tokenizer)
    return tokenizer


def _said(error: BaseException) -> str:
    """The words of an error in one line, with its kind where they say little."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:300]


def _plain(backend: Tokenizer) -> None:
    """Switches truncation and padding off."""
    backend.no_truncation()
    backend.no_padding()


def _unnamed(backend: Tokenizer) -> list[str]:
    """Tokens that a post-processor asks for without a number; the library does not survive one."""
    if backend.post_processor is None:
        return []
    found, missing = [json.loads(backend.post_processor.__getstate__())], []
    for one in found:
        found += one.get("processors", [])
        pieces = [*one.get("single", []), *one.get("pair", [])]
        asked = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        missing += [token for token in asked if token not in one["special_tokens"]]
    return missing


class Encoded(NamedTuple):
    """The ids of a text, and the characters [start, end) that each of them stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Encoder:
    """What a tokenizer makes of a text, with nothing in front of it and nothing behind.

    Attributes:
      before: the ids that the tokenizer puts in front of any text, such as a begin-of-sequence
        token; none for a tokenizer that has such a token and does not put it there.
      behind: those that it puts behind any text. No prompt and no training row has them: a model
        goes on after its prompt, and a template says what closes an answer.
    """

    def __init__(self, tokenizer: Any):
        backend = tokenizer.backend_tokenizer
        _plain(backend)
        self.before, self.behind = _around(backend)
        after = backend.post_processor
        # Such a processor takes the space of a token out of its place in the text, so that a line
        # break in front of an answer would be counted as the answer's. It changes no id.
        if after is not None and b'"trim_offsets":true' in after.__getstate__():
            backend = Tokenizer.from_str(backend.to_str())
            backend.post_processor = None
            backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        self._backend = backend
        self._known: dict[str, Encoded] = {}

    def __call__(self, text: str) -> Encoded:
        """The ids of `text`.

        Raises:
          ValueError: for a text that is none (half a character), or one that the tokenizer has no
            token for.
        """
        # Questions and answers of small benchmarks come many times.
        if (known := self._known.get(text)) is None:
            # Calls of the tokenizer itself, by whoever has it, leave their own state behind.
            _plain(self._backend)
            try:
                made = self._backend.encode(text, add_special_tokens=False)
            except Exception as error:  # a Rust error has no class of its own
                raise ValueError(f"{_fault(text, error)}: correct the text") from error
            places = made.offsets
            known = Encoded(made.ids, [start for start, _ in places], [end for _, end in places])
            if len(self._known) < KNOWN_TEXTS:
                self._known[text] = known
        return known


def _fault(text: str, error: Exception) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as half:
        return f"its text holds half a character ({text[half.start]!r} at {half.start})"
    return f"the tokenizer cannot read the text {text!r:.60} ({_said(error)})"


def _around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts in front of a text, and those that it puts behind it."""
    for text in ("a", "1", ".", *sorted(backend.get_vocab())[:100]):
        try:
            bare = backend.encode(text, add_special_tokens=False).ids
            whole = backend.encode(text, add_special_tokens=True).ids
        except Exception:  # a text that this tokenizer has no token for
            continue
        for k in range(len(whole) - len(bare) + 1):
            if bare and whole[k : k + len(bare)] == bare:
                return whole[:k], whole[k + len(bare) :]
    return [], []


def check_vocabulary(tokenizer: Any, vocab: int, *, image: int | None = None) -> None:
    """Raises ValueError for a tokenizer that gives ids for which a model has no embedding.

    The placeholder of the image (`image`, or <image>) may lie behind: it is never embedded. So may
    the token for padding: rows are padded with another one then.
    """
    spared = {image, tokenizer.get_vocab().get(IMAGE_MARK), tokenizer.pad_token_id}
    behind = {k: t for t, k in tokenizer.get_vocab().items() if k >= vocab and k not in spared}
    if behind:
        first, last = min(behind), max(behind)
        raise ValueError(
            f"the tokenizer has ids up to {last} (the first too large is {first}, "
            f"{behind[first]!r}), and the language model embeds only llm.vocab={vocab}: give "
            "the tokenizer that the model was trained with, or, for a new model, raise llm.vocab "
            f"to {-(-(last + 1) // 8) * 8}"
        )


def mark_of(tokenizer: Any, image_token: int | None) -> str:
    """What stands for an image in the texts of a model: <image>, or the token of another name that
    its configuration numbers.

    Only a token that was added can be one: some configurations number a word.
    """
    added = tokenizer.added_tokens_decoder
    if IMAGE_MARK in tokenizer.get_vocab() or image_token not in added:
        return IMAGE_MARK
    return str(added[image_token])


def hash_of(tokenizer: Any) -> str:
    """A sha256 over what a tokenizer's ids mean and how a conversation is written with it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps([vocabulary, tokenizer.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()


def keep_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer: whole or not at all, or a killed run would leave half of one behind."""
    with files.making(folder) as fresh:
        tokenizer.save_pretrained(fresh)
