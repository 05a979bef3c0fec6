# SPDX-License-Identifier: Apache-2.0
"""Loads tokenizers, and the ids that they give to a text.

The behavior of a tokenizer is tested with texts, not read from its files, because
tokenizer_config.json and tokenizer.json may contradict each other.
"""

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from vlm_jax import files
from vlm_jax.data import word_tokenizer
from vlm_jax.data.example import IMAGE_MARK

KNOWN_TEXTS = 50_000  # tokenized texts that are remembered


def load_tokenizer(path: str | PurePath) -> Any:
    """The fast tokenizer saved in a folder; nothing is downloaded, no code of the folder is run.

    Truncation and padding that tokenizer.json stores are switched off: they belong to the program
    that stored them, and every text has to keep all of its tokens here.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it holds no tokenizer that transformers can load with character offsets.
    """
    if files.is_bucket(path):
        path = files.on_disk(path)
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
    # The Rust library raises plain exceptions, and its panics are not derived from Exception.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(
            f"{path} holds no tokenizer that transformers can load ({_message(error)}): copy "
            "tokenizer.json and tokenizer_config.json again, or save them once more with "
            "transformers"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer in {path} has no fast form (tokenizer.json), which is needed to tell "
            "which tokens belong to an answer: save it once with transformers' fast class"
        )
    # Older processors of transformers keep the template here; its tokenizers do not read it.
    older = Path(path) / "chat_template.json"
    if older.is_file() and not (Path(path) / "chat_template.jinja").is_file():
        try:
            tokenizer.chat_template = json.loads(older.read_text("utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{older} holds no chat template: {{"chat_template": TEXT}} was expected; correct '
                "it, or remove it for the tokenizer's own"
            ) from error
    chat_template = tokenizer.chat_template
    named = (
        list(chat_template.values()) if isinstance(chat_template, dict) else [chat_template or ""]
    )
    if not all(isinstance(text, str) for text in named):
        raise ValueError(
            f"{path} has a chat_template that is not a text: {chat_template!r:.50}; correct or "
            "remove it"
        )
    # transformers would search for the number of such a token in every call.
    if (unk_token := tokenizer.unk_token) is not None and unk_token not in tokenizer.get_vocab():
        raise ValueError(
            f"{path}/tokenizer_config.json: unk_token={unk_token!r:.60} is not in its vocabulary: "
            "correct or remove it"
        )
    if unnamed := _unnamed(tokenizer.backend_tokenizer):
        raise ValueError(
            f"{path}/tokenizer.json puts {unnamed[0]!r} around a text, which its post_processor "
            "does not list under special_tokens: copy it again"
        )
    _plain(tokenizer.backend_tokenizer)
    word_tokenizer.add_bos(tokenizer)
    return tokenizer


def _message(error: BaseException) -> str:
    """The type and the message of an error in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:300]


def _plain(backend: Tokenizer) -> None:
    """Switches truncation and padding off."""
    backend.no_truncation()
    backend.no_padding()


def _unnamed(backend: Tokenizer) -> list[str]:
    """Tokens that a post-processor uses without a number, which crash the library."""
    if backend.post_processor is None:
        return []
    processors, missing = [json.loads(backend.post_processor.__getstate__())], []
    for fields in processors:
        processors += fields.get("processors", [])
        pieces = [*fields.get("single", []), *fields.get("pair", [])]
        tokens = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        missing += [token for token in tokens if token not in fields["special_tokens"]]
    return missing


class Encoded(NamedTuple):
    """The ids of a text, and the characters [start, end) that each of them stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Encoder:
    """Encodes texts with a tokenizer, without tokens before and after the text.

    Attributes:
      before: the ids that the tokenizer adds before any text, such as a begin-of-sequence token;
        empty for a tokenizer that has such a token and does not add it.
      behind: the ids that it adds after any text. No prompt and no training row has them: a model
        continues its prompt, and a template defines what closes an answer.
    """

    def __init__(self, tokenizer: Any):
        backend = tokenizer.backend_tokenizer
        _plain(backend)
        self.before, self.behind = _around(backend)
        after = backend.post_processor
        # Such a processor removes spaces from the offsets of tokens, so that a line break before an
        # answer would count as part of the answer. It changes no id.
        if after is not None and b'"trim_offsets":true' in after.__getstate__():
            backend = Tokenizer.from_str(backend.to_str())
            backend.post_processor = None
            backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        self._backend = backend
        self._known: dict[str, Encoded] = {}

    def __call__(self, text: str) -> Encoded:
        """The ids of `text`.

        Raises:
          ValueError: for a text with a lone surrogate, or one that the tokenizer cannot encode.
        """
        # Questions and answers of small benchmarks repeat.
        if (encoded := self._known.get(text)) is None:
            # Other calls of the tokenizer may have changed its state.
            _plain(self._backend)
            try:
                encoding = self._backend.encode(text, add_special_tokens=False)
            except Exception as error:  # a Rust error has no class of its own
                raise ValueError(f"{_fault(text, error)}: correct the text") from error
            places = encoding.offsets
            encoded = Encoded(
                encoding.ids, [start for start, _ in places], [end for _, end in places]
            )
            if len(self._known) < KNOWN_TEXTS:
                self._known[text] = encoded
        return encoded


def _fault(text: str, error: Exception) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as half:
        return f"its text holds half a character ({text[half.start]!r} at {half.start})"
    return f"the tokenizer cannot read the text {text!r:.60} ({_message(error)})"


def _around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before a text, and those that it adds after it."""
    for text in ("a", "1", ".", *sorted(backend.get_vocab())[:100]):
        try:
            bare = backend.encode(text, add_special_tokens=False).ids
            full = backend.encode(text, add_special_tokens=True).ids
        except Exception:  # a text that this tokenizer has no token for
            continue
        for k in range(len(full) - len(bare) + 1):
            if bare and full[k : k + len(bare)] == bare:
                return full[:k], full[k + len(bare) :]
    return [], []


def check_vocabulary(tokenizer: Any, vocab: int, *, image: int | None = None) -> None:
    """Raises ValueError for a tokenizer that gives ids for which a model has no embedding.

    The placeholder of the image (`image`, or <image>) may be above: it is never embedded. So may
    the padding token: rows are then padded with another one.
    """
    allowed = {image, tokenizer.get_vocab().get(IMAGE_MARK), tokenizer.pad_token_id}
    too_large = {k: t for t, k in tokenizer.get_vocab().items() if k >= vocab and k not in allowed}
    if too_large:
        first, last = min(too_large), max(too_large)
        raise ValueError(
            f"the tokenizer has ids up to {last} (the first too large is {first}, "
            f"{too_large[first]!r}), and the language model embeds only llm.vocab={vocab}: give "
            "the tokenizer that the model was trained with, or, for a new model, raise llm.vocab "
            f"to {-(-(last + 1) // 8) * 8}"
        )


def mark_of(tokenizer: Any, image_token: int | None) -> str:
    """The mark for an image in the texts of a model: <image>, or the token of number `image_token`.

    Only an added token can be a mark: in some configurations the number is that of a word.
    """
    added = tokenizer.added_tokens_decoder
    if IMAGE_MARK in tokenizer.get_vocab() or image_token not in added:
        return IMAGE_MARK
    return str(added[image_token])


def hash_of(tokenizer: Any) -> str:
    """The sha256 of a tokenizer's vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps([vocabulary, tokenizer.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()


def keep_tokenizer(tokenizer: Any, folder: PurePath) -> None:
    """Saves a tokenizer atomically: a killed run leaves no incomplete folder."""
    with files.making(folder) as fresh:
        tokenizer.save_pretrained(fresh)
