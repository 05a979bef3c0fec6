# SPDX-License-Identifier: Apache-2.0
"""A layout is what its files say, or refused: tied layers, tiles, windows, families."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import whole_models
from safetensors.numpy import load_file, save_file
from test_convert import edited, refused, run
from whole_models import FLAT, edit

from vlm_jax.weights import architectures, folder, sources
from vlm_jax.weights.methods import Wish
from vlm_jax.weights.stored import read_safetensors

FROZEN = Path(__file__).parent / "published_weights"
HEAD, WORDS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture
def copy(tmp_path):
    """A frozen LLaVA of CLIP and Llama that may be changed."""
    return Path(shutil.copytree(FROZEN / "clip_llama", tmp_path / "copy"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LLaVA in its first layout, without compression: folders `model` and `tower`."""
    path = tmp_path_factory.mktemp("plain")
    fields, tensors = whole_models.llm(24)
    draw = np.random.default_rng(0)
    for layer, inner in ((0, 16), (2, 24)):
        tensors[f"model.mm_projector.{layer}.weight"] = draw.normal(size=(24, inner))
        tensors[f"model.mm_projector.{layer}.bias"] = draw.normal(size=24)
    whole_models.tower(path / "tower", width=16, side=4, blocks=3)
    whole_models.save(path / "model", fields | FLAT | dict(mm_hidden_size=16), tensors)
    return path


@pytest.fixture
def flat(plain, tmp_path):
    """The same, which may be changed."""
    return Path(shutil.copytree(plain, tmp_path / "flat"))


def given(path):
    return ["--from", path / "model", "--vision", path / "tower"]


# --- a stored output layer -----------------------------------------------------------------------


@pytest.mark.parametrize("outer, inner, head, tied", [
    (True, True, "equal", True), (True, False, "equal", True), (False, True, "equal", True),
    (True, True, "differs", False), (True, False, "differs", False), (None, True, "differs", False),
    (False, True, "missing", True), (True, None, "missing", True), (False, False, "equal", False),
])  # fmt: skip
def test_a_stored_output_layer_is_compared_where_a_level_says_tied(
    outer, inner, head, tied, copy, tmp_path, capsys
):
    """As transformers loads it, at whichever level the configuration says it (5.24)."""
    config = json.loads((copy / "config.json").read_text())
    for level, said in ((config, outer), (config["text_config"], inner)):
        level.pop("tie_word_embeddings")
        level |= {} if said is None else dict(tie_word_embeddings=said)
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    stored = tensors.pop(HEAD)
    if head != "missing":
        tensors[HEAD] = tensors[WORDS] if head == "equal" else stored
    save_file(tensors, copy / "model.safetensors")
    assert run("--from", copy, "--to", tmp_path / "a") == 0
    made = folder.read(tmp_path / "a")
    assert made.llm["tied_embeddings"] is tied
    assert ("llm.lm_head.weight" in made.tensors) is not tied
    if not tied:
        np.testing.assert_array_equal(made.tensors["llm.lm_head.weight"].read(), tensors[HEAD])
    told = "untied" in capsys.readouterr().err
    assert told == ("untied" in made.notes) == (head == "differs")


def test_an_output_layer_that_no_level_ties_must_be_there(copy, tmp_path, capsys):
    tensors = load_file(copy / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, copy / "model.safetensors")
    said = refused(capsys, "--from", copy, "--to", tmp_path / "a")
    assert f"{copy}: the tensors do not make this model: 1 missing: llm.lm_head.weight" in said


