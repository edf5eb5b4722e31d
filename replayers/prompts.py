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
    """The prompts of one session; each is let go once it was asked for and all prompts that grow from it are made."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._uses = Counter(call.call for call in calls)
        self._uses.update(call.prompt_parent for call in calls if call.prompt_parent is not None)
        self._prompts: dict[str, tuple[Piece, ...]] = {}
        self._waiting = {call.call: call for call in calls}
        self._answers: dict[str, list[Piece]] = {}
        for call in calls:
            for segment in call.append:
                if segment.answer_of is not None and segment.tokens:
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
        return self._used(call.call)

    def _grown(self, call: Call) -> tuple[Piece, ...]:
        appended = [piece(segment) for segment in call.append if segment.tokens]
        kept = [] if call.prompt_parent is None else cut(self._used(call.prompt_parent), call.keep)
        if sum(part.tokens for part in kept) != call.keep:
            most = (
                "0 without a prompt_parent" if call.prompt_parent is None else "at most the tokens of its prompt_parent"
            )
            raise InputError(f"call {call.call}: field keep is {call.keep}, expected {most}")
        return tuple(kept + appended)

    def _used(self, name: str) -> tuple[Piece, ...]:
        """A prompt, one of whose uses is over."""
        self._uses[name] -= 1
        return self._prompts[name] if self._uses[name] else self._prompts.pop(name)
