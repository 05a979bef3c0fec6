# SPDX-License-Identifier: Apache-2.0
"""Vision language model: encoder, compressor, decoder; visual tokens replace their image in a row.

B batch  M images of a row  P patches  Z = levels x E  V visual tokens  T text tokens  X = T + M V
D llm width  W vocabulary  I image side in pixels
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax import cpu, mesh
from vlm_jax.compressors.compressor import Question, Visual
from vlm_jax.layers import rows
from vlm_jax.models.cache import Caches, Past, Pruned, positions_of, repeated
from vlm_jax.models.llm import LLM
from vlm_jax.models.prefusion import Prefusion
from vlm_jax.models.pruned import Images
from vlm_jax.models.question import QUESTIONS, feature
from vlm_jax.models.segments import starts
from vlm_jax.models.sizes import VLMSize
from vlm_jax.models.splice import Batch as Batch
from vlm_jax.models.splice import by_image, splice
from vlm_jax.models.vit import ViT
from vlm_jax.models.voco import Summary

ONE_IMAGE = (
    "this model keeps of the one image of a row what its text asks for (pruning.kind, voco, "
    "llava_mini): ask about one image at a time, or prune nothing (pruning.kind='none')"
)
ONE_CLIP = (
    "pruning.kind='evs' drops tokens between the frames of the one clip of a row: give one clip or "
    "one image, or use pruning.kind='none'"
)


class Assembled(NamedTuple):
    """The input of the LLM's last pass: spliced rows, the number of visual tokens of each image,
    where these are, at most `slots` of a row, the earlier pass, and the example of each token if
    rows hold several."""

    x: Float[Array, "B X D"]
    count: Int[Array, "B *M"]
    visual: Bool[Array, "B X"] | None = None
    slots: int = 0
    past: Past | None = None
    segments: Int[Array, "B X"] | None = None


class VLM(nnx.Module):
    """A LLaVA-style model (arXiv 2310.03744) whose image is V tokens, however many patches it had.

    A batch holds `ids` [B T] (right-padded, without a slot for an image), `image_at` [B M] (each
    image's visual tokens come before ids[image_at], ascending; T for a missing image), `question`
    [B M U] and `question_length` [B M] for compressors that read the question, and either `pixels`
    [B M I I 3] or `levels` [B M P Y] (the encoder's output for this compressor, in raster order).
    If rows have at most one image, M is left out of all these shapes. With `pixels`, a compressor
    that reads where an image was padded needs `image_size` [B M 2], width and height before that.

    For a compressor that reads the text before the image, `question` is that text: the first
    `question_length` of `ids`, at most U tokens; at most T - U tokens follow the image. A row
    without an image may be split anywhere. Such rows have at most one image.

    A row may hold several examples one after another: `segment` [B T] numbers them from 1 (0:
    padding) and `image_segment` [B M] gives the example of each image. No example sees another's
    tokens. T is then the length of the spliced row, with room for visual tokens. This does not work
    for a compressor that reads the text before the image.

    A batch without `pixels`, `levels` and `visual` is text only: nothing is encoded or spliced.

    For a compressor with layers before the LLM (`fusion`) a row has at most one image, and `length`
    [B] and in training `loss_mask` [B T] say which text reads the image.

    If one model serves any number of visual tokens, a batch may also hold `limit` [B], the most
    tokens of an image that the LLM reads, and `visual` [B*M V D], computed before, instead of
    images.
    """

    def __init__(self, vit: ViT, compressor: nnx.Module, llm: LLM):
        self.vit, self.compressor, self.llm = vit, compressor, llm

    def check(self, tokens: int) -> None:
        """Raises ValueError, with the way out, if the weights do not support so many tokens."""
        if not self.compressor.buckets:
            V = "as many" if self.compressor.adaptive else self.compressor.tokens
            needs = " as each image needs" if self.compressor.adaptive else ""
            raise ValueError(
                f"this {type(self.compressor).__name__} was trained for {V} visual tokens{needs}, "
                f"not {tokens}: train one for several (mqt, m3, compressor.elastic)"
            )
        self.compressor.check(tokens)

    def at(self, tokens: int) -> "VLM":
        """The same weights with `tokens` visual tokens. Raises ValueError as `check` does."""
        self.check(tokens)
        return VLM(self.vit, self.compressor.at(tokens), self.llm)

    @property
    def reads_in_parts(self) -> bool:
        """Whether a prompt may be read part by part, each behind the keys and values of those
        before it, as decoding reads: not if it decides what is kept of an image, or if an image
        decides what becomes of it."""
        reader = self.compressor
        return self.llm.pruning is None and not reader.method.summarizes and reader.fusion is None

    @jax.named_scope("encoder")
    def encode(
        self, pixels: Float[Array, "B I I 3"], sizes: Shaped[Array, "B 2"] | None = None
    ) -> Float[Array, "B P Z"]:
        """Encoder levels in the compressor's order and type; the encoder is frozen."""
        reader = self.compressor
        how = dict(window=reader.window, shrink=reader.shrink, reads=reader.reads, sizes=sizes)
        return lax.stop_gradient(self.vit(pixels, **how))

    def levels(self, batch: Batch) -> Float[Array, "BM P Z"]:
        """The levels of each image, row by row, in the compressor's patch order and type."""
        if "levels" not in batch:
            sizes = each(batch, "image_size") if self.compressor.reads == "image_size" else None
            return self.encode(each(batch, "pixels"), sizes)
        reader = self.compressor
        order = self.vit.order(reader.window, reader.shrink, reader.reads)
        dtype = "float32" if reader.reads else self.llm.dtype
        return each(batch, "levels")[:, order].astype(dtype)

    def compress(
        self, levels: Float[Array, "BM P Z"], question: Float[Array, "BM D"] | Question | None
    ) -> Float[Array, "BM V D"] | Visual:
        """The visual tokens of images. Where the compressor condenses, they are what the LLM makes
        of its tokens in a first pass over each image alone, which prunes nothing."""
        with jax.named_scope("compressor"):
            output = self.compressor(levels, question)
        if not self.compressor.method.condenses:
            return output
        with jax.named_scope("condensing"):
            return self.compressor.handed(self.llm(output.astype(self.llm.dtype)))

    def visual_tokens(
        self, batch: Batch, question: Float[Array, "BM D"] | Question | None
    ) -> Visual:
        """The visual tokens of each row's images, and their number: 0 for a missing image."""
        if "visual" in batch:
            output = batch["visual"]
        else:
            output = self.compress(self.levels(batch), question)
        tokens, count = output if self.compressor.adaptive else (output, output.shape[1])
        at, limit = batch["image_at"], batch.get("limit")
        if at.ndim > 1:
            tokens = jnp.reshape(
                tokens,
                (len(at), -1, tokens.shape[2]),
                out_sharding=mesh.spec("batch", "len", "feature"),
            )
            if self.compressor.adaptive:
                count = jnp.reshape(count, at.shape, out_sharding=mesh.spec("batch", "len"))
            limit = None if limit is None else limit[:, None]
        if limit is not None:
            count = jnp.minimum(count, limit)
        present = at < batch["ids"].shape[1]
        return Visual(tokens.astype(self.llm.dtype), count * present)

    def question(self, batch: Batch) -> "Float[Array, 'BM D'] | Question":
        """What the compressor reads of each image's question."""
        ids, length = each(batch, "question"), each(batch, "question_length")
        return QUESTIONS[self.compressor.method.query](self.llm, ids, length)

    def assemble(self, batch: Batch, *, dropping: bool = False) -> "Assembled":
        """The input of the LLM's last pass, and the pass before it.

        With `dropping` a model that drops tokens of clips before the LLM does so.

        For a compressor that reads the text before the image, a first pass reads that text, and the
        last pass continues with its keys and values: no token is read twice.
        """
        ids = batch["ids"]
        if not has_images(batch):
            return Assembled(self.llm.embed(ids), jnp.zeros_like(batch["image_at"]))
        if not self.compressor.reads_prefix:
            question = None
            if self.compressor.reads_question and "visual" not in batch:
                with jax.named_scope("question"):
                    question = self.question(batch)
            text = self.llm.embed(ids)
            if self.compressor.fusion is None or "visual" in batch:
                visual = self.visual_tokens(batch, question)
            else:
                visual, text = self.fused(batch, text)
            packed = dropping and self.drops and batch["image_at"].ndim > 1
            if packed:
                visual = self.dropped(visual)
            x, inside, segments = splice(text, visual, batch, packed=packed)
            return Assembled(x, visual.count, inside, visual.tokens.shape[1], segments=segments)
        if "segment" in batch:
            raise ValueError(
                "a compressor that reads the text before the image in a separate pass has one "
                "example in a row: compressor.query='separate' or 'none' can be packed"
            )
        if batch["image_at"].ndim > 1:
            raise ValueError(
                "a compressor that reads the text before the image takes one image in a row"
            )
        length, first = batch["question_length"], batch["question"].shape[1]
        rest = length[:, None] + jnp.arange(ids.shape[1] - first)
        ids = jnp.concatenate([ids[:, :first], rows(ids, rest)], axis=1)
        text = self.llm.embed(ids)
        past = self.llm.start(text[:, :first], length)
        visual = self.visual_tokens(batch, feature(past.hidden, length))
        at = {"image_at": jnp.zeros_like(length)}
        x, inside, _ = splice(text[:, first:], visual, at)
        return Assembled(x, visual.count, inside, visual.tokens.shape[1], past)

    @property
    def drops(self) -> bool:
        """Whether tokens of clips are left out before the LLM, in a prefill."""
        return self.llm.pruning is not None and self.llm.pruning.before() is not None

    def dropped(self, visual: Visual) -> Visual:
        """What is left of each row's clip, packed."""
        V, images = self.compressor.tokens, visual.count.shape[1]
        kept = tuple(self.llm.pruning.given(V, n) for n in range(images + 1))
        return self.llm.pruning.before()(visual.tokens, visual.count, kept)

    @jax.named_scope("prefusion")
    def fused(
        self, batch: Batch, text: Float[Array, "B T D"]
    ) -> tuple[Visual, Float[Array, "B T D"]]:
        """The visual tokens, and the text that has read the patches; answers have not, and are not
        read, nor has that of a row without an image."""
        if batch["image_at"].ndim > 1 or "segment" in batch:
            raise ValueError(
                f"compressor {self.compressor.method.kind!r} lets the text of a row read its one "
                "image: data.images_per_row=1, data.row_length=0"
            )
        place = positions_of(*batch["ids"].shape)
        visible = place < batch["length"][:, None]
        if "loss_mask" in batch:
            visible &= ~batch["loss_mask"]
        read = lax.stop_gradient(text)
        tokens, changed = self.compressor.fuse(self.levels(batch), read, visible)
        has_image = batch["image_at"] < text.shape[1]
        text = jnp.where((visible & has_image[:, None])[..., None], changed, text)
        return self.visual_tokens({**batch, "visual": tokens}, None), text.astype(self.llm.dtype)

    def logits(self, batch: Batch) -> Float[Array, "B T W"]:
        """The scores of every text token, given all tokens before it."""
        return self.llm.logits(self.states(batch))

    def states(self, batch: Batch, order: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """For every text token the hidden state of the token before it, in the order of the text or
        in this `order` of its positions."""
        assembled = self.assemble(batch)
        index = self.before(batch, assembled)
        index = index if order is None else rows(index, order)
        x, past, segments = assembled.x, assembled.past, assembled.segments
        summary = self.summary(batch, assembled.visual, assembled.slots)
        return read(self.llm(x, past, segments, summary), past, index)

    def summary(
        self, batch: Batch, visual: Bool[Array, "B X"] | None, slots: int
    ) -> Summary | None:
        """Where the summary of each row's image is, if its text reads a summary alone; None for
        rows without images."""
        method = self.compressor.method
        if not method.summarizes or slots < self.compressor.tokens:
            return None
        if batch["image_at"].ndim > 1 or "segment" in batch:
            raise ValueError(
                f"compressor {method.kind!r} summarizes the one image of a row: "
                "data.images_per_row=1, data.row_length=0"
            )
        patches = self.compressor.tokens - method.tokens
        return Summary(visual & (jnp.cumsum(visual, axis=1) > patches), patches)

    def before(self, batch: Batch, assembled: "Assembled") -> Int[Array, "B T"]:
        """The position in the spliced row of the token before each text token, within its example;
        of the token itself if it is the first."""
        text = jnp.arange(batch["ids"].shape[1])
        after = text[:, None] >= by_image(batch["image_at"])[:, None]
        visual = jnp.where(after, by_image(assembled.count)[:, None], 0).sum(2)
        if assembled.segments is None:
            return jnp.maximum(text + visual - 1, 0)
        # Padding may reach past the end of the row.
        own = jnp.minimum(text + visual, assembled.x.shape[1] - 1)
        return jnp.maximum(own - 1, rows(starts(assembled.segments), own))

    @jax.named_scope("prefill")
    def prefill(
        self,
        batch: Batch,
        *,
        new_tokens: int,
        prefix: Past | None = None,
    ) -> tuple[Float[Array, "B W"], Caches, Int[Array, "B"]]:
        """Scores of the first new token, caches with room for `new_tokens` more, row lengths.

        Lengths count the visual tokens that a pruning leaves out between layers. `prefix` is a pass
        over tokens that come before those of every row [1 S D] or of each [B S D]; not for a
        compressor that reads the prompt from its first token.
        """
        x, count, visual, most, past, _ = self.assemble(batch, dropping=True)
        length = batch["length"] + by_image(count).sum(1)
        if prefix is not None:
            past = repeated(prefix, x.shape[0])
            length += past.position
        slots = x.shape[1] + new_tokens + (0 if past is None else past.hidden.shape[1])
        images, pruning = None, self.llm.pruning
        if pruning is not None and pruning.inside is not None and visual is not None:
            if batch["image_at"].ndim > 1:
                raise ValueError(ONE_IMAGE)
            last = length - 1 if past is None else length - 1 - past.length
            images = Images(visual, last, most)
        summary = self.summary(batch, visual, most)
        hidden, caches = self.llm.prefill(x, slots=slots, past=past, images=images, summary=summary)
        read_to = length - caches.dropped[-1] if isinstance(caches, Pruned) else length
        last = read(hidden, past, read_to[:, None] - 1)
        return self.llm.logits(last)[:, 0], caches, length

    @jax.named_scope("decode")
    def decode(
        self,
        ids: Int[Array, "B"],
        caches: Caches,
        position: Int[Array, "B"],
    ) -> tuple[Float[Array, "B W"], Caches]:
        """Scores of the token after `ids`, which are at `position`."""
        hidden, caches = self.llm.decode(self.llm.embed(ids[:, None]), caches, position)
        return self.llm.logits(hidden)[:, 0], caches


def has_images(batch: Batch) -> bool:
    """Whether a batch has image slots; a batch of text only is a separate program."""
    return any(name in batch for name in ("pixels", "levels", "visual"))


def each(batch: Batch, name: str) -> Shaped[Array, "BM *X"]:
    """An array of a batch with one row per image, the images of a row one after another."""
    x = batch[name]
    if batch["image_at"].ndim == 1:
        return x
    dims = ("batch", *["none"] * (x.ndim - 2))
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return jnp.reshape(x, shape, out_sharding=mesh.spec(*dims))


def read(
    hidden: Float[Array, "B X D"], past: Past | None, index: Int[Array, "B Y"]
) -> Float[Array, "B Y D"]:
    """Hidden states at these positions of the spliced rows; `past` holds the first ones."""
    if past is not None:
        first, length = past.hidden.shape[1], past.length[:, None]
        hidden = jnp.concatenate([past.hidden, hidden], axis=1)
        # Positions outside a row may give anything.
        after = jnp.minimum(index - length + first, hidden.shape[1] - 1)
        index = jnp.where(index < length, index, after)
    return rows(hidden, index)


def build(size: VLMSize, rngs: nnx.Rngs) -> VLM:
    """The model of a description, with new float32 parameters."""
    shared = dict(rngs=rngs, remat_policy=size.remat, dtype=size.compute_dtype)
    vit = ViT(size.vit, **shared)
    method, parts = size.compressor, {}
    if method.prefusion:
        parts["fusion"] = Prefusion(size.llm, method.prefusion, rngs=rngs, remat_policy=size.remat)
    compressor = method.build(size.interface, rngs=rngs, kernels=size.kernels, **parts)
    llm = LLM(size.llm, **shared, kernels=size.kernels, pruning=size.pruning)
    return VLM(vit, compressor, llm)


def create(size: VLMSize, *, seed: int, of: Callable[[VLM], Any] = lambda model: model) -> Any:
    """`build` on the current mesh in one compiled call, every parameter created in its shard.

    `of` may select a part of the model: only that is computed.
    """
    once = mesh.known(cpu.DRAW_ONCE)
    return jax.jit(lambda: of(build(size, nnx.Rngs(seed))), compiler_options=once)()


def shapes(size: VLMSize) -> VLM:
    """The model of a description with shapes as parameters: nothing is computed."""
    # A copy, so that what one caller does to its module is not in that of the next.
    return jax.tree.map(lambda leaf: leaf, _shapes(size, jax.sharding.get_abstract_mesh()))


@functools.lru_cache(maxsize=64)
def _shapes(size: VLMSize, mesh: jax.sharding.AbstractMesh) -> VLM:
    """`shapes` on the current mesh: a grid asks for those of its cells again and again, and tracing
    takes a tenth of a second."""
    del mesh  # each has its own answer
    return jax.eval_shape(lambda: build(size, nnx.Rngs(0)))


def parameters(module: nnx.Module) -> int:
    """The number of parameters of a module; shapes are enough."""
    return sum(leaf.size for leaf in jax.tree.leaves(module))
