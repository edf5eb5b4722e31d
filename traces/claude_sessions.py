"""The streams of one Claude Code session made into calls: agents, who started whom, who waited for whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from keepwarm.traces.claude_files import LeadKey, role_of
from keepwarm.traces.claude_kin import Kin
from keepwarm.traces.claude_prompts import SECOND, AgentPrompt, Turn
from keepwarm.traces.claude_steps import INLINE, Asked, Step, Stream
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import FINAL_STOPS, After, Call, Segment, ToolUse


class Built(NamedTuple):
    """A session's calls in trace order, and what was noticed on the way; token counts as in Imported."""

    calls: list[Call]
    negative_waits: int = 0
    recorded_breaks: int = 0
    new_tokens: int = 0
    hidden: int = 0
    scaled: int = 0


@dataclass(slots=True)
class _Agent:
    """An agent being built; ``fork`` is another agent's turn that its first prompt grew from."""

    name: str
    role: str
    prompt: AgentPrompt
    type: str | None = None
    parent: str | None = None
    spawned_by: str | None = None
    fork: Turn | None = None
    turns: list[Turn] = field(default_factory=list)
    after: list[tuple[After, ...]] = field(default_factory=list)


class SessionBuilder:
    """Builds one session out of its streams, once.

    ``key`` is its project and its own id, ``session`` its pseudonym. ``owns`` says whether a stream is the one to tell
    a step (others hold copies of it), ``leads`` gives the size of each group's shared lead, ``informed`` takes prefix
    breaks from what was read, ``flow`` is the user's word on who waits.
    """

    def __init__(
        self,
        identity: Identity,
        session: str,
        key: tuple[str, str],
        *,
        owns: Callable[[Stream, Step], bool],
        leads: Mapping[LeadKey, int],
        informed: bool,
        flow: str | None,
    ) -> None:
        self._identity = identity
        self._session = session
        self._project, self._id = key
        self._owns = owns
        self._leads = leads
        self._informed = informed
        self._flow = flow
        self._origin = 0
        self._fresh = count()
        self._agents: dict[str, _Agent] = {}
        self._by_id: dict[str, tuple[_Agent, int]] = {}
        self._kin = Kin(identity, (), ())
        self._given: dict[str, int] = {}
        self._turns: dict[str, Turn] = {}
        self._negative = 0

    def build(self, streams: Sequence[Stream], session_start_ns: int) -> Built:
        """The session's calls; a stream without a step of its own adds nothing."""
        ordered = sorted(streams, key=lambda s: (s.agent is not None, s.source, _first_ns(s), s.session))
        owned = [(stream, step) for stream in ordered for step in stream.steps if self._owns(stream, step)]
        if not owned:
            return Built([])
        self._origin = min(step.start_ns for _, step in owned)
        self._kin = Kin(self._identity, ordered, owned)
        entrypoint = next((stream.entrypoint for stream in ordered if stream.entrypoint), None)
        self._flow = self._flow or _flow(entrypoint)
        for stream, step in _timeline(owned):
            self._step(stream, step)
        completed = _completed(ordered)
        agents = list({agent.name: agent for agent in self._agents.values()}.values())
        calls = [self._call(a, turn, session_start_ns, completed) for a in agents for turn in range(len(a.turns))]
        calls.sort(key=lambda call: (call.start_ns, call.call))
        threads = [agent.prompt.thread for agent in agents]
        self._agents.clear()  # agents hold this builder's methods: leave no cycle behind
        self._by_id.clear()
        return Built(
            calls,
            self._negative,
            sum(agent.prompt.breaks for agent in agents),
            sum(segment.tokens for call in calls for segment in call.append),
            sum(thread.hidden for thread in threads),
            sum(thread.scaled for thread in threads),
        )

    def _agent(self, stream: Stream) -> _Agent:
        """The stream's agent, made when its first step comes; a resumed one is the agent that it resumes."""
        name = self._kin.name_of(stream)
        if name in self._agents:
            return self._agents[name]
        fork = self._kin.forks.get(name)
        if fork is not None and fork.step in self._by_id:
            origin, at = self._by_id[fork.step]
            if not fork.went_on and stream.agent is None and at == len(origin.turns) - 1:
                self._agents[name] = origin
                return origin
            role = "side" if stream.source == INLINE else role_of(stream.agent)
            return self._new_agent(name, stream, role, origin, at)
        role = role_of(stream.agent)
        mains = [agent for agent in self._agents.values() if agent.role == "main" and agent.turns]
        if role == "compaction" and mains:
            return self._new_agent(name, stream, role, mains[-1], len(mains[-1].turns) - 1)
        agent = self._new_agent(name, stream, role)
        spawn = self._kin.spawn_of(name)
        if spawn is not None and spawn[0] in self._by_id:
            parent, at = self._by_id[spawn[0]]
            agent.parent, agent.spawned_by = parent.name, parent.turns[at].name
        agent.type = self._identity.agent_type(self._kin.type_of(name))
        return agent

    def _new_agent(self, name: str, stream: Stream, role: str, origin: _Agent | None = None, at: int = 0) -> _Agent:
        """An agent with a prompt of its own, or one that grows from a turn of another's."""
        prompt = AgentPrompt(
            leads=lambda step: self._lead(stream, name, step),
            hash_answer=self._hash_answer,
            fresh=self._fresh_hash,
            informed=self._informed,
        )
        agent = self._agents[name] = _Agent(name, role, prompt)
        if origin is not None:
            agent.parent, agent.fork = origin.name, origin.turns[at]
            prompt.follow(origin.turns[: at + 1], origin.prompt.thread.lead)
        return agent

    def _lead(self, stream: Stream, agent: str, step: Step) -> list[Segment]:
        key = stream.project, step.version, step.model, role_of(stream.agent)
        shared = self._identity.hash("\0".join(("lead", *key)).encode())
        own = self._identity.hash("\0".join(("own", self._session, agent, step.model)).encode())
        return [Segment(shared, self._leads.get(key, 0), "lead"), Segment(own, 0, "lead")]

    def _hash_answer(self, step: Step) -> int:
        return self._identity.hash(b"".join(part.to_bytes(8, "big", signed=True) for part in step.answer))

    def _fresh_hash(self) -> int:
        return self._identity.hash(f"fresh\0{self._session}\0{next(self._fresh)}".encode())

    def _step(self, stream: Stream, step: Step) -> None:
        agent = self._agent(stream)
        after = self._edges(agent, step)
        start = step.start_ns - self._origin
        for edge in after:
            start = max(start, self._turns[edge.call].start_ns + 1)
        turn = agent.prompt.next(
            self._identity.name("call", step.id), step, start, max(step.end_ns - self._origin, start)
        )
        self._given |= agent.prompt.thread.given
        self._turns[turn.name] = turn
        self._by_id[step.id] = agent, len(agent.turns)
        agent.turns.append(turn)
        agent.after.append(after)

    def _edge(self, call: str, due_ns: int, kind: str) -> After:
        gap = due_ns - self._turns[call].end_ns
        self._negative += gap < 0
        return After(call, "end", max(gap, 0), kind)

    def _edges(self, agent: _Agent, step: Step) -> tuple[After, ...]:
        """What the step waited for. The edge satisfied last has the observed wait, the others their own time."""
        start = step.start_ns - self._origin
        before = agent.turns[-1] if agent.turns else agent.fork
        if before is None:
            return self._first_edges(agent, start)
        kind = _gap_kind(agent.role, before.step, step)
        sender = self._sender(agent, before.step)
        if sender is not None:
            return self._edge(before.name, before.end_ns, "unknown"), self._edge(sender, start, "tool")
        joins = self._joins(agent, step)
        if not joins:
            return (self._edge(before.name, start, kind),)
        own = [i.at_ns - self._origin for i in step.inputs if i.tool_use and i.tool_use not in joins]
        done = start if kind == "human" else max([before.end_ns, *own])
        edges = [self._edge(before.name, done, kind)]
        edges += [self._edge(call, done_ns, "subagent") for call, done_ns in joins.values()]
        last = edges.index(self._last_satisfied(edges))
        edges[last] = edges[last]._replace(gap_ns=max(start - self._turns[edges[last].call].end_ns, 0))
        return tuple(edges)

    def _sender(self, agent: _Agent, before: Step) -> str | None:
        """The call whose message sent the agent on after it had finished."""
        sent = [] if before.tools else self._kin.sent.get(agent.name, [])
        for message, at_ns in sent:
            if at_ns > before.end_ns and message in self._by_id:
                sender, at = self._by_id[message]
                return sender.turns[at].name
        return None

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
        return (self._edge(max(ended or earlier, key=lambda turn: turn.end_ns).name, start, "unknown"),)

    def _joins(self, agent: _Agent, step: Step) -> dict[str, tuple[str, int]]:
        """For each input that told of an agent's end: that agent's last call, and when the input was there."""
        joins = {}
        for given in step.inputs:
            if given.launched or given.resumed:
                continue
            name = self._kin.spawned.get(given.tool_use or "")
            if name is None and given.agent:
                name = self._kin.agent_name(self._project, self._id, given.agent)
            child = self._agents.get(name) if name else None
            if child is not None and child is not agent and child.turns:
                at_ns = given.at_ns - self._origin
                if child.turns[-1].end_ns <= at_ns + SECOND:
                    joins[given.tool_use or child.name] = child.turns[-1].name, at_ns
        return joins

    def _call(self, agent: _Agent, turn: int, session_start_ns: int, completed: bool | None) -> Call:
        name, step, start_ns, end_ns, growth, parent, change, marks = agent.turns[turn]
        after = agent.after[turn]
        last = self._last_satisfied(after) if after else None
        account = step.usage.account() if step.usage else (None,) * 5
        return Call(
            session=self._session,
            agent=agent.name,
            call=name,
            role=agent.role,
            turn=turn,
            start_ns=start_ns,
            end_ns=end_ns,
            keep=growth.keep,
            usage_source="reported" if step.usage else "absent",
            write_source="reported" if step.usage and step.usage.write_told else "absent",
            origin="transcript",
            session_start_ns=session_start_ns,
            agent_type=agent.type,
            parent_agent=agent.parent,
            spawned_by=agent.spawned_by,
            flow=self._flow,
            after=after,
            gap_ns=last.gap_ns if last else None,
            gap_kind=last.kind if last else None,
            model=step.model,
            dialect="messages",
            prompt_parent=parent,
            append=growth.append,
            prefix_change=change,
            breakpoints=marks,
            prompt=step.usage.prompt if step.usage else None,
            uncached=account[0],
            cache_read=account[1],
            cache_write_5m=account[2],
            cache_write_1h=account[3],
            cache_write_other=account[4],
            output=step.output,
            output_est=round(step.weight),
            tools=tuple(map(self._tool, step.tools)),
            miss_reason=step.miss_reason,
            stop_reason=step.stop_reason,
            retries=step.retries or None,
            completed=completed,
        )

    def _tool(self, asked: Asked) -> ToolUse:
        result = self._kin.results.get(asked.id)
        return ToolUse(
            self._identity.tool(asked.name),
            asked.at_ns - self._origin,
            max(result.at_ns - asked.at_ns, 0) if result else None,
            self._given.get(asked.id),
            result.is_error if result else None,
            self._kin.spawned.get(asked.id),
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


def _gap_kind(role: str, before: Step, step: Step) -> str:
    """What the wait between two steps of an agent was for."""
    if role == "main" and any(given.human for given in step.inputs):
        return "human"
    if step.retries and not step.inputs:
        return "retry"
    return "tool" if before.tools or any(given.tool_use for given in step.inputs) else "unknown"


def _completed(streams: Sequence[Stream]) -> bool | None:
    """Whether the main agent finished: its last call stopped for good and asked for no tool. None if unknown."""
    mains = [stream for stream in streams if stream.agent is None and stream.steps]
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
