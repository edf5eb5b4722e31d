"""Summary is everything a report says of one run or recording, as one JSON-ready dict."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from keepwarm.reports import latency, losses, metrics
from keepwarm.reports.frame import Loaded, provenance, time_scale
from keepwarm.reports.prices import Prices, cost
from keepwarm.reports.reconcile import reconcile
from keepwarm.reports.validity import failures, validity

ABOUT = ("keepwarm", "mode", "trace", "endpoint", "options", "cache", "fidelity", "clock", "started", "ended", "seed")


def summarise(loaded: Loaded, prices: Prices) -> tuple[dict[str, Any], latency.Counts]:
    """The report of a run or recording: figures at the top level and under ``by_<group>``, rates as fractions, times in
    seconds, None where unknown; with validity, losses, latency, cost and, for a run, the recording beside it. Then its
    times as they were counted, which is done beside the rest.
    """
    with ThreadPoolExecutor(1) as beside:
        counting = beside.submit(latency.counts_of, loaded.scan)
        told = figures(loaded)
        rest = {
            "cost": cost(loaded, prices),
            "reconciliation": reconcile(loaded, told),
            "recorded": losses.compare_recorded(loaded.scan) if loaded.kind == "run" else None,
        }
        times = counting.result()
    latencies = {f"by_{group}": latency.grouped(times, group) for group in metrics.GROUPS}
    told["latency"] = {**latency.whole(times), **latencies, "time_scale": time_scale(loaded)}
    return told | rest, times


def figures(loaded: Loaded) -> dict[str, Any]:
    """What a run or recording is, its validity and cache figures, whole and by group."""
    recorded, grouped = loaded.kind == "recording", metrics.grouped(loaded.scan)
    links, total = losses.links_of(loaded), grouped.pop("all").get("all") or metrics.of(loaded.scan)
    return {
        "name": loaded.name,
        "kind": loaded.kind,
        "path": loaded.path,
        "about": loaded.about if recorded else {key: loaded.about.get(key) for key in ABOUT},
        **provenance(loaded),
        **validity(loaded, links),
        "failures": failures(loaded.scan),
        **total,
        **metrics.whole(loaded, links),
        **{f"by_{group}": told for group, told in grouped.items()},
        "losses": losses.table(loaded, links),
    }
