# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of LLaVA-1.5: the compressor alone on captions, 558k images, batch 256, learning rate
1e-3.

vlm-jax train --config=configs/align.py --workdir=DIR --config.data.path=blip_laion_cc_sbu_558k.json
"""

from configs import base, sizes


def get_config():
    c = base.get_config()
    c.vit.update(sizes.VIT["clip-vit-large-patch14-336"])
    c.llm.update(sizes.LLM["vicuna-1.5-7b"])
    # haotian-liu/LLaVA scripts/v1_5/pretrain.sh: one epoch, square crop, captions without a
    # question.
    c.data.update(dict(template="plain", image_fit="crop", text_length=256))
    c.align.update(dict(steps=2180, batch=256, learning_rate=1e-3))
    c.finetune.steps = 0
    return c
