"""A run in shards: processes here, or Ray's actors. Together they are one run, and what is lost is told."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from replays import MS, about, keepwarm_, write
from test_replay import served
from test_resume import long_trace, outcomes, resume, whole

from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import written
from keepwarm.traces.store import read_sessions

CLUSTER = """
import sys, ray
told = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
print(told.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
Shards = tuple[tuple[str, ...], int | None]
"""Options, and the process whose descendants they are, where that is not the command itself."""


@pytest.fixture(scope="module")
def ray() -> Iterator[tuple[str, int]]:
    """A Ray cluster of this machine, its address and the process that it comes from."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        command = [sys.executable, "-c", CLUSTER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield process.stdout.readline().decode().strip(), process.pid
            process.communicate(timeout=60)


@pytest.fixture(params=["processes", "ray"])
def shards(request: pytest.FixtureRequest) -> Shards:
    """Two of them, either way."""
    if request.param == "processes":
        return ("--processes", "2"), None
    address, pid = request.getfixturevalue("ray")
    return ("--processes", "2", "--ray", address), pid


@contextmanager
def sharded(trace: str, url: str, run: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``keepwarm replay`` as a group of processes of its own, as a terminal has it; nothing of it is left behind."""
    command = [
        sys.executable,
        "-m",
        "keepwarm.harness.cli",
        "replay",
        trace,
        "--endpoint",
        url,
        "-o",
        str(run),
        *options,
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def descendants(pid: int) -> dict[int, str]:
    """The processes that come from one, and their command lines."""
    parents, lines = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            lines[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    found, more = {}, {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= {child: lines[child] for child in more if child in lines}
    return found


def workers(pid: int) -> list[int]:
    """Those of them that send calls."""
    return [child for child, line in descendants(pid).items() if "spawn_main" in line or line.startswith("ray::Shard")]


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for it."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError(what)


def some_rows(run: Path, count: int) -> Callable[[], bool]:
    """Whether a run's processes have written so many outcomes by now."""

    def holds() -> bool:
        with suppress(InputError, OSError):
            return written(run).num_rows >= count
        return False

    return holds


@contextmanager
def under_way(trace: str, url: str, run: Path, shards: Shards, *more: str) -> Iterator[tuple[Any, list[int]]]:
    """A run of two shards in its midst, and its workers. Ray's write elsewhere: they have begun some time ago."""
    options, pid = shards
    with sharded(trace, url, run, *options, "--sessions", "4", *more) as process:
        if pid is None:
            until(some_rows(run, 8), "no outcomes came")
        else:
            until(lambda: len(workers(pid)) == 2, "no actors came")
            until(lambda: all("run_away" in descendants(pid).get(one, "") for one in workers(pid)), "none runs")
            time.sleep(0.7)
        yield process, workers(pid or process.pid)


def planned(trace: str) -> Counter[tuple[str, int]]:
    """A trace's calls, once each."""
    return Counter((call.call, 0) for calls in read_sessions(trace) for call in calls)


def keys(run: Path) -> Counter[tuple[str, int]]:
    """The calls of a run's rows."""
    return Counter((row["call"], row["copy"]) for row in outcomes(run).to_pylist())


@pytest.mark.parametrize("load", [("--repeat", "2"), ("--arrivals", "gamma:30/s:2", "--repeat", "2", "--seed", "5")])
def test_shards_are_one_run(
    load: tuple[str, ...], shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same calls with the same prompts, answers and ends as from one process; one zero of time, one report that
    knows both clients; nothing is left beside it.
    """
    trace, run, one = long_trace(tmp_path / "t.parquet", 5 * MS), tmp_path / "run", tmp_path / "one"
    with served() as url:
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(one), *load)[0] == 0
        with sharded(trace, url, run, *shards[0], *load) as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert f"{run}: 48 calls answered" in out
    whole(run, 2)
    names = ["call", "copy", "prompt", "output", "error", "planned_prompt", "planned_output", "completed"]
    assert outcomes(run).select(names).equals(outcomes(one).select(names))
    times = [outcomes(found).column("due_ns").to_pylist() for found in (one, run)]
    assert min(times[1]) >= 0
    if "--arrivals" in load:
        firsts = [name.endswith("-0") for name in outcomes(run).column("call").to_pylist()]
        apart = [at - other for at, other, first in zip(*times, firsts, strict=True) if first]
        assert set(apart) == {0}
    told = about(run)
    assert (told["interrupted"], len(told["client"]), told["planned_calls"]) == (False, 2, 48)
    report = orjson.loads(keepwarm_(capsys, "report", str(run), "--json")[1])
    assert report["calls"] == 48
    assert not [reason for reason in report["because"] if "coverage" in reason or "interrupted" in reason]


def test_a_lost_shard_is_told_and_made_good(shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 of one of two: each planned call has its row, what the other one did is there, the run is not valid, exit
    code 3. Taken up again it is whole.
    """
    trace, run = long_trace(tmp_path / "t.parquet", 400 * MS), tmp_path / "run"
    with served(0.02) as url:
        with under_way(trace, url, run, shards) as (process, found):
            assert len(found) == 2
            os.kill(found[0], signal.SIGKILL)
            out, _ = process.communicate(timeout=60)
        assert process.returncode == 3
        assert "lost 1 of 2 processes" in out
        assert keys(run) == planned(trace)
        errors = Counter(outcomes(run).column("error").to_pylist())
        assert set(errors) == {None, "interrupted"}
        assert errors[None] >= 12
        out = keepwarm_(capsys, "report", str(run))[1]
        assert "not valid" in out
        assert "it was interrupted" in " ".join(out.split())
        assert resume(capsys, trace, url, run, "--sessions", "4")[0] == 0
    whole(run)


def test_an_interrupt_reaches_all_shards(shards: Shards, tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, each planned call has its row, among them those that had been answered."""
    trace, run = long_trace(tmp_path / "t.parquet", 600 * MS), tmp_path / "run"
    with served(0.02) as url, under_way(trace, url, run, shards) as (process, _):
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "interrupted, its results so far are kept" in out
    assert keys(run) == planned(trace)
    errors = Counter(outcomes(run).column("error").to_pylist())
    assert errors[None] >= 4
    assert set(errors) == {None, "skipped"} | (errors.keys() & {"interrupted"})
    assert about(run)["interrupted"] is True
    assert not list(run.glob("shard-*"))


def test_a_lost_shards_whole_sessions_were_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every session one can say whether it was: each planned call of it has a whole answer, or not."""
    trace, run = long_trace(tmp_path / "t.parquet", 400 * MS), tmp_path / "run"
    with served(0.02) as url, under_way(trace, url, run, (("--processes", "2"), None)) as (process, found):
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode == 3
    rows = outcomes(run).to_pylist()
    failed = {row["session"] for row in rows if row["error"] is not None}
    assert {row["session"] for row in rows} - failed
    assert {row["call"]: row["completed"] for row in rows} == {
        row["call"]: row["session"] not in failed for row in rows
    }


def test_an_interrupt_of_the_command_alone_ends_it(tmp_path: Path) -> None:
    """As a supervisor sends it, to the one process it knows."""
    trace, run = long_trace(tmp_path / "t.parquet", 600 * MS), tmp_path / "run"
    with served(0.02) as url, under_way(trace, url, run, (("--processes", "2"), None)) as (process, _):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_no_shard_outlives_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 of the command: its shards stop sending soon, and what they wrote is reported."""
    trace, run = long_trace(tmp_path / "t.parquet", 4000 * MS), tmp_path / "run"
    with served(0.02) as url, under_way(trace, url, run, (("--processes", "2"), None)) as (process, found):
        process.kill()
        process.wait()
        for _ in range(200):
            left = [pid for pid in found if Path(f"/proc/{pid}").exists()]
            if left:
                time.sleep(0.1)
    assert left == []
    code, out, _ = keepwarm_(capsys, "report", str(run), "--json")
    assert (code, orjson.loads(out)["calls"]) == (0, written(run).num_rows)


def test_shards_keep_to_a_cap_that_is_smaller_than_they_are_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One call at a time by two processes: refused, or kept."""
    trace, run = long_trace(tmp_path / "t.parquet", 0), tmp_path / "run"
    with served(0.05) as url, sharded(trace, url, run, "--processes", "2", "--max-concurrency", "1") as process:
        process.communicate(timeout=60)
    if process.returncode != 2:
        spans = sorted((row["sent_ns"], row["done_ns"]) for row in outcomes(run).to_pylist())
        assert all(after[0] >= before[1] for before, after in pairwise(spans))


def test_more_processes_than_sessions_leave_none_out(tmp_path: Path) -> None:
    """A shard that has nothing to send is no lost one."""
    trace, run = (
        write(tmp_path / "t.parquet", *list(read_sessions(long_trace(tmp_path / "l.parquet", 0)))[:1]),
        tmp_path / "run",
    )
    with served() as url, sharded(trace, url, run, "--processes", "3") as process:
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert keys(run) == planned(trace)
