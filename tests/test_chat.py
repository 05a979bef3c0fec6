# SPDX-License-Identifier: Apache-2.0
"""Chat templates of the kinds that checkpoints bring along: the text is the template's own, and the
answers are found in it."""

import logging

import pytest
import real_tokenizers as real
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.data.chat import Chat, Turn
from vlm_jax.data.example import Example
from vlm_jax.data.processor import Processor, RowFormat

THOUGHT = "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
OPEN = "{% if add_generation_prompt %}"

TEMPLATES = {
    # A default system text, and turns that all look alike.
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Thoughts of earlier answers go; the last answer is written with its thoughts, were there none.
    "thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}" + THOUGHT +
        "{% if loop.last %}{{ '<think>\n' }}{% if '</think>' in m.content %}"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
        "{{ '\n</think>\n\n' }}{% endif %}{{ said }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # What invites an answer is not how any answer is written.
    "without thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}" + OPEN + "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    # One beginning, headers, trimmed texts, and the date.
    "headers": (
        "{{ bos_token }}{{ '<|im_start|>system<|im_end|>\n\nToday is '"
        " + strftime_now('%d %b %Y') + '.<|im_end|>' }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        + OPEN + "{{ '<|im_start|>assistant\n\n' }}{% endif %}"
    ),
    # No system text, roles in turn or nothing; no text of its own invites an answer.
    "inst": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "vicuna": (
        "{{ 'A chat. ' }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system text') }}{% elif m.role == 'user' %}"
        "{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        + OPEN + "{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # Another name for who answers.
    "turns": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
        + OPEN + "{{ '<|im_start|>model\n' }}{% endif %}"
    ),
    # Every answer loses its thoughts, and the next one begins with some.
    "reasoning": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|im_start|>' + m.content }}{% else %}" + THOUGHT +
        "{{ '<|im_end|>' + said + eos_token }}{% endif %}{% endfor %}"
        + OPEN + "{{ '<|im_end|><think>\n' }}{% endif %}"
    ),
    # Contents as lists, the image where the template puts it; no token ends an answer.
    "lists": (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}"
        "{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}{% endfor %}"
        + OPEN + "{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # Questions as lists, answers as texts.
    "lists and texts": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
        "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "{{ '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # What ends a conversation begins as the next turn does.
    "ends apart": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}" + OPEN + "{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}"
        "{% endif %}"
    ),
    # It says itself what an assistant has written.
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The same, and what closes an answer is left out.
    "marked without its end": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}  # fmt: skip
LISTS = {"lists": True, "lists and texts": False}  # whether answers are lists too
# What is to be written behind a prompt: for "a red cat", then "no", where it is more than those.
END, EOS = "<|im_end|>", "<|endoftext|>"
SAID = {
    "thinking": ("a red cat" + END, "<think>\n\n</think>\n\nno" + END),
    "inst": (" a red cat" + EOS, " no" + EOS),
    "vicuna": (" a red cat" + EOS, " no" + EOS),
    "reasoning": ("a red cat" + EOS, "no" + EOS),
    "lists": (" a red cat", " no"),
    "ends apart": ("a red cat" + END, "no" + END + "\n" + EOS),
    "lists and texts": ("a red cat" + EOS, "no" + EOS),
}
TURNS = (("what is it?", "a red cat"), ("is it big?", "no"))


@pytest.fixture(scope="module")
def made():
    """A processor for each template, of a tokenizer with the special tokens that they write."""

    def build(name):
        words = real.qwen(bos_token="<|endoftext|>")
        words.eos_token = EOS
        words.chat_template = TEMPLATES[name]
        return Processor(real.with_image(words), RowFormat.of(tiny.config(
            data=dict(template="checkpoint", text_length=400, question_length=40))))  # fmt: skip

    return {name: build(name) for name in TEMPLATES}


