"""Latency is how long calls took from the moment they were due; service time is from the moment they were sent.

Percentiles are exact and nearest-rank: each is a time that was measured, the smallest that at least that share of calls
did not exceed. Times are seconds.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any, NamedTuple

import polars as pl
from hdrh.histogram import HdrHistogram

from keepwarm.reports.frame import Loaded, collect
from keepwarm.reports.metrics import CELL, GROUPS, ORDERED, TIMES, VALUES
from keepwarm.traces.errors import InputError
from keepwarm.traces.place import first_line, locate

PERCENTS = (50.0, 90.0, 99.0, 99.9)
ENDED = pl.col("error").is_null()
NAMES = (*TIMES, "itl")
LONGEST_US = 2**40
MASKS = pl.lit(pl.Series([-(2 ** max(53 - zeros, 0)) for zeros in range(65)]))
"""What is kept of a number with so many leading zeros: its first eleven digits."""
STEPS = 10**8


def times(rows: pl.LazyFrame, name: str, **beside: pl.Expr) -> pl.LazyFrame:
    """Every measured value of a time as column ``ns``, with what is asked for beside it."""
    ended = rows.filter(ENDED)
    if name != "itl":
        return ended.select(**beside, ns=TIMES[name]).drop_nulls("ns")
    tokens = ended.select("token_ns", **beside).with_row_index("number").explode("token_ns")
    same = pl.col("number") == pl.col("number").shift(1)
    return tokens.select(*beside, ns=pl.when(same).then(pl.col("token_ns").diff())).drop_nulls("ns")


def ranked(percent: float) -> pl.Expr:
    """The nearest-rank percentile of column ``ns``, of which column ``len`` says how often each value was measured."""
    counts = pl.col("len").sort_by("ns").cum_sum().cast(pl.Int64)
    share = round(percent / 100 * STEPS)
    rank = (counts.last() // STEPS * share) + (counts.last() % STEPS * share + STEPS - 1) // STEPS
    return pl.col("ns").sort().filter(counts >= rank).first()


RANKED = {**{f"p{percent:g}": ranked(percent) for percent in PERCENTS}, "max": pl.col("ns").max()}
STATISTICS = {**{name: value / 1e9 for name, value in RANKED.items()}, "calls": pl.col("len").sum()}


def lowest_us(ns: pl.Expr) -> pl.Expr:
    """The least microseconds that a histogram of three significant digits does not tell from these nanoseconds."""
    us = ns // 1000
    return us & MASKS.gather(us.bitwise_leading_zeros())


class Counts(NamedTuple):
    """How often calls took how long: by the name of a time ``cell``, ``ns`` and ``len``; ``cells`` has each one's value
    of each group. The times are exact where a percentile or a maximum of any group lies, and rounded down to the
    histogram's digits elsewhere.
    """

    cells: pl.DataFrame
    tables: dict[str, pl.DataFrame]

    def by(self, name: str, group: str) -> pl.DataFrame:
        """The counts of a time by ``value`` of a group."""
        return added(self.tables[name], self.cells, group)


def added(table: pl.DataFrame, cells: pl.DataFrame, group: str) -> pl.DataFrame:
    """Counts of cells as those of the values of a group."""
    values = table.join(cells.select("cell", value=group), on="cell")
    return values.group_by("value", "ns").agg(pl.col("len").sum())


def counts_of(rows: pl.LazyFrame) -> Counts:
    """The times of some rows, counted."""
    cells = collect(rows.group_by(cell=CELL).agg(pl.col(*GROUPS.values()).first())).select("cell", **VALUES)
    between = _counted(times(rows, "itl", cell=CELL), cells)
    calls = collect(rows.filter(ENDED).select(cell=CELL, **TIMES)).lazy()
    tables = {name: _counted(calls.select("cell", ns=name).drop_nulls("ns"), cells) for name in TIMES}
    return Counts(cells, tables | {"itl": between})


def _counted(values: pl.LazyFrame, cells: pl.DataFrame) -> pl.DataFrame:
    """First all values, by what a histogram tells apart; then those again among which a percentile of a group lies."""
    values = values.with_columns(us=lowest_us(pl.col("ns")))
    rough = collect(values.group_by("cell", ns="us").len())
    asked = pl.concat(added(rough, cells, group).group_by("value").agg(**RANKED) for group in VALUES)
    wanted = asked.drop("value").unpivot()["value"].unique().implode()
    exact = collect(values.filter(pl.col("us").is_in(wanted)).group_by("cell", "ns").len())
    rest = rough.filter(~pl.col("ns").is_in(wanted)).with_columns(pl.col("ns") * 1000)
    return pl.concat([rest, exact])


def whole(counts: Counts) -> dict[str, Any]:
    """For each time: p50 p90 p99 p99.9 max in seconds and how many values; None where it was not measured."""
    return grouped(counts, "all").get("all", dict.fromkeys(NAMES))


def grouped(counts: Counts, group: str) -> dict[str, dict[str, Any]]:
    """The same by the values of a group."""
    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        for row in counts.by(name, group).group_by("value").agg(**STATISTICS).sort("value").to_dicts():
            found.setdefault(row.pop("value"), dict.fromkeys(NAMES))[name] = row
    return {value: found[value] for value in ORDERED.get(group, found) if value in found}


def histogram_of(table: pl.DataFrame) -> HdrHistogram:
    """Counted times, in microseconds, as a histogram of three significant digits."""
    histogram = HdrHistogram(1, LONGEST_US, 3)
    counts = table.group_by(us=lowest_us(pl.col("ns")).clip(1, LONGEST_US)).agg(pl.col("len").sum())
    for us, count in counts.sort("us").iter_rows():
        histogram.record_value(us, count)
    return histogram


def hlog_lines(loaded: Loaded, counts: Counts) -> Iterator[str]:
    """The lines of an HdrHistogram V2 log: one interval, the whole run; one tag a flow and time; microseconds.

    In a run of bounded duration what came before and after has tags too, with its phase. Interval_Max is in
    milliseconds, as other tools print it.
    """
    span = collect(loaded.scan.select((pl.col("done_ns").max() - pl.col("due_ns").min()) / 1e9)).item() or 0.0
    start = _started(loaded)
    yield "#[Histogram log format version 1.2]"
    yield f"#[StartTime: {start.timestamp():.3f} (seconds since epoch), {start.isoformat()}]"
    yield '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"'
    parts = {"": counts}
    if loaded.told("options").get("duration_s") is not None:
        others = {phase: loaded.every.filter(pl.col("phase") == phase) for phase in ("warmup", "drain")}
        parts |= {f"{phase}.": counts_of(rows) for phase, rows in others.items()}
    for phase, name in product(parts, NAMES):
        for (flow,), table in sorted(parts[phase].by(name, "flow").partition_by("value", as_dict=True).items()):
            longest, histogram = table["ns"].max() / 1e6, histogram_of(table)  # type: ignore[operator]
            yield f"Tag={flow}.{phase}{name},0.000,{span:.3f},{longest:.3f},{histogram.encode().decode()}"


def _started(loaded: Loaded) -> datetime:
    told = loaded.told("clock").get("anchor") or loaded.about.get("started")
    try:
        moment = datetime.fromisoformat(str(told))
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def write_hlog(loaded: Loaded, counts: Counts) -> str:
    """Write ``latency.hlog`` into the run's directory; its path. InputError where it cannot be written."""
    path = f"{loaded.path}/latency.hlog"
    text = "".join(line + "\n" for line in hlog_lines(loaded, counts))
    system, inner = locate(path)
    try:
        with system.open_output_stream(inner) as sink:
            sink.write(text.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {first_line(error)}") from error
    return path
