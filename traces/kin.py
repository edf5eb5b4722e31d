"""Kin tells how the agents of one session are related: who started whom, and who forked from whom."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from keepwarm.traces.steps import SPAWN_TOOLS, Asked, Input, Step, Stream


class Fork(NamedTuple):
    """Where a stream left the history that it copied: after message ``step``, whose own teller went on or did not."""

    step: str
    went_on: bool


class Kin:
    """The relations of a session's streams.

    ``results`` are tool results by tool use; ``spawned`` the agent that a tool use started, ``spawns`` the message and
    the tool use in it that started an agent; ``sent`` the messages that sent a finished agent on, as (message that
    asked for it, when); ``forks`` the copied history that an agent begins with; ``types`` what agents' own lines tell.
    """

    def __init__(self, streams: Sequence[Stream], owned: Sequence[tuple[Stream, Step]]) -> None:
        given = [one for stream in streams for one in _inputs(stream)]
        asked = {use.id: (step.id, use) for stream in streams for step in stream.steps for use in step.tools}
        spawning = {use: told for use, told in asked.items() if _spawns(told[1])}
        self.results = {one.tool_use: one for one in reversed(given) if one.tool_use}
        self.sent: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for one in given:
            if one.resumed and one.agent and one.tool_use in asked:
                self.sent[one.agent].append((asked[one.tool_use][0], one.at_ns))
        tellers = {step.id: stream for stream, step in owned}
        self.forks = {stream.agent: fork for stream in streams if (fork := _fork(stream, tellers))}
        self.spawned = self._spawned(streams, spawning)
        self.spawns = {agent: spawning[use] for use, agent in self.spawned.items() if use in spawning}
        self.types = {stream.agent: stream.agent_type for stream in streams if stream.agent_type}

    def _spawned(self, streams: Sequence[Stream], spawning: Mapping[str, tuple[str, Asked]]) -> dict[str, str]:
        """The agent that each tool use started: told beside the agent's lines, by the result, or by the prompt."""
        told = {i.agent: use for use, i in self.results.items() if i.agent and not i.resumed and use in spawning}
        spawned: dict[str, str] = {}
        for stream in streams:
            if stream.role != "main":
                first = {given.hash for given in stream.steps[0].inputs} if stream.steps else set()
                alike = (use for use, (_, one) in spawning.items() if one.prompt_hash in first and use not in spawned)
                use = stream.spawn_tool or told.get(stream.agent) or next(alike, None)
                if use is not None:
                    spawned.setdefault(use, stream.agent)
        return spawned


def _spawns(asked: Asked) -> bool:
    return asked.name in SPAWN_TOOLS or asked.prompt_hash is not None


def _fork(stream: Stream, tellers: Mapping[str, Stream]) -> Fork | None:
    """Where the stream's own steps leave those that it has only copies of."""
    last: tuple[Stream, str] | None = None
    for step in stream.steps:
        teller = tellers.get(step.id)
        if teller is stream:
            break
        last = (teller, step.id) if teller is not None else last
    if last is None or last[0].agent == stream.agent:
        return None
    return Fork(last[1], last[0].steps[-1].id != last[1])


def _inputs(stream: Stream) -> list[Input]:
    """All that a client put into a stream, in its order."""
    return [given for step in stream.steps for given in step.inputs] + stream.inputs
