"""A recording proxy between sockets that a test holds itself: what goes in at one side and comes out at the other."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h11
import orjson

from keepwarm.harness.proxy import Proxy
from keepwarm.harness.recorder import Recorder
from keepwarm.harness.routes import route
from keepwarm.traces.records import AnswerRecord, RequestRecord, read_records

T = TypeVar("T")
SALT = bytes(range(32))
PATIENCE_S = 10.0
"""So long a test waits for bytes that must come: a proxy that hangs fails the test, and does not stop it."""

CALL = {"model": "claude-opus-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"input_tokens": 4, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 6, "output_tokens": 1}


class Got(NamedTuple):
    """A request as the upstream understood it, by a parser that is not the proxy's."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]]


def post(body: bytes, *headers: str, path: str = "/v1/messages", host: str = "a.test") -> bytes:
    """A request with a body of a told length."""
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", *headers, f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def asking(*headers: str, path: str = "/v1/messages", text: str = "hi", **more: Any) -> bytes:
    """A call as a client sends it."""
    return post(orjson.dumps(CALL | {"messages": [{"role": "user", "content": text}]} | more), *headers, path=path)


def event(kind: str, **fields: Any) -> bytes:
    """A server-sent event of the Messages dialect."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"


def events(ident: str = "msg_1", words: Iterable[str] = ("one ", "two")) -> list[bytes]:
    """The events of a streamed message, its final one last."""
    message = {"id": ident, "type": "message", "role": "assistant", "model": "m", "content": [], "usage": USAGE}
    deltas = [event("content_block_delta", index=0, delta={"type": "text_delta", "text": word}) for word in words]
    return [
        event("message_start", message=message),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *deltas,
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": len(deltas)}),
        event("message_stop"),
    ]


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
UPGRADE = b"GET /socket HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    """A chunk of a body."""
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def streamed(ident: str = "msg_1", words: Iterable[str] = ("one ", "two")) -> bytes:
    """A whole streamed answer, each event a chunk."""
    return STREAM + b"".join(map(chunk, events(ident, words))) + LAST


def cut(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    """The data in pieces, cut at these places (taken round its length)."""
    at = sorted({one % len(data) for one in cuts} - {0}) if data else []
    for start, end in zip([0, *at], [*at, len(data)], strict=True):
        yield data[start:end]


def rst(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Line:
    """A client's connection to the proxy, and the one that the proxy has to the upstream for it."""

    def __init__(self, client: socket.socket, upstream: socket.socket) -> None:
        self.client = client
        self.upstream = upstream

    async def ask(self, data: bytes, cuts: Sequence[int] = ()) -> None:
        """Send as the client, in pieces that come one by one."""
        await _send(self.client, data, cuts)

    async def tell(self, data: bytes, cuts: Sequence[int] = ()) -> None:
        """Send as the upstream."""
        await _send(self.upstream, data, cuts)

    async def heard(self, size: int) -> bytes:
        """So many bytes at the client, fewer only where the connection ends before."""
        return await receive(self.client, size)

    async def rest(self) -> bytes:
        """All that comes to the client until its connection ends."""
        return await receive(self.client)

    async def left(self) -> bytes:
        """All that comes to the upstream until its connection ends, by a reset or otherwise."""
        with suppress(ConnectionError):
            return await receive(self.upstream)
        return b""

    async def got(self) -> Got:
        """The next request at the upstream, and nothing after it."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 24)
        request, body, loop = None, b"", asyncio.get_running_loop()
        while True:
            told = parser.next_event()
            if told is h11.NEED_DATA:
                data = await asyncio.wait_for(loop.sock_recv(self.upstream, 1 << 16), PATIENCE_S)
                assert data, f"the connection to the upstream ended within {request}"
                parser.receive_data(data)
            elif isinstance(told, h11.Request):
                request = told
                if parser.they_are_waiting_for_100_continue:
                    await self.tell(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif isinstance(told, h11.Data):
                body += told.data
            else:
                assert isinstance(told, h11.EndOfMessage) and request is not None
                assert parser.trailing_data[0] == b""
                headers, trailers = request.headers.raw_items(), told.headers.raw_items()
                return Got(request.method, request.target, list(headers), body, list(trailers))

    def close(self) -> None:
        """Both ends leave."""
        self.client.close()
        self.upstream.close()


async def settle() -> None:
    """Let the proxy take what is there."""
    for _ in range(4):
        await asyncio.sleep(0)


async def _send(sock: socket.socket, data: bytes, cuts: Sequence[int]) -> None:
    for piece in cut(data, cuts):
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(sock, piece), PATIENCE_S)
        await settle()


async def receive(sock: socket.socket, size: int = 1 << 30) -> bytes:
    """So many bytes of a socket, fewer only where the connection ends before."""
    got = bytearray()
    while len(got) < size:
        wait = asyncio.get_running_loop().sock_recv(sock, min(size - len(got), 1 << 18))
        data = await asyncio.wait_for(wait, PATIENCE_S)
        if not data:
            break
        got += data
    return bytes(got)


def listener() -> socket.socket:
    """A socket that listens on a free port of loopback."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


