"""One Claude Code transcript file folded into streams: one an agent, each a list of steps, one step an API message.

The format is the client's own and has no schema; what is known of it was measured on versions 2.0.60 to 2.1.220. A line
that is no JSON object, or lacks what its type needs, is damaged: counted, listed by its number, and passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import orjson

from keepwarm.traces.identity import Identity, content_bytes
from keepwarm.traces.thread import (
    ASSISTANT_WEIGHT,
    IMAGE_TOKENS,
    RESULT_WEIGHT,
    TOOL_RESULT_TOKENS,
    TOOL_USE_TOKENS,
    USER_WEIGHT,
)

OWN_FILE, PROGRESS, INLINE = 0, 1, 2
"""Where a sub-agent's lines stand; the first that has a message is believed."""

SPAWN_TOOLS = ("Task", "Agent")
MISS_REASONS = frozenset(
    (
        "model_changed",
        "system_changed",
        "tools_changed",
        "messages_changed",
        "previous_message_not_found",
        "unavailable",
    )
)


class Usage(NamedTuple):
    """The provider's account of one message."""

    uncached: int
    cache_read: int
    write_5m: int
    write_1h: int
    write_other: int

    @property
    def prompt(self) -> int:
        """All prompt tokens."""
        return sum(self)


class Asked(NamedTuple):
    """A tool use in an answer."""

    id: str
    name: str
    at_ns: int
    agent_type: str | None
    prompt_hash: int | None


class Input(NamedTuple):
    """A block that the client put into the conversation: what a user wrote, or a tool's result."""

    kind: str
    hash: int
    weight: float
    at_ns: int
    human: bool = False
    tool_use: str | None = None
    is_error: bool | None = None
    agent: str | None = None


@dataclass(slots=True)
class Step:
    """One API message and what went into the conversation before it."""

    id: str
    model: str
    version: str
    start_ns: int
    first_ns: int
    end_ns: int
    inputs: list[Input]
    reset: str | None = None
    cleared: tuple[str, ...] = ()
    retries: int = 0
    usage: Usage | None = None
    output: int | None = None
    stop_reason: str | None = None
    miss_reason: str | None = None
    sidechain: bool = False
    answer: list[int] = field(default_factory=list)
    weight: float = 0.0
    tools: list[Asked] = field(default_factory=list)


@dataclass(slots=True)
class Stream:
    """One agent's steps as one file tells them. ``ended``: the client said the turn was over, or gave an error."""

    project: str
    session: str
    agent: str | None
    source: int
    spawn_tool: str | None = None
    entrypoint: str | None = None
    steps: list[Step] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    reset: str | None = None
    cleared: tuple[str, ...] = ()
    retries: int = 0
    last_ns: int = 0
    ended: bool | None = None


def time_ns(stamp: str) -> int:
    """An ISO time as ns since 1970."""
    return round(datetime.fromisoformat(stamp).timestamp() * 1000) * 1_000_000


