"""The routes: OpenAI's chat completions and models, health, metrics, the page and the token map it draws."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from vlm_jax.inference.batching import STOP, Ticket, Words
from vlm_jax.serving.engine import Engine
from vlm_jax.serving.limits import Refused, late
from vlm_jax.serving.protocol import Asked, Reply, cut, event, read, unsure

HANG_UP_S = 0.25  # how often a waiting request is asked whether its client is still there


def make_app(engine: Engine, name: str, api_key: str = "") -> FastAPI:
    """The application. name: of the model, as clients call it. api_key: that /v1 and /map ask for; "" = none."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncGenerator[None]:
        await run_in_threadpool(engine.start)
        yield
        await run_in_threadpool(engine.stop)

    app = FastAPI(title="vlm_jax", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        engine.metrics.requests.labels(error.status).inc()
        headers = {"Retry-After": str(error.retry_s)} if error.retry_s else None
        return JSONResponse(error.body, error.status, headers)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise Refused(401, "the API key is missing or wrong; send Authorization: Bearer KEY.", "invalid_api_key")  # fmt: skip

    _add_protocol(app, engine, name, check_key)
    _add_others(app, engine, name, check_key)
    return app


def _add_protocol(
    app: FastAPI, engine: Engine, name: str, check_key: Callable[[Request], None]
) -> None:
    """OpenAI's routes."""

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        check_key(request)
        asked, ticket = await _ticket(engine, name, request)
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine.submit(ticket, lambda: loop.call_soon_threadsafe(changed.set))
        answer = _Answer(engine, name, asked, ticket, changed)
        if asked.stream:
            engine.metrics.requests.labels(200).inc()
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        body = await answer.whole(request)
        engine.metrics.requests.labels(200).inc()
        return JSONResponse(body)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [_card(engine, name)]}

    @app.get("/v1/models/{wanted:path}")
    async def model(wanted: str, request: Request) -> dict[str, Any]:
        check_key(request)
        if wanted != name:
            raise Refused(404, f"model {wanted!r:.80} is not served here; use {name!r}.", "model_not_found")  # fmt: skip
        return _card(engine, name)


def _add_others(
    app: FastAPI, engine: Engine, name: str, check_key: Callable[[Request], None]
) -> None:
    """Health, metrics, the page and its token map."""

    @app.get("/health")
    async def health() -> JSONResponse:
        if engine.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    page = resources.files("vlm_jax.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    drawing = asyncio.Lock()

    @app.post("/map")
    async def token_map(request: Request) -> Response:
        """The body of a chat completion -> a PNG of what the visual tokens look at."""
        check_key(request)
        asked, _ = await _ticket(engine, name, request)
        if len(asked.record.images) != 1:
            raise Refused(400, "a token map needs one picture.")
        async with drawing:
            return Response(await run_in_threadpool(_drawn, engine, asked), media_type="image/png")


async def _ticket(engine: Engine, name: str, request: Request) -> tuple[Asked, Ticket]:
    """What a request asks, checked and laid out. Raises Refused."""
    most = engine.limits.body_bytes
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise Refused(413, f"the body is larger than {most} bytes.", "body_too_large")
    asked = await run_in_threadpool(read, bytes(body), name, engine.limits)
    return asked, await run_in_threadpool(engine.ticket, asked)


def _drawn(engine: Engine, asked: Asked) -> bytes:
    (image,) = asked.record.images
    assert isinstance(image, bytes)
    count = engine.count(asked)
    figure = engine.model.token_map(image, asked.record.turns[-1].question, visual_tokens=count, answer=asked.answer)  # fmt: skip
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _card(engine: Engine, name: str) -> dict[str, Any]:
    """A model of /v1/models; `vlm_jax` is a field of our own, which the page reads."""
    model = engine.model
    own = {
        "visual_tokens": engine.default, "choices": engine.choices, "patches": model.config.vit.num_patches,
        "compressor": model.config.compressor.name, "images": engine.prompter.data.max_images,
        "max_new_tokens": engine.limits.max_new_tokens,
    }  # fmt: skip
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "vlm_jax", "vlm_jax": own}  # fmt: skip


class _Answer:
    """One answer on its way to its client. When the client goes away or time runs out, its row is freed."""

    def __init__(self, engine: Engine, name: str, asked: Asked, ticket: Ticket, changed: asyncio.Event):  # fmt: skip
        self.engine, self.asked, self.ticket, self.changed = engine, asked, ticket, changed
        self.reply, self.text, self.stopped = Reply(name), "", False
        self._words, self._taken = Words(engine.model.tokenizer), 0
        self._deadline = time.monotonic() + engine.limits.timeout_s

    async def whole(self, request: Request) -> dict[str, Any]:
        """The JSON of a complete answer. Raises Refused(504) when it takes too long."""
        try:
            while not await self._more(HANG_UP_S):
                if await request.is_disconnected():
                    raise Refused(499, "the client closed the connection.")
            return self.reply.whole(self.text, self._finish, self._usage, self.engine.cost(self.ticket))  # fmt: skip
        finally:
            self._release()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: the pieces of the text, then the reason it ended, then [DONE]. An error is an event too."""
        try:
            yield event(self.reply.chunk({"role": "assistant", "content": ""}))
            said, done = 0, False
            while not done:
                done = await self._more(None)
                held = 0 if done else unsure(self.text, self.asked.stops)
                if piece := self.text[said : len(self.text) - held]:
                    said += len(piece)
                    yield event(self.reply.chunk({"content": piece}))
            yield event(self.reply.chunk({}, self._finish))
            if self.asked.with_usage:
                yield event(self.reply.counts(self._usage, self.engine.cost(self.ticket)))
            yield event("[DONE]")
        except Refused as error:
            yield event(json.dumps(error.body))
        finally:
            self._release()

    async def _more(self, wait_s: float | None) -> bool:
        """Waits for the next tokens, takes in their text, and says whether the answer is complete."""
        left = self._deadline - time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), left if wait_s is None else min(left, wait_s))  # fmt: skip
        self.changed.clear()
        ticket, finished = self.ticket, self.ticket.finished
        if finished not in ("", STOP, "length"):
            raise Refused(500, "the model failed while it answered; see the server's log.")
        new = ticket.tokens[self._taken :]
        self._taken += len(new)
        text = self.text + self._words.add(new) + (self._words.end() if finished else "")
        self.text, self.stopped = cut(text, self.asked.stops)
        if not (finished or self.stopped) and time.monotonic() > self._deadline:
            raise late(self.engine.limits.timeout_s)
        return bool(finished or self.stopped)

    def _release(self) -> None:
        if not self.ticket.finished:
            self.ticket.cancelled = True
        self.engine.ended(self.ticket)

    @property
    def _finish(self) -> str:
        return STOP if self.stopped else self.ticket.finished

    @property
    def _usage(self) -> dict[str, int]:
        prompt, answer = self.ticket.prompt.length, len(self.ticket.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}  # fmt: skip
