# SPDX-License-Identifier: Apache-2.0
"""A file of answers to a benchmark: LLaVA's JSON lines, its settings beside it, what it has so far.

NAME.jsonl has a line for each question: question_id, prompt, text, answer_id, model_id, metadata;
`error` in place of `text` is an answer that could not be made. Lines come as they are answered, and
are put in the order of the questions when all are there. NAME.json has the `settings` from the
first line on and the score at the end. NAME_samples_TASK.jsonl has the fields of lmms-eval.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from vlm_jax import files, hosts
from vlm_jax.evals import samples as logged
from vlm_jax.evals.scoring import Scored
from vlm_jax.evals.task import Question, Task


def name_of(
    task: str, protocol: str, *, visual_tokens: int | None, view: str, offset: int, limit: int
) -> str:
    """TASK-PROTOCOL[-vV][-blind][-offsetN][-limitN]: a file of some questions is never taken for
    one of all."""
    parts = [task, protocol]
    parts += [f"v{visual_tokens}"] if visual_tokens is not None else []
    parts += [view] if view else []
    parts += [f"offset{offset}"] if offset else []
    parts += [f"limit{limit}"] if limit else []
    return "-".join(parts)


@dataclass
class AnswerFile:
    """The files of one name in a folder; of several processes one reads and writes.

    `lines` has the answers so far, by the key of their question. Errors are not kept: what could
    not be answered is tried again.
    """

    folder: PurePath
    name: str
    task: Task
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> PurePath:
        """The file of answers."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def about(self) -> PurePath:
        """The file of settings and scores."""
        return self.folder / f"{self.name}.json"

    def open(self, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Reads what is there, and notes the settings if nothing is.

        A last line that was cut off is removed.

        Raises:
          ValueError: for a file of other settings, with both, or without any.
        """
        settings = json.loads(json.dumps(settings))

        def start() -> dict[str, dict[str, Any]]:
            then = self.before()
            if then is None:
                files.write_json(self.about, {"settings": settings})
            elif then != settings:
                names = sorted(k for k in then | settings if then.get(k) != settings.get(k))
                raise ValueError(
                    f"{self.path} holds answers with other settings: there "
                    f"{shown(then, names)}; now {shown(settings, names)}: repeat the first "
                    "command, move the file away, or choose another --out"
                )
            return self.whole_lines(set(keys))

        self.lines = hosts.from_writer(start)

    def before(self) -> dict[str, Any] | None:
        """The settings of the answers that are there; None without any."""
        try:
            return json.loads(self.about.read_text())["settings"]
        except FileNotFoundError:
            found = None
        except (ValueError, KeyError, TypeError):
            found = f"{self.about} is damaged"
        if not self.path.exists():
            return None
        raise ValueError(
            f"{self.path} is there, and {found or f'no {self.about.name}'} with its settings: move "
            "both away, or choose another --out"
        )

    def whole_lines(self, keys: set[str]) -> dict[str, dict[str, Any]]:
        """The answers in the file that can be kept; all else is removed from it."""
        if not self.path.exists():
            return {}
        text = self.path.read_bytes().decode(errors="replace")
        # Not splitlines(), which also splits at characters that JSON allows inside a string.
        *lines, cut = text.split("\n")
        kept: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                key = row["metadata"].get("key") or self.task.key_of(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is no answer of this command ({error}): move the "
                    "file away, or choose another --out"
                ) from error
            if key in keys and isinstance(row.get("text"), str):
                kept[key] = row
        if cut or len(kept) < len(lines):
            self.rewrite(kept.values())
        return kept

    def rewrite(self, rows: Any) -> None:
        """Replaces the file by these lines."""
        files.write_text(self.path, "".join(line_of(row) + "\n" for row in rows))

    @contextmanager
    def adding(self) -> Iterator["Adding"]:
        """Lines that are added to the file while the body runs, by the writer."""
        if not hosts.is_writer():
            yield Adding(self, None)
            return
        with files.adding(self.path) as lines:
            yield Adding(self, lines)

    def finish(self, keys: Sequence[str]) -> None:
        """Puts the lines in the order of these keys, all of which must have one; in the writer."""
        if list(self.lines) != list(keys):
            self.lines = {key: self.lines[key] for key in keys}
            self.rewrite(self.lines.values())


class Adding:
    """Adds lines to a file and to what is known of it."""

    def __init__(self, file: AnswerFile, lines: files.Lines | None):
        self.file, self.lines = file, lines

    def add(self, key: str, row: dict[str, Any]) -> None:
        """One answer more."""
        self.file.lines[key] = row
        if self.lines is not None:
            self.lines.add(line_of(row))

    def save(self) -> None:
        """Returns when all lines are written."""
        if self.lines is not None:
            self.lines.save()


def line_of(row: Mapping[str, Any]) -> str:
    """A row as JSON in a line."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(row)
    return text


def answer_line(
    question: Question,
    prompt: str,
    *,
    task: Task,
    answer_id: str,
    model_id: str,
    metadata: Mapping[str, Any],
    text: str | None = None,
    error: str = "",
) -> dict[str, Any]:
    """The fields of one line; without a text it has an error.

    The metadata has the key of a question that repeats another's id and prompt.
    """
    said = {"error": error} if text is None else {"text": text}
    made = dict(
        question_id=question.id,
        prompt=prompt,
        **said,
        answer_id=answer_id,
        model_id=model_id,
        metadata=dict(metadata),
    )
    if task.key_of(made) != question.key:
        made["metadata"]["key"] = question.key
    return made


def samples(scored: Scored, offset: int) -> Iterator[str]:
    """The lines of `vlm-jax score --samples`; doc_id counts the questions that were left out."""
    for line in logged.lines(scored):
        row = json.loads(line)
        yield line_of(row | {"doc_id": row["doc_id"] + offset})


def sha(text: str) -> str:
    """The sha256 of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def shown(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some of the settings for a message."""
    return ", ".join(f"{name}={json.dumps(settings.get(name))}" for name in names)
