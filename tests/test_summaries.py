# SPDX-License-Identifier: Apache-2.0
"""A summary that is kept answers as one that is read anew, and is as small as it is said to be."""

import io

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_generate import PROMPTS, made

import vlm_jax
from vlm_jax.evals.task import Question
from vlm_jax.models.cache import Pruned
from vlm_jax.serving import summaries, talk
from vlm_jax.serving.answer import Drawing
from vlm_jax.serving.asking import Asker, Way
from vlm_jax.serving.greedy import Greedy
from vlm_jax.serving.requests import batch_of

N, P = 2, 16  # summary tokens, patches
DRAWING = Drawing(max_new_tokens=5)


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory):
    section = dict(kind="voco", tokens=N)
    return made(tmp_path_factory.mktemp("summaries") / "model", trained, compressor=section)


@pytest.fixture(scope="module")
def one(path, mesh1):
    return vlm_jax.VLM.from_checkpoint(path, mesh=mesh1)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(3)]


@pytest.fixture
def fresh(one):
    """The model with nothing kept, and how many images were read since."""
    kept, read = one.summaries, []
    one.summaries = summaries.Summaries(kept.model, kept.mesh, before=kept.before)
    program = one.summaries.read
    one.summaries.read = lambda model, ids, pixels: (
        read.append(len(pixels)) or program(model, ids, pixels)
    )
    yield one, read
    one.summaries = kept


@pytest.fixture(scope="module")
def anew(one, images):
    """Answers to every prompt about every image by one pass under the mask."""
    kept, one.summaries = one.summaries, None
    found = [
        [one.generate(image, prompt, max_new_tokens=5)[0] for prompt in PROMPTS] for image in images
    ]
    one.summaries = kept
    return found


def test_several_prompts_about_an_image_read_it_once(fresh, anew, images):
    model, read = fresh
    answers = model.generate(images[0], PROMPTS, max_new_tokens=5)
    assert read == [1] and {a.known_tokens for a in answers} == {0}
    assert len({tuple(a.ids) for a in answers}) > 2
    for mine, theirs in zip(answers, anew[0], strict=True):
        assert (mine.ids, mine.text, mine.stopped) == (theirs.ids, theirs.text, theirs.stopped)
        assert mine.visual_tokens == theirs.visual_tokens == P + N
        assert mine.prompt_tokens == theirs.prompt_tokens
    again = model.generate(images, [PROMPTS[1]] * 3, max_new_tokens=5)
    assert read == [1, 2]
    read_tokens = len(model.summaries.before) + P + N
    assert [a.known_tokens for a in again] == [read_tokens, 0, 0]
    assert [a.ids for a in again] == [of_image[1].ids for of_image in anew]


def test_scores_behind_a_kept_summary_are_those_of_the_mask(fresh, images):
    """The same next-token scores, positions and room, beyond which answer is chosen."""
    model, _ = fresh
    requests = [model.request(images[0], PROMPTS[0]), model.request(images[1], PROMPTS[1])]
    how = dict(skip=0, shards=1, width=model.width, pad=model.processor.pad_id)
    with jax.set_mesh(model.mesh):
        prefill = jax.jit(lambda m, b, past: m.prefill(b, new_tokens=3, prefix=past))
        decode = jax.jit(lambda m, *given: m.decode(*given))
        texts, past, _ = model.summaries.of(requests)
        found = []
        for of, prefix in ((requests, None), (texts, past)):
            batch = tiny.placed(batch_of(of, model.compressor, **how))
            logits, caches, length = prefill(model.decoder.model, batch, prefix)
            assert isinstance(caches, Pruned)
            ids = np.argmax(logits, 1).astype(np.int32)
            after, *_ = decode(model.decoder.model, tiny.placed(ids), caches, length)
            found.append((*map(np.asarray, (logits, after, length, caches.dropped)),))
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_the_second_turn_of_a_chat_reads_its_text_alone(fresh, images, capsys, tmp_path):
    model, read = fresh
    Image.fromarray(images[0]).save(path := str(tmp_path / "a.png"))
    talk.chat(model, [path], io.StringIO("what is it?\nand now?\n"), drawing=DRAWING)
    said = capsys.readouterr()
    assert (
        read == [1] and f"{P + N + len(model.summaries.before)} tokens read were known" in said.err
    )
    assert "bytes keep the summaries of 1 images" in said.err
    first, second = said.out.splitlines()
    kept, model.summaries = model.summaries, None
    turns = ["what is it?", first, "and now?"]
    assert model.generate([images[0]], [turns], max_new_tokens=5)[0].text == second
    model.summaries = kept


