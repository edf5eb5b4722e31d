"""Prompts out of Claude Code's transcripts: segments that add up to what was reported, kept prefixes, leads, breaks."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transcripts import SALT, Transcript, calls_of, ns, pieces, take, task, text, tool, usage

from keepwarm.traces.claude_code import import_claude_code
from keepwarm.traces.model import Call
from keepwarm.traces.store import read_calls, read_meta

MAIN = "p/s1.jsonl"
OTHER = "claude-sonnet-4-6"


def first(t: Transcript, *, read: int = 0, prompt: int = 1000, **more: Any) -> Transcript:
    """A first call: a question of 33 tokens, a prompt of so many of which so many were read."""
    asked = t.user(0)
    t.answer(5, f"first after {asked}", used=usage(new=3, read=read, w5=prompt - read - 3), **more)
    return t


def then(t: Transcript, at: float, prompt: int, *, read: int | None = None, new: int = 3, **more: Any) -> None:
    """Another question and its answer: it read so many tokens (all but 100 if nothing is said) and wrote the rest."""
    read = max(prompt - new - 100, 0) if read is None else read
    t.user(at)
    t.answer(at + 5, f"m{at}", used=usage(new=new, read=read, w5=prompt - new - read), **more)


def kept(call: Call) -> tuple[str | None, int, str | None]:
    """Whose prompt a call's grows from, how much of it, and why not all."""
    return call.prompt_parent, call.keep, call.prefix_change


def test_a_prompt_keeps_all_of_the_last_one(tmp_path: Path) -> None:
    """The first prompt is lead and question; each later one keeps the whole last one and appends what is new."""
    t = first(Transcript())
    then(t, 10, 1200)
    m1, m2 = calls_of(tmp_path, {MAIN: t})
    assert (kept(m1), pieces(m1)) == ((None, 0, None), [("lead", 967), ("user", 33)])
    assert (kept(m2), pieces(m2)) == ((m1.call, 1000, None), [("answer", 31), ("hidden", 136), ("user", 33)])


def test_the_weights_of_visible_blocks(tmp_path: Path) -> None:
    """Per character 0.31 of answers, 0.347 of results, 0.33 of users' text; 50 a use, 48 a result; 1,100 an image."""
    t = first(Transcript())
    t.lines.pop()
    t.answer(5, "m1", text("y" * 1000), tool("t1"), used=usage(w5=997))
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    t.result(6, "t1", [text("r" * 1000), image])
    t.user(7, [text("u" * 1000), image])
    t.answer(9, "m2", used=usage(read=997, w5=9003))
    _, m2 = calls_of(tmp_path, {MAIN: t})
    parts = dict.fromkeys(kind for kind, _ in pieces(m2))
    assert list(parts) == ["answer", "hidden", "tool_result", "user"]
    answer, hidden, result, user, picture = (tokens for _, tokens in pieces(m2))
    # 310 of text, 50 a use, and the use's name and input: "Bash" and "{}" with what parts them
    assert 360 <= answer <= 370
    assert (result, user, picture) == (347 + 1100 + 48, 330, 1100)
    assert hidden == 10_003 - 1000 - answer - result - user - picture
    assert m2.prompt_tokens == m2.prompt == 10_003


def test_too_many_visible_tokens_are_scaled_down(tmp_path: Path) -> None:
    """Estimates of 31 and 33 in 32 new tokens are cut in proportion, to the last token: 15.5 and 16.5."""
    t = first(Transcript())
    then(t, 10, 1032)
    done, (_, m2) = take(tmp_path, {MAIN: t})
    assert sorted(pieces(m2)) in ([("answer", 15), ("user", 17)], [("answer", 16), ("user", 16)])
    assert (done.scaled, done.hidden) == (32, 0)


def test_a_first_question_longer_than_its_prompt(tmp_path: Path) -> None:
    """Visible text that says more than the whole prompt is cut to the prompt."""
    t = Transcript()
    t.user(0, "x" * 10_000)
    t.answer(5, "m1", used=usage(w5=997))
    [m1] = calls_of(tmp_path, {MAIN: t})
    assert pieces(m1) == [("user", 1000)]


