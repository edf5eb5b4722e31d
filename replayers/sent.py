"""Sent is a run as it went, as a schedule: the same calls, at the times at which they were sent."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, NamedTuple

from keepwarm.replayers.arrivals import Arrival
from keepwarm.replayers.plan import Planned
from keepwarm.replayers.prompts import Grow, P, SessionPrompts
from keepwarm.traces.model import Call


class Row(NamedTuple):
    """A call that was sent, and when it had its first token and was over."""

    session: str
    copy: int
    call: str
    sent_ns: int
    first_token_ns: int
    done_ns: int


class Sent(Generic[P]):
    """The calls of ``rows``, which are in the order of sending; ``calls`` is how many there are of each copy of a
    session, ``sessions`` are those they are of, in the order in which they began, or nearly: a session is in memory
    from its first call, or that of a later one, to its last.
    """

    def __init__(
        self, rows: Iterable[Row], calls: Mapping[tuple[str, int], int], sessions: Iterable[Arrival], grow: Grow[P]
    ) -> None:
        self._rows = iter(rows)
        self._left = dict(calls)
        self._sessions: Iterator[Arrival] = iter(sessions)
        self._grow = grow
        self._open: dict[tuple[str, int], SessionPrompts[P]] = {}
        self._next: Row | None = next(self._rows, None)

    def next_due(self, now_ns: int) -> int | None:
        """When the next call was sent."""
        del now_ns
        return None if self._next is None else self._next.sent_ns

    def pop(self) -> Planned[P]:
        """Take the next call."""
        row = self._next
        assert row is not None
        self._next = next(self._rows, None)
        key = row.session, row.copy
        while key not in self._open:
            arrival = next(self._sessions)
            name = arrival.calls[0].session, arrival.copy
            if name in self._left:
                self._open[name] = SessionPrompts(arrival.calls, self._grow)
        prompts = self._open[key]
        self._left[key] -= 1
        if not self._left[key]:
            del self._open[key]
        call = prompts.calls[row.call]
        output = call.output if call.output is not None else call.output_est
        took = max(row.first_token_ns - row.sent_ns, 0), max(row.done_ns - row.sent_ns, 0)
        prompt, answer = prompts.prompt(call), prompts.answer(call)
        return Planned(row.sent_ns, call, prompt, answer, output, row.copy, took=took)

    def started(self, planned: Planned[P], now_ns: int) -> None:
        """Nothing depends on it."""

    def ended(self, planned: Planned[P], now_ns: int) -> None:
        """Nothing depends on it."""

    def failed(self, planned: Planned[P]) -> list[Call]:
        """No other call: what was sent was sent."""
        return []