def test_an_image_leaves_the_keys_and_values_of_its_summary(fresh, images):
    model, _ = fresh
    model.generate(images, PROMPTS[:3], max_new_tokens=2)
    llm = model.decoder.model.llm.size
    each = N * llm.depth * 2 * llm.kv_heads * llm.head_size + N * llm.width
    held = model.summaries.index.stats()
    assert (held.images, held.bytes) == (3, 3 * 4 * each)  # float32
    assert model.summaries.described() == f"{3 * 4 * each:,} bytes keep the summaries of 3 images"
    model.summaries.index.limit = 2 * 4 * each
    model.generate(images[0], PROMPTS[0], max_new_tokens=2)
    held = model.summaries.index.stats()
    assert held.images == 3  # nothing new came
    other = np.full((32, 32, 3), 7, np.uint8)
    model.generate(other, PROMPTS[0], max_new_tokens=2)
    assert model.summaries.index.stats().images == 2
    assert model.generate(images[0], PROMPTS[0], max_new_tokens=2)[0].known_tokens > 0


def test_an_image_behind_text_is_read_with_its_row(fresh, images):
    model, read = fresh
    turns = ["what is red?", "no", "<image> and here?"]
    (mine,) = model.generate([images[0]], [turns], max_new_tokens=5)
    (text,) = model.generate([None], ["what is red?"], max_new_tokens=5)
    assert read == [] and mine.visual_tokens == P + N and text.visual_tokens == 0
    assert model.summaries.index.stats().images == 0


def test_a_tokenizer_s_own_beginning_stands_before_the_image(fresh, images):
    """As BOS does: the summary has read it, the text has not, and it is not known to be there."""
    model, read = fresh
    request = model.request(images[0], PROMPTS[0])
    begun = type(request)(
        [7, *request.ids], tuple(x + 1 for x in request.places), request.questions, request.pixels
    )
    before = model.summaries.before
    kept, model.summaries = model.summaries, None
    (theirs,) = model.answer([begun], max_new_tokens=5)
    model.summaries = kept
    kept.before = [7, *before]
    (mine,) = model.answer([begun], max_new_tokens=5)
    kept.before = before
    assert len(read) == 1 and mine.ids == theirs.ids and mine.prompt_tokens == theirs.prompt_tokens
    assert mine.visual_tokens == theirs.visual_tokens == P + N


def test_questions_of_a_benchmark_about_one_image_read_it_once(fresh, images, tmp_path):
    """The lines of a file of answers are those of the one pass, in any batch."""
    model, read = fresh
    for k, image in enumerate(images[:2]):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    texts = ["what is red?", "and?", "is there a star on the left of it?", "b", "what is it?"]
    asked = [Question(k, text, (tmp_path / f"{k % 2}.png",)) for k, text in enumerate(texts)]
    found = []
    for kept, batch in ((model.summaries, 1), (model.summaries, 4), (None, 4)):
        model.summaries = kept
        asker = Asker(model, Way("same", None, "", 5))
        rows = ([asker.row(k, question, question.text)] for k, question in enumerate(asked))
        answers = Greedy([asker], batch=batch, cache=None).answers(rows, lambda row: None)
        found.append({row.number: said for some in answers for row, said in some})
    assert found[0] == found[1] == found[2] and len(found[0]) == 5
    assert sum(read) == 2 and {said.visual_tokens for said in found[0].values()} == {P + N}


def test_eight_devices_keep_and_answer_alike(path, mesh8, anew, images):
    many = vlm_jax.VLM.from_checkpoint(path, mesh=mesh8)
    for known in (0, P + N):
        answers = many.generate(images, PROMPTS[:3], max_new_tokens=5)
        assert [a.ids for a in answers] == [anew[k][k].ids for k in range(3)]
        assert {a.known_tokens for a in answers} == {
            known + len(many.summaries.before) * (known > 0)
        }
