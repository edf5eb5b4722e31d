"""An exchange: a request on its way through the proxy, and its answer."""

from typing import TYPE_CHECKING

import orjson

from keepwarm.harness.recorder import Passing
from keepwarm.harness.routes import Route

if TYPE_CHECKING:
    from keepwarm.harness.upstream import Upstream

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
