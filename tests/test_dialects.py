"""The four dialects: what their bodies look like to a server, and how accounts come back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from asking import NO_TOOLS, against, blocks_of, body_of, prompts, request, send, steps, stream_of
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import cluster, running

from keepwarm.harness.serve import create_app
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.job import Job, account
from keepwarm.replayers.sse import Events
from keepwarm.traces.model import Breakpoint, Hints

SALTS = count()
DIALECTS = ("messages", "chat", "responses")
SDKS = Path(__file__).parent / "real" / ".cache" / "sdks"


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """A served worker with engine rules and blocks of 16; each test asks under a salt of its own."""
    with running(create_app(cluster(), model="sim", cache={"ttl": "none", "block": 16, "rules": "engine"})) as url:
        yield url


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [True, False])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps=steps("lead", "tools", "system", "user", "answer", "tool_result"))
def test_replayed_prompts_cost_what_the_worker_says_they_do(
    engine: str, dialect: str, stream: bool, steps: list[tuple[float, list[tuple[str, int]], int]]
) -> None:
    """Over HTTP, in text, prompts have as many tokens as planned and read as many as the worker, asked directly by
    pieces, says they can.
    """
    asked = prompts(steps)
    options = {"dialect": dialect, "stream": stream, "salt": f"{next(SALTS)}", "costs": NO_TOOLS}
    answers = send(engine, *(request(*p) for p in asked), **options)
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


def test_token_ids_cost_one_each(engine: str) -> None:
    """In completions a prompt is as many ids as planned, and what grew reads what it grew from."""
    pieces = [Piece(1, 64, "tools"), Piece(2, 36, "user"), Piece(3, 10, "answer"), Piece(4, 23, "tool_result")]
    asked = [request(*pieces[:2]), request(*pieces)]
    first, second = send(engine, *asked, dialect="completions", salt="ids", costs=NO_TOOLS)
    assert (first.error, first.prompt, first.cache_read) == (None, 100, 0)
    assert (second.error, second.prompt, second.cache_read) == (None, 133, 96)


def test_managed_account_comes_back_column_by_column() -> None:
    """Marks are sent where the trace has them: 30 tokens for an hour, 12 for five minutes, 5 for nothing."""
    cache = {"rules": "managed", "ttl": "as-recorded"}
    prompt = (Piece(1, 30, "lead"), Piece(2, 12, "user"), Piece(3, 5, "user"))
    asked = request(*prompt, marks=(Breakpoint(30, 3600), Breakpoint(42, 300)))
    with running(create_app(cluster(rules="managed"), model="sim", cache=cache)) as url:
        first, second = send(url, asked, asked, salt="marks", costs=NO_TOOLS)
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
        ([Breakpoint(3, 300), Breakpoint(9, 3600)], ["1h", False, False]),
        ([Breakpoint(99, 300)], [False, False, True]),
        ([Breakpoint(0, 300)], [False, False, False]),
    ],
)
def test_mark_stands_on_the_block_that_holds_its_token(marks: list[Breakpoint], expected: list[Any]) -> None:
    """A block ends in cache_control if a breakpoint's last token lies in it, past the end on the last one."""
    pieces = (Piece(1, 10, "system"), Piece(2, 15, "user"), Piece(3, 10, "tool_result"))
    told = orjson.loads(body_of("messages", blocks_of(pieces, marks=marks)))
    blocks = [*told["system"], *told["messages"][0]["content"]]
    found = [block.get("cache_control") for block in blocks]
    assert [bool(mark) and mark.get("ttl", True) for mark in found] == expected


@pytest.mark.parametrize(
    ("kinds", "at"),
    [
        ("tools system user", 0),
        ("tools system user", 1),
        ("user answer tool_result", 1),
        ("user answer tool_result", 2),
    ],
)
def test_every_kind_of_block_can_be_marked(kinds: str, at: int) -> None:
    """A tool, a system block, a use and a result of the Messages API bear a mark, and only the one that is meant."""
    pieces = [Piece(ident, 10, kind) for ident, kind in enumerate(kinds.split())]
    told = orjson.loads(body_of("messages", blocks_of(pieces, marks=[Breakpoint(10 * at + 10, 300)])))
    content = [block for message in told["messages"] for block in message["content"]]
    blocks = [*told["tools"], *told.get("system", ()), *content][-len(pieces) :]
    assert [block.get("cache_control") for block in blocks] == [
        {"type": "ephemeral"} if index == at else None for index in range(len(pieces))
    ]


