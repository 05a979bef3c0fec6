# SPDX-License-Identifier: Apache-2.0
"""MQT and M3 on the demo's benchmark: one training per LLM size serves every number of tokens.

    vlm-jax grid --config=configs/demo_matryoshka.py --workdir=runs/demo_matryoshka

Beside them the demo's own method, trained for each number by itself. A step of M3 costs as much as
one at each of its scales together: steps are equal here, not budgets.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.compressor.kind = "mqt"
    # Published are 1, 9 and 36 of 6 x 6; with 4 every row is of a number that was trained.
    c.compressor.scales = (1, 4, 9, 36)
    others = [(kind, tokens) for kind in ("m3", "token_packer") for tokens in c.grid.tokens]
    c.grid.baselines = (("blind", 1), *others)
    return c
