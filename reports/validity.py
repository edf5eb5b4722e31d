"""Validity is whether a run's figures may be believed: each check with its figure and its limit.

A missing figure is never zero and never a pass.
"""

from collections.abc import Iterator
from typing import Any

import polars as pl

from keepwarm.reports.frame import PARTS, Loaded, collect, each
from keepwarm.reports.metrics import REPORTED, SECOND, TIMES, Links, spread

COVERAGE = 0.99
FAILED = 0.01
TOKENS_OFF = 0.01
LAG_S = 0.05
LAG_OF_LATENCY = 0.1
SATURATED = 0.95
"""Of a core, in a run of at least ``LEAST_S``."""
LEAST_S = 1.0
SKIPPED = pl.col("error") == "skipped"
CUT_OFF = pl.col("error") == "interrupted"
ANSWERED = pl.col("error").is_null() & pl.col("done_ns").is_not_null()
ANSWERED &= pl.col("status").fill_null(200).is_between(200, 299)

FAILED_CALL = ~(ANSWERED | SKIPPED.fill_null(False) | CUT_OFF.fill_null(False))
"""A call that was sent and not answered whole; one that Ctrl-C cut off in flight is neither failed nor skipped."""

CAPS = ("max_rate", "max_input_tokens_per_minute", "max_concurrency")


def _notes(loaded: Loaded) -> Iterator[str]:
    """What a reader must know of how the run was made."""
    if compression(loaded) == "unsound":
        yield "time compressed: TTL effects not measured"
    if loaded.told("endpoint").get("preflight", {}) is None:
        yield "no preflight: prompts were not calibrated to this endpoint, nor was it asked what it takes"
    duration_s, skipped_s = loaded.told("options").get("duration_s"), loaded.told("clock").get("skipped_s")
    if skipped_s:
        yield f"{skipped_s:,.1f} s were skipped in which nothing ran"
    if duration_s is not None:
        phases = dict(collect(loaded.every.group_by("phase").len()).iter_rows())
        left_out = " and ".join(f"{phases.get(name, 0):,} calls of {name}" for name in ("warmup", "drain"))
        yield f"measured from {loaded.told('options').get('warm_up_s'):g} to {duration_s:g} s: {left_out} are left out"
    if resumed := loaded.about.get("resumed"):
        yield f"gone on with {len(resumed)} times: what was cached may have been lost between"


def _check(
    name: str, value: Any, limit: float | None = None, *, least: bool = False, unit: str = "%"
) -> dict[str, Any]:
    """One check. ``least`` says whether the limit is the least or the most that is good; what has no limit is told
    and judged by nobody.
    """
    told = {"check": name, "value": value, "limit": limit, "least": None, "unit": unit, "good": None}
    if limit is None:
        return told
    return told | {"least": least, "good": value is not None and (value >= limit if least else value <= limit)}


def compression(loaded: Loaded) -> str | None:
    """``sound`` or ``unsound`` where the run's time was scaled or cut; None where it was not, or for a recording."""
    options, endpoint = loaded.told("options"), loaded.told("endpoint")
    skipped = options.get("idle_cap_s") is not None and loaded.told("clock").get("skipped_s") != 0
    cut = options.get("gap_cap_s") is not None or skipped
    if loaded.kind != "run" or not (cut or (options.get("speed") or 1.0) != 1.0):
        return None
    sound = endpoint.get("has_ttl") is False or (bool(endpoint.get("clock_driven")) and not cut)
    return "sound" if sound else "unsound"


def fidelity(name: str) -> pl.Expr:
    """How far the tokens an endpoint reported (prompt, output) are from those planned: p50, p95, max, as shares."""
    planned = pl.col(f"planned_{name}")
    return spread(((pl.col(name) - planned).abs() / planned).filter(ANSWERED & (planned > 0)), 50, 95, 100)


def drain_tail(rows: pl.LazyFrame) -> float | None:
    """Share of calls due after the last session had started: measured under a load that only falls."""
    due = pl.col("due_ns")
    last_start = collect(rows.group_by("session_no").agg(due.min())).select(due.max()).item()
    share: float | None = collect(rows.select((due > pl.lit(last_start, pl.Int64)).mean())).item()
    return share


def _client_checks(loaded: Loaded, lag_ns: float | None, latency_ns: float | None) -> Iterator[dict[str, Any]]:
    """How late calls were sent, where no cap made them wait, nor their session for its place, and whether the client
    itself was at its limits.
    """
    clients, limit = loaded.about.get("client") or (), max(LAG_S, LAG_OF_LATENCY * ((latency_ns or 0.0) / SECOND))
    lag, options = (lag_ns or 0.0) / SECOND, loaded.told("options")
    waits = [client.get("cap_wait_max_s", lag) for client in clients]  # runs of before do not tell
    capped = any(options.get(name) for name in CAPS) and max(waits, default=lag) + limit >= lag
    capped |= bool(options.get("arrivals") and options.get("sessions"))
    yield _check("schedule_lag.p99", None if lag_ns is None else lag, None if capped else limit, unit="s")
    loops = [client["loop_lag_p99_s"] for client in clients if client["loop_lag_p99_s"] is not None]
    cores = [client["cpu_s"] / client["wall_s"] for client in clients if client["wall_s"] >= LEAST_S]
    if loops:
        yield _check("loop_lag.p99", max(loops), limit, unit="s")
    if cores:
        yield _check("client_cpu", max(cores), SATURATED)


