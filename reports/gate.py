"""Gate is a policy held against a run: required figures, absolute or against a baseline, one line a check."""

from collections.abc import Callable
from operator import eq, ge, gt, le, lt
from typing import Any, NamedTuple

import polars as pl

from keepwarm.reports import latency, metrics
from keepwarm.reports.frame import USAGE, Loaded, clock_told, collect, time_scale
from keepwarm.reports.losses import links_of
from keepwarm.reports.prices import Prices, completion, cost
from keepwarm.reports.requirement import KINDS, WHOLE, Requirement, parse, percent
from keepwarm.reports.validity import validity
from keepwarm.traces.errors import InputError

OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": ge, "<=": le, ">": gt, "<": lt, "==": eq}
ON_CACHE = {name for name, kind in KINDS.items() if kind == "rate"} | {"read_write_ratio", "cost_per_completed_task"}
ON_CACHE |= {"written", *USAGE} - {"prompt", "output"}
"""Figures that depend on what a TTL left in the cache."""

ESTIMATED = 0.2
MOST_DIGITS = 6
TRACE = "trace digest"
DEFAULTS = ("warm_hit_rate >= baseline-1pt", "ttft.p99 <= baseline+10%", "latency.p99 <= baseline+10%")
"""What is held against a baseline where nothing else is asked of it."""


def measure(loaded: Loaded, want: Requirement, prices: Prices) -> Any:
    """The required figure of a run; None where it was not measured."""
    rows = loaded.scan
    for key, value in want.where:
        rows = rows.filter(metrics.VALUES[key] == value)
    if want.metric in latency.NAMES:
        counts = collect(latency.times(rows, want.metric).group_by("ns").len())
        chosen = pl.col("ns").max() if want.stat == "max" else latency.ranked(percent(want.stat or "") or 50)
        return counts.select(chosen / 1e9).item()
    if want.metric.endswith("cost_per_completed_task"):
        return cost(loaded, prices)[want.metric]
    if want.metric in WHOLE:
        found = metrics.whole(loaded, links_of(loaded))[want.metric]
        return found if want.stat is None or found is None else found.get(want.stat)
    found = metrics.of(rows)
    return found[want.metric] if found["calls"] else None


def show(metric: str, value: float, digits: int = 0) -> str:
    """A figure in the unit a person reads it in, with at least so many digits behind the point."""
    kind = KINDS[metric]
    if kind == "rate":
        return f"{100 * value:.{max(2, digits)}f}".rstrip("0").rstrip(".") + " %"
    if kind == "time":
        return f"{value:.{max(3, digits)}f} s" if value >= 1 else f"{1000 * value:.{max(1, digits)}f} ms"
    if kind == "ratio":
        return f"{value:.{max(2, digits)}f}x"
    return f"${value:.{max(4, digits)}f}" if kind == "money" else f"{value:.12g}"


def digits_apart(metric: str, value: float, limit: float) -> int:
    """How many digits it takes to show that a figure is not its limit; more than MOST_DIGITS are never shown."""
    if value == limit:
        return 0
    apart = (n for n in range(MOST_DIGITS) if show(metric, value, n) != show(metric, limit, n))
    return next(apart, MOST_DIGITS)


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
    value, limit = round(value, 12), round(limit, 12)
    good = OPERATORS[want.op](value, limit)
    digits = digits_apart(want.metric, value, limit)
    beside = f" (baseline {show(want.metric, base, digits)})" if want.relative and base is not None else ""
    told = f"{show(want.metric, value, digits)} {want.op} {show(want.metric, limit, digits)}"
    return Verdict(f"{'PASS' if good else 'FAIL'} {subject} {told}{beside}", 0 if good else 1)


class Side(NamedTuple):
    """One of the two that are held against each other: ``run`` or ``baseline``, and whether it may be believed."""

    name: str
    loaded: Loaded
    valid: dict[str, Any]


