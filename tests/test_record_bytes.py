"""Bytes through the recording proxy: what goes in at one side comes out at the other, whatever it is."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import CALL, STREAM, SWITCHED, UPGRADE, Got, Line, Stage, chunk, events, staged, streamed

MANY = settings(max_examples=int(os.environ.get("KEEPWARM_EXAMPLES", "200")), deadline=None)
CUTS = st.lists(st.integers(0, 1 << 14), max_size=12)
PATHS = ("/v1/messages?beta=true", "/v1/chat/completions", "/v1/responses", "/v1/models", "/", "/a/b?c=%20d")
OURS = ("host", "content-length", "transfer-encoding", "connection", "upgrade", "expect", "x-keepwarm-token")
TOKEN = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES = st.text(TOKEN, min_size=1, max_size=12).filter(lambda name: name.lower() not in OURS).map(str.encode)
VALUES = st.lists(st.integers(33, 126) | st.integers(128, 255), max_size=20).map(bytes)
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=6)
EXTENSIONS = st.sampled_from([b"", b";a", b";a=b", b';a="b c"'])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
KEYS = ["type", "content", "text", "messages", "role", "tools", "system", "input", "name", "id", "model", "usage"]
KEYS += ["stream", "item", "output", "metadata", "message", "delta", "index", "content_block", "choices", "tool_calls"]
KEYS += ["response", "function", "arguments", "input_tokens", "output_tokens", "prompt_tokens", "nvext", "agent_hints"]
WORDS = ["text", "message", "tool_use", "tool_result", "user", "assistant", "system", "thinking", "function_call"]
WORDS += ["message_start", "message_delta", "message_stop", "content_block_start", "content_block_delta", "error"]
WORDS += ["content_block_stop", "response.created", "response.output_item.done", "response.completed"]
ALIKE = st.recursive(
    PLAIN | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)
"""Values that look like a part of a call without being one."""
CALLS = st.dictionaries(st.sampled_from(KEYS), ALIKE, max_size=6).map(lambda told: json.dumps(CALL | told).encode())
BODIES = st.binary(max_size=3000) | CALLS | st.just(json.dumps(CALL).encode())
ENCODED = {
    "": bytes,
    "gzip": lambda body: zlib.compress(body, wbits=31),
    "deflate": zlib.compress,
    "br": lambda body: pa.compress(body, codec="brotli", asbytes=True),
    "zstd": lambda body: pa.compress(body, codec="zstd", asbytes=True),
    "snappy": bytes,
    "nonsense": bytes,
}


class Asked(NamedTuple):
    """A request: as it goes on the wire, and what it is."""

    wire: bytes
    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]]


class Told(NamedTuple):
    """An answer on the wire; ``ends`` where only the connection's end ends it."""

    wire: bytes
    ends: bool


def _lines(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % pair for pair in headers)


def _chunks(draw: Any, body: bytes) -> bytes:
    """The body in chunks, with extensions, and trailers after it."""
    at = sorted({one % len(body) for one in draw(CUTS)} - {0}) if body else []
    pieces = [body[start:end] for start, end in zip([0, *at], [*at, len(body)], strict=True)]
    return b"".join(chunk(piece, draw(EXTENSIONS)) for piece in pieces if piece) + b"0\r\n"


@st.composite
def requests(draw: Any, methods: Sequence[str] = ("POST", "POST", "PUT", "GET", "HEAD", "DELETE")) -> Asked:
    """Requests of any kind, many of them calls."""
    method, path, headers = draw(st.sampled_from(methods)), draw(st.sampled_from(PATHS)), draw(HEADERS)
    encoding = draw(st.sampled_from(sorted(ENCODED)))
    body = b"" if method in ("GET", "HEAD") else ENCODED[encoding](draw(BODIES))
    headers = [*headers, (b"Content-Encoding", encoding.encode())] if encoding else headers
    headers.insert(draw(st.integers(0, len(headers))), (b"Host", b"there.test"))
    if not body:
        framing, sent, trailers = None, b"", []
    elif draw(st.booleans()):
        framing, sent, trailers = (b"content-LENGTH", b"%d" % len(body)), body, []
    else:
        trailers = draw(HEADERS)
        framing, sent = (b"Transfer-Encoding", b"chunked"), _chunks(draw, body) + _lines(trailers) + b"\r\n"
    if framing is not None:
        headers.insert(draw(st.integers(0, len(headers))), framing)
    wire = f"{method} {path} HTTP/1.1\r\n".encode() + _lines(headers) + b"\r\n" + sent
    return Asked(wire, method, path, headers, body, trailers)


@st.composite
def _answer_bodies(draw: Any) -> tuple[str, bytes]:
    """A content type and a body of it, not encoded yet."""
    kind = draw(st.sampled_from(["text/event-stream; charset=utf-8", "application/json", "text/html"]))
    if kind.startswith("text/event") and draw(st.booleans()):
        return kind, b"".join(events(words=draw(st.lists(st.text(max_size=5), max_size=8))))
    if kind.startswith("text/event"):
        told = draw(st.lists(ALIKE, max_size=6))
        return kind, b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in told)
    return kind, draw(BODIES)


