# SPDX-License-Identifier: Apache-2.0
"""Checkpoint, images and prompts to text.

    vlm-jax generate --checkpoint=DIR --image=A.jpg --prompt="What is this?"
    vlm-jax generate --checkpoint=DIR --image=A.jpg --chat
    vlm-jax generate --checkpoint=DIR --requests=FILE.jsonl --out=ANSWERS.jsonl

--checkpoint is a folder that `vlm-jax convert` made, the --workdir of a finished `vlm-jax train`,
or a cell of a grid (GRID/cells/NAME). The answer goes to stdout; visual tokens, time to the first
token and tokens per second to stderr.

A line of --requests has `prompt` (a text, or a conversation [question, answer, ..., question]) and
may have `image` (a path, beside the file, or a list of several) and `id`. Each <image> in the
questions stands for the next image; without any, all belong to the first question. A line of --out
has `id` (else the number of the line), `line`, the number, `text`, `stopped`, `prompt_tokens`,
`visual_tokens`, `new_tokens`, `first_token_seconds` and `tokens_per_second`, or `id`, `line` and
`error`; it is there as soon as its batch is answered. Several lines may have one id.
"""

import argparse
import sys
from pathlib import Path

from vlm_jax import progress
from vlm_jax.data.example import EXIF
from vlm_jax.verbs import cli


def flags() -> argparse.ArgumentParser:
    """The flags of the verb."""
    parser = argparse.ArgumentParser(
        prog="vlm-jax generate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        help="a model folder, a finished training, or a grid's cell",
    )
    add("--image", action="append", help="an image file; again for the next of several; without, "
        "the prompt is about none")  # fmt: skip
    add("--prompt", help="the question")
    add("--chat", action="store_true", help="ask in turn; earlier turns are remembered")
    add("--requests", type=Path, help="a JSONL file of many")
    add("--out", type=Path, help="with --requests: the answers (default: stdout)")
    add("--visual-tokens", type=int, help="V, where the compressor serves any")
    add(
        "--max-new-tokens",
        type=int,
        help="most tokens of an answer (default: what the model's length leaves, 256 at most)",
    )
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    add("--top-p", type=float, default=1.0, help="of the probability mass (default: 1)")
    add("--seed", type=cli.seed_flag, default=0, help="of the draws (default: 0)")
    add("--exif", choices=EXIF, default="apply", help="whether an image is turned as its EXIF "
        "orientation says (default: apply)")  # fmt: skip
    add("--stream", action="store_true", help="print the answer as it comes")
    add("--batch", type=int, default=8, help="requests read together (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations "
        "(default: as stored)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Answers; 0, or 2 after saying on stderr what was wrong."""
    cli.keep_freed_memory()
    options = flags().parse_args(argv)

    def body() -> int:
        modes = [options.prompt is not None, options.chat, options.requests is not None]
        if sum(modes) != 1:
            raise ValueError("give one of --prompt=TEXT, --chat and --requests=FILE.jsonl")
        if options.requests is not None and options.image:
            raise ValueError("--image goes without --requests: a line of those has its own")
        if options.out and options.requests is None:
            raise ValueError("--out goes with --requests: other answers go to stdout")
        if options.requests is not None and not options.requests.is_file():
            raise FileNotFoundError(f"there is no file --requests={options.requests}")
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
            model = VLM.from_checkpoint(options.checkpoint, dtype=options.dtype)
        if options.requests is not None:
            return request_files.answer_file(
                model, options.requests, options.out, drawing=drawing, exif=options.exif
            )
        shown = dict(drawing=drawing, exif=options.exif, stream=options.stream)
        if options.chat:
            return talk.chat(model, options.image, sys.stdin, **shown)
        with progress.doing("answering"):
            talk.say(model, options.image, [options.prompt], **shown)
        return 0

    return cli.report_errors("generate", body)
