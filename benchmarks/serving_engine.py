# SPDX-License-Identifier: Apache-2.0
"""What does an engine that answers many requests together give, next to one after another?

    python benchmarks/serving_engine.py [--sizes=demo,185M] [--clients=1,8,32] [--seconds=60]

Clients of one process each ask again as soon as they are answered: the same images and prompts of
64 tokens, 64 new tokens, greedily, on two threads. The engine is asked at one visual token and at
all of them, with an empty index; one after another are `VLM.answer` with a batch of one, and a
plain loop over transformers' `generate` of the same weights, in the same run. Every answer is
compared with the one that it has alone. The first and the last requests of a cell, one for each
client, are not counted. Last parts ask with all images and prompts known, and a conversation's
second turn.
"""

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is a folder, not installed

from benchmarks import facts, generation  # noqa: E402

T = TypeVar("T")

PROMPT, NEW = generation.PROMPT, generation.NEW
DEMO = dict(
    tower=dict(width=64, depth=4, heads=4, mlp=256, image=72, patch=6),
    llm=dict(width=64, depth=2, heads=4, mlp=192, vocab=512),
)
SIZES = {"demo": DEMO, "185M": generation.SIZES, "quick": generation.QUICK}
SCALES = {"demo": (1, 4, 36, 144), "185M": (1, 36, 144, 576), "quick": (1, 9, 36)}
DIFFERENT = 8  # requests


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="demo,185M")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="default: benchmarks/results/DATE-serving_engine.json")
    return parser.parse_args(argv)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds at the 50th, 95th and 99th percentile."""
    import numpy as np

    found = np.percentile(seconds, (50, 95, 99)) if seconds else (float("nan"),) * 3
    return {f"p{p}_ms": round(1e3 * float(x), 2) for p, x in zip((50, 95, 99), found, strict=True)}


def row(side: str, V: int, clients: int, answers: list[tuple[float, float]], seconds: float):
    """A line of results: `answers` are seconds to the first token and for each after it."""
    return dict(
        side=side,
        visual_tokens=V,
        clients=clients,
        answers=len(answers),
        requests_per_second=round(len(answers) / seconds, 3),
        first_token=percentiles([first for first, _ in answers]),
        token=percentiles([later for _, later in answers]),
    )


def steady(done: list[T], ended: Callable[[T], float], clients: int, began: float):
    """The answers between those that fill the queue and those that empty it, in the order of their
    ends, and the seconds in which they came; all of them where these are too few."""
    done = sorted(done, key=ended)
    inner = done[clients:-clients]
    if len(inner) < 2:
        return done, time.monotonic() - began
    return inner, ended(inner[-1]) - ended(done[clients - 1])


def asked(engine, requests, expected, V: int, clients: int, seconds: float):
    """What so many clients got of an engine; every answer is compared with the expected one."""
    from vlm_jax.data.processor import Tokens
    from vlm_jax.serving.tickets import Ask

    asks = [
        Ask(
            Tokens(r.ids, [False] * len(r.ids), r.places, r.questions),
            tuple(r.pixels),
            max_new_tokens=NEW,
            visual_tokens=V,
        )
        for r in requests
    ]
    answers: list[tuple[float, float, float]] = []
    wrong: list[int] = []
    began = time.monotonic()

    def client(number: int) -> None:
        k = number
        while time.monotonic() < began + seconds:
            answer = engine.submit(asks[k % len(asks)]).answer()
            if list(answer.ids) != expected[k % len(asks)]:
                wrong.append(k)
            later = (answer.seconds - answer.first_token_seconds) / (NEW - 1)
            answers.append((time.monotonic(), answer.first_token_seconds, later))
            k += clients

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    inner, span = steady(answers, lambda answer: answer[0], clients, began)
    found = row("engine", V, clients, [x[1:] for x in inner], span)
    return found | dict(wrong=len(wrong))


def one_by_one(ask, seconds: float, side: str, V: int):
    """What one answer after another gives; `ask` returns the two times of an answer."""
    ask(0)
    began, answers = time.monotonic(), []
    while time.monotonic() < began + seconds:
        answers.append(ask(len(answers)))
    return row(side, V, 1, answers, time.monotonic() - began)


def second_turn(engine, request, V: int) -> dict[str, float]:
    """Milliseconds to the first token of a conversation's first and second turn."""
    import numpy as np

    from vlm_jax.data.processor import Tokens
    from vlm_jax.serving.tickets import Ask

    draw, times = np.random.default_rng(7), []
    for turn in range(4):
        pixels = request.pixels[0] + np.float32(1e-3 * (turn + 1))  # new to the index
        ids, handles = list(request.ids), (pixels,)
        for first in (True, False):
            tokens = Tokens(ids, [False] * len(ids), request.places, request.questions)
            ask = Ask(tokens, handles, max_new_tokens=NEW, visual_tokens=V)
            answer = engine.submit(ask).answer()
            times.append((first, answer.first_token_seconds))
            handles = answer.handles
            ids += [*answer.ids, *(int(x) for x in draw.integers(3, 100, 16))]
    found = {
        f"{name}_turn_ms": round(1e3 * float(np.median([t for f, t in times if f is first])), 2)
        for name, first in (("first", True), ("second", False))
    }
    return found | dict(ratio=round(found["first_turn_ms"] / found["second_turn_ms"], 2))


