# SPDX-License-Identifier: Apache-2.0
"""Whether checkpoints are what was written: every piece is read and compared with its digest.

    vlm-jax checkpoint verify runs/one
    vlm-jax checkpoint verify runs/demo
    vlm-jax checkpoint verify runs/one/finetune/1000

The folder of a training or of a grid: all steps that are kept; or one stage, or one step. A table
on stderr names each damaged array and which piece of it; one JSON object on stdout says the same.
Exit status 0: no damage was found; 1: something is damaged; 2: there was nothing to verify.
"unchecked" is a checkpoint of an earlier version that can be read and has no digests. No device
is used: a training may be running.
"""

import argparse
import json
import sys

from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("action", choices=("verify",), metavar="verify", help="the only thing there is to do")
    add("path", metavar="DIR", help="the folder of a training, a grid, a stage or one step")


def run(options: argparse.Namespace) -> int:
    """Verifies; 0, or 1 where something is damaged."""
    cli.say_warnings()
    from vlm_jax.training import verify

    results = verify.verify(options.path)
    print(verify.table(results), file=sys.stderr)
    print(json.dumps(verify.described(results)))
    return int(any(f.problems for f in results))
