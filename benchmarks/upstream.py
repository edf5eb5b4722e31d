"""A light upstream that answers POST /v1/messages as Anthropic does, and says in the answer how long it waited itself.

    python benchmarks/upstream.py

`PUT /pace/FIRST/GAP/WRITES` sets the pace of all answers: seconds to the first write, between writes, and their number.
The first text delta reads `held N `: nanoseconds from the last byte of the request to that write. A client takes
them off its time to first token, and what remains is the way there and back, without the upstream's late timers.
"""

from __future__ import annotations

import asyncio
import re
import sys
from time import perf_counter_ns
from typing import cast

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 12:00:00 GMT\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\nconnection: keep-alive\r\ncache-control: no-cache\r\n"
    b"anthropic-ratelimit-requests-limit: 4000\r\nanthropic-ratelimit-requests-remaining: 3999\r\n"
    b"anthropic-ratelimit-tokens-limit: 4000000\r\nanthropic-ratelimit-tokens-remaining: 3911000\r\n"
    b"request-id: req_011CSHoEeqs5C35K2UUqR7Fy\r\nanthropic-organization-id: 00000000-0000-0000-0000-000000000000\r\n"
    b"server: cloudflare\r\nvia: 1.1 google\r\ncf-cache-status: DYNAMIC\r\nx-robots-tag: none\r\n\r\n"
)
USAGE = (
    b'"usage":{"input_tokens":4,"cache_creation_input_tokens":512,"cache_read_input_tokens":19456,'
    b'"cache_creation":{"ephemeral_5m_input_tokens":512,"ephemeral_1h_input_tokens":0},"output_tokens":%d,'
    b'"service_tier":"standard"}'
)


def event(name: bytes, fields: bytes) -> bytes:
    """A server-sent event of the Messages dialect."""
    return b'event: %b\ndata: {"type":"%b"%b}\n\n' % (name, name, fields)


def delta(text: bytes) -> bytes:
    """A piece of text."""
    return event(b"content_block_delta", b',"index":0,"delta":{"type":"text_delta","text":"%b"}' % text)


def chunk(data: bytes) -> bytes:
    """A chunk of an HTTP body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


START = event(
    b"message_start",
    b',"message":{"id":"msg_01XFDUDYJgAACzvnptvVoYEL","type":"message","role":"assistant",'
    b'"model":"claude-opus-4-5-20251101","content":[],"stop_reason":null,"stop_sequence":null,%b}' % (USAGE % 1),
) + event(b"content_block_start", b',"index":0,"content_block":{"type":"text","text":""}')
TEXT = chunk(delta(b" and then it reads the next file"))
STOP = (
    event(b"content_block_stop", b',"index":0')
    + event(b"message_delta", b',"delta":{"stop_reason":"end_turn","stop_sequence":null},%b' % (USAGE % 120))
    + event(b"message_stop", b"")
)
LAST = chunk(STOP) + b"0\r\n\r\n"
NOTHING = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """A client's connection; one request after the other, no pipelining."""

    first = gap = 0.0
    writes = 1
    left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        self.head = b""

    def data_received(self, data: bytes) -> None:
        if self.left:
            self.left -= len(data)
        else:
            self.head += data
            end = self.head.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            found = LENGTH.search(self.head, 0, end)
            self.left = (int(found[1]) if found else 0) + end - len(self.head)
        if not self.left:
            self.whole()

    def whole(self) -> None:
        """A request has come in whole."""
        came, head, self.head = perf_counter_ns(), self.head, b""
        if not head.startswith(b"POST"):
            if head.startswith(b"PUT /pace/"):
                first, gap, writes = head.split(b" ", 2)[1].split(b"/")[2:]
                Upstream.first, Upstream.gap, Upstream.writes = float(first), float(gap), int(writes)
            self.transport.write(NOTHING)
        elif self.first:
            self.loop.call_later(self.first, self.begin, came)
        else:
            self.begin(came)

    def begin(self, came: int) -> None:
        """Write the first token, and all else if there is one write only."""
        opening = START + delta(b"held %d " % (perf_counter_ns() - came))
        if self.writes == 1:
            self.transport.write(HEAD + chunk(opening + STOP) + b"0\r\n\r\n")
        else:
            self.transport.write(HEAD + chunk(opening))
            self.loop.call_later(self.gap, self.go_on, self.writes - 1)

    def go_on(self, left: int) -> None:
        """Write the next piece, or the last."""
        if left > 1:
            self.transport.write(TEXT)
            self.loop.call_later(self.gap, self.go_on, left - 1)
        else:
            self.transport.write(LAST)


async def serve() -> None:
    """Answer until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    print(f"upstream: listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", file=sys.stderr, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
