"""Claude Code's transcripts made into calls: one a message, whose agent, after what, and how it ended."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from transcripts import Transcript, calls_of, ns, pieces, take, task, text, tool, usage

from keepwarm.traces import claude_code
from keepwarm.traces.model import After, Call

MAIN = "p/s1.jsonl"


def two_calls(t: Transcript, **second: Any) -> Transcript:
    """A user's question answered with a tool use, its result, and an answer to that: prompts of 1,000 and 2,000."""
    t.user(0)
    t.answer(5, "m1", tool("t1"), used=usage(new=3, w5=997))
    t.result(6, "t1")
    t.answer(9, "m2", used=usage(new=3, read=997, w5=1000), **second)
    return t


def by_size(calls: list[Call]) -> dict[int | None, Call]:
    """Calls by their prompts, which these tests choose all different."""
    found = {call.prompt: call for call in calls}
    assert len(found) == len(calls)
    return found


# --- one call a message


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_message_on_several_lines_is_one_call(order: tuple[int, ...], tmp_path: Path) -> None:
    """Its account counts once, its output is that of the line with the stop reason, wherever that line stands."""
    t = Transcript()
    t.user(0)
    used = usage(new=3, read=100, w5=50, out=77)
    blocks = [{"type": "thinking", "thinking": "", "signature": "s" * 40}, text("y" * 100), tool("t1")]
    t.answer(5, "m1", *blocks, used=used, stop="tool_use")
    t.lines[1:] = [t.lines[1 + place] for place in order]
    [call] = calls_of(tmp_path, {MAIN: t})
    assert (call.prompt, call.uncached, call.cache_read, call.cache_write_5m) == (153, 3, 100, 50)
    assert (call.output, call.stop_reason, [use.name for use in call.tools]) == (77, "tool_use", ["Bash"])


@pytest.mark.parametrize("whole_first", [True, False])
def test_the_fullest_account_and_the_latest_line_of_a_message_count(whole_first: bool, tmp_path: Path) -> None:
    """Lines of one message that differ: the larger account is the message's, its end is the latest line's time."""
    t = Transcript()
    t.user(0)
    accounts = [usage(new=3, read=100, w5=50), usage(new=3)]
    for at, used in zip((6, 5.5), accounts if whole_first else reversed(accounts), strict=True):
        t.answer(at, "m1", used=used)
    [call] = calls_of(tmp_path, {MAIN: t})
    assert (call.prompt, call.cache_read, call.end_ns) == (153, 100, ns(6))


def test_results_between_a_messages_lines_belong_to_the_next_call(tmp_path: Path) -> None:
    """A tool that ran before its message was complete does not split the message; its result is in the next prompt."""
    t = Transcript()
    t.user(0)
    t.answer(2, "m1", tool("a", "Read"), used=usage(w5=997))
    t.result(3, "a")
    t.answer(4, "m1", tool("b"), used=usage(w5=997))
    t.result(5, "b")
    t.answer(8, "m2", used=usage(read=997, w5=1000))
    first, second = calls_of(tmp_path, {MAIN: t})
    assert (first.prompt, first.start_ns, first.end_ns) == (1000, 0, ns(4))
    assert [use.name for use in first.tools] == ["Read", "Bash"]
    assert [kind for kind, _ in pieces(second)].count("tool_result") == 2
    assert (second.start_ns, second.after) == (ns(5), (After(first.call, "end", ns(1), "tool"),))


def test_a_placeholder_output_is_no_output(tmp_path: Path) -> None:
    """Without a stop reason the output is unknown and estimated: 100 characters of text at 0.31 are 31 tokens."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", used=usage(w5=997, out=2))
    t.user(10)
    t.answer(15, "m2", used=usage(read=997, w5=103, out=40), stop="end_turn")
    t.user(20)
    t.answer(25, "m3", used=usage(read=1100, w5=107))
    calls = calls_of(tmp_path, {MAIN: t})
    assert [(call.output, call.output_est) for call in calls] == [(None, 31), (40, 31), (None, 31)]
    assert pieces(calls[1]) == [("answer", 31), ("hidden", 103 - 31 - 33), ("user", 33)]
    assert pieces(calls[2]) == [("answer", 40), ("hidden", 107 - 40 - 33), ("user", 33)]
    assert calls[2].append[0].answer_of == calls[1].call


def test_a_final_output_stays_exact_when_the_rest_is_scaled_down(tmp_path: Path) -> None:
    """Where visible blocks have too many tokens, an answer of known length keeps its own, the others share the rest."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", tool("t1"), used=usage(w5=997, out=40), stop="tool_use")
    t.result(6, "t1", "r" * 1000)
    t.answer(9, "m2", used=usage(read=997, w5=100))
    calls = calls_of(tmp_path, {MAIN: t})
    assert pieces(calls[1]) == [("answer", 40), ("tool_result", 60)]


