"""A recorder in the middle: a scripted upstream behind it, a client before it, and the trace that comes of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import dialects
import httpx

from keepwarm.harness.proxy import Proxy
from keepwarm.harness.recorder import Recorder
from keepwarm.harness.routes import route
from keepwarm.traces.identity import new_salt
from keepwarm.traces.model import Call
from keepwarm.traces.recorded import close_journal
from keepwarm.traces.store import read_calls


class Asked(NamedTuple):
    """A request as the upstream got it, and when it was whole (monotonic ns)."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    at_ns: int

    def json(self) -> Any:
        """Its body, read."""
        return json.loads(self.body)


class Reply(NamedTuple):
    """What the upstream sends back, piece by piece; with ``trailers``, or after less than it promised where ``cut``."""

    pieces: Iterable[bytes] = ()
    status: int = 200
    headers: Mapping[str, str] = {"content-type": "application/json"}
    trailers: Mapping[str, str] = {}
    cut: bool = False


Script = Callable[[Asked], Reply]


def says(dialect: str, answer: dialects.Said, *, stream: bool = False, zipped: bool = False) -> Reply:
    """The reply that an answer is."""
    pieces = dialects.events(dialect, answer) if stream else [json.dumps(dialects.whole(dialect, answer)).encode()]
    headers = {"content-type": "text/event-stream" if stream else "application/json"}
    if zipped:
        packed = gzip.compress(b"".join(pieces))
        return Reply([packed[:20], packed[20:]], headers=headers | {"content-encoding": "gzip"})
    return Reply(pieces, headers=headers)


def refuses(status: int, kind: str = "api_error", message: str = "no") -> Reply:
    """An error as the APIs tell it."""
    return Reply([json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()], status)


class _Handler(BaseHTTPRequestHandler):
    """One connection; the script hangs on the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.script(Asked(self.path, headers, body, time.monotonic_ns()))  # type: ignore[attr-defined]
        self.send_response(reply.status)
        for name, value in {**reply.headers, "transfer-encoding": "chunked"}.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in reply.pieces:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.close_connection = reply.cut
        if not reply.cut:
            trailers = "".join(f"{name}: {value}\r\n" for name, value in reply.trailers.items())
            self.wfile.write(b"0\r\n" + trailers.encode() + b"\r\n")

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *said: Any) -> None:
        """Say nothing."""


@contextmanager
def upstream(script: Script) -> Iterator[str]:
    """The URL of an upstream that answers by a script."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.script = script  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@contextmanager
def proxied(url: str, recorder: Recorder) -> Iterator[tuple[str, Proxy]]:
    """A proxy before an upstream, and its URL; it runs in a thread of its own."""
    proxy = Proxy([route(url)], recorder)
    started, stop = threading.Event(), asyncio.Event()
    told: dict[str, Any] = {}

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(proxy.client, "127.0.0.1", 0)
        told.update(port=server.sockets[0].getsockname()[1], loop=loop)
        started.set()
        await stop.wait()
        server.close()
        for client in list(proxy.clients):
            client.transport.abort()
        await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{told['port']}", proxy
    finally:
        told["loop"].call_soon_threadsafe(stop.set)
        thread.join(10)


class Recording:
    """A recording under way, and then its calls in trace order."""

    def __init__(self, url: str, path: Path, proxy: Proxy) -> None:
        self.path = path
        self.proxy = proxy
        self.calls: list[Call] = []
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=20)

    def ask(self, dialect: str, body: Any, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Send a request, and wait for all of its answer."""
        return self.client.post(dialects.PATHS[dialect], json=body, headers=headers)

    def restart(self) -> None:
        """Stop the recorder where it is, and go on with another one on what it left."""
        left = self.proxy.recorder
        left.close()
        self.proxy.recorder = Recorder(left.journal.path, new_salt())

    @property
    def call(self) -> Call:
        """The only call."""
        (only,) = self.calls
        return only


@contextmanager
def recording(folder: Path, script: Script, **options: Any) -> Iterator[Recording]:
    """Record what is asked inside; at the end the trace is there, and the recording's ``calls``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "t.parquet"
    path.unlink(missing_ok=True)
    journal = path.with_name(path.name + ".journal")
    journal.unlink(missing_ok=True)
    recorder = Recorder(journal, new_salt(), **options)
    with upstream(script) as url, proxied(url, recorder) as (front, proxy):
        made = Recording(front, path, proxy)
        with made.client:
            yield made
    made.proxy.recorder.close()
    close_journal(journal, str(path), version="0")
    made.calls = list(read_calls(str(path)))


class Talk:
    """A client and its upstream at once: each request goes out with the answer that it is to get.

    Answers are accounted by length, a token each three bytes of request; calls are known by their number, 1 first,
    which is their output count.
    """

    def __init__(self, dialect: str = "messages", *, stream: bool = False) -> None:
        self.dialect = dialect
        self.number = 0
        self._stream = stream
        self._said: dict[str, dialects.Said] = {}

    def script(self, asked: Asked) -> Reply:
        """What the upstream answers."""
        return says(self.dialect, self._said.pop(asked.headers["x-test-number"]), stream=self._stream)

    def ask(
        self,
        made: Recording,
        turns: Sequence[dialects.Turn],
        *said: str | dialects.Use,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> int:
        """Ask, and be answered with ``said``; the call's number."""
        self.number += 1
        body = dialects.request(self.dialect, turns, stream=self._stream, **more)
        tokens = dialects.Tokens(len(json.dumps(body)) // 3, self.number, 0, 0)
        self._said[str(self.number)] = dialects.Said(said or ("Done.",), tokens)
        response = made.ask(self.dialect, body, {**(headers or {}), "x-test-number": str(self.number)})
        assert response.status_code == 200
        return self.number


def numbered(made: Recording) -> dict[int, Call]:
    """A talk's calls by their numbers."""
    return {call.output: call for call in made.calls if call.output is not None}