def talk(name, turns, image, *, whole):
    """The messages that a user of transformers would write."""
    messages = []
    for k, (question, answer) in enumerate(turns):
        shown = image and k == 0
        if name in LISTS:
            parts = [{"type": "image"}] * shown
            messages.append(
                {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
            )
            said = [{"type": "text", "text": answer}] if LISTS[name] else answer
            messages.append({"role": "assistant", "content": said})
        else:
            messages.append({"role": "user", "content": "<image>\n" * shown + question})
            messages.append({"role": "assistant", "content": answer})
    return messages if whole else messages[:-1]


def spliced(row, words):
    """The ids of a row with the token of the image at its place."""
    image = [words.convert_tokens_to_ids("<image>")] * len(row.places)
    at = row.image_at or 0
    return [*row.ids[:at], *image, *row.ids[at:]]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_prompts_and_rows_are_one_rendering_of_the_template_alone(name, image, count, made):
    processor, words = made[name], made[name].tokenizer
    example = Example("x", 0 if image else None, TURNS[:count], "f", "t")
    for answer in (False, True):
        row = processor.tokens(example, answer=answer)
        expected = words.apply_chat_template(
            talk(name, TURNS[:count], image, whole=answer), add_generation_prompt=not answer,
            return_dict=False,
        )  # fmt: skip
        assert spliced(row, words) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("image", [0, None])
def test_what_is_supervised_is_each_answer_and_what_closes_it(name, image, made):
    processor, words = made[name], made[name].tokenizer
    row = processor.tokens(Example("x", image, TURNS, "f", "t"), answer=True)
    said = SAID.get(name, ("a red cat" + END, "no" + END))
    runs, last = [], False
    for token, kept in zip(row.ids, row.mask, strict=True):
        if kept:
            runs = [*runs, []] if not last else runs
            runs[-1].append(token)
        last = kept
    assert [words.decode(run) for run in runs] == list(said)


@pytest.mark.parametrize(
    "name", ["chatml", "thinking", "headers", "inst", "vicuna", "turns", "lists"]
)
def test_generation_is_asked_for_what_training_supervises(name, made):
    """A prompt and what is supervised behind it are the training row, of every turn alone."""
    processor = made[name]
    for turns in (TURNS[:1], TURNS):
        example = Example("x", 0, turns, "f", "t")
        prompt = processor.tokens(example, answer=False)
        row = processor.tokens(example, answer=True)
        asked = len(prompt.ids)
        assert row.ids[:asked] == prompt.ids
        said = row.mask[asked:]
        assert said[0] and sum(said) == len(said) or not any(said[said.index(False) :])


def test_marks_of_a_template_are_the_mask_of_transformers(made):
    words = made["marked"].tokenizer
    theirs = words.apply_chat_template(
        talk("marked", TURNS, False, whole=True),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    row = made["marked"].tokens(Example("x", None, TURNS, "f", "t"), answer=True)
    assert row.ids == theirs["input_ids"]
    assert row.mask == [bool(kept) for kept in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_thoughts_that_a_template_strips_are_not_supervised_and_those_it_keeps_are(name, made):
    thought = "<think>\nhm\n</think>\n\n"
    turns = ((TURNS[0][0], thought + "a red cat"), (TURNS[1][0], thought + "no"))
    processor, words = made[name], made[name].tokenizer
    row = processor.tokens(Example("x", 0, turns, "f", "t"), answer=True)
    assert spliced(row, words) == words.apply_chat_template(
        talk(name, turns, True, whole=True), return_dict=False
    )
    said = words.decode([i for i, kept in zip(row.ids, row.mask, strict=True) if kept])
    assert said == {
        "thinking": f"a red cat{END}{thought}no{END}", "reasoning": f"a red cat{EOS}no{EOS}"
    }[name]  # fmt: skip


# Texts that could be mistaken: parts of templates, of each other, of what closes them, spaces.
ODD = st.sampled_from(
    ["no", "n", "user", "assistant\n", "USER: no", " a cat ", "\n\nno", "ASSISTANT:", "zq1qz",
     "<think>", "</think>", "a</think>\n\nb", "[INST]", "Today is", "<|im_end|>", "'type'", "é 日"]
)  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=st.lists(st.tuples(ODD, ODD), min_size=1, max_size=3).map(tuple), image=st.booleans())
@settings(max_examples=25)
def test_answers_are_found_whatever_they_say_or_the_row_is_refused(name, turns, image, made):
    """The text is the template's; what is supervised are answers, or what the template left of
    them, in their order."""
    chat = made[name].template.chat
    asked = [Turn(int(image and k == 0), (question,), answer) for k, (question, answer) in
             enumerate(turns)]  # fmt: skip
    try:
        text, spans = chat.row(asked)
    except ValueError as error:
        assert "answers cannot be told from the rest" in str(error)
        return
    assert text == made[name].tokenizer.apply_chat_template(
        talk(name, turns, image, whole=True), tokenize=False
    )
    assert len(spans) == len(turns)
    at = 0
    for (start, end), (_, answer) in zip(spans, turns, strict=True):
        assert at <= start <= end <= len(text)
        at = end
        left = answer.split("</think>")[-1] if name in ("thinking", "reasoning") else answer
        assert left.strip() in text[start:end]


def test_a_template_that_answers_cannot_be_told_in_is_refused_with_the_way_out():
    def chat(template):
        words = real.qwen()
        words.chat_template = template
        return Chat(words)

    turns = [Turn(0, (question,), answer) for question, answer in TURNS]
    for template, words in {
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}": "question 1 once",
        "{{ messages[1].content }}{% for m in messages %}{{ m.content }}{% endfor %}": "answer 1",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "answer 1 once",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}": "question 1|answer 1",
        "{% for m in messages %}{{ m.content|upper }}{% endfor %}": "question 1 once",
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}":
            "marks no text as an answer",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{words}.*choose another data.template"):
            chat(template).row(turns)
    for template, words in {
        "{% for m in messages %}": "line 1.*choose another data.template",
        "{{ raise_exception('system text first') }}": "system text first",
        "{{ messages[0].nothing.at_all }}": "no attribute",
        "{{ 1 // 0 }}": "does not write a conversation",
    }.items():
        with pytest.raises(ValueError, match=words) as refused:
            chat(template)
        assert "\n" not in str(refused.value)
    several = real.qwen()
    several.chat_template = {"tool_use": "{{ messages }}", "rag": "{{ messages }}"}
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        Chat(several)


def test_a_template_that_trains_what_generation_does_not_ask_for_says_so(caplog):
    def told(name):
        caplog.clear()
        words = real.qwen(bos_token="<|endoftext|>")
        words.chat_template = TEMPLATES[name]
        chat = Chat(words)
        turns = [Turn(0, (question,), answer) for question, answer in TURNS]
        for _ in range(3):
            chat.row(turns)
        return [record.message for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        assert not told("chatml") and not told("thinking") and not told("inst")
        (said,) = told("without thinking")
        assert "<think>" in said and "trained on the first generates from the second" in said
        (said,) = told("lists")
        assert "does not learn to stop" in said


def test_stop_tokens_are_the_end_of_a_text_and_what_closes_an_answer(made):
    for name, expected in {
        "chatml": [END, EOS], "vicuna": [EOS], "lists": [EOS], "inst": [EOS], "reasoning": [EOS],
    }.items():  # fmt: skip
        words = made[name].tokenizer
        assert [words.decode(i) for i in made[name].stop_ids] == expected
