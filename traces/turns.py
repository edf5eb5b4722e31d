"""Turn is a step that became a call; Prompt makes turns of an agent's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from keepwarm.traces.model import After, Breakpoint, PrefixBreak, Segment
from keepwarm.traces.steps import Step

SECOND = 1_000_000_000


class Turn(NamedTuple):
    """A step that became a call, in columns of the trace; times since the session's start."""

    step: Step
    start_ns: int
    end_ns: int
    keep: int
    append: tuple[Segment, ...]
    prompt_parent: str | None
    prefix_change: str | None
    breakpoints: tuple[Breakpoint, ...]
    prefix_break: PrefixBreak | None = None
    after: tuple[After, ...] = ()


class Prompt(Protocol):
    """One agent's prompt as it grows. ``given`` is how many tokens each tool's result got so far."""

    given: dict[str, int]

    def follow(self, origin: Prompt, turns: Sequence[Turn]) -> None:
        """Go on from where another agent's turns left its prompt."""

    def next(self, step: Step, start_ns: int, end_ns: int) -> Turn:
        """The turn that a step is."""
