"""Synthetic sessions: calls made up from a workload's figures, with the account a managed API would have given them.

Every session is drawn from its own random numbers, so a trace of more sessions begins with the sessions of a shorter
one. Times are whole milliseconds: what differs between two machines' logarithms does not show.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from operator import attrgetter
from random import Random
from typing import NamedTuple

from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import After, Breakpoint, Call, Segment, ToolUse
from keepwarm.traces.steps import SECOND, Usage
from keepwarm.traces.workloads import COMMON, HOUR, WORKLOADS, Kind, Script, Spread, Workload

MILLISECOND = 1_000_000


class _Agent(NamedTuple):
    """An agent; ``like`` is what its calls have alike."""

    kind: Kind
    like: Call


def _nanoseconds(seconds: float) -> int:
    return max(round(seconds * 1000), 1) * MILLISECOND


class _Session:
    """One session being made up; ``calls`` are its rows, in no order yet and without an account."""

    def __init__(self, workload: Workload, number: int, project: int, start_ns: int, rng: Random, identity: Identity):
        self.workload = workload
        self.script = workload.script(number, rng)
        self.start_ns = start_ns
        self.calls: list[Call] = []
        self.leads: dict[str, tuple[Segment, Segment]] = {}
        self._ends: dict[str, int] = {}
        self._rng = rng
        self._identity = identity
        self._project = str(project)
        self._name = identity.name("session", str(number))

    def tell(self) -> None:
        """Make up the whole session."""
        like = Call(
            session=self._name,
            session_start_ns=self.start_ns,
            agent=self._id("agent", "0", ""),
            completed=self.script.completed,
            **COMMON["call"],
        )
        self._run(self._agent("main", like), (), self.script.calls)

    def _id(self, kind: str, *parts: str) -> str:
        return self._identity.name(kind, self._name, *parts)

    def _tokens(self, spread: Spread) -> int:
        return round(spread.draw(self._rng))

    def _segment(self, tokens: int, kind: str, *parts: str, answer_of: str | None = None) -> Segment:
        return Segment(self._identity.hash("\0".join((kind, *parts)).encode()), tokens, kind, answer_of)

    def _agent(self, kind: str, like: Call) -> _Agent:
        """A new agent. Its lead is the project's for its kind; the rest of its system prompt is the session's."""
        known = self.workload.kinds[kind]
        rest = round(known.rest.draw(Random(f"{self._name}/{kind}")))
        shared = self._segment(known.lead, "lead", self._project, kind, known.model)
        self.leads[like.agent] = shared, self._segment(rest, "system", self._name, kind)
        return _Agent(known, like._replace(model=known.model, flow=known.flow or like.flow))

    def _run(self, agent: _Agent, edges: tuple[After, ...], calls: int) -> Call:
        """Make up all calls of an agent, those of its sub-agents included; its last call."""
        task = self._segment(self._tokens(agent.kind.task), "user", agent.like.agent)
        planned = agent.like._replace(after=edges, append=(*self.leads[agent.like.agent], task))
        for turn in range(calls):
            call = self._call(agent.kind, planned._replace(turn=turn))
            tools: tuple[ToolUse, ...] = ()
            if turn + 1 < calls:
                tools, planned = self._after(agent, call)
            elif call.role == "main" and not self.script.completed:
                tools = (ToolUse("Bash", call.end_ns),)
            self.calls.append(call._replace(tools=tools, stop_reason="tool_use" if tools else "end_turn"))
        return call

    def _call(self, kind: Kind, planned: Call) -> Call:
        """A call as it went, but for its account and what its answer asks for, of what it waits for and asks."""
        name = self._id("call", planned.agent, str(planned.turn))
        last = max(planned.after, key=self._due, default=None)
        start = 0 if last is None else self._due(last)
        prompt = planned.prompt_tokens
        output = self._tokens(COMMON["summary"] if planned.role == "compaction" else kind.output)
        parent = planned.prompt_parent
        cold = parent is None or start - self._ends[parent] >= kind.ttl_s * SECOND
        new = prompt if cold else prompt - planned.keep
        first = start + _nanoseconds(COMMON["first_token"].draw(self._rng) + new / COMMON["prefill_tps"])
        self._ends[name] = first + _nanoseconds(output / COMMON["decode_tps"].draw(self._rng))
        return planned._replace(
            call=name,
            gap_ns=last.gap_ns if last else None,
            gap_kind=last.kind if last else None,
            start_ns=start,
            first_token_ns=first,
            end_ns=self._ends[name],
            breakpoints=self._marks(kind, planned, prompt),
            prompt=prompt,
            output=output,
        )

    def _due(self, edge: After) -> int:
        return self._ends[edge.call] + edge.gap_ns

    def _marks(self, kind: Kind, planned: Call, prompt: int) -> tuple[Breakpoint, ...]:
        """Marks after the shared lead, after the system prompt, and a few tokens before the end."""
        tail = 3 if self._rng.random() < 0.95 else 4 + int(self._rng.random() * 130)
        shared, own = (segment.tokens for segment in self.leads[planned.agent])
        ats = (shared, shared + own, prompt - min(tail, planned.append[-1].tokens - 1))
        return tuple(Breakpoint(at, kind.ttl_s) for at in ats)

    def _after(self, agent: _Agent, call: Call) -> tuple[tuple[ToolUse, ...], Call]:
        """What a call's answer asks for, and the next call that comes of it, planned."""
        turn = str(call.turn + 1)
        script = self.script if call.role == "main" else Script(0)
        answer = self._segment(call.output or 0, "answer", call.call, answer_of=call.call)
        tools: tuple[ToolUse, ...] = ()
        if turn in script.teams:
            tools, edges = self._team(agent, call, script.teams[turn])
        elif turn in script.humans:
            edges = (After(call.call, "end", _nanoseconds(script.humans[turn]), "human"),)
        else:
            tools, wait_ns = self._tools(agent, call)
            edges = (After(call.call, "end", wait_ns, "tool"),)
        if tools:
            came = [self._segment(t.result_tokens or 0, "tool_result", call.call, str(i)) for i, t in enumerate(tools)]
        else:
            came = [self._segment(self._tokens(agent.kind.task) // 8 + 8, "user", call.call)]
        append = (answer, *came)
        planned = agent.like._replace(after=edges, append=append, prompt_parent=call.call, keep=call.prompt or 0)
        if call.turn + 1 in script.compactions or planned.prompt_tokens > self.workload.compact_at:
            return tools, self._compacted(agent, planned)
        return tools, planned

    def _tools(self, agent: _Agent, call: Call) -> tuple[tuple[ToolUse, ...], int]:
        """The tools an answer asks for, side by side, and when the last of them is done, ns after the call's end."""
        rng = self._rng
        longest = _nanoseconds(self.workload.tool_time.draw(rng))
        tools = []
        for i in range(1 + (rng.random() < 0.14) + (rng.random() < 0.03)):
            name = rng.choices(list(COMMON["tools"]), list(COMMON["tools"].values()))[0]
            took = longest if i == 0 else round(longest * rng.random() / MILLISECOND) * MILLISECOND
            tools.append(ToolUse(name, call.end_ns, took, self._tokens(agent.kind.result), rng.random() < 0.04))
        return tuple(tools), longest

    def _team(self, agent: _Agent, call: Call, team: Sequence[str]) -> tuple[tuple[ToolUse, ...], tuple[After, ...]]:
        """Run sub-agents side by side; the tool uses that started them, and what the next call waits for."""
        tools, edges = [], [After(call.call, "end", 0, "tool")]
        for number, kind in enumerate(team):
            name = self._id("agent", str(number), call.call)
            like = agent.like._replace(
                agent=name, role="subagent", agent_type=kind, parent_agent=call.agent, spawned_by=call.call
            )
            child = self._agent(kind, like)
            start = After(call.call, "end", _nanoseconds(COMMON["handover"].draw(self._rng)), "tool")
            last = self._run(child, (start,), self._tokens(child.kind.calls))
            edges.append(After(last.call, "end", _nanoseconds(COMMON["handover"].draw(self._rng)), "subagent"))
            result = (last.output or 0) + 40
            tools.append(ToolUse("Task", call.end_ns, self._due(edges[-1]) - call.end_ns, result, False, name))
        return tuple(tools), tuple(edges)

    def _compacted(self, agent: _Agent, planned: Call) -> Call:
        """Have the conversation summarised by a call of its own; the next call keeps the lead and takes the summary."""
        parent = planned.prompt_parent or ""
        name = self._id("agent", "compaction", parent)
        lead = self.leads[name] = self.leads[planned.agent]
        append = (*planned.append, self._segment(900, "user", "compact"))
        writer = planned._replace(
            agent=name, role="compaction", agent_type=None, parent_agent=planned.agent, spawned_by=None, append=append
        )
        summary = self._call(agent.kind, writer)
        self.calls.append(summary._replace(stop_reason="end_turn"))
        wait = After(summary.call, "end", _nanoseconds(COMMON["handover"].draw(self._rng)), "subagent")
        told = self._segment(summary.output or 0, "answer", summary.call, answer_of=summary.call)
        files = self._segment(self._tokens(COMMON["reattached"]), "user", "files", summary.call)
        keep = sum(segment.tokens for segment in lead)
        return planned._replace(after=(wait,), append=(told, files), keep=keep, prefix_change="compaction")


class _Entry(NamedTuple):
    """A cached prefix of ``at`` tokens, and from when to when (ns) it can be read."""

    at: int
    readable_ns: int
    expires_ns: int


def _account(call: Call, start_ns: int, lead: tuple[Segment, Segment], cache: dict[str, _Entry]) -> Call:
    """A call with the account a managed API gives it; the cache then holds the call's marked prefixes.

    A prefix is readable once the first call that marked it has begun to answer, and for its TTL after the end of the
    last call that used it. What lies past the last mark is not, the answer included.
    """
    now, first, end = (start_ns + (ns or 0) for ns in (call.start_ns, call.first_token_ns, call.end_ns))
    keys = (str(lead[0].hash), str(lead[1].hash), call.call)
    parent = cache.get(call.prompt_parent or "")
    known = [cache.get(key) for key in keys[:2]] + [parent if parent and parent.at <= call.keep else None]
    read = max((entry.at for entry in known if entry and entry.readable_ns <= now < entry.expires_ns), default=0)
    for key, mark in zip(keys, call.breakpoints, strict=True):
        expires = end + mark.ttl_s * SECOND
        old = cache.get(key)
        if old is None or old.expires_ns <= now:
            cache[key] = _Entry(mark.at, first, expires)
        else:
            cache[key] = _Entry(mark.at, min(old.readable_ns, first), max(old.expires_ns, expires))
    upto, ttl_s = call.breakpoints[-1]
    short, hour = (0, upto - read) if ttl_s == HOUR else (upto - read, 0)
    return call._replace(**Usage((call.prompt or 0) - upto, read, short, hour, 0).columns())


def _told(session: _Session, leads: dict[str, _Entry]) -> Iterator[Call]:
    """The session's calls in trace order, with their accounts; ``leads`` is what its project has cached meanwhile."""
    cache = dict(leads)
    for call in sorted(session.calls, key=attrgetter("start_ns", "call")):
        yield _account(call, session.start_ns, session.leads[call.agent], cache)
    leads.update({key: cache[key] for shared, _ in session.leads.values() if (key := str(shared.hash)) in cache})


def _stream(workload: Workload, name: str, seed: int, sessions: int) -> Iterator[Call]:
    identity = Identity(blake2b(f"{name} {seed}".encode(), digest_size=32).digest())
    pauses = Random(f"{name}/{seed}/pauses")
    free = [(0, 0)] + [(_nanoseconds(workload.pause.draw(pauses)), project) for project in range(1, workload.projects)]
    heapify(free)
    leads: dict[str, _Entry] = {}
    latest = -1
    for number in range(sessions):
        start, project = heappop(free)
        latest = max(start, latest + 1)
        rng = Random(f"{name}/{seed}/{number}")
        session = _Session(workload, number, project, latest, rng, identity)
        session.tell()
        yield from _told(session, leads)
        end = latest + max(call.end_ns for call in session.calls)
        heappush(free, (end + _nanoseconds(workload.pause.draw(pauses)), project))


def synthesise(workload: str, *, seed: int = 0, sessions: int | None = None) -> Iterator[Call]:
    """The calls of a synthetic trace, in trace order, a session's worth in memory at a time.

    The same workload and seed give the same calls; ``sessions`` (the workload's own number unless given) only says how
    many of the endless row of sessions. InputError for a workload there is not.
    """
    known = WORKLOADS.get(workload)
    if known is None:
        raise InputError(f"{workload}: no such workload, expected one of {', '.join(WORKLOADS)}")
    count = known.sessions if sessions is None else sessions
    if count < 1:
        raise InputError(f"sessions is {count}, expected at least 1")
    return _stream(known, workload, seed, count)
