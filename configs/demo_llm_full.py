# SPDX-License-Identifier: Apache-2.0
"""What does a pretrained LLM buy, and how many tokens does it want? 4 ways to an LLM x 4 visual
token counts x 2 seeds, with blind models; one model of each LLM and seed serves all four counts.

    vlm-jax grid --config=configs/demo_llm_full.py --workdir=runs/demo_llm_full

Files as for configs/demo_llm.py. Hours on 2 CPU cores: stop it at any time and repeat the command.
It also goes on in an empty folder that holds the rows.jsonl of another (docs/demo_llm.md).
"""

from configs import demo, demo_llm

TOKENS = (1, 4, 9, 36)
# Of 8 images with their questions (27), for each of the three of SmolLM2's size: many small steps,
# because a compressor that is new to its LLM learns by their number.
STEPS, BATCH = 640, dict(batch=8, accumulate=1)
# All questions about an image in one row, and no chat template: its 27 tokens around each question
# would be most of what is computed.
ROWS = dict(text_length=80, question_length=40)  # one row in a hundred is cut
WORDS = dict(template="bare", **ROWS)


def get_config():
    c = demo_llm.get_config()
    c.compressor.update(dict(elastic=TOKENS, tokens=TOKENS[-1]))
    c.data.update(dict(questions_per_row=0, test_images=400, **ROWS))
    c.encoder.update(dict(steps=3000, batch=64))
    c.finetune.update(dict(steps=6000, batch=32))
    c.checkpoint.every = 160
    some, most = (demo_llm.ALIGN | BATCH | dict(steps=n) for n in (STEPS // 4, STEPS))
    tuned = demo_llm.FINETUNE | BATCH | dict(steps=STEPS - STEPS // 4)
    fresh = demo_llm.SMOLLM2 | dict(data=WORDS | dict(tokenizer="runs/smollm2/tokenizer"))
    pretrained = demo_llm.pretrained(data=WORDS)
    with c.unlocked():
        c.grid.llms = {
            "230k": demo.llm(64, 2),
            "smollm2_fresh": fresh | dict(align=some, finetune=tuned),
            "smollm2_frozen": pretrained | dict(align=most, finetune=dict(steps=0)),
            "smollm2_lora": pretrained | dict(lora=demo_llm.LORA, align=some, finetune=tuned),
        }
        c.grid.baselines = (("blind", 1, dict(elastic=())),)
    c.grid.tokens = TOKENS
    c.grid.seeds = (0, 1)
    return c