def test_a_compaction_keeps_the_lead(tmp_path: Path) -> None:
    """After a compaction a prompt is lead, summary, and what else is new; the turn goes on counting."""
    t = first(Transcript(), read=15_000, prompt=20_000)
    then(t, 10, 100_000)
    t.user(18, "what was asked before is in the summary")
    t.compact(20)
    t.answer(25, "m3", used=usage(new=3, read=15_000, w5=9_997))
    then(t, 30, 25_100)
    m1, m2, m3, m4 = calls_of(tmp_path, {MAIN: t})
    assert pieces(m1) == [("lead", 15_000), ("lead", 4_967), ("user", 33)]
    assert kept(m3) == (m2.call, 19_967, "compaction")
    assert pieces(m3) == [("hidden", 25_000 - 19_967 - 330), ("user", 330)]
    assert (m3.turn, m3.gap_kind) == (2, "unknown")
    assert kept(m4) == (m3.call, 25_000, None)


def test_a_prompt_below_the_lead_after_a_compaction(tmp_path: Path) -> None:
    """A lead longer than the whole new prompt is cut to it."""
    t = first(Transcript(), prompt=20_000)
    then(t, 10, 100_000)
    t.compact(20)
    t.answer(25, "m3", used=usage(w5=9_997))
    _, m2, m3 = calls_of(tmp_path, {MAIN: t})
    assert (kept(m3), pieces(m3)) == ((m2.call, 10_000, "compaction"), [])


def test_a_microcompaction_keeps_what_stands_before_the_first_cleared_result(tmp_path: Path) -> None:
    """One old result goes from the middle: 1,050 tokens before it are kept, what followed it stands there anew."""
    t = first(Transcript())
    t.lines.pop()
    t.answer(5, "m1", tool("t1", "Read"), used=usage(w5=997, out=50), stop="tool_use")
    t.result(6, "t1", "r" * 1000)
    t.answer(9, "m2", tool("t2", "Read"), used=usage(read=997, w5=445, out=50), stop="tool_use")
    t.result(10, "t2", "q" * 1000)
    t.answer(15, "m3", used=usage(read=1442, w5=445, out=50), stop="end_turn")
    told = {"trigger": "auto", "preTokens": 1890, "tokensSaved": 395, "compactedToolIds": ["t1"]}
    t.system(19, "microcompact_boundary", microcompactMetadata=told)
    then(t, 20, 1890 - 395 + 50 + 33)
    _, m2, m3, m4 = calls_of(tmp_path, {MAIN: t})
    assert pieces(m2) == [("answer", 50), ("tool_result", 395)] == pieces(m3)
    assert kept(m4) == (m3.call, 1050, "microcompaction")
    assert pieces(m4) == [("answer", 50), ("tool_result", 395), ("answer", 50), ("user", 33)]
    assert m4.append[1] == m3.append[1]


def test_a_cleared_result_is_known_by_its_use_not_by_its_text(tmp_path: Path) -> None:
    """Two results of the same text of which the later one is cleared: all before the later one is kept."""
    t = first(Transcript())
    t.lines.pop()
    t.answer(5, "m1", tool("t1", "Read"), used=usage(w5=997, out=50), stop="tool_use")
    t.result(6, "t1")
    t.answer(9, "m2", tool("t2", "Read"), used=usage(read=997, w5=445, out=50), stop="tool_use")
    t.result(10, "t2")
    t.answer(15, "m3", used=usage(read=1442, w5=445, out=50), stop="end_turn")
    t.system(19, "microcompact_boundary", microcompactMetadata={"compactedToolIds": ["t2"]})
    then(t, 20, 1890 - 395 + 50 + 33)
    *_, m3, m4 = calls_of(tmp_path, {MAIN: t})
    assert kept(m4) == (m3.call, 1495, "microcompaction")
    assert pieces(m4) == [("answer", 50), ("user", 33)]


def test_a_microcompaction_of_unknown_results_keeps_the_lead(tmp_path: Path) -> None:
    """Cleared results that are in no line: nothing past the lead is known to be kept."""
    t = first(Transcript())
    then(t, 10, 1200)
    t.system(19, "microcompact_boundary", microcompactMetadata={"compactedToolIds": ["gone"]})
    then(t, 20, 1100)
    _, m2, m3 = calls_of(tmp_path, {MAIN: t})
    assert kept(m3) == (m2.call, 967, "microcompaction")


def test_a_fall_below_half_keeps_the_lead(tmp_path: Path) -> None:
    """A rewind without any boundary line is known by the prompt's size; at half and above all of it is kept."""
    t = first(Transcript(), prompt=200)
    then(t, 10, 1000)
    then(t, 20, 499)
    then(t, 30, 1000)
    then(t, 40, 500)
    _, m2, m3, m4, m5 = calls_of(tmp_path, {MAIN: t})
    assert kept(m3) == (m2.call, 167, "shrunk")
    assert kept(m5) == (m4.call, 500, "shrunk")
    assert pieces(m5) == []


