"""Cluster: workers behind a router, whole; what agents see of it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.job import SECOND, Event, Job, Running, account
from keepwarm.replayers.marked import MarkedCache
from keepwarm.replayers.plain import KeepBlocks, Plain
from keepwarm.replayers.router import ROUTERS, Router
from keepwarm.replayers.rules import RULES
from keepwarm.replayers.times import ServiceTimes, StepTimes
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.model import Breakpoint, Hints

FAST = StepTimes(fixed_s=0.01, prefill_s=1e-3, decode_s=0.0, kv_s=0.0)
"""A token of prompt takes 1 ms, a step 10 ms more."""


def piece(ident: int, count: int, kind: str = "user") -> Piece:
    """The first tokens of a segment."""
    return Piece(ident, count, kind)


def made(
    workers: int = 1, *, router: str = "round_robin", decoders: int = 0, capacity: int | None = None, **options: Any
) -> Cluster:
    """A cluster of engines with blocks of 16."""
    tree, seed = PromptTree(), options.pop("seed", 0)
    host, guess = options.pop("host", None), options.pop("guess", False)
    engine = {name: options.pop(name) for name in ("max_seqs", "max_batched") if name in options}

    def one() -> Engine:
        below = None if host is None else BlockCache(tree, block=16, capacity=host)
        return Engine(BlockCache(tree, block=16, capacity=capacity), times=FAST, host=below, **engine)

    pool, answering = [one() for _ in range(workers)], [one() for _ in range(decoders)]
    if guess:
        options["guesses"] = [BlockCache(tree, block=16) for _ in range(workers)]
    if decoders:
        options["decoders"] = answering
        options.setdefault("handover", 1e4)
    return Cluster(tree, pool, Router(router, block=16, seed=seed), **options)


def ask(cluster: Cluster, now_s: float, *prompt: Piece, output: int = 1, **told: Any) -> Running:
    """A call arrives, after all that happened up to then."""
    now_ns = round(now_s * SECOND)
    cluster.advance(now_ns)
    return cluster.submit(Job(cluster.tree.extend(cluster.tree.root, prompt), output, **told), now_ns)


def rest(cluster: Cluster) -> list[Event]:
    """All that is still to happen."""
    events = []
    while (at_ns := cluster.next_ns()) is not None:
        events += cluster.advance(at_ns)
    return events


def reads(cluster: Cluster, *asked: Running) -> list[int]:
    """What calls read, once all is over."""
    rest(cluster)
    return [running.read for running in asked]


def four_agents(cluster: Cluster, at: tuple[float, ...] = (0, 0, 0, 0)) -> list[int]:
    """What four sub-agents read that share 2,000 tokens, all of them marked, and differ in 100 more."""
    marks = (Breakpoint(2000, 300), Breakpoint(2100, 300))
    asked = [ask(cluster, at[n], piece(1, 2000), piece(10 + n, 100), marks=marks, output=5) for n in range(4)]
    return reads(cluster, *asked)


@pytest.mark.parametrize("rules", ["managed", "anthropic"])
def test_sub_agents_that_start_together_all_miss_on_a_managed_api(rules: str) -> None:
    """What a call writes is readable when its answer begins, so all four miss; the last of four that come one after the
    other, 1 s apart, finds what the first wrote.
    """
    for at, expected in (((0, 0, 0, 0), [0, 0, 0, 0]), ((0, 0, 0, 1.0), [0, 0, 0, 2000])):
        tree = PromptTree()
        worker = Plain(MarkedCache(tree, RULES[rules]), times=ServiceTimes(base_s=0.5))
        assert four_agents(Cluster(tree, [worker], Router("round_robin", block=16)), at) == expected


def test_sub_agents_that_start_together_share_a_cached_prefix_of_blocks() -> None:
    """The first is computed; the others, which come in its first step, find its 2,000 tokens in 125 blocks."""
    assert four_agents(made()) == [0, 2000, 2000, 2000]


def test_sub_agents_share_only_what_has_been_computed() -> None:
    """Prompts in chunks of 512: when the second is looked at 512 of the shared tokens are there, and two calls fit into
    a step only after the first has been computed.
    """
    found = four_agents(made(max_batched=512))
    assert found[0] == 0
    assert all(0 < read <= 2000 for read in found[1:])


def test_sub_agents_on_two_workers_miss_once_on_each() -> None:
    """Round robin: the first on each worker misses, the second shares."""
    assert four_agents(made(2)) == [0, 0, 2000, 2000]


def test_a_kv_aware_router_follows_the_prefix() -> None:
    """Ten turns of one agent stay on one worker, and each reads what was there before; round robin loses half."""
    for router, homes in (("kv_aware", 1), ("round_robin", 2)):
        cluster, asked, prompt = made(2, router=router), [], [piece(0, 500)]
        for turn in range(10):
            prompt.append(piece(100 + turn, 64))
            asked.append(ask(cluster, turn * 10, *prompt))
        found = reads(cluster, *asked)
        assert len({running.worker for running in asked}) == homes
        assert found[9] == (500 + 9 * 64 if homes == 1 else 500 + 8 * 64) // 16 * 16


def test_a_router_hears_of_a_steps_blocks_when_the_step_is_over() -> None:
    """500 tokens take 0.51 s, in one step or in two: halfway none of another prompt's 480 first ones, or the 256 of the
    step that is over, are known to be there, and all at the end. What was there before the step is known all the time.
    """
    for chunk, halfway in ((8192, 0), (256, 256)):
        cluster = made(2, router="kv_aware", max_batched=chunk)
        first = ask(cluster, 0, piece(0, 500))
        other = cluster.tree.extend(cluster.tree.root, [piece(0, 480), piece(1, 100)])
        for at_s, known in ((0.3, halfway), (0.6, 480)):
            cluster.advance(round(at_s * SECOND))
            seen = [member.view(other).cached for member in cluster.members]
            assert seen == [known if str(at) == first.worker else 0 for at in range(2)]
        ask(cluster, 1, piece(0, 500), piece(2, 300))
        cluster.advance(round(1.1 * SECOND))
        assert max(member.view(other).cached for member in cluster.members) == 480


def test_background_calls_have_workers_for_themselves() -> None:
    """Of three workers the last serves the background, the others everybody else."""
    cluster = made(3, background=1)
    flows = ["background", "interactive", None, "background", "interactive"]
    asked = [ask(cluster, n, piece(n, 50), flow=flow) for n, flow in enumerate(flows)]
    assert [running.worker for running in asked] == ["2", "0", "1", "2", "0"]


def test_a_prompt_is_computed_in_one_pool_and_answered_in_another() -> None:
    """1,000 tokens: 1.01 s to compute, 0.1 s to move, so its first token is out at 1.11 s, and 10 more take
    10 ms each; the next turn computes 112 and moves what the decoder has not: the 10 answered but one, and 93 new.
    """
    cluster = made(1, decoders=1, handover=1e4)
    answer = (piece(2, 11),)
    first = ask(cluster, 0, piece(1, 1000), output=11, answer=answer)
    events = rest(cluster)
    assert [(event.kind, event.running) for event in events] == [("first_token", first), ("done", first)]
    assert (first.first_token_ns, first.done_ns) == (1_110_000_000, 1_210_000_000)
    second = ask(cluster, 5, piece(1, 1000), *answer, piece(3, 93), output=1)
    assert reads(cluster, second) == [992]
    computed, missing = 1104 - 992, 1104 - 1008
    assert second.first_token_ns == 5 * SECOND + 10_000_000 + computed * 1_000_000 + missing * 100_000


def moving(cluster: Cluster, **_: Any) -> Running:
    """800 tokens are computed on worker 0; the next call, which goes on from them, goes to worker 1."""
    ask(cluster, 0, piece(1, 800))
    second = ask(cluster, 10, piece(1, 800), piece(2, 100))
    rest(cluster)
    assert second.worker == "1"
    return second


def test_a_prefix_is_moved_from_a_peer_where_that_is_faster() -> None:
    """800 tokens take 0.8 s to compute: in 0.1 s they are moved; in 0.9 s they are not, but computed."""
    for rate, loaded, took_ms in ((8000.0, 800, 100 + 10 + 100), (890.0, 0, 10 + 900), (None, 0, 10 + 900)):
        second = moving(made(2, peers=rate))
        assert (second.read, second.loaded) == (loaded, loaded)
        assert second.first_token_ns == 10 * SECOND + took_ms * 1_000_000


def test_a_host_tier_brings_back_what_was_evicted() -> None:
    """64 blocks: a second prompt of 60 evicts all but 4 of the first's 50; a tier has them all, and brings 46 of them
    where that is faster than computing them.
    """
    for host, rate, told in ((1000, 5e4, (800, 736)), (1000, 500.0, (64, 0)), (None, None, (64, 0))):
        cluster = made(1, capacity=64, host=host, tier=rate)
        ask(cluster, 0, piece(1, 800))
        ask(cluster, 10, piece(2, 960))
        again = ask(cluster, 20, piece(1, 800), piece(3, 100))
        rest(cluster)
        assert (again.read, again.loaded) == told


def test_speculative_prefill_warms_the_next_turn() -> None:
    """A worker that keeps no answers it did not compute there: the next turn finds the whole answer on the prefill side
    if the hint asked for it, else only the prompt.
    """
    for hints, read in ((Hints(speculative_prefill=True), 1040), (None, 992)):
        cluster = made(1, decoders=1)
        answer = (piece(2, 50),)
        first = ask(cluster, 0, piece(1, 1000), output=50, answer=answer, hints=hints)
        assert [event.running for event in rest(cluster)] == [first, first]
        assert reads(cluster, ask(cluster, 60, piece(1, 1000), *answer, piece(3, 10))) == [read]


def test_a_warm_up_that_cannot_run_is_nobodys_business() -> None:
    """The answer makes the next prompt longer than the prefill worker's cache: no event, no error."""
    cluster = made(1, decoders=1, capacity=64)
    hints = Hints(speculative_prefill=True)
    told = ask(cluster, 0, piece(1, 1000), output=20, answer=(piece(2, 20), piece(3, 90)), hints=hints)
    assert [event.running for event in rest(cluster)] == [told, told]
    assert told.error is None


