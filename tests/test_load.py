"""A load of bounded time: what is warm-up, measured and drain; sessions that begin midway; time that is skipped."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import MS, about, call, chain, keepwarm_, write
from test_replay import Script, Scripted, answering, served

from keepwarm.replayers.arrivals import Arrival, arrivals
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.endpoint import Answer, Request
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.prompts import SessionPrompts, as_pieces
from keepwarm.replayers.replay import Replay, run_replay
from keepwarm.traces.model import After, Call, Outcome, Segment
from keepwarm.traces.store import read_outcome_table

HOUR = 3_600_000 * MS


def loaded(come: Iterable[Arrival], script: Script, **options: Any) -> tuple[list[Outcome], Replay]:
    """What came of a load, and its replay."""
    clock, outcomes = RunClock(), []
    plan = {name: options.pop(name) for name in ("at_once", "window") if name in options}
    schedule: Schedule[Any] = Schedule(come, **plan)
    endpoint = Scripted(clock, script)

    async def run() -> tuple[Replay, bool]:
        replay = Replay(schedule, endpoint, outcomes.append, clock=clock, name="scripted", retries=0, **options)
        clock.start()
        return replay, await run_replay(replay, endpoint)

    replay, whole = asyncio.run(run())
    assert whole
    return outcomes, replay


def by_name(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    """Outcomes by their calls."""
    return {outcome.call.call: outcome for outcome in outcomes}


def driven(schedule: Schedule[Any], lasting: dict[str, int]) -> list[Planned[Any]]:
    """The calls of a schedule as they come due on a clock of its own, each sent at once and over when it has lasted."""
    now, found, running = 0, [], []
    while True:
        due = schedule.next_due(now)
        if running and (due is None or running[0][0] < due):
            now, _, over = heappop(running)
            schedule.ended(over, now)
        elif due is None:
            return found
        else:
            now = max(now, due)
            planned = schedule.pop()
            found.append(planned)
            schedule.started(planned, now)
            heappush(running, (now + lasting[planned.call.call], len(found), planned))


@st.composite
def recorded(draw: st.DrawFn) -> list[Call]:
    """A session whose calls started when their edges let them, one of them always what they waited for; each prompt
    grows from an earlier one.
    """
    calls: list[Call] = []
    for number in range(draw(st.integers(1, 8))):
        edges, started = [], 0
        for before in draw(st.lists(st.sampled_from(calls), max_size=2, unique=True)) if calls else []:
            trigger, gap = draw(st.sampled_from(["start", "end"])), draw(st.integers(0, 50)) * MS
            edges.append(After(before.call, trigger, gap, "tool"))
            started = max(started, (before.start_ns if trigger == "start" else before.end_ns) + gap)
        parents = [None, *(one for one in calls if one.start_ns <= started)]
        parent = draw(st.sampled_from(parents))
        told: dict[str, Any] = {"start_ns": started, "end_ns": started + draw(st.integers(1, 50)) * MS}
        told |= {"prompt_parent": parent and parent.call, "keep": parent.prompt_tokens if parent else 0}
        calls.append(call(f"c{number}", *edges, append=(Segment(number, 10 + number, "user"),), **told))
    return sorted(calls, key=lambda one: one.start_ns)


@settings(max_examples=200, deadline=None)
@given(calls=recorded(), over=st.floats(0, 0.999), start=st.integers(0, 100), speed=st.sampled_from([1.0, 2.0]))
def test_what_begins_midway_goes_on_as_it_was_recorded(
    calls: list[Call], over: float, start: int, speed: float
) -> None:
    """Only later calls are asked, each once, their prompts with all of the history. Where no earlier call was still
    being answered and all others wait for a call, they are due as far from the first as they were recorded.
    """
    place = int(over * len(calls))
    schedule: Schedule[Any] = Schedule([Arrival(calls, 0, start * MS, place)], speed=speed)
    lasting = {one.call: round((one.end_ns - one.start_ns) / speed) for one in calls}
    found = driven(schedule, lasting)
    assert sorted(planned.call.call for planned in found) == sorted(one.call for one in calls[place:])
    whole = SessionPrompts(calls, as_pieces)
    prompts = {one.call: whole.prompt(one) for one in calls}
    assert all(planned.prompt == prompts[planned.call.call] for planned in found)
    first_ns = calls[place].start_ns
    idle = all(one.end_ns <= first_ns for one in calls[:place])
    for planned in found:
        assert planned.due_ns >= start * MS
        if idle and all(one.after or one.start_ns == first_ns for one in calls[place:]):
            assert planned.due_ns == start * MS + (planned.call.start_ns - first_ns) / speed
    assert schedule.partial == ({("s", 0)} if place else set())


def test_phases_are_told_by_when_a_call_is_due() -> None:
    """Before the window warm-up, in it measured, from its end on drain; without a window no phase."""
    for window, expected in (((20, 40), ["warmup"] * 2 + ["measured"] * 2 + ["drain"] * 2), (None, [None] * 6)):
        schedule: Schedule[Any] = Schedule([Arrival(chain("s", 6, gap_ns=10), 0, 0)], window=window)
        found = driven(schedule, {f"s{number}": 0 for number in range(6)})
        assert [(planned.due_ns, planned.phase) for planned in found] == list(
            zip(range(0, 60, 10), expected, strict=True)
        )


def test_the_first_call_of_an_agent_that_nobody_has_cached_is_warm_up() -> None:
    """Of a session that began midway each agent's first call is not measured, wherever it is due; of a whole one all
    in the window are.
    """
    calls = [one._replace(agent="ab"[number % 2]) for number, one in enumerate(chain("s", 6, gap_ns=10))]
    for over, expected in ((1, ["warmup", "warmup", *["measured"] * 3]), (0, ["measured"] * 6)):
        schedule: Schedule[Any] = Schedule([Arrival(calls, 0, 0, over)], window=(0, 1000))
        found = driven(schedule, {one.call: 0 for one in calls})
        assert [planned.phase for planned in found] == expected


def slow(*names: str, long_s: float) -> Script:
    """A script that answers in 5 ms, but some calls of some copy late."""

    async def answer(request: Request, sent_ns: int) -> Answer:
        lasting_s = long_s if f"{request.call.call}/{request.copy}" in names else 0.005
        await asyncio.sleep(lasting_s)
        return Answer(sent_ns, sent_ns + round(lasting_s * 1e9), status=200)

    return answer


def test_the_load_goes_on_until_the_last_measured_call_is_over() -> None:
    """One call is asked within the time and takes far longer: others are sent for as long as it lasts, and none much
    later; no measured call is cut off, and every call that was due in the time has its row.
    """
    trace = [chain("s", 2), chain("t", 2)]
    come = arrivals(lambda: trace, repeat=None)
    window = (20 * MS, 100 * MS)
    outcomes, _ = loaded(come, slow("s1/0", long_s=0.4), at_once=2, window=window, until_ns=window[1])
    phases: dict[str | None, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        phases[outcome.phase].append(outcome)
    assert set(phases) == {"warmup", "measured", "drain"}
    for phase, (begin, end) in {"warmup": (0, 20), "measured": (20, 100), "drain": (100, 10_000)}.items():
        assert all(begin * MS <= (outcome.due_ns or 0) < end * MS for outcome in phases[phase])
    assert all(outcome.whole for outcome in (*phases["warmup"], *phases["measured"]))
    last = by_name(o for o in phases["warmup"] if not o.copy)["s1"]
    assert last.done_ns and last.done_ns > 400 * MS
    assert {outcome.error for outcome in phases["drain"]} <= {None, "interrupted"}
    sent = sorted(outcome.sent_ns or 0 for outcome in phases["drain"])
    assert sent[-1] > last.done_ns - 100 * MS
    assert sent[-1] < last.done_ns + 1000 * MS
    keys = Counter((outcome.call.call, outcome.copy) for outcome in outcomes)
    assert set(keys.values()) == {1}
    assert {("s0", 0), ("s1", 0), ("t0", 1), ("t1", 1)} <= keys.keys()


def test_a_call_that_is_due_as_the_time_ends_is_measured() -> None:
    """It is due 1 us before: whoever wakes for it wakes after the end."""
    come = [Arrival(chain("s", 1), 0, 0), Arrival(chain("t", 1), 0, 50 * MS - 1000)]
    outcomes, _ = loaded(come, answering(), window=(0, 50 * MS), until_ns=50 * MS)
    assert [(outcome.call.call, outcome.phase) for outcome in outcomes] == [("s0", "measured"), ("t0", "measured")]


def test_calls_that_a_failure_in_the_warm_up_took_are_not_warm_up() -> None:
    """A session fails before the window; nobody can say that what was to follow would not have been measured."""
    come = [Arrival(chain("s", 3, gap_ns=30 * MS), 0, 0), Arrival(chain("t", 3, gap_ns=30 * MS), 0, 0)]
    refused = answering(failing=frozenset({"s0"}))
    outcomes, _ = loaded(come, refused, window=(20 * MS, 100 * MS), until_ns=100 * MS)
    assert {outcome.phase for name, outcome in by_name(outcomes).items() if name in ("s1", "s2")} != {"warmup"}


def test_nothing_of_a_bounded_load_is_planned_beyond_its_time() -> None:
    """What is not due by then has no row: an hour's gap is not waited for, nor is its call told as skipped."""
    begun = time.monotonic()
    outcomes, _ = loaded(
        [Arrival(chain("s", 2, gap_ns=HOUR), 0, 0)], answering(), window=(0, 50 * MS), until_ns=50 * MS
    )
    assert [(outcome.call.call, outcome.error) for outcome in outcomes] == [("s0", None)]
    assert time.monotonic() - begun < 60


