"""Summary is everything a report says of one run or recording, as one JSON-ready dict."""

from __future__ import annotations

from typing import Any

from keepwarm.reports import latency, losses, metrics
from keepwarm.reports.frame import Loaded, provenance, time_scale
from keepwarm.reports.prices import Prices, cost
from keepwarm.reports.reconcile import reconcile
from keepwarm.reports.validity import failures, validity

ABOUT = ("keepwarm", "mode", "trace", "endpoint", "options", "cache", "fidelity", "clock", "started", "ended", "seed")


def summarise(
    loaded: Loaded, prices: Prices, gpu_hour_price: float | None = None, gpus: int | None = None
) -> dict[str, Any]:
    """The report of a run or recording: figures at the top level and under ``by_<group>``, rates as fractions, times in
    seconds, None where unknown; with validity, losses, latency, cost and, for a run, the recording beside it.
    """
    linked = metrics.with_previous(loaded.rows)
    recorded = loaded.kind == "recording"
    whole = metrics.of(loaded.rows) | metrics.whole(loaded, linked)
    return {
        "name": loaded.name,
        "kind": loaded.kind,
        "path": loaded.path,
        "about": loaded.about if recorded else {key: loaded.about.get(key) for key in ABOUT},
        **provenance(loaded),
        **validity(loaded, linked),
        "failures": failures(loaded.rows),
        **whole,
        **{f"by_{group}": metrics.by(loaded.rows, group) for group in metrics.GROUPS},
        "losses": losses.table(linked, time_scale(loaded), provider=recorded),
        "latency": times(loaded),
        "cost": cost(loaded, prices, gpu_hour_price, gpus),
        "reconciliation": reconcile(loaded, linked, whole),
        "recorded": None if recorded else losses.compare_recorded(loaded.rows),
    }


def times(loaded: Loaded) -> dict[str, Any]:
    """Latencies of a run or recording, whole and by group, in seconds as they were measured."""
    grouped = {f"by_{group}": latency.by(loaded.rows, group) for group in metrics.GROUPS}
    return {**latency.of(loaded.rows), **grouped, "time_scale": time_scale(loaded)}
