"""Engine against one that takes a step at a time, against vLLM's pool, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Pool
from stepping import Call, Stepping

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.job import Event, Job, Running
from keepwarm.replayers.queues import QUEUES
from keepwarm.replayers.times import StepTimes
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.model import Hints

TIMES = StepTimes(fixed_s=1e-6, prefill_s=1e-8, decode_s=3e-8, kv_s=1e-8)
"""All steps take whole tens of ns, so that times can be compared exactly, and calls that come in between do so."""
LENGTHS = {1: 20, 2: 9, 3: 30}

Ask = tuple[int, tuple[Piece, ...], int, tuple[Piece, ...], Hints | None, str | None]


def piece(ident: int, count: int) -> Piece:
    """The first tokens of a segment."""
    return Piece(ident, count, "user")


CUT = st.sampled_from(sorted(LENGTHS)).flatmap(lambda i: st.builds(piece, st.just(i), st.integers(1, LENGTHS[i])))
WHOLES = st.sampled_from([piece(ident, length) for ident, length in LENGTHS.items()])
PROMPTS = st.builds(lambda wholes, last: (*wholes, last), st.lists(WHOLES, max_size=2), CUT)
HINTS = st.none() | st.tuples(st.integers(-2, 2), st.none() | st.integers(0, 1)).map(lambda told: Hints(*told))
FLOWS = st.sampled_from([None, "interactive", "background"])
ASKS = st.lists(
    st.tuples(st.integers(0, 1500), PROMPTS, st.integers(1, 40), st.just(()) | st.tuples(CUT), HINTS, FLOWS),
    min_size=1,
    max_size=9,
)
BATCHES = st.fixed_dictionaries(
    {"max_seqs": st.integers(1, 5), "max_batched": st.integers(6, 40), "queue": st.sampled_from(sorted(QUEUES))}
)


def made(block: int, capacity: int | None, batch: dict[str, Any]) -> Engine:
    """An engine with an empty cache."""
    return Engine(BlockCache(PromptTree(), block=block, capacity=capacity), times=TIMES, **batch)


def job(tree: PromptTree, ask: Ask) -> Job:
    """A job in a tree."""
    _, prompt, output, answer, hints, flow = ask
    return Job(tree.extend(tree.root, prompt), output, answer, hints=hints, flow=flow)


class Watched:
    """An engine that calls come to; what holds at any time is checked whenever something happens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ran: dict[int, Running] = {}
        self.events: list[Event] = []
        self.told: list[tuple[int, int, int]] = []
        self.now = 0

    def run(self, asks: list[Ask], cancels: dict[int, int]) -> None:
        """All calls from arrival to end, but for those that are cancelled some time after they came."""
        due = [(ask[0], 0, index) for index, ask in enumerate(asks)]
        due += sorted((asks[index][0] + later, 1, index) for index, later in cancels.items())
        due.sort()
        while due or self.engine.next_ns() is not None:
            at = self.engine.next_ns()
            if due and (at is None or due[0][0] < at):
                self.now, is_cancel, index = due.pop(0)
                if is_cancel and self.ran[index].done_ns is None:
                    self.engine.cancel(self.ran[index], self.now)
                elif not is_cancel:
                    self.ran[index] = Running(job(self.engine.cache.tree, asks[index]), self.now)
                    self.engine.submit(self.ran[index], self.now)
            else:
                assert at is not None
                assert at >= self.now
                self.now = at
                self.events += self.engine.advance(at)
            self.check()

    def check(self) -> None:
        """No more runs and is held than may; answers only grow."""
        cache = self.engine.cache
        assert self.engine.running <= self.engine.max_seqs
        assert 0 <= cache.in_use <= cache.blocks
        assert cache.capacity is None or cache.blocks <= cache.capacity
        for index, running in self.ran.items():
            if running.error is None:
                self.told.append((self.now, index, self.engine.produced(running, self.now)))


