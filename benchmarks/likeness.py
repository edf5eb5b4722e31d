"""The simulated cluster made like a real engine, and asked as that was.

vLLM's clock hardly matters with its one worker; that of Dynamo's mock workers is in their sources, and is kept to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any, NamedTuple

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.job import DONE, Job, Running
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.prompts import in_tree
from keepwarm.replayers.router import Router, View
from keepwarm.replayers.times import SECOND, StepTimes
from keepwarm.replayers.tree import Node, PromptTree
from keepwarm.traces.model import Call

CALL_S = 0.002
"""What HTTP and the tokens' way to a worker take, measured on this kind of machine."""


class Asked(NamedTuple):
    """A call as the real engine did it. Times are ns since the run began."""

    call: str
    prompt: int
    output: int
    cached: int
    worker: str
    sent_ns: int
    done_ns: int


class MockTimes(StepTimes):
    """The clock of a mock worker, so many times as ``fast``: a prefill by its new tokens, and a step of decoding by the
    share of blocks in use, of which each counts once however many calls share it.
    """

    cache: BlockCache
    fast: float

    @classmethod
    def of(cls, cache: BlockCache, fast: float) -> MockTimes:
        """The clock of the worker with this cache."""
        times = cls(fixed_s=0.0, prefill_s=0.0, decode_s=0.0, kv_s=0.0, call_s=CALL_S)
        times.cache, times.fast = cache, fast
        return times

    def step_ns(self, prefill: int, decoding: int, kv: int) -> int:
        """A step; who has its prompt gets its first token in the same one."""
        ms = 16.50142 + 1.518344e-2 * prefill + 4.209989e-7 * prefill**2 if prefill else 0.0
        return round(ms / 1000 / self.fast * SECOND) + self.steps_ns(1, decoding, kv)

    def steps_ns(self, steps: int, decoding: int, kv: int) -> int:
        """So many steps of decoding; each call takes a block more after as many steps as that has tokens."""
        capacity = self.cache.capacity or 1
        used, more = self.cache.in_use / capacity, decoding / self.cache.block / capacity
        ones, squares = steps * (steps - 1) / 2, (steps - 1) * steps * (2 * steps - 1) / 6
        share = steps * used + ones * more
        share_squared = steps * used**2 + 2 * ones * used * more + squares * more**2
        return round((5.74 * steps + 54.01 * share - 25.74 * share_squared) / 1000 / self.fast * SECOND)


def cluster_of(meta: Mapping[str, Any], tree: PromptTree, router: Router) -> Cluster:
    """The simulated cluster like the engine of a run. Only vLLM has a block that it never uses."""
    block, mock = meta["block"], meta["engine"] == "dynamo"
    caches = [BlockCache(tree, block=block, capacity=meta["blocks"] - (not mock)) for _ in range(meta["workers"])]
    clocks = [MockTimes.of(each, meta["speedup"]) if mock else StepTimes(fixed_s=0.003) for each in caches]
    engines = [
        Engine(cache, times=times, max_seqs=16, max_batched=4096) for cache, times in zip(caches, clocks, strict=True)
    ]
    return Cluster(tree, engines, router)


class Ties(Router):
    """Dynamo's router, which draws lots where workers cost the same; the lots fall as they ``really`` fell, by call,
    and are in ``lots``. Who asks says which call is ``coming``.
    """

    coming = ""

    def __init__(self, block: int, really: Mapping[str, int]) -> None:
        super().__init__("kv_aware", block=block)
        self.really = really
        self.lots: list[int] = []

    def choose(self, job: Job, views: Sequence[View], among: Sequence[int]) -> int:
        """The cheapest worker, of equals the one that was really chosen."""
        less = [view._replace(decode_blocks=view.decode_blocks - 1 / 1024) for view in views]
        chosen = [
            super(Ties, self).choose(job, [*views[:at], less[at], *views[at + 1 :]], among) for at in range(len(views))
        ]
        if len(set(chosen)) > 1:
            self.lots.append(self.really[self.coming])
        return chosen[self.really[self.coming]]


def as_it_fell(
    sessions: Iterable[list[Call]], asked: Sequence[Asked], meta: Mapping[str, Any]
) -> tuple[dict[str, int], int, list[int]]:
    """Cached tokens by call if the router's lots fall as they did; how many calls went to the same worker; the lots.
    Workers are numbered in the order of their names, which say nothing.
    """
    names = sorted({each.worker for each in asked})
    really = {each.call: names.index(each.worker) for each in asked}
    router = Ties(meta["block"], really)
    over = simulated(sessions, asked, meta, router)
    same = sum(int(over[call].worker or 0) == worker for call, worker in really.items())
    return {call: running.read for call, running in over.items()}, same, router.lots


def by_lot(sessions: Iterable[list[Call]], asked: Sequence[Asked], meta: Mapping[str, Any], seed: int) -> float:
    """The hit rate with lots of the simulator's own."""
    router = Router("kv_aware", block=meta["block"], seed=seed)
    over = simulated(sessions, asked, meta, router, seed)
    return sum(running.read for running in over.values()) / sum(each.prompt for each in asked)


def simulated(
    sessions: Iterable[list[Call]],
    asked: Sequence[Asked],
    meta: Mapping[str, Any],
    router: Router,
    seed: int = 0,
) -> dict[str, Running]:
    """What becomes of the calls in the simulated cluster, each asked as the real engine was. Calls that are sent late
    by lot are so by lots of the simulator's own.
    """
    tree, now_ns, rng = PromptTree(), 0, Random(seed)
    cluster = cluster_of(meta, tree, router)
    outputs = {each.call: each.output for each in asked}
    schedule = Schedule(sessions, at_once=meta["at_once"], gap_cap_ns=0, grow=in_tree(tree))
    most, late_ns = meta["at_once"] if meta["concurrent"] else 1, meta.get("late_ms", 0) * SECOND // 1000
    leaving: list[tuple[int, int, Planned[Node]]] = []
    running: dict[Running, Call] = {}
    over: dict[str, Running] = {}
    while len(over) < len(asked):
        while len(running) + len(leaving) < most and schedule.next_due(now_ns) is not None:
            planned = schedule.pop()
            schedule.started(planned.call, now_ns)
            sent_ns, count = now_ns + round(rng.random() * late_ns), len(over) + len(running) + len(leaving)
            heappush(leaving, (sent_ns, count, planned))
        now_ns = min(at for at in (cluster.next_ns(), leaving[0][0] if leaving else None) if at is not None)
        for event in cluster.advance(now_ns):
            if event.kind == DONE:
                call = running.pop(event.running)
                over[call.call] = event.running
                schedule.ended(call, now_ns)
        while leaving and leaving[0][0] <= now_ns:
            planned = heappop(leaving)[2]
            name = planned.call.call
            if isinstance(router, Ties):
                router.coming = name
            job = Job(planned.prompt, outputs[name], planned.answer if meta["live"] else ())
            running[cluster.submit(job, now_ns)] = planned.call
    return over
