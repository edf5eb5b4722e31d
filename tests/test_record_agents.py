"""Whose a recorded call is: sessions, agents and who started whom, by each client's headers and by none at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dialects import DIALECTS, Result, Said, Turn, Use, assistant, request, user
from recording import Asked, Recording, Reply, Talk, numbered, recording, refuses, says

from keepwarm.traces.model import Call

TOOLS = "Bash", "Read", "Agent"
SUMMARY = "Your task is to create a detailed summary of the conversation so far."
EVERY = pytest.mark.parametrize("dialect", DIALECTS)


class Headers(NamedTuple):
    """The headers by which a client tells its agents: the main one, one under it, one under that."""

    dialect: str
    main: dict[str, str]
    child: dict[str, str]
    nested: dict[str, str]


def claude(agent: str = "", parent: str = "", session: str = "4f6a-session") -> dict[str, str]:
    """Claude Code's."""
    told = {"x-claude-code-agent-id": agent, "x-claude-code-parent-agent-id": parent}
    return {"x-claude-code-session-id": session, **{name: value for name, value in told.items() if value}}


def codex(thread: str, parent: str = "") -> dict[str, str]:
    """Codex's."""
    told = {"session-id": "s-1", "thread-id": thread}
    return told | ({"x-codex-parent-thread-id": parent} if parent else {})


def plain(name: str, session: str, parent: str = "") -> dict[str, str]:
    """Dynamo's and OpenCode's."""
    return {f"{name}-session-id": session} | ({f"{name}-parent-session-id": parent} if parent else {})


CLIENTS = {
    "claude": Headers("messages", claude(), claude("a1"), claude("a2", "a1")),
    "codex": Headers("responses", codex("s-1"), codex("t-2", "s-1"), codex("t-3", "t-2")),
    "dynamo": Headers("chat", plain("x-dynamo", "p"), plain("x-dynamo", "q", "p"), plain("x-dynamo", "r", "q")),
    "opencode": Headers("chat", plain("x", "p"), plain("x", "q", "p"), plain("x", "r", "q")),
}


def spawn(number: int, prompt: str) -> Use:
    """A tool use that starts an agent."""
    return Use(f"u{number}", "Agent", {"description": "help", "prompt": prompt, "subagent_type": "Explore"})


def family(made: Recording, talk: Talk, headers: Headers, between: Callable[[], None] = lambda: None) -> None:
    """A main agent (1, 5) starts one (2, 4), which starts another (3); ``between`` is done after each call."""
    outer, inner = spawn(1, "Look outside."), spawn(2, "Look inside.")
    main, child = [user("Do it.")], [user("Look outside.")]
    talk.ask(made, main, outer, headers=headers.main, tools=TOOLS, system="Lead.")
    between()
    talk.ask(made, child, inner, headers=headers.child, tools=TOOLS, system="Help.")
    between()
    talk.ask(made, [user("Look inside.")], "Seen.", headers=headers.nested, tools=TOOLS, system="Help.")
    between()
    child += [assistant(inner), user(Result("u2", "Seen."))]
    talk.ask(made, child, "Found.", headers=headers.child, tools=TOOLS, system="Help.")
    between()
    main += [assistant(outer), user(Result("u1", "Found."))]
    talk.ask(made, main, "Done.", headers=headers.main, tools=TOOLS, system="Lead.")
    between()


def check_family(made: Recording) -> None:
    """One session of three agents, each started by the one above, and waited for by it."""
    calls = numbered(made)
    assert len({call.session for call in made.calls}) == 1
    assert [calls[n].role for n in range(1, 6)] == ["main", "subagent", "subagent", "subagent", "main"]
    assert len({call.agent for call in made.calls}) == 3
    assert calls[1].agent == calls[5].agent == calls[2].parent_agent
    assert calls[2].agent == calls[4].agent == calls[3].parent_agent
    assert calls[1].parent_agent is None
    assert [calls[n].spawned_by for n in range(1, 6)] == [None, calls[1].call, calls[2].call, calls[1].call, None]
    assert [calls[n].turn for n in range(1, 6)] == [0, 0, 0, 1, 1]
    assert [calls[n].agent_type for n in (1, 2, 3)] == [None, "explore", "explore"]
    assert [tool.agent for tool in calls[1].tools] == [calls[2].agent]
    assert [(edge.call, edge.kind) for edge in calls[2].after] == [(calls[1].call, "tool")]
    assert (calls[4].call, "subagent") in [(edge.call, edge.kind) for edge in calls[5].after]
    assert (calls[3].call, "subagent") in [(edge.call, edge.kind) for edge in calls[4].after]
    assert (calls[5].gap_kind, calls[5].completed) == ("subagent", True)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_family_is_told_by_its_clients_headers(client: str, tmp_path: Path) -> None:
    """Main agent, sub-agent and one below it, as each client names them: their tree, and who waited for whom."""
    headers = CLIENTS[client]
    talk = Talk(headers.dialect)
    with recording(tmp_path, talk.script) as made:
        family(made, talk, headers)
    check_family(made)