def torch_ask(model, requests, image_token: int, patches: int):
    """Asks transformers for one answer after another: a streamer sees when tokens come."""
    import numpy as np
    import torch

    class Clock:
        def __init__(self):
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.monotonic())

        def end(self) -> None:
            pass

    def ask(number: int) -> tuple[float, float]:
        r = requests[number % len(requests)]
        ids = torch.tensor([[*r.ids[:1], *[image_token] * patches, *r.ids[1:]]])
        pixels = torch.tensor(np.stack([x.transpose(2, 0, 1) for x in r.pixels]))
        clock, then = Clock(), time.monotonic()
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                pixel_values=pixels,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                streamer=clock,
            )
        # The prompt is put first.
        return clock.times[1] - then, (clock.times[-1] - clock.times[1]) / (NEW - 1)

    return ask


def measure(name: str, args: argparse.Namespace, report: Callable) -> dict[str, Any]:
    """Reports all rows of one size; what is said of it besides."""
    from vlm_jax.serving.engine import Engine

    sizes, scales = SIZES[name], SCALES[name]
    theirs = generation.peer(sizes, "float32")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = generation.ours(Path(folder), "float32", scales)
    requests = generation.requests(sizes, DIFFERENT)
    few, many = min(scales), max(scales)
    ask = torch_ask(theirs, requests, sizes["llm"]["vocab"] - 1, many)
    report(name, one_by_one(ask, args.seconds, "transformers, a loop", many))
    expected = {}
    for V in (few, many):
        expected[V] = [
            model.answer([r], max_new_tokens=NEW, visual_tokens=V)[0].ids for r in requests
        ]

        def ours(number: int, V: int = V) -> tuple[float, float]:
            one = requests[number % DIFFERENT]
            (a,) = model.answer([one], max_new_tokens=NEW, visual_tokens=V)
            return a.first_token_seconds, 1 / a.tokens_per_second

        report(name, one_by_one(ours, args.seconds, "vlm_jax, one by one", V))
    lengths = [-(-(PROMPT + V + NEW) // 64) * 64 for V in (few, many)]
    lengths.append(lengths[-1] + 2 * NEW)  # of a second turn
    engine = Engine(model, slots=args.slots, queue=64, index_bytes=2 * 10**9, lengths=lengths)
    then = time.monotonic()
    engine.warm()
    said = dict(warm_seconds=round(time.monotonic() - then, 1))
    limit, engine.index.limit = engine.index.limit, 0  # nothing is known
    for V in expected:
        for clients in map(int, args.clients.split(",")):
            found = asked(engine, requests, expected[V], V, clients, args.seconds)
            report(name, found)
    engine.index.limit = limit
    clients = min(DIFFERENT, args.slots)
    found = asked(engine, requests, expected[many], many, clients, args.seconds)
    report(name, found | dict(side="engine, all known"))
    said["second_turn"] = second_turn(engine, requests[0], many)
    said["stats"] = dataclasses.asdict(engine.stats())
    engine.drain()
    print(name, said, flush=True)
    return said


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    heap.keep_freed_memory()
    import torch

    torch.set_num_threads(args.threads)
    results = facts.of_run(
        "requests/s, and time to the first token and of each after it, for 1 to 32 clients",
        threads=args.threads,
        packages=("jax", "flax", "numpy", "torch", "transformers"),
    ) | dict(seconds=args.seconds, slots=args.slots, rows=[], sizes={})

    def report(name: str, line: dict[str, Any]) -> None:
        results["rows"].append(dict(size=name) | line)
        print(
            f"{name:6} {line['side']:20} V={line['visual_tokens']:<4} {line['clients']:3} clients "
            f"{line['requests_per_second']:8.3f}/s  first {line['first_token']}  "
            f"token {line['token']}" + (f"  wrong {line['wrong']}" if line.get("wrong") else ""),
            flush=True,
        )
        facts.write(results, "serving_engine", args.out)

    for name in args.sizes.split(","):
        results["sizes"][name] = measure(name, args, report)
        facts.write(results, "serving_engine", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
