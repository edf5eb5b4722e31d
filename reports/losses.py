"""Loss is a call that read less than half of what its predecessor left; here each gets its cause.

Also: where a run's reads differ from the recorded ones, and what explains it.
"""

from typing import Any

import polars as pl

from keepwarm.reports.frame import Loaded, collect, each, first_of, recorded_side, time_scale
from keepwarm.reports.metrics import AGENT, LAG, REPORTED, WARM, Links, spread, with_previous

LOSS = 0.5
SMALL = 32
FALL = 1024
RATES = {
    "run": pl.col("run_read").sum() / pl.col("run_prompt").sum(),
    "recorded": pl.col("cache_read").sum() / pl.col("prompt").sum(),
}
BESIDE = ["session_no", "turn", "cache_read", "prompt", "run_read", "run_prompt", "difference"]


def cause(scale: float, provider: bool) -> pl.Expr:
    """Why a call kept less of its prefix than it might: the first cause that holds.

    ``scale`` is the seconds of the endpoint's clock in a measured second; ``provider`` is whether ``rec_miss_reason``
    is the word of the endpoint that was measured.
    """
    told = pl.col("rec_miss_reason") if provider else pl.lit(None, pl.String)
    change = pl.col("prefix_change").fill_null("")
    idle_s = (pl.col("sent_ns") - pl.col("prev_done_ns")) / 1e9 * scale
    causes = (
        (told.is_not_null(), "provider: " + told),
        ((change == "model_switch") | (pl.col("model") != pl.col("prev_model")), "model_switch"),
        (change.is_in(["compaction", "microcompaction"]), "compaction"),
        ((pl.col("planned_keep") < pl.col("prev_planned_prompt")) | (change != ""), "prompt_changed"),
        (idle_s > pl.col("prev_write_ttl_s"), "ttl"),
    )
    return first_of(causes, "unknown")


def links_of(loaded: Loaded) -> Links:
    """What calls kept of the prompts before them. Only agents that lost a prefix are looked at for its cause."""
    known, lost = pl.col("retention").is_not_null(), pl.col("retention") < LOSS
    held = pl.min_horizontal("cache_read", "prev_prompt")
    planned, before = pl.col("planned_keep"), pl.col("prev_planned_prompt")
    linked = with_previous(loaded.scan).select(
        retention=spread(pl.col("retention"), 1, 5, 50, of_tokens=held.filter(known).sum(), calls=known.sum()),
        left=pl.col("prev_prompt").filter(known).sum(),
        extending=(planned >= before).fill_null(False).filter(before.is_not_null()).mean(),
        agents=AGENT.filter(lost).unique().implode(),
    )
    told = collect(linked)
    losers = with_previous(loaded.scan.filter(AGENT.is_in(told["agents"])))
    why = cause(time_scale(loaded), provider=loaded.kind == "recording")
    could = pl.min_horizontal("prompt", "prev_prompt") - held
    causes = losers.filter(lost).select("written", cause=why, lost=pl.col("prev_prompt") - held, could=could)
    retention, left, extending, _ = told.row(0)
    retention["of_tokens"] = retention["of_tokens"] / left if left else None
    return Links(retention, extending, collect(causes), each(loaded.scan, {"lag": LAG})["lag"])


def table(loaded: Loaded, links: Links) -> list[dict[str, Any]]:
    """Prefix losses by cause, most tokens first: calls, tokens lost of the previous prompt, share of all written
    tokens that these calls wrote (None where writes are unknown), and the points of warm hit rate they cost.
    """
    sums = loaded.scan.select(pl.col("written").sum(), warm=pl.col("prompt").filter(WARM & REPORTED).sum())
    written, warm_prompt = collect(sums).row(0)
    rows = links.losses.group_by("cause").agg(
        calls=pl.len(),
        tokens_lost=pl.col("lost").sum(),
        share_of_written=pl.col("written").sum() / written if written else pl.lit(None, pl.Float64),
        points_of_warm_hit_rate=100 * pl.col("could").sum() / warm_prompt,
    )
    return rows.sort("tokens_lost", "cause", descending=[True, False]).to_dicts()


