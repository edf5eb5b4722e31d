"""Kin tells how the agents of one session are related: who started whom, and who forked from whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from keepwarm.traces.steps import SPAWN_TOOLS, Asked, Input, Step, Stream


class Fork(NamedTuple):
    """Where a stream left the history that it copied: after message ``step``, whose own teller went on or did not."""

    step: str
    went_on: bool


class Kin:
    """The relations of a session's streams.

    ``results`` are tool results by tool use; ``spawned`` the agent that a tool use started; ``sent`` the messages that
    sent a finished agent on, as (message that asked for it, when); ``forks`` the copied history that an agent begins
    with.
    """

    def __init__(self, streams: Sequence[Stream], owned: Sequence[tuple[Stream, Step]]) -> None:
        self.results: dict[str, Input] = {}
        self.spawned: dict[str, str] = {}
        self.forks: dict[str, Fork] = {}
        self.sent: dict[str, list[tuple[str, int]]] = {}
        self._asked: dict[str, tuple[str, Asked]] = {}
        self._types: dict[str, str | None] = {}
        uses: dict[str, str] = {}
        for stream in streams:
            self.results = {i.tool_use: i for i in _inputs(stream) if i.tool_use} | self.results
            for step in stream.steps:
                uses |= {asked.id: step.id for asked in step.tools}
                spawning = (use for use in step.tools if use.name in SPAWN_TOOLS or use.prompt_hash is not None)
                self._asked |= {asked.id: (step.id, asked) for asked in spawning}
            self._types[stream.agent] = stream.agent_type
        for stream in streams:
            self._find_sent(stream, uses)
        tellers = {step.id: stream for stream, step in owned}
        for stream in streams:
            self._find_fork(stream, tellers)
        self._find_spawns(streams)

    def type_of(self, agent: str) -> str | None:
        """A sub-agent's type: as its own lines tell it, else as it was asked for."""
        spawn = self.spawn_of(agent)
        return self._types.get(agent) or (spawn[1].agent_type if spawn else None)

    def spawn_of(self, agent: str) -> tuple[str, Asked] | None:
        """The message and the tool use in it that started an agent, if the logs tell."""
        use = next((use for use, started in self.spawned.items() if started == agent), None)
        return self._asked.get(use) if use is not None else None

    def _find_fork(self, stream: Stream, tellers: Mapping[str, Stream]) -> None:
        """Note where the stream's own steps leave those that it has only copies of."""
        last: tuple[Stream, str] | None = None
        for step in stream.steps:
            teller = tellers.get(step.id)
            if teller is stream:
                break
            last = (teller, step.id) if teller is not None else last
        if last is not None and last[0].agent != stream.agent:
            self.forks[stream.agent] = Fork(last[1], last[0].steps[-1].id != last[1])

    def _find_sent(self, stream: Stream, uses: Mapping[str, str]) -> None:
        for given in _inputs(stream):
            if given.resumed and given.agent and given.tool_use is not None and given.tool_use in uses:
                self.sent.setdefault(given.agent, []).append((uses[given.tool_use], given.at_ns))

    def _find_spawns(self, streams: Sequence[Stream]) -> None:
        """Find the tool use that started each sub-agent: told beside its lines, by its result, or by its prompt."""
        told = {i.agent: use for use, i in self.results.items() if i.agent and not i.resumed and use in self._asked}
        for stream in streams:
            if stream.role != "main":
                use = stream.spawn_tool or told.get(stream.agent) or self._spawn_by_prompt(stream)
                if use is not None:
                    self.spawned.setdefault(use, stream.agent)

    def _spawn_by_prompt(self, stream: Stream) -> str | None:
        first = {given.hash for given in stream.steps[0].inputs} if stream.steps else set()
        for use, (_, asked) in self._asked.items():
            if asked.prompt_hash in first and use not in self.spawned:
                return use
        return None


def _inputs(stream: Stream) -> list[Input]:
    """All that a client put into a stream, in its order."""
    return [given for step in stream.steps for given in step.inputs] + stream.inputs