def port(sock: socket.socket) -> int:
    """The port that a socket listens on."""
    return int(sock.getsockname()[1])


class Stage:
    """A proxy and the upstreams' listeners, in one event loop that the test drives."""

    def __init__(self, folder: Path, upstreams: Sequence[str], token: str | None) -> None:
        self.loop = asyncio.new_event_loop()
        self.faults: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.faults.append(context))
        self.journal = folder / "t.parquet.journal"
        self.recorder = Recorder(self.journal, SALT)
        self.listeners = [listener() for _ in upstreams]
        told = [f"{match}http://127.0.0.1:{port(one)}" for match, one in zip(upstreams, self.listeners, strict=True)]
        self.proxy = Proxy([route(one) for one in told], self.recorder, token=token)
        self._server = self.loop.run_until_complete(self.loop.create_server(self.proxy.client, "127.0.0.1", 0))
        self._lines: list[Line] = []

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Do something in the loop. Nothing may have gone wrong in it that nobody caught."""
        try:
            return self.loop.run_until_complete(what)
        finally:
            while self._lines:
                self._lines.pop().close()
            self.loop.run_until_complete(settle())
            self.recorder.beside.submit(int).result()
            self.loop.run_until_complete(settle())
            assert not self.faults, self.faults

    async def client(self) -> socket.socket:
        """A client that connects."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self.loop.sock_connect(sock, self._server.sockets[0].getsockname())
        return sock

    async def accept(self, which: int = 0) -> socket.socket:
        """The upstream takes the proxy's connection."""
        sock, _ = await asyncio.wait_for(self.loop.sock_accept(self.listeners[which]), PATIENCE_S)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    async def line(self) -> Line:
        """A client that connects, and the one upstream behind it. It is closed when the run ends."""
        return self.pair(await self.client(), await self.accept())

    def pair(self, client: socket.socket, upstream: socket.socket) -> Line:
        """A client, and one of the upstreams behind it."""
        line = Line(client, upstream)
        self._lines.append(line)
        return line

    def records(self) -> list[tuple[RequestRecord, AnswerRecord | None]]:
        """The calls in the journal."""
        found = list(read_records(self.journal))
        answers = {one.number: one for one in found if isinstance(one, AnswerRecord)}
        return [(one, answers.get(one.number)) for one in found if isinstance(one, RequestRecord)]

    def close(self) -> None:
        """Everybody goes home."""
        self._server.close()
        for client in list(self.proxy.clients):
            client.transport.abort()
        self.loop.run_until_complete(settle())
        self.recorder.close()
        for one in self.listeners:
            one.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        assert not self.faults, self.faults


@contextmanager
def staged(folder: Path, *upstreams: str, token: str | None = None) -> Iterator[Stage]:
    """A stage with one upstream, or one for each of these matches (``/prefix=`` or ``header:value=``)."""
    stage = Stage(folder, upstreams or ("",), token)
    try:
        yield stage
    finally:
        stage.close()


def refused(answer: bytes) -> int:
    """The status of an answer of the proxy's own, which is JSON that says who speaks."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert orjson.loads(body)["error"]["message"].startswith("keepwarm record: ")
    assert b"content-length: %d" % len(body) in head
    return int(head.split(b" ")[1])
