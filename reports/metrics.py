"""Metrics are the cache figures: one polars expression a number, over any group of outcome rows.

Rates are fractions. A rate is taken over the calls that reported what it needs; None where none did.
"""

from math import fsum
from typing import Any, NamedTuple

import polars as pl

from keepwarm.reports.frame import GAP_NAMES, TURN_NAMES, USAGE, Loaded, collect, each, first_of, time_scale

READ, PROMPT, UNCACHED, WRITTEN = (pl.col(name) for name in ("cache_read", "prompt", "uncached", "written"))
CALLS, AGENT = pl.col("calls"), pl.col("agent_no")
WARM = pl.col("turn") > 0
REPORTED = READ.is_not_null() & PROMPT.is_not_null()
RATE = READ / PROMPT
SECOND = 1e9
PUBLISHED_RANGE = (0.85, 0.97)

GROUPS = {name: name for name in ("role", "agent_type", "flow", "model")}
GROUPS |= {"turn": "turn_bucket", "gap": "gap_bucket"}
"""What figures are given by, and the column that holds it."""

ORDERED = {"turn": TURN_NAMES, "gap": GAP_NAMES}
"""The groups whose values have an order of their own."""

VALUES = {group: pl.col(column).cast(pl.String).fill_null("unknown") for group, column in GROUPS.items()}
VALUES |= {"all": pl.lit("all")}
"""A call's value of each group, and of the one that all are in."""

CELL = pl.struct(*GROUPS.values()).hash()
"""A number for what a call is in all groups at once."""

TIMES = {
    "ttft": pl.col("first_token_ns") - pl.col("due_ns"),
    "latency": pl.col("done_ns") - pl.col("due_ns"),
    "service_ttft": pl.col("first_token_ns") - pl.col("sent_ns"),
    "service_time": pl.col("done_ns") - pl.col("sent_ns"),
}
"""Name to nanoseconds of each time a call has; failed calls have none."""

TOKENS = (*USAGE, "written")


def _ratio(top: pl.Expr, bottom: pl.Expr, where: pl.Expr | None = None) -> pl.Expr:
    """Sum over sum, over the rows where both are known (and ``where`` holds); null if there is nothing to divide by."""
    known = top.is_not_null() & bottom.is_not_null()
    known = known if where is None else known & where
    total = bottom.filter(known).sum()
    return pl.when(total > 0).then(top.filter(known).sum() / total)


def total(name: str) -> pl.Expr:
    """The sum of a column; null where no row tells it."""
    return pl.when(pl.col(name).count() > 0).then(pl.col(name).sum())


_SOURCE = pl.col("write_source").filter(REPORTED)

AGENTS: dict[str, pl.Expr] = {
    "sessions": pl.col("session_no").n_unique(),
    "agents": AGENT.n_unique(),
    "subagents": AGENT.filter(pl.col("role") == "subagent").n_unique(),
}
FIGURES: dict[str, pl.Expr] = {
    "calls": CALLS.sum(),
    "calls_without_cache_report": CALLS.filter(~REPORTED).sum(),
    "warm_calls": CALLS.filter(WARM & REPORTED).sum(),
    "rate_prompt": PROMPT.filter(REPORTED).sum(),
    "warm_prompt": PROMPT.filter(WARM & REPORTED).sum(),
    **{name: total(name) for name in TOKENS},
    "output_calls": CALLS.filter(pl.col("output").is_not_null()).sum(),
    "output_est": pl.col("rec_output_est").filter(pl.col("output").is_null()).sum(),
    "write_source": first_of([(_SOURCE.len() == 0, "absent"), (_SOURCE.n_unique() > 1, "mixed")], _SOURCE.first()),
    "hit_rate": _ratio(READ, PROMPT),
    "warm_hit_rate": _ratio(READ, PROMPT, WARM),
    "hit_rate_excluding_writes": _ratio(READ, READ + UNCACHED),
    "read_write_ratio": _ratio(READ, WRITTEN),
}
"""Name to expression, over ``alike`` rows, of every figure that is given for a whole run and for each of its groups,
after the AGENTS that its calls are of. ``rate_prompt`` and ``warm_prompt`` are the denominators of the hit rates:
prompt tokens of the calls that reported what they read.
"""

OVER = {
    "hit_rate": REPORTED,
    "warm_hit_rate": WARM & REPORTED,
    "inside_85_97": WARM & REPORTED & (PROMPT > 0),
    "read_write_ratio": READ.is_not_null() & WRITTEN.is_not_null(),
}
"""Which calls some of the rates are taken over."""


