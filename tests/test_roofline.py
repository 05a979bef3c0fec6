# SPDX-License-Identifier: Apache-2.0
"""Ideal times equal an independent model of them; memory adds up; calibration finds planted
efficiencies.
"""

import dataclasses
from types import SimpleNamespace

import made_rows
import numpy as np
import pytest
import tiny

from configs import base, sizes
from vlm_jax.cost import chips, roofline
from vlm_jax.cost import flops as cost
from vlm_jax.cost.roofline import Request
from vlm_jax.models.sizes import LLMSize, ViTSize

CLIP = ViTSize.of(base.get_config().vit)
VICUNA = LLMSize.of(sizes.LLM["vicuna-1.5-7b"])
V5E = chips.CHIPS["v5e"]


def compressor(V):
    return tiny.method("none" if V == 576 else "quecc", V)


# Milliseconds of encoder + question pass + prefill for 64 text tokens, 24 of them the question, at
# V = 576 (no QueCC), 144, 36, 1: a second model of the same times. It reads all 13.48 GB of weights
# in both passes (here: what a pass reads, not the embedding table) and halves causal attention.
IDEAL_MS = [
    ("v5e", 4, 1, [11.1, 8.7, 8.7, 8.7]),
    ("v6e", 1, 1, [9.5, 16.9, 16.9, 16.9]),
    ("v5e", 4, 32, [356, 137, 80, 62]),
    ("v6e", 1, 32, [306, 118, 69, 53]),
    ("v5p", 1, 32, [611, 236, 138, 106]),
]


@pytest.mark.parametrize("chip, count, batch, milliseconds", IDEAL_MS)
def test_time_to_first_token_equals_the_independent_model(chip, count, batch, milliseconds):
    for V, expected in zip((576, 144, 36, 1), milliseconds, strict=True):
        got = roofline.seconds(
            CLIP,
            compressor(V),
            VICUNA,
            Request(64, batch=batch, question=24),
            chips.CHIPS[chip].times(count),
        )
        total = got["encoder"] + got["question"] + got["prefill"]
        assert 1e3 * total == pytest.approx(expected, rel=0.035)


@pytest.mark.parametrize(
    "V, batch, milliseconds", [(576, 64, 11.3), (144, 64, 6.9), (1, 64, 5.4), (576, 1, 4.23)]
)
def test_a_decode_step_equals_the_independent_model(V, batch, milliseconds):
    """The last of 64 generated tokens after 64 text tokens: each weight and cached key once."""
    chip = V5E.times(4)
    times = [
        roofline.seconds(CLIP, compressor(V), VICUNA, Request(64, G, batch), chip)["decode"]
        for G in (64, 63)
    ]
    assert 1e3 * (times[0] - times[1]) == pytest.approx(milliseconds, rel=0.025)


def test_a_phase_takes_the_slower_of_compute_and_memory():
    request = Request(50, 8)
    slow_memory = dataclasses.replace(V5E, hbm_bytes_per_s=1.0)
    slow_compute = dataclasses.replace(V5E, peak_flops=1.0)
    sized = (CLIP, compressor(36), VICUNA, request)
    assert roofline.seconds(*sized, slow_memory) == pytest.approx(roofline.request_bytes(*sized))
    flops = dataclasses.asdict(roofline.request_flops(*sized))
    assert roofline.seconds(*sized, slow_compute) == pytest.approx(flops)
    half = roofline.seconds(*sized, V5E, efficiency=dict.fromkeys(roofline.PHASES, 0.5))
    assert half == pytest.approx({k: 2 * v for k, v in roofline.seconds(*sized, V5E).items()})


def test_weights_are_read_once_per_pass_and_the_cache_once_per_sequence():
    one, many = (
        roofline.request_bytes(CLIP, compressor(36), VICUNA, Request(50, 9, b)) for b in (1, 33)
    )
    cached = 2 * roofline.cache_numbers(VICUNA)  # bytes per token: 0.52 MB for 32 layers of 4096
    assert cached == 524_288
    assert many["prefill"] - one["prefill"] == 32 * cached * 86
    # 8 passes after the first token; pass i sees 86 + i tokens.
    assert many["decode"] - one["decode"] == 32 * cached * sum(86 + i for i in range(1, 9))
    assert many["encoder"] == one["encoder"] == pytest.approx(0.6e9, rel=0.05)


def test_memory_is_weights_cache_and_activations():
    need = roofline.memory(CLIP, compressor(36), VICUNA, Request(50, 14, 4))
    assert need.cache == 4 * 100 * 524_288
    towers = cost.vit_parameters(dataclasses.replace(CLIP, depth=23)) + cost.llm_parameters(VICUNA)
    assert need.weights == 2 * (towers + cost.compressor_parameters(compressor(36), CLIP, VICUNA))
    assert need.total == need.weights + need.cache + need.activations < V5E.hbm_bytes
    # 13B in bf16 does not fit on one v5e chip, whatever is asked of it.
    big = LLMSize.of(sizes.LLM["vicuna-1.5-13b"])
    assert roofline.memory(CLIP, compressor(1), big, Request(1)).total > V5E.hbm_bytes


