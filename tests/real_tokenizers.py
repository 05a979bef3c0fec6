# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of the kinds that checkpoints bring along, trained by the library of those.

Each is saved and read as a folder, so that what a file stores is what the tests see.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "USER: what is it? ASSISTANT: a red cat",
    "A chat between a curious user and an artificial intelligence assistant. ",
    "is it big? no, it is small\nand red. What colour is the cat?",
] * 4


def _trained(model, pre_tokenizer, decoder, trainer, normalizer=None):
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(CORPUS, trainer)
    return made


def _begun(backend, token):
    """Puts a token in front of every text, as a post-processor of tokenizer.json does."""
    return processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, backend.token_to_id(token))]
    )


def byte_level(specials, *, trim=False):
    """As GPT-2, Qwen and Llama 3 have it."""
    backend = _trained(
        models.BPE(),
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\s?\w+|\s|[^\w\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]),
        decoders.ByteLevel(),
        BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                   special_tokens=list(specials), show_progress=False),
    )  # fmt: skip
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return backend


def pieces(kind, *, prefix):
    """As Llama's: "▁" for a space, one in front of a text, unknown characters in bytes.

    prefix: "normalizer" as older tokenizer.json files have it, "first" or "always" as newer.
    """
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        extra = [f"<0x{b:02X}>" for b in range(256)]
        model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        trainer = BpeTrainer(vocab_size=360, special_tokens=[*specials, *extra],
                             show_progress=False)  # fmt: skip
    else:
        model = models.Unigram()
        trainer = UnigramTrainer(vocab_size=80, special_tokens=specials, unk_token="<unk>",
                                 show_progress=False)  # fmt: skip
    scheme = "never" if prefix == "normalizer" else prefix
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind != "bpe")
    normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")]) if prefix == "normalizer" else None
    decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return _trained(model, metaspace, decoder, trainer, normalizer)


def words():
    """A token per word: nothing else is known."""
    seen = sorted({w for line in CORPUS for w in line.replace("\n", " ").split()})
    tokens = ["<unk>", "<s>", "</s>", *seen]
    made = Tokenizer(models.WordLevel({t: k for k, t in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def gpt2(**fields):
    """Has a token for the beginning, which it puts nowhere; it is the end and the padding too."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>"]), bos_token="<|endoftext|>",
        eos_token="<|endoftext|>", **fields,
    )  # fmt: skip


def qwen(**fields):
    """No token for the beginning; the end of a turn is the end of a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(CHATML), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        **fields,
    )  # fmt: skip


def llama3(**fields):
    """Byte-level, with a beginning that tokenizer.json puts there."""
    backend = byte_level(["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"], trim=True)
    backend.post_processor = processors.Sequence(
        [backend.post_processor, _begun(backend, "<|begin_of_text|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", **fields
    )


def llama(prefix="first", kind="bpe", **fields):
    """Puts <s> in front, because tokenizer_config.json says so unless told otherwise."""
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces(kind, prefix=prefix), unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", **{"add_bos_token": True} | fields,
    )  # fmt: skip


def word_level(**fields):
    backend = words()
    backend.post_processor = _begun(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **fields
    )


def no_specials(**fields):
    """Neither beginning, end, padding nor unknown."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level([]), **fields)


KINDS = {
    "gpt2": gpt2,
    "qwen": qwen,
    "llama3": llama3,
    "llama": llama,
    "llama legacy": lambda **fields: llama("normalizer", **fields),
    "llama always": lambda **fields: llama("always", **fields),
    "llama without": lambda **fields: llama(add_bos_token=False, **fields),
    "llama with both": lambda **fields: llama(add_eos_token=True, **fields),
    "unigram": lambda **fields: llama("always", "unigram", **fields),
    "words": word_level,
    "no specials": no_specials,
}


def with_image(tokenizer, image="<image>"):
    """With a token for the image, as llava-hf's tokenizers have one."""
    tokenizer.add_tokens([AddedToken(image, special=True, normalized=False)], special_tokens=True)
    return tokenizer
