# SPDX-License-Identifier: Apache-2.0
"""How many questions of a benchmark are answered in a second, next to a loop and to transformers?

    python benchmarks/evaluate.py [--questions=32] [--batch=8] [--rounds=3] [--out=FILE]

Short answers to JPEG files of 640 x 480 pixels by a LLaVA of random weights that transformers has
written. All sides read and decode the files, make pixels and ids, and answer with 8 tokens:
transformers one question after another, as LLaVA's script does; `loop` is ours in the same way; and
`evaluate` is what `vlm-jax evaluate --tasks` does, batches of rows made ahead in threads. Ours also
has 36 visual tokens (M3's, from the same weights), and both numbers in one pass. Sides take turns
after a pass that compiles; medians over rounds. `host` is the time of reading and decoding alone.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is a folder, not installed

from benchmarks import facts, generation  # noqa: E402

NEW = 8  # tokens of an answer
WORDS = "what is the color of this object how many people are in image and where near".split()
SIZES = dict(
    tower=dict(width=192, depth=6, heads=3, mlp=768, image=336, patch=14),
    llm=dict(width=384, depth=8, heads=6, mlp=1024, vocab=2000),
)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--out", help="default: benchmarks/results/DATE-evaluate.json")
    return parser.parse_args(argv)


def questions(folder: Path, count: int) -> list[Any]:
    """Questions of 8 to 20 words about smooth pictures."""
    import numpy as np
    from PIL import Image

    from vlm_jax.evals.task import Question

    draw, words = np.random.default_rng(0), random.Random(0)
    made = []
    for number in range(count):
        small = draw.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        text = " ".join(words.choices(WORDS, k=words.randint(8, 20)))
        made.append(Question(id=number, text=text, images=(path,)))
    return made


def ours(folder: Path, scales: tuple[int, ...]):
    """The model of the peer's weights, with the words of the questions."""
    from configs import base
    from vlm_jax.data.processor import Processor, RowFormat
    from vlm_jax.data.word_tokenizer import train_tokenizer

    model = generation.ours(folder, "float32", scales)
    c = base.get_config()
    c.vit.image_size = model.processor.images.size
    c.data.update(dict(template="bare", text_length=2048))
    tokenizer = train_tokenizer([" ".join(WORDS)], 100)
    model.processor = Processor(tokenizer, replace(RowFormat.of(c), vocab=None))
    model.processor.stop_ids = ()
    return model


def asker(model, V: int):
    """Questions as rows for our model with V visual tokens."""
    from vlm_jax.serving.asking import Asker, Way

    return Asker(model, Way("random weights", V, "", NEW))


def loop(model, asked: list, V: int) -> list[list[int]]:
    """Ours, one question after another."""
    from vlm_jax.serving.greedy import Greedy

    rows, answer = asker(model, V), Greedy([asker(model, V)], batch=1, cache=None)
    made = (rows.row(k, question, question.text) for k, question in enumerate(asked))
    return [answer.decoded([[row]])[0][1].ids for row in made]


def batches(model, asked: list, V: tuple[int, ...], batch: int) -> list[list[list[int]]]:
    """Ours, as `vlm-jax evaluate --tasks --visual-tokens=V,V` answers; for each V."""
    from vlm_jax.serving.asking import ahead, rows_of
    from vlm_jax.serving.greedy import Greedy

    askers = [asker(model, one) for one in V]
    answer = Greedy(askers, batch=batch, cache=None)
    made = ahead(
        lambda k: rows_of(askers, k, asked[k], asked[k].text), range(len(asked)), 2 * batch
    )
    found: dict[tuple[int | None, int], list[int]] = {}
    for some in answer.answers(made, lambda row: None):
        found |= {(row.visual_tokens, row.number): said.ids for row, said in some}
    return [[found[one, k] for k in range(len(asked))] for one in V]


def transformers_loop(peer, rows, asked: list, image_token: int, patches: int) -> list[list[int]]:
    """transformers, one question after another: its own preparation of images, our ids."""
    import torch
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size, color = rows.images.size, rows.images.color
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    found = []
    for question in asked:
        picture = Image.open(question.images[0]).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), color)
        square.paste(picture, tuple((side - x) // 2 for x in picture.size))
        pixels = prepare(square, return_tensors="pt")["pixel_values"]
        tokens = rows.model.tokens(question.text, images=1)
        at = tokens.places[0]
        ids = torch.tensor([[*tokens.ids[:at], *[image_token] * patches, *tokens.ids[at:]]])
        with torch.inference_mode():
            out = peer.generate(
                input_ids=ids,
                pixel_values=pixels,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
            )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def timed(side: Callable[[], list]) -> float:
    """Seconds of one pass over all questions."""
    then = time.perf_counter()
    side()
    return time.perf_counter() - then


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    heap.keep_freed_memory()
    import torch

    torch.set_num_threads(args.threads)
    sizes = generation.QUICK if args.quick else SIZES
    patches = (sizes["tower"]["image"] // sizes["tower"]["patch"]) ** 2
    few = 9 if args.quick else 36
    results = facts.of_run(
        f"questions per second: JPEG files of 640 x 480, {NEW} tokens of an answer, float32",
        threads=args.threads,
        packages=("jax", "flax", "numpy", "torch", "transformers", "pillow"),
    ) | dict(rounds=args.rounds, questions=args.questions, batch=args.batch, sizes=sizes)
    with tempfile.TemporaryDirectory() as folder:
        peer = generation.peer(sizes, "float32")
        peer.save_pretrained(Path(folder, "model"))
        model = ours(Path(folder, "model"), (few, patches))
        asked = questions(Path(folder), args.questions)
        rows, image_token = asker(model, patches), sizes["llm"]["vocab"] - 1
        sides = {
            "transformers": lambda: transformers_loop(peer, rows, asked, image_token, patches),
            "host": lambda: [rows.row(k, q, q.text) for k, q in enumerate(asked)],
        }
        for V in (patches, few):
            sides[f"loop, V={V}"] = lambda V=V: loop(model, asked, V)
            sides[f"evaluate, V={V}"] = lambda V=V: batches(model, asked, (V,), args.batch)[0]
        both = "both V in one pass"
        sides[both] = lambda: batches(model, asked, (few, patches), args.batch)
        said = {name: side() for name, side in sides.items() if name != "host"}  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.rounds):
            names = list(sides)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(timed(sides[name]))

    def same(one: str, other: str) -> float:
        pairs = zip(said[one], said[other], strict=True)
        return sum(a == b for a, b in pairs) / len(asked)

    results["answers_that_agree"] = {
        "evaluate and transformers": same(f"evaluate, V={patches}", "transformers"),
        **{f"evaluate and loop, V={V}": same(f"evaluate, V={V}", f"loop, V={V}")
           for V in (patches, few)},
        both: min(
            sum(a == b for a, b in zip(one, said[f"evaluate, V={V}"], strict=True)) / len(asked)
            for V, one in zip((few, patches), said[both], strict=True)
        ),
    }  # fmt: skip
    results["questions_per_second"] = {
        name: round(args.questions / statistics.median(all_of), 3)
        for name, all_of in seconds.items()
    }
    results["seconds"] = {name: [round(x, 3) for x in all_of] for name, all_of in seconds.items()}
    for name, speed in results["questions_per_second"].items():
        ratio = speed / results["questions_per_second"]["transformers"]
        print(f"{name:20} {speed:8.2f} questions/s  {ratio:.2f}x")
    print(f"answers that agree: {results['answers_that_agree']}")
    facts.write(results, "evaluate", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