def test_a_router_that_guesses_does_not_know_of_evictions() -> None:
    """Two blocks of room more than the prompt: another prompt evicts it. Who knows goes to either, by the seed; who
    guesses goes back to where the prompt was.
    """
    homes = {True: set[str | None](), False: set[str | None]()}
    for guess, found in homes.items():
        for seed in range(12):
            cluster = made(2, router="kv_aware", capacity=52, guess=guess, seed=seed)
            first = ask(cluster, 0, piece(1, 800))
            others = [ask(cluster, 10 + n, piece(10 + n, 830)) for n in range(4)]
            again = ask(cluster, 50, piece(1, 800), piece(3, 10))
            rest(cluster)
            if {other.worker for other in others} == {"0", "1"}:
                found.add("same" if again.worker == first.worker else "other")
    assert homes == {True: {"same"}, False: {"same", "other"}}


def test_a_job_that_can_never_fit_ends_with_an_error() -> None:
    """70 blocks where there are 64: done at once, nothing else is disturbed."""
    for decoders in (0, 1):
        cluster = made(1, decoders=decoders, capacity=64)
        big, small = ask(cluster, 0, piece(1, 1120)), ask(cluster, 0, piece(2, 100))
        rest(cluster)
        assert (big.error, big.done_ns, big.first_token_ns) == ("overflow", 0, None)
        assert small.error is None


