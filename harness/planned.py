"""A trace about to be replayed, in virtual time or over the wire."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from keepwarm.harness.progress import progress
from keepwarm.replayers import run as runs
from keepwarm.replayers.arrivals import Arrival, Law, arrivals
from keepwarm.replayers.plan import Schedule, check
from keepwarm.replayers.prompts import Grow, P
from keepwarm.replayers.times import SECOND
from keepwarm.traces.model import Call
from keepwarm.traces.scaled import scaled
from keepwarm.traces.store import read_meta, read_sessions, read_trace_table, refers_well

AT_ONCE = 64
"""Rows of a trace that are made calls together: what is due meanwhile is late."""


class Planned:
    """A trace about to be replayed under a load: what it is, and fresh schedules of it. Times are seconds.

    Sessions come by a law of ``arrivals``, "recorded" as they did, or ``at_once`` so many at a time, and the trace
    ``repeat`` times. With a ``duration`` it is repeated as long as that takes, what is due in the first ``warm_up`` of
    it is not measured, and the first sessions begin midway. ``shard`` (i, of) is one of so many parts; sessions (name,
    copy) in ``over`` are left out.
    """

    def __init__(
        self,
        trace: str,
        *,
        at_once: int | None,
        speed: float = 1.0,
        gap_cap: float | None = None,
        scale: float | None = None,
        law: str | None = None,
        repeat: int | None = None,
        duration: float | None = None,
        warm_up: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.trace, self.speed, self.at_once, self._scale = trace, speed, at_once, scale
        self._gap_cap_ns = None if gap_cap is None else round(gap_cap * SECOND)
        self.window = None if duration is None else (round(warm_up * SECOND), round(duration * SECOND))
        self.shard = (0, 1)
        self.over: frozenset[tuple[str, int]] = frozenset()
        self._from_ns = 0
        self._few: list[list[Call]] | None = None
        table = read_trace_table(trace, ["session", "flow", "breakpoints"])
        self.calls = table.num_rows
        self.sessions = len(table.column("session").unique())
        self.flows = set(table.column("flow").unique().to_pylist())
        self.marked = len(table.column("breakpoints").combine_chunks().flatten()) > 0
        self.meta = read_meta(trace)
        self._copies = repeat or (1 if duration is None else None)
        self._come: dict[str, Any] = {"speed": speed, "repeat": self._copies, "seed": seed}
        self._come["law"] = None if law in (None, "recorded") else Law.read(str(law))
        self._come["recorded"] = law == "recorded"
        self._come["midway"] = at_once if duration is not None and law is None else 0
        self._come["shared"] = frozenset() if self._copies == 1 else _shared(trace)
        self.options: dict[str, Any] = {"speed": speed, "sessions": at_once, "scale_tokens": scale}
        self.options |= {"arrivals": law, "repeat": repeat, "seed": seed, "gap_cap_s": gap_cap}
        self.options |= {"duration_s": duration, "warm_up_s": warm_up}

    def check(self) -> None:
        """InputError where a call cannot be replayed: before anything is sent."""
        if self._scale is None and refers_well(self.trace):
            return
        with progress("checking", self.sessions) as told:
            for done, calls in enumerate(self._read(), 1):
                check(calls)
                told(done, None)

    def go_on(self, over: frozenset[tuple[str, int]], at_ns: int, time: int) -> None:
        """Leave out sessions that are over, from some time of the run on; the others' prompts are new each time."""
        self.over, self._from_ns = over, at_ns
        self._come |= {"time": time, "shared": _shared(self.trace)}

    def _read(self) -> Iterable[list[Call]]:
        if self._few is not None:
            return self._few
        sessions: Iterable[list[Call]] = read_sessions(self.trace, at_once=AT_ONCE)
        sessions = sessions if self._scale is None else scaled(sessions, self._scale)
        if self.calls <= AT_ONCE:  # to open a file again takes longer than to play it, and copies may be thousands
            self._few = sessions = list(sessions)
        return sessions

    def sessions_of_run(self) -> Iterator[Arrival]:
        """All its sessions as they come, those that are over included."""
        return arrivals(self._read, **self._come)

    def arrivals(self) -> Iterator[Arrival]:
        """The sessions that are still to come, of its shard."""
        first = None
        for arrival in islice(self.sessions_of_run(), self.shard[0], None, self.shard[1]):
            if (arrival.calls[0].session, arrival.copy) in self.over:
                continue
            if arrival.start_ns is not None and self._from_ns:
                first = arrival.start_ns if first is None else first
                arrival = arrival._replace(start_ns=self._from_ns + arrival.start_ns - first)
            yield arrival

    def schedule(self, grow: Grow[P], *, ahead: int = 0) -> Schedule[P]:
        """Its calls as they come due, their prompts as ``grow`` makes them, so many calls read ahead."""
        number, of = self.shard
        places = None if self.at_once is None else -(-(self.at_once - number) // of)
        told: dict[str, Any] = {"gap_cap_ns": self._gap_cap_ns, "at_once": places, "window": self.window}
        return Schedule(self.arrivals(), speed=self.speed, ahead=ahead, grow=grow, **told)

    @property
    def planned_calls(self) -> int | None:
        """How many calls there are; None where only the time is bounded."""
        return None if self.window else self.calls * (self._copies or 1)

    def about(self, mode: str, started: str, *, ended: str | None, **more: Any) -> dict[str, Any]:
        """What run.json tells. How many calls were planned is known at the end where the time is bounded."""
        trace = runs.about_trace(self.trace, self.meta, self.calls, self.sessions)
        sessions = None if self.window else self.sessions * (self._copies or 1)
        about = {"format": 1, "mode": mode, "trace": trace, "options": self.options}
        about |= {"planned_calls": self.planned_calls, "planned_sessions": sessions, **more}
        return about | {"started": started, "ended": ended, **runs.about_machine()}


def _shared(trace: str) -> frozenset[int]:
    """The hashes of segments that several of a trace's sessions have."""
    table = read_trace_table(trace, ["session", "append"])
    lists = table.column("append").combine_chunks()
    sessions = table.column("session").combine_chunks().take(pc.list_parent_indices(lists))
    hashes = lists.flatten().field("hash")
    of = pa.table({"hash": hashes, "session": sessions}).group_by("hash").aggregate([("session", "count_distinct")])
    return frozenset(of.filter(pc.greater(of.column("session_count_distinct"), 1)).column("hash").to_pylist())
