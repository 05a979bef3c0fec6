# SPDX-License-Identifier: Apache-2.0
"""What a command imports: help and refusals need no library, fitting and planning no JAX."""

import json
import subprocess
import sys

import pytest
import tiny

from vlm_jax.verbs import parser

HEAVY = {
    "PIL", "absl", "fastapi", "flax", "grain", "jax", "matplotlib", "ml_collections", "optax",
    "orbax", "pydantic", "scipy", "tokenizers", "transformers", "uvicorn",
}  # fmt: skip


def imported(*argv, code=0):
    """The libraries that `vlm-jax ARGV` has imported when it ends, with what it said on stderr."""
    program = (
        "import json, sys\n"
        "from vlm_jax.__main__ import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "print('\\n' + json.dumps([code, sorted(sys.modules)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=tiny.ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    ended, modules = json.loads(done.stdout.splitlines()[-1])
    assert ended == code, done.stderr
    return set(modules), done.stderr


@pytest.mark.parametrize("verb", parser.VERBS)
def test_a_wrong_flag_is_refused_before_anything_heavy_is_imported(verb):
    modules, err = imported(verb, "--wrong-flag=1", code=2)
    assert not HEAVY & modules and err.count("\n") == 1 and "--wrong-flag" in err


@pytest.mark.parametrize(
    "argv", [[verb, "--help"] for verb in parser.VERBS] + [["--help"], ["--version"]]
)
def test_help_imports_no_heavy_library_and_says_nothing_else(argv):
    modules, err = imported(*argv)
    assert not HEAVY & modules and err == ""


def test_a_fit_and_a_plan_need_no_jax_and_of_scipy_only_what_they_use(tmp_path):
    fit = ("fit", "--published=reasoning", f"--out={tmp_path}", "--bootstrap=0")
    plan = (
        "plan",
        f"--law={tmp_path}/law.json",
        "--text-tokens=50",
        "--flops=1e12",
        "--llms=0.5,7",
    )
    unwanted = HEAVY - {"scipy"} | {"scipy.stats"}
    modules, err = imported(*fit)
    assert not unwanted & modules and "scipy.optimize" in modules
    assert "no figures" in err
    modules, _ = imported(*plan, "--json")
    assert not HEAVY & modules
