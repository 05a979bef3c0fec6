# SPDX-License-Identifier: Apache-2.0
"""Checkpoints frozen from transformers give its logits here; what is no checkpoint is refused."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import published_models as published
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from vlm_jax.__main__ import main
from vlm_jax.data import processor
from vlm_jax.data.example import Example
from vlm_jax.data.word_tokenizer import train_tokenizer
from vlm_jax.models import vlm
from vlm_jax.weights import folder, names, processors

FROZEN = Path(__file__).parent / "published_weights"
GATE = 1e-4  # absolute, float32, on logits of order one


def run(*argv):
    return main(["convert", *map(str, argv)])


def refused(capsys, *argv):
    """What `vlm-jax convert` says when it refuses; without --to it has an empty folder to use."""
    with tempfile.TemporaryDirectory() as empty:
        assert run(*argv, *(() if "--to" in argv else ("--to", f"{empty}/model"))) == 2
        assert not os.listdir(empty)
    return capsys.readouterr().err


@pytest.fixture
def copy(tmp_path):
    """A frozen case that may be broken."""
    return Path(shutil.copytree(FROZEN / "clip_llama", tmp_path / "copy"))


def case(name):
    """The batch of a frozen case, transformers' logits, visual tokens per image."""
    config = json.loads((FROZEN / name / "config.json").read_text())
    vision = SimpleNamespace(**config["vision_config"])
    batch, _, visual = published.batch(SimpleNamespace(**config | dict(vision_config=vision)))
    return batch, np.load(FROZEN / name / "logits.npz")["logits"], visual


@pytest.mark.parametrize("name", published.FROZEN)
def test_a_frozen_llava_gives_the_logits_of_transformers(name, tmp_path, mesh1):
    batch, expected, visual = case(name)
    assert run("--from", FROZEN / name, "--to", tmp_path / "ours") == 0
    with jax.set_mesh(mesh1):
        model = tiny.model_of(tmp_path / "ours")
        found = np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))
    assert published.difference(found, expected, batch, visual) < GATE


def test_eight_devices_hold_the_shards_of_what_one_holds(tmp_path, mesh1, mesh8):
    assert run("--from", FROZEN / "clip_full", "--to", tmp_path / "ours") == 0
    with jax.set_mesh(mesh1):
        one = tiny.model_of(tmp_path / "ours", dtype="bfloat16")
    with jax.set_mesh(mesh8):
        many = tiny.model_of(tmp_path / "ours", dtype="bfloat16")
        born = vlm.shapes(folder.read(tmp_path / "ours").size())
    for a, b, like in zip(*map(jax.tree.leaves, (one, many, born)), strict=True):
        assert a.dtype == "bfloat16" and b.sharding.spec == like.sharding.spec
        np.testing.assert_array_equal(np.asarray(a, "f4"), np.asarray(b, "f4"))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(many))


