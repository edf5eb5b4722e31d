"""Frame is a run or a recording as one table of outcome rows, of which a figure reads the columns that it needs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from keepwarm.reports.about import read_about
from keepwarm.traces import journal
from keepwarm.traces.errors import InputError
from keepwarm.traces.place import first_line, locate
from keepwarm.traces.schema import OUTCOMES as OUTCOME_SCHEMA
from keepwarm.traces.store import check_outcomes, read_meta, read_outcome_table, read_trace_table

DESCRIPTIVE = (
    *("session", "session_start_ns", "agent", "call", "role", "agent_type", "turn"),
    *("flow", "gap_ns", "gap_kind", "model", "prefix_change"),
)
PARTS = ("uncached", "cache_read", "cache_write_5m", "cache_write_1h", "cache_write_other")
"""The disjoint parts of a prompt."""
USAGE = ("prompt", *PARTS, "output")
SOURCES = ("usage_source", "write_source", "error", "status", "completed")
RECORDED = ("start_ns", "first_token_ns", "end_ns", *USAGE, "output_est", "miss_reason", *SOURCES)
TIMES = ("due_ns", "sent_ns", "first_token_ns", "done_ns", "token_ns", "first_sent_ns")
RUN_COLUMNS = [
    *(*DESCRIPTIVE, "copy", *TIMES, *USAGE, "write_ttl_s", "worker", *SOURCES, "phase"),
    *(f"planned_{name}" for name in ("prompt", "keep", "output")),
    *(f"rec_{name}" for name in RECORDED),
]
TRACE_COLUMNS = [*DESCRIPTIVE, "keep", *RECORDED, "prefix_break", "attempts"]

TURNS = ((0, "0"), (1, "1"), (5, "2-5"), (19, "6-19"), (49, "20-49"))
"""Turn buckets as (last turn, name); later turns are ``50+``."""

GAPS = ((1, "<1s"), (10, "1-10s"), (60, "10-60s"), (300, "1-5m"), (3600, "5-60m"))
"""Gap buckets as (end in seconds, excluded; name); longer gaps are ``>1h``, no gap is ``none``."""

TURN_NAMES = (*(name for _, name in TURNS), "50+")
GAP_NAMES = (*(name for _, name in GAPS), ">1h", "none")


class Loaded(NamedTuple):
    """A run or a recording: its rows, and what it says of itself (``run.json``, or the trace's own metadata).

    ``scan`` is read anew by every query, only the columns that it needs: a run's rows may be more than memory holds. Of
    a run of bounded duration it has what was measured, ``every`` the rest too.
    """

    kind: str
    name: str
    path: str
    scan: pl.LazyFrame
    about: dict[str, Any]
    bounds: pl.LazyFrame | None
    every: pl.LazyFrame

    def told(self, name: str) -> dict[str, Any]:
        """One of the objects in what it says of itself, empty where there is none."""
        return self.about.get(name) or {}


def collect(rows: pl.LazyFrame) -> pl.DataFrame:
    """What a query gives, worked out on few rows at a time."""
    return rows.collect(engine="streaming")


def each(rows: pl.LazyFrame, asked: dict[str, pl.Expr]) -> dict[str, Any]:
    """What single figures of some rows are, one after the other: the sorted values of all might fill memory."""
    return {name: collect(rows.select(figure)).item() for name, figure in asked.items()}


def _exists(path: str) -> bool:
    system, inner = locate(path)
    return bool(system.get_file_info(inner).type != 0)


def load(path: str) -> Loaded:
    """A run directory, or a trace (file or directory), as outcome rows; InputError if it is neither.

    Of a run that was killed, or is under way, the rows are those in its journal, or in those of its shards.
    """
    path = path.rstrip("/")
    if _exists(f"{path}/{journal.OUTCOMES}"):
        rows = _scan(f"{path}/{journal.OUTCOMES}")
    elif _exists(f"{path}/run.json"):
        found = journal.written(Path(path)).select(RUN_COLUMNS)
        if not found.num_rows:
            raise InputError(f"{path}: run.json is there but {journal.OUTCOMES} is not: the run wrote no outcomes")
        rows = pl.LazyFrame(found)
    else:
        return load_recording(path)
    about = read_about(f"{path}/run.json")
    every = arranged(rows)
    bounded = (about.get("options") or {}).get("duration_s") is not None
    scan = _measured(every) if bounded else every
    return Loaded("run", str(about.get("name") or path), path, scan, about, _read_bounds(path), every)


def _measured(every: pl.LazyFrame) -> pl.LazyFrame:
    """The calls that were due in the time that was measured; a session that has others too was not all measured."""
    others = pl.col("phase") != "measured"
    outside = every.filter(others).select("session_no", outside=True).unique()
    completed = pl.when(pl.col("outside").is_null()).then("completed")
    measured = every.filter(~others).join(outside, on="session_no", how="left")
    return measured.with_columns(completed.alias("completed")).drop("outside")


def _scan(path: str) -> pl.LazyFrame:
    """The outcomes in a file whose every page was checked. One that is not as this program writes it, or lies where
    polars may not reach, is read into memory: that says what is wrong with it, or sets it right.
    """
    if "://" in path or not check_outcomes(path, RUN_COLUMNS):
        return pl.LazyFrame(read_outcome_table(path, RUN_COLUMNS))
    columns = pl.DataFrame(OUTCOME_SCHEMA.empty_table()).select(RUN_COLUMNS).schema
    return pl.scan_parquet(path, schema=columns, missing_columns="insert", extra_columns="ignore")


def load_recording(path: str) -> Loaded:
    """A trace as the outcomes of its own recording: due = start, sent = the last try (start, where there was one), and
    every ``rec_`` equal to the measured.
    """
    meta = read_meta(path)
    rows = pl.LazyFrame(read_trace_table(path, TRACE_COLUMNS)).rename({"keep": "planned_keep"})
    rows = arranged(rows.with_columns(pl.lit(0, pl.Int32).alias("copy"))).with_columns(
        *(pl.col(name).alias(f"rec_{name}") for name in RECORDED),
        pl.lit(None, pl.List(pl.Int64)).alias("token_ns"),
        pl.lit(None, pl.Int64).alias("first_sent_ns"),
        pl.col("prompt").alias("planned_prompt"),
    )
    last_try = pl.col("session_start_ns").fill_null(0) + pl.col("attempts").list.last().struct.field("sent_ns")
    rows = recorded_side(rows).with_columns(pl.coalesce(last_try, "sent_ns").alias("sent_ns")).drop("attempts")
    scan = collect(rows).lazy()
    return Loaded("recording", path.rsplit("/", 1)[-1], path, scan, meta._asdict(), None, scan)


def recorded_side(rows: pl.LazyFrame) -> pl.LazyFrame:
    """The same rows with what was recorded in the place of what was measured."""
    start = pl.col("session_start_ns").fill_null(0)
    times = {"due": "start", "sent": "start", "first_token": "first_token", "done": "end"}
    ttls = [(pl.col("rec_cache_write_5m") > 0, 300), (pl.col("rec_cache_write_1h") > 0, 3600)]
    return rows.with_columns(
        *(pl.col(f"rec_{name}").alias(name) for name in (*USAGE, *SOURCES)),
        *((start + pl.col(f"rec_{recorded}_ns")).alias(f"{name}_ns") for name, recorded in times.items()),
        first_of(ttls, None).cast(pl.Int32).alias("write_ttl_s"),
        written("rec_").alias("written"),
    )


def written(prefix: str = "") -> pl.Expr:
    """Tokens a call wrote to the cache: the reported writes, or prompt - read where they are inferred."""
    parts = [pl.col(f"{prefix}cache_write_{kind}") for kind in ("5m", "1h", "other")]
    told = pl.any_horizontal(part.is_not_null() for part in parts)
    return (
        pl.when(pl.col(f"{prefix}write_source") == "inferred")
        .then(pl.col(f"{prefix}prompt") - pl.col(f"{prefix}cache_read"))
        .when((pl.col(f"{prefix}write_source") == "reported") & told)
        .then(pl.sum_horizontal(part.fill_null(0) for part in parts))
    )


def first_of(cases: Iterable[tuple[pl.Expr, Any]], otherwise: Any, kind: Any = pl.String) -> pl.Expr:
    """What stands beside the first condition that holds: an expression, or a text, which is told as of that kind."""
    told = [pl.when(holds).then(pl.lit(what, kind) if isinstance(what, str) else what) for holds, what in cases]
    return pl.coalesce(*told, pl.lit(otherwise, kind) if isinstance(otherwise, str) else otherwise)


def arranged(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Rows with numbers for session and agent, buckets, and tokens written.

    The numbers are hashes of 64 bits: in one run of 400,000 with ten million agents, two of them share theirs.
    """
    turns = [(pl.col("turn") <= last, name) for last, name in TURNS]
    gap = pl.col("gap_ns")
    gaps = [(gap.is_null(), "none"), *((gap < end * 1_000_000_000, name) for end, name in GAPS)]
    return rows.with_columns(
        pl.struct("copy", "session").hash().alias("session_no"),
        pl.struct("copy", "session", "agent").hash().alias("agent_no"),
        first_of(turns, "50+", pl.Enum(TURN_NAMES)).alias("turn_bucket"),
        first_of(gaps, ">1h", pl.Enum(GAP_NAMES)).alias("gap_bucket"),
        written().alias("written"),
    )


def _read_bounds(path: str) -> pl.LazyFrame | None:
    where = f"{path}/bounds.parquet"
    if not _exists(where):
        return None
    system, inner = locate(where)
    try:
        with system.open_input_file(inner) as source:
            bounds = pl.scan_parquet(where if "://" not in where else source.read())
        missing = {"call", "copy", "bound", "cache_read"} - set(bounds.collect_schema())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{where}: not a readable Parquet file: {first_line(error)}") from error
    if missing:
        raise InputError(f"{where}: column {min(missing)!r} is missing")
    return bounds


def time_scale(loaded: Loaded) -> float:
    """Seconds of the endpoint's clock in one measured second: the run's speed where that clock was driven by it."""
    driven = loaded.kind == "run" and loaded.told("endpoint").get("clock_driven")
    return float(loaded.told("options").get("speed") or 1.0) if driven else 1.0


def clock_told(scale: float) -> str:
    """What to say where an endpoint's clock ran ahead of the one that times were measured by."""
    return f"the endpoint's clock ran {scale:g} times as fast"


def provenance(loaded: Loaded) -> dict[str, Any]:
    """How the trace was imported: ``prefix_breaks`` blind or recorded (informed), ``recorded_breaks`` how many prefixes
    that cut, ``informed_calls`` how many of the calls here are marked as such; None where it is not told. Marked are
    fewer: a call has one ``prefix_change``, and a cut that fell on a compaction or the like is marked as that.
    """
    told = loaded.told("trace" if loaded.kind == "run" else "notes")
    marked = collect(loaded.scan.select((pl.col("prefix_change") == "recorded_break").sum())).item()
    return {**{key: told.get(key) for key in ("prefix_breaks", "recorded_breaks")}, "informed_calls": marked}
