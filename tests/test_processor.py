# SPDX-License-Identifier: Apache-2.0
"""Ids and pixels: published vectors, chunks as LLaVA cuts them, targets that spell the answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs import base
from vlm_jax.data.benchmark.synthetic import Synthetic
from vlm_jax.data.example import Example
from vlm_jax.data.processor import Processor, RowFormat, load_tokenizer
from vlm_jax.data.templates import TEMPLATES
from vlm_jax.data.word_tokenizer import train_tokenizer

SYSTEM = TEMPLATES["vicuna_v1"].start


def configured(query=None, **fields):
    """Rows of the base configuration with these data fields; with a query those of QueCC."""
    config = base.get_config()
    config.data.text_length, config.data.question_length = 160, 12
    if query:
        config.compressor.update(dict(kind="quecc", query=query))
    with config.unlocked():
        config.data.update(fields)
    return RowFormat.of(config)


@pytest.fixture(scope="module")
def source():
    return Synthetic("train", images=60)


@pytest.fixture(scope="module")
def texts(source):
    return [text for i in range(len(source)) for turn in source[i].turns for text in turn]


@pytest.fixture(scope="module")
def small(texts):
    return train_tokenizer(texts, 1000)


@pytest.fixture(scope="module")
def sentencepiece():
    """Like Llama's: every chunk of text gets its own dummy prefix; words outside it are spelled."""
    words = ["▁USER", "▁ASSISTANT", "▁the", "▁red", "▁what", "▁is", "▁it", "▁A", "▁chat"]
    vocab = {
        t: k
        for k, t in enumerate(
            [
                "<unk>",
                "<s>",
                "</s>",
                *words,
                *sorted(set("▁\n" + "".join(map(chr, range(33, 127))))),
            ]
        )
    }
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        add_bos_token=True,
    )  # fmt: skip


def test_pixels_equal_the_published_preprocessing():
    # Reference values: PIL 13.0 and the published code on the same 50 x 30 image. Its channel means
    # were summed in float32, which is worth 1e-4 over 336 x 336 pixels.
    y, x = np.mgrid[:30, :50]
    image = np.stack([5 * x % 256, 7 * y % 256, 3 * (x + y) % 256], -1).astype(np.uint8)
    tokenizer = train_tokenizer(["a"], 100)
    pad = Processor(tokenizer, configured(image_fit="pad"))
    square, pixels = pad.square(image), pad.pixels(image)
    assert tuple(square[0, 0]) == (122, 116, 104) and tuple(square[70, 5]) == (2, 1, 1)
    assert tuple(square[168, 168]) == (123, 102, 118)
    assert pixels.shape == (336, 336, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[168, 168], (0.003344, -0.221305, 0.197748), atol=1e-6)
    np.testing.assert_allclose(pixels[0, 0], (-0.011255, -0.011196, -0.001333), atol=1e-6)
    means = pixels.mean((0, 1), np.float64)
    np.testing.assert_allclose(means, (-0.006777, -0.140670, 0.109675), atol=2e-4)
    crop = Processor(tokenizer, configured(image_fit="crop"))
    square = crop.square(image)
    assert tuple(square[0, 0]) == (48, 0, 29) and tuple(square[168, 168]) == (123, 102, 118)
    means = crop.pixels(image).mean((0, 1), np.float64)
    np.testing.assert_allclose(means, (-0.003955, -0.228649, 0.183516), atol=2e-4)


def test_a_blind_model_sees_one_image(source):
    blind = Processor(train_tokenizer(["a"], 100), configured(blind=True))
    assert np.array_equal(blind.pixels(source.images[0]), blind.pixels(source.images[1]))
    assert np.abs(blind.pixels(source.images[0])).max() < 0.02


def test_the_trained_tokenizer_loses_nothing(small, texts):
    for text in (*texts, "KOBA 12", "a zebra, is 7B there?", "42"):
        ids = small.encode(text, add_special_tokens=False)
        assert small.decode(ids) == text and small.unk_token_id not in ids


def test_words_are_tokens_and_strings_to_be_read_are_spelled(small):
    def tokens(text):
        return len(small.encode(text, add_special_tokens=False))

    assert tokens("what colour is the red circle?") == 7
    assert tokens("KOBA") == tokens("4821") == 4


def test_the_same_texts_in_any_order_train_the_same_tokenizer(small, texts, tmp_path):
    other = train_tokenizer(reversed(texts), 1000)
    assert other.get_vocab() == small.get_vocab()
    small.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in texts[:50]:
        assert loaded.encode(text, add_special_tokens=False) == small.encode(
            text, add_special_tokens=False
        )
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        small.bos_token_id,
        small.eos_token_id,
        small.pad_token_id,
    )


