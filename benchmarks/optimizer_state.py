# SPDX-License-Identifier: Apache-2.0
"""What do fewer bytes of optimizer state and of frozen weights cost in loss?

    python benchmarks/optimizer_state.py [--steps=300] [--seeds=2] [--out=FILE]

The smallest cell of the demo (LLM of 10k parameters, one visual token) is trained from the same
encoder and the same first weights, once for each form; the loss is the mean over the last fifty
steps. The bytes are those of the state that the second stage keeps.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import facts  # noqa: E402

FORMS = {
    "float32": {},
    "moments in bfloat16": {"moments": "bfloat16"},
    "moments factored": {"moments": "factored"},
    "frozen weights in bfloat16": {"frozen_dtype": "bfloat16"},
}
LAST = 50


def configured(steps: int, seed: int, form: dict):
    from configs import demo

    config = demo.get_config()
    config.seed = seed
    config.llm.update(dict(config.grid.llms["10k"]))
    config.compressor.tokens = 1
    config.encoder.steps, config.log.every = 500, 1
    config.checkpoint.every = steps
    config.finetune.steps = steps
    config.frozen_dtype = form.get("frozen_dtype", config.frozen_dtype)
    for stage in (config.align, config.finetune):
        stage.moments = form.get("moments", stage.moments)
    return config


def measure(steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Loss and bytes of each form from one seed."""
    import jax

    from vlm_jax import mesh
    from vlm_jax.data.processor import Processor, RowFormat
    from vlm_jax.data.sources import Origin, open_source
    from vlm_jax.training import memory, stages
    from vlm_jax.training.features import Sight, features_of
    from vlm_jax.training.recipe import Recipe

    found: dict[str, dict[str, float]] = {}
    with (
        jax.set_mesh(mesh.make(devices=jax.devices()[:1])),
        tempfile.TemporaryDirectory() as place,
    ):
        config = configured(steps, seed, {})
        source = open_source(Origin.of(config), "train")
        tokenizer = stages.tokenizer_of("", config.llm.vocab, None, source)
        processor = Processor(tokenizer, RowFormat.of(config))
        inputs = stages.Inputs(source, processor)
        encoder = stages.pretrain_encoder(Recipe.of(config), Path(place), inputs)
        features = features_of(encoder, source, processor, Sight(), Path(place) / "features")
        for name, form in FORMS.items():
            recipe = Recipe.of(configured(steps, seed, form))
            folder = Path(place) / name.replace(" ", "-")
            folder.mkdir()
            with_features = stages.Inputs(source, processor, features)
            stages.train(recipe, folder, with_features, encoder=encoder)
            lines = (folder / "finetune/metrics.jsonl").read_text().splitlines()
            losses = [json.loads(line)["loss"] for line in lines]
            need = memory.of_stage(recipe, "finetune")
            found[name] = dict(
                loss=statistics.mean(losses[-LAST:]),
                optimizer_bytes=need.optimizer,
                parameter_bytes=need.parameters,
            )
            print(f"seed {seed}  {name:28}{found[name]['loss']:8.4f}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of the second stage")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", help="default: benchmarks/results/DATE-optimizer-state.json")
    args = parser.parse_args(argv)
    facts.use_threads(2)
    runs = [measure(args.steps, seed) for seed in range(args.seeds)]
    head = facts.of_run(__doc__.split("\n")[0], threads=2, packages=("jax", "flax", "optax"))
    facts.write(head | dict(steps=args.steps, runs=runs), "optimizer-state", args.out)
    for name in FORMS:
        losses = [run[name]["loss"] for run in runs]
        print(f"{name:28}{statistics.mean(losses):8.4f}  {[round(x, 4) for x in losses]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
