# SPDX-License-Identifier: Apache-2.0
"""Servers for tests: a real uvicorn on a free port of the loopback, and clients of it."""

import base64
import io
import json
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
from PIL import Image

from vlm_jax.server import run
from vlm_jax.server.app import application
from vlm_jax.server.options import Keys

PAGE = "<!DOCTYPE html><title>page</title>"


@contextmanager
def serving(service, *, keys=None, page=PAGE, wrap=lambda app: app):
    """The address of a server while the body runs."""
    bound = run.listen("127.0.0.1", 0)
    app = wrap(application(service, keys=keys or Keys(), page=page))
    listener = run.Listener(app, bound)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        service.close()
        listener.stop()


def send(address, path, body=None, *, headers=(), timeout=30):
    """Status, headers and body of a response; `body` is sent as JSON unless it is bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data)
    for name, value in (("Content-Type", "application/json"), *headers):
        request.add_header(name, value)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, dict(response.headers), response.read()


def chat(address, content="what is this?", **fields):
    """Status and parsed body of a question."""
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    body = {"messages": messages, **fields}
    status, headers, answer = send(address, "/v1/chat/completions", body)
    return status, headers, json.loads(answer)


def eventually(true, *, seconds=10.0):
    """Waits until a condition holds."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not become true"
        time.sleep(0.01)


def picture(seed=0, side=8, form="PNG"):
    """The bytes of a picture's file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def uri(content=None, kind="image/png"):
    """A picture as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content or picture()).decode()}"


def image(url=None, **fields):
    """The part of a message that is an image."""
    return {"type": "image_url", "image_url": {"url": url or uri(), **fields}}


def text(words):
    """The part of a message that is a text."""
    return {"type": "text", "text": words}
