"""Replay in virtual time: as a function of a plan and a worker, and as ``keepwarm simulate``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import scheduled

import keepwarm.harness
from keepwarm.harness.cli import main
from keepwarm.replayers.cache import NEVER, BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.marked import MarkedCache
from keepwarm.replayers.plain import KeepBlocks, Plain
from keepwarm.replayers.prompts import in_tree
from keepwarm.replayers.router import Router
from keepwarm.replayers.rules import RULES
from keepwarm.replayers.simulate import Simulated, simulate
from keepwarm.replayers.times import SECOND, ServiceTimes, StepTimes
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.model import After, Breakpoint, Call, Segment
from keepwarm.traces.store import TraceWriter, read_calls, read_meta, read_outcome_table, read_sessions

DEMO = Path(str(keepwarm.harness.__path__[0])) / "demo.parquet"
SLOW = ServiceTimes(base_s=1, prefill_tps=100, decode_tps=10)


def call(name: str, *after: After, **fields: Any) -> Call:
    """A call of 100 prompt tokens of its session's, answered in one token."""
    told: dict[str, Any] = {"session": "s", "agent": "a", "role": "main", "turn": 0, "start_ns": 0, "end_ns": 0}
    told |= {"usage_source": "absent", "write_source": "absent", "origin": "synthetic", "keep": 0, "output": 1}
    return Call(**{**told, "call": name, "after": after, "append": (Segment(1, 100, "user"),), **fields})


Kept = KeepBlocks | MarkedCache


def blocks(block: int = 1, **options: Any) -> Kept:
    """Engine rules."""
    return KeepBlocks(BlockCache(PromptTree(), block=block, **options))


def marked(ttl_ns: int | None = None) -> Kept:
    """What logs of a managed API show."""
    return MarkedCache(PromptTree(), RULES["managed"], ttl_ns=ttl_ns)


def alone(kept: Kept, times: ServiceTimes = SLOW, **options: Any) -> Cluster:
    """A cluster of one worker whose calls do not wait for each other."""
    tree = kept.cache.tree if isinstance(kept, KeepBlocks) else kept.tree
    return Cluster(tree, [Plain(kept, times=times)], Router("round_robin", block=16), **options)


def ran(*sessions: list[Call], kept: Kept | None = None, **options: Any) -> dict[str, Simulated]:
    """What came of each call."""
    cluster = alone(kept or blocks())
    schedule = scheduled(sessions, grow=in_tree(cluster.tree), **options)
    return {done.outcome.call.call: done for done in simulate(schedule, cluster)}


def write(path: Path, *sessions: list[Call]) -> str:
    """Write a trace; its path."""
    with TraceWriter(str(path), producer="tests", version="0", tokens="exact") as writer:
        for one in sessions:
            for row in one:
                writer.add(row)
    return str(path)


