# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer built from the texts of a data set, for models trained from scratch."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlm_jax.data.example import IMAGE_MARK

SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORD_START = "^(?=[a-z])"  # where a text gets a space in front, as every other word has one


def _beginning(bos: int) -> processors.PostProcessor:
    token = SPECIALS["bos_token"]
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, bos)])


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex("▁?[a-z]+|."), "isolated")


def train_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """A small lossless tokenizer: a token per word of `texts`, else characters.

    It is a PreTrainedTokenizerFast of transformers. Words are of lower-case letters. Digits,
    capitals and words outside the vocabulary are spelled in characters; only a character that
    `texts` never shows (other than ASCII letters and digits) becomes <unk>. <bos> is put in front
    of a text. The same texts in any order give the same ids. Except for special tokens,
    decode(encode(text)) == text for text without a space at its start.

    Args:
      texts: all questions and answers of the training split.
      vocab: the largest number of tokens; the most frequent words are kept.
    Raises:
      ValueError: if `vocab` is too small for the characters.
    """
    words = Counter()
    characters = set("▁0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    for text, times in Counter(texts).items():
        text = re.sub(WORD_START, "▁", text.replace(" ", "▁"))
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
        [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(WORD_START), "▁")]
    )
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _beginning(ids[SPECIALS["bos_token"]])
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIALS
    )


def add_bos(tokenizer: Any) -> None:
    """Adds <bos> to a tokenizer of `train_tokenizer` whose files do not have it yet.

    Files of earlier versions did not record that rows begin with <bos>, although the models were
    trained with it. A tokenizer with an image token belongs to a folder of transformers, whose
    files are followed.
    """
    backend = tokenizer.backend_tokenizer
    is_word_tokenizer = (
        [backend.id_to_token(k) for k in range(len(SPECIALS))] == list(SPECIALS.values())
        and isinstance(backend.model, models.WordPiece)
        and WORD_START in str(backend.normalizer)
    )
    complete = (
        backend.num_special_tokens_to_add(False) or backend.token_to_id(IMAGE_MARK) is not None
    )
    if is_word_tokenizer and not complete:
        backend.post_processor = _beginning(backend.token_to_id(SPECIALS["bos_token"]))
