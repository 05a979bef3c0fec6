# SPDX-License-Identifier: Apache-2.0
"""Several images in a row: each at its mark, found, counted, padded, and nothing else moves."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image
from test_templates import LLAVA, QWEN, processor, tokenizer
from transformers import CLIPImageProcessorPil, LlavaProcessor

from configs import demo
from vlm_jax.data.example import BadExample, Example
from vlm_jax.data.loader import Batches, evaluation_batches
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin, open_source
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.training.cells import cells_of
from vlm_jax.training.workdir import digest

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
# Questions as they are written -> the text of the row as LLaVA would cut it at its marks.
WRITTEN = {
    "two in a row": (
        (("<image>\n<image>\nsame?", "no"),),
        SYSTEM + "USER: <image>\n<image>\nsame? ASSISTANT: no</s>",
    ),
    "inside a sentence": (
        (("is <image> like <image>?", "no"),),
        SYSTEM + "USER: is <image> like <image>? ASSISTANT: no</s>",
    ),
    "one in each of two turns": (
        (("what is it? <image>", "red"), ("and <image>", "blue")),
        SYSTEM + "USER: <image>\nwhat is it? ASSISTANT: red</s>"
        "USER: <image>\nand ASSISTANT: blue</s>",
    ),
    "the first turn without": (
        (("hello", "hi"), ("<image><image> same?", "no")),
        SYSTEM + "USER: hello ASSISTANT: hi</s>USER: <image><image> same? ASSISTANT: no</s>",
    ),
    "no marks": (
        (("same?", "no"), ("sure?", "yes")),
        SYSTEM + "USER: <image>\n<image>\nsame? ASSISTANT: no</s>"
        "USER: sure? ASSISTANT: yes</s>",
    ),
}  # fmt: skip


def vicuna(words, **changes):
    return processor(words, "vicuna_v1", **changes)


def words():
    made = tokenizer(bos="<s>")
    made.add_special_tokens({"eos_token": "</s>"})
    made.add_bos_token = True
    return made


@pytest.mark.parametrize("turns, text", WRITTEN.values(), ids=WRITTEN)
def test_the_ids_are_the_chunks_between_the_images(turns, text):
    made = words()
    row = vicuna(made).tokens(Example("x", (0, 1), turns, "f", "t"), answer=True)
    ids, places = [made.bos_token_id], []
    for k, chunk in enumerate(text.split("<image>")):
        places += [len(ids)] * (k > 0)
        ids += made.encode(chunk, add_special_tokens=False)
    assert row.ids == ids and row.places == tuple(places)
    said = [i for i, kept in zip(row.ids, row.mask, strict=True) if kept]
    assert made.decode(said) == "".join(f" {answer}</s>" for _, answer in turns)


def test_an_image_of_a_later_turn_stands_in_that_turn():
    made = words()
    turns = (("hello", "hi"), ("what is <image>?", "red"))
    row = vicuna(made).tokens(Example("x", 0, turns, "f", "t"), answer=True)
    assert made.decode(row.ids[: row.image_at]).endswith("hello ASSISTANT: hi</s>USER: ")
    assert made.decode(row.ids[row.image_at :]) == "\nwhat is ? ASSISTANT: red</s>"


def test_each_image_is_compressed_by_the_question_of_its_turn():
    made, fields = words(), dict(compressor=dict(kind="quecc", query="separate"))
    turns = (("<image> is <image>?", "a"), ("b?", "c"), ("and <image>", "d"))
    row = vicuna(made, **fields).tokens(Example("x", (4, 2, 4), turns, "f", "t"), answer=False)
    assert [made.decode(q[1:]) for q in row.questions] == ["is ?", "is ?", "and"]


@pytest.mark.parametrize("turns", [
    (("<image> <image> same?", "no"), ("sure?", "yes")),
    (("hello", "hi"), ("<image> or <image>", "no")),
    (("<image>\nfirst?", "a"), ("<image>\nsecond?", "b")),
], ids=str)  # fmt: skip
def test_a_checkpoints_own_template_gives_the_ids_of_transformers(turns):
    own = tokenizer(template=LLAVA, bos="<s>", image=True)
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48), own, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA,
    )  # fmt: skip
    picture, talk = Image.new("RGB", (60, 40), "red"), []
    for question, reply in turns:
        # One mark alone goes to the front of its turn.
        pieces = question.split("<image>")
        pieces = ["", "".join(pieces).strip()] if len(pieces) == 2 else pieces
        content = []
        for k, piece in enumerate(pieces):
            content += [{"type": "image", "image": picture}] * (k > 0)
            content += [{"type": "text", "text": piece}] * bool(piece)
        talk += [{"role": "user", "content": content}]
        talk += [{"role": "assistant", "content": [{"type": "text", "text": reply}]}]
    whole = theirs.apply_chat_template(
        talk[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )["input_ids"][0]
    row = processor(own, "checkpoint").tokens(Example("x", (0, 1), turns, "f", "t"), answer=False)
    spliced = list(row.ids)
    for place in reversed(row.places):
        spliced[place:place] = [own.convert_tokens_to_ids("<image>")] * 9
    assert [i for i in spliced if i != own.bos_token_id] == list(whole)


def test_a_template_of_text_gets_its_marks_in_the_text():
    own = tokenizer(template=QWEN)
    turns = (("<image> or <image>?", "no"),)
    row = processor(own, "checkpoint").tokens(Example("x", (0, 1), turns, "f", "t"), answer=True)
    assert row == processor(own, "chatml").tokens(
        Example("x", (0, 1), turns, "f", "t"), answer=True
    )


def test_every_image_of_a_caption_is_kept_though_its_question_is_dropped():
    made = words()
    for question in ("<image> <image> describe", "describe"):
        row = processor(made, "plain").tokens(
            Example("x", (0, 1), ((question, "two cats"),), "f", "t"), answer=True
        )
        assert row.places == (1, 1) and made.decode(row.ids[1:]) == "two cats\n"


# --- Rows of fixed shape --------------------------------------------------------------------------


def said(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


@pytest.fixture
def rows():
    return [
        {"id": "one", "image": "0.png", "conversations": said("<image>\nwhat is it?", "red")},
        {"id": "two", "image": ["0.png", "1.png"],
         "conversations": said("<image> or <image>?", "no")},
        {"id": "none", "conversations": said("hello?", "hi")},
        {"id": "later", "image": ["2.png"],
         "conversations": said("hello?", "hi", "<image>?", "no")},
        {"id": "turns", "image": ["2.png", "0.png"],
         "conversations": said("<image>\nwhat?", "a", "<image>\nand?", "b")},
    ]  # fmt: skip


@pytest.fixture
def opened(tmp_path, rows):
    for k in range(3):
        Image.new("RGB", (10, 8), (80 * k, 0, 9)).save(tmp_path / f"{k}.png")

    def open_(rows=rows, **data):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        fields = dict(
            source="llava", path=str(tmp_path / "rows.json"), images=str(tmp_path), text_only=True,
            template="bare", text_length=24, question_length=8, images_per_row=2,
        )  # fmt: skip
        c = tiny.config(data=fields | data, vit=dict(image_size=16))
        words = train_tokenizer(["what is it?", "red or blue?"], 200)
        return open_source(Origin.of(c), "train"), Processor(words, RowFormat.of(c))

    return open_


def test_the_rows_of_a_file_keep_their_images_in_the_order_of_their_marks(opened):
    source, _ = opened()
    assert [source[i].images for i in range(5)] == [(0,), (0, 1), (), (2,), (2, 0)]
    assert source[0].turns == (("what is it?", "red"),)
    assert source[3].turns == (("hello?", "hi"), ("<image>?", "no"))
    assert len(source.images) == 3 and source.describe()["left_out"] == {}


FAULTS = {
    "more images than data.images_per_row": (
        dict(image=["0.png"] * 3, conversations=said("<image><image><image>", "a")),
        "3 images, and data.images_per_row=2: raise that to 3",
    ),
    "more marks than images": (
        dict(image=["0.png"], conversations=said("<image><image>", "a")),
        "2 times <image> in its questions, and `image` names 1",
    ),
    "fewer marks than images": (
        dict(image=["0.png", "1.png"], conversations=said("<image> a?", "a")),
        "1 times <image> in its questions, and `image` names 2",
    ),
    "a mark in an answer": (
        dict(image=["0.png", "1.png"], conversations=said("<image> a?", "<image>")),
        "<image> in turn 2 .gpt.: it belongs in a question",
    ),
    "a missing second image": (
        dict(image=["0.png", "gone.png"], conversations=said("<image> <image>", "a")),
        "no image .*gone.png",
    ),
}


@pytest.mark.parametrize("changed, message", FAULTS.values(), ids=FAULTS)
def test_a_row_with_a_wrong_number_of_images_is_named_or_counted(opened, rows, changed, message):
    broken = [*rows, {"id": "bad", **changed}]
    with pytest.raises(BadExample, match=f"(?s)row 5 .*bad.*{message}"):
        opened(broken)
    source, _ = opened(broken, on_bad_example="skip")
    assert sum(source.describe()["left_out"].values()) == 1 and len(source) == 5


@pytest.mark.parametrize("cached", [True, False])
def test_absent_images_are_padding_and_the_rest_is_the_batch_of_one_image(opened, rows, cached):
    alone = [rows[0], rows[2], rows[3]]
    table = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f4") if cached else None
    one, two = (
        next(iter(evaluation_batches(*opened(alone, images_per_row=m), batch=4, answer=True,
                                     features=table)))
        for m in (1, 2)
    )  # fmt: skip
    assert one.keys() == two.keys()
    for name, values in one.items():
        padded = two[name]
        if name in ("image_at", "question", "question_length", "pixels", "levels"):
            assert padded.shape == (4, 2, *values.shape[1:])
            padded = padded[:, 0]
        np.testing.assert_array_equal(padded, values, err_msg=name)
    assert list(two["image_at"][:, 1]) == [24] * 4
    images = two["levels" if cached else "pixels"]
    assert not images[:, 1].any() and images[2, 0].any() and not images[1].any()


def test_a_batch_holds_each_image_of_a_row_at_its_place(opened, monkeypatch):
    source, made = opened()
    for bytes_of_table in (1 << 28, 0):
        monkeypatch.setattr("vlm_jax.data.texts.TABLE_BYTES", bytes_of_table)
        batch = Batches(source, made, batch=5, seed=0).at(0)
        for row, index in enumerate(batch["index"]):
            example = source[int(index)]
            tokens = made.tokens(example, answer=True)
            assert tuple(batch["image_at"][row][: len(tokens.places)]) == tokens.places
            for k, image in enumerate(example.images):
                expected = made.pixels(source.images[image])
                np.testing.assert_array_equal(batch["pixels"][row, k], expected)


def test_one_unreadable_image_makes_the_row_bad(opened, tmp_path):
    source, made = opened(on_bad_example="skip")
    (tmp_path / "1.png").write_bytes(b"no picture")
    batch = next(iter(evaluation_batches(source, made, batch=5, skip=True)))
    assert list(batch["valid"]) == [True, False, True, True, True]
    with pytest.raises(BadExample, match="1.png"):
        next(iter(evaluation_batches(source, made, batch=5)))


def test_a_row_that_is_cut_loses_the_images_of_what_it_loses(opened):
    turns = (("<image>\nwhat is it?", "red " * 20), ("<image>\nand?", "blue"))
    _, made = opened()
    row = made.text(Example("x", (0, 1), turns, "f", "t"))
    assert row["cut"] and row["image_at"][0] == 1 and row["image_at"][1] == 24
    with pytest.raises(ValueError, match="data.text_length is 24"):
        made.text(Example("x", (0, 1), turns, "f", "t"), answer=False)


def test_an_image_that_nothing_follows_is_refused_where_its_place_means_none(opened, rows):
    # A place of text_length says that there is no image.
    for template, refused in (("question_first", True), ("bare", False)):
        _, made = opened(rows[:1], template=template, images_per_row=1, question_length=24)
        length = len(made.tokens(Example("x", 0, (("?", ""),), "f", "t"), answer=False).ids)
        for more in (23 - length, 24 - length):
            example = Example("x", 0, (("?" * (1 + more), ""),), "f", "t")
            if refused and more == 24 - length:
                with pytest.raises(ValueError, match="nothing follows its image"):
                    made.text(example, answer=False)
            else:
                assert made.text(example, answer=False)["image_at"] < 24


def test_more_images_than_a_row_has_room_for_are_refused(opened):
    _, made = opened()
    with pytest.raises(ValueError, match="x has 3 images, data.images_per_row=2"):
        made.text(Example("x", (0, 1, 2), (("a", "b"),), "f", "t"))
    with pytest.raises(ValueError, match="data.images_per_row=0: at least 1"):
        opened(images_per_row=0)
    with pytest.raises(ValueError, match="images_per_row=2 goes with compressor.query='separate'"):
        RowFormat.of(tiny.config(data=dict(images_per_row=2, template="question_first"),
                                 compressor=dict(kind="quecc", query="prefix")))  # fmt: skip


def test_a_grid_of_rows_with_several_images_is_refused_as_its_law_is_of_one():
    with pytest.raises(ValueError, match="images_per_row=2.*one image in a request"):
        cells_of(tiny.config(data=dict(images_per_row=2)))


def test_a_field_that_came_later_leaves_the_digests_of_published_rows_alone():
    lines = open(f"{tiny.ROOT}/docs/results/demo/rows.jsonl").read().splitlines()
    kept = {row["cell"]: row["config_hash"] for row in map(json.loads, lines)}
    cells = cells_of(demo.get_config())
    assert {cell.name: digest(cell.config) for cell in cells} == kept
    other = cells[0].config
    other.data.images_per_row = 2
    assert digest(other) != kept[cells[0].name]
