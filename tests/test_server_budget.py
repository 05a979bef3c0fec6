# SPDX-License-Identifier: Apache-2.0
"""V of a request is what it asks for, or what the law says is worth its time; and why is said."""

import dataclasses

import made_engine
import numpy as np
import pytest
import tiny
from listening import chat, image, serving, text

from vlm_jax.cost import roofline
from vlm_jax.cost.chips import Chip
from vlm_jax.law.answer import Answer, Cells
from vlm_jax.law.forms import FORMS
from vlm_jax.law.law import Law
from vlm_jax.planning import decision
from vlm_jax.planning.mixture import Mixture
from vlm_jax.server.auto import Auto, Load
from vlm_jax.server.budget import Chooser
from vlm_jax.server.choices import Choices
from vlm_jax.server.messages import Placed
from vlm_jax.server.refusals import Refusal
from vlm_jax.server.schema import ChatRequest, ImageUrl

SIZE = tiny.size(tiny.config(compressor=dict(kind="m3", tokens=4)))
N = Auto(SIZE).N
IDLE = Load(0, 0, 4)
SLOW = Chip("slow", 1e9, 1e9, 1e12, 4, "made")
STEEP = dict(A=0.2, alpha=0.1, beta=0.3, D=0.0)


def law(*, draws=200, method="m3", low=1.0, high=16.0, around=N, **params):
    """A multiplicative law around the model's N, with draws of its exponent of V."""
    params = STEEP | params
    names = FORMS["multiplicative"].names
    values = np.tile([params[name] for name in names], (draws, 1))
    values[:, names.index("beta")] *= np.random.default_rng(0).normal(1, 0.1, draws)
    one = Law(
        "multiplicative", params, sse=0.0, rmse=0.0, n=9, samples=values if draws else None,
        domain={"N": [around / 2, around * 2], "V": [low, high], "Q": [0.0, 100.0]},
    )  # fmt: skip
    return Mixture({"all": one}, {"all": 1.0}, method=method)


def chooser(law=None, size=SIZE, chip=None, target=None, **choices):
    return Chooser(Choices.of(size, **choices), Auto(size, law, chip, target))


def taken(chooser, *details, images=1, load=IDLE, text=10, new=8, **fields):
    """The budget of a request with these fields and details of its images."""
    messages = [{"role": "user", "content": "a"}]
    asked = ChatRequest.model_validate({"messages": messages} | fields)
    details = details or (None,) * images
    placed = [
        Placed(ImageUrl(url="data:", detail=detail), f"messages[0].content[{k}]")
        for k, detail in enumerate(details)
    ]
    return chooser.take(asked, placed, text=text, new=new, load=load)


# --- What a request says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, details, V, by",
    [
        (dict(visual_tokens=16), (), 16, "request"),
        (dict(visual_tokens=16), ("low",), 16, "request"),
        (dict(mm_processor_kwargs=dict(max_soft_tokens=15)), (), 4, "request"),
        (dict(mm_processor_kwargs=dict(max_soft_tokens=10**6)), (), 16, "request"),
        (dict(visual_tokens=1, mm_processor_kwargs=dict(max_soft_tokens=4)), (), 1, "request"),
        ({}, ("low", "low"), 1, "detail"),
        ({}, ("high",), 16, "detail"),
        ({}, ("auto",), 4, "server"),
        ({}, (), 4, "server"),
        (dict(visual_tokens="auto"), (), 4, "server"),
        (dict(visual_tokens="auto", mm_processor_kwargs=dict(max_soft_tokens=3)), (), 1, "server"),
    ],
)
def test_a_request_gets_what_it_asks_for(fields, details, V, by):
    found = taken(chooser(), *details, **fields)
    assert (found.visual_tokens, found.by) == (V, by) and found.why


@pytest.mark.parametrize(
    "fields, details, said",
    [
        (dict(visual_tokens=5), (), "choose one of 1, 4, 16, or auto"),
        (dict(visual_tokens=16, mm_processor_kwargs=dict(max_soft_tokens=4)), (), "more than max"),
        ({}, ("low", "high"), "high and low in one request"),
    ],
)
def test_wishes_that_cannot_be_are_refused(fields, details, said):
    with pytest.raises(Refusal, match=said):
        taken(chooser(), *details, **fields)


