# SPDX-License-Identifier: Apache-2.0
"""An engine serves models that decide over a whole prompt, and compressors that read its words."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import made_clip
import numpy as np
import pytest
from test_convert import run
from test_generate import made

import vlm_jax
from vlm_jax.models import pruned
from vlm_jax.serving import reading
from vlm_jax.serving.engine import Engine, refusal
from vlm_jax.serving.layout import Layout
from vlm_jax.serving.requests import TooLong
from vlm_jax.serving.tickets import Ask, Gone

NEW = 5
ALL = dict(compressor=dict(kind="none", tokens=16), llm=dict(depth=3))


def pruning(kind, **more):
    return dict(pruning=dict(kind=kind, **more))


MODELS = {
    "fastv": ALL | pruning("fastv", layers=(1,), tokens=(5,)),
    "pyramiddrop": ALL | pruning("pyramiddrop", layers=(1, 2), tokens=(6, 2)),
    "tokencarve": ALL | pruning("tokencarve", layers=(1,), tokens=(6,)),
    "voco": dict(compressor=dict(kind="voco", tokens=2)),
    "llava_mini": dict(compressor=dict(kind="llava_mini", tokens=4, heads=2, prefusion=2)),
    "mmtok": dict(compressor=dict(kind="mmtok", tokens=4)),
    # An image's own number of tokens, any number by request, and a question, each before a cut.
    "prumerge, fastv": dict(compressor=dict(kind="prumerge", tokens=0), vit=dict(depth=4))
    | pruning("fastv", layers=(1,), tokens=(3,)),
    "mqt, fastv": dict(compressor=dict(kind="mqt", tokens=16, heads=2))
    | pruning("fastv", layers=(1,), tokens=(3,)),
    "quecc, fastv": dict(compressor=dict(kind="quecc", tokens=4, query="separate"))
    | pruning("fastv", layers=(1,), tokens=(2,)),
}
ANY = {"mmtok", "mqt, fastv"}  # give any V

# What is asked: an image by number or none, the prompt, and how; V where a model gives any.
ASKED = [
    (0, "what is this?", {}, 2),
    (1, "is there a star?", {}, None),
    (None, "who is there?", {}, None),
    (2, "what is this?", dict(temperature=1.0, top_p=0.9, seed=3), 9),
    (1, ["what is this?", "a star", "read it."], {}, 16),
    (0, "is it red? " * 5, {}, 1),
]


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    shapes = [(32, 32), (20, 50), (64, 40)]
    return [draw.integers(0, 256, (*s, 3)).astype(np.uint8) for s in shapes]


# What they share is tested without the mark: one cut, a selection, a summary.
LONG = {
    "mqt, fastv", "prumerge, fastv", "quecc, fastv", "tokencarve", "pyramiddrop", "llava_mini"
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(MODELS)
    ],
)
def served(request, trained, tmp_path_factory, mesh1, images):
    """The name of a model, an engine of it, and what `generate` answers to all that is asked."""
    path = tmp_path_factory.mktemp("whole") / "model"
    model = vlm_jax.VLM.from_checkpoint(made(path, trained, **MODELS[request.param]), mesh=mesh1)
    yield from warm(request.param, model, images)


def warm(name, model, images):
    alone = [
        model.generate(
            None if image is None else images[image],
            [prompt],
            max_new_tokens=NEW,
            visual_tokens=V if name in ANY else None,
            **how,
        )[0]
        for image, prompt, how, V in ASKED
    ]
    assert len({tuple(answer.ids) for answer in alone}) > 2
    assert not refusal(model)
    engine = Engine(
        model, slots=2, queue=32, index_bytes=10**7, lengths=(128,), chunks=(32,),
        visual_tokens=(1, 2, 9, 16) if name == "mmtok" else (),
    )  # fmt: skip
    engine.warm()
    yield name, engine, alone
    assert engine.drain(60.0)


def ask(engine, images, name, image, prompt, how, V):
    pixels = () if image is None else (engine.pixels(images[image]),)
    V = V if name in ANY else None
    return Ask(prompt, pixels, max_new_tokens=NEW, visual_tokens=V, **how)


def test_every_answer_is_the_one_it_has_alone_and_nothing_is_compiled(served, images):
    check(*served, images)


def check(name, engine, alone, images):
    """Asked by two threads in two orders: in company, new and with images known."""
    seen, compiled = [], engine.stats().compiled

    def listen(event, seconds, **more):
        if event.startswith("/jax/core/compile"):
            seen.append(event)

    def asked(seed):
        order = np.random.default_rng(seed).permutation(len(ASKED)).tolist()
        tickets = {k: engine.submit(ask(engine, images, name, *ASKED[k])) for k in order}
        return {k: ticket.answer() for k, ticket in tickets.items()}

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(asked, range(2)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    for answers in found:
        for k, expected in enumerate(alone):
            assert (list(answers[k].ids), answers[k].text) == (expected.ids, expected.text), k
            usage = answers[k].usage
            assert usage.text_tokens == expected.prompt_tokens
            assert usage.image_tokens == expected.visual_tokens
    assert (seen, engine.stats().compiled) == ([], compiled)
    stats = engine.stats()
    assert (stats.failed, stats.running, stats.queued) == (0, 0, 0)
    assert stats.index.image_hits > 0


def test_an_image_is_named_by_its_handle_and_not_encoded_again(served, images):
    name, engine, alone = served
    first = engine.submit(ask(engine, images, name, *ASKED[1])).answer()
    image, prompt, how, V = ASKED[1]
    V = V if name in ANY else None
    again = Ask(prompt, first.handles, max_new_tokens=NEW, visual_tokens=V, **how)
    answer = engine.submit(again).answer()
    assert list(answer.ids) == alone[1].ids and answer.handles == first.handles
    assert answer.usage.reused_image_tokens == answer.usage.image_tokens > 0
    if engine.reader.block == 0:  # nothing but images is kept
        assert answer.usage.cached_tokens == 0 == engine.stats().index.blocks
    with pytest.raises(Gone):
        engine.submit(Ask(prompt, ("0" * 32,)))


@pytest.mark.parametrize("served", ["voco", "llava_mini", "fastv"], indirect=True)
def test_two_images_are_refused_before_anything_is_read(served, images):
    _, engine, _ = served
    pixels = engine.pixels(images[0])
    with pytest.raises(ValueError, match="ask about one image at a time"):
        engine.submit(Ask("a", (pixels, pixels)))
    one = engine.tokens("a", images=1)
    both = one._replace(places=one.places * 2, questions=one.questions * 2)
    with pytest.raises(ValueError, match="2 images, and a row of this model has one"):
        engine.submit(Ask(both, (pixels, pixels)))


@pytest.mark.parametrize("served", ["voco"], indirect=True)
def test_room_is_that_of_the_tokens_that_stay(served, images):
    """Of an image of 16 patches a summary of 2 tokens stays in the caches."""
    _, engine, _ = served
    assert engine.layout == Layout((0, 0), 2, 1)
    short = Engine(engine.model, slots=1, queue=1, index_bytes=0, lengths=(48,))
    pixels = (short.pixels(images[0]),)
    text = len(short.tokens("a", images=1).ids)
    with pytest.raises(TooLong, match=f"{text} tokens of text, 2 of images and up to 45"):
        short.submit(Ask("a", pixels, max_new_tokens=45))
    assert short.submit(Ask("a", pixels, max_new_tokens=46 - text)).answer().ids
    assert short.drain(60.0)


@pytest.mark.parametrize("served", ["pyramiddrop"], indirect=True)
def test_a_row_that_nobody_reads_stays_in_its_caches(served, images):
    _, engine, _ = served
    programs, reader, V = engine.programs, engine.reader, 16
    assert engine.layout == Layout((14, 4, 0), 2, 3)
    shown = reading.Seen(np.zeros((V, 16), np.float32), V)
    batch = reader.batch([3] * 5, (2,), [(shown, V)])
    read = programs.whole(batch, reading.GREEDY, 128)
    assert [cache.slots for cache in read.caches.layers] == [142, 132, 128]
    assert read.caches.dropped.ravel().tolist() == [0, 10, 14]
    slots = programs.insert(programs.opened(128), read.caches, 0, read.ids, 5 + V, reading.GREEDY)
    for _ in range(130):
        slots, _ = programs.step(slots)
    rooms = [one.slots + int(n) for one, n in zip(slots.caches.layers, slots.caches.dropped.ravel(),
                                                   strict=True)]  # fmt: skip
    assert rooms == [142, 142, 142] and slots.position.tolist() == [141]
    assert pruned.room(engine.model.decoder.model.llm, slots.caches).tolist() == [142]


def test_a_question_before_its_image_and_a_cut_behind_it_are_refused_with_the_way_out(
    trained, tmp_path, mesh1
):
    changes = dict(
        compressor=dict(kind="quecc", tokens=4, query="prefix"),
        data=dict(template="question_first", question_length=16),
    ) | pruning("fastv", layers=(1,), tokens=(2,))
    model = vlm_jax.VLM.from_checkpoint(made(tmp_path / "m", trained, **changes), mesh=mesh1)
    with pytest.raises(ValueError, match="query='prefix'.*set pruning.kind='none'.*VLM.generate"):
        Engine(model, slots=1, queue=1, index_bytes=0)


def test_a_compressor_that_reads_the_size_of_an_image_is_not_given_pixels_alone(
    trained, tmp_path, images, mesh1
):
    path = made(tmp_path / "m", trained, compressor=dict(kind="mmtok", tokens=4))
    model = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)
    engine = Engine(model, slots=1, queue=1, index_bytes=0)
    wide, same = engine.pixels(images[1]), engine.pixels(images[0])
    assert (wide.size, same.size) == ((50, 20), (32, 32))
    with pytest.raises(ValueError, match="the size that an image had.*Engine.pixels"):
        engine.submit(Ask("a", (wide.pixels,)))
    # The same pixels of another shape are another image.
    names = [engine.image(wide._replace(size=s), [1], 4).handle for s in ((50, 20), (20, 50))]
    assert len(set(names)) == 2
    engine.reader.questions = (8,)
    with pytest.raises(TooLong, match="a question of .* the compressor reads 8 of them"):
        engine.submit(Ask("one two three four five six seven eight nine", (wide,)))
    assert engine.drain(60.0)


@pytest.mark.slow
def test_clips_ids_of_a_question_choose_the_patches(trained, tmp_path, images, mesh1):
    """In front of a model that was trained here: its tower is not a CLIP's, but as wide."""
    made(tmp_path / "a", trained, compressor=dict(kind="none", tokens=16))
    clip = made_clip.clip(tmp_path / "clip", width=16, side=4, blocks=3)
    flags = ("--compressor=cdpruner", "--tokens=5", "--text-tower", clip)
    assert run("--from", tmp_path / "a", *flags, "--to", tmp_path / "b") == 0
    model = vlm_jax.VLM.from_checkpoint(tmp_path / "b", mesh=mesh1)
    for name, engine, alone in warm("cdpruner", model, images):
        assert len(engine.reader.questions) == 1  # a tower reads so many
        check(name, engine, alone, images)


def test_text_is_padded_to_few_sizes_of_which_the_last_holds_every_row(trained, tmp_path, mesh1):
    path = made(tmp_path / "m", trained, **MODELS["fastv"])
    model = vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)
    sizes = []
    for chunks in (None, (16, 200), (128,)):
        engine = Engine(model, slots=1, queue=1, index_bytes=0, chunks=chunks)
        sizes.append(engine.reader.sizes)
        assert engine.drain(60.0)
    assert sizes == [(64, 128), (16, 128), (128,)]
    # The image behind the last token needs a place.
    batch = functools.partial(engine.reader.batch, images=[])
    engine.reader.sizes = (4, 8)
    assert [batch([1] * 4, at)["ids"].shape[1] for at in ((), (3,), (4,))] == [4, 4, 8]
    assert batch([1] * 3, ())["image_at"].tolist() == [4]
    assert batch([1] * 3, (2,))["length"].tolist() == [3]
