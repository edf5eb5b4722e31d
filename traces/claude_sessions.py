"""The streams of one Claude Code session made into calls: agents, who started whom, waits, prompts, token accounts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from keepwarm.traces.claude_lines import INLINE, SPAWN_TOOLS, Asked, Input, Step, Stream, Usage
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import FINAL_STOPS, After, Breakpoint, Call, Segment, ToolUse
from keepwarm.traces.thread import Block, Growth, Thread

SECOND = 1_000_000_000
TTL_5M, TTL_1H = 300, 3600
BREAK_TOKENS = 1024
"""A read this much below what the predecessor left is a changed prefix, where prefix breaks are taken as recorded."""

LeadKey = tuple[str, str, str, str]
"""Project, client version, model, role: those whose system prompt and tools are the same."""


class Built(NamedTuple):
    """A session's calls in trace order, and what was noticed on the way."""

    calls: list[Call]
    negative_waits: int
    recorded_breaks: int
    hidden: int
    scaled: int
    new_tokens: int


@dataclass(slots=True)
class _Agent:
    """An agent being built. ``seen`` holds for each model its last call, that prompt's size, and after which reset."""

    name: str
    role: str
    thread: Thread
    type: str | None = None
    parent: str | None = None
    spawned_by: str | None = None
    fork: Call | None = None
    fork_step: Step | None = None
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ttl_s: int = TTL_5M
    resets: int = 0
    seen: dict[str, tuple[str, int, int]] = field(default_factory=dict)


class _Fork(NamedTuple):
    """Where a stream left the history that it copied: after ``step`` of ``origin``, which went on itself or did not."""

    origin: Stream
    step: str
    went_on: bool


def role_of(stream: Stream) -> str:
    """The role of a stream's agent, as far as its name tells."""
    if stream.agent is None:
        return "main"
    return "compaction" if stream.agent.startswith("acompact") else "subagent"


def lead_key(project: str, stream: Stream, step: Step) -> LeadKey:
    """Whom a call shares its lead with."""
    return project, step.version, step.model, role_of(stream)


