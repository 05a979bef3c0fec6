# SPDX-License-Identifier: Apache-2.0
"""The time of each phase of a grid, over all its restarts and jobs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from vlm_jax import files, hosts


class Phases:
    """Seconds of each phase of a run over all its restarts and jobs, kept in run.json."""

    def __init__(self, path: PurePath, facts: dict):
        self.path, self.facts, self.seconds = path, facts, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        then = time.monotonic()
        yield
        self.add(name, time.monotonic() - then)

    def add(self, name: str, seconds: float) -> None:
        """Adds to the seconds in the file; only the holder of the folder may call it."""
        if not hosts.is_writer():
            return
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.seconds = before.get("phases", {})
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 1)
        files.write_json(self.path, self.facts | {"phases": self.seconds})