def test_an_api_takes_four_marks() -> None:
    """Of six marks the last four are sent."""
    pieces = [Piece(ident, 10, "user") for ident in range(7)]
    marks = [Breakpoint(10 * n, 300) for n in range(1, 7)]
    told = orjson.loads(body_of("messages", blocks_of(pieces, marks=marks)))
    found = ["cache_control" in block for block in told["messages"][0]["content"]]
    assert found == [False, False, True, True, True, True, False]


CONVERSATION = [
    Block("tool", b"a tool", "a0"),
    Block("tool", b"another", "a1"),
    Block("system", b"you are"),
    Block("system", b"kind"),
    Block("user", b"do"),
    Block("user", b"it"),
    Block("answer", b"well"),
    Block("use", b"this", "u0"),
    Block("use", b"that", "u1"),
    Block("result", b"done", "u0"),
    Block("result", b"failed", "u1"),
    Block("user", b"and"),
    Block("answer", b"so"),
    Block("answer", b"be it"),
    Block("use", b"last", "u2"),
    Block("result", b"fine", "u2"),
]
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}}


def test_messages_have_an_agents_shape() -> None:
    """Uses stand in the assistant's turn, their results first in the user's, system and tools beside the messages."""

    def text(*said: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": f"{each}\n"} for each in said]

    def use(ident: str, said: str) -> dict[str, Any]:
        return {"type": "tool_use", "id": ident, "name": "a0a0", "input": {"text": said}}

    def result(ident: str, said: str) -> dict[str, str]:
        return {"type": "tool_result", "tool_use_id": ident, "content": said}

    assert orjson.loads(body_of("messages", CONVERSATION, max_tokens=3)) == {
        "model": "m",
        "max_tokens": 3,
        "tools": [
            {"name": "a0", "description": "a tool", "input_schema": SCHEMA},
            {"name": "a1", "description": "another", "input_schema": SCHEMA},
        ],
        "system": text("you are", "kind"),
        "messages": [
            {"role": "user", "content": text("do", "it")},
            {"role": "assistant", "content": [*text("well"), use("u0", "this"), use("u1", "that")]},
            {"role": "user", "content": [result("u0", "done"), result("u1", "failed"), *text("and")]},
            {"role": "assistant", "content": [*text("so", "be it"), use("u2", "last")]},
            {"role": "user", "content": [result("u2", "fine")]},
        ],
    }


def test_chat_has_an_agents_shape() -> None:
    """Content is a string, results are messages of their own, uses are calls whose arguments are JSON in a string."""

    def use(ident: str, said: str) -> dict[str, Any]:
        given = {"name": "a0a0", "arguments": f'{{"text": "{said}"}}'}
        return {"id": ident, "type": "function", "function": given}

    tools = [
        {"name": f"a{n}", "description": said, "parameters": SCHEMA} for n, said in enumerate(("a tool", "another"))
    ]
    assert orjson.loads(body_of("chat", CONVERSATION)) == {
        "model": "m",
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "messages": [
            {"role": "system", "content": "you are kind"},
            {"role": "user", "content": "do it"},
            {"role": "assistant", "content": "well", "tool_calls": [use("u0", "this"), use("u1", "that")]},
            {"role": "tool", "tool_call_id": "u0", "content": "done"},
            {"role": "tool", "tool_call_id": "u1", "content": "failed"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "so be it", "tool_calls": [use("u2", "last")]},
            {"role": "tool", "tool_call_id": "u2", "content": "fine"},
        ],
    }
    alone = orjson.loads(body_of("chat", [Block("user", b"do"), Block("use", b"x", "u"), Block("result", b"y", "u")]))
    assert alone["messages"][1] == {"role": "assistant", "content": None, "tool_calls": [use("u", "x")]}


def test_responses_have_an_agents_shape() -> None:
    """Answers, uses and results are items; system text is the instructions."""

    def user(*said: str) -> dict[str, Any]:
        content = [{"type": "input_text", "text": f"{each}\n"} for each in said]
        return {"type": "message", "role": "user", "content": content}

    def answer(said: str) -> dict[str, Any]:
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": said}]}

    def use(ident: str, said: str) -> dict[str, str]:
        return {"type": "function_call", "call_id": ident, "name": "a0a0", "arguments": f'{{"text": "{said}"}}'}

    def result(ident: str, said: str) -> dict[str, str]:
        return {"type": "function_call_output", "call_id": ident, "output": said}

    tools = [
        {"name": f"a{n}", "description": said, "parameters": SCHEMA} for n, said in enumerate(("a tool", "another"))
    ]
    found = orjson.loads(body_of("responses", CONVERSATION))
    assert found.pop("instructions") == "you are kind"
    assert found == {
        "model": "m",
        "tools": [{"type": "function", "strict": False, **tool} for tool in tools],
        "input": [
            user("do", "it"),
            answer("well"),
            use("u0", "this"),
            use("u1", "that"),
            result("u0", "done"),
            result("u1", "failed"),
            user("and"),
            answer("so"),
            answer("be it"),
            use("u2", "last"),
            result("u2", "fine"),
        ],
    }


def test_completions_are_token_ids_in_a_row() -> None:
    """The ids of all blocks, in the prompt."""
    found = orjson.loads(body_of("completions", [Block("system", b"1000,1003"), Block("user", b"1001")], max_tokens=1))
    assert found == {"model": "m", "max_tokens": 1, "prompt": [1000, 1003, 1001]}


def head(dialect: str, *, output: int | None = 3, **options: Any) -> dict[str, Any]:
    """The parameters that a request is sent with."""
    bodies: list[dict[str, Any]] = []

    def handler(sent: httpx.Request) -> httpx.Response:
        bodies.append(orjson.loads(sent.content))
        return httpx.Response(500)

    hints = Hints(priority=3, osl=9, ttl_s=60)
    asked = request(Piece(1, 9, "user"), output=output, hints=hints, flow="background")
    send("http://test", asked, dialect=dialect, transport=lambda: httpx.MockTransport(handler), **options)
    return {name: value for name, value in bodies[0].items() if name not in ("tools", "messages", "input", "prompt")}


def test_parameters_are_each_dialects_own() -> None:
    """The output's limit by its name, usage asked for in streams, nothing kept; one token where none is known."""
    usual = {"model": "sim", "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    plain = {"hints": "off"}
    assert head("messages", **plain) == {**usual, "max_tokens": 3}
    assert head("messages", output=None, **plain)["max_tokens"] == 1
    assert head("chat", **plain) == {**usual, **usage, "max_tokens": 3}
    assert head("completions", **plain) == {**usual, **usage, "max_tokens": 3}
    assert head("responses", **plain) == {**usual, "store": False, "max_output_tokens": 3}
    assert head("chat", stream=False, **plain) == {"model": "sim", "stream": False, "max_tokens": 3}
    extra = head("chat", stream=False, extra={"temperature": 0}, cache_salt="x", **plain)
    assert extra == {"model": "sim", "stream": False, "max_tokens": 3, "temperature": 0, "cache_salt": "x"}


def test_only_what_an_endpoint_takes_is_asked_for() -> None:
    """Exact length, no tool call, the cache key and the other name of the limit, each if it is among ``accepts``."""
    every = frozenset(("tools", "no_tool_call", "exact_output", "cache_key", "max_completion_tokens"))
    asked = head("chat", accepts=every, hints="off", salt="run")
    assert {name: asked[name] for name in ("max_completion_tokens", "min_tokens", "ignore_eos", "tool_choice")} == {
        "max_completion_tokens": 3,
        "min_tokens": 3,
        "ignore_eos": True,
        "tool_choice": "none",
    }
    assert "max_tokens" not in asked
    assert asked["prompt_cache_key"] == "runs-0"
    assert head("messages", accepts=every - {"max_completion_tokens"})["tool_choice"] == {"type": "none"}
    assert "tool_choice" not in head("completions", accepts=every)


def test_hints_are_off_as_recorded_or_derived() -> None:
    """Recorded hints go as they were but for what Dynamo has no name for; derived ones tell flow and length."""
    assert "nvext" not in head("chat", hints="off")
    assert head("chat", hints="recorded")["nvext"] == {"agent_hints": {"priority": 3, "osl": 9}}
    assert head("chat", hints="derived")["nvext"] == {"agent_hints": {"priority": 0, "osl": 3}}


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


@given(st.lists(st.binary(max_size=8).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b""))), st.data())
def test_events_do_not_depend_on_how_the_stream_is_cut(payloads: list[bytes], data: st.DataObject) -> None:
    """However a stream is chunked and whichever line ends it uses, the same data comes out."""
    end = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    raw = b"".join(b"event: x" + end + b": a comment" + end + b"data: " + one + end + end for one in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    events = Events()
    found = [one for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) for one in events.feed(raw[a:b])]
    assert found == payloads
