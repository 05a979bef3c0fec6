# SPDX-License-Identifier: Apache-2.0
"""The evidence: 4 LLM sizes over 37x, 6 visual-token counts, 3 seeds; one model of each size and
seed is trained for all six counts.

    vlm-jax grid --config=configs/demo_full.py --workdir=runs/demo_full

Hours on 2 CPU cores; stop it at any time and repeat the command. docs/results/demo_full has a run.
"""

from configs import demo

TOKENS = (1, 4, 9, 16, 36, 144)


def get_config():
    c = demo.get_config()
    # 12 x 12 patches of 6 pixels tile into six token counts; the demo's 6 x 6 only into four.
    c.vit.patch_size = 6
    c.compressor.update(dict(elastic=TOKENS, tokens=TOKENS[-1]))
    c.data.train_images = 40000
    c.data.buckets = (12, 16, 20)  # most rows are half as long as the longest
    c.encoder.steps = 3000
    c.finetune.update(dict(steps=16000, batch=32, learning_rate=3e-3))
    c.checkpoint.every = 2000
    c.log.every = 500
    with c.unlocked():
        c.grid.llms = {
            "6k": demo.llm(16, 1),
            "30k": demo.llm(32, 2),
            "110k": demo.llm(64, 2),
            "240k": demo.llm(80, 3),
        }
    c.grid.tokens = TOKENS
    c.grid.seeds = (0, 1, 2)
    c.grid.baselines = (("blind", 1, dict(elastic=())),)
    return c
