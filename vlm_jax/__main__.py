# SPDX-License-Identifier: Apache-2.0
"""`vlm-jax VERB ...` is `python -m vlm_jax VERB ...`."""

import sys
from collections.abc import Sequence

from vlm_jax import heap, progress, without_notices
from vlm_jax.verbs import cli, parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb that a command line names; its exit status.

    0, or 2 after one line on stderr about what the user can fix. Raises SystemExit where the words
    themselves say nothing more: --help, --version and a wrong flag.
    """
    without_notices()
    heap.keep_freed_memory()
    with progress.speaking("starting"):
        options, verb = parser.command(argv)
        return cli.report_errors(options.verb, lambda: verb.run(options))


if __name__ == "__main__":
    sys.exit(main())
