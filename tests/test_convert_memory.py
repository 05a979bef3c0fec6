# SPDX-License-Identifier: Apache-2.0
"""Converting takes the memory of one tensor, not of the model: measured in a process of its own."""

import functools
import json
import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.weights import folder
from vlm_jax.weights.stored import Pending, write_safetensors

pytestmark = pytest.mark.slow

# A Llama of 1.5 billion parameters, 3 GB in bfloat16; the largest tensor has 0.5 GB.
TEXT = dict(model_type="llama", vocab_size=128_000, hidden_size=2048, intermediate_size=8192,
            num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=32,
            tie_word_embeddings=False, rms_norm_eps=1e-5)  # fmt: skip
VISION = dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=128,
              num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
# Not the eight of the tests, each of which would have a copy of the model.
ONE_DEVICE = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
PROGRAM = """
import resource, sys
from vlm_jax.__main__ import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, mesh1):
    """A random checkpoint of 3 GB, written piece by piece; bytes of its largest tensor."""
    import jax

    from vlm_jax.models import vlm
    from vlm_jax.weights import architectures, hf, names

    path = tmp_path_factory.mktemp("large")
    config = dict(model_type="llava", text_config=TEXT, vision_config=VISION)
    described = architectures.describe(config)
    model = folder.Model(described.vit, described.llm, folder.PLAIN | dict(tokens=4), {}, {})
    with jax.set_mesh(mesh1):
        shapes = vlm.shapes(model.size())
        shapes = names.shapes(names.model_table(shapes), shapes)
    draw = np.random.default_rng(0)
    noise = draw.normal(size=2**20).astype(ml_dtypes.bfloat16)

    def pieces(size):
        return (noise[: min(len(noise), size - k)] for k in range(0, size, len(noise)))

    pending = [
        Pending(hf.published(n), noise.dtype, shape, functools.partial(pieces, math.prod(shape)))
        for n, shape in shapes.items()
    ]
    write_safetensors(path, pending, shard=10**9)
    (path / "config.json").write_text(json.dumps(config))
    return path, max(tensor.nbytes for tensor in pending), sum(t.nbytes for t in pending)


@pytest.mark.parametrize("flags", [[], ["--dtype=float32"], ["--to-hf"]], ids=str)
def test_the_host_never_holds_more_than_a_tensor_and_a_half_and_a_gigabyte(flags, large, tmp_path):
    path, largest, total = large
    assert total > 2.9e9
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "convert", f"--from={path}", f"--to={tmp_path}/a", *flags],
        cwd=tiny.ROOT, capture_output=True, text=True, timeout=600, env=ONE_DEVICE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stderr.split()[-1])
    print(f"largest tensor {largest / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert peak < 1.5 * largest + 1e9


LOADER = """
import resource, sys
import jax
from vlm_jax import mesh
from vlm_jax.training import runs
with jax.set_mesh(mesh.make()):
    stored = runs.read(sys.argv[1], "path")
    stored.check()
    model = jax.block_until_ready(runs.load(stored, stored.size(), dtype="bfloat16"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def test_loading_adds_no_more_to_the_model_itself(large, tmp_path):
    # On a CPU the devices' memory is the host's: the model lies in it once.
    path, largest, total = large
    assert main(["convert", "--from", str(path), "--to", str(tmp_path / "a")]) == 0
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "a")],
        cwd=tiny.ROOT, capture_output=True, text=True, timeout=600, env=ONE_DEVICE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stderr.split()[-1])
    print(f"model {total / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert peak - total < 1.5 * largest + 1e9
