# SPDX-License-Identifier: Apache-2.0
"""PEFT gives our logits with adapters that we write, and we give its with those that it writes."""

import json

import jax
import numpy as np
import published_models as published
import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.weights import adapters, folder

pytestmark = pytest.mark.torch

GATE = 1e-4  # absolute, float32, on logits of order one


def run(*argv):
    assert main(["convert", *map(str, argv)]) == 0


def ours(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


@pytest.mark.parametrize("name, targets", [
    ("clip_llama", ()), ("clip_qwen2", ("q_proj", "o_proj", "down_proj")),
    ("clip_full", ("k_proj",)),
])  # fmt: skip
def test_peft_gives_the_logits_of_an_exported_adapter(name, targets, tmp_path, mesh1):
    import peft
    from transformers import LlavaForConditionalGeneration

    model = published.random_model(LlavaForConditionalGeneration, published.llava(name))
    published.save(model, tmp_path / "hf")
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    batch, inputs, visual = published.batch(model.config)
    plain = published.logits(model, inputs, batch["pixels"])
    with jax.set_mesh(mesh1):
        trained = tiny.adapted(tiny.model_of(tmp_path / "ours"), rank=3, alpha=4.5, targets=targets)
        adapters.write(trained, folder.read(tmp_path / "ours"), tmp_path / "peft")
        found = ours(trained, batch)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    expected = published.logits(adapted, inputs, batch["pixels"])
    assert np.abs(expected - plain).max() > 0.1
    assert published.difference(found, expected, batch, visual) < GATE
    # And merged: by PEFT into its model, by us into the published base.
    run("--from", tmp_path / "hf", "--adapter-from", tmp_path / "peft", "--to", tmp_path / "merged")
    merged = published.logits(adapted.merge_and_unload(), inputs, batch["pixels"])
    with jax.set_mesh(mesh1):
        found = ours(tiny.model_of(tmp_path / "merged"), batch)
    assert published.difference(found, merged, batch, visual) < GATE


@pytest.mark.parametrize("name", ["llama_tied_head", "qwen3"])
def test_peft_gives_the_logits_of_an_adapter_of_the_language_model_alone(name, tmp_path, mesh1):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    config = published.llm(name)
    model = published.random_model(AutoModelForCausalLM.from_config(config).__class__, config)
    model.save_pretrained(tmp_path / "llm")
    published.random_model(CLIPVisionModel, published.tower("clip")).save_pretrained(
        tmp_path / "tower"
    )
    parts = ["--vision", tmp_path / "tower", "--llm", tmp_path / "llm", "--compressor=quecc",
             "--tokens=1", "--levels=1,3", "--heads=2"]  # fmt: skip
    run(*parts, "--to", tmp_path / "ours")
    with jax.set_mesh(mesh1):
        trained = tiny.adapted(tiny.model_of(tmp_path / "ours"))
        made = adapters.write(trained, folder.read(tmp_path / "ours"), tmp_path / "peft")
        ids = np.random.default_rng(0).integers(3, 60, (2, 20)).astype("i4")
        compute = jax.jit(lambda m, i: m.logits(m(m.embed(i))))
        found = np.asarray(compute(trained.llm, tiny.placed(ids)))
    assert made["base"] == "the language model alone"
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(ids.astype("i8"))).logits.numpy()
    assert np.abs(found - expected).max() < GATE


@pytest.mark.parametrize("name", published.ADAPTERS)
def test_an_adapter_of_peft_gives_its_logits(name, tmp_path, mesh1):
    model = published.random_llava(tmp_path / "hf")
    adapted = published.save_adapter(model, name, tmp_path / "peft")
    batch, inputs, visual = published.batch(model.config)
    expected = published.logits(adapted, inputs, batch["pixels"])
    run("--from", tmp_path / "hf", "--adapter-from", tmp_path / "peft", "--to", tmp_path / "ours")
    with jax.set_mesh(mesh1):
        found = ours(tiny.model_of(tmp_path / "ours"), batch)
    assert published.difference(found, expected, batch, visual) < GATE


def test_llavas_own_lora_is_a_language_model_s_with_the_projector_beside_it(tmp_path, mesh1):
    """haotian-liu/LLaVA train.py: PEFT's files of the LLM, and a pickle of what else it trained."""
    import peft
    import torch

    model = published.random_llava(tmp_path / "hf")
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    # The language model by itself, as Vicuna is published.
    text = model.config.text_config
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps(text.to_dict()))
    state = {name.replace("model.language_model.", "model."): x
             for name, x in model.state_dict().items() if "language_model" in name}  # fmt: skip
    torch.save(state | {"lm_head.weight": model.lm_head.weight.data},
               tmp_path / "llm/pytorch_model.bin")  # fmt: skip
    published.save_adapter(model, "some", tmp_path / "peft")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    lora = peft.get_peft_model_state_dict(adapted)
    llm = {name.replace("language_model.", ""): x.clone() for name, x in lora.items()
           if "lora_" in name}  # fmt: skip
    projector = {
        f"base_model.model.model.mm_projector.{2 * k}.{part}": 1.5 * getattr(layer, part).data
        for k, layer in enumerate((model.model.multi_modal_projector.linear_1,
                                   model.model.multi_modal_projector.linear_2))
        for part in ("weight", "bias")
    }  # fmt: skip
    (tmp_path / "first").mkdir()
    torch.save(llm, tmp_path / "first/adapter_model.bin")
    torch.save(projector, tmp_path / "first/non_lora_trainables.bin")
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    settings |= dict(target_modules=["q_proj", "v_proj"], modules_to_save=None)
    (tmp_path / "first/adapter_config.json").write_text(json.dumps(settings))
    run("--vision", tmp_path / "tower", "--llm", tmp_path / "llm", "--to", tmp_path / "ours",
        "--adapter-from", tmp_path / "first")  # fmt: skip
    for k, name in enumerate(("linear_1", "linear_2")):
        layer = getattr(adapted.base_model.model.model.multi_modal_projector, name)
        for part in ("weight", "bias"):
            key = f"base_model.model.model.mm_projector.{2 * k}.{part}"
            getattr(layer, part).data = projector[key]
    batch, inputs, visual = published.batch(model.config)
    expected = published.logits(adapted, inputs, batch["pixels"])
    with jax.set_mesh(mesh1):
        found = ours(tiny.model_of(tmp_path / "ours"), batch)
    assert published.difference(found, expected, batch, visual) < GATE
