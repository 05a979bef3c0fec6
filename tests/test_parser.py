# SPDX-License-Identifier: Apache-2.0
"""One command line: flags have texts and defaults, examples work, a typo gets a suggestion."""

import argparse
import re
import shlex
import subprocess

import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.verbs import parser

PARSERS = parser.build(parser.VERBS)[1]
# What stands without a default because the verb asks for it, or for one of several.
ASKED = {"flops", "ms", "dollars_per_million", "hbm_gb", "rows", "published", "prompt", "requests",
         "source", "vision", "llm", "config_field"}  # fmt: skip


def said(capsys, *argv, code=2):
    """What `vlm-jax ARGV` prints where the words themselves end it."""
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == code
    out, err = capsys.readouterr()
    return err if code else out


def test_every_verb_is_a_file_and_every_file_of_a_verb_is_one():
    shared = {"__init__", "cli", "configuration", "parser"}
    files = {path.stem for path in (tiny.ROOT / "vlm_jax" / "verbs").glob("*.py")} - shared
    assert files == parser.VERBS.keys() == PARSERS.keys()


@pytest.mark.parametrize("verb", parser.VERBS)
def test_help_has_every_flag_and_examples_that_are_read(verb, capsys):
    text = said(capsys, verb, "--help", code=0)
    for action in PARSERS[verb]._actions:
        assert all(flag in text for flag in action.option_strings)
    doc = parser.module(verb).__doc__.replace("\\\n", " ")
    examples = re.findall(r"^    vlm-jax (.*)$", doc, re.MULTILINE)
    assert examples
    for example in examples:
        assert parser.parse(shlex.split(example)).verb == verb


@pytest.mark.parametrize("verb", parser.VERBS)
def test_a_flag_says_what_it_is_and_what_it_is_without(verb):
    for action in PARSERS[verb]._actions:
        assert action.help and action.help is not argparse.SUPPRESS, action.dest
        needed = action.required or action.nargs == 0 or action.dest in ASKED
        if not needed and action.default in (None, ""):
            assert re.search("default|required", action.help), action.dest
        if action.type in (int, float):
            assert action.metavar, f"{action.dest}: say what is counted"


@pytest.mark.parametrize("argv, words", [
    (["trian"], ["vlm-jax: unknown verb 'trian', did you mean train?", "evaluate", "convert"]),
    (["--verison"], ["vlm-jax: unknown flag --verison, did you mean --version?"]),
    (["train", "--wrokdir=x"], ["vlm-jax train: unknown flag --wrokdir, did you mean --workdir?"]),
    (["train", "--dry_run"], ["did you mean --dry-run?"]),
    (["train", "llm.depth=3"], ["unexpected argument 'llm.depth=3'", "--name=value"]),
    (["train", "--workdir="], ["--workdir= is empty: give it a value"]),
    (["train", "--workdir"], ["--workdir: expected one argument"]),
    (["train", "--dry-run=yes"], ["--dry-run"]),
    (["evaluate"], ["vlm-jax evaluate: ", "required: --workdir"]),
    (["plan", "--laws=x"], ["did you mean --law?"]),
    (["fit", "--published=resoning", "--out=x"], ["did you mean reasoning?", "ocr"]),
    (["fit", "--published=ocr", "--out=x", "--bootstrap=many"], ["--bootstrap", "'many'"]),
    (["fit", "--published=ocr", "--out=x", "--config=configs/demo.py"], ["unknown flag --config"]),
    (["convert", "--to=x", "--compressor=quec"], ["did you mean quecc?", "token_packer"]),
    (["--print-completion", "fish"], ["bash, zsh"]),
])  # fmt: skip
def test_a_wrong_word_is_one_line_with_its_cure(argv, words, capsys):
    err = said(capsys, *argv)
    assert err.startswith("vlm-jax") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_value_stands_behind_an_equals_sign_or_a_space():
    for words in (["--workdir", "runs/x"], ["--workdir=runs/x"]):
        assert parser.parse(["train", *words]).workdir == "runs/x"


def test_the_words_of_a_configuration_go_to_it_in_their_order():
    words = ["--config", "a.py", "--config.grid.seeds", "(0, 1)", "--config.data.blind",
             "--noconfig.data.blind", "--config.align.weight_decay", "-1"]  # fmt: skip
    given = [*words[:2], "--workdir=w", *words[2:], "--dry-run"]
    options = parser.parse(["grid", *given])
    assert options.config == words and options.words == given
    assert options.workdir == "w" and options.dry_run


def test_help_of_the_command_names_every_verb(capsys):
    for argv in ([], ["--help"], ["help"], ["-h"]):
        text = said(capsys, *argv, code=0)
        assert all(f"    {verb} " in text for verb in parser.VERBS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_verbs_flags_choices_and_fields(shell, capsys):
    text = said(capsys, "--print-completion", shell, code=0)
    assert all(verb in text for verb in parser.VERBS)
    for word in ("--text-tokens", "token_packer", "--config.llm.depth"):
        assert word in text
    if shell == "bash":
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
