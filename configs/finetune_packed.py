# SPDX-License-Identifier: Apache-2.0
"""configs/finetune.py on packed rows: about 6 examples in each, a sixth of the FLOPs.

vlm-jax train --config=configs/finetune_packed.py --workdir=DIR --config.start_from=DIR \\
    --config.data.path=llava_v1_5_mix665k.json
"""

from configs import finetune


def get_config():
    c = finetune.get_config()
    # As LLaVA, text and visual tokens together are 2048 at most.
    c.data.update(dict(text_length=2048 - c.compressor.tokens, row_length=2048, row_images=8))
    # Rows: about 128 examples of its mix. The stage says how many they are, and steps of an epoch.
    c.finetune.batch = 20
    return c
