"""MarkedCache: managed APIs' rules against dictionaries of what was kept, and by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.job import SECOND, Job, Running, account
from keepwarm.replayers.marked import MarkedCache
from keepwarm.replayers.plain import Plain
from keepwarm.replayers.rules import RULES, Rules
from keepwarm.replayers.times import ServiceTimes
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.model import Breakpoint

Tokens = tuple[tuple[int, int], ...]
Prompt = tuple[Piece, ...]
Marks = tuple[Breakpoint, ...]
PARTS = ("uncached", "cache_read", "cache_write_5m", "cache_write_1h", "cache_write_other")


@dataclass(eq=False)
class Kept:
    """What the oracle keeps: for how long, who wrote it, and how many running calls use it."""

    ttl: int
    writer: Any
    expires: float = float("inf")
    users: int = 0


@dataclass(eq=False)
class Asked:
    """A running call of the oracle: its marks as explicit prefixes with their TTLs, and what it uses."""

    marks: list[tuple[Tokens, int]]
    ends: list[tuple[Tokens, str]]
    uses: list[Tokens] = field(default_factory=list)
    read: int = 0


class Oracle:
    """What is kept, by all tokens up to its end: of every token under runs, of every mark under entries."""

    def __init__(self, rules: Rules, refresh: bool) -> None:
        self.rules, self.refresh = rules, refresh
        self.kept: dict[Tokens, Kept] = {}

    def alive(self, key: Tokens, now: int) -> bool:
        """Whether something is kept; under runs what has expired takes along what goes on from it."""
        kept = self.kept.get(key)
        if kept is None or kept.users or kept.expires > now:
            return kept is not None
        for other in [key] if self.rules.entries else [other for other in self.kept if other[: len(key)] == key]:
            del self.kept[other]
        return False

    def use(self, asked: Asked, key: Tokens) -> None:
        """A call uses something, once."""
        if key not in asked.uses:
            self.kept[key].users += 1
            asked.uses.append(key)

    def acquire(self, prompt: Prompt, marks: Marks, now: int) -> Asked:
        """What a call reads and holds."""
        tokens, ends = (), []
        for part in prompt:
            tokens += tuple((part.ident, n) for n in range(part.tokens))
            ends.append((tokens, part.kind))
        least = self.rules.least(None)
        places = [(tokens[: mark.at], mark.ttl_s) for mark in sorted(marks)[-self.rules.most :]]
        asked = Asked([(key, ttl) for key, ttl in places if len(key) >= least], ends)
        if not asked.marks:
            return asked
        if not self.rules.entries:
            last = asked.marks[-1][0]
            for end in range(1, len(last) + 1):
                if not self.alive(last[:end], now):
                    break
                self.use(asked, last[:end])
            asked.read = len(asked.uses) if len(asked.uses) >= least else 0
            return asked
        for key, _ in reversed(asked.marks):
            found = [] if asked.read else [old for old in self.within(asked, key) if self.alive(old, now)]
            if found:
                asked.read = len(found[0])
                self.use(asked, found[0])
            elif asked.read and self.alive(key, now):
                self.use(asked, key)
        return asked

    def within(self, asked: Asked, mark: Tokens) -> list[Tokens]:
        """The mark's prefixes that a look back comes to, longest first: so many pieces, the mark's own the first, and
        tool results that follow each other are one.
        """
        found = []
        for end in range(len(mark), 0, -1):
            lengths = [len(whole) for whole, _ in asked.ends]
            first, last = (next(n for n, length in enumerate(lengths) if length >= at) for at in (end, len(mark)))
            kinds = [kind for _, kind in asked.ends[first + 1 : last + 1]]
            runs = sum(not (a == b == "tool_result") for a, b in zip(kinds, ["", *kinds], strict=False))
            if runs < self.rules.look_back:
                found.append(mark[:end])
        return found

    def store(self, asked: Asked, now: int) -> None:
        """The answer begins."""
        for mark, ttl in asked.marks:
            for end in [len(mark)] if self.rules.entries else range(1, len(mark) + 1):
                if not self.alive(mark[:end], now):
                    self.kept[mark[:end]] = Kept(ttl, asked)
                self.use(asked, mark[:end])

    def release(self, asked: Asked, now: int) -> None:
        """The answer is over, or the client left."""
        for key in asked.uses:
            kept = self.kept[key]
            kept.users -= 1
            if self.refresh or kept.writer is asked:
                kept.expires = now + kept.ttl * SECOND
        asked.uses = []


KINDS = {1: "system", 2: "tool_result", 3: "tool_result", 4: "user"}
WHOLES = {1: 7, 2: 2, 3: 3, 4: 5}
PIECES = st.sampled_from(sorted(WHOLES)).map(lambda ident: Piece(ident, WHOLES[ident], KINDS[ident]))
PROMPTS = st.builds(
    lambda pieces, cut: (*pieces, Piece(5, cut, "user")), st.lists(PIECES, max_size=5), st.integers(1, 4)
)
MARKS = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([5, 20])), max_size=5)
STEPS = st.lists(
    st.tuples(
        st.integers(0, 8),
        st.one_of(
            st.tuples(st.just("whole"), PROMPTS, MARKS),
            st.tuples(st.just("begin"), PROMPTS, MARKS),
            st.tuples(st.just("store"), st.integers(0, 9)),
            st.tuples(st.just("end"), st.integers(0, 9)),
        ),
    ),
    min_size=3,
    max_size=20,
)


LONG = (Piece(2, 2, "tool_result"), *[Piece(1, 7, "system")] * 4, Piece(5, 1, "user"))
EXPIRED = [
    (0, ("begin", LONG, [(1, 5)])),
    (0, ("whole", LONG, [(0, 5), (1, 5)])),
    (5, ("store", 0)),
    (0, ("whole", (*LONG[:2], LONG[-1]), [(1, 5)])),
]
"""A call's prompt is kept by another meanwhile, and has expired, in two parts, as the call keeps it itself."""


