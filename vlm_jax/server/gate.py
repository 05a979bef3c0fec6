# SPDX-License-Identifier: Apache-2.0
"""What a request passes before anything of it is parsed: key, form, number, size and time.

A middleware of ASGI. It holds the body of a request: whoever sends one slowly, or one without end,
costs a bounded part of the memory for a bounded time. And it cancels the answer of a client that is
gone, whatever ended its request: the slot is free before the next token.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_jax.server.options import MB, Keys
from vlm_jax.server.refusals import Refusal
from vlm_jax.server.service import Service, stopping

log = logging.getLogger(__name__)
OPEN = ("/", "/health")  # without a key
CHAT = "/v1/chat/completions"
# Keys of the scope: when the first byte came, by time.monotonic; the `Reply` under way.
ARRIVED, REPLY = "vlm_jax.arrived", "vlm_jax.reply"


@dataclass
class Taken:
    """What one request has of the gate's bounds: a place `inside`, and bytes of its body."""

    inside: bool = False
    bytes: int = 0


class Gate:
    """Lets requests through to `app`."""

    def __init__(self, app: ASGIApp, service: Service, keys: Keys):
        self.app, self.service, self.keys = app, service, keys
        # Chat requests that were let in, to the last byte of the response: one without a key, or
        # refused, takes nobody's place while its body is thrown away.
        self.inside = 0
        self.held = 0  # bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope[ARRIVED] = time.monotonic()
        status: list[int] = []

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
            await send(message)

        chat = scope["path"] == CHAT and scope["method"] == "POST"
        taken = Taken()
        try:
            await self._through(scope, receive, noted, taken)
        except Refusal as refusal:
            await refusal.response()(scope, receive, noted)
        except Exception as error:
            # The message may quote the request, and so is not logged; the place is enough.
            place = traceback.extract_tb(error.__traceback__)[-1]
            log.error("%s at %s:%s", type(error).__name__, place.filename, place.lineno)
            if not status:
                failed = Refusal("the server failed: see its log", status=500, code="failed")
                await failed.response()(scope, receive, noted)
        finally:
            if REPLY in scope:
                scope[REPLY].ticket.cancel()
            self.inside -= taken.inside
            self.held -= taken.bytes
            if chat:
                self.service.metrics.ended(status[0] if status else 499)

    async def _through(self, scope: Scope, receive: Receive, send: Send, taken: Taken) -> None:
        """Checks a request, reads its body, and calls the app. Raises Refusal."""
        limits, headers = self.service.limits, headers_of(scope)
        if scope["path"] not in OPEN and not self.keys.allow(headers.get("authorization", "")):
            refusal = Refusal(
                "no valid key: send Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
            raise await self._after(receive, refusal) if scope["method"] == "POST" else refusal
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.service.draining:
            raise await self._after(receive, stopping())
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise await self._after(receive, Refusal(
                f"Content-Type is {kind[:40]!r}: send application/json", status=415
            ))  # fmt: skip
        if scope["path"] == CHAT:
            if self.inside >= limits.requests:
                raise await self._after(receive, self._busy())
            taken.inside = True
            self.inside += 1
        body = await self._body(headers, receive, taken)
        if (values := sum(map(body.count, (b",", b"[", b"{")))) > limits.values:
            raise Refusal(
                f"about {values:,} values in the JSON of the body, and at most {limits.values:,} "
                "are read: send less",
                status=413,
                code="request_too_large",
            )
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        del body
        await self.app(scope, again, send)

    async def _body(self, headers: dict[str, str], receive: Receive, taken: Taken) -> bytes:
        """The body of a request. Raises Refusal for one that is too large or too slow."""
        limits, chunks = self.service.limits, []
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced[:20]) > limits.body_bytes:
            raise await self._after(receive, self._too_large())
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal("the client is gone", status=499)
                    chunk = message.get("body", b"")
                    chunks.append(chunk)
                    taken.bytes += len(chunk)
                    self.held += len(chunk)
                    if taken.bytes > limits.body_bytes:
                        raise self._too_large()
                    if self.held > limits.bodies_bytes:
                        raise self._busy()
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise Refusal(
                f"the request did not arrive within {limits.body_seconds:g} s: send it again",
                status=408,
                code="request_timeout",
            ) from None

    async def _after(self, receive: Receive, refusal: Refusal) -> Refusal:
        """The refusal, after a bounded part of the body was thrown away.

        A client that is still sending when the connection is closed may not see the response.
        """
        left = self.service.limits.body_bytes
        try:
            async with asyncio.timeout(self.service.limits.body_seconds):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        return refusal

    def _too_large(self) -> Refusal:
        limit = self.service.limits.body_bytes / MB
        return Refusal(
            f"the request is larger than {limit:,.1f} MB: send smaller images, or their handles",
            status=413,
            code="request_too_large",
        )

    def _busy(self) -> Refusal:
        return Refusal(
            f"{self.inside} requests are under way, and more are not taken: ask again later",
            status=429,
            code="queue_full",
            retry_after=self.service.retry_after(),
        )


def headers_of(scope: MutableMapping[str, Any]) -> dict[str, str]:
    """The headers of a request by their names in small letters."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
