"""Replay in real time: send each call when it is due, in the order that the plan lets go, and say what came of it."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from operator import attrgetter
from random import Random
from typing import Any

from keepwarm.replayers.alarm import Alarm
from keepwarm.replayers.caps import Caps
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.endpoint import Answer, Endpoint, Piece, Request
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.retry import RETRIES, wait_s
from keepwarm.replayers.watch import Watch
from keepwarm.traces.model import NOT_ANSWERED, Attempt, Call, Outcome

NOT_SENT, CUT_OFF = NOT_ANSWERED
Prompt = tuple[Piece, ...]


_told = attrgetter(*Outcome._fields[Outcome._fields.index("sent_ns") : Outcome._fields.index("completed")])
"""What an answer has of an outcome."""


@dataclass(eq=False)
class Replay:
    """One replay of a schedule against an endpoint.

    Every planned call comes out of ``emit`` exactly once: answered, failed, or never sent because its session failed
    or the replay was cut off. Waiting for ``caps`` shows in latency from due. A call that fails in passing is tried
    again up to ``retries`` times. Where nothing runs and nothing is due for longer than ``idle_cap_ns``, the clock
    skips what is above that. From ``until_ns`` on calls are sent only as long as one that was due before is not over,
    so that those end under the load they began under. It begins at ``from_ns``. What an endpoint keeps of a session is
    let go when that is over. ``skipped_ns`` is what was skipped, ``held_ns`` the longest that a call waited for caps.
    """

    schedule: Schedule[Prompt]
    endpoint: Endpoint
    emit: Callable[[Outcome], None]
    _: KW_ONLY
    clock: RunClock
    name: str
    caps: Caps = field(default_factory=Caps)
    retries: int = RETRIES
    idle_cap_ns: int | None = None
    until_ns: int | None = None
    from_ns: int = 0

    def __post_init__(self) -> None:
        self._running: dict[tuple[str, int], tuple[Planned[Prompt], asyncio.Task[None]]] = {}
        self._sent: dict[tuple[str, int], int] = {}
        self._kept: dict[tuple[str, int], dict[Any, Any]] = defaultdict(dict)
        self._failed: set[tuple[str, int]] = set()
        self._random = Random(0)
        self._task: asyncio.Task[Any] | None = None
        self._alarm_ns: int | None = None
        self._stopped = False
        self.skipped_ns = self.held_ns = 0

    def stop(self) -> None:
        """Interrupt it, from another thread or before it runs."""
        self._stopped = True
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    async def run(self) -> None:
        """Send all there is. When cancelled or broken off, what was not answered comes out as such first."""
        self._alarm, self._task = Alarm(self._rang), asyncio.current_task()
        self._ended = asyncio.get_running_loop().create_future()
        if self._stopped:
            self._task.cancel()  # type: ignore[union-attr]
        try:
            await asyncio.sleep(max(self.from_ns - self.clock(), 0) / 1e9)
            async with asyncio.TaskGroup() as self._group:
                self._go()
                await self._ended
                for _, task in self._running.values():
                    task.cancel()
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        finally:
            self._task = None
            self._alarm.close()
            if self.until_ns is not None:
                self.schedule.cut()
            for outcome in chain(self._cut_off(), self._rest()):
                self.emit(outcome)

    def _rang(self) -> None:
        self._alarm_ns = None
        try:
            self._go()
        except Exception as error:  # a loop's callback has nobody to raise it to
            self._ended.set_exception(error)

    def _go(self) -> None:
        """Send what is due by now and set the alarm for what comes next; or end, when nothing is due and nothing runs,
        or what was to be measured is over.
        """
        schedule = self.schedule
        while not self._ended.done():
            now_ns = self.clock()
            due_ns = schedule.next_due(now_ns)
            if (due_ns is None and not self._running) or self._over(now_ns, due_ns):
                self._ended.set_result(None)
            elif due_ns is None or due_ns > now_ns:
                if due_ns is None or not self._skip(due_ns - now_ns):
                    self._wait(due_ns, now_ns)
                    return
            else:
                planned = schedule.pop()
                task = self._group.create_task(self._send(planned))
                self._running[planned.call.call, planned.copy] = planned, task

    def _over(self, now_ns: int, due_ns: int | None) -> bool:
        """Whether the time is over, and every call that was due in it."""
        until_ns = self.until_ns
        if until_ns is None or now_ns < until_ns or (due_ns is not None and due_ns < until_ns):
            return False
        return all(planned.due_ns >= until_ns for planned, _ in self._running.values())

    def _skip(self, ns: int) -> bool:
        """Skip what of a time is above the idle cap, where nothing runs."""
        if self.idle_cap_ns is None or self._running or ns <= self.idle_cap_ns:
            return False
        self.clock.skip(ns - self.idle_cap_ns)
        self.skipped_ns += ns - self.idle_cap_ns
        self._alarm_ns = None  # it was set for a clock that had not skipped
        return True

    def _wait(self, due_ns: int | None, now_ns: int) -> None:
        """Set the alarm for what is due next, or for the end of the time."""
        times = [at_ns for at_ns in (due_ns, self.until_ns) if at_ns is not None and at_ns > now_ns]
        if times and min(times) != self._alarm_ns:
            self._alarm_ns = min(times)
            self._alarm.set(self._alarm_ns - now_ns)

    async def _send(self, planned: Planned[Prompt]) -> None:
        call, session, begun_ns = planned.call, planned.session, self.clock()
        await self.caps.enter(call)
        await self.caps.admit(call)
        self.held_ns = max(self.held_ns, self.clock() - begun_ns)
        if session in self._failed:  # while it waited
            outcome = self._skipped(call, planned)._replace(due_ns=planned.due_ns)
        else:
            outcome = await self._asked(planned)
        self.caps.leave(call)
        del self._running[call.call, planned.copy]
        self.emit(outcome)
        if outcome.whole:
            assert outcome.done_ns is not None
            self.schedule.ended(planned, outcome.done_ns)
        else:
            self._failed.add(session)
            for skipped in self.schedule.failed(planned):
                self.emit(self._skipped(skipped, planned))
        if not self.schedule.runs(session):
            self._kept.pop(session, None)
            self._failed.discard(session)
        self._go()

    def _skipped(self, call: Call, failed: Planned[Prompt]) -> Outcome:
        """A call that is not sent because another one failed: it counts, unless that was already in the drain."""
        phase = "measured" if failed.phase == "warmup" else failed.phase
        return Outcome(call, failed.copy, endpoint=self.name, error=NOT_SENT, phase=phase)

    async def _asked(self, planned: Planned[Prompt]) -> Outcome:
        """What came of a call that is sent now, tried again where that may help."""
        key = planned.call.call, planned.copy
        sent_ns = self._sent[key] = self.clock()
        if self.schedule.started(planned, sent_ns):
            self._go()
        kept = self._kept[planned.session]
        request = Request(planned.call, planned.prompt, planned.output, planned.answer, planned.copy, kept)
        tries: list[Attempt] = []
        while True:
            answer = await self.endpoint.send(request)
            tries.append(Attempt(answer.sent_ns, answer.done_ns, answer.status, answer.error))
            again_s = wait_s(answer, len(tries), self._random) if len(tries) <= self.retries else None
            if again_s is None:
                del self._sent[key]
                return self._answered(planned, answer, tries)
            await asyncio.sleep(again_s)
            await self.caps.admit(planned.call)

    def _answered(self, planned: Planned[Prompt], answer: Answer, tries: list[Attempt]) -> Outcome:
        first_ns = tries[0].sent_ns if len(tries) > 1 else None
        head = planned.call, planned.copy, planned.due_ns
        tail = self.name, answer.worker, tuple(tries), planned.output, first_ns, planned.phase
        return Outcome._make((*head, *_told(answer), None, *tail))

    def _cut_off(self) -> Iterator[Outcome]:
        """The calls that run."""
        for key, (planned, _) in self._running.items():
            sent_ns = self._sent.get(key)
            error = NOT_SENT if sent_ns is None else CUT_OFF
            head = planned.call, planned.copy, planned.due_ns, sent_ns
            yield Outcome(*head, endpoint=self.name, error=error, phase=planned.phase)

    def _rest(self) -> Iterator[Outcome]:
        """The calls that were planned, where a number was."""
        if self.until_ns is None:
            for call, copy in self.schedule.rest():
                yield Outcome(call, copy, endpoint=self.name, error=NOT_SENT)


async def run_replay(run: Replay, endpoint: Endpoint, watch: Watch | None = None) -> bool:
    """Run a replay and close its endpoint, the client watched meanwhile; False if it was interrupted (its outcomes are
    out all the same).
    """
    try:
        with watch or nullcontext():
            await run.run()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return False
    finally:
        with suppress(OSError):
            await endpoint.aclose()
    return True