@settings(max_examples=500, deadline=None)
@example(entries=False, look_back=1, least=1, most=2, refresh=False, inside=False, steps=EXPIRED)
@given(
    entries=st.booleans(),
    look_back=st.integers(1, 5),
    least=st.sampled_from([1, 6]),
    most=st.integers(1, 3),
    refresh=st.booleans(),
    inside=st.booleans(),
    steps=STEPS,
)
def test_what_is_read_is_what_was_kept(
    entries: bool,
    look_back: int,
    least: int,
    most: int,
    refresh: bool,
    inside: bool,
    steps: list[tuple[int, tuple[Any, ...]]],
) -> None:
    """Overlapping calls over prompts that share prefixes, marked at pieces' ends or inside them, that answer or leave
    before: each reads what a plain dictionary of marks says.
    """
    rules = Rules("now", entries=entries, look_back=look_back, minimum={"*": least}, most=most)
    tree = PromptTree()
    cache, oracle = MarkedCache(tree, rules, refresh=refresh), Oracle(rules, refresh)
    running: list[tuple[Running, Any, Asked]] = []
    now = 0

    def end(index: int) -> None:
        call, lease, asked = running.pop(index)
        cache.end(call, lease, now)
        oracle.release(asked, now)
        tree.prune(call.job.prompt)

    def store(index: int) -> None:
        call, lease, asked = running[index]
        cache.first_token(call, lease, now)
        oracle.store(asked, now)

    for later, (name, *what) in steps:
        now += later * SECOND
        if name in ("whole", "begin"):
            prompt, told = what
            ends = [sum(part.tokens for part in prompt[: n + 1]) for n in range(len(prompt))]
            marks = tuple(Breakpoint(max(ends[at % len(ends)] - inside, 1), ttl) for at, ttl in told)
            call = Running(Job(tree.extend(tree.root, prompt), 1, marks=marks), now)
            lease, asked = cache.begin(call, now), oracle.acquire(prompt, marks, now)
            assert call.read == asked.read
            running.append((call, lease, asked))
            if name == "whole":
                store(-1)
                end(-1)
        elif running:
            (store if name == "store" else end)(what[0] % len(running))
    while running:
        end(0)
    cache.clear()
    for node in [node for node in below(tree) if not node.children]:
        tree.prune(node)
    assert tree.root.children == {}


