# SPDX-License-Identifier: Apache-2.0
"""`vlm-jax VERB ...` is `python -m vlm_jax VERB ...`."""

import difflib
import os
import sys
from collections.abc import Sequence

from vlm_jax import progress


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; each imports only what it needs, and says so where that takes long."""
    # Its tokenizers are used here; that its models lack PyTorch is no news to anyone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with progress.speaking("starting"):
        return dispatch(argv)


def dispatch(argv: Sequence[str] | None) -> int:
    """Imports a verb and runs it."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    match verb:
        case "train":
            from vlm_jax.verbs.train import main as run
        case "evaluate":
            from vlm_jax.verbs.evaluate import main as run
        case "grid":
            from vlm_jax.verbs.grid import main as run
        case "fit":
            from vlm_jax.verbs.fit import main as run
        case "plan":
            from vlm_jax.verbs.plan import main as run
        case "report":
            from vlm_jax.verbs.report import main as run
        case "convert":
            from vlm_jax.verbs.convert import main as run
        case "generate":
            from vlm_jax.verbs.generate import main as run
        case "--version":
            from vlm_jax import __version__

            print(f"vlm-jax {__version__}")
            return 0
        case _:
            known = ["train", "evaluate", "grid", "fit", "plan", "report", "convert", "generate"]
            text = (
                "usage: vlm-jax VERB [--flag=value ...]\n"
                f"verbs: {', '.join(known)} (each has --help)"
            )
            if verb in ("--help", "-h", "help"):
                print(text)
                return 0
            near = difflib.get_close_matches(verb, known, 1)
            meant = f", did you mean {near[0]}?" if near else ""
            print(f"vlm-jax: unknown verb {verb!r}{meant}\n{text}", file=sys.stderr)
            return 2
    with progress.speaking(f"vlm-jax {verb} is at work"):
        return run(rest)


if __name__ == "__main__":
    sys.exit(main())