def test_tokenizer_errors_say_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="raise llm.vocab to"):
        train_tokenizer(["what is it?"], 20)
    with pytest.raises(FileNotFoundError, match="data.tokenizer"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


TURNS = (("what is it?", "a red 7"), ("and the red one?", "it is the A"))


@pytest.mark.parametrize("turns", [TURNS[:1], TURNS])
@pytest.mark.parametrize("image", [0, None])
def test_vicuna_ids_are_the_chunks_around_the_image(sentencepiece, turns, image):
    processor = Processor(sentencepiece, configured(text_length=400))
    row = processor.text(Example("x", image, turns, "f", "t"))
    said = [f"USER: {q} ASSISTANT: {a}</s>" for q, a in turns]
    body = "".join(said)
    chunks = (
        [SYSTEM + "USER: ", "\n" + body.removeprefix("USER: ")] if image == 0 else [SYSTEM + body]
    )
    expected, heads = [sentencepiece.bos_token_id], []
    for chunk in chunks:
        heads.append(len(expected))
        expected += sentencepiece.encode(chunk, add_special_tokens=False)
    assert list(row["ids"][: row["length"]]) == expected
    assert row["image_at"] == (heads[1] if image == 0 else 400)
    # What is supervised, read back as text, is every answer and its end.
    targets = row["ids"][row["loss_mask"]]
    read = sentencepiece.backend_tokenizer.id_to_token
    assert "".join(read(t) for t in targets) == "".join(f"▁{a}</s>" for _, a in turns).replace(
        " ", "▁"
    )


@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - {"chatml", "checkpoint"}))
def test_a_prompt_is_its_training_row_up_to_the_answer(sentencepiece, small, template):
    for tokenizer in (sentencepiece, small):
        processor = Processor(tokenizer, configured(template=template, text_length=400))
        example = Example("x", 0, TURNS, "f", "t")
        row, prompt = processor.text(example), processor.text(example, answer=False)
        assert row["image_at"] == prompt["image_at"] < prompt["length"]
        # vicuna: the token that carries the space before the answer is the answer's first.
        assert (row["ids"][: prompt["length"]] == prompt["ids"][: prompt["length"]]).all()
        after = row["loss_mask"][prompt["length"] : row["length"]]
        assert after.all() and len(after) > 0


def test_bare_rows_are_question_answer_end(small, source):
    processor = Processor(small, configured(template="bare"))
    for i in range(len(source)):
        row, ((question, answer),) = processor.text(source[i]), source[i].turns
        targets = row["ids"][row["loss_mask"]]
        assert small.decode(targets[:-1]) == answer and targets[-1] == small.eos_token_id
        prompt = row["ids"][: row["length"] - len(targets)]
        assert prompt[0] == small.bos_token_id and small.decode(prompt[1:]) == question
        assert row["image_at"] == 1
        asked = row["question"][: row["question_length"]]
        assert list(asked) == list(prompt[: processor.question_length])


def test_plain_keeps_only_the_image_and_the_caption(sentencepiece):
    processor = Processor(sentencepiece, configured(template="plain"))
    row = processor.text(Example("x", 0, (("describe it.", "the red A"),), "f", "t"))
    caption = sentencepiece.encode("the red A\n", add_special_tokens=False)
    assert list(row["ids"][: row["length"]]) == [sentencepiece.bos_token_id, *caption]
    assert row["image_at"] == 1 and list(row["loss_mask"][:2]) == [False, True]
    assert row["question_length"] == 1


LINES = (("what is it?\nthe A\nis it red?", "a red 7"),)
# What the LLM reads for QueCC, beside the begin-of-sequence token: the published text of each row,
# with the two published faults fixed (a cut row lost a character, ChatML showed the answer).
ASKED = {
    "the whole of a question of several lines": ("vicuna_v1", 0, LINES, LINES[0][0]),
    "only the first of several questions": ("vicuna_v1", 0, TURNS, TURNS[0][0]),
    "a stand-in where there is no image": ("vicuna_v1", None, TURNS, "image"),
    "nothing of a plain row": ("plain", 0, TURNS[:1], ""),
    "nothing but the question of a bare row": ("bare", 0, TURNS[:1], TURNS[0][0]),
}


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("template, image, turns, asked", ASKED.values(), ids=ASKED.keys())
def test_a_pass_of_its_own_reads(sentencepiece, template, image, turns, asked, answer):
    fields = dict(template=template, text_length=400, question_length=60)
    processor = Processor(sentencepiece, configured("separate", **fields))
    row = processor.text(Example("x", image, turns, "f", "t"), answer=answer)
    expected = sentencepiece.encode(asked, add_special_tokens=False) if asked else []
    found = row["question"][: row["question_length"]]
    assert list(found) == [sentencepiece.bos_token_id, *expected]


