# SPDX-License-Identifier: Apache-2.0
"""Tokens of a clip like those of the frame before: dropped as EVS does, and nothing else."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import literal_evs
import numpy as np
import pytest
import tiny
from test_generate import made

import vlm_jax
from vlm_jax.__main__ import main
from vlm_jax.cost import flops as cost
from vlm_jax.models import splice
from vlm_jax.models.dropped import drop
from vlm_jax.models.pruning import Read, describe, parse
from vlm_jax.models.pruning.evs import EVS
from vlm_jax.serving.requests import batch_of
from vlm_jax.weights import folder

T, V, D = 5, 4, 16
NEW = 4


def clips(rows, *, seed=0):
    """Clips whose frames change little, here more and there less."""
    draw = np.random.default_rng(seed)
    first = draw.normal(size=(rows, 1, V, D))
    steps = draw.normal(size=(rows, T - 1, V, D)) * draw.uniform(0.05, 1, (rows, T - 1, V, 1))
    return np.concatenate([first, first + np.cumsum(steps, 1)], 1).astype(np.float32)


@pytest.mark.parametrize("dropped", [0.2, 0.5, 0.7, 0.95])
def test_what_is_kept_is_what_the_literal_form_keeps_in_its_order(dropped, mesh8):
    """Rows of one to T frames, in one batch of T; the others' missing frames count for nothing."""
    x, frames = clips(8), [5, 4, 3, 2, 1, 5, 5, 0]
    count = np.array([[V] * n + [0] * (T - n) for n in frames], np.int32)
    numbers = tuple(EVS(dropped=dropped).kept(V, n) for n in range(T + 1))
    assert numbers[0] == 0 and all(n >= V for n in numbers[1:])
    with jax.set_mesh(mesh8):
        batch = tiny.placed(dict(tokens=x.reshape(8, T * V, D), count=count))
        found = jax.jit(lambda b: drop(b["tokens"], b["count"], numbers))(batch)
    tokens, left = np.asarray(found.tokens), np.asarray(found.count)
    assert tokens.shape == (8, numbers[-1], D)
    for row, n in enumerate(frames):
        places = literal_evs.kept(x[row, :n].astype(np.float64), dropped) if n else []
        assert len(places) == numbers[n]
        wanted = [x[row][place] for place in places]
        np.testing.assert_array_equal(tokens[row, : len(places)], np.reshape(wanted, (-1, D)))
        assert left[row].tolist() == [sum(t == f for f, _ in places) for t in range(T)]


def test_of_a_still_the_first_frame_is_kept_and_then_the_earliest(mesh1):
    still = np.repeat(clips(1)[:, :1], T, 1)
    with jax.set_mesh(mesh1):
        batch = tiny.placed(dict(x=still.reshape(1, T * V, D), n=np.full((1, T), V, np.int32)))
        numbers = tuple(EVS(dropped=0.7).kept(V, n) for n in range(T + 1))
        found = jax.jit(lambda b: drop(b["x"], b["n"], numbers))(batch)
    assert numbers[-1] == 6 and np.asarray(found.count).tolist() == [[4, 2, 0, 0, 0]]


def test_numbers_are_those_of_the_source():
    """vllm/multimodal/evs.py: max(tokens per frame, int(all (1 - q)))."""
    for tokens, frames, q in ((256, 32, 0.7), (4, 3, 0.5), (9, 7, 0.99), (16, 1, 0.5)):
        number = max(tokens, int(tokens * frames * (1 - q)))
        assert EVS(dropped=q).kept(tokens, frames) == number


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    return made(tmp_path_factory.mktemp("evs") / "model", trained)


def model(plain, mesh, pruning):
    return vlm_jax.VLM.from_checkpoint(plain, mesh=mesh, pruning=pruning)


@pytest.fixture(scope="module")
def films():
    """Three clips of T frames with a square that moves, and a still."""
    found = []
    for k in range(3):
        frames = np.full((T, 32, 32, 3), 60 * k, np.uint8)
        for t in range(T * (k < 2)):
            frames[t, 8 * k : 8 * k + 8, 6 * t : 6 * t + 8] = 250 - 40 * t
        found.append(list(frames))
    return found


def test_a_prefill_reads_the_kept_tokens_where_the_others_left_no_gap(plain, mesh1, films):
    """Against rows that are spliced by hand out of the tokens that the literal form keeps."""
    ours, whole = (model(plain, mesh1, text) for text in ("evs:dropped=0.6", "none"))
    request = ours.request(films[0], "what happens?", frames=T)
    batch = batch_of([request], ours.compressor, skip=0, shards=1, width=ours.width, pad=0)
    with jax.set_mesh(mesh1):
        placed = tiny.placed(batch)
        inside = whole.decoder.model
        visual = jax.jit(lambda m, b: m.visual_tokens(b, None))(inside, placed)
        tokens = np.asarray(visual.tokens)[0].reshape(-1, V, ours.width)[:T]
        places = literal_evs.kept(tokens.astype(np.float64), 0.6)
        assert len(places) == max(V, int(T * V * 0.4)) < T * V
        text = np.asarray(jax.jit(lambda m, i: m.llm.embed(i))(inside, placed["ids"]))[0]
        at, n = request.places[0], len(request.ids)
        row = np.concatenate([text[:at], np.stack([tokens[p] for p in places]), text[at:n]])
        alone = jax.jit(lambda m, x: m.llm.logits(m.llm.prefill(x, slots=64)[0][:, -1:])[:, 0])
        wanted = np.asarray(alone(inside, tiny.placed(row[None].astype(np.float32))))
        scores, _, length = jax.jit(lambda m, b: m.prefill(b, new_tokens=1))(
            ours.decoder.model, placed
        )
    assert int(length[0]) == n + len(places)
    np.testing.assert_allclose(np.asarray(scores), wanted, rtol=1e-4, atol=1e-4)


