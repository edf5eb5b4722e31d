"""Sweeps: a grid of clusters, each as if it had been simulated alone."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from keepwarm.harness.cli import main

DEMO = str(files("keepwarm.harness") / "demo.parquet")


def keepwarm(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return int(stop.value.code or 0), told.out, told.err


def test_each_point_is_what_it_is_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two axes give all pairs in their order, as JSON and as Parquet, with the figures of a report of the one run."""
    table = tmp_path / "grid.parquet"
    axes = ("--sweep", "cache-ttl=0,5m", "--sweep", "capacity=2000,40000")
    code, out, _ = keepwarm(capsys, "simulate", DEMO, *axes, "--json", "-o", table)
    rows: list[dict[str, Any]] = json.loads(out)
    asked = [(row["cache_ttl"], row["capacity"]) for row in rows]
    assert code == 0
    assert asked == [("0", "2000"), ("0", "40000"), ("5m", "2000"), ("5m", "40000")]
    assert pl.read_parquet(table).to_dicts() == rows
    for row in rows:
        options = ("--cache-ttl", row["cache_ttl"], "--capacity", row["capacity"])
        alone = json.loads(keepwarm(capsys, "simulate", DEMO, *options, "--json")[1])
        for name in ("hit_rate", "warm_hit_rate", "read_write_ratio", "turn_drift"):
            assert row[name] == alone[name], (row, name)
        assert row["ttft_p99_s"] == alone["latency"]["ttft"]["p99"]
        assert row["cost_per_completed_task"] == alone["cost"]["cost_per_completed_task"]
    assert rows[0]["hit_rate"] < rows[2]["hit_rate"] < rows[3]["hit_rate"]


def test_the_load_and_the_machine_are_axes_too(capsys: pytest.CaptureFixture[str]) -> None:
    """More sessions at once take less of a machine's time, so its tasks cost less; the table says what was asked."""
    options = ("--hardware", "h100", "--gap-cap", "1", "--sweep", "sessions=1,6")
    code, out, _ = keepwarm(capsys, "simulate", DEMO, *options)
    _, title, head, one, six = (line.split() for line in out.splitlines())
    cost = head.index("gpu_cost_per_completed_task")
    assert (code, title, head[0], one[0], six[0]) == (0, ["demo.parquet"], "sessions", "1", "6")
    assert 0 < float(six[cost]) < float(one[cost])


def test_the_faster_sessions_arrive_the_less_of_them_a_cache_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """Five copies of the trace, one session a minute or each second, in blocks for a few of them."""
    options = ("--repeat", "5", "--capacity", "4000", "--sweep", "arrivals=constant:1/m,constant:1/s", "--json")
    slow, fast = json.loads(keepwarm(capsys, "simulate", DEMO, *options)[1])
    assert (slow["arrivals"], fast["arrivals"]) == ("constant:1/m", "constant:1/s")
    assert 0 < fast["hit_rate"] < slow["hit_rate"]


def test_a_law_of_arrivals_is_that_of_a_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sessions of three copies are first due a minute apart; their prompts differ, so no copy reads another's."""
    run = tmp_path / "run"
    load = ("--arrivals", "constant:1/m", "--repeat", 3)
    code, out, _ = keepwarm(capsys, "simulate", DEMO, *load, "-o", run)
    rows = pl.read_parquet(run / "outcomes.parquet")
    begun = rows.group_by("session", "copy").agg(pl.col("due_ns").min()).sort("due_ns")
    once = json.loads(keepwarm(capsys, "simulate", DEMO, "--json")[1])
    assert (code, out.split(": ")[1].split(";")[0]) == (0, f"{3 * once['calls']} calls simulated")
    assert begun["due_ns"].diff().drop_nulls().unique().to_list() == [60_000_000_000]
    assert begun["copy"].to_list() == [copy for copy in range(3) for _ in range(once["sessions"])]
    about = json.loads((run / "run.json").read_bytes())
    assert (about["planned_calls"], about["options"]["arrivals"]) == (3 * once["calls"], "constant:1/m")


