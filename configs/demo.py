# SPDX-License-Identifier: Apache-2.0
"""The demo: 3 LLM sizes x 4 visual-token counts on the embedded benchmark, on 2 CPU cores in
minutes.

    vlm-jax grid --config=configs/demo.py --workdir=runs/demo
    vlm-jax train --config=configs/demo.py --workdir=runs/one

The second command trains one model, of the size in the middle.
"""

from configs import base


def llm(width: int, depth: int) -> dict:
    """A small decoder: heads of 16, SwiGLU of 8/3 the width rounded to 16, tied embeddings."""
    return dict(
        width=width,
        depth=depth,
        mlp=16 * round(8 * width / 48),
        heads=width // 16,
        kv_heads=width // 16,
    )


def get_config():
    c = base.get_config()
    c.compute_dtype = "float32"  # bfloat16 is emulated, and slower, on a CPU
    c.remat = "none"  # the activations of these models fit

    c.vit.update(
        dict(image_size=72, patch_size=12, depth=2, width=64, mlp=256, heads=4, levels=(2,))
    )
    c.llm.update(dict(vocab=192, head_size=16, tied_embeddings=True))
    c.llm.update(llm(32, 2))  # of `train`; a grid has sizes of its own
    c.compressor.update(dict(kind="token_packer", tokens=4, heads=4))

    c.data.update(
        dict(
            source="synthetic",
            train_images=20000,
            template="bare",
            text_length=28,
            question_length=26,
        )
    )

    c.encoder.update(dict(steps=1500, batch=32, learning_rate=3e-3, clip_norm=1.0))
    c.align.update(dict(steps=50, batch=64, learning_rate=2e-3, clip_norm=1.0))
    c.finetune.update(
        dict(steps=1600, batch=64, learning_rate=4e-3, clip_norm=1.0, warmup=0.05, beta2=0.98)
    )
    c.checkpoint.update(dict(every=500, keep=1))
    c.log.every = 100
    c.evaluate.update(dict(batch=128, max_new_tokens=8))

    with c.unlocked():
        c.grid.llms = {"10k": llm(16, 2), "30k": llm(32, 2), "110k": llm(64, 2)}
    c.grid.tokens = (1, 4, 9, 36)
    c.grid.baselines = (("blind", 1), ("pool", 1))
    return c