def test_an_hour_in_which_nothing_happens_costs_no_time_and_is_told() -> None:
    """The rows' times have it, the replay says how much of it was skipped: all but the cap."""
    begun = time.monotonic()
    outcomes, replay = loaded([Arrival(chain("s", 3, gap_ns=HOUR), 0, 0)], answering(), idle_cap_ns=20 * MS)
    assert time.monotonic() - begun < 60
    found = by_name(outcomes)
    for before, after in pairwise(found[f"s{number}"] for number in range(3)):
        assert after.due_ns == (before.done_ns or 0) + HOUR
        assert (after.sent_ns or 0) >= (after.due_ns or 0)
    assert 2 * HOUR - 2 * 1000 * MS < replay.skipped_ns <= 2 * HOUR - 2 * 20 * MS


def test_no_time_is_skipped_while_a_call_runs() -> None:
    """A gap of 200 ms beside a call of 300 ms, which ends the run: nothing is skipped, and the gap is waited."""
    come = [Arrival(chain("s", 2, gap_ns=200 * MS), 0, 0), Arrival(chain("t", 1), 0, 0)]
    begun = time.monotonic()
    outcomes, replay = loaded(come, slow("t0/0", long_s=0.3), idle_cap_ns=1 * MS)
    assert time.monotonic() - begun >= 0.3
    assert replay.skipped_ns == 0
    assert by_name(outcomes)["s1"].sent_ns >= 200 * MS  # type: ignore[operator]