@given(
    template=st.sampled_from(["question_first", "vicuna_question_first"]),
    turns=st.lists(
        st.tuples(st.text("ab ?", max_size=90), st.text("cd", max_size=90)), min_size=1, max_size=3
    ),
    has_image=st.booleans(),
    question_length=st.integers(1, 250),
)
@settings(max_examples=40)
def test_a_prefix_is_the_text_before_the_image(
    sentencepiece, template, turns, has_image, question_length
):
    fields = dict(template=template, question_length=question_length, text_length=300)
    processor = Processor(sentencepiece, configured("prefix", **fields))
    example = Example("x", 0 if has_image else None, tuple(turns), "f", "t")
    row = processor.text(example)
    at, length, read = row["image_at"], row["length"], row["question_length"]
    # What the two passes have room for, and what they read: the row itself.
    assert read == (at if has_image else min(length, question_length)) <= question_length
    assert length - read <= 300 - question_length
    assert np.array_equal(row["question"][:read], row["ids"][:read])
    assert not row["loss_mask"][:read].any() or not has_image
    # A row that is not cut is the row that any other compressor reads.
    whole = Processor(sentencepiece, configured(**fields)).text(example)
    if not row["cut"]:
        assert all(
            np.array_equal(row[name], whole[name]) for name in ("ids", "loss_mask", "length")
        )
        assert row["image_at"] == whole["image_at"]
    elif has_image:
        assert at == question_length or length - at == 300 - question_length


@pytest.mark.parametrize("query", ["separate", "prefix"])
def test_a_question_beyond_the_limit_is_cut_and_counted_or_refused(small, query):
    fields = dict(template="question_first", text_length=40, question_length=12)
    processor = Processor(small, configured(query, **fields))
    asked = ("0123456789", "1"), ("01234567890", "1"), ("012345678901", "1")
    rows = [processor.text(Example("long", 0, (turn,), "f", "t")) for turn in asked]
    assert [bool(row["cut"]) for row in rows] == [False, False, True]
    assert [int(row["question_length"]) for row in rows] == [11, 12, 12]
    assert small.decode(rows[2]["question"][1:]) == asked[1][0]
    assert small.decode(rows[2]["ids"][rows[2]["loss_mask"]][:1]) == "1"
    with pytest.raises(ValueError, match="example long: .*13.*data.question_length"):
        processor.text(Example("long", 0, asked[2:], "f", "t"), answer=False)
    # Nobody reads the question of a row without an image, nor where the compressor has no use.
    assert not processor.text(Example("x", None, asked[2:], "f", "t"))["cut"]
    none = Processor(small, configured("none", **fields))
    assert not none.text(Example("x", 0, asked[2:], "f", "t"))["cut"]
    assert none.text(Example("x", 0, asked[2:], "f", "t"), answer=False)["length"] == 13


def test_what_follows_the_image_of_a_prefix_has_its_own_room(small):
    fields = dict(template="question_first", text_length=16, question_length=12)
    processor = Processor(small, configured("prefix", **fields))
    rows = [
        processor.text(Example("x", 0, (("7?", answer),), "f", "t")) for answer in ("KOB", "KOBA")
    ]
    assert [bool(row["cut"]) for row in rows] == [False, True]
    assert [int(row["length"] - row["image_at"]) for row in rows] == [4, 4]
    turns = (("7?", "KOBA"), ("8?", "KOBA"))
    with pytest.raises(
        ValueError, match="3 tokens before the image and 7 behind it.*leave 12 and 4"
    ):
        processor.text(Example("x", 0, turns, "f", "t"), answer=False)


@pytest.mark.parametrize("query, template", [("separate", "plain"), ("prefix", "question_first")])
def test_an_empty_question_is_the_first_token_or_refused(sentencepiece, query, template):
    config = configured(query, template=template)
    example = Example("silent", 0, (("", "the red A"),), "f", "t")
    row = Processor(sentencepiece, config).text(example)
    assert list(row["question"][: row["question_length"]]) == [sentencepiece.bos_token_id]
    mute = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece.backend_tokenizer, eos_token="</s>", unk_token="<unk>",
        add_bos_token=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="example silent: .*reads the question, which is empty"):
        Processor(mute, config).text(example)
    assert Processor(mute, configured("none", template=template)).text(example)["length"] > 0


def test_a_prefix_needs_a_question_before_the_image_and_room_behind(small):
    for template in ("bare", "vicuna_v1", "plain"):
        words = f"data.template='{template}' has none there: choose one of question_first, vicuna_q"
        with pytest.raises(ValueError, match=words):
            Processor(small, configured("prefix", template=template))
    with pytest.raises(ValueError, match="question_length=160 of data.text_length=160"):
        configured("prefix", template="question_first", question_length=160)
    # Other compressors have no question, whatever the field says.
    other = base.get_config()
    other.compressor.query = "prefix"
    assert Processor(small, RowFormat.of(other)).query == "none"


def test_long_rows_are_cut_and_long_prompts_refused(small):
    processor = Processor(small, configured(template="bare", text_length=8))
    row = processor.text(Example("long", 0, (("what is it?", "0123456789"),), "f", "t"))
    assert row["cut"] and row["length"] == 8 and row["loss_mask"].sum() > 0
    assert not processor.text(Example("short", 0, (("what is it?", "1"),), "f", "t"))["cut"]
    with pytest.raises(ValueError, match="long.*data.text_length is 8"):
        processor.text(Example("long", 0, (("0123456789", "1"),), "f", "t"), answer=False)


def test_unknown_choices_are_named(small):
    with pytest.raises(ValueError, match="llama_3.*vicuna_v1, plain, chatml, checkpoint, bare"):
        Processor(small, configured(template="llama_3"))
