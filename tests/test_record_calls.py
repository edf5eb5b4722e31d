"""What the recorder says of one call: when it was, what it cost, how it ended, what it asked for and was given."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from dialects import DIALECTS, PATHS, Result, Said, Tokens, Use, assistant, events, request, user, whole
from recording import Asked, Recording, Reply, Script, recording, refuses, says

from keepwarm.traces.model import Breakpoint, Call, Hints

PAUSE_S = 0.03
"""What the stages of a slow answer are apart, besides waiting for one another."""
EVERY = pytest.mark.parametrize("dialect", DIALECTS)
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
TOLD = ("prompt", "uncached", "cache_read", "output", "reasoning", "usage_source", "write_source")


def one(folder: Path, dialect: str, reply: Reply, *, stream: bool = False, **asked: Any) -> Call:
    """The call that a request with this reply is."""
    headers = asked.pop("headers", {})
    with recording(folder, lambda _: reply) as made:
        made.ask(dialect, request(dialect, [user("Hello.")], stream=stream, **asked), headers)
    return made.call


class Clock:
    """Moments by name, in monotonic ns, of the upstream and of the client."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self._seen = {name: threading.Event() for name in ("head", "token", "tool")}

    def note(self, name: str) -> None:
        """It is now."""
        self.at[name] = time.monotonic_ns()
        if name in self._seen:
            self._seen[name].set()

    def after(self, seen: str, name: str) -> None:
        """Wait until the client has seen something, and a while, and note that the upstream goes on."""
        assert self._seen[seen].wait(10)
        time.sleep(PAUSE_S)
        self.note(name)

    def between(self, ns: int, begun: str, ended: str) -> bool:
        """Whether a moment, since the request came, lies between what the upstream and what the client saw."""
        return self.at[begun] - self.at["came"] <= ns <= self.at[ended] - self.at["asked"]


@EVERY
def test_times_lie_between_those_of_upstream_and_client(dialect: str, tmp_path: Path) -> None:
    """First byte, first token, a tool use and the end are each no earlier than the upstream sent them, no later than
    the client had them; they are apart, for the upstream waits for the client and a while before each. (The chat API
    does not tell when a tool use is whole.)
    """
    clock, sent = Clock(), events(dialect, Said(("One.", Use("u1", "Bash"))))
    last = -2 if dialect == "messages" else -1

    def slow() -> Iterator[bytes]:
        yield b"".join(sent[:2])
        clock.after("head", "first token")
        yield sent[2]
        clock.after("token", "tool use")
        yield b"".join(sent[3:last])
        clock.after("tool", "last")
        yield b"".join(sent[last:])

    def script(asked: Asked) -> Reply:
        clock.at["came"] = asked.at_ns
        time.sleep(PAUSE_S)
        clock.note("answered")
        return Reply(slow(), headers={"content-type": "text/event-stream"})

    with recording(tmp_path, script) as made:
        clock.note("asked")
        body = request(dialect, [user("Hello.")], stream=True)
        with made.client.stream("POST", PATHS[dialect], json=body) as response:
            clock.note("head")
            seen = b""
            for data in response.iter_raw():
                seen += data
                for name, event in (("token", sent[2]), ("tool", sent[last - 1])):
                    if event in seen and name not in clock.at:
                        clock.note(name)
            clock.note("ended")
    call = made.call
    assert (call.start_ns, call.session_start_ns) == (0, 0)
    assert clock.between(call.first_byte_ns or 0, "answered", "head")
    assert clock.between(call.first_token_ns or 0, "first token", "token")
    assert clock.between(
        call.tools[0].start_ns or 0, *(("last", "ended") if dialect == "chat" else ("tool use", "tool"))
    )
    assert clock.between(call.end_ns, "last", "ended")
    assert 0 < (call.first_byte_ns or 0) < (call.first_token_ns or 0) < call.end_ns