def test_an_output_layer_is_compared_across_types_and_shards(copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    half = tensors[WORDS].astype("f2")
    tensors[WORDS] = half.astype("f4")
    del tensors[HEAD]
    save_file(tensors, copy / "model-00001-of-00002.safetensors")
    save_file({HEAD: half}, copy / "model-00002-of-00002.safetensors")
    (copy / "model.safetensors").unlink()
    edited(copy, text_config__tie_word_embeddings=True)
    assert run("--from", copy, "--to", tmp_path / "a") == 0
    assert folder.read(tmp_path / "a").llm["tied_embeddings"]


def test_both_levels_of_an_export_say_the_same_of_the_output_layer(copy, tmp_path):
    edited(copy, tie_word_embeddings=True)
    assert run("--from", copy, "--to", tmp_path / "a", "--to-hf") == 0
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert HEAD in read_safetensors(tmp_path / "a/model.safetensors")


# --- another layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(image_aspect_ratio="anyres"), "image_aspect_ratio='anyres'"),
    (dict(image_aspect_ratio="anyres_max_9"), "image_aspect_ratio='anyres_max_9'"),
    (dict(image_aspect_ratio="slice"), "image_aspect_ratio='slice'"),
    (dict(mm_patch_merge_type="spatial_unpad"), "mm_patch_merge_type='spatial_unpad'"),
    (dict(image_grid_pinpoints=[[336, 672]]), "image_grid_pinpoints=[[336, 672]]"),
    (dict(mm_resampler_type="spatial_pool"), "mm_resampler_type='spatial_pool'"),
    (dict(s2=True), "s2=True"),
    (dict(model_type="llava_gemma"), "model_type='llava_gemma'"),
    (dict(model_type="llava_mpt"), "model_type='llava_mpt'"),
    (dict(model_type="llava_qwen_moe"), "model_type='llava_qwen_moe'"),
    (dict(model_type=["llava_llama"]), "model_type=['llava_llama']"),
    (dict(architectures=["LlavaGemmaForCausalLM"]), "architectures=['LlavaGemmaForCausalLM']"),
    (dict(architectures=["LlavaMistralForCausalLM"]), "name different language models"),
    (dict(model_type=None, architectures=None), "model_type=null is not supported"),
    (dict(mm_use_im_start_end=True), "mm_use_im_start_end=True: image start, end and patch"),
], ids=str)  # fmt: skip
def test_a_flat_llava_of_another_kind_is_refused_by_name(changes, words, flat, tmp_path, capsys):
    edit(flat / "model", **changes)
    said = refused(capsys, *given(flat), "--to", tmp_path / "a")
    assert words in said and "config.json" in said and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "llava_next_video"])
def test_a_llava_that_cuts_images_into_tiles_is_refused_by_name(kind, copy, capsys):
    edited(copy, model_type=kind)
    said = refused(capsys, "--from", copy)
    assert f"model_type='{kind}'" in said and "tiles" in said


def test_the_tensor_that_ends_a_row_of_tiles_gives_them_away(flat, copy, capsys):
    for path, name in ((flat / "model", "model.image_newline"), (copy, "image_newline")):
        tensors = load_file(path / "model.safetensors")
        save_file(tensors | {name: np.zeros(24, "f4")}, path / "model.safetensors")
    assert "image_newline: LLaVA-1.6" in refused(capsys, *given(flat))
    assert "image_newline: LLaVA-1.6" in refused(capsys, "--from", copy)


@pytest.mark.parametrize("fields", [
    dict(model_type="llava", architectures=["LlavaLlamaForCausalLM"]),
    dict(model_type="llama", architectures=["LlamaForCausalLM"]),
    dict(model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], sliding_window=512),
    dict(model_type=None),
], ids=str)  # fmt: skip
def test_a_flat_llava_of_llama_by_any_name_is_the_same_model(fields, plain, flat):
    one, other = (given(path)[1::2] for path in (plain, flat))
    edited(other[0], **fields)
    assert architectures.read(other[0]) == architectures.read(one[0])
    one, other = (sources.llava(m, vision=t, wish=Wish()) for m, t in (one, other))
    assert one.facts == other.facts


# --- Mistral -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 64, 100])
def test_a_mistral_that_sees_whole_rows_is_exactly_llama(window, copy, tmp_path):
    """Its tensors have Llama's names; tests/test_torch_convert.py holds the logits."""
    assert run("--from", copy, "--to", tmp_path / "llama") == 0
    edited(copy, text_config__model_type="mistral", text_config__sliding_window=window)
    assert run("--from", copy, "--to", tmp_path / "mistral") == 0
    one, other = (folder.read(tmp_path / name) for name in ("llama", "mistral"))
    assert one.llm == other.llm and one.tensors.keys() == other.tensors.keys()
    assert run("--from", tmp_path / "mistral", "--to-hf", "--to", tmp_path / "back") == 0
    text = json.loads((tmp_path / "back/config.json").read_text())["text_config"]
    assert text["model_type"] == "llama"


def test_a_mistral_alone_is_a_language_model(copy):
    text = json.loads((copy / "config.json").read_text())["text_config"]
    llama = architectures.describe(text)
    mistral = text | dict(model_type="mistral", sliding_window=None)
    assert architectures.describe(mistral) == llama


