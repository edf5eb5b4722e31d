"""MarkedCache is what a managed API keeps of prompts: what cache marks say, for as long as they say, without a limit.

Two kinds of rules. Under *runs* every token up to a mark is kept under that mark's TTL, and a prompt reads as far as
all of its tokens live: what logs of a managed API show. Under *entries* a mark keeps the whole prompt up to it as one
thing, found only from a mark at most so many positions further on: what the API's documentation says. A vendor's own
figures stand in ``rules``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from keepwarm.replayers.cache import NEVER
from keepwarm.replayers.job import Running
from keepwarm.replayers.rules import Rules
from keepwarm.replayers.times import SECOND
from keepwarm.replayers.tree import Node, PromptTree


@dataclass(slots=True, eq=False)
class _Kept:
    """What is kept of a node under runs, or of the prompt that ends at it under entries: for ``ttl_ns`` from its last
    use. Running calls that use it are counted; ``writer`` is the one that wrote it, while it runs.
    """

    ttl_ns: int
    writer: MarkedLease | None
    expires: int = NEVER
    users: int = 0


@dataclass(slots=True, eq=False)
class MarkedLease:
    """A running call: its marks as places in the tree, first to last, each with its TTL in ns, and what it reads. Under
    runs it uses all that is kept down to ``deepest``, under entries those of ``nodes``.
    """

    marks: list[tuple[Node, int]]
    deepest: Node
    nodes: list[Node] = field(default_factory=list)
    read: int = 0


class MarkedCache:
    """``ttl_ns`` goes over the marks' own TTLs. With ``refresh`` a read renews the TTL of what it read."""

    def __init__(self, tree: PromptTree, rules: Rules, *, ttl_ns: int | None = None, refresh: bool = True) -> None:
        self.tree = tree
        self.rules = rules
        self.ttl_ns = ttl_ns
        self.refresh = refresh
        self._slot = tree.join(self)
        self._all: deque[tuple[Node, _Kept]] = deque()

    def begin(self, running: Running, now_ns: int) -> MarkedLease:
        """A call arrives and is told what it reads; what it holds."""
        self._sweep(now_ns)
        job = running.job
        least, own = self.rules.least(job.model), self.ttl_ns
        told = [mark for mark in self.rules.marks(job.marks, job.prompt.end) if mark[0] >= least]
        places = [(self.tree.at(job.prompt, at), ttl_s * SECOND if own is None else own) for at, ttl_s in told]
        lease = MarkedLease(places, self.tree.root)
        if places and self.rules.entries:
            self._find_entry(lease, now_ns)
        elif places:
            self._find_run(lease, now_ns)
        if lease.read < least:
            lease.read = 0
        running.read = lease.read
        return lease

    def first_token(self, running: Running, lease: MarkedLease, now_ns: int) -> None:
        """The answer begins: what the marks say is readable from now on, and the call is told what it wrote."""
        unit, read = self.rules.unit, lease.read
        running.priced = self.rules.priced
        for mark, ttl_ns in lease.marks:
            node = mark if mark.linked else self.tree.extend(mark, ())
            for part in [node] if self.rules.entries else _below(lease.deepest, node):
                if not self._alive(part, now_ns):
                    kept = part.held[self._slot] = _Kept(ttl_ns, lease)
                    self._all.append((part, kept))
                self._use(lease, part)
            upto = node.end // unit * unit
            if upto > read:
                ttl = None if ttl_ns >= NEVER else round(ttl_ns / SECOND)
                running.writes[ttl] = running.writes.get(ttl, 0) + upto - read
                read = upto

    def end(self, running: Running, lease: MarkedLease, now_ns: int) -> None:
        """It is over: the TTLs of all it used run from now."""
        node, used = lease.deepest, lease.nodes
        while node is not self.tree.root:
            used.append(node)
            node = node.parent
        for node in used:
            kept: _Kept = node.held[self._slot]
            kept.users -= 1
            if self.refresh or kept.writer is lease:
                kept.expires, kept.writer = now_ns + kept.ttl_ns, None
        lease.deepest, lease.nodes = self.tree.root, []

    def clear(self, top: Node | None = None) -> None:
        """Forget all that no running call uses, or what of it is a node or below one. They stay in the tree until they
        are swept: whoever found that they have expired may be on its way through them.
        """
        nodes = [top or self.tree.root]
        for node in nodes:
            nodes += node.children.values()
            kept = node.held[self._slot]
            if kept is not None and not kept.users:
                node.held[self._slot] = None

    def split(self, upper: Node, lower: Node) -> None:
        """A node was cut in two: both halves are kept under runs, the end alone under entries."""
        kept: _Kept = lower.held[self._slot]
        if not self.rules.entries:
            above = upper.held[self._slot] = replace(kept)
            self._all.append((upper, above))

    def _alive(self, node: Node, now_ns: int) -> bool:
        """Whether a node is kept; what has expired is forgotten, and under runs all that goes on from it."""
        kept: _Kept | None = node.held[self._slot]
        if kept is None:
            return False
        if kept.users or kept.expires > now_ns:
            return True
        if self.rules.entries:
            node.held[self._slot] = None
        else:
            self.clear(node)
        return False

    def _find_run(self, lease: MarkedLease, now_ns: int) -> None:
        """Use what is kept of a prompt without a gap."""
        for node in _below(lease.deepest, lease.marks[-1][0]):
            if not self._alive(node, now_ns):
                break
            self._use(lease, node)
        lease.read = lease.deepest.end // self.rules.unit * self.rules.unit

    def _find_entry(self, lease: MarkedLease, now_ns: int) -> None:
        """Use the longest entry that a mark's look back finds, and those at the marks themselves."""
        for mark, _ in reversed(lease.marks):
            if not lease.read:
                self._look_back(lease, mark, now_ns)
            elif self._alive(mark, now_ns):
                self._use(lease, mark)

    def _look_back(self, lease: MarkedLease, node: Node, now_ns: int) -> None:
        passed, last = 1, ""
        while node is not self.tree.root and passed <= self.rules.look_back:
            if self._alive(node, now_ns):
                self._use(lease, node)
                lease.read = node.end // self.rules.unit * self.rules.unit
                return
            for kind in reversed(node.kinds[1:] if node.offset else node.kinds):  # a piece that goes on is one
                passed += not (kind == last == "tool_result")
                last = kind
            node = node.parent

    def _use(self, lease: MarkedLease, node: Node) -> None:
        node.held[self._slot].users += 1
        if self.rules.entries:
            lease.nodes.append(node)
        else:
            lease.deepest = node

    def _sweep(self, now_ns: int) -> None:
        """Look at two kept things a call, so that what nobody asks for again is forgotten in the end."""
        for _ in range(min(2, len(self._all))):
            node, kept = self._all.popleft()
            if node.held[self._slot] is kept and self._alive(node, now_ns):
                self._all.append((node, kept))
            else:
                self.tree.prune(node)


def _below(top: Node, node: Node) -> list[Node]:
    """A node and those above it, as far as they go on from ``top``, downwards."""
    path = []
    while node.end > top.end:
        path.append(node)
        node = node.parent
    return path[::-1]
