"""A replay that was cut off goes on: whole sessions stay as they are, the others run again."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from replays import MS, about, chain, keepwarm_, write
from serving import running
from templated import Templated, turns
from test_replay import replaying, served, wait_for_rows

from keepwarm.traces.journal import written
from keepwarm.traces.model import Call, Segment
from keepwarm.traces.store import read_outcome_table, write_batches

SESSIONS, CALLS = 6, 5
KEY = ["session", "copy", "call"]


def long_trace(path: Path, gap_ns: int = 60 * MS) -> str:
    """Six sessions of five calls, each grown from the one before, that share tools and a lead; two are short."""
    trace: list[list[Call]] = []
    for number in range(SESSIONS):
        lead = (Segment(1, 30, "tools"), Segment(2, 50, "lead"))
        calls = chain(f"s{number}-", CALLS if number > 1 else 2, gap_ns=gap_ns, session_start_ns=number)
        for turn, one in enumerate(calls):
            own = Segment(100 + 10 * number + turn, 40, "user")
            told: dict[str, Any] = {
                "append": (*lead, own) if not turn else (own,),
                "keep": 80 + 40 * turn if turn else 0,
            }
            calls[turn] = one._replace(prompt_parent=calls[turn - 1].call if turn else None, **told)
        trace.append(calls)
    return write(path, *trace)


def outcomes(run: Path) -> pa.Table:
    """A run's rows in the order of their calls."""
    return read_outcome_table(str(run / "outcomes.parquet")).sort_by([(name, "ascending") for name in KEY])


def whole(run: Path, copies: int = 1) -> None:
    """Every planned call has exactly one row, a whole answer of a session that was completed."""
    found = outcomes(run).to_pylist()
    names = [f"s{number}-{turn}" for number in range(SESSIONS) for turn in range(CALLS if number > 1 else 2)]
    assert Counter((row["call"], row["copy"]) for row in found) == Counter((n, c) for n in names for c in range(copies))
    assert {(row["status"], row["error"], row["completed"]) for row in found} == {(200, None, True)}
    assert not [
        path.name for path in run.iterdir() if path.name not in ("run.json", "outcomes.parquet", "bounds.parquet")
    ]


def _sessions(table: pa.Table) -> list[tuple[str, int]]:
    """Which copy of which session each row is of."""
    return list(zip(table.column("session").to_pylist(), table.column("copy").to_pylist(), strict=True))


def cut(trace: str, url: str, run: Path, *options: str, how: int = signal.SIGKILL, rows: int = 8) -> int:
    """Its exit code when a replay, two sessions at a time unless told otherwise, is killed with so many rows."""
    usual = () if "--sessions" in options else ("--sessions", "2")
    with replaying(trace, url, run, *usual, *options) as process:
        wait_for_rows(run, rows)
        process.send_signal(how)
        return process.wait(30)


def resume(capsys: pytest.CaptureFixture[str], trace: str, url: str, run: Path, *options: str) -> tuple[int, str, str]:
    """What the run says when it is taken up again."""
    usual = () if "--sessions" in options else ("--sessions", "2")
    return keepwarm_(capsys, "replay", trace, "--endpoint", url, "--resume", str(run), *usual, *options)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("options", [(), ("--repeat", "2", "--arrivals", "poisson:20/s", "--max-concurrency", "4")])
