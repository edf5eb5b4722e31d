"""A trace about to be replayed, in virtual time or over the wire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from keepwarm.replayers import run as runs
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.plan import Schedule
from keepwarm.replayers.prompts import in_tree
from keepwarm.replayers.times import SECOND
from keepwarm.replayers.tree import Node, PromptTree
from keepwarm.traces.model import Call
from keepwarm.traces.scaled import scaled
from keepwarm.traces.store import read_meta, read_sessions, read_trace_table


class Planned:
    """A trace about to be replayed: what it is, and fresh schedules of it."""

    def __init__(
        self, trace: str, *, speed: float, gap_cap: float | None, at_once: int | None, scale: float | None = None
    ) -> None:
        self.trace = trace
        self.speed = speed
        self._scale = scale
        self._options: dict[str, Any] = {
            "speed": speed,
            "gap_cap_ns": None if gap_cap is None else round(gap_cap * SECOND),
            "at_once": at_once,
        }
        table = read_trace_table(trace, ["session", "flow", "breakpoints"])
        self.calls = table.num_rows
        self.sessions = len(table.column("session").unique())
        self.flows = set(table.column("flow").unique().to_pylist())
        self.marked = len(table.column("breakpoints").combine_chunks().flatten()) > 0
        self.meta = read_meta(trace)
        self.options = {"speed": speed, "gap_cap_s": gap_cap, "sessions": at_once, "scale_tokens": scale}

    def _sessions(self) -> Iterable[list[Call]]:
        sessions = read_sessions(self.trace)
        return sessions if self._scale is None else scaled(sessions, self._scale)

    def schedule(self) -> Schedule[tuple[Piece, ...]]:
        """Its calls as they come due, their prompts as pieces."""
        return Schedule(self._sessions(), **self._options)

    def schedule_in(self, tree: PromptTree) -> Schedule[Node]:
        """Its calls as they come due, their prompts as places in a simulated cluster's tree."""
        return Schedule(self._sessions(), **self._options, grow=in_tree(tree))

    def about(self, mode: str, started: str, *, ended: str | None, **more: Any) -> dict[str, Any]:
        trace = runs.about_trace(self.trace, self.meta, self.calls, self.sessions)
        counts = {"planned_calls": self.calls, "planned_sessions": self.sessions}
        about = {"format": 1, "mode": mode, "trace": trace, "options": self.options, **counts, **more}
        return about | {"started": started, "ended": ended, **runs.about_machine()}
