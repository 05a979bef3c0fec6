# SPDX-License-Identifier: Apache-2.0
"""The search finds the closed-form optimum under the paper's cost, and the true one under every
other.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import tiny

from configs import base, sizes
from vlm_jax.compressors import describe
from vlm_jax.compressors.method import Interface
from vlm_jax.cost import chips
from vlm_jax.cost import flops as cost
from vlm_jax.law import methods, published
from vlm_jax.law.law import Law, fit
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.planning import choices, planner
from vlm_jax.planning.costs import FullCost, PaperCost, Workload
from vlm_jax.planning.mixture import Mixture
from vlm_jax.planning.planner import Budget, Search

CLIP = ViTSize.of(base.get_config().vit)
QWEN = {
    float(name[8:-1]): LLMSize.of(s) for name, s in sizes.LLM.items() if name.startswith("qwen1.5")
}
EVERY_V = {"token_packer": planner.Between(1.0, 576.0)}
WINDOWS = {"token_packer": [1.0, 4.0, 9.0, 16.0, 36.0, 64.0, 144.0, 576.0]}


def closed_form(alpha, beta, Q):
    """Minimizes N^-alpha V^-beta at constant N (Q + V), for 1 <= V <= 576."""
    return 576.0 if beta >= alpha else min(max(Q * beta / (alpha - beta), 1.0), 576.0)


def law(alpha, beta, *, A=0.59, D=0.0, domain=None):
    params = {"A": A, "alpha": alpha, "beta": beta, "D": D}
    return Law("multiplicative", params, sse=0.0, rmse=0.0, n=28, domain=domain or {})


def mixture(*laws):
    return Mixture(
        {str(i): it for i, it in enumerate(laws)}, {str(i): 1 / len(laws) for i in range(len(laws))}
    )


def paper(it, Q, flops, **workload):
    return Search(
        mixture(it),
        PaperCost(Workload(((Q, 1.0),), **workload)),
        Budget((("flops", flops),)),
        None,
        EVERY_V,
    )


def full(it, Q, unit, limit, *, tokens=None, llms=None, **settings):
    work = Workload(((Q, 1.0),), settings.pop("G", 0), settings.pop("batch", 1))
    return Search(
        mixture(it),
        FullCost(work, QWEN, CLIP, **settings),
        Budget(((unit, limit),)),
        llms,
        tokens or EVERY_V,
    )


def test_the_search_finds_the_closed_form_over_random_laws():
    """alpha > beta: V* = Q beta / (alpha - beta), whatever A, D and budget; N takes the rest."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
        alpha = rng.uniform(0.01, 0.5)
        beta = alpha * rng.uniform(0.02, 0.98)
        it = law(alpha, beta, A=rng.uniform(0.2, 2), D=rng.uniform(0, 0.4))
        Q, flops = float(rng.uniform(0, 500)), float(10 ** rng.uniform(10, 14))
        best = paper(it, Q, flops).candidates()[0]
        expected = closed_form(alpha, beta, Q)
        inside += 1 < expected < 576
        assert best.V == pytest.approx(expected, rel=0.01)
        assert best.cost == pytest.approx(flops) == cost.paper_flops(best.N, best.V, Q=Q)
    assert inside > 15  # the law was tested, not the clipping


def test_tokens_that_matter_more_than_parameters_take_all_they_can():
    """beta >= alpha, as for OCR: V* is the largest V; just below, it is the closed form."""
    for beta, expected in ((0.05, 576.0), (0.07, 576.0), (0.025, 50.0)):
        assert paper(law(0.05, beta), 50, 1e12).candidates()[0].V == pytest.approx(
            expected, rel=0.01
        )
    assert (
        paper(law(0.077, 0.015), 0, 1e12).candidates()[0].V == 1
    )  # no text: the published one token


def test_the_published_exponents_give_the_published_optimum():
    """12 tokens at Q = 50; about 24 at 100 and 121 at 500."""
    for Q, V in ((10, 2.4), (50, 12.1), (100, 24.2), (500, 121)):
        assert paper(law(0.077, 0.015), Q, 1e12).candidates()[0].V == pytest.approx(V, rel=0.01)


