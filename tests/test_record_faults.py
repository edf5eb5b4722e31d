"""The recording proxy at faults: what each side then sees, and what is written of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from wire import CALL, STREAM, Stage, asking, chunk, events, post, receive, refused, rst, settle, staged, streamed

from keepwarm.harness import recorder
from keepwarm.traces.recorded import close_journal
from keepwarm.traces.store import read_calls

MB = 1 << 20
BIG = asking(text="x" * (4 * MB))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A proxy and one upstream."""
    with staged(tmp_path) as made:
        yield made


def errors(stage: Stage) -> list[str | None]:
    """How each call ended that the journal has an answer of."""
    return [answer.error for _, answer in stage.records() if answer is not None]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        pytest.param([asking()], True, id="whole at once"),
        pytest.param([asking()[:-30], asking()[-30:]], True, id="the body comes later"),
        pytest.param([BIG[: 3 * MB], BIG[3 * MB :]], True, id="a large body"),
        pytest.param([asking("expect: 100-continue").partition(b"{")[0]], True, id="the client waits to go on"),
        pytest.param([b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"], False, id="no call"),
    ],
)
def test_an_upstream_that_is_down_is_a_502(stage: Stage, parts: list[bytes], told: bool) -> None:
    """The client hears which upstream, however it sends; a call is recorded with the error reset."""
    stage.listeners[0].close()

    async def play() -> bytes:
        client = await stage.client()
        for part in parts:
            await stage.loop.sock_sendall(client, part)
            for _ in range(20):
                await settle()
        try:
            return await receive(client)
        finally:
            client.close()

    answer = stage.run(play())
    assert refused(answer) == 502
    assert b"127.0.0.1:" in answer
    assert errors(stage) == (["reset"] if told else [])


def test_an_upstream_that_resets_resets_the_client(stage: Stage) -> None:
    """In the midst of a stream: no clean end that could be taken for one."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking())
        await line.got()
        await line.tell(STREAM + b"".join(map(chunk, events()[:3])))
        rst(line.upstream)
        with pytest.raises(ConnectionResetError):
            await line.rest()

    stage.run(play())
    ((_, answer),) = stage.records()
    assert answer is not None
    assert (answer.error, answer.status) == ("reset", 200)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", STREAM + chunk(events()[0])])
def test_an_answer_that_breaks_off_ends_as_it_did(stage: Stage, sent: bytes) -> None:
    """The upstream closes before its answer is whole: so does the proxy, after the last byte."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking())
        await line.got()
        await line.tell(sent)
        line.upstream.close()
        assert await line.rest() == sent

    stage.run(play())
    assert errors(stage) == ["reset"]


def test_an_idle_connection_ends_at_both_sides(stage: Stage) -> None:
    """The upstream closes what nobody uses: its client is not left with a connection that leads nowhere."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking())
        await line.got()
        await line.tell(streamed())
        assert await line.heard(len(streamed())) == streamed()
        line.upstream.close()
        assert await line.rest() == b""

    stage.run(play())
    assert errors(stage) == [None]


@pytest.mark.parametrize(
    ("seen", "error"), [(3, "cancelled"), (len(events()), None)], ids=["midstream", "at the final event"]
)
def test_a_client_that_leaves_is_known_at_the_upstream(stage: Stage, seen: int, error: str | None) -> None:
    """The upstream can stop; it is a cancelled call, unless nothing but the end of the stream was missing."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking())
        await line.got()
        told = STREAM + b"".join(map(chunk, events()[:seen]))
        await line.tell(told)
        assert await line.heard(len(told)) == told
        line.client.close()
        await line.left()

    stage.run(play())
    assert errors(stage) == [error]


def test_a_client_that_leaves_and_asks_the_same_again_has_made_one_call(stage: Stage, tmp_path: Path) -> None:
    """As SDKs do when they have waited too long: what was asked in the cold is no second, warm call."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking())
        await line.got()
        line.client.close()
        await line.left()
        again = await stage.line()
        await again.ask(asking())
        await again.got()
        await again.tell(streamed())
        assert await again.heard(len(streamed())) == streamed()

    stage.run(play())
    assert errors(stage) == ["cancelled", None]
    close_journal(stage.journal, str(tmp_path / "t.parquet"), version="0")
    (call,) = read_calls(str(tmp_path / "t.parquet"))
    assert (call.turn, call.retries, [tried.error for tried in call.attempts]) == (0, 1, ["cancelled", None])


def test_a_client_that_leaves_before_it_has_asked_leaves_no_call(stage: Stage) -> None:
    """Half a request is none."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking()[:-5])
        line.client.close()
        assert (await line.left()).startswith(b"POST ")

    stage.run(play())
    assert stage.records() == []


def test_a_refusal_reaches_a_client_that_is_still_sending(stage: Stage) -> None:
    """An upstream that answers a large body at its head, and closes: the client gets the answer, and no reset."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(BIG[:MB])
        answer = b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"
        await line.tell(answer)
        rst(line.upstream)
        await line.ask(BIG[MB:])
        assert await line.rest() == answer

    stage.run(play())
    ((asked, told),) = stage.records()
    assert told is not None
    assert (asked.rest, told.status, told.error) == ([], 413, "overflow")


async def flood(stage: Stage, sock: socket.socket, data: bytes, most: int) -> int:
    """Send until the other side takes no more; how much it took."""
    sent = quiet = 0
    while quiet < 50 and sent < most:
        try:
            sent, quiet = sent + sock.send(data), 0
        except BlockingIOError:
            quiet += 1
        await settle()
    return sent


def test_a_slow_reader_slows_its_upstream(stage: Stage) -> None:
    """An answer that nobody reads stays where it is; nothing piles up in the proxy."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(asking())
        await line.got()
        await line.tell(STREAM)
        assert await flood(stage, line.upstream, chunk(b"data: {}\n\n" * 10_000), 50 * MB) < 30 * MB
        (client,) = stage.proxy.clients
        assert client.transport.get_write_buffer_size() < MB

    stage.run(play())


