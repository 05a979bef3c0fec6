# SPDX-License-Identifier: Apache-2.0
"""A check of a data set finds each planted fault once, calls it by its kind, and nothing else."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from real_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from vlm_jax.__main__ import main
from vlm_jax.data import findings
from vlm_jax.data.check import EverySkip, TextFormat, check
from vlm_jax.data.image_facts import ENORMOUS_PIXELS, image_facts
from vlm_jax.data.llava import Llava
from vlm_jax.data.pictures import Place, read_image
from vlm_jax.data.sources import BadExample
from vlm_jax.reports import lengths_figure


def picture(seed, size=(40, 30), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def row(name, image, question="<image>\nwhat is it?", answer="a cat"):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": said}


def clean(folder, rows=6):
    """Rows with pictures of their own in which nothing is wrong."""
    folder.mkdir(exist_ok=True)
    made = []
    for k in range(rows):
        picture(k).save(folder / f"{k}.jpg")
        made.append(row(f"r{k}", f"{k}.jpg", answer=f"cat {k}"))
    return made


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20).save(path, exif=exif)


def film(path):
    picture(21).convert("P").save(
        path, save_all=True, append_images=[picture(22).convert("P")], format="GIF"
    )


def cut_short(path):
    file = io.BytesIO()
    picture(23, (90, 80)).save(file, "JPEG")
    path.write_bytes(file.getvalue()[:-400])


# Kind -> name of the file, and how it is made.
IMAGES = {
    "corrupt_image": ("x.jpg", cut_short),
    "wrongly_named": ("x.jpg", lambda path: picture(24).convert("P").save(path, format="GIF")),
    "animated": ("x.gif", film),
    "gray": ("x.jpg", lambda path: picture(25, mode="L").save(path)),
    "cmyk": ("x.jpg", lambda path: picture(26, mode="CMYK").save(path)),
    "alpha": ("x.png", lambda path: picture(27, mode="RGBA").save(path)),
    "sixteen_bit": (
        "x.png",
        lambda path: Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(path),
    ),
    "exif_rotated": ("x.jpg", turned),
    "enormous_image": (
        "x.png",
        lambda path: Image.new("1", (8000, ENORMOUS_PIXELS // 8000 + 1)).save(path),
    ),
    "duplicate_image": ("x.jpg", lambda path: shutil.copy(path.with_name("0.jpg"), path)),
}
# Kind -> the row that has the fault.
ROWS = {
    "missing_image": row("bad", "gone.jpg"),
    "conversations": {"id": "bad", "image": "0.jpg"},
    "image": row("bad", 7),
    "image_mark": row("bad", "0.jpg", question="what is it?"),
    "empty_answer": row("bad", "0.jpg", answer=" "),
    "text": row("bad", "0.jpg", answer="\ud800"),
    "row": ["bad"],
    "duplicate_row": row("again", "0.jpg", answer="cat 0"),
    "renamed_image": row("other", "1.png", answer="of another suffix"),
    "repeated_id": row("r0", "1.jpg", answer="of the same id"),
    "empty_question": row("none", "1.jpg", question="<image>"),
    "missing_id": {key: v for key, v in row("", "1.jpg", answer="no id").items() if key != "id"},
    "leading_answer": {
        "id": "late",
        "image": "1.jpg",
        "conversations": [{"from": "gpt", "value": "hi"}, *row("", "")["conversations"]],
    },
}


def written(folder, rows):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def checked(path, *, jobs=1, whole=True, **texts):
    source = Llava(
        str(path), "train", images=str(path.parent), text_only=True, images_per_row=99, skip=True,
        left_out=EverySkip(), may_be_empty=True,
    )  # fmt: skip
    return check(source, TextFormat(**texts), jobs=jobs, whole=whole)


def kinds(report):
    return {kind for kind, count in report.counts.items() if count}


def test_nothing_is_found_in_clean_data(tmp_path):
    report = checked(written(tmp_path, clean(tmp_path)))
    assert not kinds(report) and not report.failing(strict=True)
    found = report.fields()
    assert (found["rows"], found["usable_rows"], found["image_files"]) == (6, 6, 6)
    assert found["image_formats"] == {"JPEG": 6} and found["width"]["max"] == 40
    assert sum(found["text"]["counts"]) == 6 == found["text"]["n"]


@pytest.mark.parametrize("kind", IMAGES)
def test_each_kind_of_image_is_found_by_name(kind, tmp_path):
    rows = clean(tmp_path)
    name, make = IMAGES[kind]
    make(tmp_path / name)
    report = checked(written(tmp_path, [*rows, row("odd", name, answer="odd")]))
    grays = {"sixteen_bit", "enormous_image"}  # made of gray pixels here
    assert kinds(report) - ({"gray"} if kind in grays else set()) == {kind}
    assert report.counts[kind] == 1 and name in str(report.fields()["first"][kind])


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_row_is_found(kind, tmp_path):
    report = checked(written(tmp_path, [*clean(tmp_path), ROWS[kind]]))
    without_id = {"missing_id"} if kind == "row" else set()
    assert kinds(report) == {kind} | without_id and report.counts[kind] == 1
    bad = kind in findings.ROW_FINDINGS
    assert report.about["usable_rows"] == 7 - bad and report.about["rows"] == 7


def test_lines_of_json_have_faults_of_their_own(tmp_path):
    lines = [json.dumps(r) for r in clean(tmp_path)] + ['{"id": "cut", ', '{"id": 1, "id": 2}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    assert kinds(checked(path)) == {"json", "repeated_key", "missing_id"}


def test_a_file_without_a_good_row_is_counted_not_refused(tmp_path):
    (tmp_path / "x").mkdir()
    report = checked(written(tmp_path, [ROWS["missing_image"]] * 3))
    assert report.counts["missing_image"] == 3 and report.about["missing_files"] == 1
    assert report.fields()["text"]["max"] is None and "missing_image" in findings.table(
        report.fields()
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_an_image_is_unreadable_exactly_where_training_cannot_read_it(kind, tmp_path):
    file = io.BytesIO()
    picture(3, (64, 48)).save(file, kind)
    data, path = file.getvalue(), tmp_path / "x"
    for keep in np.linspace(0, len(data), 25).astype(int):
        path.write_bytes(data[:keep])
        try:
            read_image(str(path), "")
            readable = True
        except BadExample:
            readable = False
        assert (not image_facts(Place(str(path))).problem) == readable, keep
        place = Place(str(path), 0, int(keep))
        assert (not image_facts(place).problem) == readable, keep
    path.write_bytes(b"before" + data + b"after")
    inside = read_image(Place(str(path), 6, len(data)), "")
    assert np.array_equal(inside, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    with pytest.raises(BadExample, match="cut short: 11 of its 99 bytes"):
        read_image(Place(str(path), len(data), 99), "")


def test_a_png_with_a_large_text_is_readable(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("much", "x" * 3_000_000, zip=True)
    picture(1).save(tmp_path / "x.png", pnginfo=texts)
    assert not image_facts(Place(f"{tmp_path}/x.png")).problem


def test_more_processes_find_the_same(tmp_path):
    rows = [*clean(tmp_path, 5), *ROWS.values()]
    for number, (kind, (name, make)) in enumerate(IMAGES.items()):
        if kind != "enormous_image":
            named = f"{number}-{name}"
            make(tmp_path / named) if kind != "duplicate_image" else None
            rows.append(row(f"i{number}", named, answer=f"odd {number}"))
    path = written(tmp_path, rows)
    one, two = checked(path, jobs=1), checked(path, jobs=2)
    assert one.fields() == two.fields() and one.found == two.found
    headers = checked(path, whole=False).fields()
    assert headers["set_hash"] is None and headers["findings"]["corrupt_image"] == 0


def test_the_hash_of_the_set_is_of_rows_and_images(tmp_path):
    path = written(tmp_path, clean(tmp_path))
    before = checked(path).about["set_hash"]
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    assert checked(moved / "rows.json").about["set_hash"] == before
    picture(99).save(moved / "3.jpg")
    after = checked(moved / "rows.json")
    assert after.about["set_hash"] != before
    assert after.about["rows_sha256"] == checked(path).about["rows_sha256"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = byte_level(["<|end|>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return str(folder)


def test_long_rows_are_found_by_the_tokens_of_the_training(tokenizer, tmp_path):
    rows = clean(tmp_path)
    rows[0]["conversations"][1]["value"] = "small " * 500
    rows[1]["conversations"][0]["value"] = "<image>\n" + "small " * 500
    report = checked(written(tmp_path, rows), tokenizer=tokenizer, text_length=400)
    assert kinds(report) == {"over_long", "without_target"}
    assert (report.counts["over_long"], report.counts["without_target"]) == (2, 1)
    processor = TextFormat(tokenizer, text_length=400).processor()
    source = Llava(str(tmp_path / "rows.json"), "train", images=str(tmp_path))
    lengths = [len(processor.tokens(source[k], answer=True).ids) for k in range(6)]
    assert report.lengths.tolist() == lengths
    assert report.fields()["text"]["unit"] == "tokens" and sum(report.histogram()) == 6


def verb(capsys, *argv):
    code = main(["data", "check", *map(str, argv), "--jobs=1"])
    printed = capsys.readouterr()
    return code, (json.loads(printed.out) if printed.out else None), printed.err


def test_the_verb_tells_scripts_by_its_exit_status(tmp_path, capsys):
    rows = clean(tmp_path)
    code, found, told = verb(capsys, written(tmp_path, rows))
    assert (code, found["clean"], found["failing"]) == (0, True, [])
    picture(9, mode="L").save(tmp_path / "gray.jpg")
    path = written(tmp_path, [*rows, row("g", "gray.jpg", answer="gray")])
    assert verb(capsys, path)[0] == 0
    code, found, _ = verb(capsys, path, "--strict")
    assert (code, found["failing"]) == (1, ["gray"])
    path = written(tmp_path, [*rows, ROWS["missing_image"]])
    code, found, told = verb(capsys, path)
    assert (code, found["failing"]) == (1, ["missing_image"]) and "gone.jpg" in told
    assert verb(capsys, path, "--allow=missing_image,gray")[0] == 0


@pytest.mark.parametrize("argv, said", [
    (["gone.json"], "no such file: gone.json"),
    (["."], "this folder has no file named *.tar"),
    (["x.tar", "--images=."], "the images of x.tar are inside it"),
    (["rows.json", "--images=gone"], "--images=gone: no such folder"),
    (["rows.json", "--allow=colour"], "--allow=colour: choose of missing_image"),
    (["rows.json", "--tokenizer=gone"], "no tokenizer folder gone"),
    (["rows.json", "--jobs=0"], "give a whole number from 1"),
    (["empty.json"], "empty.json is empty"),
    (["none.json"], "none.json holds no rows"),
    (["rows.json", "--template=plain"], "give --tokenizer too"),
    (["rows.json", "--text-length=9"], "give --tokenizer too"),
    (["rows.json", "--jobs=1", "--out=rows.json"], "rows.json"),
])  # fmt: skip
def test_what_cannot_be_checked_is_one_line_and_status_2(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, clean(tmp_path))
    (tmp_path / "empty.json").write_text(" ")
    (tmp_path / "none.json").write_text("[]")
    try:
        code = main(["data", "check", *argv])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and said in printed.err and not printed.out


def test_the_folder_has_everything_that_was_found(tmp_path, capsys):
    path = written(tmp_path, [*clean(tmp_path), *[ROWS["missing_image"]] * 5])
    _, found, _ = verb(capsys, path, f"--out={tmp_path}/out")
    assert json.loads((tmp_path / "out/check.json").read_text()) == found
    lines = [json.loads(x) for x in (tmp_path / "out/found.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("missing_image") == 5
    assert len(found["first"]["missing_image"]) == findings.SHOWN
    with Image.open(tmp_path / "out/lengths.png") as drawn:
        assert min(drawn.size) > 300


def test_the_figure_has_a_bar_for_each_bin_up_to_the_limit(tmp_path):
    figure = lengths_figure.draw([0, 10, 20, 40], [3, 0, 0, 0], tmp_path, unit="tokens", limit=20)
    lines = figure.csv.read_text().splitlines()
    assert len([line for line in lines if ",bar," in line]) == 3
    assert any("kept" in line for line in lines)