def test_shadows_tell_what_an_endless_cache_would_have_had() -> None:
    """The worker has no cache at all; the endless one beside it would have read 800 of 900 tokens."""
    tree = PromptTree()
    worker = Plain(KeepBlocks(BlockCache(tree, block=16, capacity=0)), times=ServiceTimes())
    shadows = {"endless": KeepBlocks(BlockCache(tree, block=16))}
    cluster = Cluster(tree, [worker], Router("round_robin", block=16), shadows=shadows)
    ask(cluster, 0, piece(1, 800))
    second = ask(cluster, 10, piece(1, 800), piece(2, 100))
    assert reads(cluster, second) == [0]
    assert second.bounds == {"endless": 800}


def test_a_reset_forgets_all_that_is_not_in_use() -> None:
    """After it the same prompt is computed anew."""
    cluster = made()
    first, again = ask(cluster, 0, piece(1, 100)), ask(cluster, 1, piece(1, 100))
    assert reads(cluster, first, again) == [0, 96]
    cluster.reset_cache()
    assert reads(cluster, ask(cluster, 5, piece(1, 100))) == [0]


def test_members_count_what_was_done() -> None:
    """Two calls of 100 tokens, 96 of them read by the second, answered with 7 tokens each."""
    cluster = made(capacity=100)
    ask(cluster, 0, piece(1, 100), output=7)
    ask(cluster, 5, piece(1, 100), output=7)
    [member] = cluster.members
    worker = member.worker
    assert worker.running == 0
    cluster.advance(5 * SECOND)
    assert (worker.running, worker.kv_used) == (1, 0.07)
    rest(cluster)
    assert (member.prompt_tokens, member.cached_tokens, member.generated_tokens) == (200, 96, 14)
    assert (worker.running, worker.waiting, worker.kv_used, worker.preemptions) == (0, 0, 0.0, 0)


