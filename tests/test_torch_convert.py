# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that transformers writes give its numbers here, and ours give ours there."""

import jax
import numpy as np
import published_models as published
import pytest
import tiny
from flax import nnx

from vlm_jax.__main__ import main
from vlm_jax.models import vlm
from vlm_jax.models.llm import LLM
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.models.vit import ViT
from vlm_jax.weights import architectures, folder, names, sources

pytestmark = pytest.mark.torch

GATE = 1e-4  # absolute, float32, on logits of order one


def saved(name, path, **options):
    """A random LLaVA in a folder, and the model."""
    from transformers import LlavaForConditionalGeneration

    model = published.random_model(LlavaForConditionalGeneration, published.llava(name))
    published.save(model, path, **options)
    return model


def run(*argv):
    """`vlm-jax convert`; its standard error where it fails."""
    assert main(["convert", *map(str, argv)]) == 0


def ours(path, batch, mesh):
    """Our logits [B T W] of the text tokens, each given all before it."""
    with jax.set_mesh(mesh):
        model = tiny.model_of(path)
        return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


@pytest.mark.parametrize("name", published.LLAVAS)
def test_a_llava_gives_the_same_logits_and_goes_back(name, tmp_path, mesh1):
    from transformers import LlavaForConditionalGeneration

    model = saved(name, tmp_path / "hf")
    batch, inputs, visual = published.batch(model.config)
    expected = published.logits(model, inputs, batch["pixels"])
    assert expected.std() > 0.3
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    found = ours(tmp_path / "ours", batch, mesh1)
    assert published.difference(found, expected, batch, visual) < GATE
    run("--from", tmp_path / "ours", "--to-hf", "--to", tmp_path / "back")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert np.abs(published.logits(back, inputs, batch["pixels"]) - expected).max() < 1e-5


def tower_levels(path, config, pixels, mesh, **changes):
    """All levels of a tower that a folder describes, [B P depth*E]."""
    vit, tensors = sources.of_tower(path)
    depth = config.num_hidden_layers
    vit |= dict(levels=tuple(range(1, depth + 1)), **changes)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: ViT(ViTSize.of(vit), rngs=nnx.Rngs(0)))
        table = {f"vit.{name}": row for name, row in names.vit_table(shapes).items()}
        strange = [n for n in tensors if n not in table and not names.matches(n, names.UNREAD)]
        assert not strange
        tower = folder.place(shapes, table, tensors)
        return np.asarray(jax.jit(lambda m, x: m(x))(tower, tiny.placed(pixels)))


@pytest.mark.parametrize("name", published.TOWERS)
def test_every_hidden_state_of_a_tower_is_ours(name, tmp_path, mesh1):
    import torch
    from transformers import CLIPVisionModel, SiglipVisionModel

    config = published.tower(name)
    clip = config.model_type == "clip_vision_model"
    model = published.random_model(CLIPVisionModel if clip else SiglipVisionModel, config)
    model.save_pretrained(tmp_path / "tower")
    size = config.image_size
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("f4")
    with torch.no_grad():
        out = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    states = [h[:, int(clip) :].numpy() for h in out.hidden_states[1:]]
    ours = tower_levels(tmp_path / "tower", config, pixels, mesh1)
    assert np.abs(ours - np.concatenate(states, -1)).max() < GATE
    if not clip:
        # What SigLIP calls its last hidden state has gone through the norm behind the last block.
        last = tower_levels(tmp_path / "tower", config, pixels, mesh1, final_norm=True)
        last = last[..., -config.hidden_size :]
        assert np.abs(last - out.last_hidden_state.numpy()).max() < GATE


def llm_folder(name, path, **options):
    """A random language model in a folder, and the model."""
    from transformers import AutoModelForCausalLM

    config = published.llm(name)
    model = published.random_model(AutoModelForCausalLM.from_config(config).__class__, config)
    model.save_pretrained(path, **options)
    return model


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    from transformers import CLIPVisionModel

    path = tmp_path_factory.mktemp("tower")
    published.random_model(CLIPVisionModel, published.tower("clip")).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", published.LLMS)
