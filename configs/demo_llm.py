# SPDX-License-Identifier: Apache-2.0
"""The demo with pictures that people know, for which a larger encoder is trained.

    vlm-jax data fetch pictures
    vlm-jax train --config=configs/demo_llm.py --workdir=runs/llm \\
        --config.data.pictures=$HOME/.cache/vlm_jax/packages

The folder is that which the first command prints.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.vit.update(dict(depth=4, width=128, mlp=512, heads=4, levels=(4,)))
    c.llm.vocab = 2048  # the names have 1,400 words
    c.data.update(dict(picture_share=0.5, text_length=40, question_length=32))

    c.encoder.update(dict(steps=2500, batch=64, learning_rate=2e-3, clip_norm=1.0))
    c.contrast.update(dict(weight=1.0, width=128))
    return c
