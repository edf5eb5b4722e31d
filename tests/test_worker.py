"""The simulated worker's rules: what a call may read and write under each, and when it answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.replayers.cache import PrefixCache
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.worker import AS_RECORDED, SECOND, Service, ServiceTimes, Worker, account
from keepwarm.traces.model import Breakpoint

Prompt = tuple[Piece, ...]
PARTS = ("uncached", "cache_read", "cache_write_5m", "cache_write_1h", "cache_write_other")


def prompt(*pieces: tuple[int, int]) -> Prompt:
    """A prompt of pieces given as (ident, tokens)."""
    return tuple(Piece(ident, count, "user") for ident, count in pieces)


def engine(block: int = 16, **options: Any) -> Worker:
    """A worker with engine rules."""
    return Worker(PrefixCache(block=block), **options)


def managed(ttl_s: float | str | None = AS_RECORDED, **options: Any) -> Worker:
    """A worker with managed rules."""
    return Worker(PrefixCache(**options), managed=True, ttl_s=ttl_s)


def call(worker: Worker, asked: Prompt, now_s: float = 0, **more: Any) -> Service:
    """One call from beginning to end, all of it at one time."""
    now_ns = round(now_s * SECOND)
    service = worker.begin(asked, 1, now_ns, **more)
    worker.first_token(service, now_ns)
    worker.end(service, now_ns)
    return service


def parts(service: Service) -> tuple[int, ...]:
    """uncached, read, and the writes for 5 minutes, for 1 hour and for any other time."""
    told = account(service)
    return tuple(told[name] for name in PARTS)


@settings(deadline=None)
@given(block=st.integers(1, 32), count=st.integers(1, 200))
def test_an_engine_computes_the_last_token_of_every_prompt(block: int, count: int) -> None:
    """The same prompt again reads all whole blocks before its last token, and writes what whole blocks are left."""
    worker, asked = engine(block), prompt((1, count))
    call(worker, asked)
    again = call(worker, asked)
    read = (count - 1) // block * block
    written = count // block * block - read
    assert parts(again) == (count - read - written, read, 0, 0, written)


def test_an_engine_reads_the_answers_that_are_sent_back() -> None:
    """40 tokens and an answer of 30 in blocks of 16: 64 of them are read by a prompt that repeats both."""
    worker, answer = engine(), prompt((2, 30))
    call(worker, prompt((1, 40)), answer=answer)
    assert call(worker, prompt((1, 40), (2, 30), (3, 10))).read == 64
    assert call(worker, prompt((1, 40), (4, 30), (3, 10))).read == 32


def test_an_engine_that_throws_answers_away_reads_prompts_only() -> None:
    """With outputs not readable the same prompt reads the 32 tokens of the first prompt's whole blocks."""
    worker = engine(outputs_readable=False)
    call(worker, prompt((1, 40)), answer=prompt((2, 30)))
    assert call(worker, prompt((1, 40), (2, 30), (3, 10))).read == 32


def test_an_answer_is_readable_once_it_is_whole() -> None:
    """A call that comes between another's first token and its last finds the prompt, and later the answer too."""
    worker, answer, later = engine(block=1), prompt((2, 30)), prompt((1, 40), (2, 30), (3, 10))
    first = worker.begin(prompt((1, 40)), 30, 0, answer=answer)
    worker.first_token(first, first.first_token_ns)
    assert worker.begin(later, 1, first.first_token_ns).read == 40
    worker.end(first, first.done_ns)
    assert worker.begin(later, 1, first.done_ns).read == 70


def test_managed_rules_cache_nothing_past_the_last_mark() -> None:
    """47 tokens, marked after 30 for an hour and after 42 for five minutes: 5 are never cached, nor is the answer."""
    worker, asked = managed(), prompt((1, 30), (2, 17))
    marks = (Breakpoint(42, 300), Breakpoint(30, 3600))
    assert parts(call(worker, asked, marks=marks, answer=prompt((3, 9)))) == (5, 0, 12, 30, 0)
    assert parts(call(worker, asked, marks=marks)) == (5, 42, 0, 0, 0)
    longer = prompt((1, 30), (2, 17), (3, 9), (4, 4))
    assert parts(call(worker, longer, marks=(Breakpoint(60, 300),))) == (0, 42, 18, 0, 0)


