# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and templates on the way from transformers and back: the same ids, the same ends."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import real_tokenizers as real
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer

from vlm_jax.__main__ import main
from vlm_jax.data import jinja
from vlm_jax.data.example import Example
from vlm_jax.data.templates import TEMPLATES
from vlm_jax.weights import chats, ends, folder, processors

FROZEN = Path(__file__).parent / "published_weights/clip_llama"
VOCAB, IMAGE = 400, 390
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def run(*argv):
    return main(["convert", *map(str, argv)])


def edit(path, **fields):
    """Changes a JSON file; None takes a field out."""
    found = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def llava(path, tokenizer, *, text=(), **outer):
    """A small LLaVA of transformers with an embedding for every token of a tokenizer."""
    shutil.copytree(FROZEN, path)
    tensors = load_file(path / "model.safetensors")
    draw = np.random.default_rng(0)
    for name in list(tensors):
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = draw.normal(size=(VOCAB, 24)).astype("f4")
    save_file(tensors, path / "model.safetensors")
    fields = json.loads((path / "config.json").read_text())
    sizes = dict(vocab_size=VOCAB, max_position_embeddings=2048)
    edit(path / "config.json", text_config=fields["text_config"] | sizes | dict(text),
         image_token_index=IMAGE, **outer)  # fmt: skip
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def qwen(**fields):
    words = real.with_image(real.qwen(**fields))
    words.chat_template = QWEN
    return words


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder; the tests give its description other tokenizers and templates."""
    home = tmp_path_factory.mktemp("chats")
    assert run("--from", llava(home / "hf", qwen()), "--to", home / "ours") == 0
    return home / "ours"


def described(base, template, tokenizer, **facts):
    """The description of a model of another tokenizer, unread."""
    model = folder.read(base)
    model.tokenizer = tokenizer
    model.facts |= dict(template=template, image_token=None) | facts
    return model


# How a user of transformers writes these to a model with an image in the first question.
TALKS = ((("what is it?", ""),), (("what is it?", "a red cat"), ("is it big?\nno", "")))
KINDS = ("qwen", "gpt2", "llama3", "llama", "llama legacy", "llama always", "llama without",
         "llama with both")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_of_ours_is_written_so_that_transformers_gives_our_ids(kind, base, tmp_path):
    """By tokenizers, which put nothing in front of a chat, and by processors, which may."""
    real.KINDS[kind]().save_pretrained(tmp_path / "words")
    for name, template in jinja.builtin():
        if name == "chatml" and kind != "qwen":
            continue
        fresh = tmp_path / name
        fresh.mkdir()
        model = described(base, name, tmp_path / "words")
        token, mark = chats.export(model, fresh, add_image_token=True)
        theirs = AutoTokenizer.from_pretrained(fresh)
        assert jinja.template_name(theirs.chat_template) == name
        ours = processors.processor_of(model)
        for turns in TALKS[: 2 if template.joined else 1]:
            for image in (0, None):
                if name == "plain" and image is None and not ours.bos:
                    continue  # it drops the question: a prompt of no token
                row = ours.tokens(Example("x", image, turns, "", ""), answer=False)
                at = row.image_at or 0
                ids = [*row.ids[:at], *[token] * len(row.places), *row.ids[at:]]
                for lists in (True, False):
                    talk = []
                    for k, (question, answer) in enumerate(turns):
                        parts = [{"type": "image"}] * (image == 0 and k == 0)
                        asked = [*parts, {"type": "text", "text": question}]
                        if not lists:
                            asked = f"{mark}\n" * len(parts) + question
                        talk.append({"role": "user", "content": asked})
                        talk.append({"role": "assistant", "content": answer})
                    text = theirs.apply_chat_template(
                        talk[:-1], tokenize=False, add_generation_prompt=True
                    )
                    begun = bool(theirs.bos_token) and text.startswith(theirs.bos_token)
                    assert theirs(text, add_special_tokens=False).input_ids == ids
                    assert theirs(text, add_special_tokens=not begun).input_ids == ids
        told = model.notes.get("chat_template")
        assert (told is None) or not template.joined and "each part by itself" in told


def test_a_chat_template_of_ours_refuses_what_its_model_was_not_made_for():
    words = real.qwen()
    words.chat_template = jinja.chat_template(TEMPLATES["vicuna_v1"], jinja.Form())
    for talk in (
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "hello"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": [{"type": "video"}]}],
    ):
        with pytest.raises(Exception, match="this model"):
            words.apply_chat_template(talk)


def test_several_images_stand_in_a_chat_template_where_a_row_has_them(base, tmp_path):
    real.llama().save_pretrained(tmp_path / "words")
    (tmp_path / "a").mkdir()
    model = described(base, "vicuna_v1", tmp_path / "words")
    token, mark = chats.export(model, tmp_path / "a", add_image_token=True)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "a"), processors.processor_of(model)
    image, say = {"type": "image"}, lambda text: {"type": "text", "text": text}
    for question, parts in {
        f"{mark}\n{mark}\nsame?": f"{mark}\n{mark}\nsame?",
        f"is {mark} like {mark}?": [say("is "), image, say(" like "), image, say("?")],
        f"what is it? {mark}": [say("what is it? "), image],
        "same?": [image, image, say("same?")],
    }.items():
        count = max(question.count(mark), 1 + (question == "same?"))
        row = ours.tokens(
            Example("x", tuple(range(count)), ((question, ""),), "", ""), answer=False
        )
        ids = list(row.ids)
        for place in reversed(row.places):
            ids.insert(place, token)
        assert theirs.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, return_dict=False
        ) == ids  # fmt: skip


def test_a_template_and_the_ends_of_a_model_survive_the_way_to_transformers_and_back(tmp_path):
    words = real.with_image(real.llama(pad_token="<unk>"))
    hf = llava(tmp_path / "hf", words, text=dict(eos_token_id=[2, 9], bos_token_id=7),
               pad_token_id=3, eos_token_id=5)  # fmt: skip
    edit(hf / "config.json", image_token_index=360)
    (hf / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 11], top_p=0.5)))
    assert run("--from", hf, "--to", tmp_path / "ours") == 0
    stored = folder.read(tmp_path / "ours")
    assert stored.facts["template"] == "vicuna_v1"  # nothing else was said
    assert set(processors.processor_of(stored).stop_ids) == {2, 11}
    assert run("--from", tmp_path / "ours", "--to-hf", "--to", tmp_path / "back") == 0
    found = json.loads((tmp_path / "back/config.json").read_text())
    assert found["text_config"]["eos_token_id"] == [2, 9]
    assert found["text_config"]["bos_token_id"] == 7
    assert (found["pad_token_id"], found["eos_token_id"], found["image_token_index"]) == (3, 5, 360)
    more = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert more == dict(eos_token_id=[2, 11], top_p=0.5)
    assert run("--from", tmp_path / "back", "--to", tmp_path / "again") == 0
    assert folder.read(tmp_path / "again").facts == stored.facts
    # And a processor of transformers makes the ids that the model was asked with.
    theirs = AutoProcessor.from_pretrained(tmp_path / "back")
    parts = [
        {"type": "image", "image": Image.new("RGB", (30, 20))},
        {"type": "text", "text": "it?"},
    ]
    whole = theirs.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="np",
    )["input_ids"][0]  # fmt: skip
    row = processors.processor_of(stored).tokens(
        Example("x", 0, (("it?", ""),), "", ""), answer=False
    )
    assert [i for i in whole if i != 360] == row.ids and list(whole).index(360) == row.image_at


def test_a_checkpoints_own_template_stays_its_own_and_its_image_token_has_any_name(tmp_path):
    words = real.with_image(real.qwen(), "<picture>")
    words.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.content %}"
        "{{ '<picture>' if c.type == 'image' else c.text }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    hf = llava(tmp_path / "hf", words)
    token = words.convert_tokens_to_ids("<picture>")
    edit(hf / "config.json", image_token_index=token)
    assert run("--from", hf, "--to", tmp_path / "ours") == 0
    stored = folder.read(tmp_path / "ours")
    assert stored.facts["template"] == "checkpoint"
    made = processors.processor_of(stored)
    row = made.tokens(Example("x", 0, (("what is it?", ""),), "", ""), answer=False)
    assert words.decode([*row.ids[: row.image_at], token, *row.ids[row.image_at :]]) == (
        "user:<picture>what is it?<|im_end|>assistant:"
    )
    assert run("--from", tmp_path / "ours", "--to-hf", "--to", tmp_path / "back") == 0
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.chat_template == words.chat_template and back.get_vocab() == words.get_vocab()
    processor = json.loads((tmp_path / "back/processor_config.json").read_text())
    assert processor["image_token"] == "<picture>"


@pytest.mark.parametrize("kind, legacy", [("llava", None), ("llama", None), ("llama", True)])
def test_a_tokenizer_is_read_by_the_class_that_transformers_takes(kind, legacy, tmp_path):
    """Which depends on the model beside it: some classes make a tokenizer of their own."""
    real.llama("normalizer").save_pretrained(tmp_path / "a")
    edit(tmp_path / "a/tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=legacy)
    (tmp_path / "a/config.json").write_text(json.dumps(dict(model_type=kind, hidden_size=64)))
    folder.copy_tokenizer(tmp_path / "a", tmp_path / "b")
    folder.copy_tokenizer(tmp_path / "b", tmp_path / "c")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    for copy in "bc":
        found = AutoTokenizer.from_pretrained(tmp_path / copy)
        assert type(found) is type(theirs)
        for text in ("what is it?", "a</s>cat", " b\n<s>c"):
            assert found(text).input_ids == theirs(text).input_ids


@pytest.mark.parametrize("fields, text, generation, expected", [
    ({}, dict(model_type="llama"), None, [2]),  # LlamaConfig's own
    ({}, dict(model_type="qwen2"), None, []),
    ({}, dict(model_type="llama", eos_token_id=None), None, []),
    ({}, dict(model_type="llama", eos_token_id=[4, 5]), None, [4, 5]),
    (dict(eos_token_id=6), dict(model_type="llama", eos_token_id=4), None, [6]),
    (dict(eos_token_id=6), dict(model_type="llama"), dict(eos_token_id=[7, 8]), [7, 8]),
    (dict(eos_token_id=6), dict(model_type="llama"), dict(top_p=1.0), []),
    (dict(model_type="llama"), None, None, [2]),
    (dict(model_type="llama", eos_token_id=3), None, None, [3]),
    (dict(model_type="llava_llama", eos_token_id=-1), None, None, []),
    (dict(model_type="qwen3"), None, None, []),
])  # fmt: skip
def test_generation_stops_where_that_of_transformers_does(
    fields, text, generation, expected, tmp_path
):
    from transformers import CONFIG_MAPPING, GenerationConfig

    whole = fields | ({} if text is None else dict(text_config=text, model_type="llava"))
    (tmp_path / "config.json").write_text(json.dumps(whole))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    family = (text or whole)["model_type"].removeprefix("llava_")
    assert ends.of(tmp_path, family)["stop"] == expected
    if whole["model_type"] in CONFIG_MAPPING:
        config = CONFIG_MAPPING[whole.pop("model_type")](**whole)
        theirs = GenerationConfig.from_model_config(config)
        if generation is not None:
            theirs = GenerationConfig.from_pretrained(tmp_path)
        named = theirs.eos_token_id
        assert expected == (named if isinstance(named, list) else [] if named is None else [named])


@pytest.mark.parametrize("found", [3, {"stop": 3}, {"stop": ["x"]}, {"text": []},
                                   {"text": {"eos_token_id": "x"}}])  # fmt: skip
def test_the_ends_of_a_model_folder_are_checked(found, base, tmp_path):
    shutil.copytree(base, tmp_path / "a")
    facts = json.loads((base / "config.json").read_text())["facts"]
    edit(tmp_path / "a/config.json", facts=facts | dict(ends=found))
    with pytest.raises(ValueError, match="config.json.*ends"):
        folder.read(tmp_path / "a")


def test_a_model_that_was_trained_here_tells_transformers_where_its_answers_end(base, tmp_path):
    real.qwen().save_pretrained(tmp_path / "words")
    for name, start in (("a", ""), ("b", str(base))):
        (tmp_path / name).mkdir()
        model = described(base, "chatml", tmp_path / "words", ends=ends.of_run(start))
        chats.export(model, tmp_path / name, add_image_token=True)
        found = json.loads((tmp_path / name / "generation_config.json").read_text())
        stop = list(processors.processor_of(model).stop_ids)
        assert found["eos_token_id"] == stop == ([1, 2] if start else [1])
        text = {} if start else dict(bos_token_id=None, eos_token_id=1, pad_token_id=2)
        assert model.facts["ends"]["text"] == (text or folder.read(base).facts["ends"]["text"])


@pytest.mark.parametrize("name, content, words", [
    ("generation_config.json", [], r"generation_config.json=\[\]: an object"),
    ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id='x'.*the number of a token"),
    ("generation_config.json", {"eos_token_id": [1, None]}, "or a list of them"),
    ("generation_config.json", {"eos_token_id": True}, "eos_token_id=True"),
    ("tokenizer.json", {}, "holds no tokenizer that transformers can load"),
    ("tokenizer_config.json", [], "holds no tokenizer that transformers can load"),
    ("chat_template.jinja", "{% for m in messages %}", "chat template of .*line 1"),
    ("chat_template.jinja", "{{ raise_exception('never') }}", r"\(never\)"),
])  # fmt: skip
def test_damaged_files_of_a_tokenizer_are_refused_in_one_line(
    name, content, words, tmp_path, capsys
):
    import re

    hf = llava(tmp_path / "hf", qwen())
    text = content if isinstance(content, str) else json.dumps(content)
    (hf / name).write_text(text)
    assert run("--from", hf, "--to", tmp_path / "a") == 2
    said = capsys.readouterr().err.strip()
    assert re.search(words, said) and "\n" not in said and not (tmp_path / "a").exists()


def test_a_tokenizer_that_does_not_fit_its_model_or_is_none_is_refused(tmp_path, capsys):
    hf = llava(tmp_path / "hf", qwen())
    to = ("--from", hf, "--to", tmp_path / "a")
    assert run(*to, "--tokenizer", tmp_path / "nothing") == 2
    assert "holds no tokenizer (tokenizer.json, " in capsys.readouterr().err
    large = qwen()
    large.add_tokens([f"<{k}>" for k in range(120)])
    large.save_pretrained(tmp_path / "large")
    assert run(*to, "--tokenizer", tmp_path / "large") == 2
    said = capsys.readouterr().err
    assert "ids up to 420 (the first too large is 400" in said and "llm.vocab=400" in said
    # A tokenizer that is given brings its own template, or none.
    real.with_image(real.llama()).save_pretrained(tmp_path / "llama")
    assert run(*to, "--tokenizer", tmp_path / "llama") == 0
    facts = folder.read(tmp_path / "a").facts
    assert (facts["template"], facts["image_token"]) == ("vicuna_v1", 360)
    for path in list(hf.iterdir()):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    assert run("--from", hf, "--to", tmp_path / "b") == 0
    assert "no tokenizer was found: to generate, repeat with" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no tokenizer: convert it again with --tokenizer"):
        processors.processor_of(folder.read(tmp_path / "b"))
    # A run names the tokenizer of its configuration, which may be relative.
    lost = replace(folder.read(tmp_path / "b"), tokenizer=Path("runs/words"))
    with pytest.raises(ValueError, match=r"no tokenizer at runs/words, as seen from /"):
        processors.processor_of(lost)
