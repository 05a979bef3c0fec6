# SPDX-License-Identifier: Apache-2.0
"""Models that prune, from a folder to an answer and through the verbs that set a pruning."""

import json
import shutil

import jax
import literal_models
import literal_pruning
import numpy as np
import pytest
import tiny
from test_generate import PROMPTS, made

import vlm_jax
from vlm_jax import mesh as meshes
from vlm_jax.__main__ import main
from vlm_jax.grids import details
from vlm_jax.models import vlm
from vlm_jax.serving.requests import batch_of
from vlm_jax.training import fields
from vlm_jax.training.workdir import digest, flat, of_json
from vlm_jax.weights import folder

NEW = 4
FASTV = dict(kind="fastv", layers=(1,), tokens=(4,))
PYRAMID = dict(kind="pyramiddrop", layers=(1, 2), tokens=(6, 2))


def config(pruning, **changes):
    whole = dict(compressor=dict(kind="none", tokens=16), llm=dict(depth=3)) | changes
    return tiny.config(pruning=pruning, **whole)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (32, 20 + 9 * k, 3)).astype(np.uint8) for k in range(3)]


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """A model folder without pruning."""
    return made(tmp_path_factory.mktemp("plain") / "m", trained, **config({}).to_dict())


@pytest.fixture(scope="module")
def pyramid(plain, mesh1):
    """The same model, pruned."""
    text = "pyramiddrop:layers=1,2:tokens=6,2"
    return vlm_jax.VLM.from_checkpoint(plain, mesh=mesh1, pruning=text)


def test_the_tokens_are_those_of_a_model_that_hides_the_others(plain, pyramid, images, mesh1):
    """With the beginning of the prompt read before, in company, and without an image too."""
    pictures, prompts = [*images, None], PROMPTS[:4]
    together = pyramid.generate(pictures, prompts, max_new_tokens=NEW)
    assert [a.visual_tokens for a in together] == [16, 16, 16, 0]
    with jax.set_mesh(mesh1):
        model, size = tiny.model_of(plain), folder.read(plain).size()
        weights = literal_models.of(model.llm)
        assemble = jax.jit(lambda m, b: m.assemble(b).x)
        for image, prompt, answer in zip(pictures, prompts, together, strict=True):
            request = pyramid.request(image, prompt)
            batch = batch_of([request], model.compressor, skip=0, shards=1, width=pyramid.width,
                             pad=0)  # fmt: skip
            batch = jax.device_put(batch, meshes.sharding(mesh1, "batch"))
            slots = 16 if request.places else 0
            prompt = len(request.ids) + slots
            x = np.asarray(assemble(model, batch), np.float64)[0, :prompt]
            x = np.concatenate([x, weights["embedding"][answer.ids[:-1]]])
            hidden, _ = literal_pruning.llm(
                weights, x, config(PYRAMID), size.pruned(config(PYRAMID).pruning).pruning,
                prompt, request.image_at or 0, slots,
            )  # fmt: skip
            scores = literal_models.unembed(weights, hidden[prompt - 1 :])
            assert scores.argmax(1).tolist() == answer.ids


def test_a_request_gets_the_same_tokens_alone_in_company_and_on_eight_devices(
    plain, pyramid, images, mesh8
):
    together = pyramid.generate(images, PROMPTS[:3], max_new_tokens=NEW)
    many = vlm_jax.VLM.from_checkpoint(
        plain, mesh=mesh8, pruning="pyramiddrop:layers=1,2:tokens=6,2"
    )
    spread = many.generate(images, PROMPTS[:3], max_new_tokens=NEW)
    for image, prompt, a, b in zip(images, PROMPTS[:3], together, spread, strict=True):
        assert a.ids == b.ids == pyramid.generate(image, prompt, max_new_tokens=NEW)[0].ids
    with pytest.raises(ValueError, match="one image.*pruning.kind='none'"):
        pyramid.generate([images[:2]], ["which?"])


