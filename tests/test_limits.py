"""What a provider allows, which a replay keeps to, and what it does when it is refused: as the agents' SDKs do."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from math import inf, nextafter
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import MS, about, call, chain, keepwarm_, rows, write
from test_replay import Script, answering, replayed, served
from wire import event, events

from keepwarm.replayers.caps import TokenBucket
from keepwarm.replayers.endpoint import Answer, Request
from keepwarm.replayers.retry import wait_s
from keepwarm.replayers.watch import Watch
from keepwarm.traces.model import Call, Segment

FAILURES = [(429, "rate_limit"), (529, "overloaded"), (500, "other"), (503, "overloaded"), (408, "timeout")]
FAILURES += [(409, "other"), (None, "reset"), (200, "reset"), (200, "overloaded"), (None, "timeout"), (200, "timeout")]
FINAL = [(200, None), (400, "bad_request"), (401, "auth"), (403, "auth"), (404, "other"), (413, "overflow")]


class Busy:
    """A script that answers after 10 ms, and the most calls that it was answering at once, by flow and of all."""

    def __init__(self) -> None:
        self.now: Counter[str | None] = Counter()
        self.most: Counter[str | None] = Counter()

    async def __call__(self, request: Request, sent_ns: int) -> Answer:
        for name in (request.call.flow, "all"):
            self.now[name] += 1
            self.most[name] = max(self.most[name], self.now[name])
        await asyncio.sleep(0.01)
        for name in (request.call.flow, "all"):
            self.now[name] -= 1
        return Answer(sent_ns, sent_ns + 10 * MS, status=200)


def flowing(interactive: int, background: int, calls: int = 2) -> list[list[Call]]:
    """Sessions of both flows, those in the background first."""
    flows = ["background"] * background + ["interactive"] * interactive
    return [chain(f"s{number}-", calls, flow=flow) for number, flow in enumerate(flows)]


@settings(max_examples=25, deadline=None)
@given(every=st.none() | st.integers(1, 5), one=st.none() | st.integers(1, 5), sessions=st.integers(1, 6))
def test_never_more_calls_at_once_than_are_allowed(every: int | None, one: int | None, sessions: int) -> None:
    """Of all, and of a flow beside one that has no cap of its own: as many as there may be, if there are as many."""
    caps = [(None, every)] * (every is not None) + [("background", one)] * (one is not None)
    busy = Busy()
    outcomes, _, _ = replayed(flowing(sessions, sessions), busy, at_once=12, caps={"concurrency": caps})
    assert all(outcome.whole for outcome in outcomes)
    assert len(outcomes) == 4 * sessions
    assert busy.most["all"] <= (every or 12)
    assert busy.most["background"] == min(one or 12, every or 12, sessions)


def test_what_waits_for_its_flows_turn_shows_it_and_holds_up_no_other() -> None:
    """Ten of the background one at a time, ten others at once: those are not held up, these wait their turn from when
    they were due on, in that order.
    """
    outcomes, endpoint, _ = replayed(flowing(10, 10, 1), Busy(), at_once=20, caps={"concurrency": [("background", 1)]})
    waited = {o.call.call: (o.sent_ns or 0) - (o.due_ns or 0) for o in outcomes}
    behind = [f"s{number}-0" for number in range(10)]
    assert [name for name, _ in endpoint.asked if name in behind] == behind
    assert all(waited[name] >= place * 10 * MS for place, name in enumerate(behind))
    assert max(waited[f"s{number}-0"] for number in range(10, 20)) < 90 * MS


def test_a_call_that_waits_for_its_flow_takes_no_place_of_all() -> None:
    """Two at once, of the background one: while one of that runs and others wait, an interactive one has its place."""
    busy = Busy()
    caps = {"concurrency": [(None, 2), ("background", 1)]}
    outcomes, endpoint, _ = replayed(flowing(1, 4, 1), busy, at_once=5, caps=caps)
    assert len(outcomes) == 5
    assert [name for name, _ in endpoint.asked].index("s4-0") <= 1


def granted(most: int, asked: list[tuple[int, int]]) -> list[float]:
    """When a bucket lets each of these go, who ask so many ms after one another for so many tokens, in their turn."""
    bucket, now, came, found = TokenBucket(most), 1000.0, 1000.0, []
    for tokens, after_ms in asked:
        came += after_ms / 1000
        now = max(now, came)
        while (left := bucket.wait_s(tokens, now)) > 0:
            now = max(now + left, nextafter(now, inf))
        found.append(now - 1000)
    return found


def expected(most: int, asked: list[tuple[int, int]]) -> list[Fraction]:
    """The same by sums: a bucket has what it began with, and what flowed in while it was not full, less what went out.
    It is full first, and what is larger than all of it waits until it is full.
    """
    rate, room, at, came, found = Fraction(most, 60), Fraction(most), Fraction(0), Fraction(0), []
    for tokens, after_ms in asked:
        came += Fraction(after_ms, 1000)
        begin = max(at, came)
        room = min(Fraction(most), room + (begin - at) * rate)
        wait = max(Fraction(0), (min(tokens, most) - room) / rate)
        room, at = room + wait * rate - tokens, begin + wait
        found.append(at)
    return found


@settings(max_examples=200, deadline=None)
@given(
    most=st.integers(1, 10**7),
    asked=st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 90_000)), min_size=1, max_size=20),
)
def test_tokens_a_minute_are_those_of_a_bucket(most: int, asked: list[tuple[int, int]]) -> None:
    """To the time at which each call goes; and in no span of time do more go than were there and flowed in, but for a
    prompt that is larger than the bucket.
    """
    found = granted(most, asked)
    for got, wanted in zip(found, expected(most, asked), strict=True):
        assert abs(got - float(wanted)) <= 1e-6 * (1 + float(wanted))
    for first in range(len(asked)):
        taken = 0
        for last in range(first, len(asked)):
            taken += min(asked[last][0], most)
            assert taken <= most * (1 + (found[last] - found[first]) / 60) * (1 + 1e-6) + 1e-6


def test_prompt_tokens_a_minute_hold_up_what_is_sent() -> None:
    """6,000 a minute are 100 a second: of prompts of 3,000 two go at once, a third of 20 waits for its 20."""
    sizes = [3000, 3000, 20, 20]
    calls = [[call(f"c{n}", session=f"s{n}", append=(Segment(n, size, "user"),))] for n, size in enumerate(sizes)]
    outcomes, _, _ = replayed(calls, answering(), caps={"tokens_per_minute": [(None, 6000)]})
    waited = {o.call.call: (o.sent_ns or 0) - (o.due_ns or 0) for o in outcomes}
    assert all(o.whole for o in outcomes)
    assert waited["c1"] < 150 * MS
    assert waited["c2"] > 150 * MS
    assert waited["c3"] > 350 * MS


def test_what_a_call_took_is_given_back_though_it_failed() -> None:
    """One place: every call that fails leaves it to the next."""
    trace = [chain(f"s{number}-", 2) for number in range(5)]
    refused = answering(failing=frozenset(f"s{number}-0" for number in range(5)))
    outcomes, endpoint, whole = replayed(trace, refused, caps={"concurrency": [(None, 1)]})
    assert whole
    assert Counter(outcome.error for outcome in outcomes) == {"overloaded": 5, "skipped": 5}
    assert len(endpoint.asked) == 5


def test_caps_are_told_in_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its flow, and what is none is one line."""
    trace, run = write(tmp_path / "t.parquet", chain("s", 2)), tmp_path / "run"
    with served() as url:
        command = ("replay", trace, "--endpoint", url)
        caps = ("--max-rate", "50", "--max-rate", "background=3", "--max-concurrency", "interactive=2")
        assert keepwarm_(capsys, *command, "-o", str(run), *caps)[0] == 0
        for wrong in ("0", "-1", "1.5", "x", "nobody=3", "=3", "background="):
            code, _, err = keepwarm_(capsys, *command, "--max-rate", wrong)
            assert (code, "expected a whole number above 0" in err) == (2, True), wrong
    told = about(run)["options"]
    assert told["max_rate"] == [[None, 50], ["background", 3]]
    assert (told["max_concurrency"], told["max_input_tokens_per_minute"]) == ([["interactive", 2]], None)


