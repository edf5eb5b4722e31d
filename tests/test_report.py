"""Reports: exact percentiles, a histogram log other tools read, validity, and what the command prints."""

from __future__ import annotations

from fractions import Fraction
from io import StringIO
from math import ceil
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from keepwarm.harness.cli import main
from keepwarm.reports import latency
from keepwarm.reports.frame import Loaded, load
from keepwarm.reports.losses import links_of
from keepwarm.reports.recording import inspect_summary
from keepwarm.reports.render import table
from keepwarm.reports.render_trace import render_inspect
from keepwarm.reports.validity import validity
from keepwarm.traces.model import Call, Outcome, Segment, ToolUse
from keepwarm.traces.store import TraceWriter, write_outcomes

SECOND = 1_000_000_000
MS = 1_000_000


def call(call: str, turn: int = 0, **fields: Any) -> Call:
    """A call of 1,000 prompt tokens, 900 of them recorded as read after an agent's first call."""
    told = {"usage_source": "reported", "write_source": "reported", "origin": "synthetic", "keep": 0}
    read = 900 if turn else 0
    usage = {"prompt": 1000, "cache_read": read, "cache_write_5m": 1000 - read, "uncached": 0, "output_est": 10}
    start = turn * 10 * SECOND
    times = {"start_ns": start, "end_ns": start + SECOND, "session_start_ns": 0}
    about = {"session": "s", "agent": "m", "role": "main", "flow": "interactive", "append": (Segment(1, 1000, "user"),)}
    return Call(call=call, turn=turn, **{**told, **usage, **times, **about, **fields})


def outcome(turn: int, service_ms: int = 100, lag_ms: int = 0, **fields: Any) -> Outcome:
    """Call ``turn`` of an agent, sent so late, answered in so long, its first token after half of that."""
    due = turn * 10 * SECOND
    sent = due + lag_ms * MS
    half, done = sent + service_ms * MS // 2, sent + service_ms * MS
    planned = call(turn=turn, **{"call": f"c{turn}", **fields.pop("call", {})})
    usage = {"prompt": 1000, "cache_read": 800, "cache_write_5m": 200, "uncached": 0, "output": 10}
    times = {"due_ns": due, "sent_ns": sent, "first_token_ns": half, "done_ns": done}
    measured = {"write_source": "reported", "status": 200, "completed": True}
    return Outcome(planned, **{**times, **usage, **measured, **fields})


def run(path: Path, outcomes: list[Outcome], **about: Any) -> Loaded:
    """A run of these outcomes, written and read back."""
    path.mkdir(exist_ok=True)
    write_outcomes(str(path / "outcomes.parquet"), outcomes)
    told = {"planned_calls": len(outcomes), "interrupted": False, "mode": "replay"}
    (path / "run.json").write_bytes(orjson.dumps({**told, **about}))
    return load(str(path))


def keepwarm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def told(loaded: Loaded) -> dict[str, Any]:
    """The statistics of each time."""
    return latency.whole(latency.counts_of(loaded.scan))


def checked(loaded: Loaded) -> dict[str, Any]:
    """validity of a run, with its checks by name."""
    found = validity(loaded, links_of(loaded))
    return {**found, "checks": {check["check"]: check for check in found["checks"]}}


@example(list(range(1000)))
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300))
def test_percentiles_are_nearest_rank(values: list[int]) -> None:
    """A percentile is the value at rank ceil(share * n) of the sorted ones, in exact arithmetic."""
    found = pl.DataFrame({"ns": values, "len": [1] * len(values)}).select(**latency.STATISTICS).row(0, named=True)
    ranked = sorted(values)
    for name, share in (("p50", "0.5"), ("p90", "0.9"), ("p99", "0.99"), ("p99.9", "0.999")):
        assert found[name] == ranked[ceil(Fraction(share) * len(ranked)) - 1] / 1e9
    assert found["max"] == ranked[-1] / 1e9


def test_latency_counts_from_due_and_service_time_from_sent(tmp_path: Path) -> None:
    """A call sent 40 ms late and answered in 100 ms took 140 ms; its service time is 100 ms."""
    found = told(run(tmp_path, [outcome(0, lag_ms=40)]))
    assert (found["latency"]["p50"], found["service_time"]["p50"]) == (0.14, 0.1)
    assert (found["ttft"]["p50"], found["service_ttft"]["p50"]) == (0.09, 0.05)