def test_without_marks_managed_rules_cache_nothing() -> None:
    """A prompt without marks is neither written nor read, though it is cached by another's mark."""
    worker, asked = managed(), prompt((1, 30))
    assert parts(call(worker, asked)) == (30, 0, 0, 0, 0)
    call(worker, asked, marks=(Breakpoint(30, 300),))
    assert parts(call(worker, asked)) == (30, 0, 0, 0, 0)


def test_each_mark_has_its_own_ttl() -> None:
    """Six minutes later the hour's tokens are read and the five minutes' are written again; after two hours, all."""
    asked, marks = prompt((1, 42)), (Breakpoint(30, 3600), Breakpoint(42, 300))
    for later_s, expected in ((299, (0, 42, 0, 0, 0)), (360, (0, 30, 12, 0, 0)), (7200, (0, 0, 12, 30, 0))):
        worker = managed()
        call(worker, asked, marks=marks)
        assert parts(call(worker, asked, later_s, marks=marks)) == expected


def test_a_call_renews_only_what_is_before_its_last_mark() -> None:
    """A call at 200 s whose mark is at 20 renews 20 tokens; the 10 behind it expire after 300 s from their write."""
    worker, asked = managed(), prompt((1, 30))
    call(worker, asked, 0, marks=(Breakpoint(30, 300),))
    call(worker, asked, 200, marks=(Breakpoint(20, 300),))
    assert parts(call(worker, asked, 400, marks=(Breakpoint(30, 300),))) == (0, 20, 10, 0, 0)


def test_a_ttl_of_ones_own_goes_over_the_marks() -> None:
    """Marks for an hour under a TTL of 60 s: written as other, gone after a minute, though not under an endless TTL."""
    asked, marks = prompt((1, 30)), (Breakpoint(30, 3600),)
    worker = managed(ttl_s=60)
    assert parts(call(worker, asked, marks=marks)) == (0, 0, 0, 0, 30)
    assert call(worker, asked, 60, marks=marks).read == 0
    endless = managed(ttl_s=None)
    call(endless, asked, marks=marks)
    assert call(endless, asked, 10**8, marks=marks).read == 30


def test_a_mark_past_the_prompts_end_marks_all_of_it() -> None:
    """A mark at 99 of a prompt of 30 tokens writes 30."""
    assert parts(call(managed(), prompt((1, 30)), marks=(Breakpoint(99, 300),))) == (0, 0, 30, 0, 0)


@pytest.mark.parametrize("worker", [engine(block=1), managed()])
def test_parallel_calls_both_miss_and_a_later_one_hits(worker: Worker) -> None:
    """What a call writes is readable from its first token: two that begin before it miss, one at that time hits."""
    asked, marks = prompt((1, 50)), (Breakpoint(49, 300),)
    first = worker.begin(asked, 10, 0, marks=marks)
    second = worker.begin(asked, 10, first.first_token_ns - 1, marks=marks)
    assert (first.read, second.read) == (0, 0)
    worker.first_token(first, first.first_token_ns)
    third = worker.begin(asked, 10, first.first_token_ns, marks=marks)
    assert third.read == 49
    worker.first_token(second, second.first_token_ns)
    for running in (first, second, third):
        worker.end(running, second.done_ns)
    assert worker.cache.blocks == (49 if worker.managed else 50)


def test_a_ttl_runs_from_the_end_of_the_last_answer() -> None:
    """A prompt with a TTL of 10 s whose answer took until 100 s is readable at 109 s, not at 110 s."""
    asked = prompt((1, 33))
    for later_s, read in ((109, 32), (110, 0)):
        worker = engine(ttl_s=10)
        service = worker.begin(asked, 1, 0)
        worker.first_token(service, SECOND)
        worker.end(service, 100 * SECOND)
        assert worker.begin(asked, 1, later_s * SECOND).read == read


