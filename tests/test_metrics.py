"""Cache figures: each by its definition, over the calls that report what it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.harness.cli import main
from keepwarm.reports import losses, metrics
from keepwarm.reports.frame import Loaded, collect, load
from keepwarm.reports.prices import cost, load_prices
from keepwarm.reports.requirement import KINDS
from keepwarm.reports.validity import checks_of_recording, checks_of_run
from keepwarm.traces.model import Call, Outcome, Segment
from keepwarm.traces.store import TraceWriter, write_outcomes

SECOND = 1_000_000_000
DOCS = Path(__file__).parents[1] / "docs" / "figures.md"
DATA = Path(__file__).parents[2] / "shared" / "data" / "claude-projects"


def outcome(agent: str, turn: int, prompt: int | None, read: int | None, **fields: Any) -> Outcome:
    """A call of session ``s`` (or ``session``) that read so much and wrote all but one token of the rest."""
    known = prompt is not None and read is not None
    usage = {"uncached": 1, "cache_write_5m": prompt - read - 1} if known else {}
    call = Call(
        session=fields.pop("session", "s"),
        agent=agent,
        call=f"{agent}-{turn}",
        role=fields.pop("role", "main"),
        turn=turn,
        start_ns=turn * 10 * SECOND,
        end_ns=(turn * 10 + 5) * SECOND,
        keep=0,
        usage_source="reported",
        write_source="reported",
        origin="synthetic",
        append=(Segment(1, prompt or 1, "user"),),
        gap_ns=fields.pop("gap_ns", None),
        flow=fields.pop("flow", None),
        model=fields.pop("model", None),
    )
    measured = {
        "due_ns": call.start_ns,
        "sent_ns": call.start_ns,
        "first_token_ns": call.start_ns + SECOND,
        "done_ns": call.end_ns,
        "write_source": "reported" if known else "absent",
        "status": 200,
        "completed": True,
    }
    return Outcome(call, prompt=prompt, cache_read=read, **{**measured, **usage, **fields})


def run(path: Path, outcomes: list[Outcome], **about: Any) -> Loaded:
    """A run of these outcomes, written and read back."""
    path.mkdir(exist_ok=True)
    write_outcomes(str(path / "outcomes.parquet"), outcomes)
    (path / "run.json").write_bytes(orjson.dumps({"planned_calls": len(outcomes), "interrupted": False, **about}))
    return load(str(path))


TWO_AGENTS = [
    outcome("m", 0, 1000, 0),
    outcome("m", 1, 2000, 999),
    outcome("m", 2, 3000, 1999),
    outcome("x", 0, 500, 100, role="subagent"),
    outcome("x", 1, 1000, 499, role="subagent"),
]


def whole(loaded: Loaded) -> dict[str, Any]:
    """The figures of a whole run."""
    return metrics.whole(loaded, losses.links_of(loaded))


def test_rates_are_token_sums_over_token_sums(tmp_path: Path) -> None:
    """Every rate is a sum over a sum: 3,597 of 7,500 read, 3,497 of 6,000 after the first calls, 3,898 written."""
    found = metrics.of(run(tmp_path, TWO_AGENTS).scan)
    assert (found["sessions"], found["agents"], found["subagents"], found["calls"]) == (1, 2, 1, 5)
    assert (found["prompt"], found["uncached"], found["cache_read"], found["cache_write_5m"]) == (7500, 5, 3597, 3898)
    assert found["hit_rate"] == 3597 / 7500
    assert found["warm_hit_rate"] == 3497 / 6000
    assert found["read_write_ratio"] == 3597 / 3898
    assert found["hit_rate_excluding_writes"] == 3597 / 3602
    assert (found["warm_calls"], found["warm_prompt"], found["rate_prompt"]) == (3, 6000, 7500)


def test_figures_of_a_group_are_those_of_its_calls(tmp_path: Path) -> None:
    """By role, the sub-agent's 599 of 1,500 stand apart from the main agent's 2,998 of 6,000."""
    by_role = metrics.grouped(run(tmp_path, TWO_AGENTS).scan)["role"]
    assert by_role["subagent"]["hit_rate"] == 599 / 1500
    assert by_role["subagent"]["warm_hit_rate"] == 499 / 1000
    assert by_role["main"]["hit_rate"] == 2998 / 6000
    assert by_role["main"]["subagents"] == 0


def test_a_call_without_a_cache_report_is_counted_and_in_no_rate(tmp_path: Path) -> None:
    """Missing is not zero: the silent call is counted, and its prompt is no denominator."""
    rows = run(tmp_path, [outcome("m", 0, 1000, 0), outcome("m", 1, 2000, 900), outcome("m", 2, 9999, None)]).scan
    found = metrics.of(rows)
    assert found["calls_without_cache_report"] == 1
    assert (found["hit_rate"], found["warm_hit_rate"]) == (900 / 3000, 900 / 2000)
    assert found["cache_write_1h"] is None
    assert found["output"] is None


def test_nothing_reported_is_null_not_zero(tmp_path: Path) -> None:
    """Where no call reports what it read there is no hit rate and no ratio."""
    found = metrics.of(run(tmp_path, [outcome("m", 0, 100, None), outcome("m", 1, 200, None)]).scan)
    assert found["hit_rate"] is None
    assert found["warm_hit_rate"] is None
    assert found["read_write_ratio"] is None
    assert found["write_source"] == "absent"


def test_inferred_writes_are_what_was_not_read_and_say_so(tmp_path: Path) -> None:
    """An endpoint that reports no writes has prompt - read for them, labelled inferred; with others, mixed."""
    silent = {"write_source": "inferred", "cache_write_5m": None}
    told = metrics.of(run(tmp_path, [outcome("m", 0, 100, 0, **silent), outcome("m", 1, 200, 90, **silent)]).scan)
    assert told["write_source"] == "inferred"
    assert told["written"] == 100 + 110
    assert told["read_write_ratio"] == 90 / 210
    mixed = metrics.of(run(tmp_path, [outcome("m", 0, 100, 0, **silent), outcome("m", 1, 200, 90)]).scan)
    assert mixed["write_source"] == "mixed"
    assert mixed["written"] == 100 + 109


def test_figures_of_a_whole_run(tmp_path: Path) -> None:
    """Mean over agents, spread of warm calls, share of cold writes and retention, worked out by hand."""
    found = whole(run(tmp_path, TWO_AGENTS))
    assert found["hit_rate_macro"] == pytest.approx((2998 / 6000 + 599 / 1500) / 2)
    assert found["warm_hit_range"]["p50"] == 0.4995
    assert (found["warm_hit_range"]["p95"], found["warm_hit_range"]["inside_85_97"]) == (1999 / 3000, 0.0)
    assert found["cold_write_share"] == (999 + 399) / 3898
    assert found["retention"]["of_tokens"] == (999 + 1999 + 499) / (1000 + 2000 + 500)
    assert found["retention"]["calls"] == 3


def test_the_share_of_warm_calls_inside_the_published_range(tmp_path: Path) -> None:
    """85 % and 97 % themselves lie inside; an agent's first call is not looked at."""
    rates = [900, 849, 850, 970, 971]
    calls = [outcome("m", turn, 1000, read) for turn, read in enumerate(rates)]
    assert whole(run(tmp_path, calls))["warm_hit_range"]["inside_85_97"] == 2 / 4


