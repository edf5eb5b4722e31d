"""An engine that takes one step at a time and keeps plain lists, as an oracle for the one that skips ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.job import Job
from keepwarm.replayers.lease import Lease
from keepwarm.replayers.times import StepTimes


@dataclass(eq=False, slots=True)
class Call:
    """A call: what it was told, and how many of its tokens are in the cache and out."""

    job: Job
    arrives: int
    name: int
    read: int | None = None
    first: int | None = None
    done: int | None = None
    out: list[int] = field(default_factory=list)
    computed: int = 0
    target: int = 0
    generated: int = 0
    decoding: bool = False
    lease: Lease | None = None


class Stepping:
    """The engine's rules, step by step: decoding calls one token each, then prompts under way, then waiting calls in
    order as long as a whole prompt fits; the call admitted last gives way. Who comes just as a step ends is not in the
    next one.
    """

    def __init__(self, cache: BlockCache, times: StepTimes, *, max_seqs: int, max_batched: int, order: Any) -> None:
        self.cache, self.times, self.order = cache, times, order
        cache.counts_use = True
        self.max_seqs, self.max_batched = max_seqs, max_batched
        self.running: list[Call] = []
        self.waiting: list[Call] = []
        self.preemptions = 0

    def run(self, calls: list[Call]) -> None:
        """All calls, from their arrivals to their ends."""
        left, now = sorted(calls, key=lambda call: (call.arrives, call.name)), 0
        while left or self.waiting or self.running:
            while left and left[0].arrives < now:
                self.arrive(left.pop(0), now)
            if not self.waiting and not self.running and left:  # the first to come begins a step alone
                now = max(now, left[0].arrives)
                self.arrive(left.pop(0), now)
            chunks = self.schedule(now)
            decoding = [call for call in self.running if call.decoding]
            if chunks or decoding:
                held = sum(call.computed + 1 for call in decoding)
                now += self.times.step_ns(sum(n for _, n in chunks), len(decoding), held)
                self.finish(chunks, now)

    def arrive(self, call: Call, now: int) -> None:
        """A call waits, if it can ever run."""
        call.target = call.job.prompt.end
        most = -(-(call.target + call.job.output - 1) // self.cache.block)
        if self.cache.capacity is not None and most > self.cache.capacity:
            call.done = now
        else:
            self.waiting.append(call)
            self.waiting.sort(key=lambda each: self.order(each.job))

    def schedule(self, now: int) -> list[tuple[Call, int]]:
        """The prompt tokens of the next step."""
        budget = self.max_batched - sum(call.decoding for call in self.running)
        chunks: list[tuple[Call, int]] = []
        before = self.preemptions
        for call in [call for call in self.running if not call.decoding]:
            chunk = min(call.target - call.computed, budget)
            while chunk > 0 and call in self.running:
                assert call.lease is not None
                if self.cache.grow(call.lease, call.job.prompt, call.computed + chunk):
                    chunks.append((call, chunk))
                    budget -= chunk
                    break
                self.preempt(now)
        while before == self.preemptions and self.waiting and budget > 0 and len(self.running) < self.max_seqs:
            call = self.waiting[0]
            lease = self.cache.acquire(call.job.prompt, now)
            hit, chunk = lease.room, min(call.target - lease.room, budget)
            needs = -(-call.target // self.cache.block) - hit // self.cache.block
            full = self.cache.capacity is not None and self.cache.in_use + needs > self.cache.capacity
            if full or not self.cache.grow(lease, call.job.prompt, hit + chunk):
                self.cache.give_up(lease)
                break
            self.running.append(self.waiting.pop(0))
            call.lease, call.computed = lease, hit
            call.read = hit if call.read is None else call.read
            chunks.append((call, chunk))
            budget -= chunk
        return [(call, chunk) for call, chunk in chunks if call in self.running]

    def finish(self, chunks: list[tuple[Call, int]], now: int) -> None:
        """A step is over: a token for each decoding call, then the prompts' chunks."""
        while True:
            decoding = [call for call in self.running if call.decoding]
            if self.cache.draw(sum(call.computed % self.cache.block == 0 for call in decoding)):
                break
            self.preempt(now)
        for call in decoding:
            assert call.lease is not None
            call.computed += 1
            self.cache.settle(call.lease, call.computed)
            self.token(call, now)
        for call in [call for call in self.running if call in decoding and call.generated == call.job.output]:
            self.end(call, now)
        for call, chunk in chunks:
            if call in self.running:
                call.computed += chunk
                if call.computed == call.target:
                    call.decoding = True
                    self.token(call, now)
                    if call.generated == call.job.output:
                        self.end(call, now)

    def token(self, call: Call, now: int) -> None:
        """One token of the answer is out."""
        call.generated += 1
        call.out.append(now)
        call.first = now if call.first is None else call.first

    def end(self, call: Call, now: int) -> None:
        """A call is answered."""
        self.leave(call, now)
        call.done = now

    def preempt(self, now: int) -> None:
        """The call admitted last of those that matter least waits again, before all others of its rank."""
        call = sorted(self.running, key=lambda each: self.order(each.job))[-1]
        self.preemptions += 1
        self.leave(call, now)
        call.target, call.computed = call.job.prompt.end + call.generated, 0
        self.waiting.insert(0, call)
        self.waiting.sort(key=lambda each: self.order(each.job))

    def leave(self, call: Call, now: int) -> None:
        """A call lets go of its blocks; its answer is found."""
        assert call.lease is not None
        if call.decoding and call.job.answer:
            whole = self.cache.tree.extend(call.job.prompt, call.job.answer)
            self.cache.keep(call.lease, whole)
        self.cache.release(call.lease, now)
        self.running.remove(call)
        call.decoding, call.lease = False, None