def alike(rows: pl.LazyFrame, *keys: str) -> pl.DataFrame:
    """Calls that are of the same groups and tell the same kinds of tokens as one: their tokens added up, and how many
    ``calls`` they are. Figures over these are those over the calls, and these are few.
    """
    known = (pl.col(name).is_not_null().alias(f"{name}_known") for name in TOKENS)
    first = pl.col("turn", "write_source", *GROUPS.values()).first()
    sums = (total(name).alias(name) for name in TOKENS)
    kind = pl.struct(CELL, "write_source", *known).hash().alias("kind")
    found = rows.with_columns(kind, cell=CELL).group_by("kind", *keys)
    return collect(found.agg(first, *sums, pl.col("cell").first(), pl.col("rec_output_est").sum(), calls=pl.len()))


def of(rows: pl.LazyFrame) -> dict[str, Any]:
    """The figures of some rows, by name."""
    agents = collect(rows.select(**AGENTS)).row(0, named=True)
    return agents | alike(rows).select(**FIGURES).row(0, named=True)


def grouped(rows: pl.LazyFrame) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures by each group and its values, most calls first, buckets in their own order; under ``all`` of all."""
    calls = alike(rows)
    agents = collect(rows.select("session_no", "agent_no", cell=CELL).unique())
    found = {}
    for group, value in VALUES.items():
        table = calls.group_by(value.alias("value")).agg(**FIGURES)
        cells = calls.select("cell", "role", value=value).unique()
        own = agents.join(cells, on="cell").group_by("value").agg(**AGENTS).join(table, on="value")
        rates = {row.pop("value"): row for row in own.sort("calls", "value", descending=[True, False]).to_dicts()}
        found[group] = {name: rates[name] for name in ORDERED.get(group, rates) if name in rates}
    return found


def with_previous(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Rows, an agent's in a row, with what the call before left: prompt, unread remainder, end, TTL, model, plan.

    ``retention`` is the share of the previous prompt that was read; null on an agent's first call.
    """

    def left(name: str, by: pl.Expr, value: pl.Expr) -> pl.Expr:
        return pl.when(by.shift(1) == AGENT).then(value.shift(1)).alias(f"prev_{name}")

    # A call that failed reported no prompt and wrote nothing: what it could have read was left by the one before it.
    carried = {name: pl.when(pl.col(name).is_not_null()).then(AGENT) for name in ("prompt", "write_ttl_s")}
    held = pl.min_horizontal("cache_read", "prev_prompt")
    known = pl.col("cache_read").is_not_null() & (pl.col("prev_prompt") > 0)
    # One number of 64 bits is sorted by in a third of the time that two columns take.
    agents = collect(rows.select("agent_no").unique()).with_row_index("number")
    place = pl.col("number").cast(pl.Int64) * 2**32 + pl.col("turn")
    rows = rows.join(agents.lazy(), on="agent_no").with_columns(place=place).sort("place")
    linked = rows.with_columns(
        *(left(name, AGENT, pl.col(name)) for name in ("uncached", "done_ns", "model", "planned_prompt")),
        *(left(name, by.forward_fill(), pl.col(name).forward_fill()) for name, by in carried.items()),
    )
    return linked.with_columns(retention=pl.when(known).then(held / pl.col("prev_prompt")))


class Links(NamedTuple):
    """What calls kept of the prompts before them: how the share that each read of it spreads, the share of later calls
    whose planned prompt holds the whole one before it, and prefix losses; and how late they were sent.
    """

    retention: dict[str, Any]
    extending: float | None
    losses: pl.DataFrame
    lag: dict[str, Any]


def spread(values: pl.Expr, *percents: float, **beside: pl.Expr) -> pl.Expr:
    """Nearest-rank percentiles of values, by name, and what stands beside them; null where there are none. 100 is
    ``max``.
    """
    named = {"max" if p == 100 else f"p{p:g}": values.quantile(p / 100, "equiprobable") for p in percents}
    return pl.struct(value.alias(name) for name, value in (named | beside).items())


def in_seconds(times: dict[str, float | None]) -> dict[str, float | None]:
    """Times that were nanoseconds. Polars would multiply by the inverse, and may miss the last digit."""
    return {name: None if ns is None else ns / SECOND for name, ns in times.items()}


_WARM_RATES = RATE.filter(OVER["inside_85_97"])
_INSIDE = _WARM_RATES.is_between(*PUBLISHED_RANGE).mean()
LAG = spread(pl.coalesce("first_sent_ns", "sent_ns") - pl.col("due_ns"), 50, 99, 100)
"""How late calls were sent, for the first time, after they were due, in nanoseconds."""


def _ttft(bucket: str) -> pl.Expr:
    return TIMES["ttft"].filter(pl.col("turn_bucket") == bucket).quantile(0.5, "equiprobable")