def test_retention_passes_over_a_failed_call(tmp_path: Path) -> None:
    """A call that failed left nothing and took nothing: the next one is held to the prompt before it."""
    failed = outcome("m", 1, None, None, error="overloaded", status=529)
    loaded = run(tmp_path, [outcome("m", 0, 1000, 0), failed, outcome("m", 2, 1500, 400)])
    assert collect(metrics.with_previous(loaded.scan))["retention"].to_list() == [None, None, 0.4]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"m-0": 0, "m-1": 1000}, 1000 / 3000),
        ({"m-0": 0, "m-1": 1000, "m-2": 900}, 1000 / 3000),
        ({"m-1": 1000}, 1000 / 2000),
        ({"m-0": 0, "m-1": 1000, "x-0": 700}, 1000 / 3000),
        ({"m-1": 1000, "x-0": 700}, 1000 / 2000),
    ],
    ids=["of each", "of one that told nothing too", "of one alone", "of another run's too", "of the wrong ones"],
)
def test_a_bound_is_of_the_calls_that_have_it_and_told_what_they_read(
    tmp_path: Path, bounds: dict[str, int], expected: float
) -> None:
    """Whatever other calls the file of bounds has, or lacks: two calls told what they read, a third told nothing."""
    tmp_path.joinpath("run").mkdir()
    columns = {"call": list(bounds), "bound": ["endless"] * len(bounds)}
    numbers = {"copy": pa.array([0] * len(bounds), pa.int32()), "cache_read": pa.array(bounds.values(), pa.int64())}
    pq.write_table(pa.table(columns | numbers), tmp_path / "run" / "bounds.parquet")
    failed = outcome("m", 2, None, None, error="overloaded", status=529)
    found = whole(run(tmp_path / "run", [outcome("m", 0, 1000, 0), outcome("m", 1, 2000, 500), failed]))
    assert found["achievable_hit_rate"] == {"endless": expected}


