"""A scripted Responses API on loopback: it answers the real Codex from a script and keeps what it answered.

As ``upstream.py`` is for Claude Code. A reply is a list of output items; the upstream gives them ids and an account,
that of a cache which holds every prompt it was sent under the same key. Nothing here leaves the machine.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Item = dict[str, Any]
UNSEEN = "id", "internal_chat_message_metadata_passthrough", "status"
"""Keys of an input item that no model sees."""


class Usage(NamedTuple):
    """The account of a reply, in tokens; ``prompt`` has ``read`` and ``written`` in it, ``output`` ``reasoning``."""

    prompt: int
    read: int
    written: int
    output: int
    reasoning: int

    def wire(self) -> dict[str, Any]:
        """The account as the API tells it."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.read, "cache_write_tokens": self.written},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.prompt + self.output,
        }


class Request(NamedTuple):
    """A call as it came in. ``agent`` is a sub-agent's thread; ``nth``: which of its agent's calls of this kind."""

    session: str
    agent: str | None
    kind: str
    nth: int
    body: dict[str, Any]
    headers: dict[str, str]

    def visible(self) -> str:
        """What of it reaches the model, as one text: equal prefixes of it are equal prefixes of the prompt."""
        seen = [{k: v for k, v in item.items() if k not in UNSEEN} for item in self.body["input"]]
        return json.dumps([self.body.get("tools"), seen], sort_keys=True)


class Reply(NamedTuple):
    """What to answer: output items, or a ``status`` other than 200; a ``cut`` stream ends before its last event."""

    items: Sequence[Item] = ()
    status: int = 200
    cut: bool = False
    usage: Usage | None = None


class Answered(NamedTuple):
    """A call and what it got. Times are ns since 1970: when it came in, and when its reply was about to be written."""

    request: Request
    reply: Reply
    id: str
    start_ns: int
    end_ns: int

    @property
    def whole(self) -> bool:
        """Whether it was answered to the end: only then does the client learn its account."""
        return self.reply.status == 200 and not self.reply.cut


Script = Callable[[Request], Reply]


def says(words: str) -> Item:
    """A message of the model."""
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": words}]}


def use(name: str, namespace: str | None = None, **given: Any) -> Item:
    """A tool use; the upstream gives it an id."""
    called = {"type": "function_call", "name": name, "arguments": json.dumps(given)}
    return called | ({"namespace": namespace} if namespace else {})


def thinks(words: str) -> Item:
    """A piece of reasoning, sealed as the API does for clients that it does not keep answers for."""
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": words}], "encrypted_content": "c2VhbGVk"}


def steps(main: Sequence[Reply], agents: Sequence[Reply] = (), summary: Reply | None = None) -> Script:
    """A script of lists: the main agent's replies in turn, those of each sub-agent, and that to any compaction."""

    def script(request: Request) -> Reply:
        if request.kind == "compaction" and summary:
            return summary
        replies = agents if request.agent else main
        return replies[min(request.nth, len(replies) - 1)]

    return script


class Upstream:
    """The server's state: the script in force, everything answered in the order of arrival, WebSockets asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answered: list[Answered] = []
        self.sockets = 0
        self._script: Script = steps([Reply([says("Nothing scripted.")])])
        self._lock = threading.Lock()
        self._nth: dict[tuple[str | None, str], int] = {}
        self._ids, self._outputs = itertools.count(1), itertools.count(101)
        self._prompts: dict[str, list[str]] = {}

    def play(self, script: Script) -> None:
        """Answer from this script from now on, each agent from its first reply."""
        with self._lock:
            self._script, self._nth = script, {}

    def answer(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[Request, Reply, str]:
        """The scripted reply to a call, its items given ids and it an account; one call at a time."""
        with self._lock:
            agent = headers["thread-id"] if "x-codex-parent-thread-id" in headers else None
            kind = json.loads(headers["x-codex-turn-metadata"])["request_kind"]
            nth = self._nth.get((agent, kind), 0)
            self._nth[agent, kind] = nth + 1
            request = Request(headers["session-id"], agent, kind, nth, body, headers)
            reply = self._script(request)
            items = [self._named(item) for item in reply.items]
            usage = self._account(request) if reply.status == 200 else None
            return request, reply._replace(items=items, usage=usage), f"resp_{next(self._ids):024}"

    def _named(self, item: Item) -> Item:
        number = f"{next(self._ids):024}"
        call = {"call_id": f"call_{number}"} if "arguments" in item else {}
        return item | {"id": f"{item['type'][:2]}_{number}", "status": "completed"} | call

    def _account(self, request: Request) -> Usage:
        """Four characters a token; read is what an earlier prompt began with, in steps of 128 as on the real API, and
        as much of the rest as fills such steps is written.
        """
        prompt, before = request.visible(), self._prompts.setdefault(request.body["prompt_cache_key"], [])
        common = max((len(os.path.commonprefix([prompt, other])) for other in before), default=0)  # noqa: RUF071
        before.append(prompt)
        tokens, read = len(prompt) // 4, common // 512 * 128
        return Usage(tokens, read, (tokens - read) // 128 * 128, next(self._outputs), 7)

    def keep(self, answered: Answered) -> None:
        """Add a call to what was answered."""
        with self._lock:
            self.answered.append(answered)
            self.answered.sort(key=lambda done: done.start_ns)


def _events(reply: Reply, response: str, model: str) -> Iterator[dict[str, Any]]:
    head = {"id": response, "object": "response", "model": model}
    yield {"type": "response.created", "response": head | {"status": "in_progress", "output": []}}
    for at, item in enumerate(reply.items):
        yield {"type": "response.output_item.added", "output_index": at, "item": item | {"status": "in_progress"}}
        if item["type"] == "message":
            delta = {"item_id": item["id"], "content_index": 0, "delta": item["content"][0]["text"]}
            yield {"type": "response.output_text.delta", "output_index": at} | delta
        yield {"type": "response.output_item.done", "output_index": at, "item": item}
    if reply.usage and not reply.cut:
        ended = {"status": "completed", "output": list(reply.items), "usage": reply.usage.wire()}
        yield {"type": "response.completed", "response": head | ended}


class _Handler(BaseHTTPRequestHandler):
    """One connection; the upstream it speaks for hangs on the server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """A WebSocket is not to be had: the client's built-in provider asks for one first, and then posts."""
        self.server.upstream.sockets += 1  # type: ignore[attr-defined]
        self._head(426, "application/json", connection="close", content_length="0")

    def do_POST(self) -> None:
        start, upstream = time.time_ns(), self.server.upstream  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        request, reply, response = upstream.answer({k.lower(): v for k, v in self.headers.items()}, body)
        upstream.keep(Answered(request, reply, response, start, time.time_ns()))
        if reply.status != 200:
            told = json.dumps({"error": {"message": "busy", "type": "server_error", "code": None}}).encode()
            self._head(reply.status, "application/json", content_length=str(len(told)))
            self.wfile.write(told)
            return
        self._head(200, "text/event-stream", transfer_encoding="chunked")
        events = _events(reply, response, body["model"])
        sent = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
        chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in sent]
        self.close_connection = reply.cut
        self.wfile.write(b"".join(chunks) + (b"" if reply.cut else b"0\r\n\r\n"))

    def _head(self, status: int, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("x-request-id", f"req_{time.time_ns()}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

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
