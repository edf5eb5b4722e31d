"""A fast endpoint with its own truth, started: fastserver.c where a C compiler is found, else the same in Python.

python benchmarks/fastserver.py

As a program it is the one in Python, a thirtieth as fast: its truth holds, its CPU is in nobody's figures, but with
hundreds of streams it is late itself. The contract is told at the top of fastserver.c.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from time import monotonic_ns
from typing import Any, NamedTuple, cast

import orjson

HERE = Path(__file__).parent
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
WHO = [
    re.compile(rb"\r\n" + name + rb": *([^\r]*)", re.IGNORECASE)
    for name in (b"x-claude-code-session-id", b"x-dynamo-session-id", b"x-request-id")
]


class Answered(NamedTuple):
    """The truth of an answer: ns on CLOCK_MONOTONIC; first and last event are 0 where it was not streamed."""

    who: str
    arrived_ns: int
    first_ns: int
    last_ns: int
    tokens: int


def prefer(nice: int) -> None:
    """In a new process: how nice it is, as a session of its own where Linux shares cores out among sessions."""
    if nice:
        os.setsid()
        os.nice(nice)
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice))


class FastServer:
    """A running server."""

    def __init__(self, scratch: Path, core: int, nice: int) -> None:
        self.kind, command = "Python", [sys.executable, __file__]
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler:
            built = scratch / "fastserver"
            made = subprocess.run([compiler, "-O2", "-o", built, HERE / "fastserver.c"], capture_output=True, text=True)
            if made.returncode == 0:
                self.kind, command = "C", [str(built)]
            else:
                print(f"fastserver.c does not compile here: {made.stderr.strip()[:200]}")
        if self.kind == "Python":
            print("fastserver: no C compiler: in Python, so times at many streams say little")

        def settle() -> None:
            os.sched_setaffinity(0, {core})
            prefer(nice)

        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=settle)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]

    def _asked(self, method: str, path: str) -> bytes:
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        connection.request(method, path)
        body = connection.getresponse().read()
        connection.close()
        return body

    def pace(self, ttft_s: float, itl_s: float) -> None:
        """Set the time to the first token and between two; forget what was."""
        self._asked("PUT", f"/pace/{round(ttft_s * 1e6)}/{round(itl_s * 1e6)}")
        self._asked("GET", "/truth")

    def truth(self) -> list[Answered]:
        """What was answered since it was asked last, in the order of the answers' ends."""
        rows = [line.split("\t") for line in self._asked("GET", "/truth").decode().splitlines()]
        return [Answered(who, *map(int, times)) for who, *times in rows]

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


class _State:
    """What all connections share."""

    ttft = itl = 0.0
    truth: list[str] = []


class _Connection(asyncio.Protocol):
    """A client's connection; one request after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        self.data, self.need, self.before, self.first = bytearray(), 0, 0, 0

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.need and (end := self.data.find(b"\r\n\r\n") + 4) >= 4:
            length = LENGTH.search(self.data, 0, end)
            self.end, self.need = end, end + (int(length[1]) if length else 0)
        if self.need and len(self.data) >= self.need:
            head, body = bytes(self.data[: self.end]), bytes(self.data[self.end :])
            self.data, self.need = bytearray(), 0
            self.request(head, body, monotonic_ns())

    def request(self, head: bytes, body: bytes, arrived: int) -> None:
        """A request that is whole."""
        method, path, _ = head.split(b" ", 2)
        if method == b"POST":
            asked = orjson.loads(body)
            self.who = next((found[1].decode() for each in WHO if (found := each.search(head))), "-")
            self.arrived, self.sent, self.chat = arrived, 0, b"chat" in path
            self.output = asked.get("max_tokens") or asked.get("max_completion_tokens") or 1
            start = min(at for name in (b'"tools":', b'"system":', b'"messages":') if (at := body.find(name)) >= 0)
            self.prompt = body.count(b" ", start) + body.count(b"{", start)
            self.before = min(self.before, self.prompt)
            if asked.get("stream"):
                self.loop.call_later(_State.ttft, self.write_next)
            else:
                self.remember(0, 0)
                self.whole(self.unstreamed())
        elif path == b"/truth":
            self.whole("".join(_State.truth).encode())
            _State.truth.clear()
        elif path.startswith(b"/pace/"):
            _State.ttft, _State.itl = (int(part) / 1e6 for part in path.split(b"/")[2:])
            self.whole(b"{}")
        else:
            known = {b"/health": b'{"status":"ok"}', b"/v1/models": b'{"data":[{"id":"fast","object":"model"}]}'}
            self.whole(known.get(path, b"{}"), 200 if path in known else 404)

    def whole(self, body: bytes, status: int = 200) -> None:
        """A body in one piece."""
        head = f"HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    def remember(self, first: int, last: int) -> None:
        """An answer's truth; the next prompt is taken to begin with this one."""
        _State.truth.append(f"{self.who}\t{self.arrived}\t{first}\t{last}\t{self.output}\n")
        self.told, self.before = self.usage(), self.prompt

    def usage(self) -> dict[str, Any]:
        """The token account."""
        if self.chat:
            told = {"prompt_tokens": self.prompt, "completion_tokens": self.output}
            total = {"total_tokens": self.prompt + self.output}
            return told | total | {"prompt_tokens_details": {"cached_tokens": self.before}}
        read = {"cache_read_input_tokens": self.before, "cache_creation_input_tokens": self.prompt - self.before}
        return {"input_tokens": 0, **read, "output_tokens": self.output}

    def unstreamed(self) -> bytes:
        """An answer's body."""
        if self.chat:
            choice = {"index": 0, "message": {"role": "assistant", "content": "word"}, "finish_reason": "stop"}
            return orjson.dumps({"object": "chat.completion", "choices": [choice], "usage": self.told})
        content = [{"type": "text", "text": "word"}]
        about = {"type": "message", "role": "assistant", "stop_reason": "end_turn"}
        return orjson.dumps(about | {"content": content, "usage": self.told})

    def write_next(self) -> None:
        """The next word, with what goes before the first or after the last."""
        now, last, head = monotonic_ns(), self.sent + 1 >= self.output, b""
        self.first = self.first if self.sent else now
        events = [self.word()] if self.sent else [*self.opening(), self.word()]
        if not self.sent:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        if last:
            self.remember(self.first, now)
            events += self.closing()
        else:
            self.loop.call_later(_State.itl, self.write_next)
        kinds = [b"" if self.chat else b"event: %b\n" % each["type"].encode() for each in events]
        pairs = zip(kinds, events, strict=True)
        data = b"".join(b"%bdata: %b\n\n" % (kind, orjson.dumps(each)) for kind, each in pairs)
        data += b"data: [DONE]\n\n" * (self.chat and last)
        self.sent += 1
        self.transport.write(head + b"%x\r\n%b\r\n" % (len(data), data) + b"0\r\n\r\n" * last)

    def word(self) -> dict[str, Any]:
        """An event with a word."""
        if self.chat:
            return {"choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]}
        return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " word"}}

    def opening(self) -> list[dict[str, Any]]:
        """What goes before the first word."""
        if self.chat:
            return [{"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}]
        started = {"type": "message", "role": "assistant", "content": [], "usage": self.usage()}
        return [
            {"type": "message_start", "message": started},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        ]

    def closing(self) -> list[dict[str, Any]]:
        """What goes after the last word."""
        if self.chat:
            stop = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            return [stop, {"choices": [], "usage": self.told}]
        delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": self.told}
        return [{"type": "content_block_stop", "index": 0}, delta, {"type": "message_stop"}]


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=4096)
    print(f"fastserver: listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