def test_generated_tokens_count_like_text_and_cached_text_costs_nothing():
    it = law(0.077, 0.015)
    assert paper(it, 30, 1e12, G=20).candidates()[0] == paper(it, 50, 1e12).candidates()[0]
    assert paper(it, 30, 1e12, cached_text=True).candidates()[0].V == 1


def test_full_cost_is_exact_at_described_sizes_and_lies_between_them_elsewhere():
    spent = FullCost(Workload(((50.0, 1.0),), G=4), QWEN, CLIP, chip=chips.CHIPS["v5e"])
    request = cost.request_flops(CLIP, tiny.method("token_packer", 36), QWEN[4.0], Q=50.0, G=4)
    assert spent.amount("flops", 4.0, 36, "token_packer") == pytest.approx(request.total)
    for unit in ("flops", "ms", "hbm"):
        low, middle, high = (spent.amount(unit, N, 36, "token_packer") for N in (4.0, 5.0, 7.0))
        assert low < middle < high
        assert spent.within(unit, middle, 36, "token_packer") == [(0.5, pytest.approx(5.0))]
        assert sum(spent.parts(5.0, 36, "token_packer")[unit].values()) == pytest.approx(middle)
        beyond = spent.amount(unit, 20.0, 36, "token_packer")
        assert spent.within(unit, beyond, 36, "token_packer") == [(0.5, pytest.approx(20.0))]


@pytest.mark.parametrize("unit", ["flops", "ms", "hbm", "dollars"])
def test_the_search_finds_what_trying_everything_finds(unit):
    """Fifteen random laws and limits per unit: every candidate, in order, with its cost."""
    rng = np.random.default_rng(len(unit))
    llms = (0.5, 1.8, 4.0, 7.0, 14.0)
    it = law(0.07, 0.03)
    search = full(
        it, 50.0, unit, np.inf, tokens=WINDOWS, llms=llms, chip=chips.CHIPS["v5e"], G=3,
        dollars_per_hour=1.2,
    )  # fmt: skip
    spent = {
        (N, V): search.cost.amount(unit, N, V, "token_packer")
        for N, V in itertools.product(llms, WINDOWS["token_packer"])
    }
    found = 0
    for _ in range(15):
        it = law(rng.uniform(0.01, 0.2), rng.uniform(0.005, 0.2), A=rng.uniform(0.2, 1))
        limit = float(np.exp(rng.uniform(*np.log([min(spent.values()), max(spent.values())]))))
        tried = sorted(
            (float(it.error(N, V)), amount, N, V)
            for (N, V), amount in spent.items()
            if amount <= limit
        )
        here = dataclasses.replace(search, law=mixture(it), budget=Budget(((unit, limit),)))
        listed = here.candidates()
        assert [(c.N, c.V) for c in listed] == [(N, V) for _, _, N, V in tried]
        assert [c.cost for c in listed] == [amount for _, amount, _, _ in tried]
        assert [c.error for c in listed] == pytest.approx([error for error, *_ in tried])
        found += len(tried) < len(spent)
    assert found > 10


def test_a_larger_llm_that_costs_less_is_offered():
    """Planted: the 7B LLM has a quarter of the 4B one's blocks, so it costs less than that."""
    odd = dict(QWEN) | {7.0: dataclasses.replace(QWEN[7.0], depth=8)}
    work = Workload(((50.0, 1.0),))
    spent = FullCost(work, odd, CLIP)
    totals = [spent.amount("flops", N, 16, "token_packer") for N in sorted(odd)]
    assert totals[3] < totals[2] and totals[3] > totals[1]
    for llms in ((0.5, 1.8, 4.0, 7.0), None):
        search = Search(
            mixture(law(0.07, 0.03)), spent, Budget((("flops", totals[3]),)), llms,
            {"token_packer": [16.0]},
        )  # fmt: skip
        best = search.candidates()[0]
        assert best.N == pytest.approx(7.0) and best.cost == pytest.approx(totals[3])
        parts = spent.parts(best.N, 16, "token_packer")["flops"]
        assert best.cost == pytest.approx(sum(parts.values()))
    low, high = spent.within("flops", totals[3], 16, "token_packer")
    assert low[0] == 0.5 and 1.8 < low[1] < 4 and high == (pytest.approx(7.0), pytest.approx(7.0))


