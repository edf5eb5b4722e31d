"""HttpEndpoint: connections, keys, times, failures as values."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import NO_TOOLS, against, request, send, stream_of
from serving import cluster, running

from keepwarm.harness.serve import create_app
from keepwarm.replayers.endpoint import Answer, Piece, Said
from keepwarm.replayers.http import HttpEndpoint, reach
from keepwarm.traces.errors import InputError


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """A served worker with engine rules and blocks of 16; each test asks under a salt of its own."""
    cache = {"ttl": "none", "block": 16, "capacity": None, "rules": "engine"}
    with running(create_app(cluster(), model="sim", cache=cache)) as url:
        yield url


def test_salted_run_starts_cold(engine: str) -> None:
    """The same prompt is read within a run and not under another run's salt; both have the planned length."""
    prompt = request(Piece(1, 64, "lead"), Piece(2, 36, "user"))
    reads = [a.cache_read for salt in ("x", "y") for a in send(engine, prompt, prompt, salt=salt, costs=NO_TOOLS)]
    assert reads == [0, 96, 0, 96]


def test_times_stand_in_order(engine: str) -> None:
    """Sent, first byte, first token, every token, last token, done: in this order on the caller's clock."""
    (answer,) = send(engine, request(Piece(1, 20, "user"), output=50), salt="times")
    assert answer.token_ns is not None
    order = [answer.sent_ns, answer.first_byte_ns, answer.first_token_ns, *answer.token_ns, answer.last_token_ns]
    assert None not in order
    assert [*order, answer.done_ns] == sorted([*order, answer.done_ns])  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (429, {"type": "rate_limit_error", "message": ""}, "rate_limit"),
        (529, {"type": "overloaded_error", "message": ""}, "overloaded"),
        (503, None, "overloaded"),
        (401, {"type": "authentication_error", "message": ""}, "auth"),
        (403, None, "auth"),
        (400, {"type": "invalid_request_error", "message": "messages: wrong"}, "bad_request"),
        (422, None, "bad_request"),
        (400, {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"}, "overflow"),
        (400, {"message": "This model's maximum context length is 8 tokens.", "code": 400}, "overflow"),
        (413, None, "overflow"),
        (504, None, "timeout"),
        (500, None, "other"),
        (302, None, "other"),
    ],
)
def test_refusals_are_values(status: int, error: dict[str, Any] | None, expected: str) -> None:
    """A status that is not 200 makes an answer with its class and no token account."""
    answer = against(lambda _: httpx.Response(status, json={"error": error} if error else None))
    assert (answer.error, answer.status, answer.prompt, answer.usage_source) == (expected, status, None, "absent")


START = {"type": "message_start", "message": {"usage": {"input_tokens": 1990, "output_tokens": 0}}}
DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}
SPLIT = {"input_tokens": 6, "output_tokens": 4, "cache_creation_input_tokens": 32, "cache_read_input_tokens": 1952}
END = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": SPLIT}
STOP = {"type": "message_stop"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (stream_of(START, DELTA), "reset"),
        (stream_of(START, DELTA, END), "reset"),
        (b"", "reset"),
        (stream_of(START, {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}), "overloaded"),
        (stream_of(START, {"type": "error", "error": {"type": "api_error", "message": "m"}}), "other"),
        (stream_of("{"), "other"),
        (stream_of("7", "[]", "null", {"type": 3}, {"type": "message_start", "message": 1}), "reset"),
    ],
)
def test_broken_streams_are_values(body: bytes, expected: str) -> None:
    """A stream that tells an error, ends before its last event or holds rubbish is a failed answer of status 200."""
    answer = against(lambda _: httpx.Response(200, content=body))
    assert (answer.error, answer.status) == (expected, 200)


