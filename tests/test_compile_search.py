# SPDX-License-Identifier: Apache-2.0
"""`vlm-jax compile --search`: what it tries, what it passes over, how it ranks."""

import pytest
import tiny

from vlm_jax.aot import report, search, table, topology


def config():
    return tiny.config(finetune=dict(batch=32), compressor=dict(kind="none", tokens=16))


def test_every_mesh_fills_the_slice_and_cuts_the_batch():
    slice_ = topology.named("v5e:4x4")
    found = search.possible(config(), "finetune", slice_)
    assert len({tuple(sorted(fields.items())) for fields in found}) == len(found) > 4
    for fields in found:
        data, fsdp, tensor = (fields[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor"))
        assert data * fsdp * tensor == slice_.device_count
        assert 32 // fields["finetune.accumulate"] % (data * fsdp) == 0
        assert 2 % tensor == 0  # kv heads


def test_what_fits_comes_first_and_what_needs_more_than_what_did_not_is_passed_over(monkeypatch):
    asked = []

    def made(c, mode, slice_):
        asked.append((dict(c.mesh), c.remat, c.finetune.accumulate))
        if c.mesh.tensor == 2:
            raise ValueError("refused")
        fits = c.remat == "full" and c.mesh.data > 1
        times = dict(step_seconds=1.0 / c.mesh.data, mfu=0.4)
        return dict(fits=fits, hbm_share=0.5, compile_seconds=1.0, estimate=times if fits else None)

    monkeypatch.setattr(report, "of_config", made)
    found = search.search(config(), "finetune", topology.named("v5e:4x4"), most=12)
    assert len(found["tried"]) == len(asked) == 12 < found["possible"]
    fitting = [one["step_seconds"] for one in found["tried"] if one["fits"]]
    assert fitting == sorted(fitting) and fitting and found["tried"][0]["fits"]
    # On one mesh nothing is tried that keeps more than what did not fit, in no smaller pieces.
    alone = [(remat, cut) for mesh, remat, cut in asked if mesh == dict(data=1, fsdp=16, tensor=1)]
    assert alone == [("full", 1), ("full", 2)]
    assert "does not fit" in table.of_search(found) and "refused" in table.of_search(found)


def test_a_batch_that_no_mesh_cuts_is_refused():
    with pytest.raises(ValueError, match="choose a batch"):
        search.search(tiny.config(finetune=dict(batch=1)), "finetune", topology.named("v5e:8x8"),
                      most=1)  # fmt: skip
