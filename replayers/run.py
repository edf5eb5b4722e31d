"""A run on disk: its directory, what was run on what (run.json), and what could have been read at most (bounds)."""

import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fcntl import LOCK_EX, LOCK_NB, flock
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import JOURNAL, KEPT, OUTCOMES
from keepwarm.traces.sink import ParquetSink
from keepwarm.traces.store import Meta

ABOUT = "run.json"
BOUNDS = "bounds.parquet"
LOCK = ".under-way"

BOUNDS_AT_ONCE = 4096

BOUNDS_SCHEMA = pa.schema({"call": pa.string(), "copy": pa.int32(), "bound": pa.string(), "cache_read": pa.int64()})


class Bound(NamedTuple):
    """The most that a call could have read under a named bound, same prompts, same times."""

    call: str
    copy: int
    bound: str
    cache_read: int


def open_run(path: Path, *, mode: str, force: bool) -> None:
    """Make a run's directory, empty. Measured results are replaced only with ``force``, simulated ones always."""
    _check_free(path, mode, force)
    _clear(path)


@contextmanager
def staged_run(path: Path, *, mode: str, force: bool) -> Iterator[Path]:
    """A place to make a run in; made whole it replaces what ``path`` holds, and if it fails it is gone."""
    _check_free(path, mode, force)
    stage = path / ".part"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        _clear(path)
        for made in stage.iterdir():
            made.replace(path / made.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def under_way(path: Path) -> Iterator[None]:
    """Nobody else replays into a run's directory meanwhile. InputError where somebody does."""
    if not path.is_dir():
        raise InputError(f"{path / ABOUT}: expected the run.json of a replay")
    with (path / LOCK).open("wb") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except OSError as error:
            raise InputError(f"{path}: a replay into it is under way") from error
        try:
            yield
        finally:
            (path / LOCK).unlink(missing_ok=True)


def _check_free(path: Path, mode: str, force: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}") from error
    held = [name for name in (ABOUT, OUTCOMES, JOURNAL) if (path / name).exists()]
    if held and not force and not (mode == "simulate" and _mode(path) == "simulate"):
        raise InputError(f"{path}: already holds a run ({held[0]}): choose another directory, or give --force")


def _clear(path: Path) -> None:
    for name in (ABOUT, OUTCOMES, JOURNAL, KEPT, BOUNDS, "latency.hlog", OUTCOMES + ".part"):
        (path / name).unlink(missing_ok=True)


def _mode(path: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(orjson.loads((path / ABOUT).read_bytes())["mode"])
    return None


def about_trace(path: str, meta: Meta, calls: int, sessions: int) -> dict[str, Any]:
    """What run.json says of the trace."""
    known: dict[str, Any] = {"digest": meta.digest, "producer": meta.producer, "tokens": meta.tokens}
    known |= {name: meta.notes.get(name) for name in ("prefix_breaks", "recorded_breaks")}
    return {"name": path.rstrip("/").rsplit("/", 1)[-1], **known, "calls": calls, "sessions": sessions}


def about_machine() -> dict[str, Any]:
    """The machine and the libraries that a run's figures depend on; no host name."""
    libraries = ("keepwarm", "pyarrow", "httpx", "uvicorn")
    return {
        "machine": {"python": platform.python_version(), "system": platform.system(), "cpus": os.cpu_count()},
        "versions": {name: version(name) for name in libraries},
    }


def now() -> str:
    """The time of day for people, UTC; nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_about(path: Path, about: dict[str, Any]) -> None:
    """Write run.json, whole or not at all."""
    part = path / (ABOUT + ".part")
    part.write_bytes(orjson.dumps(about, option=orjson.OPT_INDENT_2))
    part.replace(path / ABOUT)


def write_bounds(path: Path, bounds: Iterable[Bound]) -> None:
    """Write a run's bounds, some in memory at a time."""
    rows = iter(bounds)
    with ParquetSink(str(path / BOUNDS), BOUNDS_SCHEMA, b"keepwarm.bounds") as sink:
        while chunk := list(islice(rows, BOUNDS_AT_ONCE)):
            columns = zip(zip(*chunk, strict=True), BOUNDS_SCHEMA.types, strict=True)
            sink.write(pa.record_batch([pa.array(*column) for column in columns], schema=BOUNDS_SCHEMA))
