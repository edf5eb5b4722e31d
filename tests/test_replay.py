"""Replay in real time: against a scripted endpoint, and as ``keepwarm replay`` against ``keepwarm serve``."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import MS, about, call, chain, keepwarm_, rows, scheduled, write
from serving import cluster, running

from keepwarm.harness.serve import create_app
from keepwarm.replayers.caps import Caps
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.endpoint import Answer, Request
from keepwarm.replayers.replay import Replay, run_replay
from keepwarm.replayers.times import ServiceTimes
from keepwarm.reports.frame import collect, load
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import JOURNAL, Journal, read_journal
from keepwarm.traces.model import After, Call, Outcome, Segment
from keepwarm.traces.store import read_meta

Script = Callable[[Request, int], Awaitable[Answer]]


class Scripted:
    """An endpoint that answers as a script says, and tells what it was asked and when."""

    def __init__(self, clock: RunClock, script: Script) -> None:
        self.clock = clock
        self.script = script
        self.asked: list[tuple[str, int]] = []
        self.closed = False

    async def send(self, request: Request) -> Answer:
        """Answer by the script."""
        sent_ns = self.clock()
        self.asked.append((request.call.call, sent_ns))
        return await self.script(request, sent_ns)

    async def aclose(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def replayed(sessions: list[list[Call]], script: Script, **options: Any) -> tuple[list[Outcome], Scripted, bool]:
    """The outcomes of a replay in their order, the endpoint, and whether it was whole."""
    clock, outcomes = RunClock(), []
    endpoint = Scripted(clock, script)
    how = {name: options.pop(name) for name in ("retries", "idle_cap_ns", "until_ns") if name in options}
    caps = Caps(**options.pop("caps", {}))
    schedule = scheduled(sessions, **{"at_once": 8, **options})

    async def run() -> bool:
        told = {"clock": clock, "name": "scripted", "caps": caps, "retries": 0, **how}
        return await run_replay(Replay(schedule, endpoint, outcomes.append, **told), endpoint)

    whole = asyncio.run(run())
    return outcomes, endpoint, whole


def answering(*, after_s: float = 0.0, failing: frozenset[str] = frozenset()) -> Script:
    """A script that answers after some time, but refuses some calls."""

    async def answer(request: Request, sent_ns: int) -> Answer:
        await asyncio.sleep(after_s)
        refused = request.call.call in failing
        done_ns = sent_ns + round(after_s * 1e9)
        return Answer(sent_ns, done_ns, status=529 if refused else 200, error="overloaded" if refused else None)

    return answer


@contextmanager
def served(base_s: float = 0.0, ttl_s: float | None = None, speed: float = 1.0) -> Iterator[str]:
    """The URL of a simulated worker that answers after a fixed time."""
    times = ServiceTimes(base_s=base_s, prefill_tps=1e9, decode_tps=1e9)
    cache = {"ttl": "none" if ttl_s is None else ttl_s, "rules": "engine"}
    app = create_app(cluster(ttl_s=ttl_s, service=times), model="sim", speed=speed, cache=cache)
    with running(app) as url:
        yield url


def test_each_call_is_sent_once_when_its_edges_let_it() -> None:
    """Nothing is sent before it is due; a gap counts from an answer's end, or a call's start, as the edge says."""
    calls = [
        call("a"),
        call("b", After("a", "start", 5 * MS, "subagent")),
        call("c", After("a", "end", 10 * MS, "tool")),
    ]
    calls.append(call("d", After("b", "end", 0, "tool"), After("c", "end", 0, "tool")))
    outcomes, endpoint, whole = replayed([calls], answering(after_s=0.02))
    found = {outcome.call.call: outcome for outcome in outcomes}
    assert whole
    assert endpoint.closed
    assert [name for name, _ in endpoint.asked] == ["a", "b", "c", "d"]
    assert Counter(outcome.call.call for outcome in outcomes) == Counter("abcd")
    assert all(o.sent_ns >= o.due_ns and o.status == 200 and o.error is None for o in outcomes)  # type: ignore[operator]
    assert found["c"].due_ns == (found["a"].done_ns or 0) + 10 * MS
    assert (found["b"].due_ns or 0) <= (found["a"].done_ns or 0)
    assert found["d"].due_ns == max(found["b"].done_ns or 0, found["c"].done_ns or 0)
    assert {outcome.endpoint for outcome in outcomes} == {"scripted"}


def test_sessions_run_so_many_at_a_time() -> None:
    """With two at a time never more than two sessions are being answered, and they begin in their order."""
    busy: set[str] = set()
    most = 0

    async def answer(request: Request, sent_ns: int) -> Answer:
        nonlocal most
        busy.add(request.call.session)
        most = max(most, len(busy))
        await asyncio.sleep(0.002)
        if request.call.call.endswith("2"):
            busy.discard(request.call.session)
        return Answer(sent_ns, sent_ns, status=200)

    sessions = [chain(name, 3) for name in "abcdef"]
    outcomes, endpoint, _ = replayed(sessions, answer, at_once=2)
    assert most == 2
    assert len(outcomes) == 18
    assert [name for name, _ in endpoint.asked if name.endswith("0")] == [f"{s}0" for s in "abcdef"]


def test_a_failure_skips_the_rest_of_its_session_only() -> None:
    """The second of four calls is refused: two rows say skipped, unsent; the other session is whole."""
    outcomes, endpoint, whole = replayed([chain("s", 4), chain("t", 4)], answering(failing=frozenset({"s1"})))
    found = {o.call.call: (o.status, o.error, o.sent_ns is not None) for o in outcomes}
    assert whole
    assert len(outcomes) == 8
    assert {name: found[name] for name in ("s0", "s1", "s2", "s3")} == {
        "s0": (200, None, True),
        "s1": (529, "overloaded", True),
        "s2": (None, "skipped", False),
        "s3": (None, "skipped", False),
    }
    assert all(found[f"t{n}"] == (200, None, True) for n in range(4))
    assert [name for name, _ in endpoint.asked if name[0] == "s"] == ["s0", "s1"]


@settings(max_examples=40, deadline=None)
@given(
    sessions=st.lists(st.integers(1, 4), max_size=5),
    failing=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3))),
    at_once=st.integers(1, 3),
)
def test_every_planned_call_has_one_outcome(sessions: list[int], failing: set[tuple[int, int]], at_once: int) -> None:
    """Whichever calls are refused: one outcome each, all before the first refusal of a session whole, all after it
    skipped.
    """
    refused = frozenset(f"{'abcde'[session]}{number}" for session, number in failing)
    trace = [chain("abcde"[number], size) for number, size in enumerate(sessions)]
    outcomes, _, _ = replayed(trace, answering(failing=refused), at_once=at_once)
    found = {outcome.call.call: outcome.error for outcome in outcomes}
    assert len(outcomes) == len(found) == sum(sessions)
    for calls in trace:
        names = [c.call for c in calls]
        first = next((n for n, name in enumerate(names) if name in refused), len(names))
        expected = [None] * first + ["overloaded"] + ["skipped"] * len(names)
        assert [found[name] for name in names] == expected[: len(names)]


def test_max_rate_caps_the_calls_of_any_second() -> None:
    """Twelve calls due at once at 5 a second: of any six the last is sent long after the first."""
    sessions = [[call(f"c{n}", session=f"s{n}")] for n in range(12)]
    _, endpoint, _ = replayed(sessions, answering(), at_once=12, caps={"rate": [(None, 5)]})
    times = [sent_ns for _, sent_ns in endpoint.asked]
    assert len(times) == 12
    assert all(later - earlier > 500 * MS for earlier, later in zip(times, times[5:], strict=False))


def test_a_call_that_waits_for_its_turn_is_skipped_when_its_session_fails() -> None:
    """Three calls due at once at one a second: the first is refused meanwhile, so the others are never sent."""
    calls = [call("a"), call("b"), call("c")]
    outcomes, endpoint, _ = replayed([calls], answering(failing=frozenset("a")), caps={"rate": [(None, 1)]})
    assert [name for name, _ in endpoint.asked] == ["a"]
    assert sorted((o.call.call, o.error) for o in outcomes) == [("a", "overloaded"), ("b", "skipped"), ("c", "skipped")]


def test_a_cancelled_replay_tells_every_call() -> None:
    """Cut off while one call is answered and one runs: they, the waiting and the never begun each have their row."""
    clock, outcomes = RunClock(), []

    async def answer(request: Request, sent_ns: int) -> Answer:
        if request.call.call == "s1":
            asyncio.get_running_loop().call_soon(task.cancel)
            await asyncio.sleep(60)
        return Answer(sent_ns, clock(), status=200)

    async def run() -> bool:
        nonlocal task
        task = asyncio.current_task()  # type: ignore[assignment]
        return await run_replay(replay, endpoint)

    task: asyncio.Task[Any]
    endpoint = Scripted(clock, answer)
    schedule = scheduled([chain("s", 3), chain("t", 2), chain("u", 1)], at_once=1)
    replay = Replay(schedule, endpoint, outcomes.append, clock=clock, name="scripted")
    assert asyncio.run(run()) is False
    assert endpoint.closed
    assert [(o.call.call, o.error, o.sent_ns is not None) for o in outcomes] == [
        ("s0", None, True),
        ("s1", "interrupted", True),
        ("s2", "skipped", False),
        ("t0", "skipped", False),
        ("t1", "skipped", False),
        ("u0", "skipped", False),
    ]


def test_a_bad_trace_ends_a_replay_with_its_own_error() -> None:
    """What is wrong with a later session comes out as it is, after the rows of what had run."""
    clock, outcomes = RunClock(), []
    endpoint = Scripted(clock, answering())
    schedule = scheduled([chain("s", 2), [call("b", After("x", "end", 0, "tool"), session="t")]], at_once=1)
    replay = Replay(schedule, endpoint, outcomes.append, clock=clock, name="scripted")
    with pytest.raises(InputError, match="call b: field after names 'x'"):
        asyncio.run(run_replay(replay, endpoint))
    assert endpoint.closed
    assert [(o.call.call, o.error) for o in outcomes] == [("s0", None), ("s1", None)]


def test_a_replay_against_the_simulated_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sessions of three calls that grow by 20 tokens over 40 shared ones; run.json says what was run on what."""
    grown = []
    for n, session in enumerate("st"):
        calls = chain(session, 3, gap_ns=MS, session_start_ns=n)
        grown.append([calls[0]])
        for turn, c in enumerate(calls[1:]):
            more = (Segment(100 + n * 10 + turn, 20, "user"),)
            grown[-1].append(c._replace(prompt_parent=calls[turn].call, keep=40 + 20 * turn, append=more))
    trace, run = write(tmp_path / "t.parquet", *grown, prefix_breaks="recorded", recorded_breaks=4), tmp_path / "run"
    with served(ttl_s=300) as url:
        command = ("replay", trace, "--endpoint", url + "/v1#secret", "-o", str(run), "--sessions", "1")
        code, out, err = keepwarm_(capsys, *command)
    assert (code, err) == (0, "")
    assert out == f"{run}: 6 calls answered; see it with: keepwarm report {run}\n"
    found = rows(run)
    assert {name: (row["prompt"], row["cache_read"], row["completed"]) for name, row in found.items()} == {
        "s0": (40, 0, True),
        "s1": (60, 32, True),
        "s2": (80, 48, True),
        "t0": (40, 32, True),
        "t1": (60, 32, True),
        "t2": (80, 48, True),
    }
    assert all(row["due_ns"] <= row["sent_ns"] <= row["first_token_ns"] <= row["done_ns"] for row in found.values())
    assert found["s1"]["due_ns"] == found["s0"]["done_ns"] + MS
    told = about(run)
    assert told["trace"] == {
        "name": "t.parquet",
        "digest": read_meta(trace).digest,
        "producer": "tests",
        "tokens": "exact",
        "prefix_breaks": "recorded",
        "recorded_breaks": 4,
        "calls": 6,
        "sessions": 2,
    }
    assert (told["mode"], told["interrupted"], told["planned_calls"], told["planned_sessions"]) == (
        "replay",
        False,
        6,
        2,
    )
    assert told["options"].items() >= {"speed": 1.0, "gap_cap_s": None, "sessions": 1, "max_rate": None}.items()
    endpoint = told["endpoint"]
    assert (endpoint["url"], endpoint["dialect"], endpoint["clock_driven"]) == (url + "/v1", "messages", True)
    assert (endpoint["has_ttl"], endpoint["server"]["server"], endpoint["server"]["model"]) == (
        True,
        "keepwarm serve",
        "sim",
    )
    assert told["cache"]["state_at_start"] == "cold"
    assert told["started"] <= told["ended"]
    assert b"secret" not in (run / "run.json").read_bytes()
    report = orjson.loads(keepwarm_(capsys, "report", str(run), "--json")[1])
    assert (report["calls"], report["achievable_hit_rate"]["endless"] >= report["hit_rate"]) == (6, True)


