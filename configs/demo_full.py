# SPDX-License-Identifier: Apache-2.0
"""The demo at length: 4 LLM sizes x 6 visual-token counts x 2 seeds, three times the steps.

    vlm-jax grid --config=configs/demo_full.py --workdir=runs/demo_full

A few hours on 2 CPU cores; stop it at any time and repeat the command.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    # 12 x 12 patches of 6 pixels tile into six token counts; the demo's 6 x 6 only into four.
    c.vit.patch_size = 6
    c.encoder.steps = 3000
    c.finetune.steps = 6000
    with c.unlocked():
        c.grid.llms = {
            "10k": demo.llm(16, 2),
            "30k": demo.llm(32, 2),
            "60k": demo.llm(48, 2),
            "110k": demo.llm(64, 2),
        }
    c.grid.tokens = (1, 4, 9, 16, 36, 144)
    c.grid.seeds = (0, 1)
    return c
