"""Call is one language-model request and its answer as it was recorded; the values it is made of.

Times are nanoseconds, token counts are tokens. ``None`` means unknown, never zero.
"""

from typing import NamedTuple

from keepwarm.traces.shipped import shipped

FLOWS = ("interactive", "background")
TRIGGERS = ("start", "end")
DIALECTS = ("messages", "chat", "responses", "completions")
NOT_ANSWERED = ("skipped", "interrupted")

NAMES = {name: frozenset(words.split()) for name, words in shipped("keepwarm.traces", "names.toml").items()}
"""Words that tell nothing of anyone. Another may tell anything: a pseudonym is kept for it, or ``other``."""
STOP_REASONS, MISS_REASONS = NAMES["stop_reasons"], NAMES["miss_reasons"]

FINAL_STOPS = ("end_turn", "stop_sequence", "stop")
"""Stop reasons after which an agent has finished what it was asked."""


class Segment(NamedTuple):
    """A piece of prompt with an identity: (hash, tokens) is the same in two prompts iff the piece is."""

    hash: int
    tokens: int
    kind: str
    answer_of: str | None = None
    text: str | None = None


class After(NamedTuple):
    """An edge: the call is due no earlier than ``gap_ns`` after the ``trigger`` (start or end) of ``call``."""

    call: str
    trigger: str
    gap_ns: int
    kind: str


class Breakpoint(NamedTuple):
    """A cache_control mark: the prompt's first ``at`` tokens are to be cached for ``ttl_s`` seconds."""

    at: int
    ttl_s: int


class ToolUse(NamedTuple):
    """A tool use the answer asked for; ``agent`` if it started one."""

    name: str
    start_ns: int | None = None
    duration_ns: int | None = None
    result_tokens: int | None = None
    is_error: bool | None = None
    agent: str | None = None


class Hints(NamedTuple):
    """Scheduling hints as they were sent with the call."""

    priority: int | None = None
    strict_priority: int | None = None
    osl: int | None = None
    speculative_prefill: bool | None = None
    ttl_s: int | None = None


class Attempt(NamedTuple):
    """One try at sending a call; times as those of the row it stands in."""

    sent_ns: int
    done_ns: int | None = None
    status: int | None = None
    error: str | None = None


class PrefixBreak(NamedTuple):
    """Where a prompt left its agent's previous one: after ``at`` tokens, at segment ``position`` (0 first), which had
    that ``kind`` and ``tokens``; ``change`` is one of those in breaks.toml.
    """

    at: int
    position: int
    kind: str
    tokens: int
    change: str


class Call(NamedTuple):
    """One call: a row of trace format v1. See docs/format.md for every column."""

    session: str
    agent: str
    call: str
    role: str
    turn: int
    start_ns: int
    end_ns: int
    keep: int
    usage_source: str
    write_source: str
    origin: str
    session_start_ns: int | None = None
    agent_type: str | None = None
    parent_agent: str | None = None
    spawned_by: str | None = None
    flow: str | None = None
    after: tuple[After, ...] = ()
    gap_ns: int | None = None
    gap_kind: str | None = None
    first_token_ns: int | None = None
    model: str | None = None
    dialect: str | None = None
    stream: bool | None = None
    prompt_parent: str | None = None
    append: tuple[Segment, ...] = ()
    prefix_change: str | None = None
    breakpoints: tuple[Breakpoint, ...] = ()
    prompt: int | None = None
    uncached: int | None = None
    cache_read: int | None = None
    cache_write_5m: int | None = None
    cache_write_1h: int | None = None
    cache_write_other: int | None = None
    output: int | None = None
    output_est: int | None = None
    reasoning: int | None = None
    tools: tuple[ToolUse, ...] = ()
    hints: Hints | None = None
    miss_reason: str | None = None
    stop_reason: str | None = None
    status: int | None = None
    error: str | None = None
    retries: int | None = None
    completed: bool | None = None
    first_byte_ns: int | None = None
    prefix_break: PrefixBreak | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt as its segments give them: kept plus appended."""
        return self.keep + sum(segment.tokens for segment in self.append)


class Outcome(NamedTuple):
    """What happened to one planned call: a row of a run.

    Times are ns since the run's anchor on one monotonic clock. ``error`` is a trace's or one of NOT_ANSWERED: a call
    that was never sent has ``sent_ns`` None and ``skipped``, one that the end of the run cut off has ``interrupted``.
    ``sent_ns`` is the last try's, ``first_sent_ns`` the first one's where there were more. ``phase`` is ``warmup``,
    ``measured`` or ``drain`` in a run of bounded duration, of which only what is ``measured`` counts.
    """

    call: Call
    copy: int = 0
    due_ns: int | None = None
    sent_ns: int | None = None
    first_byte_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    done_ns: int | None = None
    token_ns: tuple[int, ...] | None = None
    prompt: int | None = None
    uncached: int | None = None
    cache_read: int | None = None
    cache_write_5m: int | None = None
    cache_write_1h: int | None = None
    cache_write_other: int | None = None
    write_ttl_s: int | None = None
    output: int | None = None
    reasoning: int | None = None
    usage_source: str = "absent"
    write_source: str = "absent"
    usage_extra: str | None = None
    status: int | None = None
    error: str | None = None
    stop_reason: str | None = None
    completed: bool | None = None
    endpoint: str | None = None
    worker: str | None = None
    attempts: tuple[Attempt, ...] = ()
    planned_output: int | None = None
    first_sent_ns: int | None = None
    phase: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a whole answer."""
        return self.error is None and self.status is not None and 200 <= self.status < 300