class FileFold:
    """Folds the lines of one file. ``session`` is what the file's place says; None lets its lines say it."""

    def __init__(self, identity: Identity, project: str, session: str | None, agent: str | None) -> None:
        self._hash: Callable[[bytes], int] = identity.hash
        self._project = project
        self._session = session
        self._agent = agent
        self.streams: dict[tuple[int, str | None], Stream] = {}
        self._own: Stream | None = None
        self._roots: dict[str, str] = {}
        self._usage_seen: dict[str, Any] | None = None
        self.damaged: list[int] = []
        self.lines = 0

    def take(self, lines: Iterable[bytes]) -> None:
        """Take in a file's lines."""
        for number, raw in enumerate(lines, 1):
            try:
                self._take(orjson.loads(raw))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                if raw.isspace():
                    continue
                self.damaged.append(number)
            self.lines += 1

    def _take(self, line: dict[str, Any]) -> None:
        kind = line["type"] if "type" in line else line.get("kind")
        if kind == "progress":
            data = line["data"]
            if data["type"] == "agent_progress":
                stream = self._stream(line, PROGRESS, data["agentId"])
                stream.spawn_tool = line["parentToolUseID"]
                inner = data["message"]
                self._message(stream, inner["type"], inner, line)
        elif kind in ("assistant", "user"):
            self._message(self._own_stream(line), kind, line, line)
        elif kind == "system":
            self._system(self._own_stream(line), line)

    def _own_stream(self, line: dict[str, Any]) -> Stream:
        """The stream a line of this file's own belongs to; inline sidechains are told apart by their root line."""
        if self._agent is not None or not line.get("isSidechain"):
            return self._own or self._stream(line, OWN_FILE, self._agent)
        named = line.get("agentId")
        parent, uuid = line.get("parentUuid"), line["uuid"]
        root = named or self._roots.get(parent or "", uuid)
        self._roots[uuid] = root
        return self._stream(line, INLINE, root)

    def _stream(self, line: dict[str, Any], source: int, agent: str | None) -> Stream:
        key = (source, agent)
        stream = self.streams.get(key)
        if stream is None:
            session = self._session or line["sessionId"]
            entrypoint = line.get("entrypoint")
            stream = self.streams[key] = Stream(self._project, session, agent, source, entrypoint=entrypoint)
            if source == OWN_FILE:
                self._own = stream
        return stream

    def _message(self, stream: Stream, kind: str, line: dict[str, Any], outer: dict[str, Any]) -> None:
        at_ns = time_ns(line["timestamp"])
        if kind == "assistant":
            self._answer(stream, line, outer, at_ns)
        elif not line.get("isVisibleInTranscriptOnly") or line.get("isCompactSummary"):
            inputs = [self._input(block, line, at_ns) for block in _blocks(line["message"]["content"])]
            if inputs[:1] and inputs[0].human:
                stream.ended = None
            stream.inputs.extend(inputs)
        stream.last_ns = max(stream.last_ns, at_ns)

    def _answer(self, stream: Stream, line: dict[str, Any], outer: dict[str, Any], at_ns: int) -> None:
        message = line["message"]
        if message.get("model") == "<synthetic>" or line.get("isApiErrorMessage"):
            stream.ended = False if line.get("isApiErrorMessage") else stream.ended
            return
        step = self._step(stream, message, line, outer, at_ns)
        stream.ended = None
        step.end_ns = max(step.end_ns, at_ns)
        self._account(step, message)
        for block in message["content"]:
            self._answer_block(step, block, at_ns)

    def _step(
        self, stream: Stream, message: dict[str, Any], line: dict[str, Any], outer: dict[str, Any], at_ns: int
    ) -> Step:
        """The step of a message; its lines need not stand together."""
        key = message.get("id") or line.get("requestId") or line["uuid"]
        for step in reversed(stream.steps[-4:]):
            if step.id == key:
                return step
        before = stream.inputs[-1].at_ns if stream.inputs else stream.last_ns
        step = Step(
            id=key,
            model=message["model"],
            version=str(outer.get("version")),
            start_ns=min(before, at_ns) or at_ns,
            first_ns=at_ns,
            end_ns=at_ns,
            inputs=stream.inputs,
            reset=stream.reset,
            cleared=stream.cleared,
            retries=stream.retries,
            sidechain=bool(outer.get("isSidechain")),
        )
        stream.inputs, stream.reset, stream.cleared, stream.retries = [], None, (), 0
        stream.steps.append(step)
        return step

    def _account(self, step: Step, message: dict[str, Any]) -> None:
        """Take the largest account of the message's lines; the output count is final only beside a stop reason."""
        usage = message.get("usage")
        if usage and (step.usage is None or usage != self._usage_seen):
            told = _usage(usage)
            step.usage = told if step.usage is None or told.prompt > step.usage.prompt else step.usage
            self._usage_seen = usage
        if message.get("stop_reason"):
            step.stop_reason = message["stop_reason"]
            if usage and usage.get("output_tokens") is not None:
                step.output = int(usage["output_tokens"])
        reason = ((message.get("diagnostics") or {}).get("cache_miss_reason") or {}).get("type")
        if reason:
            step.miss_reason = reason if reason in MISS_REASONS else "other"

    def _answer_block(self, step: Step, block: dict[str, Any], at_ns: int) -> None:
        content = content_bytes(block)
        step.answer.append(self._hash(content))
        kind = block["type"]
        if kind == "text":
            step.weight += len(block["text"]) * ASSISTANT_WEIGHT
        elif kind == "tool_use":
            step.weight += len(content) * ASSISTANT_WEIGHT + TOOL_USE_TOKENS
            asked, agent_type, prompt = block["input"], None, None
            if block["name"] in SPAWN_TOOLS:
                agent_type = asked.get("subagent_type")
                prompt = self._hash(content_bytes(asked["prompt"])) if isinstance(asked.get("prompt"), str) else None
            step.tools.append(Asked(block["id"], block["name"], at_ns, agent_type, prompt))

    def _input(self, block: dict[str, Any] | str, line: dict[str, Any], at_ns: int) -> Input:
        hash_ = self._hash(content_bytes(block))
        if isinstance(block, str) or block["type"] == "text":
            text = block if isinstance(block, str) else block["text"]
            human = not line.get("isMeta") and not line.get("isCompactSummary")
            return Input("user", hash_, len(text) * USER_WEIGHT, at_ns, human)
        if block["type"] != "tool_result":
            return Input("user", hash_, IMAGE_TOKENS, at_ns, human=True)
        told = line.get("toolUseResult")
        agent = told.get("agentId") or (told.get("task") or {}).get("task_id") if isinstance(told, dict) else None
        weight = _result_weight(block.get("content") or "") + TOOL_RESULT_TOKENS
        return Input("tool_result", hash_, weight, at_ns, False, block["tool_use_id"], block.get("is_error"), agent)

    def _system(self, stream: Stream, line: dict[str, Any]) -> None:
        kind = line.get("subtype")
        if kind == "compact_boundary":
            stream.inputs, stream.reset = [], "compaction"
        elif kind == "microcompact_boundary":
            told = line.get("microcompactMetadata") or {}
            stream.reset = stream.reset or "microcompaction"
            stream.cleared += tuple(told.get("compactedToolIds") or ())
        elif kind == "api_error":
            stream.retries += 1
            stream.last_ns = max(stream.last_ns, time_ns(line["timestamp"]))
        elif kind in ("turn_duration", "stop_hook_summary") and stream.steps and not stream.inputs:
            stream.ended = True


def _blocks(content: Any) -> list[Any]:
    return [content] if isinstance(content, str) else list(content)


def _usage(told: dict[str, Any]) -> Usage:
    written = int(told.get("cache_creation_input_tokens") or 0)
    by_ttl = told.get("cache_creation") or {}
    five, hour = (int(by_ttl.get(f"ephemeral_{ttl}_input_tokens") or 0) for ttl in ("5m", "1h"))
    read = int(told.get("cache_read_input_tokens") or 0)
    return Usage(int(told["input_tokens"]), read, five, hour, max(written - five - hour, 0))


def _result_weight(content: str | list[dict[str, Any]]) -> float:
    if isinstance(content, str):
        return len(content) * RESULT_WEIGHT
    return sum(len(part["text"]) * RESULT_WEIGHT if part.get("type") == "text" else IMAGE_TOKENS for part in content)