def keepwarm_(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_times_of_a_call_worked_out_by_hand() -> None:
    """100 tokens at 100 a second after 1 s: first token at 2 s; 20 more tokens at 10 a second: done at 4 s. The next
    call, 3 s later, reads 99 tokens and computes one.
    """
    found = ran([call("a", output=21), call("b", After("a", "end", 3 * SECOND, "human"))])
    first, second = found["a"].outcome, found["b"].outcome
    assert (first.due_ns, first.sent_ns, first.first_token_ns, first.done_ns) == (0, 0, 2 * SECOND, 4 * SECOND)
    assert (second.due_ns, second.sent_ns, second.first_token_ns) == (7 * SECOND, 7 * SECOND, 8_010_000_000)
    assert (first.cache_read, second.cache_read, second.uncached, second.cache_write_other) == (0, 99, 0, 1)


def test_a_call_at_the_moment_of_anothers_first_token_reads_what_it_wrote() -> None:
    """First tokens come before calls begin: b, due just then, reads; c, due 1 ns before, does not."""
    calls = [call("a"), call("b", After("a", "start", 2 * SECOND, "subagent"))]
    calls.append(call("c", After("a", "start", 2 * SECOND - 1, "subagent")))
    found = ran(calls)
    assert (found["b"].outcome.cache_read, found["c"].outcome.cache_read) == (99, 0)


def test_a_ttl_counts_recorded_gaps() -> None:
    """With a TTL of 300 s from the end of the last answer a gap of 299 s hits, the one of 300 s after it misses."""
    gaps = (299 * SECOND, 300 * SECOND)
    calls = [call("a"), call("b", After("a", "end", gaps[0], "human")), call("c", After("b", "end", gaps[1], "human"))]
    found = ran(calls, kept=blocks(ttl_ns=300 * SECOND))
    assert [found[name].outcome.cache_read for name in "abc"] == [0, 99, 0]


def test_sessions_share_a_worker_at_their_recorded_starts() -> None:
    """A second session with the same prompt starts 1 s after the first and misses; a third, at 3 s, reads."""
    at = (0, SECOND, 3 * SECOND)
    sessions = [[call(f"c{n}", session=f"s{n}", session_start_ns=start)] for n, start in enumerate(at)]
    found = ran(*sessions)
    assert [found[f"c{n}"].outcome.cache_read for n in range(3)] == [0, 0, 99]
    assert [found[f"c{n}"].outcome.sent_ns for n in range(3)] == list(at)


def test_a_session_that_comes_late_is_not_sent_before_it_comes() -> None:
    """Sessions out of order: what is due in the past is sent now, and the lag is there to be seen."""
    sessions = [[call("a", session_start_ns=5 * SECOND)], [call("b", session="t", session_start_ns=2 * SECOND)]]
    outcome = ran(*sessions)["b"].outcome
    assert (outcome.due_ns, outcome.sent_ns) == (-3 * SECOND, 0)


CALLS = sum(1 for _ in read_calls(str(DEMO)))
SERVICES = st.builds(
    ServiceTimes, st.floats(0, 5), st.floats(100, 1e5, allow_nan=False), st.floats(1, 1000, allow_nan=False)
)
CLUSTERS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["plain", "managed", "engine"]),
        "block": st.sampled_from([1, 16, 64]),
        "capacity": st.none() | st.integers(0, 6000),
        "ttl_ns": st.none() | st.just(300 * SECOND),
        "times": SERVICES,
        "workers": st.integers(1, 3),
    }
)


def made(told: dict[str, Any]) -> Cluster:
    """A cluster of drawn options, with an endless cache beside it."""
    tree, times, ttl_ns = PromptTree(), told["times"], told["ttl_ns"]
    room = {"block": told["block"], "capacity": told["capacity"], "ttl_ns": ttl_ns}
    endless: Kept = KeepBlocks(BlockCache(tree, block=told["block"]), at_once=told["kind"] == "engine")
    workers: list[Any] = []
    for _ in range(told["workers"]):
        if told["kind"] == "managed":
            workers.append(Plain(MarkedCache(tree, RULES["managed"], ttl_ns=ttl_ns), times=times))
        elif told["kind"] == "plain":
            workers.append(Plain(KeepBlocks(BlockCache(tree, **room)), times=times))
        else:
            workers.append(Engine(BlockCache(tree, **room), times=StepTimes(call_s=times.base_s), max_seqs=8))
    if told["kind"] == "managed":
        endless = MarkedCache(tree, RULES["managed"], ttl_ns=NEVER)
    return Cluster(tree, workers, Router("kv_aware", block=told["block"]), shadows={"endless": endless})


def results(cluster: Cluster, at_once: int | None) -> list[Simulated]:
    """The bundled trace through a cluster."""
    schedule = scheduled(read_sessions(str(DEMO)), at_once=at_once, grow=in_tree(cluster.tree))
    return list(simulate(schedule, cluster))


