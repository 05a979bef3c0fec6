# SPDX-License-Identifier: Apache-2.0
"""Command lines: what is set is what the configuration says; a wrong word is told the way out."""

import numpy as np
import pytest
import tiny

from vlm_jax import arguments
from vlm_jax.__main__ import main
from vlm_jax.training.workdir import digest
from vlm_jax.verbs import cli

CONFIG = f"--config={tiny.ROOT}/tests/tiny.py"


@pytest.mark.parametrize("section", ["vit", "llm", "finetune", "data", "grid"])
def test_the_digest_changes_with_any_field(section):
    before = digest(tiny.get_config())
    assert before == digest(tiny.get_config()) and len(before) == 16
    for name, value in tiny.get_config()[section].items():
        changed = tiny.get_config()
        with changed.unlocked(), changed.ignore_type():
            changed[section][name] = (value, "changed")
        assert digest(changed) != before, name


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, RuntimeError, OSError])
def test_what_a_user_can_mend_is_one_line_and_status_two(error, capsys):
    def body():
        raise error("the disk is full: choose another")

    assert cli.report_errors("grid", body) == 2
    assert capsys.readouterr().err == "vlm-jax grid: the disk is full: choose another\n"
    assert cli.report_errors("grid", lambda: 0) == 0


def test_a_run_that_is_stopped_from_the_keyboard_says_so(capsys):
    def body():
        raise KeyboardInterrupt

    assert cli.report_errors("grid", body) == 130
    assert capsys.readouterr().err == "vlm-jax grid: stopped from the keyboard\n"


def test_what_is_our_fault_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.report_errors("grid", lambda: 1 // 0)


@pytest.mark.parametrize(
    "value", [1.5, 1.0, True, np.bool_(1), "1", None, np.float32(1), -1, 2**32]
)
def test_a_seed_is_a_whole_number(value):
    with pytest.raises(ValueError, match="seed=.*: give a whole number from 0 to 4294967295"):
        arguments.seed_of("seed", value)
    assert arguments.seed_of("seed", np.uint32(2**32 - 1)) == 2**32 - 1


@pytest.mark.parametrize("seed", ["1.5", "-1", "True", "one", "", "4294967296", "1e3"])
def test_a_seed_that_is_none_is_refused_by_name(seed, tmp_path, capsys):
    for argv in (["train", CONFIG, f"--workdir={tmp_path}/run", f"--config.seed={seed}"],
                 ["generate", "--checkpoint=none", "--prompt=a", f"--seed={seed}"],
                 ["convert", "--from=none", "--to=none", f"--seed={seed}"],
                 ["fit", "--published=ocr", f"--out={tmp_path}", f"--seed={seed}"]):  # fmt: skip
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
        last = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and last.startswith(f"vlm-jax {argv[0]}: ") and "seed" in last
        assert seed in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "seeds", ["(0, 1.5)", "(-1,)", "('1',)", "(True,)", "()", "(0, 0)", "(None,)"]
)
def test_a_seed_of_a_grid_that_is_none_is_refused_by_name(seeds, tmp_path, capsys):
    argv = ["grid", CONFIG, f"--workdir={tmp_path}", f"--config.grid.seeds={seeds}", "--dry-run"]
    assert main(argv) == 2
    assert "vlm-jax grid: grid.seeds=" in capsys.readouterr().err
    assert main([*argv[:3], "--config.grid.tokens=(1, 2.5)", "--dry-run"]) == 2
    assert "vlm-jax grid: grid.tokens=2.5" in capsys.readouterr().err
