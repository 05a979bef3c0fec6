# SPDX-License-Identifier: Apache-2.0
"""Law and budget in, configuration out: which LLM size, how many visual tokens, at what error.

    vlm-jax plan --law=law.json --flops=1e12 --text-tokens=50
    vlm-jax plan --law=law.json --ms=40 --chip=v5e --text-tokens=50 --llms=0.5,1.8,4,7

Prints one JSON object on stdout and the same in words on stderr (on a terminal without --json, only
the words). docs/planning.md explains every field.
"""

import argparse
import json
import sys
from typing import Any

from vlm_jax import errors
from vlm_jax.cost import chips
from vlm_jax.verbs import configuration
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    budget = parser.add_argument_group("budget, exactly one")
    budget = budget.add_mutually_exclusive_group(required=True)
    budget.add_argument("--flops", type=float, metavar="FLOPS", help="FLOPs of one request")
    budget.add_argument(
        "--ms", type=float, metavar="MS", help="milliseconds of one batch; needs --chip"
    )
    budget.add_argument(
        "--dollars-per-million",
        type=float,
        metavar="USD",
        help="dollars for a million requests; needs --chip and --price-per-hour",
    )
    budget.add_argument(
        "--hbm-gb", type=float, metavar="GB", help="memory for one batch, in 1e9 bytes"
    )
    add = parser.add_argument
    add(
        "--law",
        required=True,
        metavar="FILE",
        help="law.json of vlm-jax fit, or family:FILE,family:FILE",
    )
    add(
        "--text-tokens",
        required=True,
        metavar="Q",
        help="text tokens of a request: a number, or shares such as 25:0.5,100:0.5",
    )
    add(
        "--cost",
        choices=("paper", "full"),
        help="paper: 2N(Q+V), the default for --flops; full: every phase, the default otherwise",
    )
    add(
        "--chip",
        metavar="CHIP",
        help=f"{', '.join(chips.CHIPS)}, or cpu (measured now); its memory is a limit (default: "
        "none)",
    )
    add("--chips", type=int, metavar="N", default=1, help="chips used together, communication free")
    add(
        "--price-per-hour",
        type=float,
        metavar="USD",
        help="dollars for one chip for one hour (default: none)",
    )
    add(
        "--efficiency",
        metavar="SHARE",
        help="achieved fraction of the roofline: 0.5, or prefill:0.6,decode:0.8 (default: 1)",
    )
    add(
        "--measured",
        metavar="FILE",
        help="rows.jsonl evaluated on this chip: fits --efficiency (default: none)",
    )
    add("--batch", type=int, metavar="N", default=1, help="requests in a batch")
    add(
        "--new-tokens",
        type=float,
        metavar="G",
        help="generated tokens of a request (needed for time and money; default: 0, prefill only)",
    )
    add("--cached-text", action="store_true", help="keys and values of the text are cached")
    add(
        "--mix",
        metavar="SHARES",
        help="weights over the law's families: reasoning:0.3,ocr:0.7 (default: the law of the "
        "file itself, equal weights for several files)",
    )
    add(
        "--llms",
        metavar="LIST",
        help="0.5,1.8 (billions), names, or continuous (default: those described, within twice the "
        "fitted range)",
    )
    add(
        "--tokens",
        metavar="LIST",
        help="V to choose from: continuous, or a list (default: what the compressor can give)",
    )
    add(
        "--continuous",
        action="store_true",
        help="theory: every N and V, up to twice the fitted range",
    )
    add(
        "--compressors",
        metavar="LIST",
        help="methods; the law's error is used for each (default: the configuration's)",
    )
    add("--out", metavar="DIR", help="folder for plan.png, plan.svg and plan.csv (default: none)")
    add(
        "--json",
        action="store_true",
        help="JSON on stdout, of a failure too; only warnings and errors on stderr",
    )
    parser.failure = failure


def failure(message: str) -> str:
    """A failed plan as JSON."""
    from vlm_jax.planning import answers

    return json.dumps({"schema": answers.SCHEMA, "status": 2, "error": message})


def run(options: argparse.Namespace) -> int:
    """Plans, and prints the plan; 0. With --json a failure is printed too, and raised."""
    try:
        return answer(options)
    except (ValueError, OSError) as problem:
        if options.json:
            print(failure(errors.sentence(problem)))
        raise


def answer(options: argparse.Namespace) -> int:
    """Plans, and prints the plan; 0."""
    from vlm_jax.planning import answers, parsing, question

    law = parsing.read_laws(options.law, options.mix)
    config = configuration.read(options.config).config if options.config else None
    efficiency, warnings = efficiency_of(options)
    hbm, every = options.hbm_gb, "continuous" if options.continuous else None
    plan = question.plan(
        law,
        text_tokens=parsing.texts(options.text_tokens),
        flops=options.flops,
        ms=options.ms,
        dollars_per_million=options.dollars_per_million,
        hbm_bytes=None if hbm is None else hbm * 1e9,
        new_tokens=options.new_tokens,
        batch=options.batch,
        cached_text=options.cached_text,
        cost_model=options.cost,
        llms=parsing.sizes(options.llms or every),
        tokens=parsing.counts(options.tokens or every),
        compressors=options.compressors.split(",") if options.compressors else None,
        config=config,
        chip=options.chip,
        chips_together=options.chips,
        price_per_hour=options.price_per_hour,
        efficiency=efficiency,
        warnings=warnings,
    )
    if options.out:
        plan.fields["figures"] = draw(plan, options.out)
    words = answers.in_words(plan.fields)
    if sys.stdout.isatty() and not options.json:
        print(words)
    else:
        print(json.dumps(plan.fields, allow_nan=False))
        if not options.json:
            print(words, file=sys.stderr)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def efficiency_of(options: argparse.Namespace) -> tuple[Any, list[str]]:
    """The achieved fraction of the roofline, given or fitted to measured rows, and warnings."""
    from vlm_jax.cost import roofline
    from vlm_jax.planning import parsing, question
    from vlm_jax.rows import records

    if not options.measured:
        return parsing.efficiency(options.efficiency), []
    if options.cost == "paper" or options.cost is None and options.flops is not None:
        question.refuse_chip(True)
    if options.chip is None or options.efficiency:
        raise ValueError("--measured needs --chip, and replaces --efficiency")
    rows = records.read(options.measured)
    chip = chips.named(options.chip).times(options.chips)
    return roofline.calibrate_rows(rows, chip), records.timing_warnings(rows, options.chip)


def draw(plan: Any, out: str) -> list[str]:
    """The paths of the plan's figure; none, with a message on stderr, without matplotlib."""
    from vlm_jax.reports import plan_figure

    try:
        return [str(path) for path in plan_figure.draw(plan.search, out).paths]
    except ModuleNotFoundError as missing:
        print(f"no figure: {missing}", file=sys.stderr)
        return []
