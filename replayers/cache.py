"""BlockCache is what one engine keeps of prompts: full blocks in a chain of hashes, least recently used out first.

The rules are vLLM's: a block is found by all tokens up to its end; what a running call uses is not evicted; when a call
ends its blocks become evictable tail first, but for one that is not full, which is free at once; a block that nobody
will ask for (a generated one, or one computed twice) takes room until its turn to be evicted comes. A node of the tree
owns the blocks that end inside its run, so a block over a fork belongs to each branch.

Only the end of what a call used is marked at its end: its prefix was used no earlier, and is idle when the last thing
that goes on from it is evicted. So a call costs what is new in its prompt.
"""

from heapq import heappop, heappush

from keepwarm.replayers.lease import Held, Lease
from keepwarm.replayers.tree import Node, PromptTree

NEVER = 1 << 60
"""A time that does not come, ns: 36 years."""
_PINNED = 1 << 40  # a level above all others


class BlockCache:
    """``capacity`` is in blocks, None for endless. ``ttl_ns`` after its last use a prefix is gone, whatever room there
    is; None for no such rule. Times are ns, passed in, and must not run back.
    """

    def __init__(self, tree: PromptTree, *, block: int, capacity: int | None = None, ttl_ns: int | None = None) -> None:
        if block < 1 or (capacity is not None and capacity < 0):
            raise ValueError("block must be at least 1 token and capacity at least 0 blocks")
        self.block = block
        self.capacity = capacity
        self.ttl_ns = None if ttl_ns is None or ttl_ns >= NEVER else ttl_ns
        self.blocks = 0
        """All that takes room: in the tree, running calls' own and, where there is a capacity, what nobody finds."""
        self.counts_use = False
        self.in_use = 0
        """Those of them that running calls hold, each once; only where ``counts_use``, from before the first call."""
        self.tree = tree
        self._slot = tree.join(self)
        self._root = tree.root.held[self._slot] = Held(tree.root, None, 0)
        self._root.pins = self._root.busy = 1
        self._count = 0
        self._idle: list[tuple[int, int, int, Held]] = []
        self._aging: list[tuple[int, int, Held]] = []
        self._kept: list[tuple[int, int, Held]] = []
        self._waste: list[tuple[int, int]] = []

    def match(self, node: Node) -> int:
        """How many of a prompt's tokens a call with it would read: full blocks, and never the last token."""
        return min(self._find(node).upto, max(node.end - 1, 0)) // self.block * self.block

    def kept(self, node: Node) -> tuple[int, int]:
        """How many of a prompt's tokens are in full blocks here, and in those that running calls hold."""
        held = self._find(node)
        kept = held.upto
        while not held.busy:
            held = held.above
        return kept // self.block * self.block, held.upto // self.block * self.block

    def acquire(self, node: Node, now_ns: int) -> Lease:
        """Hold what is kept of a prompt; the lease's ``room`` are the tokens that are read."""
        self.expire(now_ns)
        if not node.linked:
            node = self.tree.extend(node, ())
        held = self._find(node)
        room = min(held.upto, max(node.end - 1, 0)) // self.block * self.block
        if held.upto - room >= self.block:  # the last block is computed again, so it may be evicted for it
            held = self._find(self.tree.at(node, node.end - 1))
        self._pin(held)
        return Lease(held, room)

    def grow(self, lease: Lease, node: Node, upto: int) -> bool:
        """A call computes its prompt ``node`` up to a token: that is found from now on. False, and nothing is changed,
        where running calls leave no room for it.
        """
        if not self.spend(lease, upto):
            return False
        self.keep(lease, node)
        return True

    def keep(self, lease: Lease, node: Node) -> None:
        """What a call has room for of its prompt, or of that and its answer, is found from now on; it holds the end."""
        slot, block, upto = self._slot, self.block, lease.room
        path: list[Node] = []
        if not node.linked:
            node = self.tree.extend(node, ())
        while node.held[slot] is None:
            path.append(node)
            node = node.parent
        held: Held = node.held[slot]
        new = 0
        while True:
            end = min(upto, held.node.end)
            if end > held.upto:
                grown = end // block - held.upto // block
                new += grown
                self.in_use += grown if held.busy else 0
                held.upto = end
            if not path or held.upto >= upto:
                break
            node = path.pop()
            held.kids += 1
            held = node.held[slot] = Held(node, held, held.upto)
        if held is not lease.held:
            twice = lease.own - (1 if upto % block else 0)
            is_nobodys = twice and not new and not held.pins and not held.busy and self.capacity is not None
            if is_nobodys and twice <= self._owned(held):
                heappush(self._waste, (held.last, twice))  # the old copies of blocks computed again
                lease.own -= twice
                self.in_use -= twice
            self._pin(held)
            self._unpin(lease.held)
            lease.held = held
        lease.own -= new
        self.in_use -= new

    def spend(self, lease: Lease, upto: int) -> bool:
        """A running call's tokens need room that is its own; False, and nothing is changed, where there is none."""
        if not self.draw(-(upto // -self.block) - -(lease.room // -self.block)):
            return False
        self.settle(lease, upto)
        return True

    def draw(self, blocks: int) -> bool:
        """Running calls need so many blocks more, whose each is told by ``settle``; False where there is no room."""
        need = 0 if self.capacity is None else self.blocks + blocks - self.capacity
        if need > 0 and ((self.counts_use and need > self.blocks - self.in_use) or self._evict(need) < need):
            return False
        self.blocks += blocks
        self.in_use += blocks
        return True

    def settle(self, lease: Lease, upto: int) -> None:
        """A call's tokens up to there are in blocks that were drawn before."""
        lease.own += -(upto // -self.block) - -(lease.room // -self.block)
        lease.room = upto

    def remember(self, node: Node, upto: int, now_ns: int) -> None:
        """Take in a prompt up to a token at once, as far as there is room, without a call that holds it."""
        lease = self.acquire(node, now_ns)
        self.grow_most(lease, node, upto)
        self.release(lease, now_ns)

    def grow_most(self, lease: Lease, node: Node, upto: int) -> None:
        """Compute a prompt up to a token, or what of it there is room for in full blocks."""
        if upto > lease.room and not self.grow(lease, node, upto):
            assert self.capacity is not None
            room = (lease.room // self.block + self.capacity - self.blocks) * self.block
            if room > lease.room:
                self.grow(lease, node, min(upto, room))

    def give_up(self, lease: Lease) -> None:
        """End the hold of a call that did not run: it was no use."""
        self._unpin(lease.held)

    def release(self, lease: Lease, now_ns: int, *, level: int = 0, keep_ns: int = 0) -> None:
        """End a call's hold: now is the last use of all that it held. What has a higher ``level`` is evicted later;
        for ``keep_ns`` it is evicted only when nothing else can be.
        """
        held = lease.held
        self._count += 1
        held.last, held.last_ns = self._count, now_ns
        held.level = max(held.level, level)
        if keep_ns and held is not self._root:
            held.level |= _PINNED
            held.keep_ns = max(held.keep_ns, now_ns + keep_ns)
            heappush(self._kept, (held.keep_ns, self._count, held))
        part = lease.own if self.capacity is None else 1 if lease.room % self.block else 0
        self.blocks -= part
        self.in_use -= lease.own
        if lease.own > part:
            heappush(self._waste, (self._count, lease.own - part))
        self._unpin(held)

    def expire(self, now_ns: int) -> None:
        """Forget what has outlived its TTL, and what is no longer to be kept."""
        while self._kept and self._kept[0][0] <= now_ns:
            _, _, held = heappop(self._kept)
            if held.keep_ns <= now_ns:
                held.level &= ~_PINNED
                self._rest(held)
        while self.ttl_ns is not None and self._aging:
            last, _, held = self._aging[0]
            if held.last == last and held.last_ns + self.ttl_ns > now_ns:
                break
            heappop(self._aging)
            if held.last == last:
                self._forget(held)

    def clear(self) -> None:
        """Forget all that no running call holds."""
        nodes = [self.tree.root]
        for node in nodes:
            nodes += [child for child in node.children.values() if child.held[self._slot] is not None]
        for node in reversed(nodes[1:]):
            self._forget(node.held[self._slot])
        self.blocks -= sum(blocks for _, blocks in self._waste)
        self._waste.clear()

    def _forget(self, held: Held) -> None:
        if self._is_idle(held):
            self.blocks -= self._owned(held)
            self._rest(self._drop(held))

    def split(self, upper: Node, lower: Node) -> None:
        """A node was cut in two; leases go on holding what they hold."""
        held: Held = lower.held[self._slot]
        if held.upto <= upper.end:
            lower.held[self._slot] = None
            upper.held[self._slot] = held
            held.node = upper
            return
        above = upper.held[self._slot] = Held(upper, held.above, upper.end)
        above.kids, above.busy, above.level = 1, 1 if held.busy else 0, held.level
        above.last, above.last_ns = held.last, held.last_ns
        held.above = above

    def _find(self, node: Node) -> Held:
        slot = self._slot
        while (held := node.held[slot]) is None:
            node = node.parent
        found: Held = held
        return found

    def _owned(self, held: Held) -> int:
        return held.upto // self.block - held.node.start // self.block

    def _pin(self, held: Held) -> None:
        held.pins += 1
        if not self.counts_use:
            return
        free = held
        while not free.busy:
            free.busy = 1
            free = free.above
        free.busy += 1
        if free is not held:
            self.in_use += held.upto // self.block - free.upto // self.block

    def _unpin(self, held: Held) -> None:
        held.pins -= 1
        if self.counts_use:
            held.busy -= 1
            free = held
            while not free.busy:
                free = free.above
                free.busy -= 1
            if free is not held:
                self.in_use -= held.upto // self.block - free.upto // self.block
        self._rest(held)

    def _is_idle(self, held: Held) -> bool:
        return not held.pins and not held.kids and held.node.held[self._slot] is held

    def _rest(self, held: Held) -> None:
        """Line up what is used no more."""
        if held.pins or held.kids or held is self._root:
            return
        self._count += 1
        if self.capacity is not None:
            heappush(self._idle, (held.level, held.last, self._count, held))
        if self.ttl_ns is not None:
            heappush(self._aging, (held.last, self._count, held))

    def _evict(self, need: int) -> int:
        """Free so many blocks of what was used longest ago; how many, fewer where the rest is in use."""
        freed = 0
        while freed < need:
            oldest = self._oldest()
            if self._waste and (oldest is None or self._waste[0][0] <= oldest.last or oldest.level > 0):
                last, blocks = heappop(self._waste)
                if blocks > need - freed:
                    heappush(self._waste, (last, blocks - need + freed))
                freed += min(blocks, need - freed)
            elif oldest is None:
                break
            else:
                heappop(self._idle)
                freed += self._take(oldest, need - freed)
        self.blocks -= freed
        return freed

    def _oldest(self) -> Held | None:
        """The leaf to be evicted next."""
        idle = self._idle
        while idle:
            level, last, _, held = idle[0]
            if held.last == last and held.level == level and self._is_idle(held):
                return held
            heappop(idle)
        return None

    def _take(self, held: Held, need: int) -> int:
        """Evict up to so many blocks from a leaf's tail, and go on with what it went on from while that is next."""
        block, freed = self.block, 0
        while True:
            start = held.node.start // block
            owned = held.upto // block - start
            if owned > need - freed:
                held.upto = (start + owned - (need - freed)) * block
                freed = need
                self._rest(held)
                break
            freed += owned
            above = self._drop(held)
            if freed == need or above.last != held.last or above.level or not self._is_idle(above):
                self._rest(above)
                break
            held = above
        return freed

    def _drop(self, held: Held) -> Held:
        """Forget a leaf. What it went on from, which is returned, was last used no earlier than it."""
        node = held.node
        node.held[self._slot] = None
        above = held.above
        above.kids -= 1
        if held.last > above.last:
            above.last, above.last_ns = held.last, held.last_ns
        above.level = max(above.level, held.level & ~_PINNED)
        self.tree.prune(node)
        return above
