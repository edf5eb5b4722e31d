"""Gate: required figures in words, one line a check, and the exit code a pipeline acts on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.harness.cli import main
from keepwarm.replayers.run import Bound, write_bounds
from keepwarm.reports.gate import OPERATORS, judge
from keepwarm.reports.requirement import parse
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Call, Outcome, Segment
from keepwarm.traces.store import TraceWriter, write_outcomes

SECOND = 1_000_000_000


def outcome(turn: int, **fields: Any) -> Outcome:
    """Call ``turn`` of one agent: 1,000 prompt tokens, 900 of them read after the first, ttft 100 ms a turn."""
    role = fields.pop("role", "main")
    told = {"usage_source": "reported", "write_source": "reported", "origin": "synthetic", "model": "claude-opus-4-6"}
    recorded = {"output_est": fields.pop("output_est", None)}
    call = Call("s", role, f"{role}{turn}", role, turn, 0, SECOND, 0, flow="interactive", **told, **recorded)
    read = 900 if turn else 0
    usage = {"prompt": 1000, "cache_read": read, "cache_write_5m": 1000 - read, "uncached": 0, "output": 10}
    due = turn * 10 * SECOND
    times = {"due_ns": due, "sent_ns": due, "first_token_ns": due + turn * SECOND // 10, "done_ns": due + SECOND}
    measured = {"write_source": "reported", "status": 200, "completed": True}
    return Outcome(call._replace(append=(Segment(1, 1000, "user"),)), **{**times, **usage, **measured, **fields})


def run(path: Path, outcomes: list[Outcome] | None = None, **about: Any) -> str:
    """A run's directory; ten calls unless told otherwise."""
    path.mkdir()
    outcomes = [outcome(turn) for turn in range(10)] if outcomes is None else outcomes
    write_outcomes(str(path / "outcomes.parquet"), outcomes)
    told = {"planned_calls": len(outcomes), "interrupted": False, "options": {"speed": 1.0, "gap_cap_s": None}}
    (path / "run.json").write_bytes(orjson.dumps({**told, "trace": {"digest": "d"}, **about}))
    return str(path)


def gate(capsys: pytest.CaptureFixture[str], path: str, *options: str) -> tuple[int, list[str]]:
    """Exit code of ``keepwarm gate`` and what it printed, both streams."""
    with pytest.raises(SystemExit) as stop:
        main(["gate", path, *options])
    said = capsys.readouterr()
    return int(stop.value.code or 0), (said.out + said.err).splitlines()


def requiring(*texts: str) -> list[str]:
    """Options for these requirements."""
    return [part for text in texts for part in ("--require", text)]


def test_a_passing_gate_is_one_line_a_check_and_exit_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates, times, ratios, counts and money, each in its unit; the ninth of ten ttfts is 800 ms."""
    asked = ("warm_hit_rate >= 90%", "ttft.p90 <= 800ms", "read_write_ratio > 4x", "calls == 10", "ttft.max < 1s")
    code, lines = gate(capsys, run(tmp_path / "r"), *requiring(*asked))
    assert (code, lines) == (
        0,
        [
            "PASS warm_hit_rate 90 % >= 90 %",
            "PASS ttft.p90 800.0 ms <= 800.0 ms",
            "PASS read_write_ratio 4.26x > 4.00x",
            "PASS calls 10 == 10",
            "PASS ttft.max 900.0 ms < 1.000 s",
        ],
    )


def test_a_failing_check_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of two checks fails: both lines are there, and the code is 1."""
    code, lines = gate(capsys, run(tmp_path / "r"), *requiring("warm_hit_rate >= 91%", "hit_rate >= 0.8"))
    assert (code, lines) == (1, ["FAIL warm_hit_rate 90 % >= 91 %", "PASS hit_rate 81 % >= 80 %"])


@pytest.mark.parametrize(
    "text", ["itl.p50 <= 1s", "efficiency.endless >= 90%", "hit_rate[role=side] >= 1%", "turn_drift <= 2"]
)
def test_a_figure_that_was_not_measured_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """No token times, no bounds, no such calls, no late turns: a missing figure is no pass and no zero."""
    code, lines = gate(capsys, run(tmp_path / "r"), *requiring(text))
    assert code == 1
    assert lines[0].startswith("FAIL")
    assert "not measured" in lines[0]


