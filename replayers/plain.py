"""Plain is a simulated worker without a limit on how many calls run at once: each takes as long as if it were alone.

It tells what a cache is worth, with engine rules or those of a managed API. What a call wrote is readable once its
first token is out, and lives from its last use.
"""

from heapq import heappop, heappush

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.job import CANCELLED, DONE, FIRST_TOKEN, Event, Running
from keepwarm.replayers.lease import Lease
from keepwarm.replayers.marked import MarkedCache
from keepwarm.replayers.times import ServiceTimes

_LOAD_BLOCK = 16
_FIRST, _END = 0, 1
"""At one instant first tokens come before calls end (an answer may be one token), and both before new calls begin."""


class KeepBlocks:
    """What happens to a cache with engine rules as a call goes on. Without ``answers`` what is generated is not kept;
    ``at_once`` a prompt is readable by others as soon as its call arrives, which no engine betters.
    """

    def __init__(self, cache: BlockCache, *, answers: bool = True, at_once: bool = False) -> None:
        self.cache = cache
        self.answers = answers
        self.at_once = at_once

    def begin(self, running: Running, now_ns: int) -> Lease:
        """A call arrives and is told what it reads; what it holds."""
        lease = self.cache.acquire(running.job.prompt, now_ns)
        running.read = lease.room
        if self.at_once:
            self.cache.grow_most(lease, running.job.prompt, running.job.prompt.end)
        return lease

    def first_token(self, running: Running, lease: Lease, now_ns: int) -> None:
        """Its prompt is computed, and it is told what it wrote."""
        self.cache.grow_most(lease, running.job.prompt, running.job.prompt.end)
        running.wrote(self.cache.block, self.cache.ttl_ns)

    def end(self, running: Running, lease: Lease, now_ns: int) -> None:
        """It is over."""
        job = running.job
        upto = job.prompt.end + job.output - 1
        if self.answers and lease.room == job.prompt.end and self.cache.spend(lease, upto) and job.answer:
            self.cache.keep(lease, self.cache.tree.extend(job.prompt, job.answer))
        self.cache.release(lease, now_ns, keep_ns=job.keep_ns())


Keeping = KeepBlocks | MarkedCache
"""What happens to a cache as a call goes on; a managed API's rules tell that themselves."""


class Plain:
    """A worker whose calls do not wait for each other."""

    def __init__(self, keeping: Keeping, *, times: ServiceTimes) -> None:
        self.keeping = keeping
        self.cache = keeping.cache if isinstance(keeping, KeepBlocks) else keeping
        self.times = times
        self.running = self.waiting = self.preemptions = 0
        self.kv_used = None
        self._events: list[tuple[int, int, int, Running]] = []
        self._count = self._blocks = 0

    def load(self) -> tuple[int, int]:
        """Prompt tokens still to be computed, of which it makes no queue, and blocks of calls that run."""
        return 0, self._blocks

    def submit(
        self, running: Running, now_ns: int, *, load_upto: int = 0, load_ns: int = 0, generated: int = 0
    ) -> None:
        """A job arrives; its prompt up to ``load_upto`` is loaded from elsewhere, which takes ``load_ns``."""
        job = running.job
        running.scheduled_ns = now_ns
        lease = self.keeping.begin(running, now_ns)
        running.loaded = max(load_upto - running.read, 0)
        running.read += running.loaded
        first_ns = now_ns + load_ns + self.times.first_token_ns(job.prompt.end - running.read)
        done_ns = first_ns + self.times.decode_ns(job.output)
        if job.took is not None:
            first_ns, done_ns = now_ns + job.took[0], now_ns + job.took[1]
        running.state = (lease, first_ns, done_ns)
        self.running += 1
        self._blocks += self._size(running)
        self._count += 1
        heappush(self._events, (first_ns, _FIRST, self._count, running))
        heappush(self._events, (done_ns, _END, self._count, running))

    def next_ns(self) -> int | None:
        """When something happens next, if nothing more arrives."""
        while self._events and self._events[0][3].error is not None:
            heappop(self._events)
        return self._events[0][0] if self._events else None

    def advance(self, now_ns: int) -> list[Event]:
        """All that happens up to now."""
        events = []
        while (at_ns := self.next_ns()) is not None and at_ns <= now_ns:
            _, kind, _, running = heappop(self._events)
            lease = running.state[0]
            if kind == _FIRST:
                running.first_token_ns = at_ns
                self.keeping.first_token(running, lease, at_ns)
                events.append(Event(at_ns, FIRST_TOKEN, running))
            else:
                running.done_ns = at_ns
                self._finish(running, at_ns)
                events.append(Event(at_ns, DONE, running))
        return events

    def produced(self, running: Running, now_ns: int) -> int:
        """Tokens of a job's answer that are out."""
        first_ns: int = running.state[1]
        done_ns: int = running.state[2]
        output = running.job.output
        if now_ns < first_ns or now_ns >= done_ns:
            return 0 if now_ns < first_ns else output
        return 1 + (output - 1) * (now_ns - first_ns) // (done_ns - first_ns)

    def cancel(self, running: Running, now_ns: int) -> None:
        """Stop a job; what its prompt left in the cache stays."""
        running.error, running.done_ns = CANCELLED, now_ns
        self._finish(running, now_ns)

    def _finish(self, running: Running, now_ns: int) -> None:
        self.running -= 1
        self._blocks -= self._size(running)
        self.keeping.end(running, running.state[0], now_ns)

    def _size(self, running: Running) -> int:
        return running.job.prompt.end // _LOAD_BLOCK + 1
