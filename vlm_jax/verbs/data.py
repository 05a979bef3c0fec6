# SPDX-License-Identifier: Apache-2.0
"""Checks a data set before it is trained on: rows, images, lengths of texts; writes it for tfds;
fetches the public packages of the demos.

    vlm-jax data check llava_v1_5_mix665k.json --images=playground/data --jobs=16
    vlm-jax data build rows.json --images=images --out=tfds --split=train
    vlm-jax data check rows.jsonl --tokenizer=models/vicuna/tokenizer --out=runs/check
    vlm-jax data fetch smollm2

One JSON object on stdout, a table on stderr. Exit status 0: clean; 1: something was found; 2: the
data could not be checked. --out=DIR also writes check.json, found.jsonl (each finding and note, one
a line) and the histogram of lengths as a picture.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser


def count_flag(text: str) -> int:
    """A whole number from 1, for argparse."""
    try:
        if (number := int(text)) >= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r:.40}: give a whole number from 1")


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("action", choices=("check", "build", "fetch"), metavar="ACTION",
        help="check; build: a data set of tensorflow-datasets, written to --out; fetch: a package "
        "of the demos, by pip or npm, into the folder VLM_JAX_PACKAGES (default: the user's "
        "cache)")  # fmt: skip
    add("path", metavar="FILE",
        help="a LLaVA file (a JSON list or JSON lines), or tars: one, a folder, or a name with "
        "{000..012} or *; fetch: the name of a package")  # fmt: skip
    add("--images", metavar="DIR",
        help="what image paths are relative to (default: the folder of FILE)")  # fmt: skip
    add("--jobs", type=count_flag, metavar="N", help="processes (default: one for each core)")
    add("--tokenizer", metavar="DIR",
        help="a folder with tokenizer.json: texts are measured in its tokens, and too long rows "
        "are found (default: characters)")  # fmt: skip
    add("--template", default="vicuna_v1", metavar="NAME", help="data.template of the training")
    add("--text-length", type=count_flag, default=2048, metavar="T",
        help="data.text_length of the training: tokens of text that a row keeps")  # fmt: skip
    add(
        "--frames",
        type=count_flag,
        metavar="T",
        default=8,
        help="data.frames of the training: frames that are taken of each clip (default: 8)",
    )
    add("--headers", action="store_true",
        help="read headers of images only: faster, but a damaged image may be missed")  # fmt: skip
    add("--strict", action="store_true", help="notes make the exit status 1 too")
    add("--allow", default="", metavar="KIND,KIND",
        help="kinds that do not change the exit status (default: none)")  # fmt: skip
    add(
        "--out",
        metavar="DIR",
        help="where found.jsonl and a picture, or the data set, are written (default: nowhere)",
    )
    add("--split", default="train", metavar="NAME", help="build: the split that the rows are")


def run(options: argparse.Namespace) -> int:
    """Checks; 0, or 1 if something was found. Or builds or fetches; 0."""
    cli.say_warnings()
    return {"check": check, "build": build, "fetch": fetched}[options.action](options)


def fetched(options: argparse.Namespace) -> int:
    """Fetches packages of the demos, and prints their folder, files and licenses; 0.

    One object for one package; for a set the folder that holds those of its packages.
    """
    from vlm_jax import fetch

    found = []
    for name in fetch.SETS.get(options.path, (options.path,)):
        if (package := fetch.PACKAGES.get(name)) is None:
            known = ", ".join((*fetch.PACKAGES, *fetch.SETS))
            raise ValueError(f"{name} is no known package: choose of {known}")
        folder = fetch.fetch(package)
        names = sorted(json.loads((folder / fetch.RECORD).read_text())["files"])
        about = dict(package=f"{package.name} {package.version}", license=package.license)
        found.append(about | dict(path=str(folder), files=names))
    if len(found) > 1:
        counted = [one | dict(files=len(one["files"])) for one in found]
        print(json.dumps(dict(path=str(folder.parent), packages=counted)))
    else:
        print(json.dumps(found[0]))
    return 0


def build(options: argparse.Namespace) -> int:
    """Writes a data set, and prints its folder and the hash of what is read from it; 0."""
    if not options.out:
        raise ValueError("--out is missing: name the folder that the data set is written to")
    from vlm_jax.data import tfds
    from vlm_jax.data.check import EverySkip

    source = opened_source(options.path, options.images)
    if bad := len(source.left_out):
        assert isinstance(source.left_out, EverySkip)
        raise ValueError(
            f"{bad} bad rows in {options.path}, the first: {source.left_out.all[0][2]}; "
            "`vlm-jax data check` names all of them: correct the file"
        )
    source.split = options.split
    folder = tfds.build(source, options.out)
    print(json.dumps({"path": str(folder), "split": options.split, "rows": len(source)}))
    return 0


def check(options: argparse.Namespace) -> int:
    """Checks; 0, or 1 if something was found."""
    from vlm_jax import progress
    from vlm_jax.data import check as checking
    from vlm_jax.data import findings

    allow = [kind for kind in options.allow.split(",") if kind]
    known = [*findings.FINDINGS, *findings.NOTES]
    if unknown := [kind for kind in allow if kind not in known]:
        raise ValueError(f"--allow={unknown[0]}: choose of {', '.join(known)}")
    jobs = options.jobs or os.cpu_count() or 1
    texts = checking.TextFormat(options.tokenizer or "", options.template, options.text_length)
    if not options.tokenizer and texts != checking.TextFormat():
        raise ValueError(
            "--template and --text-length are in tokens: give --tokenizer too, without which texts "
            "are measured in characters"
        )
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)  # an error before hours of reading
    then = time.monotonic()
    with progress.doing(f"reading {options.path}"):
        source = opened_source(options.path, options.images, frames=options.frames)
    opened = time.monotonic()
    report = checking.check(source, texts, jobs=jobs, whole=not options.headers)
    failing = report.failing(strict=options.strict, allow=allow)
    found = {
        "path": options.path,
        "images": options.images,
        "frames": options.frames,
        "clean": not failing,
        "failing": failing,
        **report.fields(),
        "jobs": jobs,
        "seconds": {
            "rows": round(opened - then, 2),
            "all": round(time.monotonic() - then, 2),
        },
    }
    if options.out:
        write(Path(options.out), found, report)
    print(findings.table(found), file=sys.stderr)
    print(json.dumps(found))
    return int(bool(failing))


def opened_source(path: str, images: str | None, *, frames: int = 0) -> Any:
    """The rows of a file or of tars, bad ones counted, not raised; `frames` are taken of each clip.

    Raises:
      FileNotFoundError, ValueError: if there is no such file or folder, or no row can be read.
    """
    from vlm_jax.data.check import EverySkip
    from vlm_jax.data.llava import Llava
    from vlm_jax.data.tars import Tars

    how: dict[str, Any] = dict(
        text_only=True,
        images_per_row=sys.maxsize,
        skip=True,
        left_out=EverySkip(),
        may_be_empty=True,
    )
    source: Llava | Tars
    if path.endswith(".tar") or Path(path).is_dir():
        if images is not None:
            raise ValueError(f"--images={images}: the images of {path} are inside it: leave it out")
        source = Tars(path, "train", **how)
    else:
        images = images if images is not None else os.path.dirname(path) or "."
        if not Path(images).is_dir():
            raise FileNotFoundError(f"--images={images}: no such folder")
        source = Llava(path, "train", images=images, frames=frames, **how)
    if not len(source) + len(source.left_out):
        raise ValueError(f"{path} holds no rows: give a file with at least one")
    return source


def write(folder: Path, found: dict[str, Any], report: Any) -> None:
    """check.json, found.jsonl and the histogram in a folder."""
    from vlm_jax import files
    from vlm_jax.reports import lengths_figure

    files.write_json(folder / "check.json", found)
    lines = (dict(zip(("kind", "name", "what"), one, strict=True)) for one in report.found)
    files.write_text(folder / "found.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    text = found["text"]
    lengths_figure.draw(
        text["edges"], text["counts"], folder, unit=text["unit"], limit=found["text_length"]
    )
