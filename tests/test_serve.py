# SPDX-License-Identifier: Apache-2.0
"""`vlm-jax serve` with a real model: answers are those of `generate`, and SIGTERM loses none."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
from listening import chat, image, picture, send, serving, text, uri
from test_generate import made
from test_server_faults import storm

import vlm_jax
from vlm_jax.__main__ import main
from vlm_jax.server.auto import Auto
from vlm_jax.server.budget import Chooser
from vlm_jax.server.choices import Choices
from vlm_jax.server.images import decoded
from vlm_jax.server.options import Limits
from vlm_jax.server.service import Service
from vlm_jax.serving.engine import Engine
from vlm_jax.weights import folder

NEW = 6


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    """A model folder that gives any V."""
    path = tmp_path_factory.mktemp("serve") / "model"
    return made(path, trained, compressor=dict(kind="m3", tokens=4))


@pytest.fixture(scope="module")
def model(checkpoint, mesh1):
    return vlm_jax.VLM.from_checkpoint(checkpoint, mesh=mesh1)


@pytest.fixture(scope="module")
def offline(checkpoint, mesh1):
    """The same model, for `generate`: an engine's is used by no one else."""
    return vlm_jax.VLM.from_checkpoint(checkpoint, mesh=mesh1)


@pytest.fixture(scope="module")
def address(model, checkpoint):
    size = folder.read(checkpoint).size()
    service = Service(
        Engine(model, slots=2, queue=30, index_bytes=10**7),
        Chooser(Choices.of(size), Auto(size)),
        "made",
        model.processor.template,
        Limits(requests=32),
    )
    with serving(service) as found:
        yield found
    service.engine.drain(10.0)


def pixels(content):
    return decoded(content, Limits())