def test_calibration_finds_planted_efficiencies_and_shares_what_it_cannot_tell_apart():
    rng = np.random.default_rng(0)
    truth = {"encoder": 0.5, "compressor": 0.5, "question": 0.5, "prefill": 0.4, "decode": 0.8}
    ideal = [{"encoder": 1.0, "prefill": p, "decode": d} for p, d in rng.uniform(0.2, 5, (40, 2))]
    measured = [sum(row[k] / truth[k] for k in row) * rng.normal(1, 0.01) for row in ideal]
    found = roofline.calibrate(ideal, measured)
    for phase in ("encoder", "prefill", "decode"):
        assert found[phase] == pytest.approx(truth[phase], rel=0.05)
    # Nothing was measured about these: the common factor.
    assert found["question"] == pytest.approx(found["compressor"])
    assert 0.4 < found["question"] < 0.8
    alone = roofline.calibrate([{"prefill": 1.0, "decode": 1.0}], [4.0])
    assert alone["prefill"] == pytest.approx(0.5, rel=1e-3) == alone["decode"]


def test_calibration_reads_rows_and_refuses_what_says_nothing():
    flops = {"encoder": 9e9, "compressor": 1e6, "question": 0.0, "prefill": 4e9, "decode": 1e9}
    tasks = {"a": {"n": 30}, "b": {"n": 70}}
    cpu = chips.Chip("cpu", 1e11, 1e10, 1e9, 4, "planted")
    rows = [SimpleNamespace(flops=flops, tasks=tasks, evaluate_seconds=20.0, timing={})]
    # 5 GFLOP in 0.2 s are 25 GFLOP/s of 100.
    assert roofline.calibrate_rows(rows, cpu)["prefill"] == pytest.approx(0.25, rel=1e-2)
    with pytest.raises(ValueError, match="none of 1 rows has timing or evaluate_seconds"):
        roofline.calibrate_rows(
            [SimpleNamespace(flops=flops, tasks=tasks, evaluate_seconds=0.0, timing={})], cpu
        )
    with pytest.raises(ValueError, match="must be positive"):
        roofline.calibrate([{"prefill": 1.0}], [0.0])


def test_calibration_uses_the_batch_of_rows_that_have_it():
    """Planted: prefill reaches a half, decoding, bound by the weights, a fifth of the roofline."""
    chip = chips.Chip("cpu", 1e11, 1e9, 1e9, 4, "planted")
    truth = {"compressor": 0.5, "question": 0.5, "prefill": 0.5, "decode": 0.2}
    rows = []
    for row in made_rows.rows(sizes=(2_000_000, 8_000_000)):
        for batch, new_tokens in ((1, 5.0), (64, 3.0)):
            parts = roofline.row_seconds(row, chip, batch=batch, new_tokens=new_tokens)
            took = sum(parts[phase] / truth[phase] for phase in truth) / batch
            timing = {"batch": batch, "new_tokens": new_tokens, "seconds_per_example": took}
            # What the whole evaluation took says nothing any more.
            rows.append(dataclasses.replace(row, timing=timing, evaluate_seconds=1e4))
    found = roofline.calibrate_rows([*rows, *made_rows.rows()], chip)
    assert found["prefill"] == pytest.approx(0.5, rel=0.02)
    assert found["decode"] == pytest.approx(0.2, rel=0.02)


def test_the_seconds_of_a_row_are_those_of_its_model_without_the_cache():
    """A row of a described model takes what `seconds` says, but for the key-value cache."""
    llm, request = VICUNA, Request(50, 5, 4)
    sized = (CLIP, compressor(36), llm, request)
    whole = roofline.seconds(*sized, V5E)
    row = dataclasses.replace(
        made_rows.rows()[0],
        G=5.0,
        flops=dataclasses.asdict(roofline.request_flops(*sized)),
        vit_parameters=cost.vit_parameters(CLIP),
        compressor_parameters=int(cost.compressor_parameters(compressor(36), CLIP, llm)),
        llm_parameters=cost.llm_parameters(llm),
    )
    found = roofline.row_seconds(row, V5E, batch=4)
    for phase, seconds in whole.items():
        assert found[phase] == pytest.approx(seconds, rel=0.05)


def test_bad_efficiencies_and_chips_are_named():
    sized = (CLIP, compressor(36), VICUNA, Request(50), V5E)
    with pytest.raises(ValueError, match=r"unknown phases \['warmup'\]"):
        roofline.seconds(*sized, efficiency={"warmup": 0.5})
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        roofline.seconds(*sized, efficiency={"decode": 1.5})
    with pytest.raises(ValueError, match="unknown chip 'v9'.*choose one of v4, v5e"):
        chips.named("v9")
    with pytest.raises(ValueError, match="at least 1"):
        V5E.times(0)


def test_this_machine_measured_is_a_chip_that_can_do_something():
    """Bounds of any machine: 0.1 to 1e5 GFLOP/s, 0.1 to 1e4 GB/s."""
    cpu = chips.measure_cpu(side=256, copy_bytes=2**22, repeats=3)
    assert 1e8 < cpu.peak_flops < 1e14
    assert 1e8 < cpu.hbm_bytes_per_s < 1e13
    assert cpu.hbm_bytes > 1e8 and cpu.bytes_per_number == 4 and "numpy" in cpu.source


def test_every_chip_says_where_its_numbers_come_from():
    for chip in chips.CHIPS.values():
        assert chip.source and chip.bytes_per_number == 2
    # FLOPs per byte at which compute and memory balance.
    ridges = {
        n: chips.CHIPS[n].peak_flops / chips.CHIPS[n].hbm_bytes_per_s
        for n in ("v4", "v5e", "v5p", "v6e", "v7")
    }
    assert ridges == pytest.approx(
        {"v4": 229, "v5e": 241, "v5p": 166, "v6e": 560, "v7": 313}, rel=0.005
    )
