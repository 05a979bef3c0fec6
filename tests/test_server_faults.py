# SPDX-License-Identifier: Apache-2.0
"""What clients do wrong: mutated requests, killed and slow clients, crowds; the server goes on."""

import copy
import hashlib
import json
import logging
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import made_engine
import pytest
import tiny
from listening import chat, eventually, image, picture, send, serving, text, uri
from made_engine import said
from pydantic import ValidationError

from vlm_jax.server.options import Keys, Limits
from vlm_jax.server.schema import ChatRequest

M3 = tiny.size(tiny.config(compressor=dict(kind="m3", tokens=4)))


def plain(address, body, *, path="/v1/chat/completions", length=None, host="a"):
    """A socket on which a request was sent, byte by byte as it stands."""
    place = address.removeprefix("http://").split(":")
    client = socket.create_connection((place[0], int(place[1])), timeout=20)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client


def question(words="what is this?", **fields):
    return json.dumps({"messages": [{"role": "user", "content": words}], **fields}).encode()


# --- Crowds ---------------------------------------------------------------------------------------


def test_every_client_of_a_crowd_gets_its_own_answer_or_is_told_when_to_come_again():
    service = made_engine.service(M3, slots=4, queue=8, seconds=0.002)
    with serving(service) as address, ThreadPoolExecutor(40) as pool:
        numbers = range(80)
        found = list(pool.map(lambda k: chat(address, f"question {k}"), numbers))
        assert {status for status, _, _ in found} == {200, 429}
        for k, (status, headers, body) in zip(numbers, found, strict=True):
            if status == 200:
                wanted = " ".join(said([f"question {k}"], []))
                assert body["choices"][0]["message"]["content"] == wanted
            else:
                assert 1 <= int(headers["retry-after"]) <= 60
                assert body["error"]["code"] == "queue_full"
        assert chat(address)[0] == 200
        now = service.engine.stats()
        assert now.queued == now.running == 0


def test_a_full_queue_of_the_engine_is_429_too():
    service = made_engine.service(M3, slots=1, queue=1, seconds=0.05, limits=Limits(requests=100))
    with serving(service) as address, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: chat(address, f"{k}"), range(8)))
        assert sorted({status for status, _, _ in found}) == [200, 429]


def test_whoever_is_refused_takes_nobodys_place():
    """A request without a key, or of another form, holds no place while its body comes slowly."""
    key = "a-key-of-the-tests"
    keys = Keys((hashlib.sha256(key.encode()).digest(),))
    service = made_engine.service(M3, limits=Limits(requests=2))
    held = [("Authorization", f"Bearer {key}")]
    with serving(service, keys=keys) as address:
        strangers = [plain(address, question()[:10], length=1000) for _ in range(4)]
        body = {"messages": [{"role": "user", "content": "what?"}]}
        for _ in range(3):
            assert send(address, "/v1/chat/completions", body, headers=held)[0] == 200
        for client in strangers:
            client.close()


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized():
    service = made_engine.service(M3)
    with serving(service) as address:
        status, _, body = chat(address, "a " * 10_000)
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"
        assert "20,000 characters" in body["error"]["message"] and not service.engine.prompts


def test_an_engine_that_has_failed_is_unhealthy_before_anybody_asks_it():
    service = made_engine.service(M3)
    with serving(service) as address:
        service.engine.closed = True
        status, _, body = send(address, "/health")
        assert status == 503 and json.loads(body)["status"] == "failed"
        status, headers, body = chat(address)
        assert status == 503 and body["error"]["code"] == "engine_failed"
        assert "retry-after" not in headers


# --- Time -----------------------------------------------------------------------------------------


def test_a_deadline_ends_an_answer_where_it_is_and_says_so():
    service = made_engine.service(M3, seconds=0.1)
    with serving(service) as address:
        status, _, body = chat(address, deadline_seconds=0.35)
        assert status == 200 and body["vlm_jax"]["finish_reason"] == "deadline"
        assert body["choices"][0]["finish_reason"] == "length"
        assert 1 <= body["usage"]["completion_tokens"] < 8
        status, _, body = chat(address, deadline_seconds=0.01)
        assert status == 408 and body["error"]["code"] == "deadline_exceeded"
        status, _, body = chat(address, deadline_seconds=0.01, stream=True, n=1)
        assert status == 408  # of a stream, too: nothing was sent yet


def test_a_request_that_does_not_arrive_is_given_up():
    limits = Limits(body_seconds=0.3, requests=2)
    with serving(made_engine.service(M3, limits=limits)) as address:
        body = question()
        slow = [plain(address, body[:10], length=len(body)) for _ in range(2)]
        for client in slow:
            assert b" 408 " in client.recv(4096).split(b"\r\n")[0]
            client.close()
        assert chat(address)[0] == 200