class SessionBuilder:
    """Builds one session out of its streams, once.

    ``owns`` says whether a stream is the one to tell a step (others hold copies of it), ``leads`` gives the size of each
    group's shared lead, ``informed`` takes prefix breaks from what was read.
    """

    def __init__(
        self,
        identity: Identity,
        project: str,
        *,
        owns: Callable[[Stream, Step], bool],
        leads: Mapping[LeadKey, int],
        informed: bool,
        flow: str | None,
    ) -> None:
        self._identity = identity
        self._project = project
        self._owns = owns
        self._leads = leads
        self._informed = informed
        self._flow = flow
        self._session = self._raw_session = ""
        self._origin = 0
        self._fresh = count()
        self._agents: dict[str, _Agent] = {}
        self._by_id: dict[str, tuple[_Agent, int]] = {}
        self._forks: dict[str, _Fork] = {}
        self._spawns: dict[str, tuple[str, Asked]] = {}
        self._spawned: dict[str, str] = {}
        self._results: dict[str, Input] = {}
        self._given: dict[str, int] = {}
        self._starts: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._negative = 0
        self._breaks = 0

    def build(self, streams: Sequence[Stream]) -> Built:
        """The session's calls; a stream without a step of its own adds nothing."""
        ordered = sorted(streams, key=lambda s: (s.agent is not None, s.source, _first_ns(s), s.session))
        self._raw_session = ordered[0].session
        self._session = self._identity.name("session", self._project, self._raw_session)
        owned = [(stream, step) for stream in ordered for step in stream.steps if self._owns(stream, step)]
        if not owned:
            return Built([], 0, 0, 0, 0, 0)
        self._origin = min(step.start_ns for _, step in owned)
        self._look_around(ordered, owned)
        for stream, step in _timeline(owned):
            self._step(stream, step)
        completed = _completed(ordered)
        agents = list({agent.name: agent for agent in self._agents.values()}.values())
        calls = [call._replace(completed=completed) for agent in agents for call in self._with_tools(agent)]
        calls.sort(key=lambda call: (call.start_ns, call.call))
        threads = [agent.thread for agent in agents]
        hidden, scaled = sum(t.hidden for t in threads), sum(t.scaled for t in threads)
        return Built(calls, self._negative, self._breaks, hidden, scaled, sum(map(_appended, calls)))

    def _look_around(self, streams: Sequence[Stream], owned: Sequence[tuple[Stream, Step]]) -> None:
        """Tool results, forks, and the tool use that started each sub-agent: told beside its lines, by its result, or
        by its prompt.
        """
        for stream in streams:
            given = [i for step in stream.steps for i in step.inputs] + stream.inputs
            self._results |= {i.tool_use: i for i in given if i.tool_use}
            for step in stream.steps:
                self._spawns |= {asked.id: (step.id, asked) for asked in step.tools if asked.name in SPAWN_TOOLS}
        tellers = {step.id: stream for stream, step in owned}
        for stream in streams:
            fork = self._fork(stream, tellers)
            if fork is not None:
                self._forks[self._name_of(stream)] = fork
        told = {i.agent: use for use, i in self._results.items() if i.agent and use in self._spawns}
        for stream in streams:
            if stream.agent is not None:
                use = stream.spawn_tool or told.get(stream.agent) or self._spawn_by_prompt(stream)
                if use is not None:
                    self._spawned.setdefault(use, self._name_of(stream))

    def _spawn_by_prompt(self, stream: Stream) -> str | None:
        first = {given.hash for given in stream.steps[0].inputs} if stream.steps else set()
        for use, (_, asked) in self._spawns.items():
            if asked.prompt_hash in first and use not in self._spawned:
                return use
        return None

    def _fork(self, stream: Stream, tellers: Mapping[str, Stream]) -> _Fork | None:
        """Where the stream's own steps leave those that it has only copies of."""
        last = None
        for step in stream.steps:
            teller = tellers.get(step.id)
            if teller is stream:
                break
            last = (teller, step.id) if teller is not None else last
        if last is None or last[0] is None or self._name_of(last[0]) == self._name_of(stream):
            return None
        teller = last[0]
        ids = [step.id for step in teller.steps]
        return _Fork(teller, last[1], ids[-1] != last[1])

    def _name_of(self, stream: Stream) -> str:
        return self._identity.name("agent", self._project, stream.session, stream.agent or "")

    def _agent(self, stream: Stream) -> _Agent:
        """The stream's agent, made when its first step comes; a resumed one is the agent that it resumes."""
        name = self._name_of(stream)
        if name in self._agents:
            return self._agents[name]
        fork = self._forks.get(name)
        if fork is not None and fork.step in self._by_id:
            origin, at = self._by_id[fork.step]
            if not fork.went_on and stream.agent is None:
                self._agents[name] = origin
                return origin
            return self._forked(name, stream, origin, at)
        agent = self._agents[name] = _Agent(name, role_of(stream), Thread(self._fresh_hash))
        use = next((use for use, started in self._spawned.items() if started == name), None)
        if use is not None and self._spawns[use][0] in self._by_id:
            parent, at = self._by_id[self._spawns[use][0]]
            agent.parent, agent.spawned_by = parent.name, parent.calls[at].call
            agent.type = self._identity.agent_type(self._spawns[use][1].agent_type)
        return agent

    def _forked(self, name: str, stream: Stream, origin: _Agent, at: int) -> _Agent:
        role = "side" if stream.source == INLINE else role_of(stream)
        agent = _Agent(name, role, Thread(self._fresh_hash), parent=origin.name, fork=origin.calls[at])
        agent.fork_step = origin.steps[at]
        agent.thread.follow(origin.calls[: at + 1], origin.thread.lead)
        agent.ttl_s = origin.ttl_s
        self._agents[name] = agent
        return agent

    def _fresh_hash(self) -> int:
        return self._identity.hash(f"fresh\0{self._session}\0{next(self._fresh)}".encode())

    def _step(self, stream: Stream, step: Step) -> None:
        agent = self._agent(stream)
        before = agent.calls[-1] if agent.calls else agent.fork
        after = self._edges(agent, before, step)
        start = max([step.start_ns - self._origin, *(self._starts[edge.call] + 1 for edge in after)])
        growth, parent, change = self._prompt(stream, agent, before, step)
        self._given |= agent.thread.given
        last = max(after, key=lambda edge: self._ends[edge.call] + edge.gap_ns, default=None)
        call = Call(
            session=self._session,
            agent=agent.name,
            call=self._identity.name("call", step.id),
            role=agent.role,
            turn=len(agent.calls),
            start_ns=start,
            end_ns=max(step.end_ns - self._origin, start),
            keep=growth.keep,
            usage_source="reported" if step.usage else "absent",
            write_source="reported" if step.usage else "absent",
            origin="transcript",
            agent_type=agent.type,
            parent_agent=agent.parent,
            spawned_by=agent.spawned_by,
            flow=self._flow or _flow(stream.entrypoint),
            after=after,
            gap_ns=last.gap_ns if last else None,
            gap_kind=last.kind if last else None,
            model=step.model,
            dialect="messages",
            prompt_parent=parent,
            append=growth.append,
            prefix_change=change,
            breakpoints=_breakpoints(step.usage, agent),
            output_est=round(step.weight),
            output=step.output,
            miss_reason=step.miss_reason,
            stop_reason=step.stop_reason,
            retries=step.retries,
            **_account(step.usage),
        )
        self._starts[call.call], self._ends[call.call] = call.start_ns, call.end_ns
        self._by_id[step.id] = agent, len(agent.calls)
        agent.calls.append(call)
        agent.steps.append(step)
        agent.seen[step.model] = call.call, agent.thread.tokens, agent.resets

    def _edge(self, call: str, due_ns: int, kind: str) -> After:
        gap = due_ns - self._ends[call]
        self._negative += gap < 0
        return After(call, "end", max(gap, 0), kind)

    def _edges(self, agent: _Agent, before: Call | None, step: Step) -> tuple[After, ...]:
        """What the step waited for. Its latest wait is the observed one, the others carry their own time."""
        start = step.start_ns - self._origin
        if before is None:
            return self._first_edges(agent, start)
        human = agent.role == "main" and any(given.human for given in step.inputs)
        asked = bool(agent.steps and agent.steps[-1].tools)
        kind = "human" if human else "tool" if asked or any(i.tool_use for i in step.inputs) else "unknown"
        if step.retries and not step.inputs:
            kind = "retry"
        joins = self._joins(agent, step)
        own = [i.at_ns - self._origin for i in step.inputs if i.tool_use and i.tool_use not in joins]
        done = start if human or not joins else max([self._ends[before.call], *own])
        edges = [self._edge(before.call, done, kind)]
        edges += [self._edge(call, done_ns, "subagent") for call, done_ns in joins.values()]
        last = max(range(len(edges)), key=lambda i: self._ends[edges[i].call] + edges[i].gap_ns)
        edges[last] = edges[last]._replace(gap_ns=max(start - self._ends[edges[last].call], 0))
        return tuple(edges)

    def _first_edges(self, agent: _Agent, start: int) -> tuple[After, ...]:
        if agent.spawned_by is not None:
            return (self._edge(agent.spawned_by, start, "tool"),)
        earlier = [call for call, began in self._starts.items() if began <= start]
        if not earlier:
            return ()
        ended = [call for call in earlier if self._ends[call] <= start]
        return (self._edge(max(ended or earlier, key=self._ends.__getitem__), start, "unknown"),)

    def _joins(self, agent: _Agent, step: Step) -> dict[str, tuple[str, int]]:
        """For each tool result that an agent's end brought: that agent's last call, and when the result was there."""
        joins = {}
        for given in step.inputs:
            name = self._spawned.get(given.tool_use or "")
            if name is None and given.agent:
                name = self._identity.name("agent", self._project, self._raw_session, given.agent)
            child = self._agents.get(name or "")
            if child is not None and child is not agent and child.calls:
                last, at_ns = child.calls[-1].call, given.at_ns - self._origin
                if self._ends[last] <= at_ns + SECOND and given.tool_use:
                    joins[given.tool_use] = last, at_ns
        return joins

    def _prompt(
        self, stream: Stream, agent: _Agent, before: Call | None, step: Step
    ) -> tuple[Growth, str | None, str | None]:
        """How the step's prompt came about, from which call's, and why it kept less than all of that."""
        thread, read = agent.thread, self._informed_read(agent, before, step)
        inputs = [Block(i.hash, i.weight, i.kind, tool_use=i.tool_use) for i in step.inputs]
        blocks = [*self._answer(agent), *inputs]
        size = step.usage.prompt if step.usage else thread.tokens + round(sum(block.weight for block in blocks))
        leads = self._lead_segments(stream, agent, step)
        if before is None:
            return self._begin(agent, size, leads, inputs)
        if step.reset == "compaction" or (size < thread.tokens / 2 and step.reset is None):
            agent.resets += 1
            return thread.reset(size, inputs, read), before.call, step.reset or "shrunk"
        if step.model != before.model:
            return self._switch(agent, before, size, leads, blocks, step.model)
        if read is not None:
            return thread.break_at(read, size, blocks), before.call, step.reset or "recorded_break"
        if step.reset == "microcompaction":
            return thread.clear(step.cleared, size, blocks), before.call, "microcompaction"
        had = thread.tokens
        growth = thread.extend(size, blocks)
        return growth, before.call, "shrunk" if growth.keep < had else None

    def _begin(
        self, agent: _Agent, size: int, leads: Sequence[Segment], inputs: Sequence[Block]
    ) -> tuple[Growth, str | None, str | None]:
        """An agent's first prompt; a compaction's grows from the prompt of the main agent that it compacts."""
        mains = [a for a in self._agents.values() if a.role == "main" and a.calls]
        if agent.role != "compaction" or not mains:
            return agent.thread.begin(size, leads, inputs), None, None
        told = mains[-1].calls[-1]
        agent.parent = mains[-1].name
        agent.thread.follow(mains[-1].calls, mains[-1].thread.lead)
        return agent.thread.extend(size, inputs), told.call, None

    def _switch(
        self, agent: _Agent, before: Call, size: int, leads: Sequence[Segment], blocks: Sequence[Block], model: str
    ) -> tuple[Growth, str | None, str | None]:
        """Another model shares nothing with the last call, but all with its own last call in this conversation."""
        known = agent.seen.get(model)
        if known is not None and known[2] == agent.resets:
            return agent.thread.break_at(known[1], size, blocks), known[0], "model_switch"
        return agent.thread.break_at(0, size, blocks, leads), before.call, "model_switch"

    def _informed_read(self, agent: _Agent, before: Call | None, step: Step) -> int | None:
        """What was read, where inside the TTL it is much less than the predecessor left; None for a blind import."""
        if not self._informed or before is None or step.usage is None or before.prompt is None:
            return None
        idle = step.start_ns - self._origin - before.end_ns
        left = min(before.prompt - (before.uncached or 0), step.usage.prompt)
        if idle > agent.ttl_s * SECOND or step.usage.cache_read >= left - BREAK_TOKENS or step.model != before.model:
            return None
        self._breaks += 1
        return step.usage.cache_read

    def _answer(self, agent: _Agent) -> list[Block]:
        """The last answer as the next prompt repeats it."""
        step = agent.steps[-1] if agent.steps else agent.fork_step
        if step is None:
            return []
        hash_ = self._identity.hash(b"".join(part.to_bytes(8, "big", signed=True) for part in step.answer))
        weight = step.weight if step.output is None else step.output
        return [Block(hash_, weight, "answer", answer_of=self._identity.name("call", step.id))]

    def _lead_segments(self, stream: Stream, agent: _Agent, step: Step) -> list[Segment]:
        key = lead_key(self._project, stream, step)
        shared = self._identity.hash("\0".join(("lead", *key)).encode())
        own = self._identity.hash("\0".join(("own", self._session, agent.name, step.model)).encode())
        return [Segment(shared, self._leads.get(key, 0), "lead"), Segment(own, 0, "lead")]

    def _with_tools(self, agent: _Agent) -> list[Call]:
        """The agent's calls with the tool uses that their answers asked for, now that the results are known."""
        pairs = zip(agent.calls, agent.steps, strict=True)
        return [call._replace(tools=tuple(map(self._tool, step.tools))) for call, step in pairs]

    def _tool(self, asked: Asked) -> ToolUse:
        result = self._results.get(asked.id)
        return ToolUse(
            name=self._identity.tool(asked.name),
            start_ns=asked.at_ns - self._origin,
            duration_ns=max(result.at_ns - asked.at_ns, 0) if result else None,
            result_tokens=self._given.get(asked.id),
            is_error=result.is_error if result else None,
            agent=self._spawned.get(asked.id),
        )


