"""The simulated worker's HTTP face: both dialects, streaming and not, driven by the wall clock.

Its tokenizer is the simplest there is: a token is a word between white space. Its model answers with as many words as
the client's limit says and then ends its turn; a limit above ``LONGEST`` is taken for none, for agents always send one.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from itertools import count
from math import ceil

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from keepwarm.harness import asked as ask
from keepwarm.harness.answered import Chat, Messages
from keepwarm.harness.asked import Asked, Refused
from keepwarm.replayers.pieces import PieceIndex
from keepwarm.replayers.text import WORD, words
from keepwarm.replayers.worker import SECOND, Service, Worker, account
from keepwarm.traces.errors import InputError

LONGEST = 31_999
"""Agents ask for at most 32,000 or 64,000 tokens and mean no number by it; a replay asks for what was recorded."""
CHUNK_NS = 4_000_000
"""A stream's events are at least this far apart; those of faster tokens carry several."""
BODY_BYTES = 64 << 20
SERVER = "keepwarm serve"

Handler = Callable[[Request], Awaitable[ASGIApp]]


def create_app(
    worker: Worker,
    *,
    model: str,
    speed: float,
    ttl_s: float | str | None,
    output_tokens: int = 128,
    body_bytes: int = BODY_BYTES,
) -> Starlette:
    """The application that serves a worker, which from then on belongs to it.

    ``speed`` and ``ttl_s`` are those the worker was made with, told by ``/health``; ``output_tokens`` is an answer's
    length where the client sets no limit; ``body_bytes`` is the largest body taken.
    """
    face = _Face(worker, model, output_tokens, body_bytes)
    cache = {
        "ttl": "none" if ttl_s is None else ttl_s,
        "block": worker.cache.block,
        "capacity": worker.cache.capacity,
        "rules": "managed" if worker.managed else "engine",
    }
    health = {"server": SERVER, "version": version("keepwarm"), "speed": speed, "cache": cache}
    served = {"id": model, "object": "model", "type": "model", "display_name": model, "owned_by": "keepwarm"}
    models = {"object": "list", "data": [served], "has_more": False}
    return Starlette(
        routes=[
            Route("/", _always(health)),
            Route("/health", _always(health)),
            Route("/v1/models", _always(models)),
            Route("/v1/messages", partial(face.answer, ask.messages, Messages), methods=["POST"]),
            Route("/v1/chat/completions", partial(face.answer, ask.chat, Chat), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refuse_http, Refused: _refuse},
    )


def _always(value: dict[str, object]) -> Handler:
    async def tell(request: Request) -> ASGIApp:
        del request
        return JSONResponse(value)

    return tell


def _error(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    dialect = Messages if request.url.path.startswith("/v1/messages") else Chat
    return JSONResponse(dialect.error(status, message), status, headers)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return _error(request, error.status, error.message)


async def _refuse_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(request, error.status_code, error.detail, dict(error.headers or {}))


class _Face:
    """Answers requests with a worker's word."""

    def __init__(self, worker: Worker, model: str, output_tokens: int, body_bytes: int) -> None:
        self._worker = worker
        self._model = model
        self._output_tokens = output_tokens
        self._body_bytes = body_bytes
        self._index = PieceIndex()
        self._idents = count(1)

    async def answer(
        self, read: Callable[[dict[str, object]], Asked], dialect: type[Messages | Chat], request: Request
    ) -> ASGIApp:
        """The answer to a request, as an application that speaks it until it is done or the client leaves."""
        try:
            body = orjson.loads(await self._body(request))
        except orjson.JSONDecodeError as error:
            raise Refused(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused(400, "the body is not a JSON object")
        asked = read(body)
        talk = dialect(asked, f"{next(self._idents):016x}", asked.model or self._model)

        async def spoken(scope: Scope, receive: Receive, send: Send) -> None:
            del scope
            speaking = asyncio.ensure_future(self._speak(asked, talk, send))
            leaving = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait((speaking, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                speaking.cancel()
                leaving.cancel()
                await asyncio.gather(speaking, leaving, return_exceptions=True)
            if not speaking.cancelled():
                speaking.result()

        return spoken

    async def _body(self, request: Request) -> bytes:
        chunks, size = [], 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size > self._body_bytes:
                    raise Refused(413, f"the body is larger than {self._body_bytes} bytes")
                chunks.append(chunk)
        except ClientDisconnect as error:
            raise Refused(400, "the body is cut off") from error
        return b"".join(chunks)

    async def _speak(self, asked: Asked, talk: Messages | Chat, send: Send) -> None:
        """One call from its beginning to its last token; its hold on the cache ends whatever happens."""
        total = asked.output if asked.output and asked.output <= LONGEST else self._output_tokens
        prompt = self._index.pieces(asked.text)
        service = self._worker.begin(prompt, total, time.monotonic_ns(), marks=asked.marks)
        told = account(service)
        text = words(blake2b(asked.text[-4096:]).digest(), total)
        data, said = talk.opening(told), 0
        try:
            await _until(service.first_token_ns)
            self._worker.first_token(service, time.monotonic_ns())
            if asked.stream:
                await send(_start(b"text/event-stream"))
            for due_ns, upto in _chunks(service) if asked.stream else [(service.done_ns, total)]:
                await _until(due_ns)
                data += talk.delta(text[max(WORD * said - 1, 0) : WORD * upto - 1])
                said = upto
                if upto < total:
                    await send(_chunk(data, more=True))
                    data = b""
        finally:
            self._end(service, asked, text[: max(WORD * said - 1, 0)])
        if asked.stream:
            await send(_chunk(data + talk.closing(told), more=False))
        else:
            await send(_start(b"application/json"))
            await send(_chunk(talk.whole(text, told), more=False))

    def _end(self, service: Service, asked: Asked, said: bytes) -> None:
        """The call is over. Where answers are readable, what was said is known by prompt and words together, for they
        may share pieces.
        """
        if said and not self._worker.managed:
            answer = said + b" " if asked.role == "assistant" else b"assistant\0" + said + b" "
            service = service._replace(prompt=(), answer=self._index.pieces(asked.text + answer))
        self._worker.end(service, time.monotonic_ns())


def _chunks(service: Service) -> Iterator[tuple[int, int]]:
    """When each event of a stream is due, and how many tokens are out with it: evenly from first token to last."""
    token_ns = (service.done_ns - service.first_token_ns) / max(service.output - 1, 1)
    step = max(ceil(CHUNK_NS / token_ns), 1) if token_ns else service.output
    upto = 1
    while upto < service.output:
        yield service.first_token_ns + round((upto - 1) * token_ns), upto
        upto += step
    yield service.done_ns, service.output


async def _until(due_ns: int) -> None:
    wait_ns = due_ns - time.monotonic_ns()
    if wait_ns > 0:
        await asyncio.sleep(wait_ns / SECOND)


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(content_type: bytes) -> dict[str, object]:
    headers = [(b"content-type", content_type), (b"cache-control", b"no-cache")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _chunk(data: bytes, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _listen(app: ASGIApp, host: str, port: int) -> tuple[uvicorn.Server, socket.socket]:
    """A server that says nothing, and the socket it will listen on."""
    try:
        sock = socket.create_server((host, port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        lifespan="off",
        ws="none",
        date_header=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config), sock


@contextmanager
def running(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve an application in a thread of its own; its base URL. Port 0 takes a free one. InputError if it is taken."""
    server, sock = _listen(app, host, port)
    bound = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="keepwarm serve", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.001)
    try:
        yield f"http://{host}:{bound}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def serve_forever(app: ASGIApp, host: str, port: int, *, told: Callable[[str], object]) -> None:
    """Serve an application until the process is interrupted. ``told`` is called with the base URL once clients can
    connect. InputError if the port is taken.
    """
    server, sock = _listen(app, host, port)
    told(f"http://{host}:{sock.getsockname()[1]}")
    with sock, suppress(KeyboardInterrupt):
        server.run(sockets=[sock])
