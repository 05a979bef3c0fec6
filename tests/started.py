# SPDX-License-Identifier: Apache-2.0
"""tests/tiny.py whose LLMs come by their weights in four ways (--config=tests/started.py).

start_from of `frozen` and `adapted`, and data.tokenizer of `fresh`, are given on the command line.
"""

from tests import tiny

WORDS = dict(template="checkpoint", text_length=96, question_length=60)
SIZE = dict(
    vocab=320, width=64, mlp=96, depth=2, heads=4, kv_heads=2, head_size=16, rope_theta=1e5,
    qkv_bias=False,
)  # fmt: skip


def get_config():
    c = tiny.get_config()
    c.align.steps, c.finetune.steps = 1, 2
    c.data.test_images = 6
    c.evaluate.max_new_tokens = 2
    with c.unlocked():
        c.grid.llms = {
            "small": dict(depth=1),
            "fresh": SIZE | dict(data=WORDS | dict(tokenizer="")),
            "frozen": dict(start_from="", data=WORDS, align=dict(steps=3), finetune=dict(steps=0)),
            "adapted": dict(start_from="", data=WORDS, lora=dict(rank=2)),
        }
    c.grid.tokens = (1,)
    c.grid.baselines = ()
    return c
