# SPDX-License-Identifier: Apache-2.0
"""Law and budget in, configuration out: which LLM size, how many visual tokens, at what error.

  vlm-jax plan --law=law.json --flops=1e12 --text-tokens=50
  vlm-jax plan --law=law.json --ms=40 --chip=v5e --text-tokens=50 --llms=0.5,1.8,4,7

Prints one JSON object on stdout and the same in words on stderr (on a terminal, without --json: in
words only). Every field is explained in docs/planning.md.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax import compressors
from vlm_jax.cost import chips, described, roofline
from vlm_jax.law.law import Law
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.planning import answers, planner
from vlm_jax.rows import records
from vlm_jax.verbs import cli

MOST_TOKENS = 576  # patches of CLIP ViT-L/14-336: the paper's largest V
FAMILY = "qwen1.5-"  # the paper's LLMs: what a plan without a configuration interpolates between


def parser() -> argparse.ArgumentParser:
    """The flags of `vlm-jax plan`."""
    p = argparse.ArgumentParser(
        prog="vlm-jax plan",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--law", required=True, help="law.json of vlm-jax fit, or family:FILE,family:FILE"
    )
    p.add_argument(
        "--text-tokens", required=True, help="Q: a number, or shares such as 25:0.5,100:0.5"
    )
    budget = p.add_argument_group("budget, exactly one").add_mutually_exclusive_group(required=True)
    budget.add_argument("--flops", type=float, help="FLOPs of one request")
    budget.add_argument("--ms", type=float, help="milliseconds of one batch; needs --chip")
    budget.add_argument(
        "--dollars-per-million",
        type=float,
        help="dollars for a million requests; needs --chip and --price-per-hour",
    )
    budget.add_argument("--hbm-gb", type=float, help="1e9 bytes of memory for one batch")
    p.add_argument(
        "--cost",
        choices=("paper", "full"),
        help="paper: 2N(Q+V), the default for --flops; full: every phase, the default else",
    )
    p.add_argument(
        "--chip", help=f"{', '.join(chips.CHIPS)}, or cpu (measured now); its memory is a limit"
    )
    p.add_argument("--chips", type=int, default=1, help="chips taken together, communication free")
    p.add_argument("--price-per-hour", type=float, help="dollars for one chip for one hour")
    p.add_argument(
        "--efficiency", help="reached fraction of the roofline: 0.5, or prefill:0.6,decode:0.8"
    )
    p.add_argument("--measured", help="rows.jsonl evaluated on this chip: fits --efficiency")
    p.add_argument("--batch", type=int, default=1, help="requests at a time")
    p.add_argument(
        "--new-tokens", type=float, default=0, help="G, generated tokens; 0 is prefill only"
    )
    p.add_argument(
        "--cached-text", action="store_true", help="keys and values of the text are kept"
    )
    p.add_argument("--mix", help="weights over the law's families: reasoning:0.3,ocr:0.7")
    p.add_argument(
        "--llms", default="continuous", help="continuous, or a list: 0.5,1.8 (billions) or names"
    )
    p.add_argument("--tokens", help="continuous, or a list of V")
    p.add_argument("--compressors", help="a list; the law's error is taken for each of them")
    p.add_argument(
        "--config", help="take encoder, compressor and LLM sizes from this configuration"
    )
    p.add_argument("--out", help="folder for plan.png, plan.svg and plan.csv")
    p.add_argument("--json", action="store_true", help="JSON on stdout, warnings only on stderr")
    return p


def shares(text: str, flag: str) -> dict[str, float]:
    """name -> share of "a:1,b:3", shares made to sum to 1. Raises ValueError naming the flag."""
    try:
        pairs = [item.rsplit(":", 1) for item in text.split(",")]
        found = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise ValueError(f"{flag}={text}: expected name:weight,name:weight") from None
    total = sum(found.values())
    if len(found) < len(pairs) or min(found.values()) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"{flag}={text}: weights must be positive, each name once")
    return {name: weight / total for name, weight in found.items()}


def number(text: str, flag: str, *, least: float = 0.0) -> float:
    """A finite number of at least `least`. Raises ValueError naming the flag."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ValueError(f"{flag}: {text!r} is not a number of at least {least:g}")
    return value