def all_tensors(path):
    """Every tensor of a folder, by the library of the format."""
    files = sorted(Path(path).glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


@pytest.mark.parametrize("name", published.FROZEN)
def test_there_and_back_every_tensor_is_bit_for_bit_what_it_was(name, tmp_path):
    assert run("--from", FROZEN / name, "--to", tmp_path / "ours") == 0
    assert run("--from", tmp_path / "ours", "--to-hf", "--to", tmp_path / "back") == 0
    assert run("--from", tmp_path / "back", "--to", tmp_path / "again") == 0
    before, after = all_tensors(FROZEN / name), all_tensors(tmp_path / "back")
    before = {names.canonical(n): x for n, x in before.items()}
    before = {n: x for n, x in before.items() if not names.matches(n, names.UNREAD)}
    after = {names.canonical(n): x for n, x in after.items()}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and tensor.tobytes() == after[key].tobytes(), key
    sections = [folder.read(tmp_path / path) for path in ("ours", "again")]
    assert sections[0].config().to_dict() == sections[1].config().to_dict()


def test_dtype_casts_every_tensor(tmp_path):
    assert run("--from", FROZEN / "clip_llama", "--to", tmp_path / "a", "--dtype=bfloat16") == 0
    exact = folder.read(tmp_path / "a").tensors
    assert {str(x.dtype) for x in exact.values()} == {"bfloat16"}
    name = "vision_tower.embeddings.class_embedding"
    before = load_file(FROZEN / "clip_llama/model.safetensors")[name]
    after = exact["vit.embeddings.class_embedding"].read()
    np.testing.assert_array_equal(after, before.astype(after.dtype))


def test_a_number_too_large_for_float16_is_an_error(copy, tmp_path, capsys):
    tensors = load_file(copy / "model.safetensors")
    tensors["vision_tower.embeddings.class_embedding"][3] = 1e6
    save_file(tensors, copy / "model.safetensors")
    said = refused(capsys, "--from", copy, "--to", tmp_path / "a", "--dtype=float16")
    assert "vit.embeddings.class_embedding holds numbers too large for float16" in said
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.tmp").exists()


def test_a_projector_of_stage_1_is_read_from_its_pickle_without_torch(tmp_path):
    assert run("--from", FROZEN / "siglip_llama3", "--projector", FROZEN / "mm_projector.bin",
               "--to", tmp_path / "a") == 0  # fmt: skip
    ours = folder.read(tmp_path / "a").tensors
    before = all_tensors(FROZEN / "siglip_llama3")
    for ours_name, name in (("0", "linear_1"), ("2", "linear_2")):
        np.testing.assert_array_equal(
            ours[f"compressor.{ours_name}.weight"].read(),
            before[f"multi_modal_projector.{name}.weight"],
        )


@pytest.mark.parametrize("kind, tokens, levels", [
    ("quecc", 9, (1, 3)), ("token_packer", 9, (1, 3)), ("pool", 9, (1, 3)), ("mqt", 9, (2,)),
    ("prumerge", 3, (2,)),
])  # fmt: skip
def test_a_new_compressor_is_born_and_its_model_keeps_our_layout(
    kind, tokens, levels, tmp_path, mesh1, capsys
):
    made = ["--from", FROZEN / "clip_llama", f"--compressor={kind}", f"--tokens={tokens}",
            f"--levels={','.join(map(str, levels))}", "--heads=2",
            "--replace-compressor"]  # fmt: skip
    assert run(*made, "--to", tmp_path / "a") == 0 and run(*made, "--to", tmp_path / "b") == 0
    assert run("--from", tmp_path / "a", "--to-hf", "--to", tmp_path / "c") == 0
    assert f"transformers has no compressor '{kind}'" in capsys.readouterr().err
    one, two, three = (all_tensors(tmp_path / path) for path in "abc")
    assert one.keys() == two.keys() == three.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)  # of the same seed
    with jax.set_mesh(mesh1):
        model = tiny.model_of(tmp_path / "c")
    assert model.compressor.tokens == tokens and model.vit.size.levels == levels


def test_a_run_of_train_becomes_a_model_folder_with_its_tokenizer(trained, tmp_path, mesh1):
    assert run("--from", trained, "--to", tmp_path / "a") == 0
    made = folder.read(tmp_path / "a")
    tokenizer = processor.load_tokenizer(tmp_path / "a/tokenizer")
    assert tokenizer("red").input_ids == processor.load_tokenizer(trained / "tokenizer")(
        "red").input_ids  # fmt: skip
    assert made.facts["template"] == "bare" and made.compressor["kind"] == "token_packer"
    with jax.set_mesh(mesh1):
        again = folder.tensors_of(tiny.model_of(tmp_path / "a"))
    assert all(np.array_equal(again[name], made.tensors[name].read()) for name in again)


# --- a tokenizer and its image token -------------------------------------------------------------


def with_tokenizer(path, extra=()):
    """A small tokenizer beside the weights of a folder."""
    tokenizer = train_tokenizer(["a b"], 67)  # as many as the model has embeddings for
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.save_pretrained(path)
    return tokenizer