def test_copies_in_a_resumed_file_are_counted_once_and_the_session_goes_on(tmp_path: Path) -> None:
    """A resumed session's file repeats the old one's history: one session, one agent, turns 0, 1, 2."""
    old, new = two_calls(Transcript("s1")), two_calls(Transcript("s2"))
    new.user(100)
    new.answer(105, "m3", used=usage(read=1997, w5=500))
    done, calls = take(tmp_path, {"p/s1.jsonl": old, "p/s2.jsonl": new})
    assert (done.sessions, done.calls, done.duplicates) == (1, 3, 2)
    assert len({(call.session, call.agent) for call in calls}) == 1
    assert [call.turn for call in calls] == [0, 1, 2]
    assert (calls[2].prompt_parent, calls[2].keep, calls[2].gap_kind) == (calls[1].call, 2000, "human")
    assert calls[2].after == (After(calls[1].call, "end", ns(91), "human"),)


def test_a_session_resumed_twice_has_a_fork_at_the_same_place(tmp_path: Path) -> None:
    """Two files copy the same finished history and go on: one is the old agent, the other grows from it likewise."""
    old, one, other = (two_calls(Transcript(name)) for name in ("s1", "s2", "s3"))
    one.user(100)
    one.answer(105, "m3", used=usage(read=1997, w5=500))
    other.user(200)
    other.answer(205, "m4", used=usage(read=1997, w5=700))
    one.user(300)
    one.answer(305, "m5", used=usage(read=2497, w5=900))
    files = {"p/s1.jsonl": old, "p/s2.jsonl": one, "p/s3.jsonl": other}
    done, calls = take(tmp_path, files)
    _, m2, m3, m4, m5 = calls
    assert (done.sessions, done.duplicates) == (1, 4)
    assert (m3.prompt_parent, m3.keep) == (m4.prompt_parent, m4.keep) == (m2.call, 2000)
    assert (m5.prompt_parent, m5.keep) == (m3.call, 2500)
    assert m3.agent == m5.agent != m4.agent


def test_history_repeated_within_a_file_is_counted_once(tmp_path: Path) -> None:
    """Six messages, all of them again, and a seventh: seven calls, each of which grows from the one before."""
    t = Transcript()
    for number in range(6):
        t.user(10 * number)
        t.answer(10 * number + 5, f"m{number}", used=usage(w5=997 + number))
    t.lines += t.lines[:]
    t.user(100)
    t.answer(105, "m7", used=usage(w5=2000))
    done, calls = take(tmp_path, {MAIN: t})
    assert (len(calls), done.duplicates) == (7, 6)
    assert [call.prompt_parent for call in calls[1:]] == [call.call for call in calls[:-1]]
    assert calls[6].after == (After(calls[5].call, "end", ns(45), "human"),)


def test_a_resumed_sessions_outcome_is_how_it_ended_last(tmp_path: Path) -> None:
    """The old file stopped for good, the resumed one asked for a tool that never answered: not completed."""
    old, new = two_calls(Transcript("s1"), stop="end_turn"), two_calls(Transcript("s2"), stop="end_turn")
    new.user(100)
    new.answer(105, "m3", tool("t9"), used=usage(read=1997, w5=500), stop="tool_use")
    calls = calls_of(tmp_path, {"p/s1.jsonl": old, "p/s2.jsonl": new})
    assert [call.completed for call in calls] == [False] * 3


def test_a_fork_is_an_agent_of_its_own_that_grows_from_the_shared_history(tmp_path: Path) -> None:
    """Two files share two messages and both go on: the later one's first own prompt keeps all of the last shared."""
    one, other = two_calls(Transcript("s1")), two_calls(Transcript("s2"))
    one.user(100)
    one.answer(105, "m3", used=usage(read=1997, w5=500))
    other.user(200)
    other.answer(205, "m4", used=usage(read=1997, w5=700))
    other.user(210)
    other.answer(215, "m5", used=usage(read=2697, w5=800))
    done, calls = take(tmp_path, {"p/s1.jsonl": one, "p/s2.jsonl": other})
    assert (done.sessions, done.calls, done.duplicates) == (1, 5, 2)
    _, m2, m3, m4, m5 = calls
    assert (m3.agent, m3.turn, m3.prompt_parent) == (m2.agent, 2, m2.call)
    assert m4.agent != m2.agent
    assert (m4.prompt_parent, m4.keep, m4.parent_agent, m4.role) == (m2.call, 2000, m2.agent, "main")
    assert (m5.agent, m5.prompt_parent, m5.keep) == (m4.agent, m4.call, 2700)


def test_the_same_history_in_another_project_is_not_another_call(tmp_path: Path) -> None:
    """Message ids are deduplicated over the whole input, also where a session's file was copied to another project."""
    files = {"p/s1.jsonl": two_calls(Transcript()), "q/s1.jsonl": two_calls(Transcript())}
    done, calls = take(tmp_path, files)
    assert (done.sessions, len(calls), done.duplicates) == (1, 2, 2)