def test_a_question_before_the_image_and_any_number_of_tokens(trained, tmp_path, images, mesh1):
    reader = dict(kind="quecc", tokens=4, query="prefix")
    data = dict(template="question_first", question_length=16)
    kept = dict(kind="fastv", layers=(1,), tokens=(2,))
    asked = config(kept, compressor=reader, data=data).to_dict()
    model = vlm_jax.VLM.from_checkpoint(made(tmp_path / "a", trained, **asked), mesh=mesh1)
    together = model.generate(images, PROMPTS[:3], max_new_tokens=NEW)
    for image, prompt, answer in zip(images, PROMPTS[:3], together, strict=True):
        assert model.generate(image, prompt, max_new_tokens=NEW)[0].ids == answer.ids
    any_v = config(kept, compressor=dict(kind="mqt", tokens=9, heads=2)).to_dict()
    made(tmp_path / "b", trained, **any_v)
    pruned = vlm_jax.VLM.from_checkpoint(tmp_path / "b", mesh=mesh1)
    whole = vlm_jax.VLM.from_checkpoint(tmp_path / "b", mesh=mesh1, pruning="none")
    asks = dict(max_new_tokens=NEW, visual_tokens=2)  # of which nothing is left out
    both = [m.generate(images[0], PROMPTS[0], **asks)[0] for m in (pruned, whole)]
    assert both[0].ids == both[1].ids


def test_convert_sets_a_pruning_and_other_formats_refuse_it(plain, tmp_path, capsys, mesh1):
    flags = [f"--from={plain}", "--pruning=fastv:layers=1:tokens=4"]
    assert main(["convert", *flags, f"--to={tmp_path}/a"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pruning"] == "fastv"
    assert folder.read(tmp_path / "a").pruning == dict(
        kind="fastv", layers=[1], tokens=[4], weight=0.5, dropped=0.0
    )
    section = folder.read(tmp_path / "a").size().pruning.section()
    assert section == dict(FASTV, weight=0.5, dropped=0.0)
    assert main(["convert", *flags, "--to-hf", f"--to={tmp_path}/b"]) == 0
    assert "transformers does not prune by 'fastv'" in capsys.readouterr().err
    assert main(["convert", f"--from={tmp_path}/a", "--pruning=none", f"--to={tmp_path}/c"]) == 0
    assert folder.read(tmp_path / "c").size() == folder.read(plain).size()
    assert main(["convert", f"--from={plain}", "--pruning=fastv", f"--to={tmp_path}/d"]) == 2
    assert "pruning.tokens=()" in capsys.readouterr().err and not (tmp_path / "d").exists()
    about = tmp_path / "a/config.json"
    written = json.loads(about.read_text())
    for wrong, words in ((dict(kind="fast"), "pruning.kind='fast'"), (dict(tokens="4"), "a list")):
        about.write_text(json.dumps(written | dict(pruning=written["pruning"] | wrong)))
        with pytest.raises(ValueError, match=words):
            folder.read(tmp_path / "a")


def test_an_evaluation_of_a_trained_model_may_prune(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    flags = ["--config.pruning.kind=fastv", "--config.pruning.layers=(1,)"]
    command = ["evaluate", f"--workdir={tmp_path}/run", *flags]
    assert main([*command, "--config.pruning.tokens=(2,)"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (scores,) = (tmp_path / "run").glob("scores-*.json")
    assert scores.name == "scores-fastv-after1-keep2.json"
    assert printed["settings"]["pruning.tokens"] == [2]
    assert main([*command, "--config.pruning.tokens=(9,)"]) == 2
    assert "reads 4 visual tokens" in capsys.readouterr().err


def test_a_pruning_is_no_part_of_a_training_and_older_runs_have_none():
    then, now = flat(config({})), flat(config(FASTV))
    for name in fields.differing(then, now):
        assert fields.change_of(name, then, now) is fields.Change.ANSWERS
    older = config({}).to_dict()
    del older["pruning"]
    assert of_json(older).pruning.kind == "none"
    assert digest(of_json(older)) == digest(config({})) != digest(config(FASTV))


def test_a_row_has_the_mean_over_layers_and_names_the_pruning(mesh1):
    c = config(FASTV)
    size = tiny.size(c)
    assert details.method_of(size) == dict(compressor="none", query="none", variant="fastv after 1")
    with jax.set_mesh(mesh1):
        model = vlm.shapes(size)
        whole = vlm.shapes(tiny.size(config({})))
    assert details.tokens_read(model, np.zeros(0)) == (16 + 4 + 4) / 3
    assert details.tokens_read(whole, np.zeros(0)) == 16