def test_a_client_that_asks_and_asks_and_does_not_read(stage: Stage) -> None:
    """It gets all of its answers in the end, and until then they are not in the proxy's memory."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + bytes(100_000)

    async def play() -> None:
        line = await stage.line()
        await line.ask(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n" * 200)

        async def answers() -> None:
            for _ in range(200):
                await line.got()
                await line.tell(answer)

        answering = stage.loop.create_task(answers())
        for _ in range(2000):
            await settle()
        (client,) = stage.proxy.clients
        assert client.transport.get_write_buffer_size() < MB
        assert not answering.done()
        assert await line.heard(200 * len(answer)) == 200 * answer
        await answering

    stage.run(play())


def test_a_slow_upstream_slows_its_client(stage: Stage) -> None:
    """A body that the upstream does not take waits where it is, whether or not the upstream has been reached."""

    async def play() -> None:
        line = await stage.line()
        head = b"POST /upload HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n"
        await line.ask(head)
        assert await flood(stage, line.client, bytes(MB), 90 * MB) < 30 * MB
        (client,) = stage.proxy.clients
        (upstream,) = client._upstreams.values()
        assert upstream.transport.get_write_buffer_size() < 2 * MB

    stage.run(play())


def test_what_waits_for_an_upstream_goes_on_when_it_is_there(tmp_path: Path) -> None:
    """More than may wait, while the upstream connects: it does not pile up, and none of it is lost."""
    with staged(tmp_path, "/a=") as stage:

        async def play() -> None:
            client = await stage.client()
            body = bytes(range(256)) * (40 * MB // 256)
            sending = stage.loop.create_task(stage.loop.sock_sendall(client, post(body, path="/a/upload")))
            upstream = await stage.accept()
            for _ in range(300):
                await settle()
            (one,) = stage.proxy.clients
            assert one._upstreams[stage.proxy.routes[0]].transport.get_write_buffer_size() < 4 * MB
            assert not sending.done()
            head, start = (await receive(upstream, 200)).split(b"\r\n\r\n")
            assert b"content-length: %d" % len(body) in head
            assert start + await receive(upstream, len(body) - len(start)) == body
            await sending
            client.close()
            upstream.close()

        stage.run(play())


def test_a_body_over_the_bound_is_passed_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call is there, and no failure: what it was asked, or what it said, is unknown."""
    monkeypatch.setattr(recorder, "MOST_BYTES", 5000)
    whole = {"id": "msg_1", "content": [], "usage": {"input_tokens": 1, "output_tokens": 2}}
    small = json.dumps(whole).encode()
    large = json.dumps(whole | {"content": [{"type": "text", "text": "x" * 9000}]}).encode()

    async def play() -> None:
        line = await stage.line()
        for text, answer in (("short", small), ("x" * 9000, small), ("short", large)):
            await line.ask(asking("x-claude-code-session-id: s", text=text))
            assert text.encode() in (await line.got()).body
            told = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer
            await line.tell(told)
            assert await line.heard(len(told)) == told
        await line.ask(asking("x-claude-code-session-id: s"))
        await line.got()
        await line.tell(streamed(words=["x" * 50] * 99))
        assert (await line.heard(len(streamed(words=["x" * 50] * 99)))).endswith(streamed()[-20:])

    stage.run(play())
    records = stage.records()
    assert [len(one.rest) for one, _ in records[:2]] == [1, 0]
    unknown = (None, None, 200)
    told = [told and (told.output, told.error, told.status) for _, told in records]
    assert told == [(2, None, 200), (2, None, 200), unknown, unknown]


def test_a_large_request_is_written_before_its_answer_is_known(stage: Stage) -> None:
    """It is taken apart beside the loop, and yet the client's last byte comes after the record."""

    async def play() -> None:
        line = await stage.line()
        await line.ask(BIG)
        await line.got()
        await line.tell(streamed("msg_big"))
        assert await line.heard(len(streamed())) != b""
        assert await line.heard(len(streamed("msg_big")) - len(streamed())) != b""
        assert errors(stage) == [None]

    stage.run(play())


def test_a_disk_that_refuses_for_a_while_costs_those_calls_only(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traffic goes on; afterwards the agent is the same, and its prompts are whole again."""
    session = "x-claude-code-session-id: s"
    add = stage.recorder.journal.add

    def full(record: object) -> None:
        raise OSError(28, "No space left on device")

    async def play() -> None:
        line = await stage.line()
        messages: list[object] = [{"role": "user", "content": "0"}]
        for number in range(5):
            monkeypatch.setattr(stage.recorder.journal, "add", full if number in (1, 2) else add)
            body = json.dumps(CALL | {"messages": messages, "tools": [{"name": "Bash"}]}).encode()
            await line.ask(post(body, session))
            assert (await line.got()).body == body
            told = streamed(f"msg_{number}")
            await line.tell(told)
            assert await line.heard(len(told)) == told
            messages.append({"role": "user", "content": str(number + 1)})

    stage.run(play())
    calls = [asked for asked, _ in stage.records()]
    assert stage.recorder.lost == 2
    assert "space" in stage.recorder.why_lost
    assert [(one.role, one.keep, len(one.rest)) for one in calls] == [("main", 0, 2), ("main", 0, 5), ("main", 5, 1)]
    assert len({(one.agent, one.thread) for one in calls}) == 1
