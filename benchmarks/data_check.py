# SPDX-License-Identifier: Apache-2.0
"""How long does `vlm-jax data check` take for the 665,000 rows of LLaVA-1.5?

    python benchmarks/data_check.py --photos=DIR [--rows=20000] [--jobs=2] [--out=FILE]

20,000 made rows of one image and three turns, each image a file of its own: 2,000 different JPEGs
of 640 x 480 (92 kB), each under ten names (hard links). Texts are measured with a byte-level BPE
tokenizer that is trained here. The time of 665,000 rows is extrapolated: the time to start is
constant, the rest proportional to rows. 2,000 files of 92 kB are in the cache of the disk; a cold
disk adds the time to read them.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# benchmarks/ is a folder of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from tokenizers.trainers import BpeTrainer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from benchmarks import facts, made_photos  # noqa: E402

ROWS_OF_LLAVA = 665_298  # llava_v1_5_mix665k.json
WORDS = 3_000


def words() -> list[str]:
    """Made words of two to four syllables."""
    draw = random.Random(0)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    return ["".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(WORDS)]


def make_tokenizer(folder: Path, known: list[str]) -> None:
    """A byte-level BPE tokenizer that has learned these words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=4000, special_tokens=["</s>"], show_progress=False,
                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator([" ".join(known)] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


def make_rows(folder: Path, photos: list[Path], rows: int) -> None:
    """rows.json and its images: each photo under as many names as there are rows for it."""
    draw, known = random.Random(1), words()
    made = []
    for number in range(rows):
        name = f"images/{number // 1000:03d}/{number:06d}.jpg"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(photos[number % len(photos)], path)
        said = []
        for turn in range(3):
            question = " ".join(draw.choices(known, k=12))
            said.append(("human", "<image>\n" * (turn == 0) + question))
            said.append(("gpt", " ".join(draw.choices(known, k=draw.randint(5, 80)))))
        turns = [{"from": who, "value": text} for who, text in said]
        made.append({"id": f"{number:06d}", "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(made))
    make_tokenizer(folder / "tokenizer", known)


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_of(folder: Path, *flags: str) -> tuple[float, float, dict]:
    """The time of a whole command, that of its processors, and what it printed."""
    then, used = time.perf_counter(), processor_seconds()
    command = [sys.executable, "-m", "vlm_jax", "data", "check", f"{folder}/rows.json", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    return time.perf_counter() - then, processor_seconds() - used, json.loads(done.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--photos", required=True, help="where photos are made, or were before")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", help="default: benchmarks/results/DATE-data-check.json")
    args = parser.parse_args(argv)
    photos = made_photos.make(Path(args.photos), min(2_000, args.rows))
    found = {}
    with tempfile.TemporaryDirectory(dir=Path(args.photos).parent) as folder:
        make_rows(Path(folder), photos, args.rows)
        tokenizer = f"--tokenizer={folder}/tokenizer"
        ways = {
            "images whole, tokens": [tokenizer],
            "images whole": [],
            "headers only": ["--headers"],
        }
        few = Path(folder, "few")
        few.mkdir()
        rows = json.loads(Path(folder, "rows.json").read_text())
        (few / "rows.json").write_text(json.dumps(rows[:64]))
        for name, flags in ways.items():
            flags = [*flags, f"--jobs={args.jobs}", f"--images={folder}"]
            start, begun, _ = seconds_of(few, *flags)
            took, used, said = seconds_of(Path(folder), *flags)
            more = ROWS_OF_LLAVA / args.rows
            whole, cores = start + (took - start) * more, begun + (used - begun) * more
            found[name] = dict(
                seconds=took,
                seconds_to_start=start,
                rows_per_second=args.rows / (took - start),
                minutes_of_665k=whole / 60,
                core_minutes_of_665k=cores / 60,
                median_tokens=said["text"]["median"],
            )
            print(f"{name:22} {took:6.1f} s, {whole / 60:5.1f} minutes for {ROWS_OF_LLAVA:,} rows "
                  f"with {args.jobs} processes; {cores / 60:.1f} minutes of a core")  # fmt: skip
    size = sum(path.stat().st_size for path in photos) / len(photos)
    results = facts.of_run(
        __doc__.split("\n")[0], threads=args.jobs, packages=("pillow", "tokenizers", "numpy")
    ) | dict(rows=args.rows, photos=len(photos), mean_bytes=size, by_way=found)
    facts.write(results, "data-check", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
