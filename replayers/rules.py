"""What managed APIs promise of their prompt caches, as dated data (``rules.toml``)."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from keepwarm.traces.model import Breakpoint
from keepwarm.traces.shipped import shipped

FOREVER = 1 << 30
AS_RECORDED = "as-recorded"
"""Each mark's own TTL."""


class Rules(NamedTuple):
    """One API's rules. ``entries``: a mark keeps the whole prompt up to it, found ``look_back`` positions further on
    at most; otherwise all tokens up to the last mark are kept, in multiples of ``unit``. ``minimum`` are the fewest
    tokens that are kept, by model, the first pattern that fits. ``ttl_s`` is that of a prompt without marks, which is
    then marked whole; None where an unmarked prompt is not cached. ``most`` marks of a request count; ``priced`` says
    whether writes are told.
    """

    dated: str
    entries: bool = False
    look_back: int = FOREVER
    unit: int = 1
    minimum: Mapping[str, int] = {"*": 1}
    ttl_s: int | None = None
    most: int = FOREVER
    priced: bool = True

    def least(self, model: str | None) -> int:
        """The fewest tokens that are kept of a model's prompts."""
        return next(tokens for pattern, tokens in self.minimum.items() if fnmatchcase(model or "", pattern))

    def marks(self, told: Sequence[Breakpoint], prompt: int) -> list[Breakpoint]:
        """The marks that count of those a call told, first to last, none of them past its prompt."""
        if self.ttl_s is not None:
            return [Breakpoint(prompt // self.unit * self.unit, self.ttl_s)] if prompt >= self.unit else []
        return [mark._replace(at=min(mark.at, prompt)) for mark in sorted(told)][-self.most :]


RULES = {name: Rules(**row) for name, row in shipped("keepwarm.replayers", "rules.toml").items()}
"""By name. ``managed`` is what logs show of any of them: all tokens up to the last mark, each under its mark's TTL."""
