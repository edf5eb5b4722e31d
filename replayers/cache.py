"""PrefixCache is a run-length radix tree of cached prompt prefixes: block-granular, exact LRU, TTL, capacity.

A node is a run of tokens of one segment that share their last use. Prompts with the same pieces share nodes; where a
prompt leaves a run in its middle, the run is split. Blocks are counted as an engine that hashes full blocks in a chain
counts them: a node owns the blocks that end inside it, so a block over a fork belongs to each branch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from keepwarm.replayers.endpoint import Piece

NEVER = 1 << 60
"""A time that does not come, ns: 36 years."""


class Write(NamedTuple):
    """The prompt's tokens up to ``upto`` are to be cached for ``ttl_ns``, past those that an earlier Write covers."""

    upto: int
    ttl_ns: int = NEVER


class _Node:
    __slots__ = ("children", "expires", "key", "length", "parent", "refs", "start", "ttl_ns", "writer")

    def __init__(self, parent: _Node | None, key: tuple[int, int], start: int, length: int, ttl_ns: int) -> None:
        self.parent = parent if parent is not None else self
        self.key = key
        self.start = start
        self.length = length
        self.ttl_ns = ttl_ns
        self.expires = NEVER
        self.refs = 0
        self.writer: Lease | None = None
        self.children: dict[tuple[int, int], _Node] = {}


class Lease:
    """A running call's hold on the nodes it uses, neither evicted nor expired until it is released: down to ``node``,
    which ends at ``tokens`` of the prompt, in the piece ``index`` at ``offset``.
    """

    __slots__ = ("index", "node", "offset", "tokens")

    def __init__(self, node: _Node) -> None:
        self.node = node
        self.index = self.offset = self.tokens = 0


class PrefixCache:
    """What one worker remembers of prompts. Times are ns and passed in; they must not run back.

    ``capacity`` is in blocks, None for endless. With ``refresh`` a read renews the TTL of what it read.
    """

    def __init__(self, *, block: int = 1, capacity: int | None = None, refresh: bool = True) -> None:
        if block < 1 or (capacity is not None and capacity < 0):
            raise ValueError("block must be at least 1 token and capacity at least 0 blocks")
        self.block = block
        self.capacity = capacity
        self.refresh = refresh
        self.blocks = 0
        self.evicted = 0
        self._root = _Node(None, (0, 0), 0, 0, NEVER)
        self._root.refs = 1
        self._idle: OrderedDict[_Node, None] = OrderedDict()

    def acquire(self, prompt: Sequence[Piece], now_ns: int) -> Lease:
        """Hold what is cached of a prompt: its first ``tokens`` tokens, not yet cut to whole blocks."""
        lease = Lease(self._root)
        self._walk(lease, prompt, now_ns)
        return lease

    def store(self, lease: Lease, prompt: Sequence[Piece], writes: Sequence[Write], now_ns: int) -> None:
        """Cache a prompt as the writes say and extend the lease over it. Where running calls hold all of a full cache,
        the prompt's rest stays uncached.
        """
        self._walk(lease, prompt, now_ns)
        for write in sorted(writes):
            while lease.tokens < write.upto and lease.index < len(prompt):
                part = prompt[lease.index]
                wanted = min(part.tokens - lease.offset, write.upto - lease.tokens)
                fits = self._room(lease.tokens, wanted)
                if fits:
                    self._grow(lease, part, fits, write.ttl_ns)
                if fits < wanted:
                    return

    def release(self, lease: Lease, now_ns: int) -> None:
        """End a call's hold: now is the last use of all that it held, its tail to be evicted first. Each token lives on
        for the TTL that it was written with; without refresh, from the end of the call that wrote it.
        """
        node = lease.node
        while node is not self._root:
            node.refs -= 1
            if self.refresh or node.writer is lease:
                node.expires, node.writer = now_ns + node.ttl_ns, None
            if not node.refs:
                self._idle[node] = None
            node = node.parent
        lease.node = self._root

    def _walk(self, lease: Lease, prompt: Sequence[Piece], now_ns: int) -> None:
        """Take a lease as far down its prompt as what is cached and alive reaches, and hold it. Only blocks expire: the
        tokens of a block that ends in another node live as long as that one.
        """
        node, index, offset, tokens = lease.node, lease.index, lease.offset, lease.tokens
        while index < len(prompt):
            part = prompt[index]
            child = node.children.get((part.ident, offset))
            if child is None:
                break
            left = part.tokens - offset
            if child.expires <= now_ns and not child.refs and self._owned(tokens, min(child.length, left)):
                self._drop(child)
                break
            if child.length > left:
                child = self._split(child, left)
            if not child.refs:
                del self._idle[child]
            child.refs += 1
            node, tokens = child, tokens + child.length
            index, offset = (index + 1, 0) if child.length == left else (index, offset + child.length)
        lease.node, lease.index, lease.offset, lease.tokens = node, index, offset, tokens

    def _owned(self, start: int, length: int) -> int:
        return (start + length) // self.block - start // self.block

    def _split(self, node: _Node, length: int) -> _Node:
        """Cut a node in two and return the upper half; whoever holds the node object holds its lower half."""
        upper = _Node(node.parent, node.key, node.start, length, node.ttl_ns)
        upper.expires, upper.refs, upper.writer = node.expires, node.refs, node.writer
        node.parent.children[node.key] = upper
        node.key = (node.key[0], node.key[1] + length)
        node.start += length
        node.length -= length
        node.parent = upper
        upper.children[node.key] = node
        if not node.refs:
            self._idle[upper] = None  # its place does not matter: whoever splits a run holds its upper half at once
        return upper

    def _grow(self, lease: Lease, part: Piece, tokens: int, ttl_ns: int) -> None:
        """Add a node for the next tokens of a piece under a lease, and hold it."""
        key = (part.ident, lease.offset)
        node = _Node(lease.node, key, lease.tokens, tokens, ttl_ns)
        node.refs, node.writer = 1, lease
        lease.node.children[key] = lease.node = node
        self.blocks += self._owned(lease.tokens, tokens)
        lease.tokens += tokens
        lease.offset += tokens
        if lease.offset == part.tokens:
            lease.index, lease.offset = lease.index + 1, 0

    def _room(self, start: int, length: int) -> int:
        """How many of ``length`` tokens from ``start`` there is room for, after evicting what may be evicted."""
        if self.capacity is None:
            return length
        need = self.blocks + self._owned(start, length) - self.capacity
        while need > 0 and self._idle:
            need -= self._evict(next(iter(self._idle)), need)
        if need <= 0:
            return length
        return max(0, ((start + length) // self.block - need) * self.block + self.block - 1 - start)

    def _evict(self, leaf: _Node, need: int) -> int:
        """Take up to ``need`` blocks from the tail of the least recently used leaf; how many it gave."""
        owned = self._owned(leaf.start, leaf.length)
        if owned <= need:
            self._drop(leaf)
            self.evicted += owned
            return owned
        end = ((leaf.start + leaf.length) // self.block - need) * self.block
        leaf.length = end - leaf.start
        self.blocks -= need
        self.evicted += need
        return need

    def _drop(self, node: _Node) -> None:
        """Forget a node and all below it; nothing of it is in use."""
        del node.parent.children[node.key]
        stack = [node]
        while stack:
            gone = stack.pop()
            self.blocks -= self._owned(gone.start, gone.length)
            self._idle.pop(gone, None)
            stack.extend(gone.children.values())