@settings(max_examples=25, deadline=None)
@given(told=CLUSTERS, at_once=st.none() | st.integers(1, 6))
def test_a_simulation_keeps_its_promises(told: dict[str, Any], at_once: int | None) -> None:
    """The bundled trace through any workers: each call comes out once, in the order of the ends, with whole gaps to
    what it waited for and an account that adds up, or with an error where no worker has room for it; none reads more
    than from the endless cache beside it; and again it is the same to the byte.
    """
    done = results(made(told), at_once)
    assert done == results(made(told), at_once)
    by_name = {one.outcome.call.call: one.outcome for one in done}
    assert len(done) == len(by_name) == CALLS
    answered = [one for one in done if one.outcome.error is None]
    assert len(answered) == CALLS or (told["kind"] == "engine" and told["capacity"] is not None)
    ends = [one.outcome.done_ns or 0 for one in answered]
    assert ends == sorted(ends)
    for one in answered:
        outcome = one.outcome
        times = (outcome.due_ns, outcome.sent_ns, outcome.first_token_ns, outcome.done_ns)
        assert list(times) == sorted(times)  # type: ignore[type-var]
        waits = []
        for edge in outcome.call.after:
            other = by_name[edge.call]
            waits.append((other.sent_ns if edge.trigger == "start" else other.done_ns) + edge.gap_ns)  # type: ignore[operator]
        assert not waits or outcome.due_ns == outcome.sent_ns == max(waits)
        writes = (outcome.cache_write_5m, outcome.cache_write_1h, outcome.cache_write_other)
        assert outcome.prompt == outcome.call.prompt_tokens
        assert sum((outcome.uncached, outcome.cache_read, *writes)) == outcome.prompt  # type: ignore[arg-type]
        assert one.bounds["endless"] >= (outcome.cache_read or 0)


@pytest.mark.parametrize("kind", ["plain", "managed", "engine"])
def test_an_endless_cache_reads_its_own_bound(kind: str) -> None:
    """Where the one worker's own cache is endless it reads what the bound says, call by call."""
    told = {"kind": kind, "block": 16, "capacity": None, "ttl_ns": NEVER, "times": ServiceTimes(), "workers": 1}
    done = results(made(told), None)
    assert all(one.bounds["endless"] == one.outcome.cache_read for one in done)
    assert sum(one.outcome.cache_read or 0 for one in done) > 1_000_000


def test_a_call_that_no_worker_can_hold_ends_its_session() -> None:
    """Ten blocks of 16 hold 160 tokens, not b's 200: b fails at once, c is not sent, another session goes on."""
    tree = PromptTree()
    worker = Engine(BlockCache(tree, block=16, capacity=10), times=StepTimes())
    big = (Segment(2, 200, "user"),)
    calls = [
        call("a"),
        call("b", After("a", "end", SECOND, "tool"), append=big),
        call("c", After("b", "end", 0, "tool")),
    ]
    other = [call("x", session="t", session_start_ns=90 * SECOND)]
    schedule = scheduled([calls, other], grow=in_tree(tree))
    done = list(simulate(schedule, Cluster(tree, [worker], Router("round_robin", block=16))))
    found = {one.outcome.call.call: one.outcome for one in done}
    assert {name: (one.error, one.status) for name, one in found.items()} == {
        "a": (None, 200),
        "b": ("overflow", 400),
        "c": ("skipped", None),
        "x": (None, 200),
    }
    assert (found["b"].prompt, found["b"].first_token_ns) == (None, None)
    assert found["x"].cache_read == 96


def rows(run: Path) -> list[dict[str, Any]]:
    """A run's outcome rows."""
    found: list[dict[str, Any]] = read_outcome_table(str(run / "outcomes.parquet")).to_pylist()
    return found


def about(run: Path) -> dict[str, Any]:
    """A run's run.json."""
    found: dict[str, Any] = orjson.loads((run / "run.json").read_bytes())
    return found


def test_the_command_writes_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row a call, a bound for each, and what was run on what; the same command gives the same rows."""
    for name in ("one", "two"):
        code, out, _ = keepwarm_(capsys, "simulate", str(DEMO), "-o", str(tmp_path / name), "--cache-ttl", "5m")
        assert (code, out) == (
            0,
            f"{tmp_path / name}: {CALLS} calls simulated; see it with: keepwarm report {tmp_path / name}\n",
        )
    found = rows(tmp_path / "one")
    assert found == rows(tmp_path / "two")
    assert Counter(row["call"] for row in found) == Counter(c.call for c in read_calls(str(DEMO)))
    assert all(row["completed"] and row["status"] == 200 and row["error"] is None for row in found)
    bounds = pl.read_parquet(tmp_path / "one" / "bounds.parquet")
    beside = pl.read_parquet(tmp_path / "one" / "outcomes.parquet").join(bounds, on="call", suffix="_most")
    assert beside.height == bounds.height == CALLS
    assert beside["cache_read_most"].ge(beside["cache_read"]).all()
    told = about(tmp_path / "one")
    assert (told["mode"], told["planned_calls"], told["interrupted"]) == ("simulate", CALLS, False)
    assert told["trace"]["digest"] == read_meta(str(DEMO)).digest
    assert told["cache"] == {
        "state_at_start": "cold",
        "ttl": 300,
        "block": 16,
        "capacity": None,
        "rules": "engine",
        "dated": None,
        "outputs_readable": True,
        "refresh": True,
    }
    assert told["clock"]["kind"] == "virtual"


def test_the_endless_bound_of_an_endless_run_is_what_it_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without TTL and capacity the run's efficiency is one."""
    assert keepwarm_(capsys, "simulate", str(DEMO), "-o", str(tmp_path / "run"))[0] == 0
    code, out, _ = keepwarm_(capsys, "report", str(tmp_path / "run"), "--json")
    told = orjson.loads(out)
    assert code == 0
    assert told["efficiency"] == {"endless": 1.0}
    assert told["hit_rate"] == told["achievable_hit_rate"]["endless"] > 0.8


