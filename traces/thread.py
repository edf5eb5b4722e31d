"""Thread is one agent's prompt as it grows, as segments that add up to the provider's own token count.

Logs give the size of each prompt exactly and its text partly. The size is the truth: what is new in a prompt is spread
over the visible blocks by weight, a surplus is one ``hidden`` segment, an overrun is scaled down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from keepwarm.traces.model import Segment

ASSISTANT_WEIGHT = 0.31
RESULT_WEIGHT = 0.347
USER_WEIGHT = 0.33
TOOL_USE_TOKENS = 50
TOOL_RESULT_TOKENS = 48
IMAGE_TOKENS = 1100
"""Tokens a character and tokens a piece, fitted on 3,648 steps of real Claude Code sessions."""


class Block(NamedTuple):
    """A visible piece of prompt: its identity and about how many tokens it has; ``exact`` when the count is final."""

    hash: int
    weight: float
    kind: str
    answer_of: str | None = None
    exact: bool = False
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


def _scaled(tokens: int, weights: Sequence[int], total: int) -> list[int]:
    shares = [weight * tokens / total for weight in weights]
    given = [int(share) for share in shares]
    rest = sorted(range(len(weights)), key=lambda i: given[i] - shares[i])
    for i in rest[: tokens - sum(given)]:
        given[i] += 1
    return given


class Thread:
    """An agent's latest prompt. ``fresh`` makes an identity that no other content has.

    ``hidden`` and ``scaled`` count tokens that no visible block explains, and that visible blocks had too many.
    """

    def __init__(self, fresh: Callable[[], int]) -> None:
        self._fresh = fresh
        self.segments: list[Segment] = []
        self.tokens = 0
        self.lead = 0
        self.given: dict[str, int] = {}
        self._results: dict[str, int] = {}
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
        append = [*shared, own._replace(tokens=room - sum(sizes)), *self._named(blocks, sizes)]
        return self._grown(0, append)

    def follow(self, growths: Sequence[Growth], lead: int) -> None:
        """Stand where another agent's growths left its prompt, to go on from there on one's own."""
        for growth in growths:
            self._grown(growth.keep, list(growth.append))
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
            rest = [shared, leads[1]._replace(tokens=room - shared.tokens), *rest]
        elif rest:
            rest[0] = rest[0]._replace(hash=self._fresh())
        old = _trim(rest, prompt - keep)
        return self._grown(keep, old + self._spread(prompt - keep - sum(s.tokens for s in old), blocks))

    def clear(self, tool_uses: Sequence[str], prompt: int, blocks: Sequence[Block]) -> Growth:
        """A microcompaction: the named tools' results went from the middle of the conversation."""
        gone = {hash_ for use in tool_uses if (hash_ := self._results.get(use)) is not None}
        keep = 0
        for segment in self.segments:
            if segment.hash in gone:
                break
            keep += segment.tokens
        else:
            return self.reset(prompt, blocks)
        left = [segment for segment in self._after(keep) if segment.hash not in gone]
        keep = min(keep, prompt)
        old = _trim(left, prompt - keep)
        return self._grown(keep, old + self._spread(prompt - keep - sum(s.tokens for s in old), blocks))

    def _after(self, keep: int) -> list[Segment]:
        """The segments past the first ``keep`` tokens, the first of them perhaps a remainder."""
        at, rest = 0, []
        for segment in self.segments:
            if at >= keep:
                rest.append(segment)
            elif at + segment.tokens > keep:
                rest.append(segment._replace(tokens=at + segment.tokens - keep, hash=self._fresh()))
            at += segment.tokens
        return rest

    def _spread(self, tokens: int, blocks: Sequence[Block]) -> list[Segment]:
        sizes = spread(tokens, blocks)
        named = self._named(blocks, sizes)
        surplus = tokens - sum(sizes)
        self.scaled += max(0, round(sum(block.weight for block in blocks)) - tokens)
        if surplus > 0:
            self.hidden += surplus
            answers = sum(segment.kind == "answer" for segment in named)
            named.insert(answers, Segment(self._fresh(), surplus, "hidden"))
        return named

    def _named(self, blocks: Sequence[Block], sizes: Sequence[int]) -> list[Segment]:
        self.given = {}
        named = []
        for block, size in zip(blocks, sizes, strict=True):
            if block.tool_use is not None:
                self.given[block.tool_use] = size
                self._results[block.tool_use] = block.hash
            if size:
                named.append(Segment(block.hash, size, block.kind, block.answer_of))
        return named

    def _grown(self, keep: int, append: list[Segment]) -> Growth:
        append = [segment for segment in append if segment.tokens]
        while self.segments and self.tokens > keep:
            last = self.segments.pop()
            self.tokens -= last.tokens
            if self.tokens < keep:
                self.segments.append(last._replace(tokens=keep - self.tokens))
                self.tokens = keep
        self.segments.extend(append)
        self.tokens += sum(segment.tokens for segment in append)
        self.lead = min(self.lead, self.tokens)
        return Growth(keep, tuple(append))


def _trim(segments: Sequence[Segment], tokens: int) -> list[Segment]:
    """The first ``tokens`` tokens of some segments."""
    kept = []
    for segment in segments:
        if tokens <= 0:
            break
        kept.append(segment._replace(tokens=min(segment.tokens, tokens)))
        tokens -= segment.tokens
    return kept