def test_dropped_thinking_keeps_all_of_the_smaller_prompt(tmp_path: Path) -> None:
    """A prompt a little smaller than the last one is the last one's beginning, and nothing is left for new blocks."""
    t = first(Transcript())
    then(t, 10, 950)
    m1, m2 = calls_of(tmp_path, {MAIN: t})
    assert (kept(m2), pieces(m2)) == ((m1.call, 950, "shrunk"), [])


def test_another_model_shares_nothing_and_the_first_one_takes_up_its_own(tmp_path: Path) -> None:
    """A switch keeps no token, though the same messages stand there; the way back keeps the model's own last prompt."""
    t = first(Transcript())
    then(t, 10, 1100, model=OTHER)
    then(t, 20, 1200)
    then(t, 30, 1300, model=OTHER)
    m1, m2, m3, m4 = calls_of(tmp_path, {MAIN: t})
    assert (m2.keep, m2.prefix_change) == (0, "model_switch")
    assert pieces(m2) == [("lead", 967), ("user", 33), ("answer", 31), ("hidden", 36), ("user", 33)]
    assert m2.append[0].hash != m1.append[0].hash
    assert m2.append[1] == m1.append[1]
    assert kept(m3) == (m1.call, 1000, "model_switch")
    assert kept(m4) == (m2.call, 1100, "model_switch")
    assert [call.turn for call in (m1, m2, m3, m4)] == [0, 1, 2, 3]


def test_no_way_back_over_a_compaction(tmp_path: Path) -> None:
    """What a model had before the conversation was compacted is not in the prompt any more."""
    t = first(Transcript())
    then(t, 10, 5000, model=OTHER)
    t.compact(20)
    t.answer(25, "m3", used=usage(w5=2997), model=OTHER)
    then(t, 30, 3100)
    *_, m4 = calls_of(tmp_path, {MAIN: t})
    assert (m4.keep, m4.prefix_change) == (0, "model_switch")


# --- leads


def lead(call: Call) -> tuple[int, int]:
    """A first call's leading segment: identity and tokens."""
    return call.append[0].hash, call.append[0].tokens


def test_a_group_shares_the_lead_that_most_first_calls_read(tmp_path: Path) -> None:
    """Same project, version, model and role: one leading segment, as long as the mode of the first reads."""
    reads = {"s1": 15_000, "s2": 15_000, "s3": 12_000, "s4": 0}
    files = {f"p/{name}.jsonl": first(Transcript(name), read=read, prompt=20_000) for name, read in reads.items()}
    calls = calls_of(tmp_path, files)
    assert {lead(call)[1] for call in calls} == {15_000}
    assert len({lead(call) for call in calls}) == 1
    assert len({call.append[1].hash for call in calls}) == 4
    assert {pieces(call)[1] for call in calls} == {("lead", 20_000 - 15_000 - 33)}


def test_other_projects_versions_models_and_roles_share_no_lead(tmp_path: Path) -> None:
    """A lead of the same size in another group is another lead."""
    files = {
        "p/s1.jsonl": first(Transcript("s1"), read=900),
        "q/s2.jsonl": first(Transcript("s2"), read=900),
        "p/s3.jsonl": first(Transcript("s3", version="2.1.39"), read=900),
        "p/s4.jsonl": first(Transcript("s4"), read=900, model=OTHER),
        "p/s5/subagents/agent-abc1234.jsonl": first(Transcript("s5", agent="abc1234"), read=900),
    }
    leads = [lead(call) for call in calls_of(tmp_path, files)]
    assert [tokens for _, tokens in leads] == [900] * 5
    assert len({hash_ for hash_, _ in leads}) == 5


def test_a_lead_that_nobody_read_is_a_sessions_own(tmp_path: Path) -> None:
    """Where no first call of the group read anything, nothing is shared."""
    files = {f"p/{name}.jsonl": first(Transcript(name)) for name in ("s1", "s2")}
    one, other = calls_of(tmp_path, files)
    assert pieces(one) == pieces(other) == [("lead", 967), ("user", 33)]
    assert lead(one) != lead(other)


# --- blind and informed


