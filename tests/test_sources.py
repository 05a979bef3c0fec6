# SPDX-License-Identifier: Apache-2.0
"""Sources: what a file says is what an example says, wherever the file lies."""

import itertools
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from configs import base
from vlm_jax.data import nlvr
from vlm_jax.data.sources import SOURCES, Origin, open_source


def configured(source, **fields):
    config = base.get_config()
    config.data.source = source
    with config.unlocked():
        config.data.update(fields)
    return Origin.of(config)


def said(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


@pytest.fixture
def llava(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (6, 4), "red").save(tmp_path / "images" / "a" / "one.png")
    Image.new("RGB", (5, 5), "blue").save(tmp_path / "images" / "two.jpg")
    rows = [
        {"id": "1", "image": "a/one.png", "conversations": said("<image>\nwhat is it?", "red")},
        {
            "id": "2",
            "image": "two.jpg",
            "conversations": said("what is\n<image>", " blue ", "and its shape?", "square"),
        },
        {"id": 3, "image": "a/one.png", "conversations": said("<image> again?", "yes")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return configured("llava", path=str(tmp_path / "rows.json"), images=str(tmp_path / "images"))


def test_llava_rows_become_turns_without_the_image_mark(llava):
    source = open_source(llava, "train")
    assert [source[i].turns for i in range(3)] == [
        (("what is it?", "red"),),
        (("what is", "blue"), ("and its shape?", "square")),
        (("again?", "yes"),),
    ]
    assert [source[i].id for i in range(3)] == ["1", "2", "3"]
    # One image file is one image, however many rows speak of it.
    assert [source[i].image for i in range(3)] == [0, 1, 0] and len(source.images) == 2
    assert source.images[0].shape == (4, 6, 3) and tuple(source.images[0][0, 0]) == (255, 0, 0)
    described = source.describe()
    assert (described["examples"], described["images"], described["left_out"]) == (3, 2, {})


def test_the_data_hash_follows_the_rows(llava, tmp_path):
    before = open_source(llava, "train").data_hash
    assert open_source(llava, "train").data_hash == before
    path = tmp_path / "rows.json"
    path.write_text(path.read_text().replace("square", "round"))
    assert open_source(llava, "train").data_hash != before


def test_llava_splits_are_files(llava, tmp_path):
    with pytest.raises(ValueError, match="'val'.*{split}"):
        open_source(llava, "val")
    (tmp_path / "val.json").write_text((tmp_path / "rows.json").read_text())
    llava = replace(llava, path=str(tmp_path / "{split}.json"))
    assert len(open_source(llava, "val")) == 3


def test_synthetic_splits_have_the_configured_sizes():
    config = configured("synthetic", train_images=7, val_images=3, test_images=4)
    sizes = [len(open_source(config, split).images) for split in ("train", "val", "test")]
    assert sizes == [7, 3, 4]
    config = replace(config, seed=1)
    assert (
        open_source(config, "val").data_hash
        != open_source(configured("synthetic", val_images=3), "val").data_hash
    )


# Three boxes that differ: one shape each, of another kind, color and size.
BOXES = [
    [{"type": "square", "color": "Yellow", "size": 30, "x_loc": 10, "y_loc": 20}],
    [{"type": "circle", "color": "Black", "size": 20, "x_loc": 60, "y_loc": 70}],
    [{"type": "triangle", "color": "#0099ff", "size": 30, "x_loc": 40, "y_loc": 5}],
]


def published_image(order):
    """An image as NLVR draws it: 400 x 100, gray bars between the boxes, RGBA."""
    image = Image.new("RGBA", (400, 100), (128, 128, 128, 255))
    canvas = ImageDraw.Draw(image)
    for left, k in zip((0, 150, 300), order, strict=True):
        canvas.rectangle((left, 0, left + 99, 99), fill=(211, 211, 211, 255))
        for s in BOXES[k]:
            x, y, end = left + s["x_loc"], s["y_loc"], s["size"] - 1
            fill = {"Yellow": (255, 255, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}[
                s["color"]
            ]
            if s["type"] == "square":
                canvas.rectangle((x, y, x + end, y + end), fill=fill)
            elif s["type"] == "circle":
                canvas.ellipse((x, y, x + end, y + end), fill=fill)
            else:
                canvas.polygon([(x, y + end), (x + end, y + end), (x + end / 2, y)], fill=fill)
    return image


@pytest.fixture(scope="module")
def nlvr_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("nlvr")
    for split, label in (("dev", "true"), ("test", "false")):
        images = root / split / "images" / "3"
        images.mkdir(parents=True)
        row = {
            "sentence": f"{split} has a circle",
            "label": label,
            "identifier": "12-3",
            "directory": "3",
            "evals": {},
            "structured_rep": BOXES,
        }
        (root / split / f"{split}.json").write_text(json.dumps(row) + "\n")
        for k, order in enumerate(itertools.permutations(range(3))):
            published_image(order).save(images / f"{split}-12-3-{k}.png")
    return root


def test_nlvr_keeps_the_orders_of_a_sentence_together(nlvr_folder):
    train, val, test = (
        open_source(configured("nlvr", path=str(nlvr_folder)), split)
        for split in ("train", "val", "test")
    )
    assert [train[i].id for i in range(6)] == [f"12-3-{k}" for k in range(6)] and len(train) == 6
    assert {train[i].turns for i in range(6)} == {(("test has a circle", "false"),)}
    assert {val[i].turns for i in range(6)} == {(("dev has a circle", "true"),)}
    assert val.data_hash == test.data_hash != train.data_hash
    assert val.describe()["file"] == "dev" and train.describe()["labels"] == {"false": 6}


def test_nlvr_labels_lie_where_the_image_shows_the_shapes(nlvr_folder):
    source = open_source(configured("nlvr", path=str(nlvr_folder)), "val")
    colors = np.array([(0, 0, 0), (255, 255, 0), (0, 153, 255)])  # by nlvr.COLORS
    for i in range(6):
        image = source.images[i]
        assert image.shape == (200, 200, 3) and (image[100:, 100:] == 128).all()
        tiles = image.reshape(20, 10, 20, 10, 3).swapaxes(1, 2).reshape(400, 100, 3)
        for label, tile in zip(source.patch_labels(i, 20), tiles, strict=True):
            shown = (np.abs(tile[:, None].astype(int) - colors).max(-1) < 9).mean(0)
            if label:
                assert shown.argmax() == (label - 1) // len(nlvr.SIZES) % 3 and shown.max() > 0.1
            else:
                assert shown.max() < 0.2
        classes = set(source.patch_labels(i, 20)) - {0}
        assert len(classes) == 3 and max(classes) < source.patch_classes
    # A grid that does not tile the picture is labeled all the same.
    assert source.patch_labels(0, 12).shape == (144,)


def test_nlvr_is_read_from_tar_files_unpacked_or_not(nlvr_folder, tmp_path):
    with tarfile.open(tmp_path / "dev.tar", "w") as archive:
        archive.add(nlvr_folder / "dev", "dev")
    packed = open_source(configured("nlvr", path=str(tmp_path)), "val")
    plain = open_source(configured("nlvr", path=str(nlvr_folder)), "val")
    assert packed.data_hash == plain.data_hash
    for i in range(6):
        assert packed[i] == plain[i] and np.array_equal(packed.images[i], plain.images[i])


def test_missing_or_broken_nlvr_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dev.tar.*data.path"):
        open_source(configured("nlvr", path=str(tmp_path)), "val")
    (tmp_path / "dev.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="dev.tar is not an uncompressed tar"):
        open_source(configured("nlvr", path=str(tmp_path)), "val")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test.json").write_text('{"sentence": "cut sh')
    with pytest.raises(ValueError, match="test.json, line 1"):
        open_source(configured("nlvr", path=str(tmp_path)), "train")


def test_nlvr_rows_of_one_identifier_are_all_there(nlvr_folder, tmp_path, caplog):
    (tmp_path / "dev").mkdir()
    line = (nlvr_folder / "dev" / "dev.json").read_text()
    (tmp_path / "dev" / "dev.json").write_text(line + line.replace("has a", "has no") + line)
    source = open_source(configured("nlvr", path=str(tmp_path)), "val")
    kept = [source[i] for i in range(0, 18, 6)]
    assert [e.id for e in kept] == ["12-3-0", "12-3#2-0", "12-3#3-0"]
    assert [e.given for e in kept] == ["", "12-3-0", "12-3-0"]
    assert {e.cluster for e in kept} == {"12"} and "2 rows have the identifier" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        dict(sentence="half \ud800"),
        dict(identifier=12),
        dict(label="maybe"),
        dict(structured_rep=[[], []]),
        dict(structured_rep=[[{"type": "star"}], [], []]),
    ],
)
def test_an_nlvr_row_that_is_none_is_refused_by_its_line(changed, nlvr_folder, tmp_path):
    (tmp_path / "dev").mkdir()
    line = (nlvr_folder / "dev" / "dev.json").read_text()
    (tmp_path / "dev" / "dev.json").write_text(line + json.dumps(json.loads(line) | changed))
    with pytest.raises(ValueError, match="dev.json, line 2: "):
        open_source(configured("nlvr", path=str(tmp_path)), "val")


def test_a_split_without_examples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="val split of data.source='synthetic'.*data.val_images"):
        open_source(configured("synthetic", val_images=0), "val")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "dev.json").touch()
    with pytest.raises(ValueError, match="dev.json is empty"):
        open_source(configured("nlvr", path=str(tmp_path)), "val")


def test_an_unknown_source_is_named():
    with pytest.raises(ValueError, match="'imagenet'.*" + ", ".join(SOURCES)):
        open_source(configured("imagenet"), "train")
    with pytest.raises(ValueError, match="'ignore'.*fail or skip"):
        open_source(configured("synthetic", on_bad_example="ignore"), "train")