def test_the_bundled_trace_as_it_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled trace's account was made up with managed rules and TTLs: simulated as recorded it comes back."""
    assert keepwarm_(capsys, "simulate", str(DEMO), "-o", str(tmp_path), "--cache-ttl", "as-recorded")[0] == 0
    found = rows(tmp_path)
    read, recorded = (sum(row[name] or 0 for row in found) for name in ("cache_read", "rec_cache_read"))
    assert read / recorded == pytest.approx(1, abs=0.005)
    assert about(tmp_path)["cache"]["rules"] == "managed"


def test_without_an_output_the_report_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report goes to standard output; no run is left."""
    code, out, err = keepwarm_(capsys, "simulate", str(DEMO))
    assert (code, err) == (0, "")
    assert f"{CALLS} calls, 6 sessions; simulate of demo.parquet on simulated" in out
    assert "warm_hit_rate" in out
    assert not Path(out.splitlines()[0].removeprefix("run ")).exists()


def test_a_simulated_run_is_replaced_and_a_replayed_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be had again is written over; measured results only with --force."""
    run = tmp_path / "run"
    command = ("simulate", str(DEMO), "-o", str(run))
    assert keepwarm_(capsys, *command)[0] == 0
    assert keepwarm_(capsys, *command, "--capacity", "0")[0] == 0
    assert {row["cache_read"] for row in rows(run)} == {0}
    (run / "run.json").write_bytes(orjson.dumps({**about(run), "mode": "replay"}))
    code, _, err = keepwarm_(capsys, *command)
    assert (code, err) == (
        2,
        f"keepwarm: {run}: already holds a run (run.json): choose another directory, or give --force\n",
    )
    assert {row["cache_read"] for row in rows(run)} == {0}
    assert keepwarm_(capsys, *command, "--force")[0] == 0
    assert about(run)["mode"] == "simulate"
    assert {row["cache_read"] for row in rows(run)} != {0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cache-ttl", "5 minutes"), "expected as-recorded, none, or a duration"),
        (("--cache-ttl", "forever"), "expected as-recorded, none, or a duration"),
        (("--base-s", "nan"), "expected a number"),
        (("--prefill-tps", "inf"), "inf is not in the range"),
        (("--gap-cap", "1e300"), "expected seconds"),
        (("--cache-ttl", "-1"), "expected as-recorded, none, or a duration"),
        (("--capacity", "-1"), "-1 is not in the range 0<=x<="),
        (("--block", "0"), "0 is not in the range 1<=x<="),
        (("--sessions", "0"), "0 is not in the range 1<=x<="),
        (("--gap-cap", "soon"), "expected seconds, or a number with ms, s, m, h or d"),
        (("--rules", "engine", "--cache-ttl", "as-recorded"), "as-recorded needs --rules managed"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_replaced(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and what was expected; the run that is there stays."""
    command = ("simulate", str(DEMO), "-o", str(tmp_path))
    assert keepwarm_(capsys, *command)[0] == 0
    before = (tmp_path / "run.json").read_bytes()
    code, out, err = keepwarm_(capsys, *command, *options)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert (tmp_path / "run.json").read_bytes() == before


def test_recorded_ttls_need_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace without cache marks has no TTLs to go by; with them it has."""
    bare = write(tmp_path / "bare.parquet", [call("a")])
    code, _, err = keepwarm_(capsys, "simulate", bare, "--cache-ttl", "as-recorded", "-o", str(tmp_path / "run"))
    assert (code, err.count("\n")) == (2, 1)
    assert f"{bare}: no call has breakpoints" in err
    assert not (tmp_path / "run").exists()
    marked = write(tmp_path / "marked.parquet", [call("a", breakpoints=(Breakpoint(100, 300),))])
    assert keepwarm_(capsys, "simulate", marked, "--cache-ttl", "as-recorded", "-o", str(tmp_path / "run"))[0] == 0
    assert rows(tmp_path / "run")[0]["cache_write_5m"] == 100


def test_a_trace_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line, no directory made."""
    code, out, err = keepwarm_(capsys, "simulate", str(tmp_path / "none"), "-o", str(tmp_path / "run"))
    assert (code, out, err) == (2, "", f"keepwarm: {tmp_path / 'none'}: no such file or directory\n")
    assert not (tmp_path / "run").exists()


def test_a_trace_that_refers_to_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the call and the field, and nothing of a run is left to be taken for one."""
    bad = write(tmp_path / "bad.parquet", [call("a"), call("b", After("x", "end", 0, "tool"), start_ns=1)])
    code, _, err = keepwarm_(capsys, "simulate", bad, "-o", str(tmp_path / "run"))
    assert code == 2
    assert err == "keepwarm: call b: field after names 'x', expected an earlier call of its session\n"
    assert list((tmp_path / "run").iterdir()) == []


def test_odd_traces_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace of no calls, an empty prompt, an answer that is repeated in parts of which one is empty, and a TTL of
    centuries are no errors.
    """
    empty = write(tmp_path / "empty.parquet")
    assert keepwarm_(capsys, "simulate", empty, "-o", str(tmp_path / "none"))[0] == 0
    assert rows(tmp_path / "none") == []
    answer = (Segment(5, 0, "answer", "b"), Segment(6, 20, "answer", "b"))
    calls = [call("a", append=()), call("b", start_ns=1, output=20)]
    edge = After("b", "end", 0, "tool")
    calls.append(call("c", edge, prompt_parent="b", keep=100, append=answer, start_ns=2))
    odd = write(tmp_path / "odd.parquet", calls)
    for ttl in ("none", "20000d", "30000d"):
        assert (
            keepwarm_(capsys, "simulate", odd, "-o", str(tmp_path / "run"), "--block", "1", "--cache-ttl", ttl)[0] == 0
        )
        assert [row["cache_read"] for row in sorted(rows(tmp_path / "run"), key=lambda row: row["call"])] == [0, 0, 119]


def test_the_directory_of_a_trace_is_simulated_in_the_order_of_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two files the second's session came first: its prompt is there when the first's comes, 5 s later."""
    folder = tmp_path / "trace"
    folder.mkdir()
    write(folder / "a.parquet", [call("late", session="s", session_start_ns=5 * SECOND)])
    write(folder / "b.parquet", [call("early", session="t", session_start_ns=0)])
    assert keepwarm_(capsys, "simulate", str(folder), "-o", str(tmp_path / "run"))[0] == 0
    found = {row["call"]: (row["sent_ns"], row["cache_read"]) for row in rows(tmp_path / "run")}
    assert found == {"early": (0, 0), "late": (5 * SECOND, 96)}


def test_an_informed_run_says_how_many_prefixes_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The heading has the trace's own number, more than the calls marked as cut."""
    notes = {"prefix_breaks": "recorded", "recorded_breaks": 27}
    path = str(tmp_path / "t.parquet")
    with TraceWriter(path, producer="tests", version="0", tokens="exact", notes=notes) as writer:
        writer.add(call("a", prefix_change="recorded_break"))
    assert keepwarm_(capsys, "simulate", path, "-o", str(tmp_path / "run"))[0] == 0
    assert about(tmp_path / "run")["trace"]["recorded_breaks"] == 27
    heading = "informed: 27 calls' prefixes cut to what was read (1 as recorded_break), not a prediction"
    assert heading in keepwarm_(capsys, "report", str(tmp_path / "run"))[1]
