"""Sessions as they come: by law, as recorded, in copies, from midway on; the same on every machine that asks."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import MS, call, chain, write

from keepwarm.harness.planned import Planned
from keepwarm.replayers.arrivals import Arrival, Law, arrivals
from keepwarm.replayers.plan import Schedule
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Call, Segment

SECOND = 1000 * MS
HASHES = st.integers(-(1 << 63), (1 << 63) - 1)
KINDS = ("tools", "system", "user", "answer", "tool_result", "lead", "hidden")
LOADS = st.fixed_dictionaries(
    {
        "law": st.sampled_from([None, "poisson:3/s", "constant:7/m", "gamma:2/s:2.5"]),
        "repeat": st.integers(1, 3),
        "midway": st.integers(0, 5),
        "seed": st.integers(0, 1 << 40),
    }
)


def sessions(count: int, calls: int = 3, apart_ns: int = 0) -> list[list[Call]]:
    """Sessions of some calls each, whose first calls are some time apart; each has texts of its own."""
    return [
        [
            one._replace(append=(Segment(1000 * number + turn, 40 + turn, "user"),))
            for turn, one in enumerate(chain(f"s{number}-", calls, session_start_ns=number * apart_ns))
        ]
        for number in range(count)
    ]


def come(trace: list[list[Call]], law: str | None = None, **options: Any) -> list[Arrival]:
    """All sessions as they come."""
    return list(arrivals(lambda: trace, law=None if law is None else Law.read(law), **options))


def starts(law: str, count: int, seed: int = 0) -> list[int]:
    """When so many sessions of a law come."""
    told = arrivals(lambda: sessions(1), law=Law.read(law), repeat=None, seed=seed)
    return [arrival.start_ns or 0 for arrival in islice(told, count)]


@settings(max_examples=50, deadline=None)
@given(per=st.sampled_from(["s", "m", "h"]), rate=st.integers(1, 5000), count=st.integers(2, 50))
def test_constant_arrivals_are_exactly_as_far_apart_as_their_rate_says(per: str, rate: int, count: int) -> None:
    """12/m is a session every 5 s, from the first on."""
    apart = round({"s": 1, "m": 60, "h": 3600}[per] * SECOND / rate)
    assert starts(f"constant:{rate}/{per}", count) == [apart * number for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("law", "mean_s", "cv"), [("poisson:4/s", 0.25, 1.0), ("gamma:30/m:2.5", 2.0, 2.5), ("gamma:10/s:0.3", 0.1, 0.3)]
)
@pytest.mark.parametrize("seed", [0, 7])
def test_drawn_arrivals_have_their_laws_mean_and_variation(law: str, mean_s: float, cv: float, seed: int) -> None:
    """Of 20,000: the mean within four of its standard errors, the coefficient of variation within a tenth."""
    apart = [after - before for before, after in pairwise([0, *starts(law, 20_000, seed)])]
    assert min(apart) >= 0
    assert abs(fmean(apart) / SECOND - mean_s) < 4 * cv * mean_s / 20_000**0.5
    assert abs(pstdev(apart) / fmean(apart) - cv) < cv / 10


def test_poisson_arrivals_are_exponential() -> None:
    """The share that waits longer than t means is e to the -t, to two in a hundred."""
    apart = [(after - before) / SECOND for before, after in pairwise([0, *starts("poisson:1/s", 10_000, 3)])]
    for means, share in ((0.5, 0.6065), (1, 0.3679), (2, 0.1353), (3, 0.0498)):
        assert abs(sum(one > means for one in apart) / len(apart) - share) < 0.02


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 7), load=LOADS, of=st.integers(1, 4))
def test_all_who_ask_draw_the_same_and_shards_are_the_whole(count: int, load: dict[str, Any], of: int) -> None:
    """Twice the same; every of-th from each place on, put together by place, is all of it."""
    trace = sessions(count)
    whole = come(trace, **load)
    assert come(trace, **load) == whole
    assert len(whole) == count * load["repeat"]
    shards = [list(islice(come(trace, **load), number, None, of)) for number in range(of)]
    assert [shards[place % of][place // of] for place in range(len(whole))] == whole


def test_another_seed_is_another_draw() -> None:
    """Of times and of the places where sessions begin; constant times have no seed."""
    assert starts("poisson:1/s", 5, 1) != starts("poisson:1/s", 5, 2)
    assert starts("constant:1/s", 5, 1) == starts("constant:1/s", 5, 2)
    trace = sessions(20, calls=50)
    over = {seed: [one.over for one in come(trace, midway=20, seed=seed)] for seed in (1, 2)}
    assert over[1] != over[2]


@settings(max_examples=100, deadline=None)
@given(
    found=st.lists(st.tuples(HASHES, st.integers(0, 1 << 30), st.sampled_from(KINDS)), min_size=1, max_size=12),
    shared=st.sets(st.integers(0, 11)),
    repeat=st.integers(2, 4),
)
def test_a_copy_has_texts_of_its_own_but_for_what_all_share(
    found: list[tuple[int, int, str]], shared: set[int], repeat: int
) -> None:
    """Tools, system and what sessions share is the same in all copies; every other segment is in none; where two of a
    trace's are the same, so are they in a copy. Tokens, names and all else stay, and copy 0 is the trace itself.
    """
    held = frozenset(segment[0] for number, segment in enumerate(found) if number in shared)
    one = call("c", append=tuple(Segment(*segment, answer_of="b") for segment in found))
    copies = come([[one]], repeat=repeat, shared=held)
    assert [arrival.copy for arrival in copies] == list(range(repeat))
    assert copies[0].calls == [one]
    for before, after in pairwise([arrival.calls[0] for arrival in copies]):
        assert before.prompt_tokens == after.prompt_tokens == one.prompt_tokens
        assert after._replace(append=()) == one._replace(append=())
        for old, new in zip(before.append, after.append, strict=True):
            common = old.kind in ("tools", "system") or old.hash in held
            assert (old.hash == new.hash) == common
            assert old._replace(hash=0) == new._replace(hash=0)
            assert -(1 << 63) <= new.hash < 1 << 63
    own = [number for number, (ident, _, kind) in enumerate(found) if kind not in KINDS[:2] and ident not in held]
    for copy in copies:
        got = [copy.calls[0].append[number].hash for number in own]
        assert len(set(got)) == len({found[number][0] for number in own})


def test_what_a_copy_shares_is_told_by_the_trace(tmp_path: Path) -> None:
    """Of a trace on disk: a lead that two sessions have stays, what one session alone has does not."""
    trace = []
    for number in range(2):
        one = sessions(2, calls=2, apart_ns=1)[number]
        lead = (Segment(7, 90, "lead"), Segment(80 + number, 20, "system"))
        trace.append([one[0]._replace(append=(*lead, *one[0].append)), one[1]])
    planned = Planned(write(tmp_path / "t.parquet", *trace), at_once=1, repeat=2)
    first, copied = (
        [[segment.hash for segment in call.append] for arrival in planned.arrivals() for call in arrival.calls][at:][:4]
        for at in (0, 4)
    )
    assert first == [[7, 80, 0], [1], [7, 81, 1000], [1001]]
    assert [one[:2] for one in (copied[0], copied[2])] == [[7, 80], [7, 81]]
    assert not {copied[0][2], copied[1][0], copied[2][2], copied[3][0]} & {0, 1, 1000, 1001}
    assert planned.planned_calls == 8


def test_recorded_sessions_come_as_far_apart_as_they_did_and_copies_behind_them() -> None:
    """At 0, 10 and 20 s, then the copy as far behind as the sessions are apart; at twice the speed in half the time."""
    trace = [
        [one._replace(session_start_ns=(one.session_start_ns or 0) + 5)] for one, *_ in sessions(3, 1, 10 * SECOND)
    ]
    told = [arrival.start_ns for arrival in come(trace, recorded=True, repeat=2)]
    assert told == [second * SECOND for second in (0, 10, 20, 30, 40, 50)]
    told = [arrival.start_ns for arrival in come(trace, recorded=True, repeat=2, speed=2.0)]
    assert told == [second * SECOND for second in (0, 5, 10, 15, 20, 25)]


def test_copies_of_what_started_at_one_time_do_not_all_start_then() -> None:
    """Of one session, or of some that began together: a load that is bounded by time alone needs time between."""
    for count in (1, 3):
        told = arrivals(lambda count=count: sessions(count), recorded=True, repeat=None)  # type: ignore[misc]
        starts_ns = [arrival.start_ns or 0 for arrival in islice(told, 100 * count)]
        assert starts_ns[-1] > SECOND / 100


def test_only_the_first_sessions_begin_midway_at_any_of_their_calls() -> None:
    """Of 4,000 sessions of ten calls each place is drawn about as often; the 4,001st and all later are whole."""
    trace = sessions(10, calls=10)
    found = [one.over for one in islice(arrivals(lambda: trace, repeat=None, midway=4000, seed=5), 4100)]
    assert set(found[4000:]) == {0}
    counts = [found[:4000].count(place) for place in range(10)]
    assert sum(counts) == 4000
    assert all(abs(count - 400) < 80 for count in counts)  # four standard deviations


def test_without_an_end_there_are_always_more_but_of_nothing() -> None:
    """An endless repeat of an empty trace ends."""
    assert len(list(islice(arrivals(lambda: sessions(2), repeat=None), 1000))) == 1000
    assert list(arrivals(list, repeat=None)) == []


def test_copies_that_run_at_once_are_told_apart() -> None:
    """A schedule runs a session and its copy side by side: each call twice, each copy with a prompt of its own."""
    schedule: Schedule[Any] = Schedule(come(sessions(1, calls=2), repeat=2), at_once=2)
    asked = []
    while schedule.next_due(0) is not None:
        planned = schedule.pop()
        asked.append((planned.call.call, planned.copy, planned.prompt[0].ident))
        schedule.started(planned, 0)
        schedule.ended(planned, 0)
    assert sorted(one[:2] for one in asked) == [("s0-0", 0), ("s0-0", 1), ("s0-1", 0), ("s0-1", 1)]
    assert len({one[2] for one in asked}) == 4


BAD = """
    poisson poisson: poisson:0/s poisson:1 poisson:1/d poisson:-1/s poisson:1.2.3/s poisson:./s burst:1/s constant:1/s:2
    poisson:1/s:2 gamma:1/s: gamma:1/s:0 gamma:1/s:1000 constant:9999999/s poisson:1/s/s
"""


@pytest.mark.parametrize("text", ["", *BAD.split()])
def test_what_is_no_law_is_told(text: str) -> None:
    """With what would be one."""
    with pytest.raises(InputError, match=r"--arrivals .*: expected poisson:RATE/s"):
        Law.read(text)
