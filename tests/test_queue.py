# SPDX-License-Identifier: Apache-2.0
"""The queue's response times are those of a simulation of its events, and of known formulas."""

import numpy as np
import pytest

from vlm_jax.cost import queue


def simulated(seconds, rate, level, *, requests=120_000):
    """The percentile of response times, request by request and batch by batch."""
    come = np.cumsum(np.random.default_rng(7).exponential(1 / rate, requests))
    took, clock, first = np.empty(requests), 0.0, 0
    while first < requests:
        clock = max(clock, come[first])
        last = min(int(np.searchsorted(come, clock, "right")), first + len(seconds))
        clock += seconds[last - first - 1]
        took[first:last] = clock - come[first:last]
        first = last
    return np.quantile(took[requests // 20 :], level)


@pytest.mark.parametrize("load", [0.05, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("most", [1, 8, 32])
def test_percentiles_are_those_of_a_simulation(most, load):
    """Batches of a fixed and a growing part, from an idle server to a nearly full one."""
    seconds = [0.03 + 0.004 * b for b in range(1, most + 1)]
    rate = load * most / seconds[-1]
    # Long queues forget slowly: the simulation is noisy there.
    close = 0.03 if load < 0.9 else 0.1
    for level in (0.5, 0.95):
        got = queue.response_seconds(seconds, rate, level=level)
        assert got == pytest.approx(simulated(seconds, rate, level), rel=close), (most, load, level)


def test_an_idle_server_takes_one_batch_and_a_full_one_never_ends():
    seconds = [0.1, 0.12]
    assert queue.response_seconds(seconds, 1e-6) == pytest.approx(0.1)
    assert queue.response_seconds(seconds, 2 / 0.12) == float("inf")
    # M/D/1 at load 1/2: the mean wait is half a service (Pollaczek and Khinchine).
    levels = (np.arange(20) + 0.5) / 20
    mean = np.mean([queue.response_seconds([1.0], 0.5, level=p) for p in levels])
    assert mean == pytest.approx(1.5, rel=0.05)
