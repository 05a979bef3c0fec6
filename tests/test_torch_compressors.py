# SPDX-License-Identifier: Apache-2.0
"""The PyTorch compressors of the benchmark compute what ours compute, from the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from benchmarks.compressors import EXPECTED, arguments
from vlm_jax.compressors.window import window_order
from vlm_jax.models.vit import class_attention

pytestmark = pytest.mark.torch
HOME = Path(__file__).parent.parent
SIZES = dict(side=6, width=32, levels=2, llm_width=48, heads=4)
CASES = [
    ("none", 36, {}),
    ("pool", 4, {}),
    ("quecc", 9, {"query": "separate"}),
    ("quecc", 4, {"query": "none"}),
    ("token_packer", 9, {}),
    ("token_packer", 4, {}),
    ("mqt", 3, {}),
    ("mqt", 30, {}),
    ("mqt", 9, {"queries": 16}),
    ("m3", 9, {}),
    ("m3", 1, {}),
    ("prumerge", 1, {}),
    ("prumerge", 8, {}),
]


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind, tokens, more", CASES, ids=str)
def test_the_peer_is_the_same_function(kind, tokens, more, mesh1):
    import torch

    from benchmarks.peers import torch_compressors

    sizes = dict(SIZES, tokens=tokens, query="none") | more
    with jax.set_mesh(mesh1):
        module = tiny.compressor(kind, **sizes, rngs=nnx.Rngs(1))
        # Norms start at one and zero, many biases at zero: what is drawn tells them apart.
        module = jax.tree.map(lambda w: w + 0.1 * drawn(w.size, *w.shape), module)
        peer = torch_compressors.load(module, sizes)
        assert sum(x.numel() for x in peer.parameters()) == sum(
            x.size for x in jax.tree.leaves(module)
        )
        patches, width = sizes["side"] ** 2, sizes["width"]
        if module.reads:
            levels = drawn(0, 2, patches, 2 * width)
            queries, keys = (drawn(i, 2, patches + 1, width) for i in (1, 2))
            attention = class_attention(jnp.array(queries[:, 0]), jnp.array(keys))
            ours = module(jnp.concatenate([levels, keys[:, 1:], attention[..., None]], -1))
            given = (levels[..., width:], queries, keys)
        else:
            levels, question = drawn(0, 2, patches, 2 * width), drawn(1, 2, sizes["llm_width"])
            order = window_order(sizes["side"], module.window)
            ours = module(jnp.array(levels)[:, order], jnp.array(question))
            given = (levels, question)
        with torch.no_grad():
            theirs = peer(*(torch.tensor(x) for x in given))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert np.abs(np.asarray(ours)).max() > 0.1


def test_the_benchmark_runs_and_counts_what_is_derived(tmp_path):
    """At toy sizes norms and activations are a good part of what the compiler counts."""
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/compressors.py", "--quick", "--rounds=1", f"--out={out}"]
    done = subprocess.run([*command, "--tokens=1,4,5"], capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {(row["method"], row["V"]) for row in rows} == {("none", 144)} | {
        (kind, V)
        for kind in EXPECTED.keys() - {"none"}
        for V in (1, 4, 5)
        if V != 5 or kind[:3] in ("mqt", "pru")
    }
    for row in rows:
        gflop = row["gflop"]
        # PruMerge's loop adds its neighbors without a product.
        assert gflop["by_torch"] == pytest.approx(gflop["published"], rel=0.05), row
        assert gflop["folded"] < gflop["by_xla"] < 1.2 * gflop["folded"] + 0.001, row


def test_the_benchmark_refuses_a_method_that_it_has_not(capsys):
    with pytest.raises(SystemExit):
        arguments(["--methods=quecc,perceiver"])
    assert "no method ['perceiver']: choose of" in capsys.readouterr().err
