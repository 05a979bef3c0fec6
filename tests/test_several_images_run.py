# SPDX-License-Identifier: Apache-2.0
"""Several images from a file to an answer: requests in any company, and the verbs one by one."""

import io
import json

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_generate import made

import vlm_jax
from vlm_jax.__main__ import main
from vlm_jax.serving.requests import batch_of

NEW = 4


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    """A model whose compressor reads the question of each image."""
    quecc = dict(kind="quecc", tokens=4, query="separate")
    return made(tmp_path_factory.mktemp("several") / "model", trained, compressor=quecc)


@pytest.fixture(scope="module")
def one(checkpoint, mesh1):
    return vlm_jax.VLM.from_checkpoint(checkpoint, mesh=mesh1)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (32, 20 + 9 * k, 3)).astype(np.uint8) for k in range(3)]


@pytest.fixture(scope="module")
def asked(images):
    """Prompts about one to three images, in one turn and in several, all of one length of rows."""
    a, b, c = images
    return [
        ([a, b], "<image> or <image>?"),
        (a, "what is this?"),
        ([a, b], ["what? <image>", "a red star", "and this? <image>"]),
        ([b, a], "which?"),
        (c, ["is there a star?", "yes", "how many are there? <image>"]),
        ([a, b, c], "<image><image> or <image>?"),
    ]


@pytest.fixture(scope="module")
def alone(one, asked):
    return [one.generate([i], [p], max_new_tokens=NEW)[0] for i, p in asked]


def test_each_request_gets_the_same_tokens_alone_and_in_company(one, asked, alone):
    pictures, prompts = zip(*asked, strict=True)
    together = one.generate(list(pictures), list(prompts), max_new_tokens=NEW)
    assert [a.ids for a in alone] == [a.ids for a in together]
    assert [a.visual_tokens for a in together] == [8, 4, 8, 8, 4, 12]
    assert len({tuple(a.ids) for a in alone}) > 3


def test_the_tokens_are_those_of_whole_passes(one, checkpoint, asked, alone, mesh1):
    """By the model as it was trained: three images of a row of three, no cache."""
    with jax.set_mesh(mesh1):
        model = tiny.model_of(checkpoint)
        logits = jax.jit(lambda m, b: m.logits(b))
        for (pictures, prompt), answer in zip(asked, alone, strict=True):
            request = one.request(pictures, prompt)
            n, ids = len(request.pixels), list(request.ids)
            pixels = np.zeros((1, 3, 32, 32, 3), np.float32)
            image_at = np.full((1, 3), 64, np.int32)
            question, length = np.zeros((1, 3, 16), np.int32), np.ones((1, 3), np.int32)
            for k in range(n):
                pixels[0, k], image_at[0, k] = request.pixels[k], request.places[k]
                question[0, k, : len(request.questions[k])] = request.questions[k]
                length[0, k] = len(request.questions[k])
            for token in answer.ids:
                row = np.zeros((1, 64), np.int32)
                row[0, : len(ids)] = ids
                batch = dict(ids=row, pixels=pixels, image_at=image_at, question=question,
                             question_length=length)  # fmt: skip
                scores = np.asarray(logits(model, tiny.placed(batch)))[0, len(ids)]
                assert scores.argmax() == token
                ids.append(token)


def test_images_follow_their_marks_and_without_any_stand_first(one, images):
    a, b, _ = images
    plain, marked, turned = (
        one.request(*x)
        for x in (([a, b], "or?"), ([a, b], "<image><image>or?"), ([b, a], "<image> or <image>?"))
    )
    assert plain.ids == marked.ids and plain.places == marked.places == (1, 1)
    np.testing.assert_array_equal(plain.pixels, marked.pixels)
    assert turned.places[0] < turned.places[1]
    np.testing.assert_array_equal(turned.pixels[0], plain.pixels[1])


def test_an_image_behind_the_last_token_of_a_full_bucket_is_seen(one, images, checkpoint):
    # Its place may not be the end of the row, which says that there is no image.
    for prompt in range(10, 40):
        request = one.request(images[0], "a " * prompt + "<image>")
        at_end = type(request)(request.ids, (len(request.ids),), request.questions, request.pixels)
        batch = batch_of([at_end], one.compressor, skip=0, shards=1, width=one.width, pad=0)
        assert batch["image_at"][0] < batch["ids"].shape[1]


def test_what_cannot_be_asked_of_several_images_says_why(one, images, tmp_path):
    a, b, c = images

    def refused(words, *args):
        with pytest.raises((ValueError, OSError), match=words):
            one.generate(*args)

    refused("1 times <image> in the prompt and 2 images: each image has one mark", [[a, b]],
            ["<image>?"])  # fmt: skip
    refused("3 times <image> in the prompt and 2 images", [[a, b]], ["<image><image><image>"])
    refused("in a question", [[a, b]], [["<image>", "<image>", "c"]])
    refused("2 images and 1 prompts: give one image .or None, or a list", [a, b], ["which?"])
    refused("there is no image", [[a, tmp_path / "gone.png"]], ["which?"])
    refused("an image is a path.*not None", [[a, None]], ["which?"])
    refused("12 of the 3 images and .*made for 128: shorten", [[a, b, c]], ["a " * 120])
    method = one.compressor.method
    one.compressor.method = tiny.method("quecc", method.tokens, query="prefix")
    try:
        refused("2 images, and this model's compressor.*one at a time.*'separate'", [[a, b]],
                ["which?"])  # fmt: skip
    finally:
        one.compressor.method = method


