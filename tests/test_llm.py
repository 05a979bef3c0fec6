# SPDX-License-Identifier: Apache-2.0
"""The decoder against the equations of Llama and Qwen written out, and its cache against itself."""

import re

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import pytest
import tiny
from flax import nnx

from configs import sizes
from vlm_jax import cpu
from vlm_jax.cost import flops as cost
from vlm_jax.layers import store_output_first
from vlm_jax.models import llm as llms
from vlm_jax.models.llm import LLM
from vlm_jax.models.rope import Rope, rotate
from vlm_jax.models.sizes import LLMSize
from vlm_jax.models.vlm import parameters

LLAMA = dict(heads=2, kv_heads=2, qkv_bias=False, tied_embeddings=False, rope_theta=1e4)
QWEN = dict(heads=4, kv_heads=1, qkv_bias=True, tied_embeddings=True, rope_theta=1e6, norm_eps=1e-6)


def rough(c, mesh):
    with jax.set_mesh(mesh):
        return tiny.roughened(jax.jit(lambda: LLM(LLMSize.of(c.llm), rngs=nnx.Rngs(0)))())


def ids_of(c, rows=2, length=9):
    return np.random.default_rng(1).integers(0, c.llm.vocab, (rows, length)).astype(np.int32)


def passes(llm, ids):
    hidden = llm(llm.embed(ids))
    return hidden, llm.logits(hidden)