@pytest.mark.parametrize("where", ["inline", "own file"])
def test_a_side_question_does_not_take_the_messages_that_it_copies(where: str, tmp_path: Path) -> None:
    """A /btw sidechain repeats the parent's messages under new request ids; they stay the parent's."""
    t = two_calls(Transcript())
    side = Transcript(agent="aside_question-0123456789abcdef")
    side.user(0)
    side.answer(5, "m1", tool("t1"), used=usage(new=3, w5=997), requestId="req_again_1")
    side.result(6, "t1")
    side.answer(9, "m2", used=usage(new=3, read=997, w5=1000), requestId="req_again_2")
    side.user(20)
    side.answer(25, "b1", used=usage(new=3, read=1997, w5=200))
    if where == "inline":
        t.lines += side.lines
    t.user(100)
    t.answer(105, "m3", used=usage(read=1997, w5=500))
    own = {} if where == "inline" else {"p/s1/subagents/agent-aside_question-0123456789abcdef.jsonl": side}
    done, calls = take(tmp_path, {MAIN: t, **own})
    m1, m2, b1, m3 = calls
    assert done.duplicates == 2
    assert [call.turn for call in (m1, m2, m3)] == [0, 1, 2]
    assert {call.agent for call in (m1, m2, m3)} == {m1.agent}
    assert [call.role for call in (m1, m2, m3)] == ["main"] * 3
    assert b1.agent != m1.agent
    assert (b1.role == "main", b1.prompt_parent, b1.keep) == (False, m2.call, 2000)


def test_messages_without_request_id_and_with_other_clouds_ids(tmp_path: Path) -> None:
    """Bedrock's and Vertex's message ids, a missing request id, and a missing message id are one call each."""
    t = Transcript()
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("msg_bdrk_01", {}),
        ("msg_vrtx_01", {"requestId": ...}),
        ("unused", {"message": {"id": ...}}),
        ("none", {"message": {"id": ...}, "requestId": ...}),
    ]
    for number, (name, more) in enumerate(kinds):
        t.user(10 * number)
        t.answer(10 * number + 5, name, used=usage(w5=1000 + number), **more)
    calls = calls_of(tmp_path, {MAIN: t})
    assert [call.prompt for call in calls] == [1003, 1004, 1005, 1006]
    assert len({call.call for call in calls}) == 4


def test_lines_that_are_no_call_make_none(tmp_path: Path) -> None:
    """Synthetic messages, told API errors, summaries, snapshots and the like are passed over without being damaged."""
    t = Transcript()
    t.chainless("summary", summary="about", leafUuid="u")
    t.chainless("file-history-snapshot", messageId="m", snapshot={"timestamp": "2026-01-01T00:00:00Z"})
    t.chainless("queue-operation", operation="enqueue", timestamp="2025-12-31T23:00:00Z", sessionId="s1", content="x")
    t.chainless("custom-title", customTitle="t", sessionId="s1")
    t.add("attachment", 0, attachment={"type": "x"})
    two_calls(t)
    t.answer(12, "e1", used=usage(new=9), model="<synthetic>")
    t.answer(13, "e2", used=usage(new=9), isApiErrorMessage=True)
    t.add("progress", 14, data={"type": "bash_progress", "output": ""}, toolUseID="x", parentToolUseID="t1")
    done, calls = take(tmp_path, {MAIN: t})
    assert [call.prompt for call in calls] == [1000, 2000]
    assert done.damaged == []
    assert calls[0].start_ns == 0
    assert done.lines == len(t.lines)


# --- sub-agents


def with_subagent(kind: str = "Explore", agent: str = "abc1234", **told: Any) -> tuple[Transcript, Transcript]:
    """A main agent (prompts of 1,000 and 2,000) that starts a sub-agent (500 and 800) and waits for it."""
    t, sub = Transcript(), Transcript(agent=agent)
    t.user(0)
    t.answer(5, "m1", task("t1", "find it", kind), used=usage(w5=997))
    sub.user(5.1, "find it")
    sub.answer(8, "a1", tool("ta"), used=usage(w5=497))
    sub.result(9, "ta")
    sub.answer(12, "a2", used=usage(read=497, w5=300), stop="end_turn")
    t.finished(12.5, "t1", agent, **told)
    t.answer(15, "m2", used=usage(read=997, w5=1000))
    return t, sub


def check_subagent(calls: list[Call]) -> None:
    """The four calls of ``with_subagent``, whatever told the sub-agent's."""
    sizes = by_size(calls)
    m1, m2, a1, a2 = (sizes[size] for size in (1000, 2000, 500, 800))
    assert [(call.role, call.turn) for call in (m1, m2, a1, a2)] == [
        *(("main", 0), ("main", 1)),
        *(("subagent", 0), ("subagent", 1)),
    ]
    assert a1.agent == a2.agent != m1.agent == m2.agent
    assert {(call.parent_agent, call.spawned_by, call.agent_type) for call in (a1, a2)} == {
        (m1.agent, m1.call, "explore")
    }
    assert [use.agent for use in m1.tools] == [a1.agent]
    assert (a1.start_ns, a1.after) == (ns(5.1), (After(m1.call, "end", ns(0.1), "tool"),))
    assert a1.prompt_parent is None
    assert (a2.prompt_parent, a2.keep) == (a1.call, 500)
    assert m2.start_ns == ns(12.5)
    assert After(a2.call, "end", ns(0.5), "subagent") in m2.after
    assert (m2.gap_ns, m2.gap_kind) == (ns(0.5), "subagent")
    assert (m2.prompt_parent, m2.keep) == (m1.call, 1000)


