"""HttpEndpoint sends planned calls to an endpoint over HTTP and reads the answers as they stream in.

The hot path calls an httpx transport with prepared requests. Each agent has a connection of its own, kept as long as a
real client keeps an idle one: httpx's shared pool does work that grows with the square of its connections.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies

import httpx
import orjson

from keepwarm.replayers.address import Address, base_url, more_headers, secret, trusting
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.chat import CHAT
from keepwarm.replayers.completions import COMPLETIONS
from keepwarm.replayers.endpoint import Answer, Request
from keepwarm.replayers.hearing import Hearing
from keepwarm.replayers.hints import nvext, session_headers
from keepwarm.replayers.messages import MESSAGES
from keepwarm.replayers.responses import RESPONSES
from keepwarm.replayers.tokens import Costs
from keepwarm.replayers.transport import Connection, head_of
from keepwarm.replayers.writer import Buffer, Writer, body, buffers

IDLE_NS = 4_000_000_000
"""How long an idle connection is kept: less than the 5 s after which common servers close theirs."""

PROBE = ("", "", -1)
"""The agent whose connection a request has that is no call of a trace."""

LATE = "late"
"""With this a call is cancelled whose time is over."""

Agent = tuple[str, str, int]


DIALECTS = {"messages": MESSAGES, "chat": CHAT, "responses": RESPONSES, "completions": COMPLETIONS}


def reach(
    url: str,
    dialect: str,
    *,
    key_env: str | None = None,
    key_file: str | None = None,
    header: Sequence[str] = (),
    ca: str | None = None,
    transport: str = "own",
) -> Address:
    """Where an endpoint is, with what its dialect's API wants in every request. The key is the one that was named; or
    else, for its vendor's own hosts over https and no others, what its vendor's variable holds.
    """
    given, base = DIALECTS[dialect], base_url(url)
    named = bool(key_env or key_file)
    anthropic, openai = (f".{base.host}".endswith(vendor) for vendor in (".anthropic.com", ".openai.com"))
    theirs = base.scheme == "https" and (anthropic if dialect == "messages" else openai)
    usual = given.key_env if theirs and not named else None
    key = secret("an API key", key_env or usual, key_file, must=named) if named or usual else None
    headers = given.headers(key)
    if key and not (anthropic and dialect == "messages"):
        headers["authorization"] = f"Bearer {key}"  # the only one that servers of many dialects look at
    return Address(url, {**headers, **more_headers(header)}, trusting(ca), transport)


@dataclass(eq=False)
class HttpEndpoint:
    """An endpoint at an address. ``clock`` gives the ns that answers are timed in; ``timeout_s`` bounds a whole call;
    ``extra`` are fields of every body.

    Prompts are written as ``costs`` tell. ``accepts`` is what it takes and does not refuse: ``tools`` at all;
    ``no_tool_call``, that none is called; ``exact_output``, an answer's exact length (``min_tokens``, ``ignore_eos``);
    ``cache_key``, a ``prompt_cache_key``; and ``max_completion_tokens`` where it refuses ``max_tokens``. Without
    ``writes_told`` what it says of cache writes is not taken for true; ``hints`` is ``off``, ``recorded`` or
    ``derived``. ``salt`` makes all texts and sessions others; ``cache_salt`` is the server's own way to that. With
    ``live`` answers are kept for later prompts. ``transport`` makes a connection's transport.
    """

    address: Address
    _: KW_ONLY
    dialect: str
    model: str
    clock: Callable[[], int]
    stream: bool = True
    timeout_s: float = 600.0
    costs: Costs = field(default_factory=Costs)
    accepts: frozenset[str] = frozenset(("tools",))
    writes_told: bool = True
    hints: str = "recorded"
    salt: str = ""
    cache_salt: str | None = None
    live: bool = False
    extra: Mapping[str, Any] | None = None
    transport: Callable[[], httpx.AsyncBaseTransport] | None = None

    def __post_init__(self) -> None:
        address, stream = self.address, self.stream
        self._spoken = DIALECTS[self.dialect]
        self._url = base_url(address.url).join(self._spoken.path.removeprefix("/"))
        self._headers = httpx.Headers(
            {
                "content-type": "application/json",
                "accept": "text/event-stream" if stream else "application/json",
                "accept-encoding": "identity",
                "user-agent": "keepwarm",
                **address.headers,
            }
        )
        self._head_bytes = head_of(httpx.Request("POST", self._url, headers=self._headers))
        self._fixed: dict[str, Any] = {"model": self.model, "stream": stream}
        if stream and self.dialect in ("chat", "completions"):
            self._fixed["stream_options"] = {"include_usage": True}
        if self.dialect == "responses":
            self._fixed["store"] = False
        if self.cache_salt:
            self._fixed["cache_salt"] = self.cache_salt
        self._fixed |= self.extra or {}
        self.writer = Writer(self.costs, salt=self.salt, ids=self.dialect == "completions")
        self._session_salt = self.salt or self.cache_salt or ""
        stock = stock_transports(address.tls) if address.transport == "httpx" else None
        self._transport = self.transport or stock or transports(self._url, address.tls, self.clock)
        self._idle: dict[Agent, tuple[httpx.AsyncBaseTransport, int]] = {}

    async def send(self, request: Request) -> Answer:
        """Send one request and wait for the whole answer; what goes wrong stands in the answer."""
        call = request.call
        fields: dict[str, Any] = {}
        if "cache_key" in self.accepts:
            fields["prompt_cache_key"] = f"{self._session_salt}{call.session}-{request.copy}"
        if hinted := nvext(call, request.output, self.hints):
            fields["nvext"] = {**self._fixed.get("nvext", {}), **hinted}
        agent = call.session, call.agent, request.copy
        kept = {} if request.kept is None else request.kept
        written = kept[agent] = self.writer.write(request.prompt, kept.get("said"), kept.get(agent))
        pieces = buffers(self._spoken, self._head(request.output or 1, fields), written, call.breakpoints)
        headers = session_headers(self.dialect, call, request.copy, self._session_salt)
        answer = await self._post(pieces, headers, agent)
        if answer.said is not None:
            kept.setdefault("said", {})[call.call] = answer.said
        return answer

    async def ask(
        self, blocks: Sequence[Block], *, output: int = 1, fields: Mapping[str, Any] | None = None, agent: Agent = PROBE
    ) -> Answer:
        """Ask for the answer to a prompt, with ``fields`` of its own, on an agent's connection."""
        return await self._post([body(self._spoken, self._head(output, fields or {}), blocks)], {}, agent)

    async def _post(self, body: Sequence[Buffer], headers: Mapping[str, str], agent: Agent) -> Answer:
        hearing = Hearing(self._spoken.reader(), streamed=self.stream)
        if self.live:
            hearing.reader.heard.text = []
        transport = await self._take(agent)
        request = self._request(transport, body, headers, hearing)
        error: str | None = "reset"
        task = asyncio.current_task()
        assert task is not None
        limit = asyncio.get_running_loop().call_later(self.timeout_s, task.cancel, LATE)
        sent_ns = self.clock()
        try:
            await self._exchange(transport, request, hearing)
            error = hearing.end()
        except asyncio.CancelledError as cancelled:
            if cancelled.args != (LATE,) or task.uncancel() > 0:
                raise
            error = "timeout"
        except httpx.TimeoutException:
            error = "timeout"
        except (httpx.TransportError, OSError):
            error = "reset"
        finally:
            limit.cancel()
            done_ns = self.clock()
            await self._give_back(agent, transport, whole=error is None)
        return hearing.answer(self.dialect, sent_ns, done_ns, error, self.address.headers, self.writes_told)

    def _request(
        self, transport: httpx.AsyncBaseTransport, body: Sequence[Buffer], headers: Mapping[str, str], hearing: Hearing
    ) -> httpx.Request:
        """A request ready to be sent. For the own transport it is its only one, with its head in bytes."""
        if not isinstance(transport, Connection):
            return httpx.Request("POST", self._url, headers={**self._headers, **headers}, content=b"".join(body))
        more = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()
        transport.request.extensions = {"listener": hearing, "head": self._head_bytes + more, "buffers": body}
        return transport.request

    async def aclose(self) -> None:
        """Close the connections."""
        while self._idle:
            await self._idle.popitem()[1][0].aclose()

    def _head(self, output: int, fields: Mapping[str, Any]) -> bytes:
        """A body's parameters."""
        limit = "max_completion_tokens" if "max_completion_tokens" in self.accepts else self._spoken.limit
        head = {**self._fixed, limit: output}
        if "exact_output" in self.accepts:
            head |= {"min_tokens": output, "ignore_eos": True}
        if "no_tool_call" in self.accepts and self._spoken.no_tool is not None:
            head["tool_choice"] = self._spoken.no_tool
        told: bytes = orjson.dumps({**head, **fields})
        return told

    async def _exchange(self, transport: httpx.AsyncBaseTransport, request: httpx.Request, hearing: Hearing) -> None:
        """One request and its answer. The own transport has told all by then; of another it is read here."""
        response = await transport.handle_async_request(request)
        if hearing.status is not None:
            return
        hearing.begin(response.status_code, response.headers.raw, self.clock())
        try:
            async for chunk in response.stream:  # type: ignore[union-attr]
                hearing.data(chunk, self.clock())
        finally:
            await response.aclose()

    async def _take(self, agent: Agent) -> httpx.AsyncBaseTransport:
        """The agent's idle connection, or a new one; those that have been idle too long are closed."""
        stale = self.clock() - IDLE_NS
        while self._idle and next(iter(self._idle.values()))[1] < stale:
            await self._idle.pop(next(iter(self._idle)))[0].aclose()
        kept = self._idle.pop(agent, None)
        return self._transport() if kept is None else kept[0]

    async def _give_back(self, agent: Agent, transport: httpx.AsyncBaseTransport, *, whole: bool) -> None:
        if whole and agent not in self._idle:
            self._idle[agent] = transport, self.clock()
        else:
            await transport.aclose()


def transports(url: httpx.URL, tls: ssl.SSLContext | None, clock: Callable[[], int]) -> Callable[[], Connection]:
    """Makes connections to a host that share one TLS context."""
    if tls is None and url.scheme == "https":
        tls = httpx.create_ssl_context()
    return lambda: Connection(url, tls, clock)


def stock_transports(tls: ssl.SSLContext | None) -> Callable[[], httpx.AsyncHTTPTransport]:
    """Makes httpx's own transports instead: slower, with HTTP/2 where the package h2 is there, and proxies as the
    environment says.
    """
    for late in ("httpcore", "anyio.streams.tls", "anyio._backends._asyncio"):
        import_module(late)  # else httpx imports them in the first call's time, 0.1 s
    context = tls or httpx.create_ssl_context()
    proxies = getproxies()
    proxy = proxies.get("https") or proxies.get("all") or proxies.get("http")
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
    http2 = find_spec("h2") is not None
    return lambda: httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy, http2=http2)