@pytest.mark.parametrize(
    ("read", "gap", "hour", "cut"),
    [
        (5_000, 10, False, True),
        (18_973, 10, False, False),
        (18_972, 10, False, True),
        (5_000, 299, False, True),
        (5_000, 301, False, False),
        (5_000, 301, True, True),
        (5_000, 3_601, True, False),
        (0, 10, False, True),
    ],
)
def test_an_informed_import_cuts_a_prompt_to_what_was_read(
    read: int, gap: int, hour: bool, cut: bool, tmp_path: Path
) -> None:
    """Inside the TTL, where more than 1,024 of the 19,997 tokens left were not read; else informed is as blind."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", used=usage(new=3, **{"w1" if hour else "w5": 19_997}))
    then(t, 5 + gap, 21_000, read=read)
    blind, _ = take(tmp_path / "blind", {MAIN: t})
    done, calls = take(tmp_path / "informed", {MAIN: t}, informed=True)
    expected = (read, "recorded_break") if cut else (20_000, None)
    assert kept(calls[1]) == (calls[0].call, *expected)
    assert calls[1].prompt_tokens == 21_000
    assert (blind.recorded_breaks, done.recorded_breaks) == (0, int(cut))
    notes = read_meta(str(tmp_path / "informed" / "trace.parquet")).notes
    assert (notes["prefix_breaks"], notes["recorded_breaks"]) == ("recorded", int(cut))


def test_a_blind_import_does_not_look_at_what_was_read(tmp_path: Path) -> None:
    """Two logs that differ in later calls' reads alone give the same prompts."""
    prompts = []
    for read in (900, 0):
        t = first(Transcript())
        then(t, 10, 1200, read=read)
        then(t, 20, 1400, read=read)
        prompts.append([(*kept(call), call.append) for call in calls_of(tmp_path / str(read), {MAIN: t})])
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("read", [0, 5_000])
def test_an_informed_break_is_not_the_old_text(read: int, tmp_path: Path) -> None:
    """What follows a recorded break has an identity that the prompt before did not have there."""
    t = first(Transcript(), prompt=20_000)
    then(t, 10, 21_000, read=read)
    m1, m2 = calls_of(tmp_path, {MAIN: t}, informed=True)
    assert m2.append[0].hash not in {segment.hash for segment in m1.append}


def test_an_informed_compaction_keeps_what_was_read(tmp_path: Path) -> None:
    """After a compaction inside the TTL the recorded read says how much of the lead was still the same."""
    t = first(Transcript(), prompt=20_000)
    then(t, 10, 100_000)
    t.compact(20)
    t.answer(25, "m3", used=usage(new=3, read=15_000, w5=9_997))
    _, m2, m3 = calls_of(tmp_path, {MAIN: t}, informed=True)
    assert kept(m3) == (m2.call, 15_000, "compaction")


# --- whatever comes


COUNT = st.integers(0, 3000)
USAGE = st.builds(lambda new, read, w5, w1, out: usage(new=new, read=read, w5=w5, w1=w1, out=out), *[COUNT] * 5)
BLOCK = st.sampled_from(["text", "tool", "task", "thinking"])
STEP = st.tuples(
    st.sampled_from(["human", "results", "nothing", "compact", "micro", "error", "image"]),
    st.floats(-2, 400).map(lambda value: round(value, 3)),
    st.integers(0, 5000),
    st.lists(BLOCK, min_size=1, max_size=3),
    USAGE,
    st.sampled_from([None, "end_turn", "tool_use"]),
    st.sampled_from(["claude-opus-4-6", OTHER]),
)