def test_a_point_whose_calls_do_not_fit_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """No figure is made up where no call was answered."""
    code, out, _ = keepwarm(capsys, "simulate", DEMO, "--max-seqs", 4, "--sweep", "capacity=0,90000", "--json")
    none, all_ = json.loads(out)
    assert code == 0
    assert (none["hit_rate"], none["ttft_p50_s"], none["failed"]) == (None, None, 152)
    assert all_["failed"] == 0 < all_["hit_rate"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweep", "cache-ttl"], "expected OPTION=VALUE"),
        (["--sweep", "colour=1,2"], "with one of"),
        (["--sweep", "capacity=1,1"], "each once"),
        (["--sweep", "capacity=1", "--sweep", "capacity=2"], "each once"),
        (["--sweep", "capacity=-1"], "not in the range"),
        (["--sweep", "router=fastest"], "'fastest' is not one of"),
        (["--sweep", "cache-ttl=soon"], "expected as-recorded, none, or a duration"),
        (["--sweep", "rules=openai", "--capacity", "5"], "--rules openai and --capacity cannot both be given"),
        (["--sweep", "workers=1,2", "--background-workers", "1"], "fewer than --workers"),
        (["--sweep", "capacity=1", "--bound", "ttl_5s"], "cannot both be given"),
        (["--sweep", "arrivals=poisson:1/s,often"], "--arrivals 'often': expected poisson:RATE/s"),
        (["--sweep", "capacity=1", "-o", "/nowhere/at/all"], "cannot be written there"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_is_simulated(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """One line, exit code 2, nothing on standard output."""
    code, out, err = keepwarm(capsys, "simulate", DEMO, *arguments)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]


def test_a_table_that_is_there_is_kept_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --force it stays as it was; with it, it is replaced."""
    table = tmp_path / "grid.parquet"
    table.write_bytes(b"mine")
    code, _, err = keepwarm(capsys, "simulate", DEMO, "--sweep", "capacity=9000", "-o", table)
    assert (code, table.read_bytes()) == (2, b"mine")
    assert "--force" in err
    assert keepwarm(capsys, "simulate", DEMO, "--sweep", "capacity=9000", "-o", table, "--force")[0] == 0
    assert pl.read_parquet(table).height == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--router", "kv_awarer"], "is not one of"),
        (["--capacity", "-1"], "not in the range"),
        (["--rules", "anthropic", "--capacity", "10"], "--rules anthropic and --capacity"),
        (["--rules", "managed", "--workers", "2"], "--rules managed and --workers"),
        (["--max-seqs", "4", "--prefill-tps", "100"], "--prefill-tps and --max-seqs"),
        (["--cache-ttl", "as-recorded", "--rules", "engine"], "needs --rules managed"),
        (["--router", "sticky", "--workers", "2", "--router-temperature", "1"], "needs --router kv_aware"),
        (["--host-tps", "5"], "--host-tps needs --host-capacity"),
        (["--hardware", "vera-rubin-groq3-lpx"], "--hardware needs --decode-workers"),
        (["--bound", "soon"], "expected ttl_300s"),
        (["--rules", "openai", "--bound", "capacity_5"], "know no capacity"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Exit code 2, and what is wrong with which options."""
    code, out, err = keepwarm(capsys, "simulate", DEMO, *arguments)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]


def test_bounds_stand_beside_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A bound is what the same calls would have read of another cache; endless, of an endless run, its own rate."""
    bounds = ("--bound", "ttl_60s", "--bound", "capacity_3000", "--bound", "rules_openai")
    report = json.loads(keepwarm(capsys, "simulate", DEMO, *bounds, "--json")[1])
    found = report["achievable_hit_rate"]
    assert found.keys() == {"endless", "ttl_60s", "capacity_3000", "rules_openai"}
    assert found["endless"] == report["hit_rate"]
    assert found["ttl_60s"] < found["endless"] > found["capacity_3000"]


def test_answers_sent_back_as_recorded_are_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    """A live assistant's tokens are read by the next call, a recorded one's are not: they come after the cut."""
    live, recorded = (
        json.loads(keepwarm(capsys, "simulate", DEMO, "--assistant", who, "--json")[1]) for who in ("live", "recorded")
    )
    assert live["about"]["cache"]["outputs_readable"] is True
    assert recorded["about"]["cache"]["outputs_readable"] is False
    assert 0 < live["cache_read"] - recorded["cache_read"] < live["output"]