def below(tree: PromptTree) -> list[Any]:
    """All nodes of a tree."""
    found = [tree.root]
    for node in found:
        found += node.children.values()
    return found


def prompt(*pieces: tuple[int, int]) -> Prompt:
    """A prompt of pieces given as (ident, tokens)."""
    return tuple(Piece(ident, count, "user") for ident, count in pieces)


class Service:
    """A worker with managed rules whose prompts take 1 s and answers no time."""

    def __init__(self, rules: str | Rules = "managed", **options: Any) -> None:
        self.tree = PromptTree()
        told = RULES[rules] if isinstance(rules, str) else rules
        self.cache = MarkedCache(self.tree, told, **options)
        self.worker = Plain(self.cache, times=ServiceTimes(base_s=1, prefill_tps=1e15, decode_tps=1))

    def begin(
        self, asked: Prompt, now_s: float, marks: Marks = (), *, output: int = 1, model: str | None = None
    ) -> Running:
        """A call arrives, after all that happened up to then."""
        now_ns = round(now_s * SECOND)
        self.worker.advance(now_ns)
        job = Job(self.tree.extend(self.tree.root, asked), output, prompt((77, 5)), marks, model=model)
        running = Running(job, now_ns)
        self.worker.submit(running, now_ns)
        return running

    def parts(
        self, asked: Prompt, now_s: float, marks: Marks = (), *, output: int = 1, model: str | None = None
    ) -> tuple[int, ...]:
        """The account of a call: uncached, read, and the writes for 5 minutes, for 1 hour and for any other time; 0
        where an API does not tell them.
        """
        running = self.begin(asked, now_s, marks, output=output, model=model)
        while running.done_ns is None:
            self.worker.advance(self.worker.next_ns() or 0)
        told = account(running)
        parts = tuple(told[name] or 0 for name in PARTS)
        assert sum(parts) == told["prompt"]
        untold = [None] * 3 if told["write_source"] == "inferred" else [told[name] for name in PARTS[2:]]
        assert [told[name] for name in PARTS[2:]] == untold
        return parts

    def read(self, asked: Prompt, now_s: float, marks: Marks = (), **more: Any) -> int:
        """What a call reads."""
        return self.begin(asked, now_s, marks, **more).read


def five(*ats: int) -> Marks:
    """Marks for five minutes."""
    return tuple(Breakpoint(at, 300) for at in ats)


def test_nothing_is_cached_past_the_last_mark() -> None:
    """47 tokens, marked after 30 for an hour and after 42 for five minutes: 5 are never cached, nor is the answer."""
    service, asked = Service(), prompt((1, 30), (2, 17))
    marks = (Breakpoint(42, 300), Breakpoint(30, 3600))
    assert service.parts(asked, 0, marks) == (5, 0, 12, 30, 0)
    assert service.parts(asked, 2, marks) == (5, 42, 0, 0, 0)
    longer = prompt((1, 30), (2, 17), (77, 5), (4, 4))
    assert service.parts(longer, 4, five(56)) == (0, 42, 14, 0, 0)
    assert service.parts(prompt((1, 30), (2, 17), (77, 5), (5, 4)), 6, five(56)) == (0, 52, 4, 0, 0)


def test_without_marks_nothing_is_cached() -> None:
    """A prompt without marks is neither written nor read, though it is cached by another's mark."""
    for rules in ("managed", "anthropic"):
        service, asked = Service(rules), prompt((1, 3000))
        assert service.parts(asked, 0) == (3000, 0, 0, 0, 0)
        service.parts(asked, 2, five(3000))
        assert service.parts(asked, 4) == (3000, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("later_s", "expected"), [(300, (0, 42, 0, 0, 0)), (301, (0, 30, 12, 0, 0)), (7200, (0, 0, 12, 30, 0))]
)
def test_each_mark_has_its_own_ttl(later_s: int, expected: tuple[int, ...]) -> None:
    """Written by a call that ends at 1 s: under five minutes later all is read, then the hour's tokens alone are read
    and the five minutes' are written again; after two hours, all.
    """
    for rules in (RULES["managed"], RULES["anthropic"]._replace(minimum={"*": 1})):
        service, marks = Service(rules), (Breakpoint(30, 3600), Breakpoint(42, 300))
        service.parts(prompt((1, 42)), 0, marks)
        assert service.parts(prompt((1, 42)), later_s, marks) == expected


