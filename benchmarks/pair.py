"""The bare pair: two asyncio protocols that copy bytes between a client and an upstream and look at none of them.

    python benchmarks/pair.py --upstream http://127.0.0.1:PORT --listen 127.0.0.1:0

The limit for a proxy on asyncio: what it costs to receive and send again, with backpressure in both directions.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from functools import partial
from typing import cast
from urllib.parse import urlsplit

BUFFER = memoryview(bytearray(1 << 18))  # to receive into new memory each time takes twice the CPU


class Half(asyncio.BufferedProtocol):
    """One of two connections; what arrives on it leaves on the other."""

    transport: asyncio.Transport | None = None

    def __init__(self, other: Half | None = None) -> None:
        self.other = other
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.other:
            self.transport.writelines(self.other.early)

    def get_buffer(self, sizehint: int) -> memoryview:
        return BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(BUFFER[:nbytes])
        if self.other and self.other.transport:
            self.other.transport.write(data)
        else:
            self.early.append(data)

    def pause_writing(self) -> None:
        if self.other and self.other.transport:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other and self.other.transport:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other and self.other.transport:
            self.other.transport.close()


class Client(Half):
    """The client's half; it opens the upstream's as soon as a client is there."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(Half(self))
        self.address = host, port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self.opening = loop.create_task(loop.create_connection(lambda: cast(Half, self.other), *self.address))


async def serve(upstream: str, listen: str) -> None:
    """Relay until killed."""
    url, (host, port) = urlsplit(upstream), listen.rsplit(":", 1)
    made = partial(Client, url.hostname or "", url.port or 80)
    server = await asyncio.get_running_loop().create_server(made, host, int(port))
    print(f"pair: listening on http://{host}:{server.sockets[0].getsockname()[1]}", file=sys.stderr, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--listen", default="127.0.0.1:0")
    args = parser.parse_args()
    asyncio.run(serve(args.upstream, args.listen))