def test_efficiency_is_the_hit_rate_over_what_was_to_be_had(tmp_path: Path) -> None:
    """Each stored bound gives the rate that could have been reached, over the same calls."""
    tmp_path.joinpath("run").mkdir()
    rows = {"call": ["m-0", "m-1", "m-0", "m-1"], "bound": ["endless", "endless", "ttl", "ttl"]}
    reads = pa.array([0, 1000, 0, 600], pa.int64())
    bounds = pa.table({**rows, "copy": pa.array([0] * 4, pa.int32()), "cache_read": reads})
    pq.write_table(bounds, tmp_path / "run" / "bounds.parquet")
    found = whole(run(tmp_path / "run", [outcome("m", 0, 1000, 0), outcome("m", 1, 2000, 500)]))
    assert found["achievable_hit_rate"] == {"endless": 1000 / 3000, "ttl": 600 / 3000}
    assert found["efficiency"] == {"endless": pytest.approx(0.5), "ttl": pytest.approx(500 / 600)}


def test_turn_drift_sets_late_turns_beside_early_ones(tmp_path: Path) -> None:
    """Turns from 50 take 3 s to their first token, turns 2 to 5 take 2 s: the drift is 1.5."""

    def slow(turn: int, ttft_s: int) -> Outcome:
        return outcome("m", turn, 100, 50, first_token_ns=turn * 10 * SECOND + ttft_s * SECOND)

    calls = [slow(0, 9), *(slow(turn, 2) for turn in range(2, 6)), slow(50, 3), slow(51, 3)]
    assert whole(run(tmp_path, calls))["turn_drift"] == 1.5
    assert whole(run(tmp_path, calls[:5]))["turn_drift"] is None


def test_stretch_is_not_told_where_gaps_were_cut(tmp_path: Path) -> None:
    """The session took 25 s, as recorded; with cut gaps its time says nothing of the recorded session's."""
    calls = [outcome("m", turn, 100, 50) for turn in range(3)]
    plain = whole(run(tmp_path, calls, options={"speed": 1.0, "gap_cap_s": None}))
    assert (plain["task_time"]["max"], plain["stretch"]["p50"]) == (25.0, 1.0)
    cut = whole(run(tmp_path, calls, options={"speed": 1.0, "gap_cap_s": 5}))
    assert (cut["task_time"]["max"], cut["stretch"]) == (25.0, None)
    driven = {"options": {"speed": 20.0}, "endpoint": {"clock_driven": True}}
    assert whole(run(tmp_path, calls, **driven))["stretch"]["p50"] == 20.0


def test_turn_and_gap_buckets(tmp_path: Path) -> None:
    """Buckets stand in their own order, each with its calls; a call without a gap is in ``none``."""
    gaps = [None, 0.5, 1, 59.9, 60, 300, 3600, 4000]
    turns = [0, 1, 2, 5, 6, 20, 49, 50]
    calls = [
        outcome("m", turn, 100, 50, gap_ns=None if gap is None else int(gap * SECOND))
        for turn, gap in zip(turns, gaps, strict=True)
    ]
    rows = run(tmp_path, calls).scan
    by_turn = {name: row["calls"] for name, row in metrics.grouped(rows)["turn"].items()}
    assert list(by_turn.items()) == [("0", 1), ("1", 1), ("2-5", 2), ("6-19", 1), ("20-49", 2), ("50+", 1)]
    by_gap = {name: row["calls"] for name, row in metrics.grouped(rows)["gap"].items()}
    assert list(by_gap.items()) == [
        *[("<1s", 1), ("1-10s", 1), ("10-60s", 1), ("1-5m", 1), ("5-60m", 1), (">1h", 2), ("none", 1)]
    ]


def test_the_same_agent_in_two_copies_is_two_agents(tmp_path: Path) -> None:
    """A repeated trace has each session once a copy; no prefix is carried from one copy to the next."""
    calls = [outcome("m", turn, 1000, 100 * turn, copy=copy) for copy in (0, 1) for turn in (0, 1)]
    loaded = run(tmp_path, calls)
    found = metrics.of(loaded.scan)
    assert (found["sessions"], found["agents"]) == (2, 2)
    assert collect(metrics.with_previous(loaded.scan))["retention"].to_list() == [None, 0.1, None, 0.1]


USAGE = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
CALLS = st.lists(
    st.tuples(st.sampled_from(["main", "subagent"]), st.integers(0, 60), st.one_of(st.none(), USAGE)),
    min_size=1,
    max_size=25,
    unique_by=lambda item: item[:2],
)


