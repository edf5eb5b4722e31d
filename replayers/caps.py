"""Caps are what a provider allows: calls a second, input tokens a minute, calls at once; of all calls or of one flow.

What waits for a cap waits in its turn, and its latency from due shows it.
"""

import asyncio
from collections.abc import Iterable
from time import monotonic
from typing import TypeVar

from asyncio_throttle.throttler import Throttler

from keepwarm.traces.model import Call

T = TypeVar("T")
MINUTE_S = 60.0
CAPS = {"rate": "max_rate", "tokens_per_minute": "max_input_tokens_per_minute", "concurrency": "max_concurrency"}
"""The caps, and what their options are called."""
Cap = tuple[str | None, int]
"""A flow, None for all, and its number."""


class TokenBucket:
    """Input tokens a minute, as providers count them: a bucket that fills all the time and holds a minute's worth. A
    prompt larger than that waits for a full one, and those behind it for what it owes.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_s, self._most = per_minute / MINUTE_S, per_minute
        self._room, self._at_s = float(per_minute), 0.0
        self._turn = asyncio.Lock()

    def wait_s(self, tokens: int, now_s: float) -> float:
        """Take so many tokens if they are there and say 0, else say when to ask again."""
        self._room = min(self._room + (now_s - self._at_s) * self._per_s, self._most)
        self._at_s = now_s
        missing = min(tokens, self._most) - self._room
        if missing <= 0:
            self._room -= tokens
        return max(missing / self._per_s, 0.0)

    async def acquire(self, tokens: int) -> None:
        """Wait for so many tokens."""
        async with self._turn:
            while (left_s := self.wait_s(tokens, monotonic())) > 0:
                await asyncio.sleep(left_s)


class Caps:
    """All caps of a run."""

    def __init__(
        self, *, rate: Iterable[Cap] = (), tokens_per_minute: Iterable[Cap] = (), concurrency: Iterable[Cap] = ()
    ) -> None:
        self._rates = [(flow, Throttler(rate_limit=most, period=1.0)) for flow, most in _own_first(rate)]
        self._buckets = [(flow, TokenBucket(most)) for flow, most in _own_first(tokens_per_minute)]
        self._places = [(flow, asyncio.Semaphore(most)) for flow, most in _own_first(concurrency)]

    async def enter(self, call: Call) -> None:
        """Wait until there is a place for a call."""
        for places in _of(self._places, call):
            await places.acquire()

    async def admit(self, call: Call) -> None:
        """Wait until a call that has its place may be sent, once."""
        for bucket in _of(self._buckets, call):
            await bucket.acquire(call.prompt_tokens)
        for rate in _of(self._rates, call):
            await rate.acquire()  # type: ignore[no-untyped-call]

    def leave(self, call: Call) -> None:
        """A call that was let in is over."""
        for places in _of(self._places, call):
            places.release()


def _own_first(caps: Iterable[Cap]) -> list[Cap]:
    """A flow's own cap before that of all calls: who waits for it holds back nobody else."""
    return sorted(caps, key=lambda cap: cap[0] is None)


def _of(caps: list[tuple[str | None, T]], call: Call) -> list[T]:
    return [cap for flow, cap in caps if flow is None or flow == call.flow]