@EVERY
def test_a_family_without_headers_is_told_by_its_prompts(dialect: str, tmp_path: Path) -> None:
    """A new agent's first message is what a tool use told it; the others go on with their own messages."""
    talk = Talk(dialect)
    with recording(tmp_path, talk.script) as made:
        family(made, talk, Headers(dialect, {}, {}, {}))
    check_family(made)


@pytest.mark.parametrize("client", [*CLIENTS, *DIALECTS])
def test_a_recorder_that_was_stopped_goes_on_where_it_was(client: str, tmp_path: Path) -> None:
    """Stopped and started again on its journal after every call: the same family, whether its agents have names or are
    known by their prompts, and prompts that still grow from those before.
    """
    headers = CLIENTS.get(client, Headers(client, {}, {}, {}))
    talk = Talk(headers.dialect)
    with recording(tmp_path, talk.script) as made:
        family(made, talk, headers, made.restart)
    check_family(made)
    calls = numbered(made)
    assert [calls[n].keep for n in (4, 5)] == [calls[n].prompt for n in (2, 1)]


@EVERY
def test_a_request_that_a_kill_cut_off_does_not_part_a_conversation(dialect: str, tmp_path: Path) -> None:
    """It was asked, and the recorder died before its answer: the next one goes on with the agent, which has no name."""
    talk, turns = Talk(dialect), [user("Hello.")]
    with recording(tmp_path, talk.script) as made:
        talk.ask(made, turns, tools=TOOLS)
        turns = grown(turns, 1)
        passing = made.proxy.recorder.passing(dialect, {})
        passing.request(json.dumps(request(dialect, turns, tools=TOOLS)).encode())
        passing.asked()
        made.restart()
        talk.ask(made, grown(turns, 2), tools=TOOLS)
    assert [(call.turn, call.agent) for call in made.calls] == [(turn, made.calls[0].agent) for turn in range(2)]
    assert made.calls[1].keep == made.calls[0].prompt


def grown(turns: list[Turn], number: int) -> list[Turn]:
    """A conversation with one more exchange."""
    return [*turns, assistant("Done."), user(f"More, {number}.")]


@EVERY
@pytest.mark.parametrize("named", [False, True])
def test_two_conversations_in_turns_are_two_sessions(dialect: str, named: bool, tmp_path: Path) -> None:
    """Same tools, same system prompt, one after the other's request: each call goes on with its own."""
    talk, turns = Talk(dialect), {name: [user(f"I am {name}.")] for name in "ab"}
    with recording(tmp_path, talk.script) as made:
        for number in range(4):
            for name in "ab":
                headers = plain("x", name) if named else None
                talk.ask(made, turns[name], headers=headers, tools=TOOLS, system="Lead.")
                turns[name] = grown(turns[name], number)
    calls = numbered(made)
    odd, even = [calls[n] for n in (1, 3, 5, 7)], [calls[n] for n in (2, 4, 6, 8)]
    for own in (odd, even):
        assert len({(call.session, call.agent) for call in own}) == 1
        assert [(call.turn, call.role) for call in own] == [(turn, "main") for turn in range(4)]
        assert [call.prompt_parent for call in own[1:]] == [call.call for call in own[:-1]]
        assert [call.keep for call in own[1:]] == [call.prompt for call in own[:-1]]
    assert odd[0].session != even[0].session


