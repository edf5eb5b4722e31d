"""A reverse proxy that is not noticed: bodies go through byte for byte, and each client connection has one of its own
to every upstream it speaks to, so that keep-alive, resets and closes are what they would be without it.

An answer's bytes are passed on as they came; a request's head is written anew, for its host is another.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httptools
import orjson

from keepwarm.harness.recorder import Passing, Recorder, dialect_of
from keepwarm.harness.routes import Route, choose, target
from keepwarm.harness.upstream import Upstream

TOKEN = "x-keepwarm-token"
WAITING_BYTES = 1 << 20
"""So much of what a client sends waits for its upstream; then the client has to wait."""


class Proxy:
    """What all connections share. ``token`` is what a client must show; None where none is asked for."""

    def __init__(
        self,
        routes: Sequence[Route],
        recorder: Recorder,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.routes = routes
        self.recorder = recorder
        self.token = token
        self.tls = tls
        self.clients: set[Client] = set()

    def client(self) -> Client:
        """The protocol of a client that connects."""
        return Client(self)

    def admits(self, path: str, headers: dict[str, str]) -> tuple[bool, str]:
        """Whether a request may pass, and its path without the token."""
        if self.token is None:
            return True, path
        shown = headers.pop(TOKEN, None)
        if shown is None:
            shown, _, rest = path.removeprefix("/").partition("/")
            path = f"/{rest}"
        return hmac.compare_digest(shown.encode(), self.token.encode()), path


class Exchange:
    """A request on its way, and what waits to be written of it while there is nowhere to write."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.trailers: list[tuple[bytes, bytes]] = []
        self.method = ""
        self.chunked = False
        self.upgrade = False
        self.whole = False
        self.waiting: list[bytes] = []
        self.upstream: Upstream | None = None
        self.passing: Passing | None = None
        self.refused: bytes | None = None


def _refusal(status: int, reason: str, told: str, kind: str = "api_error") -> bytes:
    """An answer of the proxy's own."""
    body = orjson.dumps({"type": "error", "error": {"type": kind, "message": f"keepwarm record: {told}"}})
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


