"""PrefixCache against a plain dictionary of chained blocks, and by examples worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.replayers.cache import NEVER, Lease, PrefixCache, Write
from keepwarm.replayers.endpoint import Piece

Tokens = tuple[tuple[int, int], ...]
Prompt = tuple[Piece, ...]

LENGTHS = {1: 20, 2: 9, 3: 3}
"""The pieces that generated prompts are made of: whole lengths by ident."""
USER = st.just("user")


def tokens(prompt: Prompt) -> Tokens:
    """A prompt as explicit tokens: no two idents share any, a cut piece is a prefix of the whole one."""
    return tuple((piece.ident, at) for piece in prompt for at in range(piece.tokens))


@dataclass
class Block:
    """A cached block of the oracle. Whoever holds it is counted; its writer's end starts its life."""

    ttl: int
    writer: object
    expires: int = 0
    refs: int = 1


@dataclass
class Held:
    """What a running call holds of the oracle: blocks by their chained tokens, in the prompt's order."""

    keys: list[Tokens] = field(default_factory=list)


class Oracle:
    """Full blocks in a dictionary, each under all tokens up to its end; a free list in the order of eviction, to which
    a call's blocks go back tail first, as vLLM does it. An expired block goes when it is looked up, with its chain.
    """

    def __init__(self, block: int, capacity: int | None, refresh: bool) -> None:
        self.block, self.capacity, self.refresh = block, capacity, refresh
        self.cached: dict[Tokens, Block] = {}
        self.free: list[Tokens] = []
        self.evicted = 0

    def acquire(self, prompt: Tokens, now: int) -> Held:
        """Hold the blocks a prompt begins with."""
        held = Held()
        self.extend(held, prompt, now)
        return held

    def chain(self, held: Held, prompt: Tokens) -> list[Tokens]:
        """The prompt's full blocks behind those that are held."""
        ends = range((len(held.keys) + 1) * self.block, len(prompt) + 1, self.block)
        return [prompt[:end] for end in ends]

    def extend(self, held: Held, prompt: Tokens, now: int) -> None:
        """Hold what of the prompt is there and alive behind what is held."""
        for key in self.chain(held, prompt):
            found = self.cached.get(key)
            if found is None:
                return
            if not found.refs:
                if found.expires <= now:
                    self.forget(key)
                    return
                self.free.remove(key)
            found.refs += 1
            held.keys.append(key)

    def forget(self, prefix: Tokens) -> None:
        """Drop a block and all that are chained on it."""
        for key in [key for key in self.cached if key[: len(prefix)] == prefix]:
            del self.cached[key]
            self.free.remove(key)

    def store(self, held: Held, prompt: Tokens, writes: list[Write], now: int) -> None:
        """Cache the blocks that end inside a write, each for the TTL of the first write that covers its end."""
        self.extend(held, prompt, now)
        for key in self.chain(held, prompt):
            covering = [write for write in sorted(writes) if write.upto >= len(key)]
            if not covering or not self.room():
                return
            self.cached[key] = Block(covering[0].ttl_ns, held)
            held.keys.append(key)

    def room(self) -> bool:
        """Make room for one block."""
        if self.capacity is None or len(self.cached) < self.capacity:
            return True
        if not self.free:
            return False
        del self.cached[self.free.pop(0)]
        self.evicted += 1
        return True

    def release(self, held: Held, now: int) -> None:
        """Give all blocks back, tail first."""
        for key in reversed(held.keys):
            found = self.cached[key]
            found.refs -= 1
            if self.refresh or found.writer is held:
                found.expires = now + found.ttl
            if not found.refs:
                self.free.append(key)
        held.keys = []


class Both:
    """The cache and its oracle, given the same calls; they are compared after each step."""

    def __init__(self, block: int, capacity: int | None, refresh: bool) -> None:
        self.cache = PrefixCache(block=block, capacity=capacity, refresh=refresh)
        self.oracle = Oracle(block, capacity, refresh)
        self.running: list[tuple[Lease, Held, Prompt]] = []
        self.now = 0

    def begin(self, prompt: Prompt) -> None:
        """A call begins: it holds what is cached."""
        lease, held = self.cache.acquire(prompt, self.now), self.oracle.acquire(tokens(prompt), self.now)
        self.running.append((lease, held, prompt))

    def store(self, index: int, answer: Prompt, writes: list[Write]) -> None:
        """A running call writes its prompt, or its prompt and an answer."""
        lease, held, prompt = self.running[index]
        whole = prompt + answer
        self.running[index] = lease, held, whole
        self.cache.store(lease, whole, writes, self.now)
        self.oracle.store(held, tokens(whole), writes, self.now)

    def release(self, index: int) -> None:
        """A running call ends."""
        lease, held, _ = self.running.pop(index)
        self.cache.release(lease, self.now)
        self.oracle.release(held, self.now)

    def compare(self) -> None:
        """Each running call holds the same blocks, as many are cached, as many were evicted."""
        for lease, held, _ in self.running:
            assert lease.tokens // self.cache.block == len(held.keys)
        assert self.cache.blocks == len(self.oracle.cached)
        assert self.cache.evicted == self.oracle.evicted
        assert self.cache.capacity is None or self.cache.blocks <= self.cache.capacity


