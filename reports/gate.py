"""Gate is a policy held against a run: required figures, absolute or against a baseline, one line a check."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import polars as pl

from keepwarm.reports import latency, metrics
from keepwarm.reports.frame import Loaded
from keepwarm.reports.prices import Prices, cost
from keepwarm.reports.requirement import KINDS, RATES, WHOLE, Requirement, parse, percent
from keepwarm.reports.validity import validity
from keepwarm.traces.errors import InputError

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
ON_CACHE = {*RATES, "read_write_ratio", "hit_rate_macro", "cold_write_share", "warm_hit_range", "retention"}
ON_CACHE |= {"achievable_hit_rate", "efficiency", "cost_per_completed_task", "cache_read", "uncached"}
ON_CACHE |= {"cache_write_5m", "cache_write_1h", "cache_write_other", "written"}
"""Figures that depend on what a TTL left in the cache."""

ESTIMATED = 0.2
DEFAULTS = ("warm_hit_rate >= baseline-1pt", "ttft.p99 <= baseline+10%", "latency.p99 <= baseline+10%")
"""What is held against a baseline where nothing else is asked of it."""


def measure(loaded: Loaded, want: Requirement, prices: Prices, gpu: tuple[float | None, int | None]) -> Any:
    """The required figure of a run; None where it was not measured."""
    rows = loaded.rows
    for key, value in want.where:
        rows = rows.filter(pl.col(metrics.GROUPS[key]).fill_null("unknown") == value)
    if want.metric in latency.NAMES:
        values = latency.times(rows, want.metric)
        chosen = pl.col("ns").max() / 1e9 if want.stat == "max" else latency.percentile(percent(want.stat or "") or 50)
        return values.select(chosen).item()
    if want.metric.endswith("cost_per_completed_task"):
        return cost(loaded, prices, *gpu)[want.metric]
    if want.metric in WHOLE:
        return _of_whole(loaded, want)
    return metrics.of(rows)[want.metric] if rows.height else None


def _of_whole(loaded: Loaded, want: Requirement) -> Any:
    found = metrics.whole(loaded, metrics.with_previous(loaded.rows))[want.metric]
    return found if want.stat is None or found is None else found.get(want.stat)


def show(metric: str, value: float) -> str:
    """A figure in the unit a person reads it in."""
    kind = KINDS[metric]
    if kind == "rate":
        return f"{100 * value:.2f}".rstrip("0").rstrip(".") + " %"
    if kind == "time":
        return f"{value:.3f} s" if value >= 1 else f"{1000 * value:.1f} ms"
    return {"ratio": f"{value:.2f}x", "money": f"${value:.4f}", "count": f"{value:g}"}[kind]


class Verdict(NamedTuple):
    """What came of one check: a line, and the exit code it asks for (0 good, 1 failed or not measured, 3 not valid)."""

    line: str
    code: int


def judge(want: Requirement, value: float | None, base: float | None) -> Verdict:
    """Hold a figure against what is required of it; ``base`` is the baseline's."""
    subject = want.subject
    if value is None:
        return Verdict(f"FAIL {subject} not measured, required {want.text.strip()}", 1)
    if want.relative and base is None:
        return Verdict(f"FAIL {subject} {show(want.metric, value)}: not measured in the baseline", 1)
    limit = (base or 0.0) * want.times + want.value if want.relative else want.value
    # Rounded so that a figure which is its limit, but for how floats add, is its limit.
    good = OPERATORS[want.op](round(value, 12), round(limit, 12))
    beside = f" (baseline {show(want.metric, base)})" if want.relative and base is not None else ""
    word = "PASS" if good else "FAIL"
    line = f"{word} {subject} {show(want.metric, value)} {want.op} {show(want.metric, limit)}{beside}"
    return Verdict(line, 0 if good else 1)


def refusal(loaded: Loaded, want: Requirement, prices: Prices, valid: dict[str, Any]) -> str | None:
    """Why a figure cannot be held to anything, though it was measured."""
    if want.metric in ON_CACHE and valid["time_compression"] == "unsound":
        return str(valid["notes"][0])
    if want.metric == "cost_per_completed_task":
        share = cost(loaded, prices)["output_est_share"]
        if share is not None and share > ESTIMATED:
            return f"{100 * share:.1f} % of the money rests on estimated outputs, at most {100 * ESTIMATED:.0f} % may"
    return None


def differences(run: Loaded, baseline: Loaded) -> list[str]:
    """What differs between the two runs besides what they measured: trace, endpoint, options, cache."""

    def of(loaded: Loaded) -> dict[str, Any]:
        about = loaded.about
        trace, endpoint = about.get("trace") or {}, about.get("endpoint") or {}
        digest = trace.get("digest") if loaded.kind == "run" else about.get("digest")
        server = {key: endpoint.get(key) for key in ("name", "dialect", "server")}
        named = {key: about.get(key) for key in ("options", "cache", "mode")}
        return {"trace digest": digest, "endpoint": server, **named}

    ours, theirs = of(run), of(baseline)
    return [name for name in ours if ours[name] != theirs[name]]


def check(
    run: Loaded,
    requires: list[str],
    prices: Prices,
    baseline: Loaded | None = None,
    gpu_hour_price: float | None = None,
    gpus: int | None = None,
) -> tuple[list[str], int]:
    """Hold a run to its requirements: the lines to print and the exit code. InputError on a bad requirement."""
    wants = [parse(text) for text in requires]
    if baseline is None and (not wants or any(want.relative for want in wants)):
        raise InputError("gate needs --require 'metric >= value' or, for 'baseline' figures, --baseline RUN")
    defaults = [] if baseline is None or any(want.relative for want in wants) else [parse(text) for text in DEFAULTS]
    gpu = (gpu_hour_price, gpus)
    lines, codes = _standing(run, baseline)
    valid = validity(run, metrics.with_previous(run.rows))
    for want in (*wants, *defaults):
        base = measure(baseline, want, prices, gpu) if baseline is not None and want.relative else None
        if want in defaults and base is None:
            lines.append(f"SKIP {want.subject} not measured in the baseline")
            continue
        refused = refusal(run, want, prices, valid)
        verdict = judge(want, measure(run, want, prices, gpu), base)
        lines.append(f"NOT VALID {want.subject}: {refused}" if refused else verdict.line)
        codes.append(3 if refused else verdict.code)
    if not codes:
        return [*lines, "FAIL nothing was measured in both runs"], 1
    return lines, 3 if 3 in codes else max(codes)


def _standing(run: Loaded, baseline: Loaded | None) -> tuple[list[str], list[int]]:
    """Lines and codes for runs that are not valid, and a line on how the two differ."""
    lines, codes = [], []
    for name, loaded in (("run", run), ("baseline", baseline)):
        if loaded is None:
            continue
        standing = validity(loaded, metrics.with_previous(loaded.rows))
        if not standing["valid"]:
            lines.append(f"NOT VALID {name} {loaded.path}: {'; '.join(standing['because'])}")
            codes.append(3)
    apart = differences(run, baseline) if baseline is not None else []
    if apart:
        lines.append(f"note: the runs differ in {', '.join(apart)}")
    return lines, codes