def checks_of_run(loaded: Loaded, links: Links) -> list[dict[str, Any]]:
    """The checks of a run. Where the same bytes were sent to all endpoints, tokens are told and not judged. The lag's
    limit is 50 ms, or a tenth of the median latency where that is more."""
    rows, planned = loaded.scan, loaded.about.get("planned_calls")
    counts = rows.select(
        calls=pl.len(),
        answered=ANSWERED.sum(),
        reported=REPORTED.filter(ANSWERED).mean(),
        failed=FAILED_CALL.sum(),
        skipped=SKIPPED.fill_null(False).mean(),
        cut_off=CUT_OFF.fill_null(False).mean(),
    )
    told = collect(counts).row(0, named=True)
    median = TIMES["latency"].filter(ANSWERED).quantile(0.5, "equiprobable")
    told |= each(rows, {"prompt": fidelity("prompt"), "output": fidelity("output"), "latency": median})
    covered = told["answered"] if planned is None or told["calls"] <= planned else told["calls"]
    too_many = {"good": False} if planned and covered > planned else {}
    off, output = told["prompt"], told["output"]
    same_bytes = loaded.told("fidelity").get("match") == "bytes"
    interrupted = loaded.about.get("interrupted")
    return [
        _check("coverage", covered / planned if planned else None, COVERAGE, least=True) | too_many,
        _check("cached_tokens_reported", told["reported"], COVERAGE, least=True),
        _check("token_fidelity.p95", off["p95"], None if same_bytes else TOKENS_OFF),
        *(_check(f"token_fidelity.{name}", off[name]) for name in ("p50", "max")),
        _check("prefix_fidelity", links.extending),
        *(_check(f"output_fidelity.{name}", output[name]) for name in ("p50", "p95")),
        *_client_checks(loaded, links.lag["p99"], told["latency"]),
        _check("failed_calls", told["failed"] / planned if planned else None, FAILED),
        _check("skipped_calls", told["skipped"], FAILED),
        _check("interrupted_calls", told["cut_off"]),
        _check("drain_tail", drain_tail(rows)),
        _check("uninterrupted", None if interrupted is None else float(not interrupted), 1.0, least=True),
    ]


def failures(rows: pl.LazyFrame) -> list[dict[str, Any]]:
    """Failed and skipped calls by error and status, most calls first; their sum is that of both checks' calls."""
    failed = rows.filter(FAILED_CALL | SKIPPED.fill_null(False)).group_by("error", "status").agg(calls=pl.len())
    return collect(failed).sort("calls", "error", "status", descending=[True, False, False]).to_dicts()


def checks_of_recording(rows: pl.LazyFrame) -> list[dict[str, Any]]:
    """The checks of a recording: its calls tell their tokens, and the disjoint parts add up to the prompt."""
    parts = pl.sum_horizontal(pl.col(name).fill_null(0) for name in PARTS)
    told = rows.select(
        REPORTED.filter(pl.col("error").is_null()).mean(),
        add_up=(parts == pl.col("prompt")).filter(REPORTED & pl.col("uncached").is_not_null()).mean(),
    )
    reported, add_up = collect(told).row(0)
    return [
        _check("cached_tokens_reported", reported, COVERAGE, least=True),
        _check("tokens_add_up", add_up, COVERAGE, least=True),
    ]


def validity(loaded: Loaded, links: Links) -> dict[str, Any]:
    """``valid``, why not (a list of lines), every check, and how time was compressed."""
    checks = checks_of_run(loaded, links) if loaded.kind == "run" else checks_of_recording(loaded.scan)
    reasons = [reason(check) for check in checks if check["good"] is False]
    return {
        "valid": not reasons,
        "because": reasons,
        "checks": checks,
        "time_compression": compression(loaded),
        "notes": list(_notes(loaded)),
    }


def figure(value: float | None, unit: str) -> str:
    """A check's figure in its unit."""
    if value is None:
        return "not measured"
    return f"{100 * value:.2f} %" if unit == "%" else f"{1000 * value:.1f} ms"


def reason(check: dict[str, Any]) -> str:
    """One line on a check that was not passed."""
    bound = "at least" if check["least"] else "at most"
    if check["check"] == "uninterrupted":
        return "it was interrupted" if check["value"] is not None else "run.json does not say if it was interrupted"
    value = figure(check["value"], check["unit"])
    if check["check"] == "coverage" and (check["value"] or 0.0) > 1.0:
        return f"coverage is {value}: there are more outcomes than planned_calls in run.json"
    return f"{check['check']} is {value}, expected {bound} {figure(check['limit'], check['unit'])}"