def test_service_times() -> None:
    """2 s, then 1,000 uncached tokens at 500 a second, then 9 tokens more at 3 a second: 4 s and 7 s."""
    worker = engine(block=10, service=ServiceTimes(base_s=2, prefill_tps=500, decode_tps=3))
    first = worker.begin(prompt((1, 1000)), 10, 5 * SECOND)
    assert (first.first_token_ns, first.done_ns) == (9 * SECOND, 12 * SECOND)
    worker.first_token(first, first.first_token_ns)
    again = worker.begin(prompt((1, 1000)), 1, 20 * SECOND)
    assert again.read == 990
    assert (again.first_token_ns, again.done_ns) == (22_020_000_000, 22_020_000_000)


def test_speed_divides_ttls_and_service_times_alike() -> None:
    """At speed 10 a TTL of 300 s ends after 30 s, 2 s take 0.2 s, and the account still says 300 s."""
    worker = engine(ttl_s=300, service=ServiceTimes(base_s=2, prefill_tps=1e12, decode_tps=3), speed=10)
    asked = prompt((1, 33))
    service = worker.begin(asked, 4, 0)
    assert (service.first_token_ns, service.done_ns) == (SECOND // 5, 3 * SECOND // 10)
    assert account(service)["write_ttl_s"] == 300
    worker.first_token(service, 0)
    worker.end(service, 0)
    assert worker.begin(asked, 1, 30 * SECOND).read == 0
    worker = engine(ttl_s=300, speed=10)
    call(worker, asked)
    assert worker.begin(asked, 1, 30 * SECOND - 1).read == 32


def test_only_managed_rules_have_recorded_ttls() -> None:
    """Engine rules know no marks, so a TTL as recorded means nothing there."""
    with pytest.raises(ValueError, match="recorded TTLs"):
        engine(ttl_s=AS_RECORDED)


PROMPTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), max_size=4).map(lambda pieces: prompt(*pieces))
MARKS = st.lists(st.builds(Breakpoint, st.integers(0, 100), st.sampled_from([300, 3600])), max_size=4)


@settings(deadline=None)
@given(
    calls=st.lists(st.tuples(PROMPTS, MARKS, st.integers(0, 400)), max_size=12),
    block=st.integers(1, 16),
    capacity=st.none() | st.integers(0, 8),
    rules=st.sampled_from([(False, None), (False, 300), (True, None), (True, 77), (True, AS_RECORDED)]),
)
def test_accounts_are_disjoint_and_add_up(
    calls: list[tuple[Prompt, list[Breakpoint], int]],
    block: int,
    capacity: int | None,
    rules: tuple[bool, float | str | None],
) -> None:
    """Of any call under any rules no part is negative, together they are the prompt, whole blocks are read and no more
    than may be, and the longest TTL written is told.
    """
    is_managed, ttl_s = rules
    worker = Worker(PrefixCache(block=block, capacity=capacity), managed=is_managed, ttl_s=ttl_s)
    now_s = 0
    for asked, marks, later_s in calls:
        now_s += later_s
        service = call(worker, asked, now_s, marks=marks)
        told, total = account(service), sum(piece.tokens for piece in asked)
        assert min(parts(service)) >= 0
        assert sum(parts(service)) == told["prompt"] == total
        last = min(max((mark.at for mark in marks), default=0), total) if is_managed else max(total - 1, 0)
        assert service.read <= last
        assert service.read % block == 0
        wrote = [ttl for ttl, name in ((3600, "cache_write_1h"), (300, "cache_write_5m")) if told[name]]
        if told["cache_write_other"] and ttl_s is not None:
            wrote.append(77)
        assert told["write_ttl_s"] == max(wrote, default=None)
