"""Arrivals are the sessions of a run as they come: which copy of which session starts when, and where in it.

Pure functions of the trace's sessions, the asked load and a seed: all processes of a run draw the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from random import Random
from typing import NamedTuple

from keepwarm.replayers.times import SECOND
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Call, Segment

COMMON = ("tools", "system")
"""Kinds of segments that all copies of a session share."""
_NUMBER = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
LAW = re.compile(rf"(poisson|constant|gamma):{_NUMBER}/(s|m|h)(?::{_NUMBER})?")
PER = {"s": 1, "m": 60, "h": 3600}
MS = SECOND // 1000
ODD = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


class Arrival(NamedTuple):
    """A session as it comes. ``start_ns`` is when, None for as soon as there is a place; of its calls the first
    ``over`` are taken to be over then.
    """

    calls: list[Call]
    copy: int = 0
    start_ns: int | None = None
    over: int = 0


class Law(NamedTuple):
    """How sessions arrive: ``rate_hz`` a second on the average, the times between them ``poisson`` (exponential),
    ``constant``, or ``gamma`` with ``cv`` as their coefficient of variation.
    """

    name: str
    rate_hz: float
    cv: float

    @classmethod
    def read(cls, text: str) -> Law:
        """A law as it is written: poisson:0.2/s, constant:12/m, gamma:0.2/s:2.5. InputError if it is none."""
        told = LAW.fullmatch(text)
        rate, cv = (float(told[2]) / PER[told[3]], float(told[4] or 1)) if told else (0.0, 0.0)
        if told is None or not (1e-9 < rate < 1e6 and 0.01 <= cv <= 100) or (told[4] and told[1] != "gamma"):
            raise InputError(f"--arrivals {text!r}: expected poisson:RATE/s, constant:RATE/s or gamma:RATE/s[:CV]")
        return cls(told[1], rate, cv)

    def apart_ns(self, random: Random) -> int:
        """The time from one arrival to the next."""
        if self.name == "constant":
            return round(SECOND / self.rate_hz)
        shape = 1.0 if self.name == "poisson" else self.cv**-2
        return round(random.gammavariate(shape, 1 / shape) / self.rate_hz * SECOND)


def arrivals(
    read: Callable[[], Iterable[list[Call]]],
    *,
    law: Law | None = None,
    recorded: bool = False,
    speed: float = 1.0,
    repeat: int | None = 1,
    midway: int = 0,
    shared: frozenset[int] = frozenset(),
    seed: int = 0,
    time: int = 0,
) -> Iterator[Arrival]:
    """The sessions that ``read`` gives anew each time it is called, ``repeat`` times, without end if None.

    They come by a law, or when they were ``recorded`` to, or as places get free. The first ``midway`` begin at one of
    their calls, drawn evenly: a load that has gone on for long has sessions of every age. A copy's prompts are its own
    but for tools, system and the hashes that are ``shared`` by sessions; so are all where a run goes on for the
    ``time``-th time, because what was cut off has been asked before.
    """
    random, number, now_ns = Random(seed), 0, 0
    for copy in count() if repeat is None else range(repeat):
        origin, last, longest, sessions = None, 0, MS, 0
        for calls in read():
            if law is not None:
                now_ns += law.apart_ns(random)
            if recorded:
                told = calls[0].session_start_ns or 0
                origin = told if origin is None else origin
                last = round((told - origin) / speed)
                longest = max(longest, *(round(call.end_ns / speed) for call in calls))
            over = random.randrange(len(calls)) if number < midway else 0
            start_ns = now_ns if law is not None else now_ns + last if recorded else None
            which = copy + (time << 32)
            yield Arrival([_another(call, which, shared) for call in calls] if which else calls, copy, start_ns, over)
            number, sessions = number + 1, sessions + 1
        if not sessions:
            return
        if recorded:  # the next copy follows as far apart as sessions are
            now_ns += last + (last // (sessions - 1) if last else longest)


def _another(call: Call, which: int, shared: frozenset[int]) -> Call:
    """A call whose own segments are others."""

    def other(segment: Segment) -> Segment:
        if segment.kind in COMMON or segment.hash in shared:
            return segment
        mixed = (segment.hash + which * ODD) & MASK
        return segment._replace(hash=mixed - (mixed >> 63 << 64))

    return call._replace(append=tuple(map(other, call.append)))