def test_a_clip_has_the_same_answer_in_any_company_and_an_image_loses_nothing(
    plain, mesh8, mesh1, films
):
    prompts = ["what happens?", "is it red?", "how many are there?"]
    asked = dict(max_new_tokens=NEW, frames=T)
    whole = model(plain, mesh1, "none").generate(films, prompts, **asked)
    all_of_it = model(plain, mesh1, "evs:dropped=0.001").generate(films, prompts, **asked)
    assert int(T * V * 0.999) == T * V - 1  # all but one
    assert [a.visual_tokens for a in all_of_it] == [T * V - 1] * 3
    some = model(plain, mesh1, "evs:dropped=0.6")
    together = some.generate(films, prompts, **asked)
    alone = [some.generate([f], [p], **asked)[0] for f, p in zip(films, prompts, strict=True)]
    spread = model(plain, mesh8, "evs:dropped=0.6").generate(films, prompts, **asked)
    for a, b, c, d in zip(together, alone, spread, whole, strict=True):
        assert a.ids == b.ids == c.ids and a.visual_tokens == 8 and d.visual_tokens == T * V
    one = some.generate([films[0][0]], ["what is it?"], max_new_tokens=NEW)[0]
    plain_one = model(plain, mesh1, "none").generate(
        [films[0][0]], ["what is it?"], max_new_tokens=NEW
    )[0]
    assert one.ids == plain_one.ids and one.visual_tokens == V  # an image loses nothing


def test_what_has_no_frames_or_places_is_refused(plain, mesh1, films):
    read = Read(4, 16, tiny.method("pool", 16))
    for text, said in (
        ("evs", "pruning.dropped=0.0"),
        ("evs:dropped=1", "above 0 and below 1"),
        ("evs:dropped=0.5:tokens=4", "pruning.tokens=.* is not read"),
        ("fastv:tokens=4:dropped=0.5", "pruning.dropped=0.5 is of pruning.kind='evs'"),
    ):
        with pytest.raises(ValueError, match=said):
            describe(parse(text), read)
    for kind in ("random", "divprune", "prumerge", "voco", "llava_mini"):
        with pytest.raises(ValueError, match=f"compressor.kind='{kind}' has none"):
            describe(parse("evs:dropped=0.5"), Read(4, 4, tiny.method(kind, 4, **tiny.CLIP)))
    assert describe(parse("evs:dropped=0.5"), Read(4, 4, tiny.method("uniform", 4))).dropped == 0.5
    some = model(plain, mesh1, "evs:dropped=0.5")
    with pytest.raises(ValueError, match="the one clip of a row"):
        some.request(films[0][:2], "<image> or <image>?")
    with pytest.raises(ValueError, match="the one clip of a row"):
        some.request(films[0][:4], "<image> or <image>?", frames=2)


def test_costs_and_rows_count_what_is_given_to_the_llm():
    c = tiny.config(compressor=dict(kind="pool", tokens=4), pruning=dict(kind="evs", dropped=0.5))
    size = tiny.size(c)
    parts = size.vit, size.compressor, size.llm
    less = cost.request_flops(*parts, Q=10, G=3, frames=8, pruning=size.pruning)
    same = cost.request_flops(*parts, Q=10, G=3, frames=4)  # 16 of 32 tokens
    assert less.prefill == same.prefill and less.decode == same.decode
    assert less.encoder == 2 * same.encoder and less.compressor == 2 * same.compressor
    assert size.pruning.variant == "evs drops 0.5" and size.pruning.section()["dropped"] == 0.5
    assert dataclasses.replace(size, pruning=None) == tiny.size(
        tiny.config(compressor=dict(kind="pool", tokens=4))
    )


def test_a_folder_keeps_it_and_one_of_before_has_none(plain, tmp_path):
    flags = [f"--from={plain}", "--pruning=evs:dropped=0.7", f"--to={tmp_path}/a"]
    assert main(["convert", *flags]) == 0
    assert folder.read(tmp_path / "a").size().pruning == EVS(dropped=0.7)
    assert main(["convert", f"--from={plain}", "--pruning=fastv:layers=1:tokens=2",
                 f"--to={tmp_path}/b"]) == 0  # fmt: skip
    about = tmp_path / "b" / "config.json"
    written = json.loads(about.read_text())
    assert written["pruning"].pop("dropped") == 0.0
    about.write_text(json.dumps(written))
    assert folder.read(tmp_path / "b").size().pruning.kind == "fastv"


def test_packed_images_follow_each_other(mesh1):
    """The same row from images that begin their shares of the slots and from packed ones."""
    draw = np.random.default_rng(0)
    text, count = draw.normal(size=(1, 6, D)).astype(np.float32), np.array([[3, 1, 2]], np.int32)
    shares = draw.normal(size=(1, 3, 3, D)).astype(np.float32)
    packed = np.concatenate([shares[0, k, :n] for k, n in enumerate(count[0])])[None]
    at = dict(image_at=np.array([[2, 2, 5]], np.int32))
    with jax.set_mesh(mesh1):
        made_of = []
        for tokens, how in ((shares.reshape(1, 9, D), False), (packed, True)):
            placed = tiny.placed(dict(text=text, x=tokens, count=count, **at))
            visual = splice.Visual(placed["x"], placed["count"])
            x, inside, _ = splice.splice(placed["text"], visual, placed, packed=how)
            made_of.append((np.asarray(x)[0, :12], np.asarray(inside)[0, :12]))
    np.testing.assert_array_equal(made_of[0][0], made_of[1][0])
    np.testing.assert_array_equal(made_of[0][1], made_of[1][1])
    assert jnp.asarray(made_of[0][1]).sum() == 6
