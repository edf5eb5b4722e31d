"""BlockCache against vLLM's block pool told plainly, against a dictionary of last uses, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Held, Pool

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.lease import Lease
from keepwarm.replayers.tree import Node, PromptTree

Tokens = tuple[Any, ...]
Prompt = tuple[Piece, ...]

LENGTHS = {1: 20, 2: 9, 3: 3, 4: 1}
"""The pieces that generated prompts are made of: whole lengths by ident."""


def piece(ident: int, count: int) -> Piece:
    """The first tokens of a segment."""
    return Piece(ident, count, "user")


def tokens(prompt: Sequence[Piece]) -> Tokens:
    """A prompt as explicit tokens: no two idents share any, a cut piece is a prefix of the whole one."""
    return tuple((piece.ident, at) for piece in prompt for at in range(piece.tokens))


class Both:
    """The cache and vLLM's pool, given the same calls. A block computed again (the last of a prompt found whole, or an
    answer said again) has two copies there. The cache follows that as long as the old copy is nobody's and nothing is
    chained on it, and no call touches either again: ``exact`` is whether this still holds.
    """

    def __init__(self, block: int, capacity: int) -> None:
        self.tree = PromptTree()
        self.cache = BlockCache(self.tree, block=block, capacity=capacity)
        self.cache.counts_use = True
        self.pool = Pool(block, capacity + 1)
        self.running: list[tuple[Lease, Held, Node]] = []
        self.reads: list[tuple[int, int]] = []
        self.now = self.unknown = 0
        self.passed: set[int] = set()
        self.exact = True

    def begin(self, prompt: Prompt) -> bool:
        """A call is admitted, if there is room for its prompt."""
        self.now += 1
        node = self.tree.extend(self.tree.root, prompt)
        self.exact &= self.follows(tokens(prompt))
        held = self.pool.begin(tokens(prompt))
        lease = self.cache.acquire(node, self.now)
        read = lease.room
        grown = self.cache.grow(lease, node, node.end)
        assert grown == (held is not None) or not self.exact
        if not grown or held is None:
            if grown:
                self.cache.release(lease, self.now)
            else:
                self.cache.give_up(lease)
            if held is not None:
                self.pool.end(held)
            return False
        self.reads.append((read, held.cached))
        self.running.append((lease, held, node))
        return True

    def follows(self, prompt: Tokens) -> bool:
        """Whether the cache follows what a call does to blocks of which there are two, or will be."""
        keys, cached = self.pool._keys([], prompt), self.pool.cached
        hits = [*(key in cached for key in keys), False].index(False)
        last = keys[hits - 1 : hits] if hits * self.cache.block == len(prompt) else []
        read = keys[: hits - len(last)]
        return all(len(cached[key]) == 1 for key in read) and all(key in self.idle_ends() for key in last)

    def idle_ends(self) -> set[int]:
        """Cached blocks that no call holds, and past which no call ever went."""
        return {key for key, blocks in self.pool.cached.items() if not any(b.refs for b in blocks)} - self.passed

    def end(self, index: int, answer: Prompt, known: bool) -> None:
        """A running call generates, if there is room, and ends. No prompt will repeat an answer that is not known."""
        self.now += 1
        lease, held, node = self.running.pop(index)
        self.unknown += 1
        said = tokens(answer) if known else tuple((self.unknown, "unknown", at) for at in range(len(tokens(answer))))
        if said:
            upto = node.end + len(said) - 1
            has_room = self.cache.spend(lease, upto)
            assert has_room == self.pool.grow(held, said) or not self.exact
            self.exact &= all(
                len(self.pool.cached.get(key, ())) < 2 for key in held.keys[node.end // self.cache.block :]
            )
            if has_room and known:
                self.cache.keep(lease, self.tree.extend(node, answer))
        computed = len(held.tokens) - bool(said)
        self.passed.update(held.keys if computed > len(held.keys) * self.cache.block else held.keys[:-1])
        self.pool.end(held)
        self.cache.release(lease, self.now)

    def compare(self) -> None:
        """As many blocks take room, and as many are in use; all calls were spared as many tokens."""
        free = [block for block in self.pool.free if block.key is None]
        assert self.cache.blocks <= (self.cache.capacity or 0)
        if self.exact:
            assert all(read == cached for read, cached in self.reads)
            assert self.cache.blocks == self.cache.capacity - len(free)  # type: ignore[operator]
            assert self.cache.in_use == self.cache.capacity - len(self.pool.free)  # type: ignore[operator]


WHOLES = st.sampled_from([piece(ident, length) for ident, length in LENGTHS.items()])
CUT = st.sampled_from(sorted(LENGTHS)).flatmap(lambda i: st.builds(piece, st.just(i), st.integers(1, LENGTHS[i])))
PROMPTS = st.builds(lambda wholes, last: (*wholes, last), st.lists(WHOLES, max_size=3), CUT | WHOLES)
ANSWERS = st.just(()) | st.tuples(CUT | WHOLES)
WHICH = st.integers(0, 9)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("whole"), PROMPTS, ANSWERS, st.booleans()),
        st.tuples(st.just("begin"), PROMPTS),
        st.tuples(st.just("end"), WHICH, ANSWERS, st.booleans()),
    ),
    min_size=3,
    max_size=30,
)


def follow(both: Both, steps: list[tuple[Any, ...]]) -> None:
    """Do the steps and compare after each."""
    for name, *what in steps:
        if name == "whole":
            if both.begin(what[0]):
                both.end(-1, *what[1:])
        elif name == "begin":
            both.begin(*what)
        elif both.running:
            both.end(what[0] % len(both.running), *what[1:])
        both.compare()


@settings(max_examples=300, deadline=None)
@given(block=st.integers(1, 32), capacity=st.integers(1, 24), steps=STEPS)
def test_cache_is_vllms_block_pool(block: int, capacity: int, steps: list[tuple[Any, ...]]) -> None:
    """Overlapping calls over prompts that share prefixes and are cut inside pieces, with answers that come back or do
    not, under eviction: each is admitted and spared tokens as by vLLM's pool, and as many blocks are taken and in use.
    """
    follow(Both(block, capacity), steps)


@settings(max_examples=300, deadline=None)
@given(block=st.integers(1, 16), capacity=st.integers(1, 24), steps=STEPS)
def test_nothing_stays_held_once_all_calls_ended(block: int, capacity: int, steps: list[tuple[Any, ...]]) -> None:
    """After the last release nothing is in use, one new prompt can have the whole cache, and a clear leaves nothing, in
    the tree neither.
    """
    both = Both(block, capacity)
    follow(both, steps)
    while both.running:
        both.end(0, (), True)
    assert both.cache.in_use == 0
    both.begin((piece(99, capacity * block),))
    assert both.cache.in_use == both.cache.blocks == capacity
    both.end(0, (), True)
    both.cache.clear()
    assert (both.cache.blocks, both.cache.in_use) == (0, 0)
    for node in leaves(both.tree.root):
        both.tree.prune(node)
    assert both.tree.root.children == {}


def leaves(node: Node) -> list[Node]:
    """All prompts that none goes on from."""
    found = [node]
    for each in found:
        found += each.children.values()
    return [each for each in found if not each.children]


@pytest.mark.parametrize("seed", range(3))
def test_where_copies_are_touched_again_little_differs(seed: int) -> None:
    """Prompts of whole blocks, half of them asked again, and grown, under heavy eviction: of 2,000 calls fewer than 1
    in 100 is told another count than by vLLM's pool, none by more than a few blocks, and all within a thousandth.
    """
    rng, both, prompts = Random(seed), Both(4, 120), [(piece(0, 8),)]
    for number in range(2000):
        base = rng.choice(prompts[-40:])
        if rng.random() < 0.5:
            base = (*base[:8], piece(number + 10, 4 * rng.randint(1, 5)))
            prompts.append(base)
        assert both.begin(base)
        both.end(-1, (), True)
    read, cached = (sum(column) for column in zip(*both.reads, strict=True))
    assert not both.exact
    assert sum(one != other for one, other in both.reads) < 20
    assert max(abs(one - other) for one, other in both.reads) <= 16
    assert read == pytest.approx(cached, rel=0.001)


class Uses:
    """Full blocks by all tokens up to their end, each with its last use; endless, with a TTL."""

    def __init__(self, block: int, ttl: int) -> None:
        self.block, self.ttl = block, ttl
        self.last: dict[Tokens, int] = {}
        self.holders: dict[Tokens, int] = {}

    def chain(self, prompt: Tokens) -> list[Tokens]:
        """The prompt's full blocks."""
        return [prompt[:end] for end in range(self.block, len(prompt) + 1, self.block)]

    def alive(self, prompt: Tokens, now: int) -> int:
        """How many full blocks of a prompt are held, or were used less than a TTL ago."""
        chain = self.chain(prompt)
        alive = [bool(self.holders.get(key)) or now - self.last.get(key, -(10**9)) < self.ttl for key in chain]
        return [*alive, False].index(False)


