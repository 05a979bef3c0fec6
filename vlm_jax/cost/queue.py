# SPDX-License-Identifier: Apache-2.0
"""How long requests wait at a server that answers them in batches.

The model: requests come independently at a mean rate (Poisson). The server works on one batch at a
time; when it is free it takes all that wait, at most `most` of them, and gives their answers
together after the seconds that a batch of this size takes. Nothing joins a batch that has begun:
a server that lets requests join between steps (continuous batching) answers sooner.

The number of requests that wait when a batch ends is a Markov chain; its stationary distribution is
solved for, and the response time of requests that meet it is drawn. tests/test_queue.py compares
the result with a simulation of events.
"""

from collections.abc import Sequence

import numpy as np

from vlm_jax.compressors.method import Number

DRAWS = 20_000  # requests: the 95th percentile of them is known to about 1 %
LONGEST = 4096  # requests in a queue; a server that is busier than that counts as overloaded


def response_seconds(
    seconds: Sequence[Number], rate: Number, *, level: Number = 0.95, draws: int = DRAWS
) -> float:
    """The time from request to answer that a share `level` of requests does not exceed.

    `seconds[b - 1]` is the time of a batch of b requests, `rate` is requests per second. Infinite
    for a server that cannot keep up.
    """
    times = np.asarray(seconds, np.float64)
    most = len(times)
    if rate * times[-1] >= most:
        return float("inf")
    waiting = _stationary(times, rate)
    if waiting is None:
        return float("inf")
    random = np.random.default_rng(0)
    counts = np.arange(len(waiting))
    taken = np.clip(counts, 1, most)
    # Requests that come while a batch runs, by the state it began in; and those that come to an
    # idle server, which are answered at once and alone.
    during = waiting * rate * times[taken - 1]
    share = np.concatenate([during, waiting[:1]])
    state = random.choice(len(share), draws, p=share / share.sum())
    alone = state == len(waiting)
    state = np.where(alone, 0, state)
    running = times[taken[state] - 1]
    came = random.uniform(0, running)
    ahead = np.maximum(state - most, 0) + random.poisson(rate * came)
    # Full batches go first, then its own, which others may fill.
    wait = running - came + ahead // most * times[-1]
    size = np.minimum(ahead % most + 1 + random.poisson(rate * wait), most)
    return float(np.quantile(np.where(alone, times[0], wait + times[size - 1]), level))


def _stationary(times: np.ndarray, rate: Number) -> np.ndarray | None:
    """Probabilities of 0, 1, ... requests waiting when a batch ends; None if they never settle."""
    from scipy.special import gammaln  # scipy.stats takes a second to import

    most = len(times)
    length = max(64, 8 * most)
    while length <= LONGEST:
        counts = np.arange(length)
        means = rate * times
        logs = counts * np.log(means)[:, None] - means[:, None] - gammaln(counts + 1)
        arrivals = np.exp(logs)  # [batch size - 1, requests that come meanwhile]
        steps = np.zeros((length, length))
        for n in range(length):
            left = max(n - most, 0)
            steps[n, left:] = arrivals[min(max(n, 1), most) - 1, : length - left]
        steps[:, -1] += 1 - steps.sum(1)
        equations = steps.T - np.eye(length)
        equations[-1] = 1
        found = np.linalg.solve(equations, np.eye(length)[-1]).clip(0)
        if found[-length // 8 :].sum() < 1e-4:
            return np.asarray(found / found.sum())
        length *= 4
    return None