LASTS = st.sampled_from(sorted(LENGTHS)).flatmap(
    lambda i: st.builds(Piece, st.just(i), st.integers(1, LENGTHS[i]), USER)
)
WHOLES = st.sampled_from([Piece(ident, length, "user") for ident, length in LENGTHS.items()])
PROMPTS = st.builds(lambda wholes, last: (*wholes, last), st.lists(WHOLES, max_size=2), LASTS | WHOLES)
TTLS = st.sampled_from([0, 5, 20, NEVER])
WRITES = st.lists(st.builds(Write, st.integers(0, 60) | st.just(1000), TTLS), min_size=1, max_size=2)
CALL = st.integers(0, 9)
STEPS = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.one_of(
            st.tuples(st.just("whole"), PROMPTS, WRITES),
            st.tuples(st.just("begin"), PROMPTS),
            st.tuples(st.just("store"), CALL, st.just(()) | PROMPTS, WRITES),
            st.tuples(st.just("release"), CALL),
        ),
    ),
    min_size=3,
    max_size=25,
)


def follow(both: Both, steps: list[tuple[int, tuple[Any, ...]]]) -> None:
    """Do the steps, each some time after the one before, and compare after each."""
    for later, (name, *what) in steps:
        both.now += later
        if name == "whole":
            both.begin(what[0])
            both.store(-1, (), what[1])
            both.release(-1)
        elif name == "begin":
            both.begin(*what)
        elif both.running:
            getattr(both, name)(what[0] % len(both.running), *what[1:])
        both.compare()


@settings(max_examples=250, deadline=None)
@given(
    block=st.integers(1, 16),
    capacity=st.none() | st.integers(0, 12),
    refresh=st.booleans(),
    steps=STEPS,
)
def test_cache_is_a_dictionary_of_chained_blocks(
    block: int, capacity: int | None, refresh: bool, steps: list[tuple[int, tuple[Any, ...]]]
) -> None:
    """Overlapping calls over prompts that share prefixes, cut inside pieces: at every step each holds as many blocks as
    in a plain dictionary of chained blocks, as many are cached, never above capacity, and as many were evicted.
    """
    follow(Both(block, capacity, refresh), steps)


@settings(max_examples=60, deadline=None)
@given(block=st.integers(1, 16), capacity=st.integers(1, 12), refresh=st.booleans(), steps=STEPS)
def test_nothing_stays_held_once_all_calls_ended(
    block: int, capacity: int, refresh: bool, steps: list[tuple[int, tuple[Any, ...]]]
) -> None:
    """After the last release one new prompt can have the whole cache, whatever went on before."""
    both = Both(block, capacity, refresh)
    follow(both, steps)
    while both.running:
        both.release(0)
    both.begin((Piece(99, capacity * block, "user"),))
    both.store(0, (), [Write(1000)])
    both.compare()
    assert both.running[0][0].tokens == capacity * block


def piece(ident: int, count: int) -> Piece:
    """The first tokens of a segment."""
    return Piece(ident, count, "user")


def run(cache: PrefixCache, now: int, *prompt: Piece, ttl: int = NEVER, upto: int = 10**6) -> int:
    """One call from beginning to end at one instant; how many tokens it found."""
    lease = cache.acquire(prompt, now)
    found = lease.tokens
    cache.store(lease, prompt, [Write(upto, ttl)], now)
    cache.release(lease, now)
    return found


def test_a_block_over_a_fork_belongs_to_each_branch() -> None:
    """20 shared tokens and 20 of each branch in blocks of 16: one shared block, and one of each branch's own."""
    cache = PrefixCache(block=16)
    assert run(cache, 0, piece(1, 20), piece(2, 20)) == 0
    assert cache.blocks == 2
    assert run(cache, 1, piece(1, 20), piece(3, 20)) == 20
    assert cache.blocks == 3
    assert run(cache, 2, piece(1, 20), piece(2, 12)) == 32


def test_the_tail_of_the_least_recently_used_prompt_goes_first() -> None:
    """Ten blocks: six of the older prompt, four of the newer. Three more take the older one's last three."""
    cache = PrefixCache(block=4, capacity=10)
    run(cache, 0, piece(1, 24))
    run(cache, 1, piece(2, 16))
    run(cache, 2, piece(3, 12))
    assert (cache.blocks, cache.evicted) == (10, 3)
    assert cache.acquire((piece(1, 24),), 3).tokens == 12
    assert cache.acquire((piece(2, 16),), 3).tokens == 16


