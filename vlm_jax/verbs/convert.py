# SPDX-License-Identifier: Apache-2.0
"""Published weights to a model folder of this package, and back to a folder of transformers.

    vlm-jax convert --from=llava-1.5-7b-hf --to=DIR [--dtype=bfloat16]
    vlm-jax convert --from=llava-v1.5-7b --vision=clip-vit-large-patch14-336 --to=DIR
    vlm-jax convert --vision=DIR --llm=DIR --compressor=quecc --tokens=36 --levels=12,16,22,23 \\
        --to=DIR
    vlm-jax convert --from=llava-1.5-7b-hf --compressor=quecc --tokens=36 --replace-compressor \\
        --to=DIR
    vlm-jax convert --from=DIR --to-hf --to=DIR
    vlm-jax convert --from=WORKDIR --to-peft --to=DIR
    vlm-jax convert --from=llava-1.5-7b-hf --adapter-from=PEFT_DIR --to=DIR

--from is a published LLaVA, a model folder, or (with --to-hf or without) the --workdir of a
finished `vlm-jax train` or a cell of a grid (GRID/cells/NAME). LoRA adapters of a training are
merged unless --to-peft asks for them alone. Nothing trained is replaced unless --replace-compressor
asks for it. Tensors pass through one at a time, whatever the size of the model. docs/weights.md
says what can be read and what is written.
"""

import argparse
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

from vlm_jax import progress
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.serving import chats
from vlm_jax.training import runs
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.workdir import finished
from vlm_jax.verbs import cli
from vlm_jax.weights import adapters, folder, hf, names, sources
from vlm_jax.weights.classes import within
from vlm_jax.weights.methods import Wish


