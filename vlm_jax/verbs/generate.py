# SPDX-License-Identifier: Apache-2.0
"""Checkpoint, images and prompts to text.

    vlm-jax generate --checkpoint=DIR --image=A.jpg --prompt="What is this?"
    vlm-jax generate --checkpoint=DIR --image=A.jpg --chat
    vlm-jax generate --checkpoint=DIR --video=A.mp4 --frames=8 --prompt="What happens?"
    vlm-jax generate --checkpoint=DIR --requests=FILE.jsonl --out=ANSWERS.jsonl
    vlm-jax generate --checkpoint=DIR --requests=FILE.jsonl --out=ANSWERS.jsonl --mesh=tensor=8

--checkpoint is a folder that `vlm-jax convert` made, the --workdir of a finished `vlm-jax train`,
or a cell of a grid (GRID/cells/NAME). The answer goes to stdout; visual tokens, time to the first
token and tokens per second to stderr.

A line of --requests has `prompt` (a text, or a conversation [question, answer, ..., question]) and
may have `image` (a path, beside the file, or a list of several) or `video` (a folder of frames or a
video file) with `frames`, and `id`. Each <image> in the questions stands for the next image or the
video; without any, all belong to the first question. A line of --out
has `id` (default: the line number), `line` (its number), `text`, `stopped`, `prompt_tokens`,
`visual_tokens`, `new_tokens`, `first_token_seconds` and `tokens_per_second`, or `id`, `line` and
`error`; it is written as soon as its batch is answered. Several lines may share an id.
"""

import argparse
import sys
from pathlib import Path

from vlm_jax import arguments, progress
from vlm_jax.data.example import EXIF
from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a model folder, a finished training, or a grid's cell",
    )
    add(
        "--image",
        action="append",
        metavar="FILE",
        help="an image file; repeat the flag for several (default: no image)",
    )
    add(
        "--video",
        metavar="PATH",
        help="a folder of frames or a video file, in place of images; by default none",
    )
    add(
        "--frames",
        type=int,
        metavar="T",
        help="frames that are taken of a video, at even places (required with --video)",
    )
    add("--prompt", metavar="TEXT", help="the question")
    add("--chat", action="store_true", help="a conversation on stdin; the model sees earlier turns")
    add("--requests", type=Path, metavar="FILE", help="JSONL file of many requests")
    add("--out", type=Path, metavar="FILE", help="with --requests: the answers (default: stdout)")
    add(
        "--visual-tokens",
        type=int,
        metavar="V",
        help="visual tokens of an image, if the compressor serves any number (default: as trained)",
    )
    add("--pruning", **cli.pruning_flag("in the folder"))
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer (default: what fits into the model's length, at most 256)",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        default=0.0,
        help="0 takes the likeliest token, 1 draws from the model's distribution",
    )
    add(
        "--top-p",
        type=float,
        metavar="P",
        default=1.0,
        help="probability mass of the tokens to draw from, above 0 and at most 1",
    )
    add("--seed", type=cli.seed_flag, metavar="N", default=0, help="of the draws")
    add(
        "--exif",
        choices=EXIF,
        default="apply",
        help="apply or ignore an image's EXIF orientation",
    )
    add("--stream", action="store_true", help="print the answer while it is generated")
    add(
        "--mesh",
        metavar="AXIS=N",
        help="the device mesh, such as tensor=2 or data=2,tensor=4: tensor splits the weights of "
        "each layer, data the rows of a batch (default: all devices to data)",
    )
    add("--batch", type=int, metavar="N", default=8, help="requests in a batch")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number format of weights and activations (default: as stored)",
    )


def run(options: argparse.Namespace) -> int:
    """Answers; 0, or 2 if a request could not be answered."""
    modes = [options.prompt is not None, options.chat, options.requests is not None]
    if sum(modes) != 1:
        raise ValueError("give one of --prompt=TEXT, --chat and --requests=FILE.jsonl")
    if options.requests is not None and options.image:
        raise ValueError("--image goes without --requests: a line of those has its own")
    if options.video is not None:
        if options.image or options.chat or options.requests is not None:
            raise ValueError(
                "--video goes with --prompt alone: without --image, --chat (whose later turns have "
                "no clip) and --requests, whose lines have their own"
            )
        if options.frames is None:
            raise ValueError("--video needs --frames=T, how many frames are taken of it")
    elif options.frames is not None and options.requests is None:
        raise ValueError("--frames goes with --video or --requests: images have none")
    if options.frames is not None:
        arguments.whole_number("--frames", options.frames)
    if options.out and options.requests is None:
        raise ValueError("--out goes with --requests: other answers go to stdout")
    if options.requests is not None and not options.requests.is_file():
        raise FileNotFoundError(f"there is no file --requests={options.requests}")
    cli.join(options)
    from vlm_jax import mesh
    from vlm_jax.data import clips
    from vlm_jax.serving import request_files, talk
    from vlm_jax.serving.model import VLM, Drawing

    drawing = Drawing(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        visual_tokens=options.visual_tokens,
        batch=options.batch,
    )
    if options.requests is not None:
        request_files.check_files(options.requests, options.out)
    with progress.doing("loading the model"):
        model = VLM.from_checkpoint(
            options.checkpoint,
            dtype=options.dtype,
            mesh=mesh.make(**mesh.sizes(options.mesh)),
            pruning=options.pruning,
        )
    if options.requests is not None:
        return request_files.answer_file(
            model,
            options.requests,
            options.out,
            drawing=drawing,
            exif=options.exif,
            frames=options.frames,
        )
    shown = dict(drawing=drawing, exif=options.exif, stream=options.stream)
    if options.chat:
        return talk.chat(model, options.image, sys.stdin, **shown)
    with progress.doing("answering"):
        if options.video is None:
            talk.say(model, options.image, [options.prompt], **shown)
        else:
            pictures = clips.pictures(options.video, options.frames, exif=options.exif)
            talk.say(model, pictures, [options.prompt], frames=options.frames, **shown)
    return 0
