# SPDX-License-Identifier: Apache-2.0
"""Fields that are set reach a configuration; a wrong one is one line with the way out."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import vlm_jax
from vlm_jax.__main__ import main
from vlm_jax.verbs import configuration

CONFIG = f"--config={tiny.ROOT}/tests/tiny.py"


def test_a_configuration_is_the_file_and_what_is_set_over_it():
    given = configuration.read([CONFIG, "--config.llm.depth=7", "--config.vit.levels=(1, 3)",
                                "--config.grid.seeds=(0, 1)", "--config.data.blind",
                                "--config.finetune.learning_rate", "1e-4",
                                "--config.compressor.kind=quecc"])  # fmt: skip
    expected = tiny.config(llm=dict(depth=7), vit=dict(levels=(1, 3)), grid=dict(seeds=(0, 1)),
                           data=dict(blind=True), finetune=dict(learning_rate=1e-4),
                           compressor=dict(kind="quecc"))  # fmt: skip
    assert given.config.to_dict() == expected.to_dict()
    assert given.overrides["llm.depth"] == 7 and given.overrides["vit.levels"] == (1, 3)
    assert len(given.overrides) == 6
    assert not configuration.read([CONFIG, "--noconfig.data.blind"]).config.data.blind


@pytest.mark.parametrize("way", [[CONFIG], CONFIG.split("=")], ids=["=", "space"])
def test_a_configuration_finds_its_neighbors_from_anywhere(way, tmp_path):
    # tiny.py imports `configs.base`, which is beside it and not installed.
    script = tmp_path / "verb.py"
    script.write_text(
        f"import sys; sys.path.append({str(Path(vlm_jax.__file__).parents[1])!r})\n"
        "from vlm_jax.verbs import configuration\n"
        "print(configuration.read(sys.argv[1:]).config.llm.depth)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), *way], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


@pytest.mark.parametrize("words, message", [
    ([CONFIG, "--config.grid.llms.a-b.depth=3"], "grid.llms.a-b.depth: 'a-b' is no name of Python"),
    ((CONFIG, "--config.llm.detph=3"), 'no such field: "detph", did you mean "depth"\\?'),
    ((CONFIG, "--config.lm.depth=3"), 'no such field: "lm", did you mean "llm"\\?'),
    ((CONFIG, "--config.llm.depth=deep"), "--config.llm.depth=deep.*whole number, not 'deep'"),
    ((CONFIG, "--config.llm.depth=2.5"), "--config.llm.depth=2.5"),
    ((CONFIG, "--config.llm.tied_embeddings=so"), "give True or False, not 'so'"),
    (("--config.llm.depth=3",), "--config is missing: .*configs/demo.py"),
    ((), "--config is missing: .*configs/demo.py"),
    (("--config=nowhere.py",), "nowhere.py"),
])  # fmt: skip
def test_a_wrong_word_is_one_line_with_its_cure(words, message):
    with pytest.raises(ValueError, match=message) as wrong:
        configuration.read(words)
    assert "Traceback" not in str(wrong.value) and "\n" not in str(wrong.value)


@pytest.mark.parametrize("text, words", [
    ("def get_config(:", "mine.py, line 1: SyntaxError"),
    ("import nothing_of_this_name", "mine.py, line 1: ModuleNotFoundError: No module named"),
    ("def get_config():\n    return false", "mine.py, line 2: NameError: name 'false'"),
    ("def get_config():\n    assert False", "mine.py, line 2: AssertionError"),
    ("def get_config():\n    return {'seed': 0}", "no configuration at"),
])  # fmt: skip
def test_a_configuration_that_is_none_is_one_line_that_says_why(text, words, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError) as wrong:
        configuration.read([f"--config={tmp_path}/mine.py"])
    assert words in str(wrong.value) and "\n" not in str(wrong.value)


def test_a_record_of_a_run_is_no_configuration_file(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0, "blind": false}')
    with pytest.raises(ValueError, match="config.json is no file of Python: "):
        configuration.read([f"--config={tmp_path}/config.json"])


def test_a_misspelt_field_over_the_configuration_of_a_folder_is_told():
    with pytest.raises(ValueError, match='no such field: "spilt", did you mean "split"'):
        configuration.read(["--config.evaluate.spilt=val"], default=tiny.get_config())


def test_a_wrong_value_in_a_configuration_file_is_one_line_that_names_it(tmp_path):
    text = "from tests import tiny\n\n\ndef get_config():\n    c = tiny.get_config()\n"
    for line, words in (
        ("c.seed = 1.5", "mine.py, line 6: TypeError: Could not override field 'seed'"),
        ("c.seed = '1'", "mine.py, line 6: TypeError: Could not override field 'seed'"),
        ("c.sed = 1", 'no such field: "sed", did you mean "seed"?'),
        ("c.finetune.update(dict(stpes=3))", '"stpes", did you mean "steps"?'),
    ):
        (tmp_path / "mine.py").write_text(f"{text}    {line}\n    return c\n")
        with pytest.raises(ValueError) as wrong:
            configuration.read([f"--config={tmp_path}/mine.py"])
        err = str(wrong.value)
        assert words in err and "\n" not in err and "present" not in err


@pytest.mark.parametrize("kind", ["int32", "float16", "float8", ""])
def test_a_number_format_that_nothing_is_trained_in_is_refused(kind, tmp_path, capsys):
    argv = ["train", CONFIG, f"--workdir={tmp_path}/run", f"--config.compute_dtype={kind}"]
    assert main(argv) == 2
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
        assert main(argv) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
