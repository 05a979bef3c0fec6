# SPDX-License-Identifier: Apache-2.0
"""What a grid says of the time that is left follows from the cells that are done."""

from dataclasses import replace

import jax
import made_rows
import pytest
import tiny

from vlm_jax.training.cells import cells_of, describe
from vlm_jax.training.forecast import remaining, standing


def test_what_is_left_is_a_fixed_time_and_a_time_by_flop():
    law = [(f, 10 + f / 1e9) for f in (1e9, 4e9, 9e9)]
    assert remaining(law, [2.0, 4.0], [16e9, 1e9], 3) == pytest.approx(26 + 11 + 3 * 3)
    # Of one size alone nothing is known but its time, and no time is below zero.
    assert remaining([(1e9, 7.0)], [1.0], [9e9], 1) == pytest.approx(8)
    falling = [(1e9, 30.0), (9e9, 10.0)]
    assert remaining(falling, [0.0], [1e12], 1) == pytest.approx(20, rel=1e-3)


def test_a_grid_says_how_far_it_is(mesh1):
    with jax.set_mesh(mesh1):
        cells = cells_of(tiny.get_config())
        flops = {cell.name: describe(cell)[2] for cell in cells}

        def row(name):
            seconds = 30 + flops[name] / 1e6
            train = dict(flops=flops[name], seconds=seconds)
            return replace(made_rows.rows()[0], train=train, evaluate_seconds=5.0)

        rows = {cell.name: row(cell.name) for cell in cells[:3]}
        line = standing(cells, rows, 125.0)
        left = sum(35 + flops[cell.name] / 1e6 for cell in cells[3:])
        minutes, seconds = divmod(round(left), 60)
        assert line.startswith("run: 3 of 8 cells, 0:02:05 so far, about ")
        assert f"about {minutes // 60}:{minutes % 60:02d}:{seconds:02d} to go" in line
        done = {cell.name: row(cell.name) for cell in cells}
        assert standing(cells, done, 3600.0) == "run: 8 of 8 cells, 1:00:00 so far"
