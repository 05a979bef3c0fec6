# SPDX-License-Identifier: Apache-2.0
"""Scores a file of predictions by a benchmark's published rules; needs no model and no JAX.

    vlm-jax score --task=gqa --predictions=answers.jsonl --annotations=eval/gqa
    vlm-jax score --task=pope --protocol=llava --predictions=answers.jsonl --annotations=eval/pope
    vlm-jax score --task=gqa --annotations=eval/gqa --compare small.jsonl large.jsonl
    vlm-jax score --task=own --metric=contains --predictions=a.jsonl --annotations=mine.jsonl
    vlm-jax score --task=gqa --annotations=eval/gqa --predictions=a.jsonl --blind=b.jsonl
    vlm-jax score --task=docvqa --annotations=test.json --predictions=a.jsonl --submission=up.json

Predictions are JSON lines with `question_id` and `text`, as LLaVA's scripts and `vlm-jax evaluate
--tasks` write them; a line with `error` in place of `text` is an answer that could not be made. One
JSON object on stdout: value and standard error in the task's unit (percent, or points for MME and
OCRBench), the protocol and its known faults, how many answers each rule of the parser took, and
the hashes of all files. docs/benchmarks.md lists tasks, protocols, fields and where the files are.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax import files
from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser

IMAGE = ("blind", "downsampled", "full")


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add(
        "--task",
        metavar="TASK",
        help="the benchmark, such as gqa or textvqa_ocr, or own (required, except for samples)",
    )
    add(
        "--protocol",
        metavar="NAME",
        help="the rules: official (the data set's own), llava, lmms-eval or paper (default: "
        "official)",
    )
    add("--metric", metavar="NAME", help="of the task own, in the place of --protocol (no default)")
    add(
        "--predictions",
        metavar="FILE",
        help="JSON lines: question_id, text (required, except with --compare)",
    )
    add(
        "--annotations",
        metavar="PATH",
        help="the benchmark's official file, or the folder with its official layout (required, "
        "except for --compare of samples or scores)",
    )
    add(
        "--allow",
        default="",
        metavar="KINDS",
        help="of missing (they count as failed), surplus (left out) and duplicate (the last "
        "counts), with commas between them (default: each is an error)",
    )
    add(
        "--samples",
        metavar="FILE",
        help="also write one JSON line a question, with lmms-eval's field names and ours "
        "(default: none)",
    )
    add(
        "--submission",
        metavar="FILE",
        help="also write the file for the server of vqav2, vizwiz, mmbench (.xlsx), docvqa or "
        "infovqa; the only thing to do with a test split (default: none)",
    )
    image = parser.add_argument_group("does the benchmark need the image?").add_argument
    image(
        "--blind",
        metavar="FILE",
        help="predictions of the same model without images (default: none)",
    )
    image(
        "--downsampled",
        metavar="FILE",
        help="predictions of the same model with downsampled images, at the same number of visual "
        "tokens (default: none)",
    )
    image(
        "--full",
        metavar="FILE",
        help="with --downsampled, predictions without compression: VTC-Bench's groups A and B "
        "(default: none)",
    )
    pair = parser.add_argument_group("two models on the same questions").add_argument
    pair(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two files of predictions, of samples or of printed scores: the difference B - A "
        "(default: none)",
    )
    pair(
        "--across-protocols",
        action="store_true",
        help="compare scores of two protocols",
    )
    pair(
        "--difference",
        type=float,
        metavar="D",
        help="also say how many questions tell a difference of D percent or points (default: "
        ".5, 1, 2 and 5)",
    )
    parser.add_argument_group("the law").add_argument(
        "--model",
        default="",
        metavar="COLUMNS",
        help='of the model, for `vlm-jax fit`: N (billions), V, Q, label, seed, such as "N=7,V=36,'
        'Q=50,label=vicuna-7b" (default: none)',
    )


def run(options: argparse.Namespace) -> int:
    """Scores, compares or writes a submission; 0."""
    cli.say_warnings()
    from vlm_jax.evals import scoring

    if options.compare:
        shown = compared(options)
    else:
        for name in ("task", "predictions", "annotations"):
            required(options, name)
        unused(options, ("across_protocols", "difference"), "is for --compare")
        shown = scored(options)
    print(json.dumps(finite(shown), allow_nan=False))
    for note in scoring.warnings(shown):
        print(f"vlm-jax score: {note}", file=sys.stderr)
    return 0


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def required(options: argparse.Namespace, name: str) -> Any:
    """A flag that this use of the verb needs. Raises ValueError if it was not given."""
    value = getattr(options, name)
    if value is None:
        raise ValueError(f"--{name} is missing (vlm-jax score --help)")
    return value


def unused(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises ValueError for the first of these flags that was given."""
    for name in names:
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def protocol_named(options: argparse.Namespace) -> str:
    """--protocol, or --metric of the task own. Raises ValueError where the other one is meant."""
    if options.task == "own":
        if options.protocol is not None:
            raise ValueError("--task=own has no protocols: choose with --metric")
        return required(options, "metric")
    if options.metric is not None:
        raise ValueError("--metric is for --task=own: a benchmark's metric is in its --protocol")
    return options.protocol or "official"