def test_a_language_model_assembled_with_a_tower_gives_its_logits(
    name, tower_folder, tmp_path, mesh1
):
    import torch

    model = llm_folder(name, tmp_path / "llm")
    run("--vision", tower_folder, "--llm", tmp_path / "llm", "--to", tmp_path / "ours",
        "--compressor=quecc", "--tokens=1", "--levels=1,3", "--heads=2")  # fmt: skip
    ids = np.random.default_rng(0).integers(3, 60, (2, 40)).astype("i4")
    with torch.no_grad():
        expected = model(torch.tensor(ids.astype("i8"))).logits.numpy()
    with jax.set_mesh(mesh1):
        llm = tiny.model_of(tmp_path / "ours").llm
        ours = jax.jit(lambda m, i: m.logits(m(m.embed(i))))(llm, tiny.placed(ids))
    assert np.abs(np.asarray(ours) - expected).max() < GATE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_shards_are_read_as_they_are(dtype, tmp_path, mesh1, mesh8):
    model = saved("clip_llama", tmp_path / "hf", dtype=dtype, max_shard_size="20KB")
    assert len(set(published.read_index(tmp_path / "hf").values())) > 2
    batch, inputs, visual = published.batch(model.config)
    # In float32, of the rounded weights.
    expected = published.logits(model, inputs, batch["pixels"])
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    found = ours(tmp_path / "ours", batch, mesh1)
    assert published.difference(found, expected, batch, visual) < GATE


