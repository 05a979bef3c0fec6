# SPDX-License-Identifier: Apache-2.0
"""Every compressor on the demo's benchmark, and what QueCC's question and convolution are worth.

    vlm-jax grid --config=configs/demo_methods.py --workdir=runs/demo_methods

The grid proper is QueCC as published. Beside it: its question read once as the prompt's prefix, no
question at all, and pooling in the place of its convolution; then the other methods.
"""

from configs import demo

TOKENS = (1, 4, 9)  # windows of more than one patch, so that there is something to choose from


def get_config():
    c = demo.get_config()
    # PruMerge asks the block behind the last level. Nothing trains that block here: what PruMerge
    # keeps is as good as drawn by lot, and its rows show what it costs.
    c.vit.depth = 3
    c.compressor.update(dict(kind="quecc", query="separate", downsample="conv", scales=(1, 9, 36)))
    # A prefix that holds the question needs it before the image; so all cells have it there.
    c.data.template = "question_first"
    # As many tokens as the longest question, and as the longest answer with its end behind it:
    # a prefix has room for each, and all cells read rows of one length.
    c.data.update(dict(question_length=24, text_length=24 + 19))
    c.grid.tokens = TOKENS
    variants = (dict(query="prefix"), dict(query="none"), dict(downsample="pool"))
    others = ("token_packer", "pool", "downsample", "mqt")
    with c.unlocked():
        c.grid.llms = {"30k": demo.llm(32, 2)}
        c.grid.seeds = (0, 1)  # of one method, seeds differ by more than the questions' sampling
        c.grid.baselines = (
            ("blind", 1),
            *(("quecc", tokens, fields) for fields in variants for tokens in TOKENS),
            *((kind, tokens) for kind in others for tokens in TOKENS),
            *(("m3", tokens) for tokens in c.compressor.scales),
            *(("prumerge", tokens) for tokens in (4, 9)),
            ("none", 36),
        )
    return c