@st.composite
def answers(draw: Any, method: str) -> Told:
    """Answers that say where they end, or do not."""
    interim = b"".join(draw(st.lists(st.sampled_from(INTERIM), max_size=2)))
    headers, status = draw(HEADERS), draw(st.sampled_from([200, 200, 200, 201, 204, 304, 400, 413, 429, 500, 529]))
    kind, body = draw(_answer_bodies())
    encoding = draw(st.sampled_from(sorted(ENCODED)))
    body = ENCODED[encoding](body)
    headers += [(b"Content-Type", kind.encode())] + ([(b"content-encoding", encoding.encode())] if encoding else [])
    framing = draw(st.sampled_from(["length", "chunked", "eof"]))
    bodiless = method == "HEAD" or status in (204, 304)
    if framing == "length" and status != 204:
        headers.append((b"Content-Length", b"%d" % len(body)))
    elif framing == "chunked" and status != 204:
        headers.append((b"transfer-encoding", b"chunked"))
        body = _chunks(draw, body) + _lines(draw(HEADERS)) + b"\r\n"
    elif not bodiless:
        return Told(interim + b"HTTP/1.%d %d\r\n" % (draw(st.integers(0, 1)), status) + _head(headers) + body, True)
    head = b"HTTP/1.1 %d Some Reason\r\n" % status + _head(headers)
    return Told(interim + head + (b"" if bodiless else body), False)


def _head(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    return _lines(headers) + b"\r\n"


INTERIM = (
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\ncontent-type: text/html\r\n\r\n",
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One proxy for all tests of this file; each has connections of its own."""
    with staged(tmp_path_factory.mktemp("record")) as made:
        yield made


def _same(asked: Asked, got: Got) -> None:
    """The upstream has been asked what the client asked; only where to is another."""
    host = {name.lower(): value for name, value in got.headers}[b"host"]
    headers = [(name, host if name.lower() == b"host" else value) for name, value in asked.headers]
    assert host.startswith(b"127.0.0.1:")
    assert (got.method.decode(), got.target.decode()) == (asked.method, asked.path)
    assert got.headers == headers
    assert got.body == asked.body
    assert got.trailers == asked.trailers


async def _exchange(line: Line, asked: Asked, told: Told, there: Sequence[int], back: Sequence[int]) -> None:
    await line.ask(asked.wire, there)
    _same(asked, await line.got())
    await line.tell(told.wire, back)
    if told.ends:
        line.upstream.close()
        assert await line.rest() == told.wire
    else:
        assert await line.heard(len(told.wire)) == told.wire


@MANY
@given(st.data())
def test_bytes_of_both_directions_over_many_exchanges(stage: Stage, data: Any) -> None:
    """Requests and answers of any framing, encoding and chunking, cut anywhere, on one connection that is kept."""
    exchanges = []
    for _ in range(data.draw(st.integers(1, 4))):
        asked = data.draw(requests())
        exchanges.append((asked, data.draw(answers(asked.method)), data.draw(CUTS), data.draw(CUTS)))
        if exchanges[-1][1].ends:
            break

    async def play() -> None:
        line = await stage.line()
        for exchange in exchanges:
            await _exchange(line, *exchange)
        line.client.close()

    stage.run(play())


@st.composite
def _broken(draw: Any) -> bytes:
    """An answer that is damaged somewhere, or was none from the start."""
    wire = bytearray(draw(answers("POST")).wire)
    how = draw(st.sampled_from(["cut", "flip", "more", "garbage", "size", "insert"]))
    if how == "cut":
        del wire[draw(st.integers(1, len(wire))) :]
    elif how == "flip":
        for _ in range(draw(st.integers(1, 5))):
            wire[draw(st.integers(0, len(wire) - 1))] = draw(st.integers(0, 255))
    elif how == "garbage":
        wire = bytearray(draw(st.binary(min_size=1, max_size=300)))
    elif how == "size":
        wire = bytearray(
            STREAM + chunk(b"data: {}\n\n") + draw(st.sampled_from([b"zz\r\nab\r\n", b"-1\r\n", b"5\nab"]))
        )
    else:
        at = draw(st.integers(0, len(wire))) if how == "insert" else len(wire)
        wire[at:at] = draw(st.binary(min_size=1, max_size=40) | st.just(streamed()))
    return bytes(wire)


@MANY
@given(requests(("POST",)), _broken(), CUTS, CUTS)
def test_a_malformed_answer_is_passed_on_to_its_last_byte(
    stage: Stage, asked: Asked, wire: bytes, there: list[int], back: list[int]
) -> None:
    """Garbage, bad chunk sizes, truncated answers, more bytes than were told: the client sees what was sent."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asked.wire, there)
        _same(asked, await line.got())
        await line.tell(wire, back)
        line.upstream.close()
        assert await line.rest() == wire

    stage.run(play())


@MANY
@given(st.binary(min_size=1, max_size=500), st.binary(min_size=1, max_size=500), CUTS, CUTS)
def test_a_websocket_is_a_tunnel(stage: Stage, up: bytes, down: bytes, there: list[int], back: list[int]) -> None:
    """After 101 all bytes are theirs, in both directions, until either side closes."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(UPGRADE, there)
        assert (await line.got()).target == b"/socket"
        await line.tell(SWITCHED + down[:3], back)
        assert await line.heard(len(SWITCHED) + len(down[:3])) == SWITCHED + down[:3]
        await line.ask(up, there)
        await line.tell(down, back)
        assert await stage.loop.sock_recv(line.upstream, len(up)) or not up
        assert await line.heard(len(down)) == down
        line.client.close()
        await line.left()

    stage.run(play())
