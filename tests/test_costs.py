# SPDX-License-Identifier: Apache-2.0
"""What a plan spends: times apart, under load, on several chips, in eight bits, over a life."""

import pytest

from vlm_jax.cost import catalog
from vlm_jax.cost.roofline import Stored
from vlm_jax.law import published
from vlm_jax.law.law import fit
from vlm_jax.planning import question
from vlm_jax.planning.mixture import Mixture

LAW = Mixture(
    {name: fit(published.points(name), bootstrap=0) for name in ("reasoning", "ocr")},
    {"reasoning": 0.5, "ocr": 0.5},
)


def planned(**how):
    """A plan for 50 text tokens on a v5e at 60 % of the roofline, as JSON fields."""
    usual = dict(text_tokens=50, new_tokens=16, chip="v5e", efficiency=0.6)
    return question.plan(LAW, **(usual | how)).fields


def test_several_budgets_hold_together_and_times_are_told_apart():
    """A request's time is its first token's and the others'; each may have a limit of its own."""
    free = planned(ms=200)
    times, latency = free["cost"]["ms"], free["latency"]
    assert latency["time_to_first_token_ms"] == pytest.approx(sum(times.values()) - times["decode"])
    assert latency["time_per_output_token_ms"] == pytest.approx(times["decode"] / 15)
    quick = planned(ms=200, tpot_ms=5)
    assert quick["latency"]["time_per_output_token_ms"] <= 5 < latency["time_per_output_token_ms"]
    assert quick["budget"]["also"]["tpot"] == 5 and quick["N"] < free["N"]
    first = planned(ms=200, ttft_ms=15)
    assert first["latency"]["time_to_first_token_ms"] <= 15 and first["V"] < free["V"]


def test_what_needs_a_chip_is_not_left_unused():
    for how in (dict(efficiency=0.6), dict(rate=2.0, efficiency=None)):
        with pytest.raises(ValueError, match="need --chip"):
            planned(hbm_bytes=9e9, chip=None, **how)
        with pytest.raises(ValueError, match="the paper's cost has no chip"):
            planned(flops=1e12, chip=None, **how)


def test_a_measured_system_is_chosen_by_name():
    """Launching takes 30 of the milliseconds to the first token, whatever is chosen."""
    known = planned(
        ttft_ms=50, chip="a100", efficiency=None, calibration="a100-transformers", llms=[7.0]
    )
    assert known["cost"]["ttft"]["request"] == pytest.approx(15.3)
    assert 30 < known["cost"]["amount"] <= 50
    with pytest.raises(ValueError, match="give one of them"):
        planned(ttft_ms=50, calibration="a100-transformers")


def test_under_load_less_fits():
    """The same limit on 95 % of requests, from one at a time to a busy server."""
    errors = []
    for rate in (0.01, 20, 40):
        answer = planned(p95_ms=400, batch=8, rate=rate)
        assert answer["latency"]["p95_ms"] == answer["cost"]["amount"] <= 400
        errors.append(answer["predicted_error"])
    assert errors == sorted(errors) and errors[0] < errors[-1]
    with pytest.raises(ValueError, match="no server keeps up with 10000 requests per second"):
        planned(p95_ms=400, rate=1e4)


def test_more_chips_and_fewer_bytes_are_faster_but_not_free():
    spent = {
        name: planned(ms=1e9, llms=[4.0], tokens=[144], **more)
        for name, more in {
            "one": {}, "four": {"chips_together": 4}, "int8": {"stored": Stored("int8", "int8")},
        }.items()
    }  # fmt: skip
    ms = {name: answer["cost"]["ms"]["decode"] for name, answer in spent.items()}
    assert ms["one"] / 4 < ms["four"] < ms["one"] and ms["int8"] < 0.55 * ms["one"]
    assert any("without quantization" in w for w in spent["int8"]["warnings"])


def test_chips_and_llms_of_a_file_are_planned_with(tmp_path):
    (tmp_path / "mine.toml").write_text("""
[chips.mine]
peak_tflops = 100
gb_per_s = 800
memory_gib = 12
price_per_hour = 0.5
source = "planted"
[llms.mine-3b]
billions = 3
vocab = 32000
depth = 26
width = 3072
mlp = 8192
heads = 24
""")
    mine = catalog.read(tmp_path / "mine.toml")
    answer = planned(dollars_per_million=50, chip="mine", catalog=mine)
    assert answer["llm"] == "mine-3b" and answer["budget"]["also"]["hbm"] == 12 * 2**30
    seconds = sum(answer["cost"]["ms"].values()) / 1e3
    assert answer["cost"]["amount"] == pytest.approx(0.5 / 3600 * 1e6 * seconds)
    # A named LLM of the package beside them.
    both = planned(ms=1e3, catalog=mine, llms=["mine-3b", "qwen1.5-1.8b"])
    assert both["llm"] == "mine-3b"


def test_a_life_is_its_training_and_its_requests():
    """Few requests: training decides. Many: the requests do."""
    for model in ("paper", "full"):
        shares = []
        how = dict(chip=None, efficiency=None, new_tokens=1, cost_model=model)
        for requests, limit in ((1e3, 1e20), (1e10, 1e22)):
            answer = planned(lifetime_flops=limit, requests=requests, **how)
            parts = answer["cost"]["lifetime"]
            assert answer["cost"]["amount"] == pytest.approx(sum(parts.values()))
            assert answer["cost"]["amount"] <= limit
            shares.append(parts["training"] / sum(parts.values()))
        assert shares[0] > 0.99 and shares[1] < 0.05
    priced = planned(lifetime_dollars=1e5, requests=1e6, price_per_hour=1.2)
    assert priced["cost"]["amount"] == pytest.approx(
        sum(priced["cost"]["lifetime_dollars"].values())
    )
