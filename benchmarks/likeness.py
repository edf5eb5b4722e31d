"""The simulated cluster made like a real engine, and asked as that was.

vLLM's clock hardly matters with its one worker; that of Dynamo's mock workers is in their
sources and their log, and is kept to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any, NamedTuple

from keepwarm.replayers.arrivals import Arrival
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.job import DONE, Job, Running
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.prompts import SessionPrompts, in_tree
from keepwarm.replayers.router import Router, View
from keepwarm.replayers.times import SECOND, StepTimes
from keepwarm.replayers.tree import Node, PromptTree
from keepwarm.traces.model import Call

CALL_S, ASK_S, HEAR_S = 0.0008, 0.0034, 0.003
"""What passes from a router's choice to its worker, before it from a client's sending to the choice, and from a
worker's end until the client has the answer: means of 1,064 calls in real runs, by the log of Dynamo and the client.
That a worker's step is over the router heard 0.4 ms later in the median (6,035 events; 2.2 ms in 95 % of them): here
at once.
"""


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
    """The clock of a mock worker with room for so many tokens, so many times as ``fast``: a prefill by its new tokens,
    and a step of decoding by the tokens of all calls that decode, shared ones counted for each, as a share of the room.
    """

    room: int
    fast: float

    @classmethod
    def of(cls, room: int, fast: float) -> MockTimes:
        """The clock of one worker."""
        times = cls(fixed_s=0.0, prefill_s=0.0, decode_s=0.0, kv_s=0.0, call_s=CALL_S)
        times.room, times.fast = room, fast
        return times

    def step_ns(self, prefill: int, decoding: int, kv: int) -> int:
        """A step; a call's first token comes with its prompt and takes no more."""
        ms = 16.50142 + 1.518344e-2 * prefill + 4.209989e-7 * prefill**2 if prefill else 0.0
        return round(ms / 1000 / self.fast * SECOND) + self.steps_ns(1 if decoding else 0, decoding, kv)

    def steps_ns(self, steps: int, decoding: int, kv: int) -> int:
        """So many steps of decoding, of which each adds a token for each call; a share above the whole is the whole."""
        part = min(steps, max(-((kv - self.room) // max(decoding, 1)), 0))
        used, more = kv / self.room, decoding / self.room
        ones, squares = part * (part - 1) / 2, (part - 1) * part * (2 * part - 1) / 6
        share = part * used + ones * more + steps - part
        share_squared = part * used**2 + 2 * ones * used * more + squares * more**2 + steps - part
        return round((5.74 * steps + 54.01 * share - 25.74 * share_squared) / 1000 / self.fast * SECOND)


def cluster_of(meta: Mapping[str, Any], tree: PromptTree, router: Router) -> Cluster:
    """The simulated cluster like the engine of a run. Only vLLM has a block that it never uses."""
    block, mock = meta["block"], meta["engine"] == "dynamo"
    caches = [BlockCache(tree, block=block, capacity=meta["blocks"] - (not mock)) for _ in range(meta["workers"])]
    clock = MockTimes.of(block * meta["blocks"], meta["speedup"]) if mock else StepTimes(fixed_s=0.003)
    return Cluster(tree, [Engine(each, times=clock, max_seqs=16, max_batched=4096) for each in caches], router)


class Told(Router):
    """Dynamo's router, told where each call ``really`` went: where workers cost the same, or, ``pinned``, always it
    chooses that one. ``lots`` are the workers chosen among equals, ``apart`` the calls that really went to a dearer
    one. Who asks says which call is ``coming``.
    """

    coming = ""

    def __init__(self, block: int, asked: Iterable[Asked], *, pinned: bool = False) -> None:
        super().__init__("kv_aware", block=block)
        self.really = places(asked)
        self.pinned = pinned
        self.lots: list[int] = []
        self.apart: list[str] = []

    def choose(self, job: Job, views: Sequence[View], among: Sequence[int]) -> int:
        """The worker that a call really went to, or the cheapest one."""
        really, cheapest = self.really[self.coming], []
        for at, view in enumerate(views):
            favoured = view._replace(decode_blocks=view.decode_blocks - 1 / 1024)  # type: ignore[arg-type]
            less = [*views[:at], favoured, *views[at + 1 :]]
            if super().choose(job, less, among) == at:
                cheapest.append(at)
        if really not in cheapest:
            self.apart.append(self.coming)
        elif len(cheapest) > 1:
            self.lots.append(really)
        return really if self.pinned or really in cheapest else cheapest[0]


def places(asked: Iterable[Asked]) -> dict[str, int]:
    """The worker of each call. Workers are numbered in the order of their names, which say nothing."""
    worker = {each.call: each.worker for each in asked}
    names = sorted(set(worker.values()))
    return {call: names.index(name) for call, name in worker.items()}


class Fell(NamedTuple):
    """A run asked again of the simulated cluster: cached tokens by call, and what the router that was told it saw."""

    cached: dict[str, int]
    moved: list[str]
    router: Told

    def off(self, asked: Iterable[Asked]) -> float:
        """By how much the hit rate is above that of the run."""
        return (sum(self.cached.values()) - sum(each.cached for each in asked)) / sum(each.prompt for each in asked)

    def equal(self, asked: Iterable[Asked]) -> int:
        """Calls with as many cached tokens as in the run."""
        return sum(self.cached[each.call] == each.cached for each in asked)


def fell(over: Mapping[str, Running], router: Told) -> Fell:
    """What became of the calls; ``moved`` are those on another worker than really."""
    moved = [call for call, running in over.items() if int(running.worker or 0) != router.really[call]]
    return Fell({call: running.read for call, running in over.items()}, moved, router)


def as_it_fell(sessions: Iterable[list[Call]], asked: Sequence[Asked], meta: Mapping[str, Any]) -> Fell:
    """A run whose lots fall as they did; all else is the simulator's."""
    router = Told(meta["block"], asked)
    return fell(simulated(sessions, asked, meta, router), router)


def as_sent(sessions: Iterable[list[Call]], asked: Sequence[Asked], meta: Mapping[str, Any]) -> Fell:
    """A run whose calls come when and go where they really did; what is cached, and what the router would have chosen,
    is the simulator's.
    """
    tree, router = PromptTree(), Told(meta["block"], asked, pinned=True)
    cluster, over = cluster_of(meta, tree, router), {}
    calls: dict[str, tuple[Node, tuple[Piece, ...]]] = {}
    for session in sessions:
        prompts = SessionPrompts(session, in_tree(tree))
        calls.update((call.call, (prompts.prompt(call), prompts.answer(call))) for call in session)
    for each in sorted(asked, key=lambda each: each.sent_ns):
        now_ns = each.sent_ns + round(ASK_S * SECOND)
        cluster.advance(now_ns)
        prompt, answer = calls[each.call]
        router.coming = each.call
        over[each.call] = cluster.submit(Job(prompt, each.output, answer if meta["live"] else ()), now_ns)
    while (next_ns := cluster.next_ns()) is not None:
        cluster.advance(next_ns)
    return fell(over, router)


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
    schedule = Schedule(map(Arrival, sessions), at_once=meta["at_once"], gap_cap_ns=0, grow=in_tree(tree))
    most, late_ns = meta["at_once"] if meta["concurrent"] else 1, meta.get("late_ms", 0) * SECOND // 1000
    way_ns = round((HEAR_S + ASK_S) * SECOND) if meta["engine"] == "dynamo" else 0
    leaving: list[tuple[int, int, Planned[Node]]] = []
    running: dict[Running, Planned[Node]] = {}
    over: dict[str, Running] = {}
    while len(over) < len(asked):
        while len(running) + len(leaving) < most and schedule.next_due(now_ns) is not None:
            planned = schedule.pop()
            schedule.started(planned, now_ns)
            sent_ns, count = now_ns + way_ns + round(rng.random() * late_ns), len(over) + len(running) + len(leaving)
            heappush(leaving, (sent_ns, count, planned))
        now_ns = min(at for at in (cluster.next_ns(), leaving[0][0] if leaving else None) if at is not None)
        for event in cluster.advance(now_ns):
            if event.kind == DONE:
                planned = running.pop(event.running)
                over[planned.call.call] = event.running
                schedule.ended(planned, now_ns)
        while leaving and leaving[0][0] <= now_ns:
            planned = heappop(leaving)[2]
            name = planned.call.call
            if isinstance(router, Told):
                router.coming = name
            job = Job(planned.prompt, outputs[name], planned.answer if meta["live"] else ())
            running[cluster.submit(job, now_ns)] = planned
    return over
