"""Trace files on disk: a streaming writer and reader, digest, version check.

A trace is one Parquet file or a directory of them, on the local disk or any filesystem pyarrow has a URI for.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from heapq import merge
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, NamedTuple, Self

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from keepwarm.traces import schema
from keepwarm.traces.columns import Order, Packed, batch_to_calls, outcomes_to_batch, pack
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import TRIGGERS, Call, Outcome
from keepwarm.traces.place import first_line, locate
from keepwarm.traces.sink import ParquetSink, is_whole, leaves

ROWS_PER_BATCH = 4096
"""Rows that become columns, or are read from them, together."""
ROWS_AT_ONCE = 256
"""Rows that become calls together."""


class Meta(NamedTuple):
    """What a trace says of itself: format version, who made it, how its token counts came to be, content digest."""

    version: int
    producer: str
    producer_version: str
    created: str
    tokens: str
    digest: str
    notes: dict[str, Any]


class TraceWriter:
    """Writes a trace call by call, in trace order; memory is one row group, however many calls there are.

    Use it as a context manager: on an exception nothing is left behind. ``digest`` is known after it closed.
    """

    def __init__(self, path: str, *, producer: str, version: str, tokens: str, notes: dict[str, Any] | None = None):
        self._sink = ParquetSink(path, schema.TRACE, schema.TRACE_KEY)
        self._sink.meta |= {"producer": producer, "producer_version": version, "tokens": tokens, "notes": notes}
        self._sink.meta["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._buffer: list[Call] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._last: Order | None = None
        self.calls = 0
        self.digest = ""

    def add(self, call: Call) -> None:
        """Append a call. ValueError, by the end, if it does not follow the last one in trace order."""
        self._buffer.append(call)
        if len(self._buffer) >= ROWS_PER_BATCH:
            self._pack()

    def _pack(self) -> None:
        if self._buffer:
            calls, self._buffer = self._buffer, []
            self.add_packed(pack(calls))

    def add_packed(self, packed: Packed) -> None:
        """Append calls that are packed already. ValueError if they do not follow in trace order."""
        if self._last is not None and packed.first <= self._last:
            raise ValueError(f"call {packed.first[3]} does not follow {self._last[3]} in trace order")
        self._last = packed.last
        self._hash.update(packed.content)
        self._sink.write(packed.batch)
        self.calls += packed.batch.num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._sink.__exit__(kind)
            return
        with self._sink:
            self._pack()
            self.digest = self._sink.meta["digest"] = self._hash.hexdigest()


def write_outcomes(path: str, outcomes: Iterable[Outcome]) -> None:
    """Write a run's outcomes, few in memory at a time."""
    rest = iter(outcomes)
    write_batches(path, map(outcomes_to_batch, iter(lambda: list(islice(rest, ROWS_PER_BATCH)), [])))


