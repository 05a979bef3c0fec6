# SPDX-License-Identifier: Apache-2.0
"""Turns a run's rows into figures and one HTML page, DIR/report/index.html.

    vlm-jax report --workdir=runs/demo

vlm_jax/reports/report.py lists the files that it reads and writes.
"""

import argparse
import json
import sys

from vlm_jax import progress
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="a grid's folder, which holds rows.jsonl"
    )
    parser.add_argument("--png", action="store_true", help="each figure as PNG too")


def run(options: argparse.Namespace) -> int:
    """Writes the report; 0."""
    from vlm_jax.reports import report

    with progress.doing("fitting the law and drawing figures"):
        result = report.write(options.workdir, png=options.png)
    for family, why in result["no_law"].items():
        print(f"no law for {family}: {why}", file=sys.stderr)
    if result["no_figures"]:
        print(result["no_figures"], file=sys.stderr)
    print(json.dumps(result))
    return 0