def test_bounds_that_were_stored_can_be_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the simulated cluster would have read, and an endless cache: 720 and 891 of 1,000 tokens a later call."""
    path = run(tmp_path / "r")
    reads = {"predicted": 720, "endless": 891}
    bounds = [Bound(f"main{turn}", 0, name, read if turn else 0) for turn in range(10) for name, read in reads.items()]
    write_bounds(tmp_path / "r", bounds)
    asked = requiring("predicted_hit_rate >= 64.8%", "predicted_hit_rate > 64.8%", "achievable_hit_rate.endless <= 81%")
    code, lines = gate(capsys, path, *asked)
    assert code == 1
    assert lines[0] == "PASS predicted_hit_rate 64.8 % >= 64.8 %"
    assert lines[1].startswith("FAIL predicted_hit_rate 64.8 % > 64.8 %")
    assert lines[2] == "PASS achievable_hit_rate.endless 80.19 % <= 81 %"


def test_selectors_choose_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Turn buckets, roles and flows pick the calls a figure is taken over."""
    calls = [*(outcome(turn) for turn in range(10)), outcome(0, role="subagent"), outcome(3, role="subagent")]
    asked = ("ttft.p50[turn=2-5,role=main] <= 300ms", "calls[role=subagent] == 2", "calls[flow=background] == 0")
    code, lines = gate(capsys, run(tmp_path / "r", calls), *requiring(*asked))
    assert lines[0] == "PASS ttft.p50[turn=2-5,role=main] 300.0 ms <= 300.0 ms"
    assert lines[1] == "PASS calls[role=subagent] 2 == 2"
    assert lines[2].startswith("FAIL calls[flow=background] not measured")
    assert code == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hit_rat >= 90%", "no figure 'hit_rat'"),
        ("ttft <= 2s", "ttft needs a percentile or max"),
        ("ttft.p101 <= 2s", "ttft needs a percentile or max"),
        ("ttft.p99 <= 2", "ttft is a time, expected a number with unit 's' or 'ms' or 'us'"),
        ("hit_rate >= 90", "is over 100 %"),
        ("hit_rate.p50 >= 90%", "one figure and has no 'p50'"),
        ("hit_rate >= 90ms", "hit_rate is a rate"),
        ("hit_rate[color=red] >= 9%", "selector 'color=red': expected role|"),
        ("cost_per_completed_task[role=main] <= $1", "takes no selector"),
        ("retention.p7 >= 9%", "needs a statistic: one of p1, p5, p50, of_tokens"),
        ("hit_rate => 9%", "expected 'metric[.statistic]"),
        ("hit_rate >= baseline-1pt", "--baseline RUN"),
    ],
)
def test_a_requirement_that_makes_no_sense_is_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    """One line says which requirement, and what was expected."""
    code, lines = gate(capsys, run(tmp_path / "r"), *requiring(text))
    assert code == 2
    assert len(lines) == 1
    assert said in lines[0]


def test_nothing_to_hold_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a requirement and without a baseline there is no gate."""
    assert gate(capsys, run(tmp_path / "r"))[0] == 2


def test_a_missing_run_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that is not there is one clear line."""
    code, lines = gate(capsys, str(tmp_path / "none"), *requiring("hit_rate >= 9%"))
    assert (code, len(lines)) == (2, 1)


def test_a_run_that_is_not_valid_is_exit_3_over_a_failed_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the planned calls were answered: 3, whatever the checks say, and the reason is told."""
    path = run(tmp_path / "r", planned_calls=20)
    code, lines = gate(capsys, path, *requiring("hit_rate >= 99%"))
    assert code == 3
    assert "coverage is 50.00 %, expected at least 99.00 %" in lines[0]
    assert lines[1].startswith("FAIL hit_rate")


def test_cache_figures_of_compressed_time_are_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At speed 5 against a clock of its own an endpoint's TTL was not measured; latencies may still be held."""
    options = {"options": {"speed": 5.0, "gap_cap_s": None}, "endpoint": {"clock_driven": False, "has_ttl": True}}
    path = run(tmp_path / "r", **options)
    for asked in ("warm_hit_rate >= 1%", "cost_per_completed_task <= $9", "retention.p5 >= 1%"):
        code, lines = gate(capsys, path, *requiring(asked))
        assert code == 3
        assert lines[0].endswith("time compressed: TTL effects not measured")
    assert gate(capsys, path, *requiring("ttft.p99 <= 1s"))[0] == 0


@pytest.mark.parametrize(
    ("about", "code"),
    [
        ({"options": {"speed": 5.0}, "endpoint": {"clock_driven": True, "has_ttl": True}}, 0),
        ({"options": {"speed": 5.0}, "endpoint": {"clock_driven": False, "has_ttl": False}}, 0),
        ({"options": {"speed": 5.0}, "endpoint": {"clock_driven": False, "has_ttl": None}}, 3),
        ({"options": {"speed": 1.0, "gap_cap_s": 5}, "endpoint": {"clock_driven": True, "has_ttl": True}}, 3),
        ({"options": {"speed": 1.0, "gap_cap_s": 5}, "endpoint": {"clock_driven": True, "has_ttl": False}}, 0),
    ],
)
def test_compressed_time_is_sound_without_ttl_or_on_a_driven_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], about: dict[str, Any], code: int
) -> None:
    """Scaled time is sound on a clock that is scaled with it; cut gaps only where nothing expires."""
    assert gate(capsys, run(tmp_path / "r", **about), *requiring("warm_hit_rate >= 1%"))[0] == code


