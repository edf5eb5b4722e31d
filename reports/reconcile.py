"""Reconciliation sets side by side what clients were told, what the server counted, and what a simulator expected.

The server's counters hold all of its traffic: a residual is what others asked of it meanwhile, or what was lost.
"""

from typing import Any

import polars as pl

from keepwarm.reports.frame import Loaded, collect
from keepwarm.reports.metrics import REPORTED, bounded, total, with_previous
from keepwarm.reports.validity import ANSWERED

COLUMNS = {"prompt_tokens": "prompt", "cached_tokens": "cache_read", "output_tokens": "output"}
"""The column whose sum over the answered calls is what a server's counter should have counted."""


def reconcile(loaded: Loaded, figures: dict[str, Any]) -> dict[str, Any] | None:
    """``rows`` of figure, client, server and their difference; ``hit_rate`` by client, server, the server's router, and
    as ``predicted`` by the simulator; and ``as_block_rule``, the share of calls that read what an engine's block cache
    of that block must give. ``figures`` are the run's. None where the server told nothing; a figure that one side did
    not tell is None.
    """
    told = loaded.told("counters")
    before, after = told.get("before") or {}, told.get("after") or {}
    if loaded.kind != "run" or not before:
        return None
    first, last = before.get("counters") or {}, after.get("counters") or {}
    server = {name: last[name] - first[name] for name in first if name in last}
    sums = {name: total(column) for name, column in COLUMNS.items()}
    client = collect(loaded.every.filter(ANSWERED).select(requests=pl.len(), **sums)).row(0, named=True)
    rows = [_row(name, value, server.get(name)) for name, value in client.items()]
    predicted = figures.get("predicted_hit_rate")
    return {
        "kind": before.get("kind"),
        "rows": rows,
        "hit_rate": {
            "client": figures["hit_rate"],
            "server": _ratio(server.get("cached_tokens"), server.get("prompt_tokens")),
            "router": _ratio(server.get("router_cached_tokens"), server.get("router_prompt_tokens")),
            "predicted": predicted,
        },
        "as_predicted": _as_predicted(loaded) if predicted is not None else None,
        "as_block_rule": _as_block_rule(loaded, before),
        "preemptions": server.get("preemptions"),
    }


def _row(name: str, client: float | None, server: float | None) -> dict[str, Any]:
    known = client is not None and server is not None
    return {"figure": name, "client": client, "server": server, "residual": server - client if known else None}  # type: ignore[operator]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _as_predicted(loaded: Loaded) -> float | None:
    """The share of calls that read, to the token, what was predicted."""
    predicted = bounded(loaded).filter(pl.col("bound") == "predicted")
    share: float | None = collect(predicted.select((pl.col("best") == pl.col("cache_read")).mean())).item()
    return share


def _as_block_rule(loaded: Loaded, server: dict[str, Any]) -> dict[str, Any] | None:
    """Over calls whose prompt holds the whole of their agent's previous one, and of its answer where they are live: the
    share that read its whole blocks, but for the one with the last token. The tokens are those the endpoint reported,
    not those planned. Of several workers' calls those that are known to be by the one that answered before.
    """
    block = server.get("block")
    if not block:
        return None
    live = loaded.told("options").get("assistant") == "live"
    left = pl.col("prev_prompt") + (pl.col("output").shift(1) - 1 if live else 0)
    held = pl.min_horizontal(left, pl.col("prompt") - 1) // block * block
    good = REPORTED & (pl.col("planned_keep") >= pl.col("prev_planned_prompt")) & pl.col("prev_prompt").is_not_null()
    if (server.get("workers") or 1) > 1:
        good &= pl.col("worker") == pl.col("worker").shift(1)
    grown = with_previous(loaded.scan).select("cache_read", held=held, good=good).filter("good")
    calls, share = collect(grown.select(pl.len(), share=(pl.col("cache_read") == pl.col("held")).mean())).row(0)
    return {"block": block, "calls": calls, "share": share}
