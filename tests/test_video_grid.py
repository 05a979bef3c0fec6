# SPDX-License-Identifier: Apache-2.0
"""A grid over frames: cells, rows, costs and pages of clips; what takes one image is refused."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_cost import WIDE_LLM, WIDE_VIT, flops, shape

from vlm_jax.__main__ import main
from vlm_jax.cost import flops as cost
from vlm_jax.grids import run
from vlm_jax.law.points import Points
from vlm_jax.models import vlm
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.reports import report
from vlm_jax.rows import records
from vlm_jax.training import stages, workdir
from vlm_jax.training.cells import cells_of

VIDEO = dict(video_share=1.0, train_images=24, val_images=8, test_images=12)


def grid(**changes):
    """Two sizes, one V and two numbers of frames."""
    c = tiny.config(
        data=VIDEO, vit=dict(image_size=72, patch_size=12), encoder=dict(steps=0),
        align=dict(steps=0), finetune=dict(steps=2), **changes,
    )  # fmt: skip
    c.grid.frames = (1, 3)
    c.grid.tokens, c.grid.baselines = (4,), ()
    return c


def small():
    """The smaller size alone."""
    c = grid()
    with c.unlocked():
        del c.grid.llms.large
    return c


@pytest.fixture(scope="module")
def done(tmp_path_factory, mesh1):
    """A finished grid's folder and its rows; its report has no figures."""
    folder = tmp_path_factory.mktemp("video") / "grid"
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh1):
        patch.setattr("vlm_jax.reports.figures.run_figures", lambda *given, **more: [])
        with workdir.claim(folder, run.checked(small()), grid=True) as claimed:
            run.run(claimed, "vlm-jax grid")
    return folder, records.read(folder / "rows.jsonl")


def test_a_cell_of_each_number_of_frames_has_its_own_name_and_configuration():
    cells = cells_of(grid())
    names = [cell.name for cell in cells]
    assert "small-v4-f3-token_packer-s0" in names and len(set(names)) == len(names) == 4
    assert {(c.frames, c.config.data.frames, c.recipe.row[1]) for c in cells} == {
        (1, 1, 1), (3, 3, 3),
    }  # fmt: skip
    assert len({workdir.digest(cell.config) for cell in cells}) == len(cells)
    shared = grid(compressor=dict(kind="random", tokens=4))
    assert {c.model for c in cells_of(shared) if c.frames == 3 and not c.blind} == {
        "small-v36-f3-none-s0", "large-v36-f3-none-s0",
    }  # fmt: skip


@pytest.mark.parametrize("change, said", [
    (lambda c: c.data.update(frames=2), "grid.frames=.* and data.frames=2"),
    (lambda c: c.grid.update(frames=(1, 1)), "name each number once"),
    (lambda c: c.grid.update(frames=(0, 1)), "whole number from 1"),
    (lambda c: c.data.update(images_per_row=2), "or of one clip"),
])  # fmt: skip
def test_frames_that_a_grid_cannot_have_are_refused(change, said):
    c = grid()
    change(c)
    with pytest.raises(ValueError, match=said):
        cells_of(c)


@pytest.mark.parametrize("compressor, pruning", [
    (dict(kind="llava_mini", tokens=4), {}),
    (dict(kind="voco", tokens=1), {}),
    (dict(kind="pool", tokens=4), dict(kind="fastv", tokens=(1,), layers=(1,))),
])  # fmt: skip
def test_what_takes_one_image_is_refused_before_anything_is_trained(compressor, pruning, mesh1):
    c = grid(compressor=compressor, pruning=pruning)
    cell = next(cell for cell in cells_of(c) if cell.frames == 3 and cell.llm == "large")
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="takes one image in a row"):
        stages.check(cell.recipe, cell=True)


def test_a_row_says_its_frames_and_pays_for_each(done):
    _, rows = done
    assert sorted(row.frames for row in rows) == [1, 3]
    by_cell = {row.cell: row for row in rows}
    one, three = (by_cell[f"small-v4-f{T}-token_packer-s0"] for T in (1, 3))
    assert one.V == three.V == 4 and one.Q == three.Q
    for phase in ("encoder", "compressor"):
        assert three.flops[phase] == 3 * one.flops[phase] > 0
    cell = next(c for c in cells_of(grid()) if c.name == one.cell)
    llm = cell.recipe.model.llm
    assert three.flops["prefill"] == cost.llm_flops(llm, three.Q + 3 * 4)
    assert {name: t["family"] for name, t in one.tasks.items()} == dict.fromkeys(
        ("direction", "order", "events"), "video"
    )
    assert one.data_hash != three.data_hash and one.tasks["order"]["n"] == 12
    assert records.Row.from_json(three.to_json()) == three
    older = json.loads(one.to_json())
    del older["frames"]
    assert records.Row.from_json(json.dumps(older)).frames == 1


def test_a_cell_is_evaluated_on_clips_of_its_frames(done):
    folder, rows = done
    cell = folder / "cells" / "small-v4-f3-token_packer-s0"
    assert main(["evaluate", f"--workdir={cell}"]) == 0
    scores = json.loads((cell / "scores-test.json").read_text())
    row = next(row for row in rows if row.cell == cell.name)
    assert all(scores[task]["score"] == s["score"] for task, s in row.tasks.items())