WHOLE = {
    "hit_rate": FIGURES["hit_rate"],
    "warm_hit_range": spread(_WARM_RATES, 5, 50, 95, inside_85_97=_INSIDE, calls=_WARM_RATES.len()),
    "cold_write_share": _ratio(pl.when(~WARM).then(WRITTEN).otherwise(0), WRITTEN),
    "turn_drift": pl.when(_ttft("2-5") > 0).then(_ttft("50+") / _ttft("2-5")),
}
"""Figures of a whole run: how the hit rates of single warm calls spread, and the share of them inside 85-97 %; tokens
written by agents' first calls over all that were written; the median TTFT of late turns over that of early ones, which
says whether those still feel fast.
"""


def hit_rate_macro(rows: pl.LazyFrame) -> float | None:
    """Mean over agents of each agent's own hit rate."""
    agents = rows.filter(REPORTED).group_by("agent_no").agg(rate=_ratio(READ, PROMPT))
    rates = collect(agents.select("rate").drop_nulls()).to_series()
    return fsum(rates) / len(rates) if len(rates) else None


# Joined by a hash of 64 bits, as agents are told apart: names are long, and there may be very many.
KEY = (pl.col("call").hash() + pl.col("copy").cast(pl.UInt64)).alias("key")


def bounded(loaded: Loaded) -> pl.LazyFrame:
    """The calls that reported what they read once for each ``bound`` stored with the run, ``best`` what it allowed."""
    assert loaded.bounds is not None
    best = loaded.bounds.select(KEY, "bound", best="cache_read")
    return loaded.scan.filter(REPORTED).select(KEY, "cache_read", "planned_prompt").join(best, on="key")


def achievable(loaded: Loaded) -> dict[str, float]:
    """Hit rate that was to be had under each bound stored with the run, over the calls that reported theirs."""
    if loaded.bounds is None:
        return {}
    # To join all is dear, and needless where a bound's calls, less those that reported nothing, are those that did:
    # then their keys add up to the same.
    reported, others = loaded.scan.filter(REPORTED), loaded.scan.filter(~REPORTED).select(KEY)
    keys, planned = collect(reported.select(KEY.sum(), pl.col("planned_prompt").sum())).row(0)
    best = loaded.bounds.select(KEY, "bound", "cache_read").drop_nulls().join(others, on="key", how="anti")
    sums = collect(best.group_by("bound").agg(pl.col("key", "cache_read").sum()).sort("bound")).rows()
    if planned and all(key == keys for _, key, _ in sums):
        return {bound: read / planned for bound, _, read in sums}
    rates = bounded(loaded).group_by("bound").agg(rate=_ratio(pl.col("best"), pl.col("planned_prompt")))
    return {bound: rate for bound, rate in collect(rates).sort("bound").iter_rows() if rate is not None}


def task_time(loaded: Loaded) -> dict[str, Any]:
    """Wall seconds of sessions whose every call ended (in a bounded run: that ran whole in the time that was measured),
    and ``stretch``: that over the recorded session's.

    Stretch is None where gaps were cut or divided on a clock the endpoint does not share: the recorded session is then
    not the same plan.
    """
    options, scale = loaded.told("options"), time_scale(loaded)
    inside = pl.col("completed").is_not_null() | (options.get("duration_s") is None)
    sessions = loaded.scan.group_by("session_no").agg(
        wall=(pl.col("done_ns").max() - pl.col("due_ns").min()),
        recorded=(pl.col("rec_end_ns").max() - pl.col("rec_start_ns").min()),
        whole=(pl.col("done_ns").is_not_null() & inside).all(),
    )
    same_plan = options.get("gap_cap_s") is None and (options.get("speed") or 1.0) in (1.0, scale)
    stretch = (pl.col("wall") * scale / pl.col("recorded")).filter(pl.col("recorded") > 0)
    stretched = (stretch.len() > 0) & (same_plan and loaded.kind == "run")
    times = spread(pl.col("wall"), 50, 90, 100), pl.when(stretched).then(spread(stretch, 50, 90, 100)).alias("stretch")
    wall, stretches = collect(sessions.filter("whole").select(*times)).row(0)
    return {"task_time": in_seconds(wall), "stretch": stretches}


def whole(loaded: Loaded, links: Links) -> dict[str, Any]:
    """The figures that are given for a whole run only."""
    rates, told = achievable(loaded), each(loaded.scan, WHOLE)
    hit, predicted = told["hit_rate"], rates.pop("predicted", None)
    return {
        **told,
        "predicted_hit_rate": predicted,
        "hit_rate_macro": hit_rate_macro(loaded.scan),
        "retention": links.retention,
        "achievable_hit_rate": rates or None,
        "efficiency": {b: hit / rate for b, rate in rates.items() if hit is not None and rate} or None,
        **task_time(loaded),
        "schedule_lag": in_seconds(links.lag) if loaded.kind == "run" else None,
    }
