"""The least that a client in Python costs: an asyncio Protocol a connection, httptools, a time for each piece.

    python benchmarks/bareclient.py URL ORDER

ORDER is JSON: ``streams``, begun ``apart_s``; ``calls`` of each, ``output`` tokens of each answer, ``body_bytes``.
Prints JSON: CPU seconds, answers, pieces. With ``copying`` it is one blocking socket that sends the body and reads the
answer, nothing else: what copying costs. With ``sleeping`` it sleeps so many times and says how late it woke.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from time import monotonic_ns, process_time, sleep
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson


def request(host: str, output: int, size: int) -> bytes:
    """A call as it is sent."""
    body = b'{"model":"fast","stream":true,"max_tokens":%d,"messages":[{"role":"user","content":"' % output
    body += b"note " * ((size - len(body)) // 5) + b'"}]}'
    head = (
        f"POST /v1/messages HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\naccept: text/event-stream\r\n"
    )
    return f"{head}user-agent: bare\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One stream: asks, reads, asks again."""

    def __init__(self, asked: bytes, calls: int) -> None:
        self.asked, self.left, self.times, self.pieces = asked, calls, list[int](), 0
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        """The next call."""
        self.parser = httptools.HttpResponseParser(self)
        self.sent = monotonic_ns()
        self.transport.write(self.asked)

    def data_received(self, data: bytes) -> None:
        self.now = monotonic_ns()
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.times.append(self.now)
        self.pieces += 1

    def on_message_complete(self) -> None:
        self.times.clear()
        self.left -= 1
        if self.left:
            self.ask()
        else:
            self.over.set_result(None)


async def bare(url: str, order: dict[str, Any]) -> dict[str, Any]:
    """The calls of an order; what they took once all were connected."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    asked = request(parts.netloc, order["output"], order["body_bytes"])
    where = parts.hostname or "", parts.port or 80
    made = [
        (await loop.create_connection(lambda: Connection(asked, order["calls"]), *where))[1]
        for _ in range(order["streams"])
    ]
    begun, began = process_time(), monotonic_ns()
    for number, connection in enumerate(made):
        loop.call_later(number * order.get("apart_s", 0.0), connection.ask)
    await asyncio.gather(*(connection.over for connection in made))
    told = {"cpu_s": process_time() - begun, "wall_s": (monotonic_ns() - began) / 1e9}
    return told | {"answers": order["streams"] * order["calls"], "pieces": sum(each.pieces for each in made)}


def sleeping(order: dict[str, Any]) -> dict[str, Any]:
    """How late this machine wakes a process that sleeps a millisecond at a time, ms: what nobody can be better than."""
    begun, late = monotonic_ns(), []
    for number in range(1, order["sleeping"] + 1):
        due = begun + number * 1_000_000
        sleep(max(due - monotonic_ns(), 0) / 1e9)
        late.append((monotonic_ns() - due) / 1e6)
    return {"late_ms": late}


def copying(url: str, order: dict[str, Any]) -> dict[str, Any]:
    """One call after the other on a blocking socket."""
    parts = urlsplit(url)
    asked = request(parts.netloc, order["output"], order["body_bytes"])
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as sock:
        begun = process_time()
        for _ in range(order["calls"]):
            sock.sendall(asked)
            while not sock.recv(1 << 16).endswith(b"0\r\n\r\n"):
                pass
        return {"cpu_s": process_time() - begun, "answers": order["calls"]}


if __name__ == "__main__":
    order = orjson.loads(sys.argv[2])
    if "sleeping" in order:
        told = sleeping(order)
    else:
        told = copying(sys.argv[1], order) if order.get("copying") else asyncio.run(bare(sys.argv[1], order))
    print(orjson.dumps(told).decode())
