# SPDX-License-Identifier: Apache-2.0
"""Two runs that were not trained alike differ in a row, whatever their configuration says."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import mesh as meshes
from vlm_jax.training import fingerprint


def arrays() -> dict:
    """Weights of the kinds that a model has."""
    draw = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(draw.standard_normal((8, 4)), jnp.float32),
        "scale": jnp.asarray(draw.standard_normal(8), jnp.bfloat16),
    }


def test_one_bit_of_one_weight_is_another_fingerprint():
    weights = arrays()
    same = fingerprint.of_weights(weights)
    assert same == fingerprint.of_weights(arrays())
    for name, x in weights.items():
        bits = np.asarray(x).copy()
        bits.view(f"uint{8 * bits.itemsize}")[(1,) * bits.ndim] ^= 1
        assert fingerprint.of_weights(weights | {name: jnp.asarray(bits)}) != same


def test_values_that_change_places_between_weights_are_another_fingerprint():
    weights = {"a": jnp.arange(4.0), "b": jnp.zeros(4)}
    swapped = {"a": weights["b"], "b": weights["a"]}
    assert fingerprint.of_weights(weights) != fingerprint.of_weights(swapped)


def test_a_fingerprint_does_not_know_the_sharding(mesh8):
    weights = arrays()
    with jax.set_mesh(mesh8):
        cut = jax.device_put(weights, meshes.sharding(mesh8, "batch"))
        assert fingerprint.of_weights(cut) == fingerprint.of_weights(weights)


def test_the_host_and_the_device_find_the_same_fingerprint(monkeypatch):
    weights = arrays() | {"scalar": jnp.float32(0.1)}
    on_the_host = fingerprint.of_weights(weights)
    monkeypatch.setattr(fingerprint, "SMALL", 0)
    assert fingerprint.of_weights(weights) == on_the_host


def test_a_run_tells_how_it_began_and_ended(trained):
    found = fingerprint.of_run(trained, ["align", "finetune"])
    first = json.loads((trained / "align" / fingerprint.BEGAN).read_text())
    lines = (trained / "finetune" / "metrics.jsonl").read_text().splitlines()
    assert len(found["initial_weights"]) == 16 and found["initial_weights"] == first["weights"]
    assert found["last_loss"] == json.loads(lines[-1])["loss"] < found["first_loss"]


def test_a_run_from_before_there_were_fingerprints_has_none(tmp_path):
    assert fingerprint.of_run(tmp_path, ["align", "finetune"]) == {}


def test_a_processor_is_named_with_its_widest_vectors():
    name = fingerprint.processor()
    assert name.endswith("CPU cores")
    assert any(f", {vectors}, " in name for vectors in fingerprint.VECTORS)
