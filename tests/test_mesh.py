# SPDX-License-Identifier: Apache-2.0
"""The mesh covers the devices exactly, and no dimension name goes unnoticed."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from vlm_jax import mesh


@pytest.mark.parametrize("asked, shape", [
    ((), (8, 1, 1)), ((2, 2, 2), (2, 2, 2)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 4), (1, 2, 4)),
    ((1, 1, -1), (1, 1, 8)), ((8, 1, -1), (8, 1, 1)),
])  # fmt: skip
def test_a_mesh_takes_every_device_once(asked, shape):
    made = mesh.make(*asked)
    assert tuple(made.shape.values()) == shape and made.axis_names == mesh.AXES
    assert sorted(d.id for d in made.devices.flat) == [d.id for d in jax.devices()]
    assert set(made.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize("asked", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_says_what_would(asked):
    with pytest.raises(
        ValueError, match="does not fit 8 devices: the product .* must be 8; use -1"
    ):
        mesh.make(*asked)


@pytest.mark.parametrize("asked", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_sizes_that_mean_nothing_are_refused(asked):
    with pytest.raises(ValueError, match="sizes are positive, and one of them may be -1"):
        mesh.make(*asked)


@pytest.mark.parametrize("dims, axis", [
    (("heads", "mlp"), "tensor"), (("batch", "embed"), "fsdp"), (("batch", "batch"), "data, fsdp"),
])  # fmt: skip
def test_an_axis_splits_one_dimension_of_an_array(dims, axis):
    with pytest.raises(ValueError, match=f"use the mesh axis {axis} twice"):
        mesh.spec(*dims)


def test_names_become_axes_and_unknown_names_raise():
    assert mesh.spec("batch", "len", "mlp") == P(("data", "fsdp"), None, "tensor")
    with pytest.raises(KeyError, match="unknown dimension.*embd.*knows.*embed"):
        mesh.spec("batch", "embd")


def test_every_rule_names_an_axis_that_exists():
    axes = {a for rule in mesh.RULES.values() if rule for a in np.atleast_1d(rule).tolist()}
    assert axes == set(mesh.AXES)


def test_the_batch_is_cut_into_as_many_parts_as_counted(mesh1, mesh8):
    for made, parts in ((mesh1, 1), (mesh8, 4)):
        cut = jax.device_put(np.zeros((8, 3)), mesh.sharding(made, "batch"))
        assert mesh.batch_shards(made) == parts
        assert {s.data.shape for s in cut.addressable_shards} == {(8 // parts, 3)}


def test_a_compiler_is_asked_which_options_it_knows(mesh1):
    """Releases drop options, and an unknown one would stop every program that names it."""
    old, new = "xla_cpu_no_release_has_this", "xla_backend_optimization_level"
    with jax.set_mesh(mesh1):
        known = mesh.known({old: False, new: 0})
        assert known == {new: 0}
        assert jax.jit(lambda x: x + 1, compiler_options=known)(1) == 2
        with pytest.raises(jax.errors.JaxRuntimeError, match=old):
            jax.jit(lambda x: x + 1, compiler_options={old: False})(1)


def test_asking_leaves_a_program_that_is_being_traced_alone(mesh8):
    def traced(x):
        assert mesh.known({"xla_backend_optimization_level": 0, "xla_gpu_of_no_release": 1})
        return x + 1

    with jax.set_mesh(mesh8):
        assert jax.jit(traced)(1) == 2
