# SPDX-License-Identifier: Apache-2.0
"""Ideal times equal an independent model of them; memory, types and links
add up.
"""

import dataclasses

import made_rows
import pytest
import tiny

from configs import base, sizes
from vlm_jax.cost import calibration, chips, roofline
from vlm_jax.cost import flops as cost
from vlm_jax.cost.roofline import Request
from vlm_jax.models.sizes import LLMSize, ViTSize

CLIP = ViTSize.of(base.get_config().vit)
VICUNA = LLMSize.of(sizes.LLM["vicuna-1.5-7b"])
V5E = chips.CHIPS["v5e"]


def compressor(V):
    return tiny.method("none" if V == 576 else "quecc", V)


def free_links(chip):
    """These chips as one: the independent model counts no communication."""
    return dataclasses.replace(chip, count=1)


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
            free_links(chips.CHIPS[chip].times(count)),
        )
        total = got["encoder"] + got["question"] + got["prefill"]
        assert 1e3 * total == pytest.approx(expected, rel=0.035)


@pytest.mark.parametrize(
    "V, batch, milliseconds", [(576, 64, 11.3), (144, 64, 6.9), (1, 64, 5.4), (576, 1, 4.23)]
)
def test_a_decode_step_equals_the_independent_model(V, batch, milliseconds):
    """The last of 64 generated tokens after 64 text tokens: each weight and cached key once."""
    chip = free_links(V5E.times(4))
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
    reached = calibration.Calibration(dict.fromkeys(roofline.PHASES, 0.5))
    half = roofline.seconds(*sized, V5E, calibration=reached)
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
    found = calibration.row_seconds(row, V5E, batch=4)
    for phase, seconds in whole.items():
        assert found[phase] == pytest.approx(seconds, rel=0.05)


def test_bad_types_and_chips_are_named():
    sized = (CLIP, compressor(36), VICUNA, Request(50))
    with pytest.raises(ValueError, match="weights in 'int3': choose one of f32, bf16"):
        roofline.Stored(weights="int3")
    with pytest.raises(ValueError, match="v4 has no peak for int8: choose one of bf16"):
        roofline.seconds(*sized, chips.CHIPS["v4"], stored=roofline.Stored(products="int8"))
    with pytest.raises(ValueError, match="unknown chip 'v9'.*choose one of v4, v5e"):
        chips.named("v9")
    with pytest.raises(ValueError, match="at least 1"):
        V5E.times(0)
    with pytest.raises(ValueError, match="2 x cpu: the speed of its links is not known"):
        chips.Chip("cpu", 1.0, 1.0, 1.0, 4, "planted").times(2)


def test_eight_bits_halve_what_is_stored_and_read():
    """Weights of the LLM and its cache; the encoder stays as it is."""
    sized = (CLIP, compressor(36), VICUNA, Request(50, 8, 4))
    half = roofline.Stored("int8", "int8", "int8")
    full, less = (roofline.memory(*sized, stored=s) for s in (roofline.AS_CHIP, half))
    assert less.cache == full.cache / 2 and less.activations == full.activations
    assert full.weights - less.weights == cost.llm_parameters(VICUNA)
    moved, fewer = (roofline.request_bytes(*sized, stored=s) for s in (roofline.AS_CHIP, half))
    assert fewer["decode"] == moved["decode"] / 2 and fewer["encoder"] == moved["encoder"]
    bound = dataclasses.replace(V5E, hbm_bytes_per_s=1e30)  # by products alone
    slow, fast = (roofline.seconds(*sized, bound, stored=s) for s in (roofline.AS_CHIP, half))
    assert fast["prefill"] == slow["prefill"] / 2 and fast["encoder"] == slow["encoder"]


def test_chips_together_spend_time_on_sums():
    """Two sums per block and pass: by hand for four chips; nothing for one; all of it is added."""
    request, chip = Request(64, 9, 32), V5E.times(4)
    sized = (CLIP, compressor(36), VICUNA, request)
    sent = roofline.communication(*sized, chip)
    prefill = 32 * 100 * 4096 * 2  # bytes of one sum
    ring = 2 * 3 / 4 * prefill / 90e9 + 6e-6
    assert sent["prefill"] == pytest.approx(2 * 32 * ring)
    assert sent["decode"] == pytest.approx(8 * 2 * 32 * (1.5 * prefill / 100 / 90e9 + 6e-6))
    free = roofline.seconds(*sized, dataclasses.replace(chip, link_bytes_per_s=1e30))
    both = roofline.seconds(*sized, chip)
    steps = 2 * 32 * 6e-6  # of the chips' latency, which a fast link does not remove
    assert both["prefill"] - free["prefill"] == pytest.approx(sent["prefill"] - steps)
    assert set(roofline.communication(*sized, V5E).values()) == {0.0}


def test_prefill_holds_the_scores_of_a_tile():
    """As many queries as the program takes at once, not all pairs of a long prompt."""
    from vlm_jax.models import llm

    assert roofline.QUERIES == llm.QUERIES
    short, long = (roofline.memory(CLIP, compressor(576), VICUNA, Request(Q)) for Q in (3000, 6000))
    # Linear in the tokens: twice as many need twice as much, scores of all pairs four times.
    assert long.activations / short.activations < 2


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
