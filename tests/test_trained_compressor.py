# SPDX-License-Identifier: Apache-2.0
"""A published model keeps the compressor that was trained in it; nothing goes without a word."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import whole_models
from published_trained import METHODS
from safetensors.numpy import load_file, save_file
from test_convert import refused, run
from whole_models import edit

from vlm_jax.compressors.window import window_order
from vlm_jax.models import vlm
from vlm_jax.training import runs
from vlm_jax.verbs import convert, parser
from vlm_jax.weights import folder

FROZEN = Path(__file__).parent / "published_weights"
# Heads are in neither config nor tensors. QueCC's code has 8; the small cases of the others have 4.
CASES = {
    "quecc_k2": ("quecc", 16, 8, "separate", (12, 16, 22, 23), []),
    "token_packer_s4": ("token_packer", 4, 4, "none", (12, 16, 22, 23), ["--heads=4"]),
    "mqt": ("mqt", 16, 4, "none", (23,), ["--heads=4"]),
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Every whole model, in a folder of its own."""
    path = tmp_path_factory.mktemp("wholes")
    return {name: (path / name, *whole_models.whole(path / name, name)) for name in CASES}


@pytest.fixture
def quecc(wholes, tmp_path):
    """A whole QueCC that may be broken: folders `model` and `tower`."""
    return Path(shutil.copytree(wholes["quecc_k2"][0], tmp_path / "quecc"))


def given(path):
    return ["--from", path / "model", "--vision", path / "tower"]


def gathered(*argv):
    """The model that `vlm-jax convert` would write, its tensors held against its sizes."""
    with runs.one_device():
        words = [str(word) for word in (*argv, "--to=x")]
        model = convert.gathered(parser.parse(["convert", *words]), None)
        assert model.check() == ([], [])
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_whole_model_keeps_its_trained_compressor_and_gives_the_published_tokens(
    name, wholes, tmp_path, mesh1
):
    path, meta, inputs, outputs = wholes[name]
    kind, tokens, heads, query, levels, flags = CASES[name]
    assert run(*given(path), "--to", tmp_path / "a", *flags) == 0
    made = folder.read(tmp_path / "a")
    assert made.vit["levels"] == levels and "replaced" not in made.notes
    section = dict(kind=kind, tokens=tokens, heads=heads, query=query)
    assert {key: made.compressor[key] for key in section} == section
    state = {n.removeprefix("compressor."): x.read() for n, x in made.tensors.items()
             if n.startswith("compressor.")}  # fmt: skip
    with jax.set_mesh(mesh1):
        module = tiny.filled(vlm.shapes(made.size()).compressor, state)
        counts = {"counts": tuple(meta["token_counts"])} if kind == "mqt" else {}
        found = METHODS[kind][1](
            module, window_order(meta["grid"], module.window), **inputs, **counts
        )
    for key, expected in outputs.items():
        assert np.abs(np.asarray(found[key]) - expected).max() < 1e-4


@pytest.mark.parametrize("flags", [
    ["--compressor=token_packer"], ["--compressor=none"], ["--compressor=m3", "--tokens=4"],
    ["--tokens=4"], ["--heads=4"], ["--query=none"], ["--query=prefix"], ["--levels=1,2,3,23"],
    ["--compressor=quecc", "--tokens=1"],
], ids=" ".join)  # fmt: skip
def test_a_flag_that_contradicts_what_was_trained_is_refused(flags, wholes, tmp_path, capsys):
    said = refused(capsys, *given(wholes["quecc_k2"][0]), *flags, "--to", tmp_path / "a")
    assert "has a trained compressor, quecc (16 tokens, levels 12,16,22,23, 8 heads" in said
    assert flags[-1] in said and "--replace-compressor" in said and said.count("\n") == 1


def test_flags_that_say_what_was_trained_are_no_contradiction(wholes):
    flags = ["--compressor=quecc", "--tokens=16", "--heads=8", "--levels=12,16,22,23",
             "--query=separate"]  # fmt: skip
    model = gathered(*given(wholes["quecc_k2"][0]), *flags)
    assert model.compressor["tokens"] == 16 and "replaced" not in model.notes


def test_a_trained_compressor_is_replaced_only_by_name_and_that_is_told(quecc, tmp_path, capsys):
    flags = ["--compressor=pool", "--tokens=4", "--to", tmp_path / "a"]
    refused(capsys, *given(quecc), *flags)
    assert run(*given(quecc), *flags, "--replace-compressor") == 0
    said = capsys.readouterr().err
    assert "replaced: 32 trained tensors by fresh weights of pool: compressor.0.clip_attn" in said
    notes = folder.read(tmp_path / "a").notes
    assert "32 trained tensors" in notes["replaced"] and "4 tensors" in notes["new"]
    said = refused(capsys, *given(quecc), "--replace-compressor", "--to", tmp_path / "b")
    assert "needs --compressor=METHOD --tokens=V" in said
    same = gathered(*given(quecc), "--projector", quecc / "stage1.safetensors")
    assert same.compressor["kind"] == "quecc" and "replaced" not in same.notes


