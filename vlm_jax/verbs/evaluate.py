# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained model: greedy answers to every question, and their scores.

    vlm-jax evaluate --workdir=runs/one
    vlm-jax evaluate --workdir=runs/one --config.evaluate.split=val
    vlm-jax evaluate --workdir=runs/demo/cells/30k-v4-token_packer-s0
    vlm-jax evaluate --workdir=models/llava --config=configs/base.py --config.data.path=FILE
    vlm-jax evaluate --workdir=models/llava --tasks=gqa --protocol=llava --annotations=eval/gqa
    vlm-jax evaluate --workdir=models/m3 --tasks=gqa,pope --visual-tokens=1,36 --annotations=eval

The folder is that of a finished `vlm-jax train`, which has its configuration (--config may be
given, and must agree), a cell of a grid, or a model folder, whose data --config names.
predictions.jsonl and scores.json are written into it.

A different split, file, prompt, batch, number of answer tokens or, if the compressor serves any,
number of visual tokens is another evaluation of the same model, with its own files:
predictions-val.jsonl, scores-val.json. Their names and the `settings` in them say what differs.
Fields that the training depends on cannot be changed.

With --tasks it answers public benchmarks instead. For each task and V the folder `answers` gets
TASK-PROTOCOL[-vV][-blind].jsonl, LLaVA's answers format, which `vlm-jax score` reads, and a .json
with settings, counts and the score, which also goes to stdout, one line of JSON for each file. The
same command continues a file that was not finished. docs/benchmarks.md lists tasks and protocols.
"""

import argparse
from pathlib import Path

from vlm_jax import files
from vlm_jax.data.example import EXIF
from vlm_jax.verbs import cli, configuration
from vlm_jax.verbs.parser import Parser

BATCH = 16


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="the folder of a finished `vlm-jax train`, a grid's cell, or a model",
    )
    add = parser.add_argument_group("public benchmarks").add_argument
    add("--tasks", metavar="TASKS", help="benchmarks, such as gqa,textvqa_ocr (default: none)")
    add(
        "--protocol",
        metavar="NAME",
        help="prompts and rules: official (the default), llava, lmms-eval or paper",
    )
    add(
        "--annotations",
        metavar="PATH",
        help="the official file or folder of the task; for several, a folder with a subfolder "
        "TASK for each (required with --tasks)",
    )
    add("--out", metavar="DIR", help="the folder of the answers (default: WORKDIR/answers)")
    add(
        "--visual-tokens",
        metavar="V,V",
        help="visual tokens of an image, if the compressor serves any number: a file for each V, "
        "all in one pass that encodes an image once (default: as trained)",
    )
    add("--pruning", **cli.pruning_flag("in the folder"))
    add("--limit", type=int, metavar="N", help="ask no more than N questions (default: all)")
    add("--offset", type=int, metavar="N", help="leave out the first N questions (default: 0)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer (default: as many as the protocol has)",
    )
    add(
        "--blind",
        action="store_true",
        help="answers without the image, which is replaced by its mean color",
    )
    add(
        "--downsample",
        action="store_true",
        help="answers to an image that was reduced to the pixels of V patches",
    )
    add("--predict-only", action="store_true", help="write the answers, do not score them")
    add(
        "--log-samples",
        action="store_true",
        help="also write NAME_samples_TASK.jsonl, as `vlm-jax score --samples` does",
    )
    add("--cache", metavar="DIR", help="take and keep answers in this folder, by their content "
        "(default: none)")  # fmt: skip
    add(
        "--on-missing-image",
        choices=("fail", "record"),
        metavar="WHAT",
        help="fail (the default), or record an error in place of the answer",
    )
    add("--exif", choices=EXIF, metavar="WHAT", help="apply (the default) or ignore the images' "
        "EXIF orientation")  # fmt: skip
    add("--batch", type=int, metavar="N", help=f"questions in a batch (default: {BATCH})")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number format of weights and activations (default: as stored)",
    )
    add("--mesh", metavar="AXIS=N", help="the device mesh, as in `vlm-jax generate` (default: all "
        "devices to data)")  # fmt: skip


OF_BENCHMARKS = (
    "protocol", "annotations", "out", "visual_tokens", "pruning", "limit", "offset",
    "max_new_tokens", "blind", "downsample", "predict_only", "log_samples", "cache",
    "on_missing_image", "exif", "batch", "dtype", "mesh",
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Evaluates; 0."""
    if options.tasks is not None:
        return benchmarks(options)
    if surplus := [name for name in OF_BENCHMARKS if getattr(options, name) not in (None, False)]:
        flag = surplus[0].replace("_", "-")
        raise ValueError(
            f"--{flag} goes with --tasks=TASKS, which answers public benchmarks; an evaluation of "
            "the model's own data has its settings in the configuration (--config.evaluate...)"
        )
    cli.say_warnings()
    cli.join(options)
    from vlm_jax.serving.evaluation import evaluate
    from vlm_jax.serving.subject import Subject

    path = options.workdir
    subject = Subject.of(path)
    if subject.stored is not None and not configuration.value_of(options.config, "config"):
        raise ValueError(
            f"{path} is a model folder, which names no data: give --config=FILE (configs/base.py) "
            "and what differs, such as --config.data.path=ROWS.json --config.data.images=DIR, or "
            "--tasks=TASKS --annotations=PATH for public benchmarks"
        )
    read = configuration.read(options.config, default=subject.default())
    evaluate(subject, read.config, read.overrides)
    return 0


