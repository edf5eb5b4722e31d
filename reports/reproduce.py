"""Reproduce sets published cache-reuse figures beside what a trace or run shows under each named definition."""

from typing import Any

import polars as pl

from keepwarm.reports import metrics
from keepwarm.reports.frame import Loaded, each
from keepwarm.reports.losses import links_of
from keepwarm.reports.validity import validity
from keepwarm.traces.shipped import shipped

REPRODUCED, NOT_REPRODUCED, UNTESTED = "reproduced", "not reproduced", "cannot be tested here"


def chosen(rows: pl.LazyFrame, definition: dict[str, Any]) -> pl.LazyFrame:
    """The rows a definition is about."""
    for column, value in definition.get("where", {}).items():
        rows = rows.filter(pl.col(column).str.to_lowercase() == value)
    least = definition.get("sessions_with_subagents")
    if least is None:
        return rows
    sessions = rows.group_by("session_no").agg(subagents=metrics.AGENTS["subagents"])
    return rows.join(sessions.filter(pl.col("subagents") >= least), on="session_no", how="semi")


def measured(rows: pl.LazyFrame, definition: dict[str, Any]) -> tuple[float | None, int, int]:
    """(figure, calls, sessions) of a definition: the figure, None where nothing is there to measure, and what it is
    over: the calls that report what it needs, and their sessions.
    """
    metric = definition["metric"]
    over, rows = metrics.OVER[metric], chosen(rows, definition)
    if definition.get("over") == "sessions":
        sessions = metrics.alike(rows.with_columns(over=over), "session_no", "over").group_by("session_no")
        calls = {"calls": metrics.CALLS.sum(), "over": metrics.CALLS.filter("over").sum()}
        table = sessions.agg(value=metrics.FIGURES[metric], **calls).drop_nulls("value")
        size = pl.col("calls").is_between(definition.get("calls_least", 0), definition.get("calls_most", 2**62))
        table = table.filter(size)
        return table.select(pl.col("value").median()).item(), int(table["over"].sum()), table.height
    rows = rows.filter(over)
    told = metrics.of(rows)
    figure = each(rows, metrics.WHOLE)["warm_hit_range"][metric] if metric == "inside_85_97" else told[metric]
    return figure, told["calls"], told["sessions"]


def band(metric: str, low: float, high: float) -> str:
    """What a figure must lie in to be reproduced, in words."""
    return f"{low:g}x-{high:g}x" if metric == "read_write_ratio" else f"{100 * low:g}-{100 * high:g} %"


def verdict(value: float | None, low: float, high: float) -> str:
    """Reproduced where the figure lies between low and high; a figure that was not measured cannot be tested."""
    if value is None:
        return UNTESTED
    return REPRODUCED if low <= value <= high else NOT_REPRODUCED


def contradiction(claims: dict[str, Any]) -> str:
    """Why the two headline figures cannot be one measurement: nothing uncached, hit rate h means h / (1 - h) read to
    written; any uncached token only widens the distance.
    """
    hit, ratio = claims["aggregate_hit_rate"], claims["read_tokens"] / claims["written_tokens"]
    return (
        f"{100 * hit:.1f} % and {ratio:.1f}x cannot be one measurement: of all prompt tokens, {100 * hit:.1f} % read "
        f"needs at least {hit / (1 - hit):.1f}x read to written, and {ratio:.1f}x means at most "
        f"{100 * ratio / (1 + ratio):.1f} % read."
    )


def reproduce(loaded: Loaded) -> dict[str, Any]:
    """Every published claim under each of its definitions: figure, what it was measured over, and the verdict."""
    claims = shipped("keepwarm.reports", "published.toml")
    figures, standing = metrics.of(loaded.scan), validity(loaded, links_of(loaded))
    results = []
    for claim in claims["claim"]:
        for definition in claim["definition"]:
            low, high = definition.get("low", claim["low"]), definition.get("high", claim["high"])
            value, calls, sessions = measured(loaded.scan, definition)
            row = {"claim": claim["name"], "definition": definition["name"], "metric": definition["metric"]}
            row |= {"measured": value, "calls": calls, "sessions": sessions, "low": low, "high": high}
            results.append(row | {"verdict": verdict(value, low, high)})
    return {
        "name": loaded.name,
        "path": loaded.path,
        "kind": loaded.kind,
        **{key: standing[key] for key in ("valid", "because", "notes")},
        **{key: figures[key] for key in ("sessions", "calls", "subagents")},
        "source": claims["source"],
        "results": results,
        "contradiction": contradiction(claims),
    }