def test_a_llava_hf_folder_needs_an_image_token_and_can_be_given_one(copy, tmp_path, capsys):
    from transformers import AutoConfig, AutoTokenizer

    size = len(with_tokenizer(copy))
    assert run("--from", copy, "--to", tmp_path / "a") == 0
    said = refused(capsys, "--from", tmp_path / "a", "--to-hf", "--to", tmp_path / "b")
    assert "has no image token <image>" in said and "--add-image-token" in said
    assert not (tmp_path / "b").exists()
    made = ("--from", tmp_path / "a", "--to-hf", "--to", tmp_path / "b", "--add-image-token")
    assert run(*made) == 0
    config = AutoConfig.from_pretrained(tmp_path / "b")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_index == size
    # The placeholder is looked up before the image is put there: it has a row.
    tensors = all_tensors(tmp_path / "b")
    grown = tensors["language_model.model.embed_tokens.weight"]
    assert len(grown) == config.text_config.vocab_size == 128 > size
    assert run("--from", tmp_path / "b", "--to", tmp_path / "c") == 0


def test_the_tokenizer_of_a_llava_hf_folder_names_its_image_token(copy, tmp_path):
    from transformers import AutoConfig

    tokenizer = with_tokenizer(copy, ["<image>"])
    assert run("--from", copy, "--to", tmp_path / "a") == 0
    assert run("--from", tmp_path / "a", "--to-hf", "--to", tmp_path / "b") == 0
    config = AutoConfig.from_pretrained(tmp_path / "b")
    assert config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")


def test_a_chat_template_beside_the_tokenizer_is_used_as_transformers_does(copy, tmp_path):
    """chat_template.json of a processor, as llava-hf publishes it: tokenizers do not read that."""
    with_tokenizer(copy, ["<image>"])
    path = copy / "chat_template.json"
    text = (
        "{% for m in messages %}{% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}"
    )
    path.write_text(json.dumps({"chat_template": text}))
    assert run("--from", copy, "--to", tmp_path / "a") == 0
    stored = folder.read(tmp_path / "a")
    assert stored.facts["template"] == "checkpoint"
    made = processors.processor_of(stored)
    row = made.tokens(Example("x", 0, (("a b", ""),), "f", "t"), answer=False)
    assert made.tokenizer.decode(row.ids[row.image_at :]) == "a b"
    (tmp_path / "a/tokenizer/chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match="chat_template.json holds no chat template"):
        processors.processor_of(stored)


# --- what is refused -----------------------------------------------------------------------------


def test_missing_and_surplus_tensors_are_listed_unless_allowed(copy, tmp_path, capsys, mesh1):
    tensors = load_file(copy / "model.safetensors")
    norm, extra = "language_model.model.norm.weight", "language_model.model.extra.weight"
    tensors[extra] = tensors.pop(norm)
    tensors["multi_modal_projector.linear_1.bias"] = np.zeros(3, "f4")
    save_file(tensors, copy / "model.safetensors")
    to = ("--from", copy, "--to", tmp_path / "a")
    said = refused(capsys, *to, "--allow-missing=llm.norm*")
    assert " missing: " not in said and "1 surplus: llm.extra.weight" in said
    said = refused(capsys, *to)
    assert "1 missing: llm.norm.weight; 1 surplus: llm.extra.weight; " in said
    assert "compressor.0.bias (3,) instead of (24,)" in said
    tensors["multi_modal_projector.linear_1.bias"] = np.zeros(24, "f4")
    save_file(tensors, copy / "model.safetensors")
    assert run(*to, "--allow-missing=llm.norm.weight", "--allow-surplus=*.extra.*") == 0
    assert "1 tensors fresh: llm.norm.weight" in capsys.readouterr().err
    np.testing.assert_array_equal(folder.read(tmp_path / "a").tensors["llm.norm.weight"].read(), 1)


def edited(path, **changes):
    """Changes a config.json; fields of a part are given as text_config__FIELD."""
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        *parts, last = name.split("__")
        of = config
        for part in parts:
            of = of[part]
        of[last] = value
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), r"architecture 'gpt2' is not supported; .*llama, qwen2, qwen3"),
    (dict(text_config__model_type="gemma"), "llava of clip_vision_model and gemma is not"),
    (dict(text_config__rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)),
     "rope_type='yarn' is not supported; supported: default, linear, llama3"),
    (dict(text_config__hidden_act="gelu"), "hidden_act='gelu' is not supported; supported: silu"),
    (dict(text_config__attention_bias=True), "attention_bias=True is not supported"),
    (dict(projector_hidden_act="relu"), "projector_hidden_act='relu'"),
    (dict(vision_feature_layer=[-2, -3]), "vision_feature_layer=.* supported: int"),
    (dict(vision_feature_layer=0), "vision_feature_layer=0: from 1 to 3"),
    (dict(vision_feature_select_strategy="cls"), "vision_feature_select_strategy.*default.*full"),
])  # fmt: skip
def test_what_our_models_are_not_is_said_with_what_they_are(changes, words, copy, tmp_path, capsys):
    import re

    edited(copy, **changes)
    assert re.search(words, refused(capsys, "--from", copy, "--to", tmp_path / "a"))