def test_a_hit_makes_a_prompt_the_last_to_go() -> None:
    """The older of two prompts is read again, and so outlives the newer one."""
    cache = PrefixCache(capacity=20)
    run(cache, 0, piece(1, 10))
    run(cache, 1, piece(2, 10))
    assert run(cache, 2, piece(1, 10)) == 10
    run(cache, 3, piece(3, 10))
    assert run(cache, 4, piece(1, 10)) == 10
    assert cache.acquire((piece(2, 10),), 5).tokens == 0


def test_what_a_running_call_holds_is_not_evicted() -> None:
    """Eight of ten blocks are held, so a second prompt finds room for two blocks, and gives them up when it ends."""
    cache = PrefixCache(capacity=10)
    lease = cache.acquire((piece(1, 8),), 0)
    cache.store(lease, (piece(1, 8),), [Write(8)], 0)
    run(cache, 1, piece(2, 8))
    assert (cache.blocks, cache.evicted) == (10, 0)
    assert cache.acquire((piece(2, 8),), 2).tokens == 2
    cache.release(lease, 3)
    assert run(cache, 4, piece(1, 8)) == 8


def test_a_cache_without_blocks_holds_nothing() -> None:
    """Capacity 0 is no error: every call finds nothing."""
    cache = PrefixCache(block=16, capacity=0)
    assert [run(cache, now, piece(1, 40)) // 16 for now in range(3)] == [0, 0, 0]
    assert cache.blocks == 0


@pytest.mark.parametrize(("refresh", "found"), [(True, [0, 10, 10, 0]), (False, [0, 10, 0, 10])])
def test_a_read_renews_the_ttl_or_does_not(refresh: bool, found: list[int]) -> None:
    """TTL 10, calls at 0, 9, 18 and 28: with refresh the third is 9 after the second and the fourth 10 after the third,
    too late; without, the third comes after the first's TTL and writes again for the fourth to read at 27 only.
    """
    cache = PrefixCache(refresh=refresh)
    times = (0, 9, 18, 28 if refresh else 27)
    assert [run(cache, now, piece(1, 10), ttl=10) for now in times] == found


@pytest.mark.parametrize("read", [5, 3])
def test_without_refresh_a_prompt_lives_from_its_writers_end(read: int) -> None:
    """Written at 1 by a call that ends at 8, read by another, whole or in part, from 2 to 3: with a TTL of 10 it lives
    until 18.
    """
    for now, found in ((17, 5), (18, 0)):
        cache, prompt = PrefixCache(refresh=False), (piece(1, 5),)
        writer = cache.acquire(prompt, 0)
        cache.store(writer, prompt, [Write(5, 10)], 1)
        reader = cache.acquire((piece(1, read),), 2)
        cache.release(reader, 3)
        cache.release(writer, 8)
        assert cache.acquire(prompt, now).tokens == found


def test_a_held_prompt_does_not_expire() -> None:
    """A call that runs longer than the TTL still holds its prompt, which then lives for a TTL from its end."""
    cache, prompt = PrefixCache(), (piece(1, 5),)
    lease = cache.acquire(prompt, 0)
    cache.store(lease, prompt, [Write(5, 10)], 0)
    assert cache.acquire(prompt, 50).tokens == 5
    cache.release(lease, 100)


def test_each_write_gives_its_own_tokens_its_ttl() -> None:
    """30 tokens for 100, 12 more for 10, the last 5 for nothing: found at 5, at 50 and at 200."""
    prompt = (piece(1, 30), piece(2, 17))
    for now, found in ((5, 42), (50, 30), (200, 0)):
        cache = PrefixCache()
        lease = cache.acquire(prompt, 0)
        cache.store(lease, prompt, [Write(42, 10), Write(30, 100)], 0)
        cache.release(lease, 0)
        assert cache.acquire(prompt, now).tokens == found


def test_the_block_that_a_later_call_filled_lives_without_its_first_writer() -> None:
    """Without refresh: ten tokens written at 0 fill no block of 16; the call at 8 that does starts its TTL of 10."""
    cache = PrefixCache(block=16, refresh=False)
    run(cache, 0, piece(1, 10), ttl=10)
    run(cache, 8, piece(1, 10), piece(2, 10), ttl=10)
    assert cache.acquire((piece(1, 10), piece(2, 10)), 17).tokens == 20


@pytest.mark.parametrize(("block", "capacity"), [(0, None), (-1, None), (16, -1)])
def test_impossible_caches_are_refused(block: int, capacity: int | None) -> None:
    """A block has at least one token, a cache at least no blocks."""
    with pytest.raises(ValueError, match="block must be"):
        PrefixCache(block=block, capacity=capacity)