def read_laws(text: str, mix: str | None) -> planner.Mixture:
    """The law of a file, of the families in it, or of several files, weighted as `mix` says."""
    if Path(text).is_file() or ":" not in text:
        fields = _json(Path(text))
        named = {
            family: law_of(f, f"{text} families.{family}")
            for family, f in fields.get("families", {}).items()
        }
        if mix is None:
            return planner.Mixture({"all": law_of(fields, text)}, {"all": 1.0})
        if not named:
            raise ValueError(
                f"--mix={mix} needs a law with families, and {text} has none: "
                "fit rows of several families, or pass --law=family:FILE,family:FILE"
            )
    else:
        paths = dict(item.split(":", 1) for item in text.split(","))
        named = {family: law_of(_json(Path(path)), path) for family, path in paths.items()}
    weights = {family: 1 / len(named) for family in named} if mix is None else shares(mix, "--mix")
    if unknown := [family for family in weights if family not in named]:
        raise ValueError(f"--mix: no law for {', '.join(unknown)}; there are {', '.join(named)}")
    return planner.Mixture(named, weights)


def _json(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "law.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a law: it holds a {type(fields).__name__}")
    return fields


def law_of(fields: Mapping[str, Any], place: str) -> Law:
    """The law in parsed JSON; one without residuals or draws is accepted and has no interval."""
    try:
        return Law.from_dict({"sse": 0.0, "rmse": 0.0, "n": 0} | dict(fields))
    except (ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"{place}: {problem}") from None


def described_llms(config: Any | None) -> dict[str, tuple[float, LLMSize]]:
    """name -> (N, shape): of a configuration's grid, else published sizes by their nominal N."""
    own = config is not None and len(config.grid.llms) > 0
    return described.grid_llms(config.llm, config.grid.llms) if own else described.published_llms()


def chosen_llms(text: str, known: Mapping[str, tuple[float, LLMSize]], own: bool):
    """(list of N or None for every size, name -> (N, shape) to interpolate between) from --llms."""
    family = {name: sized for name, sized in known.items() if own or name.startswith(FAMILY)}
    if text == "continuous":
        return None, family
    names = [name.strip() for name in text.split(",")]
    if all(re.fullmatch(r"[\d.eE+-]+", name) for name in names):
        return tuple(number(name, "--llms", least=1e-9) for name in names), family
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--llms: {', '.join(unknown)} unknown; there are {', '.join(known)}, "
            "or give sizes in billions"
        )
    family = {name: known[name] for name in names}
    sizes = tuple(N for N, _ in family.values())
    if len(set(sizes)) < len(names):
        raise ValueError(
            f"--llms={text}: two LLMs with one N cannot be told apart by a law; name one"
        )
    return sizes, family


def token_choices(args: argparse.Namespace, kinds: Sequence[str], vit: ViTSize | None):
    """Compressor -> the V to look through."""
    most = vit.patches if vit else MOST_TOKENS
    text = args.tokens or (
        "continuous" if args.cost == "paper" and args.llms == "continuous" else None
    )
    if text == "continuous":
        if args.llms != "continuous":
            raise ValueError(
                "--tokens=continuous needs --llms=continuous: with a list of LLMs, list V too"
            )
        return {kind: ("continuous", (1.0, float(most))) for kind in kinds}
    side = math.isqrt(most)
    methods = {kind: compressors.named(kind) for kind in kinds}
    offered = {kind: method.planned(side) for kind, method in methods.items()}
    if text is None:
        return {kind: [float(v) for v in V] for kind, V in offered.items()}
    wanted = [number(v, "--tokens", least=1.0) for v in text.split(",")]
    if args.cost == "paper":
        return dict.fromkeys(kinds, wanted)
    found = {kind: [v for v in wanted if method.gives(side, v)] for kind, method in methods.items()}
    if not any(found.values()):
        raise ValueError(
            f"--tokens={text}: none fits; allowed are "
            + "; ".join(f"{kind} {offered[kind]}" for kind in kinds)
        )
    return {kind: V for kind, V in found.items() if V}