@pytest.mark.parametrize("changes", [
    dict(model_type="mistral", sliding_window=63),
    dict(model_type="mistral"),  # transformers' class has a window of 4096 of 131072 tokens
    dict(model_type="qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=8),
    dict(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]),
    dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8),
], ids=str)  # fmt: skip
def test_a_window_over_less_than_a_row_is_refused_by_name(changes, copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    if len(changes) == 1:
        del config["text_config"]["max_position_embeddings"]
    config["text_config"] |= changes
    (copy / "config.json").write_text(json.dumps(config))
    said = refused(capsys, "--from", copy)
    assert "sliding_window=" in said and "max_position_embeddings" in said


# --- what changes a computation ------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_type='dynamic'"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope_type='yarn'"),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2.0, short_factor=[1.0] * 3,
                            long_factor=[1.0] * 3)), "rope_type='longrope'"),
    (dict(rope_scaling=dict(factor=2.0)), "rope_parameters has factor, and no rope_type"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(hidden_act="gelu_pytorch_tanh"), "hidden_act='gelu_pytorch_tanh'"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    (dict(head_dim=7), "got `head_dim`=7"),
    (dict(num_key_value_heads=3), "num_key_value_heads=3 does not divide"),
], ids=str)  # fmt: skip
def test_what_a_language_model_computes_otherwise_is_refused_by_name(changes, words, copy, capsys):
    edited(copy, **{f"text_config__{name}": value for name, value in changes.items()})
    said = refused(capsys, "--from", copy)
    assert words in said and "config.json" in said


def test_both_ways_to_write_rotary_positions_mean_the_same(copy):
    text = json.loads((copy / "config.json").read_text())["text_config"]
    del text["rope_parameters"]
    old = text | dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0))
    new = text | dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5e5))
    one, other = architectures.describe(old).llm, architectures.describe(new).llm
    assert one == other and (one["rope_theta"], one["rope_factor"]) == (5e5, 2.0)


@pytest.mark.parametrize("kind, longest", [
    ("llama", 2048), ("mistral", 131072), ("qwen2", 32768), ("qwen3", 32768),
])  # fmt: skip
def test_a_length_that_is_absent_is_that_of_the_class(kind, longest, copy, flat):
    config = json.loads((copy / "config.json").read_text())
    text = config["text_config"] | dict(model_type=kind, sliding_window=None)
    assert architectures.describe(text).length == 64
    del text["max_position_embeddings"]
    assert architectures.describe(text).length == longest
    assert architectures.describe(config | dict(text_config=text)).length == longest
    first = edit(flat / "model", max_position_embeddings=None)
    assert sources.llava(first, vision=flat / "tower", wish=Wish()).facts["max_length"] == 2048


def test_a_part_that_is_null_is_that_of_the_class(copy, capsys):
    edited(copy, text_config=None)
    assert "config.json says llm.vocab (vocab_size) = 32000" in refused(capsys, "--from", copy)


def test_two_ways_to_write_one_thing_mean_the_same(copy):
    config = json.loads((copy / "config.json").read_text())
    text = config["text_config"]
    other = config | dict(vision_feature_layer=[-2], text_config=text | dict(hidden_act="swish"))
    assert architectures.describe(other) == architectures.describe(config)


@pytest.mark.parametrize("changes, words", [
    (dict(image_size=[24, 16]), "image_size=[24, 16]: only squares"),
    (dict(hidden_act="relu"), "hidden_act='relu'"),
    (dict(num_channels=1), "num_channels=1"),
    (dict(layer_norm_eps=0.0), "layer_norm_eps=0.0"),
], ids=str)  # fmt: skip
def test_what_a_tower_computes_otherwise_is_refused_by_name(changes, words, copy, capsys):
    edited(copy, **{f"vision_config__{name}": value for name, value in changes.items()})
    said = refused(capsys, "--from", copy)
    assert words in said and "vision_config" in said


# --- quantized -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["", "text_config__", "vision_config__"])
def test_a_quantization_is_noticed_at_every_level(level, copy, capsys):
    edited(copy, **{f"{level}quantization_config": dict(quant_method="bitsandbytes", bits=4)})
    said = refused(capsys, "--from", copy)
    assert f"{level.replace('__', '.')}quantization_config" in said and "bitsandbytes" in said
    assert "get the original ones" in said


def test_a_quantized_part_is_no_part_of_a_new_model(flat, capsys):
    fields, tensors = whole_models.llm(24)
    quantized = dict(model_type="llama", quantization_config=dict(quant_method="awq"))
    whole_models.save(flat / "llm", fields | quantized, tensors)
    said = refused(capsys, "--llm", flat / "llm", "--vision", flat / "tower")
    assert "llm/config.json: quantization_config" in said and "awq" in said
