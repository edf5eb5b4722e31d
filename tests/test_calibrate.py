"""``keepwarm calibrate``: runs of known step times give these back; what a run does not tell is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from replays import scheduled

from keepwarm.harness.cli import main
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.engine import MAX_BATCHED, Engine
from keepwarm.replayers.job import SECOND
from keepwarm.replayers.prompts import in_tree
from keepwarm.replayers.router import Router
from keepwarm.replayers.simulate import simulate
from keepwarm.replayers.times import StepTimes, read_times
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.journal import OUTCOMES
from keepwarm.traces.model import After, Call, Segment
from keepwarm.traces.store import read_outcome_table, read_sessions, write_batches, write_outcomes

HOPPER = StepTimes(0.008, 4e-5, 1e-4, 1e-8, 0.05)
SLOW = StepTimes(0.02, 1e-4, 1e-3, 3e-8, 0.2)
BATCHED = 4096
PAUSE_S = 60


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixteen sessions with sub-agents."""
    path = str(tmp_path_factory.mktemp("trace") / "t.parquet")
    with pytest.raises(SystemExit) as stop:
        main(["synth", "demo", "--sessions", "16", "--seed", "3", "-o", path])
    assert not stop.value.code
    return path


def ran(trace: str | list[list[Call]], path: Path, times: StepTimes, *, workers: int = 1, **options: Any) -> str:
    """A run of the trace on engines of those step times; its directory."""
    tree = PromptTree()
    engines = [Engine(BlockCache(tree, block=16), times=times, max_batched=BATCHED) for _ in range(workers)]
    cluster = Cluster(tree, engines, Router("sticky", block=16))
    sessions = read_sessions(trace) if isinstance(trace, str) else trace
    schedule = scheduled(sessions, grow=in_tree(tree), **options)
    path.mkdir()
    write_outcomes(str(path / OUTCOMES), (done.outcome for done in simulate(schedule, cluster)))
    (path / "run.json").write_text('{"format": 1, "mode": "simulate"}')
    return str(path)


def changed(run: str, path: Path, **columns: pl.Expr) -> str:
    """A copy of a run with other values in some columns."""
    shutil.copytree(run, path)
    table = read_outcome_table(f"{run}/{OUTCOMES}")
    rows = pl.DataFrame(table).with_columns(**columns)
    write_batches(str(path / OUTCOMES), rows.to_arrow().cast(table.schema).to_batches())
    return str(path)


def keepwarm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def fitted(capsys: pytest.CaptureFixture[str], run: str, *more: str) -> dict[str, Any]:
    """What calibrate says of a run."""
    code, out, err = keepwarm(capsys, "calibrate", run, "--max-batched-tokens", str(BATCHED), "--json", *more)
    assert (code, err) == (0, "")
    told: dict[str, Any] = orjson.loads(out)
    return told


@pytest.mark.parametrize("times", [HOPPER, SLOW], ids=["hopper", "slow"])
@pytest.mark.parametrize(("at_once", "workers"), [(2, 1), (6, 1), (8, 2)])
def test_known_times_are_given_back(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path, times: StepTimes, at_once: int, workers: int
) -> None:
    """At several loads, on one worker and on two: fixed, prompt and call times within 2 %, the time that KV takes to
    read within 5 %, and that of another call in the step, which is small, within 12 %.
    """
    told = fitted(capsys, ran(trace, tmp_path / "run", times, at_once=at_once, workers=workers))
    within = {"fixed_s": 0.02, "prefill_s": 0.02, "call_s": 0.02, "kv_s": 0.05, "decode_s": 0.12}
    for name, share in within.items():
        assert told[name] == pytest.approx(getattr(times, name), rel=share), name
    assert told["fitted"]["workers"] == workers and told["fitted"]["not_identified"] == {}
    for kind in ("itl", "ttft"):
        error = told["fitted"][kind]
        assert error["used"] > 5 and error["held_out"] and error["error_p50"] < 0.01 and error["error_p90"] < 0.03


