"""Prefix losses and their causes; a run's reads beside the recorded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from keepwarm.reports.frame import load
from keepwarm.reports.losses import compare_recorded, links_of, table
from keepwarm.traces.model import Call, Outcome, Segment
from keepwarm.traces.store import write_outcomes

SECOND = 1_000_000_000


def lost(tmp_path: Path, read: int = 100, gap_s: float = 1.0, ttl_s: int | None = 300, **fields: Any) -> dict[str, Any]:
    """The one loss of an agent whose first call of 1,000 tokens is followed by one of 1,200 that read so much."""
    prompt = fields.pop("prompt", 1200)
    keep = fields.pop("keep", min(prompt, 1000))
    about = fields.pop("about", {})
    measured = {"write_source": "reported", "status": 200}
    first = Outcome(
        call("a", 0, keep=0, prompt=1000),
        due_ns=0,
        sent_ns=0,
        done_ns=SECOND,
        prompt=1000,
        cache_read=0,
        uncached=0,
        cache_write_5m=1000,
        write_ttl_s=ttl_s,
        **measured,
    )
    sent = SECOND + int(gap_s * SECOND)
    second = Outcome(
        call("b", 1, keep=keep, prompt=prompt, **fields),
        due_ns=sent,
        sent_ns=sent,
        done_ns=sent + SECOND,
        prompt=prompt,
        cache_read=read,
        uncached=0,
        cache_write_5m=prompt - read,
        **measured,
    )
    tmp_path.mkdir(exist_ok=True)
    write_outcomes(str(tmp_path / "outcomes.parquet"), [first, second])
    (tmp_path / "run.json").write_bytes(orjson.dumps(about))
    loaded = load(str(tmp_path))
    rows = table(loaded, links_of(loaded))
    assert len(rows) <= 1
    return rows[0] if rows else {}


def call(name: str, turn: int, *, keep: int, prompt: int, **fields: Any) -> Call:
    """A call of one agent."""
    usage = {"usage_source": "reported", "write_source": "reported", "origin": "synthetic"}
    times = {"start_ns": turn * 10 * SECOND, "end_ns": turn * 10 * SECOND + SECOND}
    rest = (Segment(turn, prompt - keep, "user"),)
    return Call("s", "m", name, "main", turn, keep=keep, append=rest, **{**usage, **times, "model": "a", **fields})


def test_reading_half_of_the_previous_prompt_is_no_loss(tmp_path: Path) -> None:
    """Of 1,000 tokens, 500 read are no loss and 499 are."""
    assert lost(tmp_path, read=500) == {}
    assert lost(tmp_path, read=499)["calls"] == 1


def test_what_a_loss_costs(tmp_path: Path) -> None:
    """900 of 1,000 tokens lost; the call wrote 1,100 of 2,100; the warm prompts were 1,200 tokens, so 75 points."""
    row = lost(tmp_path, read=100)
    assert row["tokens_lost"] == 900
    assert row["share_of_written"] == pytest.approx(1100 / 2100)
    assert row["points_of_warm_hit_rate"] == pytest.approx(75.0)


def test_what_a_prompt_shed_costs_no_points(tmp_path: Path) -> None:
    """Of 1,000 tokens 600 are still asked for: 900 are lost, but only 500 of the 600 could have been read."""
    row = lost(tmp_path, read=100, prompt=600, prefix_change="compaction")
    assert (row["tokens_lost"], row["points_of_warm_hit_rate"]) == (900, pytest.approx(100 * 500 / 600))


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"model": "b", "prefix_change": "compaction", "gap_s": 301}, "model_switch"),
        ({"prefix_change": "model_switch"}, "model_switch"),
        ({"prefix_change": "compaction", "keep": 10, "gap_s": 301}, "compaction"),
        ({"prefix_change": "microcompaction"}, "compaction"),
        ({"prefix_change": "recorded_break", "keep": 100}, "prompt_changed"),
        ({"keep": 999, "gap_s": 301}, "prompt_changed"),
        ({"gap_s": 300.1}, "ttl"),
        ({"gap_s": 299.9}, "unknown"),
        ({"gap_s": 3000, "ttl_s": 3600}, "unknown"),
        ({"gap_s": 10**6, "ttl_s": None}, "unknown"),
    ],
)
def test_a_loss_has_the_first_cause_that_holds(tmp_path: Path, fields: dict[str, Any], cause: str) -> None:
    """Model switch before compaction before a changed prompt before the TTL, which runs from the last answer's end."""
    assert lost(tmp_path, **fields)["cause"] == cause


def test_idle_time_is_the_endpoints_own_where_its_clock_was_driven(tmp_path: Path) -> None:
    """At speed 20 a wait of 16 s is 320 s to an endpoint on that clock, and 16 s to any other."""
    driven = {"options": {"speed": 20.0}, "endpoint": {"clock_driven": True}}
    assert lost(tmp_path / "driven", gap_s=16, about=driven)["cause"] == "ttl"
    other = {"options": {"speed": 20.0}, "endpoint": {"clock_driven": False}}
    assert lost(tmp_path / "other", gap_s=16, about=other)["cause"] == "unknown"


def test_a_recordings_own_reason_comes_first_and_is_not_held_against_a_run(tmp_path: Path) -> None:
    """What the provider said of the recorded call explains the recording, not what a run's endpoint did."""
    row = lost(tmp_path, miss_reason="tools_changed", gap_s=301)
    assert row["cause"] == "ttl"
    recording = load(str(tmp_path))._replace(kind="recording")
    assert table(recording, links_of(recording))[0]["cause"] == "provider: tools_changed"


