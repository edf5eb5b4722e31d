"""What is rare on the wire and yet goes through the recording proxy: odd bodies, early answers, upgrades, pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from wire import LAST, STREAM, UPGRADE, Stage, asking, chunk, post, settle, staged, streamed


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One proxy for all tests of this file; each has connections of its own."""
    with staged(tmp_path_factory.mktemp("record")) as made:
        yield made


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("asked", "encoding"),
    [
        (
            b'{"messages":[{"role":"user","content":'
            + b'[{"type":"tool_result","content":' * 400
            + b'"x"'
            + b"}]" * 400
            + b"}]}",
            "",
        ),
        (b'{"messages":[[]],"input":[[]],"tools":[[1]]}', ""),
        (b'{"model":{},"messages":{"role":[],"content":{"type":[]}},"input":{"type":[]}}', ""),
        (b"[1]", ""),
        (b"\x28\xb5\x2f\xfd broken", "zstd"),
        (b"x" * 99, "snappy"),
        (b"x" * 99, "lz4_raw"),
    ],
)
def test_a_body_that_makes_no_sense_is_passed_on(stage: Stage, path: str, asked: bytes, encoding: str) -> None:
    """What the recorder cannot read disturbs nobody."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(post(asked, f"content-encoding: {encoding}" if encoding else "accept: a/b", path=path))
        assert (await line.got()).body == asked
        answer = STREAM + chunk(b'data: {"type":"content_block_stop","index":{}}\n\n') + chunk(b"data: [[]]\n\n") + LAST
        await line.tell(answer)
        assert await line.heard(len(answer)) == answer
        await line.ask(asking(path=path))
        await line.got()

    stage.run(play())


def test_pipelined_requests_reach_the_upstream_one_by_one(stage: Stage) -> None:
    """Answers come in the order of the requests, however the client hurries."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(b"".join(asking(text=str(number)) for number in range(5)))
        for number in range(5):
            assert b'"content":"%d"' % number in (await line.got()).body
            answer = streamed(f"msg_p{number}")
            await line.tell(answer, [7, 300])
            assert await line.heard(len(answer)) == answer

    stage.run(play())


