"""The traces that replay.py plays: made up, one agent a session, written as any trace is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from keepwarm.traces.model import After, Call, Segment
from keepwarm.traces.store import TraceWriter

MS = 1_000_000
TOLD = {"role": "main", "usage_source": "absent", "write_source": "absent", "origin": "synthetic", "end_ns": 0}


class Shape(NamedTuple):
    """Sessions alike: how many, and their calls; the first prompt's blocks (how many tokens each) after ``lead`` tokens
    that all sessions share; what each later prompt adds; ``every_ns``: calls are due so far apart after the first was
    sent, else each when the one before has ended; sessions start ``apart_ns``.
    """

    sessions: int
    calls: int
    lead: int = 60
    blocks: tuple[int, ...] = (60,)
    adds: int = 20
    output: int = 1
    every_ns: int | None = None
    apart_ns: int = 0


def session(shape: Shape, number: int) -> Iterator[Call]:
    """One session's calls."""
    name, last = f"s{number:06}", 0
    for turn in range(shape.calls):
        ident = (number + 1) * 100_000 + turn * 2
        call = f"{name}.{turn:05}"
        before = f"{name}.{turn - 1:05}"
        if turn:
            added = [Segment(ident, shape.output, "answer", before), Segment(ident + 1, shape.adds, "tool_result")]
        else:
            kinds = ("user", *("answer", "tool_result") * len(shape.blocks))
            own = [Segment(-ident - at, tokens, kinds[at]) for at, tokens in enumerate(shape.blocks)]
            added = [Segment(1, shape.lead, "system"), *own]
        if not turn:
            after: tuple[After, ...] = ()
        elif shape.every_ns is None:
            after = (After(before, "end", 0, "tool"),)
        else:
            after = (After(f"{name}.{0:05}", "start", turn * shape.every_ns, "tool"),)
        yield Call(
            **TOLD,  # type: ignore[arg-type]
            session=name,
            agent=name,
            call=call,
            turn=turn,
            start_ns=turn,
            session_start_ns=number * shape.apart_ns,
            keep=last,
            prompt_parent=before if turn else None,
            after=after,
            append=tuple(added),
            output=shape.output,
        )
        last += sum(segment.tokens for segment in added)


def calls(shape: Shape) -> Iterator[Call]:
    """All calls, session by session."""
    for number in range(shape.sessions):
        yield from session(shape, number)


def write(path: Path, rows: Iterable[Call]) -> str:
    """A trace file; its name."""
    with TraceWriter(str(path), producer="benchmark", version="0", tokens="exact") as writer:
        for row in rows:
            writer.add(row)
    return str(path)
