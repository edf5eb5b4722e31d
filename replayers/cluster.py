"""Cluster is the simulated endpoint, sans-IO: workers behind a router, jobs in, events out, time passed in.

All workers are alike and answer calls whole, or there are two pools: then a worker of the first computes the prompt,
its KV is moved, and a worker of the second generates. A prefix that another worker or the host tier has is moved to the
one chosen where that is faster than computing it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.job import CANCELLED, DONE, FIRST_TOKEN, SECOND, Event, Job, Running
from keepwarm.replayers.plain import Keeping, Plain
from keepwarm.replayers.router import Router, View
from keepwarm.replayers.tree import Node, PromptTree

Worker = Engine | Plain


class Member:
    """A worker in a cluster, its place, and its totals in tokens since it started; ``guess`` is what the router thinks
    it has cached, where it cannot know.
    """

    def __init__(self, worker: Worker, index: int, guess: BlockCache | None) -> None:
        self.worker = worker
        self.index = index
        self.guess = guess
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    def cached(self, node: Node) -> int:
        """What of a prompt a call would find here; managed rules tell only calls."""
        cache = self.worker.cache
        return cache.match(node) if isinstance(cache, BlockCache) else 0

    def host(self, node: Node) -> int:
        """What of a prompt the host tier has."""
        host = self.worker.host if isinstance(self.worker, Engine) else None
        return 0 if host is None else host.match(node)

    def view(self, node: Node) -> View:
        """What the router sees of it."""
        known = self.worker.cache if self.guess is None else self.guess
        cached, active = known.kept(node) if isinstance(known, BlockCache) else (0, 0)
        if self.guess is None and isinstance(self.worker, Engine):
            cached = self.worker.heard(node, cached)
        return View(*self.worker.load(), cached, active, self.host(node))


@dataclass(eq=False)
class Cluster:
    """``workers`` answer calls; of two pools, ``decoders`` generate what workers computed. ``peers``, ``tier`` and
    ``handover`` are how many tokens a second move between workers, from the host tier and from pool to pool, None where
    none do.
    Background calls have the last ``background`` workers for themselves. ``shadows`` are caches of the same tree that
    see the same calls at the same times, to tell what could have been read. ``guesses`` are the router's caches, one a
    worker, where it does not know theirs. Background workers are fewer than workers, and decoders need a ``handover``.
    """

    tree: PromptTree
    workers: Sequence[Worker]
    router: Router
    _: KW_ONLY
    decoders: Sequence[Worker] = ()
    peers: float | None = None
    tier: float | None = None
    handover: float | None = None
    background: int = 0
    guesses: Sequence[BlockCache] = ()
    shadows: Mapping[str, Keeping] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = len(self.workers)
        self._pool = [Member(one, i, self.guesses[i] if self.guesses else None) for i, one in enumerate(self.workers)]
        self._decoding = [Member(one, number + i, None) for i, one in enumerate(self.decoders)]
        self.members = self._pool + self._decoding
        self._decode_router = Router("least_loaded", block=self.router.block)
        everyone, split = range(number), number - self.background
        self._among = {"background": everyone[split:] if self.background else everyone}
        self._others = everyone[:split]

    def submit(self, job: Job, now_ns: int) -> Running:
        """Take a job on, and choose a worker for it, or for its prompt alone."""
        running = Running(job, now_ns)
        for name, shadow in self.shadows.items():
            copy = Running(job, now_ns)
            running.seen += ((shadow, copy, shadow.begin(copy, now_ns)),)
            running.bounds[name] = copy.read
        among = self._among.get(job.flow or "", self._others)
        views = [each.view(job.prompt) for each in self._pool] if self.router.needs_views and len(among) > 1 else ()
        chosen = self.router.choose(job, views, among) if len(among) > 1 else among[0]
        self._send(self._pool[chosen], running, now_ns)
        return running

    def next_ns(self) -> int | None:
        """When ``advance`` has something to do next, if nothing more is submitted."""
        soonest = None
        for each in self.members:
            at_ns = each.worker.next_ns()
            if at_ns is not None and (soonest is None or at_ns < soonest):
                soonest = at_ns
        return soonest

    def advance(self, now_ns: int) -> list[Event]:
        """All that happens up to now, in the order of time."""
        told: list[Event] = []
        while (at_ns := self.next_ns()) is not None and at_ns <= now_ns:
            for each in self.members:
                for event in each.worker.advance(at_ns):
                    self._happened(event, told)
        return told

    def produced(self, running: Running, now_ns: int) -> int:
        """Tokens of a job's answer that are out by now."""
        return 0 if running.inner is not None else running.where.worker.produced(running, now_ns)

    def cancel(self, running: Running, now_ns: int) -> None:
        """The client left: a job that is not done ends as it is."""
        if running.done_ns is None:
            running.where.worker.cancel(running.inner or running, now_ns)
            running.error, running.done_ns = CANCELLED, now_ns
            self._unseen(running, now_ns)

    def reset_cache(self) -> None:
        """Forget all that no running call uses."""
        for each in self.members:
            each.worker.cache.clear()

    def _send(self, chosen: Member, running: Running, now_ns: int) -> None:
        """Give a job to a worker, with what of its prefix is moved there."""
        job, inner = running.job, running
        if self._decoding:
            inner = running.inner = Running(job._replace(output=1, answer=()), now_ns, silent=True, outer=running)
        upto, took_ns = self._moved(chosen, job.prompt)
        running.worker = inner.worker = str(chosen.index)
        inner.overlap = upto or (chosen.cached(job.prompt) if isinstance(chosen.worker, Engine) else 0)
        if chosen.guess is not None:
            chosen.guess.remember(job.prompt, job.prompt.end, now_ns)
        running.where = inner.where = chosen
        chosen.worker.submit(inner, now_ns, load_upto=upto, load_ns=took_ns)

    def _moved(self, chosen: Member, node: Node) -> tuple[int, int]:
        """Up to which token a prompt's prefix is best fetched from elsewhere, and what that takes; 0 for not at all."""
        best, upto, took_ns = 0, 0, 0
        if self.peers is None and self.tier is None:
            return 0, 0
        own = chosen.cached(node)
        sources = [(self.tier, chosen.host(node))]
        sources += [(self.peers, each.cached(node)) for each in self._pool if each is not chosen]
        for rate, has in sources:
            if rate is not None and has > own:
                moving_ns = round((has - own) / rate * SECOND)
                saved = chosen.worker.times.prefill_ns(has - own) - moving_ns
                if saved > best:
                    best, upto, took_ns = saved, has, moving_ns
        return upto, took_ns

    def _happened(self, event: Event, told: list[Event]) -> None:
        """Pass a worker's event on, as that of the job the cluster was given."""
        running = event.running
        if event.kind == FIRST_TOKEN and running.where.index < len(self._pool):
            running.where.prompt_tokens += running.job.prompt.end
            running.where.cached_tokens += running.read
        if running.outer is not None:
            self._handed(event, running, running.outer, told)
            return
        if event.kind == DONE:
            self._done(running, event.at_ns)
        for shadow, copy, lease in running.seen:
            shadow.first_token(copy, lease, event.at_ns)
        if not running.silent:
            told.append(event)

    def _done(self, running: Running, now_ns: int) -> None:
        self._unseen(running, now_ns)
        if running.error is not None:
            return
        job, where = running.job, running.where
        where.generated_tokens += job.output
        if job.hints is not None and job.hints.speculative_prefill and job.answer and not running.silent:
            warm = Job(self.tree.extend(job.prompt, job.answer), 1, model=job.model, session=job.session)
            self._send(self._pool[where.index % len(self._pool)], Running(warm, now_ns, silent=True), now_ns)

    def _handed(self, event: Event, inner: Running, outer: Running, told: list[Event]) -> None:
        """A prompt is computed: its KV goes to a worker that generates."""
        if event.kind == FIRST_TOKEN:
            outer.read, outer.loaded, outer.writes = inner.read, inner.loaded, inner.writes
            outer.scheduled_ns = inner.scheduled_ns
            return
        job, outer.inner = outer.job, None
        if inner.error is not None:
            outer.error, outer.done_ns = inner.error, event.at_ns
            self._happened(event._replace(running=outer), told)
            return
        assert self.handover is not None
        views = [each.view(job.prompt) for each in self._decoding]
        chosen = self._decoding[self._decode_router.choose(job, views, range(len(self._decoding)))]
        outer.where = chosen
        moving_ns = round((job.prompt.end - chosen.cached(job.prompt)) / self.handover * SECOND)
        chosen.worker.submit(outer, event.at_ns, load_upto=job.prompt.end, load_ns=moving_ns, generated=1)

    def _unseen(self, running: Running, now_ns: int) -> None:
        for shadow, copy, lease in running.seen:
            shadow.end(copy, lease, now_ns)
        running.seen = ()
        self.tree.prune(running.job.prompt)
