"""Engine is one simulated worker that batches continuously, sans-IO: jobs in, events out, time passed in.

It goes on in steps as vLLM's scheduler does. A step gives every decoding call one token and spends what is left of the
token budget on prompts, those under way first, then waiting calls in the order of their queue, each only if its whole
prompt fits. What is scheduled is found by others at once. Where a running call finds no room the one admitted last is
preempted: it lets go of its blocks and waits at the front. Steps in which nothing but decoding happens are one event.
"""

from dataclasses import KW_ONLY, dataclass
from heapq import heappop, heappush

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.decoding import Decoding
from keepwarm.replayers.job import CANCELLED, DONE, FIRST_TOKEN, OVERFLOW, Event, Running
from keepwarm.replayers.lease import Lease
from keepwarm.replayers.queues import QUEUES
from keepwarm.replayers.times import SECOND, StepTimes
from keepwarm.replayers.tree import Node

MAX_SEQS, MAX_BATCHED = 256, 8192


@dataclass(slots=True, eq=False)
class _Work:
    """A job here: ``computed`` of its ``target`` tokens (the prompt, and after a preemption what it had generated) are
    in the cache; it decodes since the count ``base``, at which it had ``generated`` tokens out.
    """

    running: Running
    load_upto: int
    generated: int
    target: int
    computed: int = 0
    base: int = 0
    lease: Lease | None = None


@dataclass(slots=True, eq=False)
class _Step:
    """A step under way, or ``steps`` of decoding alone; ``chunks`` are the prompt tokens it computes."""

    begun_ns: int
    end_ns: int
    steps: int
    kv: int
    chunks: list[tuple[_Work, int]]


def _holding(node: Node, token: int) -> Node:
    """The node on the way to a prompt's end in whose run a token is."""
    while node.parent.end > token:
        node = node.parent
    return node


