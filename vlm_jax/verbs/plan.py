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
from vlm_jax.cost import calibration, catalog, chips
from vlm_jax.verbs import configuration
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    budget = parser.add_argument_group("budgets, at least one; all of them hold").add_argument
    for flag, metavar, text in (
        ("--flops", "FLOPS", "FLOPs of one request"),
        ("--ms", "MS", "milliseconds of one batch; needs --chip"),
        ("--ttft-ms", "MS", "milliseconds to the first token; needs --chip"),
        ("--tpot-ms", "MS", "milliseconds per output token after the first; needs --chip"),
        ("--p95-ms", "MS", "milliseconds that 95 %% of requests do not exceed; needs --rate"),
        (
            "--dollars-per-million",
            "USD",
            "dollars for a million requests; needs --chip and --price-per-hour",
        ),
        ("--lifetime-flops", "FLOPS", "FLOPs of training and of all requests; needs --requests"),
        ("--lifetime-dollars", "USD", "the same in dollars; needs --chip and --price-per-hour"),
        ("--hbm-gb", "GB", "memory for one batch, in 1e9 bytes"),
    ):
        budget(flag, type=float, metavar=metavar, help=f"{text} (default: no limit)")
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
    add("--chips", type=int, metavar="N", default=1, help="chips that work on one batch together")
    add(
        "--catalog",
        metavar="FILE",
        help="TOML or JSON with chips and LLMs of your own (docs/cost.md; default: none)",
    )
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
        help="rows.jsonl evaluated on this chip: fits efficiency and overheads (default: none)",
    )
    add(
        "--calibration",
        choices=tuple(calibration.NAMED),
        help="a measured system: efficiency and overheads (default: the roofline)",
    )
    for flag, what in (("--weights", "weights"), ("--cache", "cache"), ("--products", "products")):
        add(
            flag,
            choices=("bf16", "int8", "fp8"),
            help=f"type of the LLM's {what} (default: the chip's)",
        )
    add(
        "--batch", type=int, metavar="N", default=1, help="requests in a batch, at most with --rate"
    )
    add("--rate", type=float, metavar="N", help="requests per second at a server (default: none)")
    add(
        "--requests",
        type=float,
        metavar="N",
        help="requests in the model's life: adds the cost of training (default: none)",
    )
    add(
        "--new-tokens",
        type=float,
        metavar="G",
        help="generated tokens of a request (needed for time and money; default: 0, prefill only)",
    )
    add(
        "--frames",
        type=float,
        metavar="T",
        default=1,
        help="frames of a video, of V tokens each, for a law of `fit --form=frames` (default: 1)",
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
        help="methods (default: the configuration's, or the law's)",
    )
    add(
        "--epsilon",
        type=float,
        metavar="ERROR",
        default=0.005,
        help="configurations whose error is at most this much more than the best's are listed",
    )
    add(
        "--next",
        action="store_true",
        help="also the cells to train next: regret saved per training FLOP",
    )
    add("--out", metavar="DIR", help="folder for plan.png, plan.svg and plan.csv (default: none)")
    add(
        "--page",
        metavar="FILE",
        help="one HTML file in which budget, requests, chip and tasks can be moved (default: none)",
    )
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
    reached, warnings = calibration_of(options)
    hbm, every = options.hbm_gb, "continuous" if options.continuous else None
    arguments: dict[str, Any] = dict(
        text_tokens=parsing.texts(options.text_tokens),
        flops=options.flops,
        ms=options.ms,
        dollars_per_million=options.dollars_per_million,
        hbm_bytes=None if hbm is None else hbm * 1e9,
        ttft_ms=options.ttft_ms,
        tpot_ms=options.tpot_ms,
        p95_ms=options.p95_ms,
        lifetime_flops=options.lifetime_flops,
        lifetime_dollars=options.lifetime_dollars,
        new_tokens=options.new_tokens,
        batch=options.batch,
        rate=options.rate,
        requests=options.requests,
        cached_text=options.cached_text,
        frames=options.frames,
        cost_model=options.cost,
        llms=parsing.sizes(options.llms or every),
        tokens=parsing.counts(options.tokens or every),
        compressors=options.compressors.split(",") if options.compressors else None,
        config=config,
        chip=options.chip,
        chips_together=options.chips,
        price_per_hour=options.price_per_hour,
        efficiency=parsing.efficiency(options.efficiency),
        calibration=reached,
        stored=parsing.stored(options.weights, options.cache, options.products),
        catalog=catalog.read(options.catalog) if options.catalog else None,
        epsilon=options.epsilon,
    )
    plan = question.plan(law, **arguments, next_cells=5 if options.next else 0, warnings=warnings)
    if options.page:
        plan.fields["page"] = write_page(options, law, arguments)
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


def write_page(options: argparse.Namespace, law: Any, arguments: dict[str, Any]) -> str:
    """The path of the page that plans anew for every budget; it is written."""
    from vlm_jax import files
    from vlm_jax.planning import exported, parsing
    from vlm_jax.reports import planner_page

    families = parsing.read_families(options.law)
    mix = None
    if families is not None and (options.mix or ":" in options.law):
        mix = {name: law.weights.get(name, 0.0) for name in families.weights}
    own = law if mix is None or len(law.others) else parsing.read_laws(options.law, None)
    data = exported.data(
        own, families, arguments, offer="asked" if options.measured else "all", mix=mix,
        own_name=parsing.law_name(options.law),
    )  # fmt: skip
    path = files.path_of(options.page)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, planner_page.build(data, source=f"the law of {options.law}"))
    return str(path)


def calibration_of(options: argparse.Namespace) -> tuple[Any, list[str]]:
    """What is reached of the roofline: a name, or fitted to measured rows, and warnings."""
    from vlm_jax.planning import question
    from vlm_jax.rows import records

    if not options.measured:
        return options.calibration, []
    if options.cost == "paper" or options.cost is None and options.chip is None:
        question.refuse_chip(True)
    if options.chip is None or options.efficiency or options.calibration:
        raise ValueError("--measured needs --chip, and replaces --efficiency and --calibration")
    rows = records.read(options.measured)
    own = catalog.read(options.catalog) if options.catalog else None
    chip = question.chip_of(options.chip, own)
    assert chip is not None
    found = calibration.calibrate_rows(rows, chip.times(options.chips))
    return found, records.timing_warnings(rows, options.chip)


def draw(plan: Any, out: str) -> list[str]:
    """The paths of the plan's figure; none, with a message on stderr, without matplotlib."""
    from vlm_jax.reports import plan_figure

    try:
        return [str(path) for path in plan_figure.draw(plan.search, out).paths]
    except ModuleNotFoundError as missing:
        print(f"no figure: {missing}", file=sys.stderr)
        return []
