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
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vlm_jax import progress
from vlm_jax.data import rows
from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.data.pictures import EXIF
from vlm_jax.serving.model import VLM, Answer
from vlm_jax.verbs import cli

__all__ = ["VLM", "main"]


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
        if options.requests is not None:
            check_files(options.requests, options.out)
        with progress.doing("loading the model"):
            model = VLM.from_checkpoint(options.checkpoint, dtype=options.dtype)
        if options.chat:
            return chat(model, options, sys.stdin)
        if options.requests:
            return many(model, options)
        with progress.doing("answering"):
            say(model, options, [options.prompt])
        return 0

    return cli.report_errors("generate", body)


def how(options: argparse.Namespace) -> dict[str, Any]:
    """What `VLM.answer` is told of the flags."""
    return dict(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        visual_tokens=options.visual_tokens,
        batch=options.batch,
    )


def say(model: VLM, options: argparse.Namespace, turns: Sequence[str]) -> str:
    """Answers a conversation on stdout, with the numbers on stderr; the answer."""

    def show(index: int, piece: str) -> None:
        print(piece, end="", flush=True)

    (answer,) = model.generate(
        [options.image],
        [list(turns)],
        exif=options.exif,
        told=show if options.stream else None,
        **how(options),
    )
    print("" if options.stream else answer.text, flush=True)
    print(numbers(answer), file=sys.stderr)
    return answer.text


def numbers(answer: Answer) -> str:
    """What an answer took, in one line."""
    return (
        f"{answer.visual_tokens} visual tokens, {answer.prompt_tokens} of the prompt, "
        f"{len(answer.ids)} new; first token after {answer.first_token_seconds:.3f} s, then "
        f"{answer.tokens_per_second:.1f} tokens/s"
    )


def chat(model: VLM, options: argparse.Namespace, lines: io.TextIOBase) -> int:
    """Answers line after line until there are none; a conversation that is full says so."""
    turns: list[str] = []
    prompt = "> " if lines.isatty() else ""
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        try:
            with progress.listening():
                line = lines.readline()
        except KeyboardInterrupt:  # as a person ends a chat
            return 0
        if not line:
            return 0
        if line.strip():
            try:
                if turns and IMAGE_MARK in line:
                    raise ValueError(
                        f"{IMAGE_MARK} in a later question: the images of a chat belong to its "
                        "first; a conversation of --requests has them anywhere"
                    )
                turns += [line.strip(), say(model, options, [*turns, line.strip()])]
            except ValueError as error:
                if not turns:
                    raise
                print(f"not answered: {error}", file=sys.stderr)


@dataclass(frozen=True)
class Line:
    """One line of a file of requests: where it stands, its id, and its fields or what is wrong."""

    number: int
    id: Any
    row: dict[str, Any]
    wrong: str = ""


