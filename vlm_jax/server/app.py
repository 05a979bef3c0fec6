# SPDX-License-Identifier: Apache-2.0
"""The routes: /v1/chat/completions, /v1/models, /health, /metrics, and the page at /."""

import asyncio
import itertools
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from vlm_jax import __version__
from vlm_jax.server import schema
from vlm_jax.server.answers import Reply
from vlm_jax.server.gate import ARRIVED, CHAT, REPLY, Gate
from vlm_jax.server.options import Keys
from vlm_jax.server.refusals import Refusal
from vlm_jax.server.service import Service

T = TypeVar("T")
NAMES = {
    name
    for model in vars(schema).values()
    if isinstance(model, type) and issubclass(model, BaseModel)
    for name in model.model_fields
}
# What the page may load: itself, and the API beside it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schema.ErrorBody, "description": "Refused, with the way out"},
    500: {"model": schema.ErrorBody, "description": "The request could not be computed"},
    503: {"model": schema.ErrorBody, "description": "The server is stopping"},
}
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def application(service: Service, *, keys: Keys, page: str) -> ASGIApp:
    """The server as an ASGI application; `page` is the HTML at /."""
    app = FastAPI(
        title="vlm_jax",
        version=__version__,
        description="OpenAI's chat completions by a vision language model with a visual budget.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirection would name a host as the client does
    )
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, failed)
    _chat(app, service)
    _facts(app, service)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    return Gate(app, service, keys)


def _chat(app: FastAPI, service: Service) -> None:
    """The route that answers."""

    @app.post(
        CHAT,
        response_model=schema.ChatCompletion,
        responses={200: {"content": STREAM, "description": "The answer"}} | ERRORS,
        operation_id="chat",
    )
    async def chat(request: Request, asked: schema.ChatRequest) -> Response:
        """Answers the last message of a conversation, about its images."""
        prepared = await service.prepare(asked, request.scope[ARRIVED])
        reply = request.scope[REPLY] = Reply(service, prepared)
        # Of a stream, too, the first event is waited for: until then a failure has a status.
        first = await unless_gone(request, reply.next() if prepared.stream else reply.whole())
        if first is None:
            return Response(status_code=499)  # nobody reads it
        if isinstance(first, schema.ChatCompletion):
            return JSONResponse(first.model_dump(mode="json"))
        return EventSourceResponse(
            reply.chunks(first), sep="\n", send_timeout=service.limits.send_seconds
        )


def _facts(app: FastAPI, service: Service) -> None:
    """The routes that say what is served, and how it is."""
    choices = service.chooser.choices
    card = schema.ModelCard(
        id=service.name,
        created=service.created,
        max_model_len=service.engine.model.max_length,
        compressor=service.chooser.auto.size.compressor.kind,
        visual_tokens=schema.Budgets(
            supported=list(choices.supported),
            default=choices.default,
            low=choices.low,
            high=choices.high,
            auto=service.chooser.auto.describe(),
        ),
    )

    @app.get("/v1/models", operation_id="models", responses={"4XX": ERRORS["4XX"]})
    async def models() -> schema.ModelList:
        """The served model, with the visual tokens that may be asked for."""
        return schema.ModelList(data=[card])

    @app.get("/v1/models/{name:path}", operation_id="model", responses={"4XX": ERRORS["4XX"]})
    async def model(name: str) -> schema.ModelCard:
        """The served model, if this is its name."""
        if name != service.name:
            raise Refusal(f"model {name!r:.80} is not served here: ask for {service.name}",
                          status=404, param="model", code="model_not_found")  # fmt: skip
        return card

    @app.get("/health", operation_id="health", response_model=schema.Health,
             responses={503: {"model": schema.Health, "description": "Not ready"}})  # fmt: skip
    async def health() -> Response:
        """Whether requests are taken, and how many are under way."""
        now = service.engine.stats()
        status = "failed" if service.failed else "draining" if service.draining else "ok"
        found = schema.Health(
            status=status, active=now.running, waiting=now.queued, slots=now.slots
        )
        return JSONResponse(found.model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", operation_id="metrics", response_class=PlainTextResponse,
             responses={"4XX": ERRORS["4XX"]})  # fmt: skip
    async def metrics() -> Response:
        """What the server has done, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What `work` gives; None, with the work cancelled, as soon as the client is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        for task in (answer, leaving):
            task.cancel()


async def refused(request: Request, error: Exception) -> Response:
    """The response of a Refusal."""
    assert isinstance(error, Refusal)
    return error.response()


async def invalid(request: Request, error: Exception) -> Response:
    """The response to a body that is not of the form of the schema."""
    assert isinstance(error, RequestValidationError)
    # Of the forms that a value may have, that of its own type says most.
    first = min(error.errors(), key=lambda e: (e["type"].endswith("_type"), -len(e["loc"])))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return Refusal(f"the body is no JSON: {reason}", code="invalid_json").response()
    param = place_of(first["loc"])
    message = f"{param or 'the body'}: {first['msg']}"
    if first["type"] == "extra_forbidden":
        message += f" ({first['loc'][-1]})"
    elif not isinstance(first.get("input"), (dict, list)):
        message += f", not {first.get('input')!r:.60}"
    return Refusal(message, param=param or None, code="invalid_value").response()


def place_of(loc: Sequence[str | int]) -> str:
    """A place in a request such as messages[0].content, without the names of types in it."""
    place = ""
    for before, part in itertools.pairwise(loc):
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in NAMES and part != before:
            place += f".{part}"
    return place.lstrip(".")


async def failed(request: Request, error: Exception) -> Response:
    """The response after a fault of the server, which the gate logs."""
    return Refusal("the server failed: see its log", status=500, code="failed").response()


async def unknown(request: Request, error: Exception) -> Response:
    """The response to an unknown path or method, and to a body that cannot be read."""
    assert isinstance(error, HTTPException)
    refusal = Refusal(str(error.detail), status=error.status_code)
    if error.status_code == 400:  # FastAPI's word for a parser that gave up
        refusal.message = "the body cannot be read: it is nested too deeply, or has a huge number"
        refusal.code = "invalid_json"
    response = refusal.response()
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
