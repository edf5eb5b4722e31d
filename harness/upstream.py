"""The side of the upstream: what it sends goes to the client as it is, whatever it is, while a parser looks on."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import httptools

from keepwarm.harness.routes import Route

if TYPE_CHECKING:
    from keepwarm.harness.proxy import Client, Exchange

CONNECT_S = 30.0


class Upstream(asyncio.Protocol):
    """The side of the upstream: what it sends goes to the client as it is, while a parser looks on."""

    def __init__(self, client: Client, route: Route) -> None:
        self.route = route
        self.ready = False
        self._client = client
        self._transport: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._gone = False
        self._new_parser()

    def _new_parser(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._begun = self._over = self._alive = self._broken = False
        self._status = 0

    def connect(self, tls: ssl.SSLContext | None) -> None:
        """Connect; the client is told when that is done, or why it failed."""
        self._connecting = asyncio.get_running_loop().create_task(self._connect(tls))

    async def _connect(self, tls: ssl.SSLContext | None) -> None:
        loop, route = asyncio.get_running_loop(), self.route
        try:
            async with asyncio.timeout(CONNECT_S):
                await loop.create_connection(lambda: self, route.host, route.port, ssl=tls if route.tls else None)
        except (OSError, TimeoutError) as error:
            told = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
            self._client.failed(self, f"cannot be reached: {told}", None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._gone:
            self._transport.abort()
            return
        self.ready = True
        self._client.connected()

    def write(self, data: bytes) -> None:
        """Send to the upstream."""
        self._transport.write(data)

    def pause_writing(self) -> None:
        self._client.transport.pause_reading()

    def resume_writing(self) -> None:
        self._client.resume()

    def pause(self) -> None:
        """The client reads too slowly."""
        self._transport.pause_reading()

    def go_on(self) -> None:
        """The client reads again."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """The client is gone."""
        self._gone = True
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        exchange = self._client.exchanges[0] if self._client.exchanges else None
        if exchange is None or exchange.upstream is not self:
            self._transport.abort()  # nobody asked
            return
        if not self._broken:
            self._look_on(data, exchange)
        if self._over:
            self._end(data, exchange)
        else:
            self._client.transport.write(data)

    def _look_on(self, data: bytes, exchange: Exchange) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self._broken = not self._over
        passing = exchange.passing
        if passing is not None:
            for piece in self._pieces:
                passing.answer(piece)
        self._pieces.clear()

    def _end(self, data: bytes, exchange: Exchange) -> None:
        """The answer is over: it is written down before the client can know."""
        passing = exchange.passing
        if passing is not None:
            if not passing.ready(lambda: self._end(data, exchange)):
                self._transport.pause_reading()
                return
            passing.ended()
            exchange.passing = None
        alive = self._alive
        self._new_parser()
        if self._client.transport.is_closing():
            return
        self._client.transport.write(data)
        self._transport.resume_reading()
        self._client.answered(alive)

    # What the parser tells.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if 100 <= self._status < 200:
            return
        self._begun = True
        exchange = self._client.exchanges[0]
        if exchange.passing is not None:
            exchange.passing.answering(self._status, self._headers)
        if exchange.method == "HEAD":
            self._over, self._alive = True, self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200:
            self._headers = {}
            return
        self._over, self._alive = True, self._parser.should_keep_alive()

    def eof_received(self) -> bool | None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.ready = False
        exchange = self._client.exchanges[0] if self._client.exchanges else None
        until_eof = self._begun and not {"content-length", "transfer-encoding"} & self._headers.keys()
        if exc is None and until_eof and exchange is not None and exchange.upstream is self:
            self._alive = False
            self._end(b"", exchange)
        elif not self._gone:
            self._client.failed(self, None, exc)
