# SPDX-License-Identifier: Apache-2.0
"""Command lines: what is set is what the configuration says; a wrong word is told the way out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from vlm_jax import __main__, arguments
from vlm_jax.training.workdir import digest
from vlm_jax.verbs import cli

CONFIG = f"--config={tiny.ROOT}/tests/tiny.py"
VERBS = ("train", "evaluate", "grid", "fit", "plan", "report")


def parse(*argv):
    return cli.parse(
        "train",
        "Doc.",
        argv,
        strings={"workdir": "where"},
        booleans={"dry-run": "print"},
        required=["workdir"],
    )


def test_a_configuration_is_the_file_and_what_is_set_over_it():
    config, flags = parse(CONFIG, "--workdir=runs/one", "--config.llm.depth=7", "--dry-run",
                          "--config.vit.levels=(1, 3)", "--config.grid.seeds=(0, 1)",
                          "--config.data.blind", "--config.finetune.learning_rate=1e-4",
                          "--config.compressor.kind=quecc")  # fmt: skip
    expected = tiny.config(llm=dict(depth=7), vit=dict(levels=(1, 3)), grid=dict(seeds=(0, 1)),
                           data=dict(blind=True), finetune=dict(learning_rate=1e-4),
                           compressor=dict(kind="quecc"))  # fmt: skip
    assert config.to_dict() == expected.to_dict()
    assert flags.workdir == "runs/one" and flags["dry-run"].value


@pytest.mark.parametrize("way", [[CONFIG], CONFIG.split("=")], ids=["=", "space"])
def test_a_configuration_finds_its_neighbours_from_anywhere(way, tmp_path):
    # tiny.py imports `configs.base`, which is beside it and not installed.
    code = (
        "import sys; from vlm_jax.verbs import cli; "
        "print(cli.parse('train', '', sys.argv[1:])[0].llm.depth)"
    )
    path = f"import sys; sys.path.append({str(Path(cli.__file__).parents[1])!r})\n"
    script = tmp_path / "verb.py"
    script.write_text(path + code)
    done = subprocess.run(
        [sys.executable, str(script), *way], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


@pytest.mark.parametrize("argv, words", [
    ((CONFIG, "--config.llm.detph=3"), ["no such field", "detph", 'mean "depth"']),
    ((CONFIG, "--config.lm.depth=3"), ["no such field", "lm", 'mean "llm"']),
    ((CONFIG, "--config.llm.depth=deep"), ["--config.llm.depth=deep", "'deep'"]),
    ((CONFIG, "--config.llm.depth=2.5"), ["--config.llm.depth=2.5"]),
    ((CONFIG, "--wrokdir=x"), ["wrokdir", "mean: workdir"]),
    ((CONFIG, "llm.depth=3"), ["unexpected argument 'llm.depth=3'", "--name=value"]),
    ((CONFIG, "--config.llm.depth=deep", "--workdir=x"), ["give a whole number, not 'deep'"]),
    ((CONFIG, "--config.llm.tied_embeddings=so", "--workdir=x"), ["give True or False, not 'so'"]),
    ((CONFIG,), ["--workdir is missing"]),
    ((CONFIG, "--workdir="), ["--workdir= is empty"]),
    (("--workdir=x",), ["--config is missing", "configs/demo.py"]),
    (("--config=nowhere.py", "--workdir=x"), ["nowhere.py"]),
])  # fmt: skip
def test_a_wrong_word_ends_with_its_cure(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("vlm-jax train: ")
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_help_needs_no_configuration(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith("Doc.")
    assert "--workdir" in out and "--dry-run" in out and "--config.FIELD=VALUE" in out


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


def test_every_verb_is_dispatched_and_has_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            raise SystemExit(__main__.main([verb, "--help"]))
        assert end.value.code == 0, verb
        assert f"vlm-jax {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_refused_with_the_choices(capsys):
    assert __main__.main(["trian"]) == 2
    err = capsys.readouterr().err
    assert "unknown verb 'trian', did you mean train?" in err and all(verb in err for verb in VERBS)
    assert __main__.main([]) == 0
    assert "usage" in capsys.readouterr().out


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
            code = __main__.main(argv)
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
    assert __main__.main(argv) == 2
    assert "vlm-jax grid: grid.seeds=" in capsys.readouterr().err
    assert __main__.main([*argv[:3], "--config.grid.tokens=(1, 2.5)", "--dry-run"]) == 2
    assert "vlm-jax grid: grid.tokens=2.5" in capsys.readouterr().err


def test_a_wrong_value_in_a_configuration_file_is_one_line_that_names_it(tmp_path, capsys):
    text = "from tests import tiny\n\n\ndef get_config():\n    c = tiny.get_config()\n"
    for line, words in (
        ("c.seed = 1.5", "mine.py, line 6: TypeError: Could not override field 'seed'"),
        ("c.seed = '1'", "mine.py, line 6: TypeError: Could not override field 'seed'"),
        ("c.sed = 1", 'no such field: "sed", did you mean "seed"?'),
        ("c.finetune.update(dict(stpes=3))", '"stpes", did you mean "steps"?'),
    ):
        (tmp_path / "mine.py").write_text(f"{text}    {line}\n    return c\n")
        with pytest.raises(SystemExit, match="2"):
            parse(f"--config={tmp_path}/mine.py", "--workdir=w")
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and "present" not in err


@pytest.mark.parametrize("text, words", [
    ("def get_config(:", "mine.py, line 1: SyntaxError"),
    ("import nothing_of_this_name", "mine.py, line 1: ModuleNotFoundError: No module named"),
    ("def get_config():\n    return false", "mine.py, line 2: NameError: name 'false'"),
    ("def get_config():\n    assert False", "mine.py, line 2: AssertionError"),
    ("def get_config():\n    return {'seed': 0}", "no configuration at"),
])  # fmt: skip
def test_a_configuration_that_is_none_is_one_line_that_says_why(text, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse(f"--config={tmp_path}/mine.py", "--workdir=w")
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_record_of_a_run_is_no_configuration_file(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"seed": 0, "blind": false}')
    with pytest.raises(SystemExit, match="2"):
        parse(f"--config={tmp_path}/config.json", "--workdir=w")
    assert "config.json is no file of Python: " in capsys.readouterr().err


def test_a_misspelt_field_over_the_configuration_of_a_folder_is_told(capsys):
    argv = ["--workdir=w", "--config.evaluate.spilt=val"]
    with pytest.raises(SystemExit, match="2"):
        cli.parse("evaluate", "", argv, strings={"workdir": ""}, default=tiny.get_config())
    assert 'no such field: "spilt", did you mean "split"?' in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["int32", "float16", "float8", ""])
def test_a_number_format_that_nothing_is_trained_in_is_refused(kind, tmp_path, capsys):
    argv = ["train", CONFIG, f"--workdir={tmp_path}/run", f"--config.compute_dtype={kind}"]
    assert __main__.main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "compute_dtype=" in last and "give one of float32, bfloat16" in last


@pytest.mark.parametrize("text, words", [
    ("from ml_collections import ConfigDict as C\ndef get_config():\n    return C({'seed': 0})",
     "lacks the field align.accumulate and "),
    ("from tests import tiny\ndef get_config():\n    c = tiny.get_config().unlock()\n"
     "    c.llm.dept = 3\n    return c", "has the field llm.dept:"),
])  # fmt: skip
def test_a_configuration_has_every_field_and_no_other(text, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    for verb in ("train", "grid"):
        argv = [verb, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/w", "--dry-run"]
        assert __main__.main(argv) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