@EVERY
def test_an_answer_that_is_not_streamed_has_no_first_token(dialect: str, tmp_path: Path) -> None:
    """All of its tokens come at once, at a time that nobody was told: null, while first byte and end are known."""
    call = one(tmp_path, dialect, says(dialect, Said()))
    assert (call.first_token_ns, call.stream, call.dialect) == (None, False, dialect)
    assert 0 < (call.first_byte_ns or 0) <= call.end_ns


@EVERY
@STREAMED
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_the_account_is_the_one_the_api_told(dialect: str, stream: bool, zipped: bool, tmp_path: Path) -> None:
    """All parts told, streamed or whole, packed or not: the final account, not the placeholder at a stream's start."""
    reply = says(dialect, Said(tokens=Tokens(1000, 12, 400, 300, 5)), stream=stream, zipped=zipped)
    call = one(tmp_path, dialect, reply, stream=stream)
    assert [getattr(call, name) for name in TOLD] == [1000, 300, 400, 12, 5, "reported", "reported"]
    writes = call.cache_write_5m, call.cache_write_1h, call.cache_write_other
    assert sum(tokens or 0 for tokens in writes) == 300
    assert writes[0 if dialect == "messages" else 2] == 300
    assert (call.status, call.error, call.stream, call.model) == (200, None, stream, "claude-opus-4-8")


@EVERY
@STREAMED
def test_what_the_api_does_not_tell_is_null(dialect: str, stream: bool, tmp_path: Path) -> None:
    """Without an account everything is null, not 0; without a word on the cache only prompt and output are known."""
    call = one(tmp_path / "none", dialect, says(dialect, Said(tokens=None), stream=stream), stream=stream)
    assert [getattr(call, name) for name in TOLD] == [None, None, None, None, None, "absent", "absent"]
    assert (call.cache_write_5m, call.cache_write_1h, call.cache_write_other) == (None, None, None)
    assert (call.status, call.error) == (200, None)
    call = one(tmp_path / "bare", dialect, says(dialect, Said(tokens=Tokens(1000, 12)), stream=stream), stream=stream)
    assert [getattr(call, name) for name in TOLD] == [1000, None, None, 12, None, "reported", "absent"]
    call = one(tmp_path / "zero", dialect, says(dialect, Said(tokens=Tokens(9, 0, 0)), stream=stream), stream=stream)
    writes_told = "inferred"
    assert [getattr(call, name) for name in TOLD] == [9, 9, 0, 0, None, "reported", writes_told]
    assert (call.cache_write_5m, call.cache_write_1h, call.cache_write_other) == (None, None, None)


def test_writes_are_told_by_how_long_they_live(tmp_path: Path) -> None:
    """The Messages API splits them into five minutes and an hour; the rest of their sum is other."""
    split = {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 30}
    body = whole("messages", Said())
    body["usage"] = {"input_tokens": 5, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 140}
    body["usage"] |= {"cache_creation": split, "output_tokens": 3}
    call = one(tmp_path, "messages", Reply([json.dumps(body).encode()]))
    assert (call.prompt, call.uncached, call.cache_read) == (205, 5, 60)
    assert (call.cache_write_5m, call.cache_write_1h, call.cache_write_other) == (100, 30, 10)


@EVERY
@STREAMED
def test_stop_reasons_are_the_apis_own(dialect: str, stream: bool, tmp_path: Path) -> None:
    """Finished, cut at its length, or stopped to use a tool."""
    cut = {"messages": "max_tokens", "chat": "length", "responses": "max_output_tokens"}[dialect]
    used = {"messages": "tool_use", "chat": "tool_calls", "responses": "stop"}[dialect]
    done = {"messages": "end_turn"}.get(dialect, "stop")
    use = Said((Use("u1", "Bash", {"command": "ls"}),))
    for stop, answer in ((done, Said()), (cut, Said(stop=cut)), (used, use)):
        call = one(tmp_path / stop / str(answer.said == ("Done.",)), dialect, says(dialect, answer, stream=stream))
        assert (call.stop_reason, call.error) == (stop, None)
        assert call.completed is (False if answer is use else True if answer.stop is None else None)