def scored(options: argparse.Namespace) -> dict[str, Any]:
    """One score with what else was asked for."""
    from vlm_jax.evals import image_need, predictions, samples, scoring, submission
    from vlm_jax.evals.scoring import Scored

    allow = allowed(options.allow, predictions.ALLOWED)
    task, name = scoring.task_of(options.task), protocol_named(options)
    scoring.protocol_of(task, name)
    file = Path(options.predictions)
    if options.full and not options.downsampled:
        raise ValueError("--full needs --downsampled: together they are VTC-Bench's groups")
    given = scoring.annotations_of(task, Path(options.annotations))
    inputs = [
        file,
        *given.files,
        *(Path(path) for kind in IMAGE if (path := getattr(options, kind))),
    ]
    keep(inputs, options.submission, options.samples)
    shown: dict[str, Any] = {}
    if options.submission:
        content, found = submission.made(task, given, file, allow=allow)
        files.write_bytes(options.submission, content)
        failed = sum(text is None for text in found.texts.values())
        shown["submission"] = dict(file=options.submission, n=len(found.texts), failed=failed)
        if not all(question.answers for question in given.questions):
            unused(options, (*IMAGE, "samples", "model"), "needs answers, and this is a test split")
            return dict(schema=scoring.SCHEMA, task=task.name) | shown

    def of(path: Path) -> Scored:
        return scoring.score_given(task, name, path, given, allow=allow)

    result = of(file)
    shown = result.described | columns(options.model) | shown
    if options.blind or options.downsampled:
        others = dict(blind=options.blind, downsampled=options.downsampled, full=options.full)
        read = {kind: of(Path(path)) for kind, path in others.items() if path}
        shown["image"] = image_need.described(result, **read)
    if options.samples:
        text = "".join(f"{line}\n" for line in samples.lines(result))
        files.write_text(options.samples, text)
        shown["samples"] = options.samples
    return shown


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """The comparison of two files of one kind."""
    from vlm_jax.evals import compare, predictions, samples, scoring

    alone = ("predictions", "samples", "submission", *IMAGE, "model")
    unused(options, alone, "is not for --compare, which takes two files")
    paths = [Path(path) for path in options.compare]
    (kind, a), (other, b) = map(samples.kind_of, paths)
    if kind != other:
        raise ValueError(
            f"{paths[0]} holds {kind} and {paths[1]} {other}: compare two files of predictions, "
            "two of samples (--samples) or two printed scores"
        )
    how: dict[str, Any] = dict(
        across_protocols=options.across_protocols, difference=options.difference
    )
    if kind != "predictions":
        told = ("task", "protocol", "metric", "annotations", "allow")
        unused(options, told, f"is not for --compare of {kind}, which say it themselves")
    if kind == "score":
        return compare.unpaired(a, b, **how)
    if kind == "samples":
        return compare.paired(*map(samples.read, paths), **how)
    for name in ("task", "annotations"):
        required(options, name)
    allow = allowed(options.allow, predictions.ALLOWED)
    task, name = scoring.task_of(options.task), protocol_named(options)
    scoring.protocol_of(task, name)
    given = scoring.annotations_of(task, Path(options.annotations))
    one, two = (scoring.score_given(task, name, path, given, allow=allow) for path in paths)
    return compare.paired(one, two, **how)


def keep(inputs: Sequence[Path], *outputs: str | None) -> None:
    """Raises ValueError for a file to be written that is read, or is written twice."""
    taken = {path.resolve() for path in inputs}
    for name in filter(None, outputs):
        if (path := Path(name).resolve()) in taken:
            raise ValueError(f"{name} is read or written already: give the new file another name")
        taken.add(path)


def allowed(text: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of --allow. Raises ValueError for an unknown one."""
    allow = tuple(filter(None, text.split(",")))
    if wrong := sorted(set(allow) - set(kinds)):
        raise ValueError(f"--allow={wrong[0]}: choose of {', '.join(kinds)}")
    return allow


def columns(text: str) -> dict[str, Any]:
    """The columns of --model: name -> value. Raises ValueError for one that `fit` does not read."""
    kinds: dict[str, type] = dict(N=float, V=float, Q=float, label=str, seed=int)
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or name not in kinds:
            raise ValueError(f"--model: {part!r} is none of {'=, '.join(kinds)}=")
        try:
            found[name] = kinds[name](value.strip())
        except ValueError:
            raise ValueError(f"--model: {name}={value!r} is not a number") from None
    return found