def refusal(sides: list[Side], want: Requirement, prices: Prices) -> str | None:
    """Why a figure cannot be held to anything, though it was measured; it rests on all of these sides."""
    if want.metric == "cost_per_completed_task" and len({one.loaded.kind for one in sides}) == 2:
        return f"{'; '.join(f'{one.name}: completed = {completion(one.loaded)}' for one in sides)}: not one figure"
    for one in sides:
        if want.metric in ON_CACHE and one.valid["time_compression"] == "unsound":
            return f"{one.name}: {one.valid['notes'][0]}"
        share = cost(one.loaded, prices)["output_est_share"] if want.metric == "cost_per_completed_task" else None
        if share is not None and share > ESTIMATED:
            least = f"at most {100 * ESTIMATED:.0f} % may"
            return f"{one.name}: {100 * share:.1f} % of the money rests on estimated outputs, {least}"
    return None


def differences(run: Loaded, baseline: Loaded) -> list[str]:
    """What differs between the two besides what they measured: trace digest, endpoint, options, cache, mode."""

    def of(loaded: Loaded) -> dict[str, Any]:
        about = loaded.about
        digest = loaded.told("trace").get("digest") if loaded.kind == "run" else about.get("digest")
        server = {key: loaded.told("endpoint").get(key) for key in ("name", "dialect", "server")}
        named = {key: about.get(key) for key in ("options", "cache", "mode")}
        return {TRACE: digest, "endpoint": server, **named}

    ours, theirs = of(run), of(baseline)
    return [name for name in ours if ours[name] != theirs[name]]


def check(
    run: Loaded, requires: list[str], prices: Prices, baseline: Loaded | None = None, *, across_traces: bool = False
) -> tuple[list[str], int]:
    """Hold a run to its requirements: the lines to print and the exit code. InputError on a bad requirement.

    A baseline of another trace holds nothing, unless ``across_traces``.
    """
    wants = [parse(text) for text in requires]
    relative = any(want.relative for want in wants)
    if baseline is None and (relative or not wants):
        raise InputError("gate needs --require 'metric >= value' or, for 'baseline' figures, --baseline RUN")
    defaults = [] if baseline is None or relative else [parse(text) for text in DEFAULTS]
    told = {"run": run, "baseline": baseline}
    sides = [Side(name, one, validity(one, links_of(one))) for name, one in told.items() if one is not None]
    lines, codes = _standing(sides, across_traces)
    for want in (*wants, *defaults):
        base = measure(baseline, want, prices) if baseline is not None and want.relative else None
        if want in defaults and base is None:
            lines.append(f"SKIP {want.subject} not measured in the baseline")
            continue
        refused = refusal(sides if want.relative else sides[:1], want, prices)
        verdict = judge(want, measure(run, want, prices), base)
        lines.append(f"NOT VALID {want.subject}: {refused}" if refused else verdict.line)
        codes.append(3 if refused else verdict.code)
    if not codes:
        return [*lines, "FAIL nothing was measured in both runs"], 1
    return lines, 3 if 3 in codes else max(codes)


def _standing(sides: list[Side], across_traces: bool) -> tuple[list[str], list[int]]:
    """Lines and codes for runs that are not valid, or not of the same trace where they must be; notes on the rest."""
    bad = [one for one in sides if not one.valid["valid"]]
    lines = [f"NOT VALID {one.name} {one.loaded.path}: {'; '.join(one.valid['because'])}" for one in bad]
    apart = differences(sides[0].loaded, sides[1].loaded) if len(sides) == 2 else []
    other = not across_traces and TRACE in apart
    if other:
        lines.append(f"NOT VALID run and baseline differ in {TRACE}: give --across-traces to hold them all the same")
        apart.remove(TRACE)
    if apart:
        lines.append(f"note: the runs differ in {', '.join(apart)}")
    for one in sides:
        scale = time_scale(one.loaded)
        if scale != 1.0:
            where = "" if one is sides[0] else "baseline: "
            lines.append(f"note: {where}{clock_told(scale)}: times are as measured, not scaled back")
    return lines, [3] * (len(bad) + other)
