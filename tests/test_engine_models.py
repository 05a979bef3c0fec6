# SPDX-License-Identifier: Apache-2.0
"""An engine serves every kind of compressor, a model over several devices, and a chat."""

import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image
from test_generate import made

import vlm_jax
from vlm_jax import mesh
from vlm_jax.serving import reading, row, talk
from vlm_jax.serving.engine import Engine, refusal
from vlm_jax.serving.model import Drawing
from vlm_jax.serving.tickets import Ask, Gone

NEW = 4
LONG = "is it red? " * 8


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    shapes = [(32, 32), (20, 50), (64, 40), (32, 32)]
    return [draw.integers(0, 256, (*s, 3)).astype(np.uint8) for s in shapes]


def small(model, **changes):
    return Engine(
        model,
        **dict(slots=1, queue=9, index_bytes=10**6, lengths=(128,), chunks=(16,)) | changes,
    )


def check(engine, model, images, prompt):
    """Asks of both images twice; the answers are those of `generate`. Returns the second ones."""
    for _ in range(2):
        found = []
        for image in images:
            expected = model.generate(image, prompt, max_new_tokens=NEW)[0]
            ask = Ask(prompt, (engine.pixels(image),), max_new_tokens=NEW)
            answer = engine.submit(ask).answer()
            assert list(answer.ids) == expected.ids
            assert answer.usage.image_tokens == expected.visual_tokens
            found.append(answer)
    return found


@pytest.mark.parametrize("query", ["separate", "prefix"])
def test_an_image_that_is_read_by_a_question_is_kept_for_that_question(
    query, trained, tmp_path, images, mesh1
):
    data = dict(template="question_first", question_length=30) if query == "prefix" else {}
    compressor = dict(kind="quecc", tokens=4, query=query)
    path = made(tmp_path / "m", trained, compressor=compressor, data=data)
    model = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)
    engine = small(model)
    answers = check(engine, model, images[:2], "what is this?")
    assert all(answer.usage.reused_image_tokens == 4 for answer in answers)
    handles = answers[0].handles
    again = engine.submit(Ask("what is this?", handles, max_new_tokens=NEW)).answer()
    assert again.ids == answers[0].ids
    with pytest.raises(Gone, match="for this question: send the image"):
        engine.submit(Ask("is there a star?", handles))
    # A beginning that was read before and holds the question, of which a part is read again.
    assert check(engine, model, images[:2], LONG)[0].usage.cached_tokens >= 32
    engine.index.images.values.clear()
    assert check(engine, model, images[:1], LONG)[0].usage.cached_tokens >= 32
    assert engine.drain(60.0)


def test_images_that_choose_their_number_of_tokens(trained, tmp_path, images, mesh1):
    changes = dict(compressor=dict(kind="prumerge", tokens=0), vit=dict(depth=4))
    model = vlm_jax.VLM.from_checkpoint(made(tmp_path / "m", trained, **changes), mesh=mesh1)
    engine = small(model)
    answers = check(engine, model, images, "what is this?")
    assert len({answer.usage.image_tokens for answer in answers}) > 1
    assert engine.drain(60.0)


def test_a_selection_is_compiled_for_what_a_plan_searches_and_what_is_wished(
    trained, tmp_path, images, mesh1, monkeypatch
):
    monkeypatch.setattr(reading, "MOST_BUCKETS", 4)
    path = made(tmp_path / "m", trained, compressor=dict(kind="divprune", tokens=16))
    model = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)
    engine = small(model, visual_tokens=(7,))
    assert engine.reader.slots == (1, 4, 7, 16)
    expected = model.generate(images[0], "b", max_new_tokens=NEW, visual_tokens=7)[0]
    asked = Ask("b", (engine.pixels(images[0]),), max_new_tokens=NEW, visual_tokens=7)
    answer = engine.submit(asked).answer()
    assert list(answer.ids) == expected.ids and answer.usage.image_tokens == 7
    with pytest.raises(ValueError, match="visual_tokens=5: this engine is compiled for 1, 4, 7, 1"):
        engine.submit(dataclasses.replace(asked, visual_tokens=5))
    assert engine.drain(60.0)