def compare_recorded(rows: pl.LazyFrame) -> dict[str, Any] | None:
    """A run's cache reads beside the recorded ones of the same calls; None where no call has both.

    Rates are over the calls that have both. ``explained`` groups run minus recorded by what the recording shows.
    """
    both = REPORTED & pl.col("rec_cache_read").is_not_null() & (pl.col("rec_prompt") > 0) & (pl.col("prompt") > 0)
    difference = pl.col("cache_read") - pl.col("rec_cache_read")
    measured = rows.with_columns(both=both, difference=difference, run_prompt="prompt", run_read="cache_read")
    if not collect(measured.select(both.any())).item():
        return None
    linked = collect(with_previous(recorded_side(measured)).filter("both").select(BESIDE, cause=explanation()))
    warm = linked.filter(WARM)
    rates = warm.select(**RATES).row(0) if len(warm) else (None, None)
    exact = warm.select((pl.col("difference").abs() <= SMALL).mean()).item()
    return {
        "calls": len(linked),
        "warm_calls": len(warm),
        "warm_hit_rate": rates[0],
        "recorded_warm_hit_rate": rates[1],
        "difference_points": None if None in rates else 100 * (rates[0] - rates[1]),
        "warm_calls_within_32_tokens": exact,
        "sessions": session_differences(warm),
        "explained": explained(linked),
    }


def session_differences(warm: pl.DataFrame) -> dict[str, Any]:
    """Points of warm hit rate, session by session, that the run is away from the recording."""
    sessions = warm.group_by("session_no").agg(**RATES)
    away = (100 * (sessions["run"] - sessions["recorded"])).abs()
    within = {f"within_{p:g}": (away <= p).mean() if len(away) else None for p in (0.5, 1.0, 1.5, 2.0)}
    return {"sessions": len(away), **within, "max": away.max()}


def explanation() -> pl.Expr:
    """What the recording shows of a call whose read a run did not repeat; first that holds."""
    left = pl.col("prev_prompt") - pl.col("prev_uncached").fill_null(0)
    why = cause(1.0, provider=True)
    fell = pl.col("cache_read") < pl.min_horizontal(left, pl.col("prompt")) - FALL
    kind = pl.col("gap_kind").fill_null("unknown")
    unexplained = why.is_in(["unknown", "prompt_changed"]) & fell & pl.col("prefix_change").is_null()
    explanations = (
        (pl.col("turn") == 0, "first call: warmed by traffic outside the data"),
        (pl.col("difference").abs() <= SMALL, "32 tokens or less"),
        (pl.col("prefix_change") == "recorded_break", "prefix cut to what was read (informed)"),
        (pl.col("cache_read") > left + SMALL, "read more than its predecessor left: a call outside the data wrote"),
        (unexplained, "fell inside its TTL, no cause in the log, after a " + kind + " gap"),
        (why == "unknown", "other"),
    )
    return first_of(explanations, why)


def explained(linked: pl.DataFrame) -> list[dict[str, Any]]:
    """Run minus recorded tokens read, by explanation, largest first; points are of the warm hit rate, or of the
    hit rate for first calls.
    """
    prompts = linked.select(all=pl.col("run_prompt").sum(), warm=pl.col("run_prompt").filter(WARM).sum()).row(0)
    groups = linked.filter(pl.col("difference") != 0).group_by("cause")
    sums = groups.agg(calls=pl.len(), tokens=pl.col("difference").sum(), first=(pl.col("turn") == 0).all())
    whole = pl.when(pl.col("first")).then(prompts[0]).otherwise(prompts[1])
    points = sums.with_columns(points=100 * pl.col("tokens") / whole)
    return points.sort(pl.col("tokens").abs(), "cause", descending=[True, False]).drop("first").to_dicts()
