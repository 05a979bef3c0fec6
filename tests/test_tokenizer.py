# SPDX-License-Identifier: Apache-2.0
"""The ids of a text are transformers', whatever state the files of a tokenizer store."""

import json
import pickle
from pathlib import Path

import pytest
import real_tokenizers as real
import tiny
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

from vlm_jax.data import tokenizer as tokenizers
from vlm_jax.data.example import BadExample, Example
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.tokenizer import Encoder, load_tokenizer
from vlm_jax.data.word_tokenizer import train_tokenizer

TEXTS = (
    "", "a", " ", "what is it?", " a  red cat\n", "is it big? " * 20, "café 日本", "\n\nUSER: no",
    "a</s>b <|im_end|>\n<image> c<s>", "<|endoftext|><|begin_of_text|>",
)  # fmt: skip
TURNS = (("what is it?", "a red cat"), ("is it big?", "no, it is small"))
TALK = Example("talk", 0, TURNS, "f", "t")


def processor(tokenizer, template, **changes):
    data = dict(template=template, text_length=900, question_length=40) | changes
    return Processor(tokenizer, RowFormat.of(tiny.config(data=data)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every kind of tokenizer as a folder, without any stored state."""
    home = tmp_path_factory.mktemp("tokenizers")
    for name, make in real.KINDS.items():
        make().save_pretrained(home / name)
    return home


def stored(source, target, **state):
    """A copy of a tokenizer's folder whose tokenizer.json has truncation and padding."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    path = target / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | state))
    return target


TRUNCATION = dict(direction="Left", max_length=8, strategy="LongestFirst", stride=0)
PADDING = dict(strategy={"Fixed": 24}, direction="Left", pad_to_multiple_of=None, pad_id=3,
               pad_type_id=0, pad_token="<pad>")  # fmt: skip


@pytest.mark.parametrize("kind", real.KINDS)
def test_ids_are_those_of_transformers_and_stored_truncation_and_padding_change_none(
    kind, folders, tmp_path
):
    clean = AutoTokenizer.from_pretrained(folders / kind)
    for name, state in {
        "as it is": {},
        "truncated": dict(truncation=TRUNCATION),
        "padded": dict(padding=PADDING),
        "both": dict(truncation=TRUNCATION, padding=PADDING),
    }.items():
        ours = load_tokenizer(stored(folders / kind, tmp_path / name, **state))
        encode = Encoder(ours)
        for text in TEXTS:
            assert encode(text).ids == clean(text, add_special_tokens=False).input_ids
            assert [*encode.before, *encode(text).ids, *encode.behind] == clean(text).input_ids
        # Whoever else uses the tokenizer leaves no state behind for us.
        ours("what is it?", truncation=True, max_length=3)
        ours.backend_tokenizer.enable_padding(length=50)
        assert encode("no, it is big. " * 9).ids == clean(
            "no, it is big. " * 9, add_special_tokens=False).input_ids  # fmt: skip


@pytest.mark.parametrize("state", [dict(truncation=TRUNCATION), dict(padding=PADDING)])
def test_rows_and_prompts_of_a_stored_state_are_whole(state, folders, tmp_path):
    whole = processor(load_tokenizer(folders / "llama"), "vicuna_v1")
    ours = processor(
        load_tokenizer(stored(folders / "llama", tmp_path / "a", **state)), "vicuna_v1"
    )
    for answer in (True, False):
        assert ours.tokens(TALK, answer=answer) == whole.tokens(TALK, answer=answer)
    again = pickle.loads(pickle.dumps(ours))  # as a process that reads ahead gets it
    assert again.tokens(TALK, answer=True) == whole.tokens(TALK, answer=True)
    assert sum(ours.text(TALK)["loss_mask"]) > 5 and ours.pad_id < 256


@pytest.mark.parametrize("kind", [k for k in real.KINDS if k != "no specials"])
@pytest.mark.parametrize("image", [0, None])
def test_a_row_begins_as_transformers_begins_a_text_and_a_prompt_never_ends_with_an_end(
    kind, image, folders
):
    """LLaVA tokenizes what stands around an image by itself, each with what the tokenizer puts in
    front of a text, and drops that from all but the first."""
    words = load_tokenizer(folders / kind)
    made, row = processor(words, "vicuna_v1"), Example("x", image, TURNS, "f", "t")
    bare = AutoTokenizer.from_pretrained(folders / kind)
    for answer in (False, True):
        text = "".join(part for part, _ in made.template.parts(row, words, answer=answer))
        chunks = [
            bare(chunk, add_special_tokens=False).input_ids for chunk in text.split("<image>")
        ]
        begin = {"llama3": [0]}.get(kind, [1] * (kind not in ("gpt2", "qwen", "llama without")))
        assert bare(text).input_ids[: len(begin) + 1] == [*begin, chunks[0][0]]
        found = made.tokens(row, answer=answer)
        assert found.ids == [*begin, *(i for chunk in chunks for i in chunk)]
        assert found.image_at == (None if image is None else len(begin) + len(chunks[0]))
    prompt = made.tokens(row, answer=False).ids
    assert prompt[-1] != words.eos_token_id and found.ids[-1] == words.eos_token_id


# A template of a vision language model, which writes a beginning itself or leaves it to others.
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("kind", real.KINDS)
@pytest.mark.parametrize("begins", ["", "{{ bos_token or '' }}"])
def test_a_llava_processor_makes_the_same_ids_with_every_kind_of_tokenizer(kind, begins, folders):
    words = real.with_image(load_tokenizer(folders / kind))
    words.chat_template = begins + LLAVA
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48), words, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )  # fmt: skip
    talk = []
    for question, reply in TURNS:
        talk.append({"role": "user", "content": [{"type": "text", "text": question}]})
        talk.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    for picture in (Image.new("RGB", (60, 40), "red"), None):
        if picture:
            talk[0]["content"].insert(0, {"type": "image", "image": picture})
        else:
            talk[0]["content"].pop(0)
        whole = theirs.apply_chat_template(
            talk[:-1], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="np",
        )["input_ids"][0].tolist()  # fmt: skip
        if kind == "llama with both" and whole[-1] == words.eos_token_id:
            whole.pop()  # they ask behind the end of a text; we do not
        row = processor(words, "checkpoint").tokens(
            Example("x", 0 if picture else None, TURNS, "f", "t"), answer=False
        )
        image = [words.convert_tokens_to_ids("<image>")] * (9 if picture else 0)
        at = row.image_at or 0
        assert [*row.ids[:at], *image, *row.ids[at:]] == whole
        assert words.bos_token is None or row.ids.count(words.bos_token_id) <= 1