def test_a_plain_projector_is_kept_by_methods_that_have_no_other_weights(tmp_path, capsys):
    base = ("--from", FROZEN / "clip_llama")
    said = refused(capsys, *base, "--compressor=quecc", "--tokens=1", "--to", tmp_path / "a")
    assert "has a trained compressor, none (9 tokens, levels 2)" in said
    before = load_file(FROZEN / "clip_llama/model.safetensors")
    for kind, tokens in (("m3", 1), ("prumerge", 3), ("prumerge_plus", 0), ("pool", 9)):
        made = gathered(*base, f"--compressor={kind}", f"--tokens={tokens}")
        assert (made.compressor["kind"], made.compressor["tokens"]) == (kind, tokens)
        np.testing.assert_array_equal(made.tensors["compressor.2.weight"].read(),
                                      before["multi_modal_projector.linear_2.weight"])  # fmt: skip
    said = refused(capsys, *base, "--compressor=m3", "--tokens=1", "--levels=1")
    assert "and not --levels=1" in said


def test_a_projector_of_stage_1_with_other_numbers_needs_the_flag(quecc, tmp_path, capsys):
    other = load_file(quecc / "stage1.safetensors")
    other = {name: 2 * x for name, x in other.items()}
    save_file(other, quecc / "stage1.safetensors")
    flags = ("--projector", quecc / "stage1.safetensors", "--to", tmp_path / "a")
    assert "add --replace-compressor" in refused(capsys, *given(quecc), *flags)
    flags += ("--replace-compressor", "--compressor=quecc", "--tokens=16",
              "--levels=12,16,22,23")  # fmt: skip
    made = gathered(*given(quecc), *flags)
    assert "replaced" in made.notes
    name = "0.q_downsample.bias"
    ours = made.tensors[f"compressor.{name}"].read()
    np.testing.assert_array_equal(ours, other[f"model.mm_projector.{name}"])
    said = refused(capsys, *given(quecc), *flags[:2], "--replace-compressor")
    assert "its tensors belong to quecc, and not to --compressor=none" in said


def without(path, *parts):
    """A whole model without the tensors of which a name has one of the parts."""
    tensors = load_file(path / "model/model.safetensors")
    kept = {n: x for n, x in tensors.items() if not any(part in n for part in parts)}
    assert kept.keys() != tensors.keys()
    save_file(kept, path / "model/model.safetensors")


def test_stage_1_beside_a_model_that_names_its_compressor_makes_it_whole(quecc, tmp_path, capsys):
    without(quecc, "mm_projector")
    said = refused(capsys, *given(quecc), "--to", tmp_path / "a")
    assert "mm_vision_token_compression_type='quecc' names the compressor quecc, and none" in said
    made = gathered(*given(quecc), "--projector", quecc / "stage1.safetensors")
    assert made.compressor["tokens"] == 16


@pytest.mark.parametrize("changes, words", [
    (dict(mm_vision_token_compression_type="conv"), "compression_type='conv' is not supported"),
    (dict(mm_vision_token_compression_type=["quecc"]), "compression_type=['quecc'] is not"),
    (dict(mm_vision_token_compression_type="token-packer"), "and the tensors are of quecc"),
    (dict(mm_projector_type="linear"), "mm_projector_type='linear' is not supported"),
    (dict(mm_projector_type="mlp3x_gelu"), "mm_projector_type='mlp3x_gelu' is not supported"),
    (dict(mm_projector_type="identity"), "mm_projector_type='identity'"),
    (dict(mm_projector_type="ldpv2"), "mm_projector_type='ldpv2'"),
    (dict(query_abstractor_type="matry_query"), "name different compressors"),
    (dict(mm_vision_token_compression_kernel_size=4), "kernel_size=4, and compressor.0.q_"),
    (dict(mm_vision_token_compression_stride=4), "stride=4 on a 8x8 grid is not supported"),
    (dict(mm_vision_output_token_count=576), "token_count=576, and the tower has 64 patches"),
    (dict(mm_vision_output_text_embedding_size=7), "text_embedding_size=7, and compressor.0.text"),
    (dict(mm_vision_select_layer=-3), "mm_vision_select_layer is block 22 of 24, and the last"),
    (dict(mm_vision_select_layer="-2"), "mm_vision_select_layer='-2'"),
    (dict(mm_vision_select_feature="cls_patch"), "keeps the class token"),
    (dict(mm_hidden_size=64), "mm_hidden_size=64, and the tower"),
], ids=str)  # fmt: skip
def test_a_configuration_that_its_tensors_do_not_bear_out_is_refused(
    changes, words, quecc, tmp_path, capsys
):
    edit(quecc / "model", **changes)
    said = refused(capsys, *given(quecc), "--to", tmp_path / "a")
    assert words in said and str(quecc / "model") in said


