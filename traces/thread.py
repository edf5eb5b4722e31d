"""Thread is one agent's prompt as it grows, as segments that add up to the provider's own token count.

Logs give the size of each prompt exactly and its text partly. The size is the truth: what is new in a prompt is spread
over the visible blocks by weight, a surplus is one ``hidden`` segment, an overrun is scaled down.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from keepwarm.traces.identity import Identity
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


class Held(NamedTuple):
    """A segment of the latest prompt, and the tool use whose result it is."""

    segment: Segment
    tool_use: str | None = None


class Growth(NamedTuple):
    """How a prompt came about: its first ``keep`` tokens from its parent's, the rest appended."""

    keep: int
    append: tuple[Segment, ...]


def spread(tokens: int, blocks: Sequence[Block]) -> list[int]:
    """Tokens for each block, at most ``tokens`` in all: their weights, or those scaled down."""
    weights = [round(block.weight) for block in blocks]
    return weights if sum(weights) <= tokens else _fitted(tokens, blocks, weights)


def filled(tokens: int, blocks: Sequence[Block]) -> list[int]:
    """Tokens for each block, ``tokens`` in all wherever a block has a weight that is not exact."""
    if not any(block.weight for block in blocks if not block.exact):
        return spread(tokens, blocks)
    return _fitted(tokens, blocks, [round(block.weight) if block.exact else block.weight for block in blocks])


def _fitted(tokens: int, blocks: Sequence[Block], weights: Sequence[float]) -> list[int]:
    """Tokens for each block, ``tokens`` in all: the inexact ones get what the exact ones leave. Exact counts are only
    scaled down where they alone are too many.
    """
    exact = sum(round(weight) for weight, block in zip(weights, blocks, strict=True) if block.exact)
    if exact > tokens:
        return _scaled(tokens, weights)
    rest = _scaled(tokens - exact, [0 if block.exact else weights[i] for i, block in enumerate(blocks)])
    return [round(weights[i]) if block.exact else rest[i] for i, block in enumerate(blocks)]


def _scaled(tokens: int, weights: Sequence[float]) -> list[int]:
    """``tokens`` shared out by weight (largest remainder)."""
    total = sum(weights)
    shares = [weight * tokens / total for weight in weights]
    given = [int(share) for share in shares]
    rest = sorted(range(len(weights)), key=lambda i: given[i] - shares[i])
    for i in rest[: tokens - sum(given)]:
        given[i] += 1
    return given


def _trimmed(held: Sequence[Held], tokens: int) -> list[Held]:
    """What is held with no more than its first ``tokens`` tokens; what lies past them has none."""
    kept = []
    for one in held:
        inside = min(one.segment.tokens, tokens)
        tokens -= inside
        kept.append(one if inside == one.segment.tokens else one._replace(segment=one.segment._replace(tokens=inside)))
    return kept


class Thread:
    """The latest prompt of the agent of that name.

    ``given`` is how many tokens each tool's result got; ``noticed`` counts tokens that no visible block explains
    (``hidden``), and that visible blocks had too many (``scaled``).
    """

    def __init__(self, identity: Identity, agent: str, noticed: Counter[str]) -> None:
        self._identity = identity
        self._agent = agent
        self._made = 0
        self._held: list[Held] = []
        self.tokens = 0
        self.lead = 0
        self.given: dict[str, int] = {}
        self.noticed = noticed

    def _fresh(self) -> int:
        """An identity that no other content has."""
        self._made += 1
        return self._identity.hash(f"fresh\0{self._agent}\0{self._made}".encode())

    def begin(self, prompt: int, leads: Sequence[Segment], blocks: Sequence[Block]) -> Growth:
        """The first prompt: the shared lead, then the session's own, which is what the visible blocks leave."""
        shared, own = leads
        if shared.tokens > prompt:
            shared = shared._replace(tokens=0)
        sizes = spread(prompt - shared.tokens, blocks)
        self.lead = prompt - sum(sizes)
        lead = [Held(shared), Held(own._replace(tokens=self.lead - shared.tokens))]
        return self._grown(0, lead + self._named(blocks, sizes))

    def grow(self, keep: int, prompt: int, blocks: Sequence[Block], rest: Sequence[Held] = ()) -> Growth:
        """The next prompt keeps the last one's first ``keep`` tokens, then has what there is room for of the ``rest``,
        then the new blocks.
        """
        keep = min(keep, self.tokens, prompt)
        old = _trimmed(rest, prompt - keep)
        return self._grown(keep, old + self._spread(prompt - keep - sum(one.segment.tokens for one in old), blocks))

    def break_at(self, keep: int, prompt: int, blocks: Sequence[Block], leads: Sequence[Segment] = ()) -> Growth:
        """The next prompt differs from the last one after ``keep`` tokens: what follows stands there anew.

        With ``leads`` (another model's) the lead is replaced by them.
        """
        keep = min(keep, prompt, self.tokens)
        rest = self._after(max(keep, self.lead if leads else 0))
        if leads:
            room = min(self.lead, prompt)
            shared = leads[0]._replace(tokens=min(leads[0].tokens, room))
            rest = [Held(shared), Held(leads[1]._replace(tokens=room - shared.tokens)), *rest]
        elif rest:
            rest[0] = rest[0]._replace(segment=rest[0].segment._replace(hash=self._fresh()))
        return self.grow(keep, prompt, blocks, rest)

    def clear(self, tool_uses: Sequence[str], prompt: int, blocks: Sequence[Block]) -> Growth:
        """A microcompaction: the named tools' results went from the middle of the conversation."""
        before = list(takewhile(lambda held: held.tool_use not in tool_uses, self._held))
        if len(before) == len(self._held):
            return self.grow(self.lead, prompt, blocks)
        keep = sum(held.segment.tokens for held in before)
        left = [held for held in self._after(keep) if held.tool_use not in tool_uses]
        return self.grow(keep, prompt, blocks, left)

    def _after(self, keep: int) -> list[Held]:
        """What is held past the first ``keep`` tokens, the first of it perhaps a remainder."""
        at, rest = 0, []
        for held in self._held:
            end = at + held.segment.tokens
            if at >= keep:
                rest.append(held)
            elif end > keep:
                rest.append(held._replace(segment=held.segment._replace(tokens=end - keep, hash=self._fresh())))
            at = end
        return rest

    def _spread(self, tokens: int, blocks: Sequence[Block]) -> list[Held]:
        sizes = spread(tokens, blocks)
        named = self._named(blocks, sizes)
        surplus = tokens - sum(sizes)
        self.noticed["scaled"] += max(0, round(sum(block.weight for block in blocks)) - tokens)
        if surplus > 0:
            self.noticed["hidden"] += surplus
            answers = sum(held.segment.kind == "answer" for held in named)
            named.insert(answers, Held(Segment(self._fresh(), surplus, "hidden")))
        return named

    def _named(self, blocks: Sequence[Block], sizes: Sequence[int]) -> list[Held]:
        pairs = list(zip(blocks, sizes, strict=True))
        self.given |= {block.tool_use: size for block, size in pairs if block.tool_use}
        return [Held(Segment(one.hash, size, one.kind, one.answer_of), one.tool_use) for one, size in pairs]

    def _grown(self, keep: int, append: Sequence[Held]) -> Growth:
        added = [held for held in append if held.segment.tokens]
        if keep < self.tokens:
            self._held = [held for held in _trimmed(self._held, keep) if held.segment.tokens]
        self._held += added
        self.tokens = keep + sum(held.segment.tokens for held in added)
        self.lead = min(self.lead, self.tokens)
        return Growth(keep, tuple(held.segment for held in added))