def test_a_cost_that_rests_on_estimates_is_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Estimated answers make up most of the money: the gate on it is refused; the figure itself was measured."""
    calls = [outcome(turn, output=None, output_est=1_000) for turn in range(3)]
    code, lines = gate(capsys, run(tmp_path / "r", calls), *requiring("cost_per_completed_task <= $9"))
    assert code == 3
    assert "rests on estimated outputs" in lines[0]


def test_a_baseline_is_refused_for_what_a_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A baseline in compressed time, or whose money rests on estimates, holds nothing; an absolute figure is held."""
    path = run(tmp_path / "r")
    squeezed = {"options": {"speed": 5.0}, "endpoint": {"clock_driven": False, "has_ttl": True}}
    fast = run(tmp_path / "fast", **squeezed)
    guessed = run(tmp_path / "guessed", [outcome(turn, output=None, output_est=1_000) for turn in range(10)])
    code, lines = gate(capsys, path, "--baseline", fast, *requiring("warm_hit_rate >= baseline"))
    assert code == 3
    assert lines[-1] == "NOT VALID warm_hit_rate: baseline: time compressed: TTL effects not measured"
    asked = requiring("cost_per_completed_task <= baseline", "hit_rate >= 80%")
    code, lines = gate(capsys, path, "--baseline", guessed, *asked)
    assert code == 3
    assert lines[-2].startswith("NOT VALID cost_per_completed_task: baseline: ")
    assert lines[-2].endswith("of the money rests on estimated outputs, at most 20 % may")
    assert lines[-1] == "PASS hit_rate 81 % >= 80 %"
    assert gate(capsys, path, "--baseline", fast, *requiring("ttft.p99 <= baseline"))[0] == 0


@pytest.mark.parametrize(
    ("text", "value", "line"),
    [
        ("hit_rate >= 88.05%", 0.88046, "FAIL hit_rate 88.046 % >= 88.05 %"),
        ("hit_rate >= 88.05%", 0.8805, "PASS hit_rate 88.05 % >= 88.05 %"),
        ("hit_rate > 88%", 0.88000001, "PASS hit_rate 88.000001 % > 88 %"),
        ("ttft.p99 <= 2s", 2.00004, "FAIL ttft.p99 2.00004 s <= 2.00000 s"),
        ("read_write_ratio >= 11.7", 11.6999, "FAIL read_write_ratio 11.6999x >= 11.7000x"),
        ("cost_per_completed_task <= $1.2", 1.20001, "FAIL cost_per_completed_task $1.20001 <= $1.20000"),
        ("prompt <= 2000000", 2_000_001, "FAIL prompt 2000001 <= 2000000"),
    ],
)
def test_a_figure_never_looks_like_the_limit_it_missed(text: str, value: float, line: str) -> None:
    """As many digits are printed as tell the two apart."""
    assert judge(parse(text), value, None).line == line


def test_relative_requirements_are_held_to_the_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The baseline reads 90 % warm and has a median ttft of 400 ms; shares, points, factors and amounts apply to it."""
    base = run(tmp_path / "base")
    slower = [outcome(t, first_token_ns=t * 10 * SECOND + t * SECOND // 8) for t in range(10)]
    path = run(tmp_path / "r", slower)
    asked = {
        "ttft.p50 <= baseline+20%": "FAIL ttft.p50 500.0 ms <= 480.0 ms (baseline 400.0 ms)",
        "ttft.p50 <= baseline+25%": "PASS ttft.p50 500.0 ms <= 500.0 ms (baseline 400.0 ms)",
        "ttft.p50 <= baseline*1.3": "PASS ttft.p50 500.0 ms <= 520.0 ms (baseline 400.0 ms)",
        "ttft.p50 <= baseline + 50ms": "FAIL ttft.p50 500.0 ms <= 450.0 ms (baseline 400.0 ms)",
        "warm_hit_rate >= baseline-0.5pt": "PASS warm_hit_rate 90 % >= 89.5 % (baseline 90 %)",
        "warm_hit_rate > baseline": "FAIL warm_hit_rate 90 % > 90 % (baseline 90 %)",
    }
    code, lines = gate(capsys, path, "--baseline", base, *requiring(*asked))
    assert (code, lines) == (1, list(asked.values()))


def test_a_baseline_alone_holds_the_run_to_three_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Warm hit rate within a point, ttft and latency p99 within a tenth; a difference in what was run is told."""
    base, path = run(tmp_path / "base"), run(tmp_path / "r", cache={"ttl": "5m"})
    code, lines = gate(capsys, path, "--baseline", base)
    assert code == 0
    assert lines == ["note: the runs differ in cache", *HELD]