def test_time_between_tokens_is_measured_where_token_times_were_kept(tmp_path: Path) -> None:
    """Tokens at 0, 10, 40 ms and a call without token times: two intervals, 10 and 30 ms."""
    kept = outcome(0, token_ns=(0, 10 * MS, 40 * MS))
    found = told(run(tmp_path, [kept, outcome(1)]))
    assert (found["itl"]["calls"], found["itl"]["p50"], found["itl"]["max"]) == (2, 0.01, 0.03)
    assert told(run(tmp_path, [outcome(0)]))["itl"] is None


def test_failed_calls_have_no_latency(tmp_path: Path) -> None:
    """A refusal in one millisecond does not make the endpoint quick."""
    refused = outcome(1, service_ms=1, error="overloaded", status=529)
    found = told(run(tmp_path, [outcome(0), refused]))
    assert (found["latency"]["calls"], found["latency"]["p50"]) == (1, 0.1)


def test_latencies_by_group(tmp_path: Path) -> None:
    """Calls of the background flow are slow, those of the interactive one are not."""
    calls = [outcome(0), outcome(1, service_ms=900, call={"flow": "background"})]
    by_flow = latency.grouped(latency.counts_of(run(tmp_path, calls).scan), "flow")
    assert {flow: row["latency"]["p99"] for flow, row in by_flow.items()} == {"background": 0.9, "interactive": 0.1}


