# SPDX-License-Identifier: Apache-2.0
"""The page's planner is Python's: random settings, to a millionth, and every refusal's words.

Here in V8, Chromium's engine; on the page itself, in Chromium, in tests/test_browser.py.
"""

import json

import made_settings
import numpy as np
import pytest
from py_mini_racer import MiniRacer

from vlm_jax.planning import exported, exported_costs
from vlm_jax.reports import page as pages


def test_the_script_plans_as_python_does(tmp_path):
    """16 settings of four pages: forms that share draws, cells, mixtures, chips, types."""
    rng, answered = np.random.default_rng(0), 0
    script = MiniRacer()
    script.eval(pages.TEMPLATES.get_template("planner.js").render())
    script.eval("const plans = (data, asked) => JSON.stringify(asked.map(planner(data).plan))")
    for made in made_settings.few_pages(tmp_path):
        of_page = made_settings.data(made)
        settings = made_settings.settings(made, of_page, 4, rng)
        plans = json.loads(script.call("plans", of_page, settings))
        for number, (setting, plan) in enumerate(zip(settings, plans, strict=True)):
            where = f"{made} {number} {setting}"
            made_settings.assert_same(plan, made_settings.by_python(made, setting), where)
            answered += "error" not in plan
    assert answered > 5


def test_a_polynomial_is_found_again():
    """Six coefficients to the bit, from values at small whole numbers; no zeros at the end."""
    asked = [3e12, 2.5e10, 1.5e6, 2.0, 0.5, 7.0]
    of = [1, 0, 0, 0, 0, 0]
    for wanted in (asked, asked[:3], of[:1], []):
        c = wanted + [0] * (6 - len(wanted))
        found = exported_costs.polynomial(
            lambda Q, p, c=c: c[0] + c[1] * Q + c[2] * Q**2 + c[3] * p + c[4] * p**2 + c[5] * p * Q
        )
        assert found == wanted


def test_what_the_page_cannot_do_is_refused():
    law = made_settings.parsing.read_laws(str(made_settings.DEMO), None)
    usual = dict(flops=1e7, text_tokens=9, config=str(made_settings.HOME / "configs/demo.py"))
    with pytest.raises(ValueError, match="leave --rate out"):
        exported.data(law, None, usual | dict(rate=2.0))
    with pytest.raises(ValueError, match="leave --frames out"):
        exported.data(law, None, usual | dict(frames=4))
    with pytest.raises(ValueError, match="leave --continuous out"):
        exported.data(law, None, usual | dict(llms="continuous", tokens="continuous"))
    with pytest.raises(ValueError, match="nothing meets the budget"):
        exported.data(law, None, usual | dict(flops=1.0))
