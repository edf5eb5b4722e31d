"""The own transport, against a server that a test holds itself: what it sends, and what it makes of what comes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from functools import partial

import httpx
import pytest
from asking import NO_TOOLS, against, request, send, stream_of

from keepwarm.replayers.endpoint import Answer, Piece, Request
from keepwarm.replayers.http import HttpEndpoint, reach

USAGE = {"input_tokens": 9, "output_tokens": 1}
BODY = stream_of({"type": "message_delta", "delta": {}, "usage": USAGE}, {"type": "message_stop"})
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
Serves = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def asked(serves: Serves, *requests: Request, limit: int = 1 << 16) -> list[Answer]:
    """The answers to requests, one after the other; a connection ends where its serving does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serves(reader, writer)
        writer.close()

    async def all_of_them() -> list[Answer]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=limit)
        address = reach(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "messages")
        endpoint = HttpEndpoint(
            address, dialect="messages", model="sim", clock=time.monotonic_ns, costs=NO_TOOLS, timeout_s=30.0
        )
        answers = [await endpoint.send(one) for one in requests]
        await endpoint.aclose()
        server.close()
        await server.wait_closed()
        return answers

    return asyncio.run(all_of_them())


async def received(reader: asyncio.StreamReader, slowly: int = 0) -> bytes:
    """The body of a request, read in so many bytes at a time."""
    head = await reader.readuntil(b"\r\n\r\n")
    told = re.search(rb"content-length: (\d+)", head)
    assert told is not None
    body = b""
    while slowly and len(body) < int(told[1]):
        body += await reader.read(slowly)
        await asyncio.sleep(0)
    return body or await reader.readexactly(int(told[1]))


PAST = "Sat, 21 Nov 2015 07:28:00 GMT"


def refused(status: int, headers: dict[str, str]) -> Answer:
    """What is made of an answer of a status and headers alone."""

    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await received(reader)
        lines = [f"HTTP/1.1 {status} No", "content-length: 0", *(f"{name}: {told}" for name, told in headers.items())]
        writer.write("\r\n".join((*lines, "", "")).encode())

    return asked(refuses, request(Piece(1, 9, "user")))[0]


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (503, {"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        (529, {"retry-after": "1.5"}, 1.5),
        (408, {"retry-after": "0"}, 0.0),
        (409, {"retry-after": "2"}, 2.0),
        (429, {}, None),
        (429, {"retry-after": PAST}, None),
        (429, {"retry-after": "Sat, 99 Nov 2026"}, None),
        (429, {"retry-after": "-1"}, None),
        (429, {"retry-after": "Fri, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        (429, {"retry-after": "nan"}, None),
        (500, {"retry-after": "inf"}, None),
        (400, {"retry-after": "7"}, None),
        (302, {"retry-after": "7"}, None),
    ],
)
def test_a_refusal_tells_when_to_come_again(status: int, headers: dict[str, str], expected: float | None) -> None:
    """In seconds, where a number says so and the call may be taken later; whichever transport it came by."""
    own = refused(status, headers)
    other = against(lambda _: httpx.Response(status, headers=headers))
    assert [(one.status, one.retry_after_s) for one in (own, other)] == [(status, expected)] * 2


def test_a_time_to_come_again_is_as_far_off_as_it_is() -> None:
    """Retry-After may be a date, as RFC 9110 has it: seconds from now, to the second."""
    now = time.time()
    told = refused(429, {"retry-after": formatdate(now + 30, usegmt=True)}).retry_after_s
    assert told is not None
    assert now + 28 < time.time() + told < time.time() + 30


def test_a_long_body_arrives_whole_where_its_server_reads_slowly() -> None:
    """What the kernel does not take at once is sent when it does, byte for byte what another transport sends."""
    seen: list[bytes] = []

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            seen.append(await received(reader, slowly=50_000))
            writer.write(WHOLE)

    def handler(sent: httpx.Request) -> httpx.Response:
        seen.append(sent.content)
        return httpx.Response(200, content=BODY)

    long = Piece(1, 2_000_000, "system"), Piece(2, 9, "user")
    grown = (*long, Piece(3, 9, "answer"), Piece(4, 9, "user"))
    answers = asked(slow, request(*long), request(*grown))
    send("http://t", request(*long), request(*grown), transport=partial(httpx.MockTransport, handler), costs=NO_TOOLS)
    assert [answer.error for answer in answers] == [None, None]
    assert len(seen[0]) > 9_000_000
    assert seen[:2] == seen[2:]


def test_what_comes_behind_an_answer_is_not_its() -> None:
    """A server that sends a second answer with the first: the call has the first, and the next another connection."""
    calls = []

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(await received(reader))
        writer.write(WHOLE + b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno")
        if len(calls) == 1:
            assert await reader.read() == b""

    answers = asked(twice, *[request(Piece(1, 9, "user"))] * 2)
    assert [(answer.error, answer.status, answer.prompt) for answer in answers] == [(None, 200, 9)] * 2
    assert len(calls) == 2


def test_a_call_on_a_connection_that_was_closed_meanwhile_is_not_lost() -> None:
    """A server that closes after each answer without saying so gets the next call on a new connection."""
    calls = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(await received(reader))
        writer.write(WHOLE)
        await writer.drain()

    answers = asked(once, *[request(Piece(1, 9, "user"))] * 4)
    assert [(answer.error, answer.prompt) for answer in answers] == [(None, 9)] * 4
    assert len(calls) == 4
