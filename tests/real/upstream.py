"""A scripted Messages API on loopback: it answers a real coding agent from a script and keeps what it answered.

A script is a function from a request to a reply; ``steps`` makes one of lists. What was answered is the truth that an
importer or a recording proxy can be held against. Nothing here leaves the machine.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Block = dict[str, Any]


class Usage(NamedTuple):
    """The account of a reply, in tokens: the prompt's disjoint parts, and the output."""

    uncached: int
    read: int
    write_5m: int
    write_1h: int
    output: int

    def wire(self, output: int) -> dict[str, Any]:
        """The account as the API tells it, with that many output tokens."""
        written = {"ephemeral_5m_input_tokens": self.write_5m, "ephemeral_1h_input_tokens": self.write_1h}
        return {
            "input_tokens": self.uncached,
            "cache_read_input_tokens": self.read,
            "cache_creation_input_tokens": self.write_5m + self.write_1h,
            "cache_creation": written,
            "output_tokens": output,
            "service_tier": "standard",
        }


class Request(NamedTuple):
    """A call as it came in. ``nth``: which of its agent's calls since the script was put in, 0 first."""

    session: str
    agent: str | None
    nth: int
    body: dict[str, Any]
    headers: dict[str, str]


class Reply(NamedTuple):
    """What to answer: content blocks and an account, or with a ``status`` other than 200 an error of that kind."""

    blocks: Sequence[Block] = ()
    usage: Usage = Usage(10, 0, 0, 0, 10)
    stop: str | None = None
    status: int = 200
    error: str = "api_error"
    seconds: float = 0.0


class Answered(NamedTuple):
    """A call and what it got. Times are ns since 1970: when it came in, and when its reply was about to be written."""

    request: Request
    reply: Reply
    id: str
    start_ns: int
    end_ns: int


Script = Callable[[Request], Reply]


def text(words: str) -> Block:
    """A text block."""
    return {"type": "text", "text": words}


def use(name: str, **given: Any) -> Block:
    """A tool use; the upstream gives it an id."""
    return {"type": "tool_use", "name": name, "input": given}


def steps(main: Sequence[Reply], agents: Sequence[Reply] = ()) -> Script:
    """A script of lists: the main agent's replies in turn, and those that each sub-agent gets; the last one repeats."""

    def script(request: Request) -> Reply:
        replies = main if request.agent is None else agents
        return replies[min(request.nth, len(replies) - 1)]

    return script


class Upstream:
    """The server's state: the script in force, and everything answered in the order of arrival."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answered: list[Answered] = []
        self._script: Script = steps([Reply([text("Nothing scripted.")])])
        self._lock = threading.Lock()
        self._nth: dict[str | None, int] = {}
        self._ids = 0

    def play(self, script: Script) -> None:
        """Answer from this script from now on, each agent from its first reply."""
        with self._lock:
            self._script, self._nth = script, {}

    def answer(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[Request, Reply, str]:
        """The scripted reply to a call, its tool uses and its message given ids; one call at a time."""
        with self._lock:
            agent = headers.get("x-claude-code-agent-id")
            nth = self._nth.get(agent, 0)
            self._nth[agent] = nth + 1
            request = Request(headers.get("x-claude-code-session-id", ""), agent, nth, body, headers)
            reply = self._script(request)
            self._ids += 1
            uses = [b | {"id": f"toolu_{self._ids:020}{at:04}"} for at, b in enumerate(reply.blocks) if "name" in b]
            blocks = [uses.pop(0) if "name" in block else block for block in reply.blocks]
            stop = reply.stop or ("tool_use" if "name" in (blocks or [{}])[-1] else "end_turn")
            return request, reply._replace(blocks=blocks, stop=stop), f"msg_{self._ids:024}"

    def keep(self, answered: Answered) -> None:
        """Add a call to what was answered."""
        with self._lock:
            self.answered.append(answered)
            self.answered.sort(key=lambda done: done.start_ns)


def _events(reply: Reply, message: str, model: str) -> Iterator[dict[str, Any]]:
    """A streamed message: the output count at its start is a placeholder, as on the real API."""
    head = {"id": message, "type": "message", "role": "assistant", "model": model, "content": []}
    head |= {"stop_reason": None, "stop_sequence": None, "usage": reply.usage.wire(1)}
    yield {"type": "message_start", "message": head}
    for at, block in enumerate(reply.blocks):
        if block["type"] == "text":
            empty, delta = block | {"text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = block | {"input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield {"type": "content_block_start", "index": at, "content_block": empty}
        yield {"type": "content_block_delta", "index": at, "delta": delta}
        yield {"type": "content_block_stop", "index": at}
    ended = {"stop_reason": reply.stop, "stop_sequence": None}
    yield {"type": "message_delta", "delta": ended, "usage": {"output_tokens": reply.usage.output}}
    yield {"type": "message_stop"}


class _Handler(BaseHTTPRequestHandler):
    """One connection; the upstream it speaks for hangs on the server."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._send(200, b"", "text/plain")

    def do_POST(self) -> None:
        start, upstream = time.time_ns(), self.server.upstream  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.partition("?")[0] != "/v1/messages":
            self._send(200, b'{"input_tokens": 1000}', "application/json")
            return
        request, reply, message = upstream.answer({k.lower(): v for k, v in self.headers.items()}, body)
        time.sleep(reply.seconds)
        upstream.keep(Answered(request, reply, message, start, time.time_ns()))
        if reply.status == 200:
            events = _events(reply, message, body["model"])
            sent = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
            self._send(200, sent.encode(), "text/event-stream")
        else:
            told = {"type": "error", "error": {"type": reply.error, "message": reply.error}}
            self._send(reply.status, json.dumps(told).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("request-id", f"req_{time.time_ns()}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *said: Any) -> None:
        """Say nothing."""


@contextmanager
def running() -> Iterator[Upstream]:
    """An upstream on a free loopback port, stopped at the end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.upstream = upstream = Upstream(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield upstream
        finally:
            server.shutdown()
