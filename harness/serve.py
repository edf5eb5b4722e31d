"""The simulated cluster's HTTP face: four dialects, streaming and not, driven by the wall clock.

Its tokenizer is the simplest there is: a token is a word between white space. Its model answers with as many words as
the client's limit says, or with the tool calls that its user wrote down for it.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any

import orjson
import uvicorn
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from keepwarm.harness import asked as ask
from keepwarm.harness import nvext, who
from keepwarm.harness.answered import FORMS, Speech, error
from keepwarm.harness.asked import Asked
from keepwarm.harness.driver import Call, Driver
from keepwarm.harness.script import Said, Script
from keepwarm.harness.served_metrics import Metrics
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.job import Job, account
from keepwarm.replayers.pieces import PieceIndex
from keepwarm.replayers.rules import RULES
from keepwarm.traces.errors import InputError

BODY_BYTES = 64 << 20
SERVER = "keepwarm serve"
QUIET: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
QUIET |= {"date_header": False, "server_header": False}
"""What makes a server of uvicorn's say nothing of itself, to its user and in answers."""


def create_app(
    cluster: Cluster,
    *,
    model: str,
    speed: float = 1.0,
    cache: Mapping[str, Any] | None = None,
    script: Script | None = None,
    body_bytes: int = BODY_BYTES,
) -> Starlette:
    """The application that serves a cluster, which from then on belongs to it and whose time runs ``speed`` times as
    fast as the wall clock's. ``cache`` is what ``/health`` tells of the cache, ``body_bytes`` the largest body taken.
    """
    cache, script = cache or {}, script or Script()
    face = _Face(cluster, model, speed, script, body_bytes, str(cache.get("rules", "engine")))
    health = {"server": SERVER, "version": version("keepwarm"), "speed": speed, "cache": cache}
    about = {"type": "model", "display_name": model, "owned_by": "keepwarm", "max_model_len": script.longest}
    served = {"id": model, "object": "model", "created": int(time.time()), **about}
    models = {"object": "list", "data": [served], "has_more": False, "first_id": model, "last_id": model}
    pages = {"/": health, "/health": health, "/v1/models": models}
    routes = [Route(path, JSONResponse(told), methods=["GET"]) for path, told in pages.items()]
    routes += [Route(forms["path"], partial(face.answer, name), methods=["POST"]) for name, forms in FORMS.items()]
    return Starlette(
        routes=[
            *routes,
            Route("/v1/messages/count_tokens", face.count, methods=["POST"]),
            Route("/v1/responses", _no_socket),
            Route("/metrics", face.metrics),
            Route("/reset_prefix_cache", face.reset, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refuse, Exception: _refuse},
    )


async def _no_socket(request: Request) -> ASGIApp:
    """Codex asks for a WebSocket first, and posts once it is told to upgrade to nothing."""
    wanted = request.headers.get("upgrade", "").lower() == "websocket"
    raise HTTPException(426, "no WebSocket here: POST") if wanted else HTTPException(405, headers={"Allow": "POST"})


async def _refuse(request: Request, why: Exception) -> Response:
    """The dialect's own error, of a refusal or of a fault in here."""
    fault = HTTPException(500, f"a fault in the simulated cluster: {type(why).__name__}: {why}")
    told = why if isinstance(why, HTTPException) else fault
    dialect = "messages" if request.url.path.startswith("/v1/messages") else "chat"
    body = error(dialect, told.status_code, told.detail)
    return Response(body, told.status_code, told.headers, "application/json")


class _Face:
    """Answers requests with a cluster's word."""

    def __init__(self, cluster: Cluster, model: str, speed: float, script: Script, body_bytes: int, rules: str) -> None:
        self._driver = Driver(cluster, speed=speed)
        self._model = model
        self._script = script
        self._body_bytes = body_bytes
        known = RULES.get(rules)
        self._blocks = known is not None and known.entries
        self._writes = "cache_write_tokens" if rules.startswith("openai") else "created_cache_tokens"
        self._index = PieceIndex()
        self._metrics = Metrics(model, speed, cluster.members)

    async def answer(self, dialect: str, request: Request) -> ASGIApp:
        """The answer to a request, as an application that speaks it until it is done or the client leaves."""
        body = await self._json(request)
        asked = ask.read(dialect, body, salt=nvext.salt(body, request.headers), blocks=self._blocks)
        hints = nvext.hints(body, request.headers)
        said = self._script.answer(asked)
        told = who.client(request.headers, body)
        session = told.agent or told.session or body.get("prompt_cache_key")
        flow, session = who.flow(request.headers), session if isinstance(session, str) else None
        job = self._job(asked, said)._replace(hints=hints, flow=flow, session=session, model=asked.model)
        model = asked.model or self._model
        speech = Speech(dialect, said, model, tell_usage=asked.tell_usage, writes=self._writes)

        async def spoken(_: Scope, receive: Receive, send: Send) -> None:
            call = self._driver.submit(job, stream=asked.stream)
            speaking = asyncio.ensure_future(self._speak(call, said, speech, send, stream=asked.stream))
            leaving = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait((speaking, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                speaking.cancel()
                leaving.cancel()
                await asyncio.gather(speaking, leaving, return_exceptions=True)
                if not call.done:
                    self._metrics.over(call.running, "abort")
                self._driver.leave(call)
            if not speaking.cancelled():
                speaking.result()

        return spoken

    async def count(self, request: Request) -> ASGIApp:
        """How many tokens a prompt of the Messages API has."""
        asked = ask.read("messages", await self._json(request))
        return JSONResponse({"input_tokens": asked.tokens})

    async def metrics(self, request: Request) -> ASGIApp:
        """The state of things as Prometheus reads it."""
        self._driver.advance()
        return Response(generate_latest(self._metrics), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def reset(self, request: Request) -> ASGIApp:
        """Empty all caches."""
        self._driver.advance()
        self._driver.cluster.reset_cache()
        return JSONResponse({"success": True})

    async def _json(self, request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "expected a body of application/json without an encoding")
        raw = bytearray()
        try:
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > self._body_bytes:
                    raise HTTPException(413, f"the body is larger than {self._body_bytes} bytes")
            body = orjson.loads(raw)
        except ClientDisconnect as error:
            raise HTTPException(400, "the body is cut off") from error
        except orjson.JSONDecodeError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise HTTPException(400, "the body is not a JSON object")
        return body

    def _job(self, asked: Asked, said: Said) -> Job:
        """What is asked of the cluster. The answer's pieces are those by which a later prompt knows it; where they
        share one with the prompt, which takes a client that knew the answer before, it is not kept.
        """
        prompt = self._index.pieces(asked.text)
        whole = self._index.pieces(asked.text + said.again(asked))
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else ()
        tree = self._driver.cluster.tree
        return Job(tree.extend(tree.root, prompt), said.tokens, answer, asked.marks)

    async def _speak(self, call: Call, said: Said, speech: Speech, send: Send, *, stream: bool) -> None:
        """One call from its first token to its last."""
        while call.running.first_token_ns is None and not call.done:
            await call.news()
        if call.running.error:
            raise HTTPException(400, f"{call.running.error}: no worker's cache can hold the prompt and its answer")
        while not stream and not call.done:
            await call.news()
        told = account(call.running)
        await send(_start(b"text/event-stream" if stream else b"application/json"))
        data, out = speech.told("opening" if stream else "whole", told), 0
        while stream and (not call.done or out < said.tokens):
            while call.out <= out:
                await call.news()
            before, out = out, call.out
            data += speech.delta(said.text[said.upto(before) : said.upto(out)])
            if out < said.tokens:
                await send(_chunk(data, more=True))
                data = b""
        if stream:
            data += speech.told("closing", told)
        self._metrics.over(call.running, said.stop)
        await send(_chunk(data, more=False))


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(content_type: bytes) -> dict[str, object]:
    headers = [(b"content-type", content_type), (b"cache-control", b"no-cache")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _chunk(data: bytes, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def listen(app: ASGIApp, host: str, port: int) -> tuple[uvicorn.Server, socket.socket]:
    """A server that says nothing, and the socket it will listen on. InputError if the port is taken."""
    try:
        sock = socket.create_server((host, port), backlog=1024)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does so for sockets of its own making only
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
    config = uvicorn.Config(app, lifespan="off", ws="none", timeout_keep_alive=75, timeout_graceful_shutdown=1, **QUIET)
    return uvicorn.Server(config), sock


def serve_forever(app: ASGIApp, host: str, port: int, *, told: Callable[[str], object]) -> None:
    """Serve an application until the process is interrupted. ``told`` is called with the base URL once clients can
    connect. InputError if the port is taken.
    """
    server, sock = listen(app, host, port)
    told(f"http://{host}:{sock.getsockname()[1]}")
    with sock, suppress(KeyboardInterrupt):
        server.run(sockets=[sock])
