# SPDX-License-Identifier: Apache-2.0
"""Whole models that select patches: what the encoder gives them, answers at any V, conversion."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import literal_models
import literal_selection
import made_clip
import numpy as np
import pytest
import tiny
import whole_models
from PIL import Image
from test_convert import refused, run
from test_generate import made

import vlm_jax
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.hashing import image_ids, joined
from vlm_jax.compressors.selection import Selection
from vlm_jax.evals.task import Question
from vlm_jax.serving import asking
from vlm_jax.weights import folder

SELECTIONS = sorted(kind for kind, of in COMPRESSORS.items() if issubclass(of, Selection))
FROZEN = Path(__file__).parent / "published_weights"


# --- The encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
def test_attention_and_keys_are_those_of_the_last_levels_own_block(devices, request):
    c = tiny.get_config()
    pixels = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype("f4")
    with jax.set_mesh(request.getfixturevalue(f"mesh{devices}")):
        vit = tiny.roughened(tiny.created(c).vit)

        @jax.jit
        def read(vit, x):
            return vit(x), vit(x, reads="own_attention"), vit(x, reads="own_keys")

        plain, seen, whole = map(np.asarray, read(vit, tiny.placed(pixels)))
    np.testing.assert_allclose(seen[..., :-1], plain, atol=1e-5)
    np.testing.assert_allclose(whole[:, 1:, : plain.shape[2]], plain, atol=1e-5)
    for k in range(2):
        attention, keys = literal_models.own_block(literal_models.of(vit), pixels[k], c)
        np.testing.assert_allclose(seen[k, :, -1], attention, atol=2e-5)
        np.testing.assert_allclose(whole[k, 1:, -1], attention, atol=2e-5)
        means = keys.reshape(len(keys), c.vit.heads, -1).mean(1)
        np.testing.assert_allclose(whole[k, :, plain.shape[2] : -1], means, atol=2e-5)


def test_numbers_and_sizes_of_images_go_with_their_levels(mesh1):
    c = tiny.get_config()
    pixels = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype("f4")
    sizes = np.array([[640, 480], [3, 9], [1, 1]], np.int32)
    with jax.set_mesh(mesh1):
        vit = tiny.created(c).vit
        read = jax.jit(lambda v, x, s: (v(x, reads="image_id"), v(x, reads="image_size", sizes=s)))
        numbers, shown = map(np.asarray, read(vit, pixels, sizes))
    found = joined(jnp.array(numbers[:, 5, -2:]))
    assert found.tolist() == image_ids(jnp.array(pixels)).tolist()
    assert shown[:, 7, -2:].tolist() == sizes.tolist()


@pytest.mark.parametrize("kind", ["visionzip", "vispruner"])
def test_an_encoder_without_a_class_token_is_refused(kind):
    c = tiny.config(vit=dict(class_token=False), compressor=dict(kind=kind))
    with pytest.raises(ValueError, match="asks the class token.*vit.class_token=True.*CLIP"):
        tiny.size(c)


def test_more_tokens_than_patches_are_refused():
    with pytest.raises(ValueError, match="cannot make 17 visual tokens.*4x4.*any of 1 to 16"):
        tiny.size(tiny.config(compressor=dict(kind="divprune", tokens=17)))


# --- Answers --------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        "mmtok",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("divprune", "visionzip", "random")
        ),
    ],
)
def asked(request, trained, tmp_path_factory, mesh1):
    """A model folder of one method, and the model."""
    path = tmp_path_factory.mktemp("selected") / "model"
    made(path, trained, compressor=dict(kind=request.param, tokens=4))
    return path, vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)


def test_one_model_answers_at_any_number_of_tokens(asked):
    _, model = asked
    draw = np.random.default_rng(1)
    images = [draw.integers(0, 256, (40, 20, 3)).astype(np.uint8) for _ in range(2)]
    prompts = ["what is red?", "is there a star?"]
    for tokens in (1, 6, 16):
        together = model.generate(images, prompts, visual_tokens=tokens, max_new_tokens=3)
        assert [a.visual_tokens for a in together] == [tokens] * 2
        apart = [
            model.generate(i, p, visual_tokens=tokens, max_new_tokens=3)[0]
            for i, p in zip(images, prompts, strict=True)
        ]
        assert [a.ids for a in apart] == [a.ids for a in together]
    with pytest.raises(ValueError, match="cannot make 17 visual tokens"):
        model.generate(images[0], prompts[0], visual_tokens=17)
    (blind,) = model.generate(None, "what is red?", max_new_tokens=2)
    assert blind.visual_tokens == 0


def test_a_selection_of_all_patches_is_the_model_without_compression(trained, tmp_path, mesh1):
    made(tmp_path / "a", trained, compressor=dict(kind="none", tokens=16))
    assert run("--from", tmp_path / "a", "--compressor=divprune", "--tokens=16", "--to",
               tmp_path / "b") == 0  # fmt: skip
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    ids = [
        vlm_jax.VLM.from_checkpoint(tmp_path / name, mesh=mesh1)
        .generate(image, "what is red?", max_new_tokens=4)[0]
        .ids
        for name in "ab"
    ]
    assert ids[0] == ids[1]


# --- Conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(set(SELECTIONS) - {"cdpruner"}))
def test_a_published_llava_becomes_a_selection_by_its_name_alone(kind, tmp_path, mesh1):
    base = ("--from", FROZEN / "clip_llama")
    assert run(*base, "--to", tmp_path / "a") == 0
    assert run(*base, f"--compressor={kind}", "--tokens=3", "--to", tmp_path / "b") == 0
    a, b = folder.read(tmp_path / "a"), folder.read(tmp_path / "b")
    assert (b.compressor["kind"], b.compressor["tokens"]) == (kind, 3)
    with jax.set_mesh(mesh1):
        assert a.tensors.keys() == b.tensors.keys() and b.check() == ([], [])
    assert all(np.array_equal(a.tensors[n].read(), b.tensors[n].read()) for n in a.tensors)
    # A folder of ours may change from one to another.
    assert run("--from", tmp_path / "b", "--compressor=none", "--to", tmp_path / "c") == 0
    assert folder.read(tmp_path / "c").compressor == a.compressor


def test_cdpruner_takes_the_text_tower_of_a_whole_clip(tmp_path, capsys, trained, mesh1):
    """In front of a model that was trained here: its tower is not a CLIP's, but as wide."""
    made(tmp_path / "a", trained, compressor=dict(kind="none", tokens=16))
    clip = made_clip.clip(tmp_path / "clip", width=16, side=4, blocks=3)
    base = ("--from", tmp_path / "a", "--compressor=cdpruner", "--tokens=5")
    said = refused(capsys, *base, "--to", tmp_path / "b")
    assert "reads the question with CLIP's text tower: give --text-tower=DIR" in said
    assert run(*base, "--text-tower", clip, "--to", tmp_path / "b") == 0
    stored = folder.read(tmp_path / "b")
    assert stored.compressor["text_width"] == made_clip.WIDTH
    model = vlm_jax.VLM.from_checkpoint(tmp_path / "b", mesh=mesh1)
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    request = model.request(image, "a red cat")
    (words,) = request.questions
    tensors = {
        name.removeprefix("compressor."): x.read().astype("f8")
        for name, x in stored.tensors.items()
        if name.startswith("compressor.")
    }
    with jax.set_mesh(mesh1):
        whole = tiny.model_of(tmp_path / "b")
        levels = jax.jit(lambda m, x: m.encode(x))(whole, request.pixels[0][None])
        batch = tiny.placed(dict(
            pixels=request.pixels[0][None], ids=np.array([request.ids], np.int32),
            image_at=np.array([request.image_at], np.int32),
            question=np.array([words], np.int32), question_length=np.array([len(words)], np.int32),
        ))  # fmt: skip
        ours = jax.jit(lambda m, b: m.visual_tokens(b, m.question(b)).tokens)(whole, batch)
    theirs = literal_selection.compress(
        stored.size().compressor, tensors, np.asarray(levels[0], "f8"), words, width=16
    )
    np.testing.assert_allclose(ours[0], theirs, atol=1e-4)
    assert model.generate(image, "a red cat", max_new_tokens=2)[0].visual_tokens == 5
    # Without it again: what only CLIP has goes.
    assert run("--from", tmp_path / "b", "--compressor=uniform", "--tokens=2", "--to",
               tmp_path / "c") == 0  # fmt: skip
    with jax.set_mesh(mesh1):
        assert folder.read(tmp_path / "c").check() == ([], [])


