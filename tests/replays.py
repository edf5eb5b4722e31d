"""Traces for replays, ``keepwarm`` as a command, and what a run's directory holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest

from keepwarm.harness.cli import main
from keepwarm.replayers.arrivals import arrivals
from keepwarm.replayers.plan import Schedule
from keepwarm.traces.model import After, Call, Segment
from keepwarm.traces.store import TraceWriter, read_outcome_table

MS = 1_000_000


def call(name: str, *after: After, **fields: Any) -> Call:
    """A call of 40 prompt tokens, answered in two."""
    told: dict[str, Any] = {"session": "s", "agent": "a", "role": "main", "turn": 0, "start_ns": 0, "end_ns": 0}
    told |= {"usage_source": "absent", "write_source": "absent", "origin": "synthetic", "keep": 0, "output": 2}
    return Call(**{**told, "call": name, "after": after, "append": (Segment(1, 40, "user"),), **fields})


def chain(session: str, calls: int, gap_ns: int = 0, **fields: Any) -> list[Call]:
    """A session of calls of which each follows the one before."""
    names = [f"{session}{number}" for number in range(calls)]
    edges = [(), *((After(name, "end", gap_ns, "tool"),) for name in names)]
    told = [{"session": session, "turn": turn, "start_ns": turn, **fields} for turn in range(calls)]
    return [call(name, *edge, **more) for name, edge, more in zip(names, edges, told, strict=False)]


def write(path: Path, *sessions: list[Call], **notes: Any) -> str:
    """Write a trace; its path."""
    with TraceWriter(str(path), producer="tests", version="0", tokens="exact", notes=notes) as writer:
        for one in sessions:
            for row in one:
                writer.add(row)
    return str(path)


def scheduled(
    sessions: Iterable[list[Call]], *, speed: float = 1.0, at_once: int | None = None, **options: Any
) -> Schedule[Any]:
    """The plan of sessions that start as they were recorded to, or so many at once."""
    come = arrivals(lambda: sessions, recorded=at_once is None, speed=speed)
    return Schedule(come, speed=speed, at_once=at_once, **options)


def keepwarm_(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def rows(run: Path) -> dict[str, dict[str, Any]]:
    """A run's outcome rows by call; there is one a call."""
    found = read_outcome_table(str(run / "outcomes.parquet")).to_pylist()
    by_call = {row["call"]: row for row in found}
    assert len(by_call) == len(found)
    return by_call


def about(run: Path) -> dict[str, Any]:
    """A run's run.json."""
    found: dict[str, Any] = orjson.loads((run / "run.json").read_bytes())
    return found
