# SPDX-License-Identifier: Apache-2.0
"""The API as clients see it: OpenAI's own client, streams, fields that are used or refused."""

import json

import made_engine
import openai
import pytest
import tiny
from listening import chat, eventually, image, picture, send, serving, text, uri
from made_engine import said

from vlm_jax.server.options import Keys, Limits

M3 = tiny.size(tiny.config(compressor=dict(kind="m3", tokens=4)))
ONE = tiny.size(tiny.get_config())  # a compressor with one V


@pytest.fixture(scope="module")
def service():
    return made_engine.service(M3)


@pytest.fixture(scope="module")
def address(service):
    with serving(service) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


def asked(service):
    """The last request that the engine was given."""
    return service.engine.asks[-1]


def turns(service):
    """Its conversation, as it was tokenized."""
    return service.engine.prompts[asked(service).prompt.ids[0]]


# --- OpenAI's client ------------------------------------------------------------------------------


def test_openais_client_reads_an_answer_with_text_and_image_tokens_apart(client, service):
    answer = client.chat.completions.create(
        model="made",
        messages=[{"role": "user", "content": [text("what is this?"), image()]}],
        max_tokens=20,
        temperature=0,
        extra_body={"visual_tokens": 16},
    )
    words = said(["what is this?"], [next(reversed(service.engine.index))])
    assert answer.choices[0].message.content == " ".join(words)
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].index == 0
    usage = answer.usage
    assert usage.image_tokens == 16 and usage.text_tokens == 4
    assert usage.prompt_tokens == 20 and usage.completion_tokens == len(words)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert asked(service).visual_tokens == 16 and asked(service).max_new_tokens == 20
    extension = answer.vlm_jax
    assert extension["budget"]["visual_tokens"] == 16 and extension["budget"]["by"] == "request"
    assert set(extension["flops"]) == {"encoder", "compressor", "question", "prefill", "decode"}


def test_a_stream_gives_the_same_text_and_ends_with_the_counts_and_done(client, address):
    question = [{"role": "user", "content": "tell me"}]
    whole = client.chat.completions.create(model="made", messages=question)
    chunks = list(
        client.chat.completions.create(
            model="made", messages=question, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert len({c.id for c in chunks}) == 1 and chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage and all(c.usage is None for c in chunks[:-1])
    body = {"messages": question, "stream": True}
    status, headers, raw = send(address, "/v1/chat/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: ") for e in events[:-1])
    assert '"usage"' not in raw.decode()
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "stop" and last["vlm_jax"]["budget"] is None


def test_the_client_lists_the_model_and_the_visual_tokens_it_gives(client):
    (model,) = client.models.list().data
    assert model.id == "made" and model.visual_tokens["supported"] == [1, 4, 16]
    assert client.models.retrieve("made").id == "made"
    with pytest.raises(openai.NotFoundError, match="ask for made"):
        client.models.retrieve("gpt/4")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "a"}])


