# SPDX-License-Identifier: Apache-2.0
"""What the server has done, for Prometheus: requests, tokens, times, and its engine now."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from vlm_jax.serving.tickets import Answer, Stats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
TOKENS = (1, 4, 9, 16, 36, 64, 144, 256, 576)


class Metrics:
    """The metrics of one server; `stats` asks its engine when they are read."""

    def __init__(self, stats: Callable[[], Stats]):
        self.registry = CollectorRegistry()
        self.stats = stats
        self.registry.register(self)
        more = dict(registry=self.registry)
        self.requests = Counter(
            "vlm_jax_requests", "Requests to /v1/chat/completions by status", ["status"], **more
        )
        self.tokens = Counter(
            "vlm_jax_tokens", "Tokens: text and image read, image reused, new", ["kind"], **more
        )
        self.budgets = Histogram(
            "vlm_jax_visual_tokens", "V of requests with an image", buckets=TOKENS, **more
        )
        self.first = Histogram(
            "vlm_jax_first_token_seconds", "From the queue to the first token", buckets=SECONDS,
            **more,
        )  # fmt: skip
        self.each = Histogram(
            "vlm_jax_token_seconds", "For each token after the first", buckets=STEPS, **more
        )
        self.whole = Histogram(
            "vlm_jax_answer_seconds", "From the queue to the end", buckets=SECONDS, **more
        )

    def ended(self, status: int) -> None:
        """Counts a request that ended with this status."""
        self.requests.labels(str(status)).inc()

    def answered(self, answer: Answer, V: int | None) -> None:
        """Counts the tokens and times of an answer."""
        usage = answer.usage
        for kind, count in (
            ("text", usage.text_tokens),
            ("image", usage.image_tokens),
            ("image_reused", usage.reused_image_tokens),
            ("new", usage.new_tokens),
        ):
            self.tokens.labels(kind).inc(count)
        if V is not None:
            self.budgets.observe(V)
        self.whole.observe(answer.seconds)
        if answer.first_token_seconds is not None:
            self.first.observe(answer.first_token_seconds)
            if usage.new_tokens > 1:
                after = answer.seconds - answer.first_token_seconds
                self.each.observe(after / (usage.new_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """What the engine says now."""
        now = self.stats()
        for name, words, value in (
            ("running", "Requests that are read or answered", now.running),
            ("queued", "Requests that wait", now.queued),
            ("slots", "Most requests that run together", now.slots),
            ("queue_limit", "Most requests that wait", now.queue),
            ("index_bytes", "Bytes of the image index", now.index.bytes),
            ("index_limit_bytes", "Most bytes of the image index", now.index.limit),
            ("index_images", "Images in the index", now.index.images),
        ):
            yield GaugeMetricFamily(f"vlm_jax_{name}", words, value=value)
        for name, words, value in (
            ("index_hits", "Images that were in the index", now.index.image_hits),
            ("index_misses", "Images that were not", now.index.image_misses),
            ("compiled_programs", "Programs compiled since the start", now.compiled),
            ("failed", "Requests that could not be computed", now.failed),
        ):
            yield CounterMetricFamily(f"vlm_jax_{name}", words, value=value)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