@pytest.mark.parametrize(("served_at", "options", "driven"), [(5.0, ("--speed", "5"), True), (5.0, (), False)])
def test_a_clock_is_driven_only_at_the_same_speed(
    served_at: float, options: tuple[str, ...], driven: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """keepwarm serve at the replay's own speed has its clock driven; at any other it has not."""
    trace = write(tmp_path / "t.parquet", chain("s", 1))
    with served(speed=served_at) as url:
        run = str(tmp_path / "run")
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", run, *options)[0] == 0
    endpoint = about(tmp_path / "run")["endpoint"]
    assert (endpoint["clock_driven"], endpoint["has_ttl"]) == (driven, False)


def test_a_run_is_replaced_only_with_force_and_only_when_something_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured results stay: without --force, and with it while nothing listens at the URL, in one line and exit 2."""
    trace, run = write(tmp_path / "t.parquet", chain("s", 1)), tmp_path / "run"
    with served() as url:
        command = ("replay", trace, "--endpoint", url, "-o", str(run))
        assert keepwarm_(capsys, *command)[0] == 0
        before = about(run)
        code, _, err = keepwarm_(capsys, *command)
        assert (code, err.count("\n")) == (2, 1)
        assert "already holds a run (run.json): choose another directory, or give --force" in err
    code, out, err = keepwarm_(capsys, *command, "--force")
    assert (code, out, err) == (2, "", f"keepwarm: endpoint {url}: nothing answers there\n")
    assert about(run) == before
    with served() as url:
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), "--force")[0] == 0
    assert about(run)["endpoint"]["url"] == url != before["endpoint"]["url"]
    assert len(rows(run)) == 1


def test_nothing_is_sent_of_a_trace_that_refers_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad reference in the last session is told before the first call is asked."""
    last = [call("b", After("x", "end", 0, "tool"), session="t", session_start_ns=1)]
    trace, run = write(tmp_path / "t.parquet", chain("s", 2), last), tmp_path / "run"
    with served() as url:
        code, out, err = keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run))
    assert (code, out) == (2, "")
    assert err == "keepwarm: call b: field after names 'x', expected an earlier call of its session\n"
    assert list(run.iterdir()) == []