def test_the_histogram_log_is_read_by_the_hdr_reader(tmp_path: Path) -> None:
    """Each tag is a flow and a time; counts are exact, percentiles within the histogram's three digits."""
    service_ms = [7 * turn * turn + 3 for turn in range(60)]
    calls = [outcome(turn, ms) for turn, ms in enumerate(service_ms)]
    calls += [outcome(turn, 5, call={"flow": "background", "agent": "b", "call": f"b{turn}"}) for turn in range(9)]
    loaded = run(tmp_path, calls, clock={"anchor": "2026-11-21T01:00:00+00:00"})
    path = latency.write_hlog(loaded, latency.counts_of(loaded.scan))
    reader = HistogramLogReader(path, HdrHistogram(1, 2**40, 3))
    found = {}
    while (histogram := reader.get_next_interval_histogram()) is not None:
        found[histogram.get_tag()] = histogram
    reader.input_file.close()
    assert set(found) == {f"{f}.{t}" for f in ("interactive", "background") for t in latency.TIMES}
    assert reader.get_start_time_sec() == 1795222800.0
    whole = found["interactive.latency"]
    assert whole.get_total_count() == 60
    for percent in (25, 50, 90, 100):
        exact = sorted(service_ms)[ceil(Fraction(percent, 100) * 60) - 1] * 1000
        assert whole.get_value_at_percentile(percent) == pytest.approx(exact, rel=1e-3)
    assert found["background.latency"].get_total_count() == 9


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**16), min_size=1, max_size=50))
def test_counting_before_recording_changes_no_histogram(values: list[int]) -> None:
    """Values rounded to the histogram's digits fall where recording them one by one puts them."""
    one_by_one = HdrHistogram(1, latency.LONGEST_US, 3)
    for value in values:
        one_by_one.record_value(max(min(value // 1000, latency.LONGEST_US), 1))
    counted = latency.histogram_of(pl.DataFrame({"ns": values, "len": [1] * len(values)}))
    for percent in (1, 25, 50, 75, 99, 100):
        assert counted.get_value_at_percentile(percent) == one_by_one.get_value_at_percentile(percent)


def test_a_good_run_is_valid(tmp_path: Path) -> None:
    """Every call answered, tokens as planned, sent in time, not interrupted."""
    found = checked(run(tmp_path, [outcome(turn) for turn in range(3)]))
    assert (found["valid"], found["because"]) == (True, [])
    assert found["checks"]["coverage"]["value"] == 1.0


@pytest.mark.parametrize(
    ("last", "about", "check"),
    [
        ({"error": "timeout", "status": None}, {}, "failed_calls"),
        ({"error": "skipped", "status": None, "sent_ns": None, "done_ns": None}, {}, "skipped_calls"),
        ({}, {"planned_calls": 4}, "coverage"),
        ({}, {"planned_calls": None}, "coverage"),
        ({"cache_read": None}, {}, "cached_tokens_reported"),
        ({"prompt": 1011}, {}, "token_fidelity.p95"),
        ({"sent_ns": 20 * SECOND + 51 * MS}, {}, "schedule_lag.p99"),
        ({}, {"interrupted": True}, "uninterrupted"),
        ({}, {"interrupted": None}, "uninterrupted"),
    ],
)
def test_one_thing_wrong_makes_a_run_not_valid(
    tmp_path: Path, last: dict[str, Any], about: dict[str, Any], check: str
) -> None:
    """Each check fails over its limit, and a figure that is missing is no pass."""
    found = checked(run(tmp_path, [outcome(0), outcome(1), outcome(2, **last)], **about))
    assert found["valid"] is False
    assert found["checks"][check]["good"] is False


def test_a_lag_is_judged_by_the_latencies_too(tmp_path: Path) -> None:
    """60 ms late is too late for calls of 100 ms, and not for calls of 2 s."""
    quick = [outcome(turn, service_ms=100, lag_ms=60) for turn in range(3)]
    slow = [outcome(turn, service_ms=2000, lag_ms=60) for turn in range(3)]
    assert checked(run(tmp_path / "quick", quick))["because"] == [
        "schedule_lag.p99 is 60.0 ms, expected at most 50.0 ms"
    ]
    assert checked(run(tmp_path / "slow", slow))["valid"] is True


@pytest.mark.parametrize(
    ("options", "waited_s", "valid"),
    [
        ({"max_rate": [[None, 5]]}, 1.0, True),
        ({"max_rate": [[None, 5]]}, 0.001, False),
        ({"max_rate": [[None, 5]]}, 0.009, False),
        ({}, 1.0, False),
        ({"arrivals": "poisson:1/s", "sessions": 4}, 0.0, True),
        ({"arrivals": "poisson:1/s", "sessions": None}, 0.0, False),
    ],
)
def test_a_lag_that_was_asked_for_is_not_judged(
    tmp_path: Path, options: dict[str, Any], waited_s: float, valid: bool
) -> None:
    """60 ms late is a fault of the client, unless a call waited longer than that for a cap, or sessions for a place."""
    client = {"wall_s": 1.0, "cpu_s": 0.1, "loop_lag_p99_s": 0.0, "loop_lag_max_s": 0.0, "cap_wait_max_s": waited_s}
    late = [outcome(turn, service_ms=100, lag_ms=60) for turn in range(3)]
    assert checked(run(tmp_path, late, options=options, client=[client]))["valid"] is valid


def test_a_run_that_answered_nothing_is_not_valid_and_has_no_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All calls skipped: the report is printed all the same, says why, and tells no rate."""
    nothing = dict.fromkeys(
        ("sent_ns", "first_token_ns", "done_ns", "prompt", "cache_read", "cache_write_5m", "output")
    )
    run(tmp_path, [outcome(turn, error="skipped", status=None, **nothing) for turn in range(2)])
    code, out, _ = keepwarm(capsys, "report", str(tmp_path), "--json")
    told = orjson.loads(out)
    assert (code, told["valid"], told["hit_rate"], told["latency"]["latency"]) == (0, False, None, None)
    assert "not valid, because coverage is 0.00 %" in keepwarm(capsys, "report", str(tmp_path))[1]


def test_json_is_all_that_is_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run is an object with figures at the top and by group, several are an array; latency.hlog lies in the run."""
    run(tmp_path, [outcome(turn) for turn in range(3)])
    code, out, err = keepwarm(capsys, "report", str(tmp_path), "--json")
    told = orjson.loads(out)
    assert (code, err) == (0, "")
    assert (told["calls"], told["hit_rate"], told["cache_write_1h"]) == (3, 0.8, None)
    assert told["by_role"]["main"]["warm_hit_rate"] == 0.8
    assert told["recorded"]["recorded_warm_hit_rate"] == 0.9
    assert (tmp_path / "latency.hlog").exists()
    assert len(orjson.loads(keepwarm(capsys, "report", str(tmp_path), str(tmp_path), "--json")[1])) == 2


def test_the_report_fits_a_terminal_and_names_what_was_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 100 columns, no escape codes off a terminal, the first lines say what, how valid, and how imported."""
    trace = {"name": "t.parquet", "prefix_breaks": "blind"}
    run(tmp_path, [outcome(turn) for turn in range(3)], trace=trace, endpoint={"name": "simulated"})
    _, out, _ = keepwarm(capsys, "report", str(tmp_path), "--by", "flow", "--by", "gap")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in out
    assert lines[0] == f"run {tmp_path}"
    assert lines[1] == "3 calls, 1 sessions; replay of t.parquet on simulated"
    assert lines[2:4] == ["valid", "blind: no prefix was cut by what the recording read"]
    assert "warm_hit_rate              80.00 %" in out
    assert "of 2,000 in 2 calls with turn > 0" in out
    assert "By flow" in out
    assert "By role" not in out


def test_an_informed_run_is_never_called_a_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report says how many prefixes were cut to what was read."""
    calls = [outcome(0), outcome(1, call={"prefix_change": "recorded_break"}), outcome(2)]
    run(tmp_path, calls, trace={"prefix_breaks": "recorded"})
    said = "informed: 1 calls' prefixes cut to what was read (prefix_change = recorded_break), not a prediction"
    assert said in keepwarm(capsys, "report", str(tmp_path))[1]


def test_compressed_time_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against an endpoint with a clock of its own; where its clock was driven, its speed is told instead."""
    fast = {"options": {"speed": 20.0, "gap_cap_s": None}}
    run(tmp_path, [outcome(0)], endpoint={"clock_driven": False, "has_ttl": True}, **fast)
    assert "time compressed: TTL effects not measured" in keepwarm(capsys, "report", str(tmp_path))[1]
    run(tmp_path, [outcome(0)], endpoint={"clock_driven": True, "has_ttl": True}, **fast)
    out = keepwarm(capsys, "report", str(tmp_path))[1]
    assert "time compressed" not in out
    assert "clock ran 20 times as fast" in out


def test_a_loss_on_a_driven_clock_is_the_ttls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wait of 9.9 s at speed 60 is 594 s to the endpoint: past its 300 s."""
    later = outcome(1, call={"keep": 1000, "append": ()}, cache_read=100)
    about = {"options": {"speed": 60.0}, "endpoint": {"clock_driven": True, "has_ttl": True}}
    run(tmp_path, [outcome(0, write_ttl_s=300), later], **about)
    losses = orjson.loads(keepwarm(capsys, "report", str(tmp_path), "--json")[1])["losses"]
    assert [(row["cause"], row["tokens_lost"]) for row in losses] == [("ttl", 900)]


@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_a_run_without_a_good_run_json_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    """Missing, damaged or no object: the line names the file, the exit code is 2."""
    run(tmp_path, [outcome(0)])
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    code, out, err = keepwarm(capsys, "report", str(tmp_path))
    assert (code, out) == (2, "")
    assert f"{tmp_path}/run.json" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"planned_calls": "many"}, "field 'planned_calls' is 'many', expected a whole number"),
        ({"planned_calls": True}, "field 'planned_calls' is True, expected a whole number"),
        ({"options": {"speed": "fast"}}, "field 'options.speed' is 'fast', expected a number"),
        ({"options": 5}, "field 'options' is 5, expected a JSON object"),
        ({"endpoint": "x"}, "field 'endpoint' is 'x', expected a JSON object"),
        ({"endpoint": {"has_ttl": "no"}}, "field 'endpoint.has_ttl' is 'no', expected true or false"),
        ({"trace": 3}, "field 'trace' is 3, expected a JSON object"),
        ({"clock": 7}, "field 'clock' is 7, expected a JSON object"),
        ({"mode": [1]}, "field 'mode' is [1], expected text"),
        ({"format": 2}, "format 2 is newer than this program reads (1): upgrade keepwarm"),
    ],
)
def test_a_run_json_of_another_shape_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], about: dict[str, Any], said: str
) -> None:
    """The line names the file, the field and what was expected there."""
    run(tmp_path, [outcome(0)])
    (tmp_path / "run.json").write_bytes(orjson.dumps({"planned_calls": 1, "interrupted": False, **about}))
    code, out, err = keepwarm(capsys, "report", str(tmp_path))
    assert (code, out, err) == (2, "", f"keepwarm: {tmp_path}/run.json: {said}\n")