@EVERY
@pytest.mark.parametrize(
    ("status", "kind", "message", "error"),
    [
        (529, "overloaded_error", "Overloaded", "overloaded"),
        (503, "api_error", "later", "overloaded"),
        (429, "rate_limit_error", "slow down", "rate_limit"),
        (401, "authentication_error", "who?", "auth"),
        (400, "invalid_request_error", "prompt is too long: 300000 tokens > 200000 maximum", "overflow"),
        (400, "invalid_request_error", "no such field", "bad_request"),
        (404, "not_found_error", "no such model", "other"),
        (500, "api_error", "oh", "other"),
        (504, "timeout_error", "late", "timeout"),
    ],
)
def test_failures_are_told_by_class(
    dialect: str, status: int, kind: str, message: str, error: str, tmp_path: Path
) -> None:
    """An error is a row with its status and class, its times, and nothing else: no account, no output."""
    call = one(tmp_path, dialect, refuses(status, kind, message))
    assert (call.status, call.error, call.stop_reason, call.first_token_ns) == (status, error, None, None)
    assert [getattr(call, name) for name in TOLD] == [None, None, None, None, None, "absent", "absent"]
    assert call.end_ns >= (call.first_byte_ns or 0) > 0
    assert (call.completed, call.retries, call.attempts) == (False, 0, ())


@EVERY
def test_a_stream_may_fail_when_it_has_begun(dialect: str, tmp_path: Path) -> None:
    """An error event after the first token: status 200, the error's class. A stream that just ends was reset."""
    begun = events(dialect, Said())[:3]
    told = b'data: {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}\n\n'
    head = {"content-type": "text/event-stream"}
    call = one(tmp_path / "told", dialect, Reply([*begun, told], headers=head), stream=True)
    assert (call.status, call.error, call.completed, call.usage_source) == (200, "overloaded", False, "absent")
    assert (call.first_token_ns or 0) > 0
    call = one(tmp_path / "short", dialect, Reply(begun, headers=head), stream=True)
    assert (call.status, call.error, call.completed) == (200, "reset", False)


def scripted(*replies: Reply) -> Script:
    """A script that gives these replies in turn."""
    left = list(replies)
    return lambda _: left.pop(0)


@EVERY
def test_retries_are_folded_into_the_call_they_lead_to(dialect: str, tmp_path: Path) -> None:
    """The same request again after a 529 and a 500: one row from the first try's start to the last one's end, with all
    tries; another request after an error is a row of its own.
    """
    body = request(dialect, [user("Hello.")])
    answer = says(dialect, Said())
    with recording(tmp_path / "again", scripted(refuses(529), refuses(500), answer)) as made:
        for _ in range(3):
            made.ask(dialect, body)
    call = made.call
    assert (call.retries, call.status, call.error, call.start_ns, call.prompt) == (2, 200, None, 0, 100)
    assert [(tried.status, tried.error) for tried in call.attempts] == [
        (529, "overloaded"),
        (500, "other"),
        (200, None),
    ]
    times = [ns for tried in call.attempts for ns in (tried.sent_ns, tried.done_ns)]
    assert times == sorted(times)  # type: ignore[type-var]
    assert (times[0], times[-1]) == (0, call.end_ns)
    assert times[4] < (call.first_byte_ns or 0)  # type: ignore[operator]
    with recording(tmp_path / "other", scripted(refuses(529), answer)) as made:
        made.ask(dialect, body)
        made.ask(dialect, request(dialect, [user("Hello.", "And more.")]))
    assert [(call.status, call.retries) for call in made.calls] == [(529, 0), (200, 0)]