@dataclass(eq=False)
class Engine:
    """``priorities`` makes a hint's priority protect what its call leaves in the cache; ``host`` is a tier below that
    remembers what calls leave. A preempted call that had begun to answer computes its answer so far again.
    """

    cache: BlockCache
    _: KW_ONLY
    times: StepTimes
    max_seqs: int = MAX_SEQS
    max_batched: int = MAX_BATCHED
    queue: str = "fcfs"
    priorities: bool = False
    host: BlockCache | None = None

    def __post_init__(self) -> None:
        if self.max_seqs < 1 or self.max_batched < 1:
            raise ValueError("a step must take at least one call and one token")
        self.cache.counts_use = True
        self.preemptions = 0
        self._order = QUEUES[self.queue]
        self._count = 0
        self._arriving: list[tuple[int, int, _Work]] = []
        self._waiting: list[tuple[tuple[int, ...], int, _Work]] = []
        self._admitted: dict[_Work, None] = {}
        self._prefilling: list[_Work] = []
        self._decoding: Decoding[_Work] = Decoding(self.cache.block)
        self._blocked = False
        self._step: _Step | None = None
        self._events: list[Event] = []

    @property
    def running(self) -> int:
        """Calls in the batch."""
        return len(self._admitted)

    @property
    def waiting(self) -> int:
        """Calls that wait to be in it."""
        return len(self._waiting) + len(self._arriving)

    @property
    def kv_used(self) -> float | None:
        """The share of the cache that running calls hold; None without a capacity."""
        return self.cache.in_use / self.cache.capacity if self.cache.capacity else None

    def load(self) -> tuple[int, int]:
        """Prompt tokens of calls without a first token that were not cached, and blocks of all calls here."""
        queued = [work for *_, work in self._waiting] + [work for *_, work in self._arriving]
        tokens = sum(work.target - work.running.read for work in self._prefilling)
        tokens += sum(work.target - work.running.overlap for work in queued)
        return tokens, self.cache.in_use + sum(work.target // self.cache.block for work in queued)

    def heard(self, prompt: Node, cached: int) -> int:
        """What a router knows by now of a prompt's ``cached`` tokens: workers tell at a step's end what it computes."""
        for work, _ in self._step.chunks if self._step is not None else ():
            at = work.computed
            if at < cached and _holding(prompt, at) is _holding(work.running.job.prompt, at):
                cached = at // self.cache.block * self.cache.block
        return cached

    def submit(
        self, running: Running, now_ns: int, *, load_upto: int = 0, load_ns: int = 0, generated: int = 0
    ) -> None:
        """A job arrives; it can be scheduled once its prompt up to ``load_upto`` is loaded from elsewhere, which takes
        ``load_ns``. Of its answer so many tokens were ``generated`` elsewhere.
        """
        work = running.state = _Work(running, load_upto, generated, running.job.prompt.end)
        self._count += 1
        ready_ns = now_ns + load_ns + round(self.times.call_s * SECOND)
        heappush(self._arriving, (ready_ns, self._count, work))
        step = self._step
        if step is not None and not step.chunks and ready_ns < step.end_ns:
            step.steps = self.times.steps_within(ready_ns - step.begun_ns, len(self._decoding), step.kv, step.steps)
            step.end_ns = step.begun_ns + self.times.steps_ns(step.steps, len(self._decoding), step.kv)

    def next_ns(self) -> int | None:
        """When something happens next, if nothing more arrives."""
        if self._step is not None:
            return self._step.end_ns
        return self._arriving[0][0] if self._arriving else None

    def advance(self, now_ns: int) -> list[Event]:
        """All that happens up to now."""
        while (at_ns := self.next_ns()) is not None and at_ns <= now_ns:
            if self._step is not None:
                self._finish(self._step)
            while self._arriving and self._arriving[0][0] <= at_ns:
                self._arrive(heappop(self._arriving)[2], at_ns)
            self._step = self._next_step(at_ns)
        events, self._events = self._events, []
        return events

    def produced(self, running: Running, now_ns: int) -> int:
        """Tokens of a job's answer that are out."""
        if running.done_ns is not None:
            return running.job.output
        work: _Work = running.state
        if running.first_token_ns is None or work not in self._admitted or work.computed < work.target:
            return work.generated
        step, done = self._step, 0
        if step is not None and not step.chunks and now_ns > step.begun_ns:
            args = (len(self._decoding), step.kv)
            done = self.times.steps_within(now_ns - step.begun_ns, *args, step.steps)
            done -= step.begun_ns + self.times.steps_ns(done, *args) > now_ns
        return work.generated + self._decoding.count - work.base + done

    def cancel(self, running: Running, now_ns: int) -> None:
        """Stop a job; what it has computed stays in the cache."""
        work: _Work = running.state
        if work in self._admitted:
            self._leave(work, now_ns)
        else:
            self._waiting = sorted(entry for entry in self._waiting if entry[2] is not work)
            self._arriving = sorted(entry for entry in self._arriving if entry[2] is not work)
        running.error, running.done_ns = CANCELLED, now_ns

    def _arrive(self, work: _Work, now_ns: int) -> None:
        job = work.running.job
        capacity = self.cache.capacity
        if capacity is not None and self._blocks(job.prompt.end + job.output - 1) > capacity:
            work.running.error, work.running.done_ns = OVERFLOW, now_ns
            self._events.append(Event(now_ns, DONE, work.running))
            return
        self._count += 1
        self._enqueue(work, self._count)

    def _enqueue(self, work: _Work, count: int) -> None:
        self._blocked = False
        heappush(self._waiting, (self._order(work.running.job), count, work))

    def _blocks(self, tokens: int) -> int:
        return -(tokens // -self.cache.block)

    def _next_step(self, now_ns: int) -> _Step | None:
        """What is done next; None if there is nothing to do."""
        chunks: list[tuple[_Work, int]] = []
        budget = self.max_batched - len(self._decoding)
        preempted = self.preemptions
        for work in tuple(self._prefilling):
            chunk = min(work.target - work.computed, budget)
            if chunk > 0 and self._fits(work, work.computed + chunk, now_ns):
                chunks.append((work, chunk))
                budget -= chunk
        if preempted == self.preemptions:
            self._admit(budget, chunks, now_ns)
        else:
            chunks = [(work, chunk) for work, chunk in chunks if work in self._admitted]
        decoding, kv = len(self._decoding), self._decoding.kv
        if chunks:
            tokens = sum(chunk for _, chunk in chunks)
            return _Step(now_ns, now_ns + self.times.step_ns(tokens, decoding, kv), 1, kv, chunks)
        if not decoding:
            return None
        steps = self._decoding.left() if preempted == self.preemptions else 1  # who waits is looked at in the next
        if (capacity := self.cache.capacity) is not None:
            steps = self._decoding.steps_within(capacity - self.cache.in_use, steps)
        if self._arriving:
            steps = self.times.steps_within(self._arriving[0][0] - now_ns, decoding, kv, steps)
        return _Step(now_ns, now_ns + self.times.steps_ns(steps, decoding, kv), steps, kv, chunks)

    def _fits(self, work: _Work, upto: int, now_ns: int) -> bool:
        """Make room for a running call's next tokens, at the cost of those admitted later; False if it had to go."""
        assert work.lease is not None
        while work in self._admitted:
            if self.cache.grow(work.lease, work.running.job.prompt, upto):
                return True
            self._preempt(now_ns)
        return False

    def _admit(self, budget: int, chunks: list[tuple[_Work, int]], now_ns: int) -> None:
        """Take waiting calls into the batch, in their order, until one does not fit."""
        while self._waiting and budget > 0 and not self._blocked and len(self._admitted) < self.max_seqs:
            work = self._waiting[0][2]
            job = work.running.job
            lease = self.cache.acquire(job.prompt, now_ns)
            hit = lease.room
            computed = max(hit, min(work.load_upto, work.target))
            chunk = min(work.target - computed, budget)
            need = self._blocks(work.target) - hit // self.cache.block  # not of the chunk alone
            fits = self.cache.capacity is None or self.cache.in_use + need <= self.cache.capacity
            if not fits or not self.cache.grow(lease, job.prompt, computed + chunk):
                self.cache.give_up(lease)
                self._blocked = True
                return
            heappop(self._waiting)
            work.lease, work.computed = lease, computed
            self._admitted[work] = None
            if work.running.scheduled_ns is None:
                work.running.scheduled_ns = now_ns
                work.running.read, work.running.loaded = computed, computed - hit
            if chunk:
                self._prefilling.append(work)
                chunks.append((work, chunk))
                budget -= chunk
            else:
                self._decode(work, now_ns)

    def _finish(self, step: _Step) -> None:
        """A step is over."""
        self._step = None
        if self._decoding:
            while not self.cache.draw(self._decoding.need(step.steps)):
                self._preempt(step.end_ns)
            self._decoding.go(step.steps)
            while (ended := self._decoding.ended()) is not None:
                self._end(ended, step.end_ns)
        for work, chunk in step.chunks:
            if work in self._admitted:
                work.computed += chunk
                if work.computed == work.target:
                    self._prefilling.remove(work)
                    self._first(work, step.end_ns)

    def _first(self, work: _Work, now_ns: int) -> None:
        """A call's prompt is computed, and with it its next token."""
        running = work.running
        work.generated += 1
        if running.first_token_ns is None:
            running.wrote(self.cache.block, self.cache.ttl_ns)
        self._decode(work, now_ns)

    def _decode(self, work: _Work, now_ns: int) -> None:
        """A call's first token is out, and its next ones come one a step."""
        running = work.running
        if running.first_token_ns is None:
            running.first_token_ns = now_ns
            self._events.append(Event(now_ns, FIRST_TOKEN, running))
        left = running.job.output - work.generated
        work.base = self._decoding.add(work, work.target, left)
        if left <= 0:
            self._end(work, now_ns)

    def _end(self, work: _Work, now_ns: int) -> None:
        running = work.running
        self._leave(work, now_ns)
        running.done_ns = now_ns
        self._events.append(Event(now_ns, DONE, running))

    def _preempt(self, now_ns: int) -> None:
        """The call that matters least, of equals the one admitted last, makes room for others and begins again."""
        work = max(reversed(self._admitted), key=lambda one: self._order(one.running.job))
        self.preemptions += 1
        self._leave(work, now_ns)
        work.load_upto = 0
        self._enqueue(work, -self.preemptions)

    def _leave(self, work: _Work, now_ns: int) -> None:
        """A call is no more in the batch; what it has computed is found until it is evicted."""
        job, lease = work.running.job, work.lease
        assert lease is not None
        self._blocked = False
        del self._admitted[work]
        if work in self._prefilling:
            self._prefilling.remove(work)
        else:
            self._stop(work, lease)
        level = (job.hints.priority or 0) if job.hints is not None and self.priorities else 0
        if self.host is not None:
            self.host.remember(lease.held.node, lease.held.upto, now_ns)
        self.cache.release(lease, now_ns, level=level, keep_ns=job.keep_ns())
        work.lease = None

    def _stop(self, work: _Work, lease: Lease) -> None:
        """A call decodes no more; what later prompts will repeat of its answer is found."""
        steps = self._decoding.remove(work, work.target, work.base)
        self.cache.settle(lease, work.target + steps)
        job = work.running.job
        work.generated += steps
        work.target = job.prompt.end + work.generated
        if job.answer:
            self.cache.keep(lease, self.cache.tree.extend(job.prompt, job.answer))
