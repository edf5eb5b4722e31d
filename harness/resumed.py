"""Resumed is a run that goes on where it was cut off: whole sessions are kept, the others run again."""

from collections import Counter
from functools import reduce
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from keepwarm.harness.asking import replayed
from keepwarm.harness.planned import Planned
from keepwarm.replayers.run import BOUNDS, under_way
from keepwarm.replayers.tokens import Costs
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import JOURNAL, KEPT, OUTCOMES, completed_but, written
from keepwarm.traces.store import ROWS_PER_BATCH, read_trace_table, write_batches

FREE = ("processes", "ray")
"""Options that may be others when a run goes on."""


SAME = {"endpoint.url", "endpoint.dialect", "endpoint.server.model", "cache.how", "fidelity.match"}
"""What must be the same besides the other options."""


class Resumed(NamedTuple):
    """What is known of the run: its run.json, the costs that its texts were written by, its rows, its whole sessions
    (name, copy), and when its last call was over.
    """

    about: dict[str, Any]
    costs: Costs
    rows: pa.Table
    over: frozenset[tuple[str, int]]
    last_ns: int


def resume(run: Path, planned: Planned) -> Resumed:
    """A replay that is to be taken up again. InputError where it is none of this trace."""
    about, costs = replayed(run)
    if about["trace"]["digest"] != planned.meta.digest:
        raise InputError(f"{run}: is a replay of another trace: {about['trace'].get('name')}")
    rows = written(run)
    return Resumed(about, costs, rows, _whole(rows, planned), pc.max(rows.column("done_ns")).as_py() or 0)


def same(resumed: Resumed, asked: dict[str, Any]) -> None:
    """InputError where a run would go on otherwise than it began: ``asked`` is what its run.json would have."""
    options = {f"options.{name}" for name in asked["options"].keys() - FREE}
    for field in sorted(SAME | options):
        before, now = _at(resumed.about, field), _at(asked, field)
        if orjson.dumps(before) != orjson.dumps(now):
            raise InputError(f"--resume: the run has {field.rpartition('.')[2]} {before!r}, not {now!r}")
    if (resumed.about["endpoint"]["preflight"] is None) != (asked["endpoint"]["preflight"] is None):
        raise InputError("--resume: the run has begun with a preflight or without, and must go on so")


def _at(about: Any, field: str) -> Any:
    return reduce(dict.get, field.split("."), about)


def keep(run: Path, resumed: Resumed) -> None:
    """Put what the run has of whole sessions aside for its end, and forget the rest."""
    rows = resumed.rows
    keys = zip(rows.column("session").to_pylist(), rows.column("copy").to_pylist(), strict=True)
    kept = rows.filter(pa.array([key in resumed.over for key in keys], pa.bool_()))
    write_batches(str(run / KEPT), completed_but(kept, frozenset()).to_batches(ROWS_PER_BATCH))
    for name in (OUTCOMES, JOURNAL, BOUNDS, "latency.hlog"):
        (run / name).unlink(missing_ok=True)
    for shard in run.glob("shard-*"):
        with under_way(shard):
            rmtree(shard)


def _whole(rows: pa.Table, planned: Planned) -> frozenset[tuple[str, int]]:
    """The sessions all of whose planned calls have a whole answer."""
    calls = Counter(read_trace_table(planned.trace, ["session"]).column("session").to_pylist())
    good = pc.and_(pc.is_null(rows.column("error")), pc.less(pc.fill_null(rows.column("status"), 999), 300))
    answered = rows.filter(good).group_by(["session", "copy"]).aggregate([("call", "count_distinct")])
    columns = (column.to_pylist() for column in answered.columns)
    return frozenset((one, copy) for one, copy, count in zip(*columns, strict=True) if count == calls[one])