def test_without_an_output_the_report_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run is reported and forgotten."""
    trace = write(tmp_path / "t.parquet", chain("s", 2))
    with served() as url:
        code, out, _ = keepwarm_(capsys, "replay", trace, "--endpoint", url, "--no-stream", "--dialect", "chat")
    assert code == 0
    assert f"2 calls, 1 sessions; replay of t.parquet on {url}" in out
    assert not Path(out.splitlines()[0].removeprefix("run ")).exists()


def test_a_server_that_dies_fails_what_comes_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every call has its row: answered while it lived, reset afterwards, skipped where its session had failed."""
    trace, run = write(tmp_path / "t.parquet", chain("s", 400), chain("t", 2, session_start_ns=1)), tmp_path / "run"
    command = [sys.executable, "-m", "keepwarm.harness.cli", "serve", "--port", "0", "--base-s", "0.02"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = server.stderr.readline().rsplit(" ", 1)[-1].strip()
        with replaying(trace, url, run, "--sessions", "1") as process:
            wait_for_rows(run)
            server.kill()
            assert process.wait(30) == 0
    found = rows(run)
    errors = [found[f"s{n}"]["error"] for n in range(400)]
    whole = errors.count(None)
    assert 0 < whole < 400
    assert errors == [None] * whole + ["reset"] + ["skipped"] * (399 - whole)
    assert [(found[f"t{n}"]["error"], found[f"t{n}"]["completed"]) for n in range(2)] == [
        ("reset", False),
        ("skipped", False),
    ]
    code, out, _ = keepwarm_(capsys, "report", str(run))
    assert code == 0
    assert "not valid, because coverage is" in out
    assert about(run)["interrupted"] is False


@contextmanager
def replaying(trace: str, url: str, run: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``keepwarm replay`` as a process of its own."""
    command = [sys.executable, "-m", "keepwarm.harness.cli", "replay", trace, "--endpoint", url, "-o", str(run)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_rows(run: Path, count: int = 1) -> None:
    """Wait until a run's journal holds so many outcomes."""
    for _ in range(3000):
        with suppress(InputError):
            if read_journal(run).num_rows >= count:
                return
        time.sleep(0.01)
    raise AssertionError("the outcomes did not come")


def held_up(tmp_path: Path) -> str:
    """A trace that is soon held up: a session of one call and of two with an hour between, and two more such."""
    hour = 3_600_000 * MS
    sessions = [chain("s", 1), *(chain(name, 2, gap_ns=hour) for name in "tuv")]
    return write(
        tmp_path / "t.parquet", *([c._replace(session_start_ns=n) for c in one] for n, one in enumerate(sessions))
    )


def test_an_interrupted_replay_keeps_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C: exit code 130, one row a planned call, the report says that it is not valid because interrupted."""
    run = tmp_path / "run"
    with served() as url, replaying(held_up(tmp_path), url, run, "--sessions", "3") as process:
        wait_for_rows(run, 4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    kept = "interrupted, its results so far are kept"
    assert out == f"{run}: 4 calls answered, 3 skipped; {kept}; see it with: keepwarm report {run}\n"
    found = {name: (row["error"], row["completed"]) for name, row in rows(run).items()}
    assert found == {
        "s0": (None, True),
        **dict.fromkeys(("t0", "u0", "v0"), (None, False)),
        **dict.fromkeys(("t1", "u1", "v1"), ("skipped", False)),
    }
    assert not (run / JOURNAL).exists()
    assert about(run)["interrupted"] is True
    code, out, _ = keepwarm_(capsys, "report", str(run))
    assert code == 0
    assert "not valid, because coverage is 57.14 %" in out
    assert "it was interrupted" in " ".join(out.split())


def test_an_interrupt_cuts_off_the_calls_that_run(tmp_path: Path) -> None:
    """A call that is being answered when Ctrl-C comes is a row with the time it was sent and no account."""
    slow = write(tmp_path / "t.parquet", chain("s", 1), chain("t", 2, session_start_ns=1, output=30_000))
    run = tmp_path / "run"
    times = ServiceTimes(base_s=0, prefill_tps=1e9, decode_tps=100)
    app = create_app(cluster(service=times), model="sim", cache={"ttl": "none"})
    with running(app) as url, replaying(slow, url, run) as process:
        wait_for_rows(run)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    found = rows(run)
    assert (found["s0"]["error"], found["t1"]["error"], found["t1"]["sent_ns"]) == (None, "skipped", None)
    cut = found["t0"]
    assert (cut["error"], cut["status"], cut["done_ns"], cut["prompt"]) == ("interrupted", None, None, None)
    assert cut["sent_ns"] >= cut["due_ns"] >= 0


def test_a_killed_replay_is_reported_from_its_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9: what was answered is there to be reported, as an interrupted run."""
    run = tmp_path / "run"
    with served() as url, replaying(held_up(tmp_path), url, run, "--sessions", "3") as process:
        wait_for_rows(run, 4)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    assert not (run / "outcomes.parquet").exists()
    held = read_journal(run).column("call").to_pylist()
    assert sorted(held) == ["s0", "t0", "u0", "v0"]
    code, out, _ = keepwarm_(capsys, "report", str(run), "--json")
    told = orjson.loads(out)
    assert (code, told["valid"], told["calls"], told["about"]["ended"]) == (0, False, 4, None)
    assert "it was interrupted" in told["because"]
    assert "coverage is 57.14 %, expected at least 99.00 %" in told["because"]
    code, out, _ = keepwarm_(capsys, "report", str(run))
    assert code == 0
    assert "4 calls, 4 sessions; replay of t.parquet" in out
    code, _, err = keepwarm_(capsys, "simulate", str(tmp_path / "t.parquet"), "-o", str(run))
    assert (code, "already holds a run" in err) == (2, True)


def outcome(name: str, **fields: Any) -> Outcome:
    """An answered call."""
    return Outcome(call(name, session=name[0]), **{"due_ns": 0, "sent_ns": 0, "done_ns": 1, "status": 200, **fields})


def test_a_journal_becomes_the_outcomes_with_each_sessions_completion(tmp_path: Path) -> None:
    """s is whole; t has a skipped call, u one without status, v an answer of status 500: they are not completed."""
    journal = Journal(tmp_path)
    told: dict[str, dict[str, Any]] = {"s0": {}, "s1": {}, "t0": {}, "t1": {"error": "skipped", "status": None}}
    told |= {"u0": {"status": None}, "v0": {"status": 500}, "v1": {}}
    for name, fields in told.items():
        journal.add(outcome(name, **fields))
    assert journal.rows == 7
    journal.close()
    assert not (tmp_path / JOURNAL).exists()
    completed = {name: row["completed"] for name, row in rows(tmp_path).items()}
    assert completed == {name: name[0] == "s" for name in told}


def test_what_a_journal_got_is_on_disk_soon_though_nothing_follows(tmp_path: Path) -> None:
    """The last outcomes before a long wait are written without another one to push them."""
    journal = Journal(tmp_path)
    for name in ("s0", "s1"):
        journal.add(outcome(name))
    wait_for_rows(tmp_path, 2)
    journal.add(outcome("s2"))
    journal.close()
    assert sorted(rows(tmp_path)) == ["s0", "s1", "s2"]


def test_a_torn_journal_gives_what_is_whole(tmp_path: Path) -> None:
    """Cut anywhere behind its first outcome, a journal gives every outcome that is whole in it, never an error."""
    journal = Journal(tmp_path)
    ends = []
    for name in ("s0", "s1", "s2"):
        journal.add(outcome(name))
        ends.append((tmp_path / JOURNAL).stat().st_size)
    whole = (tmp_path / JOURNAL).read_bytes()
    for length in (*range(ends[0], len(whole), 61), len(whole) - 1, len(whole)):
        (tmp_path / JOURNAL).write_bytes(whole[:length])
        names = read_journal(tmp_path).column("call").to_pylist()
        assert names == [f"s{number}" for number, end in enumerate(ends) if end <= length]
    for damage in (b"", whole[:100], b"no journal at all" * 20, whole[: ends[0] - 1]):
        (tmp_path / JOURNAL).write_bytes(damage)
        with pytest.raises(InputError, match=r"outcomes\.jsonl: holds no outcome"):
            read_journal(tmp_path)
    (tmp_path / JOURNAL).write_bytes(whole)
    journal.close()


def test_a_run_without_any_outcome_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed before its first answer: there is a run.json, and nothing to report."""
    (tmp_path / "run.json").write_bytes(b"{}")
    (tmp_path / JOURNAL).write_bytes(b"")
    code, out, err = keepwarm_(capsys, "report", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the run wrote no outcomes" in err


def test_a_journal_reads_like_the_outcomes_it_becomes(tmp_path: Path) -> None:
    """The same rows from the journal and from the file, but for completion, which only the end tells."""
    (tmp_path / "run.json").write_bytes(orjson.dumps({"planned_calls": 2}))
    journal = Journal(tmp_path)
    for name in ("s0", "s1"):
        journal.add(outcome(name))
    wait_for_rows(tmp_path)
    under_way = collect(load(str(tmp_path)).scan)
    journal.close()
    ended = collect(load(str(tmp_path)).scan)
    assert under_way.drop("completed").equals(ended.drop("completed"))
    assert under_way["completed"].to_list() == [None, None]
    assert ended["completed"].to_list() == [True, True]
