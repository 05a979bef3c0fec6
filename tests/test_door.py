# SPDX-License-Identifier: Apache-2.0
"""`import vlm_jax`: a catalog that is typed, lazy, and says what the commands say."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys

import made_rows
import pytest
import tiny

import vlm_jax
from vlm_jax.__main__ import main
from vlm_jax.cost import flops as cost
from vlm_jax.grids import run
from vlm_jax.law import published

FUNCTIONS = [name for name in vlm_jax.__all__ if inspect.isfunction(getattr(vlm_jax, name))]
CLASSES = [name for name in vlm_jax.__all__ if inspect.isclass(getattr(vlm_jax, name))]
METHODS = [vlm_jax.VLM.from_checkpoint, vlm_jax.VLM.generate, vlm_jax.VLM.answer,
           vlm_jax.Law.error, vlm_jax.Law.band]  # fmt: skip


def test_the_catalog_has_what_it_names_and_nothing_else():
    assert len(FUNCTIONS) + len(CLASSES) == len(vlm_jax.__all__) == len(set(vlm_jax.__all__))
    assert set(vlm_jax.__all__) <= set(dir(vlm_jax))
    assert "Any" not in dir(vlm_jax)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        vlm_jax.fitt  # noqa: B018


def test_what_pages_show_of_it_exists():
    pages = [vlm_jax.__doc__]
    pages += [(tiny.ROOT / name).read_text() for name in ("README.md", "docs/generation.md")]
    shown = {name for page in pages for name in re.findall(r"(?<!/)\bvlm_jax\.(\w+)\(", page)}
    assert {"fit", "plan", "load", "train_cell"} <= shown <= set(vlm_jax.__all__)


@pytest.mark.parametrize("call", [getattr(vlm_jax, name) for name in FUNCTIONS] + METHODS,
                         ids=lambda call: call.__qualname__)  # fmt: skip
def test_arguments_are_named_typed_and_explained(call):
    assert call.__doc__
    signature = inspect.signature(call)
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        assert name == "self" or parameter.annotation is not parameter.empty, name


def test_a_model_is_asked_for_without_notices_of_libraries():
    program = "import vlm_jax; vlm_jax.load; import transformers"
    done = subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_each_type_says_what_it_is():
    assert all(getattr(vlm_jax, name).__doc__ for name in CLASSES)


def test_what_is_not_asked_for_is_not_imported():
    program = (
        "import sys, vlm_jax\n"
        "assert not {'numpy', 'jax', 'typing_extensions'} & sys.modules.keys()\n"
        "law = vlm_jax.fit(vlm_jax.published('reasoning'), bootstrap=0)\n"
        "best = vlm_jax.plan(law, flops=1e12, text_tokens=50, llms='continuous', "
        "tokens='continuous')\n"
        "assert 'jax' not in sys.modules and 'scipy.stats' not in sys.modules\n"
        "print(best.V)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and float(done.stdout) == pytest.approx(13.5, rel=0.02), done.stderr


@pytest.fixture(scope="module")
def law():
    return vlm_jax.fit(vlm_jax.published("reasoning"), bootstrap=50)


def test_a_plan_is_what_the_command_prints(law, tmp_path, capsys):
    (tmp_path / "law.json").write_text(law.to_json())
    stored = vlm_jax.read_law(tmp_path)
    assert stored.params == law.params
    argv = ["--ms=40", "--chip=v5e", "--text-tokens=25:1,100:3", "--efficiency=0.5",
            "--new-tokens=1",
            "--llms=qwen1.5-0.5b,qwen1.5-4b", "--tokens=4,36"]  # fmt: skip
    assert main(["plan", f"--law={tmp_path}/law.json", *argv]) == 0
    best = vlm_jax.plan(
        stored, ms=40.0, chip="v5e", text_tokens={25: 0.25, 100: 0.75}, efficiency=0.5,
        new_tokens=1, llms=["qwen1.5-0.5b", "qwen1.5-4b"], tokens=[4, 36],
    )  # fmt: skip
    assert best.fields == json.loads(capsys.readouterr().out)
    assert (best.N, best.V, best.llm) == (best.fields["N"], best.fields["V"], best.fields["llm"])
    assert best.cost <= 40 and best.interval[0] < best.predicted_error < best.interval[1]


@pytest.mark.parametrize("how, words", [
    (dict(), "0 budgets: give one of flops"),
    (dict(flops=1e12, ms=4.0), "needs --new-tokens"),
    (dict(flops=1e12, calibration="v5e-mine"), "choose one of a100-transformers"),
    (dict(flops=1e12, cost_model="half"), "choose one of paper, full"),
    (dict(flops=1e12, chip="v5e"), "has no chip"),
    (dict(flops=1e12, tokens="many"), "give a list of V, or continuous"),
    (dict(ms=4.0, chip="v5e", new_tokens=1, llms=["qwen9"]), "qwen9 unknown"),
])  # fmt: skip
def test_a_question_that_makes_no_sense_is_refused(how, words, law):
    with pytest.raises(ValueError, match=words):
        vlm_jax.plan(law, text_tokens=50, **how)


def test_points_come_from_any_file_of_results(tmp_path):
    lines = ["N,V,error", *(f"{n},{v},{0.5 - n / 100 - v / 1e3}" for n in (1, 2) for v in (1, 4))]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    points = vlm_jax.read_points(tmp_path / "mine.csv")
    assert isinstance(points, vlm_jax.Points) and len(points) == 4
    assert vlm_jax.published("ocr").error.tolist() == published.points("ocr").error.tolist()


def test_a_description_is_the_sizes_of_the_model_that_is_built():
    config = vlm_jax.read_config(tiny.ROOT / "tests" / "tiny.py")
    model = vlm_jax.describe(config)
    of = tiny.size(config)
    assert (model.vit, model.compressor, model.llm) == (of.vit, of.compressor, of.llm)
    assert vlm_jax.describe(config, llm="large").llm.depth == 2
    assert vlm_jax.describe(config, tokens=1).visual_tokens == 1
    seven = vlm_jax.describe(llm="qwen1.5-7b", tokens=36)
    assert seven.llm_parameters == cost.llm_parameters(seven.llm) > 7e9
    with pytest.raises(ValueError, match="llm='nine': choose one of"):
        vlm_jax.describe(config, llm="nine")


def test_a_cost_is_flops_bytes_and_seconds():
    model = vlm_jax.describe(llm="qwen1.5-4b", tokens=16)
    one = vlm_jax.request_cost(model, text_tokens=50, new_tokens=5)
    assert one.flops == cost.request_flops(model.vit, model.compressor, model.llm, Q=50, G=5)
    assert one.seconds is None and one.total_seconds is None
    on_chip = vlm_jax.request_cost(model, text_tokens=50, new_tokens=5, batch=8, chip="v5e")
    assert on_chip.total_seconds == sum(on_chip.seconds.values()) > 0
    assert on_chip.memory.total > on_chip.memory.weights > model.llm_parameters


@pytest.fixture
def config():
    """Two cells of the smallest models."""
    config = tiny.config(finetune=dict(steps=2), align=dict(steps=1), encoder=dict(steps=1))
    with config.unlocked():
        config.grid.llms = {"only": dict(depth=1)}
    config.grid.baselines = ()
    return config


def test_one_cell_of_a_grid_is_asked_for_by_its_name(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "run_some", lambda folder, config, command, names: asked.extend(names))
    names = vlm_jax.cell_names(config)
    path = tmp_path / "run" / "cells" / names[1] / "row.json"
    path.parent.mkdir(parents=True)
    row = dataclasses.replace(made_rows.rows()[0], cell=names[1])
    path.write_text(row.to_json())
    assert vlm_jax.train_cell(config, tmp_path / "run", cell=names[1]) == row
    assert asked == [names[1]]
    config.start_from = "somewhere"
    with pytest.raises(ValueError, match="a grid makes models of several sizes"):
        vlm_jax.train_cell(config, tmp_path / "run", cell=names[1])


@pytest.mark.slow
def test_a_cell_is_trained_evaluated_and_read_back(config, tmp_path):
    names = vlm_jax.cell_names(config)
    assert names == ["only-v1-token_packer-s0", "only-v4-token_packer-s0"]
    row = vlm_jax.train_cell(config, tmp_path / "run", cell=names[1])
    assert isinstance(row, vlm_jax.Row) and row.cell == names[1] and row.V == 4
    assert vlm_jax.read_rows(tmp_path / "run" / "rows.jsonl") == [row]
    assert vlm_jax.train_cell(config, tmp_path / "run", cell=names[1]) == row
    with pytest.raises(ValueError, match="cell='only-v9': choose one of only-v1-token_packer-s0"):
        vlm_jax.train_cell(config, tmp_path / "run", cell="only-v9")
    answers = vlm_jax.load(tmp_path / "run" / "cells" / names[1]).generate(
        None, "what is this?", max_new_tokens=2
    )
    assert isinstance(answers[0], vlm_jax.Answer) and len(answers[0].ids) <= 2