def test_a_clip_without_text_and_a_flag_without_use_are_refused(tmp_path, capsys):
    base = ("--from", FROZEN / "clip_llama", "--tokens=3", "--to", tmp_path / "b")
    tower = whole_models.tower(tmp_path / "tower", width=16, side=3, blocks=3)
    said = refused(capsys, *base, "--compressor=cdpruner", "--text-tower", tower)
    assert "model_type='clip_vision_model' is not supported; supported: clip" in said
    said = refused(capsys, *base, "--compressor=mmtok", "--text-tower", tower)
    assert "--text-tower is for --compressor=cdpruner" in said


def test_a_model_that_was_trained_for_another_method_is_not_given_a_selection(
    trained, tmp_path, capsys
):
    for source in (trained, made(tmp_path / "a", trained)):
        flags = ("--compressor=mmtok", "--tokens=4", "--to", tmp_path / "b")
        said = refused(capsys, "--from", source, *flags)
        assert "already: it is converted as it is, without --compressor=mmtok --tokens=4" in said


def test_training_a_random_text_tower_is_refused(mesh1):
    from vlm_jax.training import stages

    c = tiny.config(compressor=dict(kind="cdpruner"))
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="text tower, which would be random"):
        stages.check(tiny.recipe(c))


def test_a_folder_says_which_selection_it_holds(asked):
    path, model = asked
    about = json.loads((path / "config.json").read_text())["compressor"]
    assert COMPRESSORS[about["kind"]].selects and model.compressor.buckets == tuple(range(1, 17))


def test_questions_of_a_benchmark_bring_the_size_of_their_image(asked, tmp_path):
    _, model = asked
    image = np.random.default_rng(1).integers(0, 256, (10, 30, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "wide.png")
    question = Question("q", "what is red?", images=(tmp_path / "wide.png",))
    keys = []
    for view in ("", "blind"):
        asker = asking.Asker(model, asking.Way("same", 4, view, 3))
        row = asker.row(0, question, "what is red?")
        assert row.error == "" and row.request.sizes == [(30, 10) if view == "" else (1, 1)]
        keys.append(row.key)
    assert keys[0] != keys[1]