@pytest.mark.parametrize(("status", "error"), FAILURES)
def test_what_may_pass_is_tried_again_as_the_sdks_do(status: int | None, error: str) -> None:
    """After half a second, doubled each time up to eight, less up to a quarter."""
    answer = Answer(0, 1, status=status, error=error)
    for tries, most in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 8.0), (6, 8.0), (50, 8.0)):
        waits = [wait_s(answer, tries, Random(seed)) or 0 for seed in range(100)]
        assert 0.75 * most <= min(waits) < 0.8 * most
        assert 0.95 * most < max(waits) <= most


@pytest.mark.parametrize(("status", "error"), FINAL)
def test_what_will_not_pass_is_final(status: int, error: str | None) -> None:
    """An answer, and what is wrong with the request itself, whatever the server tells to wait."""
    assert wait_s(Answer(0, 1, status=status, error=error, retry_after_s=1.0), 1, Random(0)) is None


@pytest.mark.parametrize(("told", "obeyed"), [(0.001, True), (30.0, True), (60.0, True), (60.1, False), (0.0, False)])
def test_a_server_is_left_alone_as_long_as_it_says_up_to_a_minute(told: float, obeyed: bool) -> None:
    """Beyond that, and where it says nothing of use, by the SDKs' own time."""
    waited = wait_s(Answer(0, 1, status=429, error="rate_limit", retry_after_s=told), 1, Random(0))
    assert waited is not None
    assert waited == told if obeyed else 0.375 <= waited <= 0.5


