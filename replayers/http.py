"""HttpEndpoint sends planned calls to an endpoint over HTTP and reads the answers as they stream in.

The hot path calls an httpx transport with prepared requests. Each agent has a connection of its own, kept as long as a
real client keeps an idle one: httpx's shared pool does work that grows with the square of its connections.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import httpx
import orjson

from keepwarm.replayers import chat, messages
from keepwarm.replayers.endpoint import Answer, Request
from keepwarm.replayers.sse import Events, Heard, Reader, failure, fault, part, string
from keepwarm.replayers.text import PromptText
from keepwarm.traces.errors import InputError

IDLE_NS = 4_000_000_000
"""How long an idle connection is kept: less than the 5 s after which common servers close theirs."""


class Dialect(NamedTuple):
    """What a dialect's module gives."""

    path: str
    key_env: str
    headers: Callable[[str | None], dict[str, str]]
    body: Callable[..., bytes]
    usage: Callable[[Mapping[str, Any] | None], dict[str, Any]]
    reader: Callable[[], Reader]


DIALECTS = {
    "messages": Dialect(
        messages.PATH, messages.KEY_ENV, messages.headers, messages.body, messages.usage, messages.Reader
    ),
    "chat": Dialect(chat.PATH, chat.KEY_ENV, chat.headers, chat.body, chat.usage, chat.Reader),
}


def base_url(url: str) -> httpx.URL:
    """An endpoint's address without its ``/v1``; InputError if it is not http or https."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"endpoint {url!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"endpoint {url!r}: expected http://HOST[:PORT] or https://HOST[:PORT]")
    path = parsed.path.rstrip("/").removesuffix("/v1")
    return parsed.copy_with(path=path + "/", query=None, fragment=None)


def endpoint_headers(url: str, dialect: str, *, key_env: str | None = None) -> dict[str, str]:
    """The dialect's headers, with a key from the environment: ``key_env``, which must then be set, or else the name its
    vendor uses; but no key that was not named goes out unencrypted.
    """
    given = DIALECTS[dialect]
    key = os.environ.get(key_env or given.key_env)
    if key_env and not key:
        raise InputError(f"environment variable {key_env}: expected an API key, found nothing")
    return given.headers(key if key_env or base_url(url).scheme == "https" else None)


class HttpEndpoint:
    """An endpoint behind a URL. ``clock`` gives the ns that answers are timed in; ``timeout_s`` bounds a whole call;
    ``extra`` are fields for every body; with ``exact_output`` a chat endpoint of the vLLM kind is told not to stop
    early; ``transport`` makes a connection's transport.
    """

    def __init__(
        self,
        url: str,
        *,
        dialect: str,
        model: str,
        clock: Callable[[], int],
        headers: Mapping[str, str] | None = None,
        key_env: str | None = None,
        stream: bool = True,
        timeout_s: float = 600.0,
        salt: str = "",
        extra: Mapping[str, Any] | None = None,
        exact_output: bool = False,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        self._dialect = DIALECTS[dialect]
        self._url = base_url(url).join(self._dialect.path.removeprefix("/"))
        self._headers = httpx.Headers(
            {
                "content-type": "application/json",
                "accept": "text/event-stream" if stream else "application/json",
                "accept-encoding": "identity",
                "user-agent": "keepwarm",
                **endpoint_headers(url, dialect, key_env=key_env),
                **(headers or {}),
            }
        )
        self._model = model
        self._clock = clock
        self._stream = stream
        self._timeout_s = timeout_s
        self._text = PromptText(salt=salt)
        self._extra = dict(extra or {})
        self._exact_output = exact_output
        self._transport = transport or _transports(self._url.scheme)
        self._idle: dict[tuple[str, str, int], tuple[httpx.AsyncBaseTransport, int]] = {}

    async def send(self, request: Request) -> Answer:
        """Send one request and wait for the whole answer; what goes wrong stands in the answer."""
        prepared = httpx.Request("POST", self._url, headers=self._headers, content=self._body(request))
        transport = await self._take(request)
        reader = self._dialect.reader()
        seen = _Seen()
        error: str | None = "reset"
        sent_ns = self._clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                error = await self._exchange(transport, prepared, reader, seen)
        except (TimeoutError, httpx.TimeoutException):
            error = "timeout"
        except (httpx.TransportError, OSError):
            error = "reset"
        except orjson.JSONDecodeError:
            error = "other"
        finally:
            done_ns = self._clock()
            await self._give_back(request, transport, whole=error is None)
        return self._answer(reader.heard, seen, sent_ns, done_ns, error)

    async def aclose(self) -> None:
        """Close the connections."""
        while self._idle:
            await self._idle.popitem()[1][0].aclose()

    def _body(self, request: Request) -> bytes:
        extra = self._extra
        if self._exact_output:
            extra = {"min_tokens": request.output or 1, "ignore_eos": True, **extra}
        return self._dialect.body(request, text=self._text, model=self._model, stream=self._stream, extra=extra)

    async def _exchange(
        self, transport: httpx.AsyncBaseTransport, request: httpx.Request, reader: Reader, seen: _Seen
    ) -> str | None:
        """One request and its answer; the error's class if there was one."""
        response = await transport.handle_async_request(request)
        seen.status = response.status_code
        try:
            if response.status_code != 200 or not self._stream:
                return await self._whole(response, reader, seen)
            events = Events()
            async for chunk in response.stream:  # type: ignore[union-attr]
                now_ns = self._clock()
                if seen.first_byte_ns is None:
                    seen.first_byte_ns = now_ns
                for data in events.feed(chunk):
                    reader.event(data, now_ns)
        finally:
            await response.aclose()
        if reader.heard.fault:
            return failure(200, *reader.heard.fault)
        return None if reader.heard.finished else "reset"

    async def _whole(self, response: httpx.Response, reader: Reader, seen: _Seen) -> str | None:
        chunks = []
        async for chunk in response.stream:  # type: ignore[union-attr]
            if seen.first_byte_ns is None:
                seen.first_byte_ns = self._clock()
            chunks.append(chunk)
        data = b"".join(chunks)
        if response.status_code == 200:
            reader.whole(data)
            return None if reader.heard.finished else "other"
        try:
            told = fault(orjson.loads(data))
        except orjson.JSONDecodeError:
            told = ("", "")
        return failure(response.status_code, *told)

    def _answer(self, heard: Heard, seen: _Seen, sent_ns: int, done_ns: int, error: str | None) -> Answer:
        return Answer(
            sent_ns,
            done_ns,
            first_byte_ns=seen.first_byte_ns,
            first_token_ns=heard.token_ns[0] if heard.token_ns else None,
            last_token_ns=heard.token_ns[-1] if heard.token_ns else None,
            token_ns=tuple(heard.token_ns) or None,
            status=seen.status,
            error=error,
            stop_reason=heard.stop_reason,
            **self._dialect.usage(heard.usage),
        )

    async def _take(self, request: Request) -> httpx.AsyncBaseTransport:
        """The agent's idle connection, or a new one; those that have been idle too long are closed."""
        stale = self._clock() - IDLE_NS
        while self._idle and next(iter(self._idle.values()))[1] < stale:
            transport, _ = self._idle.pop(next(iter(self._idle)))
            await transport.aclose()
        kept = self._idle.pop(_agent(request), None)
        return self._transport() if kept is None else kept[0]

    async def _give_back(self, request: Request, transport: httpx.AsyncBaseTransport, *, whole: bool) -> None:
        if whole and _agent(request) not in self._idle:
            self._idle[_agent(request)] = transport, self._clock()
        else:
            await transport.aclose()