def test_a_call_renews_only_what_is_before_its_last_mark() -> None:
    """A call at 200 s whose mark is at 20 renews 20 tokens; the 10 behind it expire after 300 s from their write."""
    service, asked = Service(), prompt((1, 30))
    service.parts(asked, 0, five(30))
    service.parts(asked, 200, five(20))
    assert service.parts(asked, 400, five(30)) == (0, 20, 10, 0, 0)


@pytest.mark.parametrize(("refresh", "reads"), [(True, [0, 10, 10, 0]), (False, [0, 10, 0, 10])])
def test_a_read_renews_the_ttl_or_does_not(refresh: bool, reads: list[int]) -> None:
    """TTL 300, calls of 1 s at 0, 250, 500 and 801: with refresh the third is 249 s after the second's end and the
    fourth 300 s after the third's, too late; without, the third comes too late and writes for the fourth.
    """
    service = Service(refresh=refresh)
    times = (0, 250, 500, 801 if refresh else 800)
    assert [service.read(prompt((1, 10)), now, five(10)) for now in times] == reads


def test_a_ttl_runs_from_the_end_of_the_answer_that_used_it() -> None:
    """An answer of 1,000 s: while it runs its prompt is there, and so for 300 s more."""
    for later_s, read in ((999, 33), (1299, 33), (1300, 0)):
        service = Service()
        service.begin(prompt((1, 33)), 0, five(33), output=1000)
        assert service.read(prompt((1, 33)), later_s, five(33)) == read


def test_a_ttl_of_ones_own_goes_over_the_marks() -> None:
    """Marks for an hour under a TTL of 60 s: written as other, gone after a minute."""
    service, marks = Service(ttl_ns=60 * SECOND), (Breakpoint(30, 3600),)
    assert service.parts(prompt((1, 30)), 0, marks) == (0, 0, 0, 0, 30)
    assert service.read(prompt((1, 30)), 60, marks) == 30
    assert service.read(prompt((1, 30)), 200, marks) == 0


def test_a_mark_past_the_prompts_end_marks_all_of_it() -> None:
    """A mark at 99 of a prompt of 30 tokens writes 30."""
    assert Service().parts(prompt((1, 30)), 0, five(99)) == (0, 0, 30, 0, 0)


@pytest.mark.parametrize("rules", ["managed", "anthropic", "openai", "openai-priced"])
def test_a_write_is_readable_once_the_first_answer_begins(rules: str) -> None:
    """Two that begin before the first's first token miss; one that begins just then hits."""
    service, asked, marks = Service(rules), prompt((1, 2048)), five(2048)
    reads = [service.read(asked, at, marks, output=50) for at in (0, 0.999999999, 1, 1.5)]
    assert reads == [0, 0, 2048, 2048]


@pytest.mark.parametrize("refresh", [True, False])
def test_a_prompt_that_another_leaves_in_its_middle_lives_as_before(refresh: bool) -> None:
    """While a call of 1,000 s runs another shares half its prompt: for 300 s from the first's end all of it is there,
    then nothing.
    """
    for later_s, read in ((1299, 30), (1301, 0)):
        service = Service(refresh=refresh)
        service.begin(prompt((1, 30)), 0, five(30), output=1000)
        service.parts(prompt((1, 15), (2, 15)), 100, five(30))
        assert service.read(prompt((1, 30)), later_s, five(30)) == read


