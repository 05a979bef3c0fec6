# SPDX-License-Identifier: Apache-2.0
"""NLVR: 3 LLM sizes x 3 visual-token counts x 2 seeds on human sentences about drawn boxes.

    vlm-jax grid --config=configs/grid_nlvr.py --workdir=runs/nlvr --config.data.path=DIR

DIR holds the dev and public test splits of lil-lab/nlvr. Trained on test (990 sentences x 6 orders
of the boxes), evaluated on dev (989), as the two are all that is at hand; about 35 minutes on 2 CPU
cores.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    # Three boxes of 100 x 100 pixels on a square of 200 x 200; 12 x 12 patches, six to a box's
    # side.
    c.vit.update(dict(image_size=192, patch_size=16))
    c.llm.update(demo.llm(32, 1))
    with c.unlocked():
        c.grid.llms = {"6k": demo.llm(16, 1), "20k": demo.llm(32, 1), "60k": demo.llm(48, 2)}
    c.data.update(dict(source="nlvr", path="data/nlvr", template="question_first"))
    c.data.update(dict(text_length=40, question_length=38))
    c.encoder.steps = 600
    c.finetune.update(dict(steps=1500, learning_rate=2e-3, weight_decay=0.05))
    c.evaluate.max_new_tokens = 2
    c.grid.tokens = (1, 4, 36)
    c.grid.seeds = (0, 1)
    c.grid.baselines = (("blind", 1),)
    return c
