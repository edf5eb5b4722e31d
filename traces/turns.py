"""Turn is a step that became a call; Prompt makes turns of an agent's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from keepwarm.traces.model import Breakpoint, PrefixBreak
from keepwarm.traces.steps import Step
from keepwarm.traces.thread import Growth

SECOND = 1_000_000_000


class Turn(NamedTuple):
    """A step that became a call: its times since the session's start, and how its prompt came about."""

    step: Step
    start_ns: int
    end_ns: int
    growth: Growth
    parent: str | None
    change: str | None
    marks: tuple[Breakpoint, ...]
    broke: PrefixBreak | None = None


class Prompt(Protocol):
    """One agent's prompt as it grows. ``given`` is how many tokens each tool's result got so far, ``breaks`` how many
    prefixes were cut to what was read; ``hidden`` and ``scaled`` are as in Thread.
    """

    given: dict[str, int]
    breaks: int
    hidden: int
    scaled: int

    def follow(self, origin: Prompt, turns: Sequence[Turn]) -> None:
        """Go on from where another agent's turns left its prompt."""

    def next(self, step: Step, start_ns: int, end_ns: int) -> Turn:
        """The turn that a step is."""
