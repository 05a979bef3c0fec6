# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of LLaVA-1.5: compressor and LLM on the 665k mix, batch 128, learning rate 2e-5.

vlm-jax train --config=configs/finetune.py --workdir=DIR --config.start_from=DIR \\
    --config.data.path=llava_v1_5_mix665k.json

start_from is the folder of the run of configs/align.py, or a model folder.
"""

from configs import base, sizes


def get_config():
    c = base.get_config()
    c.vit.update(sizes.VIT["clip-vit-large-patch14-336"])
    c.llm.update(sizes.LLM["vicuna-1.5-7b"])
    # haotian-liu/LLaVA scripts/v1_5/finetune.sh: one epoch, padded images, rows of up to 2048
    # tokens.
    c.data.update(dict(template="vicuna_v1", image_fit="pad", text_length=2048, text_only=True))
    c.align.steps = 0
    c.finetune.update(dict(steps=5197, batch=128, learning_rate=2e-5))
    return c
