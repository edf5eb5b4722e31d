"""A session's prompts put together from what each call kept of another's and what it appended."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.tree import Node, PromptTree
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Call, Segment

P = TypeVar("P")
Grow = Callable[[P | None, int | None, list[Piece]], P]
"""Makes a prompt of another one's first tokens (None: all of them), or of none's, and more pieces."""


def piece(segment: Segment) -> Piece:
    """A whole segment as a piece; its ident joins hash and token count, which together are its identity."""
    ident = (segment.hash & 0xFFFFFFFFFFFFFFFF) << 32 | segment.tokens
    return Piece(ident, segment.tokens, segment.kind, segment.answer_of)


def cut(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    """The pieces that hold the first ``tokens`` tokens, the last one cut."""
    kept = []
    for part in pieces:
        if tokens <= 0:
            break
        kept.append(part if part.tokens <= tokens else part._replace(tokens=tokens))
        tokens -= part.tokens
    return kept


def as_pieces(parent: tuple[Piece, ...] | None, keep: int | None, pieces: list[Piece]) -> tuple[Piece, ...]:
    """A prompt as its pieces."""
    parent = parent or ()
    return (*(parent if keep is None else cut(parent, keep)), *pieces)


def in_tree(tree: PromptTree) -> Grow[Node]:
    """Prompts as places in a tree."""

    def grow(parent: Node | None, keep: int | None, pieces: list[Piece]) -> Node:
        kept = tree.root if parent is None else parent if keep is None else tree.at(parent, keep)
        return tree.extend(kept, pieces)

    return grow


class SessionPrompts(Generic[P]):
    """The prompts of a session's ``calls``; each is let go once it was asked for and all that grow from it are made."""

    def __init__(self, calls: Sequence[Call], grow: Grow[P]) -> None:
        self._grow = grow
        self._uses = Counter(call.call for call in calls)
        self._uses.update(call.prompt_parent for call in calls if call.prompt_parent is not None)
        self._prompts: dict[str, tuple[P, int]] = {}
        self.calls = {call.call: call for call in calls}
        self._answers: dict[str, list[Piece]] = {}
        for call in calls:
            for segment in call.append:
                if segment.answer_of is not None and segment.tokens:
                    self._answers.setdefault(segment.answer_of, []).append(piece(segment))

    def answer(self, call: Call) -> tuple[Piece, ...]:
        """The pieces in which later prompts repeat a call's answer."""
        return tuple(self._answers.get(call.call, ()))

    def prompt(self, call: Call) -> P:
        """A call's prompt; those it grew from are made on the way."""
        chain: list[Call] = []
        link: Call | None = call
        while link is not None and link.call not in self._prompts:
            chain.append(link)
            link = self.calls.get(link.prompt_parent or "")
        for link in reversed(chain):
            self._make(link)
        return self._used(call.call)[0]

    def _make(self, call: Call) -> None:
        appended = [piece(segment) for segment in call.append if segment.tokens]
        parent, most = (None, 0) if call.prompt_parent is None else self._used(call.prompt_parent)
        if call.keep > most or call.keep < 0:
            told = "0 without a prompt_parent" if parent is None else "at most the tokens of its prompt_parent"
            raise InputError(f"call {call.call}: field keep is {call.keep}, expected {told}")
        tokens = call.keep + sum(part.tokens for part in appended)
        self._prompts[call.call] = (self._grow(parent, None if call.keep == most else call.keep, appended), tokens)

    def _used(self, name: str) -> tuple[P, int]:
        """A prompt and its tokens, one of whose uses is over."""
        self._uses[name] -= 1
        return self._prompts[name] if self._uses[name] else self._prompts.pop(name)