def benchmarks(options: argparse.Namespace) -> int:
    """Answers the benchmarks of --tasks; 0."""
    if options.config:
        raise ValueError(
            f"{options.config[0]} goes without --tasks: the protocol of a benchmark has its "
            "prompts and lengths"
        )
    if options.annotations is None:
        raise ValueError(
            "--annotations is missing: give the official file or folder of the benchmark, or for "
            "several a folder with one subfolder for each"
        )
    tokens = (None,) if options.visual_tokens is None else tuple(
        whole("--visual-tokens", word) for word in options.visual_tokens.split(",")
    )  # fmt: skip
    limit, offset = options.limit, options.offset
    if limit is not None and limit < 1:
        raise ValueError(f"--limit={limit}: give 1 or more, or leave it out for all questions")
    if offset is not None and offset < 0:
        raise ValueError(f"--offset={offset}: give 0 or more")
    for flag, number in (("batch", options.batch), ("max-new-tokens", options.max_new_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"--{flag}={number}: give 1 or more")
    cli.say_warnings()
    cli.join(options)
    from vlm_jax import mesh, progress
    from vlm_jax.serving import benchmarks as rooms
    from vlm_jax.serving.answer_cache import AnswerCache
    from vlm_jax.serving.greedy import Said

    views = [
        view
        for view, asked in (("blind", options.blind), ("downsampled", options.downsample))
        if asked
    ]
    request = rooms.Request(
        tasks=tuple(filter(None, (name.strip() for name in options.tasks.split(",")))),
        protocol=options.protocol or "official",
        annotations=Path(options.annotations),
        visual_tokens=tokens,
        views=tuple(views) or ("",),
        offset=offset or 0,
        limit=limit or 0,
        max_new_tokens=options.max_new_tokens,
        batch=options.batch or BATCH,
        exif=options.exif or "apply",
        on_missing_image=options.on_missing_image or "fail",
        samples=options.log_samples,
        score=not options.predict_only,
    )
    with progress.doing("reading the annotations"):
        tasks = rooms.read_tasks(request)
    devices = mesh.make(**mesh.sizes(options.mesh))
    with progress.doing("loading the model"):
        model, identity = rooms.opened(
            options.workdir, dtype=options.dtype, mesh=devices, pruning=options.pruning
        )
    workdir = files.path_of(options.workdir)
    out = workdir / "answers" if options.out is None else files.path_of(options.out)
    cache = None if options.cache is None else AnswerCache(options.cache, fits=Said.fits)
    name = workdir.name or Path(options.workdir).absolute().name
    reports = rooms.evaluate(model, identity, request, tasks, out, model_id=name, cache=cache)
    for report in reports:
        print(rooms.shown(report), flush=True)
    return 0


def whole(flag: str, word: str) -> int:
    """A number of 1 or more."""
    if not word.strip().isdecimal() or int(word) < 1:
        raise ValueError(f"{flag}: {word!r} is no whole number of 1 or more, as in {flag}=1,4,36")
    return int(word)