def test_a_cost_that_every_configuration_pays_moves_the_budget_and_not_the_optimum():
    """The encoder is the same for all: a budget larger by its FLOPs buys what was bought without
    it.
    """
    it, small = law(0.077, 0.015), dataclasses.replace(CLIP, mlp=16, levels=(1, 2, 3, 4))
    counted = [cost.encoder_flops(vit, tiny.method("token_packer", 1)) for vit in (CLIP, small)]
    heavy = full(it, 50.0, "flops", 1.5e12)
    light = dataclasses.replace(
        heavy,
        cost=dataclasses.replace(heavy.cost, vit=small),
        budget=Budget((("flops", 1.5e12 - counted[0] + counted[1]),)),
    )
    best = [search.candidates()[0] for search in (heavy, light)]
    assert counted[0] > 10 * counted[1]
    assert best[0].N == pytest.approx(best[1].N, rel=1e-6) and best[0].V == pytest.approx(
        best[1].V, rel=1e-4
    )


def test_reading_the_question_twice_doubles_the_text_and_so_the_optimum():
    """A separate question pass costs Q tokens of the LLM more: V* as for 2 Q, give or take
    attention.
    """
    once = full(law(0.077, 0.015), 100.0, "flops", 2e12)
    twice = dataclasses.replace(
        once,
        tokens={"quecc": planner.Between(1.0, 576.0)},
        cost=dataclasses.replace(once.cost, query="separate"),
    )
    half = dataclasses.replace(
        twice, cost=dataclasses.replace(twice.cost, workload=Workload(((50.0, 1.0),)))
    )
    assert half.candidates()[0].V == pytest.approx(once.candidates()[0].V, rel=0.03)
    assert twice.candidates()[0].N < once.candidates()[0].N


def test_at_an_optimum_inside_both_gains_per_cost_are_equal():
    search = paper(law(0.077, 0.015), 50, 1e12)
    value = planner.marginal(search, search.candidates()[0])
    assert value["gain_per_cost_tokens_over_parameters"] == pytest.approx(1, abs=1e-3)
    assert value["error_saved_by_one_more_billion"] > value["error_saved_by_one_more_token"] > 0
    edge = paper(law(0.077, 0.015), 0, 1e12)
    assert planner.marginal(edge, edge.candidates()[0])["gain_per_cost_tokens_over_parameters"] < 1


def test_a_distribution_of_text_costs_its_mean_and_must_fit_its_longest():
    texts, mean = ((25.0, 0.5), (75.0, 0.5)), ((50.0, 1.0),)
    spread, single = (FullCost(Workload(t), QWEN, CLIP) for t in (texts, mean))
    # Attention is quadratic: the mean of costs is a little above the cost of the mean.
    ratio = spread.amount("flops", 4.0, 36, "token_packer") / single.amount(
        "flops", 4.0, 36, "token_packer"
    )
    assert 1 < ratio < 1.001
    longest = FullCost(Workload(((75.0, 1.0),)), QWEN, CLIP)
    assert spread.amount("hbm", 4.0, 36, "token_packer") == longest.amount(
        "hbm", 4.0, 36, "token_packer"
    )
    it = law(0.077, 0.015)
    both = [
        dataclasses.replace(paper(it, 50, 1e12), cost=PaperCost(Workload(t))).candidates()[0]
        for t in (texts, mean)
    ]
    assert both[0].V == pytest.approx(both[1].V, rel=1e-6)