def many(model: VLM, options: argparse.Namespace) -> int:
    """Answers a file of requests, batch by batch; 2 if one could not be answered.

    What cannot be answered, for whatever reason, costs its own line only.
    """
    model.answer([], **how(options))  # what is wrong with the flags is wrong with every line
    bad: list[str] = []
    seen, repeated = set[str](), 0
    with opened(options.out) as out, progress.doing("answers", count(options.requests)) as task:
        waiting: list[tuple[Line, Any]] = []

        def write(line: Line, fields: dict[str, Any]) -> None:
            row = {"id": line.id, "line": line.number} | fields
            try:
                text = json.dumps(row, ensure_ascii=False)
                text.encode()
            except UnicodeEncodeError:  # half a character, which an id may hold
                text = json.dumps(row)
            out.write(text + "\n")

        def refuse(line: Line, error: BaseException | str) -> None:
            said = error if isinstance(error, str) else cli.sentence(error)
            named = "" if line.id == line.number else f", id {line.id}"
            where = f"{options.requests}, line {line.number}{named}: {said}"
            bad.append(where)
            write(line, {"error": where})

        def answer(lines: list[tuple[Line, Any]]) -> None:
            try:
                found = model.answer([request for _, request in lines], **how(options))
            # Whatever one of them raised, of the device or of ours, the others are sound.
            except Exception as error:
                if len(lines) == 1:
                    refuse(lines[0][0], error)
                else:
                    for one in lines:
                        answer([one])
                return
            for (line, _), said in zip(lines, found, strict=True):
                write(
                    line,
                    dict(
                        text=said.text,
                        stopped=said.stopped,
                        prompt_tokens=said.prompt_tokens,
                        visual_tokens=said.visual_tokens,
                        new_tokens=len(said.ids),
                        first_token_seconds=round(said.first_token_seconds, 4),
                        tokens_per_second=round(said.tokens_per_second, 2),
                    ),
                )

        def flush() -> None:
            if waiting:
                answer(waiting)
            out.flush()
            waiting.clear()

        task.note(0)
        for line in lines_of(options.requests):
            repeated += (name := json.dumps(line.id)) in seen
            seen.add(name)
            try:
                if line.wrong:
                    raise ValueError(line.wrong)
                image, where = line.row.get("image"), options.requests.parent
                if isinstance(image, list):
                    image = [where / x if isinstance(x, str) else x for x in image]
                elif isinstance(image, str):
                    image = where / image
                request = model.request(image, line.row["prompt"], exif=options.exif)
                model.room(request, new_tokens=options.max_new_tokens,
                           visual_tokens=options.visual_tokens)  # fmt: skip
            except (ValueError, OSError) as error:
                refuse(line, error)
                continue
            waiting.append((line, request))
            if len(waiting) == options.batch:
                flush()
                task.note(line.number)
        flush()
    if repeated:
        print(f"{repeated} requests repeat the id of an earlier one: `line` in the answers tells "
              "them apart", file=sys.stderr)  # fmt: skip
    if bad:
        first = "".join(f"\n  {where}" for where in bad[:3])
        print(f"{len(bad)} requests were not answered, the first:{first}", file=sys.stderr)
    return 2 if bad else 0


def check_files(requests: Path, out: Path | None) -> None:
    """Raises ValueError for a file of no request, and for answers that would replace them."""
    if out is not None and out.exists() and out.samefile(requests):
        raise ValueError(
            f"--out={out} is the file of --requests, which it would replace: choose another"
        )
    if next(lines_of(requests), None) is None:
        raise ValueError(
            f"--requests={requests} holds no request: give an object with a `prompt` on each line"
        )


def count(path: Path) -> int:
    """The lines of a file."""
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def lines_of(path: Path) -> Iterator[Line]:
    """Every line of a file of requests that is not empty; an id that is not given is its number."""
    with path.open("rb") as lines:  # a line that is no text is one bad request
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row: Any = None
            try:
                row = rows.json_value(line.decode(json.detect_encoding(line), "surrogatepass"))
                if not isinstance(row, dict) or "prompt" not in row:
                    kind = "object without one" if isinstance(row, dict) else type(row).__name__
                    raise ValueError(
                        f"a request is an object with a `prompt`, on a line of its own, and this "
                        f"is a {kind}"
                    )
                rows.check_keys("the request", row)
                if unknown := sorted(row.keys() - {"id", "image", "prompt"}):
                    raise ValueError(
                        f"a request has id, image and prompt, and this one {', '.join(unknown)}"
                    )
                if isinstance(row.get("id"), (list, dict)):
                    del row["id"]
                    raise ValueError("its id is a list or an object: give a text or a number")
                wrong = ""
            except RecursionError:
                wrong = "its JSON is nested too deep"
            except (ValueError, rows.Fault) as error:
                wrong = str(error)
            row = row if isinstance(row, dict) else {}
            yield Line(number, row.get("id", number), row, wrong)


@contextmanager
def opened(path: Path | None) -> Iterator[TextIO]:
    """The file to write, or stdout."""
    if path is None:
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8") as out:
        yield out