@EVERY
def test_a_changing_system_prompt_does_not_make_another_agent(dialect: str, tmp_path: Path) -> None:
    """The time at the front of the system prompt changes with each call: still one agent, and the break is told."""
    talk, turns = Talk(dialect), [user("Hello.")]
    with recording(tmp_path, talk.script) as made:
        for minute in range(10, 14):
            talk.ask(made, turns, tools=TOOLS, system=f"It is 12:{minute}. Lead.")
            turns = grown(turns, minute)
    assert len({(call.session, call.agent) for call in made.calls}) == 1
    broke = [(call.prefix_break.kind, call.prefix_break.change) for call in made.calls if call.prefix_break]
    assert broke == [("system", "numbers")] * 3


@EVERY
def test_conversations_begun_alike_part_where_they_differ(dialect: str, tmp_path: Path) -> None:
    """Two runs of one prompt at once, without a name: two agents, for the second comes while the first is asked."""
    begun, go = threading.Event(), threading.Event()
    replied: list[Asked] = []

    def script(asked: Asked) -> Reply:
        if not replied:
            replied.append(asked)
            begun.set()
            assert go.wait(10)
        return says(dialect, Said())

    body = request(dialect, [user("Hello.")], tools=TOOLS)
    with recording(tmp_path, script) as made:
        first = threading.Thread(target=made.ask, args=(dialect, body))
        first.start()
        assert begun.wait(10)
        made.ask(dialect, body)
        go.set()
        first.join(10)
    assert [(call.role, call.turn) for call in made.calls] == [("main", 0)] * 2
    assert len({call.session for call in made.calls}) == len({call.agent for call in made.calls}) == 2


def test_calls_beside_the_conversation_have_a_role_of_their_own(tmp_path: Path) -> None:
    """Claude Code asks for a title, without tools, before and after its first call: side calls, each an agent, and one
    that is gone on with is the same one.
    """
    talk, titled = Talk(), "Sum up in three words: "
    with recording(tmp_path, talk.script) as made:
        talk.ask(made, [user(titled + "Hello.")], "A greeting", headers=claude())
        talk.ask(made, [user("Hello.")], headers=claude(), tools=TOOLS, system="Lead.")
        talk.ask(made, [user(titled + "Hello again.")], "Two greetings", headers=claude())
        talk.ask(made, grown([user("Hello.")], 1), headers=claude(), tools=TOOLS, system="Lead.")
        talk.ask(made, grown([user(titled + "Hello again.")], 1), "Greetings", headers=claude())
    calls = numbered(made)
    assert [calls[n].role for n in range(1, 6)] == ["side", "main", "side", "main", "side"]
    assert [calls[n].turn for n in range(1, 6)] == [0, 0, 0, 1, 1]
    assert calls[5].prompt_parent == calls[3].call
    assert len({call.session for call in made.calls}) == 1
    assert len({call.agent for call in made.calls}) == 3
    assert calls[4].prompt_parent == calls[2].call
    assert calls[3].parent_agent == calls[2].agent


@pytest.mark.parametrize(
    ("dialect", "headers", "how"),
    [
        ("messages", claude(), {}),
        ("responses", codex("s-1"), {"x-codex-turn-metadata": '{"request_kind": "compaction"}'}),
        ("chat", {}, {}),
    ],
    ids=["claude", "codex", "none"],
)
def test_a_compaction_is_an_agent_that_grew_from_the_compacted(
    dialect: str, headers: dict[str, str], how: dict[str, str], tmp_path: Path
) -> None:
    """By its instruction or the client's word. It keeps the prompt that it sums up; the next call waits for it, keeps
    only what stands before the conversation, and says why.
    """
    talk, turns = Talk(dialect), grown([user("Hello. " * 50)], 1)
    asked: dict[str, Any] = {"tools": TOOLS, "system": "Lead."}
    with recording(tmp_path, talk.script) as made:
        talk.ask(made, turns[:1], headers=headers, **asked)
        talk.ask(made, turns, headers=headers, **asked)
        summed = "Sum up." if how else SUMMARY
        talk.ask(made, [*turns, assistant("Done."), user(summed)], "All of it.", headers=headers | how, **asked)
        talk.ask(made, [turns[0], user("All of it.")], headers=headers, **asked)
    calls = numbered(made)
    assert [calls[n].role for n in range(1, 5)] == ["main", "main", "compaction", "main"]
    assert calls[3].parent_agent == calls[2].agent == calls[4].agent
    assert (calls[3].prompt_parent, calls[3].keep, calls[3].turn) == (calls[2].call, calls[2].prompt, 0)
    assert calls[3].call in [edge.call for edge in calls[4].after]
    assert (calls[4].prompt_parent, calls[4].turn, calls[4].prefix_change) == (calls[2].call, 2, "compaction")
    assert 0 < calls[4].keep < (calls[2].prompt or 0)


