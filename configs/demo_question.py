# SPDX-License-Identifier: Apache-2.0
"""What QueCC's question is worth, and its convolution: an ablation on the demo's benchmark.

    vlm-jax grid --config=configs/demo_question.py --workdir=runs/demo_question

The grid proper is QueCC as published; beside it the question read once as the prompt's prefix, no
question at all, and pooling in the place of the convolution.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.compressor.update(dict(kind="quecc", query="separate", downsample="conv"))
    # As many tokens as the longest question, and as the longest answer with its end behind it:
    # a prefix has room for each, and all cells read rows of one length.
    c.data.update(dict(question_length=24, text_length=24 + 19))
    # Windows of more than one patch, so that there is something to convolve.
    c.grid.tokens = (1, 4, 9)
    with c.unlocked():
        c.grid.baselines = (
            ("blind", 1),
            *(
                ("quecc", tokens, fields)
                for fields in (dict(query="prefix"), dict(query="none"), dict(downsample="pool"))
                for tokens in c.grid.tokens
            ),
        )
    return c
