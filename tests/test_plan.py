"""Schedule: which call is due when, after which others; and the prompts it hands out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Any, NamedTuple
from zlib import crc32

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from replays import scheduled, write

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.plan import Planned, Schedule, check
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import After, Call, Segment
from keepwarm.traces.store import refers_well


def call(name: str, *after: After, session: str = "s", agent: str = "a", **fields: Any) -> Call:
    """A call of ten prompt tokens of its own."""
    told: dict[str, Any] = {"role": "main", "turn": 0, "start_ns": 0, "end_ns": 0, "keep": 0, "origin": "synthetic"}
    told |= {"usage_source": "absent", "write_source": "absent", "append": (Segment(crc32(name.encode()), 10, "user"),)}
    return Call(**{**told, "session": session, "agent": agent, "call": name, "after": after, **fields})


def end(name: str, gap: int) -> After:
    """So long after a call's end."""
    return After(name, "end", gap, "tool")


def start(name: str, gap: int) -> After:
    """So long after a call's start."""
    return After(name, "start", gap, "subagent")


def name(planned: Planned) -> str:
    """The name of a planned call."""
    return planned.call.call


class Ran(NamedTuple):
    """A call that ran: when it was due, sent, and done."""

    call: Call
    due: int
    sent: int
    done: int


def drive(schedule: Schedule[Any], lasting: int | dict[str, int] = 100) -> list[Ran]:
    """Run a schedule on a clock of its own, each call sent when it is due; what ran, in the order of sending."""
    running: list[tuple[int, int, Planned]] = []
    ran: list[Ran] = []
    now = 0
    while True:
        due = schedule.next_due(now)
        if running and (due is None or running[0][0] <= due):
            now, _, done = heappop(running)
            schedule.ended(done, now)
        elif due is not None:
            now = max(now, due)
            planned = schedule.pop()
            sent = planned.call
            schedule.started(planned, now)
            lasts = lasting if isinstance(lasting, int) else lasting[sent.call]
            heappush(running, (now + lasts, len(ran), planned))
            ran.append(Ran(sent, planned.due_ns, now, now + lasts))
        else:
            return ran


def dues(*sessions: list[Call], **options: Any) -> dict[str, int]:
    """When each call was due; each takes 100."""
    return {ran.call.call: ran.due for ran in drive(scheduled(sessions, **options))}


def test_a_call_is_due_at_the_latest_of_its_edges() -> None:
    """d waits for 5 after b's end at 170, 90 after c's start at 140, 230 after a's end at 100: due at 330."""
    calls = [call("a"), call("b", start("a", 70)), call("c", end("a", 40))]
    calls.append(call("d", end("b", 5), start("c", 90), end("a", 230)))
    assert dues(calls) == {"a": 0, "b": 70, "c": 140, "d": 330}


def test_two_edges_to_one_call_both_count() -> None:
    """30 after a's start and 10 after its end, at 100."""
    assert dues([call("a"), call("b", start("a", 30), end("a", 10))])["b"] == 110
    assert dues([call("a"), call("b", end("a", 7), end("a", 10))])["b"] == 110


def test_calls_without_edges_are_due_at_their_sessions_start() -> None:
    """Sessions recorded at 1,000 and 1,250 start at 0 and 250, all their calls without edges with them."""
    first = [call("a", session_start_ns=1000), call("b", session_start_ns=1000)]
    second = [call("c", session="t", session_start_ns=1250)]
    assert dues(first, second) == {"a": 0, "b": 0, "c": 250}


def test_speed_divides_gaps_and_starts() -> None:
    """At speed 4 a gap of 200 is 50 and a start at 1,000 is 250; how long calls take is not the plan's."""
    first = [call("a", session_start_ns=0), call("b", end("a", 200), session_start_ns=0)]
    second = [call("c", session="t", session_start_ns=1000)]
    assert dues(first, second, speed=4) == {"a": 0, "b": 150, "c": 250}