SHAPES = st.fixed_dictionaries(
    {"workers": st.integers(1, 3), "router": st.sampled_from(ROUTERS), "decoders": st.integers(0, 2)},
    optional={
        "capacity": st.integers(8, 40),
        "host": st.integers(0, 60),
        "guess": st.booleans(),
        "max_seqs": st.integers(1, 4),
        "max_batched": st.integers(8, 200),
        "peers": st.just(1e6),
        "tier": st.just(1e6),
    },
)


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32))
def test_every_job_of_any_cluster_ends(shape: dict[str, Any], seed: int) -> None:
    """Jobs of agents that grow their prompts, some of whose clients leave: each that stays is told its first token and
    its end, in the order of time, or an error; the account adds up; nothing stays in use; and again it is the same.
    """
    assert lived(shape, Random(seed)) == lived(shape, Random(seed))


def lived(shape: dict[str, Any], rng: Random) -> list[tuple[Any, ...]]:
    """What happened to 25 jobs."""
    cluster = made(**shape)
    prompts = [[piece(1, 40), piece(10 + n, 20)] for n in range(4)]
    asked: list[Running] = []
    events: list[Event] = []
    now = 0
    for number in range(25):
        now += rng.randint(0, 200_000_000)
        events += cluster.advance(now)
        prompt = rng.choice(prompts)
        answer = (piece(100 + number, rng.randint(1, 30)),)
        hints = Hints(priority=rng.randint(0, 2), ttl_s=rng.choice([None, 1]), speculative_prefill=rng.random() < 0.3)
        node = cluster.tree.extend(cluster.tree.root, prompt)
        job = Job(node, answer[0].tokens, answer if rng.random() < 0.8 else (), hints=hints, session=str(prompt[1]))
        asked.append(cluster.submit(job, now))
        prompt += [*answer, piece(200 + number, rng.randint(1, 40))]
        if rng.random() < 0.2 and (running := [one for one in asked if one.done_ns is None]):
            cluster.cancel(rng.choice(running), now)
    events += rest(cluster)
    assert [event.at_ns for event in events] == sorted(event.at_ns for event in events)
    ends = [event.running for event in events if event.kind == "done"]
    assert len(set(ends)) == len(ends)
    assert set(ends) == {one for one in asked if one.error != "cancelled"}
    for one in asked:
        if one.error is None:
            assert one.arrived_ns <= (one.first_token_ns or 0) <= (one.done_ns or 0)
            told = account(one)
            assert told["uncached"] >= 0
            assert one.loaded <= one.read < one.job.prompt.end
    workers = [member.worker for member in cluster.members]
    assert all(worker.running == worker.waiting == 0 and not worker.kv_used for worker in workers)
    return [(event.at_ns, event.kind, event.running.read, event.running.worker) for event in events]
