"""The journal of a run that is under way: outcomes as they come, each on disk at once, readable after a crash.

It is a line of JSON an outcome, behind one with the names of the columns, beside the place of ``outcomes.parquet``,
which it becomes at the end. A row costs a replay a few microseconds, and never holds it up as a batch of them would.
"""

from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from keepwarm.traces import schema
from keepwarm.traces.columns import outcome_row, rows_to_batch
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Outcome
from keepwarm.traces.store import ROWS_PER_BATCH, read_outcome_table, write_batches

JOURNAL = "outcomes.jsonl"
OUTCOMES = "outcomes.parquet"
KEPT = "kept.parquet"
"""Beside a journal: what a resumed run has from before."""

NAMES = schema.OUTCOMES.names
SESSION, COPY, COMPLETED, ATTEMPTS = (NAMES.index(name) for name in ("session", "copy", "completed", "attempts"))


class Journal:
    """Appends outcomes to a run's journal; what was added survives the program. InputError where it cannot be
    written. ``partial`` are sessions (name, copy) of which nobody can say that they were completed; it is looked at in
    the end.
    """

    def __init__(self, run: Path, *, partial: Set[tuple[str, int]] = frozenset()) -> None:
        self._run, self._partial = run, partial
        self._whole: dict[tuple[str, int], bool | None] = {}
        self.rows = 0
        try:
            self._file = (run / JOURNAL).open("wb", buffering=0)
        except OSError as error:
            raise InputError(f"{run / JOURNAL}: cannot be written: {error.strerror}") from error
        self._write(NAMES)

    def add(self, outcome: Outcome) -> None:
        """Append an outcome. Its session is completed while all of its outcomes are whole answers."""
        key = outcome.call.session, outcome.copy
        self._whole[key] = bool(self._whole.get(key, True)) and outcome.whole
        self.rows += 1
        self._write(outcome_row(outcome))

    def _write(self, row: Any) -> None:
        line = orjson.dumps(row, default=tuple, option=orjson.OPT_APPEND_NEWLINE)
        try:
            written = self._file.write(line)
        except OSError as error:
            raise InputError(f"{self._run / JOURNAL}: cannot be written: {error.strerror}") from error
        if written != len(line):
            raise InputError(f"{self._run / JOURNAL}: cannot be written: the disk is full")

    def close(self) -> None:
        """Turn the journal, with what was kept from before, into the run's outcomes, each row with its session's
        completion.
        """
        self._file.close()
        self._whole |= dict.fromkeys(self._partial & self._whole.keys())
        write_batches(str(self._run / OUTCOMES), _batches(self._run, self._whole))
        (self._run / JOURNAL).unlink()
        (self._run / KEPT).unlink(missing_ok=True)


def complete(run: Path, failed: Set[tuple[str, int]]) -> None:
    """Write into a run's outcomes that these sessions (name, copy) were not completed, and all others were."""
    table = completed_but(read_outcome_table(str(run / OUTCOMES)), failed)
    write_batches(str(run / OUTCOMES), table.to_batches(ROWS_PER_BATCH))


def completed_but(rows: pa.Table, failed: Set[tuple[str, int]]) -> pa.Table:
    """Outcomes of sessions that were completed but for these (name, copy)."""
    keys = zip(rows.column("session").to_pylist(), rows.column("copy").to_pylist(), strict=True)
    column = pa.array([key not in failed for key in keys], pa.bool_())
    return rows.set_column(COMPLETED, schema.OUTCOMES.field("completed"), column)


def read_journal(run: Path) -> pa.Table:
    """What a run's journal holds, and what was kept from before; the row that a crash cut is left out."""
    batches = list(_batches(run, {}))
    if not batches:
        raise InputError(f"{run / JOURNAL}: holds no outcome")
    return pa.Table.from_batches(batches, schema=schema.OUTCOMES)


def written(run: Path) -> pa.Table:
    """What a run has written so far, its shards too; perhaps nothing."""
    tables = [written(shard) for shard in sorted(run.glob("shard-*"))]
    if (run / OUTCOMES).exists():
        tables.append(read_outcome_table(str(run / OUTCOMES)))
    else:
        with suppress(InputError):
            tables.append(read_journal(run))
    return pa.concat_tables([schema.OUTCOMES.empty_table(), *tables])


def _batches(run: Path, whole: Mapping[tuple[str, int], bool | None]) -> Iterator[pa.RecordBatch]:
    """The rows, some in memory at a time; sessions that are in ``whole`` with their completion."""
    if (run / KEPT).exists():
        yield from read_outcome_table(str(run / KEPT)).to_batches(ROWS_PER_BATCH)
    rows = _rows(run)
    names = next(rows, [])
    while chunk := list(islice(rows, ROWS_PER_BATCH)):
        for row in chunk:
            row[ATTEMPTS] = list(map(tuple, row[ATTEMPTS]))
            if whole:
                row[COMPLETED] = whole[row[SESSION], row[COPY]]
        yield rows_to_batch(names, chunk)


def _rows(run: Path) -> Iterator[list[Any]]:
    """A journal's lines up to the first that is not whole: the columns' names, and the rows."""
    with suppress(OSError, orjson.JSONDecodeError), (run / JOURNAL).open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield orjson.loads(line)
