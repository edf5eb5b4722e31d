"""Metrics are the cache figures: one polars expression a number, over any group of outcome rows.

Rates are fractions. A rate is taken over the calls that reported what it needs; None where none did.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from keepwarm.reports.frame import GAP_NAMES, TURN_NAMES, USAGE, Loaded, first_of, time_scale

READ, PROMPT, UNCACHED, WRITTEN = (pl.col(name) for name in ("cache_read", "prompt", "uncached", "written"))
WARM = pl.col("turn") > 0
REPORTED = READ.is_not_null() & PROMPT.is_not_null()
RATE = READ / PROMPT
SECOND = 1e9
PUBLISHED_RANGE = (0.85, 0.97)

GROUPS = {name: name for name in ("role", "agent_type", "flow", "model")}
GROUPS |= {"turn": "turn_bucket", "gap": "gap_bucket"}
"""What figures are given by, and the column that holds it."""


def _ratio(top: pl.Expr, bottom: pl.Expr, where: pl.Expr | None = None) -> pl.Expr:
    """Sum over sum, over the rows where both are known (and ``where`` holds); null if there is nothing to divide by."""
    known = top.is_not_null() & bottom.is_not_null()
    known = known if where is None else known & where
    total = bottom.filter(known).sum()
    return pl.when(total > 0).then(top.filter(known).sum() / total)


def _total(name: str) -> pl.Expr:
    return pl.when(pl.col(name).count() > 0).then(pl.col(name).sum())


def _source() -> pl.Expr:
    told = pl.col("write_source").filter(REPORTED)
    return first_of([(told.len() == 0, "absent"), (told.n_unique() > 1, "mixed")], told.first())


FIGURES: dict[str, pl.Expr] = {
    "sessions": pl.col("session_no").n_unique(),
    "agents": pl.col("agent_no").n_unique(),
    "subagents": pl.col("agent_no").filter(pl.col("role") == "subagent").n_unique(),
    "calls": pl.len(),
    "calls_without_cache_report": (~REPORTED).sum(),
    "warm_calls": (WARM & REPORTED).sum(),
    "rate_prompt": PROMPT.filter(REPORTED).sum(),
    "warm_prompt": PROMPT.filter(WARM & REPORTED).sum(),
    **{name: _total(name) for name in (*USAGE, "written")},
    "output_calls": pl.col("output").count(),
    "output_est": pl.col("rec_output_est").filter(pl.col("output").is_null()).sum(),
    "write_source": _source(),
    "hit_rate": _ratio(READ, PROMPT),
    "warm_hit_rate": _ratio(READ, PROMPT, WARM),
    "hit_rate_excluding_writes": _ratio(READ, READ + UNCACHED),
    "read_write_ratio": _ratio(READ, WRITTEN),
}
"""Name to expression of every figure that is given for a whole run and for each of its groups. ``rate_prompt`` and
``warm_prompt`` are the denominators of the hit rates: prompt tokens of the calls that reported what they read."""

OVER = {
    "hit_rate": REPORTED,
    "warm_hit_rate": WARM & REPORTED,
    "inside_85_97": WARM & REPORTED & (PROMPT > 0),
    "read_write_ratio": READ.is_not_null() & WRITTEN.is_not_null(),
}
"""Which calls some of the rates are taken over."""


def of(rows: pl.DataFrame) -> dict[str, Any]:
    """The figures of some rows, by name."""
    return rows.select(**FIGURES).row(0, named=True)


def by(rows: pl.DataFrame, group: str) -> dict[str, dict[str, Any]]:
    """The figures by the values of a group (a key of GROUPS), most calls first, buckets in their own order."""
    column = GROUPS[group]
    table = rows.group_by(pl.col(column).fill_null("unknown").alias("_key")).agg(**FIGURES)
    found = {row.pop("_key"): row for row in table.sort("calls", "_key", descending=[True, False]).to_dicts()}
    order = {"turn": TURN_NAMES, "gap": GAP_NAMES}.get(group, found)
    return {name: found[name] for name in order if name in found}


def with_previous(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with what the call before them in their agent left: its prompt, unread remainder, end, TTL, model, plan.

    ``retention`` is the share of the previous prompt that was read; null on an agent's first call.
    """
    same = pl.col("agent_no") == pl.col("agent_no").shift(1)

    def before(name: str) -> pl.Expr:
        return pl.when(same).then(pl.col(name).shift(1)).alias(f"prev_{name}")

    # A call that failed reported no prompt and wrote nothing: what it could have read was left by the one before it.
    carried = pl.col("prompt", "write_ttl_s").forward_fill().over("agent_no")
    last = rows.with_columns(carried).select(
        *(before(name) for name in ("prompt", "write_ttl_s", "uncached", "done_ns", "model", "planned_prompt"))
    )
    held = pl.min_horizontal("cache_read", "prev_prompt")
    known = pl.col("cache_read").is_not_null() & (pl.col("prev_prompt") > 0)
    return pl.concat([rows, last], how="horizontal").with_columns(
        pl.when(known).then(held / pl.col("prev_prompt")).alias("retention")
    )


def spread(values: pl.Series, *percents: float, unit: float = 1.0) -> dict[str, float | None]:
    """Nearest-rank percentiles of values, by name, divided by ``unit``; None where there are none."""
    found = {f"p{p:g}": values.quantile(p / 100, "equiprobable") for p in percents}
    return {name: None if value is None else value / unit for name, value in found.items()}