def test_an_agent_goes_on_after_an_error(tmp_path: Path) -> None:
    """A refused call is one of its agent's calls; the next one grows from it, and the session is not failed by it."""
    talk = Talk()

    def script(asked: Asked) -> Reply:
        return talk.script(asked) if "x-test-number" in asked.headers else refuses(400, "invalid_request_error")

    turns = grown([user("Hello.")], 1)
    with recording(tmp_path, script) as made:
        talk.ask(made, turns[:1], headers=claude(), tools=TOOLS)
        made.ask("messages", request("messages", turns, tools=TOOLS), claude())
        talk.ask(made, grown(turns, 2), headers=claude(), tools=TOOLS)
    assert [(call.status, call.turn, call.role) for call in made.calls] == [
        (200, 0, "main"),
        (400, 1, "main"),
        (200, 2, "main"),
    ]
    first, failed, last = made.calls
    assert (failed.prompt, failed.keep, last.prompt_parent) == (None, first.prompt, failed.call)
    assert last.keep == failed.prompt_tokens
    assert [call.completed for call in made.calls] == [True] * 3


def test_sessions_do_not_mix(tmp_path: Path) -> None:
    """The same words and agent ids in two sessions of Claude Code: two sessions, with nothing that points across."""
    talk = Talk()
    with recording(tmp_path, talk.script) as made:
        for session in ("one", "two"):
            headers = (claude(session=session), claude("a1", session=session), claude("a2", "a1", session=session))
            family(made, talk, Headers("messages", *headers))
    sessions: dict[str, list[Call]] = {}
    for call in made.calls:
        sessions.setdefault(call.session, []).append(call)
    assert [len(calls) for calls in sessions.values()] == [5, 5]
    one, two = ({call.agent for call in calls} for calls in sessions.values())
    assert not one & two
    for calls in sessions.values():
        known = {call.call for call in calls}
        assert {edge.call for call in calls for edge in call.after} <= known
        assert {call.prompt_parent for call in calls} <= known | {None}


@pytest.mark.parametrize("client", CLIENTS)
def test_agents_whose_parent_was_not_seen_are_one_session(client: str, tmp_path: Path) -> None:
    """The recorder came later than the main agent: two agents that it started are still of one session, and go on."""
    headers, talk = CLIENTS[client], Talk(CLIENTS[client].dialect)
    other = {
        name: value.replace("a1", "a9").replace("t-2", "t-9").replace("q", "z") for name, value in headers.child.items()
    }
    with recording(tmp_path, talk.script) as made:
        for one in (headers.child, other, headers.child):
            talk.ask(made, [user("Look outside.")], headers=one, tools=TOOLS)
    assert [call.role for call in made.calls] == ["subagent"] * 3
    assert len({call.session for call in made.calls}) == 1
    assert [call.turn for call in made.calls] == [0, 0, 1]
    assert made.calls[0].agent == made.calls[2].agent != made.calls[1].agent


@EVERY
def test_a_title_asked_of_the_first_message_is_a_side_call(dialect: str, tmp_path: Path) -> None:
    """A call without tools that repeats the conversation's first message, and no more of it, is beside it."""
    talk, named = Talk(dialect), {"x-session-id": "s"}
    said = [user("Do it."), assistant("Done."), user("More."), assistant("Done."), user("And more.")]
    with recording(tmp_path, talk.script) as made:
        for turns, tools in ((said[:1], TOOLS), (said[:3], TOOLS), (said[:1], ()), (said, TOOLS)):
            talk.ask(made, turns, tools=tools, headers=named)
    assert [call.role for call in made.calls] == ["main", "main", "side", "main"]
    assert {call.prefix_break for call in made.calls} == {None}
