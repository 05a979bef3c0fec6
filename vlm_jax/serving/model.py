# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that answers: images and prompts in, text out, in batches of few shapes.

    from vlm_jax import VLM

    model = VLM.from_checkpoint("models/llava")
    answer = model.generate("cat.jpg", "What is this?", max_new_tokens=64)[0]
    answer.text, answer.visual_tokens, answer.first_token_seconds

docs/generation.md says what is compiled when, and what was measured.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax import arguments, hosts
from vlm_jax import mesh as meshes
from vlm_jax.data.example import Example
from vlm_jax.data.pictures import check_exif
from vlm_jax.data.processor import Processor, Tokens
from vlm_jax.models import vlm

# Callers of this file need what it gives and takes.
from vlm_jax.serving.answer import Answer as Answer
from vlm_jax.serving.answer import Drawing as Drawing
from vlm_jax.serving.decoder import Decoder, Sampling, check_drawing
from vlm_jax.serving.requests import (
    Picture,
    Prompt,
    Request,
    TooLong,
    batch_of,
    bucket_of_images,
    conversation,
    digest,
    listed,
    picture,
)
from vlm_jax.serving.summaries import Summaries
from vlm_jax.serving.words import Text, Words
from vlm_jax.training import runs
from vlm_jax.weights import folder
from vlm_jax.weights.processors import processor_of

MOST_NEW_TOKENS = 256  # of an answer without a set limit, if they fit