def test_estimate_at_the_start_of_a_stream_is_no_usage() -> None:
    """vLLM starts with the whole prompt as input_tokens and tells the split at the end: the end holds, and a stream
    that breaks before it has told nothing.
    """
    whole = against(lambda _: httpx.Response(200, content=stream_of(START, DELTA, DELTA, END, STOP)))
    assert (whole.error, whole.prompt, whole.uncached, whole.cache_read) == (None, 1990, 6, 1952)
    assert (whole.cache_write_5m, whole.cache_write_1h, whole.cache_write_other) == (None, None, 32)
    assert (whole.output, whole.stop_reason, len(whole.token_ns or ())) == (4, "max_tokens", 2)
    broken = against(lambda _: httpx.Response(200, content=stream_of(START, DELTA)))
    assert (broken.prompt, broken.usage_source, broken.write_source) == (None, "absent", "absent")


def test_slow_answers_time_out() -> None:
    """A call that takes longer than it may is a value, whether the headers or the body are late."""

    async def late_body() -> AsyncIterator[bytes]:
        yield stream_of(START)
        await asyncio.sleep(30)

    async def late_headers(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        return httpx.Response(200)

    slow = against(late_headers, timeout_s=0.05)
    assert (slow.error, slow.status) == ("timeout", None)
    slow = against(lambda _: httpx.Response(200, content=late_body()), timeout_s=0.05)
    assert (slow.error, slow.status) == ("timeout", 200)


def test_refused_and_cut_connections_are_resets() -> None:
    """Nobody listening, and a server that hangs up in mid-stream, both come out as reset."""

    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        chunk = stream_of(START)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(chunk), chunk))
        await writer.drain()
        writer.close()

    async def both() -> list[Answer]:
        server = await asyncio.start_server(hangs_up, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        endpoint = HttpEndpoint(reach(url, "messages"), dialect="messages", model="m", clock=time.monotonic_ns)
        cut_off = await endpoint.send(request(Piece(1, 9, "user")))
        server.close()
        await server.wait_closed()
        refused = await endpoint.send(request(Piece(1, 9, "user")))
        await endpoint.aclose()
        return [cut_off, refused]

    assert [(answer.error, answer.status) for answer in asyncio.run(both())] == [("reset", 200), ("reset", None)]


def test_agents_have_connections_of_their_own(engine: str) -> None:
    """Calls of one agent share a connection, two agents do not, and a failed connection is not used again."""
    made: list[httpx.AsyncHTTPTransport] = []

    def transport() -> httpx.AsyncHTTPTransport:
        made.append(httpx.AsyncHTTPTransport())
        return made[-1]

    one, other = (request(Piece(1, 9, "user"), agent=agent) for agent in ("one", "other"))
    answers = send(engine, one, one, other, one, other, salt="agents", transport=transport)
    assert [answer.error for answer in answers] == [None] * 5
    assert len(made) == 2
    made.clear()
    send("http://127.0.0.1:9", one, one, transport=transport)
    assert len(made) == 2


def test_connection_idle_too_long_is_not_used_again(engine: str) -> None:
    """An agent that comes back within 4 s finds its connection, one that comes back later gets a new one."""
    made: list[httpx.AsyncHTTPTransport] = []
    now = [0]

    def transport() -> httpx.AsyncHTTPTransport:
        made.append(httpx.AsyncHTTPTransport())
        return made[-1]

    async def sends() -> list[int]:
        address = reach(engine, "messages")
        endpoint = HttpEndpoint(address, dialect="messages", model="m", clock=lambda: now[0], transport=transport)
        known = []
        for seconds in (1, 4, 9):
            now[0] = seconds * 1_000_000_000
            assert (await endpoint.send(request(Piece(1, 9, "user")))).error is None
            known.append(len(made))
        await endpoint.aclose()
        return known

    assert asyncio.run(sends()) == [1, 1, 2]


def sent_headers(url: str, **options: Any) -> httpx.Headers:
    """The headers of a request."""
    seen: list[httpx.Headers] = []

    def handler(sent: httpx.Request) -> httpx.Response:
        seen.append(sent.headers)
        return httpx.Response(500)

    send(url, request(Piece(1, 9, "user")), transport=partial(httpx.MockTransport, handler), **options)
    return seen[0]


def test_key_comes_from_the_environment_and_only_a_named_one_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's variable is used for its own hosts over https; elsewhere a key must be asked for by the name of its
    variable. Servers of many dialects look for it in one header, Anthropic in its own.
    """
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret-a")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-o")
    monkeypatch.setenv("MY_KEY", "secret-m")
    asked: list[tuple[dict[str, Any], tuple[str | None, str | None]]] = [
        ({"url": "https://test", "dialect": "messages"}, (None, None)),
        ({"url": "https://notanthropic.com", "dialect": "messages"}, (None, None)),
        ({"url": "http://api.anthropic.com", "dialect": "messages"}, (None, None)),
        ({"url": "https://test", "dialect": "messages", "key_env": "MY_KEY"}, ("secret-m", "Bearer secret-m")),
        ({"url": "https://api.anthropic.com", "dialect": "messages"}, ("secret-a", None)),
        ({"url": "https://api.openai.com/v1", "dialect": "chat"}, (None, "Bearer secret-o")),
        ({"url": "https://api.anthropic.com", "dialect": "chat"}, (None, None)),
        ({"url": "https://test", "dialect": "responses", "key_env": "MY_KEY"}, (None, "Bearer secret-m")),
        ({"url": "http://test", "dialect": "messages"}, (None, None)),
        ({"url": "http://test", "dialect": "chat"}, (None, None)),
        ({"url": "http://test", "dialect": "completions", "key_env": "MY_KEY"}, (None, "Bearer secret-m")),
    ]
    for options, expected in asked:
        found = sent_headers(**options)
        assert (found.get("x-api-key"), found.get("authorization")) == expected, options
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        reach("https://test", "messages", key_env="NO_SUCH_KEY")


def test_key_comes_from_a_file(tmp_path: Path) -> None:
    """Its first line, without the white space around it, is the key, over http too; a file that is not there, has an
    empty first line or no text is told by its name, and nothing of it is.
    """
    file = tmp_path / "key"
    file.write_text("  sk-planted \nanother line")
    assert sent_headers("http://test", key_file=str(file))["x-api-key"] == "sk-planted"
    assert sent_headers("http://test", dialect="responses", key_file=str(file))["authorization"] == "Bearer sk-planted"
    for bad in (b"", b"\nsk-planted", b"\xffsk-planted", "sk-plantéd".encode(), b"sk-\x00planted"):
        file.write_bytes(bad)
        with pytest.raises(InputError, match="key: expected an API key") as caught:
            reach("http://test", "messages", key_file=str(file))
        assert "plant" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        reach("http://test", "messages", key_file=str(tmp_path / "none"))


def test_headers_take_their_values_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME=VARIABLE sends the variable's value, and stands above the key's header; anything else is refused."""
    monkeypatch.setenv("TENANT", "acme")
    monkeypatch.setenv("OTHER", "Bearer other")
    monkeypatch.setenv("OPENAI_API_KEY", "usual")
    found = sent_headers("https://api.openai.com", dialect="chat", header=["X-Tenant=TENANT", "Authorization=OTHER"])
    assert (found["x-tenant"], found.get_list("authorization")) == ("acme", ["Bearer other"])
    for bad in ("X-Tenant", "=TENANT", "X-Tenant=", "X-Tenant=NOT_SET"):
        with pytest.raises(InputError, match=r"X-Tenant|=TENANT"):
            reach("https://test", "chat", header=[bad])


def test_live_answers_are_kept_as_their_next_prompts_repeat_them() -> None:
    """What was said comes back whole, escaped for JSON, streamed or not, from each dialect; not asked for, it does not;
    what broke off half way has said nothing.
    """
    words = ['say "yes"\n', "\\ done é"]
    delta = {"type": "content_block_delta", "index": 0}
    texts = [{**delta, "delta": {"type": "text_delta", "text": word}} for word in words]
    thought = {**delta, "delta": {"type": "thinking_delta", "thinking": "hm"}}
    usage = {"input_tokens": 9, "output_tokens": 7}
    stop = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
    body = stream_of({"type": "message_start", "message": {"usage": {}}}, thought, *texts, stop, STOP)
    expected = Said(b'say \\"yes\\"\\n\\\\ done \xc3\xa9', 7)
    assert against(lambda _: httpx.Response(200, content=body), live=True).said == expected
    assert against(lambda _: httpx.Response(200, content=body)).said is None
    assert against(lambda _: httpx.Response(200, content=stream_of(*texts)), live=True).said is None
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "".join(words)}]
    whole = {"type": "message", "content": content, "stop_reason": "end_turn", "usage": usage}
    assert against(lambda _: httpx.Response(200, json=whole), live=True, stream=False).said == expected
    told = {"prompt_tokens": 9, "completion_tokens": 7}
    chunks = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
    body = stream_of(*chunks, {"choices": [], "usage": told}, "[DONE]")
    assert against(lambda _: httpx.Response(200, content=body), live=True, dialect="chat").said == expected
    spoken: dict[str, Any] = {
        "choices": [{"message": {"content": "".join(words)}, "finish_reason": "stop"}],
        "usage": told,
    }
    assert against(lambda _: httpx.Response(200, json=spoken), live=True, dialect="chat", stream=False).said == expected
    told |= {"completion_tokens": 27, "completion_tokens_details": {"reasoning_tokens": 20}}
    assert against(lambda _: httpx.Response(200, json=spoken), live=True, dialect="chat", stream=False).said == expected
    spoken["choices"][0]["message"]["content"] = " \n"
    assert against(lambda _: httpx.Response(200, json=spoken), live=True, dialect="chat", stream=False).said is None
    deltas = [{"type": "response.output_text.delta", "delta": word} for word in words]
    made = {"status": "completed", "usage": usage, "output": [{"content": [{"text": "".join(words)}]}]}
    hidden = {"type": "response.reasoning_text.delta", "delta": "hm"}
    body = stream_of(hidden, *deltas, {"type": "response.completed", "response": made})
    assert against(lambda _: httpx.Response(200, content=body), live=True, dialect="responses").said == expected
    assert (
        against(lambda _: httpx.Response(200, json=made), live=True, dialect="responses", stream=False).said == expected
    )


