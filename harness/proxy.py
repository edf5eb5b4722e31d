"""A reverse proxy that is not noticed: bodies go through byte for byte, and each client connection has one of its own
to every upstream it speaks to, so that keep-alive, resets and closes are what they would be without it.

An answer's bytes are passed on as they came; a request's head is written anew, for its host is another.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httptools

from keepwarm.harness.recorder import Recorder, dialect_of
from keepwarm.harness.routes import Route, choose
from keepwarm.harness.upstream import BUFFER, TOKEN, Exchange, Upstream, head, refusal

WAITING_BYTES = 1 << 20
"""So much of what a client sends waits for its upstream; then the client has to wait."""
MOST_HEAD_BYTES = 1 << 20
LINGER_S = 5.0
"""So long a client that was answered before it had asked to the end may go on sending."""


@dataclass
class Proxy:
    """What all connections share. ``token`` is what a client must show; None where none is asked for."""

    routes: Sequence[Route]
    recorder: Recorder
    token: str | None = None
    tls: ssl.SSLContext | None = None
    clients: set[Client] = field(default_factory=set)

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
        return hmac.compare_digest(shown.encode("latin-1"), os.fsencode(self.token)), path


class Client(asyncio.BufferedProtocol):
    """The side of the client: requests in, answers out, one exchange at a time."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.transport: Any = None
        self.exchanges: deque[Exchange] = deque()
        self.slow = False
        self._upstreams: dict[Route, Upstream] = {}
        self._parser = httptools.HttpRequestParser(self)
        self._coming = Exchange()
        self._raw = False
        self._held = self._heading = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.proxy.clients.add(self)
        if len(self.proxy.routes) == 1:
            self._upstream(self.proxy.routes[0])

    def connection_lost(self, exc: Exception | None) -> None:
        self.proxy.clients.discard(self)
        self._part("cancelled")

    def get_buffer(self, sizehint: int) -> memoryview:
        return BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        data = BUFFER[:nbytes]  # a view: the parser takes copies of what it hands on
        if self._raw:
            self._tunnel(bytes(data))
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._raw = True
            self._tunnel(bytes(data[upgrade.args[0] :]))
        except httptools.HttpParserError:
            self._malformed()
        else:
            if not self._coming.method:
                self._heading += len(data)
                if self._heading > MOST_HEAD_BYTES:
                    self._malformed()
        self.go_on()

    def _tunnel(self, data: bytes) -> None:
        """What comes after an upgrade; what comes when all is over is let go."""
        if data and self.exchanges:
            self._pass(self.exchanges[-1], data)
            self.go_on()

    def _malformed(self) -> None:
        """What comes is no HTTP, or is none any more: then its upstream waits in vain, if it is at it already."""
        exchange = self.exchanges.pop() if self.exchanges and not self.exchanges[-1].whole else Exchange()
        begun = exchange.upstream is not None and exchange.upstream.begun
        if exchange.upstream is not None:
            exchange.upstream.abort()
        exchange.ended("cancelled")
        if begun or exchange.answered:
            self._leave()
            return
        exchange.hasty = True
        exchange.refused = refusal(400, "Bad Request", "not an HTTP request", "invalid_request_error")
        self.exchanges.append(exchange)
        self.transport.pause_reading()
        self.go_on()

    # What the parser tells.

    def on_message_begin(self) -> None:
        self._coming, self._heading = Exchange(), 0
        if not self.exchanges:
            return
        first = self.exchanges[0]
        if first.whole and first.upstream is not None and first.upstream.broken and len(self.exchanges) == 1:
            first.ended("other")  # its client knows where it ended
            first.upstream.forget()
            self._next()
        else:
            self.transport.pause_reading()

    def on_url(self, url: bytes) -> None:
        self._coming.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        (self._coming.trailers if self._coming.method else self._coming.headers).append((name, value))

    def on_headers_complete(self) -> None:
        exchange = self._coming
        exchange.method = self._parser.get_method().decode()
        upgrade = self._parser.should_upgrade()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers}
        exchange.chunked = "transfer-encoding" in headers
        exchange.hasty = upgrade or "expect" in headers
        self.exchanges.append(exchange)
        admitted, path = self.proxy.admits(exchange.url.decode("latin-1"), headers)
        chosen = choose(self.proxy.routes, path, headers)
        dialect = dialect_of(path)
        if not admitted:
            exchange.refused = refusal(401, "Unauthorized", f"expected a token: {TOKEN}", "authentication_error")
        elif chosen is None:
            exchange.refused = refusal(404, "Not Found", "no upstream for this path", "not_found_error")
        elif dialect == "responses" and "websocket" in headers.get("upgrade", "").lower():
            exchange.refused = refusal(426, "Upgrade Required", "calls are recorded over HTTP, not WebSocket")
        else:
            exchange.route = chosen
            if dialect and exchange.method == "POST":
                exchange.passing = self.proxy.recorder.passing(dialect, headers)
            self._pass(exchange, head(exchange, self._parser.get_http_version(), chosen, path))

    def on_body(self, data: bytes) -> None:
        exchange = self._coming
        self._pass(exchange, b"%x\r\n%b\r\n" % (len(data), data) if exchange.chunked else data)
        if exchange.passing is not None:
            exchange.passing.request(data)

    def on_message_complete(self) -> None:
        exchange = self._coming
        exchange.whole = True
        if exchange.chunked:
            self._pass(exchange, b"0\r\n" + b"".join(b"%b: %b\r\n" % pair for pair in exchange.trailers) + b"\r\n")
        if exchange.refused is None:
            self.go_on()
        if exchange.passing is not None:
            self.proxy.recorder.soon(exchange.passing.asked)
        if exchange.refused is not None:
            exchange.ended("reset")
        elif exchange.answered:
            self._next()

    # Towards the upstream.

    def _upstream(self, chosen: Route) -> Upstream:
        upstream = self._upstreams.get(chosen)
        if upstream is None:
            upstream = self._upstreams[chosen] = Upstream(self, chosen)
            upstream.connect(self.proxy.tls)
        return upstream

    def _pass(self, exchange: Exchange, data: bytes) -> None:
        """A part of a request waits for its turn, which may be at once; of one that is refused nothing is wanted."""
        if exchange.refused is None:
            exchange.waiting.append(data)
            self._held += len(data)
            if self._held > WAITING_BYTES:
                self.transport.pause_reading()

    def go_on(self) -> None:
        """Do what can be done for the first exchange: refuse it, or write what has waited."""
        exchange = self.exchanges[0] if self.exchanges else None
        if exchange is None:
            return
        if exchange.refused is not None:
            if exchange.whole or exchange.hasty:
                self.transport.write(exchange.refused)
                self._leave()
            return
        if exchange.upstream is None and exchange.route is not None:
            exchange.upstream = self._upstream(exchange.route)
            exchange.upstream.ask(exchange)
        if exchange.upstream is not None and exchange.upstream.ready and exchange.waiting:
            exchange.upstream.transport.write(b"".join(self._waited(exchange)))
            self.resume()

    def _waited(self, exchange: Exchange) -> list[bytes]:
        """What waited of an exchange waits no longer."""
        waited, exchange.waiting = exchange.waiting, []
        self._held -= sum(map(len, waited))
        return waited

    def resume(self) -> None:
        """Take more from the client, unless it is ahead of its answers, or of its upstream."""
        upstream = self.exchanges[0].upstream if self.exchanges else None
        full = self._held > WAITING_BYTES or (upstream is not None and upstream.full)
        if len(self.exchanges) < 2 and not full and not self.transport.is_closing():
            self.transport.resume_reading()

    def answered(self) -> None:
        """The first exchange's answer is over, and so is the exchange once its request is."""
        self.exchanges[0].answered = True
        if self.exchanges[0].whole:
            self._next()

    def _next(self) -> None:
        self.exchanges.popleft()
        if self._raw:  # an upgrade that was not taken
            self._raw, self._parser = False, httptools.HttpRequestParser(self)
        self.go_on()
        self.resume()

    def unasked(self, upstream: Upstream, data: bytes) -> None:
        """An upstream says what nobody asked for: the client's to judge, unless another is speaking to it."""
        if self.exchanges and self.exchanges[0].upstream is not upstream:
            upstream.abort()
            self._upstreams.pop(upstream.route, None)
        else:
            self.transport.write(data)

    def unreachable(self, upstream: Upstream, why: str) -> None:
        """An upstream is not there: who has asked it is told."""
        self._upstreams.pop(upstream.route, None)
        exchange = self.exchanges[0] if self.exchanges else None
        if exchange is not None and exchange.upstream is upstream:
            exchange.refused = refusal(502, "Bad Gateway", f"upstream {upstream.route.netloc}: {why}")
            self._waited(exchange)
            if exchange.whole or exchange.hasty:
                exchange.ended("reset")
            self.go_on()
            self.resume()

    def failed(self, upstream: Upstream, exc: Exception | None) -> None:
        """An upstream has closed, or was lost. The client sees what it would have seen."""
        self._upstreams.pop(upstream.route, None)
        exchange = self.exchanges[0] if self.exchanges else None
        if exchange is not None and exchange.upstream is upstream:
            if exc is not None and not exchange.answered:
                exchange.ended("reset")
                self.reset()
            else:
                self._leave()
        elif exchange is None and not self._upstreams:
            self._leave()

    def _leave(self) -> None:
        """Close. A client that is still sending gets time to hear why: closed at once, it would hear a reset."""
        self._raw = True
        if all(exchange.whole for exchange in self.exchanges):
            self.transport.close()
        else:
            self.transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)
        self._part("reset")
        self.transport.resume_reading()

    def _part(self, error: str) -> None:
        """No more exchanges."""
        for exchange in self.exchanges:
            exchange.ended(error)
        self.exchanges.clear()
        for upstream in self._upstreams.values():
            upstream.abort()

    def reset(self) -> None:
        """End the connection as a reset does."""
        sock = self.transport.get_extra_info("socket")
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def pause_writing(self) -> None:
        self.slow = True
        for upstream in self._upstreams.values():
            upstream.go_on()

    def resume_writing(self) -> None:
        self.slow = False
        for upstream in self._upstreams.values():
            upstream.go_on()
