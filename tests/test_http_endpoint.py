"""HttpEndpoint: bodies that grow byte for byte, token accounts read back, failures as values."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import cluster

from keepwarm.harness.serve import create_app, running
from keepwarm.replayers import chat, messages
from keepwarm.replayers.endpoint import Answer, Piece, Request
from keepwarm.replayers.http import HttpEndpoint, preflight
from keepwarm.replayers.job import Job, account
from keepwarm.replayers.prompts import cut
from keepwarm.replayers.sse import Events
from keepwarm.replayers.text import PromptText
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Breakpoint, Call

SALTS = count()
DIALECTS = ("messages", "chat")


def request(*pieces: Piece, output: int | None = 3, agent: str = "a", marks: Sequence[Breakpoint] = ()) -> Request:
    """A request for a prompt; of its call only agent and marks matter."""
    call = Call(
        session="s",
        agent=agent,
        call="c",
        role="main",
        turn=0,
        start_ns=0,
        end_ns=0,
        keep=0,
        usage_source="absent",
        write_source="absent",
        origin="synthetic",
        breakpoints=tuple(marks),
    )
    return Request(call, pieces, output)


def send(url: str, *requests: Request, dialect: str = "messages", **options: Any) -> list[Answer]:
    """The answers to requests sent one after the other by one endpoint."""

    async def all_of_them() -> list[Answer]:
        endpoint = HttpEndpoint(url, dialect=dialect, model="sim", clock=time.monotonic_ns, **options)
        try:
            return [await endpoint.send(one) for one in requests]
        finally:
            await endpoint.aclose()

    return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """A served worker with engine rules and blocks of 16; each test asks under a salt of its own."""
    cache = {"ttl": "none", "block": 16, "capacity": None, "rules": "engine"}
    with running(create_app(cluster(), model="sim", cache=cache)) as url:
        yield url


@pytest.fixture(scope="module")
def managed() -> Iterator[str]:
    """A served worker with managed rules."""
    with running(
        create_app(cluster(rules="managed"), model="sim", cache={"rules": "managed", "ttl": "as-recorded"})
    ) as url:
        yield url


KINDS = st.sampled_from(["lead", "tools", "system", "user", "answer", "tool_result", "hidden"])
STEPS = st.lists(
    st.tuples(st.floats(0, 1), st.lists(st.tuples(KINDS, st.integers(1, 60)), max_size=4), st.integers(1, 40)),
    min_size=1,
    max_size=5,
)


def prompts(steps: list[tuple[float, list[tuple[str, int]], int]]) -> list[tuple[Piece, ...]]:
    """Prompts of which each keeps some share of the one before, cut anywhere, and goes on with pieces of its own."""
    idents, found = count(1), [()]
    for share, kinds, last in steps:
        kept = cut(found[-1], round(share * sum(piece.tokens for piece in found[-1])))
        more = [Piece(next(idents), tokens, kind) for kind, tokens in (*kinds, ("user", last))]
        found.append((*kept, *more))
    return found[1:]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [True, False])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(steps=STEPS)
def test_replayed_prompts_cost_what_the_worker_says_they_do(
    engine: str, dialect: str, stream: bool, steps: list[tuple[float, list[tuple[str, int]], int]]
) -> None:
    """Over HTTP, in text, prompts have as many tokens as planned and read as many as the worker, asked directly by
    pieces, says they can.
    """
    asked = prompts(steps)
    answers = send(engine, *(request(*p) for p in asked), dialect=dialect, stream=stream, salt=f"{next(SALTS)}")
    worker = cluster()
    for prompt, answer in zip(asked, answers, strict=True):
        service = worker.submit(Job(worker.tree.extend(worker.tree.root, prompt), 3), 0)
        worker.advance(10**9)
        expected = account(service)
        assert answer.error is None
        assert (answer.status, answer.output) == (200, 3)
        assert answer.prompt == sum(piece.tokens for piece in prompt)
        for column in ("prompt", "uncached", "cache_read", "cache_write_other", "usage_source", "write_source"):
            assert getattr(answer, column) == expected[column]


def test_managed_account_comes_back_column_by_column(managed: str) -> None:
    """Marks are sent where the trace has them: 30 tokens for an hour, 12 for five minutes, 5 for nothing."""
    prompt = (Piece(1, 30, "lead"), Piece(2, 12, "user"), Piece(3, 5, "user"))
    marks = (Breakpoint(30, 3600), Breakpoint(42, 300))
    first, second = send(managed, request(*prompt, marks=marks), request(*prompt, marks=marks), salt="marks")
    columns = (
        "prompt",
        "uncached",
        "cache_read",
        "cache_write_5m",
        "cache_write_1h",
        "cache_write_other",
        "write_ttl_s",
    )
    assert [getattr(first, column) for column in columns] == [47, 5, 0, 12, 30, 0, 3600]
    assert [getattr(second, column) for column in columns] == [47, 5, 42, 0, 0, 0, None]
    assert first.stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([Breakpoint(10, 300)], [True, False, False]),
        ([Breakpoint(11, 300)], [False, True, False]),
        ([Breakpoint(10, 3600), Breakpoint(35, 300)], ["1h", False, True]),
        ([Breakpoint(99, 300)], [False, False, True]),
        ([Breakpoint(0, 300)], [False, False, False]),
    ],
)
def test_mark_stands_on_the_block_that_holds_its_token(marks: list[Breakpoint], expected: list[Any]) -> None:
    """A block ends in cache_control if a breakpoint's last token lies in it, past the end on the last one."""
    pieces = (Piece(1, 10, "system"), Piece(2, 15, "user"), Piece(3, 10, "tool_result"))
    told = orjson.loads(messages.body(request(*pieces, marks=marks), text=PromptText(), model="m"))
    blocks = [*told["system"], *told["messages"][0]["content"]]
    found = [block.get("cache_control") for block in blocks]
    assert [bool(mark) and mark.get("ttl", True) for mark in found] == expected