def test_a_request_without_an_image_has_no_budget_but_a_wrong_wish_is_refused():
    assert taken(chooser(), images=0, visual_tokens=16) is None
    with pytest.raises(Refusal, match="choose one of"):
        taken(chooser(), images=0, visual_tokens=5)


def test_the_operator_chooses_what_words_and_silence_mean():
    own = chooser(default=1, low=4, high=4)
    assert taken(own).visual_tokens == 1 and taken(own, "low").visual_tokens == 4
    for wrong in (dict(default=5), dict(low=3), dict(low=16, high=4)):
        with pytest.raises(ValueError, match="--"):
            Choices.of(SIZE, **wrong)


def test_a_model_with_one_v_says_so_and_gives_no_other():
    one = chooser(size=tiny.size(tiny.get_config()))
    found = taken(one, "high", visual_tokens="auto")
    assert (found.visual_tokens, found.by) == (4, "model")
    assert "visual_tokens=auto and detail=high changes nothing" in found.why
    assert taken(one, visual_tokens=4).visual_tokens == 4
    with pytest.raises(Refusal, match="that give several are .*m3.*mqt"):
        taken(one, visual_tokens=9)
    with pytest.raises(Refusal, match="at least V=4"):
        taken(one, mm_processor_kwargs=dict(max_soft_tokens=3))
    with pytest.raises(ValueError, match="V=4 alone"):
        Choices.of(tiny.size(tiny.get_config()), low=1)


def test_any_number_of_mqt_may_be_asked_for():
    size = tiny.size(tiny.config(compressor=dict(kind="mqt", tokens=16)))
    found = Choices.of(size)
    assert found.supported == tuple(range(1, 17)) and (found.low, found.high) == (1, 16)


# --- The law --------------------------------------------------------------------------------------


def test_auto_takes_the_fewest_tokens_that_err_no_more_than_epsilon_above_the_best():
    steep, flat = law(), law(beta=0.001)
    assert taken(chooser(steep), "auto").visual_tokens == 16
    found = taken(chooser(flat), "auto")
    assert found.visual_tokens == 1 and found.by == "law" and "errs 0.0" in found.why
    assert found.predicted_error == pytest.approx(float(flat.error(N, 1.0)))
    draws = flat.draws(np.full(3, N), np.array([1.0, 4.0, 16.0]), 10)
    assert found.p_best == pytest.approx(decision.odds(draws).best[0])
    low, high = found.interval
    assert low <= found.predicted_error <= high
    asked = dict(visual_tokens="auto", mm_processor_kwargs=dict(max_soft_tokens=5))
    assert taken(chooser(steep), **asked).visual_tokens == 4


def test_a_latency_target_limits_v_and_load_limits_it_further():
    auto = Auto(SIZE, law(), SLOW, 1.0)
    times = [auto.milliseconds(V, 1, 10, 8, IDLE) for V in (1, 4, 16)]
    assert times == sorted(times) and times[0] < times[2]
    free = chooser(law(), chip=SLOW, target=times[2] * 1.001)
    assert taken(free, "auto").visual_tokens == 16
    tight = chooser(law(), chip=SLOW, target=(times[1] + times[2]) / 2)
    found = taken(tight, "auto")
    assert found.visual_tokens == 4 and found.predicted_ms == pytest.approx(times[1])
    assert found.load == dict(active=0, waiting=0, slots=4, measured=None)
    # A queue takes its time: the same target holds fewer tokens.
    busy = taken(free, "auto", load=Load(4, 3, 4))
    assert busy.visual_tokens == 1 and "no V is expected within" in busy.why
    assert busy.predicted_ms > busy.target_ms


def test_the_predicted_time_is_the_roofline_of_reading_and_of_steps_in_company():
    auto = Auto(SIZE, law(), SLOW)
    alone = roofline.seconds(
        SIZE.vit, SIZE.compressor.at(4), SIZE.llm, roofline.Request(10, 8, frames=2), SLOW
    )
    assert auto.milliseconds(4, 2, 10, 8, IDLE) == pytest.approx(1e3 * sum(alone.values()))
    company = auto.milliseconds(4, 2, 10, 8, Load(3, 0, 4))
    waits = auto.milliseconds(4, 2, 10, 8, Load(4, 0, 4))
    assert 1e3 * sum(alone.values()) <= company < waits
    assert waits == pytest.approx(company * (1 + 1 / 4))
    slow = auto.milliseconds(4, 2, 10, 8, Load(3, 0, 4, measured=2.5))
    assert slow == pytest.approx(2.5 * company)


