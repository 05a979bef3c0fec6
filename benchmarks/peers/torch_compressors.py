# SPDX-License-Identifier: Apache-2.0
"""Visual-token compressors in PyTorch, computing what the published modules compute, as they do it.

Every key and value is projected, patches are regrouped into windows by a copy, M3 pools after its
MLP, MQT attends anew for every image, PruMerge merges token by token in a loop. Parameters have
the published names, so that a state exported from ours loads. Patches come in raster order.

B batch  P patches  V visual tokens  S patches of a window  Z = levels x E  E vit width  D llm width
"""

import inspect
import math

import torch
from flax import nnx
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_jax.weights import folder

EPS = 1e-6  # of every LayerNorm here, as published
MERGED = 32  # tokens merged into each that PruMerge keeps


def mlp(inputs: int, between: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, between), nn.GELU(), nn.Linear(between, outputs))


def windows(x: Tensor, per_row: int) -> Tensor:
    """[B P C] to [B V, S, C]: windows in raster order, patches in raster order inside."""
    batch, patches, channels = x.shape
    size = math.isqrt(patches) // per_row
    grid = x.view(batch, per_row, size, per_row, size, channels).transpose(2, 3)
    return grid.reshape(batch * per_row**2, size**2, channels)


def raster(x: Tensor) -> Tensor:
    """[B P C] as a picture [B C side side]."""
    batch, patches, channels = x.shape
    side = math.isqrt(patches)
    return x.transpose(1, 2).reshape(batch, channels, side, side)


def ask_windows(attention: nn.MultiheadAttention, query: Tensor, keys: Tensor, values: Tensor):
    """One query for each window of the keys and values, [B V E]."""
    batch, tokens, width = query.shape
    per_row = math.isqrt(tokens)
    query = query.reshape(batch * tokens, 1, width)
    return attention(query, windows(keys, per_row), windows(values, per_row))[0].view(
        batch, tokens, width
    )


class QueCC(nn.Sequential):
    """arXiv 2411.03312: the first of a sequence whose others are LLaVA's projector."""

    def __init__(
        self, *, tokens: int, side: int, width: int, levels: int, llm_width: int, heads: int,
        query: str, downsample: str = "conv",
    ):  # fmt: skip
        first = QueCCAttention(tokens, side, width, levels, llm_width, heads, query, downsample)
        super().__init__(first, *mlp(width, llm_width, llm_width))

    def forward(self, levels: Tensor, question: Tensor | None = None) -> Tensor:
        x = self[0](levels, question)
        for layer in list(self)[1:]:
            x = layer(x)
        return x


class QueCCAttention(nn.Module):
    """The tokens before the projector: a strided convolution of patches plus question asks."""

    def __init__(
        self, tokens: int, side: int, width: int, levels: int, llm_width: int, heads: int,
        query: str, downsample: str,
    ):  # fmt: skip
        super().__init__()
        self.width, window = width, side // math.isqrt(tokens)
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Sequential(*mlp(inputs, width, width), nn.LayerNorm(width, eps=EPS))
            for inputs in (width, levels * width, levels * width)
        )
        self.q_downsample = (
            nn.Conv2d(width, width, window, window, groups=width)
            if downsample == "conv"
            else nn.AvgPool2d(window)
        )
        self.text_projection = (
            None
            if query == "none"
            else nn.Sequential(nn.Linear(llm_width, width), nn.LayerNorm(width, eps=EPS))
        )

    def forward(self, levels: Tensor, question: Tensor | None = None) -> Tensor:
        x = levels[..., -self.width :]
        if self.text_projection is not None:
            x = x + self.text_projection(question)[:, None]
        query = self.q_downsample(raster(self.q_proj(x))).flatten(2).transpose(1, 2)
        return ask_windows(self.clip_attn, query, self.k_proj(levels), self.v_proj(levels))


class TokenPacker(nn.Module):
    """arXiv 2407.02392: the last level, resized bilinearly, asks the windows of all levels."""

    def __init__(
        self, *, tokens: int, side: int, width: int, levels: int, llm_width: int, heads: int
    ):
        super().__init__()
        self.width, self.per_row = width, math.isqrt(tokens)
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1, self.v_proj_1 = (mlp(levels * width, width, width) for _ in range(2))
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = mlp(width, llm_width, llm_width)

    def forward(self, levels: Tensor, question: Tensor | None = None) -> Tensor:
        small = F.interpolate(
            raster(levels[..., -self.width :]), size=(self.per_row,) * 2, mode="bilinear"
        )
        query = self.ln_q_1(self.q_proj_1(small.flatten(2).transpose(1, 2)))
        keys, values = self.ln_k_1(self.k_proj_1(levels)), self.ln_v_1(self.v_proj_1(levels))
        return self.mlp(ask_windows(self.clip_attn, query, keys, values))


