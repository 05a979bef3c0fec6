# SPDX-License-Identifier: Apache-2.0
"""The PyTorch peer of the benchmark is the same model: logits, loss, gradients and steps agree."""

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from benchmarks.train_step import random_batch
from configs import demo
from vlm_jax import mesh
from vlm_jax.models import vlm
from vlm_jax.models.sizes import VLMSize
from vlm_jax.training import cells, objective, optimizer

pytestmark = pytest.mark.torch
LLMS = list(demo.get_config().grid.llms)
CELLS = [(LLMS[0], 1), (LLMS[-1], 36)]


def cell(llm: str, tokens: int):
    """One cell with few rows: the mesh of the tests, a batch of 4."""
    config = cells.cell_of(demo.get_config(), llm, "token_packer", tokens, 0).config
    config.finetune.batch = 4
    return config


@pytest.fixture(params=CELLS, ids=str)
def pair(request, mesh1):
    """A configuration, our model, its peer, and one batch for each."""
    from benchmarks.peers import torch_vlm

    config = cell(*request.param)
    batch = random_batch(config)
    batch["image_at"][0] = config.data.text_length  # a row without an image
    with jax.set_mesh(mesh1):
        model = vlm.create(VLMSize.of(config), seed=0)
        ours = jax.device_put(batch, mesh.sharding(mesh1, "batch"))
        yield config, model, torch_vlm.load(config, model), ours, torch_vlm.tensors(batch)


def test_the_peer_has_our_parameters_and_no_others(pair):
    _, model, peer, _, _ = pair
    ours = vlm.parameters(model.llm) + vlm.parameters(model.compressor)
    assert sum(p.numel() for p in peer.parameters()) == ours


def test_logits_loss_and_every_gradient_agree(pair):
    from benchmarks.peers import torch_vlm

    _, model, peer, batch, tensors = pair
    np.testing.assert_allclose(model.logits(batch), peer(tensors).detach(), atol=1e-4)

    def loss(model):
        return objective.next_token(model, batch).nll / batch["loss_mask"].sum()

    graph, state = nnx.split(model)
    value, gradient = jax.value_and_grad(lambda s: loss(nnx.merge(graph, s)))(state)
    theirs = peer.loss(tensors)
    theirs.backward()
    assert float(value) == pytest.approx(theirs.item(), abs=1e-4)
    named = dict(peer.named_parameters())
    ours = torch_vlm.published(nnx.merge(graph, gradient))
    assert ours.keys() == named.keys()
    for name, found in ours.items():
        np.testing.assert_allclose(found, named[name].grad, atol=1e-4, err_msg=name)


def test_both_take_the_same_steps(pair):
    from benchmarks.peers import torch_vlm

    config, model, peer, batch, tensors = pair
    graph, state = optimizer.start(
        model, "finetune", optimizer.optimizer(tiny.stage(config.finetune))
    )
    ours = optimizer.make_step(
        graph, optimizer.optimizer(tiny.stage(config.finetune)), objective.next_token
    )
    theirs = torch_vlm.Trainer(peer, config.finetune, compiled=False)
    for _ in range(5):
        state, metrics = ours(state, batch)
        assert float(metrics.loss) == pytest.approx(theirs(tensors), abs=1e-4)