def test_what_answers_took_corrects_what_the_next_ones_are_expected_to_take():
    service = made_engine.service(SIZE, law=law(), chip=SLOW, seconds=0.01)
    with serving(service) as address:
        for _ in range(2):
            status, _, body = chat(address, [text("a"), image(detail="auto")])
        budget, took = body["vlm_jax"]["budget"], 1e3 * body["vlm_jax"]["seconds"]
        assert status == 200 and took / 2 < budget["predicted_ms"] < took * 2
        assert budget["load"]["measured"] > 1 and not budget["warnings"]


@pytest.mark.parametrize(
    "given, said",
    [
        (None, "no law"),
        (law(method="token_packer,separate"), "fitted with token_packer,separate, and this model"),
        (law(around=7.0), "fitted on N=3.5 to 14 billion"),
        (law(low=2.0, high=3.0), "fitted on V=2 to 3"),
    ],
)
def test_where_the_law_does_not_know_it_is_not_asked(given, said):
    found = taken(chooser(given), "auto")
    assert (found.visual_tokens, found.by) == (4, "server") and said in found.why
    assert found.predicted_error is None and found.p_best is None


def test_a_law_that_misfits_gives_no_answer():
    fitted = law()
    doubtful = dataclasses.replace(fitted.laws["all"], misfit={"sentence": "misses a pattern"})
    alone = Mixture({"all": doubtful}, {"all": 1.0}, method="m3")
    assert "cannot be trusted" in taken(chooser(alone), "auto").why
    ones = np.ones(1)
    cells = Cells(ones * N, ones, ones, ones * 0.3, ones * 0.01, 30.0)
    by_cells = Answer("cells", {}, {}, cells, misfit="no form of the law fits")
    measured = Mixture(fitted.laws, {"all": 1.0}, {"all": by_cells}, method="m3")
    assert "no form of the law fits" in taken(chooser(measured), "auto").why


def test_the_law_of_the_models_own_method_answers_among_several():
    several = dataclasses.replace(
        law(method="token_packer,separate"), others={"m3": law(beta=0.001)}
    )
    assert taken(chooser(several), "auto").by == "law"


def test_what_weakens_a_choice_is_said():
    unnamed = taken(chooser(law(method=None), chip=SLOW, target=1e9), "auto", text=1000)
    assert any("with which compressor" in one for one in unnamed.warnings)
    assert any("roofline" in one for one in unnamed.warnings)
    bare = taken(chooser(law(draws=0)), "auto")
    assert bare.p_best is None and bare.by == "law"


def test_a_target_needs_a_chip_and_a_law():
    with pytest.raises(ValueError, match="--chip"):
        Auto(SIZE, law(), None, 10.0)
    with pytest.raises(ValueError, match="--law"):
        Auto(SIZE, None, SLOW, 10.0)


def test_flops_are_those_of_the_request():
    auto = Auto(SIZE)
    one, two = (auto.flops(4, images=k, text=10, new=3) for k in (1, 2))
    assert two["encoder"] == 2 * one["encoder"] and two["prefill"] > one["prefill"]
    none = auto.flops(4, images=0, text=10, new=3)
    assert none["encoder"] == none["compressor"] == 0 < none["prefill"] < one["prefill"]


def test_what_a_pruning_leaves_out_and_an_index_keeps_is_not_counted():
    c = tiny.config(compressor=dict(kind="none", tokens=16), llm=dict(depth=3))
    whole = tiny.size(c)
    c.pruning.update(dict(kind="fastv", layers=(1,), tokens=(2,)))
    pruned = Auto(tiny.size(c), chip=SLOW)
    asked = dict(images=1, text=10, new=3)
    mine, theirs = (auto.flops(16, **asked) for auto in (pruned, Auto(whole)))
    assert mine["prefill"] < theirs["prefill"] and mine["decode"] < theirs["decode"]
    times = [auto.milliseconds(16, 1, 10, 3, IDLE) for auto in (pruned, Auto(whole, chip=SLOW))]
    assert times[0] < times[1]
    # LLaVA-Mini's text reads the patches of an image that is known too.
    mini = Auto(tiny.size(tiny.config(compressor=dict(kind="llava_mini", tokens=4, heads=2))))
    new, known = (mini.flops(4, encoded=share, **asked) for share in (1.0, 0.0))
    assert known["encoder"] == 0 < known["compressor"] == new["compressor"]