@pytest.mark.parametrize("failed", [False, True])
def test_more_outcomes_than_were_planned_are_not_valid(tmp_path: Path, failed: bool) -> None:
    """Three rows of two planned calls: coverage above 100 %, whether or not all three were answered."""
    last = {"error": "timeout", "status": None} if failed else {}
    found = checked(run(tmp_path, [outcome(0), outcome(1), outcome(2, **last)], planned_calls=2))
    assert found["because"][0] == "coverage is 150.00 %: there are more outcomes than planned_calls in run.json"
    assert found["valid"] is False


def test_failed_and_skipped_calls_are_counted_by_what_went_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two refusals, a timeout and a skipped call; the one that Ctrl-C cut off is neither, and no answer either."""
    lost = [{"error": "overloaded", "status": 529}] * 2
    lost += [{"error": name, "status": None} for name in ("timeout", "skipped", "interrupted")]
    loaded = run(tmp_path, [outcome(turn, **fields) for turn, fields in enumerate([{}] * 5 + lost)], interrupted=True)
    _, out, _ = keepwarm(capsys, "report", str(tmp_path), "--json")
    assert orjson.loads(out)["failures"] == [
        {"error": "overloaded", "status": 529, "calls": 2},
        {"error": "skipped", "status": None, "calls": 1},
        {"error": "timeout", "status": None, "calls": 1},
    ]
    values = {name: check["value"] for name, check in checked(loaded)["checks"].items()}
    assert (values["coverage"], values["failed_calls"]) == (0.5, 0.3)
    assert (values["skipped_calls"], values["interrupted_calls"]) == (0.1, 0.1)
    words = " ".join(keepwarm(capsys, "report", str(tmp_path))[1].split())
    assert "Failures error status calls overloaded 529 2 skipped - 1 timeout - 1" in words


def test_a_run_without_failures_has_no_such_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing failed: an empty list, and no word of it."""
    run(tmp_path, [outcome(0)])
    assert orjson.loads(keepwarm(capsys, "report", str(tmp_path), "--json")[1])["failures"] == []
    assert "Failures" not in keepwarm(capsys, "report", str(tmp_path))[1]


