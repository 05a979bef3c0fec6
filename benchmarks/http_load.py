# SPDX-License-Identifier: Apache-2.0
"""Clients of a chat server on the loopback: what each got, and what all of them got together."""

import base64
import http.client
import io
import json
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is a folder, not installed

from benchmarks import serving_engine  # noqa: E402

NEW = serving_engine.NEW


class Expected(NamedTuple):
    """The answer that a request has alone: its text and the number of its tokens."""

    text: str
    tokens: int


@dataclass
class Got:
    """What one request got: seconds from when it was due to the first text and to the end, the
    text, and when it ended; `error` if there is no answer."""

    first: float = 0.0
    whole: float = 0.0
    text: str = ""
    ended: float = 0.0
    error: str = ""


def stream(address: str, body: bytes, due: float) -> Got:
    """Asks once, and reads the whole stream; `due` is of `time.monotonic`."""
    got, parts = Got(), []
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            return Got(error=f"status {response.status}: {response.read()[:200]!r}")
        while part := response.read1(65536):
            parts.append(part)
            # Chunks without text come first; what they say is looked at when the answer is there.
            if not got.first and texts(b"".join(parts)):
                got.first = time.monotonic() - due
        got.ended = time.monotonic()
        got.whole = got.ended - due
        whole = b"".join(parts)
        got.text = "".join(texts(whole))
        if b'"error"' in whole:
            got.error = whole[-300:].decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        got.error = repr(error)
    finally:
        connection.close()
    return got


def texts(stream: bytes) -> list[str]:
    """The pieces of an answer in a stream of events, empty ones left out."""
    found = []
    for line in stream.split(b"\n"):
        if not line.startswith(b"data: {") or not line.rstrip().endswith(b"}"):
            continue
        for choice in json.loads(line[6:]).get("choices", ()):
            if piece := choice.get("delta", {}).get("content"):
                found.append(piece)
    return found


def picture(seed: int, side: int) -> bytes:
    """A PNG of noise, as large as the encoder reads."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def body(question: str, image: bytes, model: str, V: int | None) -> bytes:
    """A request; `V` is for our server."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    asked: dict[str, Any] = dict(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=NEW,
        temperature=0.0,
        stream=True,
    )
    if V is not None:
        asked["visual_tokens"] = V
    return json.dumps(asked).encode()


Pair = tuple[Got, Expected]


class Target(NamedTuple):
    """A server, under the name that a result has for it, and the requests that it gets in turn."""

    side: str
    visual_tokens: int
    address: str
    bodies: list[bytes]
    expected: list[Expected]

    def ask(self, number: int, due: float) -> Pair:
        """Asks one of the requests; `due` as of `stream`."""
        k = number % len(self.bodies)
        return stream(self.address, self.bodies[k], due), self.expected[k]


def row(
    target: Target, inner: list[Pair], pairs: list[Pair], span: float, **more: Any
) -> dict[str, Any]:
    """A line of results: counts of all answers, times of the `inner` ones, in `span` seconds."""
    answers = [
        (got.first, (got.whole - got.first) / max(expected.tokens - 1, 1))
        for got, expected in inner
    ]
    line = serving_engine.row(
        target.side, target.visual_tokens, more.pop("clients", 0), answers, span
    )
    return line | dict(
        response=serving_engine.percentiles([got.whole for got, _ in inner]),
        asked=len(pairs),
        wrong=sum(got.text != expected.text for got, expected in pairs if not got.error),
        failed=sum(bool(got.error) for got, _ in pairs),
        errors=sorted({got.error for got, _ in pairs if got.error})[:3],
        **more,
    )


def closed(target: Target, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients that ask again as soon as they are answered."""
    pairs: list[Pair] = []
    began = time.monotonic()
    until = began + seconds

    def client(number: int) -> None:
        k = number
        while (now := time.monotonic()) < until:
            pairs.append(target.ask(k, now))
            k += clients

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [one for one in pairs if not one[0].error]
    inner, span = serving_engine.steady(done, lambda one: one[0].ended, clients, began)
    return row(target, inner, pairs, span, clients=clients)


def poisson(target: Target, rate: float, seconds: float, *, most: int) -> dict[str, Any]:
    """Requests that come independently at a mean rate; `most` are under way at once."""
    draw, now = random.Random(0), time.monotonic()
    due, at = [], now
    while (at := at + draw.expovariate(rate)) < now + seconds:
        due.append(at)
    pairs: list[Pair] = []
    numbers, lock = iter(range(len(due))), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                k = next(numbers, None)
            if k is None:
                return
            time.sleep(max(due[k] - time.monotonic(), 0.0))
            pairs.append(target.ask(k, due[k]))

    threads = [threading.Thread(target=client) for _ in range(most)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [one for one in pairs if not one[0].error]
    return row(target, done, pairs, seconds, rate=round(rate, 3))
