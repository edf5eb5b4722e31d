"""A recorder's journal made into a trace: records folded into steps, and those built into sessions."""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from keepwarm.traces.identity import Identity
from keepwarm.traces.model import Attempt
from keepwarm.traces.recorded_prompts import RecordedPrompt
from keepwarm.traces.records import AnswerRecord, RequestRecord, journal_salt, read_records, whole
from keepwarm.traces.sessions import SessionBuilder
from keepwarm.traces.steps import OWN_FILE, Asked, Input, Step, Stream, Wire
from keepwarm.traces.store import TraceWriter

RETRIED = ("overloaded", "rate_limit", "timeout", "reset", "other", "cancelled")
"""Failures after which a client asks the same again."""


class Closed(NamedTuple):
    """What became of a journal: calls in the trace, and requests that had no answer when the recorder ended."""

    sessions: int
    calls: int
    unanswered: int


class _Agent:
    """An agent's requests as they become steps. A failed try waits for the next, which may be the same again. ``uses``
    are new names of tool uses whose names had been used before.
    """

    def __init__(self, identity: Identity, stream: Stream) -> None:
        self.stream = stream
        self.summary = False
        self.uses: dict[str, str] = {}
        self._identity = identity
        self._failed: list[tuple[RequestRecord, AnswerRecord]] = []

    def take(self, record: RequestRecord, answer: AnswerRecord) -> None:
        """The next of its requests, in the order in which they came in."""
        if self._failed and self._failed[-1][0].rest != record.rest:
            self.give_up()
        self._failed.append((record, answer))
        if answer.error not in RETRIED:
            self.give_up()

    def give_up(self) -> None:
        """There will be no other try: what there is becomes a step."""
        if self._failed:
            self.stream.steps.append(self._step(self._failed))
            self.stream.ended = False if self._failed[-1][1].error else None
            self._failed, self.summary = [], False

    def _step(self, tries: list[tuple[RequestRecord, AnswerRecord]]) -> Step:
        """The step that a request became, with all that was tried of it."""
        record, answer = tries[-1]
        last = self.stream.steps[-1].wire if self.summary and self.stream.steps else None
        known = {piece.hash for piece in last.request.rest} if last else ()
        attempts = [Attempt(one.at_ns, told.end_ns, told.status, told.error) for one, told in tries]
        return Step(
            id=answer.call or self._identity.name("call", self.stream.agent, str(record.number), str(record.at_ns)),
            model=record.model,
            version="",
            start_ns=attempts[0].sent_ns,
            end_ns=answer.end_ns,
            inputs=[given for given in tries[0][0].inputs if given.hash not in known],  # again, nothing is new
            reset="compaction" if self.summary else None,
            retries=len(attempts) - 1,
            weight=sum(piece.weight for piece in answer.said),
            tools=list(answer.tools),
            wire=Wire(record, answer, tuple(attempts) if len(attempts) > 1 else ()),
            **{name: getattr(answer, name) for name in ("usage", "output", "stop_reason", "miss_reason")},
        )


class _Fold:
    """All of a journal's agents, session by session."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._answers: dict[int, AnswerRecord] = {}
        self._uses: dict[str, Asked] = {}
        self._calls: set[str | None] = set()
        self._renamed: dict[int, dict[str, str]] = {}
        self._names: dict[str | None, str] = {}
        self.sessions: dict[str, dict[str, _Agent]] = defaultdict(dict)

    def answers(self, records: Iterable[RequestRecord | AnswerRecord]) -> None:
        """First all answers, for a request may be told by what it answers to; and the names agents were given."""
        for record in records:
            if isinstance(record, AnswerRecord):
                record = self._answers[record.number] = self._once(record)
                self._uses |= {asked.id: asked for asked in record.tools}
            elif record.role == "subagent":
                named = (one.agent for one in record.inputs if one.launched and not one.tool_use)
                self._names |= dict.fromkeys(named, record.agent)

    def _once(self, record: AnswerRecord) -> AnswerRecord:
        """An answer with ids that no other has, nor its tool uses: some servers count anew in each answer."""
        call = None if record.call in self._calls else record.call
        self._calls.add(record.call)
        known, number = (asked.id for asked in record.tools if asked.id in self._uses), str(record.number)
        again = self._renamed[record.number] = {use: self._identity.name("use", use, number) for use in known}
        tools = tuple(asked._replace(id=again.get(asked.id, asked.id)) for asked in record.tools)
        return record._replace(call=call, tools=tools)

    def requests(self, records: Iterable[RequestRecord | AnswerRecord]) -> int:
        """Then the requests, in the order in which they came in; how many had no answer."""
        asked = [record for record in records if isinstance(record, RequestRecord)]
        for record in asked:
            if record.number in self._answers:
                self._add(record, self._answers[record.number])
        return sum(record.number not in self._answers for record in asked)

    def _add(self, record: RequestRecord, answer: AnswerRecord) -> None:
        agents = self.sessions[record.session]
        agent = agents.get(record.agent)
        if agent is None:
            whose = record.session, record.agent, record.role
            stream = Stream("", "", *whose, OWN_FILE, record.parent, flow=record.flow)
            agent = agents[record.agent] = _Agent(self._identity, stream)
        given = (one._replace(tool_use=agent.uses.get(one.tool_use or "", one.tool_use)) for one in record.inputs)
        agent.take(record._replace(inputs=[self._told(one) for one in given]), answer)
        agent.uses |= self._renamed.get(record.number, {})
        compacted = agents.get(record.parent or "") if record.role == "compaction" else None
        if compacted is not None and answer.error is None:
            compacted.give_up()
            compacted.summary = True

    def _told(self, given: Input) -> Input:
        """What a client put in, with what the tool use that it answers says of it; agents by their own names."""
        given = given._replace(agent=self._names.get(given.agent, given.agent))
        asked = self._uses.get(given.tool_use or "")
        if asked is None:
            return given
        if asked.to is not None:
            return given._replace(agent=asked.to, resumed=True)
        return given._replace(launched=True) if asked.behind else given

    def streams(self) -> list[tuple[int, str, list[Stream]]]:
        """Each session's start, name and streams, in trace order."""
        found = []
        for session, agents in self.sessions.items():
            for agent in agents.values():
                agent.give_up()
            streams = [agent.stream for agent in agents.values() if agent.stream.steps]
            if streams:
                _promote(streams)
                found.append((min(stream.steps[0].start_ns for stream in streams), session, streams))
        return sorted(found, key=lambda item: item[:2])


def _promote(streams: list[Stream]) -> None:
    """A session whose client offers no tools at all has none but side calls: the longest is its main agent."""
    if all(stream.role == "side" for stream in streams):
        longest = max(streams, key=lambda stream: len(stream.steps))
        longest.role, longest.parent = "main", None


def close_journal(journal: Path, out: str, *, version: str, flow: str | None = None) -> Closed:
    """Write the trace of a journal's records; the journal stays."""
    identity = Identity(journal_salt(journal))
    fold = _Fold(identity)
    records = list(whole(read_records(journal)))
    fold.answers(records)
    unanswered = fold.requests(records)
    sessions = fold.streams()
    prompts = partial(RecordedPrompt, identity, {})
    notes = {"prefix_breaks": None}
    with TraceWriter(out, producer="record", version=version, tokens="reported", notes=notes) as writer:
        for start_ns, session, streams in sessions:
            builder = SessionBuilder(session, lambda *_: True, prompts, flow, "proxy")
            for call in builder.build(streams, start_ns - sessions[0][0]):
                writer.add(call)
    return Closed(len(sessions), writer.calls, unanswered)
