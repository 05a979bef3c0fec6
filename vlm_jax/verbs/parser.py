# SPDX-License-Identifier: Apache-2.0
"""One command line for all verbs: their names and flags, and suggestions for typos.

A verb is a file of this folder with `add_flags(parser)` and `run(options) -> exit status`. It
imports libraries inside `run`: help, completion and errors of flags need none.

argparse does not know --config.FIELD=VALUE: these words, and --config itself, go to
`vlm_jax/verbs/configuration.py` as `options.config`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from vlm_jax import __version__
from vlm_jax.errors import suggestion

# Each verb with a summary, in the order of a project.
VERBS = {
    "train": "train one model: encoder, alignment, finetuning",
    "evaluate": "answer a split with a trained model, and score the answers",
    "score": "score a file of predictions by a benchmark's published rules",
    "grid": "train and evaluate a grid of LLM sizes x visual tokens; fit the law; make the report",
    "report": "figures and one HTML page of a grid's rows",
    "fit": "fit the scaling law to results, with intervals",
    "plan": "the best LLM size and number of visual tokens for a budget",
    "convert": "published weights to a model folder, and back",
    "generate": "answer prompts about images",
    "serve": "answer OpenAI clients, with a visual budget for every request",
    "data": "check a data set: rows, images, lengths of texts",
    "checkpoint": "verify the checkpoints of a run against their digests",
    "compile": "what a step needs on a TPU slice, by the TPU compiler, without a TPU",
}
# Verbs with a configuration, and its default.
USES_CONFIG = {
    "train": "required",
    "evaluate": "default: that of the folder; required for a model folder",
    "grid": "required",
    "compile": "required",
    "plan": "default: the published sizes and CLIP ViT-L/14-336",
}
# Verbs that use devices and may run in several processes.
USES_DEVICES = ("train", "evaluate", "grid", "generate")
# --config=FILE, --config FILE, --config.FIELD=VALUE, --config.FIELD VALUE, --config.FIELD and
# --noconfig.FIELD of a boolean: what ml_collections reads.
CONFIG_WORD = re.compile(r"--?(no)?config(\.[^=]*)?(=|$)")


def module(verb: str) -> ModuleType:
    """The file of a verb."""
    match verb:
        case "train":
            from vlm_jax.verbs import train

            return train
        case "evaluate":
            from vlm_jax.verbs import evaluate

            return evaluate
        case "score":
            from vlm_jax.verbs import score

            return score
        case "grid":
            from vlm_jax.verbs import grid

            return grid
        case "report":
            from vlm_jax.verbs import report

            return report
        case "fit":
            from vlm_jax.verbs import fit

            return fit
        case "plan":
            from vlm_jax.verbs import plan

            return plan
        case "convert":
            from vlm_jax.verbs import convert

            return convert
        case "generate":
            from vlm_jax.verbs import generate

            return generate
        case "serve":
            from vlm_jax.verbs import serve

            return serve
        case "data":
            from vlm_jax.verbs import data

            return data
        case "checkpoint":
            from vlm_jax.verbs import checkpoint

            return checkpoint
        case "compile":
            from vlm_jax.verbs import compile

            return compile
    raise KeyError(verb)


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; the default of a flag after its text."""

    def __init__(self, prog: str, **how: Any):
        super().__init__(prog, max_help_position=28, width=100, **how)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = not action.required and action.nargs != 0 and "default" not in text
        if shown and action.default is not None and action.default != "":
            text += " (default: %(default)s)"
        return text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the nearest name, and exit status 2."""

    # A verb whose --json covers failures: its message as one line of JSON.
    failure: Callable[[str], str] | None = None
    words: Sequence[str] = ()

    def __init__(self, **how: Any):
        super().__init__(formatter_class=Help, allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        if self.failure is not None and "--json" in self.words:
            print(self.failure(" ".join(message.split())))
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"{value!r} is no choice{suggestion(str(value), choices)}: choose one of "
                f"{', '.join(choices)}",
            )

    def check(self, words: Iterable[str]) -> None:
        """Refuses an unknown flag, and an empty value, as from an unset shell variable."""
        self.words = list(words)
        for word in self.words:
            name, given, value = word.partition("=")
            if not re.match(r"--?[A-Za-z]", name):
                continue
            action = self._option_string_actions.get(name)
            if action is None:
                known = [flag for flag in self._option_string_actions if flag.startswith("--")]
                self.error(f"unknown flag {name}{suggestion(name, known)} ({self.prog} --help)")
            if given and not value and action.default != "" and action.metavar != "TEXT":
                self.error(f"{name}= is empty: give it a value ({action.help})")


class PrintCompletion(argparse.Action):
    """Prints the shell completion script of `vlm-jax`, and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error(f"{option_string} needs shtab: pip install shtab")
        from vlm_jax.cost import described

        whole, verbs = build(VERBS)
        for verb in USES_CONFIG:
            for name, value in fields(described.base()):
                text = f"configuration (default: {value!r:.40})".replace("%", "%%")
                verbs[verb].add_argument(f"--config.{name}", dest="field", help=text)
        kinds = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
        for parser_of_verb in verbs.values():
            for action in parser_of_verb._actions:
                kind = kinds.get(str(action.metavar))
                if kind is not None:
                    action.complete = kind  # type: ignore[attr-defined]  # shtab reads it there
        print(shtab.complete(whole, shell=values))
        parser.exit(0)


def fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field of a configuration."""
    for name, value in section.items():
        if hasattr(value, "items"):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def build(filled: Iterable[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command and those of its verbs; the verbs in `filled` get their flags."""
    whole = Parser(
        prog="vlm-jax",
        description="For an inference budget: which language model, and how many visual tokens?",
        epilog="Each verb has --help. Completion of a shell: vlm-jax --print-completion bash",
    )
    whole.add_argument("--version", action="version", version=f"vlm-jax {__version__}")
    whole.add_argument(
        "--print-completion", choices=("bash", "zsh"), metavar="SHELL", action=PrintCompletion,
        help="print the shell completion script of this command: bash or zsh",
    )  # fmt: skip
    under = whole.add_subparsers(title="verbs", dest="verb", metavar="VERB")
    verbs: dict[str, Parser] = {}
    for verb, summary in VERBS.items():
        verbs[verb] = under.add_parser(verb, prog=f"vlm-jax {verb}", help=summary)
        if verb in filled:
            verb_module = module(verb)
            verbs[verb].description = verb_module.__doc__
            verb_module.add_flags(verbs[verb])
            if verb in USES_CONFIG:
                configuration_flags(verbs[verb], USES_CONFIG[verb])
            if verb in USES_DEVICES:
                process_flags(verbs[verb])
    return whole, verbs


def configuration_flags(parser: Parser, otherwise: str) -> None:
    """Lists the flags of a configuration in the help; they are parsed elsewhere."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config", metavar="FILE",
        help="Python file whose get_config() returns the configuration, such as configs/demo.py "
        f"({otherwise})",
    )  # fmt: skip
    group.add_argument(
        "--config.FIELD", dest="config_field", metavar="VALUE",
        help="a field of it by its dotted name, such as --config.llm.depth=4; configs/base.py has "
        "all of them with their defaults and units",
    )  # fmt: skip


def process_flags(parser: Parser) -> None:
    """The flags of a run of several processes, for `vlm_jax/hosts.py`."""
    add = parser.add_argument_group("several hosts, the same command on each").add_argument
    add(
        "--coordinator", metavar="HOST:PORT",
        help="address of process 0 (default: as JAX finds it on TPU VMs, GKE and Slurm)",
    )  # fmt: skip
    add(
        "--processes", type=int, metavar="N",
        help="number of processes; 1 alone looks for no other (default: as JAX finds)",
    )  # fmt: skip
    add(
        "--process", type=int, metavar="I",
        help="number of this process, from 0 (default: as JAX finds)",
    )  # fmt: skip
    add(
        "--join-timeout", type=int, metavar="SECONDS", default=300,
        help="how long to wait for all processes to join",
    )  # fmt: skip
    add(
        "--heartbeat-timeout", type=int, metavar="SECONDS", default=100,
        help="silence after which a process counts as dead, and the others end",
    )  # fmt: skip


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a configuration, and the others.

    --config.FIELD without a value is that of a boolean, or has it in the next word.
    """
    configuration, others = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not CONFIG_WORD.match(word):
            others.append(word)
            continue
        configuration.append(word)
        if "=" not in word and rest and not re.match("--?[A-Za-z]", rest[0]):
            configuration.append(rest.pop(0))
    return configuration, others


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What a command line says: `verb`, its flags, `config` (the words of a configuration) and
    `words`, all that follow the verb.

    A wrong word ends the process with status 2 and one line on stderr that says the way out;
    --help and --version with status 0.
    """
    words = list(words) or ["--help"]
    words = ["--help", *words[1:]] if words[0] == "help" else words
    verb, *rest = words
    if verb.startswith("-"):
        whole, _ = build([])
        whole.check([verb])
        whole.parse_args(words)
        whole.error(f"{verb} goes before no verb: flags follow the verb")
    whole, verbs = build([verb])
    if verb not in verbs:
        whole.error(
            f"unknown verb {verb!r}{suggestion(verb, verbs)}: choose one of {', '.join(verbs)}"
        )
    configuration, others = apart(rest) if verb in USES_CONFIG else ([], rest)
    verbs[verb].check(others)
    options, unexpected = whole.parse_known_args([verb, *others])
    if unexpected:
        verbs[verb].error(f"unexpected argument {unexpected[0]!r}: flags are written --name=value")
    options.config, options.words = configuration, rest
    return options


def command(words: Sequence[str] | None) -> tuple[argparse.Namespace, ModuleType]:
    """The options of a command line (of this process where None) and the verb that takes them."""
    options = parse(sys.argv[1:] if words is None else words)
    return options, module(options.verb)
