"""The prompts of a recording: segments that add up, identities that agree, and why a prefix broke."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from dialects import DIALECTS, Result, Said, Tokens, Turn, Use, assistant, request, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording import Asked, Recording, Reply, Talk, numbered, recording, refuses, says

from keepwarm.traces.model import Call, PrefixBreak, Segment

TOOLS = "Bash", "Read", "Agent", "Grep"
EVERY = pytest.mark.parametrize("dialect", DIALECTS)


def whole_prompts(calls: list[Call]) -> dict[str, list[Segment]]:
    """Each call's prompt in full, rebuilt from what its row refers to; a row may refer to earlier rows only."""
    prompts: dict[str, list[Segment]] = {}
    for call in calls:
        room, held = call.keep, list[Segment]()
        for segment in prompts[call.prompt_parent] if call.prompt_parent else ():
            if room > 0:
                held.append(segment._replace(tokens=min(segment.tokens, room)))
            room -= segment.tokens
        assert room <= 0
        prompts[call.call] = [*held, *call.append]
    return prompts


def broken(folder: Path, dialect: str, *prompts: dict[str, Any]) -> PrefixBreak | None:
    """The second of two prompts of one agent: its break, checked to lie where the prompts part."""
    talk = Talk(dialect)
    with recording(folder, talk.script) as made:
        for prompt in prompts:
            talk.ask(made, **prompt, headers={"x-session-id": "s"})
    first, second = made.calls
    assert (first.agent, first.prefix_break) == (second.agent, None)
    broke, held = second.prefix_break, first.append
    if broke is not None:
        ends = [0, *accumulate(segment.tokens for segment in held)]
        assert broke.at == second.keep == min(ends[broke.position], second.prompt or 0)
        differs = second.append[0] if broke.change == "added" else held[broke.position]
        assert (broke.kind, broke.tokens) == (differs.kind, differs.tokens)
        assert broke.kind == held[broke.position].kind or broke.change == "added"
    else:
        assert second.keep == first.prompt
    return broke


LONG = "A line of a file.\n" * 40
USE = Use("u1", "Read", {"file_path": "x"})
BEFORE = [user("Hello."), assistant(USE), user(Result("u1", LONG), "And?"), assistant("Yes."), user("Good.")]
ASKED: dict[str, Any] = {"turns": BEFORE, "tools": TOOLS, "system": "It is 12:01. Lead."}
AFTER = [*BEFORE, assistant("Done."), user("More.")]


def edited(at: int, turn: Turn) -> list[Turn]:
    """The conversation gone on with, one of its turns another."""
    return [*AFTER[:at], turn, *AFTER[at + 1 :]]


BREAKS: dict[str, tuple[dict[str, Any], tuple[int, str, str] | None]] = {
    "nothing": ({}, None),
    "numbers": ({"system": "It is 12:02. Lead."}, (4, "system", "numbers")),
    "system changed": ({"system": "It is late. Lead."}, (4, "system", "changed")),
    "reordered": ({"tools": ("Bash", "Agent", "Read", "Grep")}, (1, "tools", "reordered")),
    "tool added": ({"tools": ("Bash", "Edit", "Read", "Agent", "Grep")}, (1, "tools", "added")),
    "tool added last": ({"tools": (*TOOLS, "Edit")}, (4, "tools", "added")),
    "tool removed": ({"tools": ("Bash", "Agent", "Grep")}, (1, "tools", "removed")),
    "cleared": ({"turns": edited(2, user(Result("u1", "[cleared]"), "And?"))}, (7, "tool_result", "cleared")),
    "result changed": ({"turns": edited(2, user(Result("u1", LONG + "!"), "And?"))}, (7, "tool_result", "changed")),
    "changed": ({"turns": edited(3, assistant("No."))}, (9, "answer", "changed")),
    "rewritten": (
        {"turns": [*BEFORE[:2], user("Forget it."), assistant("Yes, I do.")]},
        (7, "tool_result", "rewritten"),
    ),
    "cut": ({"turns": BEFORE[:-2]}, (9, "answer", "cut")),
}


@EVERY
@pytest.mark.parametrize("why", BREAKS)
def test_why_a_prefix_broke(why: str, dialect: str, tmp_path: Path) -> None:
    """The first segment that differs from the agent's previous prompt: where, what kind, how large, and how."""
    more, expected = BREAKS[why]
    broke = broken(tmp_path, dialect, ASKED, ASKED | {"turns": AFTER} | more)
    assert (broke and (broke.position, broke.kind, broke.change)) == expected


@EVERY
def test_a_cleared_result_is_a_microcompaction(dialect: str, tmp_path: Path) -> None:
    """The call says that this is why its prefix is shorter."""
    talk = Talk(dialect)
    with recording(tmp_path, talk.script) as made:
        talk.ask(made, **ASKED)
        talk.ask(made, **ASKED | BREAKS["cleared"][0])
    assert [call.prefix_change for call in made.calls] == [None, "microcompaction"]


