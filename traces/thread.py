"""Thread is one agent's prompt as it grows, as segments that add up to the provider's own token count.

Logs give the size of each prompt exactly and its text partly. The size is the truth: what is new in a prompt is spread
over the visible blocks by weight, a surplus is one ``hidden`` segment, an overrun is scaled down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from keepwarm.traces.model import Segment

CHARACTER_TOKENS = {"answer": 0.31, "tool_result": 0.347, "user": 0.33}
PIECE_TOKENS = {"tool_use": 50, "tool_result": 48, "image": 1100}
"""Tokens a character and tokens a piece, fitted on 3,648 steps of real Claude Code sessions."""


class Block(NamedTuple):
    """A visible piece of prompt: its identity and about how many tokens it has; ``exact`` when the count is final."""

    hash: int
    weight: float
    kind: str
    answer_of: str | None = None
    exact: bool = False
    tool_use: str | None = None


class _Held(NamedTuple):
    """A segment of the latest prompt, and the tool use whose result it is."""

    segment: Segment
    tool_use: str | None = None


class Growth(NamedTuple):
    """How a prompt came about: its first ``keep`` tokens from its parent's, the rest appended."""

    keep: int
    append: tuple[Segment, ...]


def spread(tokens: int, blocks: Sequence[Block]) -> list[int]:
    """Tokens for each block, at most ``tokens`` in all: their weights, or those scaled down (largest remainder). An
    exact count is only scaled down where the exact ones alone are too many.
    """
    weights = [round(block.weight) for block in blocks]
    total = sum(weights)
    if total <= tokens:
        return weights
    exact = sum(weight for weight, block in zip(weights, blocks, strict=True) if block.exact)
    if not 0 < exact <= tokens:
        return _scaled(tokens, weights, total)
    rest = [0 if block.exact else weight for weight, block in zip(weights, blocks, strict=True)]
    scaled = _scaled(tokens - exact, rest, total - exact)
    return [weights[i] if block.exact else scaled[i] for i, block in enumerate(blocks)]


def filled(tokens: int, blocks: Sequence[Block]) -> list[int]:
    """Tokens for each block, ``tokens`` in all wherever a block has a weight that is not exact: those get what the
    exact ones leave. Exact counts are only scaled down where they alone are too many.
    """
    exact = sum(round(block.weight) for block in blocks if block.exact)
    loose = [0.0 if block.exact else block.weight for block in blocks]
    if exact > tokens or not any(loose):
        return spread(tokens, blocks)
    rest = _scaled(tokens - exact, loose, sum(loose))
    return [round(block.weight) if block.exact else rest[i] for i, block in enumerate(blocks)]


def _scaled(tokens: int, weights: Sequence[float], total: float) -> list[int]:
    shares = [weight * tokens / total for weight in weights]
    given = [int(share) for share in shares]
    rest = sorted(range(len(weights)), key=lambda i: given[i] - shares[i])
    for i in rest[: tokens - sum(given)]:
        given[i] += 1
    return given


