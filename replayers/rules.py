"""What managed APIs promise of their prompt caches, as dated data; where sources differ the newest is taken.

Sources: the vendors' prompt caching guides (Anthropic: platform.claude.com/docs, April 2026, with the changes since
that others quote; OpenAI: developers.openai.com/api/docs/guides/prompt-caching, November 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from keepwarm.traces.model import Breakpoint

FOREVER = 1 << 30
AS_RECORDED = "as-recorded"
"""Each mark's own TTL."""


class Rules(NamedTuple):
    """One API's rules. ``entries``: a mark keeps the whole prompt up to it, found ``look_back`` positions further on
    at most; otherwise all tokens up to the last mark are kept, in multiples of ``unit``. ``minimum`` are the fewest
    tokens that are kept, by model, the first pattern that fits. ``ttl_s`` is that of a prompt without marks, which is
    then marked whole; None where an unmarked prompt is not cached. ``most`` marks of a request count. ``dialect`` names
    the usage fields; ``priced`` whether writes are told.
    """

    dated: str
    entries: bool = False
    look_back: int = FOREVER
    unit: int = 1
    minimum: tuple[tuple[str, int], ...] = (("*", 1),)
    ttl_s: int | None = None
    most: int = FOREVER
    priced: bool = True

    def least(self, model: str | None) -> int:
        """The fewest tokens that are kept of a model's prompts."""
        return next(tokens for pattern, tokens in self.minimum if fnmatchcase(model or "", pattern))

    def marks(self, told: Sequence[Breakpoint], prompt: int) -> list[Breakpoint]:
        """The marks that count of those a call told, first to last, none of them past its prompt."""
        if self.ttl_s is not None:
            return [Breakpoint(prompt // self.unit * self.unit, self.ttl_s)] if prompt >= self.unit else []
        return [mark._replace(at=min(mark.at, prompt)) for mark in sorted(told)][-self.most :]


ANTHROPIC_MINIMUM = (
    ("*opus-4-[56]*", 4096),
    ("*haiku-4-5*", 4096),
    ("*mythos-preview*", 4096),
    ("*opus-4-7*", 2048),
    ("*sonnet-4-6*", 2048),
    ("*haiku-3*", 2048),
    ("*opus-4-8*", 1024),
    ("*opus-4*", 1024),
    ("*sonnet-5-5*", 512),
    ("*opus-5*", 512),
    ("*fable*", 512),
    ("*", 1024),
)
OPENAI_MINIMUM = (("*", 1024),)

RULES = {
    "managed": Rules("2026-11"),
    "anthropic": Rules("2026-09", entries=True, look_back=20, minimum=ANTHROPIC_MINIMUM, most=4),
    "openai": Rules("2026-11", unit=128, minimum=OPENAI_MINIMUM, ttl_s=300, priced=False),
    "openai-24h": Rules("2026-11", unit=128, minimum=OPENAI_MINIMUM, ttl_s=86400, priced=False),
    "openai-priced": Rules("2026-06-27", entries=True, look_back=50, minimum=OPENAI_MINIMUM, ttl_s=1800),
}
"""``managed`` is what logs show of any of them: all tokens up to the last mark, each under its mark's TTL."""
