# SPDX-License-Identifier: Apache-2.0
"""The evidence: 4 LLM sizes over 36x, 6 visual-token counts, 3 seeds; one model of each size and
seed is trained for all six counts.

    vlm-jax grid --config=configs/demo_full.py --workdir=runs/demo_full

Hours on 2 CPU cores; stop it at any time and repeat the command. It also goes on in an empty folder
that holds the rows.jsonl of another.
"""

from configs import demo

TOKENS = (1, 2, 4, 9, 18, 36)  # of 6 x 6 patches; 2 and 18 are halves and pairs


def get_config():
    c = demo.get_config()
    c.compressor.update(dict(elastic=TOKENS, tokens=TOKENS[-1]))
    c.data.train_images = 60000
    c.encoder.steps = 3000
    c.finetune.update(dict(steps=16000, batch=32, learning_rate=2e-3))
    c.checkpoint.every = 2000
    c.log.every = 500
    with c.unlocked():
        c.grid.llms = {
            "10k": demo.llm(16, 2),
            "30k": demo.llm(32, 2),
            "110k": demo.llm(64, 2),
            "350k": demo.llm(96, 3),
        }
    c.grid.tokens = TOKENS
    c.grid.seeds = (0, 1, 2)
    c.grid.baselines = (("blind", 1, dict(elastic=())),)
    return c