class Thread:
    """An agent's latest prompt. ``fresh`` makes an identity that no other content has.

    ``given`` is how many tokens each tool's result got in the latest step; ``hidden`` and ``scaled`` count tokens that
    no visible block explains, and that visible blocks had too many.
    """

    def __init__(self, fresh: Callable[[], int]) -> None:
        self._fresh = fresh
        self._held: list[_Held] = []
        self.tokens = 0
        self.lead = 0
        self.given: dict[str, int] = {}
        self.hidden = 0
        self.scaled = 0

    def begin(self, prompt: int, leads: Sequence[Segment], blocks: Sequence[Block]) -> Growth:
        """The first prompt: the shared lead, then the session's own, which is what the visible blocks leave."""
        *shared, own = leads
        room = prompt - sum(lead.tokens for lead in shared)
        if room < 0:
            shared, room = [], prompt
        sizes = spread(room, blocks)
        self.lead = prompt - sum(sizes)
        lead = [_Held(segment) for segment in (*shared, own._replace(tokens=room - sum(sizes)))]
        return self._grown(0, lead + self._named(blocks, sizes))

    def follow(self, growths: Sequence[Growth], lead: int) -> None:
        """Stand where another agent's growths left its prompt, to go on from there on one's own."""
        for growth in growths:
            self._grown(growth.keep, [_Held(segment) for segment in growth.append])
        self.lead = min(lead, self.tokens)

    def extend(self, prompt: int, blocks: Sequence[Block]) -> Growth:
        """The next prompt keeps all of the last one that it has room for."""
        keep = min(self.tokens, prompt)
        return self._grown(keep, self._spread(prompt - keep, blocks))

    def reset(self, prompt: int, blocks: Sequence[Block], keep: int | None = None) -> Growth:
        """The next prompt keeps the lead (or ``keep`` tokens) and holds nothing else of the conversation so far."""
        kept = min(self.lead if keep is None else keep, self.tokens, prompt)
        return self._grown(kept, self._spread(prompt - kept, blocks))

    def break_at(self, keep: int, prompt: int, blocks: Sequence[Block], leads: Sequence[Segment] = ()) -> Growth:
        """The next prompt differs from the last one after ``keep`` tokens: what follows stands there anew.

        With ``leads`` (another model's) the lead is replaced by them.
        """
        keep = min(keep, prompt, self.tokens)
        rest = self._after(max(keep, self.lead if leads else 0))
        if leads:
            room = min(self.lead, prompt)
            shared = leads[0]._replace(tokens=min(leads[0].tokens, room))
            rest = [_Held(shared), _Held(leads[1]._replace(tokens=room - shared.tokens)), *rest]
        elif rest:
            rest[0] = _Held(rest[0].segment._replace(hash=self._fresh()), rest[0].tool_use)
        return self._refilled(keep, prompt, rest, blocks)

    def clear(self, tool_uses: Sequence[str], prompt: int, blocks: Sequence[Block]) -> Growth:
        """A microcompaction: the named tools' results went from the middle of the conversation."""
        keep = 0
        for held in self._held:
            if held.tool_use in tool_uses:
                break
            keep += held.segment.tokens
        else:
            return self.reset(prompt, blocks)
        left = [held for held in self._after(keep) if held.tool_use not in tool_uses]
        return self._refilled(min(keep, prompt), prompt, left, blocks)

    def _refilled(self, keep: int, prompt: int, rest: Sequence[_Held], blocks: Sequence[Block]) -> Growth:
        """Keep so much, then what there is room for of the rest, then the new blocks."""
        old = _trim(rest, prompt - keep)
        return self._grown(keep, old + self._spread(prompt - keep - sum(h.segment.tokens for h in old), blocks))

    def _after(self, keep: int) -> list[_Held]:
        """What is held past the first ``keep`` tokens, the first of it perhaps a remainder."""
        at, rest = 0, []
        for held in self._held:
            end = at + held.segment.tokens
            if at >= keep:
                rest.append(held)
            elif end > keep:
                rest.append(_Held(held.segment._replace(tokens=end - keep, hash=self._fresh()), held.tool_use))
            at = end
        return rest

    def _spread(self, tokens: int, blocks: Sequence[Block]) -> list[_Held]:
        sizes = spread(tokens, blocks)
        named = self._named(blocks, sizes)
        surplus = tokens - sum(sizes)
        self.scaled += max(0, round(sum(block.weight for block in blocks)) - tokens)
        if surplus > 0:
            self.hidden += surplus
            answers = sum(held.segment.kind == "answer" for held in named)
            named.insert(answers, _Held(Segment(self._fresh(), surplus, "hidden")))
        return named

    def _named(self, blocks: Sequence[Block], sizes: Sequence[int]) -> list[_Held]:
        self.given = {}
        named = []
        for block, size in zip(blocks, sizes, strict=True):
            if block.tool_use is not None:
                self.given[block.tool_use] = size
            if size:
                named.append(_Held(Segment(block.hash, size, block.kind, block.answer_of), block.tool_use))
        return named

    def _grown(self, keep: int, append: Sequence[_Held]) -> Growth:
        added = [held for held in append if held.segment.tokens]
        while self._held and self.tokens > keep:
            segment, tool_use = self._held.pop()
            self.tokens -= segment.tokens
            if self.tokens < keep:
                self._held.append(_Held(segment._replace(tokens=keep - self.tokens), tool_use))
                self.tokens = keep
        self._held.extend(added)
        self.tokens += sum(held.segment.tokens for held in added)
        self.lead = min(self.lead, self.tokens)
        return Growth(keep, tuple(held.segment for held in added))


def _trim(held: Sequence[_Held], tokens: int) -> list[_Held]:
    """The first ``tokens`` tokens of what is held."""
    kept = []
    for segment, tool_use in held:
        if tokens <= 0:
            break
        kept.append(_Held(segment._replace(tokens=min(segment.tokens, tokens)), tool_use))
        tokens -= segment.tokens
    return kept
