"""Connection is one kept HTTP/1.1 connection, as an httpx transport: own code, because this is the hot path.

What comes in is told to a listener from the very callback that read it, stamped with the time at which the kernel had
the last of it, where the platform tells that: a program that reads a little late still knows when a token came. Tokens
that came together since it read last have one time.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from time import time_ns
from typing import Any

import httptools
import httpx

from keepwarm.replayers.hearing import Hearing

CONNECT_S = 30.0
READ_BYTES = 1 << 16
"""What is read at once: memory for more than 128 KB would come from the kernel, page by page, for each read."""
STAMPED = 35
"""Linux' SO_TIMESTAMPNS and SCM_TIMESTAMPNS, which the socket module does not name."""
TIMESPEC = struct.Struct("@ll")
ROOM = socket.CMSG_SPACE(TIMESPEC.size)

Buffer = bytes | memoryview


class Connection(httpx.AsyncBaseTransport):
    """A connection to one host, made when it is first needed, and made anew where the server has closed it meanwhile.
    ``clock`` gives ns. It takes requests made ready: their extensions, which it takes out, hold ``head``, as
    ``head_of`` makes it, ``buffers``, the body in some pieces, and ``listener``, who is told the answer; when it is
    whole its status alone is returned. ``request`` is one that may be made ready time and again.
    """

    def __init__(self, url: httpx.URL, tls: ssl.SSLContext | None, clock: Callable[[], int]) -> None:
        self._host, self._port = url.host, url.port or (443 if url.scheme == "https" else 80)
        self._tls, self._clock = tls if url.scheme == "https" else None, clock
        self.request = httpx.Request("POST", url)
        self._wire: _Wire | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read its whole answer. httpx's errors where that fails."""
        ready, request.extensions = request.extensions, {}
        listener, body = ready["listener"], ready["buffers"]
        sent = [b"%bcontent-length: %d\r\n\r\n" % (ready["head"], sum(map(len, body))), *body]
        while True:
            kept = self._wire is not None
            wire = self._wire or await self._connect()
            reading = wire.ask(sent, listener)
            try:
                await reading.over
                break
            except OSError as error:
                self._close()
                if not kept or reading.begun:
                    raise httpx.ReadError(str(error), request=request) from error
            except BaseException:
                self._close()
                raise
            finally:
                wire.reading = None
                reading.forget()
        if not reading.keep:
            self._close()
        return _heard(reading.status)

    async def aclose(self) -> None:
        """Close it."""
        wire = self._wire
        self._close()
        if isinstance(wire, _Stream):
            await wire.over.wait()

    def _close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    async def _connect(self) -> _Wire:
        connect = asyncio.get_running_loop().create_connection
        try:
            async with asyncio.timeout(CONNECT_S):
                if self._tls is not None:
                    made = partial(_Stream, self._clock)
                    _, self._wire = await connect(made, self._host, self._port, ssl=self._tls)
                else:
                    transport, _ = await connect(asyncio.Protocol, self._host, self._port)
                    self._wire = _Socket(self._clock, transport.get_extra_info("socket").dup())
                    transport.abort()
        except TimeoutError as error:
            raise httpx.ConnectTimeout("no connection") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return self._wire


@cache
def _heard(status: int) -> httpx.Response:
    """A response of which a listener was told all: one a status, because to make it costs as much as to send."""
    return httpx.Response(status, stream=httpx.ByteStream(b""))


def head_of(request: httpx.Request) -> bytes:
    """A request's head but for the length of its body and the empty line."""
    lines = [request.method.encode() + b" " + request.url.raw_path + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in request.headers.raw if name.lower() != b"content-length"]
    return b"\r\n".join((*lines, b""))


