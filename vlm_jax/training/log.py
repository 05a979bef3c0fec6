# SPDX-License-Identifier: Apache-2.0
"""The log of a running stage: a line or a bar for people, JSONL for programs, TensorBoard on
request."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from tqdm import tqdm

from vlm_jax import files, hosts, progress
from vlm_jax.training.optimizer import Metrics


class Diverged(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


class Log:
    """The progress of one stage: `metrics.jsonl`, and a line every `every` steps (a bar on a
    terminal).

    `batch` is the examples of a step. `more` gives further fields of a line of `metrics.jsonl`.
    Only process 0 writes. On a restart, lines after the resumed step are dropped. An update that is
    not finite is not applied (`optimizer.make_step`): `skipped` counts those before this restart,
    and `patience` of them in a row end the run.
    """

    def __init__(
        self,
        folder: PurePath,
        name: str,
        *,
        first: int,
        last: int,
        every: int,
        batch: int | float,
        patience: int,
        tensorboard: bool = False,
        skipped: int = 0,
        more: Callable[[], dict[str, Any]] = dict,
    ):
        self.name, self.last, self.every, self.batch = name, last, every, batch
        self.mark = (first, time.monotonic())
        self.tokens, self.more = 0, more
        self.first, self.untaught = first, 0  # steps without a supervised token
        self.patience, self.skipped, self.in_a_row = patience, skipped, 0
        self.compiled = False
        self.speaks = hosts.is_writer()
        self.file = self.bar = self.board = None
        if not self.speaks:
            return
        path = folder / "metrics.jsonl"
        drop_after(path, first)
        self.file = files.Lines(path)
        if sys.stderr.isatty():
            self.bar = tqdm(total=last, initial=first, desc=name, unit="step", leave=False)
        if tensorboard:
            self.board = board(folder)

    def __call__(self, step: int, metrics: Metrics, newest: Callable[[], str]) -> None:
        """Logs one finished step; raises Diverged if too many in a row were skipped, with the
        sentence of `newest` on the checkpoints."""
        values = {k: float(v) for k, v in metrics._asdict().items()}
        if all(math.isfinite(values[k]) for k in ("loss", "gradient_norm")):
            self.in_a_row = 0
        else:
            self.skip(step, values, newest)
        self.tokens += values["tokens"]
        self.untaught += values["tokens"] == 0
        if step == self.last and not self.first and self.untaught == self.last:
            raise ValueError(
                f"{self.name}: not one of {self.last} steps had a supervised token, so that "
                "nothing was learned: raise data.text_length (and data.question_length), or "
                "correct the data"
            )
        if not self.speaks:
            return
        if self.bar is not None:
            loss = f"loss {values['loss']:.4f}" if values["tokens"] else "no supervised token"
            self.bar.set_postfix_str(loss, refresh=False)
            self.bar.update(step - self.bar.n)
            progress.spoke()
        first, self.compiled = not self.compiled, True
        if step % self.every and step != self.last:
            if first:  # it includes compilation: leave it out of the rate
                self.mark, self.tokens = (step, time.monotonic()), 0
            return
        since, then = self.mark
        now = time.monotonic()
        rate = (step - since) / max(now - then, 1e-9)
        values |= dict(
            step=step,
            examples_per_s=rate * self.batch,
            tokens_per_s=self.tokens / max(now - then, 1e-9),
        )
        self.mark, self.tokens = (step, now), 0
        without = {"steps_without_tokens": self.untaught} if self.untaught else {}
        without |= {"skipped_updates": self.skipped} if self.skipped else {}
        # JSON has no value for what is not finite.
        known = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.file.add(json.dumps(known | without | self.more()))
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(f"{self.name}/{key}", value, step)
        if self.bar is None:
            eta = int((self.last - step) / rate)
            loss = f"loss {values['loss']:.4f}" if values["tokens"] else "no supervised token"
            print(
                f"{self.name} {step}/{self.last}  {loss}  "
                f"{values['examples_per_s']:.0f} examples/s  {values['tokens_per_s']:.0f} "
                f"tokens/s  "
                f"eta {progress.duration(eta)}",
                file=sys.stderr,
            )
            progress.spoke()

    def skip(self, step: int, values: dict[str, float], newest: Callable[[], str]) -> None:
        """Counts and reports a skipped update; raises Diverged at `patience` in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        values_text = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
        if self.in_a_row >= self.patience:
            raise Diverged(
                f"{self.name} step {step}: {values_text}, {self.in_a_row} in a row (their updates "
                f"were skipped; {self.name}.max_nonfinite allows {self.patience - 1}); {newest()}; "
                f"lower {self.name}.learning_rate or set {self.name}.clip_norm, and start again in "
                "another --workdir"
            )
        if self.speaks:
            progress.say(
                f"{self.name} step {step}: {values_text}: the update is skipped, number "
                f"{self.skipped} of this stage; {self.patience} in a row end the run"
            )

    def leave_out(self, seconds: float) -> None:
        """Leaves a pause of so many seconds out of the rates."""
        step, since = self.mark
        self.mark = (step, since + seconds)

    def save(self) -> None:
        """Returns when all lines are in their file; called before each checkpoint."""
        if self.file is not None:
            self.file.save()

    def close(self) -> None:
        """Closes the bar and the files."""
        for thing in (self.file, self.bar, self.board):
            if thing is not None:
                thing.close()


def drop_after(path: PurePath, step: int) -> None:
    """Removes the lines of `path` after `step`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    files.write_text(path, "".join(kept))


def board(folder: PurePath):
    """A TensorBoard writer."""
    if files.is_bucket(folder):
        raise ValueError(
            f"log.tensorboard=True: its files cannot be written to {folder}: turn it off "
            "(metrics.jsonl is always written)"
        )
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "log.tensorboard needs tensorboardX: pip install 'vlm_jax[tensorboard]', "
            "or turn it off (metrics.jsonl is always written)"
        ) from None
    return SummaryWriter(str(folder))