LONG = "a-model-with-a-name-of-more-than-sixty-characters-as-gateways-make-them"


def test_no_table_is_cut_where_it_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A long model id makes the table wider: name and figures stand whole on one line."""
    run(tmp_path, [outcome(turn, call={"model": LONG}) for turn in range(3)])
    _, out, _ = keepwarm(capsys, "report", str(tmp_path), "--by", "model")
    (row,) = [line for line in out.splitlines() if line.startswith(LONG)]
    assert " ".join(row.split()) == f"{LONG} 1 1 3 3,000 80.00 % 80.00 % 4.0x 50.0 ms 50.0 ms"
    assert "…" not in out


@pytest.mark.parametrize("width", [100, 60, 20])
def test_a_terminal_breaks_words_and_hides_no_figure(width: int) -> None:
    """However narrow: the name goes over several lines, and every figure is there whole."""
    out = Console(file=StringIO(), force_terminal=True, color_system=None, width=width)
    figures = ("1,234,567", "98.76 %", "26.6x", "12.34 s", "99.9 ms", "1,234", "5,678,901")
    table(out, "By model", ("model", *"abcdefg"), [(LONG, *figures)])
    said = out.file.getvalue()  # type: ignore[attr-defined]
    assert all(figure in said for figure in figures)
    assert "".join(line.split("  ")[0] for line in said.splitlines()[3:]) == LONG
    assert "…" not in said
    assert out.width == width


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """A main agent of three calls that starts two sub-agents at work at the same time."""
    used = {"tools": (ToolUse("Read"), ToolUse("Bash"))}
    human = {"gap_ns": 30 * SECOND, "gap_kind": "human"}
    path = tmp_path / "t.parquet"
    sub = {"role": "subagent", "agent_type": "explore"}
    rows = [
        call("a", 0, **used),
        call("x", 0, agent="x", start_ns=2 * SECOND, end_ns=9 * SECOND, **sub),
        call("y", 0, agent="y", start_ns=8 * SECOND, end_ns=9 * SECOND, **sub),
        call("b", 1, prompt=1500, uncached=500, gap_ns=10 * SECOND, gap_kind="tool", tools=(ToolUse("Read"),)),
        call("c", 2, prompt=1200, uncached=200, **human),
    ]
    with TraceWriter(str(path), producer="tests", version="0", tokens="reported") as writer:
        for row in rows:
            writer.add(row)
    return str(path)


def test_what_is_in_a_trace(trace: str) -> None:
    """Fan-out, growth, gaps and tools, worked out by hand."""
    found = inspect_summary(trace)
    assert (found["sessions"], found["agents"], found["subagents"], found["calls"]) == (1, 3, 2, 5)
    assert found["fan_out"]["sessions_by_subagents"] == {"2": 1}
    assert (found["fan_out"]["most_at_once"], found["span_s"]) == (2, 21.0)
    assert (found["growth"]["added_a_call"]["p50"], found["growth"]["added_a_call"]["max"]) == (-300, 500)
    assert found["growth"]["shrinking_calls"] == 1
    assert found["growth"]["first_prompt_p50"] == {"main": 1000, "subagent": 1000}
    assert found["gaps"]["human"] == {"count": 1, "p50": 30, "p90": 30, "p99": 30, "max": 30, "share_of_time": 0.75}
    assert found["tools"]["by_name"] == {"Read": 2, "Bash": 1}
    assert found["tools"]["uses_a_call"] == 1.5
    assert orjson.loads(orjson.dumps(found))["by_agent_type"]["explore"]["agents"] == 2


def test_a_trace_is_shown_in_a_terminal(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same content as tables of at most 100 columns."""
    render_inspect(inspect_summary(trace))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "1 have 2; at most 2 at once" in out
    assert "p50 -300, p90 500, p99 500" in out