def test_a_body_without_an_end_costs_a_bounded_memory():
    limits = Limits(body_bytes=100_000, requests=4)
    service = made_engine.service(M3, limits=limits)
    with serving(service) as address:
        client = plain(address, b"", length=10**12)
        with pytest.raises(OSError):
            for _ in range(10_000):
                client.sendall(b"0" * 65536)
        client.close()
        place = address.removeprefix("http://").split(":")
        chunked = socket.create_connection((place[0], int(place[1])), timeout=20)
        chunked.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        with pytest.raises(OSError):
            for _ in range(10_000):
                chunked.sendall(b"1000\r\n" + b"0" * 4096 + b"\r\n")
        chunked.close()
        assert chat(address)[0] == 200


# --- Clients that go away, or do not read ---------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_of_a_killed_client_is_cancelled(stream, caplog):
    service = made_engine.service(M3, slots=1, queue=4, seconds=0.2)
    with serving(service) as address:
        clients = [plain(address, question(stream=stream)) for _ in range(3)]
        eventually(lambda: service.engine.stats().running == 1)
        if stream:
            clients[0].recv(100)  # the answer has begun
        began = time.monotonic()
        for client in clients:
            client.close()
        eventually(lambda: not service.engine.stats().running + service.engine.stats().queued)
        assert time.monotonic() - began < 3 * 8 * 0.2 / 2  # not three whole answers
        assert chat(address)[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_client_that_reads_slowly_gets_everything_and_delays_nobody():
    service = made_engine.service(M3, slots=2, seconds=0.01)
    with serving(service) as address:
        slow = plain(address, question(stream=True))
        began = time.monotonic()
        assert chat(address)[0] == 200 and time.monotonic() - began < 5
        found = b""
        while not found.endswith(b"[DONE]\n\n") and (piece := slow.recv(16)):
            found += piece
            if b"0\r\n\r\n" in found[-8:]:
                break
            time.sleep(0.001)
        assert b"[DONE]" in found
        slow.close()


def test_answers_that_are_cut_when_the_server_stops_say_so():
    service = made_engine.service(M3, slots=2, seconds=0.2)
    with serving(service) as address:
        stream, whole = plain(address, question(stream=True)), plain(address, question())
        assert b"200 OK" in stream.recv(4096)
        service.draining = True
        assert not service.engine.drain(0.05)
        found = b""
        while piece := stream.recv(4096):
            found += piece
            if b"[DONE]" in found:
                break
        *_, error, done = [line for line in found.split(b"\n") if line.startswith(b"data: ")]
        assert json.loads(error[6:])["error"]["code"] == "server_stopping"
        assert done == b"data: [DONE]"
        assert b" 503 " in whole.recv(4096).split(b"\r\n")[0]
        status, headers, body = chat(address)
        assert status == 503 and headers["retry-after"]
        status, _, body = send(address, "/health")
        assert status == 503 and json.loads(body)["status"] == "draining"


def test_a_failure_of_the_engine_is_told_and_not_the_prompt(caplog):
    service = made_engine.service(M3, failing=True)
    with caplog.at_level(logging.DEBUG), serving(service) as address:
        status, _, body = chat(address, "a secret question")
        assert status == 500 and "out of memory" in body["error"]["message"]
        status, _, body = chat(address, "a secret question", stream=True, n=1)
        assert status == 500
    assert "secret" not in caplog.text and "out of memory" in caplog.text


def test_nothing_of_a_prompt_is_in_the_log(caplog):
    service = made_engine.service(M3)
    secret = "xyzzy"
    with caplog.at_level(logging.DEBUG), serving(service) as address:
        assert chat(address, [text(secret), image()])[0] == 200
        body = {"messages": [{"role": "user", "content": secret}], "stream": True}
        assert secret not in send(address, "/v1/chat/completions", body)[2].decode()
        assert chat(address, secret, n=4)[0] == 400
        assert chat(address, secret, temperature=secret)[0] == 400
        answer = " ".join(said([secret], []))
    assert secret not in caplog.text and answer not in caplog.text
    assert "tokens text=" in caplog.text


# --- Malformed requests ---------------------------------------------------------------------------


def valid(system):
    """A request with everything in it; a system message only for a template that has a place."""
    content = [text("what is this?"), image(uri(picture()), detail="auto")]
    return {
        "model": "made",
        "messages": [
            *([{"role": "system", "content": "be brief"}] if system else []),
            {"role": "user", "content": content},
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "sure?"},
        ],
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"],
        "logprobs": True, "top_logprobs": 2, "visual_tokens": 4,
        "mm_processor_kwargs": {"max_soft_tokens": 16},
        "stream": True, "stream_options": {"include_usage": True}, "deadline_seconds": 10, "n": 1,
    }  # fmt: skip