@settings(max_examples=300, deadline=None)
@given(block=st.integers(1, 8), ttl=st.integers(1, 12), prompts=st.lists(PROMPTS, max_size=15), rng=st.randoms())
def test_a_prefix_lives_for_a_ttl_from_the_end_of_its_last_use(
    block: int, ttl: int, prompts: list[Prompt], rng: Random
) -> None:
    """Overlapping calls at random times: each reads what is held or was used less than a TTL ago, and in the end just
    that is there.
    """
    tree = PromptTree()
    cache, uses = BlockCache(tree, block=block, ttl_ns=ttl), Uses(block, ttl)
    running: list[tuple[Lease, Tokens]] = []
    now = 0
    for prompt in prompts:
        now += rng.randint(0, 6)
        while running and rng.random() < 0.6:
            lease, asked = running.pop(rng.randrange(len(running)))
            cache.release(lease, now)
            for key in uses.chain(asked):
                uses.holders[key] -= 1
                uses.last[key] = now
            now += rng.randint(0, 6)
        node, asked = tree.extend(tree.root, prompt), tokens(prompt)
        lease = cache.acquire(node, now)
        assert lease.room == min(uses.alive(asked, now), (len(asked) - 1) // block) * block
        cache.grow(lease, node, node.end)
        for key in uses.chain(asked):
            uses.holders[key] = uses.holders.get(key, 0) + 1
        running.append((lease, asked))
    cache.expire(now)
    there = {key for key, held in uses.holders.items() if held or now - uses.last[key] < ttl}
    kept = [(tokens(prompt), cache.kept(tree.extend(tree.root, prompt))[0] // block) for prompt in prompts]
    assert {key for asked, blocks in kept for key in uses.chain(asked)[:blocks]} == there


def test_what_was_used_again_does_not_keep_what_was_not() -> None:
    """TTL 10: of two prompts the older is used again at 8; at 11 the other, used at 1, is gone, and at 18 both are."""
    for now, reads in ((10, [8, 8]), (11, [8, 0]), (18, [0, 0])):
        cache = BlockCache(PromptTree(), block=4, ttl_ns=10)
        for at, ident in ((0, 1), (1, 2), (8, 1)):
            asked_whole(cache, at, piece(ident, 8))
        cache.expire(now)
        assert [found(cache, piece(ident, 9)) for ident in (1, 2)] == reads


def asked_whole(cache: BlockCache, now: int, *prompt: Piece, level: int = 0, keep: int = 0) -> int:
    """One call from beginning to end at one instant; how many tokens it found."""
    node = cache.tree.extend(cache.tree.root, prompt)
    lease = cache.acquire(node, now)
    found = lease.room
    cache.grow_most(lease, node, node.end)
    cache.release(lease, now, level=level, keep_ns=keep)
    return found


def found(cache: BlockCache, *prompt: Piece) -> int:
    """What a call would read; nothing is changed."""
    return cache.match(cache.tree.extend(cache.tree.root, prompt))


def test_a_block_over_a_fork_belongs_to_each_branch() -> None:
    """20 shared tokens and 20 of each branch in blocks of 16: one shared block, and one of each branch's own."""
    cache = BlockCache(PromptTree(), block=16)
    assert asked_whole(cache, 0, piece(1, 20), piece(2, 20)) == 0
    assert cache.blocks == 2
    assert asked_whole(cache, 1, piece(1, 20), piece(3, 20)) == 16
    assert cache.blocks == 3
    assert asked_whole(cache, 2, piece(1, 20), piece(2, 13)) == 32


def test_the_tail_of_the_least_recently_used_prompt_goes_first() -> None:
    """Ten blocks: six of the older prompt, four of the newer. Three more take the older one's last three."""
    cache = BlockCache(PromptTree(), block=4, capacity=10)
    asked_whole(cache, 0, piece(1, 24))
    asked_whole(cache, 1, piece(2, 16))
    asked_whole(cache, 2, piece(3, 12))
    assert (cache.blocks, found(cache, piece(3, 13))) == (10, 12)
    assert found(cache, piece(1, 25)) == 12
    assert found(cache, piece(2, 17)) == 16


def test_a_lookup_is_no_use() -> None:
    """The router asks of the older prompt; it goes first nevertheless."""
    cache = BlockCache(PromptTree(), block=4, capacity=10)
    asked_whole(cache, 0, piece(1, 20))
    asked_whole(cache, 1, piece(2, 20))
    assert found(cache, piece(1, 21)) == 20
    asked_whole(cache, 2, piece(3, 8))
    assert (found(cache, piece(1, 21)), found(cache, piece(2, 21))) == (12, 20)


def pressed(cache: BlockCache, now: int, blocks: int) -> list[int]:
    """Prompts 1, 2 and 3 of two blocks each, after a new prompt of so many blocks."""
    asked_whole(cache, now, piece(100 + now, 4 * blocks))
    return [found(cache, piece(ident, 9)) for ident in (1, 2, 3)]


def test_higher_levels_are_evicted_later() -> None:
    """Of three prompts the oldest has level 2, the second 1: the newest goes first, then the second, then the first."""
    for blocks, left in ((2, [8, 8, 0]), (4, [8, 0, 0]), (6, [0, 0, 0])):
        cache = BlockCache(PromptTree(), block=4, capacity=6)
        for ident, level in ((1, 2), (2, 1), (3, 0)):
            asked_whole(cache, ident, piece(ident, 8), level=level)
        assert pressed(cache, 9, blocks) == left


def test_what_is_kept_goes_last_and_only_for_so_long() -> None:
    """The oldest of three prompts is kept for 100 after its use at 1: at 50 it outlives the others, yet goes where
    nothing else is left; at 101 it is the first to go.
    """
    for now, blocks, left in ((50, 4, [8, 0, 0]), (50, 5, [4, 0, 0]), (100, 4, [8, 0, 0]), (101, 2, [0, 8, 8])):
        cache = BlockCache(PromptTree(), block=4, capacity=6)
        for ident, keep in ((1, 100), (2, 0), (3, 0)):
            asked_whole(cache, ident, piece(ident, 8), level=5 if ident == 2 and now < 101 else 0, keep=keep)
        assert pressed(cache, now, blocks) == left


def test_what_a_running_call_holds_is_not_evicted() -> None:
    """Eight of ten blocks are held: a prompt of four finds no room, nothing is evicted for it, and one of two does."""
    cache = BlockCache(PromptTree(), block=4, capacity=10)
    cache.counts_use = True
    asked_whole(cache, 0, piece(2, 8))
    node = cache.tree.extend(cache.tree.root, [piece(1, 32)])
    lease = cache.acquire(node, 0)
    assert cache.grow(lease, node, 32)
    other = cache.tree.extend(cache.tree.root, [piece(3, 16)])
    refused = cache.acquire(other, 1)
    assert not cache.grow(refused, other, 16)
    cache.give_up(refused)
    assert (cache.blocks, found(cache, piece(2, 9)), cache.in_use) == (10, 8, 8)
    assert asked_whole(cache, 1, piece(4, 8)) == 0
    assert (cache.blocks, found(cache, piece(2, 9))) == (10, 0)
    cache.release(lease, 2)
    assert cache.in_use == 0


def test_a_cache_without_blocks_holds_nothing() -> None:
    """Capacity 0 is no error: every call finds nothing."""
    cache = BlockCache(PromptTree(), block=16, capacity=0)
    assert [asked_whole(cache, now, piece(1, 40)) for now in range(3)] == [0, 0, 0]
    assert cache.blocks == 0


def test_a_prompt_forgotten_while_its_call_waits_is_found_again() -> None:
    """A prompt was cached when its call came, evicted while it waited, and computed anew: the next one reads it, and so
    does one that had waited as long.
    """
    cache = BlockCache(PromptTree(), block=4, capacity=4)
    asked_whole(cache, 0, piece(1, 16))
    waits, shorter = (cache.tree.extend(cache.tree.root, [piece(1, tokens)]) for tokens in (16, 15))
    asked_whole(cache, 1, piece(2, 16))
    lease = cache.acquire(waits, 2)
    assert cache.grow(lease, waits, 16)
    cache.release(lease, 2)
    assert (found(cache, piece(1, 17)), cache.blocks) == (16, 4)
    again = cache.acquire(shorter, 3)
    assert again.room == 12
    cache.release(again, 3)
    cache.clear()
    assert cache.blocks == 0


@pytest.mark.parametrize(("block", "capacity"), [(0, None), (-1, None), (16, -1)])
def test_impossible_caches_are_refused(block: int, capacity: int | None) -> None:
    """A block has at least one token, a cache at least no blocks."""
    with pytest.raises(ValueError, match="block must be"):
        BlockCache(PromptTree(), block=block, capacity=capacity)
