# SPDX-License-Identifier: Apache-2.0
"""Verifies checkpoints: every piece is read and compared with its digest.

    vlm-jax checkpoint verify runs/one
    vlm-jax checkpoint verify runs/demo
    vlm-jax checkpoint verify runs/one/finetune/1000

Takes the folder of a training or of a grid (all steps that are kept), of a stage, or of one step. A
table on stderr names each damaged array and piece; one JSON object on stdout has the same content.
Exit status 0: no damage; 1: something is damaged; 2: there was nothing to verify. "unchecked" means
a checkpoint of an earlier version that can be read but has no digests. No device is used, so
training may continue meanwhile.
"""

import argparse
import json
import sys

from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("action", choices=("verify",), metavar="verify", help="the only action")
    add("path", metavar="DIR", help="the folder of a training, a grid, a stage or one step")


def run(options: argparse.Namespace) -> int:
    """Verifies; 0, or 1 if something is damaged."""
    cli.say_warnings()
    from vlm_jax.training import verify

    results = verify.verify(options.path)
    print(verify.table(results), file=sys.stderr)
    print(json.dumps(verify.described(results)))
    return int(any(f.problems for f in results))