def _first_ns(stream: Stream) -> int:
    return stream.steps[0].start_ns if stream.steps else 0


def _timeline(owned: Sequence[tuple[Stream, Step]]) -> list[tuple[Stream, Step]]:
    """Steps in order of start, each stream's own order kept."""
    reached: dict[int, int] = {}
    timed = []
    for order, (stream, step) in enumerate(owned):
        reached[id(stream)] = max(reached.get(id(stream), 0), step.start_ns)
        timed.append((reached[id(stream)], order, stream, step))
    return [(stream, step) for _, _, stream, step in sorted(timed, key=lambda item: item[:2])]


def _flow(entrypoint: str | None) -> str | None:
    if entrypoint is None:
        return None
    return "background" if entrypoint.startswith("sdk") else "interactive"


def _account(usage: Usage | None) -> dict[str, int | None]:
    if usage is None:
        return {}
    return {
        "prompt": usage.prompt,
        "uncached": usage.uncached,
        "cache_read": usage.cache_read,
        "cache_write_5m": usage.write_5m,
        "cache_write_1h": usage.write_1h,
        "cache_write_other": usage.write_other,
    }


def _breakpoints(usage: Usage | None, agent: _Agent) -> tuple[Breakpoint, ...]:
    """The cache marks that the account lets one infer: what lies past the last mark is the uncached part, and what was
    written for an hour comes before what was written for five minutes.
    """
    if usage is None or not usage.prompt - usage.uncached:
        return ()
    marks = []
    if usage.write_1h:
        marks.append(Breakpoint(usage.cache_read + usage.write_1h, TTL_1H))
        agent.ttl_s = TTL_1H
    if usage.write_5m or usage.write_other:
        agent.ttl_s = TTL_5M
    if not marks or usage.write_5m or usage.write_other:
        marks.append(Breakpoint(usage.prompt - usage.uncached, agent.ttl_s))
    return tuple(marks)


def _appended(call: Call) -> int:
    return sum(segment.tokens for segment in call.append)


def _completed(streams: Sequence[Stream]) -> bool | None:
    """Whether the main agent finished: its last call stopped for good and asked for no tool. None if unknown."""
    mains = [stream for stream in streams if stream.agent is None and stream.steps]
    if not mains:
        return None
    stream = max(mains, key=lambda s: s.steps[-1].start_ns)
    step = stream.steps[-1]
    if stream.ended is False:
        return False
    answered = {given.tool_use for given in stream.inputs}
    if step.tools:
        return False if any(asked.id not in answered for asked in step.tools) else None
    if any(given.human for given in stream.inputs):
        return None
    if step.stop_reason is not None:
        return step.stop_reason in FINAL_STOPS
    return stream.ended