def test_a_tower_without_a_class_token_must_not_lose_its_first_patch(tmp_path, capsys):
    path = Path(shutil.copytree(FROZEN / "siglip_llama3", tmp_path / "copy"))
    edited(path, vision_feature_select_strategy="default")
    said = refused(capsys, "--from", path, "--to", tmp_path / "a")
    assert "a patch of the image would be lost; supported is full" in said


def test_folders_that_are_no_whole_checkpoint_are_refused(copy, tmp_path, capsys):
    to = ("--to", tmp_path / "a")
    assert "there is no folder" in refused(capsys, "--from", tmp_path / "none", *to)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(capsys, "--from", tmp_path / "empty", *to)
    (copy / "model.safetensors").rename(copy / "weights.txt")
    said = refused(capsys, "--from", copy, *to)
    assert "is not a checkpoint" in said and "only config.json" in said and "weights.txt" in said
    sharded = Path(shutil.copytree(FROZEN / "siglip_llama3", tmp_path / "sharded"))
    (sharded / "model-00002-of-00003.safetensors").unlink()
    said = refused(capsys, "--from", sharded, *to)
    assert "is incomplete" in said and "model-00002-of-00003.safetensors" in said
    whole = (FROZEN / "siglip_llama3/model-00002-of-00003.safetensors").read_bytes()
    (sharded / "model-00002-of-00003.safetensors").write_bytes(whole[:-1])
    assert "model-00002-of-00003.safetensors" in refused(capsys, "--from", sharded, *to)
    assert not (tmp_path / "a").exists()
    (copy / "config.json").write_text("{")
    assert "is not JSON" in refused(capsys, "--from", copy, *to)


def test_a_tower_alone_and_a_model_in_its_first_layout_say_what_else_to_give(
    copy, tmp_path, capsys
):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config["vision_config"]))
    said = refused(capsys, "--from", copy, "--to", tmp_path / "a")
    assert "holds a tower alone: give --vision=DIR and --llm=DIR" in said
    flat = config["text_config"] | dict(mm_vision_tower="openai/clip-vit-large-patch14-336",
                                        mm_projector_type="mlp2x_gelu")  # fmt: skip
    (copy / "config.json").write_text(json.dumps(flat))
    said = refused(capsys, "--from", copy, "--to", tmp_path / "a")
    assert "--vision=DIR, a folder with openai/clip-vit-large-patch14-336" in said


