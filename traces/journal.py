"""The journal of a run that is under way: outcomes as they come, on disk within a second, readable after a crash.

It is an Arrow stream in the outcome schema beside the place of ``outcomes.parquet``, which it becomes at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer

import pyarrow as pa

from keepwarm.traces import schema
from keepwarm.traces.columns import outcomes_to_batch
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Outcome
from keepwarm.traces.place import first_line
from keepwarm.traces.store import read_outcome_table, write_outcome_table

JOURNAL = "outcomes.arrows"
OUTCOMES = "outcomes.parquet"
FLUSH_S = 1.0
FLUSH_ROWS = 100
"""Few enough that a replay is not held up for long."""


class Journal:
    """Appends outcomes to a run's journal; what was added more than a second ago survives the program.

    InputError where it cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        try:
            self._file = (run / JOURNAL).open("wb")
        except OSError as error:
            raise InputError(f"{run / JOURNAL}: cannot be written: {error.strerror}") from error
        self._stream = pa.ipc.new_stream(self._file, schema.OUTCOMES)
        self._buffer: list[Outcome] = []
        self._lock = Lock()
        self._timer: Timer | None = None
        self._whole: dict[tuple[str, int], bool] = {}
        self.rows = 0

    def add(self, outcome: Outcome) -> None:
        """Append an outcome. Its session is completed while all of its outcomes are whole answers."""
        key = outcome.call.session, outcome.copy
        whole = outcome.error is None and outcome.status is not None and 200 <= outcome.status < 300
        self._whole[key] = self._whole.get(key, True) and whole
        self.rows += 1
        with self._lock:
            self._buffer.append(outcome)
            if len(self._buffer) >= FLUSH_ROWS:
                self._flush()
            elif self._timer is None:
                self._timer = Timer(FLUSH_S, self._flush_late)
                self._timer.daemon = True
                self._timer.start()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._buffer:
            try:
                self._stream.write_batch(outcomes_to_batch(self._buffer))
                self._file.flush()
            except OSError as error:
                raise InputError(f"{self._run / JOURNAL}: cannot be written: {first_line(error)}") from error
            self._buffer.clear()

    def _flush_late(self) -> None:
        """Flush what has waited long enough; where that fails, the next flush says so."""
        with self._lock, suppress(InputError):
            self._flush()

    def close(self) -> None:
        """Turn the journal into the run's outcomes, each row with its session's completion."""
        with self._lock:
            self._flush()
        self._stream.close()
        self._file.close()
        table = _with_completed(read_journal(self._run), self._whole)
        write_outcome_table(str(self._run / OUTCOMES), table)
        (self._run / JOURNAL).unlink()


def complete(run: Path, failed: Set[tuple[str, int]]) -> None:
    """Write into a run's outcomes that these sessions (name, copy) were not completed, and all others were."""
    table = read_outcome_table(str(run / OUTCOMES))
    keys = set(zip(table.column("session").to_pylist(), table.column("copy").to_pylist(), strict=True))
    write_outcome_table(str(run / OUTCOMES), _with_completed(table, {key: key not in failed for key in keys}))


def _with_completed(table: pa.Table, whole: Mapping[tuple[str, int], bool]) -> pa.Table:
    keys = zip(table.column("session").to_pylist(), table.column("copy").to_pylist(), strict=True)
    column = pa.array([whole[key] for key in keys], pa.bool_())
    return table.set_column(table.schema.get_field_index("completed"), schema.OUTCOMES.field("completed"), column)


def read_journal(run: Path) -> pa.Table:
    """What a run's journal holds; the record that a crash cut is left out."""
    batches = []
    try:
        with (run / JOURNAL).open("rb") as file, pa.ipc.open_stream(file) as stream:
            while True:
                batches.append(stream.read_next_batch())
    except StopIteration:
        pass
    except (pa.ArrowInvalid, OSError) as error:
        if not batches:
            raise InputError(f"{run / JOURNAL}: holds no outcome: {first_line(error)}") from error
    return pa.Table.from_batches(batches, schema=schema.OUTCOMES)