@settings(max_examples=300, deadline=None)
@given(block=st.integers(1, 16), capacity=st.none() | st.integers(5, 60), batch=BATCHES, asks=ASKS)
def test_skipping_ahead_is_stepping(block: int, capacity: int | None, batch: dict[str, Any], asks: list[Ask]) -> None:
    """Calls at random times, with and without priorities and room: first tokens, ends, tokens out in between, cached
    tokens and preemptions are those of an engine that takes one step after the other; whoever can never fit ends with
    an error; all others end, and leave nothing in use. (No call comes just as a step ends: it may be in the next one.)
    """
    asks = [(10 * at + number, *rest) for number, (at, *rest) in enumerate(asks)]
    engine = made(block, capacity, batch)
    watched = Watched(engine)
    watched.run(asks, {})
    cache = BlockCache(PromptTree(), block=block, capacity=capacity)
    calls = [Call(job(cache.tree, ask), ask[0], name) for name, ask in enumerate(asks)]
    order = QUEUES[batch["queue"]]
    stepping = Stepping(cache, TIMES, max_seqs=batch["max_seqs"], max_batched=batch["max_batched"], order=order)
    stepping.run(calls)
    for index, call in enumerate(calls):
        one = watched.ran[index]
        assert (one.first_token_ns, one.done_ns) == (call.first, call.done)
        assert one.read == (call.read or 0)
        assert one.error == (None if call.first is not None else "overflow")
    for at, index, produced in watched.told:
        assert produced == sum(out <= at for out in calls[index].out)
    assert engine.preemptions == stepping.preemptions
    assert [event.at_ns for event in watched.events] == sorted(event.at_ns for event in watched.events)
    assert (engine.cache.in_use, engine.running, engine.waiting) == (0, 0, 0)
    assert engine.cache.blocks == cache.blocks


@settings(max_examples=200, deadline=None)
@given(
    block=st.integers(1, 16),
    capacity=st.none() | st.integers(5, 60),
    batch=BATCHES,
    asks=ASKS,
    cancels=st.dictionaries(st.integers(0, 8), st.integers(0, 3000), max_size=5),
)
def test_a_call_may_leave_at_any_moment(
    block: int, capacity: int | None, batch: dict[str, Any], asks: list[Ask], cancels: dict[int, int]
) -> None:
    """Whenever clients leave, waiting, computing or answering: all others end, nothing stays in use, and a clear leaves
    nothing. The same again gives the same events.
    """
    told = []
    for _ in range(2):
        engine = made(block, capacity, batch)
        watched = Watched(engine)
        watched.run(asks, {index: later for index, later in cancels.items() if index < len(asks)})
        assert all(one.done_ns is not None for one in watched.ran.values())
        assert (engine.cache.in_use, engine.running, engine.waiting) == (0, 0, 0)
        told.append([(event.at_ns, event.kind, event.running.read) for event in watched.events])
        engine.cache.clear()
        assert engine.cache.blocks == 0
    assert told[0] == told[1]