@given(steps=STEPS, more=st.lists(st.tuples(KINDS, st.integers(1, 60)), min_size=1, max_size=4))
def test_prompt_grows_byte_for_byte(
    steps: list[tuple[float, list[tuple[str, int]], int]], more: list[tuple[str, int]]
) -> None:
    """The body of a grown prompt repeats the bytes of the one before from the prompt's start to its last word, though
    it asks for another length of output.
    """
    before = prompts(steps)[-1]
    after = (*before, *(Piece(1000 + i, tokens, kind) for i, (kind, tokens) in enumerate(more)), Piece(9999, 1, "user"))
    for dialect, end in ((messages, b'"}]}]}'), (chat, b'"}]}')):
        text = PromptText()
        bodies = [
            dialect.body(request(*prompt, output=output), text=text, model="m")
            for prompt, output in ((before, 7), (after, 1234))
        ]
        starts = [min(at for name in (b'"system"', b'"messages"') if (at := body.find(name)) >= 0) for body in bodies]
        assert bodies[0].endswith(end)
        assert bodies[1][starts[1] :].startswith(bodies[0][starts[0] : -len(end)])


def test_bodies_have_the_dialects_shape() -> None:
    """Roles come from kinds; consecutive pieces of a role are blocks of one message, or one string a space apart."""
    prompt = (
        Piece(1, 1, "tools"),
        Piece(2, 1, "user"),
        Piece(3, 2, "answer"),
        Piece(4, 1, "user"),
        Piece(5, 1, "user"),
    )
    text = PromptText()
    said = [text.fragment(piece).decode() for piece in prompt]
    blocks = [{"type": "text", "text": words} for words in said]
    assert orjson.loads(messages.body(request(*prompt), text=text, model="m", stream=False)) == {
        "model": "m",
        "max_tokens": 3,
        "stream": False,
        "system": blocks[:1],
        "messages": [
            {"role": "user", "content": blocks[1:2]},
            {"role": "assistant", "content": blocks[2:3]},
            {"role": "user", "content": blocks[3:]},
        ],
    }
    assert orjson.loads(chat.body(request(*prompt, output=None), text=text, model="m", extra={"seed": 1})) == {
        "model": "m",
        "max_tokens": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 1,
        "messages": [
            {"role": "system", "content": said[0]},
            {"role": "user", "content": said[1]},
            {"role": "assistant", "content": said[2]},
            {"role": "user", "content": f"{said[3]} {said[4]}"},
        ],
    }


def test_salted_run_starts_cold(engine: str) -> None:
    """The same prompt is read within a run and not under another run's salt; both have the planned length."""
    prompt = request(Piece(1, 64, "lead"), Piece(2, 36, "user"))
    reads = [a.cache_read for salt in ("x", "y") for a in send(engine, prompt, prompt, salt=salt)]
    assert reads == [0, 96, 0, 96]


def test_times_stand_in_order(engine: str) -> None:
    """Sent, first byte, first token, every token, last token, done: in this order on the caller's clock."""
    (answer,) = send(engine, request(Piece(1, 20, "user"), output=50), salt="times")
    assert answer.token_ns is not None
    order = [answer.sent_ns, answer.first_byte_ns, answer.first_token_ns, *answer.token_ns, answer.last_token_ns]
    assert None not in order
    assert [*order, answer.done_ns] == sorted([*order, answer.done_ns])  # type: ignore[type-var]