# --- The verbs ------------------------------------------------------------------------------------


@pytest.fixture
def files(images, tmp_path):
    for name, image in zip("ab", images, strict=False):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_chat_has_its_images_in_its_first_question(checkpoint, files, one, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("which?\nand <image>?\nis there a star?\n"))
    argv = [f"--checkpoint={checkpoint}", f"--image={files}/a.png", f"--image={files}/b.png"]
    assert main(["generate", *argv, "--chat", f"--max-new-tokens={NEW}"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    both = [[files / "a.png", files / "b.png"]]
    assert first == one.generate(both, ["which?"], max_new_tokens=NEW)[0].text
    talk = ["which?", first, "is there a star?"]
    assert second == one.generate(both, [talk], max_new_tokens=NEW)[0].text
    assert "not answered: <image> in a later question" in err


def test_a_line_of_requests_has_a_list_of_images(checkpoint, files, one, capsys):
    lines = [
        dict(id="two", image=["a.png", "b.png"], prompt="<image> or <image>?"),
        dict(id="later", image="b.png", prompt=["is there a star?", "yes", "<image> here?"]),
        dict(id="gone", image=["a.png", "gone.png"], prompt="which?"),
        dict(id="marks", image=["a.png", "b.png"], prompt="<image>?"),
        dict(id="odd", image=["a.png", 5], prompt="which?"),
    ]
    (files / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = [f"--checkpoint={checkpoint}", f"--requests={files}/r.jsonl", f"--out={files}/o.jsonl"]
    assert main(["generate", *argv, f"--max-new-tokens={NEW}"]) == 2
    found = {r["id"]: r for r in map(json.loads, (files / "o.jsonl").read_text().splitlines())}
    both = [[files / "a.png", files / "b.png"]]
    assert found["two"]["text"] == one.generate(
        both, ["<image> or <image>?"], max_new_tokens=NEW)[0].text  # fmt: skip
    assert (found["two"]["visual_tokens"], found["later"]["visual_tokens"]) == (8, 4)
    assert "there is no image" in found["gone"]["error"] and "gone.png" in found["gone"]["error"]
    assert "1 times <image>" in found["marks"]["error"] and "a path" in found["odd"]["error"]


def said(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


def flags(path, **fields):
    """The command line of a run on these splits."""
    fields = {
        "data.source": "llava", "data.path": f"{path}/{{split}}.json", "data.images": path,
        "data.text_only": True, "data.text_length": 24, "data.question_length": 8,
        "encoder.steps": 0, "align.steps": 0, "finetune.steps": 3, "finetune.accumulate": 2,
        "evaluate.batch": 8,
    } | fields  # fmt: skip
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={tiny.ROOT}/tests/tiny.py", *given]


@pytest.fixture
def written(files):
    """Splits of a data set whose rows have none, one and two images."""
    rows = [dict(id="none", conversations=said("which?", "a"))]
    for k in range(11):
        x, y = ("ab", "ba")[k % 2]
        both = {"image": [f"{x}.png", f"{y}.png"]}
        rows += [
            dict(id=f"{k}-two", **both, conversations=said("<image> or <image>?", x)),
            dict(id=f"{k}-turns", **both,
                 conversations=said("<image>\nwhich?", x, "and <image>", y)),
            dict(id=f"{k}-one", image=f"{x}.png", conversations=said("<image>\nwhich?", x)),
        ]  # fmt: skip
    for split in ("train", "test"):
        (files / f"{split}.json").write_text(json.dumps(rows))
    return files


@pytest.mark.slow
def test_two_images_in_a_row_are_trained_evaluated_and_asked_about(written, mesh1):
    run = written / "run"
    argv = [*flags(written, **{"data.images_per_row": 2}), f"--workdir={run}"]
    for verb in ("train", "evaluate"):
        done = tiny.run(verb, *argv)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 34 and {"0-two", "3-turns", "4-one", "none"} <= {x["id"] for x in lines}
    # As by hand: evaluation and requests are two roads to one answer.
    model = vlm_jax.VLM.from_checkpoint(run, mesh=mesh1)
    assert model.max_length == 24 + 2 * 4
    rows = {row["id"]: row for row in json.loads((written / "test.json").read_text())}
    for line in lines[1:5]:
        row = rows[line["id"]]
        prompt = [turn["value"] for turn in row["conversations"]][:-1]
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        pictures = [written / name for name in names]
        (answer,) = model.generate([pictures], [prompt], max_new_tokens=4)
        assert answer.text.strip() == line["prediction"] and answer.visual_tokens == 4 * len(names)