def test_a_page_of_each_number_of_frames_counts_all_their_tokens(done):
    folder, rows = done
    most = (folder / "report" / "index.html").read_text()
    first = (folder / "report" / "frames-1" / "index.html").read_text()
    assert "Clips of 3 frames: V counts the tokens of all of them" in most
    assert "frames-1/index.html" in most and "Clips of 1 frames" in first
    assert "small-v4-f3" in most and "small-v4-f3" not in first
    assert "vlm-jax plan --frames=T" in most
    with (folder / "report" / "cells.csv").open() as file:
        assert sorted(line["frames"] for line in csv.DictReader(file)) == ["1", "3"]
    assert len(rows) == 2


def test_rows_of_clips_give_the_law_of_frames_and_a_plan(tmp_path, capsys):
    """Rows as a grid writes them, of a law that is known."""
    truth = lambda N, V, T: 0.2 * N**-0.3 + 0.2 * T**-0.5 + (0.1 + 0.05 * T**-0.3) * V**-0.4  # noqa: E731
    some = records.Row(
        cell="", llm="", llm_parameters=0, vit_parameters=1, compressor_parameters=1,
        compressor="pool", query="none", blind=False, V=1, Q=20.0, G=2.0, seed=0, tasks={},
        families={}, flops=dict.fromkeys(("encoder", "compressor", "question", "prefill",
        "decode"), 1.0), train={}, evaluate_seconds=1.0, protocol="embedded", prompt="bare",
        parser="words", data_hash="", config_hash="", commit="", versions={}, machine="cpu",
        created="",
    )  # fmt: skip
    rows = []
    for N in (0.5, 1, 3, 7):
        for V in (1, 4, 16, 36):
            for T in (1, 4, 8):
                score = dict(score=1 - truth(N, V, T), stderr=0.003, n=1000)
                one = dict(order=score | dict(family="video", metric="accuracy"))
                rows.append(dataclasses.replace(
                    some, cell=f"{N}-{V}-{T}", llm=f"{N}", llm_parameters=round(N * 1e9), V=V,
                    frames=T, tasks=one, families=dict(video=score),
                ))  # fmt: skip
    records.write(tmp_path / "rows.jsonl", rows)
    assert isinstance(records.points(rows), Points)
    assert sorted(set(records.points(rows).frames)) == [1, 4, 8]
    flags = ["fit", f"--rows={tmp_path}/rows.jsonl", f"--out={tmp_path}/law", "--bootstrap=20"]
    assert main(flags) == 2 and "--form=frames" in capsys.readouterr().err
    assert main([*flags, "--form=frames"]) == 0
    assert json.loads((tmp_path / "law/law.json").read_text())["rmse"] < 0.005
    capsys.readouterr()
    plan = ["plan", f"--law={tmp_path}/law/law.json", "--flops=1e14", "--text-tokens=20"]
    costs = {}
    for T in (1, 8):
        assert main([*plan, f"--frames={T}"]) == 0
        costs[T] = json.loads(capsys.readouterr().out)
    assert costs[8]["cost_model"] == "full" != costs[1]["cost_model"]
    found = report.write(tmp_path)
    assert found["laws"]["video"]["form"] == "frames" and found["cells"] == len(rows)
    assert found["pages"] == {"1": "frames-1/index.html", "4": "frames-4/index.html",
                              "8": "index.html"}  # fmt: skip
    # At one T the truth is a sum: a page's law is the best form that fits.
    assert "By the additive form" in (tmp_path / "report/index.html").read_text()


def test_the_flops_of_a_clip_are_the_compilers(mesh1):
    """Encoder, compressor and prefill of three frames, against XLA's count of one program."""
    c = tiny.config(vit=WIDE_VIT, llm=WIDE_LLM, compressor=dict(kind="pool", tokens=9))
    size, T, Q = tiny.size(c), 3, 40
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: vlm.build(size, nnx.Rngs(0)))
        batch = dict(
            ids=shape(1, Q, dims=("batch", "none"), dtype=jnp.int32),
            length=shape(1, dims=("batch",), dtype=jnp.int32),
            image_at=shape(1, T, dims=("batch", "none"), dtype=jnp.int32),
            pixels=shape(1, T, 48, 48, 3, dims=("batch", *["none"] * 4)),
        )
        got = flops(lambda m, b: m.prefill(b, new_tokens=1)[0], model, batch)
    vit, llm = ViTSize.of(c.vit), LLMSize.of(c.llm)
    counted = cost.request_flops(vit, size.compressor, llm, Q=Q, G=1, frames=T)
    assert got == pytest.approx(counted.total, rel=0.01)
    one = cost.request_flops(vit, size.compressor, llm, Q=Q, G=1)
    assert counted.encoder == 3 * one.encoder and np.isfinite(got)


def test_every_example_of_a_grid_is_a_clip(tmp_path, mesh1):
    c = grid()
    c.data.video_share = 0.5
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="are no clip of so many frames"):
        run.train_cell(c, tmp_path / "g", cell="small-v4-f3-token_packer-s0")
