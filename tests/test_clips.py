# SPDX-License-Identifier: Apache-2.0
"""Clips from a folder or a file to a row: which frames are taken, where they stand, what is bad."""

import json
import math
import pickle
import struct
import sys

import av
import numpy as np
import pytest
import tiny
from PIL import Image
from test_generate import made as made_model
from test_templates import processor, tokenizer

from vlm_jax.__main__ import main
from vlm_jax.data import clips
from vlm_jax.data.example import BadExample, Example
from vlm_jax.data.loader import Batches
from vlm_jax.data.sources import Origin, open_source
from vlm_jax.serving import request_files

SIZE = (32, 48)  # height and width of the frames


def folder(path, n, name="{}.png"):
    """A clip as a folder: frame k is the gray level 10 k."""
    path.mkdir(parents=True)
    for k in range(n):
        Image.fromarray(np.full((*SIZE, 3), 10 * k, np.uint8)).save(path / name.format(k))
    return path


def film(path, n, codec="mpeg4"):
    """A clip as a video file: frame k is about the gray level 10 k."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for k in range(n):
            pixels = np.full((*SIZE, 3), 10 * k, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        out.mux(stream.encode())
    return path


def row(video, question="<image>\nwhat happens?", **more):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "it stops"}]
    return {"id": "a", "video": video, "conversations": said} | more


def opened(home, *rows, **data):
    (home / "rows.json").write_text(json.dumps(rows))
    own = dict(source="llava", path=f"{home}/rows.json", images=str(home), frames=4)
    return open_source(Origin.of(tiny.config(data=own | data)), "train")


def test_frames_are_taken_from_the_first_to_the_last_in_even_steps_rounded_down():
    for n in range(1, 40):
        for T in range(2, 12):
            assert clips.sampled(n, T) == [math.floor(k * (n - 1) / (T - 1)) for k in range(T)]
        assert clips.sampled(n, 1) == [0]
    assert clips.sampled(2, 4) == [0, 0, 0, 1]


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    folder(tmp_path / "clip", 12, "frame{}.png")  # as text frame10 comes before frame2
    (tmp_path / "clip" / "about.txt").write_text("no frame")
    source = opened(tmp_path, row("clip"))
    assert source[0].images == (0, 1, 2, 3) and source[0].frames == 4
    assert [source.images[k].max() for k in range(4)] == [10 * k for k in clips.sampled(12, 4)]
    short = opened(tmp_path, row("clip"), frames=24)
    assert len(short[0].images) == 24 and len(short.images) == 12
    assert any("fewer than the data.frames=24" in note for note in short.notes())
    assert source.data_hash != short.data_hash


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_the_frames_of_a_clip_stand_at_its_one_mark(mark, tmp_path):
    """Of three frames and one image the same text remains, and the frames have one place."""
    folder(tmp_path / "clip", 6)
    made = processor(tokenizer(bos="<s>"), "vicuna_v1")
    source = opened(tmp_path, row("clip", f"{mark}\nwhat happens?"), frames=3)
    ours = made.tokens(source[0], answer=True)
    one = made.tokens(Example("x", 0, (("what happens?", "it stops"),), "f", "t"), answer=True)
    assert ours.ids == one.ids and ours.mask == one.mask
    assert ours.places == one.places * 3 and ours.questions == one.questions * 3
    # Two clips of one turn stay where they are written.
    two = opened(tmp_path, row(["clip", "clip"], f"{mark} or {mark}?"), frames=3, images_per_row=2)
    ours = made.tokens(two[0], answer=True)
    one = made.tokens(
        Example("x", (0, 1), (("<image> or <image>?", "it stops"),), "f", "t"), answer=True
    )
    assert ours.ids == one.ids and ours.places == (one.places[0],) * 3 + (one.places[1],) * 3


def test_a_row_with_a_clip_is_one_with_its_frames_as_images(tmp_path):
    names = [f"clip/{k}.png" for k in clips.sampled(9, 4)]
    folder(tmp_path / "clip", 9)
    c = tiny.config(data=dict(frames=4))
    batches = []
    for number, (rows, data) in enumerate((
        (row("clip"), {}),
        (row("", "<image><image><image><image>what happens?", image=names),
         dict(frames=0, images_per_row=4)),
    )):  # fmt: skip
        (home := tmp_path / str(number)).mkdir()
        source = opened(home, rows, images=str(tmp_path), **data)
        made = processor(tokenizer(bos="<s>"), "bare", data=dict(images_per_row=4))
        assert made.images_per_row == clips.room(c.data) == 4
        batches.append(Batches(source, made, batch=1, seed=0).at(0))
    for name, values in batches[0].items():
        np.testing.assert_array_equal(values, batches[1][name], err_msg=name)
    assert batches[0]["pixels"].shape[:2] == (1, 4)


@pytest.mark.parametrize("changed, data, kind, said", [
    (dict(video=7), {}, "video", "`video` is 7, not a path"),
    (dict(video="gone"), {}, "missing_clip", "no clip .*gone: check data.images"),
    (dict(video="empty"), {}, "empty_clip", "a folder without a frame"),
    (dict(image="clip/0.png"), {}, "video", "images or clips, not both"),
    ({}, dict(frames=0), "video", "data.frames=0: set it to the number of frames"),
    (dict(video=["clip"] * 2), {}, "images", "2 clips, and data.images_per_row=1: raise"),
    (dict(conversations=row("", "what?")["conversations"]), {}, "image_mark", "a clip but no <im"),
])  # fmt: skip
def test_a_bad_clip_is_a_bad_row_that_says_why(changed, data, kind, said, tmp_path):
    folder(tmp_path / "clip", 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadExample, match=said):
        opened(tmp_path, row("clip") | changed, **data)
    good = {"id": "b", "image": "clip/0.png", "conversations": row("")["conversations"]}
    source = opened(tmp_path, row("clip") | changed, good, on_bad_example="skip", **data)
    assert dict(source.left_out.kinds) == {kind: 1} and len(source) == 1


def test_sources_without_clips_refuse_them(tmp_path):
    for kind in ("nlvr", "tars", "tfds"):
        with pytest.raises(ValueError, match=f"data.source='{kind}' has no clips"):
            open_source(Origin.of(tiny.config(data=dict(source=kind, frames=2))), "train")


def test_a_video_file_without_its_decoder_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"video")
    with pytest.raises(ValueError, match=r"needs PyAV: pip install 'vlm_jax\[video\]'"):
        opened(tmp_path, row("a.mp4"), on_bad_example="skip")


def test_a_video_file_gives_the_frames_at_the_places_of_a_folder(tmp_path):
    film(tmp_path / "a.mp4", 11)
    source = opened(tmp_path, row("a.mp4"))
    levels = [float(source.images[k].mean()) for k in range(4)]
    assert levels == pytest.approx([10 * k for k in clips.sampled(11, 4)], abs=4)
    assert source.images[0].shape == (*SIZE, 3)
    again = pickle.loads(pickle.dumps(source.images.read))  # as for a worker process
    np.testing.assert_array_equal(again(2), source.images[2])


def test_the_frames_of_a_row_are_decoded_together(tmp_path, monkeypatch):
    film(tmp_path / "a.mp4", 11)
    source, calls = opened(tmp_path, row("a.mp4")), []
    decoded = clips.decoded
    monkeypatch.setattr(clips, "decoded", lambda *a, **k: calls.append(a) or decoded(*a, **k))
    for k in range(4):
        source.images.picture(k)
    assert len(calls) == 1


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("a.webm", "libvpx")])
def test_a_video_file_that_is_cut_short_is_bad_wherever_it_ends(name, codec, tmp_path):
    whole = film(tmp_path / name, 12, codec).read_bytes()
    assert clips.decoded(str(tmp_path / name), 3).frames == 12
    for share in (0, 0.1, 0.5, 0.8):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadExample, match="clip .*(not be decoded|cut short|empty|no video)"):
            clips.pictures(str(tmp_path / name), 3)


def test_a_turned_video_is_turned_upright_on_request(tmp_path):
    path = film(tmp_path / "a.mp4", 3)
    content = path.read_bytes()
    # The matrix of the track's head (ISO 14496-12, 8.3.2): x' = -y + width, y' = x.
    at = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, SIZE[0] << 16, 0, 1 << 30)
    path.write_bytes(content[:at] + matrix + content[at + 36 :])
    stored, turned = (clips.decoded(str(path), 1, exif=how).pictures[0] for how in (
        "ignore", "apply"))  # fmt: skip
    assert stored.size == SIZE[::-1] and turned.size == SIZE


def test_a_check_reads_every_clip_and_counts_the_bad_ones(tmp_path, capsys):
    folder(tmp_path / "clip", 12)
    folder(tmp_path / "short", 3, "of_three_{}.png")
    film(tmp_path / "film.mp4", 12)
    film(tmp_path / "brief.mp4", 5)
    film(tmp_path / "cut.mp4", 12)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-300])
    (tmp_path / "empty").mkdir()
    names = ("clip", "short", "film.mp4", "brief.mp4", "cut.mp4", "empty", "gone")
    rows = [row(name, f"<image>{name}?") | {"id": name} for name in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(["data", "check", f"{tmp_path}/rows.json", "--jobs=1", "--frames=8"]) == 1
    out = capsys.readouterr()
    found = json.loads(out.out)
    told = found["findings"] | found["notes"]
    assert {k: n for k, n in told.items() if n and k != "duplicate_image"} == {
        "corrupt_clip": 1, "empty_clip": 1, "missing_clip": 1, "short_clip": 2,
    }  # fmt: skip
    assert "cut.mp4" in str(found["first"]["corrupt_clip"])
    assert (found["clips"], found["frames"], found["usable_rows"]) == (5, 8, 5)
    assert found["image_files"] == 8 + 3 + 3 * 8 and "; 5 clips" in out.err
    assert main(["data", "check", f"{tmp_path}/rows.json", "--jobs=1", "--frames=3",
                 "--allow=empty_clip,missing_clip,corrupt_clip"]) == 0  # fmt: skip


def test_a_clip_is_asked_about_by_path_and_in_a_line(trained, tmp_path, capsys):
    path = made_model(tmp_path / "model", trained)
    folder(tmp_path / "clip", 9)
    flags = ["generate", f"--checkpoint={path}", "--max-new-tokens=3", "--frames=4"]
    assert main([*flags, f"--video={tmp_path}/clip", "--prompt=what happens?"]) == 0
    out = capsys.readouterr()
    assert "16 visual tokens" in out.err  # of four frames
    lines = [
        {"prompt": "<image>\nwhat happens?", "video": "clip"},
        {"prompt": "what happens?", "video": "clip", "frames": 2},
        {"prompt": "what happens?", "video": "clip", "image": "clip/0.png"},
        {"prompt": "what happens?", "image": "clip/0.png", "frames": 2},
        {"prompt": "what happens?", "video": "gone"},
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main([*flags, f"--requests={tmp_path}/asked.jsonl"]) == 2
    said = map(json.loads, capsys.readouterr().out.splitlines())
    first, second, *bad = sorted(said, key=lambda line: line["line"])
    assert first["text"] == out.out.strip() and second["visual_tokens"] == 2 * 4
    for line, said in zip(bad, ("an image and a video", "without a video", "no clip"), strict=True):
        assert said in line["error"]


@pytest.mark.parametrize("flags, said", [
    (["--video=a", "--prompt=b"], "--video needs --frames=T"),
    (["--video=a", "--frames=2", "--chat"], "--video goes with --prompt alone"),
    (["--video=a", "--frames=2", "--prompt=b", "--image=c"], "--video goes with --prompt alone"),
    (["--frames=2", "--prompt=b"], "--frames goes with --video or --requests"),
    (["--video=a", "--frames=0", "--prompt=b"], "--frames=0: give a whole number from 1"),
])  # fmt: skip
def test_flags_of_a_clip_that_say_too_little_or_too_much_are_refused(flags, said, capsys):
    assert main(["generate", "--checkpoint=tests", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_line_needs_to_know_how_many_frames(tmp_path):
    with pytest.raises(ValueError, match="a video needs `frames`"):
        request_files.shown(dict(video="a"), tmp_path, exif="apply", frames=None)
