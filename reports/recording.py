"""Recording is what a trace holds before anything is replayed: shape, growth, gaps, fan-out, tools."""

from typing import Any

import polars as pl

from keepwarm.reports import metrics
from keepwarm.reports.frame import collect, load_recording
from keepwarm.reports.summary import figures
from keepwarm.traces.store import read_trace_table

TOP_TOOLS = 10


def inspect_summary(path: str) -> dict[str, Any]:
    """What is in a trace and how warm its recording was: the figures of a report that need no replay, JSON-ready."""
    loaded = load_recording(path)
    rows, linked = collect(loaded.scan), collect(metrics.with_previous(loaded.scan))
    return {
        **figures(loaded),
        "breaks": breaks(linked),
        "gaps": gaps(rows),
        "growth": growth(linked),
        "fan_out": fan_out(rows),
        "tools": tools(path),
        "span_s": rows.select((pl.col("done_ns").max() - pl.col("sent_ns").min()) / 1e9).item(),
    }


def breaks(linked: pl.DataFrame) -> list[dict[str, Any]]:
    """Where prompts left their agent's previous one, grouped by the first segment that differs: its kind and how it
    differs, its positions and size (p50); calls, agents, and tokens of the previous prompts that lay behind it, most
    first.
    """
    broken = linked.filter(pl.col("prefix_break").is_not_null()).unnest("prefix_break")
    behind = pl.col("prev_prompt") - pl.min_horizontal("at", "prev_prompt")
    groups = broken.group_by("role", "kind", "change").agg(
        first_position=pl.col("position").min(),
        last_position=pl.col("position").max(),
        tokens=pl.col("tokens").quantile(0.5, "equiprobable").cast(pl.Int64),
        calls=pl.len(),
        agents=pl.col("agent_no").n_unique(),
        tokens_behind=pl.when(behind.count() > 0).then(behind.sum()),
    )
    return groups.sort("tokens_behind", "role", "kind", "change", descending=[True, False, False, False]).to_dicts()


def gaps(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Gaps by kind: how many, p50 p90 p99 max in seconds, and the share of all gap time."""
    kinds = rows.drop_nulls("gap_ns").group_by(kind=pl.col("gap_kind").fill_null("unknown"))
    spread, time = metrics.spread(pl.col("gap_ns"), 50, 90, 99, 100), pl.col("gap_ns").sum()
    found = kinds.agg(count=pl.len(), spread=spread, time=time).sort("count", "kind", descending=[True, False])
    total = rows["gap_ns"].sum()
    return {
        kind: {"count": count, **metrics.in_seconds(each), "share_of_time": spent / total if total else None}
        for kind, count, each, spent in found.iter_rows()
    }


def growth(linked: pl.DataFrame) -> dict[str, Any]:
    """How prompts start and grow, in tokens: added a call over the one before, first prompts by role, the longest."""
    added = pl.col("prompt") - pl.col("prev_prompt")
    first = linked.filter((pl.col("turn") == 0) & pl.col("prompt").is_not_null()).group_by("role")
    medians = first.agg(p50=pl.col("prompt").quantile(0.5, "equiprobable")).sort("role")
    return {
        "added_a_call": linked.select(metrics.spread(added, 50, 90, 99, 100)).item(),
        "shrinking_calls": linked.select((added < 0).sum()).item(),
        "first_prompt_p50": {role: int(p50) for role, p50 in medians.iter_rows()},
        "longest_prompt": linked["prompt"].max(),
    }


def fan_out(rows: pl.DataFrame) -> dict[str, Any]:
    """Sub-agents: how many a session has, how many run at once, and calls a session."""
    sessions = rows.group_by("session_no").agg(calls=pl.len(), subagents=metrics.AGENTS["subagents"])
    peaks = peak_concurrent(rows)
    peak_counts = peaks.group_by("peak").len().sort("peak")
    counts = sessions.group_by("subagents").len().sort("subagents")
    return {
        "calls_a_session": sessions.select(metrics.spread(pl.col("calls"), 50, 90, 99, 100)).item(),
        "sessions_by_subagents": {str(number): count for number, count in counts.iter_rows()},
        "sessions_by_peak_at_once": {str(peak): count for peak, count in peak_counts.iter_rows()},
        "most_at_once": peaks["peak"].max(),
    }


def peak_concurrent(rows: pl.DataFrame) -> pl.DataFrame:
    """The most sub-agents at work at the same moment, session by session (``session_no``, ``peak``)."""
    agents = rows.filter(pl.col("role") == "subagent").group_by("session_no", "agent_no")
    spans = agents.agg(start=pl.col("sent_ns").min(), end=pl.col("done_ns").max())
    ends = (("start", 1), ("end", -1))
    steps = pl.concat([spans.select("session_no", at=end, step=pl.lit(step, pl.Int32)) for end, step in ends])
    running = steps.sort("session_no", "at", "step").with_columns(running=pl.col("step").cum_sum().over("session_no"))
    return running.group_by("session_no").agg(peak=pl.col("running").max())


def tools(path: str) -> dict[str, Any]:
    """Tool uses: how many, how many a call that asked for any, and the most used names."""
    used = pl.DataFrame(read_trace_table(path, ["tools"]))["tools"]
    asking = int((used.list.len() > 0).sum())
    names = used.filter(used.list.len() > 0).explode().struct.field("name").cast(pl.String)
    counts = names.value_counts().sort("count", "name", descending=[True, False])
    return {
        "uses": len(names),
        "calls_with_tools": asking,
        "uses_a_call": len(names) / asking if asking else None,
        "by_name": dict(counts.head(TOP_TOOLS).iter_rows()),
        "names": counts.height,
    }
