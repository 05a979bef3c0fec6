# SPDX-License-Identifier: Apache-2.0
"""What do clients of `vlm-jax serve` get through HTTP, next to one at a time and another server?

    python benchmarks/serving_http.py [--sizes=demo,185M] [--clients=1,8,32,64] [--seconds=60]

Servers are processes of their own on the loopback, asked by streams: `vlm-jax serve` with 16 slots,
with one slot, and `transformers serve` of the same weights. Clients ask again as soon as they are
answered, 64 tokens of text about one of eight images, 64 new tokens, greedily, at one visual token
and at all of them. Every text is compared with that of `VLM.generate`. Then requests come by
themselves (Poisson) at parts of the highest rate, and the 95th percentile of the whole answer is
put beside what `plan` says (vlm_jax/cost/queue.py): with batches as long as the cost model has them
on this machine, and as long as they were measured. Clients and server share the cores.

benchmarks/serving_load.py draws the result.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is a folder, not installed

from benchmarks import facts, generation, serving_engine  # noqa: E402
from benchmarks.http_load import Expected, Target, body, closed, picture, poisson  # noqa: E402
from benchmarks.peers import transformers_serve  # noqa: E402

PROMPT, NEW, DIFFERENT = generation.PROMPT, generation.NEW, serving_engine.DIFFERENT
SHARES = (0.5, 0.8)  # of the highest rate, at which requests come by themselves
BATCHES = (1, 4, 16)  # whose seconds are measured


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="demo,185M")
    parser.add_argument("--clients", default="1,8,32,64")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0,
                        help="with the most clients, and of requests that come by themselves; "
                        "fewer clients ask for a third of it")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-clients", default="1,8,32,64",
                        help="of transformers' server, which computes one request after another; "
                        "empty: without it")  # fmt: skip
    parser.add_argument("--out", help="default: benchmarks/results/DATE-serving_http.json")
    return parser.parse_args(argv)


# --- What plan says -------------------------------------------------------------------------------


def predicted(seconds: dict[int, float], slots: int, rate: float) -> float | None:
    """Milliseconds that 95 % of requests do not exceed by `plan`'s queue, of batches of so many
    seconds; None where it says that the server cannot keep up."""
    import numpy as np

    from vlm_jax.cost import queue

    sizes = np.arange(1, slots + 1)
    known = sorted(seconds)
    every = np.interp(sizes, known, [seconds[size] for size in known])
    found = queue.response_seconds(every.tolist(), rate)
    return None if found == float("inf") else round(1e3 * found, 1)


def beside_plan(line: dict[str, Any], ways: dict[str, dict[int, float]], slots: int) -> None:
    """Adds to a line what `plan` says of it, by each way of knowing the seconds of batches."""
    rate, measured = line["requests_per_second"], line["response"]["p95_ms"]
    line["plan"] = {}
    for way, seconds in ways.items():
        ms = predicted(seconds, slots, rate)
        ratio = round(measured / ms, 3) if ms else None
        line["plan"][way] = dict(p95_ms=ms, measured_over_predicted=ratio)


def by_cost_model(size: Any, V: int, slots: int) -> dict[int, float]:
    """Seconds of batches on this machine, whose peaks are measured now, by `plan`'s cost model."""
    from vlm_jax.cost import chips, roofline

    chip, method = chips.named("cpu"), size.compressor.at(V)
    return {
        rows: sum(
            roofline.seconds(
                size.vit, method, size.llm, roofline.Request(PROMPT, NEW, rows), chip
            ).values()
        )
        for rows in sorted({*BATCHES, slots})
    }


def by_batches(model: Any, pixels: list[Any], questions: list[str], V: int) -> dict[int, float]:
    """Seconds of batches of `VLM.generate`, which were compiled before."""
    found = {}
    for rows in BATCHES:
        some = [k % len(pixels) for k in range(rows)]
        given = [pixels[k] for k in some], [questions[k] for k in some]
        for _ in range(2):
            then = time.monotonic()
            model.generate(*given, max_new_tokens=NEW, visual_tokens=V, batch=rows)
            found[rows] = time.monotonic() - then
    return found


