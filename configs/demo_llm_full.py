# SPDX-License-Identifier: Apache-2.0
"""What does a pretrained LLM buy, and how many tokens does it want? 4 ways to an LLM x 4 visual
token counts x 2 seeds, with blind models.

    vlm-jax grid --config=configs/demo_llm_full.py --workdir=runs/demo_llm_full

Files as for configs/demo_llm.py. Hours on 2 CPU cores: stop it at any time and repeat the command.
It also goes on in an empty folder that holds the rows.jsonl of another (docs/demo_llm.md).
"""

from configs import demo, demo_llm

STEPS = 400  # of 16 examples, for each of the three that are SmolLM2's architecture


def get_config():
    c = demo_llm.get_config()
    c.data.test_images = 800
    c.encoder.update(dict(steps=6000, batch=64))
    c.finetune.steps = 1600
    some, most = (demo_llm.ALIGN | dict(steps=n) for n in (STEPS // 4, STEPS))
    tuned = demo_llm.FINETUNE | dict(steps=STEPS - STEPS // 4)
    fresh = demo_llm.SMOLLM2 | dict(data=demo_llm.WORDS | dict(tokenizer="runs/smollm2/tokenizer"))
    with c.unlocked():
        c.grid.llms = {
            "230k": demo.llm(64, 2),
            "smollm2_fresh": fresh | dict(align=some, finetune=tuned),
            "smollm2_frozen": demo_llm.pretrained(align=most, finetune=dict(steps=0)),
            "smollm2_lora": demo_llm.pretrained(lora=demo_llm.LORA, align=some, finetune=tuned),
        }
    c.grid.tokens = (1, 4, 9, 36)
    c.grid.seeds = (0, 1)
    return c
