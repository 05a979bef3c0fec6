# SPDX-License-Identifier: Apache-2.0
"""An adapter frozen from PEFT gives its logits here, and ours are written as PEFT writes them."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import published_models as published
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from vlm_jax.__main__ import main
from vlm_jax.models import lora
from vlm_jax.weights import adapters, folder

FROZEN = Path(__file__).parent / "published_weights"
BASE, ADAPTER = FROZEN / "clip_llama", FROZEN / "clip_llama_adapter"
GATE = 1e-4  # absolute, float32, on logits of order one
TENSORS = "adapter_model.safetensors"


def run(*argv):
    return main(["convert", *map(str, argv)])


def merging(path, to, *argv):
    """The command that merges the adapter of a folder into the frozen base."""
    return ("--from", BASE, "--adapter-from", path, "--to", to, *argv)


def refused(capsys, *argv):
    """What `vlm-jax convert` says when it refuses."""
    assert run(*argv) == 2
    return capsys.readouterr().err


@pytest.fixture
def copy(tmp_path):
    """The frozen adapter, which may be broken."""
    return Path(shutil.copytree(ADAPTER, tmp_path / "copy"))


def edited(path, **changes):
    """Changes an adapter_config.json."""
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The frozen LLaVA as a model folder."""
    path = tmp_path_factory.mktemp("base") / "ours"
    assert run("--from", BASE, "--to", path) == 0
    return path


def test_a_frozen_adapter_gives_the_logits_of_peft(tmp_path, mesh1):
    assert run(*merging(ADAPTER, tmp_path / "ours")) == 0
    config = json.loads((BASE / "config.json").read_text())
    vision = SimpleNamespace(**config["vision_config"])
    batch, _, visual = published.batch(SimpleNamespace(**config | dict(vision_config=vision)))
    expected, plain = (np.load(p / "logits.npz")["logits"] for p in (ADAPTER, BASE))
    with jax.set_mesh(mesh1):
        model = tiny.model_of(tmp_path / "ours")
        found = np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))
    assert np.abs(expected - plain).max() > 0.1
    assert published.difference(found, expected, batch, visual) < GATE


@pytest.fixture(scope="module")
def written(base, tmp_path_factory, mesh1):
    """The PEFT folder of a model with adapters, and the model merged."""
    path = tmp_path_factory.mktemp("written")
    with jax.set_mesh(mesh1):
        model = tiny.adapted(tiny.model_of(base), rank=3)
        adapters.write(model, folder.read(base), path / "peft")
        return path / "peft", folder.tensors_of(lora.merge(model))