def test_special_tokens_in_a_question_are_what_transformers_makes_of_them(folders, tmp_path):
    """Special tokens, as everywhere there, unless tokenizer_config.json has them spelled."""
    asked = "is <|im_end|> or </s> or <|endoftext|> it?"
    row = Example("x", None, ((asked, "a cat"),), "f", "t")
    split = stored(folders / "qwen", tmp_path / "split")
    config = json.loads((split / "tokenizer_config.json").read_text())
    (split / "tokenizer_config.json").write_text(
        json.dumps(config | {"split_special_tokens": True})
    )
    for folder in (folders / "qwen", split):
        words = load_tokenizer(folder)
        encode, theirs = Encoder(words), AutoTokenizer.from_pretrained(folder)
        assert encode(asked).ids == theirs(asked, add_special_tokens=False).input_ids
        assert (words.eos_token_id in encode(asked).ids) == (folder != split)
    made = processor(load_tokenizer(folders / "qwen"), "chatml").tokens(row, answer=True)
    assert sum(made.mask) == len(Encoder(load_tokenizer(folders / "qwen"))("a cat").ids) + 1
    with pytest.raises(ValueError, match=r"closes answers with <\|im_end\|>.*split_special_tokens"):
        processor(load_tokenizer(split), "chatml")


def test_a_tokenizer_that_trims_its_offsets_supervises_what_any_other_does(folders):
    """A line break in front of an answer is the question's, where the file says offsets are cut."""
    masks = []
    for kind in ("qwen", "llama3"):
        words = load_tokenizer(folders / kind)
        words.chat_template = (
            "{% for m in messages %}{{ '[' + m.role + ']\n' + m.content + eos_token + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
        )
        made = processor(words, "checkpoint").tokens(TALK, answer=True)
        read = [i for i, kept in zip(made.ids, made.mask, strict=True) if kept]
        masks.append(words.decode(read).replace(words.eos_token, "|"))
    assert masks == ["a red cat|no, it is small|"] * 2


def test_what_a_tokenizer_lacks_is_done_without_or_refused(folders):
    none = load_tokenizer(folders / "no specials")
    for template in ("vicuna_v1", "bare", "question_first"):
        with pytest.raises(ValueError, match="the tokenizer has none: set its eos_token"):
            processor(none, template)
    plain = processor(none, "plain")
    assert plain.stop_ids == () and plain.pad_id == 0 and plain.bos == []
    one = load_tokenizer(folders / "gpt2")  # one token is beginning, end and, here, padding
    one.pad_token = one.eos_token
    with pytest.raises(BadExample, match="example x: its text has no token: ask something"):
        processor(one, "bare").tokens(Example("x", None, (("", ""),), "f", "t"), answer=False)
    made = processor(one, "vicuna_v1", text_length=600)
    row = made.text(TALK)
    assert made.stop_ids == (one.eos_token_id,) and made.pad_id == one.eos_token_id
    said = row["ids"][row["loss_mask"]]
    assert one.decode(said) == " a red cat<|endoftext|> no, it is small<|endoftext|>"
    assert not row["loss_mask"][row["length"] :].any()


