"""Schedule is the plan of a replay as it unfolds: which call is due when, given when others started and ended.

It never reads a clock: whoever drives it, in virtual or in real time, tells it what happened and asks what is due.
Times are ns since the run's anchor.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Set
from dataclasses import KW_ONLY, dataclass
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple

from keepwarm.replayers.arrivals import Arrival
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.prompts import Grow, P, SessionPrompts, as_pieces
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import TRIGGERS, After, Call


class Planned(NamedTuple, Generic[P]):
    """A call that may be sent at ``due_ns``, with its prompt and the pieces in which later ones repeat its answer.

    ``output`` is how many tokens to answer with: the recorded count, else its estimate, else None. ``phase`` is an
    outcome's where the schedule has a window. ``took`` are the ns to its first token and to its end where it is known.
    """

    due_ns: int
    call: Call
    prompt: P
    answer: tuple[Piece, ...] = ()
    output: int | None = None
    copy: int = 0
    phase: str | None = None
    took: tuple[int, int] | None = None

    @property
    def session(self) -> tuple[str, int]:
        """Which copy of which session it is of."""
        return self.call.session, self.copy


@dataclass(slots=True)
class _Waiting:
    """A call of a running session: how many of its edges are open, and the latest due time of the closed ones."""

    call: Call
    open: int
    due_ns: int


class _Session(Generic[P]):
    """A session that is to run: its calls that wait for others, and what each call lets go. ``seen`` are those of its
    agents that have been asked since it began midway.
    """

    def __init__(self, arrival: Arrival, grow: Grow[P]) -> None:
        calls = arrival.calls
        self.arrival, self.copy = arrival, arrival.copy
        self.seen: set[str] = set()
        self.prompts = SessionPrompts(calls, grow)
        self.left = len(calls) - arrival.over
        self.waiting: dict[str, _Waiting] = {}
        self.next: dict[tuple[str, str], list[tuple[str, After]]] = {}
        known: set[str] = set()
        for call in calls:
            _check(call, known)
            for edge in call.after:
                self.next.setdefault((edge.call, edge.trigger), []).append((call.call, edge))
            known.add(call.call)
            self.waiting[call.call] = _Waiting(call, len(call.after), 0)
        for call in calls[: arrival.over]:
            del self.waiting[call.call]


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


def check(calls: list[Call]) -> None:
    """InputError where a call of a session refers to what is not there."""
    prompts = _Session(Arrival(calls), lambda parent, keep, pieces: 0).prompts
    for call in calls:
        prompts.prompt(call)


@dataclass(eq=False)
class Schedule(Generic[P]):
    """The calls of a run in the order in which they come due. ``grow`` makes their prompts.

    ``speed`` X divides every gap, ``gap_cap_ns`` cuts gaps first. Sessions start when their arrival says, or, those
    without a time, in their order with ``at_once`` running at a time. They are read as they are needed, or so many
    calls ``ahead``. Of a ``window`` (from, to) in ns the calls due in it are measured; those before are warm-up, as is
    the first call of each agent of a session that began midway, whose prompt nobody has cached.
    """

    sessions: Iterable[Arrival]
    _: KW_ONLY
    speed: float = 1.0
    gap_cap_ns: int | None = None
    at_once: int | None = None
    window: tuple[int, int] | None = None
    ahead: int = 0
    grow: Grow[P] = as_pieces  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.speed <= 0 or (self.at_once is not None and self.at_once < 1):
            raise ValueError("speed must be above 0 and at least one session must run at once")
        self._unread = (_Session(arrival, self.grow) for arrival in self.sessions)
        self._coming: deque[_Session[P]] = deque()
        self._room = self.ahead
        self._running: dict[tuple[str, int], _Session[P]] = {}
        self._due: list[tuple[int, int, _Session[P], Call]] = []
        self._count = 0
        self.partial: set[tuple[str, int]] = set()
        """Sessions that are not whole in this run: begun midway, or not over when ``cut`` was called."""

    def next_due(self, now_ns: int) -> int | None:
        """When the next call is due; None if none is before something more has ended, or at all."""
        self._admit(now_ns)
        return self._due[0][0] if self._due else None

    def pop(self) -> Planned[P]:
        """Take the next due call."""
        due_ns, _, session, call = heappop(self._due)
        output = call.output if call.output is not None else call.output_est
        phase = None if self.window is None else self._phase(session, call, due_ns, *self.window)
        prompts = session.prompts
        return Planned(due_ns, call, prompts.prompt(call), prompts.answer(call), output, session.copy, phase)

    def started(self, planned: Planned[P], now_ns: int) -> bool:
        """A call was sent; whether that let others go."""
        return self._closed(self._running[planned.session], planned.call, "start", now_ns)

    def ended(self, planned: Planned[P], now_ns: int) -> None:
        """A call was answered whole."""
        self._closed(self._running[planned.session], planned.call, "end", now_ns)
        self._count_down(planned, 1)

    def runs(self, session: tuple[str, int]) -> bool:
        """Whether a copy of a session has calls that are not over."""
        return session in self._running

    def failed(self, planned: Planned[P]) -> list[Call]:
        """A call failed: the rest of its session that was not popped yet will not be; which calls those are."""
        session = self._running[planned.session]
        skipped = [waiting.call for waiting in session.waiting.values()]
        skipped += [due[3] for due in self._due if due[2] is session]
        session.waiting.clear()
        self._due = [due for due in self._due if due[2] is not session]
        heapify(self._due)
        self._count_down(planned, 1 + len(skipped))
        return skipped

    def rest(self) -> Iterator[tuple[Call, int]]:
        """All calls that were never popped, each with its copy; the schedule is over."""
        for _, _, session, call in self._due:
            yield call, session.copy
        for session in self._running.values():
            yield from ((waiting.call, session.copy) for waiting in session.waiting.values())
        while (coming := self._next()) is not None:
            self._take(coming)
            yield from ((call, coming.copy) for call in coming.arrival.calls[coming.arrival.over :])

    def cut(self) -> None:
        """The schedule is over; what is running is partial."""
        self.partial.update(self._running)

    def _phase(self, session: _Session[P], call: Call, due_ns: int, begin_ns: int, end_ns: int) -> str:
        cold = session.arrival.over and call.agent not in session.seen
        session.seen.add(call.agent)
        return "warmup" if due_ns < begin_ns or cold else "measured" if due_ns < end_ns else "drain"

    def _count_down(self, planned: Planned[P], calls: int) -> None:
        session = self._running[planned.session]
        session.left -= calls
        if not session.left:
            del self._running[planned.session]

    def _next(self) -> _Session[P] | None:
        """The session that is to begin next, read with those behind it."""
        while self._room >= 0 and (session := next(self._unread, None)) is not None:
            self._coming.append(session)
            self._room -= len(session.arrival.calls)
        return self._coming[0] if self._coming else None

    def _take(self, session: _Session[P]) -> None:
        self._room += len(session.arrival.calls)
        self._coming.popleft()

    def _admit(self, now_ns: int) -> None:
        """Begin the sessions whose time has come, or for which there is a place."""
        while self.at_once is None or len(self._running) < self.at_once:
            if (coming := self._next()) is None:
                return
            start_ns = coming.arrival.start_ns
            if start_ns is None:
                start_ns = now_ns
            elif self._due and self._due[0][0] < start_ns:
                return
            self._begin(coming, start_ns)

    def _begin(self, session: _Session[P], start_ns: int) -> None:
        self._take(session)
        calls, over = session.arrival.calls, session.arrival.over
        name = calls[0].session, session.copy
        if name in self._running:
            raise InputError(f"session {name[0]}: expected its calls once and in one file")
        self._running[name] = session
        for call in calls[over:]:
            if not call.after:
                self._push(session, session.waiting.pop(call.call), start_ns)
        if over:
            self.partial.add(name)
            for waiting in session.waiting.values():
                waiting.due_ns = start_ns
        for call in calls[:over]:
            for trigger, at_ns in (("start", call.start_ns), ("end", call.end_ns)):
                past_ns = min(at_ns - calls[over].start_ns, 0)
                self._closed(session, call, trigger, start_ns + round(past_ns / self.speed))

    def _push(self, session: _Session[P], waiting: _Waiting, due_ns: int) -> None:
        self._count += 1
        heappush(self._due, (due_ns, self._count, session, waiting.call))

    def _closed(self, session: _Session[P], call: Call, trigger: str, now_ns: int) -> bool:
        edges = session.next.get((call.call, trigger), ())
        for name, edge in edges:
            waiting = session.waiting.get(name)
            if waiting is None:
                continue
            waiting.open -= 1
            waiting.due_ns = max(waiting.due_ns, now_ns + self._gap(edge.gap_ns))
            if not waiting.open:
                self._push(session, session.waiting.pop(name), waiting.due_ns)
        return bool(edges)

    def _gap(self, gap_ns: int) -> int:
        if self.gap_cap_ns is not None:
            gap_ns = min(gap_ns, self.gap_cap_ns)
        return round(gap_ns / self.speed)
