"""Block is a piece of a prompt as a dialect writes it: in a role, with its words, marked or not.

The roles are a real agent's: tools, then system blocks, then a user's words, answers, tool uses and their results. What
a block is depends on the pieces before it and on the results that follow an answer, so that a grown prompt repeats the
blocks of what it grew from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from keepwarm.replayers.endpoint import Piece, Said
from keepwarm.replayers.text import PromptText
from keepwarm.replayers.tokens import Costs
from keepwarm.traces.model import Breakpoint

MARKS = 4
"""How many cache marks an API takes."""


class Block(NamedTuple):
    """``role`` is one of ``tool``, ``system``, ``user``, ``answer``, ``use``, ``result``. ``text`` needs no escaping in
    JSON. ``name`` is a tool's name, or the id of a use and of its result. ``ttl_s`` says for how long the prompt up to
    here is to be cached, if it is marked.
    """

    role: str
    text: bytes
    name: str = ""
    ttl_s: int | None = None


SYSTEM = ("tools", "lead", "system")


def _end(prompt: Sequence[Piece], at: int, *kinds: str) -> int:
    """Where the run of pieces of these kinds ends."""
    while at < len(prompt) and prompt[at].kind in kinds:
        at += 1
    return at


def roles(prompt: Sequence[Piece], costs: Costs) -> Iterator[tuple[str, Piece | None]]:
    """Who says each piece. An answer that tool results follow, with what is hidden behind it, ends in as many uses;
    where it has too few pieces, uses without one follow. Where an endpoint takes no tools, or these pieces have fewer
    tokens than what uses and results take, there are none, but text; where they have too few for an answer, a user
    says it.

    What an assistant would open or close, and a result of no use, a user says, and a word where else nothing follows
    the system's: endpoints refuse it otherwise.
    """
    offered = _end(prompt, 0, "tools") if costs.tools else 0
    front = at = _end(prompt, offered, *SYSTEM)
    yield from (("tool", piece) for piece in prompt[:offered])
    yield from (("system", piece) for piece in prompt[offered:front])
    if front == len(prompt):
        yield "user", None
    while at < len(prompt):
        said = _end(prompt, at, "answer")
        if at in (front, said):
            yield "user", prompt[at]
            at += 1
            continue
        until = _end(prompt, said, "hidden")
        end = _end(prompt, until, "tool_result")
        if end == until:
            until = end = said
        tokens = sum(piece.tokens for piece in prompt[at:end])
        uses = end - until if costs.tools and tokens >= costs.step(end - until) else 0
        if not uses and end > until and tokens < costs.step(0):
            yield from (("user", piece) for piece in prompt[at:end])
            at = end
            continue
        answers = max(until - uses, at)
        closing = 1 if until == len(prompt) else 0
        yield from (("answer", piece) for piece in prompt[at : answers - closing])
        yield from (("user", piece) for piece in prompt[answers - closing : answers])
        yield from (("use", piece) for piece in prompt[answers:until])
        yield from (("use", None) for _ in range(uses - (until - answers)))
        yield from (("result" if uses else "user", piece) for piece in prompt[until:end])
        at = end


def label(number: int) -> str:
    """A tool's name or a use's id: letters and digits in turn, which take as many tokens whatever they are."""
    out = ""
    for radix, first in ((10, "0"), (26, "a"), (10, "0"), (26, "a")):
        number, rest = divmod(number, radix)
        out = chr(ord(first) + rest) + out
    return out


class Writer:
    """Writes prompts as blocks, of as many tokens as planned as far as ``costs`` tell what blocks take; with ``ids`` as
    token ids.
    """

    def __init__(self, costs: Costs, *, salt: str = "", ids: bool = False) -> None:
        self._costs = costs
        self._text = PromptText(salt=salt, words=costs.words, ids=ids)
        self._least = self._text.fragment(0, 1)

    def blocks(
        self, prompt: Sequence[Piece], marks: Sequence[Breakpoint] = (), said: Mapping[str, Said] | None = None
    ) -> list[Block]:
        """A prompt's blocks. ``said`` are answers, by their calls, that take the place of the recorded ones.

        What blocks take beyond words, or one word too many, the next one has less.
        """
        prompt = [piece for piece in prompt if piece.tokens]
        offered = self._costs.tools and prompt[:1] and prompt[0].kind != "tools"
        out = [Block("tool", self._least, label(0))] if offered else []
        ends: list[tuple[int, int]] = []
        before, planned, spent, live = "", 0, 0.0, None
        names = dict.fromkeys(("tool", "use", "result"), 0)
        for role, piece in roles(prompt, self._costs):
            planned += piece.tokens if piece else 0
            heard = (said or {}).get(piece.answer_of or "") if piece and role in ("answer", "use") else None
            if piece and heard:
                if piece.answer_of != live:
                    out.append(Block("answer", heard.text))
                    spent += self._costs.overhead(before, "answer") - 1 + heard.tokens
                    before, live = "answer", piece.answer_of
                if role == "answer":
                    continue
                piece = None
            spent += self._costs.overhead(before, role)
            more = max(round((planned - spent) / self._costs.word), 0) if piece else 0
            spent += more * self._costs.word
            text = self._text.fragment(piece.ident, 1 + more) if piece else self._least
            name = label(names[role]) if role in names else ""
            if role in names:
                names[role] += 1
            out.append(Block(role, text, name))
            ends.append((planned, len(out) - 1))
            before = role
        return _marked(out, ends, marks) if marks and ends else out


def _marked(blocks: list[Block], ends: Sequence[tuple[int, int]], marks: Sequence[Breakpoint]) -> list[Block]:
    """The blocks, marked where a mark's last token lies, past the end on the last one; the last four marks count."""
    ttls: dict[int, int] = {}
    at = 0
    for mark in sorted(marks):
        while ends[at][0] < mark.at and at + 1 < len(ends):
            at += 1
        if mark.at > 0:
            index = ends[at][1]
            ttls[index] = max(mark.ttl_s, ttls.get(index, 0))
    for index, ttl_s in list(ttls.items())[-MARKS:]:
        blocks[index] = blocks[index]._replace(ttl_s=ttl_s)
    return blocks
