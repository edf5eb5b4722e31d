"""Lease is a running call's hold on what a BlockCache keeps, Held what the cache keeps of one node of the tree."""

from __future__ import annotations

from dataclasses import dataclass

from keepwarm.replayers.tree import Node


class Held:
    """What is kept of a node: the prompt up to token ``upto``, all before its run included. ``level`` and ``last`` (the
    count of the release and its time) tell when it is evicted; ``kids`` are kept nodes that go on from it, ``pins``
    leases that end here, ``busy`` those and the kids that are busy.
    """

    __slots__ = ("above", "busy", "keep_ns", "kids", "last", "last_ns", "level", "node", "pins", "upto")

    def __init__(self, node: Node, above: Held | None, upto: int) -> None:
        self.node = node
        self.above = self if above is None else above
        self.upto = upto
        self.pins = self.busy = self.kids = self.last = self.last_ns = self.level = self.keep_ns = 0


@dataclass(slots=True, eq=False)
class Lease:
    """A running call's hold on its prefix, which is pinned at its end. It has blocks for ``room`` tokens; ``own`` are
    those that nobody finds: not full yet, or computed twice.
    """

    held: Held
    room: int
    own: int = 0
