"""Driver advances a simulated cluster by the wall clock, and wakes whoever waits for one of its calls."""

import asyncio
import time

from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.job import SECOND, Job, Running

PACE_NS = 4_000_000
"""A stream's events are at least this far apart; those of faster tokens carry several."""


class Call:
    """A job under way. ``out`` are the tokens that a stream may have of it; the last one only when all is done. Who
    waits for it is woken when something ``happened`` to it.
    """

    def __init__(self, running: Running) -> None:
        self.running = running
        self.out = 0
        self.fault: Exception | None = None
        self.happened = asyncio.Event()

    @property
    def done(self) -> bool:
        """All of it is over."""
        return self.running.done_ns is not None

    async def news(self) -> None:
        """Wait until something more has happened to it."""
        self.happened.clear()
        await self.happened.wait()
        if self.fault is not None:
            raise self.fault


class Driver:
    """The cluster's time runs ``speed`` times as fast as the wall clock's, from now on."""

    def __init__(self, cluster: Cluster, *, speed: float) -> None:
        self.cluster = cluster
        self.speed = speed
        self._anchor_ns = time.monotonic_ns()
        self._calls: dict[Running, Call] = {}
        self._streams: set[Call] = set()
        self._timer: asyncio.TimerHandle | None = None

    def now_ns(self) -> int:
        """The cluster's time."""
        return int((time.monotonic_ns() - self._anchor_ns) * self.speed)

    def submit(self, job: Job, *, stream: bool) -> Call:
        """Ask a job of the cluster; a stream is woken for its tokens too."""
        self.advance()
        call = Call(self.cluster.submit(job, self.now_ns()))
        self._calls[call.running] = call
        if stream:
            self._streams.add(call)
        self.advance()
        return call

    def leave(self, call: Call) -> None:
        """Nobody waits for a call any more: one that is not over is cancelled."""
        self._streams.discard(call)
        self.advance()
        if self._calls.pop(call.running, None) is not None:
            self.cluster.cancel(call.running, self.now_ns())
            self.advance()

    def advance(self) -> None:
        """All that has happened up to now."""
        now_ns = self.now_ns()
        for event in self.cluster.advance(now_ns):
            call = self._calls.get(event.running)
            if call is not None:
                call.happened.set()
                if call.done:
                    call.out = call.running.job.output
                    del self._calls[event.running]
                    self._streams.discard(call)
        for call in self._streams:
            if call.running.first_token_ns is not None:
                out = min(self.cluster.produced(call.running, now_ns), call.running.job.output - 1)
                if out > call.out:
                    call.out = out
                    call.happened.set()
        self._set_timer(now_ns)

    def _set_timer(self, now_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ns = self.cluster.next_ns()
        waits = [] if due_ns is None else [(due_ns - now_ns) / self.speed]
        if any(call.running.first_token_ns is not None for call in self._streams):
            waits.append(PACE_NS)
        if waits:
            self._timer = asyncio.get_running_loop().call_later(max(min(waits) / SECOND, 0), self._ring)

    def _ring(self) -> None:
        self._timer = None
        try:
            self.advance()
        except Exception as error:  # a fault in the cluster is told to all who wait: else they would for ever
            for call in self._calls.values():
                call.fault = error
                call.happened.set()