def test_a_skip_brings_forward_what_was_waited_for_already() -> None:
    """A session is due in a minute while a call still runs; that ends, the minute is skipped, and the call is on time
    by the run's own clock, not a minute late by it.
    """
    come = [Arrival(chain("s", 1), 0, 0), Arrival(chain("t", 1), 0, 60_000 * MS)]
    outcomes, replay = loaded(come, slow("s0/0", long_s=0.1), idle_cap_ns=10 * MS)
    late = by_name(outcomes)["t0"]
    assert (late.sent_ns or 0) - (late.due_ns or 0) < 30_000 * MS
    assert replay.skipped_ns > 30_000 * MS


def test_a_gap_within_the_idle_cap_is_waited_whole() -> None:
    """50 ms at a cap of a minute."""
    begun = time.monotonic()
    _, replay = loaded([Arrival(chain("s", 2, gap_ns=50 * MS), 0, 0)], answering(), idle_cap_ns=60_000 * MS)
    assert (replay.skipped_ns, time.monotonic() - begun >= 0.05) == (0, True)


@pytest.fixture
def bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of three sessions of six calls at a time, repeated for two seconds of which the first half second is no
    measure.
    """
    trace = [
        [one._replace(session_start_ns=n) for one in chain(name, 6, gap_ns=20 * MS)] for n, name in enumerate("stu")
    ]
    path, run = write(tmp_path / "t.parquet", *trace), tmp_path / "run"
    with served() as url:
        command = ("replay", path, "--endpoint", url, "-o", str(run), "--sessions", "3")
        assert keepwarm_(capsys, *command, "--duration", "2s", "--warm-up", "0.5s")[0] == 0
    return run


def test_a_bounded_run_says_what_was_measured(bounded: Path) -> None:
    """run.json plans what was measured, all of which was answered; every call is at most once there."""
    found = read_outcome_table(str(bounded / "outcomes.parquet")).to_pylist()
    told = about(bounded)
    assert told["planned_calls"] == sum(row["phase"] == "measured" for row in found) > 0
    assert told["options"].items() >= {"duration_s": 2.0, "warm_up_s": 0.5, "repeat": None}.items()
    assert all(row["error"] is None for row in found if row["phase"] == "measured")
    assert len({(row["call"], row["copy"]) for row in found}) == len(found)
    assert told["interrupted"] is False


def test_nobody_says_that_a_session_was_completed_that_was_not_whole_in_the_run(bounded: Path) -> None:
    """Neither of those that began midway nor of those that the end cut; all others were."""
    calls = defaultdict(list)
    for row in read_outcome_table(str(bounded / "outcomes.parquet")).to_pylist():
        calls[row["session"], row["copy"]].append(row)
    whole = {key: len(rows) == 6 and all(row["error"] is None for row in rows) for key, rows in calls.items()}
    assert {key: {row["completed"] for row in rows} for key, rows in calls.items()} == {
        key: {True if is_whole else None} for key, is_whole in whole.items()
    }
    assert set(whole.values()) == {True, False}


def test_a_report_of_a_bounded_run_is_of_what_was_measured(bounded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It covers all of it, and its calls are those that were measured."""
    told = orjson.loads(keepwarm_(capsys, "report", str(bounded), "--json")[1])
    assert told["calls"] == about(bounded)["planned_calls"]
    assert not [reason for reason in told["because"] if "coverage" in reason]