def test_answers_are_those_of_generate_alone_and_in_company(address, offline):
    pictures = [picture(k, side=20 + 8 * k) for k in range(3)]
    cases = [
        (dict(content=[text("what is this?"), image(uri(pictures[0]))]),
         [pixels(pictures[0])], "what is this?", None),
        (dict(content=[image(uri(pictures[1])), text("read it.")], visual_tokens=16),
         [pixels(pictures[1])], "read it.", 16),
        (dict(content=[text("is"), image(uri(pictures[1])), text("like"), image(uri(pictures[2]))]),
         [pixels(pictures[1]), pixels(pictures[2])], "is\n<image>\nlike\n<image>", None),
        (dict(content="who is there?"), None, "who is there?", None),
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        asked = [dict(fields, max_tokens=NEW) for fields, *_ in cases * 2]
        found = list(pool.map(lambda fields: chat(address, **fields), asked))
    for k, (_, images, prompt, V) in enumerate(cases):
        wanted = offline.generate([images], [prompt], max_new_tokens=NEW, visual_tokens=V)[0]
        for status, _, body in (found[k], found[k + len(cases)]):
            assert status == 200, body
            (choice,), usage = body["choices"], body["usage"]
            assert choice["message"]["content"] == wanted.text
            assert choice["finish_reason"] == ("stop" if wanted.stopped else "length")
            assert usage["text_tokens"] == wanted.prompt_tokens
            assert usage["image_tokens"] == wanted.visual_tokens
            assert usage["completion_tokens"] == len(wanted.ids)


def test_a_draw_is_that_of_its_seed(address, offline):
    drawn = dict(temperature=1.0, top_p=0.9, seed=3)
    wanted = offline.generate(None, "draw", max_new_tokens=NEW, **drawn)[0]
    assert chat(address, "draw", max_tokens=NEW, **drawn)[2]["choices"][0]["message"][
        "content"] == wanted.text  # fmt: skip


def test_streams_stops_scores_and_handles_are_those_of_the_whole_answer(address):
    ask = dict(content=[text("what is this?"), image(uri(picture(1, side=28)))], max_tokens=NEW)
    whole = chat(address, **ask, logprobs=True, top_logprobs=2)[2]
    said, scores = whole["choices"][0]["message"]["content"], whole["choices"][0]["logprobs"]
    assert len(scores["content"]) == whole["usage"]["completion_tokens"] > 2
    assert all(one["logprob"] <= one["top_logprobs"][0]["logprob"] for one in scores["content"])
    messages = [{"role": "user", "content": ask["content"]}]
    body = dict(messages=messages, max_tokens=NEW, stream=True, logprobs=True)
    events = send(address, "/v1/chat/completions", body)[2].decode().split("\n\n")[:-2]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(one["delta"].get("content", "") for one in choices) == said
    streamed = [token for one in choices if one["logprobs"] for token in one["logprobs"]["content"]]
    assert [t["token"] for t in streamed] == [t["token"] for t in scores["content"]]
    assert chunks[-1]["vlm_jax"]["finish_reason"] == whole["vlm_jax"]["finish_reason"]
    middle = said[len(said) // 2]
    cut = chat(address, **ask, stop=middle)[2]["choices"][0]
    assert cut["message"]["content"] == said[: said.index(middle)]
    assert cut["finish_reason"] == "stop"
    (handle,) = whole["vlm_jax"]["images"]
    again = chat(address, [text("what is this?"), image(handle)], max_tokens=NEW)[2]
    assert again["choices"][0]["message"]["content"] == said
    assert again["usage"]["reused_image_tokens"] == again["usage"]["image_tokens"] == 4
    assert again["vlm_jax"]["flops"]["encoder"] == 0


def test_what_the_model_cannot_read_is_refused_with_its_own_words(address):
    for content, fields, said in (
        ("word " * 500, {}, "this model was made for 128"),
        ([text("<image> and <image>"), image()], {}, "2 times <image> in the prompt"),
        ("half \ud800", {}, "half a character"),
        ([text("a"), image()], dict(messages=[{"role": "system", "content": "be brief"},
                                              {"role": "user", "content": "a"}]), "no place for"),
    ):  # fmt: skip
        status, _, body = chat(address, content, **fields)
        assert status == 400 and said in body["error"]["message"], body
        assert body["error"]["param"] == "messages"
    assert chat(address, "still there?", max_tokens=NEW)[0] == 200


def test_malformed_requests_do_not_reach_what_they_could_break(address, caplog):
    wanted = chat(address, "hello", max_tokens=NEW)[2]["choices"]
    statuses = storm(address, 150, seed=7, system=False)
    assert max(statuses) < 500 and {200, 400} <= set(statuses), sorted(set(statuses))
    assert chat(address, "hello", max_tokens=NEW)[2]["choices"] == wanted
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# --- The command ----------------------------------------------------------------------------------


def started(checkpoint, *flags):
    """A server in a process of its own, its address, and what it said before that."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(tiny.ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    command = [sys.executable, "-m", "vlm_jax", "serve", f"--checkpoint={checkpoint}", "--port=0"]
    process = subprocess.Popen(
        [*command, *flags], cwd=tiny.ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if "is served at" in line:
            return process, line.split("served at ")[1].split("/ ")[0], "".join(said)
    raise AssertionError("".join(said))


def test_sigterm_under_load_loses_no_answer_that_was_taken(checkpoint, offline, tmp_path):
    assert main(["fit", "--published=reasoning", f"--out={tmp_path}", "--bootstrap=0"]) == 0
    flags = (f"--law={tmp_path}/law.json", "--chip=cpu", "--target-ms=1000", "--model-name=tiny")
    process, address, said = started(checkpoint, "--slots=2", "--queue=20", *flags)
    assert "whoever reaches" not in said  # the loopback
    # A law of another compressor says nothing of this model, and the server says so.
    assert b"fitted with token_packer, and this model has m3" in send(address, "/v1/models")[2]
    wanted = offline.generate(None, "hello", max_new_tokens=NEW)[0].text
    outcomes, begun = [], threading.Event()

    def ask(_):
        for _ in range(50):
            try:
                status, _, body = chat(address, "hello", max_tokens=NEW)
            except (urllib.error.URLError, ConnectionError):
                outcomes.append("refused")  # nobody listens any more
                return
            outcomes.append(status)
            if status == 200:
                assert body["choices"][0]["message"]["content"] == wanted
                begun.set()
            else:
                assert body["error"]["code"] in ("server_stopping", "queue_full")

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(ask, k) for k in range(4)]
        assert begun.wait(120)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 42, rest
        for one in work:
            one.result()
    # One line for each answer, without a word of it.
    assert rest.count("tokens text=") >= outcomes.count(200) and "hello" not in rest
    assert "all were answered" in rest and outcomes.count(200) >= 1
    assert set(outcomes) <= {200, 503, "refused"}, outcomes


def test_flags_that_contradict_are_refused_in_one_line(checkpoint, tmp_path, capsys):
    law = tmp_path / "law.json"
    law.write_text(json.dumps({}))
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    for flags, said in (
        (["--target-ms=5"], "--target-ms needs"),
        (["--efficiency=0.5"], "need --chip"),
        (["--visual-tokens=5"], "choose one of 1, 4, 16"),
        (["--allow-image-hosts=*"], "whole name"),
        ([f"--api-key-file={tmp_path}/none"], "no file"),
        (["--slots=0"], "slots=0"),
        (["--most-images=-1"], "more than 0"),
        (["--drain=nan"], "--drain: 'nan' is not a number"),
        (["--index-gb=inf"], "--index-gb: 'inf' is not a number"),
        (["--most-mb=0"], "--most-mb: '0.0' is not a number"),
        (["--mix=reasoning:1"], "--mix needs --law"),
        ([f"--api-key-file={tmp_path}/bytes"], "bytes: one key a line of UTF-8"),
        (["--port=99999"], "choose another port"),
        ([f"--law={law}"], "law"),
    ):
        code = main(["serve", f"--checkpoint={checkpoint}", "--port=0", "--no-warmup", *flags])
        err = capsys.readouterr().err
        assert code == 2 and said in err.splitlines()[-1], (flags, err)


def test_without_its_extra_the_command_says_how_to_get_it(checkpoint):
    before = "sys.modules['uvicorn'] = None"
    done = tiny.run("serve", f"--checkpoint={checkpoint}", "--port=0", before=before)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "vlm-jax serve: uvicorn is missing: pip install 'vlm_jax[serve]'"
    )
