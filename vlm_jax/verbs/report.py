# SPDX-License-Identifier: Apache-2.0
"""Turns a run's rows into figures and one HTML page: vlm-jax report --workdir=DIR.

What it reads and writes stands in vlm_jax/reports/report.py.
"""

import argparse
import json
import sys

from vlm_jax import progress
from vlm_jax.verbs import cli


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vlm-jax report", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="holds rows.jsonl")
    options = parser.parse_args(argv)

    def body() -> int:
        from vlm_jax.reports import report

        with progress.doing("fitting the law, and drawing"):
            made = report.write(options.workdir)
        for family, why in made["no_law"].items():
            print(f"no law for {family}: {why}", file=sys.stderr)
        if made["no_figures"]:
            print(made["no_figures"], file=sys.stderr)
        print(json.dumps(made))
        return 0

    return cli.report_errors("report", body)
