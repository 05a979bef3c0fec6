# SPDX-License-Identifier: Apache-2.0
"""Configurations change values of the one list of fields, and describe models that exist."""

from pathlib import Path

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from configs import base, sizes
from vlm_jax.models import vlm
from vlm_jax.training import stages, workdir
from vlm_jax.training.cells import cells_of, describe
from vlm_jax.verbs import configuration

CONFIGS = sorted(p.stem for p in (Path(tiny.ROOT) / "configs").glob("*.py")
                 if p.stem != "sizes")  # fmt: skip


def load(name):
    """As the command line loads it."""
    return configuration.read([f"--config={tiny.ROOT}/configs/{name}.py"]).config


def leaves(tree, prefix=""):
    """Dotted names of all fields; the names of LLM sizes are values, not fields."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, ConfigDict) and path != "grid.llms":
            yield from leaves(value, path + ".")
        else:
            yield path, value


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_has_the_fields_of_base_and_their_types(name):
    fields, ours = dict(leaves(base.get_config())), dict(leaves(load(name)))
    assert ours.keys() == fields.keys()
    for path, value in ours.items():
        assert type(value) is type(fields[path]), path


@pytest.mark.parametrize("name", CONFIGS)
def test_every_cell_of_a_configuration_can_be_built(name, mesh1):
    c = load(name)
    with jax.set_mesh(mesh1):
        if not c.grid.llms:
            assert vlm.parameters(vlm.shapes(tiny.size(c))) > 0
            return
        cells = cells_of(c)
        stages.check(tiny.recipe(c))
        assert len({cell.name for cell in cells}) == len(cells)
        # Seeds and token counts of one size build alike: the first and the last are built.
        for cell in cells[: 2 * len(c.grid.llms)] + cells[-len(c.grid.llms) :]:
            assert describe(cell)[0] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_of_a_grid_outside_its_cells_is_one_of_its_sizes(name, mesh1):
    """`train` with a grid's configuration makes a model that the machine of the grid can hold."""
    c = load(name)
    if not c.grid.llms:
        return
    sizes = [c.llm.to_dict() | fields.to_dict() for fields in c.grid.llms.values()]
    assert c.llm.to_dict() in sizes
    with jax.set_mesh(mesh1):
        assert vlm.parameters(vlm.shapes(tiny.size(c)).llm) < 1e6


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cell_says_all_of_its_llm(name):
    """The size of `train` moves no cell: each names every field in which sizes differ."""
    c, other = load(name), load(name)
    other.llm.update(sizes.LLM["vicuna-1.5-7b"] | {
        k: c.llm[k] for k in ("vocab", "head_size", "tied_embeddings")})  # fmt: skip
    if c.grid.llms:
        assert [workdir.digest(a.config) for a in cells_of(c)] == [
            workdir.digest(b.config) for b in cells_of(other)]  # fmt: skip


def test_the_demo_spans_what_it_must(mesh1):
    # At least 3 sizes over a factor of 10, at least 4 token counts, one of them 1.
    c = load("demo")
    with jax.set_mesh(mesh1):
        counts = sorted({describe(cell)[0] for cell in cells_of(c) if not cell.blind})
    assert len(counts) >= 3 and counts[-1] >= 10 * counts[0]
    assert len(c.grid.tokens) >= 4 and 1 in c.grid.tokens
    assert {kind for kind, _ in c.grid.baselines} == {"blind", "pool"}


def test_published_sizes_are_fields_of_the_base():
    c = base.get_config()
    for table, section in ((sizes.LLM, c.llm), (sizes.VIT, c.vit)):
        for name, of in table.items():
            assert of.keys() <= section.to_dict().keys(), name
    assert sizes.LLM.keys() == sizes.LLM_PARAMETERS.keys()
    assert sizes.VIT.keys() == sizes.VIT_PARAMETERS.keys()


def test_the_base_is_the_published_encoder_and_the_7b_model():
    c = base.get_config()
    assert sizes.LLM["vicuna-1.5-7b"].items() <= c.llm.to_dict().items()
    assert sizes.VIT["clip-vit-large-patch14-336"].items() <= c.vit.to_dict().items()