def test_an_entry_inside_a_piece_is_as_far_as_that_piece() -> None:
    """A mark may stand at the end of the 19th piece after the one in which the entry ends, not of the 20th."""
    for pieces, read in ((19, 1500), (20, 0)):
        service, lead = Service("anthropic"), prompt((1, 2000))
        service.parts(lead, 0, five(1500))
        asked = (*lead, *prompt(*((100 + n, 3) for n in range(pieces))))
        assert service.read(asked, 2, five(2000 + 3 * pieces)) == read


def test_a_call_renews_the_entries_at_all_its_marks() -> None:
    """Two marks, written at 0 and read at 250 from the second: at 500 a prompt that has the first alone finds it."""
    service, asked = Service("anthropic"), prompt((1, 1100), (2, 1100))
    for now_s in (0, 250):
        service.parts(asked, now_s, five(1100, 2200))
    assert service.read(prompt((1, 1100), (3, 9)), 500, five(1100)) == 1100


def test_who_leaves_before_the_answer_writes_nothing() -> None:
    """Of two that ask the same at once one leaves: nothing is readable until the other's answer begins, then all is."""
    service, asked, marks = Service(), prompt((1, 50)), five(50)
    leaves, _ = service.begin(asked, 0, marks), service.begin(asked, 0, marks)
    service.worker.cancel(leaves, SECOND // 2)
    assert service.read(asked, 0.6, marks) == 0
    assert service.read(asked, 1, marks) == 50


def test_a_mixed_ttl_bill() -> None:
    """Read up to A = 2,000, for an hour from there to the last hour mark B, for five minutes to the last mark C."""
    service = Service("anthropic")
    first, whole = prompt((1, 2000)), prompt((1, 2000), (2, 1500), (3, 700), (4, 60))
    service.parts(first, 0, (Breakpoint(2000, 3600),))
    marks = (Breakpoint(2000, 3600), Breakpoint(3500, 3600), Breakpoint(4200, 300))
    assert service.parts(whole, 2, marks) == (60, 2000, 700, 1500, 0)


def test_only_the_last_four_marks_count() -> None:
    """Of five marks the first writes no entry: a prompt that goes another way after it finds nothing."""
    service = Service("anthropic")
    asked = prompt(*((n, 1100) for n in range(1, 6)))
    service.parts(asked, 0, five(1100, 2200, 3300, 4400, 5500))
    assert service.read(prompt((1, 1100), (9, 5)), 2, five(1105)) == 0
    assert service.read(prompt((1, 1100), (2, 1100), (9, 5)), 4, five(2205)) == 2200


def test_entries_are_found_only_where_they_were_written() -> None:
    """A prompt that shares 2,900 of an entry's 3,000 tokens reads none of them; under runs it would read all."""
    for rules, read in (("anthropic", 0), ("managed", 2900)):
        service = Service(rules)
        service.parts(prompt((1, 2900), (2, 100)), 0, five(3000))
        assert service.read(prompt((1, 2900), (3, 100)), 2, five(3000)) == read


@pytest.mark.parametrize(("passed", "read"), [(19, 2000), (20, 0)])
def test_a_mark_looks_back_twenty_positions(passed: int, read: int) -> None:
    """The mark's own position is the first of the twenty. A run of tool results is one."""
    for kind, run in (("user", 1), ("tool_result", 7)):
        service = Service("anthropic")
        lead = prompt((1, 2000))
        service.parts(lead, 0, five(2000))
        more = [Piece(100 + n, 3, "answer") for n in range(passed - 1)]
        more += [Piece(200 + n, 3, kind) for n in range(run)]
        asked = (*lead, *more)
        assert service.read(asked, 2, five(sum(part.tokens for part in asked))) == read
        again = (Breakpoint(2000, 300), *five(sum(part.tokens for part in asked)))
        assert service.read(asked, 2.5, again) == 2000


@pytest.mark.parametrize(
    ("model", "least"),
    [
        ("claude-opus-4-6", 4096),
        ("claude-haiku-4-5-20251001", 4096),
        ("claude-opus-4-7", 2048),
        ("claude-sonnet-4-6", 2048),
        ("claude-opus-4-8", 1024),
        ("claude-opus-4-1", 1024),
        ("claude-sonnet-4-5", 1024),
        ("claude-opus-5", 512),
        (None, 1024),
    ],
)
def test_shorter_prompts_than_a_models_minimum_are_not_cached(model: str | None, least: int) -> None:
    """One token fewer is neither written nor read."""
    service = Service("anthropic")
    for tokens, parts in ((least - 1, (least - 1, 0, 0, 0, 0)), (least, (0, least, 0, 0, 0))):
        asked, marks = prompt((tokens, tokens)), five(tokens)
        service.parts(asked, 0, marks, model=model)
        assert service.parts(asked, 2, marks, model=model) == parts


def test_openai_caches_whole_prompts_in_steps_of_128() -> None:
    """From 1,024 tokens on, without marks; what follows the last whole step is not cached."""
    for tokens, read in ((1023, 0), (1024, 1024), (1151, 1024), (1152, 1152), (3000, 2944)):
        service = Service("openai")
        service.parts(prompt((1, tokens)), 0)
        assert service.read(prompt((1, tokens)), 2) == read
    assert service.read(prompt((1, 1500), (2, 900)), 4) == 1408
    assert service.read(prompt((1, 1000), (2, 900)), 6) == 0


def test_openai_tells_no_writes_but_in_its_priced_form() -> None:
    """What is not told is None, no 0, and part of what is uncached."""
    for rules, written, uncached in (("openai", None, 1300), ("openai-priced", 1300, 0)):
        service = Service(rules)
        running = service.begin(prompt((1, 1300)), 0, ())
        service.worker.advance(10 * SECOND)
        told = account(running)
        assert (told["cache_write_other"], told["uncached"]) == (written, uncached), rules


def test_openais_ttls() -> None:
    """In memory five minutes, or a day, from the last use; in the priced form half an hour."""
    for rules, ttl_s in (("openai", 300), ("openai-24h", 86400), ("openai-priced", 1800)):
        for later_s, read in ((ttl_s, 1280), (ttl_s + 1, 0)):
            service = Service(rules)
            service.parts(prompt((1, 1280)), 0)
            assert service.read(prompt((1, 1280)), later_s) == read


def test_openais_priced_form_keeps_whole_prompts() -> None:
    """A prompt that goes on from a whole one reads it, one that leaves it before its end does not; writes are told."""
    service = Service("openai-priced")
    assert service.parts(prompt((1, 1500), (2, 50)), 0) == (0, 0, 0, 0, 1550)
    assert service.parts(prompt((1, 1500), (2, 50), (3, 9)), 2) == (0, 1550, 0, 0, 9)
    assert service.read(prompt((1, 1500), (4, 50)), 4) == 0


def test_what_nobody_asks_for_again_is_forgotten() -> None:
    """Of 600 prompts that share nothing and each live for five minutes few are still in the tree after the last."""
    service = Service()
    for number in range(600):
        service.parts(prompt((number, 30)), number * 400, five(30))
    assert len(service.tree.root.children) < 5


@settings(max_examples=200, deadline=None)
@given(
    rules=st.sampled_from(sorted(RULES)),
    ttl_s=st.none() | st.just(77),
    calls=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3000)), min_size=1, max_size=4),
            st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([300, 3600])), max_size=6),
            st.integers(0, 1000),
        ),
        max_size=10,
    ),
)
def test_accounts_are_disjoint_and_add_up(rules: str, ttl_s: int | None, calls: list[tuple[Any, Any, int]]) -> None:
    """Of any call under any rules no part is negative and together they are the prompt."""
    service, now_s = Service(rules, ttl_ns=None if ttl_s is None else ttl_s * SECOND), 0.0
    for pieces, marks, later_s in calls:
        now_s += later_s + 1
        parts = service.parts(prompt(*pieces), now_s, tuple(Breakpoint(*mark) for mark in marks))
        assert min(parts) >= 0
        assert not parts[4] or ttl_s or rules in ("openai-24h", "openai-priced")