def test_shapes_and_marks_that_no_model_sees_change_nothing(tmp_path: Path) -> None:
    """A string or a list of one text, another order of keys, other ids, a cache mark that moved on: the same prefix."""
    mark = {"cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "u1", "content": "Text."}
    first = {
        "model": "m",
        "tools": [{"name": "Read", "description": "d", "input_schema": {"type": "object", "required": ["a"]}, **mark}],
        "system": "Lead.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello.", **mark}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "u1", "name": "Read", "input": {"a": 1, "b": 2}}],
            },
            {"role": "user", "content": [result]},
        ],
    }
    other_use = {"name": "Read", "input": {"b": 2, "a": 1}, "id": "u9", "type": "tool_use"}
    other_result = {"content": [{"text": "Text.", "type": "text"}], "type": "tool_result", "tool_use_id": "u9", **mark}
    second = {
        "messages": [
            {"content": "Hello.", "role": "user"},
            {"role": "assistant", "content": [other_use]},
            {"role": "user", "content": [other_result]},
            {"role": "assistant", "content": "Done."},
            {"role": "user", "content": [{"type": "text", "text": "More.", **mark}]},
        ],
        "system": [{"type": "text", "text": "Lead.", **mark}],
        "tools": [{"input_schema": {"required": ["a"], "type": "object"}, "description": "d", "name": "Read"}],
        "model": "m",
    }
    with recording(tmp_path, lambda asked: says("messages", Said(tokens=Tokens(len(asked.body), 5)))) as made:
        made.ask("messages", first)
        made.ask("messages", second)
    one, other = made.calls
    assert (other.agent, other.prefix_break, other.prompt_parent, other.keep) == (one.agent, None, one.call, one.prompt)
    assert [segment.kind for segment in other.append] == ["answer", "user"]


@EVERY
def test_equal_content_is_one_segment_wherever_it_stands(dialect: str, tmp_path: Path) -> None:
    """Two sessions of other lengths with the same tools and system prompt: the same identities and sizes, so that what
    one has read is warm for the other; the text that only one of them has is in no other.
    """
    talk = Talk(dialect)
    with recording(tmp_path, talk.script) as made:
        for name, words in (("a", 3), ("b", 300), ("c", 40)):
            turns = [user(f"I am {name}. " + "Word. " * words)]
            talk.ask(made, turns, headers={"x-session-id": name}, tools=TOOLS, system="Lead well.")
    prompts = [[(segment.hash, segment.tokens) for segment in call.append] for call in made.calls]
    assert [len(prompt) for prompt in prompts] == [6, 6, 6]
    assert prompts[0][:5] == prompts[1][:5] == prompts[2][:5]
    assert len({prompt[5][0] for prompt in prompts}) == 3
    assert len({hash_ for hash_, _ in prompts[0]}) == 6


def test_another_model_keeps_nothing(tmp_path: Path) -> None:
    """The same conversation asked of another model: nothing of its prefix is warm there; back again, all of it is."""
    talk, models = Talk(), ("claude-opus-4-8", "claude-haiku-4-5", "claude-opus-4-8")
    with recording(tmp_path, talk.script) as made:
        for model in models:
            talk.ask(made, **ASKED, headers={"x-session-id": "s"}, model=model)
    first, second, third = made.calls
    assert [call.model for call in made.calls] == list(models)
    assert (second.keep, second.prefix_change, third.prefix_change) == (0, "model_switch", "model_switch")
    assert (third.keep, third.prompt_parent) == (first.prompt, first.call)


@EVERY
def test_ids_that_come_again_confuse_nothing(dialect: str, tmp_path: Path) -> None:
    """A server that gives each answer the same id, and its tool uses too: calls are told apart, and each tool use has
    the result that came next.
    """
    use, turns = Use("call_0", "Bash", {"command": "ls"}), [user("Hello.")]
    with recording(tmp_path, lambda asked: says(dialect, Said((use,), Tokens(len(asked.body), 9), id="id-1"))) as made:
        for number in range(4):
            made.ask(dialect, request(dialect, turns))
            turns += [assistant(use), user(Result(use.id, "x" * 500 * (number + 1)))]
    assert len({call.call for call in made.calls}) == 4
    assert [call.prompt_parent for call in made.calls] == [None, *(call.call for call in made.calls[:-1])]
    for call, after in pairwise(made.calls):
        given = [segment.tokens for segment in after.append if segment.kind == "tool_result"]
        assert [tool.result_tokens for tool in call.tools] == given
        assert [(tool.start_ns or 0) + (tool.duration_ns or 0) for tool in call.tools] == [after.start_ns]
    assert made.calls[-1].tools[0].duration_ns is None


TEXTS = st.sampled_from(["Hello.", "", "Go on, 17.", "Wörter, 漢字 and \x00.", "x" * 3000, '{"a": 1}'])
STEP = st.tuples(
    st.integers(0, 3),
    st.sampled_from(["grow", "grow", "grow", "tool", "edit", "cut", "system", "fork", "again"]),
    TEXTS,
    st.sampled_from([200, 200, 200, 529, 400]),
    st.one_of(st.none(), st.integers(0, 3000)),
)