def test_a_model_over_two_devices_in_bfloat16_answers_as_it_does_offline(trained, tmp_path, images):
    """In bfloat16 a cache of several rows is float32 on a CPU, and what is read is not."""
    two = mesh.make(1, 1, 2, devices=jax.devices()[:2])
    path = made(tmp_path / "m", trained)
    model = vlm_jax.VLM.from_checkpoint(path, mesh=two, dtype="bfloat16")
    assert not refusal(model)
    engine = small(model, slots=2)
    engine.warm()
    compiled = engine.stats().compiled
    check(engine, model, images[:2], LONG)
    tickets = [
        engine.submit(Ask("b", (engine.pixels(image),), max_new_tokens=NEW)) for image in images
    ]
    assert all(len(ticket.answer().ids) == NEW for ticket in tickets)
    assert engine.stats().compiled == compiled
    assert engine.drain(60.0)


def test_a_chat_reads_its_image_and_its_turns_once(trained, tmp_path, images, mesh1, capsys):
    model = vlm_jax.VLM.from_checkpoint(made(tmp_path / "m", trained), mesh=mesh1)
    drawing, photo = Drawing(max_new_tokens=NEW), str(tmp_path / "a.png")
    Image.fromarray(images[0]).save(photo)
    lines = io.StringIO(f"{LONG}\n\nis there a star?\n<image>\n{'a star ' * 99}\nb\n")
    assert talk.chat(model, [photo], lines, drawing=drawing, stream=True) == 0
    out, err = capsys.readouterr()
    turns = []
    for question, said in zip(
        (LONG.strip(), "is there a star?", "b"), out.splitlines(), strict=True
    ):
        turns.append(question)
        assert said == model.generate([photo], [turns], max_new_tokens=NEW)[0].text
        turns.append(said)
    numbers = [line for line in err.splitlines() if "visual tokens" in line]
    assert "; 0 tokens read were known" in numbers[0] and "; 0 tokens" not in numbers[1]
    assert "in a later question" in err and "made for 128: shorten" in err


def test_a_row_has_its_images_where_they_belong():
    image = row.Image("h", b"k", 4, 3, None, None, None)
    one = row.Row([5, 6, 7], (1,), [image], row.GREEDY)
    assert one.most == 6
    one.lay(adaptive=False)
    assert one.ids.tolist() == [5, 0, 1, 2, 6, 7] and one.image.tolist() == [-1, 0, 0, 0, -1, -1]
    assert (image.start, image.end) == (1, 4) and one.keys() == []
    assert len(one.keys(range(30))) == 1


def test_a_prompt_is_read_in_the_chunks_that_take_least():
    def chunks(tokens, cost):
        first, found = reading.first_chunks((16, 64, 128), cost), []
        while tokens > sum(found):
            found.append(first[min(tokens - sum(found), 128)])
        return found

    # 81 tokens in 64, 16 and 16 are 96 and three passes, in 128 one pass.
    lengths = (1, 16, 17, 64, 65, 80, 81, 128, 140)
    found = [chunks(n, 32) for n in lengths]
    assert found == [[16], [16], [64], [64], [64, 16], [64, 16], [128], [128], [128, 16]]
    # Of a tiny model a pass costs more than its tokens.
    assert chunks(65, 500) == [128]
    for n in range(1, 129):  # none is cheaper
        best = min(
            sum(some) + 32 * len(some)
            for k in range(1, 4)
            for some in itertools.combinations_with_replacement((16, 64, 128), k)
            if sum(some) >= n
        )
        assert sum(chunks(n, 32)) + 32 * len(chunks(n, 32)) == best