class Client(asyncio.Protocol):
    """The side of the client: requests in, answers out, one exchange at a time."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.transport: Any = None
        self.exchanges: deque[Exchange] = deque()
        self._upstreams: dict[Route, Upstream] = {}
        self._parser = httptools.HttpRequestParser(self)
        self._coming: Exchange | None = None
        self._tunnel = False
        self._held = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.proxy.clients.add(self)
        if len(self.proxy.routes) == 1:
            self._upstream(self.proxy.routes[0])

    def connection_lost(self, exc: Exception | None) -> None:
        self.proxy.clients.discard(self)
        for exchange in self.exchanges:
            _ended(exchange, "cancelled")
        self.exchanges.clear()
        for upstream in self._upstreams.values():
            upstream.abort()

    def data_received(self, data: bytes) -> None:
        if self._tunnel:
            self._pass(self.exchanges[0], data)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._tunnel = True
            rest = data[upgrade.args[0] :]
            if rest and self.exchanges and self.exchanges[0].refused is None:
                self._pass(self.exchanges[0], rest)
        except httptools.HttpParserError:
            self._malformed()

    def _malformed(self) -> None:
        exchange = Exchange()
        exchange.whole, exchange.refused = (
            True,
            _refusal(400, "Bad Request", "not an HTTP request", "invalid_request_error"),
        )
        self.exchanges.append(exchange)
        self.transport.pause_reading()
        self._go_on()

    # What the parser tells.

    def on_message_begin(self) -> None:
        self._coming = Exchange()
        if self.exchanges:
            self.transport.pause_reading()

    def on_url(self, url: bytes) -> None:
        assert self._coming is not None
        self._coming.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._coming
        assert exchange is not None
        (exchange.trailers if exchange.method else exchange.headers).append((name, value))

    def on_headers_complete(self) -> None:
        exchange = self._coming
        assert exchange is not None
        exchange.method = self._parser.get_method().decode()
        exchange.upgrade = self._parser.should_upgrade()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers}
        exchange.chunked = "transfer-encoding" in headers
        self.exchanges.append(exchange)
        admitted, path = self.proxy.admits(exchange.url.decode("latin-1"), headers)
        chosen = choose(self.proxy.routes, path, headers)
        dialect = dialect_of(exchange.method, path)
        if not admitted:
            exchange.refused = _refusal(401, "Unauthorized", f"expected a token: {TOKEN}", "authentication_error")
        elif chosen is None:
            exchange.refused = _refusal(404, "Not Found", "no upstream for this path", "not_found_error")
        elif exchange.upgrade and dialect_of("POST", path) == "responses":
            exchange.refused = _refusal(426, "Upgrade Required", "calls are recorded over HTTP, not WebSocket")
        else:
            exchange.upstream = self._upstream(chosen)
            exchange.passing = self.proxy.recorder.passing(dialect, headers) if dialect else None
            self._pass(exchange, _head(exchange, self._parser.get_http_version(), chosen, path))
        if exchange.refused is not None:
            self._go_on()

    def on_body(self, data: bytes) -> None:
        exchange = self._coming
        assert exchange is not None
        if exchange.refused is None:
            self._pass(exchange, b"%x\r\n%b\r\n" % (len(data), data) if exchange.chunked else data)
            if exchange.passing is not None:
                exchange.passing.request(data)

    def on_message_complete(self) -> None:
        exchange = self._coming
        assert exchange is not None
        exchange.whole = True
        if exchange.refused is not None:
            self._go_on()
            return
        if exchange.chunked:
            self._pass(exchange, b"0\r\n" + b"".join(b"%b: %b\r\n" % pair for pair in exchange.trailers) + b"\r\n")
        if exchange.passing is not None:
            exchange.passing.asked()

    # Towards the upstream.

    def _upstream(self, chosen: Route) -> Upstream:
        upstream = self._upstreams.get(chosen)
        if upstream is None:
            upstream = self._upstreams[chosen] = Upstream(self, chosen)
            upstream.connect(self.proxy.tls)
        return upstream

    def _pass(self, exchange: Exchange, data: bytes) -> None:
        """Send a part of a request on; it waits while another exchange is under way, or nothing is connected."""
        if exchange.upstream is None:
            return
        if exchange is self.exchanges[0] and exchange.upstream.ready and not exchange.waiting:
            exchange.upstream.write(data)
            return
        exchange.waiting.append(data)
        self._held += len(data)
        if self._held > WAITING_BYTES:
            self.transport.pause_reading()

    def _go_on(self) -> None:
        """Do what can be done for the first exchange: refuse it, or write what has waited."""
        exchange = self.exchanges[0] if self.exchanges else None
        if exchange is None:
            return
        if exchange.refused is not None:
            if exchange.whole or exchange.upgrade:
                self.transport.write(exchange.refused)
                self.transport.close()
            return
        if exchange.upstream is not None and exchange.upstream.ready:
            waiting, exchange.waiting = exchange.waiting, []
            self._held -= sum(map(len, waiting))
            for data in waiting:
                exchange.upstream.write(data)
            self.resume()

    def connected(self) -> None:
        """An upstream is there."""
        self._go_on()

    def resume(self) -> None:
        """Take more from the client, unless it is ahead of its answers."""
        if len(self.exchanges) < 2 and self._held <= WAITING_BYTES and not self.transport.is_closing():
            self.transport.resume_reading()

    def answered(self, keep_alive: bool) -> None:
        """The first exchange is over."""
        self.exchanges.popleft()
        if not keep_alive or self._tunnel:
            self.transport.close()
            return
        self._go_on()
        self.resume()

    def failed(self, upstream: Upstream, why: str | None, exc: Exception | None) -> None:
        """The upstream is gone: ``why`` where it was never there. The client sees what it would have seen."""
        self._upstreams.pop(upstream.route, None)
        exchange = self.exchanges[0] if self.exchanges else None
        if exchange is not None and exchange.upstream is upstream:
            _ended(exchange, "reset")
            exchange.upstream = None
            if why is not None:
                exchange.refused = _refusal(502, "Bad Gateway", f"upstream {upstream.route.netloc}: {why}")
                self._go_on()
                return
        elif why is not None:
            return  # nobody asked it for anything yet
        if exc is not None:
            self.reset()
        elif not self._upstreams or exchange is not None:
            self.transport.close()

    def reset(self) -> None:
        """End the connection as a reset does."""
        sock = self.transport.get_extra_info("socket")
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def pause_writing(self) -> None:
        if self.exchanges and self.exchanges[0].upstream is not None:
            self.exchanges[0].upstream.pause()

    def resume_writing(self) -> None:
        if self.exchanges and self.exchanges[0].upstream is not None:
            self.exchanges[0].upstream.go_on()


def _head(exchange: Exchange, version: str, chosen: Route, path: str) -> bytes:
    """The request's head as the upstream gets it."""
    lines = [f"{exchange.method} {target(chosen, path)} HTTP/{version}".encode("latin-1")]
    for name, value in exchange.headers:
        lower = name.lower()
        if lower == b"host":
            lines.append(name + b": " + chosen.netloc.encode())
        elif lower != TOKEN.encode():
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _ended(exchange: Exchange, error: str | None) -> None:
    """An exchange ended before its answer did."""
    passing, exchange.passing = exchange.passing, None
    if passing is not None and passing.ready(lambda: _late(passing, error)):
        passing.ended(error)


def _late(passing: Passing, error: str | None) -> None:
    if passing.ready(lambda: None):
        passing.ended(error)