@settings(max_examples=60, deadline=None)
@given(calls=CALLS)
def test_rates_agree_with_plain_sums(tmp_path_factory: pytest.TempPathFactory, calls: list[Any]) -> None:
    """Over any calls, silent ones among them, the rates are what a loop over them gives, whole and by role."""
    outcomes = []
    for role, turn, usage in calls:
        read, written, rest = usage or (None, None, None)
        prompt = None if usage is None else sum(usage)
        outcomes.append(
            outcome(role, turn, prompt, read, role=role)._replace(cache_write_5m=written, uncached=rest),
        )
    rows = run(tmp_path_factory.mktemp("run"), outcomes).scan
    by_role = metrics.grouped(rows)["role"]
    for name, found in (("all", metrics.of(rows)), *by_role.items()):
        told = [(turn, usage) for role, turn, usage in calls if usage and name in ("all", role)]
        warm = [usage for turn, usage in told if turn > 0]
        read, written = sum(u[0] for _, u in told), sum(u[1] for _, u in told)
        prompt, warm_prompt = sum(sum(u) for _, u in told), sum(map(sum, warm))
        assert found["hit_rate"] == (pytest.approx(read / prompt) if prompt else None)
        assert found["warm_hit_rate"] == (pytest.approx(sum(u[0] for u in warm) / warm_prompt) if warm_prompt else None)
        assert found["read_write_ratio"] == (pytest.approx(read / written) if written else None)


def test_a_recording_reads_as_its_own_outcome(tmp_path: Path) -> None:
    """A trace's rows have due = sent = start since the trace's origin, and the recorded usage as the measured one."""
    first = outcome("m", 0, 1000, 0).call._replace(session_start_ns=7 * SECOND, prompt=1000, cache_read=400)
    second = first._replace(call="m-1", turn=1, start_ns=10 * SECOND, end_ns=12 * SECOND, cache_write_1h=600)
    with TraceWriter(str(tmp_path / "t.parquet"), producer="tests", version="0", tokens="exact") as writer:
        writer.add(first)
        writer.add(second)
    rows = collect(load(str(tmp_path / "t.parquet")).scan)
    assert rows["due_ns"].to_list() == rows["sent_ns"].to_list() == [7 * SECOND, 17 * SECOND]
    assert rows["done_ns"].to_list() == [12 * SECOND, 19 * SECOND]
    assert rows["cache_read"].to_list() == rows["rec_cache_read"].to_list() == [400, 400]
    assert rows["write_ttl_s"].to_list() == [None, 3600]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the sample of real sessions is not here")
def test_real_sessions_have_the_rates_two_other_programs_found(tmp_path: Path) -> None:
    """3,760 real calls: 96.19 / 96.70 / 25.4 over all, 96.52 / 96.92 / 27.9 main, 91.58 / 93.56 / 11.0 sub-agents."""
    with pytest.raises(SystemExit) as stop:
        main(["import", "claude-code", str(DATA), "-o", str(tmp_path / "t.parquet")])
    assert not stop.value.code
    rows = load(str(tmp_path / "t.parquet")).scan
    found = {"all": metrics.of(rows), **metrics.grouped(rows)["role"]}
    assert (found["all"]["sessions"], found["all"]["calls"], found["all"]["subagents"]) == (63, 3760, 28)
    expected = {"all": (96.19, 96.70, 25.4), "main": (96.52, 96.92, 27.9), "subagent": (91.58, 93.56, 11.0)}
    for name, (hit, warm, ratio) in expected.items():
        assert 100 * found[name]["hit_rate"] == pytest.approx(hit, abs=0.005)
        assert 100 * found[name]["warm_hit_rate"] == pytest.approx(warm, abs=0.005)
        assert found[name]["read_write_ratio"] == pytest.approx(ratio, abs=0.05)


def test_docs_name_every_figure_check_and_cause(tmp_path: Path) -> None:
    """docs/figures.md has in code font every figure, requirement, check and cause of a loss."""
    loaded = run(tmp_path / "r", TWO_AGENTS)
    links = losses.links_of(loaded)
    checks = [*checks_of_run(loaded, links), *checks_of_recording(loaded.scan)]
    names = {
        *metrics.AGENTS,
        *metrics.FIGURES,
        *whole(loaded),
        *(check["check"] for check in checks),
        *("model_switch", "compaction", "prompt_changed", "ttl", "unknown"),
        *KINDS,
    }
    names |= {*cost(loaded, load_prices())} - {"prices_date", "prices_source"}
    told = set(re.findall(r"`([^`]+)`", DOCS.read_text()))
    assert names - told == set()
    assert len(names) > 60