def test_an_exported_adapter_has_the_names_and_shapes_that_peft_writes(written):
    ours, theirs = (load_file(path / TENSORS) for path in (written[0], ADAPTER))
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}
    ours, theirs = (
        json.loads((path / "adapter_config.json").read_text()) for path in (written[0], ADAPTER)
    )
    assert ours.keys() <= theirs.keys()
    same = ("peft_type", "r", "modules_to_save", "bias", "lora_dropout", "use_rslora")
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    # And it is of the language model's layers alone: the tower has a q_proj too.
    modules = {n.removeprefix("base_model.model.").rpartition(".lora_")[0]
               for n in load_file(ADAPTER / TENSORS) if "lora_" in n}  # fmt: skip
    assert all(re.fullmatch(ours["target_modules"], name) for name in modules)
    assert not re.fullmatch(
        ours["target_modules"], "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    )


def test_an_exported_adapter_merged_into_its_base_is_the_merged_model(written, tmp_path):
    assert run(*merging(written[0], tmp_path / "again")) == 0
    again = folder.read(tmp_path / "again").tensors
    assert again.keys() == written[1].keys()
    for name, expected in written[1].items():
        np.testing.assert_allclose(again[name].read(), expected, atol=1e-6, err_msg=name)
    changed = [n for n, x in load_file(BASE / "model.safetensors").items()
               if "layers" in n and "language" in n and "proj" in n]  # fmt: skip
    assert len(changed) == 2 * len(lora.TARGETS)


def test_a_sum_is_rounded_once_into_the_type_it_is_written_in(written, tmp_path):
    half = tmp_path / "half"
    assert run("--from", BASE, "--to", half, "--dtype=bfloat16") == 0
    name = "llm.layers.1.mlp.down_proj.weight"
    before = folder.read(half).tensors[name].read().astype("f4")
    tensors = load_file(written[0] / TENSORS)
    stem = f"base_model.model.model.language_model.{name[4:-7]}"
    a, b = (tensors[f"{stem}.lora_{part}.weight"] for part in "AB")
    exact = before + 2.0 * b @ a
    for flags, kind, tolerance in (([], "bfloat16", 0), (["--dtype=float32"], "float32", 1e-6)):
        to = tmp_path / kind
        assert run("--from", half, "--adapter-from", written[0], "--to", to, *flags) == 0
        found = folder.read(to).tensors[name].read()
        assert found.dtype == kind
        np.testing.assert_allclose(
            found.astype("f4"), exact.astype(found.dtype).astype("f4"), atol=tolerance
        )


def test_pieces_of_a_sum_are_those_of_the_whole(written, base, monkeypatch):
    model = folder.read(base)
    adapters.merge(model, written[0])
    tensor = model.tensors["llm.layers.0.mlp.up_proj.weight"]
    whole = tensor.read()
    assert whole.shape == (40, 24) and tensor.dtype == "float32"
    np.testing.assert_array_equal(tensor.read(7, 9), whole[7:9])
    monkeypatch.setattr("vlm_jax.weights.stored.PIECE", 4 * 37)  # in the middle of rows
    pieces = list(tensor.pieces())
    assert len(pieces) == 26
    np.testing.assert_allclose(np.concatenate(pieces).reshape(40, 24), whole, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


def test_missing_and_surplus_tensors_of_an_adapter_are_listed_unless_allowed(
    copy, tmp_path, capsys
):
    tensors = load_file(copy / TENSORS)
    layer = "base_model.model.model.language_model.layers."
    for name in [n for n in tensors if n.startswith(f"{layer}1.self_attn.q_proj")]:
        del tensors[name]
    del tensors[f"{layer}0.mlp.up_proj.lora_B.weight"]
    tensors[f"{layer}7.mlp.up_proj.lora_A.weight"] = np.zeros((3, 24), "f4")
    tensors[f"{layer}0.self_attn.v_proj.lora_B.weight"] = np.zeros((24, 3), "f4")
    save_file(tensors, copy / TENSORS)
    said = refused(capsys, *merging(copy, tmp_path / "a"))
    assert f"adapter {copy}: the tensors do not make this model: 3 missing" in said
    for name in ("0.mlp.up_proj.lora_B", "1.self_attn.q_proj.lora_A", "1.self_attn.q_proj.lora_B"):
        assert f"llm.layers.{name}.weight" in said
    assert "1 surplus: llm.layers.7.mlp.up_proj.lora_A.weight" in said
    assert "llm.layers.0.self_attn.v_proj.lora_B.weight (24, 3) instead of (12, 3)" in said
    tensors[f"{layer}0.self_attn.v_proj.lora_B.weight"] = np.zeros((12, 3), "f4")
    save_file(tensors, copy / TENSORS)
    allowed = ("--allow-missing=llm.layers.*.lora_?.weight", "--allow-surplus=llm.layers.7.*")
    assert run(*merging(copy, tmp_path / "a", *allowed)) == 0
    said = capsys.readouterr().err
    assert "1 tensors left out: llm.layers.7" in said and "3 tensors of the adapter absent" in said
    ours = folder.read(tmp_path / "a").tensors
    for name in ("0.mlp.up_proj", "1.self_attn.q_proj", "0.self_attn.v_proj"):
        np.testing.assert_array_equal(
            ours[f"llm.layers.{name}.weight"].read(),
            load_file(BASE / "model.safetensors")[f"language_model.model.layers.{name}.weight"],
        )


def test_layers_that_cannot_be_adapted_are_surplus(copy, tmp_path, capsys):
    tied = Path(shutil.copytree(BASE, tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text()) | dict(tie_word_embeddings=True)
    (tied / "config.json").write_text(json.dumps(config))
    base = load_file(tied / "model.safetensors")
    del base["language_model.lm_head.weight"]  # one that differs would untie the two
    save_file(base, tied / "model.safetensors")
    tensors = load_file(copy / TENSORS)
    stem = "base_model.model."
    added = [f"{stem}lm_head.lora_A.weight", f"{stem}lm_head.lora_B.weight",
             f"{stem}model.language_model.embed_tokens.lora_embedding_A",
             f"{stem}model.vision_tower.embeddings.patch_embedding.lora_A.weight"]  # fmt: skip
    shapes = [(3, 24), (67, 3), (3, 67), (3, 3, 8, 8)]
    save_file(tensors | {n: np.zeros(s, "f4") for n, s in zip(added, shapes, strict=True)},
              copy / TENSORS)  # fmt: skip
    said = refused(capsys, "--from", tied, "--adapter-from", copy, "--to", tmp_path / "a")
    surplus = said.split("surplus: ")[1].split(". Names")[0].split(", ")
    assert set(surplus) == {"llm.lm_head.lora_A.weight", "llm.lm_head.lora_B.weight",
                            "llm.embed_tokens.lora_embedding_A",
                            "vit.embeddings.patch_embedding.lora_A.weight"}  # fmt: skip


@pytest.mark.parametrize("changes, words", [
    (dict(peft_type="IA3"), "an adapter of kind 'IA3'; supported is LORA"),
    (dict(use_dora=True), "use_dora=True is not supported: merge the adapter with PEFT"),
    (dict(alpha_pattern={"q_proj": 1}), "alpha_pattern={'q_proj': 1} is not supported"),
    (dict(bias="all"), "bias='all' is not supported"),
    (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
])  # fmt: skip
def test_what_low_rank_sums_are_not_is_refused_by_name(changes, words, copy, tmp_path, capsys):
    edited(copy, **changes)
    assert words in refused(capsys, *merging(copy, tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_folders_that_are_no_adapter_are_refused(copy, tmp_path, capsys):
    tensors = load_file(copy / TENSORS)
    whole = {name: x for name, x in tensors.items() if "lora_" not in name}
    save_file(whole, copy / TENSORS)
    said = refused(capsys, *merging(copy, tmp_path / "a"))
    assert "holds no LoRA tensors, only compressor.0.bias" in said
    (copy / TENSORS).unlink()
    assert f"it has no {TENSORS}" in refused(capsys, *merging(copy, tmp_path / "a"))
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    said = refused(capsys, *merging(copy, tmp_path / "a"))
    assert "adapter_config.json lacks r, lora_alpha, target_modules" in said
    assert "has no adapter_config.json" in refused(capsys, *merging(BASE, tmp_path / "a"))


def test_only_a_run_with_adapters_has_any_to_export(base, trained, tmp_path, capsys):
    said = refused(capsys, "--from", base, "--to-peft", "--to", tmp_path / "a")
    assert "--to-peft needs --from=WORKDIR" in said and "config.lora.rank" in said
    said = refused(capsys, "--from", trained, "--to-peft", "--to", tmp_path / "a")
    assert "has no adapters to export: it was trained with lora.rank=0" in said
    said = refused(capsys, "--from", trained, "--to-peft", "--to-hf", "--to", tmp_path / "a")
    assert "goes with neither --to-hf nor --adapter-from" in said
