"""Job is what is asked of the simulated cluster, Running what has become of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.tree import Node
from keepwarm.traces.model import Breakpoint, Hints

SECOND = 1_000_000_000


class Job(NamedTuple):
    """``prompt`` is a place in the cluster's tree, ``output`` how many tokens to answer with, at least 1. ``answer``
    are the pieces in which a later prompt will repeat the answer: what decoding leaves in the cache. ``took`` are the
    ns to its first token and to its end, where a worker that takes calls alone is not to say that.
    """

    prompt: Node
    output: int
    answer: tuple[Piece, ...] = ()
    marks: tuple[Breakpoint, ...] = ()
    hints: Hints | None = None
    flow: str | None = None
    session: str | None = None
    model: str | None = None
    took: tuple[int, int] | None = None

    def keep_ns(self) -> int:
        """How long its hints want kept what it leaves in a cache."""
        return (self.hints.ttl_s or 0) * SECOND if self.hints is not None else 0


@dataclass(slots=True, eq=False)
class Running:
    """A job taken on. ``read`` are its cached tokens, ``loaded`` those of them that came from another tier or worker,
    ``overlap`` what its worker had when it arrived; ``writes`` are tokens newly cached, by their TTL in seconds (None:
    no TTL), which its account does not tell where they are not ``priced``; ``bounds`` what other caches would have had.
    What has not happened yet is None. A job that cannot run is done at once, with an ``error``; nobody is told of a
    ``silent`` one. ``state`` belongs to the worker that runs it, the rest to the cluster: ``where`` it runs, what other
    caches have ``seen`` of it, and the ``inner`` job that computes its prompt apart meanwhile, to which it is the
    ``outer``.
    """

    job: Job
    arrived_ns: int
    silent: bool = False
    worker: str | None = None
    scheduled_ns: int | None = None
    first_token_ns: int | None = None
    done_ns: int | None = None
    error: str | None = None
    read: int = 0
    loaded: int = 0
    overlap: int = 0
    writes: dict[int | None, int] = field(default_factory=dict)
    priced: bool = True
    state: Any = None
    bounds: dict[str, int] = field(default_factory=dict)
    where: Any = None
    seen: tuple[Any, ...] = ()
    inner: Running | None = None
    outer: Running | None = None

    def wrote(self, block: int, ttl_ns: int | None) -> None:
        """Its prompt is computed: the full blocks that it did not read are newly cached."""
        tokens = self.job.prompt.end // block * block - self.read
        if tokens > 0:
            self.writes = {None if ttl_ns is None else round(ttl_ns / SECOND): tokens}


class Event(NamedTuple):
    """Something that happened: ``kind`` is ``first_token`` or ``done``."""

    at_ns: int
    kind: str
    running: Running


FIRST_TOKEN, DONE = "first_token", "done"
CANCELLED, OVERFLOW = "cancelled", "overflow"


def account(running: Running) -> dict[str, Any]:
    """The token account of a job whose first token is out, in the columns of an outcome; parts are disjoint and add up
    to the prompt. Writes with the TTLs that the managed APIs sell stand under their names, all others under
    ``cache_write_other``; where they have no price they are not told, and are part of what is uncached.
    """
    ttls = [ttl for ttl, tokens in running.writes.items() if tokens and ttl is not None]
    writes = dict(running.writes) if running.priced else {}
    prompt, told = running.job.prompt.end, running.priced
    return {
        "prompt": prompt,
        "uncached": prompt - running.read - sum(writes.values()),
        "cache_read": running.read,
        "cache_write_5m": writes.pop(300, 0) if told else None,
        "cache_write_1h": writes.pop(3600, 0) if told else None,
        "cache_write_other": sum(writes.values()) if told else None,
        "write_ttl_s": max(ttls) if ttls else None,
        "output": running.job.output,
        "usage_source": "reported",
        "write_source": "reported" if told else "inferred",
    }