def search_of(args: argparse.Namespace) -> tuple[planner.Search, dict[float, str], list[str]]:
    """The search that the flags describe, the names of LLMs by N, and warnings.

    Raises ValueError for flags that clash.
    """
    unit, limit = next(
        (u, x)
        for u, x in (
            ("flops", args.flops),
            ("ms", args.ms),
            ("hbm", args.hbm_gb),
            ("dollars", args.dollars_per_million),
        )
        if x is not None
    )
    number(str(limit), "the budget", least=1e-300)
    limit = limit * 1e9 if unit == "hbm" else limit
    args.cost = args.cost or ("paper" if unit == "flops" else "full")
    if args.batch < 1:
        raise ValueError(f"--batch={args.batch}: at least 1")
    texts = (
        shares(args.text_tokens, "--text-tokens")
        if ":" in args.text_tokens
        else {args.text_tokens: 1.0}
    )
    work = planner.Workload(
        tuple((number(q, "--text-tokens"), s) for q, s in texts.items()),
        number(str(args.new_tokens), "--new-tokens"),
        args.batch,
        args.cached_text,
    )
    config = described.load(args.config, "get_config")() if args.config else None
    law = read_laws(args.law, args.mix)
    kinds = args.compressors.split(",") if args.compressors else None
    limits, doubts = [(unit, float(limit))], []
    if args.cost == "paper":
        if args.chip or args.efficiency or args.measured:
            raise ValueError(
                "the paper's cost knows no chip: add --cost=full, or leave the chip out"
            )
        needless = re.fullmatch(r"continuous|[\d.eE+,\s-]+", args.llms)  # no shapes are looked up
        llms, family = chosen_llms(
            args.llms, {} if needless else described_llms(config), bool(config)
        )
        spent: planner.Cost = planner.PaperCost(work)
        vit = ViTSize.of(config.vit) if config else None
        kinds = kinds or [config.compressor.kind if config else "token_packer"]
    else:
        base = config if config is not None else described.base()
        llms, family = chosen_llms(
            args.llms, described_llms(config), config is not None and len(config.grid.llms) > 0
        )
        vit = ViTSize.of(base.vit)
        chip = chips.named(args.chip).times(args.chips) if args.chip else None
        if unit in ("ms", "dollars") and chip is None:
            raise ValueError(f"a budget in {planner.UNITS[unit]} needs --chip")
        if unit == "dollars" and not args.price_per_hour:
            raise ValueError("--dollars-per-million needs --price-per-hour, the price of one chip")
        if chip is not None and unit != "hbm":
            limits.append(("hbm", chip.hbm_bytes))
        efficiency, doubts = efficiency_of(args, chip)
        spent = planner.FullCost(
            work,
            dict(family.values()),
            vit,
            query=base.compressor.query,
            heads=base.compressor.heads,
            chip=chip,
            efficiency=efficiency,
            dollars_per_hour=(args.price_per_hour or 0.0) * args.chips,
        )
        kinds = kinds or [base.compressor.kind]
    for kind in kinds:
        compressors.named(kind)  # says the choices where it is unknown
    search = planner.Search(
        law, spent, planner.Budget(tuple(limits)), llms, token_choices(args, kinds, vit)
    )
    return search, {N: name for name, (N, _) in family.items()}, doubts


def efficiency_of(
    args: argparse.Namespace, chip: chips.Chip | None
) -> tuple[dict[str, float] | None, list[str]]:
    """The reached fraction of the roofline by phase, given or fitted to measured rows; warnings."""
    if args.measured:
        if chip is None or args.efficiency:
            raise ValueError("--measured needs --chip, and replaces --efficiency")
        rows = records.read(args.measured)
        return roofline.calibrate_rows(rows, chip), doubts_of(rows, args.chip)
    if not args.efficiency:
        return None, []
    if ":" not in args.efficiency:
        return dict.fromkeys(roofline.PHASES, number(args.efficiency, "--efficiency")), []
    pairs = [item.split(":", 1) for item in args.efficiency.split(",")]
    if bad := [":".join(pair) for pair in pairs if len(pair) < 2]:
        raise ValueError(f"--efficiency: {', '.join(bad)} is not phase:fraction")
    return {phase: number(value, "--efficiency") for phase, value in pairs}, []


def doubts_of(rows: Sequence[records.Row], chip: str) -> list[str]:
    """What is doubtful about times of this chip that are fitted to these rows."""
    found = []
    machines = sorted({row.machine for row in rows if ("cpu" in row.machine) != (chip == "cpu")})
    if machines:
        found.append(f"the rows of --measured were evaluated on {', '.join(machines)}, "
                     f"not on {chip}: their efficiency says nothing of it")  # fmt: skip
    if not any(row.timing for row in rows):
        found.append("the rows of --measured have no times of single batches: "
                     "loading and compiling count against the chip")  # fmt: skip
    return found


def draw(search: planner.Search, out: str) -> list[str]:
    """The paths of the plan's figure; none, said on stderr, where matplotlib is missing."""
    from vlm_jax.reports import plan_figure

    try:
        return [str(path) for path in plan_figure.draw(search, out).paths]
    except ModuleNotFoundError as missing:
        print(f"no figure: {missing}", file=sys.stderr)
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; 0, or 2 after a message about what the user can fix."""
    args = parser().parse_args(argv)

    def body() -> int:
        search, names, doubts = search_of(args)
        answer = answers.plan(search, names)
        answer["warnings"] += doubts
        if args.out:
            answer["figures"] = draw(search, args.out)
        words = answers.in_words(answer)
        if sys.stdout.isatty() and not args.json:
            print(words)
        else:
            print(json.dumps(answer, allow_nan=False))
            if not args.json:
                print(words, file=sys.stderr)
        for warning in answer["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        return 0

    return cli.report_errors("plan", body)