# --- A size ---------------------------------------------------------------------------------------


def words(vocab: int) -> list[str]:
    """So many words of four letters, in the order in which a tokenizer keeps them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        "".join(letters[k // 26**place % 26] for place in (3, 2, 1, 0))
        for k in range(max(vocab, 0))
    ]


def write_models(folder: Path, sizes: dict[str, Any], scales: tuple[int, ...]) -> Path:
    """transformers' model with a tokenizer of as many tokens as it has; the folder of ours."""
    from vlm_jax.data.word_tokenizer import train_tokenizer
    from vlm_jax.weights import folder as folders
    from vlm_jax.weights import sources
    from vlm_jax.weights.methods import Wish

    vocab, theirs = sizes["llm"]["vocab"], folder / "theirs"
    tokenizer = train_tokenizer(words(vocab), vocab - 1)
    if len(tokenizer) != vocab - 1:
        raise ValueError(f"{len(tokenizer)} tokens for a vocabulary of {vocab}")
    transformers_serve.save(theirs, generation.peer(sizes, "float32"), tokenizer)
    stored = sources.llava(theirs, vision=None, wish=Wish())
    stored.compressor |= dict(kind="m3", tokens=max(scales), scales=scales)
    stored.facts["template"] = "bare"
    folders.write(stored, folder / "ours")
    transformers_serve.add_processor(theirs, patch=sizes["tower"]["patch"])
    return folder / "ours"


@contextlib.contextmanager
def ours(folder: Path, slots: int) -> Iterator[str]:
    """The address of `vlm-jax serve`."""
    port = transformers_serve.free_port()
    argv = [sys.executable, "-m", "vlm_jax", "serve", f"--checkpoint={folder}", f"--port={port}",
            f"--slots={slots}", "--queue=80", "--index-gb=0", "--deadline=3600"]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with transformers_serve.process(argv, address, "/health", seconds=600):
        yield address


def offline(folder: Path, images: list[bytes], questions: list[str], few: int, many: int):
    """The answers of `VLM.generate` at both V, seconds of batches, and the model's description."""
    import jax
    import numpy as np
    from PIL import Image

    import vlm_jax
    from vlm_jax import mesh
    from vlm_jax.weights import folder as folders

    model = vlm_jax.VLM.from_checkpoint(folder, mesh=mesh.make(devices=jax.devices()[:1]))
    pixels = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in images]
    expected, seconds = {}, {}
    for V in (few, many):
        answers = [
            model.generate(image, question, max_new_tokens=NEW, visual_tokens=V)[0]
            for image, question in zip(pixels, questions, strict=True)
        ]
        expected[V] = [Expected(answer.text, len(answer.ids)) for answer in answers]
        seconds[V] = by_batches(model, pixels, questions, V)
    return expected, seconds, folders.read(folder).size()


