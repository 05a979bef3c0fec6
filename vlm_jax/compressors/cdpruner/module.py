# SPDX-License-Identifier: Apache-2.0
"""CDPruner: patches that differ from each other, weighted by the question.

B batch  P patches, raster order  V visual tokens  M texts of a question
Y channels of the encoder  E vit width  C width of CLIP's space  D llm width
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.cdpruner import CDPrunerMethod
from vlm_jax.compressors.cdpruner.text import EPS, TextTower
from vlm_jax.compressors.compressor import Question
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.selector import Selector, each_image, pairs, products, unit
from vlm_jax.layers import LayerNorm, Linear

LEAST = 1e-6  # of a patch's relevance, as published; and of the range that it is divided by


class CDPruner(Selector):
    """Patches that differ from each other, weighted by the question.

    The greedy choice of a determinantal point process whose kernel is the similarity of the
    projected patches, times the relevance of both. Relevance is the negative cosine of a patch and
    the question in CLIP's space, shifted to be positive: as published, the patch that is most like
    the question is hardly ever chosen. The question is read by CLIP's own text tower
    (compressor.query "clip"), each image's own.

    Source: arXiv 2506.10967; Theia-4869/CDPruner at 9541616c. There relevance is scaled over a
    batch and averaged over its questions, and a question beyond 75 tokens is cut into texts of
    which the first ones are read as nothing; here each image is alone, and such a question is
    truncated.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.cdpruner import CDPrunerMethod
        >>> from vlm_jax.compressors.compressor import Question
        >>> from vlm_jax.compressors.method import Interface
        >>> between = Interface(side=4, width=32, levels=1, llm_width=64)
        >>> sizes = dict(text_width=32, text_depth=1, text_heads=2, text_vocab=9)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     prune = CDPrunerMethod(tokens=5, **sizes).build(between, rngs=nnx.Rngs(0))
        ...     asked = Question(jnp.ones((2, 3), int), jnp.array([3, 2]))
        ...     jax.jit(lambda m, x, q: m(x, q))(prune, jnp.ones((2, 16, 32)), asked).shape
        (2, 5, 64)
    """

    def __init__(
        self,
        method: CDPrunerMethod,
        interface: Interface,
        *,
        rngs: nnx.Rngs,
        kernels: str = "auto",
    ):
        super().__init__(method, interface, rngs=rngs, kernels=kernels)
        self.clip = Clip(method, interface.width, rngs=rngs)

    def choose(
        self, levels: Float[Array, "B P Y"], tokens: Float[Array, "B P D"], question: Question
    ) -> Int[Array, "B V"]:
        text = self.clip.text(question.tokens, question.length)
        return self.of_text(self.last(levels), tokens, text[:, None])

    def of_text(
        self,
        features: Float[Array, "B P E"],
        tokens: Float[Array, "B P D"],
        texts: Float[Array, "B M C"],
    ) -> Int[Array, "B V"]:
        """The chosen patches, from the texts of each image's question in CLIP's space."""
        images = self.clip.images(features)

        def one(tokens, images, texts):
            return select(tokens, relevance(images, texts), count=self.tokens)

        return each_image(one, tokens, images, texts)


class Clip(nnx.Module):
    """CLIP's own weights with which a question is compared with patches; they are not trained."""

    def __init__(self, method: CDPrunerMethod, width: int, *, rngs: nnx.Rngs):
        self.text = TextTower(method, rngs=rngs)
        self.norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.image = Linear(
            "BPE,EC->BPC",
            (width, method.clip_width),
            dims=("embed", "none"),
            out=("batch", "len", "feature"),
            bias=False,
            rngs=rngs,
        )

    def images(self, features: Float[Array, "B P E"]) -> Float[Array, "B P C"]:
        """The patches in CLIP's space, in float32."""
        return self.image(self.norm(features.astype(jnp.float32)))


def relevance(images: Float[Array, "P C"], texts: Float[Array, "M C"]) -> Float[Array, " P"]:
    """How much each patch counts, above zero: the less it is like the question, the more."""
    unlike = -products(unit(images), unit(texts)).mean(1)
    reach = unlike.max() - unlike.min()
    # Where all patches are alike, all count the same.
    return (unlike - unlike.min() + LEAST) / jnp.maximum(reach, LEAST)


def select(
    tokens: Float[Array, "P D"], relevance: Float[Array, " P"], *, count: int
) -> Int[Array, " V"]:
    """`count` patches of one image in the order in which they are chosen.

    Each next one enlarges the determinant of the chosen rows and columns of the kernel most, by
    the steps of a Cholesky factorization.
    """
    rows = unit(tokens)
    kernel = relevance[:, None] * pairs(rows) * relevance

    def step(i, state):
        order, left, factors = state
        best = jnp.argmax(left)
        explained = jnp.matmul(factors[:, best], factors, precision=lax.Precision.HIGHEST)
        # Where nothing is left, what is chosen next explains nothing more.
        pivot = left[best]
        scale = jnp.where(pivot > 0, lax.rsqrt(jnp.where(pivot > 0, pivot, 1)), 0)
        factor = (kernel[best] - explained) * scale
        left = (left - jnp.square(factor)).at[best].set(-jnp.inf)
        return order.at[i].set(best), left, factors.at[i].set(factor)

    state = (
        jnp.zeros(count, jnp.int32),
        jnp.diagonal(kernel),
        jnp.zeros((count, len(tokens))),
    )
    return lax.fori_loop(0, count, step, state)[0]