HELD = [
    "PASS warm_hit_rate 90 % >= 89 % (baseline 90 %)",
    "PASS ttft.p99 900.0 ms <= 990.0 ms (baseline 900.0 ms)",
    "PASS latency.p99 1.000 s <= 1.100 s (baseline 1.000 s)",
]


def test_a_baseline_of_another_trace_holds_nothing_unless_it_may(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digests differ: exit 3 and one line on it; with --across-traces a note; absolute figures do not mind."""
    base, path = run(tmp_path / "base"), run(tmp_path / "r", trace={"digest": "other"}, cache={"ttl": "5m"})
    refused = "NOT VALID run and baseline differ in trace digest: give --across-traces to hold them all the same"
    code, lines = gate(capsys, path, "--baseline", base)
    assert (code, lines) == (3, [refused, "note: the runs differ in cache", *HELD])
    code, lines = gate(capsys, path, "--baseline", base, "--across-traces")
    assert (code, lines) == (0, ["note: the runs differ in trace digest, cache", *HELD])


def test_a_recordings_tasks_are_not_a_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording knows if its task was done, a run if its calls were answered: their costs are not one figure."""
    with TraceWriter(str(tmp_path / "t.parquet"), producer="tests", version="0", tokens="exact") as writer:
        for turn in range(3):
            usage = {"prompt": 1000, "cache_read": 900, "cache_write_5m": 100, "uncached": 0, "output": 10}
            writer.add(outcome(turn).call._replace(start_ns=turn, end_ns=turn + 1, completed=True, **usage))
    path = run(tmp_path / "r", trace={"digest": writer.digest})
    asked = requiring("cost_per_completed_task <= baseline*9")
    code, lines = gate(capsys, path, "--baseline", str(tmp_path / "t.parquet"), *asked)
    assert code == 3
    assert lines[-1] == (
        "NOT VALID cost_per_completed_task: run: completed = every planned call was answered; "
        "baseline: completed = the task's recorded outcome: not one figure"
    )


def test_a_driven_clock_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At speed 60 against a clock that runs as fast, 900 ms are 54 s to the endpoint: the gate says so."""
    fast = {"options": {"speed": 60.0, "gap_cap_s": None}, "endpoint": {"clock_driven": True, "has_ttl": True}}
    told = "the endpoint's clock ran 60 times as fast: times are as measured, not scaled back"
    path, base = run(tmp_path / "r", **fast), run(tmp_path / "base")
    assert gate(capsys, path, *requiring("ttft.p99 <= 2s")) == (
        0,
        [f"note: {told}", "PASS ttft.p99 900.0 ms <= 2.000 s"],
    )
    assert f"note: baseline: {told}" in gate(capsys, base, "--baseline", path)[1]


def test_what_the_baseline_did_not_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A default check is passed over where the baseline has no such figure; one that was asked for fails."""
    silent = [outcome(turn, first_token_ns=None) for turn in range(3)]
    base, path = run(tmp_path / "base", silent), run(tmp_path / "r")
    assert "SKIP ttft.p99 not measured in the baseline" in gate(capsys, path, "--baseline", base)[1]
    code, lines = gate(capsys, path, "--baseline", base, *requiring("ttft.p99 <= baseline*2"))
    assert (code, lines) == (1, ["FAIL ttft.p99 900.0 ms: not measured in the baseline"])


def test_a_baseline_that_is_not_valid_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be held to an interrupted baseline."""
    base, path = run(tmp_path / "base", interrupted=True), run(tmp_path / "r")
    code, lines = gate(capsys, path, "--baseline", base)
    assert code == 3
    assert "it was interrupted" in lines[0]


@given(st.text(max_size=40))
def test_any_text_is_a_requirement_or_an_input_error(text: str) -> None:
    """No text makes the parser fail otherwise, and an error is one line."""
    try:
        assert parse(text).metric
    except InputError as error:
        assert "\n" not in str(error)


@given(
    op=st.sampled_from(sorted(OPERATORS)),
    limit=st.integers(0, 1000),
    value=st.integers(0, 1000),
)
def test_a_verdict_is_the_comparison_itself(op: str, limit: int, value: int) -> None:
    """PASS and 0 exactly where the figure stands to the limit as the operator says."""
    verdict = judge(parse(f"hit_rate {op} {limit / 10}%"), value / 1000, None)
    good = eval(f"{value} {op} {limit}")
    assert verdict.code == (0 if good else 1)
    assert verdict.line.startswith("PASS" if good else "FAIL")
