"""Summary is everything a report says of one run or recording, as one JSON-ready dict."""

from __future__ import annotations

from typing import Any

import polars as pl

from keepwarm.reports import latency, losses, metrics
from keepwarm.reports.frame import Loaded, provenance, time_scale
from keepwarm.reports.prices import Prices, cost
from keepwarm.reports.reconcile import reconcile
from keepwarm.reports.validity import failures, validity

ABOUT = ("keepwarm", "mode", "trace", "endpoint", "options", "cache", "fidelity", "clock", "started", "ended", "seed")


def summarise(loaded: Loaded, prices: Prices) -> dict[str, Any]:
    """The report of a run or recording: figures at the top level and under ``by_<group>``, rates as fractions, times in
    seconds, None where unknown; with validity, losses, latency, cost and, for a run, the recording beside it.
    """
    linked = metrics.with_previous(loaded.rows)
    told = figures(loaded, linked)
    return {
        **told,
        "latency": times(loaded),
        "cost": cost(loaded, prices),
        "reconciliation": reconcile(loaded, linked, told),
        "recorded": losses.compare_recorded(loaded.rows) if loaded.kind == "run" else None,
    }


def figures(loaded: Loaded, linked: pl.DataFrame) -> dict[str, Any]:
    """What a run or recording is, its validity and cache figures, whole and by group; linked: rows with_previous."""
    recorded = loaded.kind == "recording"
    return {
        "name": loaded.name,
        "kind": loaded.kind,
        "path": loaded.path,
        "about": loaded.about if recorded else {key: loaded.about.get(key) for key in ABOUT},
        **provenance(loaded),
        **validity(loaded, linked),
        "failures": failures(loaded.rows),
        **metrics.of(loaded.rows),
        **metrics.whole(loaded, linked),
        **{f"by_{group}": metrics.by(loaded.rows, group) for group in metrics.GROUPS},
        "losses": losses.table(linked, time_scale(loaded), provider=recorded),
    }


def times(loaded: Loaded) -> dict[str, Any]:
    """Latencies of a run or recording, whole and by group, in seconds as they were measured."""
    grouped = {f"by_{group}": latency.by(loaded.rows, group) for group in metrics.GROUPS}
    return {**latency.of(loaded.rows), **grouped, "time_scale": time_scale(loaded)}
