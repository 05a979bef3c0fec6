# SPDX-License-Identifier: Apache-2.0
"""A program is compiled once on a machine."""

import os
import subprocess
import sys

import jax

from vlm_jax import compiled, cpu, mesh

PROGRAM = """
import jax, jax.monitoring
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
from vlm_jax import compiled
compiled.SHORTEST = 0.0
compiled.keep()
print(jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(8.0)), len(hits))
"""


def run(tmp_path, **env):
    env = {n: x for n, x in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"} | env
    env |= dict(XDG_CACHE_HOME=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    (value, hits), _ = run(tmp_path)
    assert hits == "0"
    (again, hits), _ = run(tmp_path)
    assert int(hits) > 0 and again == value == "84.0"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "cache").write_text("a file")
    (value, hits), err = run(tmp_path)
    assert (value, hits) == ("84.0", "0") and "JAX_COMPILATION_CACHE_DIR" in err


def test_the_folder_is_of_one_kind_of_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.home() == tmp_path / "vlm_jax" / "compiled" / compiled.processor()
    assert compiled.processor() == compiled.processor()


def test_flags_of_a_user_hold_against_the_options_of_a_step(mesh1, monkeypatch):
    with jax.set_mesh(mesh1):
        monkeypatch.setenv("XLA_FLAGS", "")
        assert cpu.step_options()["xla_backend_optimization_level"] == 1
        monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        assert "xla_backend_optimization_level" not in cpu.step_options()
        assert mesh.platform() == "cpu"
