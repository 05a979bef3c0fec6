# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that answers: the same text in any company, few programs, every wrong word named.

More than 400 lines: one small model, trained once, answers for all of them.
"""

import io
import json
import re
import shutil
import unicodedata

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import vlm_jax
from vlm_jax import mesh
from vlm_jax.__main__ import main
from vlm_jax.serving import model as serving
from vlm_jax.serving import request_files
from vlm_jax.serving.decoder import Sampling, bucket, choose
from vlm_jax.serving.requests import batch_of
from vlm_jax.weights import folder, sources

PROMPTS = ["what is this?", "how many red circles are there?", "is there a star?", "b", "read it."]
NEW = 6


def made(path, trained, **changes):
    """A model folder whose answers differ from prompt to prompt and image to image."""
    c = tiny.config(**changes)
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        model = tiny.roughened(tiny.created(c), scale=0.4)
        stored = sources.of_run(trained, c, model)
        stored.facts["max_length"] = 128
        folder.write(stored, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    return made(tmp_path_factory.mktemp("generate") / "model", trained)


@pytest.fixture(scope="module")
def one(checkpoint, mesh1):
    return vlm_jax.VLM.from_checkpoint(checkpoint, mesh=mesh1)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    shapes = [(32, 32), (20, 50), (64, 40), (32, 32), (9, 9)]
    return [draw.integers(0, 256, (*s, 3)).astype(np.uint8) for s in shapes]


@pytest.fixture(scope="module")
def alone(one, images):
    """Each prompt answered by itself."""
    return [one.generate(i, p, max_new_tokens=NEW)[0] for i, p in zip(images, PROMPTS, strict=True)]


def test_a_request_gets_the_same_tokens_alone_in_company_and_on_eight_devices(
    one, checkpoint, images, alone, mesh8
):
    together = one.generate(images, PROMPTS, max_new_tokens=NEW)
    many = serving.VLM.from_checkpoint(checkpoint, mesh=mesh8)
    spread = many.generate(images, PROMPTS, max_new_tokens=NEW)
    assert len({tuple(a.ids) for a in alone}) > 2
    for a, b, c in zip(alone, together, spread, strict=True):
        assert a.ids == b.ids == c.ids and a.text == b.text == c.text
        assert a.visual_tokens == b.visual_tokens == c.visual_tokens == 4
        assert (a.batch, b.batch) == (1, 5)


def test_the_tokens_are_those_of_whole_passes(one, checkpoint, images, alone, mesh1):
    """By the model as it was trained: no cache, no beginning read before, layers in a scan."""
    with jax.set_mesh(mesh1):
        model = tiny.model_of(checkpoint)
        logits = jax.jit(lambda m, b: m.logits(b))
        for image, prompt, answer in zip(images[:2], PROMPTS[:2], alone[:2], strict=True):
            request = one.request(image, prompt)
            ids = list(request.ids)
            for token in answer.ids:
                row = np.zeros((1, 32), np.int32)
                row[0, : len(ids)] = ids
                batch = dict(
                    ids=row, pixels=np.stack(request.pixels), image_at=np.array([request.image_at])
                )
                scores = np.asarray(logits(model, tiny.placed(batch)))[0, len(ids)]
                assert scores.argmax() == token
                ids.append(token)


def test_the_beginning_that_all_prompts_share_is_read_once_and_changes_nothing(one, images):
    """vicuna_v1 has 35 tokens before every image; a template without any has the first token."""
    assert one.prefix == [one.processor.tokenizer.bos_token_id] and one.prefix_pass is not None
    request = one.request(images[0], PROMPTS[0])
    found = []
    for begins in (True, False):
        with jax.set_mesh(one.mesh):
            skip = len(one.prefix) if begins else 0
            batch = batch_of([request], one.compressor, skip=skip, shards=1, width=one.width, pad=0)
            batch = jax.device_put(batch, mesh.sharding(one.mesh, "batch"))
            prefix = one.prefix_pass if begins else None
            scores, _, length = jax.jit(
                lambda m, b, prefix: m.prefill(b, new_tokens=1, prefix=prefix)
            )(one.decoder.model, batch, prefix)
        found.append(np.asarray(scores))
        assert int(length[0]) == len(request.ids) + 4
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_programs_are_compiled_once_for_a_bucket_and_not_for_a_prompt(one, images):
    before = one.decoder.first._cache_size(), one.decoder.following._cache_size()
    for prompt in ("a", "is it?", "what colour is it?"):
        one.generate(images[1], prompt, max_new_tokens=NEW)
    assert (one.decoder.first._cache_size(), one.decoder.following._cache_size()) == before
    one.generate(images[1], "is it red? " * 8, max_new_tokens=NEW)
    assert one.decoder.first._cache_size() == before[0] + 1


def test_buckets_hold_their_length_and_waste_at_most_a_third():
    sizes = {bucket(n) for n in range(1, 3000)}
    assert sorted(sizes)[:6] == [16, 32, 48, 64, 96, 128] and len(sizes) < 18
    for n in range(17, 3000):
        assert n <= bucket(n) and (bucket(n) - n) / bucket(n) < (1 / 2 if n <= 32 else 1 / 3)


def test_a_draw_depends_on_its_seed_and_not_on_its_company(one, images):
    how = dict(max_new_tokens=NEW, temperature=1.0, top_p=0.9)
    together = one.generate(images, PROMPTS, seed=3, **how)
    for k in (0, 4):
        assert one.generate(images[k], PROMPTS[k], seed=3, **how)[0].ids == together[k].ids
    others = [one.generate(images[0], PROMPTS[0], seed=s, **how)[0].ids for s in range(4)]
    assert len({tuple(ids) for ids in others}) > 1


def test_top_p_keeps_the_likeliest_that_have_the_mass(mesh1):
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    with jax.set_mesh(mesh1):
        rows = 400
        logits = tiny.placed(np.tile(np.log(probabilities), (rows, 1)).astype(np.float32))
        place = tiny.placed(np.arange(rows, dtype=np.int32))

        def drawn(temperature, top_p):
            full = (np.full(rows, x, np.float32) for x in (temperature, top_p))
            sampling = tiny.placed(Sampling(*full, np.zeros(rows, np.uint32)))
            return np.bincount(np.asarray(choose(logits, sampling, place)), minlength=4) / rows

        np.testing.assert_allclose(drawn(1.0, 1.0), probabilities, atol=0.08)
        np.testing.assert_allclose(drawn(1.0, 0.75), [0.625, 0.375, 0, 0], atol=0.08)
        assert drawn(1.0, 0.4)[0] == drawn(0.0, 1.0)[0] == drawn(0.01, 1.0)[0] == 1
        # Half the temperature squares the odds.
        np.testing.assert_allclose(drawn(0.5, 0.75)[:2], [25 / 34, 9 / 34], atol=0.08)


def test_a_row_ends_at_a_stop_token_and_a_batch_when_all_rows_have(one, images, alone):
    ends = alone[0].ids[0]
    decoder = one.decoder
    before = decoder.stop_ids, one.processor.stop_ids
    try:
        decoder.stop_ids, one.processor.stop_ids = np.array([ends]), (ends,)
        answer = one.generate(images[0], PROMPTS[0], max_new_tokens=NEW)[0]
        assert answer.ids == [ends] and answer.stopped and answer.text == ""
        decoder.stop_ids, one.processor.stop_ids = np.array([], int), ()
        answer = one.generate(images[0], PROMPTS[0], max_new_tokens=NEW)[0]
        assert len(answer.ids) == NEW and not answer.stopped
    finally:
        decoder.stop_ids, one.processor.stop_ids = before


def test_a_prompt_without_an_image_is_answered_and_sees_none(one, images):
    plain = one.generate(None, PROMPTS[0], max_new_tokens=NEW)[0]
    assert plain.visual_tokens == 0
    mixed = one.generate([images[0], None], [PROMPTS[0]] * 2, max_new_tokens=NEW)
    assert mixed[1].ids == plain.ids and mixed[0].visual_tokens == 4


@pytest.mark.parametrize(
    "kind, fields, asked",
    [
        ("mqt", {}, (1, 7, 16)),
        pytest.param("m3", dict(scales=(1, 4, 16)), (1, 4, 16), marks=pytest.mark.slow),
        ("quecc", dict(query="separate"), (4,)),
        pytest.param("quecc", dict(query="prefix"), (4,), marks=pytest.mark.slow),
        ("none", {}, (16,)),
    ],
)
def test_every_way_of_compressing_answers(kind, fields, asked, trained, tmp_path, images, mesh1):
    data = (
        dict(template="question_first", question_length=16) if "prefix" in fields.values() else {}
    )
    path = made(
        tmp_path / "m", trained, compressor=dict(kind=kind, tokens=max(asked), **fields), data=data
    )
    model = serving.VLM.from_checkpoint(path, mesh=mesh1)
    for tokens in asked:
        one, two = model.generate(images[:2], PROMPTS[:2], max_new_tokens=3, visual_tokens=tokens)
        assert one.visual_tokens == two.visual_tokens == tokens
        assert (
            two.ids
            == model.generate(images[1], PROMPTS[1], max_new_tokens=3, visual_tokens=tokens)[0].ids
        )
    with pytest.raises(ValueError, match="5 visual tokens|visual tokens, not 5|17"):
        model.generate(images[0], "a", visual_tokens=17 if kind == "mqt" else 5)


def test_images_that_choose_their_tokens_do_so_in_any_company(trained, tmp_path, images, mesh1):
    changes = dict(compressor=dict(kind="prumerge", tokens=0), vit=dict(depth=4))
    model = serving.VLM.from_checkpoint(made(tmp_path / "m", trained, **changes), mesh=mesh1)
    together = model.generate(images, PROMPTS, max_new_tokens=3)
    assert len({a.visual_tokens for a in together}) > 1
    for k in (0, 1):
        alone = model.generate(images[k], PROMPTS[k], max_new_tokens=3)[0]
        assert (alone.ids, alone.visual_tokens) == (together[k].ids, together[k].visual_tokens)
    with pytest.raises(ValueError, match="as many visual tokens as each image needs, not 4"):
        model.generate(images[0], "a", visual_tokens=4)


# --- The verb ---------------------------------------------------------------------------------


@pytest.fixture
def photo(images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_verb_prints_the_answer_and_what_it_took(checkpoint, photo, alone, capsys):
    argv = [f"--checkpoint={checkpoint}", f"--image={photo}", f"--prompt={PROMPTS[0]}"]
    for more in ([], ["--stream"]):
        assert main(["generate", *argv, f"--max-new-tokens={NEW}", *more]) == 0
        out, err = capsys.readouterr()
        assert out.strip() == alone[0].text.strip()
        assert "4 visual tokens" in err and "first token after" in err and "tokens/s" in err


def test_a_finished_training_answers_as_its_folder_does(trained, photo, capsys):
    argv = [f"--image={photo}", f"--prompt={PROMPTS[0]}", f"--max-new-tokens={NEW}"]
    assert main(["generate", f"--checkpoint={trained}", *argv]) == 0
    assert "4 visual tokens" in capsys.readouterr().err


def test_a_chat_remembers_its_turns(one, photo, monkeypatch, capsys, checkpoint):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is this?\n\nis there a star?\n"))
    argv = [f"--checkpoint={checkpoint}", f"--image={photo}", "--chat", f"--max-new-tokens={NEW}"]
    assert main(["generate", *argv]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == one.generate(photo, "what is this?", max_new_tokens=NEW)[0].text
    talk = ["what is this?", first, "is there a star?"]
    assert second == one.generate(photo, [talk], max_new_tokens=NEW)[0].text


def test_a_file_of_requests_keeps_what_is_finished(checkpoint, photo, tmp_path, alone, capsys):
    lines = [
        dict(id="good", image="a.png", prompt=PROMPTS[0]),
        dict(id="gone", image="b.png", prompt="a"),
        dict(promt="a"),
        dict(prompt="b"),
        dict(prompt=5),
        dict(prompt="a", image=5),
    ]
    file, out = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    file.write_bytes("\n".join(map(json.dumps, lines)).encode() + b"\n{broken\n\xff\xfe\n")
    argv = [f"--checkpoint={checkpoint}", f"--requests={file}", f"--out={out}"]
    assert main(["generate", *argv, f"--max-new-tokens={NEW}"]) == 2
    found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert found["good"]["text"] == alone[0].text and found["good"]["visual_tokens"] == 4
    assert "there is no image" in found["gone"]["error"]
    assert "a `prompt`" in found[3]["error"] and "text" in found[4]
    assert "list of texts" in found[5]["error"] and "a path" in found[6]["error"]
    assert "line 7" in found[7]["error"] and "line 8" in found[8]["error"]
    err = capsys.readouterr().err
    assert "6 requests were not answered, the first:" in err
    assert f"{file}, line 2, id gone: there is no image" in err


def test_answers_never_replace_the_requests_and_no_requests_are_told(checkpoint, tmp_path, capsys):
    names = ("r.jsonl", "empty.jsonl", "o.jsonl", "list.json")
    file, empty, other, listed = (tmp_path / name for name in names)
    file.write_text(text := json.dumps(dict(prompt="a")))
    empty.write_text("\n \n")
    listed.write_text(json.dumps([dict(prompt="a")], indent=1))
    other.symlink_to(file)
    for requests, out, words in ((file, file, "is the file of --requests"),
                                 (file, other, "is the file of --requests"),
                                 (listed, tmp_path / "new.jsonl", "is a JSON list"),
                                 (empty, tmp_path / "new.jsonl", "holds no request")):  # fmt: skip
        argv = [f"--checkpoint={checkpoint}", f"--requests={requests}", f"--out={out}"]
        assert main(["generate", *argv]) == 2 and words in capsys.readouterr().err
    assert file.read_text() == text and not (tmp_path / "new.jsonl").exists()


def test_a_request_with_a_key_twice_is_refused_as_a_row_is(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "a", "prompt": "b"}\n[{}]')
    good, twice, other = request_files.lines_of(path)
    assert good.row == {"prompt": "a"} and not good.wrong
    assert "'prompt' more than once" in twice.wrong and "this is a list" in other.wrong


def test_the_line_of_what_cannot_be_answered_has_its_id_and_its_number(tmp_path):
    lines = [dict(id="a", promt="b"), dict(id=7, prompt="c", pixels=1), dict(id="\ud800"), [1],
             dict(id=[[]], prompt="a")]  # fmt: skip
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n" + "[" * 100_000)
    found = list(request_files.lines_of(path))
    assert [line.id for line in found] == ["a", 7, "\ud800", 4, 5, 7]
    assert [line.number for line in found] == [1, 2, 3, 4, 5, 7] and all(
        line.wrong for line in found
    )
    assert "id, image (or video and frames) and prompt, and this one pixels" in found[1].wrong
    assert "its id is a list" in found[4].wrong and "nested too deep" in found[5].wrong


def test_what_fails_at_run_time_costs_its_own_line(checkpoint, tmp_path, monkeypatch, capsys):
    """A batch of which one request cannot be computed: the others are answered by themselves."""
    together = serving.VLM._together

    def fails(self, requests, **how):
        if any(len(r.ids) > 40 for r in requests):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\n\nmore")
        return together(self, requests, **how)

    monkeypatch.setattr(serving.VLM, "_together", fails)
    lines = [dict(id="x", prompt="a"), dict(id="long", prompt="star " * 60),
             dict(id="\ud800", prompt="b")]  # fmt: skip
    path, out = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    argv = [f"--checkpoint={checkpoint}", f"--requests={path}", f"--out={out}"]
    assert main(["generate", *argv, "--max-new-tokens=2"]) == 2
    found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert {"text" in row for name, row in found.items() if name != "long"} == {True}
    assert found["long"]["error"].startswith(f"{path}, line 2, id long: out of memory (RES")
    assert "1 requests were not answered" in capsys.readouterr().err
    # What is wrong with a flag is wrong with no line: it is said once.
    assert main(["generate", *argv, "--visual-tokens=9"]) == 2
    assert "trained for 4 visual tokens, not 9" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unset_limit_is_what_fits(one, images, checkpoint, photo, tmp_path, capsys):
    """By flag, file and Python; a limit that was set and does not fit is refused with numbers."""
    short, long = (one.request(images[0], "star " * n) for n in (1, 90))
    assert [one.room(r) for r in (short, long)] == [128 - 4 - len(r.ids) for r in (short, long)]
    assert one.room(short, new_tokens=2) == 2
    kept, one.max_length = one.max_length, 4000
    try:
        assert one.room(short) == 256  # and no more
    finally:
        one.max_length = kept
    before = one.decoder.stop_ids, one.processor.stop_ids
    try:  # nothing ends a row: each is as long as it may be, in company too
        one.decoder.stop_ids, one.processor.stop_ids = np.array([], int), ()
        answers = one.answer([short, long])
        assert [len(a.ids) for a in answers] == [one.room(short), one.room(long)]
        assert answers[1].ids == one.answer([long])[0].ids
    finally:
        one.decoder.stop_ids, one.processor.stop_ids = before
    argv = [f"--checkpoint={checkpoint}", f"--image={photo}"]
    assert main(["generate", *argv, "--prompt=what is this?"]) == 0
    (tmp_path / "r.jsonl").write_text(json.dumps(dict(image="a.png", prompt="star " * 90)))
    assert main(["generate", argv[0], f"--requests={tmp_path}/r.jsonl"]) == 0
    capsys.readouterr()
    assert main(["generate", *argv, "--prompt=a", "--max-new-tokens=256"]) == 2
    assert re.search(r"4 of the image and up to 256 .*made for 128", capsys.readouterr().err)
    with pytest.raises(ValueError, match="at least 1 of the answer are .*made for 128: shorten"):
        one.room(one.request(images[0], "star " * 200))


def test_a_damaged_picture_costs_its_own_line_and_no_other(
    checkpoint, photo, tmp_path, alone, capsys
):
    """Whatever its decoder raises: here ValueError, OSError, SyntaxError and no picture at all."""
    body = photo.read_bytes()
    (tmp_path / "cut.png").write_bytes(body[: len(body) // 2])
    (tmp_path / "short.pcx").write_bytes(b"\x0a\x05\x01\x08" + bytes(130))
    (tmp_path / "head.gif").write_bytes(b"GIF89a\x05")
    (tmp_path / "odd.png").write_bytes(body[:40] + bytes(20) + body[60:])
    (tmp_path / "folder.png").mkdir()
    bad = ["cut.png", "short.pcx", "head.gif", "odd.png", "folder.png"]
    lines = [dict(id=name, image=name, prompt="a") for name in bad]
    for k in (1, 3, 5):
        lines.insert(k, dict(id=k, image="a.png", prompt=PROMPTS[0]))
    file, out = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    argv = [f"--checkpoint={checkpoint}", f"--requests={file}", f"--out={out}"]
    assert main(["generate", *argv, f"--max-new-tokens={NEW}"]) == 2
    found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert all(found[k]["text"] == alone[0].text for k in (1, 3, 5))
    assert all(name in found[name]["error"] for name in bad)
    assert "Traceback" not in capsys.readouterr().err


def test_requests_may_share_an_id_and_spell_a_name_in_either_unicode_form(
    checkpoint, photo, tmp_path, alone, capsys
):
    shutil.copy(photo, tmp_path / unicodedata.normalize("NFD", "\xe9t\xe9.png"))
    line = dict(id=1, image=unicodedata.normalize("NFC", "\xe9t\xe9.png"), prompt=PROMPTS[0])
    file, out = tmp_path / "r.jsonl", tmp_path / "o.jsonl"
    file.write_text("\n".join(json.dumps(line | more) for more in ({}, dict(id="1"), {})))
    argv = [f"--checkpoint={checkpoint}", f"--requests={file}", f"--out={out}"]
    assert main(["generate", *argv, f"--max-new-tokens={NEW}"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["line"]) for row in found] == [(1, 1), ("1", 2), (1, 3)]
    assert {row["text"] for row in found} == {alone[0].text}
    assert "1 requests repeat the id of an earlier one" in capsys.readouterr().err


def test_an_image_that_cannot_be_used_is_named_by_its_number(one, images, tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    for bad, words in (
        (tmp_path / "a.png", "image 1: image .*a.png cannot be decoded"),
        (tmp_path / "none.png", "image 1: there is no image"),
        (np.zeros((0, 0, 3), np.uint8), "image 1: the array image is 0 x 0 pixels: it is empty"),
        (Image.new("F", (3, 3)), "image 1: the PIL image has numbers of 32 bits"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            one.generate([images[0], bad], ["a", "b"], max_new_tokens=1)
    with pytest.raises(ValueError, match="exif='no': choose one of apply, ignore"):
        one.generate(images[0], "a", exif="no")


def test_an_orientation_is_applied_unless_it_is_to_be_ignored(
    one, images, checkpoint, tmp_path, capsys
):
    lying = Image.fromarray(images[0]).transpose(Image.Transpose.ROTATE_90)
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "a.png", exif=exif)
    for how, image in (("apply", images[0]), ("ignore", np.asarray(lying))):
        made = one.request(tmp_path / "a.png", PROMPTS[0], exif=how)
        np.testing.assert_array_equal(made.pixels, one.request(image, PROMPTS[0]).pixels)
    seen = one.generate(tmp_path / "a.png", PROMPTS[0], max_new_tokens=NEW)[0].text
    assert seen == one.generate(images[0], PROMPTS[0], max_new_tokens=NEW)[0].text
    argv = [f"--checkpoint={checkpoint}", f"--image={tmp_path / 'a.png'}", f"--prompt={PROMPTS[0]}",
            f"--max-new-tokens={NEW}"]  # fmt: skip
    assert main(["generate", *argv, "--exif=ignore"]) == 0
    expected = one.generate(np.asarray(lying), PROMPTS[0], max_new_tokens=NEW)[0].text
    assert capsys.readouterr().out.strip() == expected.strip()


def test_what_cannot_be_answered_says_why(one, images, tmp_path):
    image = images[0]

    def refused(words, *args, **how):
        with pytest.raises((ValueError, OSError), match=words):
            one.generate(*args, **how)

    refused("2 times <image> in the prompt and 1 image", image, "<image> and <image>")
    refused("1 times <image> in the prompt and 0 image", None, "<image> what?")
    refused("conversation of 2 texts", image, [["a", "b"]])
    refused("2 images and 1 prompts", [image, image], "a")
    refused("max_new_tokens=0: give a whole number from 1", image, "a", max_new_tokens=0)
    refused("top_p=0", image, "a", top_p=0.0, temperature=1.0)
    refused("temperature=-1", image, "a", temperature=-1.0)
    refused("temperature=nan", image, "a", temperature=float("nan"))
    for seed in (-1, True, 2**32):  # others are stopped by the annotations in tests: test_cli.py
        refused("seed=.*give a whole number from 0 to 4294967295", image, "a", seed=seed)
    refused("batch=0", image, "a", batch=0)
    refused("this model was made for 128: shorten", image, "a star " * 100)
    refused("trained for 4 visual tokens, not 9", image, "a", visual_tokens=9)
    refused("uint8", image.astype(np.float32), "a")
    refused("there is no image", tmp_path / "none.jpg", "a")
    (tmp_path / "a.jpg").write_bytes(b"%PDF-1.4 not an image")
    refused("a.jpg cannot be decoded", tmp_path / "a.jpg", "a")
    Image.fromarray(image).save(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:-200])
    refused("d.jpg cannot be decoded", tmp_path / "d.jpg", "a")
    Image.new("RGB", (1, 400)).save(tmp_path / "thin.png")
    refused("1 x 400 pixels", tmp_path / "thin.png", "a")
    refused("20000 x 1 pixels", np.zeros((1, 20_000, 3), np.uint8), "a")
    refused("20000 x 1 pixels", Image.new("L", (20_000, 1)), "a")
    Image.new("RGB", (20_000, 300), (9, 99, 200)).save(tmp_path / "wide.png")
    assert one.generate(tmp_path / "wide.png", "a", max_new_tokens=1)[0].visual_tokens == 4
    Image.new("RGB", (1, 5)).save(tmp_path / "small.png")
    assert one.generate(tmp_path / "small.png", "a", max_new_tokens=1)[0].visual_tokens == 4


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--checkpoint=/nowhere/at/all", "--prompt=a"], "no folder --checkpoint=/nowhere"),
        (["--checkpoint=tests", "--prompt=a"], "config.json"),
        (["--checkpoint=tests/published_weights/clip_llama", "--prompt=a"], "vlm-jax convert"),
        (["--checkpoint=tests"], "one of --prompt"),
        (["--checkpoint=tests", "--requests=no.jsonl"], "no file --requests=no.jsonl"),
        (["--checkpoint=tests", "--requests=a", "--image=b"], "a line of those has its own"),
        (["--checkpoint=tests", "--prompt=a", "--out=b"], "--out goes with --requests"),
    ],
)
def test_a_wrong_command_names_the_way_out(argv, words, capsys):
    assert main(["generate", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_a_folder_without_a_tokenizer_says_how_to_get_one(checkpoint):
    stored = folder.read(checkpoint)
    stored.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer: convert it again with --tokenizer"):
        serving.processor_of(stored)
    assert isinstance(serving.processor_of(folder.read(checkpoint)).stop_ids, tuple)