class Conversations:
    """Conversations that grow, fork, and change as drawn, each asked in its own name or in none."""

    def __init__(self, dialect: str, named: bool) -> None:
        self.dialect = dialect
        self.turns: list[list[Turn]] = [[user(f"I am {name}.")] for name in "abcd"]
        self.system = ["Lead."] * 4
        self.prompts: dict[int, int | None] = {}
        self.asked = 0
        self._named = named
        self._reply = Reply()

    def script(self, _: object) -> Reply:
        """What the upstream answers."""
        return self._reply

    def _change(self, who: int, how: str, text: str) -> None:
        turns = self.turns[who]
        if how in ("grow", "tool"):
            use = Use(f"u{len(turns)}", "Bash", {"command": text})
            said = assistant(use), user(Result(use.id, text))
            turns += said if how == "tool" else (assistant(text or "Hm."), user(text or "Go on."))
        elif how == "edit":
            turns[len(turns) // 2] = turns[len(turns) // 2]._replace(said=(text or "Edited.",))
        elif how == "cut":
            del turns[max(1, len(turns) - 2) :]
        elif how == "system":
            self.system[who] = f"Lead. {text}"
        elif how == "fork":
            self.turns[who] = list(self.turns[(who + 1) % 4])

    def step(self, made: Recording, drawn: tuple[int, str, str, int, int | None]) -> None:
        """Change a conversation, and ask it."""
        who, how, text, status, tokens = drawn
        self._change(who, how, text)
        self.asked += 1
        told = None if tokens is None else Tokens(tokens, self.asked)
        self._reply = refuses(status) if status != 200 else says(self.dialect, Said((text or "Hm.",), told))
        body = request(self.dialect, self.turns[who], system=self.system[who], tools=TOOLS[: 2 + who])
        made.ask(self.dialect, body, {"x-session-id": "abcd"[who]} if self._named else {})
        if told is not None and status == 200:
            self.prompts[self.asked] = tokens


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dialect=st.sampled_from(DIALECTS), named=st.booleans(), steps=st.lists(STEP, min_size=1, max_size=12))
def test_whatever_was_asked_the_trace_holds_together(
    dialect: str, named: bool, steps: list[tuple[int, str, str, int, int | None]], tmp_path: Path
) -> None:
    """Random conversations, forks, edits, errors, absent and absurd accounts: every answered call is a row, its prompt
    is what was told, rows refer to earlier rows of their session only, equal segments are equal.
    """
    talk = Conversations(dialect, named)
    with recording(tmp_path, talk.script) as made:
        for step in steps:
            talk.step(made, step)
    rows = [call for call in made.calls if call.prompt is not None]
    assert {call.output: call.prompt for call in rows} == talk.prompts
    assert sum(1 + (call.retries or 0) for call in made.calls) == talk.asked
    prompts = whole_prompts(made.calls)
    seen: dict[str, str] = {}
    for call in made.calls:
        assert call.prompt in (None, call.prompt_tokens)
        assert all(segment.tokens > 0 for segment in call.append)
        for other in [call.prompt_parent, call.spawned_by, *(edge.call for edge in call.after)]:
            assert other is None or seen[other] == call.session
        assert (call.prompt_parent is None) <= (call.keep == 0)
        for segment in prompts[call.call]:
            assert segment.answer_of is None or seen[segment.answer_of] == call.session
        assert [call.start_ns, call.end_ns] == sorted([call.start_ns, call.end_ns])
        seen[call.call] = call.session


def test_numbers_tell_calls_apart(tmp_path: Path) -> None:
    """The talk that these tests lean on: each call gets the answer that was meant for it."""
    talk = Talk("chat", stream=True)
    with recording(tmp_path, talk.script) as made:
        asked = [talk.ask(made, [user(f"Question {n}.")]) for n in range(3)]
    assert sorted(numbered(made)) == asked == [1, 2, 3]


def test_a_conversation_that_the_provider_keeps_is_known(tmp_path: Path) -> None:
    """Requests that name an earlier answer hold its conversation, and are one agent's; instructions are not kept."""
    prompts = iter((100, 160, 230))

    def script(asked: Asked) -> Reply:
        told = asked.json()
        ident = f"resp {told.get('previous_response_id')}"
        answer = Said(("Yes.",), Tokens(next(prompts), output=9), id=ident)
        return says("responses", answer)

    with recording(tmp_path, script) as made:
        before = None
        for words in ("One.", "Two.", "Three."):
            body = {"model": "m", "instructions": "Be brief.", "input": [{"role": "user", "content": words}]}
            before = made.ask("responses", body | ({"previous_response_id": before} if before else {})).json()["id"]
    first, second, third = made.calls
    assert {call.agent for call in made.calls} == {first.agent}
    assert [call.keep for call in made.calls] == [0, 100, 160]
    assert [call.prompt_parent for call in made.calls] == [None, first.call, second.call]
    assert [(s.kind, s.answer_of) for s in third.append] == [("answer", second.call), ("user", None)]
