# SPDX-License-Identifier: Apache-2.0
"""An engine answers as `VLM.generate` does, whatever the company, and every request ends."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tiny
from test_generate import made

import vlm_jax
from vlm_jax.serving import slots
from vlm_jax.serving.engine import Engine, lengths_of
from vlm_jax.serving.tickets import (
    Answer,
    Ask,
    Closed,
    Failed,
    Full,
    Gone,
    Piece,
    Ticket,
    Usage,
)

NEW = 6
LONG = "is it red? " * 6


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory, mesh1):
    """A model that serves any V, whose answers differ from prompt to prompt."""
    path = tmp_path_factory.mktemp("engine") / "model"
    made(path, trained, compressor=dict(kind="mqt", tokens=16))
    return vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(3)]


# What is asked: images by number, the prompt, and how.
ASKED = [
    ((0,), "what is this?", {}),
    ((1,), "is there a star?", dict(visual_tokens=1)),
    ((2,), "how many red circles are there?", dict(visual_tokens=7)),
    ((0,), "b", dict(visual_tokens=9)),
    ((), "what is this?", {}),
    ((0, 1), "is <image> in <image>?", dict(visual_tokens=7)),
    ((1,), ["what is this?", "a star", "read it."], {}),
    ((2,), "what is this?", dict(temperature=1.0, top_p=0.9, seed=3)),
    ((0,), "is it red?", dict(temperature=0.7, seed=5, visual_tokens=4)),
    ((0,), LONG, {}),
]


def offline(model, images, which, prompt, how, new=NEW):
    """The answer of `VLM.generate`, alone."""
    given = [images[k] for k in which]
    return model.generate([given or None], [prompt], max_new_tokens=new, **how)[0]


@pytest.fixture(scope="module")
def alone(model, images):
    return [offline(model, images, *one) for one in ASKED]


@pytest.fixture(scope="module")
def engine(model, alone):
    """Warm; `alone` first, as the model has one user at a time."""
    engine = Engine(model, slots=4, queue=16, index_bytes=10**7, lengths=(64, 128), chunks=(16, 32))
    engine.warm()
    yield engine
    assert engine.drain(60.0)


def ask(engine, images, which, prompt, how, new=NEW, **more):
    pixels = tuple(engine.pixels(images[k]) for k in which)
    return Ask(prompt, pixels, max_new_tokens=new, **how, **more)


@pytest.fixture(scope="module")
def compilations():
    """What JAX traces and compiles, one name each."""
    seen = []

    def listen(event, seconds, **more):
        if event.startswith("/jax/core/compile"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_every_answer_is_the_one_it_has_alone_and_nothing_is_compiled(
    engine, images, alone, compilations
):
    """Asked by three threads in three orders, twice: new, and with images and beginnings known."""
    before, compiled = len(compilations), engine.stats().compiled
    orders = [list(np.random.default_rng(seed).permutation(len(ASKED))) for seed in range(3)]

    def asked(order):
        tickets = {k: engine.submit(ask(engine, images, *ASKED[k])) for k in order[:5]}
        found = {k: ticket.answer() for k, ticket in tickets.items()}
        rest = {k: engine.submit(ask(engine, images, *ASKED[k])) for k in order[5:]}
        return found | {k: ticket.answer() for k, ticket in rest.items()}

    with ThreadPoolExecutor(3) as threads:
        for answers in threads.map(asked, orders):
            for k, expected in enumerate(alone):
                assert (list(answers[k].ids), answers[k].text) == (expected.ids, expected.text), k
                usage = answers[k].usage
                assert usage.text_tokens == expected.prompt_tokens
                assert usage.image_tokens == expected.visual_tokens
                assert usage.new_tokens == len(expected.ids)
                assert answers[k].finish == ("stop" if expected.stopped else "length")
    assert len({tuple(a.ids) for a in alone}) > 5
    assert (len(compilations), engine.stats().compiled) == (before, compiled)
    stats = engine.stats()
    assert (stats.answered, stats.failed, stats.running, stats.queued) == (30, 0, 0, 0)
    assert stats.index.image_hits > 0 and stats.index.reused_tokens > 0


def test_a_step_writes_into_the_caches_it_has_and_an_empty_pool_has_none(engine, images):
    pool, ended, seen = engine.schedule.pools[0], threading.Event(), []

    def listen(event):
        seen.append(pool.slots)
        if isinstance(event, Answer):
            ended.set()

    engine.submit(ask(engine, images, *ASKED[1]), listen)
    assert ended.wait(60)
    assert all(x.is_deleted() for x in jax.tree.leaves(seen[0].caches))
    assert seen[-1] is None


def test_a_second_turn_reads_what_is_new_and_names_its_image_by_handle(engine, model, images):
    first = engine.submit(ask(engine, images, (2,), LONG, {}, new=20)).answer()
    before = engine.stats().read_tokens
    talk = [LONG, first.text, "is there a star?"]
    expected = offline(model, images, (2,), talk, {})
    second = engine.submit(Ask(talk, first.handles, max_new_tokens=NEW)).answer()
    assert list(second.ids) == expected.ids and second.handles == first.handles
    usage = second.usage
    assert usage.reused_image_tokens == usage.image_tokens == 16
    assert usage.cached_tokens >= 32 and usage.cached_tokens % 32 == 0
    whole = usage.text_tokens + usage.image_tokens
    assert engine.stats().read_tokens - before == whole - usage.cached_tokens
    # The same image in another number of slots is another entry.
    with pytest.raises(Gone, match="at 1 visual tokens: send the image"):
        engine.submit(Ask("a", first.handles, visual_tokens=1))
    with pytest.raises(Gone):
        engine.submit(Ask("a", ("0" * 32,)))


def test_an_image_that_stands_twice_in_a_prompt_is_encoded_once(engine, model, images):
    new, prompt = 255 - images[2], "is <image> in <image>?"
    pixels = engine.pixels(new)
    answer = engine.submit(Ask(prompt, (pixels, pixels), max_new_tokens=NEW)).answer()
    assert 2 * answer.usage.reused_image_tokens == answer.usage.image_tokens > 0
    assert list(answer.ids) == list(offline(model, {0: new}, (0, 0), prompt, {}).ids)


def test_a_stop_string_ends_the_answer_before_it(engine, model, images, alone):
    which, prompt, how = ASKED[0]
    whole = offline(model, images, which, prompt, how, new=12).text
    words = whole.split()
    stop = (f"{words[1]} {words[2]}", "never said")
    *pieces, answer = engine.submit(ask(engine, images, which, prompt, how, new=12, stop=stop))
    assert answer.text == whole[: whole.index(stop[0])] and answer.finish == "stop"
    assert "".join(piece.text for piece in pieces) == answer.text
    assert sum((piece.ids for piece in pieces), ()) == answer.ids


def test_scores_are_the_log_probabilities_of_whole_passes(engine, model, images, alone):
    which, prompt, how = ASKED[0]
    answer = engine.submit(ask(engine, images, which, prompt, how, logprobs=3)).answer()
    request = model.request(images[0], prompt)
    ids = [*request.ids, *answer.ids]
    row = np.zeros((1, 64), np.int32)
    row[0, : len(ids)] = ids
    batch = dict(ids=row, pixels=np.stack(request.pixels), image_at=np.array([request.image_at]))
    with jax.set_mesh(model.mesh):
        run = jax.jit(lambda m, b: jax.nn.log_softmax(m.logits(b)))
        logprobs = np.asarray(run(model.decoder.model, tiny.placed(batch)))[0]
    for k, score in enumerate(answer.scores):
        here = logprobs[len(request.ids) + k]
        assert score.id == answer.ids[k] == score.likeliest[0].id
        assert score.logprob == pytest.approx(here[score.id], abs=1e-4)
        best = np.argsort(-here)[:3]
        assert [one.id for one in score.likeliest] == best.tolist()
        assert [x.logprob for x in score.likeliest] == pytest.approx(here[best].tolist(), abs=1e-4)
    assert len(answer.scores) == len(answer.ids)


def test_a_cancelled_request_ends_and_the_others_do_not_notice(engine, images, alone):
    long = engine.submit(ask(engine, images, (0,), "b", {}, new=100))
    others = [engine.submit(ask(engine, images, *one)) for one in ASKED[:3]]
    events = iter(long)
    assert isinstance(next(events), Piece)
    long.cancel()
    *_, answer = events
    assert answer.finish == "cancelled" and 0 < len(answer.ids) < 100
    for ticket, expected in zip(others, alone, strict=False):
        assert list(ticket.answer().ids) == expected.ids
    assert engine.stats().running == 0


def test_what_is_cancelled_at_any_time_got_a_beginning_of_its_answer(engine, images, alone):
    patience = np.random.default_rng(4).integers(1, 6, 30)

    def client(number):
        k, seen = number % len(ASKED), []
        ticket = engine.submit(ask(engine, images, *ASKED[k]))
        for event in ticket:
            seen.append(event)
            if len(seen) == patience[number]:
                ticket.cancel()
        return k, seen[-1]

    with ThreadPoolExecutor(6) as threads:
        ended = list(threads.map(client, range(30)))
    for k, answer in ended:
        assert list(answer.ids) == alone[k].ids[: len(answer.ids)]
        assert alone[k].text.startswith(answer.text) and answer.finish != "deadline"
        assert answer.usage.new_tokens == len(answer.ids)
    assert {answer.finish for _, answer in ended} >= {"cancelled", "length"}
    assert engine.stats().running == engine.stats().queued == 0


def test_a_late_request_ends_with_what_it_has(engine, images):
    late = engine.submit(ask(engine, images, (0,), "b", {}, deadline=0.0)).answer()
    assert (late.finish, late.ids, late.text, late.first_token_seconds) == (
        "deadline",
        (),
        "",
        None,
    )


def test_a_full_queue_refuses_and_no_listener_stops_the_engine(engine, images):
    held, go = threading.Event(), threading.Event()

    def listen(event):
        held.set()
        assert go.wait(60)
        raise RuntimeError("nobody is there any more")

    engine.submit(ask(engine, images, *ASKED[0]), listen)
    assert held.wait(60)
    # Three of four slots are free.
    waiting = [engine.submit(ask(engine, images, *ASKED[1])) for _ in range(engine.queue + 3)]
    with pytest.raises(Full, match="19 requests wait"):
        engine.submit(ask(engine, images, *ASKED[1]))
    assert engine.stats().queued == 19
    go.set()
    assert len({ticket.answer().ids for ticket in waiting}) == 1


def test_what_fails_is_told_to_those_it_belongs_to(engine, images, alone, monkeypatch):
    def broken(*given):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room")

    for name in ("levels", "step", "of_rows"):
        with monkeypatch.context() as patch:
            patch.setattr(engine.programs, name, broken)
            fresh = np.full((32, 32, 3), len(name), np.uint8)
            asks = [Ask("b", (engine.pixels(fresh),), max_new_tokens=NEW)] * 2
            tickets = [engine.submit(one) for one in asks]
            failed = 0
            for ticket in tickets:
                try:
                    ticket.answer()
                except RuntimeError as error:
                    assert "out of memory" in str(error)
                    failed += 1
            # A row that needs more room than there is fails alone.
            assert failed == (1 if name == "of_rows" else 2), name
        answer = engine.submit(ask(engine, images, *ASKED[0])).answer()
        assert list(answer.ids) == alone[0].ids


def test_an_index_for_which_there_is_no_memory_grows_no_more(
    engine, images, alone, monkeypatch, capsys
):
    def full(*given):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    before = engine.index.limit
    monkeypatch.setattr(engine.programs, "block", full)
    fresh = "is it red? is there a star? " * 3
    assert engine.submit(ask(engine, images, (1,), fresh, {})).answer().finish == "length"
    assert engine.stats().index.limit == engine.index.used < before
    assert "the device has no more memory" in capsys.readouterr().err
    answer = engine.submit(ask(engine, images, *ASKED[0])).answer()
    assert list(answer.ids) == alone[0].ids
    engine.index.limit = before


@pytest.mark.parametrize(
    "words, given",
    [
        ("made for 128: shorten", dict(prompt="a star " * 100)),
        ("logprobs=21: give a whole number from 0 to 20", dict(logprobs=21)),
        ("stop='': a stop string", dict(stop=("",))),
        ("top_p=0", dict(top_p=0.0)),
        ("17 visual tokens", dict(visual_tokens=17)),
        ("2 times <image> in the prompt and 0", dict(prompt="<image> <image>")),
        ("0 images and 1 places", dict(prompt="tokens")),
        ("float32 .32, 32, 3., not float32.8, 8, 3.", dict(images="small")),
    ],
)
def test_what_cannot_be_answered_is_refused_with_numbers(engine, words, given):
    given = dict(prompt="a") | given
    if given["prompt"] == "tokens":
        given["prompt"] = engine.tokens("a", images=1)
    if "images" in given:
        given["images"] = (np.zeros((8, 8, 3), np.float32),)
    with pytest.raises(ValueError, match=words):
        engine.submit(Ask(**given))


def test_an_engine_that_drains_finishes_what_it_took_or_cancels_it(model, images, alone):
    short = dict(slots=1, queue=4, index_bytes=0, lengths=(64,), chunks=(16, 32))
    engine = Engine(model, **short)
    with pytest.raises(ValueError, match="this engine's rows have 64 at most"):
        engine.submit(Ask("a", max_new_tokens=70))
    tickets = [engine.submit(ask(engine, images, *ASKED[0])) for _ in range(3)]
    assert engine.drain()
    for ticket in tickets:
        answer = ticket.answer()
        assert list(answer.ids) == alone[0].ids and answer.handles == ()
        assert answer.usage.cached_tokens == 0
    engine.thread.join(60)
    assert not engine.thread.is_alive()
    for refused in (lambda: engine.submit(Ask("a")), engine.warm):
        with pytest.raises(Closed, match="draining"):
            refused()
    slow = Engine(model, **short)
    tickets = [slow.submit(ask(slow, images, (0,), "b", {}, new=40)) for _ in range(2)]
    assert not slow.drain(0.0)
    assert {ticket.answer().finish for ticket in tickets} == {"cancelled"}


def test_an_engine_is_one_replica(mesh8):
    many = object.__new__(vlm_jax.VLM)
    many.mesh = mesh8
    with pytest.raises(ValueError, match="start one for each replica"):
        Engine(many, slots=1, queue=1, index_bytes=0)


def test_lengths_and_rows_grow_by_fours():
    assert lengths_of(2048) == (256, 1024, 2048) and lengths_of(128) == (128,)
    assert slots.rungs_of(16) == (1, 4, 16) and slots.rungs_of(1) == (1,)
    assert slots.rungs_of(6) == (1, 4, 6)


def test_a_ticket_gives_its_events_in_order_and_ends_with_the_answer_or_the_reason():
    end = Answer("ab", (1, 2), "stop", Usage(1, 0, 0, 0, 2), (), (), 0.1, 0.2)
    ticket = Ticket()
    for event in (Piece("a", (1,)), Piece("b", (2,)), end):
        ticket.tell(event)
    *pieces, answer = ticket
    assert "".join(piece.text for piece in pieces) == answer.text and answer is end
    failed = Ticket()
    failed.tell(Failed("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        failed.answer()
    heard = []
    Ticket(heard.append).tell(end)
    assert heard == [end]