def test_gaps_are_cut_before_they_are_divided() -> None:
    """Capped at 80 and then halved: 200 becomes 40, 60 becomes 30."""
    calls = [call("a"), call("b", end("a", 200)), call("c", end("a", 60))]
    assert dues(calls, speed=2, gap_cap_ns=80) == {"a": 0, "b": 140, "c": 130}


def test_at_once_runs_so_many_sessions_in_their_order() -> None:
    """Two at a time: the third starts when the shortest of the first two has ended, not when it was recorded."""
    sessions = [[call(n, session=n, session_start_ns=at)] for n, at in (("a", 0), ("b", 5), ("c", 9), ("d", 10**9))]
    ran = drive(scheduled(sessions, at_once=2), {"a": 300, "b": 100, "c": 50, "d": 10})
    assert [(r.call.call, r.due) for r in ran] == [("a", 0), ("b", 0), ("c", 100), ("d", 150)]


def test_a_session_keeps_its_place_until_its_last_call_ended() -> None:
    """One at a time: the second session waits for both calls of the first and the gap between them."""
    sessions = [[call("a"), call("b", end("a", 1000))], [call("c", session="t")]]
    assert dues(*sessions, at_once=1) == {"a": 0, "b": 1100, "c": 1200}


@pytest.mark.parametrize("options", [{}, {"at_once": 3}])
def test_sessions_are_read_as_they_are_needed(options: dict[str, Any]) -> None:
    """Of 10,000 sessions no more than a few are taken before those ahead of them have begun."""
    taken = 0

    def sessions() -> Iterator[list[Call]]:
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield [call(f"c{number}", session=f"s{number}", session_start_ns=number * 1000)]

    schedule, ahead, now = scheduled(sessions(), **options), 0, 0
    for sent in range(10_000):
        due = schedule.next_due(now)
        assert due is not None
        now = max(now, due)
        planned = schedule.pop()
        ahead = max(ahead, taken - sent)
        schedule.started(planned, now)
        schedule.ended(planned, now + 10)
    assert schedule.next_due(now) is None
    assert ahead <= 5


def test_a_failure_skips_the_rest_of_its_session_once() -> None:
    """a and b run, c is due, d and e wait. a fails: c, d, e are skipped; b fails later: nothing more is."""
    calls = [
        call("a"),
        call("b"),
        call("c", start("a", 10)),
        call("d", end("a", 0)),
        call("e", end("d", 0), end("b", 0)),
    ]
    other = [call("x", session="t", session_start_ns=0)]
    schedule = scheduled([calls, other])
    schedule.next_due(0)
    a, b, x = (schedule.pop() for _ in range(3))
    assert [name(c) for c in (a, b, x)] == ["a", "b", "x"]
    for sent in (a, b, x):
        schedule.started(sent, 0)
    assert sorted(c.call for c in schedule.failed(a)) == ["c", "d", "e"]
    assert schedule.failed(b) == []
    schedule.ended(x, 5)
    assert schedule.next_due(5) is None
    assert list(schedule.rest()) == []


def test_an_answer_after_a_failure_lets_nothing_go() -> None:
    """b is answered after a has failed: what waited for it is not asked, and the next session has its place."""
    calls = [call("a"), call("b"), call("c", end("b", 0))]
    schedule = scheduled([calls, [call("x", session="t")]], at_once=1)
    schedule.next_due(0)
    a, b = (schedule.pop() for _ in range(2))
    schedule.started(a, 0)
    schedule.started(b, 0)
    assert [c.call for c in schedule.failed(a)] == ["c"]
    assert schedule.next_due(1) is None
    schedule.ended(b, 2)
    assert schedule.next_due(2) == 2
    assert name(schedule.pop()) == "x"


def test_rest_is_all_that_was_never_popped() -> None:
    """Of two sessions begun one call is popped; due ones, waiting ones and sessions not begun are the rest."""
    sessions = [
        [call(f"{s}{n}", *edges, session=s) for n, edges in enumerate([(), (), (end(f"{s}0", 1),)])] for s in "abcd"
    ]
    schedule = scheduled(sessions, at_once=2)
    schedule.next_due(0)
    popped = name(schedule.pop())
    every = {c.call for session in sessions for c in session}
    rest = [c.call for c, _ in schedule.rest()]
    assert len(rest) == len(every) - 1
    assert set(rest) == every - {popped}