def test_a_recording_can_be_reported(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace reads as the run it was; nothing is written beside it, and it has no ttft it never recorded."""
    code, out, _ = keepwarm(capsys, "report", trace, "--json")
    told = orjson.loads(out)
    assert (code, told["kind"], told["valid"], told["recorded"]) == (0, "recording", True, None)
    assert (told["latency"]["ttft"], told["latency"]["latency"]["max"]) == (None, 7.0)
    assert [path.name for path in Path(trace).parent.iterdir()] == ["t.parquet"]


def test_a_recording_whose_tokens_do_not_add_up_is_not_valid(tmp_path: Path) -> None:
    """Parts that are not the prompt are no account of it."""
    with TraceWriter(str(tmp_path / "t.parquet"), producer="tests", version="0", tokens="reported") as writer:
        writer.add(call("a", uncached=7))
    assert checked(load(str(tmp_path / "t.parquet")))["because"] == [
        "tokens_add_up is 0.00 %, expected at least 99.00 %"
    ]


def test_an_empty_run_is_reported_and_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No planned call at all: nothing was measured, and nothing is good."""
    run(tmp_path, [], planned_calls=0, interrupted=None)
    code, out, _ = keepwarm(capsys, "report", str(tmp_path), "--json")
    told = orjson.loads(out)
    assert (code, told["valid"], told["calls"], told["hit_rate"]) == (0, False, 0, None)
    assert told["because"][-1] == "run.json does not say if it was interrupted"
    assert "Cache" in keepwarm(capsys, "report", str(tmp_path))[1]


def test_figures_that_are_told_and_not_judged(tmp_path: Path) -> None:
    """Of four calls one is due after the last session started; of two later calls one extends the prompt before it."""
    calls = [outcome(turn, call={"keep": 1000 if turn == 2 else 0, "append": ()}) for turn in (1, 2)]
    first = outcome(0)
    other = outcome(1, call={"call": "z", "session": "z"})._replace(due_ns=15 * SECOND, sent_ns=15 * SECOND)
    found = checked(run(tmp_path, [first, *calls, other]))["checks"]
    assert (found["drain_tail"]["value"], found["drain_tail"]["good"]) == (0.25, None)
    assert (found["prefix_fidelity"]["value"], found["prefix_fidelity"]["good"]) == (0.5, None)