class MQT(nn.Module):
    """arXiv 2405.19315: the first V learned queries attend all patches by position alone."""

    def __init__(
        self, *, tokens: int, side: int, width: int, llm_width: int, heads: int,
        queries: int | None = None,
    ):  # fmt: skip
        super().__init__()
        queries = queries or min(side**2, 256)
        self.tokens, self.side, self.width = tokens, side, width
        self.pos_embed, self.query = (
            nn.Parameter(0.02 * torch.randn(queries, width)) for _ in range(2)
        )
        self.proj = nn.Parameter(llm_width**-0.5 * torch.randn(width, llm_width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=EPS) for _ in range(3))

    def forward(self, levels: Tensor, question: Tensor | None = None) -> Tensor:
        x = levels[..., -self.width :]
        places = F.interpolate(raster(self.pos_embed[None]), size=(self.side,) * 2, mode="bicubic")
        keys = self.ln_k(places.flatten(2).transpose(1, 2)).expand(len(x), -1, -1)
        query = self.ln_q((self.query + self.pos_embed)[None, : self.tokens])
        return self.attn(query.expand(len(x), -1, -1), keys, self.ln_v(x))[0] @ self.proj


class LLaVA(nn.Sequential):
    """arXiv 2310.03744: every patch of the last level through the MLP."""

    def __init__(self, *, tokens: int, width: int, llm_width: int):
        super().__init__(*mlp(width, llm_width, llm_width))
        self.tokens, self.width = tokens, width

    def forward(self, levels: Tensor, question: Tensor | None = None) -> Tensor:
        return super().forward(levels[..., -self.width :])


class Pool(LLaVA):
    """Average pooling of the features, then the MLP."""

    def forward(self, levels: Tensor, question: Tensor | None = None) -> Tensor:
        small = F.adaptive_avg_pool2d(raster(levels[..., -self.width :]), math.isqrt(self.tokens))
        return super().forward(small.flatten(2).transpose(1, 2))


class M3(LLaVA):
    """arXiv 2405.17430: average pooling of what the MLP made of all patches."""

    def forward(self, levels: Tensor, question: Tensor | None = None) -> Tensor:
        x = raster(super().forward(levels))
        small = F.avg_pool2d(x, x.shape[2] // math.isqrt(self.tokens))
        return small.flatten(2).transpose(1, 2)


class PruMerge(LLaVA):
    """arXiv 2403.15388 at a fixed ratio: V - 1 patches, each with those most like it, and the rest.

    Beside the features [B P E] it takes what the next block projects as queries and keys of all
    tokens, class token first, [B P+1 E].
    """

    def forward(self, features: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        return super().forward(self.merged(features, queries, keys))

    def merged(self, features: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """The tokens before the MLP."""
        scores = (queries @ keys.transpose(1, 2) * self.width**-0.5).softmax(-1)[:, 0, 1:]
        kept = scores.topk(self.tokens - 1).indices
        merged = [
            merge(x, F.normalize(k[1:], dim=-1), score, index)
            for x, k, score, index in zip(features, keys, scores, kept, strict=True)
        ]
        return torch.stack(merged)


def merge(x: Tensor, keys: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
    """One image [P E]: kept patches [K] with their neighbors, then the sum of all not kept."""
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[kept] = False
    order = torch.cat([kept, rest.nonzero()[:, 0]])
    x, keys, scores = x[order], keys[order], scores[order]
    made = torch.empty(len(kept) + 1, x.shape[1])
    for i in range(len(kept)):
        others, other_keys, other_scores = (
            torch.cat([y[:i], y[i + 1 :]]) for y in (x, keys, scores)
        )
        near = (other_keys @ keys[i, :, None])[:, 0].topk(MERGED).indices
        made[i] = x[i] + (others[near] * other_scores[near, None]).sum(0)
    made[-1] = (x[len(kept) :] * scores[len(kept) :, None]).sum(0)
    return made


PEERS = {
    "none": LLaVA,
    "pool": Pool,
    "quecc": QueCC,
    "token_packer": TokenPacker,
    "mqt": MQT,
    "m3": M3,
    "prumerge": PruMerge,
}


def load(module: nnx.Module, sizes: dict) -> nn.Module:
    """The peer of one of our compressors, built from the same sizes, with its weights."""
    peer = PEERS[module.method.kind]
    known = inspect.signature(peer).parameters
    peer = peer(**{name: value for name, value in sizes.items() if name in known})
    tensors = folder.compressor_tensors(module)
    peer.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=True)
    return peer.eval()