def refusing(*failures: tuple[int | None, str]) -> Script:
    """A script that fails s1 so often, each time told to wait 20 ms, and then answers it."""
    left = list(failures)

    async def answer(request: Request, sent_ns: int) -> Answer:
        if request.call.call == "s1" and left:
            status, error = left.pop(0)
            return Answer(sent_ns, sent_ns, status=status, error=error, retry_after_s=0.02)
        return Answer(sent_ns, sent_ns, status=200)

    return answer


def test_tries_are_told_and_the_answer_is_the_last_ones() -> None:
    """Two failures and an answer: a whole outcome, its first try's time, three attempts as far apart as was told, and
    the session goes on.
    """
    failures = (429, "rate_limit"), (None, "reset")
    outcomes, endpoint, _ = replayed([chain("s", 3)], refusing(*failures), retries=2)
    found = {outcome.call.call: outcome for outcome in outcomes}
    assert Counter(name for name, _ in endpoint.asked) == {"s0": 1, "s1": 3, "s2": 1}
    one = found["s1"]
    assert (one.status, one.error, one.whole) == (200, None, True)
    assert [(a.status, a.error) for a in one.attempts] == [*failures, (200, None)]
    assert [a.sent_ns for a in one.attempts] == [sent_ns for name, sent_ns in endpoint.asked if name == "s1"]
    assert all(after.sent_ns >= (before.done_ns or 0) + 20 * MS for before, after in pairwise(one.attempts))
    assert (one.first_sent_ns, one.sent_ns) == (one.attempts[0].sent_ns, one.attempts[-1].sent_ns)
    assert found["s2"].due_ns == one.done_ns
    assert (found["s0"].first_sent_ns, len(found["s0"].attempts)) == (None, 1)


@pytest.mark.parametrize(("retries", "asked"), [(0, 1), (1, 2), (2, 3), (5, 6)])
def test_a_call_is_tried_so_often_and_no_more(retries: int, asked: int) -> None:
    """What fails each time fails for good with its last error; its session is over."""
    outcomes, endpoint, _ = replayed([chain("s", 3)], refusing(*[(503, "overloaded")] * 9), retries=retries)
    assert Counter(name for name, _ in endpoint.asked) == {"s0": 1, "s1": asked}
    assert [(o.call.call, o.error, len(o.attempts)) for o in outcomes] == [
        ("s0", None, 1),
        ("s1", "overloaded", asked),
        ("s2", "skipped", 0),
    ]


