# SPDX-License-Identifier: Apache-2.0
"""Prune or train? Selections of patches, which need no training, beside trained compressors.

    vlm-jax grid --config=configs/demo_selection.py --workdir=runs/demo_selection

Two LLMs, three seeds. TokenPacker, pooling and QueCC are an elastic model each for all their V, MQT
is one by itself; all selections answer with the model without compression. Windows of the
36 patches give 18 tokens and not 16. Hours on 2 CPU cores: stop it and repeat the command.
"""

from configs import demo

TRAINED = (1, 4, 9, 18, 36)
SELECTED = (1, 4, 9, 16)
SELECTIONS = ("divprune", "mmtok", "visionzip", "vispruner", "random", "uniform")
OWN = dict(elastic=())  # V is fixed, or free by the method's nature


def get_config():
    c = demo.get_config()
    c.compressor.update(dict(elastic=TRAINED, tokens=TRAINED[-1]))
    c.finetune.update(dict(steps=4000, batch=32, learning_rate=2e-3))
    c.checkpoint.every = 2000
    with c.unlocked():
        c.grid.llms = {"10k": demo.llm(16, 2), "30k": demo.llm(32, 2)}
        c.grid.seeds = (0, 1, 2)
        c.grid.baselines = (
            ("blind", 1, OWN),
            ("none", 36, OWN),
            *((kind, tokens, OWN) for kind in SELECTIONS for tokens in SELECTED),
            *(("pool", tokens) for tokens in TRAINED),
            *(("quecc", tokens, dict(downsample="pool")) for tokens in TRAINED),
            *(("mqt", tokens, OWN) for tokens in (1, 4, 9, 16, 36)),
            *(("downsample", tokens, OWN) for tokens in (4, 9)),
            ("voco", 4, OWN),
        )
    c.grid.tokens = TRAINED
    return c
