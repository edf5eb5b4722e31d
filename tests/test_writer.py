"""Writer: a prompt that grows is written on from where it was, and comes out byte for byte as if written anew."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from asking import prompts, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.replayers.endpoint import Piece, Said
from keepwarm.replayers.http import DIALECTS
from keepwarm.replayers.tokens import Costs
from keepwarm.replayers.writer import Writer, body, buffers
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
    on, anew = (Writer(costs, ids=dialect == "completions") for _ in range(2))
    for prompt in prompts(made):
        prompt = tuple(piece._replace(answer_of="c" if piece.ident % 3 == 0 else None) for piece in prompt)
        known = on.write(prompt, said, known)
        pieces = buffers(DIALECTS[dialect], b'{"model":"m"}', known, marks)
        assert b"".join(pieces) == body(DIALECTS[dialect], b'{"model":"m"}', anew.blocks(prompt, marks, said))
        orjson.loads(b"".join(pieces))


def test_a_grown_prompt_costs_what_is_new() -> None:
    """All fragments of the prompt before but those of its last run are the very objects that were sent before."""
    writer, prompt, known = Writer(Costs()), (Piece(1, 9, "system"), Piece(2, 9, "user")), None
    kept: list[bytes] = []
    for turn in range(3, 40):
        prompt = (*prompt, Piece(10 * turn, 9, "answer"), Piece(10 * turn + 1, 9, "tool_result"))
        known = writer.write(prompt, None, known)
        sent = buffers(DIALECTS["chat"], b"{}", known)[1:-1]
        assert all(one is other for one, other in zip(sent, kept[: len(kept) - 2], strict=False))
        kept = sent
