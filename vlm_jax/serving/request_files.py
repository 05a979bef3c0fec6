# SPDX-License-Identifier: Apache-2.0
"""Answers a file of requests into a file of answers, batch by batch; bad lines are reported.

A line has `prompt` (a text, or a conversation [question, answer, ..., question]) and may have
`image` (a path relative to the file, or a list of several), or `video` (a folder of frames or a
video file) with `frames`, and `id`.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vlm_jax import arguments, errors, hosts, progress
from vlm_jax.data import clips, rows
from vlm_jax.serving.model import VLM, Drawing


@dataclass(frozen=True)
class Line:
    """One line of a file of requests: its number, its id, and its fields or what is wrong."""

    number: int
    id: Any
    row: dict[str, Any]
    wrong: str = ""


def answer_file(
    model: VLM,
    requests: Path,
    out: Path | None,
    *,
    drawing: Drawing,
    exif: str = "apply",
    frames: int | None = None,
) -> int:
    """Answers a file of requests into `out` or stdout; returns 2 if one could not be answered.

    `frames` are taken of each `video` that does not say how many.
    A request that fails, for any reason, has an error in its own line and does not stop the others.
    """
    options = dataclasses.asdict(drawing)
    if hosts.joined():
        hosts.check_same("file of --requests", hashlib.sha256(requests.read_bytes()).hexdigest())
    model.answer([], **options)  # wrong flags are an error before the first line
    bad: list[str] = []
    ids, repeated = set[str](), 0
    with open_output(out) as file, progress.doing("answers", count(requests)) as task:
        waiting: list[tuple[Line, Any]] = []

        def write(line: Line, fields: dict[str, Any]) -> None:
            row = {"id": line.id, "line": line.number} | fields
            try:
                text = json.dumps(row, ensure_ascii=False)
                text.encode()
            except UnicodeEncodeError:  # a lone surrogate, which an id may hold
                text = json.dumps(row)
            file.write(text + "\n")

        def refuse(line: Line, error: BaseException | str) -> None:
            said = error if isinstance(error, str) else errors.sentence(error)
            named = "" if line.id == line.number else f", id {line.id}"
            where = f"{requests}, line {line.number}{named}: {said}"
            bad.append(where)
            write(line, {"error": where})

        def answer(lines: list[tuple[Line, Any]]) -> None:
            try:
                answers = model.answer([request for _, request in lines], **options)
            # If one of them fails, for any reason, the others are answered one by one.
            except Exception as error:
                if len(lines) == 1:
                    refuse(lines[0][0], error)
                else:
                    for one in lines:
                        answer([one])
                return
            for (line, _), said in zip(lines, answers, strict=True):
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
            file.flush()
            waiting.clear()

        task.note(0)
        for line in lines_of(requests):
            repeated += (name := json.dumps(line.id)) in ids
            ids.add(name)
            request, wrong = None, None
            try:
                if line.wrong:
                    raise ValueError(line.wrong)
                image, of_clip = shown(line.row, requests.parent, exif=exif, frames=frames)
                request = model.request(image, line.row["prompt"], exif=exif, frames=of_clip)
                model.room(request, new_tokens=drawing.max_new_tokens,
                           visual_tokens=drawing.visual_tokens)  # fmt: skip
            except (ValueError, OSError) as error:
                wrong = errors.sentence(error)
            # A request that one host cannot read is answered by none.
            if faults := [said for said in hosts.collected(wrong) if said]:
                refuse(line, faults[0])
                continue
            waiting.append((line, request))
            if len(waiting) == drawing.batch:
                flush()
                task.note(line.number)
        flush()
    if repeated:
        progress.say(
            f"{repeated} requests repeat the id of an earlier one: `line` in the answers tells "
            "them apart"
        )
    if model.summaries is not None:
        progress.say(model.summaries.described())
    if bad:
        first = "".join(f"\n  {where}" for where in bad[:3])
        progress.say(f"{len(bad)} requests were not answered, the first:{first}")
    return 2 if bad else 0


def shown(row: dict[str, Any], where: Path, *, exif: str, frames: int | None) -> tuple[Any, int]:
    """The pictures of a request, and how many of them are a clip; 1 without one.

    Raises:
      ValueError, OSError: for images and a clip, for a clip that is none, or without its frames.
    """
    image, video, taken = row.get("image"), row.get("video"), row.get("frames", frames)
    if video is None:
        if "frames" in row:
            raise ValueError(f"frames={taken!r:.40} without a video, of which they are taken")
        if isinstance(image, list):
            return [where / x if isinstance(x, str) else x for x in image], 1
        return where / image if isinstance(image, str) else image, 1
    if image is not None:
        raise ValueError("an image and a video: a request has one or the other")
    if not isinstance(video, str):
        raise ValueError(f"`video` is a path, not {video!r:.80}")
    if taken is None:
        raise ValueError("a video needs `frames`, how many are taken of it, or --frames=T")
    taken = arguments.whole_number("frames", taken)
    return clips.pictures(str(where / video), taken, exif=exif), taken


def check_files(requests: Path, out: Path | None) -> None:
    """Raises ValueError for a file of no request or of one JSON list, and for answers that would
    replace the requests."""
    if out is not None and out.exists() and out.samefile(requests):
        raise ValueError(
            f"--out={out} is the file of --requests, which it would replace: choose another"
        )
    with requests.open("rb") as lines:
        first = next((line.strip() for line in lines if line.strip()), b"")
    if first.startswith(b"["):
        raise ValueError(
            f"--requests={requests} is a JSON list: give each request a line of its own, as "
            f"`jq -c '.[]' {requests.name}` writes them"
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
                if unknown := sorted(row.keys() - {"id", "image", "prompt", "video", "frames"}):
                    raise ValueError(
                        "a request has id, image (or video and frames) and prompt, and this one "
                        f"{', '.join(unknown)}"
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
def open_output(path: Path | None) -> Iterator[TextIO]:
    """The file to write, or stdout; of several processes one writes."""
    if not hosts.is_writer():
        path = Path(os.devnull)
    if path is None:
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8") as out:
        yield out