class _Seen:
    """What the exchange itself showed."""

    __slots__ = ("first_byte_ns", "status")

    def __init__(self) -> None:
        self.first_byte_ns: int | None = None
        self.status: int | None = None


def _agent(request: Request) -> tuple[str, str, int]:
    return request.call.session, request.call.agent, request.copy


def _transports(scheme: str) -> Callable[[], httpx.AsyncBaseTransport]:
    """Makes transports of one connection each that share one TLS context."""
    for late in ("httpcore", "anyio.streams.tls", "anyio._backends._asyncio"):
        import_module(late)  # else httpx imports them in the first call's time, 0.1 s
    context = httpx.create_ssl_context() if scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
    return lambda: httpx.AsyncHTTPTransport(verify=context, limits=limits)


def preflight(
    url: str, *, dialect: str = "messages", key_env: str | None = None, timeout_s: float = 5.0
) -> dict[str, Any]:
    """What listens at a URL, None where it does not say: ``server`` and its ``version``, its ``speed``, the cache's
    ``ttl``, ``block``, ``capacity`` and ``rules``, and the ``model`` if it serves a single one. InputError if nothing
    listens, or what does is no endpoint.
    """
    base = base_url(url)
    headers = endpoint_headers(url, dialect, key_env=key_env)
    where = f"endpoint {base.scheme}://{base.netloc.decode()}"
    with httpx.Client(headers=headers, timeout=timeout_s, trust_env=False) as client:
        try:
            answers = client.get(base.join("health")), client.get(base.join("v1/models"))
        except httpx.RequestError as error:
            raise InputError(f"{where}: {_unanswered(error, timeout_s)}") from error
    faults = [_unusable(answer) for answer in answers]
    if all(faults):
        raise InputError(f"{where}: is no endpoint: GET /v1/models gave {faults[1]}, GET /health {faults[0]}")
    health, models = map(_json, answers)
    served = models.get("data")
    names = [name for model in served if (name := string(model.get("id")))] if isinstance(served, list) else []
    ours = string(health.get("server")) is not None
    cache = part(health, "cache")
    return {
        "server": health.get("server") if ours else None,
        "version": health.get("version") if ours else None,
        "speed": health.get("speed") if ours else None,
        **{name: cache.get(name) for name in ("ttl", "block", "capacity", "rules")},
        "model": names[0] if len(names) == 1 else None,
    }


def _unanswered(error: httpx.RequestError, timeout_s: float) -> str:
    """Why there was no answer: nobody, nothing in time, no TLS, or something that is no HTTP."""
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, httpx.ConnectError):
        return "what listens there does not speak TLS as it should" if "SSL" in str(error) else "nothing answers there"
    return "what listens there gave no HTTP answer"


def _unusable(response: httpx.Response) -> str | None:
    """What of an answer no endpoint gives: a server's error, or a page. A path that is unknown or not allowed is."""
    if response.status_code >= 500 and response.status_code != 501:
        return f"status {response.status_code}"
    if response.is_success and not _json(response):
        return f"{response.headers.get('content-type') or 'something'} that is no JSON object"
    return None


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        value = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) and response.is_success else {}
