# SPDX-License-Identifier: Apache-2.0
"""The curves of a stage of training: loss and scores against steps, on training and held-out
data."""

import json
from pathlib import Path, PurePath

from vlm_jax.reports.canvas import Canvas, Figure
from vlm_jax.reports.colors import MARKERS, OKABE_ITO


def lines_of(path: Path) -> list[dict]:
    """The lines of a JSONL file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(folder: Path | PurePath) -> list[Figure]:
    """Writes curves.png, .svg and .csv, and scores.* if answers were scored, into a stage's folder.

    They are drawn from its metrics.jsonl and validation.jsonl. Losses that are not finite are left
    out of the figure. Raises ModuleNotFoundError without matplotlib.
    """
    folder = Path(folder)
    training = [x for x in lines_of(folder / "metrics.jsonl") if x["loss"] is not None]
    validation = [x for x in lines_of(folder / "validation.jsonl") if x["loss"] is not None]
    canvas = Canvas(x="optimizer steps", y="loss per token (nats)", title=f"{folder.name}: loss")
    if training:
        canvas.line(
            "training",
            [x["step"] for x in training],
            [x["loss"] for x in training],
            color=OKABE_ITO[5],
            name="training batches",
        )
    if validation:
        steps, losses = [x["step"] for x in validation], [x["loss"] for x in validation]
        canvas.line("validation", steps, losses, color=OKABE_ITO[1])
        canvas.points("validation", steps, losses, color=OKABE_ITO[1], name="validation")
    canvas.legend()
    caption = f"Loss of stage {folder.name}."
    figures = [canvas.save(folder, "curves", caption=caption, alt="Loss against steps")]
    scored = [x for x in validation if x.get("scores")]
    if scored:
        canvas = Canvas(
            x="optimizer steps", y="score of validation answers", title=f"{folder.name}: scores"
        )
        for number, task in enumerate(scored[-1]["scores"]):
            mine = [x for x in scored if task in x["scores"]]
            color = OKABE_ITO[number % len(OKABE_ITO)]
            steps = [x["step"] for x in mine]
            scores = [x["scores"][task]["score"] for x in mine]
            canvas.line(task, steps, scores, color=color)
            canvas.points(
                task,
                steps,
                scores,
                stderr=[x["scores"][task]["stderr"] for x in mine],
                color=color,
                marker=MARKERS[number % len(MARKERS)],
                name=task,
            )
        canvas.legend()
        caption = f"Scores of stage {folder.name}, with one standard error."
        figures.append(canvas.save(folder, "scores", caption=caption, alt="Scores against steps"))
    return figures