def measure(name: str, args: argparse.Namespace, report: Callable) -> dict[str, Any]:
    """Reports all rows of one size; what is saved by few tokens."""
    sizes, scales = serving_engine.SIZES[name], serving_engine.SCALES[name]
    few, many = min(scales), max(scales)
    counts = [int(n) for n in args.clients.split(",")]
    peer = [int(n) for n in args.peer_clients.split(",") if n]
    seconds = {n: args.seconds / (1 if n == max(counts) else 3) for n in (*counts, *peer)}
    images = [picture(k, sizes["tower"]["image"]) for k in range(DIFFERENT)]
    draw = random.Random(0)
    known = words(sizes["llm"]["vocab"] - 100) or words(20)
    # One token is <bos>.
    questions = [" ".join(draw.choices(known, k=PROMPT - 1)) for _ in range(DIFFERENT)]
    rows: list[dict[str, Any]] = []

    def add(line: dict[str, Any]) -> dict[str, Any]:
        rows.append(line)
        report(name, line)
        return line

    with tempfile.TemporaryDirectory() as place:
        folder = write_models(Path(place), sizes, scales)
        expected, batches, size = offline(folder, images, questions, few, many)
        bodies = {
            V: [body(q, i, folder.name, V) for q, i in zip(questions, images, strict=True)]
            for V in (few, many)
        }
        with ours(folder, 1) as address:
            for V in (few, many):
                alone = Target("vlm_jax, one slot", V, address, bodies[V], expected[V])
                add(closed(alone, 1, args.seconds / 3))
        with ours(folder, args.slots) as address:
            for V in (few, many):
                ways = dict(
                    cost_model=by_cost_model(size, V, args.slots), measured_batches=batches[V]
                )
                target, best = Target("vlm_jax", V, address, bodies[V], expected[V]), 0.0
                for clients in counts:
                    line = add(closed(target, clients, seconds[clients]))
                    best = max(best, line["requests_per_second"])
                for share in SHARES:
                    by_themselves = target._replace(side="vlm_jax, Poisson")
                    most = args.slots + 64
                    line = poisson(by_themselves, share * best, args.seconds, most=most)
                    beside_plan(line, ways, args.slots)
                    add(line)
        if peer:
            theirs = Path(place) / "theirs"
            asks = [body(q, i, str(theirs), None) for q, i in zip(questions, images, strict=True)]
            with transformers_serve.serving(theirs, threads=args.threads) as address:
                target = Target("transformers serve", many, address, asks, expected[many])
                target.ask(0, time.monotonic())  # the first one takes longer
                for clients in peer:
                    add(closed(target, clients, seconds[clients]))
    return dict(batches={str(V): one for V, one in batches.items()}, saved=saved(rows, few, many))


def saved(rows: list[dict[str, Any]], few: int, many: int) -> list[dict[str, Any]]:
    """What few tokens save against all of them, for each number of clients."""
    ours = {
        (line["visual_tokens"], line["clients"]): line for line in rows if line["side"] == "vlm_jax"
    }
    found = []
    for clients in sorted({clients for _, clients in ours}):
        one, all_ = ours[few, clients], ours[many, clients]
        medians = [line["response"]["p50_ms"] for line in (one, all_)]
        rates = [line["requests_per_second"] for line in (one, all_)]
        found.append(
            dict(
                clients=clients,
                prompt_tokens_saved=round((many - few) / (PROMPT + many), 4),
                seconds_saved=round((medians[1] - medians[0]) / 1e3, 4),
                requests_per_second=rates,
                ratio=round(rates[0] / rates[1], 3) if rates[1] else None,
            )
        )
    return found


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    results = facts.of_run(
        "requests/s and times of vlm-jax serve through HTTP, for 1 to 64 clients",
        threads=args.threads,
        packages=("jax", "flax", "numpy", "torch", "transformers", "fastapi", "uvicorn"),
    ) | dict(seconds=args.seconds, slots=args.slots, prompt=PROMPT, new=NEW, rows=[], sizes={})

    def report(name: str, line: dict[str, Any]) -> None:
        results["rows"].append(dict(size=name) | line)
        who = f"{line['clients']} clients" if line["clients"] else f"{line['rate']}/s by themselves"
        print(
            f"{name:6} {line['side']:20} V={line['visual_tokens']:<4} {who:>18} "
            f"{line['requests_per_second']:8.3f}/s  first {line['first_token']}  token "
            f"{line['token']}  whole {line['response']}  wrong {line['wrong']} failed "
            f"{line['failed']}  plan {line.get('plan')}",
            flush=True,
        )
        facts.write(results, "serving_http", args.out)

    for name in args.sizes.split(","):
        results["sizes"][name] = measure(name, args, report)
        facts.write(results, "serving_http", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