def test_a_run_that_was_cut_off_goes_on(
    how: int, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By kill -9 or Ctrl-C, once more in the resumed one: in the end each call has one whole row, those of the sessions
    that were whole are the same byte for byte, and all that is sent later is later.
    """
    trace, run = long_trace(tmp_path / "t.parquet"), tmp_path / "run"
    with served(0.02) as url:
        assert cut(trace, url, run, *options, how=how) == (130 if how == signal.SIGINT else -9)
        begun, before = (
            about(run),
            written(run).drop_columns("completed").sort_by([(name, "ascending") for name in KEY]),
        )
        code, out, err = resume(capsys, trace, url, run, *options)
    assert (code, err) == (0, "")
    assert f"{run}: " in out
    whole(run, 2 if options else 1)
    after, over = outcomes(run).drop_columns("completed"), before.filter(pc.is_valid(before.column("status")))
    answered = Counter(_sessions(over))
    calls = Counter(_sessions(after))
    kept = {session for session, count in answered.items() if count == calls[session]}
    assert kept
    stays, was = (pa.array([one in kept for one in _sessions(table)]) for table in (after, before))
    assert after.filter(stays).equals(before.filter(was))
    told = about(run)
    assert (told["interrupted"], len(told["resumed"]), told["started"]) == (False, 1, begun["started"])
    assert told["cache"] == begun["cache"]
    assert told["options"] == begun["options"]
    code, out, _ = keepwarm_(capsys, "report", str(run), "--json")
    assert (code, orjson.loads(out)["calls"]) == (0, outcomes(run).num_rows)


def test_rows_of_whole_sessions_stay_and_the_others_are_all_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with one row taken away: the rows of that session are asked again, later than all that stayed; every other
    row is the same in every column. Twice over.
    """
    trace, run = long_trace(tmp_path / "t.parquet", 0), tmp_path / "run"
    with served() as url:
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), "--sessions", "2")[0] == 0
        for again in (1, 2):
            before = outcomes(run)
            _write(
                run, before.filter(pa.array([name != f"s{again + 1}-3" for name in before.column("call").to_pylist()]))
            )
            code, out, _ = resume(capsys, trace, url, run)
            assert (code, f"{run}: {CALLS} calls answered" in out) == (0, True)
            whole(run)
            kept = [name != f"s{again + 1}-" for name in before.column("session").to_pylist()]
            mask, new = pa.array(kept), pa.array([not keep for keep in kept])
            assert outcomes(run).filter(mask).equals(before.filter(mask))
            last = max(before.filter(mask).column("done_ns").to_pylist())
            assert min(outcomes(run).filter(new).column("sent_ns").to_pylist()) >= last
            assert len(about(run)["resumed"]) == again


def _write(run: Path, table: pa.Table) -> None:
    """Give a run other rows."""
    write_batches(str(run / "outcomes.parquet"), table.to_batches())


def test_a_run_that_was_whole_has_the_same_rows_when_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is asked of the trace; rows, bounds and what was counted before stay."""
    trace, run = long_trace(tmp_path / "t.parquet", 0), tmp_path / "run"
    with served() as url:
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), "--sessions", "2")[0] == 0
        rows, bounds = outcomes(run), (run / "bounds.parquet").read_bytes()
        code, out, _ = resume(capsys, trace, url, run)
    assert (code, f"{run}: 0 calls answered" in out) == (0, True)
    assert outcomes(run).equals(rows)
    assert (run / "bounds.parquet").read_bytes() == bounds
    whole(run)


def test_a_run_killed_before_its_first_answer_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is a run.json and nothing else."""
    trace, run = long_trace(tmp_path / "t.parquet", 0), tmp_path / "run"
    with served() as url:
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), "--sessions", "2")[0] == 0
        (run / "outcomes.parquet").unlink()
        (run / "outcomes.jsonl").write_bytes(b"")
        assert resume(capsys, trace, url, run)[0] == 0
    whole(run)


def test_sessions_that_run_again_have_other_texts_but_for_what_is_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was cut off has been asked, and is in the cache: asked again it is not. Tools and the shared lead are the
    same bytes; so they are under the same salt.
    """
    trace, run, server = long_trace(tmp_path / "t.parquet", 0), tmp_path / "run", Templated()

    def longest(asked: int) -> list[tuple[str, list[str]]]:
        """Tools and words of the longest prompts of the trace since so many bodies."""
        found = []
        for data, headers in zip(server.asked[asked:], server.headers[asked:], strict=True):
            if "x-dynamo-session-id" in headers:  # preflight is of no session
                body = orjson.loads(data)
                texts = [part.text for _, parts in turns("chat", body) for part in parts]
                found.append((orjson.dumps(body["tools"]).decode(), " ".join(texts).split()))
        most = max(len(words) for _, words in found)
        return [one for one in found if len(one[1]) == most]

    def alike(one: list[str], other: list[str]) -> int:
        """How many words two prompts begin with together."""
        assert len(one) == len(other)
        return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))

    with running(server) as url:
        command = ("--dialect", "chat", "--start", "salt")
        first = ("replay", trace, "--endpoint", url, "-o", str(run), "--sessions", "2", *command)
        assert keepwarm_(capsys, *first)[0] == 0
        prompts = [longest(0)]
        keep = pa.array([name != "s5-" for name in outcomes(run).column("session").to_pylist()])
        for _ in range(2):
            asked = len(server.asked)
            _write(run, outcomes(run).filter(keep))
            assert resume(capsys, trace, url, run, *command)[0] == 0
            prompts.append(longest(asked))
    assert len({tools for each in prompts for tools, _ in each}) == 1
    (_, once), (_, twice) = prompts[1][0], prompts[2][0]
    common = [alike(once, twice), *(alike(words, again) for _, words in prompts[0] for again in (once, twice))]
    assert all(20 < words < 60 for words in common), common


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--speed", "2"), "--resume: the run has speed 1.0, not 2.0"),
        (("--sessions", "3"), "--resume: the run has sessions 2, not 3"),
        (("--seed", "1"), "--resume: the run has seed 0, not 1"),
        (("--repeat", "2"), "--resume: the run has repeat None, not 2"),
        (("--gap-cap", "1s"), "the run has gap_cap_s None, not 1.0"),
        (("--max-rate", "7"), "the run has max_rate None, not "),
        (("--max-retries", "0"), "the run has max_retries 2, not 0"),
        (("--assistant", "live"), "the run has assistant 'recorded', not 'live'"),
        (("--dialect", "chat"), "the run has dialect 'messages', not 'chat'"),
        (("--no-stream",), "the run has stream True, not False"),
        (("-o", "elsewhere"), "--resume goes on in its own RUN: without -o and --force"),
        (("--force",), "--resume goes on in its own RUN: without -o and --force"),
        (("--duration", "5s"), "--resume and --duration cannot both be given"),
    ],
)
def test_a_run_does_not_go_on_otherwise(
    options: tuple[str, ...], said: str, whole_run: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what differs, exit code 2, and the run is as it was."""
    _refused(capsys, whole_run, options, said)


