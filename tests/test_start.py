# SPDX-License-Identifier: Apache-2.0
"""Training starts from the weights of a model folder, and refuses one that it would misread."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.training import runs, stages
from vlm_jax.weights import folder, start

FROZEN = Path(__file__).parent / "published_weights"


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """The model folder of a finished run."""
    path = tmp_path_factory.mktemp("made") / "folder"
    assert main(["convert", "--from", str(trained), "--to", str(path)]) == 0
    return path


def test_a_run_that_learns_nothing_ends_with_the_weights_it_started_from(made, tmp_path):
    flags = {"start_from": made, "align.steps": 0, "finetune.steps": 2,
             "finetune.learning_rate": 0.0, "encoder.steps": 0, "llm.depth": 1}  # fmt: skip
    done = tiny.run("train", "--config=tests/tiny.py", f"--workdir={tmp_path}/run",
                    *[f"--config.{name}={value}" for name, value in flags.items()])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main(["convert", "--from", f"{tmp_path}/run", "--to", f"{tmp_path}/again"]) == 0
    before, after = folder.read(made).tensors, folder.read(tmp_path / "again").tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.read(), after[name].read(), err_msg=name)
    told = json.loads((tmp_path / "run/config.json").read_text())
    assert told["llm"]["depth"] == 2 and told["data"]["tokenizer"] == str(made / "tokenizer")


def test_a_finished_run_is_started_from_as_its_model_folder_is(made, trained, mesh1):
    ours, theirs = (stages.with_start(tiny.config(start_from=str(p))) for p in (trained, made))
    for c in (ours, theirs):
        c.start_from, c.data.tokenizer = "", ""
    assert ours.to_dict() == theirs.to_dict()
    tensors, same = (runs.read(p, "start_from").tensors for p in (trained, made))
    assert tensors.keys() == same.keys()
    for name, tensor in same.items():
        np.testing.assert_array_equal(tensor.read(), tensors[name], err_msg=name)


def load(c, path):
    return start.load(tiny.size(c), folder.read(path), start_from=c.start_from, seed=0)


def test_a_folder_without_compression_gets_a_fresh_compressor(tmp_path, mesh1):
    path = tmp_path / "llava"
    assert main(["convert", "--from", str(FROZEN / "clip_llama"), "--to", str(path)]) == 0
    c = tiny.config(start_from=str(path), compressor=dict(tokens=1))
    adopted = stages.with_start(c)
    assert c.llm.width == 16 and adopted.llm.width == 24 and adopted.vit.levels == (1, 2)
    with jax.set_mesh(mesh1):
        model = load(adopted, path)
    assert model.compressor.tokens == 1 and model.llm.embedding.shape == (67, 24)
    tensors = folder.read(path).tensors
    np.testing.assert_array_equal(
        model.llm.embedding[...], tensors["llm.embed_tokens.weight"].read()
    )


def test_a_method_whose_only_weights_are_the_projector_starts_from_the_trained_one(
    tmp_path, mesh1, capsys
):
    path = tmp_path / "llava"
    assert main(["convert", "--from", str(FROZEN / "clip_llama"), "--to", str(path)]) == 0
    tensors = folder.read(path).tensors
    for levels, kept in (((1, 2), True), ((1,), False)):
        c = tiny.config(start_from=str(path), compressor=dict(kind="m3", tokens=1),
                        vit=dict(levels=levels))  # fmt: skip
        with jax.set_mesh(mesh1):
            model = load(stages.with_start(c), path)
        same = np.array_equal(
            model.compressor.projector.up.kernel[...], tensors["compressor.0.weight"].read().T
        )
        told = capsys.readouterr().err
        assert same is kept and ("projector and LLM" in told) is kept
        assert ("a fresh m3 in place of its trained projector" in told) is not kept


def test_a_trained_compressor_must_be_the_one_that_is_configured(made):
    c = tiny.config(start_from=str(made), compressor=dict(tokens=1))
    with pytest.raises(ValueError, match="'tokens': 4.*the configuration says {'tokens': 1}"):
        stages.with_start(c)


def test_images_are_prepared_as_the_folder_says(made, tmp_path, capsys):
    path = shutil.copytree(made, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    half = dict(mean=[0.5] * 3, std=[0.25] * 3, fit="stretch", resample="bilinear", resize=[40, 36],
                rescale=0.5, normalize=False)  # fmt: skip
    config["facts"]["image"] = half
    (path / "config.json").write_text(json.dumps(config))
    data = stages.with_start(tiny.config(start_from=str(path))).data
    assert (data.image_mean, data.image_std) == ((0.5,) * 3, (0.25,) * 3)
    assert (data.image_fit, data.image_resample) == ("stretch", "bilinear")
    assert (data.image_resize, data.image_rescale, data.image_normalize) == ((40, 36), 0.5, False)
    assert "made square by 'stretch'" in capsys.readouterr().err
    # How an image becomes square is the recipe's choice where the tower wants none stretched.
    config["facts"]["image"] = half | dict(fit="crop", resize=[40, 50])
    (path / "config.json").write_text(json.dumps(config))
    for fit, resize in (("crop", (40, 50)), ("pad", (40,))):
        data = stages.with_start(tiny.config(start_from=str(path), data=dict(image_fit=fit))).data
        assert (data.image_fit, data.image_resize) == (fit, resize)
    assert "'pad', as data.image_fit says" in capsys.readouterr().err


def test_an_llm_of_another_size_than_the_folders_is_refused(made, mesh1):
    c = stages.with_start(tiny.config(start_from=str(made)))
    c.llm.depth = 1
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="differs .* in depth: "):
        load(c, made)


def test_what_is_no_model_folder_is_refused_with_the_way_to_one(tmp_path):
    with pytest.raises(ValueError, match="is no model folder.*vlm-jax convert --from="):
        stages.with_start(tiny.config(start_from=str(FROZEN / "clip_llama")))
    with pytest.raises(FileNotFoundError, match="start_from=.* holds no trained model: neither"):
        stages.with_start(tiny.config(start_from=str(tmp_path)))
