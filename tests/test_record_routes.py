"""Who may pass the recording proxy, and to which upstream."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from wire import asking, refused, settle, staged

TOLD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("path", "header", "code"),
    [
        ("/v1/messages", "accept: a/b", 401),
        ("/v1/messages", "x-keepwarm-token: wrong", 401),
        ("/wrong/v1/messages", "accept: a/b", 401),
        ("/v1/messages", "X-Keepwarm-Token: sesame", 200),
    ],
)
def test_a_token_is_asked_of_every_request(tmp_path: Path, path: str, header: str, code: int) -> None:
    """Without it nothing reaches the upstream; with it the upstream does not see it."""
    with staged(tmp_path, token="sesame") as stage:

        async def play() -> None:
            line = await stage.line()
            await line.ask(asking(header, path=path))
            if code == 200:
                got = await line.got()
                assert got.target.decode() == path
                assert b"x-keepwarm-token" not in [name.lower() for name, _ in got.headers]
                await line.tell(TOLD)
                assert await line.heard(len(TOLD)) == TOLD
            else:
                assert refused(await line.rest()) == code
                assert await line.left() == b""

        stage.run(play())
        assert len(stage.records()) == (code == 200)


def test_a_token_in_the_path_is_taken_out_of_it(tmp_path: Path) -> None:
    """For clients that can be given a base URL and no header."""
    with staged(tmp_path, token="sesame") as stage:

        async def play() -> None:
            line = await stage.line()
            await line.ask(asking(path="/sesame/v1/messages?beta=true"))
            assert (await line.got()).target == b"/v1/messages?beta=true"

        stage.run(play())


def test_several_upstreams_by_path_and_by_header(tmp_path: Path) -> None:
    """Each request to its own, on one client connection, and a word where there is none for it."""
    with staged(tmp_path, "/a=", "/a/b=", "x-to:c=") as stage:

        async def play() -> None:
            client = await stage.client()
            upstreams: dict[int, socket.socket] = {}
            for path, header, which, target in [
                ("/a/v1/messages", "x-to: d", 0, b"/v1/messages"),
                ("/a/b/v1/messages", "x-to: d", 1, b"/v1/messages"),
                ("/a/bc", "accept: a", 0, b"/bc"),
                ("/a?q=1", "accept: a", 0, b"/?q=1"),
                ("/z/v1/messages", "X-To: c", 2, b"/z/v1/messages"),
                ("/a/v1/messages", "x-to: c", 2, b"/a/v1/messages"),
            ]:
                await stage.loop.sock_sendall(client, asking(header, path=path))
                if which not in upstreams:
                    upstreams[which] = await stage.accept(which)
                line = stage.pair(client, upstreams[which])
                assert (await line.got()).target == target
                await line.tell(TOLD)
                assert await line.heard(len(TOLD)) == TOLD
            await stage.loop.sock_sendall(client, asking(path="/nowhere"))
            assert refused(await line.rest()) == 404

        stage.run(play())


def test_one_of_several_upstreams_that_closes_disturbs_no_other(tmp_path: Path) -> None:
    """An idle connection ends while another upstream's answer streams: that one goes on, and the first one again."""
    with staged(tmp_path, "/a=", "/b=") as stage:

        async def play() -> None:
            client = await stage.client()
            await stage.loop.sock_sendall(client, asking(path="/a/v1/messages"))
            one = stage.pair(client, await stage.accept(0))
            await one.got()
            await one.tell(TOLD)
            assert await one.heard(len(TOLD)) == TOLD
            await one.ask(asking(path="/b/v1/messages"))
            other = stage.pair(client, await stage.accept(1))
            await other.got()
            await other.tell(TOLD[:-1])
            await one.tell(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            one.upstream.close()
            await settle()
            await other.tell(TOLD[-1:])
            assert await other.heard(len(TOLD)) == TOLD
            await other.ask(asking(path="/a/v1/messages"))
            again = stage.pair(client, await stage.accept(0))
            await again.got()
            await again.tell(TOLD)
            assert await again.heard(len(TOLD)) == TOLD

        stage.run(play())


def test_pipelined_requests_to_an_upstream_that_is_down(tmp_path: Path) -> None:
    """The first is answered; the second is told that there is nobody."""
    with staged(tmp_path, "/a=", "/b=") as stage:
        stage.listeners[1].close()

        async def play() -> None:
            client = await stage.client()
            await stage.loop.sock_sendall(client, asking(path="/a/x") + asking(path="/b/x"))
            line = stage.pair(client, await stage.accept(0))
            await line.got()
            await line.tell(TOLD)
            assert await line.heard(len(TOLD)) == TOLD
            assert refused(await line.rest()) == 502

        stage.run(play())