class VLM:
    """A model with its processor, on a mesh.

    Args:
      model: cannot be used afterwards.
      processor: makes its tokens and pixels.
      max_length: most tokens of a row: prompt, visual tokens and answer together.
      mesh: of the devices; batches are sharded over its data and fsdp axes.
    """

    def __init__(self, model: vlm.VLM, processor: Processor, *, max_length: int, mesh: Mesh):
        self.processor, self.max_length, self.mesh = processor, max_length, mesh
        self.compressor, self.width = model.compressor, model.llm.embedding[...].shape[1]
        with jax.set_mesh(mesh):
            self.decoder = Decoder(model, stop_ids=processor.stop_ids, consume=True)
            # The constant start of all prompts is read once, unless the compressor reads it.
            own = model.compressor.reads_text
            self.prefix = [] if own else processor.constant_prefix()
            self.prefix_pass = self.decoder.read_prefix(self.prefix)
        # Where text reads a summary of its image alone, an image is read once for all questions.
        summarizes, before = model.compressor.method.summarizes, processor.bos
        self.summaries = Summaries(self.decoder.model, mesh, before=before) if summarizes else None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | PurePath,
        *,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        pruning: str | None = None,
    ) -> "VLM":
        """The model of a folder: of `vlm-jax convert`, a finished `vlm-jax train`, a grid's cell.

        Args:
          dtype: of weights and activations, float32 or bfloat16; default: as stored.
          mesh: default: all devices on the data axes.
          pruning: such as "fastv:tokens=64", as `--pruning` of `vlm-jax convert`; default: that of
            the folder.
        Raises:
          FileNotFoundError, ValueError: if it is not a model folder, with the way to make one.
        """
        stored = runs.read(path, "--checkpoint").pruned(pruning)
        return cls.of(stored, dtype=dtype, mesh=mesh)

    @classmethod
    def of(
        cls, stored: folder.Model, *, dtype: str | None = None, mesh: Mesh | None = None
    ) -> "VLM":
        """The model of `weights.folder`, its tensors read once, straight into their shards."""
        mesh = mesh or meshes.make()
        with jax.set_mesh(mesh):
            model = placed(stored, dtype)
        return cls(model, processor_of(stored), max_length=stored.facts["max_length"], mesh=mesh)

    def generate(
        self,
        images: Picture | Sequence[Picture | Sequence[Picture]],
        prompts: Prompt | Sequence[Prompt],
        *,
        exif: str = "apply",
        frames: int = 1,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        visual_tokens: int | None = None,
        batch: int = 8,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list["Answer"]:
        """Answers, one for each prompt, in order.

        Args:
          images: for each prompt a path, a PIL image, uint8 [H, W, 3], a list of several of these,
            or None; one for all prompts if it is no list.
          prompts: a question, or a conversation as a list [question, answer, ..., question]. Each
            "<image>" in the questions stands for the next image; without any, all images belong to
            the first question, whose template places them.
          exif: "apply" rotates an image as its EXIF orientation says, "ignore" takes the pixels as
            stored.
          frames: T, if images are frames: each T in a row are a clip, which has one mark.
          max_new_tokens, temperature, top_p, seed, visual_tokens, batch, on_text: as in `answer`.
        Raises:
          ValueError, OSError: if something cannot be answered, before anything is; for an image
            with its number.
        """
        check_exif("exif", exif)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = list(images) if isinstance(images, (list, tuple)) else [images] * len(prompts)
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} images and {len(prompts)} prompts: give one image (or None, or a "
                "list of several) for each prompt, or a single one for all"
            )
        requests = []
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            pictures = []
            for k, one in enumerate(listed(image)):
                name = f"image {number}[{k}]" if isinstance(image, (list, tuple)) else (
                    f"image {number}")  # fmt: skip
                try:
                    pictures.append(picture(one, exif=exif))
                except (ValueError, OSError) as error:
                    raise type(error)(f"{name}: {error}") from error
            requests.append(self.request(pictures, prompt, frames=frames))
        return self.answer(
            requests,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            visual_tokens=visual_tokens,
            batch=batch,
            on_text=on_text,
        )

    def request(self, image: Any, prompt: Any, *, exif: str = "apply", frames: int = 1) -> Request:
        """The request of a Picture or a list of them and a Prompt, ready for `answer`.

        With `frames` T each T pictures are a clip, which has one mark.

        Raises:
          ValueError, OSError: for anything else, or what this model cannot read.
        """
        images = listed(image)
        tokens = self.tokens(prompt, images=len(images), frames=frames)
        pictures = [picture(one, exif=exif) for one in images]
        return Request.of(tokens, pictures, self.processor)

    def tokens(
        self, prompt: Any, *, images: int, system: str | None = None, frames: int = 1
    ) -> Tokens:
        """The tokens of a Prompt about images, after a `system` text. Raises as `request`."""
        if images % arguments.whole_number("frames", frames):
            raise ValueError(f"{images} images, and frames={frames}: give all frames of each clip")
        pairs = conversation(prompt, images=images // frames)
        if images > 1 and self.compressor.reads_prefix:
            raise ValueError(
                f"{images} images, and this model's compressor reads the text before the one "
                "image of a row (compressor.query='prefix'): ask about one at a time, or train "
                "with compressor.query='separate'"
            )
        which = tuple(range(images)) if images > 1 else 0 if images else None
        if images > 1 and self.decoder.model.drops:
            if images != frames:
                raise ValueError(vlm.ONE_CLIP)
        elif images > 1 and not self.decoder.model.reads_in_parts:
            raise ValueError(vlm.ONE_IMAGE)
        example = Example("prompt", which, pairs, family="", task="", frames=frames)
        processor = self.processor if system is None else self.processor.saying(system)
        tokens = processor.tokens(example, answer=False)
        if self.processor.query != "none" and images and not all(tokens.questions):
            raise ValueError(
                "this model's compressor reads the question, and the prompt has none: ask something"
            )
        return tokens

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        visual_tokens: int | None = None,
        batch: int = 8,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answers to requests, in order.

        Args:
          max_new_tokens: most tokens of an answer; default: what each request leaves of the model's
            length, at most 256.
          temperature: 0 takes the likeliest token; top_p: of the probability mass, when drawing.
          seed: of each request's draws: the same request gets the same answer in any batch.
          visual_tokens: V, if the compressor serves any number; default: as in the checkpoint.
          batch: most requests in a batch.
          on_text: called with a request's number and each new piece of its text.
        Raises:
          ValueError: if a request cannot be answered, before any is.
        """
        batch = arguments.whole_number("batch", batch)
        check_drawing(max_new_tokens, temperature, top_p, seed)
        self.check_tokens(visual_tokens)
        hosts.check_same("requests", digest(requests) if hosts.joined() else "")
        room = [
            self.room(request, new_tokens=max_new_tokens, visual_tokens=visual_tokens)
            for request in requests
        ]
        # Requests of a batch share their start and the number of image slots. Each kind is a
        # program.
        kinds = [(self.begins(r), self.kept(r), bucket_of_images(len(r.pixels))) for r in requests]
        answers: dict[int, Answer] = {}
        for kind in sorted(set(kinds)):
            members = [i for i in range(len(requests)) if kinds[i] == kind]
            for first in range(0, len(members), batch):
                some = members[first : first + batch]
                batch_answers = self._together(
                    [requests[i] for i in some],
                    begins=kind[0],
                    kept=kind[1],
                    drawn=(temperature, top_p, seed),
                    room=[room[i] for i in some],
                    visual_tokens=visual_tokens,
                    on_text=(lambda k, text, some=some: on_text(some[k], text))
                    if on_text
                    else None,
                )
                answers |= zip(some, batch_answers, strict=True)
        return [answers[i] for i in range(len(requests))]

    def check_tokens(self, visual_tokens: int | None) -> None:
        """Raises ValueError for a V that this model does not serve."""
        if visual_tokens is not None:
            arguments.whole_number("visual_tokens", visual_tokens)
        one = self.compressor.tokens if not self.compressor.adaptive else None
        if visual_tokens not in (None, one):
            self.decoder.model.check(visual_tokens)

    def room(
        self, request: Request, *, new_tokens: int | None = None, visual_tokens: int | None = None
    ) -> int:
        """How many new tokens an answer may have: `new_tokens`, or what fits, at most 256.

        Raises:
          TooLong: for a request that does not fit into the model, with the numbers.
        """
        V = self.compressor.tokens if visual_tokens is None else visual_tokens
        pruning, images = self.decoder.model.llm.pruning, len(request.pixels)
        V = images * V if pruning is None else pruning.given(V, images)
        read = len(request.ids) + V
        most = min(self.max_length - read, MOST_NEW_TOKENS) if new_tokens is None else new_tokens
        if read + max(most, 1) > self.max_length:
            way = "lower max_new_tokens" if most > 1 else "use a model with a longer context"
            raise TooLong(
                f"{len(request.ids)} tokens of prompt, {V} of the "
                f"{'image' if len(request.pixels) < 2 else f'{len(request.pixels)} images'} and "
                f"{'at least 1' if new_tokens is None else f'up to {most}'} of the answer are "
                f"{read + max(most, 1)}; this model was made for {self.max_length}: shorten the "
                f"prompt, or {way}"
            )
        return most

    def requested_tokens(self, visual_tokens: int | None) -> int | None:
        """The V to request from the compressor; None if it has only one."""
        if not self.compressor.buckets:
            return None
        return self.compressor.tokens if visual_tokens is None else visual_tokens

    def begins(self, request: Request) -> bool:
        """Whether a request starts with the prefix that is already read."""
        length = len(self.prefix)
        at = len(request.ids) if request.image_at is None else request.image_at
        return 0 < length <= at and request.ids[:length] == self.prefix

    def kept(self, request: Request) -> bool:
        """Whether a request starts with an image whose summary is kept."""
        return self.summaries is not None and self.summaries.first(request)

    def _together(
        self, requests, *, begins, kept, drawn, room, visual_tokens, on_text
    ) -> list[Answer]:
        """The answers of one batch, each with at most the tokens in `room`."""
        words, stop_ids = Words(self.processor.tokenizer), self.processor.stop_ids
        with jax.set_mesh(self.mesh):
            then = time.perf_counter()
            read, prefix = requests, self.prefix_pass if begins else None
            known = [len(self.prefix) if begins else 0] * len(requests)
            if kept:
                read, prefix, known = self.summaries.of(requests)
            batch = batch_of(
                read,
                self.compressor,
                skip=len(self.prefix) if begins else 0,
                shards=meshes.batch_shards(self.mesh),
                width=self.width,
                pad=self.processor.pad_id,
            )
            rows = len(batch["ids"])
            temperature, top_p, seed = drawn
            sampling = Sampling(
                np.full(rows, temperature, np.float32),
                np.full(rows, top_p, np.float32),
                np.full(rows, seed, np.uint32),
            )
            started = self.decoder.start(
                meshes.spread(batch, self.mesh, "batch"),
                new_tokens=max(room),
                tokens=self.requested_tokens(visual_tokens) if requests[0].pixels else None,
                prefix=prefix,
                sampling=meshes.spread(sampling, self.mesh, "batch") if temperature else None,
            )
            length = hosts.fetched(started.length)
            texts = [Text(words) for _ in requests]
            ended: dict[int, float] = {}  # when each row did
            for step, ids in enumerate(self.decoder.stream(started, max(room))):
                now = time.perf_counter()
                first = now - then if step == 0 else first
                for k, text in enumerate(texts):
                    if k in ended:
                        continue
                    text.ids.append(int(ids[k]))
                    stopped = text.ids[-1] in stop_ids
                    if stopped or step == room[k] - 1:
                        ended[k] = now
                    if on_text and (piece := text.piece(whole=k in ended, stop=stopped)):
                        on_text(k, piece)
                if len(ended) == len(texts):
                    break
        answers = []
        for k, (request, text) in enumerate(zip(requests, texts, strict=True)):
            stopped = text.ids[-1] in stop_ids
            seconds = ended[k] - then - first
            answers.append(
                Answer(
                    text=text.whole(stop=stopped),
                    ids=text.ids,
                    stopped=stopped,
                    prompt_tokens=len(request.ids),
                    visual_tokens=int(length[k]) - len(request.ids),
                    first_token_seconds=first,
                    tokens_per_second=(len(text.ids) - 1) / seconds if seconds > 0 else 0.0,
                    batch=len(requests),
                    known_tokens=known[k],
                )
            )
        return answers


def placed(stored: folder.Model, dtype: str | None = None) -> vlm.VLM:
    """The layers of a model folder on the current mesh, in `dtype` or as stored.

    ValueError for another dtype than float32 and bfloat16.
    """
    dtype = dtype or stored.dtype()
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: choose float32 or bfloat16")
    stored.check()
    size = replace(stored.size(), compute_dtype=dtype, kernels="auto")
    return runs.load(stored, size, dtype=dtype)


def load(path: str | PurePath, *, dtype: str | None = None, mesh: Mesh | None = None) -> VLM:
    """The model of a folder, as `VLM.from_checkpoint` reads it."""
    return VLM.from_checkpoint(path, dtype=dtype, mesh=mesh)