def test_quantized_weights_are_refused(copy, tmp_path, capsys):
    tensors = load_file(copy / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    tensors[name] = tensors[name].astype("i1")
    save_file(tensors, copy / "model.safetensors")
    said = refused(capsys, "--from", copy, "--to", tmp_path / "a")
    assert "compressor.0.weight has dtype int8" in said and "F32, F16, BF16" in said


def test_a_full_disk_leaves_nothing_that_looks_like_a_model(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said = refused(capsys, "--from", FROZEN / "clip_llama", "--to", tmp_path / "a")
    assert "no space is left for" in said and "make room" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert run("--from", FROZEN / "clip_llama", "--to", tmp_path / "model") == 0
    monkeypatch.setattr(os, "fsync", full)
    back = ("--from", tmp_path / "model", "--to-hf", "--to", tmp_path / "a")
    assert "no space is left for" in refused(capsys, *back)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    few = SimpleNamespace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    assert "needs about" in refused(capsys, "--from", FROZEN / "clip_llama", "--to", tmp_path / "a")


def test_a_conversion_killed_half_way_can_be_repeated_and_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp/model.safetensors").write_bytes(b"half")
    to = ("--from", FROZEN / "clip_llama", "--to", tmp_path / "a")
    assert run(*to) == 0
    assert "is there already" in refused(capsys, *to)


@pytest.mark.parametrize("flags, words", [
    ([], "give --from=DIR, or --vision=DIR and --llm=DIR"),
    (["--from=.", "--llm=y"], "leave --llm out"),
    (["--from=.", "--compressor=quecc", "--replace-compressor"], "needs --tokens=V"),
    (["--from=.", "--dtype=int8"], "choose one of float32, float16, bfloat16"),
    (["--from=.", "--compressor=quecc", "--tokens=1", "--levels=a"], "12,16,22,23"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, words, capsys):
    assert words in refused(capsys, *flags)


@pytest.mark.parametrize("name, kind, fit, visual", [
    ("clip_llama", "CLIPImageProcessor", "crop", 9),
    ("clip_llama", "LlavaImageProcessor", "pad", 9),
    ("clip_full", "CLIPImageProcessor", "crop", 10),
    ("siglip_llama3", "SiglipImageProcessor", "stretch", 9),
])  # fmt: skip
def test_transformers_prepares_an_exported_model_as_its_configuration_says(
    name, kind, fit, visual, tmp_path
):
    from PIL import Image
    from transformers import AutoProcessor

    path = Path(shutil.copytree(FROZEN / name, tmp_path / "copy"))
    with_tokenizer(path, ["<image>"])
    side = json.loads((path / "config.json").read_text())["vision_config"]["image_size"]
    (path / "preprocessor_config.json").write_text(json.dumps(
        dict(do_pad=fit == "pad", size=side, crop_size=side, image_mean=[0.1, 0.2, 0.3],
             image_std=[0.4, 0.5, 0.6])
        if fit != "stretch" else
        dict(image_processor_type=kind, size=dict(height=side, width=side))))  # fmt: skip
    assert run("--from", path, "--to", tmp_path / "a") == 0
    facts = folder.read(tmp_path / "a").facts["image"]
    mean = [0.5] * 3 if fit == "stretch" else [0.1, 0.2, 0.3]
    assert (facts["fit"], facts["mean"]) == (fit, mean)
    assert run("--from", tmp_path / "a", "--to-hf", "--to", tmp_path / "b") == 0
    said = json.loads((tmp_path / "b/preprocessor_config.json").read_text())
    assert said["image_processor_type"] == kind and said["image_mean"] == mean
    made = AutoProcessor.from_pretrained(tmp_path / "b", backend="pil")
    out = made(images=Image.new("RGB", (60, 40), "white"), text="<image>a b", return_tensors="np")
    assert (out["input_ids"] == made.tokenizer.convert_tokens_to_ids("<image>")).sum() == visual
    assert out["pixel_values"].shape == (1, 3, side, side)
    center = (1 - np.array(mean)) / np.array(facts["std"])
    np.testing.assert_allclose(out["pixel_values"][0, :, side // 2, side // 2], center, atol=1e-5)
