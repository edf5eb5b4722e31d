"""Blocks: prompts in a real agent's roles, that servers take, that grow by what is new and cost what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import orjson
import pytest
from asking import KINDS, blocks_of, body_of, prompts, steps
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keepwarm.replayers.blocks import Block, label
from keepwarm.replayers.endpoint import Piece, Said
from keepwarm.replayers.prompts import cut
from keepwarm.replayers.tokens import Costs
from keepwarm.traces.model import Breakpoint

DIALECTS = ("messages", "chat", "responses")
NAMES = ("tool", "system", "user", "answer", "use", "result")
Steps = list[tuple[float, list[tuple[str, int]], int]]
Turn = tuple[str, str | None]
"""Who says it: ``user``, ``answer``, or a use or result with its id."""

COSTS = st.builds(
    lambda tokens, tools: Costs(overheads={(a, b): tokens[i] for i, (a, b) in enumerate(PAIRS)}, tools=tools),
    st.lists(st.integers(1, 9), min_size=42, max_size=42),
    st.booleans(),
)
PAIRS = [(before, role) for before in ("", *NAMES) for role in NAMES]
ANY = steps(*KINDS)
AGENTS = steps("answer", "answer", "tool_result", "tool_result", "hidden", "user")


def pieces(kinds: str, tokens: int = 5) -> list[Piece]:
    """A piece of so many tokens for each kind."""
    return [Piece(ident, tokens, kind) for ident, kind in enumerate(kinds.split())]


def roles(prompt: list[Piece], costs: Costs) -> str:
    """Who says a prompt's blocks, but for the tool that prompts without one start with where endpoints take any."""
    told = [block.role for block in blocks_of(prompt, costs)]
    return " ".join(told[1:] if costs.tools and prompt and prompt[0].kind != "tools" else told)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("lead tools system user", "system system system user"),
        ("tools tools lead tools user", "tool tool system system user"),
        ("lead user answer tool_result", "system user use result"),
        ("user answer answer tool_result", "user answer use result"),
        ("user answer answer tool_result tool_result", "user use use result result"),
        ("user answer tool_result tool_result tool_result", "user use use use result result result"),
        ("user answer hidden tool_result tool_result", "user use use result result"),
        ("user answer answer hidden tool_result user answer user", "user answer answer use result user answer user"),
        ("user answer answer hidden user", "user answer answer user user"),
        ("user tool_result answer user", "user user answer user"),
        ("user answer user tool_result", "user answer user user"),
        ("system user system user", "system user user user"),
        ("user tools", "user user"),
        ("lead answer answer user", "system user answer user"),
        ("answer tool_result", "user user"),
        ("user answer", "user user"),
        ("user answer answer", "user answer user"),
        ("lead", "system user"),
        ("tools", "tool user"),
        ("", "user"),
    ],
)
def test_roles_follow_kinds(kinds: str, expected: str) -> None:
    """Tools and system text stand at the start, results have their uses, and the user opens and closes."""
    assert roles(pieces(kinds), Costs()) == expected


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("tools lead user", "system system user"),
        ("user answer answer tool_result user", "user answer answer user user"),
        ("user answer hidden tool_result tool_result", "user answer answer user user"),
    ],
)
def test_without_tools_all_is_text(kinds: str, expected: str) -> None:
    """Where an endpoint takes no tools, what was an agent's use is an answer, and what was a result is the user's."""
    assert roles(pieces(kinds), Costs(tools=False)) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (10, "user use use result result"),
        (9, "user answer user user"),
        (4, "user answer user user"),
        (3, "user user user user"),
    ],
)
def test_a_step_of_fewer_tokens_than_its_use_takes_is_text(tokens: int, expected: str) -> None:
    """Two uses and results take ten tokens here, an answer and a word four: a step of less is not made longer."""
    known = {("user", "use"): 3, ("use", "use"): 1, ("use", "result"): 4, ("result", "result"): 2}
    costs = Costs(overheads=known | {("user", "answer"): 2, ("answer", "user"): 2})
    prompt = [Piece(1, 5, "user"), Piece(2, tokens - 2, "answer"), *(Piece(n, 1, "tool_result") for n in (3, 4))]
    assert roles(prompt, costs) == expected