@settings(max_examples=200, deadline=None)
@given(block=st.integers(1, 16), room=st.integers(0, 20), asks=ASKS, batched=st.integers(1, 50))
def test_one_call_after_the_other_is_vllms_pool(block: int, room: int, asks: list[Ask], batched: int) -> None:
    """Calls that do not overlap, under eviction, however their prompts are cut into chunks: each is told the cached
    tokens that vLLM's pool finds. (No prompt is of whole blocks, and no answer comes back: see the cache's own tests.)
    """
    asks = [(0, (*prompt, piece(9, 1)) if size(prompt) % block == 0 else prompt, *rest) for _, prompt, *rest in asks]
    asks = [ask for ask in asks if size(ask[1]) % block]
    capacity = room + max([-(-(size(ask[1]) + ask[2] - 1) // block) for ask in asks], default=1)
    engine = made(block, capacity, {"max_batched": batched})
    pool, now = Pool(block, capacity + 1), 0
    for number, ask in enumerate(asks):
        running = Running(job(engine.cache.tree, ask)._replace(answer=()), now)
        engine.submit(running, now)
        while (at := engine.next_ns()) is not None:
            engine.advance(at)
            now = at
        prompt = [(part.ident, n) for part in ask[1] for n in range(part.tokens)]
        assert running.read == pool.serve(prompt, [("answer", number, n) for n in range(ask[2])])


def size(prompt: tuple[Piece, ...]) -> int:
    """A prompt's tokens."""
    return sum(part.tokens for part in prompt)


def ended(engine: Engine, *asks: Ask) -> list[Running]:
    """Calls, all of which end."""
    watched = Watched(engine)
    watched.run(list(asks), {})
    return [watched.ran[index] for index in range(len(asks))]


def test_times_of_two_calls_worked_out_by_hand() -> None:
    """100 tokens: 1,000 ns a step and 10 a token: first at 2,000. A second call, there at 500, computes its 50 tokens
    beside the first's decoding (30 ns, and 101 of cache): first token at 2,000 + 1,000 + 500 + 30 + 1,010.
    """
    engine = made(16, None, {})
    first, second = ended(engine, (0, (piece(1, 100),), 3, (), None, None), (500, (piece(2, 50),), 1, (), None, None))
    assert first.first_token_ns == 2000
    assert second.first_token_ns == second.done_ns == 4540
    assert first.done_ns == 4540 + 1000 + 30 + 1020


@pytest.mark.parametrize(
    ("queue", "order"), [("fcfs", [0, 1, 2, 3]), ("priority", [0, 3, 2, 1]), ("flow", [0, 2, 3, 1])]
)
def test_queues(queue: str, order: list[int]) -> None:
    """One at a time; three wait behind the first: in their order, by priority, by flow and then priority."""
    hints = [None, None, Hints(priority=1), Hints(priority=5)]
    flows = [None, "background", "interactive", "background"]
    asks: list[Ask] = [(n, (piece(n, 10),), 2, (), hints[n], flows[n]) for n in range(4)]
    ran = ended(made(16, None, {"max_seqs": 1, "queue": queue}), *asks)
    assert sorted(range(4), key=lambda n: ran[n].first_token_ns or 0) == order


def test_a_waiting_call_finds_what_was_scheduled_before_it() -> None:
    """Two calls that come during a step share 64 of 70 tokens: both are admitted in the next, the second reads them."""
    asks: list[Ask] = [(0, (piece(5, 10),), 1, (), None, None)]
    asks += [(n, (piece(1, 64), piece(n + 1, 6)), 1, (), None, None) for n in (1, 2)]
    assert [one.read for one in ended(made(16, None, {}), *asks)] == [0, 0, 64]


def test_an_answer_is_read_by_the_prompt_that_repeats_it() -> None:
    """40 tokens and an answer of 30 in blocks of 16: 64 of the 69 that were computed are read."""
    asks: list[Ask] = [(0, (piece(1, 40),), 30, (piece(2, 30),), None, None)]
    asks += [(90_000, (piece(1, 40), piece(2, 30), piece(3, 10)), 1, (), None, None)]
    asks += [(180_000, (piece(1, 40), piece(4, 30), piece(3, 10)), 1, (), None, None)]
    assert [one.read for one in ended(made(16, None, {}), *asks)] == [0, 64, 32]


def test_a_priority_protects_what_a_call_leaves() -> None:
    """Room for three prompts of two blocks: when a fourth comes the oldest stays if it had priority, else it goes."""
    asks: list[Ask] = [(n * 9000, (piece(n, 8),), 1, (), Hints(3) if n == 1 else None, None) for n in (1, 2, 3, 4)]
    for priorities, read in ((True, 8), (False, 0)):
        engine = made(4, 6, {"priorities": priorities})
        again: list[Ask] = [(90_000, (piece(1, 9),), 1, (), None, None)]
        assert ended(engine, *asks, *again)[-1].read == read


def test_a_hinted_ttl_keeps_a_prompt_across_a_tool_call() -> None:
    """Room for three prompts of two blocks: the oldest, kept for a minute, outlives the second, and later no more."""
    for later_ns, read in ((30_000_000_000, 8), (61_000_000_000, 0)):
        asks: list[Ask] = [(n * 9000, (piece(n, 8),), 1, (), None, None) for n in (1, 2, 3)]
        asks[0] = (9000, (piece(1, 8),), 1, (), Hints(ttl_s=60), None)
        asks += [(later_ns, (piece(4, 8),), 1, (), None, None), (later_ns + 9000, (piece(1, 9),), 1, (), None, None)]
        assert ended(made(4, 6, {}), *asks)[-1].read == read


def test_an_engines_load_is_what_is_left_to_compute() -> None:
    """100 tokens are being computed in 7 blocks; of 50 that wait 32 are cached, and will be in 3 full blocks."""
    engine = made(16, None, {"max_seqs": 1})
    tree = engine.cache.tree
    for now, ident, tokens, overlap in ((0, 1, 100, 0), (1, 2, 50, 32)):
        running = Running(Job(tree.extend(tree.root, [piece(ident, tokens)]), 1), now)
        running.overlap = overlap
        engine.submit(running, now)
        engine.advance(now)
    assert (engine.running, engine.waiting, engine.load()) == (1, 1, (118, 10))


@pytest.mark.parametrize("options", [{"max_seqs": 0}, {"max_batched": 0}])
def test_impossible_engines_are_refused(options: dict[str, int]) -> None:
    """A step takes at least one call and one token."""
    with pytest.raises(ValueError, match="a step must take"):
        made(16, None, options)