def test_the_ttl_is_that_of_the_latest_write(tmp_path: Path) -> None:
    """A call that wrote nothing leaves the TTL as the write before it set it."""
    write_outcomes(
        str(tmp_path / "outcomes.parquet"),
        [
            Outcome(
                call(name, turn, keep=999 + turn if turn else 0, prompt=1000 + turn),
                due_ns=at * SECOND,
                sent_ns=at * SECOND,
                done_ns=at * SECOND,
                prompt=1000 + turn,
                cache_read=read,
                write_ttl_s=ttl,
            )
            for turn, (name, at, read, ttl) in enumerate([("a", 0, 0, 300), ("b", 200, 1000, None), ("c", 501, 0, 300)])
        ],
    )
    (tmp_path / "run.json").write_bytes(b"{}")
    loaded = load(str(tmp_path))
    assert [row["cause"] for row in table(loaded, links_of(loaded))] == ["ttl"]


def beside(recorded: list[dict[str, Any]], measured: list[int], tmp_path: Path) -> dict[str, Any]:
    """compare_recorded of one agent whose prompts grow by 10,000 tokens a call."""
    outcomes = []
    for turn, (fields, read) in enumerate(zip(recorded, measured, strict=True)):
        size = 10_000 * (turn + 1)
        planned = call(f"c{turn}", turn, keep=size - 10_000, prompt=size)
        planned = planned._replace(prompt=size, uncached=0, cache_write_5m=size - fields["cache_read"], **fields)
        outcomes.append(Outcome(planned, due_ns=0, sent_ns=0, done_ns=0, prompt=size, cache_read=read))
    write_outcomes(str(tmp_path / "outcomes.parquet"), outcomes)
    (tmp_path / "run.json").write_bytes(b"{}")
    found = compare_recorded(load(str(tmp_path)).scan)
    assert found is not None
    return found


def test_a_run_is_set_beside_its_recording(tmp_path: Path) -> None:
    """Of 90,000 warm prompt tokens the run read 60,000, the recording 48,490; what lies between is explained."""
    recorded = [
        {"cache_read": 5_000},
        {"cache_read": 9_990},
        {"cache_read": 8_000, "gap_kind": "human"},
        {"cache_read": 30_500},
    ]
    found = beside(recorded, [0, 10_000, 20_000, 30_000], tmp_path)
    assert (found["calls"], found["warm_calls"]) == (4, 3)
    assert found["warm_hit_rate"] == pytest.approx(60_000 / 90_000)
    assert found["recorded_warm_hit_rate"] == pytest.approx(48_490 / 90_000)
    assert found["difference_points"] == pytest.approx(100 * 11_510 / 90_000)
    assert found["warm_calls_within_32_tokens"] == pytest.approx(1 / 3)
    assert found["sessions"]["within_2"] == 0.0
    assert found["sessions"]["max"] == pytest.approx(100 * 11_510 / 90_000)
    explained = {row["cause"]: (row["calls"], row["tokens"], row["points"]) for row in found["explained"]}
    assert explained == {
        "fell inside its TTL, no cause in the log, after a human gap": (1, 12_000, pytest.approx(100 * 12 / 90)),
        "first call: warmed by traffic outside the data": (1, -5_000, pytest.approx(-100 * 5 / 100)),
        "read more than its predecessor left: a call outside the data wrote": (1, -500, pytest.approx(-100 / 180)),
        "32 tokens or less": (1, 10, pytest.approx(100 / 9000)),
    }


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"start_ns": 400 * SECOND, "end_ns": 401 * SECOND}, "ttl"),
        ({"prefix_change": "compaction"}, "compaction"),
        ({"model": "b"}, "model_switch"),
        ({"prefix_change": "shrunk"}, "prompt_changed"),
        ({"prefix_change": "recorded_break"}, "prefix cut to what was read (informed)"),
        ({"miss_reason": "system_changed"}, "provider: system_changed"),
        ({"gap_kind": "tool"}, "fell inside its TTL, no cause in the log, after a tool gap"),
    ],
)
def test_what_the_recording_shows_of_a_fall(tmp_path: Path, fields: dict[str, Any], cause: str) -> None:
    """A call that read 1,000 of 10,000 in the recording and all of it in the run is explained by what the log shows."""
    found = beside([{"cache_read": 0}, {"cache_read": 1_000, **fields}], [0, 10_000], tmp_path)
    assert [(row["cause"], row["tokens"]) for row in found["explained"]] == [(cause, 9_000)]


def test_the_explanations_add_up_to_the_whole_difference(tmp_path: Path) -> None:
    """Over the warm calls the points of the explanations sum to the difference of the two rates."""
    recorded = [{"cache_read": 0}, {"cache_read": 3_000}, {"cache_read": 21_000}, {"cache_read": 29_999}]
    found = beside(recorded, [0, 10_000, 20_000, 30_000], tmp_path)
    assert sum(row["points"] for row in found["explained"]) == pytest.approx(found["difference_points"])


def test_nothing_is_compared_where_nothing_was_recorded(tmp_path: Path) -> None:
    """A trace without recorded reads has no recording to stand beside."""
    lost(tmp_path)
    assert compare_recorded(load(str(tmp_path)).scan) is None