def test_a_tokenizer_of_an_earlier_version_still_begins_its_rows(tmp_path):
    """Files of the project's own small tokenizer did not say that it puts <bos> in front."""
    made = train_tokenizer(["a red cat"], 100)
    made.save_pretrained(tmp_path / "new")
    old = stored(tmp_path / "new", tmp_path / "old", post_processor=None)
    assert Encoder(AutoTokenizer.from_pretrained(old)).before == []
    for folder in (tmp_path / "new", old):
        assert Encoder(load_tokenizer(folder)).before == [made.bos_token_id]
    real.with_image(made).save_pretrained(tmp_path / "hf")
    hf = stored(tmp_path / "hf", tmp_path / "old hf", post_processor=None)
    assert Encoder(load_tokenizer(hf)).before == []


def test_a_text_that_is_none_is_a_bad_example_with_its_name(folders):
    words = load_tokenizer(folders / "llama")
    words.chat_template = LLAVA
    for template in ("vicuna_v1", "checkpoint", "bare"):
        made = processor(words, template)
        for turn in (("what \ud800?", "a"), ("what?", "a\udfff")):
            row = Example("row 7", None, (turn,), "f", "t")
            with pytest.raises(BadExample, match="example row 7: its text holds half a character"):
                made.text(row)
    unread = Tokenizer.from_file(str(folders / "words/tokenizer.json"))
    unread = json.loads(unread.to_str())
    unread["model"]["unk_token"] = "<gone>"
    words._tokenizer = Tokenizer.from_str(json.dumps(unread))
    with pytest.raises(ValueError, match="cannot read the text 'dog'"):
        Encoder(words)("dog")


def test_tokens_for_which_there_is_no_embedding_are_refused_with_both_numbers(folders):
    words = load_tokenizer(folders / "llama")
    tokenizers.check_vocabulary(words, 360)
    real.with_image(words)  # the place of the image, never embedded
    words.add_special_tokens({"pad_token": "[PAD]"})
    tokenizers.check_vocabulary(words, 360)
    words.add_tokens(["<box>"])
    with pytest.raises(ValueError, match="ids up to 362 .*'<box>'.* only llm.vocab=360.* to 368"):
        tokenizers.check_vocabulary(words, 360)


def broken(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def test_a_post_processor_that_names_an_unknown_token_is_refused(folders, tmp_path):
    """The library ends the process in its own way where it meets such a token."""
    single = [
        {"SpecialToken": {"id": "<z>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    post = dict(type="TemplateProcessing", pair=[], special_tokens={}, single=single)
    for name, state in (("a", post), ("b", dict(type="Sequence", processors=[post]))):
        folder = stored(folders / "qwen", tmp_path / name, post_processor=state)
        with pytest.raises(ValueError, match="tokenizer.json puts '<z>' around a text"):
            load_tokenizer(folder)


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", b""), ("tokenizer.json", b"{"), ("tokenizer.json", b"\xff\xfe"),
    ("tokenizer.json", []), ("tokenizer.json", {}), ("tokenizer.json", {"model": 3}),
    ("tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": [], "merges": {}}}),
    ("tokenizer.json", {"version": "1.0", "added_tokens": [{"id": -1, "content": 3}]}),
    ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"\xff\xfe"),
    ("tokenizer_config.json", []), ("tokenizer_config.json", 7),
    ("tokenizer_config.json", {"tokenizer_class": 3}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}),
    ("tokenizer_config.json", {"eos_token": 5}),
    ("tokenizer_config.json", {"unk_token": ""}),
    ("tokenizer_config.json", {"chat_template": 5}),
    ("tokenizer_config.json", {"chat_template": [1]}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", "a.C"]}}),
    ("tokenizer_config.json", {"auto_map": 3}),
    ("chat_template.jinja", b"\xff\xfe"), ("chat_template.json", b"["),
    ("chat_template.json", {"chat_template": 3}),
    ("special_tokens_map.json", b"["), ("added_tokens.json", b"["),
    ("tokenizer.json", b"[" * 100_000), ("tokenizer_config.json", b'{"a":' * 100_000),
])  # fmt: skip
def test_a_damaged_file_of_a_tokenizer_is_one_sentence(name, content, folders, tmp_path):
    folder = broken(stored(folders / "llama", tmp_path / "a"), name, content)
    with pytest.raises(ValueError, match=str(folder)) as refused:
        load_tokenizer(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700
    assert Path(folder).is_dir()