def against(handler: Callable[[httpx.Request], Any], **options: Any) -> Answer:
    """The answer when the transport does as the handler says."""
    made = partial(httpx.MockTransport, handler)
    (answer,) = send("http://test", request(Piece(1, 9, "user")), transport=made, **options)
    return answer


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


def stream_of(*events: dict[str, Any] | str) -> bytes:
    """Server-sent events."""
    data = [event if isinstance(event, str) else orjson.dumps(event).decode() for event in events]
    return "".join(f"data: {one}\n\n" for one in data).encode()


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


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({"cached_tokens": 1952, "created_cache_tokens": 32}, (3, 1952, 32, "reported")),
        ({"cached_tokens": 1952, "cache_write_tokens": 0}, (35, 1952, 0, "reported")),
        ({"cached_tokens": 1952}, (35, 1952, None, "inferred")),
        ({}, (None, None, None, "absent")),
        (None, (None, None, None, "absent")),
    ],
)
def test_chat_usage_keeps_what_was_not_reported_unknown(details: Any, expected: tuple[Any, ...]) -> None:
    """Uncached is what is neither read nor written as far as that was told; nothing untold becomes a zero."""
    usage = {"prompt_tokens": 1987, "completion_tokens": 5, "prompt_tokens_details": details}
    first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    word = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "length"}], "usage": None}
    body = stream_of(first, word, {"choices": [], "usage": usage}, "[DONE]")
    answer = against(lambda _: httpx.Response(200, content=body), dialect="chat")
    assert (answer.uncached, answer.cache_read, answer.cache_write_other, answer.write_source) == expected
    assert (answer.error, answer.prompt, answer.output, answer.stop_reason) == (None, 1987, 5, "length")
    assert (answer.cache_write_5m, answer.write_ttl_s, len(answer.token_ns or ())) == (None, None, 1)


def test_messages_usage_keeps_what_was_not_reported_unknown() -> None:
    """An endpoint that tells only input_tokens has told a prompt's length and nothing of its cache."""
    told = messages.usage({"input_tokens": 10, "output_tokens": 2})
    assert (told["prompt"], told["uncached"], told["cache_read"], told["cache_write_other"]) == (10, None, None, None)
    assert (told["usage_source"], told["write_source"]) == ("reported", "absent")
    assert messages.usage({"output_tokens": 2})["usage_source"] == "absent"


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
        endpoint = HttpEndpoint(url, dialect="messages", model="m", clock=time.monotonic_ns)
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
        endpoint = HttpEndpoint(engine, dialect="messages", model="m", clock=lambda: now[0], transport=transport)
        known = []
        for seconds in (1, 4, 9):
            now[0] = seconds * 1_000_000_000
            assert (await endpoint.send(request(Piece(1, 9, "user")))).error is None
            known.append(len(made))
        await endpoint.aclose()
        return known

    assert asyncio.run(sends()) == [1, 1, 2]


def test_output_is_asked_for_exactly_only_when_told() -> None:
    """An endpoint that can be told not to stop early is told so on request, with the recorded length."""
    bodies: list[dict[str, Any]] = []

    def handler(sent: httpx.Request) -> httpx.Response:
        bodies.append(orjson.loads(sent.content))
        return httpx.Response(500)

    for exact in (False, True):
        against(handler, dialect="chat", exact_output=exact, extra={"temperature": 0})
    assert [body["max_tokens"] for body in bodies] == [3, 3]
    assert [body["temperature"] for body in bodies] == [0, 0]
    assert [(body.get("min_tokens"), body.get("ignore_eos")) for body in bodies] == [(None, None), (3, True)]


def test_key_comes_from_the_environment_and_only_a_named_one_goes_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's variable is used over https; over http a key must be asked for by the name of its variable."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret-a")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-o")
    monkeypatch.setenv("MY_KEY", "secret-m")
    seen: list[httpx.Headers] = []

    def handler(sent: httpx.Request) -> httpx.Response:
        seen.append(sent.headers)
        return httpx.Response(500)

    options: list[dict[str, Any]] = [
        {"url": "https://test", "dialect": "messages"},
        {"url": "https://test", "dialect": "chat"},
        {"url": "http://test", "dialect": "messages"},
        {"url": "http://test", "dialect": "chat", "key_env": "MY_KEY"},
    ]
    for option in options:
        url = option.pop("url")
        send(url, request(Piece(1, 9, "user")), transport=partial(httpx.MockTransport, handler), **option)
    keys = [(headers.get("x-api-key"), headers.get("authorization")) for headers in seen]
    assert keys == [("secret-a", None), (None, "Bearer secret-o"), (None, None), (None, "Bearer secret-m")]
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        send("https://test", key_env="NO_SUCH_KEY")