@EVERY
def test_what_a_failed_try_brought_is_not_lost(dialect: str, tmp_path: Path) -> None:
    """The request with a tool's result is refused and sent again: the result came with the first try, and that is what
    the tool's time, the gap and the edge are of.
    """
    use, result = Use("u1", "Bash", {"command": "ls"}), Result("u1", "a" * 300)
    body = request(dialect, [user("Hello."), assistant(use), user(result)])
    replies = says(dialect, Said((use,), Tokens(500, 40))), refuses(529), says(dialect, Said(tokens=Tokens(900, 9)))
    with recording(tmp_path, scripted(*replies)) as made:
        made.ask(dialect, request(dialect, [user("Hello.")]))
        for _ in range(2):
            time.sleep(PAUSE_S)
            made.ask(dialect, body)
    first, second = made.calls
    (tool,) = first.tools
    assert second.retries == 1
    assert (tool.start_ns or 0) + (tool.duration_ns or 0) == second.start_ns == second.attempts[0].sent_ns
    assert [tool.result_tokens] == [segment.tokens for segment in second.append if segment.kind == "tool_result"]
    assert (second.gap_kind, second.gap_ns) == ("tool", second.start_ns - first.end_ns)
    assert [(edge.call, edge.kind) for edge in second.after] == [(first.call, "tool")]


@EVERY
@pytest.mark.parametrize("how", ["a write each", "one write", "br"])
def test_an_event_that_cannot_be_read_is_not_the_end_of_an_answer(dialect: str, how: str, tmp_path: Path) -> None:
    """Half an emoji, which the parser refuses: the client took the answer as good, and its account is told."""
    pieces = events(dialect, Said(tokens=Tokens(150, 9)))
    pieces = [*pieces[:1], b'data: {"said": "\\ud83d"}\n\n', *pieces[1:]]
    pieces = pieces if how == "a write each" else [b"".join(pieces)]
    headers = {"content-type": "Text/Event-Stream"}
    if how == "br":
        pieces, headers = [pa.compress(pieces[0], codec="brotli", asbytes=True)], headers | {"content-encoding": how}
    call = one(tmp_path, dialect, Reply(pieces, headers=headers), stream=True)
    assert (call.status, call.error, call.prompt, call.output) == (200, None, 150, 9)


@EVERY
@STREAMED
def test_tools_are_told_with_their_results(dialect: str, stream: bool, tmp_path: Path) -> None:
    """Two tools asked for in one answer: their names, when asked, how long until the next request brought the results,
    how large those were, and whether they failed (which only the Messages API tells).
    """
    uses = Use("u1", "Bash", {"command": "ls"}), Use("u2", "Read", {"file_path": "x"})
    replies = [says(dialect, Said(uses, Tokens(500, 40)), stream=stream), says(dialect, Said(tokens=Tokens(900, 9)))]
    results = Result("u1", "a" * 300, is_error=True), Result("u2", "b" * 600)
    with recording(tmp_path, scripted(*replies)) as made:
        made.ask(dialect, request(dialect, [user("Hello.")], stream=stream))
        time.sleep(PAUSE_S)
        made.ask(dialect, request(dialect, [user("Hello."), assistant(*uses), user(*results)]))
    first, second = made.calls
    assert [tool.name for tool in first.tools] == ["Bash", "Read"]
    assert [tool.is_error for tool in first.tools] == [True if dialect == "messages" else None, None]
    for tool in first.tools:
        assert 0 < (tool.start_ns or 0) <= first.end_ns
        assert (tool.start_ns or 0) + (tool.duration_ns or 0) == second.start_ns
    given = [segment.tokens for segment in second.append if segment.kind == "tool_result"]
    assert [tool.result_tokens for tool in first.tools] == given
    assert 0 < given[0] < given[1]
    assert (second.gap_kind, second.gap_ns) == ("tool", second.start_ns - first.end_ns)
    assert [(edge.call, edge.kind) for edge in second.after] == [(first.call, "tool")]
    answered = [segment for segment in second.append if segment.answer_of == first.call]
    assert [segment.kind for segment in answered] == ["answer", "answer"]
    assert sum(segment.tokens for segment in answered) == 40
    assert second.prompt_parent == first.call
    assert second.keep == 500


@EVERY
@pytest.mark.parametrize("number", [-1, 1.5, True, None, 3 * 10**9, 2**63, 10**30])
def test_counts_that_cannot_be_are_unknown(dialect: str, number: Any, tmp_path: Path) -> None:
    """A server or a client that tells nonsense: the call is there, the number is null, the trace can be written."""
    reply = says(dialect, Said(tokens=Tokens(100, number, number, number, number)))
    hints = {"priority": number if number != -1 else 0.5, "strict_priority": number, "osl": number}
    nvext = {"agent_hints": hints, "cache_control": {"ttl": f"{number}h"}}
    call = one(tmp_path, dialect, reply, nvext=nvext)
    assert (call.status, call.output, call.reasoning, call.cache_read) == (200, None, None, None)
    assert call.hints is None