def test_names_take_as_many_characters_whatever_they_are() -> None:
    """A letter and a digit, twice over; 67,600 of them before the first comes again."""
    names = [label(number) for number in range(67_600)]
    assert names[:2] == ["a0a0", "a0a1"]
    assert len(set(names)) == len(names)
    assert {tuple(letter.isdigit() for letter in name) for name in names} == {(False, True, False, True)}


def said_in_messages(body: dict[str, Any]) -> Iterator[Turn]:
    """Who says what in the Messages API, whose turns must take turns."""
    found = [message["role"] for message in body["messages"]]
    assert found == ["user", "assistant"] * (len(found) // 2) + ["user"]
    for message in body["messages"]:
        assert message["content"]
        kinds = [block["type"] for block in message["content"]]
        assert kinds == sorted(kinds, key=["tool_result", "text", "tool_use"].index)
        for block in message["content"]:
            if block["type"] == "text":
                assert block["text"].strip()
                yield ("user" if message["role"] == "user" else "answer"), None
            elif block["type"] == "tool_use":
                assert message["role"] == "assistant"
                yield "use", block["id"]
            else:
                assert message["role"] == "user"
                yield "result", block["tool_use_id"]


def said_in_chat(body: dict[str, Any]) -> Iterator[Turn]:
    """Who says what in chat; the system speaks first, and once."""
    for index, message in enumerate(body["messages"]):
        if message["role"] == "system":
            assert index == 0
        elif message["role"] == "tool":
            yield "result", message["tool_call_id"]
        else:
            assert message["content"] or message["tool_calls"]
            if message["content"]:
                yield ("user" if message["role"] == "user" else "answer"), None
            for use in message.get("tool_calls", ()):
                assert message["role"] == "assistant"
                assert set(orjson.loads(use["function"]["arguments"])) == {"text"}
                yield "use", use["id"]


def said_in_responses(body: dict[str, Any]) -> Iterator[Turn]:
    """Who says what in the Responses API."""
    for item in body["input"]:
        if item["type"] == "message":
            assert item["content"]
            yield ("user" if item["role"] == "user" else "answer"), None
        else:
            yield ("use" if item["type"] == "function_call" else "result"), item["call_id"]


SAID = {"messages": said_in_messages, "chat": said_in_chat, "responses": said_in_responses}


def check_turns(turns: Sequence[Turn]) -> None:
    """What every API demands: a user first, an answer never last, each run of uses with its results right behind."""
    assert turns[0][0] == "user"
    assert turns[-1][0] in ("user", "result")
    used = [ident for role, ident in turns if role == "use"]
    assert len(set(used)) == len(used)
    at = 0
    while at < len(turns):
        if turns[at][0] not in ("use", "result"):
            at += 1
            continue
        uses = 0
        while turns[at + uses][0] == "use":
            uses += 1
        assert uses, "a result of no use"
        asked, told = turns[at : at + uses], turns[at + uses : at + 2 * uses]
        assert [("result", ident) for _, ident in asked] == list(told)
        at += 2 * uses
        assert at == len(turns) or turns[at][0] != "result"


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=40, deadline=None)
@given(asked=st.one_of(ANY, AGENTS), costs=COSTS, last=st.integers(0, 100))
def test_every_prompt_is_one_that_servers_take(dialect: str, asked: Steps, costs: Costs, last: int) -> None:
    """Whatever pieces a prompt has, and wherever it is cut: its body has an agent's turns, and uses an offered tool."""
    for prompt in prompts(asked):
        cut_off = cut(prompt, max(sum(piece.tokens for piece in prompt) - last, 0))
        for one in (prompt, cut_off):
            body = orjson.loads(body_of(dialect, blocks_of(one, costs)))
            turns = list(SAID[dialect](body))
            check_turns(turns)
            tools = [tool.get("function", tool)["name"] for tool in body.get("tools", ())]
            assert len(set(tools)) == len(tools)
            if any(role == "use" for role, _ in turns):
                assert "a0a0" in tools
            assert costs.tools or not tools


