# SPDX-License-Identifier: Apache-2.0
"""tests/tiny.py with one LLM size: the smallest grid (--config=tests/one_size.py)."""

from tests import tiny


def get_config():
    c = tiny.get_config()
    with c.unlocked():
        c.grid.llms = {"only": dict(depth=1)}
    return c
