"""Latency is how long calls took from the moment they were due; service time is from the moment they were sent.

Percentiles are exact and nearest-rank: each is a time that was measured, the smallest that at least that share of calls
did not exceed. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import polars as pl
from hdrh.histogram import HdrHistogram

from keepwarm.reports.frame import GAP_NAMES, TURN_NAMES, Loaded
from keepwarm.reports.metrics import GROUPS
from keepwarm.traces.errors import InputError
from keepwarm.traces.place import first_line, locate

PERCENTS = (50.0, 90.0, 99.0, 99.9)
ENDED = pl.col("error").is_null()
TIMES = {
    "ttft": pl.col("first_token_ns") - pl.col("due_ns"),
    "latency": pl.col("done_ns") - pl.col("due_ns"),
    "service_ttft": pl.col("first_token_ns") - pl.col("sent_ns"),
    "service_time": pl.col("done_ns") - pl.col("sent_ns"),
}
"""Name to nanoseconds of each time a call has; failed calls have none."""

NAMES = (*TIMES, "itl")
LONGEST_US = 2**40


def times(rows: pl.DataFrame, name: str, *keys: str) -> pl.DataFrame:
    """Every measured value of a time as column ``ns``, with the named columns beside it."""
    rows = rows.filter(ENDED)
    if name == "itl":
        between = pl.col("token_ns").list.diff(null_behavior="drop").alias("ns")
        return rows.filter(pl.col("token_ns").list.len() > 1).select(*keys, between).explode("ns")
    return rows.select(*keys, TIMES[name].alias("ns")).drop_nulls("ns")


def percentile(percent: float) -> pl.Expr:
    """The nearest-rank percentile of column ``ns``, in seconds."""
    return pl.col("ns").quantile(percent / 100, "equiprobable") / 1e9


STATISTICS = {
    **{f"p{percent:g}": percentile(percent) for percent in PERCENTS},
    "max": pl.col("ns").max() / 1e9,
    "calls": pl.len(),
}


def of(rows: pl.DataFrame) -> dict[str, Any]:
    """For each time: p50 p90 p99 p99.9 max in seconds and how many values; None where it was not measured."""
    found = {name: times(rows, name).select(**STATISTICS).row(0, named=True) for name in NAMES}
    return {name: row if row["calls"] else None for name, row in found.items()}


def by(rows: pl.DataFrame, group: str) -> dict[str, dict[str, Any]]:
    """The same as ``of``, by the values of a group."""
    key = pl.col(GROUPS[group]).fill_null("unknown")
    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        table = times(rows.with_columns(key.alias("_key")), name, "_key").group_by("_key").agg(**STATISTICS)
        for row in table.sort("_key").to_dicts():
            found.setdefault(row.pop("_key"), dict.fromkeys(NAMES))[name] = row
    order = {"turn": TURN_NAMES, "gap": GAP_NAMES}.get(group, found)
    return {value: found[value] for value in order if value in found}


def counted(values: pl.DataFrame) -> Iterator[tuple[int, int]]:
    """Column ``ns`` as (microseconds, how many), rounded down to the histogram's own three significant digits."""
    us = (pl.col("ns") // 1000).clip(1, LONGEST_US)
    shift = (us.log(2).floor() - 10).clip(0).cast(pl.Int64)
    step = pl.lit(2, pl.Int64).pow(shift).cast(pl.Int64)
    yield from values.group_by((us // step * step).alias("us")).len().sort("us").iter_rows()


def hlog_lines(loaded: Loaded) -> Iterator[str]:
    """The lines of an HdrHistogram V2 log: one interval, the whole run; one tag a flow and time; microseconds.

    Interval_Max is in milliseconds, as other tools print it.
    """
    rows = loaded.rows.with_columns(pl.col("flow").fill_null("unknown"))
    span = rows.select((pl.col("done_ns").max() - pl.col("due_ns").min()) / 1e9).item() or 0.0
    start = _started(loaded)
    yield "#[Histogram log format version 1.2]"
    yield f"#[StartTime: {start.timestamp():.3f} (seconds since epoch), {start.isoformat()}]"
    yield '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"'
    for name in NAMES:
        for (flow,), values in sorted(times(rows, name, "flow").group_by("flow"), key=lambda item: str(item[0])):
            histogram = HdrHistogram(1, LONGEST_US, 3)
            for us, count in counted(values):
                histogram.record_value(us, count)
            longest = values.select(pl.col("ns").max() / 1e6).item()
            yield f"Tag={flow}.{name},0.000,{span:.3f},{longest:.3f},{histogram.encode().decode()}"


def _started(loaded: Loaded) -> datetime:
    told = loaded.told("clock").get("anchor") or loaded.about.get("started")
    try:
        moment = datetime.fromisoformat(str(told))
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def write_hlog(loaded: Loaded) -> str:
    """Write ``latency.hlog`` into the run's directory; its path. InputError where it cannot be written."""
    path = f"{loaded.path}/latency.hlog"
    text = "".join(line + "\n" for line in hlog_lines(loaded))
    system, inner = locate(path)
    try:
        with system.open_output_stream(inner) as sink:
            sink.write(text.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {first_line(error)}") from error
    return path