def test_tensors_of_two_compressors_and_of_none_that_is_known_are_refused(quecc, wholes, capsys):
    path = quecc / "model/model.safetensors"
    tensors = load_file(path)
    packer = load_file(wholes["token_packer_s4"][0] / "stage1.safetensors")
    save_file(tensors | packer, path)
    said = refused(capsys, *given(quecc))
    assert "the tensors of several compressors (of quecc" in said and "of token_packer" in said
    save_file({n.replace("mm_projector.0", "mm_projector.x"): t for n, t in tensors.items()}, path)
    edit(quecc / "model", mm_vision_token_compression_type=None)
    assert "is of no known method: it has 1.bias" in refused(capsys, *given(quecc))


def test_tensors_that_are_of_one_method_alone_name_it_where_config_does_not(wholes, tmp_path):
    for name, fields in (
        ("token_packer_s4", dict(mm_projector_type="mlp2x_gelu", scale_factor=None, down_rate=4)),
        ("mqt", dict(query_abstractor_type=None, num_visual_tokens="9")),
    ):
        path = Path(shutil.copytree(wholes[name][0], tmp_path / name))
        edit(path / "model", **fields)
        tokens = gathered(*given(path), "--heads=4").compressor["tokens"]
        assert tokens == (4 if name == "token_packer_s4" else 9)


def test_an_elastic_method_gives_the_tokens_that_are_asked_for(wholes, tmp_path, capsys):
    path = wholes["mqt"][0]
    assert gathered(*given(path), "--heads=4", "--tokens=5").compressor["tokens"] == 5
    said = refused(capsys, *given(path), "--heads=4", "--tokens=17", "--to", tmp_path / "b")
    assert "cannot make 17 visual tokens" in said and "1 to 16" in said


def test_a_matryoshka_llava_is_known_by_the_scales_it_was_trained_on(tmp_path, capsys):
    fields, tensors = whole_models.llm(24)
    draw = np.random.default_rng(0)
    for layer, inner in ((0, 16), (2, 24)):
        tensors[f"model.mm_projector.{layer}.weight"] = draw.normal(size=(24, inner))
        tensors[f"model.mm_projector.{layer}.bias"] = draw.normal(size=24)
    whole_models.tower(tmp_path / "tower", width=16, side=6, blocks=3)
    scales = dict(mm_hidden_size=16, matryoshka_vis_token_scale=[1, 9, 36])
    whole_models.save(tmp_path / "model", fields | whole_models.FLAT | scales, tensors)
    found = gathered(*given(tmp_path)).compressor
    assert (found["kind"], found["tokens"], found["scales"]) == ("m3", 36, (1, 9, 36))
    assert gathered(*given(tmp_path), "--tokens=9").compressor["tokens"] == 9
    edit(tmp_path / "model", matryoshka_vis_token_scale="1,x")
    assert "matryoshka_vis_token_scale='x'" in refused(capsys, *given(tmp_path))
    edit(tmp_path / "model", matryoshka_vis_token_scale=[1, 5])
    assert "cannot make 5 visual tokens" in refused(capsys, *given(tmp_path))


def test_what_is_a_model_already_is_not_given_another_compressor(wholes, tmp_path, capsys):
    path = wholes["quecc_k2"][0]
    assert run(*given(path), "--to", tmp_path / "a") == 0
    for flags in (["--tokens=4"], ["--compressor=pool", "--tokens=4", "--replace-compressor"]):
        said = refused(capsys, "--from", tmp_path / "a", *flags, "--to", tmp_path / "b")
        assert "is a model folder already" in said and flags[0] in said


def test_what_a_training_run_has_learned_is_not_given_another_compressor(trained, tmp_path, capsys):
    said = refused(capsys, "--from", trained, "--heads=4", "--to", tmp_path / "b")
    assert "is a training run" in said and "--heads=4" in said


def test_parts_are_not_lost_from_a_folder_that_is_named_as_another(wholes, tmp_path, capsys):
    path = Path(shutil.copytree(wholes["quecc_k2"][0], tmp_path / "copy"))
    fields, _ = whole_models.llm(48)
    (path / "model/config.json").write_text(json.dumps(fields | dict(model_type="llama")))
    said = refused(capsys, "--llm", path / "model", "--vision", path / "tower")
    assert "it is not only a language model: it also has compressor." in said
