"""A Parquet file in the making: row groups as they come, its metadata at the end, nothing left where it fails."""

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from keepwarm.traces.errors import InputError
from keepwarm.traces.place import first_line, locate
from keepwarm.traces.schema import VERSION

MARK = b"keepwarm CRC-32:"
"""What stands, with the checksum of all other bytes of the file, between the pages and the footer, where no reader of
Parquet looks.
"""
SUM_SIZE = len(MARK) + 4
BYTES_PER_GROUP = 2**24
"""What a row group's columns take in memory, at least, but for the last one's: many small groups are slow to read."""


def leaves(fields: Any, above: str = "") -> list[str]:
    """The dotted names of all values of a schema, those inside lists and structs too: what a reader must find again."""
    names: list[str] = []
    for field in fields:
        name = above + field.name
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        names += leaves(kind, name + ".") if pa.types.is_struct(kind) else [name]
    return names


def parquet_options(columns: pa.Schema) -> dict[str, Any]:
    """How columns are best laid down: times by their differences, which are short, other values once in a dictionary,
    and those in lists as they are.
    """
    flat = [field.name for field in columns if not pa.types.is_nested(field.type)]
    times = {name: "DELTA_BINARY_PACKED" for name in flat if name.endswith("_ns")}
    encodings = {"use_dictionary": [name for name in flat if name not in times], "column_encoding": times}
    return {"compression": "zstd", "write_page_checksum": True} | encodings


def _parts(path: str) -> tuple[pa.Buffer, int]:
    """The bytes of a Parquet file on this machine, and where its footer begins."""
    with pa.memory_map(path) as file:
        data = file.read_buffer()
    return data, data.size - 8 - int.from_bytes(data[-8:-4], "little")


def seal(path: str) -> None:
    """Put the checksum of its bytes into a Parquet file on this machine."""
    data, footer = _parts(path)
    tail = MARK + crc32(data).to_bytes(4) + data[footer:].to_pybytes()
    with Path(path).open("r+b") as file:
        file.seek(footer)
        file.write(tail)


def is_whole(path: str) -> bool | None:
    """Whether a Parquet file on this machine has the bytes that were written; None where it has no checksum of them."""
    data, footer = _parts(path)
    pages = max(footer - SUM_SIZE, 0)
    kept = data[pages:footer].to_pybytes()
    return crc32(data[footer:], crc32(data[:pages])).to_bytes(4) == kept[-4:] if kept.startswith(MARK) else None


class ParquetSink:
    """A Parquet file written a row group at a time, its metadata (``meta``: it may be added to) at the end. Use it as
    a context manager: nothing is left of a file whose writing failed, and an existing file is replaced only when the
    new one is whole.
    """

    def __init__(self, path: str, columns: pa.Schema, key: bytes) -> None:
        self._fs, self._inner = locate(path)
        self._part = self._inner + ".part"
        self._key = key
        self.meta: dict[str, Any] = {"version": VERSION, "columns": leaves(columns)}
        self._group: list[pa.RecordBatch] = []
        self._size = self.rows = 0
        if self._fs.get_file_info(self._inner).type == pafs.FileType.Directory:
            raise InputError(f"{path}: is a directory, expected the name of a file to write")
        try:
            self._sink = self._fs.open_output_stream(self._part)
            self._writer = pq.ParquetWriter(self._sink, columns, **parquet_options(columns))
        except OSError as error:
            with suppress(OSError):
                self._fs.delete_file(self._part)
            raise InputError(f"{path}: cannot be written: {first_line(error)}") from error

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows; as many as take ``BYTES_PER_GROUP`` are written together, as a row group."""
        self._group.append(batch)
        self._size += batch.nbytes
        self.rows += batch.num_rows
        if self._size >= BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._group:
            self._writer.write_table(pa.Table.from_batches(self._group))
        self._group, self._size = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as undo:
            undo.callback(self._fs.delete_file, self._part)
            if kind is None:
                self._flush()
                self._writer.add_key_value_metadata({self._key: orjson.dumps(self.meta | {"rows": self.rows})})
            self._writer.close()
            self._sink.close()
            if kind is not None:
                return
            if isinstance(self._fs, pafs.LocalFileSystem):
                seal(self._part)
            undo.pop_all()
        self._fs.move(self._part, self._inner)