class _Reading:
    """An answer that is being read: a parser's callbacks."""

    def __init__(self, listener: Hearing) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status, self.keep, self.begun = 0, True, False
        self.headers: list[tuple[bytes, bytes]] = []
        self.at_ns = 0
        self._listener = listener
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes, at_ns: int) -> None:
        """Bytes that came in at some time."""
        self.at_ns, self.begun = at_ns, True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.fail(ConnectionError("what came is no HTTP"))

    def forget(self) -> None:
        """It is over: parser and reading, which hold one another, are let go without a garbage collection."""
        del self._parser, self._listener

    def fail(self, error: OSError | None) -> None:
        """The connection is at its end; that is the answer's too where it said no length."""
        self.keep = False
        if self.over.done():
            return
        told = {name.lower() for name, _ in self.headers}
        until_eof = self.status and not told & {b"content-length", b"transfer-encoding"}
        if error is None and until_eof:
            self.over.set_result(None)
        else:
            self.over.set_exception(error or ConnectionResetError("closed"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self.over.done():
            raise ValueError("more than one answer")
        if status >= 200:
            self.status, self.keep = status, self._parser.should_keep_alive()
            self._listener.begin(status, self.headers, self.at_ns)

    def on_body(self, chunk: bytes) -> None:
        self._listener.data(chunk, self.at_ns)

    def on_message_complete(self) -> None:
        if self.status and not self.over.done():
            self.over.set_result(None)
        elif not self.status:
            self.headers.clear()


class _Wire:
    """What both kinds of connection are: asked, answered, and at an end some time."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self.reading: _Reading | None = None
        self._lost: OSError | None = None

    def ask(self, buffers: Sequence[Buffer], listener: Hearing) -> _Reading:
        """Send a request; its answer as it will be read."""
        self.reading = _Reading(listener)
        if self._lost is not None:
            self.reading.fail(self._lost)
        else:
            self.send(buffers)
        return self.reading

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send."""

    def close(self) -> None:
        """Close it."""

    def end(self, error: OSError | None) -> None:
        """The other side has closed it, or it broke."""
        self._lost = error or ConnectionResetError("closed")
        if self.reading is not None:
            self.reading.fail(error)


class _Socket(_Wire):
    """A plain connection, read by recvmsg for the kernel's stamps, written in pieces without joining them."""

    def __init__(self, clock: Callable[[], int], sock: socket.socket) -> None:
        super().__init__(clock)
        self._loop, self._sock = asyncio.get_running_loop(), sock
        self._unsent: list[Buffer] = []
        self._waits = False
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, STAMPED, 1)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send what the kernel takes, and the rest when it takes more."""
        self._unsent = list(buffers)
        self._writable()

    def close(self) -> None:
        """Close it."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()

    def _writable(self) -> None:
        try:
            while self._unsent:
                sent = self._sock.sendmsg(self._unsent)
                while self._unsent and sent >= len(self._unsent[0]):
                    sent -= len(self._unsent.pop(0))
                if sent:
                    self._unsent[0] = memoryview(self._unsent[0])[sent:]
        except BlockingIOError:
            if not self._waits:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            self._waits = True
            return
        except OSError:
            self._unsent = []  # what the server said before it closed is still to be read
        if self._waits:
            self._loop.remove_writer(self._sock.fileno())
            self._waits = False

    def _readable(self) -> None:
        try:
            data, told, _, _ = self._sock.recvmsg(READ_BYTES, ROOM)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(error)
            return
        if not data or self.reading is None:
            self.end(None)
            return
        at_ns = self._clock()
        if told:
            seconds, rest = TIMESPEC.unpack(told[0][2])
            at_ns -= max(time_ns() - (seconds * 1_000_000_000 + rest), 0)
        self.reading.feed(data, at_ns)

    def end(self, error: OSError | None) -> None:
        """Nothing more comes."""
        self._loop.remove_reader(self._sock.fileno())
        super().end(error)


class _Stream(_Wire, asyncio.Protocol):
    """A connection over TLS, by asyncio; its times are those at which the program read."""

    def __init__(self, clock: Callable[[], int]) -> None:
        super().__init__(clock)
        self._transport: Any = None
        self.over = asyncio.Event()

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send."""
        self._transport.writelines(buffers)

    def close(self) -> None:
        """Close it."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self.reading is not None:
            self.reading.feed(data, self._clock())

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()
        self.end(exc if isinstance(exc, OSError) else None)
