"""A session's prompts put together from what each call kept of another's and what it appended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from keepwarm.replayers.endpoint import Piece, Request
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Call, Segment


def piece(segment: Segment) -> Piece:
    """A whole segment as a piece; its ident joins hash and token count, which together are its identity."""
    ident = (segment.hash & 0xFFFFFFFFFFFFFFFF) << 32 | segment.tokens
    return Piece(ident, segment.tokens, segment.kind, segment.answer_of, segment.text)


def cut(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    """The pieces that hold the first ``tokens`` tokens, the last one cut."""
    kept = []
    for part in pieces:
        if tokens <= 0:
            break
        kept.append(part if part.tokens <= tokens else part._replace(tokens=tokens))
        tokens -= part.tokens
    return kept


class SessionPrompts:
    """The prompts of one session, resolved in trace order; one that no later call grows from is let go at once."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._children = Counter(call.prompt_parent for call in calls if call.prompt_parent)
        self._prompts: dict[str, tuple[Piece, ...]] = {}
        self._waiting = {call.call: call for call in calls}
        self._answers: dict[str, list[Piece]] = {}
        for call in calls:
            for segment in call.append:
                if segment.answer_of is not None:
                    self._answers.setdefault(segment.answer_of, []).append(piece(segment))

    def request(self, call: Call) -> Request:
        """The request for a call; the prompts it grew from are resolved on the way."""
        pieces = self._resolve(call)
        output = call.output if call.output is not None else call.output_est
        return Request(call, pieces, output, tuple(self._answers.get(call.call, ())))

    def _resolve(self, call: Call) -> tuple[Piece, ...]:
        chain = [call]
        while (parent := chain[-1].prompt_parent) is not None and parent not in self._prompts:
            chain.append(self._waiting[parent])
        for link in reversed(chain):
            if link.call not in self._prompts:
                self._prompts[link.call] = self._grown(link)
        pieces = self._prompts[call.call]
        if not self._children[call.call]:
            del self._prompts[call.call]
        return pieces

    def _grown(self, call: Call) -> tuple[Piece, ...]:
        appended = [piece(segment) for segment in call.append if segment.tokens]
        if call.prompt_parent is None:
            return tuple(appended)
        kept = cut(self._prompts[call.prompt_parent], call.keep)
        self._children[call.prompt_parent] -= 1
        if not self._children[call.prompt_parent]:
            del self._prompts[call.prompt_parent]
        if sum(part.tokens for part in kept) != call.keep:
            raise InputError(
                f"call {call.call}: field keep is {call.keep}, expected at most the tokens of its prompt_parent"
            )
        return tuple(kept + appended)