def flags() -> argparse.ArgumentParser:
    """The flags of the verb."""
    parser = argparse.ArgumentParser(
        prog="vlm-jax convert", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--from", dest="source", type=Path, help="a model: published, converted, or trained here")
    add("--to", required=True, type=Path, help="the folder to make")
    add("--to-hf", action="store_true", help="make a llava-hf folder where that can hold the model")
    add("--to-peft", action="store_true", help="make a PEFT folder of a run's LoRA adapters")
    add("--adapter-from", type=Path, help="folder of a published LoRA adapter to merge")
    add("--dtype", help="float32, bfloat16 or float16 (default: as it is stored)")
    add("--vision", type=Path, help="folder of a CLIP or SigLIP tower")
    add("--llm", type=Path, help="folder of a Llama, Vicuna, Mistral or Qwen1.5 to Qwen3")
    add("--compressor", choices=sorted(COMPRESSORS), help="method (default: what --from has)")
    add("--tokens", type=int, help="visual tokens that it hands to the LLM (0: as many as needed)")
    add("--levels", help="blocks of the tower that it reads (new: the last but one)")
    add("--heads", type=int, help="of its attention (new: 8)")
    add("--query", help="quecc: who reads the question (new: separate)")
    add("--projector", type=Path, help="weights of stage 1 for it (default: fresh ones)")
    add("--replace-compressor", action="store_true", help="drop the trained one of --from for it")
    add("--seed", type=cli.seed_flag, default=0, help="of fresh weights")
    add("--tokenizer", type=Path, help="folder of the tokenizer (default: that of the LLM)")
    add("--add-image-token", action="store_true", help="with --to-hf, if the tokenizer has none")
    add("--allow-missing", default="", metavar="PATTERNS", help="tensors that stay fresh")
    add("--allow-surplus", default="", metavar="PATTERNS", help="tensors that are left out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Converts; 0, or 2 after saying on stderr what was wrong."""
    cli.keep_freed_memory()
    options = flags().parse_args(argv)

    def body() -> int:
        with runs.one_device(), progress.doing("reading and writing the tensors"):
            print(json.dumps(run(options)))
        return 0

    return cli.report_errors("convert", body)


def run(options: argparse.Namespace) -> dict:
    """Converts as the flags say; returns what was made."""
    dtype = folder.kind_of(options.dtype) if options.dtype else None
    if options.to_peft:
        return export_adapter(options, dtype)
    model = gather(options)
    chats.settle(model, published=published(options), tokenizer=options.tokenizer)
    patterns = {
        name: [p for p in getattr(options, name).split(",") if p]
        for name in ("allow_missing", "allow_surplus")
    }
    model.tie()
    apart = [[], []]
    if options.adapter_from:
        apart = adapters.merge(model, options.adapter_from, **patterns)
    with within(str(options.source or f"{options.vision} and {options.llm}")):
        missing, surplus = model.check(**patterns)
    if missing:
        model.tensors |= folder.fresh(model.size(), missing, seed=options.seed)
    model.notes |= {
        name: list(of) for name, of in (("fresh", missing), ("left_out", surplus)) if of
    }
    reason = hf.inexpressible(model) if options.to_hf else None
    room(options.to, sum(x.dtype.itemsize * math.prod(x.shape) for x in model.tensors.values()))
    if options.to_hf and reason is None:
        words = partial(chats.export, model, add_image_token=options.add_image_token)
        hf.write(model, options.to, words=words, dtype=dtype)
    else:
        folder.write(model, options.to, dtype=dtype)
    if about := model.notes.get("images"):
        print(about, file=sys.stderr)
    if reason:
        print(f"{options.to} is a model folder, not a llava-hf one: {reason}", file=sys.stderr)
    if model.tokenizer is None or not folder.has_tokenizer(model.tokenizer):
        print("no tokenizer was found: to generate, repeat with --tokenizer=DIR", file=sys.stderr)
    if said := model.notes.get("chat_template"):
        print(said, file=sys.stderr)
    for name in ("replaced", "new", "tower", "untied", "adapted"):
        if said := model.notes.get(name):
            print(f"{name}: {said}", file=sys.stderr)
    for kind, of in (
        ("fresh", missing),
        ("left out", surplus + apart[1]),
        ("of the adapter absent", apart[0]),
    ):
        if of:
            print(f"{len(of)} tensors {kind}: {names.shown(of)}", file=sys.stderr)
    return dict(
        to=str(options.to),
        layout="llava-hf" if options.to_hf and reason is None else folder.MODEL_TYPE,
        tensors=len(model.tensors),
        parameters=sum(math.prod(x.shape) for x in model.tensors.values()),
        compressor=model.compressor["kind"],
        visual_tokens=model.compressor["tokens"],
    )


def gather(options: argparse.Namespace) -> folder.Model:
    """The model that the flags name, its tensors unread."""
    wish = Wish(
        options.compressor,
        options.tokens,
        options.heads,
        sources.numbers(options.levels),
        options.query,
        options.projector,
        options.seed,
        options.replace_compressor,
    )
    compresses = wish.kind is not None and COMPRESSORS[wish.kind].compresses
    if wish.replace and compresses and wish.tokens is None:
        raise ValueError(f"--compressor={wish.kind} needs --tokens=V")
    if options.source is None:
        if not (options.vision and options.llm):
            raise ValueError("give --from=DIR, or --vision=DIR and --llm=DIR")
        return sources.assembled(options.vision, options.llm, wish)
    if options.llm:
        raise ValueError("--from=DIR is a whole model: leave --llm out")
    if not options.source.is_dir():
        raise FileNotFoundError(f"there is no folder --from={options.source}")
    if runs.is_run(options.source):
        if given := wish.said() + [f"--vision={options.vision}"] * bool(options.vision):
            raise ValueError(
                f"{options.source} is a training run: its model is converted as it is, without "
                f"{' '.join(given)}"
            )
        return runs.read(options.source, "--from")
    return sources.llava(options.source, vision=options.vision, wish=wish)


def published(options: argparse.Namespace) -> Path | None:
    """The folder whose files say how a conversation is written; None for a training run."""
    source = options.source or options.llm
    return None if runs.is_run(source) else source


def export_adapter(options: argparse.Namespace, dtype: str | None) -> dict:
    """Makes a PEFT folder of the adapters that a run has trained; returns what was made."""
    if options.to_hf or options.adapter_from:
        raise ValueError("--to-peft goes with neither --to-hf nor --adapter-from")
    workdir = options.source
    if workdir is None or not runs.is_run(workdir):
        raise ValueError(
            f"--to-peft needs --from=WORKDIR, the folder of a `vlm-jax train` with "
            f"config.lora.rank, and got {workdir}"
        )
    run = runs.of(workdir, "--from")
    if not run.config.lora.rank:
        raise ValueError(f"{workdir} has no adapters to export: it was trained with lora.rank=0")
    model = finished(run.home, Recipe.of(run.config), merge=False)
    about = runs.described(workdir, "--from")
    return dict(to=str(options.to)) | adapters.write(model, about, options.to, dtype=dtype)


def room(target: Path, size: int) -> None:
    """OSError unless the disk of `target` has `size` bytes left, before anything is written."""
    parent = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(parent).free) < size:
        raise OSError(
            f"{target} needs about {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left: "
            "make room, or choose another disk"
        )
