# SPDX-License-Identifier: Apache-2.0
"""Cases of what prunes, fuses or summarizes visual tokens in the LLM, run through ours."""

import functools

import jax
import numpy as np
import tiny
from flax import nnx

from vlm_jax.compressors.llava_mini import LlavaMiniMethod
from vlm_jax.compressors.method import Interface
from vlm_jax.models import pruned
from vlm_jax.models.cache import positions_of
from vlm_jax.models.llm import LLM
from vlm_jax.models.prefusion import Prefusion
from vlm_jax.models.pruning import PRUNINGS, cuts
from vlm_jax.models.sizes import LLMSize
from vlm_jax.models.voco import voco_mask
from vlm_jax.weights import folder, names

GATE = 1e-5  # absolute, on activations of order one, float32 with matmuls at highest precision


def llm_size(meta, **more):
    """A decoder of the sizes of a case."""
    heads = meta.get("heads", 1)
    fields = dict(
        vocab=8,
        depth=2,
        width=meta["hidden"],
        mlp=8,
        heads=heads,
        kv_heads=meta.get("kv_heads", heads),
        head_size=meta.get("head_dim", meta["hidden"] // heads),
        rope_theta=meta["rope_theta"],
        norm_eps=meta["rms_eps"],
        qkv_bias=False,
        tied_embeddings=True,
    )
    return LLMSize(**(fields | more))


def visual(rows, length, first, tokens):
    """The places of the image's tokens."""
    place = np.broadcast_to(np.arange(length), (rows, length))
    return (place >= first) & (place < first + tokens)


@functools.partial(jax.jit, static_argnames=("one", "slots", "tokens"))
def cut(one, hidden_states, attention, where, *, slots, tokens):
    """Each row cut by attention, mean over heads."""
    made = jax.vmap(lambda *row: one(*row, slots=slots, tokens=tokens))(
        hidden_states, attention.mean(1), where
    )
    return made.hidden, made.index


def fastv(meta, state, hidden_states, attention):
    return kept_positions(meta, cuts.by_attention, hidden_states, attention)


def token_carve(meta, state, hidden_states, attention):
    described = PRUNINGS["tokencarve"](
        layers=(meta["layer"],), tokens=(meta["tokens"],), weight=meta["weight"]
    )
    return kept_positions(meta, described.cut(), hidden_states, attention)


def kept_positions(meta, one, hidden_states, attention):
    where = visual(*hidden_states.shape[:2], meta["prefix"], meta["image_tokens"])
    slots, tokens = meta["image_tokens"], meta["tokens"]
    hidden, index = cut(one, hidden_states, attention, where, slots=slots, tokens=tokens)
    return dict(hidden_states=hidden, indices=index, positions=index)


def pyramid_drop(meta, state, hidden_states):
    """The cut behind the first of two layers, of which the second is the published one."""
    size = llm_size(meta)
    slots = int(meta["image_tokens"] * meta["ratios"][meta["stage"]])
    tokens = int(meta["image_tokens"] * meta["ratios"][meta["stage"] + 1])
    assert tokens == meta["tokens"]
    pruning = PRUNINGS["pyramiddrop"](layers=(1,), tokens=(tokens,))
    llm = LLM(size, rngs=nnx.Rngs(0), pruning=pruning)
    published = {f"llm.layers.1.{name}": value for name, value in state.items()}
    llm = placed(llm, published, names.llm_table(llm), "llm.")
    rows, length, _ = hidden_states.shape
    last = np.full(rows, meta["prompt_len"] + slots - 1, np.int32)
    where = visual(rows, length, meta["image_index"], slots)

    @jax.jit
    def run(llm, x, last, where):
        turns = llm.rope.turns(positions_of(rows, length), size.head_size // 2)
        attention = pruned.last_attention(llm, 1, x, None, turns, last, None)
        return pruned.cut(llm, x, attention, where, last, slots=slots, tokens=tokens)

    hidden, index = run(llm, *map(tiny.placed, (hidden_states, last, where)))
    return dict(hidden_states=hidden, indices=index, positions=positions_of(*index.shape))


def placed(module, tensors, table, prefix=""):
    """A module with these published tensors, and zeros for its others."""
    wanted = names.shapes(table, module)
    given = {name.removeprefix(prefix): value for name, value in tensors.items()}
    assert given.keys() <= wanted.keys(), given.keys() - wanted.keys()
    assert all(wanted[name] == value.shape for name, value in given.items())
    zeros = {name: np.zeros(shape, np.float32) for name, shape in wanted.items()}
    return folder.place(module, table, zeros | given)


def llava_mini(meta, state, image_features, text_features, text_visible):
    """The compressor, the projector and the layers that fuse them with the text."""
    if meta["layer_norm_eps"] != 1e-5:
        raise ValueError(f"layer_norm_eps={meta['layer_norm_eps']}: LLaVA-Mini has 1e-5")
    mlp = state["prefusion_layers.0.mlp.up_proj.weight"].shape[0]
    heads, depth = meta["llm_heads"], meta["prefusion_layers"]
    size = llm_size(meta, mlp=mlp, heads=heads, kv_heads=meta["llm_kv_heads"],
                    head_size=meta["hidden"] // heads)  # fmt: skip
    method = LlavaMiniMethod(tokens=meta["tokens"], heads=meta["heads"], prefusion=depth)
    between = Interface(meta["grid"], meta["dim"], 1, meta["hidden"])

    def made():
        rngs = nnx.Rngs(0)
        return method.build(between, rngs=rngs, fusion=Prefusion(size, depth, rngs=rngs))

    tensors = {names.canonical(name).removeprefix("compressor."): x for name, x in state.items()}
    mini = tiny.filled(jax.eval_shape(made), tensors)
    run = jax.jit(lambda module, *given: module.fuse(*given))
    tokens, text = run(mini, image_features, text_features, text_visible)
    return dict(vision_tokens=tokens, text_features=text)


def voco(meta, state, valid, summary):
    return dict(mask=jax.jit(voco_mask)(valid, summary))


def of_case(run):
    """A run by the meta, the state and the inputs of a case."""
    return lambda meta, state, inputs: run(meta, state, **inputs)


RUNS = {
    "fastv": of_case(fastv),
    "llava_mini": of_case(llava_mini),
    "pyramid_drop": of_case(pyramid_drop),
    "token_carve": of_case(token_carve),
    "voco_mask": of_case(voco),
}