@pytest.mark.parametrize("change", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_hidden_states_and_logits_equal_the_equations(change, mesh1):
    c = tiny.config(llm=change)
    llm, ids = rough(c, mesh1), ids_of(c)
    with jax.set_mesh(mesh1):
        hidden, logits = jax.jit(passes)(llm, tiny.placed(ids))
    weights = literal_models.of(llm)
    assert ("head" in weights) != c.llm.tied_embeddings
    for row, ours, scores in zip(ids, *map(np.asarray, (hidden, logits)), strict=True):
        theirs = literal_models.llm(weights, weights["embedding"][row], c)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        np.testing.assert_allclose(scores, literal_models.unembed(weights, theirs), atol=1e-4)


def test_a_score_of_two_rotated_tokens_depends_on_their_distance_alone(mesh1):
    draw = np.random.default_rng(0)
    q, k = (jnp.asarray(draw.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(i, j):
        turns = [Rope(1e4).turns(jnp.full((1, 1), p, jnp.int32), 4) for p in (i, j)]
        return float((rotate(q, turns[0]) * rotate(k, turns[1])).sum())

    with jax.set_mesh(mesh1):
        assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
        assert abs(score(7, 3) - score(8, 3)) > 1e-2
        np.testing.assert_array_equal(
            rotate(q, Rope(1e4).turns(jnp.zeros((1, 1), jnp.int32), 4)), q
        )


@pytest.mark.parametrize("queries", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_queries_that_attend_some_at_a_time_give_what_all_at_once_give(queries, mesh1, monkeypatch):
    # Behind a past too, whose padding no query may see.
    c = tiny.config(llm=QWEN)
    llm, ids = rough(c, mesh1), ids_of(c, rows=2, length=14)

    def loss(llm, first, rest):
        past = llm.start(llm.embed(first), jnp.array([3, 5], jnp.int32))
        return jnp.square(llm.logits(llm(llm.embed(rest), past))).mean()

    found = []
    with jax.set_mesh(mesh1):
        for at_a_time in (llms.QUERIES, queries):
            monkeypatch.setattr(llms, "QUERIES", at_a_time)
            f = jax.jit(lambda *given: jax.value_and_grad(loss)(*given))
            found.append(f(llm, tiny.placed(ids[:, :5]), tiny.placed(ids[:, 5:])))
    for whole, parts in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_cache_gives_every_row_what_a_whole_pass_gives(mesh1):
    # Rows stop at different places: the token of a row is written at that row's own position.
    c = tiny.get_config()
    llm, ids = rough(c, mesh1), ids_of(c, rows=3, length=10)
    lengths = np.array([3, 6, 7], np.int32)
    with jax.set_mesh(mesh1):
        whole, _ = jax.jit(passes)(llm, tiny.placed(ids))
        x = llm.embed(tiny.placed(ids[:, :7]))
        hidden, caches = jax.jit(lambda m, x: m.prefill(x, slots=10))(llm, x)
        whole = np.asarray(whole)
        np.testing.assert_allclose(hidden, whole[:, :7], atol=1e-5)
        decode = jax.jit(lambda m, ids, caches, at: m.decode(m.embed(ids), caches, at))
        for step in range(3):
            at = lengths + step
            one = tiny.placed(ids[np.arange(3), at][:, None])
            ours, caches = decode(llm, one, caches, tiny.placed(at))
            np.testing.assert_allclose(ours[:, 0], whole[np.arange(3), at], atol=1e-5)
        # Several tokens at a time too, over what rows left behind their ends.
        at = np.zeros(3, np.int32)
        for size in (4, 6):
            some = np.stack([row[first : first + size] for row, first in zip(ids, at, strict=True)])
            ours, caches = decode(llm, tiny.placed(some), caches, tiny.placed(at))
            np.testing.assert_allclose(ours, whole[:, at[0] : at[0] + size], atol=1e-5)
            at += size


@pytest.mark.parametrize("name", sizes.LLM)
def test_parameters_of_the_published_models(name, mesh1):
    of = sizes.LLM[name]
    with jax.set_mesh(mesh1):
        counted = parameters(jax.eval_shape(lambda: LLM(LLMSize.of(of), rngs=nnx.Rngs(0))))
    assert counted == sizes.LLM_PARAMETERS[name] == cost.llm_parameters(LLMSize.of(of))


@pytest.mark.parametrize("change, words", [
    (dict(kv_heads=3), r"llm.kv_heads=3 does not divide llm.heads=4.*\[1, 2, 4\]"),
    (dict(head_size=5), "llm.head_size=5 is odd"),
    (dict(rope_kind="yarn"), "rope_kind='yarn': choose one of .*'linear', 'llama3'"),
])  # fmt: skip
def test_impossible_sizes_are_refused_with_the_way_out(change, words, mesh1):
    c = tiny.config(llm=change)
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: LLM(LLMSize.of(c.llm), rngs=nnx.Rngs(0)))


def test_examples_of_one_row_are_computed_as_if_each_were_alone(mesh1, mesh8):
    c = tiny.config(llm=QWEN | dict(kv_heads=2))
    draw, lengths = np.random.default_rng(3), (5, 1, 7)
    parts = [draw.integers(0, c.llm.vocab, (2, n)).astype(np.int32) for n in lengths]
    row = np.concatenate([*parts, np.zeros((2, 3), np.int32)], axis=1)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 3])[None].repeat(2, 0).astype(np.int32)
    alone = rough(c, mesh1)
    with jax.set_mesh(mesh1):
        one = jax.jit(lambda m, i: m(m.embed(i)))
        expected = np.concatenate([one(alone, tiny.placed(p)) for p in parts], axis=1)
    for mesh in (mesh1, mesh8):
        with jax.set_mesh(mesh):
            llm = rough(c, mesh)
            rows = [tiny.placed(np.tile(x, (2, 1))) for x in (row, segments)]
            packed = np.asarray(jax.jit(lambda m, i, s: m(m.embed(i), segments=s))(llm, *rows))
        np.testing.assert_allclose(packed[:2, : sum(lengths)], expected, atol=2e-5)
        assert np.isfinite(packed).all()


@pytest.mark.parametrize("change", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_kernels_stored_output_first_compute_the_same(change, mesh1, monkeypatch):
    c = tiny.config(llm=change)
    llm, ids = rough(c, mesh1), ids_of(c)
    many = ids_of(c, rows=3, length=cpu.FEW_ROWS // 2)
    with jax.set_mesh(mesh1):
        run = jax.jit(passes)
        plain = llm.unrolled()
        expected = [run(plain, tiny.placed(x)) for x in (ids, many)]
        monkeypatch.setattr(cpu, "LARGE_KERNEL", 1)
        other = llm.unrolled()
        for block in other.blocks:
            store_output_first(block, llm.dtype)
        run = jax.jit(lambda *x: passes(*x))  # the logits' form is chosen while tracing
        found = [run(other, tiny.placed(x)) for x in (ids, many)]
    kernel = other.blocks[0].attention.query.kernel
    assert kernel.shape == (c.llm.heads * c.llm.head_size, c.llm.width)
    for ours, theirs in zip(found, expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


def test_the_kernel_of_few_rows_stays_first_in_the_compiled_product(mesh1):
    x, kernel = jnp.ones((1, 5, 8)), jnp.ones((24, 8))

    def product(x, kernel):
        return cpu.project_output_first(x, kernel, (6, 4), ("batch", "len", "heads", "head"))

    with jax.set_mesh(mesh1):
        compiled = jax.jit(product).lower(x, kernel).compile()
        assert compiled(x, kernel).shape == (1, 5, 6, 4)
    assert re.search(r"f32\[24,5\]\S* dot\(", compiled.as_text())
