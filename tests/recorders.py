"""``keepwarm record`` as a process of its own, and upstreams for it that run beside the test."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

Handler = Callable[[socket.socket], None]
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
PATIENCE_S = 30.0


def command(*arguments: object) -> list[str]:
    """The command line of ``keepwarm record``."""
    return [sys.executable, "-m", "keepwarm.harness.cli", "record", *map(str, arguments)]


class Recording:
    """A recorder that is running."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        self.said = ""
        while "listening on " not in self.said:
            line = process.stderr.readline()
            assert line, f"it ended: {self.said}"
            self.said += line
        self.url = self.said.rpartition("listening on ")[2].strip()

    def connect(self) -> socket.socket:
        """A client's connection."""
        port = int(self.url.rpartition(":")[2])
        return socket.create_connection(("127.0.0.1", port), PATIENCE_S)

    def rss(self) -> int:
        """Its resident memory in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def ended(self) -> int:
        """Wait for its end; its exit code."""
        said = self.process.communicate(timeout=PATIENCE_S)[1]
        self.said += said
        return self.process.returncode

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.terminate()
        return self.ended()


@contextmanager
def recording(*arguments: object, env: Mapping[str, str] | None = None) -> Iterator[Recording]:
    """A recorder with these arguments; it is killed where the test leaves it running."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env or {})
    with subprocess.Popen(command(*arguments), env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Recording(process)
        finally:
            if process.poll() is None:
                process.kill()


def closed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A run of ``keepwarm record`` that ends by itself."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@contextmanager
def answering(handler: Handler, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server on a port of loopback that handles each connection in a thread of its own."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
        threads: list[threading.Thread] = []
        taken: list[socket.socket] = []

        def handle(sock: socket.socket) -> None:
            with suppress(OSError), sock, tls.wrap_socket(sock, server_side=True) if tls else sock as spoken:
                handler(spoken)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    sock = server.accept()[0]
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    taken.append(sock)
                    threads.append(threading.Thread(target=handle, args=(sock,)))
                    threads[-1].start()

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            serving.join()
            for sock in taken:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def asked(sock: socket.socket) -> bytes:
    """The next request with a body of a told length, head and all; nothing where the connection ends."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(1 << 16)
        if not more:
            return b""
        data += more
    told = LENGTH.search(data)
    whole = data.index(b"\r\n\r\n") + 4 + (int(told[1]) if told else 0)
    while len(data) < whole:
        more = sock.recv(1 << 16)
        if not more:
            return b""
        data += more
    return data


def hear(sock: socket.socket, size: int) -> bytes:
    """So many bytes, fewer only where the connection ends."""
    got = bytearray()
    while len(got) < size and (more := sock.recv(min(1 << 18, size - len(got)))):
        got += more
    return bytes(got)