@pytest.mark.parametrize(("ahead", "read"), [(0, 2), (5, 4), (100, 9)])
def test_sessions_are_read_so_many_calls_ahead_and_no_more(ahead: int, read: int) -> None:
    """Before anything runs; what is due, and in which order, is the same."""
    taken = []

    def sessions() -> Iterator[list[Call]]:
        for number in range(9):
            taken.append(number)
            names = f"a{number}", f"b{number}"
            yield [call(name, session=f"s{number}", session_start_ns=number * 10) for name in names]

    schedule = scheduled(sessions(), ahead=ahead)  # type: ignore[arg-type]
    assert schedule.next_due(0) == 0
    assert len(taken) == read
    assert [ran[0].call for ran in drive(schedule)] == [f"{letter}{number}" for number in range(9) for letter in "ab"]


def test_nothing_is_due_in_an_empty_trace() -> None:
    """No session: nothing is ever due, nothing is left."""
    schedule = scheduled([])
    assert schedule.next_due(0) is None
    assert list(schedule.rest()) == []


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([call("a", end("x", 0))], "call a: field after names 'x', expected an earlier call of its session"),
        ([call("a", end("b", 0)), call("b")], "call a: field after names 'b', expected an earlier call"),
        ([call("a", end("a", 0))], "call a: field after names 'a', expected an earlier call"),
        ([call("a", prompt_parent="x")], "call a: field prompt_parent names 'x', expected an earlier call"),
        ([call("a", prompt_parent="b"), call("b")], "call a: field prompt_parent names 'b', expected an earlier call"),
        ([call("a"), call("b", After("a", "begin", 0, "tool"))], "call b: field after has trigger 'begin'"),
        ([call("a"), call("a")], "call a: field call: expected a name that no other call"),
        (
            [call("a"), call("b", prompt_parent="a", keep=11)],
            "call b: field keep is 11, expected at most the tokens of",
        ),
        ([call("a", keep=3)], "call a: field keep is 3, expected 0 without a prompt_parent"),
        ([call("a"), call("b", prompt_parent="a", keep=-1)], "call b: field keep is -1"),
    ],
)
def test_bad_references_are_one_line(calls: list[Call], said: str) -> None:
    """What a call refers to must be an earlier call of its session; the error names the call and the field."""
    with pytest.raises(InputError) as error:
        drive(scheduled([calls]))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@st.composite
def referring(draw: st.DrawFn) -> list[list[Call]]:
    """Two sessions of calls that refer to one another, most of them well."""
    back = st.sampled_from((1, 1, 1, 1, 2, 3, 0, -1))
    kept = st.sampled_from((0, 0, 3, 10, 10, 20, 11, -1))
    told = st.tuples(st.none() | back, kept, st.lists(back, max_size=1), st.sampled_from((False,) * 6 + (True,)))
    sessions = []
    for session in "st":
        calls: list[Call] = []
        for number, (parent, keep, after, again) in enumerate(draw(st.lists(told, min_size=1, max_size=4))):
            names = ("abcde"[max(number - one, 0)] for one in (*after, parent or 0))
            *others, other = names
            more = {"start_ns": number, "session_start_ns": int(session == "t"), "keep": 0}
            if number and parent is not None:
                more |= {"prompt_parent": other, "keep": keep}
            edges = [After(one, "end", 0, "tool") for one in others if number]
            calls.append(call("abcd"[max(number - again, 0)], *edges, session=session, **more))
        sessions.append(calls)
    return sessions