def test_task_times_of_a_bounded_run_are_of_whole_sessions(bounded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of which some calls are outside what was measured, before it or after it, are no tasks."""
    told = orjson.loads(keepwarm_(capsys, "report", str(bounded), "--json")[1])
    sessions = defaultdict(list)
    for row in read_outcome_table(str(bounded / "outcomes.parquet")).to_pylist():
        sessions[row["session"], row["copy"]].append(row)
    inside = [rows for rows in sessions.values() if len(rows) == 6 and {row["phase"] for row in rows} == {"measured"}]
    took = [max(row["done_ns"] for row in rows) - min(row["due_ns"] for row in rows) for rows in inside]
    assert told["task_time"]["max"] == max(took) / 1e9
    assert told["task_time"]["p50"] == sorted(took)[(len(took) - 1) // 2] / 1e9


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_time_is_not_begun_before_all_are_ready(
    processes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trace of one call for a second: thousands of its copies are read ahead, and no time goes by on that."""
    path, run = write(tmp_path / "t.parquet", chain("s", 1)), tmp_path / "run"
    with served() as url:
        command = ("replay", path, "--endpoint", url, "-o", str(run), "--processes", processes)
        assert keepwarm_(capsys, *command, "--duration", "1s", "--warm-up", "500ms")[0] == 0
    rows = read_outcome_table(str(run / "outcomes.parquet")).to_pylist()
    assert min(row["sent_ns"] for row in rows if row["sent_ns"] is not None) < 500 * MS
    assert {"warmup", "measured"} <= {row["phase"] for row in rows}


@pytest.mark.parametrize("option", ["--duration", "--timeout"])
def test_no_time_at_all_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be measured in it."""
    path = write(tmp_path / "t.parquet", chain("s", 1))
    code, out, err = keepwarm_(capsys, "replay", path, "--endpoint", "http://127.0.0.1:9", option, "0")
    assert (code, out) == (2, "")
    assert "must be above 0" in err


def test_a_run_says_how_much_time_it_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An hour, over HTTP: in the rows' times and in run.json."""
    path, run = write(tmp_path / "t.parquet", chain("s", 2, gap_ns=HOUR)), tmp_path / "run"
    with served() as url:
        assert keepwarm_(capsys, "replay", path, "--endpoint", url, "-o", str(run), "--idle-cap", "50ms")[0] == 0
    before, after = read_outcome_table(str(run / "outcomes.parquet")).sort_by("due_ns").to_pylist()
    assert after["due_ns"] == before["done_ns"] + HOUR
    assert after["due_ns"] <= after["sent_ns"] <= after["first_token_ns"] <= after["done_ns"] < 2 * HOUR
    assert 3590 < about(run)["clock"]["skipped_s"] < 3600
    assert about(run)["options"]["idle_cap_s"] == 0.05


def test_a_report_says_that_time_was_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lives for five minutes was measured over an hour that nobody waited for: that is told."""
    path, run = write(tmp_path / "t.parquet", chain("s", 2, gap_ns=HOUR)), tmp_path / "run"
    with served(ttl_s=300) as url:
        assert keepwarm_(capsys, "replay", path, "--endpoint", url, "-o", str(run), "--idle-cap", "50ms")[0] == 0
    told = orjson.loads(keepwarm_(capsys, "report", str(run), "--json")[1])
    assert told["time_compression"] == "unsound"
