# SPDX-License-Identifier: Apache-2.0
"""The processor of a model folder, from the folder's own facts."""

from pathlib import Path

from vlm_jax.data.images import Preparation
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.tokenizer import check_vocabulary, load_tokenizer
from vlm_jax.weights import ends, folder, preprocessor


def processor_of(stored: folder.Model) -> Processor:
    """The processor of a model folder. Raises ValueError if the folder has no tokenizer."""
    if stored.tokenizer is None or not folder.has_tokenizer(stored.tokenizer):
        raise ValueError(
            f"this model folder has no tokenizer{looked_for(stored)}: convert it again with "
            "--tokenizer=DIR"
        )
    facts, length = stored.facts, stored.facts["max_length"]
    size = stored.size()
    rows = RowFormat(
        template=facts.get("template", "vicuna_v1"),
        text_length=length,
        question_length=length // 2,
        images_per_row=1,  # of rows made by `Processor.text`; a request has as many as it needs
        blind=False,
        images=Preparation.of(preprocessor.configured(facts["image"]), size.vit.image_size),
        query=size.compressor.query,
        reads=size.compressor.reads,
        vocab=size.llm.vocab,
    )
    tokenizer, image_token = load_tokenizer(stored.tokenizer), facts.get("image_token")
    check_vocabulary(tokenizer, size.llm.vocab, image=image_token)
    processor = Processor(
        tokenizer,
        rows,
        image_token,
        text_tokenizer=stored.text_tokenizer and load_tokenizer(stored.text_tokenizer),
        text_places=getattr(size.compressor, "text_length", 0),
    )
    stop_ids = ends.stops(stored.tokenizer)
    if stop_ids is None:
        stop_ids = facts.get("ends", {}).get("stop", [])
    processor.stop_ids = tuple(dict.fromkeys([*processor.stop_ids, *stop_ids]))
    return processor


def looked_for(stored: folder.Model) -> str:
    """For a message: where no tokenizer was found, if that depends on where the command runs."""
    place = stored.tokenizer
    if place is None or place.is_absolute():
        return ""
    return f" at {place}, as seen from {Path.cwd()} (a run names it as seen from its own)"