@pytest.mark.parametrize("url", ["http://test", "http://test/", "http://test/v1", "http://test/v1/"])
def test_address_may_end_in_v1(url: str) -> None:
    """Both habits of giving a base URL lead to the same place."""
    seen: list[str] = []

    def handler(sent: httpx.Request) -> httpx.Response:
        seen.append(str(sent.url))
        return httpx.Response(500)

    send(url, request(Piece(1, 9, "user")), transport=partial(httpx.MockTransport, handler))
    assert seen == ["http://test/v1/messages"]


def test_preflight_says_what_listens(engine: str, managed: str) -> None:
    """The simulated cluster tells its speed, rules and model."""
    told = preflight(engine)
    assert told.pop("version") is not None
    assert told == {
        "server": "keepwarm serve",
        "speed": 1,
        "ttl": "none",
        "block": 16,
        "capacity": None,
        "rules": "engine",
        "model": "sim",
    }
    assert (preflight(managed)["rules"], preflight(managed)["ttl"]) == ("managed", "as-recorded")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://127.0.0.1", "127.0.0.1:8000", "http://", "http://[", ""])
def test_preflight_refuses_what_is_no_endpoint(url: str) -> None:
    """Nobody listening, or no http address, is one line that names the endpoint."""
    with pytest.raises(InputError, match="endpoint") as caught:
        preflight(url)
    assert "\n" not in str(caught.value)


@contextmanager
def answering(data: bytes, hold: bool = False) -> Iterator[str]:
    """A listener that gives every connection these bytes and closes it, or holds it open; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with ExitStack() as taken, suppress(OSError):
            while True:
                one = taken.enter_context(listener.accept()[0])
                if not hold:
                    one.recv(65536)
                    one.sendall(data)
                    one.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def http(status: str, kind: str, body: bytes) -> bytes:
    """An answer as it goes over the wire."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (http("500 No", "text/plain", b"oh"), "is no endpoint: GET /v1/models gave status 500, GET /health status 500"),
        (http("200 OK", "text/html", b"<p>"), "is no endpoint: GET /v1/models gave text/html that is no JSON object"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what listens there gave no HTTP answer"),
        (b"", "what listens there gave no HTTP answer"),
    ],
)
def test_preflight_says_what_it_found_instead_of_an_endpoint(data: bytes, said: str) -> None:
    """A server's error or a page for everything, another protocol, a closed connection: each is told as what it is."""
    with answering(data) as url, pytest.raises(InputError) as caught:
        preflight(url)
    assert str(caught.value).startswith(f"endpoint {url}: {said}")


def test_preflight_tells_silence_from_nobody() -> None:
    """What takes a connection and says nothing did not answer in time."""
    with answering(b"", hold=True) as url, pytest.raises(InputError, match=r"no answer within 0\.2 s"):
        preflight(url, timeout_s=0.2)
    with pytest.raises(InputError, match="nothing answers there"):
        preflight("http://127.0.0.1:9")


@pytest.mark.parametrize("status", ["404 Not Found", "401 Unauthorized", "501 Unsupported method"])
def test_an_endpoint_need_not_answer_preflight(status: str) -> None:
    """One that knows neither path may know calls all the same: it only does not say its model."""
    with answering(http(status, "text/html", b"<p>")) as url:
        assert preflight(url)["model"] is None


@given(st.lists(st.binary(max_size=8).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b""))), st.data())
def test_events_do_not_depend_on_how_the_stream_is_cut(payloads: list[bytes], data: st.DataObject) -> None:
    """However a stream is chunked and whichever line ends it uses, the same data comes out."""
    end = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    raw = b"".join(b"event: x" + end + b": a comment" + end + b"data: " + one + end + end for one in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    events = Events()
    found = [one for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) for one in events.feed(raw[a:b])]
    assert found == payloads


def test_nothing_is_left_open() -> None:
    """A process that serves, replays, is cut off in mid-call and ends leaves no warning behind."""
    script = """
import asyncio, gc, time
from keepwarm.harness.serve import create_app, running
from keepwarm.harness.simulated import make_cluster
from keepwarm.replayers.endpoint import Piece, Request
from keepwarm.replayers.http import HttpEndpoint
from keepwarm.traces.model import Call

call = Call("s", "a", "c", "main", 0, 0, 0, 0, "absent", "absent", "synthetic")

async def replay(url):
    for dialect in ("messages", "chat"):
        endpoint = HttpEndpoint(url, dialect=dialect, model="m", clock=time.monotonic_ns)
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
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
