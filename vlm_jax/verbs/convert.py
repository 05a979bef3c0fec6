# SPDX-License-Identifier: Apache-2.0
"""Published weights to a model folder of this package, and back to a folder of transformers.

    vlm-jax convert --from=llava-1.5-7b-hf --to=DIR --dtype=bfloat16
    vlm-jax convert --from=llava-v1.5-7b --vision=clip-vit-large-patch14-336 --to=DIR
    vlm-jax convert --vision=DIR --llm=DIR --compressor=quecc --tokens=36 --levels=12,16,22,23 \\
        --to=DIR
    vlm-jax convert --llm=SmolLM2-135M-Instruct.Q4_1.gguf --to=DIR
    vlm-jax convert --from=llava-1.5-7b-hf --compressor=quecc --tokens=36 --replace-compressor \\
        --to=DIR
    vlm-jax convert --from=llava-1.5-7b-hf --compressor=mmtok --tokens=16 --to=DIR
    vlm-jax convert --from=DIR --to-hf --to=DIR
    vlm-jax convert --from=WORKDIR --to-peft --to=DIR
    vlm-jax convert --from=llava-1.5-7b-hf --adapter-from=PEFT_DIR --to=DIR

--from is a published LLaVA, a model folder, or (with --to-hf or without) the --workdir of a
finished `vlm-jax train` or a cell of a grid (GRID/cells/NAME). LoRA adapters of a training are
merged unless --to-peft asks for them alone. Nothing trained is replaced unless --replace-compressor
asks for it. Tensors are converted one at a time, for models of any size. docs/weights.md lists what
can be read and what is written.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from vlm_jax import progress
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser

# The configuration of the tower of a language model that is given none.
TOWER = "configs/demo.py"


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="a model: published, converted, or trained here",
    )
    add("--to", required=True, type=Path, metavar="DIR", help="the folder to write")
    add("--to-hf", action="store_true", help="write a llava-hf folder, if that can hold the model")
    add("--to-peft", action="store_true", help="write a PEFT folder of a run's LoRA adapters")
    add(
        "--adapter-from",
        type=Path,
        metavar="DIR",
        help="a published LoRA adapter to merge (default: none)",
    )
    add("--dtype", metavar="KIND", help="float32, bfloat16 or float16 (default: as stored)")
    add(
        "--vision",
        type=Path,
        metavar="DIR",
        help="folder of a CLIP or SigLIP tower; a model that was trained or converted here, whose "
        "tower is taken; or a configuration, whose tower is drawn with --seed (default with "
        f"--llm: {TOWER})",
    )
    add(
        "--llm",
        type=Path,
        metavar="DIR",
        help="folder of a Llama, Vicuna, Mistral or Qwen1.5 to Qwen3, or a GGUF file of one",
    )
    add(
        "--compressor",
        choices=sorted(COMPRESSORS),
        metavar="METHOD",
        help=f"{', '.join(sorted(COMPRESSORS))} (default: what --from has)",
    )
    add(
        "--tokens",
        type=int,
        metavar="V",
        help="visual tokens of an image (0: adaptive; default: as published)",
    )
    add(
        "--levels",
        metavar="LIST",
        help="blocks of the tower that the compressor reads, such as 12,16,22,23 (default: the "
        "last but one)",
    )
    add(
        "--heads",
        type=int,
        metavar="N",
        help="attention heads of the compressor (default for a new one: 8)",
    )
    add(
        "--query",
        metavar="HOW",
        help="quecc: how the question is read: none, separate or prefix (default for a new one: "
        "separate)",
    )
    add("--pruning", **cli.pruning_flag("in --from"))
    add(
        "--projector",
        type=Path,
        metavar="FILE",
        help="stage 1 weights of the compressor (default: new ones)",
    )
    add(
        "--text-tower",
        type=Path,
        metavar="DIR",
        help="cdpruner: folder of the whole CLIP that reads questions (default: --vision)",
    )
    add(
        "--replace-compressor",
        action="store_true",
        help="replace the trained compressor of --from",
    )
    add("--seed", type=cli.seed_flag, metavar="N", default=0, help="of new weights")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of the tokenizer (default: that of the LLM)",
    )
    add("--add-image-token", action="store_true", help="with --to-hf, if the tokenizer has none")
    add(
        "--allow-missing",
        default="",
        metavar="PATTERNS",
        help="tensors that may be missing: names with *, separated by commas (default: none)",
    )
    add(
        "--allow-surplus",
        default="",
        metavar="PATTERNS",
        help="tensors that may be ignored: names with *, separated by commas (default: none)",
    )


def run(options: argparse.Namespace) -> int:
    """Converts; 0."""
    from vlm_jax.training import runs
    from vlm_jax.weights import adapters, conversion, folder, llama_cpp

    dtype = folder.kind_of(options.dtype) if options.dtype else None
    with (
        runs.one_device(),
        progress.doing("reading and writing the tensors"),
        contextlib.ExitStack() as stack,
    ):
        if options.to_peft:
            if options.to_hf or options.adapter_from:
                raise ValueError("--to-peft goes with neither --to-hf nor --adapter-from")
            model, about = runs.adapted(options.source, "--from")
            written = adapters.write(model, about, options.to, dtype=dtype)
            print(json.dumps(dict(to=str(options.to)) | written))
            return 0
        llm = options.llm
        if llm is not None and llm.is_file():
            own = options.tokenizer is None
            llm = stack.enter_context(llama_cpp.as_folder(llm, tokenizer=own))
        source = options.source or llm
        done = conversion.convert(
            gathered(options, llm).pruned(options.pruning),
            options.to,
            name=str(options.source or f"{options.vision or TOWER} and {options.llm}"),
            published=None if runs.is_run(source) else source,
            tokenizer=options.tokenizer,
            adapter=options.adapter_from,
            to_hf=options.to_hf,
            dtype=dtype,
            allow_missing=[p for p in options.allow_missing.split(",") if p],
            allow_surplus=[p for p in options.allow_surplus.split(",") if p],
            add_image_token=options.add_image_token,
            seed=options.seed,
        )
    for note in done.notes:
        print(note, file=sys.stderr)
    print(json.dumps(done.facts))
    return 0


def gathered(options: argparse.Namespace, llm: Path | None) -> Any:
    """The model that the flags name, a `weights.folder.Model`; its tensors are not read yet.

    `llm` is the folder of --llm.
    """
    from vlm_jax.cost import described
    from vlm_jax.training import runs
    from vlm_jax.weights import conversion, folder, sources
    from vlm_jax.weights.methods import Wish

    reads_clip = options.compressor and COMPRESSORS[options.compressor].clip
    if options.text_tower and not reads_clip:
        kinds = ", ".join(kind for kind, method in COMPRESSORS.items() if method.clip)
        raise ValueError(f"--text-tower is for --compressor={kinds}, which reads questions with it")
    wish = Wish(
        options.compressor,
        options.tokens,
        options.heads,
        sources.numbers(options.levels),
        options.query,
        options.projector,
        options.seed,
        options.replace_compressor,
        options.text_tower or (options.vision if reads_clip else None),
    )
    vision = options.vision
    if vision is None and llm and not options.source:
        vision = Path(TOWER)
    if vision is not None and vision.suffix == ".py":
        vision = described.load(vision, "get_config")()
    elif vision is not None and (runs.is_run(vision) or folder.is_model(vision)):
        vision = runs.read(vision, "--vision")
    if options.source and not options.llm and options.source.is_dir():
        if runs.is_run(options.source):
            return sources.reselected(
                runs.read(options.source, "--from"),
                vision=options.vision,
                wish=wish,
                path=options.source,
                what="a training run",
            )
    return conversion.read_source(options.source, vision=vision, llm=llm, wish=wish)