class Moody(BaseHTTPRequestHandler):
    """An endpoint of the Messages dialect that is not well for some answers: it refuses, or drops a stream midway."""

    protocol_version = "HTTP/1.1"
    moods: list[Callable[[Moody], None]]
    bodies: list[bytes]

    def do_GET(self) -> None:
        self._send(200, orjson.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        (self.moods.pop(0) if self.moods else Moody.well)(self)

    def well(self) -> None:
        """Answer."""
        self._send(200, b"".join(events()), "content-type: text/event-stream")

    def busy(self) -> None:
        """Refuse, and tell to wait 30 ms."""
        self._send(429, b'{"error": {"type": "rate_limit_error"}}', "retry-after-ms: 30")

    def wrong(self) -> None:
        """Refuse for good."""
        self._send(400, b'{"error": {"type": "invalid_request_error"}}', "retry-after-ms: 30")

    def drop(self) -> None:
        """Begin an answer and hang up."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"".join(events()[:3]))
        self.close_connection = True

    def fault(self) -> None:
        """Begin an answer and say in it that it is too much."""
        told = event("error", error={"type": "overloaded_error", "message": "busy"})
        self._send(200, b"".join(events()[:3]) + told, "content-type: text/event-stream")

    def _send(self, status: int, data: bytes, *headers: str) -> None:
        self.send_response(status)
        for header in (*headers, f"content-length: {len(data)}"):
            self.send_header(*header.split(": "))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def moody(*moods: Callable[[Moody], None]) -> Iterator[tuple[str, list[bytes]]]:
    """Its URL, and the bodies it has read, while it listens."""
    told: dict[str, Any] = {"moods": list(moods), "bodies": []}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Listening", (Moody,), told))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", told["bodies"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("moods", "options", "expected"),
    [
        ((Moody.busy,), (), [(429, "rate_limit"), (200, None)]),
        ((Moody.drop,), (), [(200, "reset"), (200, None)]),
        ((Moody.fault,), (), [(200, "overloaded"), (200, None)]),
        ((Moody.busy, Moody.drop), (), [(429, "rate_limit"), (200, "reset"), (200, None)]),
        ((Moody.busy,) * 3, (), [(429, "rate_limit")] * 3),
        ((Moody.busy,), ("--max-retries", "0"), [(429, "rate_limit")]),
        ((Moody.wrong,), (), [(400, "bad_request")]),
    ],
)
def test_over_http_a_call_is_sent_again_as_it_was(
    moods: tuple[Any, ...],
    options: tuple[str, ...],
    expected: list[tuple[int, str | None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same bytes each time, attempts with what came of each in the run's rows; a dropped stream is begun anew and
    counts only its own tokens.
    """
    trace, run = write(tmp_path / "t.parquet", [call("a")]), tmp_path / "run"
    with moody(*moods) as (url, bodies):
        command = ("replay", trace, "--endpoint", url, "-o", str(run), "--no-preflight", *options)
        code, _, _ = keepwarm_(capsys, *command)
    row = rows(run)["a"]
    assert [(attempt["status"], attempt["error"]) for attempt in row["attempts"]] == expected
    assert (row["status"], row["error"]) == expected[-1]
    assert code == (0 if row["error"] is None else 3)
    assert len(bodies) == len(expected)
    assert len(set(bodies)) == 1
    first, last = row["attempts"][0]["sent_ns"], row["attempts"][-1]["sent_ns"]
    assert (row["first_sent_ns"], row["sent_ns"]) == (None if len(expected) == 1 else first, last)
    assert row["due_ns"] <= first
    if row["error"] is None:
        assert (row["prompt"], row["output"]) == (15, 2)
        assert last <= row["first_token_ns"] <= row["done_ns"]
    for before, after in pairwise(row["attempts"]):
        assert after["sent_ns"] - before["done_ns"] >= (30 * MS if before["status"] == 429 else 375 * MS)


def test_a_loop_that_is_held_up_is_late_for_all_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stall of 0.2 s among hundreds of looks 1 ms apart is two hundred late ones, not one: the p99 shows it."""
    monkeypatch.setattr("keepwarm.replayers.watch.TICK_S", 0.001)
    watch = Watch()

    async def stalled() -> None:
        with watch:
            await asyncio.sleep(0.5)
            time.sleep(0.2)  # it is what holds the loop up
            await asyncio.sleep(0.01)

    asyncio.run(stalled())
    assert 0.15 < watch.told["loop_lag_p99_s"] <= watch.told["loop_lag_max_s"]