@settings(max_examples=200)
@given(sessions=referring())
def test_columns_tell_what_refers_well_as_the_calls_do(
    tmp_path_factory: pytest.TempPathFactory, sessions: list[list[Call]]
) -> None:
    """Read as columns, a trace is found good exactly where each of its sessions can be replayed."""
    path = write(tmp_path_factory.mktemp("refers") / "t.parquet", *sessions)
    event("well" if refers_well(path) else "ill")
    try:
        for calls in sessions:
            check(calls)
    except InputError:
        assert not refers_well(path)
    else:
        assert refers_well(path)


def test_a_session_in_two_places_is_refused() -> None:
    """The same session twice, as in a directory that holds a trace and a copy of it, is no trace."""
    with pytest.raises(InputError, match="session s: expected its calls once"):
        drive(scheduled([[call("a")], [call("a")]]))


def test_impossible_options_are_refused() -> None:
    """Speed is above 0, and at least one session runs."""
    for options in ({"speed": 0.0}, {"speed": -1.0}, {"at_once": 0}):
        with pytest.raises(ValueError, match="speed must be"):
            scheduled([], **options)  # type: ignore[arg-type]


def test_prompts_grow_are_cut_and_fork() -> None:
    """b keeps all of a, c cuts a inside its second segment, d grows from c though c was asked for before b."""
    lead, task = Segment(7, 30, "lead"), Segment(8, 12, "user")
    calls = [
        call("a", append=(lead, task)),
        call("b", end("a", 500), prompt_parent="a", keep=42, append=(Segment(9, 5, "answer", answer_of="a"),)),
        call("c", end("a", 0), prompt_parent="a", keep=33, append=()),
        call("d", end("b", 0), prompt_parent="c", keep=33, append=(Segment(8, 12, "user"), Segment(4, 0, "user"))),
    ]
    asked = {}
    schedule = scheduled([calls])
    while (due := schedule.next_due(0)) is not None:
        planned = schedule.pop()
        asked[name(planned)] = planned
        schedule.started(planned, due)
        schedule.ended(planned, due)
    sizes = {name: [(p.ident >> 32, p.tokens) for p in request.prompt] for name, request in asked.items()}
    assert list(asked) == ["a", "c", "b", "d"]
    assert sizes == {
        "a": [(7, 30), (8, 12)],
        "b": [(7, 30), (8, 12), (9, 5)],
        "c": [(7, 30), (8, 3)],
        "d": [(7, 30), (8, 3), (8, 12)],
    }
    assert asked["a"].answer == (Piece(9 << 32 | 5, 5, "answer", "a"),)
    assert asked["c"].prompt[1].ident == asked["a"].prompt[1].ident


def test_a_prompt_asked_for_before_its_parent_was() -> None:
    """c grows from b, and b from a, but c comes first and b last: each prompt is what it should be."""
    calls = [
        call("a"),
        call("b", end("a", 900), prompt_parent="a", keep=10),
        call("c", end("a", 0), prompt_parent="b", keep=15),
    ]
    schedule = scheduled([calls])
    totals = {}
    while (due := schedule.next_due(0)) is not None:
        request = schedule.pop()
        totals[request.call.call] = [piece.tokens for piece in request.prompt]
        schedule.started(request, due)
        schedule.ended(request, due)
    assert list(totals) == ["a", "c", "b"]
    assert totals == {"a": [10], "c": [10, 5, 10], "b": [10, 10]}


@st.composite
def traces(draw: st.DrawFn) -> list[list[Call]]:
    """Sessions of agents whose calls follow their predecessor and whatever earlier calls else."""
    sessions, at = [], 0
    for number in range(draw(st.integers(0, 5))):
        at += draw(st.integers(0, 300))
        calls: list[Call] = []
        last: dict[str, str] = {}
        for turn in range(draw(st.integers(1, 7))):
            agent = draw(st.sampled_from("abc"))
            edges = [end(last[agent], draw(st.integers(0, 200)))] if agent in last else []
            for _ in range(draw(st.integers(0, 2)) if calls else 0):
                other = draw(st.sampled_from(calls)).call
                edges.append(After(other, draw(st.sampled_from(["start", "end"])), draw(st.integers(0, 200)), "tool"))
            parent = draw(st.none() | st.sampled_from(calls)) if calls else None
            keep = draw(st.integers(0, parent.prompt_tokens)) if parent else 0
            told: dict[str, Any] = {"prompt_parent": parent.call if parent else None, "keep": keep, "turn": turn}
            told |= {"session": f"s{number}", "agent": agent, "session_start_ns": at}
            calls.append(call(f"s{number}c{turn}", *edges, **told))
            last[agent] = calls[-1].call
        sessions.append(calls)
    return sessions


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "speed": st.sampled_from([0.5, 1.0, 3.0]),
        "gap_cap_ns": st.integers(0, 150),
        "at_once": st.integers(1, 4),
    },
)


