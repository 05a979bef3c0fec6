# SPDX-License-Identifier: Apache-2.0
"""Conversations as text and ids: ChatML, and the chat templates that checkpoints bring along."""

import numpy as np
import pytest
import tiny
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from vlm_jax.data.example import Example
from vlm_jax.data.processor import Processor, RowFormat

TURNS = (("what is it?", "a red cat"), ("is it big?", "no"))
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# The shape of Qwen's own template, and of llava-hf's for Vicuna.
QWEN = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer(*, template=None, bos=None, specials=("<|im_start|>", "<|im_end|>"), image=False):
    """A byte-level tokenizer as Qwen's: no merges, special tokens that are one id each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?\w+|\s|[^\w\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = [*specials, "<|endoftext|>", *([bos] if bos else []), *(["<image>"] if image else [])]
    backend.add_special_tokens([AddedToken(t, special=True) for t in added])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token=bos,
    )
    made.chat_template = template
    return made


def processor(tokenizer, template, **changes):
    data = dict(template=template, text_length=400, question_length=40) | changes.pop("data", {})
    return Processor(tokenizer, RowFormat.of(tiny.config(data=data, **changes)))


def supervised(made, words):
    """The text that the loss looks at."""
    row = made.text(Example("x", 0, TURNS, "f", "t"))
    return words.decode(row["ids"][row["loss_mask"]])


def test_chatml_is_qwens_text_and_supervises_answers_and_their_ends():
    words = tokenizer()
    made = processor(words, "chatml")
    row = made.text(Example("x", 0, TURNS, "f", "t"))
    ids, at = row["ids"][: row["length"]], int(row["image_at"])
    text = (
        SYSTEM + "<|im_start|>user\n{}\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
        "a red cat<|im_end|>\n<|im_start|>user\nis it big?<|im_end|>\n<|im_start|>assistant\n"
        "no<|im_end|>\n"
    )
    before, after = text.split("{}")
    assert words.decode(ids[:at]) == before and words.decode(ids[at:]) == after
    assert supervised(made, words) == "a red cat<|im_end|>no<|im_end|>"
    assert [words.decode(i) for i in made.stop_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert words.decode(made.constant_prefix()) == SYSTEM + "<|im_start|>user\n"


def test_chatml_equals_the_template_of_the_checkpoint():
    words = tokenizer(template=QWEN)
    example = Example("x", 0, TURNS, "f", "t")
    own, ours = processor(words, "checkpoint"), processor(words, "chatml")
    assert ours.tokens(example, answer=True) == own.tokens(example, answer=True)
    one, other = (made.tokens(example, answer=False) for made in (own, ours))
    assert (one.ids, one.image_at) == (other.ids, other.image_at)
    roles = ("user", "assistant")
    talk = [{"role": r, "content": t} for qa in TURNS for r, t in zip(roles, qa, strict=True)]
    plain = processor(words, "checkpoint").tokens(Example("x", None, TURNS, "f", "t"), answer=True)
    assert plain.ids == words.apply_chat_template(talk, tokenize=True, return_dict=False)


def test_a_system_message_takes_the_place_of_the_templates_own():
    """ChatML's by its text, a checkpoint's as transformers renders it, texts or lists of parts."""
    example, brief = Example("x", 0, TURNS[:1], "f", "t"), "be brief: {a}"
    words = tokenizer(template=QWEN)
    ours, own = (processor(words, name).saying(brief) for name in ("chatml", "checkpoint"))
    one, other = (made.tokens(example, answer=False) for made in (ours, own))
    assert one.ids == other.ids and one.image_at == other.image_at
    written = words.decode(one.ids)
    assert written.startswith(f"<|im_start|>system\n{brief}<|im_end|>\n<|im_start|>user\n")
    assert "You are a helpful assistant" not in written
    lists = processor(tokenizer(template=LLAVA, image=True), "checkpoint").saying(brief)
    row = lists.tokens(example, answer=False)
    assert lists.tokenizer.decode(row.ids).startswith(f"SYSTEM: {brief} USER: ")
    # Nobody else's template changes.
    assert processor(words, "chatml").template.system in words.decode(
        processor(words, "chatml").tokens(example, answer=False).ids
    )


@pytest.mark.parametrize("name", ["bare", "plain", "question_first"])
def test_a_template_without_a_place_for_a_system_message_refuses_it(name):
    with pytest.raises(ValueError, match="into the first question"):
        processor(tokenizer(), name).saying("be brief")


def test_a_checkpoints_template_that_drops_system_messages_refuses_them():
    dropping = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    made = processor(tokenizer(template=dropping), "checkpoint").saying("be brief")
    with pytest.raises(ValueError, match="writes no system message"):
        made.tokens(Example("x", 0, TURNS[:1], "f", "t"), answer=False)


def test_answers_never_reach_the_question():
    fields = dict(compressor=dict(kind="quecc", query="separate"))
    made = processor(tokenizer(), "chatml", **fields)
    row = made.tokens(Example("x", 0, TURNS, "f", "t"), answer=True)
    assert made.tokenizer.decode(row.question) == "what is it?"


def test_a_checkpoints_template_with_contents_places_the_image_and_drops_a_second_bos():
    words = tokenizer(template="{{ bos_token }}" + LLAVA, bos="<s>", image=True)
    made = processor(words, "checkpoint")
    prompt = made.tokens(Example("x", 0, TURNS, "f", "t"), answer=False)
    assert prompt.ids[0] == words.bos_token_id and prompt.ids.count(words.bos_token_id) == 1
    assert words.decode(prompt.ids[: prompt.image_at]) == "<s>USER: "
    rest = "\nwhat is it? ASSISTANT: a red cat USER: is it big? ASSISTANT:"
    assert words.decode(prompt.ids[prompt.image_at :]) == rest
    # As transformers tokenizes the same text, image token included.
    contents = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    ]
    whole = words.apply_chat_template(
        contents, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    one = made.tokens(Example("x", 0, TURNS[:1], "f", "t"), answer=False)
    image = words.convert_tokens_to_ids("<image>")
    assert [*one.ids[: one.image_at], image, *one.ids[one.image_at :]] == whole
    assert supervised(made, words) == " a red cat no"


@pytest.mark.parametrize("adds, writes", [(True, False), (True, True), (False, False)])
def test_a_llava_processor_makes_the_same_ids(adds, writes):
    """Whoever puts the first token there: the tokenizer, the template, both or nobody."""
    text = "{{ bos_token }}" * writes + LLAVA
    words = tokenizer(template=text, bos="<s>", image=True)
    if adds:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
        )
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48), words, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=text,
    )  # fmt: skip
    picture = Image.new("RGB", (60, 40), "red")
    talk = []
    for question, reply in TURNS:
        talk.append({"role": "user", "content": [{"type": "text", "text": question}]})
        talk.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    talk[0]["content"].insert(0, {"type": "image", "image": picture})
    kinds = dict(tokenize=True, return_dict=True, return_tensors="np")
    for answer, messages in ((True, talk), (False, talk[:-1])):
        whole = theirs.apply_chat_template(messages, add_generation_prompt=not answer, **kinds)
        row = processor(words, "checkpoint").tokens(Example("x", 0, TURNS, "f", "t"), answer=answer)
        image = [words.convert_tokens_to_ids("<image>")] * 9
        spliced = [*row.ids[: row.image_at], *image, *row.ids[row.image_at :]]
        assert spliced == list(whole["input_ids"][0])
        assert spliced.count(words.bos_token_id) == int(adds or writes)


# Ids of the toy below that are those of Llama: its special tokens and its bytes come first.
BEGIN, END, LINE = 1, 2, 13


def llama(prefix):
    """Like Llama's: pairs merged within words, what is unknown in bytes, "▁" before a text.

    "always" puts that before the text behind a special token too (`legacy` in published files).
    """
    merges = ["U S", "E R", "US ER", "▁ USER", "A S", "▁ AS", "c a", "ca t", "▁ cat", "▁ a"]
    letters = list("▁USERAcat:SIN?")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += list(dict.fromkeys([*letters, *(m.replace(" ", "") for m in merges)]))
    backend = Tokenizer(
        models.BPE(
            {piece: k for k, piece in enumerate(pieces)},
            [tuple(m.split(" ")) for m in merges],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        add_bos_token=True,
    )  # fmt: skip
    return made, {piece: k for k, piece in enumerate(pieces)}


@pytest.mark.parametrize("prefix, second", [("first", ["USER"]), ("always", ["▁USER"])])
def test_vicuna_ids_are_the_ones_that_llama_gives(prefix, second):
    words, ids = llama(prefix)
    turns = (("cat?", "a cat\u00e9"), ("cat", "a"))
    made = processor(words, "vicuna_v1")
    row = made.tokens(Example("x", 0, turns, "f", "t"), answer=True)
    # What stands before the image ends with "▁" alone; what follows begins with one, its own.
    assert row.ids[0] == BEGIN and row.ids[row.image_at - 3 : row.image_at] == [
        ids["▁USER"], ids[":"], ids["▁"]]  # fmt: skip
    after = row.ids[row.image_at :]
    assert after[:2] == [ids["▁"], LINE] and after[2:4] == [ids["cat"], ids["?"]]
    # Supervised from the token with the space to the end; the last letter is two bytes.
    said = [ids["▁a"], ids["▁cat"], 3 + 0xC3, 3 + 0xA9, END, ids["▁a"], END]
    assert [i for i, kept in zip(row.ids, row.mask, strict=True) if kept] == said
    behind = row.ids.index(END) + 1
    assert row.ids[behind : behind + len(second)] == [ids[piece] for piece in second]
    plain = processor(words, "plain").tokens(
        Example("x", 0, (("cat?", "a cat"),), "f", "t"), answer=True
    )
    assert plain.ids == [BEGIN, ids["▁a"], ids["▁cat"], LINE] and plain.image_at == 1
    assert plain.mask == [False, True, True, True]


def test_what_a_template_needs_and_lacks_is_named():
    with pytest.raises(ValueError, match="tokenizer has none: choose one of vicuna_v1"):
        processor(tokenizer(), "checkpoint").text(Example("x", 0, TURNS, "f", "t"))
    with pytest.raises(ValueError, match=r"'chatml' closes answers with <\|im_end\|>.*not a token"):
        processor(tokenizer(specials=()), "chatml")
    silent = tokenizer(template="{{ messages[0].content }}".replace("content", "role"))
    with pytest.raises(ValueError, match="does not say where the image is"):
        processor(silent, "checkpoint").text(Example("x", 0, TURNS, "f", "t"))
    twice = "{{ messages[1].content }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write answer 1 once"):
        processor(tokenizer(template=twice), "checkpoint").text(Example("x", 0, TURNS, "f", "t"))


def test_a_plain_row_is_begin_image_caption_and_line_break():
    words = tokenizer(bos="<s>")
    words.add_bos_token = True
    row = processor(words, "plain").tokens(Example("x", 0, (("ignored", "a cat"),), "f", "t"),
                                           answer=True)  # fmt: skip
    assert (
        row.ids == [words.bos_token_id, *words.encode("a cat\n", add_special_tokens=False)]
        and row.image_at == 1
    )
    np.testing.assert_array_equal(row.mask, [False] + [True] * 6)