@pytest.mark.parametrize("path", ["p/s1/subagents/agent-abc1234.jsonl", "p/agent-abc1234.jsonl"])
def test_a_subagent_in_a_file_of_its_own(path: str, tmp_path: Path) -> None:
    """Under the session's folder as now, or flat beside the session as in 2.0.x: an agent of that session."""
    t, sub = with_subagent()
    done, calls = take(tmp_path, {MAIN: t, path: sub})
    assert (done.sessions, done.duplicates) == (1, 0)
    check_subagent(calls)


def test_a_subagent_in_progress_lines_alone(tmp_path: Path) -> None:
    """Versions 2.1.12 to 2.1.81 told a sub-agent's messages inside the main file; that is enough."""
    t, sub = with_subagent()
    t.lines.pop()
    t.relay(sub, "abc1234", "t1")
    t.answer(15, "m2", used=usage(read=997, w5=1000))
    check_subagent(calls_of(tmp_path, {MAIN: t}))


def test_an_own_file_goes_before_progress_lines(tmp_path: Path) -> None:
    """Told twice, a sub-agent is one agent, and its own file's account and final output are taken."""
    t, sub = with_subagent()
    told = Transcript(agent="abc1234")
    told.user(5.1, "find it")
    told.answer(8, "a1", tool("ta"), used=usage(w5=497))
    told.result(9, "ta")
    told.answer(12, "a2", used=usage(read=497, w5=300, out=1))
    t.relay(told, "abc1234", "t1")
    sub.lines[-1]["message"]["usage"]["output_tokens"] = 66
    done, calls = take(tmp_path, {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": sub})
    assert done.duplicates == 2
    check_subagent(calls)
    assert by_size(calls)[800].output == 66


def test_progress_lines_fill_in_what_an_own_file_lacks(tmp_path: Path) -> None:
    """A message that only one of the two tells still counts, in the same agent."""
    t, sub = with_subagent()
    t.relay(sub, "abc1234", "t1")
    cut = Transcript(agent="abc1234")
    cut.lines = sub.lines[:2]
    done, calls = take(tmp_path, {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": cut})
    assert done.duplicates == 1
    check_subagent(calls)


def test_inline_sidechains_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    """Before 2.0 two sub-agents' lines stand mixed in the main file, without any agent's id."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", task("t1", "find it"), task("t2", "count it", "Plan"), used=usage(w5=997))
    side: dict[str, Any] = {"isSidechain": True}
    one = t.user(5.1, "find it", parentUuid=None, **side)
    two = t.user(5.2, "count it", parentUuid=None, **side)
    t.answer(8, "a1", tool("ta"), used=usage(w5=497), parentUuid=one, **side)
    one = f"s1--{len(t.lines) - 1}"
    t.answer(9, "b1", tool("tb"), used=usage(w5=597), parentUuid=two, **side)
    two = f"s1--{len(t.lines) - 1}"
    two = t.result(9.5, "tb", parentUuid=two, **side)
    one = t.result(9.6, "ta", parentUuid=one, **side)
    t.answer(11, "a2", used=usage(read=497, w5=300), parentUuid=one, **side)
    t.answer(12, "b2", used=usage(read=597, w5=301), parentUuid=two, **side)
    t.result(12.5, "t2")
    t.result(12.6, "t1")
    t.answer(15, "m2", used=usage(read=997, w5=1000))
    sizes = by_size(calls_of(tmp_path, {MAIN: t}))
    m1, a1, b1, a2, b2 = (sizes[size] for size in (1000, 500, 600, 800, 901))
    assert len({m1.agent, a1.agent, b1.agent}) == 3
    assert (a2.agent, a2.prompt_parent, a2.keep) == (a1.agent, a1.call, 500)
    assert (b2.agent, b2.prompt_parent, b2.keep) == (b1.agent, b1.call, 600)
    assert [(call.role, call.spawned_by, call.agent_type) for call in (a1, b1)] == [
        *(("subagent", m1.call, "explore"), ("subagent", m1.call, "plan"))
    ]
    assert sorted(sizes[2000].after) == sorted(
        [
            After(m1.call, "end", 0, "tool"),
            After(b2.call, "end", ns(0.5), "subagent"),
            After(a2.call, "end", ns(1.6), "subagent"),
        ]
    )


def test_a_spawn_is_found_by_the_prompts_text_alone(tmp_path: Path) -> None:
    """A sub-agent that nothing names belongs to the tool use whose prompt it begins with."""
    t, sub = with_subagent()
    del t.lines[2:]
    t.result(12.5, "t1", "done")
    t.answer(15, "m2", used=usage(read=997, w5=1000))
    check_subagent(calls_of(tmp_path, {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": sub}))


def test_a_spawn_is_found_by_the_progress_lines_tool_use_alone(tmp_path: Path) -> None:
    """The prompt's text changed on its way and the result names no agent: the progress lines' parent is the use."""
    t, sub = with_subagent()
    sub.lines[0]["message"]["content"] = "not what was asked"
    t.lines[2:] = [{**t.lines[2], "toolUseResult": "done"}]
    t.relay(sub, "abc1234", "t1")
    t.answer(15, "m2", used=usage(read=997, w5=1000))
    check_subagent(calls_of(tmp_path, {MAIN: t}))


def test_a_spawn_is_found_by_the_results_agent_alone(tmp_path: Path) -> None:
    """The prompt's text changed on its way: the tool's result names the agent it came from."""
    t, sub = with_subagent()
    sub.lines[0]["message"]["content"] = "not what was asked"
    check_subagent(calls_of(tmp_path, {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": sub}))


def test_two_agents_given_the_same_prompt_are_started_by_one_use_each(tmp_path: Path) -> None:
    """Two tool uses with one prompt start two agents; each use starts one."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", task("t1", "find it"), task("t2", "find it"), used=usage(w5=997))
    files = {MAIN: t}
    for number, agent in enumerate(("aaaaaaa", "bbbbbbb")):
        files[f"p/s1/subagents/agent-{agent}.jsonl"] = sub = Transcript(agent=agent)
        sub.user(5.1, "find it")
        sub.answer(8, agent, used=usage(w5=497 + number))
    m1, *subs = calls_of(tmp_path, files)
    assert {use.agent for use in m1.tools} == {call.agent for call in subs}
    assert [call.spawned_by for call in subs] == [m1.call] * 2


def test_a_join_waits_for_the_agent_that_ended_last(tmp_path: Path) -> None:
    """Two sub-agents and a command run side by side: an edge each, the last one's wait is the one observed."""
    t, one, two = Transcript(), Transcript(agent="aaaaaaa"), Transcript(agent="bbbbbbb")
    t.user(0)
    t.answer(5, "m1", task("t1", "one"), task("t2", "two"), tool("t3"), used=usage(w5=997))
    one.user(5, "one")
    one.answer(20, "a1", used=usage(w5=497))
    two.user(5, "two")
    two.answer(12, "b1", used=usage(w5=597))
    t.result(7, "t3")
    t.finished(12.5, "t2", "bbbbbbb")
    t.finished(20.25, "t1", "aaaaaaa")
    t.user(21, "a reminder", isMeta=True)
    t.answer(30, "m2", used=usage(read=997, w5=3000))
    files = {MAIN: t, "p/s1/subagents/agent-aaaaaaa.jsonl": one, "p/s1/subagents/agent-bbbbbbb.jsonl": two}
    done, calls = take(tmp_path, files)
    sizes = by_size(calls)
    m1, m2, a1, b1 = (sizes[size] for size in (1000, 4000, 500, 600))
    assert sorted(m2.after) == sorted(
        [
            After(m1.call, "end", ns(2), "tool"),
            After(b1.call, "end", ns(0.5), "subagent"),
            After(a1.call, "end", ns(1), "subagent"),
        ]
    )
    assert (m2.start_ns, m2.gap_ns, m2.gap_kind) == (ns(21), ns(1), "subagent")
    assert done.negative_waits == 0


def test_an_agent_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    """async_launched gives a result at once: the next call goes on, though the agent's first call ended just then."""
    t, sub = Transcript(), Transcript(agent="abc1234")
    t.user(0)
    t.answer(5, "m1", task("t1", "find it"), used=usage(w5=997))
    sub.user(5, "find it")
    sub.answer(5.5, "a1", tool("ta"), used=usage(w5=497))
    sub.result(5.6, "ta")
    sub.answer(50, "a2", used=usage(read=497, w5=300))
    t.finished(5.6, "t1", "abc1234", status="async_launched", isAsync=True)
    t.answer(15, "m2", tool("t2", "TaskOutput", task_id="abc1234"), used=usage(read=997, w5=1000))
    t.result(51, "t2", "all", toolUseResult={"retrieval_status": "success", "task": {"task_id": "abc1234"}})
    t.answer(60, "m3", used=usage(read=1997, w5=1000))
    sizes = by_size(calls_of(tmp_path, {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": sub}))
    m1, m2, m3, a1, a2 = (sizes[size] for size in (1000, 2000, 3000, 500, 800))
    assert (a1.spawned_by, a1.parent_agent) == (m1.call, m1.agent)
    assert m2.after == (After(m1.call, "end", ns(0.6), "tool"),)
    assert After(a2.call, "end", ns(1), "subagent") in m3.after
    assert (m3.gap_ns, m3.gap_kind, m3.start_ns) == (ns(1), "subagent", ns(51))


def test_a_subagents_subagent(tmp_path: Path) -> None:
    """An agent that a sub-agent starts has the sub-agent for its parent and is joined there."""
    t, outer, inner = Transcript(), Transcript(agent="aaaaaaa"), Transcript(agent="bbbbbbb")
    t.user(0)
    t.answer(5, "m1", task("t1", "outer"), used=usage(w5=997))
    outer.user(5, "outer")
    outer.answer(8, "a1", task("t2", "inner", "Plan"), used=usage(w5=497))
    inner.user(8, "inner")
    inner.answer(12, "b1", used=usage(w5=597))
    outer.finished(12.5, "t2", "bbbbbbb")
    outer.answer(14, "a2", used=usage(read=497, w5=400))
    t.finished(15, "t1", "aaaaaaa")
    t.answer(20, "m2", used=usage(read=997, w5=1000))
    files = {MAIN: t, "p/s1/subagents/agent-aaaaaaa.jsonl": outer, "p/s1/subagents/agent-bbbbbbb.jsonl": inner}
    sizes = by_size(calls_of(tmp_path, files))
    m1, a1, b1, a2 = (sizes[size] for size in (1000, 500, 600, 900))
    assert (a1.parent_agent, a1.spawned_by) == (m1.agent, m1.call)
    assert (b1.parent_agent, b1.spawned_by, b1.agent_type) == (a1.agent, a1.call, "plan")
    assert After(b1.call, "end", ns(0.5), "subagent") in a2.after
    assert [edge.call for edge in sizes[2000].after if edge.kind == "subagent"] == [a2.call]


def test_a_session_without_its_main_transcript(tmp_path: Path) -> None:
    """Only sub-agents' files: calls of a session whose spawns and outcome are unknown."""
    _, sub = with_subagent()
    done, calls = take(tmp_path, {"p/s1/subagents/agent-abc1234.jsonl": sub})
    assert (done.sessions, [call.role for call in calls]) == (1, ["subagent"] * 2)
    assert {(call.spawned_by, call.parent_agent, call.agent_type, call.completed) for call in calls} == {
        (None, None, None, None)
    }
    assert calls[0].after == ()


def test_a_compaction_agent_grows_from_the_conversation_that_it_compacts(tmp_path: Path) -> None:
    """agent-acompact-*: role compaction, whose prompt keeps the main agent's."""
    t, side = two_calls(Transcript()), Transcript(agent="acompact-0123456789abcdef")
    side.user(20, "summarise")
    side.answer(25, "c1", used=usage(read=1997, w5=100))
    calls = calls_of(tmp_path, {MAIN: t, "p/s1/subagents/agent-acompact-0123456789abcdef.jsonl": side})
    c1 = by_size(calls)[2100]
    assert (c1.role, c1.prompt_parent, c1.keep) == ("compaction", calls[1].call, 2000)
    assert (c1.agent != calls[1].agent, c1.parent_agent) == (True, calls[1].agent)


# --- waits, retries, accounts


def test_parallel_tools_whose_results_come_in_another_order(tmp_path: Path) -> None:
    """Each result is matched to its use: durations, errors and sizes; the next call waits for the latest."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", tool("a", "Read"), tool("b", "Grep"), tool("c"), used=usage(w5=997))
    parent = "s1--1"
    t.result(6, "c", "r" * 100, is_error=True, parentUuid=parent)
    t.result(7, "a", "r" * 200, parentUuid=parent)
    t.result(9, "b", "r" * 300, is_error=False, parentUuid=parent)
    t.answer(12, "m2", used=usage(read=997, w5=1000))
    m1, m2 = calls_of(tmp_path, {MAIN: t})
    assert [(use.name, use.start_ns, use.duration_ns, use.is_error) for use in m1.tools] == [
        ("Read", ns(5), ns(2), None),
        ("Grep", ns(5), ns(4), False),
        ("Bash", ns(5), ns(1), True),
    ]
    # 0.347 a character and 48 a result: 83, 117, 152
    assert [use.result_tokens for use in m1.tools] == [117, 152, 83]
    assert [part for part in pieces(m2) if part[0] == "tool_result"] == [
        *(("tool_result", 83), ("tool_result", 117), ("tool_result", 152))
    ]
    assert (m2.start_ns, m2.gap_ns, m2.gap_kind) == (ns(9), ns(4), "tool")


def test_a_wait_below_zero_becomes_none_and_is_counted(tmp_path: Path) -> None:
    """A tool's result written before the last line of the message that asked for it: times in a log run backwards."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", tool("t1"), used=usage(w5=997))
    t.answer(6, "m1", used=usage(w5=997))
    t.result(5.5, "t1")
    t.answer(9, "m2", used=usage(read=997, w5=1000))
    done, (m1, m2) = take(tmp_path, {MAIN: t})
    assert (m1.end_ns, m2.start_ns, m2.after) == (ns(6), ns(5.5), (After(m1.call, "end", 0, "tool"),))
    assert done.negative_waits == 1


def test_what_was_waited_for(tmp_path: Path) -> None:
    """Gap kinds: a person, a tool, a retry after a refused attempt, and unknown where nothing says."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", tool("t1"), used=usage(w5=997))
    t.result(6, "t1")
    t.user(6.5, "a reminder", isMeta=True)
    t.answer(9, "m2", used=usage(read=997, w5=1000))
    t.user(20)
    t.answer(25, "m3", used=usage(read=1997, w5=1000))
    t.api_error(27)
    t.api_error(29, attempt=2)
    t.answer(35, "m4", used=usage(read=2997, w5=1000))
    t.user(40, "a hook's word", isMeta=True)
    t.answer(45, "m5", used=usage(read=3997, w5=1000))
    calls = calls_of(tmp_path, {MAIN: t})
    assert [call.gap_kind for call in calls] == [None, "tool", "human", "retry", "unknown"]
    assert [call.gap_ns for call in calls] == [None, ns(1.5), ns(11), ns(4), ns(5)]
    assert [call.retries for call in calls] == [None, None, None, 2, None]
    assert calls[0].after == ()


def test_no_person_waits_inside_a_subagent(tmp_path: Path) -> None:
    """Text in the user's name within a sub-agent is the client's: the wait for it is not a person's."""
    _, sub = with_subagent()
    sub.user(20, "go on")
    sub.answer(25, "a3", used=usage(read=797, w5=300))
    calls = calls_of(tmp_path, {"p/s1/subagents/agent-abc1234.jsonl": sub})
    assert [call.gap_kind for call in calls] == [None, "tool", "unknown"]


def test_a_retry_within_a_tool_loop_still_waited_for_the_tool(tmp_path: Path) -> None:
    """Refused attempts after a tool's result count as retries; the wait and its kind are the tool's."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", tool("t1"), used=usage(w5=997))
    t.result(6, "t1")
    t.api_error(8)
    t.answer(15, "m2", used=usage(read=997, w5=1000))
    _, m2 = calls_of(tmp_path, {MAIN: t})
    assert (m2.retries, m2.gap_kind, m2.gap_ns, m2.start_ns, m2.end_ns) == (1, "tool", ns(1), ns(6), ns(15))


@pytest.mark.parametrize(
    ("used", "writes", "marks"),
    [
        (usage(new=3, read=100, w5=50), (50, 0, 0), [(150, 300)]),
        (usage(new=3, read=100, w1=50), (0, 50, 0), [(150, 3600)]),
        (usage(new=3, read=100, w1=40, w5=10), (10, 40, 0), [(140, 3600), (150, 300)]),
        (usage(new=3, read=150), (0, 0, 0), [(150, 300)]),
        (usage(new=153), (0, 0, 0), []),
        (usage(new=3, read=100, w5=50) | {"cache_creation": None}, (0, 0, 50), [(150, 300)]),
    ],
    ids=["five minutes", "an hour", "both", "only read", "no cache", "unnamed"],
)
def test_writes_and_the_cache_marks_that_they_tell_of(
    used: dict[str, Any], writes: tuple[int, ...], marks: list[tuple[int, int]], tmp_path: Path
) -> None:
    """What was written for five minutes, an hour, or untold; marks where the cached part of the prompt ended."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", used=used)
    [call] = calls_of(tmp_path, {MAIN: t})
    assert (call.cache_write_5m, call.cache_write_1h, call.cache_write_other) == writes
    assert list(call.breakpoints) == marks
    assert call.prompt == 153
    assert call.prompt == (call.uncached or 0) + (call.cache_read or 0) + sum(writes)


def test_a_call_that_only_reads_keeps_the_life_its_agent_writes_with(tmp_path: Path) -> None:
    """After a write for an hour a call that writes nothing is marked for an hour."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", used=usage(new=3, w1=997))
    t.user(10)
    t.answer(15, "m2", used=usage(new=103, read=997))
    assert calls_of(tmp_path, {MAIN: t})[1].breakpoints == ((997, 3600),)


def test_an_account_that_is_not_told_is_unknown(tmp_path: Path) -> None:
    """No usage on any line: null counts, source absent, and no zero anywhere."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", used=usage(), message={"usage": ...})
    [call] = calls_of(tmp_path, {MAIN: t})
    assert (call.prompt, call.uncached, call.cache_read, call.cache_write_5m, call.output) == (None,) * 5
    assert (call.usage_source, call.write_source) == ("absent", "absent")


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("system_changed", "system_changed"),
        ("tools_changed", "tools_changed"),
        ("messages_changed", "messages_changed"),
        ("model_changed", "model_changed"),
        ("previous_message_not_found", "previous_message_not_found"),
        ("unavailable", "unavailable"),
        ("something_new", "other"),
    ],
)
def test_the_providers_own_miss_reasons(reason: str, kept: str, tmp_path: Path) -> None:
    """The reason that the provider gives for a miss is kept; one not known yet is told as other."""
    t = Transcript()
    t.user(0)
    told = {"diagnostics": {"cache_miss_reason": {"type": reason, "cache_missed_input_tokens": 9}}}
    t.answer(5, "m1", used=usage(w5=997), message=told)
    t.user(10)
    t.answer(15, "m2", used=usage(read=997, w5=100), message={"diagnostics": {"cache_miss_reason": None}})
    assert [call.miss_reason for call in calls_of(tmp_path, {MAIN: t})] == [kept, None]


# --- outcome, flow, order


def ending(t: Transcript, how: str) -> None:
    """Go on from ``two_calls`` to an end of some kind."""
    if how == "stopped":
        t.user(20)
        t.answer(25, "m3", used=usage(read=1997, w5=100), stop="end_turn")
    elif how == "stopped, then a turn's length":
        t.system(26, "turn_duration", durationMs=9)
    elif how == "an API error":
        t.user(20)
        t.answer(25, "e1", used=usage(), model="<synthetic>", isApiErrorMessage=True)
    elif how == "a tool use without a result":
        t.user(20)
        t.answer(25, "m3", tool("t9"), used=usage(read=1997, w5=100), stop="tool_use")
    elif how == "a result that nobody read":
        t.user(20)
        t.answer(25, "m3", tool("t9"), used=usage(read=1997, w5=100), stop="tool_use")
        t.result(26, "t9")
    elif how == "a question without an answer":
        t.answer(25, "m3", used=usage(read=1997, w5=100), stop="end_turn")
        t.user(30)
    elif how == "an error that the next attempt made good":
        t.answer(12, "e1", used=usage(), model="<synthetic>", isApiErrorMessage=True)
        t.answer(25, "m3", used=usage(read=1997, w5=100), stop="end_turn")
    elif how == "an error that a later call made good":
        t.answer(12, "e1", used=usage(), model="<synthetic>", isApiErrorMessage=True)
        t.user(20)
        t.answer(25, "m3", used=usage(read=1997, w5=100), stop="end_turn")


@pytest.mark.parametrize(
    ("how", "completed"),
    [
        ("stopped", True),
        ("stopped, then a turn's length", True),
        ("an error that a later call made good", True),
        ("an error that the next attempt made good", True),
        ("an API error", False),
        ("a tool use without a result", False),
        ("no stop reason", None),
        ("a result that nobody read", None),
        ("a question without an answer", None),
    ],
)
def test_whether_a_session_was_completed(how: str, completed: bool | None, tmp_path: Path) -> None:
    """True after a final stop without a tool use, false after an error or an unanswered tool use, else unknown."""
    t = two_calls(Transcript())
    ending(t, how)
    assert {call.completed for call in calls_of(tmp_path, {MAIN: t})} == {completed}


def test_a_subagents_end_is_not_the_sessions(tmp_path: Path) -> None:
    """The main agent's last call decides, also where a sub-agent stopped for good after it; every row says the same."""
    t, sub = with_subagent()
    t.lines = t.lines[:2]
    calls = calls_of(tmp_path, {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": sub})
    assert [call.completed for call in calls] == [False] * 3


@pytest.mark.parametrize(
    ("entrypoint", "flow"),
    [
        ("cli", "interactive"),
        ("claude-desktop", "interactive"),
        ("sdk-cli", "background"),
        ("sdk-py", "background"),
        (..., None),
    ],
)
def test_the_flow_follows_the_clients_entrypoint(entrypoint: Any, flow: str | None, tmp_path: Path) -> None:
    """Someone waits for a terminal's session, nobody for the SDK's; where the log does not say it is unknown."""
    t = two_calls(Transcript(entrypoint=entrypoint))
    assert {call.flow for call in calls_of(tmp_path, {MAIN: t})} == {flow}


def test_subagents_inherit_the_flow(tmp_path: Path) -> None:
    """A sub-agent's lines need not name the entrypoint: its session's holds."""
    t, sub = with_subagent()
    for line in t.lines:
        line["entrypoint"] = "sdk-cli"
    calls = calls_of(tmp_path, {MAIN: t, "p/s1/subagents/agent-abc1234.jsonl": sub})
    assert [call.flow for call in calls] == ["background"] * 4


def test_the_user_says_the_flow(tmp_path: Path) -> None:
    """What the user says goes before the entrypoint."""
    t = two_calls(Transcript(entrypoint="cli"))
    assert {call.flow for call in calls_of(tmp_path, {MAIN: t}, flow="background")} == {"background"}


def test_sessions_stand_in_the_order_of_their_start(tmp_path: Path) -> None:
    """Sessions count from the first call of all; calls from their session's first."""
    late, early = Transcript("s1"), two_calls(Transcript("s2"))
    late.user(3600)
    late.answer(3605, "n1", used=usage(w5=500))
    calls = calls_of(tmp_path, {"p/s1.jsonl": late, "q/s2.jsonl": early})
    assert [(call.prompt, call.session_start_ns, call.start_ns) for call in calls] == [
        (1000, 0, 0),
        (2000, 0, ns(6)),
        (503, ns(3600), 0),
    ]


def test_worker_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and built in two processes, in lots of a session, the trace has the digest that one process gives it; a
    copied history is told once all the same.
    """
    files = {}
    for number in range(5):
        t = Transcript(f"s{number}")
        t.user(number)
        t.answer(number + 5, "shared" if number < 2 else f"m{number}", used=usage(w5=997))
        t.user(number + 6)
        t.answer(number + 9, f"n{number}", used=usage(read=997, w5=100))
        files[f"p/s{number}.jsonl"] = t
    alone, calls = take(tmp_path, files)
    assert (alone.calls, alone.sessions) == (9, 4)
    monkeypatch.setattr(claude_code, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(claude_code, "LOT_BYTES", 1)
    together, others = take(tmp_path, files, processes=2)
    assert together == alone
    assert others == calls


def test_a_backend_without_a_word_on_its_cache_has_not_said_zero(tmp_path: Path) -> None:
    """Usage without cache fields: the prompt is known, what was read and written is not; no rate is made of it."""
    t = Transcript()
    t.user(0)
    t.answer(5, "m1", used={"input_tokens": 1000, "output_tokens": 9}, stop="end_turn")
    t.user(10)
    told = {"input_tokens": 200, "cache_read_input_tokens": 900, "output_tokens": 9}
    t.answer(15, "m2", used=told, stop="end_turn")
    silent, partly = calls_of(tmp_path, {MAIN: t})
    assert (silent.prompt, silent.uncached, silent.cache_read, silent.cache_write_5m) == (1000, None, None, None)
    assert (silent.usage_source, silent.write_source, silent.breakpoints) == ("reported", "absent", ())
    assert (partly.prompt, partly.uncached, partly.cache_read, partly.cache_write_5m) == (1100, 200, 900, None)
    assert partly.write_source == "absent"
