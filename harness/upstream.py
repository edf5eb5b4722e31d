"""The side of the upstream: what it is asked, an exchange each, and its answers, which go to the client as they are,
while a parser looks on.
"""

from __future__ import annotations

import asyncio
import ssl
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import httptools
import orjson

from keepwarm.harness.recorder import WALL_NS, Passing
from keepwarm.harness.routes import Route

if TYPE_CHECKING:
    from keepwarm.harness.proxy import Client

CONNECT_S = 30.0
UNREAD_BYTES = 1 << 15
"""So much of an answer waits to be read: all at once costs less than piece by piece."""
TOKEN = "x-keepwarm-token"
BUFFER = memoryview(bytearray(1 << 18))
"""Where each connection in turn reads what has come: a new one each time costs more than what stands in it."""


class Exchange:
    """A request on its way, and what waits to be written of it while there is nowhere to write. ``hasty`` where its
    client waits for a word before it sends the rest.
    """

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.trailers: list[tuple[bytes, bytes]] = []
        self.method = ""
        self.chunked = self.hasty = self.whole = self.answered = False
        self.waiting: list[bytes] = []
        self.route: Route | None = None
        self.upstream: Upstream | None = None
        self.passing: Passing | None = None
        self.refused: bytes | None = None

    def ended(self, error: str) -> None:
        """It ended before its answer did. What was asked is known as far as it came, unless the client left it."""
        passing, self.passing = self.passing, None
        if passing is not None:
            if not self.whole and error != "cancelled":
                passing.asked()
            passing.ended(error)


def refusal(status: int, reason: str, told: str, kind: str = "api_error") -> bytes:
    """An answer of the proxy's own."""
    body = orjson.dumps({"type": "error", "error": {"type": kind, "message": f"keepwarm record: {told}"}})
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


def head(exchange: Exchange, version: str, chosen: Route, path: str) -> bytes:
    """The request's head as the upstream gets it."""
    target = chosen.path + path[len(chosen.prefix) :]
    slash = "" if target.startswith("/") else "/"
    lines = [f"{exchange.method} {slash}{target} HTTP/{version}".encode("latin-1")]
    for name, value in exchange.headers:
        lower = name.lower()
        if lower != TOKEN.encode():
            lines.append(b"%b: %b" % (name, chosen.netloc.encode() if lower == b"host" else value))
    return b"\r\n".join((*lines, b"", b""))


class Upstream(asyncio.BufferedProtocol):
    """What the upstream sends goes to the client as it is, while a parser looks on. ``exchange`` is what it was asked
    and has not answered; ``begun`` says whether it has begun to, ``broken`` that what it says is no answer.
    """

    def __init__(self, client: Client, route: Route) -> None:
        self.route = route
        self.ready = self.full = False
        self.exchange: Exchange | None = None
        self._client = client
        self.transport: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._gone = False
        self._fields: dict[bytes, bytes] = {}
        self.on_header = self._fields.__setitem__
        self.forget()

    def forget(self) -> None:
        """What it was asked is over; the next answer begins anew."""
        self.exchange = None
        self.begun = self.broken = self._over = False
        self._status = self._unread = 0

    def ask(self, exchange: Exchange) -> None:
        """Something is asked; what comes next is its answer. The body goes to the recorder straight from the parser."""
        self.exchange = exchange
        self.on_body = exchange.passing.coming.append if exchange.passing else None
        self._parser = httptools.HttpResponseParser(self)

    def connect(self, tls: ssl.SSLContext | None) -> None:
        """Connect; the client is told when that is done, or why it failed."""
        self._connecting = asyncio.get_running_loop().create_task(self._connect(tls))

    async def _connect(self, tls: ssl.SSLContext | None) -> None:
        loop, route = asyncio.get_running_loop(), self.route
        try:
            async with asyncio.timeout(CONNECT_S):
                await loop.create_connection(lambda: self, route.host, route.port, ssl=tls if route.tls else None)
        except (OSError, TimeoutError, UnicodeError) as error:
            told = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
            self._client.unreachable(self, f"cannot be reached: {told}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self._gone:
            self.transport.abort()
            return
        self.ready = True
        self.go_on()
        self._client.go_on()

    def pause_writing(self) -> None:
        self.full = True
        self._client.transport.pause_reading()

    def resume_writing(self) -> None:
        self.full = False
        self._client.resume()

    def go_on(self) -> None:
        """Take more from the upstream, unless the client reads too slowly."""
        if self.ready and self._client.slow:
            self.transport.pause_reading()
        elif self.ready:
            self.transport.resume_reading()

    def abort(self) -> None:
        """The client is gone."""
        self._gone = True
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
        if self.transport is not None:
            self.transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        data, exchange = bytes(BUFFER[:nbytes]), self.exchange
        if exchange is None:
            self._client.unasked(self, data)
            return
        if not self.broken:
            passing = exchange.passing
            if passing is not None:
                passing.coming.append(monotonic_ns() + WALL_NS)
                self._unread += nbytes
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserUpgrade, httptools.HttpParserError):
                self.broken = not self._over
            if self._unread > UNREAD_BYTES and passing is not None:
                self._unread = 0
                passing.read()
        if self._over:
            self._end(data, exchange)
        else:
            self._client.transport.write(data)

    def _end(self, data: bytes, exchange: Exchange) -> None:
        """The answer is over: it is written down before the client can know."""
        passing = exchange.passing
        if passing is not None:
            if not exchange.whole:
                passing.asked()
            if not passing.ready(lambda: self._end(data, exchange)):
                self.transport.pause_reading()
                return
            passing.ended()
            exchange.passing = None
        self.forget()
        if self._client.transport.is_closing():
            return
        self._client.transport.write(data)
        self.go_on()
        self._client.answered()
        if not self.ready:
            self._client.failed(self, None)

    # What the parser tells.

    def on_message_begin(self) -> None:
        if self._over:
            raise ValueError("more than one answer")
        self._fields.clear()

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if 100 <= self._status < 200:
            return
        self.begun = True
        self._headers = {name.lower(): value for name, value in self._fields.items()}
        exchange = self.exchange
        assert exchange is not None
        if exchange.passing is not None:
            exchange.passing.answering(self._status, self._headers)
        self._over = exchange.method == "HEAD"

    def on_message_complete(self) -> None:
        self._over = not 100 <= self._status < 200

    def connection_lost(self, exc: Exception | None) -> None:
        self.ready = False
        if self._gone or self._over:
            return
        until_eof = self.begun and not {b"content-length", b"transfer-encoding"} & self._headers.keys()
        if exc is None and until_eof and self.exchange is not None:
            self._over = True
            self._end(b"", self.exchange)
        else:
            self._client.failed(self, exc)