def test_a_client_that_waits_for_100_continue_gets_the_upstreams(stage: Stage) -> None:
    """Expect: 100-continue is between the two of them."""

    async def play() -> None:
        line = await stage.line()
        head, _, body = asking("expect: 100-continue").partition(b"\r\n\r\n")
        await line.ask(head + b"\r\n\r\n")
        asked = stage.loop.create_task(line.got())
        assert await line.heard(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        await line.ask(body)
        got = await asked
        assert got.body == body
        assert (b"expect", b"100-continue") in got.headers
        await line.tell(streamed())
        assert await line.heard(len(streamed())) == streamed()

    stage.run(play())


def test_an_upgrade_that_the_upstream_does_not_take_leaves_the_connection_as_it_is(stage: Stage) -> None:
    """Some clients offer h2c with every first request; the next one goes the same way."""

    async def play() -> None:
        line = await stage.line()
        for offer in (("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AA"), ()):
            await line.ask(asking(*offer))
            assert (b"upgrade", b"h2c") in (await line.got()).headers or not offer
            await line.tell(streamed("msg_h2c"))
            assert await line.heard(len(streamed("msg_h2c"))) == streamed("msg_h2c")

    stage.run(play())


def test_responses_over_a_websocket_are_refused(stage: Stage) -> None:
    """Codex goes back to HTTP at 426; the upstream hears nothing of it."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(UPGRADE.replace(b"/socket", b"/v1/responses"))
        answer = await line.rest()
        assert answer.startswith(b"HTTP/1.1 426 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert await line.left() == b""

    stage.run(play())


def test_responses_with_another_upgrade_pass(stage: Stage) -> None:
    """Java's client offers HTTP/2 with each request: it is no WebSocket, and the upstream says what it thinks of it."""

    async def play() -> None:
        line = await stage.line()
        offer = asking("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AA")
        await line.ask(offer.replace(b"/v1/messages", b"/v1/responses"))
        assert (await line.got()).target == b"/v1/responses"
        await line.tell(streamed("resp_h2c"))
        assert await line.heard(len(streamed("resp_h2c"))) == streamed("resp_h2c")

    stage.run(play())


@pytest.mark.parametrize("framing", ["", "content-length: 12\r\n", "connection: keep-alive\r\n"])
def test_head_leaves_the_connection_open(stage: Stage, framing: str) -> None:
    """Claude Code begins with HEAD /: its connection is for the calls that follow, whatever the answer's head tells."""

    async def play() -> None:
        line = await stage.line()
        answer = f"HTTP/1.1 200 OK\r\n{framing}\r\n".encode()
        for _ in range(2):
            await line.ask(b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n")
            await line.got()
            await line.tell(answer)
            assert await line.heard(len(answer)) == answer
        await line.ask(asking())
        assert (await line.got()).method == b"POST"

    stage.run(play())


def test_the_connection_ends_when_the_upstreams_does(stage: Stage) -> None:
    """After the last byte, not before."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking())
        await line.got()
        answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"
        await line.tell(answer)
        line.upstream.close()
        assert await line.rest() == answer

    stage.run(play())


@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_before_the_end_of_its_request(stage: Stage, whole: bool) -> None:
    """An upstream may answer while it is still being asked: the answer goes through, and so does the rest."""

    async def play() -> None:
        line = await stage.line()
        wire = asking(text="x" * 5000)
        await line.ask(wire[:900])
        await settle()
        answer = b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\n{}"
        await line.tell(answer)
        assert await line.heard(len(answer)) == answer
        if whole:
            await line.ask(wire[900:])
            assert len((await line.got()).body) > 5000
            await line.ask(asking(text="the next"))
            assert b"the next" in (await line.got()).body
            await line.tell(streamed())
            assert await line.heard(len(streamed())) == streamed()

    stage.run(play())


def test_bytes_that_nobody_asked_for(stage: Stage) -> None:
    """What an upstream says unasked, such as 408 before it closes an idle connection, the client hears too."""

    async def play() -> None:
        line = await stage.line()
        told = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        await line.tell(told)
        line.upstream.close()
        assert await line.rest() == told

    stage.run(play())


def test_an_answer_that_only_its_client_understands_does_not_block_the_next_request(stage: Stage) -> None:
    """A head with bare line feeds: the client reads it, and asks again."""

    async def play() -> None:
        line = await stage.line()
        for number in range(2):
            await line.ask(asking(text=f"number {number}"))
            assert b"number %d" % number in (await line.got()).body
            await line.tell(b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}")
            assert await line.heard(37) == b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}"

    stage.run(play())


def test_a_request_that_breaks_off_in_garbage_is_refused(stage: Stage) -> None:
    """A chunk size that is none: the client is told, and the upstream is not left waiting."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await line.ask(b"nonsense\r\n\r\n")
        assert (await line.rest()).startswith(b"HTTP/1.1 400 ")
        assert b"3\r\nabc\r\n" in await line.left()

    stage.run(play())


@pytest.mark.parametrize(
    "wire", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_no_http_is_refused(stage: Stage, wire: bytes) -> None:
    """TLS on a plain port, or a mistyped client: a word of HTTP, and an end."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(wire)
        assert (await line.rest()).startswith(b"HTTP/1.1 400 ")

    stage.run(play())


def test_a_head_without_an_end_is_refused(stage: Stage) -> None:
    """It would be kept until it is whole: a megabyte is enough."""

    async def play() -> None:
        line = await stage.line()
        with suppress(ConnectionError):
            await line.ask(b"GET / HTTP/1.1\r\nx: " + b"x" * 9_000_000)
        assert (await line.rest()).startswith(b"HTTP/1.1 400 ")
        assert await line.left() == b""

    stage.run(play())