def test_scores_of_tokens_come_whole_and_in_the_stream(client):
    ask = dict(model="made", messages=[{"role": "user", "content": "a"}], logprobs=True)
    content = client.chat.completions.create(**ask, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in content).split() == said(["a"], [])
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 3 for token in content)
    assert bytes(content[1].bytes).decode() == content[1].token
    streamed = [
        token
        for chunk in client.chat.completions.create(**ask, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert all(t.top_logprobs == [] for t in streamed)


def test_drawing_stopping_and_length_reach_the_engine(client, service):
    ask = dict(model="made", messages=[{"role": "user", "content": "draw"}])
    drawn = dict(temperature=0.7, top_p=0.9, seed=5)
    first = client.chat.completions.create(**ask, **drawn)
    assert (asked(service).temperature, asked(service).top_p, asked(service).seed) == (0.7, 0.9, 5)
    words = said(["draw"], [], 5)
    assert first.choices[0].message.content == " ".join(words)
    cut = client.chat.completions.create(**ask, **drawn, stop=[words[3], "zzz"])
    assert cut.choices[0].message.content == " ".join(words[: words.index(words[3])])
    assert cut.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(**ask, max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
    free = [client.chat.completions.create(**ask, temperature=1).vlm_jax["seed"] for _ in "abc"]
    assert len(set(free)) == 3  # a seed that was not given is drawn, and said


# --- Conversations --------------------------------------------------------------------------------


def test_an_image_stands_first_wherever_the_client_wrote_it(client, service):
    for content in ([text("what?"), image()], [image(), text("what?")]):
        question = [{"role": "user", "content": content}]
        client.chat.completions.create(model="made", messages=question)
        assert turns(service) == ["what?"] and len(asked(service).images) == 1


def test_images_between_texts_and_in_later_turns_stay_where_they_are(client, service):
    def ask(*messages):
        roles = ("user", "assistant")
        named = [{"role": roles[k % 2], "content": m} for k, m in enumerate(messages)]
        client.chat.completions.create(model="made", messages=named)
        return turns(service)

    two = [image(uri(picture(k))) for k in (1, 2)]
    assert ask([text("compare"), *two]) == ["compare"]  # all first: the template places them
    assert ask([text("is"), two[0], text("larger than"), two[1]]) == [
        "is\n<image>\nlarger than\n<image>"
    ]
    assert ask([text("what?"), two[0]], "a cat", [text("and this?"), two[1]]) == [
        "<image>\nwhat?", "a cat", "<image>\nand this?",
    ]  # fmt: skip
    marked = "is <image> larger than <image>?"
    assert ask([*two, text(marked)]) == [marked]  # as in LLaVA's files


def test_a_system_message_is_used(client, service):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    client.chat.completions.create(model="made", messages=messages)
    assert turns(service) == ["<be brief>", "a"]


@pytest.mark.parametrize(
    "messages, said_of_it",
    [
        ([], "messages"),
        ([{"role": "assistant", "content": "a"}], "begin with a question"),
        ([{"role": "user", "content": "a"}] * 2, "join messages"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "end with a"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "first message"),
        ([{"role": "system", "content": [image()]}, {"role": "user", "content": "a"}], "image in"),
        ([{"role": "system", "content": ""}, {"role": "user", "content": "a"}], "empty system"),
        ([{"role": "user", "content": "a", "name": "bob"}], "no names"),
        ([{"role": "tool", "content": "a"}], "role"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "content"),
    ],
)
def test_a_conversation_that_cannot_be_written_is_refused(address, messages, said_of_it):
    status, _, body = chat(address, messages=messages)
    assert status == 400 and said_of_it in body["error"]["message"], body
    assert body["error"]["type"] == "invalid_request_error"


# --- Fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, said_of_it",
    [
        (dict(n=2), "several times with seeds"),
        (dict(tools=[{"type": "function"}]), "tools are not called"),
        (dict(tool_choice="required"), "tools are not called"),
        (dict(response_format={"type": "json_object"}), "not constrained"),
        (dict(frequency_penalty=0.1), "not penalized"),
        (dict(presence_penalty=-1), "not penalized"),
        (dict(repetition_penalty=1.1), "not penalized"),
        (dict(logit_bias={"5": 1}), "preferred"),
        (dict(top_k=40), "temperature and top_p"),
        (dict(min_p=True), "temperature and top_p"),
        (dict(reasoning_effort="high"), "no reasoning"),
        (dict(chat_template="{{ x }}"), "that it was trained with"),
        (dict(stop_token_ids=[2]), "in stop"),
        (dict(echo=True), "join"),
        (dict(max_tokens=3, max_completion_tokens=4), "one of them"),
        (dict(top_logprobs=2), "needs logprobs"),
        (dict(stream_options={"include_usage": True}), "needs stream"),
        (dict(mm_processor_kwargs={"num_crops": 4}), "num_crops"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens="7"), "max_tokens"),
        (dict(max_tokens=1.5), "max_tokens"),
        (dict(temperature=-1), "temperature"),
        (dict(temperature=True), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**32), "seed"),
        (dict(stop=""), "stop"),
        (dict(stop=["a"] * 17), "stop"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs"),
        (dict(deadline_seconds=0), "deadline_seconds"),
        (dict(visual_tokens=0), "visual_tokens"),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_and_not_ignored(
    address, fields, said_of_it
):
    status, _, body = chat(address, **fields)
    assert status == 400 and said_of_it in body["error"]["message"], body
    assert body["error"]["param"].startswith(next(reversed(fields)).split(".")[0])


def test_neutral_values_and_fields_without_an_effect_change_nothing(address):
    plain = chat(address)[2]["choices"]
    neutral = dict(
        n=1, tools=None, tool_choice="auto", response_format={"type": "text"}, logit_bias={},
        frequency_penalty=0.0, presence_penalty=0, top_k=-1, user="me", metadata={"a": "b"},
        store=True, parallel_tool_calls=False, something_new={"x": [1]}, visual_tokens=None,
        stream=False, stop=None, logprobs=False,
    )  # fmt: skip
    status, _, body = chat(address, **neutral)
    assert status == 200 and body["choices"] == plain


def test_a_request_that_does_not_fit_says_the_numbers(address):
    status, _, body = chat(address, max_tokens=10_000)
    assert status == 400 and "10000" in body["error"]["message"]
    assert body["error"]["code"] == "context_length_exceeded"
    assert body["error"]["message"].endswith("lower max_tokens")  # as a request names it


# --- Images by handle -----------------------------------------------------------------------------


def test_a_handle_stands_for_an_image_in_the_next_turn(client, address, service):
    content = [text("what is this?"), image(uri(picture(7)))]
    first = client.chat.completions.create(
        model="made", messages=[{"role": "user", "content": content}]
    )
    (handle,) = first.vlm_jax["images"]
    assert first.usage.reused_image_tokens == 0 and first.vlm_jax["flops"]["encoder"] > 0
    again = client.chat.completions.create(
        model="made",
        messages=[{"role": "user", "content": [text("what is this?"), image(handle)]}],
    )
    assert again.choices == first.choices
    assert again.usage.reused_image_tokens == again.usage.image_tokens == 4
    assert again.vlm_jax["flops"]["encoder"] == 0
    status, _, body = chat(address, [text("what?"), image("vlm-jax:0123456789abcdef")])
    assert status == 400 and body["error"]["code"] == "image_not_found"


# --- Who may ask, and how much --------------------------------------------------------------------


def test_only_holders_of_a_key_are_answered(tmp_path):
    file = tmp_path / "keys"
    # As an editor of Windows writes it.
    file.write_bytes(
        "\ufeffsecret-key-number-one\r\n\r\n# of the tests\r\nclé-numéro-voilà-à\r\n".encode()
    )
    with serving(made_engine.service(M3), keys=Keys.of_file(file)) as address:
        for path in ("/v1/chat/completions", "/v1/models", "/metrics", "/openapi.json", "/nothing"):
            body = {} if "chat" in path else None
            status, headers, answer = send(address, path, body)
            assert status == 401 and headers["www-authenticate"] == "Bearer", path
            assert json.loads(answer)["error"]["code"] == "invalid_api_key"
        for path in ("/", "/health"):
            assert send(address, path)[0] == 200
        for key, status in (
            ("secret-key-number-one", 200),
            ("clé-numéro-voilà-à", 200),
            ("secret-key-number", 401),
        ):
            held = [("Authorization", b"Bearer " + key.encode())]
            assert send(address, "/v1/models", headers=held)[0] == status
    file.write_text("short\n")
    with pytest.raises(ValueError, match="at least 16"):
        Keys.of_file(file)


def test_what_is_too_large_or_of_another_form_is_refused_before_it_is_parsed():
    limits = Limits(body_bytes=10_000, images=2, pixels=100, requests=8)
    with serving(made_engine.service(M3, limits=limits)) as address:
        status, _, body = chat(address, "a" * 10_000)
        assert status == 413 and "0.0 MB" in body["error"]["message"]
        status, _, body = chat(address, [text("a"), *[image()] * 3])
        assert status == 400 and body["error"]["code"] == "too_many_images"
        status, _, body = chat(address, [text("a"), image(uri(picture(side=11)))])
        assert status == 400 and "11 x 11 pixels" in body["error"]["message"]
        assert body["error"]["param"] == "messages[0].content[1].image_url.url"
        kind = [("Content-Type", "text/plain")]
        assert send(address, "/v1/chat/completions", b"{}", headers=kind)[0] == 415
        assert send(address, "/v1/chat/completions", b"{")[0] == 400
        assert send(address, "/v1/chat/completions", b"[" * 5000)[0] == 400
        assert send(address, "/v1/chat/completions")[0] == 405
        assert send(address, "/nothing")[0] == 404


def test_health_and_metrics_say_what_was_done():
    service = made_engine.service(M3)
    with serving(service) as address:
        assert chat(address, [text("a"), image()])[0] == 200
        assert chat(address, n=3)[0] == 400
        status, _, body = send(address, "/health")
        assert status == 200
        assert json.loads(body) == dict(status="ok", active=0, waiting=0, slots=4)
        lines = send(address, "/metrics")[2].decode().splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        eventually(lambda: b'requests_total{status="400"} 1.0' in send(address, "/metrics")[2])
        assert found['vlm_jax_requests_total{status="200"}'] == "1.0"
        assert found['vlm_jax_tokens_total{kind="image"}'] == "4.0"
        assert found["vlm_jax_slots"] == "4.0" and found["vlm_jax_index_images"] == "1.0"


# --- What other programs send ---------------------------------------------------------------------


def test_requests_of_lmms_eval_are_answered(address, service):
    """As lmms-eval 0.7's model `openai` builds them: the text first, PNG in base64, max_tokens."""
    payload = {
        "model": "made",
        "messages": [{"role": "user", "content": [text("Is there a cat?\nAnswer yes or no."),
                                                  image(uri(picture(3)))]}],
        "max_tokens": 16,
        "temperature": 0,
    }  # fmt: skip
    status, _, body = send(address, "/v1/chat/completions", payload)
    answer = json.loads(body)
    assert status == 200 and turns(service) == ["Is there a cat?\nAnswer yes or no."]
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > 0 and asked(service).max_new_tokens == 16


def test_requests_of_vlmevalkit_are_answered(address, service):
    """As its OpenAIWrapper builds them: parts in their order, JPEG, detail=low, n=1."""
    content = [image(uri(picture(4, form="JPEG"), "image/jpeg"), detail="low"), text("A or B?")]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    status, _, body = chat(address, model="made", messages=messages, n=1, temperature=0,
                           max_tokens=128)  # fmt: skip
    assert status == 200 and asked(service).visual_tokens == 1
    assert body["vlm_jax"]["budget"]["why"] == "detail=low of the image"
    assert turns(service) == ["<be brief>", "A or B?"]


def test_a_model_whose_template_drops_questions_is_not_served():
    with pytest.raises(ValueError, match="second stage"):
        made_engine.service(M3, template="plain")


def test_a_model_of_one_v_answers_and_says_that_it_has_no_other():
    service = made_engine.service(ONE)
    with serving(service) as address:
        status, _, body = chat(address, [text("a"), image(detail="low")])
        budget = body["vlm_jax"]["budget"]
        assert status == 200 and budget["by"] == "model" and "detail=low changes" in budget["why"]
        assert asked(service).visual_tokens is None
        status, _, body = chat(address, [text("a"), image()], visual_tokens=9)
        assert status == 400 and "that give several are" in body["error"]["message"]
