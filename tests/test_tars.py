# SPDX-License-Identifier: Apache-2.0
"""Tars give the examples of the file that they were made from, and name each bad sample."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax.__main__ import main
from vlm_jax.data.llava import Llava
from vlm_jax.data.sources import BadExample, Origin, open_source
from vlm_jax.data.tars import Tars, expanded


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def said(question="<image>\nwhat is it?", answer="a cat"):
    return {"conversations": [{"from": "human", "value": question},
                              {"from": "gpt", "value": answer}]}  # fmt: skip


def tar(path, members):
    """A tar of name -> bytes, text or a JSON value."""
    with tarfile.open(path, "w") as made:
        for name, content in members.items():
            if not isinstance(content, (bytes, str)):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return str(path)


def shards(folder, *, rows=7, each=3):
    """The same rows as tars and as a LLaVA file with its images."""
    in_file = []
    for first in range(0, rows, each):
        members = {}
        for k in range(first, min(first + each, rows)):
            (folder / f"{k}.png").write_bytes(png(k))
            members[f"d/{k:03d}.png"] = png(k)
            members[f"d/{k:03d}.json"] = {"id": f"r{k}"} | said(answer=f"cat {k}")
            in_file.append({"id": f"r{k}", "image": f"{k}.png"} | said(answer=f"cat {k}"))
        tar(folder / f"train-{first // each:02d}.tar", members)
    (folder / "rows.json").write_text(json.dumps(in_file))
    return in_file


def test_tars_hold_what_the_file_holds(tmp_path):
    shards(tmp_path)
    file = Llava(f"{tmp_path}/rows.json", "train", images=str(tmp_path))
    for path in (tmp_path, f"{tmp_path}/train-{{00..02}}.tar", f"{tmp_path}/train-*.tar",
                 f"{tmp_path}/{{split}}-{{00..02}}.tar"):  # fmt: skip
        source = Tars(str(path), "train")
        assert len(source) == len(file) == 7
        for k in range(7):
            ours, theirs = source[k], file[k]
            assert (ours.id, ours.turns, ours.image) == (theirs.id, theirs.turns, theirs.image)
            assert np.array_equal(source.images[k], file.images[k])
        assert source.describe()["shards"] == 3 and not source.notes()
    assert "train-01.tar:d/004.png" in source.images.name(4)


def test_the_hash_is_of_the_content_not_of_the_place(tmp_path):
    shards(tmp_path)
    before = Tars(str(tmp_path), "train").data_hash
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.tar"):
        path.rename(moved / path.name)
    assert Tars(str(moved), "train").data_hash == before
    tar(moved / "train-02.tar", {"d/006.png": png(6), "d/006.json": {"id": "r6"} | said()})
    assert Tars(str(moved), "train").data_hash != before


def test_captions_several_images_and_other_members(tmp_path):
    path = tar(tmp_path / "x.tar", {
        "a.jpg": png(0), "a.txt": "a red cat\n", "a.json": {"width": 8}, "a.cls": "7",
        "b.10.png": png(10), "b.2.png": png(2), "b.json": said("<image> or <image>?", "this"),
        "c.txt": "no picture",
    })  # fmt: skip
    source = Tars(path, "train", images_per_row=2, text_only=True)
    assert [e.turns for e in (source[0], source[1])] == [
        (("", "a red cat"),), (("<image> or <image>?", "this"),)]  # fmt: skip
    assert source[1].images == (1, 2) and source[2].images == ()
    assert [source[k].id for k in range(3)] == ["a", "b", "c"]
    assert "b.2.png" in source.images.name(1) and "b.10.png" in source.images.name(2)
    assert ".cls 1" in source.notes()[0]


@pytest.mark.parametrize("members, kind, sentence", [
    ({"x.png": png(1)}, "row", "the sample has .png: it needs a .json"),
    ({"x.png": png(1), "x.json": "{"}, "json", "not JSON, or cut short"),
    ({"x.png": png(1), "x.json": [1]}, "row", "holds a list"),
    ({"x.png": png(1), "x.json": {"a": 1}}, "conversations", "no `conversations`"),
    ({"x.png": png(1), "x.txt": " "}, "empty_answer", "empty answer"),
    ({"x.png": png(1), "x.txt": b"\xff"}, "text", "not UTF-8"),
    ({"x.json": said()}, "no_image", "no `image`"),
    ({"x.0.png": png(1), "x.1.png": png(1), "x.json": said()}, "images", "raise that to 2"),
    ({"x.png": png(1), "x.json": said("what?")}, "image_mark", "no <image>"),
])  # fmt: skip
def test_a_bad_sample_is_named_or_left_out(members, kind, sentence, tmp_path):
    good = {"good.png": png(0), "good.json": said()}
    path = tar(tmp_path / "x.tar", good | members)
    with pytest.raises(BadExample, match=r"x\.tar, x .*") as raised:
        Tars(path, "train")
    assert sentence in str(raised.value) and "on_bad_example=skip" in str(raised.value)
    source = Tars(path, "train", skip=True)
    assert len(source) == 1 and dict(source.left_out.kinds) == {kind: 1}


def test_a_member_that_is_there_twice_is_a_bad_sample(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.png": png(0), "a.json": said()})
    with tarfile.open(path, "a") as more:
        more.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(BadExample, match="two members end with .png"):
        Tars(path, "train")


@pytest.mark.parametrize("make, sentence", [
    (lambda p: p.write_bytes(gzip.compress(b"x" * 999)), "compressed .gzip.*gunzip"),
    (lambda p: p.write_bytes(p.read_bytes()[:-11_000]), "cut short"),
    (lambda p: p.write_bytes(b"no tar" * 300), "no tar"),
])  # fmt: skip
def test_a_shard_that_is_no_whole_tar_is_refused(make, sentence, tmp_path):
    path = tmp_path / "x.tar"
    tar(path, {"a.png": png(0), "a.json": said(answer="long " * 3000)})
    make(path)
    with pytest.raises(ValueError, match=sentence):
        Tars(str(path), "train")


def test_links_are_refused(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.png": png(0), "a.json": said()})
    with tarfile.open(path, "a") as more:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.SYMTYPE, "a.png"
        more.addfile(info)
    with pytest.raises(ValueError, match="'b.png' is a link.*--dereference"):
        Tars(path, "train")


@pytest.mark.parametrize("path, sentence", [
    ("gone.tar", "no such file: gone.tar"),
    ("x-{2..1}.tar", "give the lower number first"),
    ("x-{0..9999999}.tar", "at most 100000 shards"),
    ("x-*.tar", "no file has such a name"),
    (".", "this folder has no file named"),
])  # fmt: skip
def test_shards_that_are_not_there(path, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        expanded(path)


def test_a_configuration_opens_them_and_a_check_counts_them(tmp_path, capsys):
    shards(tmp_path)
    origin = Origin.of(tiny.config(data=dict(source="tars", path=str(tmp_path))))
    assert len(open_source(origin, "train")) == 7
    with pytest.raises(ValueError, match="all training data"):
        open_source(origin, "val")
    assert main(["data", "check", str(tmp_path), "--jobs=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["image_files"], found["clean"]) == (7, 7, True)
    whole = png(3)
    tar(tmp_path / "train-09.tar", {"z.jpg": whole[:-30], "z.json": said(answer="cut")})
    assert main(["data", "check", str(tmp_path), "--jobs=1"]) == 1
    assert json.loads(capsys.readouterr().out)["failing"] == ["corrupt_image"]
