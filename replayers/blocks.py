"""Block is a piece of a prompt as a dialect writes it: in a role, with its words, marked or not.

The roles are a real agent's: tools, then system blocks, then a user's words, answers, tool uses and their results. What
a block is depends on the pieces before it and on the results that follow an answer, so that a grown prompt repeats the
blocks of what it grew from.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.tokens import Costs


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


Role = tuple[str, Piece | None]


def opening(prompt: Sequence[Piece], costs: Costs) -> tuple[int, list[Role]]:
    """The pieces that a prompt starts with, before anyone speaks: how many, and who says them. A user says a word where
    else nothing follows the system's.
    """
    offered = _end(prompt, 0, "tools") if costs.tools else 0
    front = _end(prompt, offered, *SYSTEM)
    told: list[Role] = [("tool" if at < offered else "system", piece) for at, piece in enumerate(prompt[:front])]
    return front, told + ([("user", None)] if front == len(prompt) else [])


def run(prompt: Sequence[Piece], at: int, front: int, costs: Costs) -> tuple[int, list[Role], int]:
    """What is said together from ``at`` on, an answer with the results that follow it or a user's piece: where it ends,
    who says what, and the last piece whose kind that depends on.

    An answer that tool results follow, with what is hidden behind it, ends in as many uses; where it has too few
    pieces, uses without one follow. Where an endpoint takes no tools, or these pieces have fewer tokens than what uses
    and results take, there are none, but text; where they have too few for an answer, a user says it. What an assistant
    would open or close, and a result of no use, a user says: endpoints refuse it otherwise.
    """
    said = _end(prompt, at, "answer")
    if at in (front, said):
        return at + 1, [("user", prompt[at])], at
    until = _end(prompt, said, "hidden")
    end = last = _end(prompt, until, "tool_result")
    if end == until:
        until = end = said
    tokens = sum([piece.tokens for piece in prompt[at:end]])
    uses = end - until if costs.tools and tokens >= costs.step(end - until) else 0
    if not uses and end > until and tokens < costs.step(0):
        return end, [("user", piece) for piece in prompt[at:end]], last
    answers = max(until - uses, at)
    spoken = answers - (1 if until == len(prompt) else 0)
    names = ["answer"] * (spoken - at) + ["user"] * (answers - spoken) + ["use"] * (until - answers)
    told: list[Role] = list(zip(names, prompt[at:until], strict=True))
    told += [("use", None)] * (uses - (until - answers))
    told += zip(repeat("result" if uses else "user"), prompt[until:end])
    return end, told, last


@lru_cache(1 << 12)
def label(number: int) -> str:
    """A tool's name or a use's id: letters and digits in turn, which take as many tokens whatever they are."""
    out = ""
    for radix, first in ((10, "0"), (26, "a"), (10, "0"), (26, "a")):
        number, rest = divmod(number, radix)
        out = chr(ord(first) + rest) + out
    return out