ODD = (
    None, True, False, 0, -1, 1, 2, 1e308, -0.0, 10**30, 2**63, "", "a", "\ud800", "\x00",
    "<image>", [], [[]], {}, {"type": "text"}, {"": {}}, [None], "auto", float("nan"), float("inf"),
    "🎈" * 50,
    "data:image/png;base64,AAAA", [{"type": "text", "text": "\udfff"}], {"url": "data:"},
)  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()  # fmt: skip
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(rng, system):
    """A valid request with up to three places changed, removed or doubled."""
    body = json.loads(json.dumps(valid(system)))
    for _ in range(rng.randint(1, 3)):
        spots = [path for path in places(body) if path]
        if not spots:
            break
        *way, last = rng.choice(spots)
        inner = body
        for key in way:
            inner = inner[key]
        action = rng.choice(("change", "change", "remove", "double", "add"))
        odd = copy.deepcopy(rng.choice(ODD))
        if action == "change":
            inner[last] = odd
        elif action == "remove":
            del inner[last]
        elif isinstance(inner, list):
            inner.insert(rng.randint(0, len(inner)), rng.choice([copy.deepcopy(inner[last]), odd]))
        else:
            inner[rng.choice(("n", "tools", "name", "detail", "x", "role", "content"))] = odd
    return json.dumps(body).encode()


def broken(rng, system):
    """The bytes of a request with some of them changed, cut off or doubled."""
    body = bytearray(json.dumps(valid(system)).encode())
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(body) or 1)
        action = rng.choice(("flip", "cut", "insert"))
        if action == "flip" and body:
            body[at] = rng.randrange(256)
        elif action == "cut":
            del body[at : at + rng.randint(1, 200)]
        else:
            body[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
    return bytes(body)


def storm(address, count, *, seed=0, system=True):
    """Sends malformed requests; the statuses they got."""
    rng = random.Random(seed)
    bodies = [(mutated, broken)[k % 2](rng, system) for k in range(count)]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda body: send(address, "/v1/chat/completions", body)[0], bodies))


def test_json_that_no_parser_reads_is_refused_with_the_reason():
    with serving(made_engine.service(M3)) as address:
        for body in (b'{"messages":' + b"[" * 100_000, b'{"n": ' + b"9" * 5_000 + b"}"):
            status, _, answer = send(address, "/v1/chat/completions", body)
            error = json.loads(answer)["error"]
            assert status == 400 and error["code"] == "invalid_json", error
            assert "nested too deeply, or has a huge number" in error["message"]
        for lists in ([{}] * 300_000, [[1, 2]] * 300_000):
            status, _, answer = send(address, "/v1/chat/completions", {"x": lists})
            assert status == 413 and b"00,00" in answer and b"values in the JSON" in answer
        for path in ("/v1/chat/completions/", "/health/"):
            assert send(address, path)[0] == 404  # and no redirection to what Host says


@pytest.mark.parametrize("field", ["messages", "content", "stop"])
def test_a_list_fails_at_its_first_fault(field):
    """The errors of a long one would take minutes, in which nobody is answered."""
    wrong = [1] * 100_000
    message = {"role": "user", "content": wrong if field == "content" else "a"}
    body = {"messages": [message], "stop": "a"} | ({} if field == "content" else {field: wrong})
    with pytest.raises(ValidationError) as found:
        ChatRequest.model_validate(body)
    assert found.value.error_count() < 4


def test_malformed_requests_are_refused_and_never_break_the_server(caplog):
    service = made_engine.service(M3, slots=16, queue=64)
    with serving(service) as address:
        statuses = storm(address, 400)
        assert max(statuses) < 500 and {200, 400} <= set(statuses), sorted(set(statuses))
        status, _, body = chat(address)
        assert status == 200
        assert body["choices"][0]["message"]["content"] == " ".join(said(["what is this?"], []))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.slow
def test_ten_thousand_malformed_requests_leave_no_memory_behind():
    service = made_engine.service(M3, slots=16, queue=64)
    with serving(service) as address:
        storm(address, 2_000)
        before = resident()
        statuses = [s for k in range(8) for s in storm(address, 1_000, seed=1 + k)]
        assert max(statuses) < 500
        assert resident() - before < 50e6
        assert chat(address)[0] == 200
        assert threading.active_count() < 100


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