@pytest.mark.parametrize("url", ["http://test", "http://test/", "http://test/v1", "http://test/v1/"])
def test_address_may_end_in_v1(url: str) -> None:
    """Both habits of giving a base URL lead to the same place."""
    seen: list[str] = []

    def handler(sent: httpx.Request) -> httpx.Response:
        seen.append(str(sent.url))
        return httpx.Response(500)

    send(url, request(Piece(1, 9, "user")), transport=partial(httpx.MockTransport, handler))
    assert seen == ["http://test/v1/messages"]


def test_nothing_is_left_open() -> None:
    """A process that serves, replays, is cut off in mid-call and ends leaves no warning behind."""
    script = """
import asyncio, gc, time
from keepwarm.harness.serve import create_app
from keepwarm.harness.simulated import make_cluster
from keepwarm.replayers.endpoint import Piece, Request
from keepwarm.replayers.address import Address
from keepwarm.replayers.http import HttpEndpoint
from keepwarm.traces.model import Call
from serving import running

call = Call("s", "a", "c", "main", 0, 0, 0, 0, "absent", "absent", "synthetic")

async def replay(url):
    for dialect in ("messages", "chat", "responses", "completions"):
        endpoint = HttpEndpoint(Address(url, {}), dialect=dialect, model="m", clock=time.monotonic_ns)
        for output in (1, 20):
            assert (await endpoint.send(Request(call, (Piece(1, 50, "user"),), output))).error is None
        long = asyncio.create_task(endpoint.send(Request(call, (Piece(1, 50, "user"),), 30000)))
        await asyncio.sleep(0.1)
        long.cancel()
        assert isinstance((await asyncio.gather(long, return_exceptions=True))[0], asyncio.CancelledError)
        await endpoint.aclose()

worker = make_cluster(base_s=0.0, prefill_tps=1e9, decode_tps=1000.0)
with running(create_app(worker, model="m")) as url:
    asyncio.run(replay(url))
gc.collect()
"""
    command, here = [sys.executable, "-W", "error", "-c", script], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