def block_of(kind: str, use: str, size: int) -> dict[str, Any]:
    """A content block of some kind and size."""
    if kind == "thinking":
        return {"type": "thinking", "thinking": "", "signature": "s" * 10}
    if kind == "text":
        return text("y" * (size // 3))
    return task(use, f"sub {use}") if kind == "task" else tool(use, "Bash", command="c" * (size // 5))


def stream(t: Transcript, steps: list[tuple[Any, ...]], prefix: str) -> None:
    """Write random steps, each with something before the message, into a transcript."""
    at = 10.0
    uses: list[str] = []
    t.user(at, "start " + prefix)
    for number, (before, wait, size, blocks, used, stop, model) in enumerate(steps):
        at += wait
        if before in ("human", "image"):
            t.user(at, "x" * size if before == "human" else [{"type": "image", "source": {"data": "A" * size}}])
        elif before == "results":
            for use in reversed(uses):
                t.result(at, use, "r" * size)
        elif before == "compact":
            t.compact(at, "z" * size)
        elif before == "micro":
            t.system(at, "microcompact_boundary", microcompactMetadata={"compactedToolIds": uses[:1]})
        elif before == "error":
            t.api_error(at)
        at += 1 + size / 1000
        names = [f"{prefix}t{number}.{place}" for place, _ in enumerate(blocks)]
        made = [block_of(kind, name, size) for kind, name in zip(blocks, names, strict=True)]
        t.answer(at, f"{prefix}m{number}", *made, used=used, stop=stop, model=model)
        uses = [name for name, block in zip(names, blocks, strict=True) if block in ("tool", "task")]


def check_whole(calls: list[Call], negative: int) -> None:
    """What holds in every trace: prompts add up, parents and waits are earlier rows, turns count, starts are due."""
    seen: dict[str, Call] = {}
    turns: dict[str, int] = {}
    for call in calls:
        assert call.prompt_tokens == call.prompt
        assert all(segment.tokens > 0 for segment in call.append)
        assert call.prompt_parent is not None or call.keep == 0
        if call.prompt_parent is not None:
            assert 0 <= call.keep <= seen[call.prompt_parent].prompt_tokens
        assert call.turn == turns.get(call.agent, -1) + 1
        turns[call.agent] = call.turn
        due = max((seen[edge.call].end_ns + edge.gap_ns for edge in call.after), default=None)
        assert all(edge.gap_ns >= 0 for edge in call.after)
        if due is not None and not negative:
            assert 0 <= call.start_ns - due < len(calls)  # calls of the same millisecond are told apart by 1 ns
        assert call.spawned_by is None or call.spawned_by in seen
        assert call.end_ns >= call.start_ns >= 0
        seen[call.call] = call
    assert len(seen) == len(calls)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(STEP, min_size=1, max_size=8),
    st.lists(STEP, max_size=5),
    st.lists(STEP, max_size=4),
    st.booleans(),
)
def test_prompts_add_up_whatever_the_log_says(
    main: list[Any], sub: list[Any], other: list[Any], informed: bool
) -> None:
    """Random messages, accounts, resets, models and times, in a main file, a sub-agent's and another session's."""
    t, side, fork = Transcript(), Transcript(agent="abc1234"), Transcript("s2")
    stream(t, main, "a")
    stream(side, sub, "b")
    fork.lines = [{**line, "sessionId": "s2"} for line in t.lines[: len(t.lines) // 2]]
    stream(fork, other, "c")
    with TemporaryDirectory() as place:
        files = {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": side, "p/s2.jsonl": fork}
        done, calls = take(Path(place), files, informed=informed)
    check_whole(calls, done.negative_waits)
    assert len(calls) == len(main) + len(sub) + len(other)
    accounted = sum(call.prompt or 0 for call in calls)
    reported = sum(
        used[key]
        for *_, used, _, _ in (*main, *sub, *other)
        for key in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    )
    assert accounted == reported


def test_one_file_takes_its_subagents_files_along(tmp_path: Path) -> None:
    """Given one transcript, the sub-agents' files in the folder of its name are read too, others' are not."""
    t, side = first(Transcript()), first(Transcript(agent="abc1234"), prompt=500)
    other = first(Transcript("s2"), prompt=700)
    for name, transcript in ((MAIN, t), ("p/s1/subagents/agent-abc1234.jsonl", side), ("p/s2.jsonl", other)):
        transcript.write(tmp_path / name)
    done = import_claude_code(tmp_path / MAIN, str(tmp_path / "t"), version="0", salt=SALT)
    assert (done.files, done.sessions) == (2, 1)
    assert sorted(call.prompt or 0 for call in read_calls(str(tmp_path / "t"))) == [500, 1000]


def test_one_file_takes_the_flat_files_of_its_subagents_along(tmp_path: Path) -> None:
    """In the layout of 2.0.x sub-agents' files stand beside the session's; only those of its session are its own."""
    t, side = first(Transcript()), first(Transcript(agent="abc1234"), prompt=500)
    other = first(Transcript("s2", agent="def5678"), prompt=700)
    for name, transcript in ((MAIN, t), ("p/agent-abc1234.jsonl", side), ("p/agent-def5678.jsonl", other)):
        transcript.write(tmp_path / name)
    import_claude_code(tmp_path / MAIN, str(tmp_path / "t"), version="0", salt=SALT)
    assert sorted(call.prompt or 0 for call in read_calls(str(tmp_path / "t"))) == [500, 1000]


def test_times_are_milliseconds_from_the_sessions_first_call(tmp_path: Path) -> None:
    """A line's time to the millisecond, also with another zone's offset."""
    t = Transcript()
    t.user(3.217)
    t.answer(5.001, "m1", used=usage(w5=997))
    t.user(9.999)
    t.answer(0, "m2", used=usage(read=997, w5=100), timestamp="2026-01-01T02:00:12.345+02:00")
    m1, m2 = calls_of(tmp_path, {MAIN: t})
    assert (m1.start_ns, m1.end_ns) == (0, ns(1.784))
    assert (m2.start_ns, m2.end_ns) == (ns(6.782), ns(9.128))
