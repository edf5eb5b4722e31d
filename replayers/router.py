"""Router says which of several workers a call goes to.

The kv-aware ways are Dynamo's, in blocks. *Classic*, up to 1.0: weight x (prompt and prefill under way - what is
cached) + active decode blocks. *Current*, as the router of 1.6.1 logs it: prefill_load_scale x (prefill under way + the
prompt - credit for cached blocks, at least 0) + active decode blocks + the prompt's full blocks that no running call
there holds. The lowest cost wins, ties at random; with a temperature above 0 workers are drawn by softmax of the costs,
scaled to lie between 0 and 1.
"""

from collections.abc import Callable, Sequence
from math import exp
from random import Random
from typing import NamedTuple

from keepwarm.replayers.job import Job


class View(NamedTuple):
    """What the router knows of a worker: prompt tokens that it has yet to compute, blocks of calls that run there; of
    the call's tokens, those that it had cached when its last step was over, those that running calls hold, and those in
    its host tier.
    """

    prefill_tokens: int
    decode_blocks: int
    cached: int
    active: int = 0
    host: int = 0


class Weights(NamedTuple):
    """``overlap`` is the credit of a cached block (or the weight of a computed one, classic), ``host`` that of one in
    the host tier, ``prefill`` the scale of the prefill load.
    """

    overlap: float = 1.0
    host: float = 0.75
    prefill: float = 1.0
    temperature: float = 0.0


Cost = Callable[[View, int, int, Weights], float]


def classic(view: View, tokens: int, block: int, weights: Weights) -> float:
    """Dynamo's cost up to 1.0."""
    prefill = (tokens + view.prefill_tokens - view.cached) / block
    return weights.overlap * prefill + view.decode_blocks


def current(view: View, tokens: int, block: int, weights: Weights) -> float:
    """Dynamo's cost since."""
    credit = (weights.overlap * view.cached + weights.host * max(view.host - view.cached, 0)) / block
    prefill = max((view.prefill_tokens + tokens) / block - credit, 0.0)
    return weights.prefill * prefill + view.decode_blocks + tokens // block - view.active // block


COSTS: dict[str, Cost] = {"kv_aware": current, "kv_classic": classic}
ROUTERS = ("round_robin", "random", "least_loaded", "sticky", *COSTS)


class Router:
    """Chooses by one of ROUTERS. ``sticky`` sends a session where it went first, a new one to the least loaded."""

    def __init__(self, name: str, *, block: int, weights: Weights | None = None, seed: int = 0) -> None:
        if name not in ROUTERS:
            raise ValueError(f"no router is called {name!r}")
        self.name = name
        self.needs_views = name not in ("round_robin", "random")
        self.block = block
        self._weights = weights or Weights()
        self._rng = Random(seed)
        self._next = 0
        self._homes: dict[str, int] = {}

    def choose(self, job: Job, views: Sequence[View], among: Sequence[int]) -> int:
        """The worker for a call, one of ``among``; ``views`` are of all workers, and unused where not needed."""
        if self.name == "round_robin":
            self._next += 1
            return among[(self._next - 1) % len(among)]
        if self.name == "random":
            return self._rng.choice(among)
        if self.name == "sticky" and job.session is not None:
            if self._homes.get(job.session) not in among:
                self._homes[job.session] = self._least(views, among)
            return self._homes[job.session]
        if self.name in COSTS:
            return self._cheapest(job, views, among)
        return self._least(views, among)

    def _least(self, views: Sequence[View], among: Sequence[int]) -> int:
        return min(among, key=lambda i: (views[i].decode_blocks + views[i].prefill_tokens // self.block, i))

    def _cheapest(self, job: Job, views: Sequence[View], among: Sequence[int]) -> int:
        cost, weights = COSTS[self.name], self._weights
        costs = [cost(views[i], job.prompt.end, self.block, weights) for i in among]
        low, high = min(costs), max(costs)
        if weights.temperature and high > low:
            chances = [exp(-(each - low) / (high - low) / weights.temperature) for each in costs]
            return self._rng.choices(among, chances)[0]
        return self._rng.choice([i for i, each in zip(among, costs, strict=True) if each == low])