@settings(max_examples=100, deadline=None)
@given(sessions=traces(), options=OPTIONS, lasting=st.integers(0, 300))
def test_every_call_runs_once_when_its_edges_say(
    sessions: list[list[Call]], options: dict[str, Any], lasting: int
) -> None:
    """Any trace, any options: each call is popped once, due exactly at the latest of its edges or its session's start,
    never before; an agent's calls keep their order; prompts have as many tokens as planned; no more sessions run than
    asked for, and they start in order. The same again gives the same.
    """
    ran = drive(scheduled(sessions, **options), lasting)
    assert ran == drive(scheduled(iter(sessions), **options), lasting)
    by_name = {r.call.call: r for r in ran}
    assert Counter(r.call.call for r in ran) == Counter(c.call for session in sessions for c in session)
    speed, cap, at_once = options.get("speed", 1.0), options.get("gap_cap_ns", 10**9), options.get("at_once")
    begun: list[int] = []
    for calls in sessions:
        starts = {by_name[c.call].due for c in calls if not c.after}
        assert len(starts) == 1
        begun += starts
        for c in calls:
            edges = [(by_name[e.call], e) for e in c.after]
            waits = [(r.sent if e.trigger == "start" else r.done) + round(min(e.gap_ns, cap) / speed) for r, e in edges]
            assert by_name[c.call].due == max(waits, default=begun[-1])
            assert by_name[c.call].sent >= by_name[c.call].due
        for agent in "abc":
            times = [by_name[c.call].sent for c in calls if c.agent == agent]
            assert times == sorted(times)
    assert begun == sorted(begun)
    if at_once is None:
        first = sessions[0][0].session_start_ns or 0 if sessions else 0
        assert begun == [round(((calls[0].session_start_ns or 0) - first) / speed) for calls in sessions]
    else:
        ends = [max(by_name[c.call].done for c in calls) for calls in sessions]
        assert all(sum(e > b for e in ends[:n]) < at_once for n, b in enumerate(begun))


@settings(max_examples=100, deadline=None)
@given(sessions=traces(), at_once=st.none() | st.integers(1, 3), data=st.data())
def test_however_a_replay_goes_every_call_is_told_once(
    sessions: list[list[Call]], at_once: int | None, data: st.DataObject
) -> None:
    """Calls end, fail or are cut off in any order: each is popped, skipped or part of the rest, only one of them."""
    schedule, running, seen, now = scheduled(sessions, at_once=at_once), [], Counter[str](), 0
    for _ in range(data.draw(st.integers(0, 30))):
        due = schedule.next_due(now)
        if due is not None and (not running or data.draw(st.booleans())):
            now = max(now, due)
            planned = schedule.pop()
            assert sum(piece.tokens for piece in planned.prompt) == planned.call.prompt_tokens
            seen[name(planned)] += 1
            schedule.started(planned, now)
            running.append(planned)
        elif running:
            done = running.pop(data.draw(st.integers(0, len(running) - 1)))
            now += 10
            if data.draw(st.booleans()):
                schedule.ended(done, now)
            else:
                seen.update(skipped.call for skipped in schedule.failed(done))
    seen.update(left.call for left, _ in schedule.rest())
    assert seen == Counter(c.call for session in sessions for c in session)