@pytest.mark.parametrize("block", [{"type": "tool_use", "id": "u1", "name": "Bash"}, {"type": "text"}, 7])
def test_an_answer_that_makes_no_sense_still_costs(block: Any, tmp_path: Path) -> None:
    """A block without what its type must have: what was said is unknown, and the account is told."""
    body = whole("messages", Said(("Hm.",), Tokens(100, 9, 60, 0))) | {"content": [block]}
    call = one(tmp_path, "messages", Reply([json.dumps(body).encode()]))
    assert (call.status, call.error, call.prompt, call.cache_read, call.output) == (200, "other", 100, 60, 9)
    assert call.tools == ()


def test_cache_marks_are_told_in_tokens(tmp_path: Path) -> None:
    """Marks on a tool, a system block and the last message: tokens up to and with each, five minutes or an hour.
    None lies past what the API counted as cacheable.
    """

    def marked(text: str, **more: str) -> dict[str, Any]:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral", **more}}

    tool = {"name": "Bash", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {
        "model": "claude-opus-4-8",
        "tools": [{"name": "Read", "input_schema": {}}, tool],
        "system": [{"type": "text", "text": "Be brief."}, marked("Really.", ttl="1h")],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello."}, marked("Go.", ttl="5m")]}],
    }
    reply = says("messages", Said(tokens=Tokens(1000, 9, 0, 1000)))
    with recording(tmp_path, lambda _: reply) as made:
        made.ask("messages", body)
    sizes = [segment.tokens for segment in made.call.append]
    assert [segment.kind for segment in made.call.append] == ["tools", "tools", "system", "system", "user", "user"]
    assert made.call.breakpoints == (
        Breakpoint(sum(sizes[:2]), 3600),
        Breakpoint(sum(sizes[:4]), 3600),
        Breakpoint(1000, 300),
    )
    reply = says("messages", Said(tokens=Tokens(1000, 9, 400, 570)))
    with recording(tmp_path, lambda _: reply) as made:
        made.ask("messages", body)
    assert made.call.breakpoints[-1] == Breakpoint(970, 300)


def test_hints_are_kept_as_they_were_sent(tmp_path: Path) -> None:
    """Dynamo's: priority, strict priority, expected output, prefill, how long to keep. None sent: null."""
    hints = {"priority": -3, "strict_priority": 2, "osl": 400, "speculative_prefill": True}
    nvext = {"agent_hints": hints, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    reply = says("chat", Said())
    assert one(tmp_path / "sent", "chat", reply, nvext=nvext).hints == Hints(-3, 2, 400, True, 3600)
    assert one(tmp_path / "none", "chat", reply).hints is None


@pytest.mark.parametrize(
    ("agent", "given", "flow"),
    [
        ("claude-cli/2.1.197 (external, cli)", None, "interactive"),
        ("claude-cli/2.1.197 (external, sdk-py)", None, "background"),
        ("codex_exec/0.169.0 (Linux)", None, "background"),
        ("codex_cli_rs/0.169.0 (Linux)", None, "interactive"),
        ("python-httpx/0.28", None, None),
        ("claude-cli/2.1.197 (external, cli)", "background", "background"),
        ("python-httpx/0.28", "interactive", "interactive"),
    ],
)
def test_who_waits_is_told_by_the_client_or_the_user(
    agent: str, given: str | None, flow: str | None, tmp_path: Path
) -> None:
    """By the entrypoint in the user agent; the user's --flow goes before it."""

    def ask(made: Recording) -> None:
        made.ask("messages", request("messages", [user("Hello.")]), {"user-agent": agent})

    with recording(tmp_path, lambda _: says("messages", Said()), flow=given) as made:
        ask(made)
    assert made.call.flow == flow