def test_a_full_server_still_gives_what_matters(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    """Sixteen sessions without gaps: the time of a step and of a prompt token within 3 %, and held-out calls decode as
    predicted, at a load where a lone call's step would be far off.
    """
    run = ran(trace, tmp_path / "run", HOPPER, at_once=16, gap_cap_ns=0)
    told = fitted(capsys, run)
    assert told["fixed_s"] == pytest.approx(HOPPER.fixed_s, rel=0.03)
    assert told["prefill_s"] == pytest.approx(HOPPER.prefill_s, rel=0.03)
    assert told["fitted"]["itl"]["error_p90"] < 0.03
    rows = pl.DataFrame(read_outcome_table(f"{run}/{OUTCOMES}")).filter(pl.col("output") > 1)
    itl = (pl.col("last_token_ns") - pl.col("first_token_ns")) / (pl.col("output") - 1) / SECOND
    assert rows.select(itl.median()).item() > 1.5 * HOPPER.fixed_s


def test_pauses_and_jitter_do_not_carry_the_fit_away(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    """The machine stops for two seconds every minute, and tokens are heard up to 5 ms late: the fit is not far
    off, its 90th percentile of errors is.
    """
    run = ran(trace, tmp_path / "run", HOPPER, at_once=4)
    names = ("sent_ns", "first_token_ns", "last_token_ns", "done_ns")
    jitter = (pl.col("call").hash(1) % 5_000_000).cast(pl.Int64)
    noisy = changed(
        run,
        tmp_path / "noisy",
        **{name: pl.col(name) + pl.col(name) // (PAUSE_S * SECOND) * 2 * SECOND for name in names},
    )
    noisy = changed(noisy, tmp_path / "noisier", **{name: pl.col(name) + jitter for name in names[1:]})
    told = fitted(capsys, noisy)
    assert told["fixed_s"] == pytest.approx(HOPPER.fixed_s, rel=0.02)
    assert told["prefill_s"] == pytest.approx(HOPPER.prefill_s, rel=0.02)
    assert told["kv_s"] == pytest.approx(HOPPER.kv_s, rel=0.05)
    assert told["call_s"] == pytest.approx(HOPPER.call_s + 0.0025, rel=0.05)
    assert told["fitted"]["itl"]["error_p50"] < 0.01


def test_calls_that_never_meet_do_not_tell_what_meeting_costs(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    """One session without sub-agents: decode_s is null and said, its part is in fixed_s; nothing else is lost."""
    run = ran([[_one(number) for number in range(80)]], tmp_path / "run", SLOW)
    told = fitted(capsys, run)
    assert told["decode_s"] is None and "fixed_s" in told["fitted"]["not_identified"]["decode_s"]
    assert told["fixed_s"] == pytest.approx(SLOW.fixed_s + SLOW.decode_s, rel=0.001)
    for name in ("prefill_s", "kv_s", "call_s"):
        assert told[name] == pytest.approx(getattr(SLOW, name), rel=0.01), name
    code, out, _ = keepwarm(capsys, "calibrate", run)
    assert code == 0 and "decode_s  not identified" in out


def _one(number: int) -> Call:
    """A call of a chain in which each waits for the last one's end; prompts grow and fall back."""
    fields: dict[str, Any] = {"session": "s", "agent": "a", "role": "main", "turn": number, "start_ns": number}
    fields |= {"usage_source": "absent", "write_source": "absent", "origin": "synthetic", "keep": 0, "end_ns": number}
    after = () if not number else (After(f"c{number - 1}", "end", SECOND, "tool"),)
    append = (Segment(number, 500 + number * 7919 % 20_000, "user"),)
    return Call(**fields, call=f"c{number}", after=after, append=append, output=2 + number * 37 % 150)


def test_the_file_is_what_simulate_reads(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    """-o writes the times, the same every time; read back they are the fit, and a simulation by them takes as long as
    the run did.
    """
    run, files = ran(trace, tmp_path / "run", HOPPER, at_once=4), [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        told = fitted(capsys, run, "-o", str(file))
    assert files[0].read_bytes() == files[1].read_bytes()
    times = read_times(files[0])
    assert times == StepTimes(*(told[name] for name in StepTimes._fields))
    again = ran(trace, tmp_path / "again", times, at_once=4)
    ends = [max(read_outcome_table(f"{path}/{OUTCOMES}")["done_ns"].to_pylist()) for path in (run, again)]
    assert ends[1] == pytest.approx(ends[0], rel=0.005)


def test_a_clock_that_ran_ahead_is_taken_back(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    """A replay at ten times the speed against a server that we drive: its times are of the server's clock."""
    run = Path(ran(trace, tmp_path / "run", HOPPER, at_once=4))
    told = fitted(capsys, str(run))
    endpoint = {"clock_driven": True}
    (run / "run.json").write_bytes(orjson.dumps({"format": 1, "options": {"speed": 10}, "endpoint": endpoint}))
    assert fitted(capsys, str(run))["fixed_s"] == pytest.approx(10 * told["fixed_s"])


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"first_token_ns": None}, "no call has a first token's time"),
        ({"cache_read": None}, "no call tells its cached tokens"),
        ({"output": None}, "no call tells its answer's tokens"),
        ({"error": "timeout"}, "no call was answered"),
        ({"output": 0}, "0 calls with times and token counts"),
    ],
)
def test_a_run_that_cannot_tell_is_one_line(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path, columns: dict[str, Any], told: str
) -> None:
    """Exit code 2 and what is missing."""
    run = ran(trace, tmp_path / "run", HOPPER, at_once=4)
    types = {"error": pl.String}
    literals = {name: pl.lit(value, types.get(name, pl.Int64)) for name, value in columns.items()}
    code, out, err = keepwarm(capsys, "calibrate", changed(run, tmp_path / "changed", **literals))
    assert (code, out) == (2, "") and told in err and err.count("\n") == 1


def test_a_run_without_times_is_told(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    """What was simulated in no time teaches no times."""
    run = ran(trace, tmp_path / "run", StepTimes(0.0, 0.0, 0.0, 0.0, 0.0), at_once=4)
    code, _, err = keepwarm(capsys, "calibrate", run)
    assert code == 2 and "took no time" in err and err.count("\n") == 1


def test_what_is_no_run_is_told(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    """A trace, a directory without outcomes, one without run.json, and a file that cannot be written."""
    run = ran(trace, tmp_path / "run", HOPPER, at_once=4)
    for path, told in ((trace, "not a run"), (str(tmp_path), "not a run"), (str(tmp_path / "no"), "not a run")):
        code, _, err = keepwarm(capsys, "calibrate", path)
        assert code == 2 and told in err and err.count("\n") == 1
    code, _, err = keepwarm(capsys, "calibrate", run, "-o", str(tmp_path / "none" / "t.json"))
    assert code == 2 and "none/t.json" in err and err.count("\n") == 1
    (Path(run) / "run.json").unlink()
    code, _, err = keepwarm(capsys, "calibrate", run)
    assert code == 2 and "run.json" in err and err.count("\n") == 1


def test_a_fit_is_for_the_tokens_that_the_engine_computes_in_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody says how many: the option's default, which stands as data, is the engine's."""
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    assert f"[default: {MAX_BATCHED}; 1<=x" in " ".join(capsys.readouterr().out.split())
