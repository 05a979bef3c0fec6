# SPDX-License-Identifier: Apache-2.0
"""The demo's cell in PyTorch: TokenPacker and a Llama decoder, written as a PyTorch user would.

Batches are those of vlm_jax (as torch tensors), features cached: `levels` [B P Z] in raster order.
Parameters have the published names; `load` takes them from a vlm_jax model.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_jax.models.vlm import VLM
from vlm_jax.weights import folder

EPS = 1e-6  # of TokenPacker's LayerNorms, as published


class WindowAttention(nn.Module):
    """One query per window over the patches of its window; weights as nn.MultiheadAttention's."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, tokens, width = query.shape
        size = width // self.heads
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        # Each window is a row of its own: [B V, heads, patches of the window, head size].
        q, k, v = (
            F.linear(x, w, b).view(batch * tokens, -1, self.heads, size).transpose(1, 2)
            for x, w, b in zip((query, keys, values), weights, biases, strict=True)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class TokenPacker(nn.Module):
    """arXiv 2407.02392, under the published names."""

    def __init__(
        self, *, tokens: int, side: int, width: int, levels: int, llm_width: int, heads: int
    ):
        super().__init__()
        self.tokens, self.side, self.width = tokens, side, width

        def mlp(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))

        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1, self.v_proj_1 = mlp(levels * width, width), mlp(levels * width, width)
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.clip_attn = WindowAttention(width, heads)
        self.mlp = mlp(width, llm_width)

    def forward(self, levels: Tensor) -> Tensor:
        batch, patches, channels = levels.shape
        per_row = math.isqrt(self.tokens)
        size = self.side // per_row
        grid = levels.view(batch, per_row, size, per_row, size, channels).transpose(2, 3)
        windows = grid.reshape(batch, self.tokens, size, size, channels)
        middle = slice((size - 1) // 2, size // 2 + 1)  # bilinear resizing to one sample per window
        query = windows[:, :, middle, middle, -self.width :].mean((2, 3))
        query = self.ln_q_1(self.q_proj_1(query))
        windows = windows.reshape(batch, patches, channels)
        keys = self.ln_k_1(self.k_proj_1(windows))
        values = self.ln_v_1(self.v_proj_1(windows))
        return self.mlp(self.clip_attn(query, keys, values))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split form, x [B heads T H]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """One pre-norm Llama block."""

    def __init__(
        self, *, width: int, mlp: int, heads: int, kv_heads: int, head_size: int, norm_eps: float
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.input_layernorm = nn.RMSNorm(width, eps=norm_eps)
        self.q_proj = nn.Linear(width, heads * head_size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_size, bias=False)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=norm_eps)
        self.gate_proj = nn.Linear(width, mlp, bias=False)
        self.up_proj = nn.Linear(width, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.input_layernorm(x)

        def cut(z: Tensor, heads: int) -> Tensor:
            return z.view(batch, length, heads, self.head_size).transpose(1, 2)

        q = rotate(cut(self.q_proj(y), self.heads), cos, sin)
        k = rotate(cut(self.k_proj(y), self.kv_heads), cos, sin)
        v = cut(self.v_proj(y), self.kv_heads)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class TorchVLM(nn.Module):
    """Compressor and decoder of one cell of the demo: tied embeddings, no biases in the decoder."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        llm, vit = config.llm, config.vit
        if config.compressor.kind != "token_packer" or llm.qkv_bias or not llm.tied_embeddings:
            raise ValueError(
                "the peer has token_packer, tied embeddings and no qkv biases; got "
                f"{config.compressor.kind}, tied_embeddings={llm.tied_embeddings}, "
                f"qkv_bias={llm.qkv_bias}: choose such a cell"
            )
        self.compressor = TokenPacker(
            tokens=config.compressor.tokens,
            side=vit.image_size // vit.patch_size,
            width=vit.width,
            levels=len(vit.levels),
            llm_width=llm.width,
            heads=config.compressor.heads,
        )
        self.embed_tokens = nn.Embedding(llm.vocab, llm.width)
        self.layers = nn.ModuleList(
            Block(
                width=llm.width,
                mlp=llm.mlp,
                heads=llm.heads,
                kv_heads=llm.kv_heads,
                head_size=llm.head_size,
                norm_eps=llm.norm_eps,
            )
            for _ in range(llm.depth)
        )
        self.norm = nn.RMSNorm(llm.width, eps=llm.norm_eps)
        positions = torch.arange(config.data.text_length + config.compressor.tokens)
        half = llm.head_size // 2
        angle = positions[:, None] * llm.rope_theta ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """For every text token the scores given all before it, [B T W]."""
        ids, at = batch["ids"], batch["image_at"][:, None]
        visual = self.compressor(batch["levels"])
        length, tokens = ids.shape[1], visual.shape[1]
        place = torch.arange(length + tokens)
        index = torch.where(
            place < at, place, torch.where(place < at + tokens, length + place - at, place - tokens)
        )
        x = take(torch.cat([self.embed_tokens(ids), visual], 1), index)
        for block in self.layers:
            x = block(x, self.cos, self.sin)
        text = torch.arange(length)
        before = (text + tokens * (text >= at) - 1).clamp(min=0)
        return F.linear(take(self.norm(x), before), self.embed_tokens.weight)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the supervised tokens."""
        mask = batch["loss_mask"]
        target = torch.where(mask, batch["ids"], -100)
        return F.cross_entropy(self(batch).flatten(0, 1), target.flatten())


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t]]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class Trainer:
    """AdamW under warm-up and cosine with clipped gradients: one call is one optimizer step."""

    def __init__(self, model: TorchVLM, stage: ConfigDict, *, compiled: bool):
        self.parameters, self.clip_norm = list(model.parameters()), stage.clip_norm
        self.loss = torch.compile(model.loss) if compiled else model.loss
        decayed = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=decayed, weight_decay=stage.weight_decay),
                dict(params=others, weight_decay=0.0),
            ],
            lr=stage.learning_rate,
            betas=(stage.beta1, stage.beta2),
            eps=stage.epsilon,
            fused=True,
        )
        warmup = math.ceil(stage.warmup * stage.steps)

        def rate(step: int) -> float:
            if step < warmup:
                return step / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (stage.steps - warmup)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def __call__(self, batch: Mapping[str, Tensor]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """A batch as torch takes it."""
    return {
        name: torch.tensor(np.asarray(x)).to(torch.int64 if x.dtype == np.int32 else None)
        for name, x in batch.items()
    }


def published(model: VLM) -> dict[str, Tensor]:
    """Every weight of compressor and decoder by name, or every gradient of a model of gradients."""
    tensors = folder.compressor_tensors(model.compressor)
    named = {f"compressor.{name}": x for name, x in tensors.items()}
    llm = model.llm
    named["embed_tokens.weight"] = np.asarray(llm.embedding[...])
    named["norm.weight"] = np.asarray(llm.norm.scale[...])
    parts = {
        "q_proj": llm.blocks.attention.query,
        "k_proj": llm.blocks.attention.key,
        "v_proj": llm.blocks.attention.value,
        "gate_proj": llm.blocks.gate,
        "up_proj": llm.blocks.up,
        "down_proj": llm.blocks.down,
    }
    for i in range(llm.depth):
        for name, part in parts.items():
            kernel = np.asarray(part.kernel[...][i])
            named[f"layers.{i}.{name}.weight"] = kernel.reshape(kernel.shape[0], -1).T
        out = np.asarray(llm.blocks.attention.out.kernel[...][i])
        named[f"layers.{i}.o_proj.weight"] = out.reshape(-1, out.shape[-1]).T
        named[f"layers.{i}.input_layernorm.weight"] = np.asarray(llm.blocks.norm1.scale[...][i])
        named[f"layers.{i}.post_attention_layernorm.weight"] = np.asarray(
            llm.blocks.norm2.scale[...][i]
        )
    return {name: torch.tensor(x) for name, x in named.items()}


def load(config: ConfigDict, model: VLM) -> TorchVLM:
    """The peer of `model`, with its weights."""
    peer = TorchVLM(config)
    peer.load_state_dict(published(model))
    return peer
