"""AgentPrompt follows one Claude Code agent's prompt from step to step: what each keeps of which, and why not all."""

from collections import Counter
from collections.abc import Mapping, Sequence

from keepwarm.traces.claude_files import LeadKey
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import Breakpoint, Segment
from keepwarm.traces.steps import SECOND, Prompt, Step, Stream, Turn, Usage
from keepwarm.traces.thread import Block, Growth, Held, Thread

TTL_5M, TTL_1H = 300, 3600
BREAK_TOKENS = 1024
"""A read this much below what the predecessor left is a changed prefix, where prefix breaks are taken as recorded."""

Grown = tuple[Growth, str | None, str | None]
"""How a prompt grew, from which call's, and why it did not keep all of that."""


class AgentPrompt(Thread):
    """One agent's prompt as it grows. ``leads`` gives the size of each group's shared lead. In an ``informed`` import
    prefix breaks are taken from what was read; ``noticed`` counts them, as ``recorded_breaks``.
    """

    def __init__(
        self, identity: Identity, leads: Mapping[LeadKey, int], informed: bool, noticed: Counter[str], stream: Stream
    ) -> None:
        super().__init__(identity, stream.agent, noticed)
        self._leads = leads
        self._informed = informed
        self._stream = stream
        self._last: Turn | None = None
        self._ttl_s = TTL_5M
        self._seen: dict[str, tuple[str, int]] = {}

    def _lead(self, step: Step) -> list[Segment]:
        """The lead that the agent shares with others of the step's model, and its own."""
        key = self._stream.project, step.version, step.model, self._stream.role
        shared = self._identity.hash("\0".join(("lead", *key)).encode())
        own = self._identity.hash("\0".join(("own", self._stream.agent, step.model)).encode())
        return [Segment(shared, self._leads.get(key, 0), "lead"), Segment(own, 0, "lead")]

    def follow(self, origin: Prompt, turns: Sequence[Turn]) -> None:
        """Go on from where another agent's turns left its prompt."""
        assert isinstance(origin, AgentPrompt)
        self._last = turns[-1]
        for turn in turns:
            self._grown(turn.keep, [Held(segment) for segment in turn.append])
            self._mark(turn.step.usage)
        self.lead = min(origin.lead, self.tokens)

    def next(self, step: Step, start_ns: int, end_ns: int) -> Turn:
        """The turn that a step is."""
        growth, parent, change = self._grow(step, start_ns)
        marks = self._mark(step.usage)
        turn = self._last = Turn(step, start_ns, end_ns, *growth, parent, change, marks)
        self._seen[step.model] = step.id, self.tokens
        return turn

    def _grow(self, step: Step, start_ns: int) -> Grown:
        last = self._last
        inputs = [Block(i.hash, i.weight, i.kind, tool_use=i.tool_use) for i in step.inputs]
        if last is None:
            return self.begin(self._size(step, inputs), self._lead(step), inputs), None, None
        blocks = [self._answer(last), *inputs]
        size = self._size(step, blocks)
        read = self._informed_read(last, step, start_ns)
        if step.reset == "compaction" or (size < self.tokens / 2 and step.reset is None):
            self._seen.clear()
            return self.grow(self.lead if read is None else read, size, inputs), last.step.id, step.reset or "shrunk"
        if step.model != last.step.model:
            return self._switch(last, step, size, blocks)
        if read is not None:
            return self.break_at(read, size, blocks), last.step.id, step.reset or "recorded_break"
        if step.reset == "microcompaction":
            return self.clear(step.cleared, size, blocks), last.step.id, step.reset
        had = self.tokens
        return self.grow(had, size, blocks), last.step.id, "shrunk" if size < had else None

    def _size(self, step: Step, blocks: Sequence[Block]) -> int:
        """The prompt's tokens as reported; without a report, what the visible blocks come to."""
        return step.usage.prompt if step.usage else self.tokens + round(sum(block.weight for block in blocks))

    def _switch(self, last: Turn, step: Step, size: int, blocks: Sequence[Block]) -> Grown:
        """Another model shares nothing with the last call, but all with its own last call since the last reset."""
        known = self._seen.get(step.model)
        if known is not None:
            return self.break_at(known[1], size, blocks), known[0], "model_switch"
        return self.break_at(0, size, blocks, self._lead(step)), last.step.id, "model_switch"

    def _informed_read(self, last: Turn, step: Step, start_ns: int) -> int | None:
        """What was read, where inside the TTL it is much less than the predecessor left; None for a blind import."""
        left, now = last.step.usage, step.usage
        if not self._informed or left is None or now is None or not now.read_told or step.model != last.step.model:
            return None
        readable = min(left.prompt - left.uncached, now.prompt)
        if start_ns - last.end_ns > self._ttl_s * SECOND or now.cache_read >= readable - BREAK_TOKENS:
            return None
        self.noticed["recorded_breaks"] += 1
        return now.cache_read

    def _answer(self, last: Turn) -> Block:
        """The last answer as the next prompt repeats it."""
        told = last.step.output
        weight = last.step.weight if told is None else told
        hash_ = self._identity.hash(b"".join(part.to_bytes(8, "big", signed=True) for part in last.step.answer))
        return Block(hash_, weight, "answer", last.step.id, exact=told is not None)

    def _mark(self, usage: Usage | None) -> tuple[Breakpoint, ...]:
        """The cache marks that the account lets one infer: what lies past the last mark is the uncached part, and what
        was written for an hour comes before what was written for five minutes.
        """
        if usage is None or usage.prompt == usage.uncached:
            return ()
        short = usage.write_5m or usage.write_other
        hour = (Breakpoint(usage.cache_read + usage.write_1h, TTL_1H),) if usage.write_1h else ()
        self._ttl_s = TTL_5M if short else TTL_1H if hour else self._ttl_s
        if hour and not short:
            return hour
        return (*hour, Breakpoint(usage.prompt - usage.uncached, self._ttl_s))