def ends(prompt: Sequence[Piece]) -> list[int]:
    """Where a prompt can have ended: behind a user's words, or behind a tool's last result."""
    kinds = [piece.kind for piece in prompt]
    after = [*kinds[1:], ""]
    return [
        at + 1
        for at, (kind, follows) in enumerate(zip(kinds, after, strict=True))
        if kind == "user" or (kind == "tool_result" and follows != "tool_result")
    ]


def parts(dialect: str, blocks: Sequence[Block]) -> bytes:
    """A body's prompt, without what closes it."""
    body = body_of(dialect, blocks)
    first = min(
        at
        for name in (b'"tools"', b'"system"', b'"messages"', b'"instructions"', b'"input"', b'"prompt"')
        if (at := body.find(name)) >= 0
    )
    return body[first:].rstrip(b'"}]n\\')


@pytest.mark.parametrize("dialect", [*DIALECTS, "completions"])
@settings(max_examples=40, deadline=None)
@given(asked=st.one_of(ANY, AGENTS), costs=COSTS)
def test_a_prompt_repeats_the_bytes_of_what_it_grew_from(dialect: str, asked: Steps, costs: Costs) -> None:
    """Wherever prompts had ended before, their bytes stand at the start of what grew from them, and of its forks; what
    is cut inside a user's words has the start of those words.
    """
    for prompt in prompts(asked):
        whole, grown = blocks_of(prompt, costs), parts(dialect, blocks_of(prompt, costs))
        for end in ends(prompt):
            before = blocks_of(prompt[:end], costs)
            assert whole[: len(before)] == before
            assert grown.startswith(parts(dialect, before))
            last = prompt[end - 1]
            if last.kind == "user" and last.tokens > 1:
                shorter = blocks_of([*prompt[: end - 1], last._replace(tokens=last.tokens // 2)], costs)
                assert before[: len(shorter) - 1] == shorter[:-1]
                assert before[len(shorter) - 1].text.startswith(shorter[-1].text)


@settings(max_examples=30, deadline=None)
@given(asked=AGENTS, costs=COSTS, marks=st.lists(st.builds(Breakpoint, st.integers(1, 200), st.just(300)), max_size=3))
def test_marks_change_nothing_but_themselves(asked: Steps, costs: Costs, marks: list[Breakpoint]) -> None:
    """With marks the blocks are the same, and each mark that is in the prompt stands on one of them."""
    prompt = prompts(asked)[-1]
    plain, marked = blocks_of(prompt, costs), blocks_of(prompt, costs, marks)
    assert [block._replace(ttl_s=None) for block in marked] == plain
    assert (sum(block.ttl_s is not None for block in marked) > 0) == bool(marks)


def cost(blocks: Sequence[Block], costs: Costs) -> float:
    """What blocks take: an overhead each, and a word's tokens for each word after its first."""
    told = [block for block in blocks if block.role != "tool" or block.name != "a0a0" or not offered_alone(blocks)]
    found = sum(costs.overheads[pair] for pair in pairwise(["", *(block.role for block in told)]))
    return found + costs.word * sum(len(block.text.split()) - 1 for block in told)


def offered_alone(blocks: Sequence[Block]) -> bool:
    """Whether a prompt has but the tool of one word that is offered for the uses' sake: every probe has it too."""
    return [block.text for block in blocks if block.role == "tool"] == [b"note"]


@settings(max_examples=60, deadline=None)
@given(asked=st.one_of(ANY, AGENTS), costs=COSTS, word=st.sampled_from([1.0, 1.0, 1.75]))
def test_a_prompt_costs_what_was_planned(asked: Steps, costs: Costs, word: float) -> None:
    """Where every piece is larger than what blocks take beyond words, all add up to the plan: to the token if a word is
    one, or else to the nearest word.
    """
    costs = costs._replace(word=word)
    for prompt in prompts(asked):
        large = [piece._replace(tokens=piece.tokens + 150) for piece in prompt]
        planned = sum(piece.tokens for piece in large)
        assert abs(cost(blocks_of(large, costs), costs) - planned) <= (0 if word == 1.0 else word / 2)


def test_small_pieces_are_made_up_for_by_the_next() -> None:
    """Five pieces of a token where a block takes four are 20 tokens for 5: the next piece of 40 has 15 less."""
    costs = Costs(overheads=dict.fromkeys(PAIRS, 4), tools=False)
    small = [Piece(ident, 1, "user") for ident in range(5)]
    for more in (40, 20):
        blocks = blocks_of([*small, Piece(9, more, "user")], costs)
        assert [len(block.text.split()) for block in blocks] == [1, 1, 1, 1, 1, more - 18]
        assert cost(blocks, costs) == 5 + more


def test_live_answers_stand_in_place_of_the_recorded_ones() -> None:
    """Of two calls the first one's answer was heard: it stands once in place of its two pieces, use and result stay,
    and the rest of the prompt makes up for its tokens.
    """
    kinds = [(1, 50, "user", None), (2, 20, "answer", "c1"), (3, 10, "answer", "c1"), (4, 40, "tool_result", None)]
    kinds += [(5, 30, "answer", "c2"), (6, 60, "user", None)]
    prompt = [Piece(*piece) for piece in kinds]
    costs = Costs(overheads=dict.fromkeys(PAIRS, 2))
    recorded, live = blocks_of(prompt, costs), blocks_of(prompt, costs, said={"c1": Said(b"yes\\n", 17)})
    assert [block.role for block in recorded] == ["tool", "user", "answer", "use", "result", "answer", "user"]
    assert [block.role for block in live] == [block.role for block in recorded]
    assert [block.text for block in live if block.role in ("answer", "use")][:2] == [b"yes\\n", b"note"]
    heard = cost([block for block in live if block.text != b"yes\\n"], costs) - 2 + 2 - 1 + 17 + 2
    assert heard == pytest.approx(cost(recorded, costs), abs=2)
    assert live[-1] == recorded[-1]
    assert blocks_of(prompt, costs, said={"other": Said(b"no", 1)}) == recorded


TOLD = st.tuples(st.sampled_from(["answer", "answer", "tool_result", "user"]), st.sampled_from(["c1", "c2"]))


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=60, deadline=None)
@example(told=[("answer", "c1"), ("answer", "c2"), ("tool_result", ""), ("tool_result", "")], heard={"c1", "c2"})
@given(told=st.lists(TOLD, min_size=3, max_size=9), heard=st.sets(st.sampled_from(["c1", "c2"]), min_size=1))
def test_live_answers_are_an_agents_turns_too(dialect: str, told: list[tuple[str, str]], heard: set[str]) -> None:
    """Whichever calls' answers were heard, even of two calls with nothing said between: servers take the prompt, and
    no answer stands in it twice in a row.
    """
    said = {name: Said(f"heard {name}".encode(), 2) for name in heard}
    parts = [("user", ""), *told, ("user", "")]
    prompt = [Piece(i, 9, kind, name if kind == "answer" else None) for i, (kind, name) in enumerate(parts)]
    blocks = blocks_of(prompt, said=said)
    check_turns(list(SAID[dialect](orjson.loads(body_of(dialect, blocks)))))
    found = [block.text for block in blocks]
    assert all(one != other for one, other in pairwise(found) if one.startswith(b"heard"))
    assert {text for text in found if text.startswith(b"heard")} <= {answer.text for answer in said.values()}
