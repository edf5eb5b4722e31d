"""Schedule is the plan of a replay as it unfolds: which call is due when, given when others started and ended.

It never reads a clock: whoever drives it, in virtual or in real time, tells it what happened and asks what is due.
Times are ns since the run's anchor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.prompts import Grow, P, SessionPrompts, as_pieces
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import TRIGGERS, After, Call


class Planned(NamedTuple, Generic[P]):
    """A call that may be sent at ``due_ns``, with its prompt and the pieces in which later ones repeat its answer.

    ``output`` is how many tokens to answer with: the recorded count, else its estimate, else None.
    """

    due_ns: int
    call: Call
    prompt: P
    answer: tuple[Piece, ...] = ()
    output: int | None = None
    copy: int = 0


@dataclass(slots=True)
class _Waiting:
    """A call of a running session: how many of its edges are open, and the latest due time of the closed ones."""

    call: Call
    open: int
    due_ns: int


class _Session(Generic[P]):
    """A running session: its calls that wait for others, and what each call lets go."""

    def __init__(self, calls: Sequence[Call], grow: Grow[P]) -> None:
        self.prompts = SessionPrompts(calls, grow)
        self.left = len(calls)
        self.waiting: dict[str, _Waiting] = {}
        self.next: dict[tuple[str, str], list[tuple[str, After]]] = {}
        known: set[str] = set()
        for call in calls:
            _check(call, known)
            for edge in call.after:
                self.next.setdefault((edge.call, edge.trigger), []).append((call.call, edge))
            known.add(call.call)
            self.waiting[call.call] = _Waiting(call, len(call.after), 0)


def _check(call: Call, known: Set[str]) -> None:
    """A call refers to calls that are known by now, and is not one of them."""
    if call.call in known:
        raise InputError(f"call {call.call}: field call: expected a name that no other call of its session has")
    references = [("after", edge.call) for edge in call.after]
    if call.prompt_parent is not None:
        references.append(("prompt_parent", call.prompt_parent))
    for field, name in references:
        if name not in known:
            raise InputError(f"call {call.call}: field {field} names {name!r}, expected an earlier call of its session")
    for edge in call.after:
        if edge.trigger not in TRIGGERS:
            raise InputError(f"call {call.call}: field after has trigger {edge.trigger!r}, expected start or end")


class Schedule(Generic[P]):
    """The calls of a trace in the order in which they come due. ``grow`` makes their prompts.

    ``speed`` X divides every gap, ``gap_cap_ns`` cuts gaps first. Sessions start when they were recorded to, or, with
    ``at_once``, in their order with so many running at a time. Sessions are read as they are needed.
    """

    def __init__(
        self,
        sessions: Iterable[list[Call]],
        *,
        speed: float = 1.0,
        gap_cap_ns: int | None = None,
        at_once: int | None = None,
        grow: Grow[P] = as_pieces,  # type: ignore[assignment]
    ) -> None:
        if speed <= 0 or (at_once is not None and at_once < 1):
            raise ValueError("speed must be above 0 and at least one session must run at once")
        self._sessions: Iterator[list[Call]] = iter(sessions)
        self._speed = speed
        self._gap_cap_ns = gap_cap_ns
        self._at_once = at_once
        self._grow = grow
        self._running: dict[str, _Session[P]] = {}
        self._due: list[tuple[int, int, _Session[P], Call]] = []
        self._count = 0
        self._peeked: list[Call] | None = None
        self._origin: int | None = None
        self.sessions_begun = 0

    def next_due(self, now_ns: int) -> int | None:
        """When the next call is due; None if none is before something more has ended, or at all."""
        self._admit(now_ns)
        return self._due[0][0] if self._due else None

    def pop(self) -> Planned[P]:
        """Take the next due call."""
        due_ns, _, session, call = heappop(self._due)
        output = call.output if call.output is not None else call.output_est
        return Planned(due_ns, call, session.prompts.prompt(call), session.prompts.answer(call), output)

    def started(self, call: Call, now_ns: int) -> None:
        """A call was sent."""
        self._closed(call, "start", now_ns)

    def ended(self, call: Call, now_ns: int) -> None:
        """A call was answered whole."""
        self._closed(call, "end", now_ns)
        self._count_down(call, 1)

    def runs(self, session: str) -> bool:
        """Whether a session has calls that are not over."""
        return session in self._running

    def failed(self, call: Call) -> list[Call]:
        """A call failed: the rest of its session that was not sent yet will not be; which calls those are."""
        session = self._running[call.session]
        skipped = [waiting.call for waiting in session.waiting.values()]
        skipped += [due[3] for due in self._due if due[2] is session]
        session.waiting.clear()
        self._due = [due for due in self._due if due[2] is not session]
        heapify(self._due)
        self._count_down(call, 1 + len(skipped))
        return skipped

    def rest(self) -> Iterator[Call]:
        """All calls that were never popped, sessions that never began included; the schedule is over."""
        for _, _, _, call in self._due:
            yield call
        for session in self._running.values():
            yield from (waiting.call for waiting in session.waiting.values())
        if self._peeked is not None:
            yield from self._peeked
        for calls in self._sessions:
            yield from calls

    def _count_down(self, call: Call, calls: int) -> None:
        session = self._running[call.session]
        session.left -= calls
        if not session.left:
            del self._running[call.session]

    def _peek(self) -> list[Call] | None:
        if self._peeked is None:
            self._peeked = next(self._sessions, None)
        return self._peeked

    def _admit(self, now_ns: int) -> None:
        """Begin the sessions whose time has come: by their recorded start, or as places get free."""
        while (calls := self._peek()) is not None:
            if self._at_once is None:
                recorded = calls[0].session_start_ns or 0
                self._origin = recorded if self._origin is None else self._origin
                start_ns = round((recorded - self._origin) / self._speed)
                if self._due and self._due[0][0] < start_ns:
                    return
            elif len(self._running) >= self._at_once:
                return
            else:
                start_ns = now_ns
            self._begin(calls, start_ns)

    def _begin(self, calls: list[Call], start_ns: int) -> None:
        self._peeked = None
        self.sessions_begun += 1
        name = calls[0].session
        if name in self._running:
            raise InputError(f"session {name}: expected its calls once and in one file")
        session = self._running[name] = _Session(calls, self._grow)
        for call in calls:
            if not call.after:
                self._push(session, session.waiting.pop(call.call), start_ns)

    def _push(self, session: _Session[P], waiting: _Waiting, due_ns: int) -> None:
        self._count += 1
        heappush(self._due, (due_ns, self._count, session, waiting.call))

    def _closed(self, call: Call, trigger: str, now_ns: int) -> None:
        session = self._running[call.session]
        for name, edge in session.next.get((call.call, trigger), ()):
            waiting = session.waiting.get(name)
            if waiting is None:
                continue
            waiting.open -= 1
            waiting.due_ns = max(waiting.due_ns, now_ns + self._gap(edge.gap_ns))
            if not waiting.open:
                self._push(session, session.waiting.pop(name), waiting.due_ns)

    def _gap(self, gap_ns: int) -> int:
        if self._gap_cap_ns is not None:
            gap_ns = min(gap_ns, self._gap_cap_ns)
        return round(gap_ns / self._speed)
