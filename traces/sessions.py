"""The streams of one session made into calls: agents, who started whom, who waited for whom."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import groupby
from typing import Any

from keepwarm.traces.kin import Kin
from keepwarm.traces.model import FINAL_STOPS, After, Call, ToolUse
from keepwarm.traces.steps import INLINE, SECOND, Asked, Prompt, Step, Stream, Turn, Wire


@dataclass(slots=True)
class _Agent:
    """An agent being built; ``fork`` is another agent's turn that its first prompt grew from, ``summaries`` the agents
    that compacted it since its last call.
    """

    name: str
    role: str
    prompt: Prompt
    agent_type: str | None = None
    parent_agent: str | None = None
    spawned_by: str | None = None
    fork: Turn | None = None
    summaries: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


@dataclass
class SessionBuilder:
    """Builds one session out of its streams, once.

    ``owns`` says whether a stream is the one to tell a step (others hold copies of it), ``prompts`` makes the prompt of
    a stream's agent, ``flow`` is the user's word on who waits, ``origin`` the trace's; ``noticed`` counts
    ``negative_waits``.
    """

    session: str
    owns: Callable[[Stream, Step], bool]
    prompts: Callable[[Stream], Prompt]
    flow: str | None
    origin: str
    noticed: Counter[str] = field(default_factory=Counter)
    _zero_ns: int = 0
    _agents: dict[str, _Agent] = field(default_factory=dict)
    _by_id: dict[str, tuple[_Agent, int]] = field(default_factory=dict)
    _kin: Kin = field(default_factory=lambda: Kin((), ()))
    _turns: dict[str, Turn] = field(default_factory=dict)

    def build(self, streams: Sequence[Stream], session_start_ns: int) -> list[Call]:
        """The session's calls in trace order; a stream without a step of its own adds nothing."""
        ordered = sorted(streams, key=lambda s: (s.role != "main", s.source, _first_ns(s), s.session))
        owned = [(stream, step) for stream in ordered for step in stream.steps if self.owns(stream, step)]
        if not owned:
            return []
        self._zero_ns = min(step.start_ns for _, step in owned)
        self._kin = Kin(ordered, owned)
        self.flow = self.flow or next((stream.flow for stream in ordered if stream.flow), None)
        by_stream = [list(steps) for _, steps in groupby(owned, key=lambda item: id(item[0]))]
        for stream, step in merge(*by_stream, key=lambda item: item[1].start_ns):  # each stream's own order is kept
            self._step(stream, step)
        completed = _completed(ordered)
        agents = list({agent.name: agent for agent in self._agents.values()}.values())
        calls = [self._call(a, turn, session_start_ns, completed) for a in agents for turn in range(len(a.turns))]
        return sorted(calls, key=lambda call: (call.start_ns, call.call))

    def _agent(self, stream: Stream) -> _Agent:
        """The stream's agent, made when its first step comes; a resumed one is the agent that it resumes."""
        name = stream.agent
        if name in self._agents:
            return self._agents[name]
        fork = self._kin.forks.get(name)
        if fork is not None and fork.step in self._by_id:
            origin, at = self._by_id[fork.step]
            if not fork.went_on and stream.role == "main" and at == len(origin.turns) - 1:
                self._agents[name] = origin
                return origin
            role = "side" if stream.source == INLINE else stream.role
            return self._new_agent(stream, role, origin, at)
        role = stream.role
        mains = [agent for agent in self._agents.values() if agent.role == "main" and agent.turns]
        compacted = self._agents.get(stream.parent or "", mains[-1] if mains else None)
        if role == "compaction" and compacted is not None:
            compacted.summaries.append(name)
            return self._new_agent(stream, role, compacted, len(compacted.turns) - 1)
        agent = self._new_agent(stream, role)
        agent.parent_agent = stream.parent
        spawn = self._kin.spawns.get(name)
        if spawn is not None and spawn[0] in self._by_id:
            agent.parent_agent, agent.spawned_by = self._by_id[spawn[0]][0].name, spawn[0]
        agent.agent_type = self._kin.types.get(name) or (spawn[1].agent_type if spawn else None)
        return agent

    def _new_agent(self, stream: Stream, role: str, origin: _Agent | None = None, at: int = 0) -> _Agent:
        """An agent with a prompt of its own, or one that grows from a turn of another's."""
        agent = self._agents[stream.agent] = _Agent(stream.agent, role, self.prompts(stream))
        if origin is not None:
            agent.parent_agent, agent.fork = origin.name, origin.turns[at]
            agent.prompt.follow(origin.prompt, origin.turns[: at + 1])
        return agent

    def _step(self, stream: Stream, step: Step) -> None:
        agent = self._agent(stream)
        after = self._edges(agent, step)
        start = max([step.start_ns - self._zero_ns, *(self._turns[edge.call].start_ns + 1 for edge in after)])
        turn = agent.prompt.next(step, start, max(step.end_ns - self._zero_ns, start))._replace(after=after)
        self._turns[step.id] = turn
        self._by_id[step.id] = agent, len(agent.turns)
        agent.turns.append(turn)

    def _edge(self, call: str, due_ns: int, kind: str) -> After:
        gap = due_ns - self._turns[call].end_ns
        self.noticed["negative_waits"] += gap < 0
        return After(call, "end", max(gap, 0), kind)

    def _edges(self, agent: _Agent, step: Step) -> tuple[After, ...]:
        """What the step waited for. The edge satisfied last has the observed wait, the others their own time."""
        start = step.start_ns - self._zero_ns
        before = agent.turns[-1] if agent.turns else agent.fork
        if before is None:
            return self._first_edges(agent, start)
        kind = _gap_kind(agent.role, before.step, step)
        sender = self._sender(agent, before.step)
        if sender is not None:
            return self._edge(before.step.id, before.end_ns, "unknown"), self._edge(sender, start, "tool")
        joins = self._joins(agent, step)
        if not joins:
            return (self._edge(before.step.id, start, kind),)
        own = [i.at_ns - self._zero_ns for i in step.inputs if i.tool_use and i.tool_use not in joins]
        done = start if kind == "human" else max([before.end_ns, *own])
        edges = [self._edge(before.step.id, done, kind)]
        edges += [self._edge(call, done_ns, "subagent") for call, done_ns in joins.values()]
        last = edges.index(self._last_satisfied(edges))
        edges[last] = edges[last]._replace(gap_ns=max(start - self._turns[edges[last].call].end_ns, 0))
        return tuple(edges)

    def _sender(self, agent: _Agent, before: Step) -> str | None:
        """The call whose message sent the agent on after it had finished."""
        sent = [] if before.tools else self._kin.sent.get(agent.name, [])
        return next((call for call, at_ns in sent if at_ns > before.end_ns and call in self._by_id), None)

    def _last_satisfied(self, edges: Sequence[After]) -> After:
        return max(edges, key=lambda edge: self._turns[edge.call].end_ns + edge.gap_ns)

    def _first_edges(self, agent: _Agent, start: int) -> tuple[After, ...]:
        """What an agent's first call waited for: the call that started it, or, where the logs do not tell which that
        was, whatever ended last before it.
        """
        if agent.spawned_by is not None:
            return (self._edge(agent.spawned_by, start, "tool"),)
        earlier = [turn for turn in self._turns.values() if turn.start_ns <= start]
        if not earlier:
            return ()
        ended = [turn for turn in earlier if turn.end_ns <= start]
        return (self._edge(max(ended or earlier, key=lambda turn: turn.end_ns).step.id, start, "unknown"),)

    def _joins(self, agent: _Agent, step: Step) -> dict[str, tuple[str, int]]:
        """For each input that told of an agent's end: that agent's last call, and when the input was there."""
        joins = {}
        for given in step.inputs:
            if given.launched or given.resumed:
                continue
            name = self._kin.spawned.get(given.tool_use or "") or given.agent
            child = self._agents.get(name) if name else None
            if child is not None and child is not agent and child.turns:
                at_ns = given.at_ns - self._zero_ns
                if child.turns[-1].end_ns <= at_ns + SECOND:
                    joins[given.tool_use or child.name] = child.turns[-1].step.id, at_ns
        start = step.start_ns - self._zero_ns
        joins |= {name: (self._agents[name].turns[-1].step.id, start) for name in agent.summaries}
        agent.summaries.clear()
        return joins

    def _call(self, agent: _Agent, turn: int, session_start_ns: int, completed: bool | None) -> Call:
        columns = agent.turns[turn]._asdict()
        step: Step = columns.pop("step")
        last = self._last_satisfied(columns["after"]) if columns["after"] else None
        account = step.usage.columns() if step.usage else dict.fromkeys(("usage_source", "write_source"), "absent")
        call = Call(
            session=self.session,
            agent=agent.name,
            call=step.id,
            turn=turn,
            origin=self.origin,
            session_start_ns=session_start_ns,
            flow=self.flow,
            gap_ns=last.gap_ns if last else None,
            gap_kind=last.kind if last else None,
            model=step.model or None,
            dialect="messages",
            output_est=round(step.weight),
            tools=tuple(self._tool(asked, agent) for asked in step.tools),
            retries=step.retries or None,
            completed=completed,
            **{name: getattr(agent, name) for name in ("role", "agent_type", "parent_agent", "spawned_by")},
            **{name: getattr(step, name) for name in ("output", "stop_reason", "miss_reason")},
            **columns,
            **account,
        )
        return call if step.wire is None else call._replace(**self._seen(step.wire))

    def _seen(self, wire: Wire) -> dict[str, Any]:
        """What the wire told of a call beyond what a log does, in trace columns."""
        zero = self._zero_ns
        times = {name: getattr(wire.answer, name) for name in ("first_byte_ns", "first_token_ns")}
        tries = [one._replace(sent_ns=one.sent_ns - zero, done_ns=(one.done_ns or 0) - zero) for one in wire.attempts]
        return {
            **{name: None if at_ns is None else at_ns - zero for name, at_ns in times.items()},
            **{name: getattr(wire.request, name) for name in ("dialect", "stream", "hints")},
            **{name: getattr(wire.answer, name) for name in ("status", "error", "reasoning", "write_source")},
            "retries": max(len(tries) - 1, 0),
            "attempts": tuple(tries),
        }

    def _tool(self, asked: Asked, agent: _Agent) -> ToolUse:
        result = self._kin.results.get(asked.id)
        return ToolUse(
            asked.name,
            asked.at_ns - self._zero_ns,
            max(result.at_ns - asked.at_ns, 0) if result else None,
            agent.prompt.given.get(asked.id),
            result.is_error if result else None,
            self._kin.spawned.get(asked.id),
        )


def _first_ns(stream: Stream) -> int:
    return stream.steps[0].start_ns if stream.steps else 0


def _gap_kind(role: str, before: Step, step: Step) -> str:
    """What the wait between two steps of an agent was for."""
    if role == "main" and any(given.human for given in step.inputs):
        return "human"
    if step.retries and not step.inputs:
        return "retry"
    return "tool" if before.tools or any(given.tool_use for given in step.inputs) else "unknown"


def _completed(streams: Sequence[Stream]) -> bool | None:
    """Whether the main agent finished: its last call stopped for good and asked for no tool. None if unknown."""
    mains = [stream for stream in streams if stream.role == "main" and stream.steps]
    if not mains:
        return None
    stream = max(mains, key=lambda s: s.steps[-1].start_ns)
    step = stream.steps[-1]
    if stream.ended is False:
        return False
    if step.tools:
        answered = {given.tool_use for given in stream.inputs}
        return None if all(asked.id in answered for asked in step.tools) else False
    if any(given.human for given in stream.inputs):
        return None
    return stream.ended if step.stop_reason is None else step.stop_reason in FINAL_STOPS or None