def test_a_mixture_is_the_weighted_mean_of_its_laws_and_so_is_its_interval():
    laws = {name: fit(published.points(name), bootstrap=100) for name in ("reasoning", "ocr")}
    mix = Mixture(laws, {"reasoning": 0.3, "ocr": 0.7})
    expected = 0.3 * laws["reasoning"].error(4, 16) + 0.7 * laws["ocr"].error(4, 16)
    assert mix.error(4, 16) == pytest.approx(expected)
    low, high = mix.interval(4, 16, 50)
    assert low < expected < high
    wider = mix.interval(4, 16, 50, measured=True)
    assert wider[0] < low and high < wider[1]
    alone = Mixture(laws, {"reasoning": 1.0, "ocr": 0.0})
    assert alone.interval(4, 16, 50) == pytest.approx(
        [float(x) for x in laws["reasoning"].band(4, 16)]
    )
    assert mixture(law(0.07, 0.01)).interval(4, 16, 50) is None


def test_extrapolation_is_said_for_what_the_law_reads():
    domain = {"N": [0.5, 7.0], "V": [1.0, 144.0], "Q": [0.0, 0.0]}
    mix = mixture(law(0.07, 0.01, domain=domain))
    assert mix.outside(4, 16, 50) == []  # this form does not read Q
    assert mix.outside(14, 576, 50) == [
        "extrapolates N: 14 billion LLM parameters, fitted on 0.5 to 7",
        "extrapolates V: 576 visual tokens, fitted on 1 to 144",
    ]
    reads = Law(
        "multiplicative_total",
        {"A": 0.6, "alpha": 0.07, "beta": 0.01, "D": 0.0},
        sse=0.0,
        rmse=0.0,
        n=28,
        domain=domain,
    )
    assert mixture(reads).outside(4, 16, 50) == ["extrapolates Q: 50 text tokens, fitted on 0 to 0"]


def test_what_nothing_meets_names_the_cheapest_and_its_cost():
    search = full(law(0.07, 0.01), 50.0, "ms", 1.0, chip=chips.CHIPS["v5e"], tokens=WINDOWS)
    with pytest.raises(
        ValueError, match=r"cheapest is N=0.5 billion, V=1, token_packer: 3\.\d+ milliseconds"
    ):
        search.candidates()
    with pytest.raises(ValueError, match="needs --chip"):
        full(law(0.07, 0.01), 50.0, "ms", 1.0, tokens=WINDOWS).candidates()
    with pytest.raises(ValueError, match="needs --cost=full"):
        dataclasses.replace(
            paper(law(0.07, 0.01), 50, 1.0), budget=Budget((("ms", 40.0),))
        ).candidates()


def test_two_limits_hold_together():
    """40 ms would admit more than 15.75 GiB hold: memory decides."""
    chip = chips.CHIPS["v5e"]
    search = full(law(0.077, 0.015), 50.0, "ms", 400.0, chip=chip, tokens=WINDOWS)
    search = dataclasses.replace(search, budget=Budget((("ms", 400.0), ("hbm", chip.hbm_bytes))))
    best = search.candidates()[0]
    assert search.cost.amount("hbm", best.N, best.V, best.compressor) == pytest.approx(
        chip.hbm_bytes
    )
    assert best.cost < 400 and 6 < best.N < 8


@pytest.fixture(scope="module")
def by_method():
    """The published laws of methods, as law.json has them."""
    known = methods.fit_published(bootstrap=20)
    laws = {
        name: Mixture({"all": one}, {"all": 1.0}, {"all": known.answer(name)}, name)
        for name, one in known.laws.items()
    }
    return dataclasses.replace(laws["token_packer"], others=laws)


@pytest.mark.parametrize("kind", ["mmtok", "divprune", "visionzip", "token_packer", "quecc", "mqt"])
def test_a_published_method_is_offered_what_it_can_give_and_was_measured_at(by_method, kind):
    found, _ = choices.tokens(
        None, [kind], by_method, most=576, theory=False, every_size=False, elastic={}
    )
    between = Interface(side=24, width=1024, levels=1, llm_width=4096)
    for v in found[kind]:
        describe(dict(kind=kind, tokens=int(v), heads=8, query="none")).check(between)
    if kind in ("mmtok", "divprune", "visionzip"):  # their best V are among these
        assert {8, 16, 32, 64, 128, 192, 576} <= set(found[kind])