def test_both_names_of_the_parts_are_read(tmp_path, mesh1):
    # transformers saves `language_model.model.*`; its class, and older towers, say otherwise.
    from safetensors.numpy import load_file, save_file

    model = saved("clip_llama", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    for old, new in (("language_model.model.", "model.language_model."),
                     ("language_model.lm_head.", "lm_head."),
                     ("vision_tower.", "model.vision_tower.vision_model."),
                     ("multi_modal", "model.multi_modal")):  # fmt: skip
        tensors = {new + n[len(old) :] if n.startswith(old) else n: x for n, x in tensors.items()}
    save_file(tensors, tmp_path / "hf/model.safetensors")
    batch, inputs, visual = published.batch(model.config)
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    found = ours(tmp_path / "ours", batch, mesh1)
    expected = published.logits(model, inputs, batch["pixels"])
    assert published.difference(found, expected, batch, visual) < GATE


def test_a_llava_in_its_first_layout_and_a_projector_of_stage_1(tmp_path, mesh1):
    # As haotian-liu/LLaVA publishes it: torch pickles, a flat configuration, the tower elsewhere.
    import json

    import torch

    model = saved("clip_llama", tmp_path / "hf")
    state = model.state_dict()
    llm, projector = {}, {}
    for name, tensor in state.items():
        if name.startswith("model.multi_modal_projector.linear_"):
            index, part = name.removeprefix("model.multi_modal_projector.linear_").split(".")
            projector[f"model.mm_projector.{2 * int(index) - 2}.{part}"] = tensor
        elif not name.startswith("model.vision_tower"):
            llm[name.replace("model.language_model.", "model.")] = tensor
    text = model.config.text_config.to_dict()
    text |= dict(model_type="llava_llama", mm_hidden_size=16, mm_projector_type="mlp2x_gelu",
                 mm_vision_select_layer=-2, mm_vision_select_feature="patch",
                 mm_vision_tower="openai/clip", image_aspect_ratio="pad")  # fmt: skip
    for folder_name, tensors in (("first", llm | projector), ("vicuna", llm)):
        path = tmp_path / folder_name
        path.mkdir()
        torch.save(tensors, path / "pytorch_model.bin")
        kind = {} if folder_name == "first" else model.config.text_config.to_dict()
        (path / "config.json").write_text(json.dumps(text if folder_name == "first" else kind))
    torch.save(projector, tmp_path / "mm_projector.bin")
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    batch, inputs, visual = published.batch(model.config)
    expected = published.logits(model, inputs, batch["pixels"])
    run("--from", tmp_path / "first", "--vision", tmp_path / "tower", "--to", tmp_path / "a")
    assert json.loads((tmp_path / "a/config.json").read_text())["facts"]["image"]["fit"] == "pad"
    run("--vision", tmp_path / "tower", "--llm", tmp_path / "vicuna", "--to", tmp_path / "b",
        "--projector", tmp_path / "mm_projector.bin")  # fmt: skip
    for path in ("a", "b"):
        found = ours(tmp_path / path, batch, mesh1)
        assert published.difference(found, expected, batch, visual) < GATE


def covered(found, table, shapes, tied=False):
    """Asserts that our key table is exactly the published tensors, shapes included."""
    found = names.by_canonical_name(found)
    if tied:
        del found["llm.lm_head.weight"]
    read = {n: shape for n, shape in found.items() if not names.matches(n, names.UNREAD)}
    assert set(read) == set(table)
    ours = names.parameters(shapes)
    for name, row in table.items():
        of = [ours[".".join(path)].shape for path in row.paths]
        assert read[name] == row.shape([s[1:] for s in of] if row.layer is not None else of), name


@pytest.mark.parametrize("name", published.PUBLISHED_TOWERS)
def test_the_table_of_a_published_tower_is_every_tensor_of_it(name, mesh1):
    from transformers import CLIPModel, CLIPVisionModel, SiglipModel, SiglipVisionModel

    kind, fields = published.PUBLISHED_TOWERS[name]
    clip = kind == "clip_vision_model"
    vit = architectures.vit_section(fields, kind) | dict(levels=(1,))
    with jax.set_mesh(mesh1):
        shapes = jax.eval_shape(lambda: ViT(ViTSize.of(vit), rngs=nnx.Rngs(0)))
    table = {f"vit.{key}": row for key, row in names.vit_table(shapes).items()}
    config = published.config_of(kind, fields)
    covered(published.meta(CLIPVisionModel if clip else SiglipVisionModel, config), table, shapes)
    # As the file of the whole CLIP or SigLIP, which is what is published.
    whole = published.config_of(kind.split("_")[0], dict(vision_config=fields))
    covered(published.meta(CLIPModel if clip else SiglipModel, whole), table, shapes)


@pytest.mark.parametrize("name", published.PUBLISHED_LLMS)
def test_the_table_of_a_published_llm_is_every_tensor_of_it(name, mesh1):
    from transformers import AutoModelForCausalLM

    kind, fields = published.PUBLISHED_LLMS[name]
    llm = architectures.llm_section(fields | dict(model_type=kind))
    with jax.set_mesh(mesh1):
        shapes = jax.eval_shape(lambda: LLM(LLMSize.of(llm), rngs=nnx.Rngs(0)))
    table = {f"llm.{key}": row for key, row in names.llm_table(shapes).items()}
    config = published.config_of(kind, fields)
    found = published.meta(AutoModelForCausalLM.from_config, config)
    covered(found, table, shapes, tied=llm["tied_embeddings"])


@pytest.mark.parametrize("name", published.PUBLISHED_LLAVAS)
def test_the_table_of_a_published_llava_is_every_tensor_of_it(name, mesh1):
    from transformers import LlavaForConditionalGeneration

    config = published.config_of("llava", published.PUBLISHED_LLAVAS[name])
    described = architectures.describe(config.to_dict())
    rows = folder.PLAIN | dict(tokens=576)
    model = folder.Model(described.vit, described.llm, rows, {}, {})
    with jax.set_mesh(mesh1):
        shapes = vlm.shapes(model.size())
    covered(
        published.meta(LlavaForConditionalGeneration, config), names.model_table(shapes), shapes
    )
