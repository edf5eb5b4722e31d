"""Replay in real time: send each call when it is due, in the order that the plan lets go, and say what came of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from asyncio_throttle.throttler import Throttler

from keepwarm.replayers.alarm import Alarm
from keepwarm.replayers.endpoint import Answer, Endpoint, Piece, Request
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.traces.model import NOT_ANSWERED, Attempt, Outcome

NOT_SENT, CUT_OFF = NOT_ANSWERED
Prompt = tuple[Piece, ...]


class Replay:
    """One replay of a schedule against an endpoint.

    Every planned call comes out of ``emit`` exactly once: answered, failed, or never sent because its session failed
    or the replay was cut off. ``max_rate`` caps the calls sent a second; waiting for it shows in latency from due.
    What an endpoint keeps of a session is let go when that is over.
    """

    def __init__(
        self,
        schedule: Schedule[Prompt],
        endpoint: Endpoint,
        emit: Callable[[Outcome], None],
        *,
        clock: Callable[[], int],
        name: str,
        max_rate: int | None = None,
    ) -> None:
        self._schedule = schedule
        self._endpoint = endpoint
        self._emit = emit
        self._clock = clock
        self._name = name
        self._throttle = Throttler(rate_limit=max_rate, period=1.0) if max_rate else None
        self._running: dict[str, Planned[Prompt]] = {}
        self._sent: dict[str, int] = {}
        self._kept: dict[str, dict[Any, Any]] = defaultdict(dict)
        self._alarm: Alarm | None = None
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Send all there is. When cancelled or broken off, what was not answered comes out as such first."""
        self._alarm = Alarm(self._wake.set)
        try:
            async with asyncio.TaskGroup() as group:
                while await self._until_due():
                    if self._throttle is not None:
                        async with self._throttle:  # what was due may have been skipped meanwhile
                            if not await self._until_due():
                                break
                    planned = self._schedule.pop()
                    self._running[planned.call.call] = planned
                    group.create_task(self._send(planned))
        except BaseException as error:
            for outcome in self._cut_off():
                self._emit(outcome)
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        finally:
            self._alarm.close()

    async def _until_due(self) -> bool:
        """Wait until a call is due; False when nothing is and nothing runs."""
        while True:
            now_ns = self._clock()
            due_ns = self._schedule.next_due(now_ns)
            if due_ns is not None and due_ns <= now_ns:
                return True
            if due_ns is None and not self._running:
                return False
            self._wake.clear()
            assert self._alarm is not None
            if due_ns is not None:
                self._alarm.set(due_ns - now_ns)
            await self._wake.wait()

    async def _send(self, planned: Planned[Prompt]) -> None:
        call = planned.call
        self._sent[call.call] = self._clock()
        self._schedule.started(call, self._sent[call.call])
        self._wake.set()
        kept = self._kept[call.session]
        request = Request(call, planned.prompt, planned.output, planned.answer, planned.copy, kept)
        answer = await self._endpoint.send(request)
        del self._running[call.call], self._sent[call.call]
        self._emit(self._answered(planned, answer))
        if answer.error is None and answer.status is not None and answer.status < 300:
            self._schedule.ended(call, answer.done_ns)
        else:
            for skipped in self._schedule.failed(call):
                self._emit(Outcome(skipped, endpoint=self._name, error=NOT_SENT))
        if not self._schedule.runs(call.session):
            self._kept.pop(call.session, None)
        self._wake.set()

    def _answered(self, planned: Planned[Prompt], answer: Answer) -> Outcome:
        told = answer._asdict()
        del told["said"], told["told"], told["head_ns"]
        told["attempts"] = answer.attempts or (Attempt(answer.sent_ns, answer.done_ns, answer.status, answer.error),)
        told |= {"due_ns": planned.due_ns, "endpoint": self._name, "planned_output": planned.output}
        return Outcome(planned.call, copy=planned.copy, **told)

    def _cut_off(self) -> Iterator[Outcome]:
        for name, planned in self._running.items():
            sent_ns = self._sent.get(name)
            error = NOT_SENT if sent_ns is None else CUT_OFF
            yield Outcome(planned.call, due_ns=planned.due_ns, sent_ns=sent_ns, endpoint=self._name, error=error)
        for call in self._schedule.rest():
            yield Outcome(call, endpoint=self._name, error=NOT_SENT)


async def run_replay(run: Replay, endpoint: Endpoint) -> bool:
    """Run a replay and close its endpoint; False if it was interrupted (its outcomes are out all the same)."""
    try:
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