def write_batches(path: str, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a run's outcomes that are columns already."""
    with ParquetSink(path, schema.OUTCOMES, schema.OUTCOMES_KEY) as sink:
        for batch in batches:
            sink.write(batch)


def trace_files(path: str) -> list[str]:
    """The Parquet files of a trace, one or a directory of them, as paths or URIs; InputError if there are none."""
    fs, inner = locate(path)
    try:
        info = fs.get_file_info(inner)
        found = fs.get_file_info(pafs.FileSelector(inner)) if info.type == pafs.FileType.Directory else []
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be looked up: {first_line(error)}") from error
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{path}: no such file or directory")
    if info.type != pafs.FileType.Directory:
        return [path]
    names = sorted(f.base_name for f in found if f.type == pafs.FileType.File and f.base_name.endswith(".parquet"))
    if not names:
        raise InputError(f"{path}: holds no .parquet file")
    return [f"{path.rstrip('/')}/{name}" for name in names]


@contextmanager
def _opened(path: str, key: bytes, what: str) -> Iterator[tuple[pq.ParquetFile, dict[str, Any]]]:
    """A Parquet file of ours and its metadata. Whatever is wrong with it is said in one line."""
    fs, inner = locate(path)
    try:
        with fs.open_input_file(inner) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
            raw = (file.schema_arrow.metadata or {}).get(key) or (file.metadata.metadata or {}).get(key)
            if raw is None:
                raise InputError(f"{path}: not a keepwarm {what}: its metadata has no {key.decode()!r}")
            meta = _checked_meta(path, raw)
            _check_whole(path, file, meta)
            yield file, meta
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable {what} file: {first_line(error)}") from error


def _checked_meta(path: str, raw: bytes) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = orjson.loads(raw)
        meta["version"] = int(meta["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: its keepwarm metadata is damaged: {first_line(error)}") from error
    if meta["version"] > schema.VERSION:
        newer = f"{meta['version']} is newer than this program reads ({schema.VERSION})"
        raise InputError(f"{path}: format version {newer}: upgrade keepwarm")
    return meta


def _check_whole(path: str, file: pq.ParquetFile, meta: dict[str, Any]) -> None:
    """Parquet keeps no checksum of its footer: a damaged one could lose columns or rows unnoticed. Ours are listed."""
    lost = set(meta.get("columns", ())) - set(leaves(file.schema_arrow))
    if lost:
        raise InputError(f"{path}: damaged: column {min(lost)!r} was written and is not there")
    _check_rows(path, meta, file.metadata.num_rows)


def _check_rows(path: str, meta: dict[str, Any], rows: int) -> None:
    if rows != meta.get("rows", rows):
        raise InputError(f"{path}: damaged: {meta['rows']} rows were written, {rows} are there")


def _check_pages(path: str, file: pq.ParquetFile, seen: Iterable[str] = ()) -> None:
    """A file damaged anywhere is believed nowhere. Where no checksum of all its bytes is at hand, what nobody asked for
    is read too, and dropped.
    """
    whole = None if "://" in path else is_whole(path)
    if whole is False:
        raise OSError("its bytes are not those that were written")
    rest = [name for name in file.schema_arrow.names if name not in seen]
    if rest and whole is None:
        file.scan_contents(rest)


def read_meta(path: str) -> Meta:
    """What a trace says of itself. Of a directory: the first file's, with one digest over all files' digests."""
    metas = []
    for name in trace_files(path):
        with _opened(name, schema.TRACE_KEY, "trace") as (_, meta):
            metas.append(meta)
    digest = metas[0].get("digest", "")
    if len(metas) > 1:
        digest = hashlib.blake2b("".join(m.get("digest", "") for m in metas).encode(), digest_size=16).hexdigest()
    first = metas[0]
    known = {name: str(first.get(name, "")) for name in ("producer", "producer_version", "created", "tokens")}
    return Meta(version=first["version"], digest=digest, notes=first.get("notes") or {}, **known)


def _known(file: pq.ParquetFile, meta: dict[str, Any], columns: pa.Schema) -> list[str] | None:
    """Which of a file's columns to read; None for all, where the file is of an older version."""
    return [n for n in columns.names if n in file.schema_arrow.names] if meta["version"] == schema.VERSION else None


def _conform(path: str, table: pa.Table, version: int, columns: pa.Schema, first_row: int = 0) -> pa.Table:
    """A table as the present schema has it: upgraded, unknown columns dropped, missing nullable ones null."""
    while version < schema.VERSION:
        if version not in schema.UPGRADES:
            raise InputError(f"{path}: format version {version} is not one this program reads")
        table = schema.UPGRADES[version](table)
        version += 1
    arrays = []
    for field in columns:
        if field.name in table.column_names:
            column = table.column(field.name)
        elif field.nullable:
            column = pa.nulls(table.num_rows, field.type)
        else:
            raise InputError(f"{path}: column {field.name!r} is missing, expected {field.type}")
        arrays.append(_cast(path, column, field, first_row))
    return pa.Table.from_arrays(arrays, schema=columns)


def _cast(path: str, column: Any, field: pa.Field, first_row: int) -> Any:
    if not field.nullable and column.null_count:
        row = first_row + next(i for i, value in enumerate(column) if not value.is_valid)
        raise InputError(f"{path}: row {row}, column {field.name!r} is null, expected {field.type}")
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {field.name!r} is {column.type}, expected {field.type}") from error


def read_calls(path: str) -> Iterator[Call]:
    """The calls of a trace, file by file in each file's order, few in memory at a time."""
    for name in trace_files(path):
        yield from _file_calls(name)


def _file_calls(name: str, at_once: int = ROWS_AT_ONCE) -> Iterator[Call]:
    for batch in _batches(name, schema.TRACE, at_once * ROWS_PER_BATCH // ROWS_AT_ONCE):
        for at in range(0, batch.num_rows, at_once):
            yield from batch_to_calls(batch.slice(at, at_once))


def _batches(name: str, columns: pa.Schema, rows_at_once: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
    """So many rows of a trace file at a time; what columns there are beyond these is not looked at."""
    with _opened(name, schema.TRACE_KEY, "trace") as (file, meta):
        rows = 0
        for batch in file.iter_batches(rows_at_once, columns=_known(file, meta, columns)):
            yield from _conform(name, pa.Table.from_batches([batch]), meta["version"], columns, rows).to_batches()
            rows += batch.num_rows
        _check_rows(name, meta, rows)


def refers_well(path: str) -> bool:
    """Whether each call of a trace refers to earlier calls of its session alone, and keeps no more of a prompt than it
    has. Looks at columns, which takes a fifth of the time that reading sessions takes.
    """
    return all(map(_file_refers_well, trace_files(path)))


def _file_refers_well(name: str) -> bool:
    session, tokens = None, dict[str, int]()
    names = "session", "call", "prompt_parent", "keep", "append", "after"
    for batch in _batches(name, pa.schema([schema.TRACE.field(each) for each in names])):
        for whose, call, parent, keep, appended, after in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            if whose != session:
                session, tokens = whose, {}
            known = call not in tokens and all(e["call"] in tokens and e["trigger"] in TRIGGERS for e in after)
            if not known or not 0 <= keep <= (0 if parent is None else tokens.get(parent, -1)):
                return False
            tokens[call] = keep + sum([segment["tokens"] for segment in appended])
    return True


def read_sessions(path: str, *, at_once: int = ROWS_AT_ONCE) -> Iterator[list[Call]]:
    """The sessions of a trace, each the list of its calls, in the order of their start over all its files. The fewer
    rows become calls ``at_once``, the shorter it holds up who reads as it goes.
    """
    by_session = (groupby(_file_calls(name, at_once), key=attrgetter("session")) for name in trace_files(path))
    files = [(list(calls) for _, calls in sessions) for sessions in by_session]
    return merge(*files, key=lambda calls: (calls[0].session_start_ns or 0, calls[0].session))


def read_trace_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """A trace as one Arrow table, all columns of the schema or the named ones."""
    return _read_table(trace_files(path), schema.TRACE_KEY, "trace", schema.TRACE, columns)


def read_outcome_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """An outcome file as one Arrow table, all columns of the schema or the named ones."""
    return _read_table([path], schema.OUTCOMES_KEY, "outcome", schema.OUTCOMES, columns)


def check_outcomes(path: str, names: list[str]) -> bool:
    """Read an outcome file to its end, and drop it: InputError if it is damaged. Whether the named columns stand in it
    just as the schema has them, or may be missing and are.
    """
    with _opened(path, schema.OUTCOMES_KEY, "outcome") as (file, meta):
        _check_pages(path, file)
        there = file.schema_arrow
        asked = (schema.OUTCOMES.field(name) for name in names)
        alike = all(there.field(f.name).equals(f) if f.name in there.names else f.nullable for f in asked)
        return alike and meta["version"] == schema.VERSION


def _read_table(files: list[str], key: bytes, what: str, columns: pa.Schema, names: list[str] | None) -> pa.Table:
    wanted = columns if names is None else pa.schema([columns.field(name) for name in names])
    tables = []
    for name in files:
        with _opened(name, key, what) as (file, meta):
            table = file.read(columns=_known(file, meta, wanted))
            _check_pages(name, file, table.column_names)
            _check_rows(name, meta, table.num_rows)
            tables.append(_conform(name, table, meta["version"], wanted))
    return pa.concat_tables(tables)
