# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of LLaVA-1.5 by LoRA: adapters of rank 128 in the LLM at 2e-4, the compressor at 2e-5.

vlm-jax train --config=configs/finetune_lora.py --workdir=DIR --config.start_from=DIR \\
    --config.data.path=llava_v1_5_mix665k.json
"""

from configs import finetune


def get_config():
    c = finetune.get_config()
    # haotian-liu/LLaVA scripts/v1_5/finetune_lora.sh; its dropout of 0.05 has no field here.
    c.lora.update(dict(rank=128, alpha=256.0))
    c.finetune.update(dict(learning_rate=2e-4, compressor_rate=0.1))
    return c