def spread_to_max(values: pl.Series, *percents: float, unit: float = 1.0) -> dict[str, float | None]:
    """The same, and the largest value as ``max``."""
    found = spread(values, *percents, 100, unit=unit)
    most = found.pop("p100")
    return {**found, "max": most}


def warm_hit_range(rows: pl.DataFrame) -> dict[str, Any]:
    """How the hit rates of single warm calls spread (p5, p50, p95), and the share of them inside 85-97 %."""
    rates = rows.filter(OVER["inside_85_97"]).select(RATE.alias("rate"))["rate"]
    inside = rates.is_between(*PUBLISHED_RANGE).mean() if len(rates) else None
    return {**spread(rates, 5, 50, 95), "inside_85_97": inside, "calls": len(rates)}


def hit_rate_macro(rows: pl.DataFrame) -> float | None:
    """Mean over agents of each agent's own hit rate."""
    agents = rows.filter(REPORTED).group_by("agent_no").agg(rate=_ratio(READ, PROMPT))
    mean: float | None = agents["rate"].mean()  # type: ignore[assignment]
    return mean


def retention(linked: pl.DataFrame) -> dict[str, Any]:
    """Spread of the share of its predecessor's prompt that a call read, and over all tokens."""
    known = linked.filter(pl.col("retention").is_not_null())
    held = known.select(_ratio(pl.min_horizontal("cache_read", "prev_prompt"), pl.col("prev_prompt"))).item()
    return {**spread(known["retention"], 1, 5, 50), "of_tokens": held, "calls": len(known)}


def cold_write_share(rows: pl.DataFrame) -> float | None:
    """Tokens written by agents' first calls over all tokens written."""
    share: float | None = rows.select(_ratio(pl.when(~WARM).then(WRITTEN).otherwise(0), WRITTEN)).item()
    return share


def bounded(loaded: Loaded) -> pl.DataFrame:
    """The calls that reported what they read once for each ``bound`` stored with the run, ``best`` what it allowed."""
    assert loaded.bounds is not None
    best = loaded.bounds.select("call", pl.col("copy").cast(pl.Int32), "bound", best="cache_read")
    return loaded.rows.filter(REPORTED).join(best, on=["call", "copy"])


def achievable(loaded: Loaded) -> dict[str, float]:
    """Hit rate that was to be had under each bound stored with the run, over the calls that reported theirs."""
    if loaded.bounds is None:
        return {}
    bounds = bounded(loaded).group_by("bound", maintain_order=True)
    rates = bounds.agg(rate=_ratio(pl.col("best"), pl.col("planned_prompt")))
    return {bound: rate for bound, rate in rates.sort("bound").iter_rows() if rate is not None}


def task_time(loaded: Loaded) -> dict[str, Any]:
    """Wall seconds of sessions whose every call ended, and ``stretch``: that over the recorded session's.

    Stretch is None where gaps were cut or divided on a clock the endpoint does not share: the recorded session is then
    not the same plan.
    """
    tasks = loaded.rows.group_by("session_no").agg(
        wall=(pl.col("done_ns").max() - pl.col("due_ns").min()),
        recorded=(pl.col("rec_end_ns").max() - pl.col("rec_start_ns").min()),
        whole=pl.col("done_ns").is_not_null().all(),
    )
    tasks = tasks.filter("whole")
    options, scale = loaded.told("options"), time_scale(loaded)
    same_plan = options.get("gap_cap_s") is None and (options.get("speed") or 1.0) in (1.0, scale)
    stretch = tasks.filter(pl.col("recorded") > 0).select(s=pl.col("wall") * scale / pl.col("recorded"))["s"]
    known = same_plan and loaded.kind == "run" and len(stretch) > 0
    return {
        "task_time": spread_to_max(tasks["wall"], 50, 90, unit=SECOND),
        "stretch": spread_to_max(stretch, 50, 90) if known else None,
    }


def turn_drift(rows: pl.DataFrame) -> float | None:
    """Median ttft at turns from 50 over the median at turns 2 to 5: do the later turns still feel fast."""
    ttft = pl.col("first_token_ns") - pl.col("due_ns")
    late, early = (
        ttft.filter(pl.col("turn_bucket") == bucket).quantile(0.5, "equiprobable") for bucket in ("50+", "2-5")
    )
    drift: float | None = rows.select(pl.when(early > 0).then(late / early)).item()
    return drift


def schedule_lag(rows: pl.DataFrame) -> dict[str, Any]:
    """How late calls were sent after they were due, in seconds."""
    lag = rows.select(lag=pl.col("sent_ns") - pl.col("due_ns"))["lag"].drop_nulls()
    return spread_to_max(lag, 50, 99, unit=SECOND)


def whole(loaded: Loaded, linked: pl.DataFrame) -> dict[str, Any]:
    """The figures that are given for a whole run only; ``linked`` is its rows with_previous."""
    rows, rates = loaded.rows, achievable(loaded)
    hit, predicted = of(rows)["hit_rate"], rates.pop("predicted", None)
    return {
        "predicted_hit_rate": predicted,
        "warm_hit_range": warm_hit_range(rows),
        "hit_rate_macro": hit_rate_macro(rows),
        "retention": retention(linked),
        "cold_write_share": cold_write_share(rows),
        "achievable_hit_rate": rates or None,
        "efficiency": {b: hit / rate for b, rate in rates.items() if hit is not None and rate} or None,
        "turn_drift": turn_drift(rows),
        **task_time(loaded),
        "schedule_lag": schedule_lag(rows) if loaded.kind == "run" else None,
    }
