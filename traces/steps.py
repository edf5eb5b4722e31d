"""What transcripts and recordings fold into: streams of steps, one stream an agent, one step an API message; and the
turns that steps become.

All that names someone or something is a pseudonym already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from keepwarm.traces.model import After, Attempt, Breakpoint, PrefixBreak, Segment

if TYPE_CHECKING:
    from keepwarm.traces.records import AnswerRecord, RequestRecord

SECOND = 1_000_000_000

OWN_FILE, PROGRESS, INLINE = 0, 1, 2
"""Where a sub-agent's lines stand; the first that has a message is believed."""

SPAWN_TOOLS = ("Task", "Agent", "task", "spawn_agent")
"""The tools that start an agent."""


class Usage(NamedTuple):
    """The provider's account of one message, in tokens; whether it told reads and writes at all: a backend without a
    word on its cache has not said 0.
    """

    uncached: int
    cache_read: int
    write_5m: int
    write_1h: int
    write_other: int
    read_told: bool = True
    write_told: bool = True

    @property
    def prompt(self) -> int:
        """All prompt tokens."""
        return sum(self[:5])

    def columns(self) -> dict[str, Any]:
        """The account in trace columns, as far as it was told. Without a word on reads nobody knows what of the prompt
        was uncached.
        """
        told = {"prompt": self.prompt, "usage_source": "reported"}
        if self.read_told:
            told |= {"uncached": self.uncached, "cache_read": self.cache_read}
        if self.write_told:
            told |= {f"cache_{name}": getattr(self, name) for name in ("write_5m", "write_1h", "write_other")}
        return told | {"write_source": "reported" if self.write_told else "absent"}


class Asked(NamedTuple):
    """A tool use in an answer. ``prompt_hash`` is of what it tells a new agent, which it does not wait for where
    ``behind``; ``to`` is a finished agent that it sends on.
    """

    id: str
    name: str
    at_ns: int
    agent_type: str | None = None
    prompt_hash: int | None = None
    behind: bool = False
    to: str | None = None


class Input(NamedTuple):
    """A block that the client put into the conversation: what a user wrote, a tool's result, news of an agent.

    ``agent`` is the agent it tells of: its end, unless it was only ``launched`` or sent on (``resumed``).
    """

    kind: str
    hash: int
    weight: float
    at_ns: int
    human: bool = False
    tool_use: str | None = None
    is_error: bool | None = None
    agent: str | None = None
    launched: bool = False
    resumed: bool = False


class Piece(NamedTuple):
    """A block of a prompt as it was sent: its identity, its ``shape`` (the identity of its text with all digits alike),
    about how many tokens it has. ``text`` only where the user asked to keep it.
    """

    kind: str
    hash: int
    shape: int
    weight: float
    text: str | None = None


class Wire(NamedTuple):
    """What a recorder saw of a step: the request that was its last try, told whole, and the answer; all its tries where
    there were several.
    """

    request: RequestRecord
    answer: AnswerRecord
    attempts: tuple[Attempt, ...]


@dataclass(slots=True)
class Step:
    """One API message and what went into the conversation before it."""

    id: str
    model: str
    version: str
    start_ns: int
    end_ns: int
    inputs: list[Input]
    reset: str | None = None
    cleared: tuple[str, ...] = ()
    retries: int = 0
    usage: Usage | None = None
    output: int | None = None
    stop_reason: str | None = None
    miss_reason: str | None = None
    answer: list[int] = field(default_factory=list)
    weight: float = 0.0
    tools: list[Asked] = field(default_factory=list)
    wire: Wire | None = None

    def __reduce__(self) -> tuple[type[Step], tuple[Any, ...]]:
        return Step, _STEP_FIELDS(self)  # a third of the bytes and time that pickle takes for named fields


_STEP_FIELDS = attrgetter(*Step.__slots__)


@dataclass(slots=True)
class Stream:
    """One agent's steps as one file tells them.

    ``place`` is the file, ``source`` how the stream stands in it; ``agent`` and ``parent`` are pseudonyms. ``ended`` is
    True where the client said that the turn was over, False where it gave an error. ``copied`` is set where the file is
    known to begin with another's history.
    """

    place: str
    project: str
    session: str
    agent: str
    role: str
    source: int
    parent: str | None = None
    spawn_tool: str | None = None
    agent_type: str | None = None
    flow: str | None = None
    steps: list[Step] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    reset: str | None = None
    cleared: tuple[str, ...] = ()
    retries: int = 0
    last_ns: int = 0
    copied: bool = False
    ended: bool | None = None


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


def flow_of(entrypoint: str | None) -> str | None:
    """Who waits for a client that was started in this way."""
    if entrypoint is None:
        return None
    return "background" if entrypoint.startswith("sdk") else "interactive"
