"""What a run's calls could have read at most, and what the simulated engine reads: of the run as it went."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from keepwarm.harness.planned import Planned
from keepwarm.harness.progress import progress
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.plain import KeepBlocks, Plain
from keepwarm.replayers.prompts import in_tree
from keepwarm.replayers.router import Router
from keepwarm.replayers.run import Bound, write_bounds
from keepwarm.replayers.sent import Row, Sent
from keepwarm.replayers.simulate import simulate
from keepwarm.replayers.times import ServiceTimes
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.journal import OUTCOMES
from keepwarm.traces.store import ROWS_PER_BATCH, read_outcome_table


def bound(path: Path, planned: Planned, server: dict[str, Any] | None, *, live: bool) -> None:
    """Write into a run's directory what each call that was sent could have read, at the times at which they were sent,
    from an endless cache that keeps prompts (``endless``); and what it reads from a cluster of the server's workers,
    block and capacity, where it tells them (``predicted``).
    """
    tree = PromptTree()
    endless = KeepBlocks(BlockCache(tree, block=1), answers=live, at_once=True)
    name, every, shadows, router = "endless", [endless], {}, Router("round_robin", block=1)
    if server and server.get("block"):
        size = {"block": server["block"], "capacity": server.get("blocks")}
        every = [KeepBlocks(BlockCache(tree, **size), answers=live) for _ in range(server.get("workers") or 1)]
        kind = "kv_aware" if "router_cached_tokens" in server["counters"] else "round_robin"
        name, shadows, router = "predicted", {"endless": endless}, Router(kind, block=size["block"])
    cluster = Cluster(tree, [Plain(each, times=ServiceTimes()) for each in every], router, shadows=shadows)
    write_bounds(path, _told(path, planned, cluster, name, live=live))


def _told(path: Path, planned: Planned, cluster: Cluster, name: str, *, live: bool) -> Iterator[Bound]:
    table = _sent(path)
    sessions = table.group_by(["session", "copy"]).aggregate([([], "count_all")])
    calls = {(one, copy): count for one, copy, count in zip(*(c.to_pylist() for c in sessions.columns), strict=True)}
    parts = table.to_batches(ROWS_PER_BATCH)
    rows = (Row(*row) for part in parts for row in zip(*(c.to_pylist() for c in part), strict=True))
    sent = Sent(rows, calls, planned.sessions_of_run(), in_tree(cluster.tree))
    with progress("predicting", table.num_rows) as tell:
        for done, (outcome, bounds) in enumerate(simulate(sent, cluster, live=live), 1):
            for which, read in (bounds | {name: outcome.cache_read or 0}).items():
                yield Bound(outcome.call.call, outcome.copy, which, read)
            tell(done, None)


def _sent(path: Path) -> pa.Table:
    """The calls that were sent, in that order; where a call was tried again, by its first try."""
    names = ["session", "copy", "call", "sent_ns", "first_token_ns", "done_ns"]
    table = read_outcome_table(str(path / OUTCOMES), [*names, "first_sent_ns"])
    sent, token, done, first = table.columns[3:]
    told = pc.coalesce(first, sent), pc.coalesce(token, done, sent), pc.coalesce(done, sent)
    table = pa.table([*table.columns[:3], *told], names)
    table = table.filter(pc.is_valid(table.column("sent_ns")))
    return table.sort_by([("sent_ns", "ascending"), ("copy", "ascending")])
