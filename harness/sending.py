"""Sending a run's calls, all of them or a shard, their outcomes into a directory as they come."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple

from keepwarm.harness.asking import Asking
from keepwarm.harness.planned import Planned
from keepwarm.harness.progress import progress
from keepwarm.replayers.caps import Cap, Caps
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.plan import Schedule
from keepwarm.replayers.prompts import as_pieces
from keepwarm.replayers.replay import Prompt, Replay, run_replay
from keepwarm.replayers.watch import Watch
from keepwarm.traces.journal import Journal
from keepwarm.traces.model import Outcome

AHEAD = 10_000
"""Calls that are made ready before a replay begins, because many sessions may begin at once."""
MOST_FILES = 1 << 16
"""For so many at most the kernel's table of open files is made large beforehand."""
Counts = Counter[tuple[str | None, str | None]]


class Sending(NamedTuple):
    """How calls are sent: what the endpoint is told, the caps, how often a call is tried again, idle time that is not
    waited, and where the run's clock begins (above 0 where a run goes on).
    """

    endpoint: dict[str, Any]
    caps: dict[str, tuple[Cap, ...]]
    retries: int
    idle_cap_ns: int | None = None
    from_ns: int = 0

    def part(self, number: int, of: int) -> Sending:
        """What one of so many processes may do: its share of each cap."""
        shares = {
            name: tuple((flow, (most - number + of - 1) // of) for flow, most in each)
            for name, each in self.caps.items()
        }
        return self._replace(caps=shares)


class Came(NamedTuple):
    """What came of sending: how many calls by phase and error (None: answered), whether it was interrupted, what each
    process's watch told, the time that was skipped, and how many processes were lost.
    """

    counts: Counts
    interrupted: bool
    clients: list[dict[str, Any]]
    skipped_ns: int = 0
    lost: int = 0

    def __add__(self, other: Came) -> Came:  # type: ignore[override]
        counts, clients = self.counts + other.counts, self.clients + other.clients
        cut, skipped_ns = self.interrupted or other.interrupted, self.skipped_ns + other.skipped_ns
        return Came(counts, cut, clients, skipped_ns, self.lost + other.lost)

    @property
    def answered(self) -> int:
        """How many calls were."""
        return sum(count for (_, error), count in self.counts.items() if error is None)

    def measured(self) -> int:
        """How many calls were due in the time that was measured."""
        return sum(count for (phase, _), count in self.counts.items() if phase == "measured")

    def words(self) -> str:
        """It in one line."""
        errors: Counter[str] = Counter()
        for (_, error), count in self.counts.items():
            errors[error or ""] += count
        parts = [f"{self.answered:,} calls answered"]
        parts += [f"{count:,} {error}" for error, count in errors.items() if error]
        told = ", ".join(parts)
        told += f"; lost {self.lost} of {self.lost + len(self.clients)} processes" if self.lost else ""
        return told + ("; interrupted, its results so far are kept" if self.interrupted else "")


def send_all(
    path: Path,
    planned: Planned,
    asking: Asking,
    sending: Sending,
    *,
    ready: Schedule[Prompt] | None = None,
    at_ns: int | None = None,
    begun: Callable[[Replay], None] | None = None,
) -> Came:
    """Send a plan's calls, their outcomes into a run's directory as they come. For a shard ``ready`` is its schedule,
    ``at_ns`` the time of day that is the run's zero, and ``begun`` is told what can be stopped.
    """
    clock, counts = RunClock(), Counts()
    endpoint = asking.endpoint(clock=clock, **sending.endpoint)
    shown = nullcontext(lambda done, of: None) if at_ns else progress("replaying", planned.planned_calls)
    schedule, watch = ready or made_ready(planned, sending), Watch()
    with closing(Journal(path, partial=schedule.partial)) as journal, shown as told:

        def emit(outcome: Outcome) -> None:
            journal.add(outcome)
            counts[outcome.phase, outcome.error] += 1
            told(journal.rows, None)

        replay = Replay(
            schedule,
            endpoint,
            emit,
            clock=clock,
            name=asking.model,
            caps=Caps(**sending.caps),
            retries=sending.retries,
            idle_cap_ns=sending.idle_cap_ns,
            until_ns=planned.window and planned.window[1],
            from_ns=sending.from_ns,
        )
        if begun is not None:
            begun(replay)
        with _undisturbed():
            clock.start((0 if at_ns is None else at_ns - time_ns()) - sending.from_ns)
            whole = asyncio.run(run_replay(replay, endpoint, watch))
    return Came(counts, not whole, [watch.told | {"cap_wait_max_s": replay.held_ns / 1e9}], replay.skipped_ns)


def made_ready(planned: Planned, sending: Sending) -> Schedule[Prompt]:
    """A plan's schedule, its first sessions read: that is for before the clock runs."""
    schedule = planned.schedule(as_pieces, ahead=AHEAD)
    schedule.next_due(sending.from_ns)
    return schedule


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No call is held up by Python's garbage collection, but rarely, nor by the kernel's table of open files: each time
    that must grow, a program of several threads stands still for 10 to 20 ms, so it grows to its end before.
    """
    with Path(os.devnull).open() as file, suppress(OSError):
        os.close(fcntl(file, F_DUPFD, min(os.sysconf("SC_OPEN_MAX"), MOST_FILES) - 1))
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(100_000, before[1], 1 << 30)  # 256 calls on their way are looked through in 5 to 15 ms
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
