"""Writer: a prompt that grows is written on from where it was, and comes out byte for byte as if written anew."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from asking import blocks_of, prompts, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.replayers.chat import CHAT
from keepwarm.replayers.endpoint import Piece, Said
from keepwarm.replayers.http import DIALECTS
from keepwarm.replayers.tokens import Costs
from keepwarm.replayers.writer import Buffer, Writer, body, buffers
from keepwarm.traces.model import Breakpoint

KINDS = ("lead", "tools", "system", "user", "answer", "answer", "tool_result", "tool_result", "hidden")
COSTS = st.sampled_from(
    [
        Costs(),
        Costs(tools=False),
        Costs(word=1.7, overheads={("user", "use"): 6.0, ("use", "result"): 11.0, ("user", "answer"): 3.0}),
    ]
)
MARKS = st.lists(st.builds(Breakpoint, st.integers(0, 400), st.sampled_from([300, 3600])), max_size=6)


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=150, deadline=None)
@given(made=steps(*KINDS), costs=COSTS, marks=MARKS, live=st.booleans())
def test_written_on_is_written_anew(dialect: str, made: Any, costs: Costs, marks: list[Breakpoint], live: bool) -> None:
    """Whatever a prompt keeps of the one before, cut anywhere, its body has the bytes that it has without that one."""
    said = {"c": Said(b"what it said\\n", 9)} if live and dialect != "completions" else None
    known = None
    ids = dialect == "completions"
    on = Writer(costs, ids=ids)
    for prompt in prompts(made):
        prompt = tuple(piece._replace(answer_of="c" if piece.ident % 3 == 0 else None) for piece in prompt)
        known = on.write(prompt, said, known)
        pieces = buffers(DIALECTS[dialect], b'{"model":"m"}', known, marks)
        assert b"".join(pieces) == body(
            DIALECTS[dialect], b'{"model":"m"}', blocks_of(prompt, costs, marks, said, ids=ids)
        )
        orjson.loads(b"".join(pieces))


def test_a_grown_prompt_costs_what_is_new() -> None:
    """Only new blocks are written, a run that may go on once more where it did; what was sent before is not touched,
    most of it is one object all the time, and the pieces to send stay few.
    """
    writer, fragment, known = Writer(Costs()), Mock(wraps=CHAT.fragment), None
    dialect = CHAT._replace(fragment=fragment)
    prompt = tuple(Piece(-ident, 900, "system") for ident in range(1, 99))
    asked, largest = [], []
    sent: list[tuple[list[Buffer], bytes]] = []
    for turn in range(100):
        prompt = (*prompt, Piece(2 * turn + 1, 9, "answer"), Piece(2 * turn + 2, 9, "tool_result"))
        known, before = writer.write(prompt, None, known), fragment.call_count
        pieces = buffers(dialect, b"{}", known)
        asked.append(fragment.call_count - before)
        largest.append(max(map(memoryview, pieces), key=len).obj)
        sent.append((pieces, b"".join(pieces)))
    assert asked[1:] == [2] * 99
    assert all(one is largest[0] for one in largest)
    assert max(len(pieces) for pieces, _ in sent) < 16
    assert all(b"".join(pieces) == then for pieces, then in sent)
    prompt, before = (*prompt, Piece(0, 9, "tool_result")), fragment.call_count
    assert b"".join(buffers(dialect, b"{}", writer.write(prompt, None, known)))
    assert fragment.call_count - before == 4