@pytest.mark.parametrize(
    "options",
    [("--start", "warm"), ("--start", "cache-salt"), ("--model", "other"), ("--match", "bytes"), ("--no-preflight",)],
)
def test_a_run_does_not_go_on_with_other_texts_or_another_model(
    options: tuple[str, ...], whole_run: tuple[str, str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another salt, model or way to write prompts would make two halves that nobody can compare."""
    _refused(capsys, whole_run, options, "--resume: the run has ")


@pytest.fixture
def whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str, Path]]:
    """A trace, an endpoint and a run of it that is whole."""
    trace, run = long_trace(tmp_path / "t.parquet", 0), tmp_path / "run"
    with served() as url:
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), "--sessions", "2")[0] == 0
        yield trace, url, run


def _refused(
    capsys: pytest.CaptureFixture[str], whole_run: tuple[str, str, Path], options: tuple[str, ...], said: str
) -> None:
    trace, url, run = whole_run
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    code, out, err = resume(capsys, trace, url, run, *options)
    assert (code, out, said in err) == (2, "", True), err
    assert err.strip().count("\n") <= ("Usage" in err) * 3
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_only_a_replay_of_the_same_trace_goes_on(
    whole_run: tuple[str, str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another trace, no run at all, a damaged run.json, a simulated run: one line each, exit code 2."""
    trace, url, run = whole_run
    other = write(tmp_path / "o.parquet", chain("s", 2))
    assert keepwarm_(capsys, "simulate", trace, "-o", str(tmp_path / "simulated"))[0] == 0
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_bytes((run / "run.json").read_bytes()[:100])
    wrong = {"none": "expected the run.json of a replay", "damaged": "expected the run.json of a replay"}
    wrong |= {"simulated": "expected the run.json of a replay"}
    for name, said in wrong.items():
        code, out, err = resume(capsys, trace, url, tmp_path / name)
        assert (code, out, err.count("\n"), said in err) == (2, "", 1, True), err
    assert not (tmp_path / "none").exists()
    code, out, err = resume(capsys, other, url, run)
    assert (code, out, err.count("\n"), "is a replay of another trace: t.parquet" in err) == (2, "", 1, True), err


def test_a_run_that_is_under_way_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To go on with it is refused; it ends as if nobody had tried."""
    trace, run = long_trace(tmp_path / "t.parquet", 200 * MS), tmp_path / "run"
    with served(0.02) as url, replaying(trace, url, run, "--sessions", "2") as process:
        wait_for_rows(run, 8)
        code, _, err = resume(capsys, trace, url, run)
        assert process.wait(30) == 0
    assert (code, err.count("\n")) == (2, 1)
    whole(run)


def test_what_the_first_part_skipped_and_counted_is_told_in_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour that the first part did not wait for was not waited for."""
    trace, run = write(tmp_path / "t.parquet", chain("s", 2, gap_ns=3_600_000 * MS)), tmp_path / "run"
    with served() as url:
        command = ("--idle-cap", "10ms", "--sessions", "1")
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), *command)[0] == 0
        before = about(run)
        assert resume(capsys, trace, url, run, *command)[0] == 0
    assert about(run)["clock"]["skipped_s"] == before["clock"]["skipped_s"] > 3500
    assert about(run)["counters"]["before"] == before["counters"]["before"]
