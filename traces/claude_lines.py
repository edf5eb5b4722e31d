"""One Claude Code transcript file folded into streams: one an agent, each a list of steps, one step an API message.

The format is the client's own and has no schema; what is known of it was measured on versions 2.0.60 to 2.1.220. A line
that is no JSON object, or lacks what its type needs, is damaged: counted, listed by its number, and passed over. What
takes a value out of a line raises TypeError or ValueError where it is not of the type that it must have.
"""

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from keepwarm.traces.identity import Identity, content_bytes
from keepwarm.traces.model import MISS_REASONS, STOP_REASONS
from keepwarm.traces.steps import INLINE, OWN_FILE, PROGRESS, SPAWN_TOOLS, Asked, Input, Step, Stream, Usage, flow_of
from keepwarm.traces.thread import CHARACTER_TOKENS, PIECE_TOKENS

MOST_TOKENS = 1 << 31
LAST_NS = 1 << 62

TASK_ID = re.compile(r"<task-id>([\w-]+)</task-id>")
"""How a background agent's end is told to the agent that started it."""


def role_of(agent: str | None) -> str:
    """An agent's role, as far as its name tells."""
    if agent is None:
        return "main"
    return "compaction" if agent.startswith("acompact") else "subagent"


class Source(NamedTuple):
    """A transcript file and what its place says: project, session and agent; the last two None if the lines say."""

    path: Path
    project: str
    session: str | None
    agent: str | None


class FileFold:
    """Folds the lines of one file; ``repeated`` are messages that stand in it once more."""

    def __init__(self, identity: Identity, source: Source) -> None:
        self._identity = identity
        self._name = identity.name
        self._hash: Callable[[bytes], int] = identity.hash
        self._source = source
        self._told = source.session or ""
        self.streams: dict[tuple[int, str | None], Stream] = {}
        self._queued_ns = 0
        self._roots: dict[str, str] = {}
        self._seen: set[str] = set()
        self.repeated: set[str] = set()
        self._steps: dict[tuple[int, str, str], Step] = {}
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
                stream = self._stream(line, PROGRESS, string(data["agentId"]))
                stream.spawn_tool = self._name("use", string(line["parentToolUseID"]))
                inner = data["message"]
                self._message(stream, inner["type"], inner, line)
        elif kind in ("assistant", "user"):
            self._message(self._own_stream(line), kind, line, line)
        elif kind == "system":
            self._system(self._own_stream(line), line)
        elif kind == "attachment":
            self._attachment(line)
        elif kind == "queue-operation":
            self._queued_ns = self._queued_ns or time_ns(line["timestamp"])

    def _own_stream(self, line: dict[str, Any]) -> Stream:
        """The stream a line of this file's own belongs to; inline sidechains are told apart by their root line."""
        if self._source.agent is not None or not line.get("isSidechain"):
            return self._stream(line, OWN_FILE, self._source.agent)
        uuid = string(line["uuid"])
        root = maybe_string(line.get("agentId")) or self._roots.get(line.get("parentUuid") or "", uuid)
        self._roots[uuid] = root
        return self._stream(line, INLINE, root)

    def _stream(self, line: dict[str, Any], source: int, agent: str | None) -> Stream:
        key = (source, agent)
        stream = self.streams.get(key)
        if stream is None:
            file = self._source
            told = file.session or string(line["sessionId"])
            session, name = self._name("session", told), self._name("agent", told, agent or "")
            flow = flow_of(maybe_string(line.get("entrypoint")))
            stream = Stream(str(file.path), file.project, session, name, role_of(agent), source, flow=flow)
            self._told = told
            self.streams[key] = stream
        return stream

    def _message(self, stream: Stream, kind: str, line: dict[str, Any], outer: dict[str, Any]) -> None:
        at_ns = time_ns(line["timestamp"])
        uuid = line.get("uuid")
        if uuid is not None:
            if uuid in self._seen:
                if kind == "assistant":  # history that a client wrote once more
                    self.repeated.add(string(line["message"]["id"]))
                return
            self._seen.add(uuid)
        if not stream.last_ns:
            stream.copied = self._queued_ns > at_ns
        if kind == "assistant":
            self._answer(stream, line, outer, at_ns)
        elif not line.get("isVisibleInTranscriptOnly") or line.get("isCompactSummary"):
            content = line["message"]["content"]
            blocks = [content] if isinstance(content, str) else content
            inputs = [self._input(block, line, at_ns) for block in blocks]
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
        told_type = maybe_string(outer.get("attributionAgent"))
        stream.agent_type = stream.agent_type or self._identity.agent_type(told_type)
        self._account(step, message)
        for block in message["content"]:
            self._answer_block(step, block, at_ns)

    def _step(
        self, stream: Stream, message: dict[str, Any], line: dict[str, Any], outer: dict[str, Any], at_ns: int
    ) -> Step:
        """The step of a message; its lines need not stand together."""
        key = self._name("call", string(message.get("id") or line.get("requestId") or line["uuid"]))
        known = self._steps.get((stream.source, stream.agent, key))
        if known is not None:
            return known
        before = max((given.at_ns for given in stream.inputs), default=stream.last_ns)
        step = Step(
            id=key,
            model=self._identity.model(string(message["model"])),
            version=str(outer.get("version")),
            start_ns=min(before, at_ns) or at_ns,
            end_ns=at_ns,
            inputs=stream.inputs,
            reset=stream.reset,
            cleared=stream.cleared,
            retries=stream.retries,
        )
        stream.inputs, stream.reset, stream.cleared, stream.retries = [], None, (), 0
        stream.steps.append(step)
        self._steps[stream.source, stream.agent, key] = step
        return step

    def _account(self, step: Step, message: dict[str, Any]) -> None:
        """Take the largest account of the message's lines; the output count is final only beside a stop reason."""
        told = message.get("usage")
        if told and (step.usage is None or told != self._usage_seen):
            account = usage(told)
            step.usage = account if step.usage is None or account.prompt > step.usage.prompt else step.usage
            self._usage_seen = told
        if message.get("stop_reason"):
            told_stop = string(message["stop_reason"])
            step.stop_reason = told_stop if told_stop in STOP_REASONS else "other"
            if told and told.get("output_tokens") is not None:
                step.output = tokens(told["output_tokens"])
        reason = ((message.get("diagnostics") or {}).get("cache_miss_reason") or {}).get("type")
        if reason:
            step.miss_reason = reason if reason in MISS_REASONS else "other"

    def _answer_block(self, step: Step, block: dict[str, Any], at_ns: int) -> None:
        content = content_bytes(block)
        step.answer.append(self._hash(content))
        kind = block["type"]
        if kind == "text":
            step.weight += len(block["text"]) * CHARACTER_TOKENS["answer"]
        elif kind == "tool_use":
            step.weight += len(content) * CHARACTER_TOKENS["answer"] + PIECE_TOKENS["tool_use"]
            asked, agent_type, prompt = block["input"], None, None
            if block["name"] in SPAWN_TOOLS:
                agent_type = maybe_string(asked.get("subagent_type"))
                prompt = self._hash(content_bytes(asked["prompt"])) if isinstance(asked.get("prompt"), str) else None
            use, name = self._name("use", string(block["id"])), self._identity.tool(string(block["name"]))
            step.tools.append(Asked(use, name, at_ns, self._identity.agent_type(agent_type), prompt))

    def _input(self, block: dict[str, Any] | str, line: dict[str, Any], at_ns: int) -> Input:
        hash_ = self._hash(content_bytes(block))
        if isinstance(block, str) or block["type"] == "text":
            text = block if isinstance(block, str) else block["text"]
            if (line.get("origin") or {}).get("kind") == "task-notification":
                return self._news(text, hash_, at_ns)
            human = not line.get("isMeta") and not line.get("isCompactSummary")
            return Input("user", hash_, len(text) * CHARACTER_TOKENS["user"], at_ns, human)
        if block["type"] != "tool_result":
            return Input("user", hash_, PIECE_TOKENS["image"], at_ns, human=True)
        told = line.get("toolUseResult")
        told = told if isinstance(told, dict) else {}
        resumed = maybe_string(told.get("resumedAgentId"))
        agent = resumed or maybe_string(told.get("agentId") or (told.get("task") or {}).get("task_id"))
        return Input(
            "tool_result",
            hash_,
            _result_weight(block.get("content") or "") + PIECE_TOKENS["tool_result"],
            at_ns,
            tool_use=self._name("use", string(block["tool_use_id"])),
            is_error=maybe_bool(block.get("is_error")),
            agent=self._agent_name(agent),
            launched=told.get("status") == "async_launched",
            resumed=resumed is not None,
        )

    def _news(self, text: str, hash_: int, at_ns: int) -> Input:
        found = TASK_ID.search(text)
        agent = self._agent_name(found[1] if found else None)
        return Input("user", hash_, len(text) * CHARACTER_TOKENS["user"], at_ns, agent=agent)

    def _agent_name(self, agent: str | None) -> str | None:
        return self._name("agent", self._told, agent) if agent else None

    def _attachment(self, line: dict[str, Any]) -> None:
        """News of an agent that came while a tool ran; it stands after the tool's result but is dated before it."""
        told = line["attachment"]
        if told["type"] == "queued_command" and told.get("commandMode") == "task-notification":
            text = string(told["prompt"])
            given = self._news(text, self._hash(content_bytes(text)), time_ns(line["timestamp"]))
            self._own_stream(line).inputs.append(given)

    def _system(self, stream: Stream, line: dict[str, Any]) -> None:
        kind = line.get("subtype")
        if kind == "compact_boundary":
            stream.inputs, stream.reset = [], "compaction"
        elif kind == "microcompact_boundary":
            told = line.get("microcompactMetadata") or {}
            stream.reset = stream.reset or "microcompaction"
            stream.cleared += tuple(self._name("use", string(use)) for use in told.get("compactedToolIds") or ())
        elif kind == "api_error":
            stream.retries += 1
            stream.last_ns = max(stream.last_ns, time_ns(line["timestamp"]))
        elif kind in ("turn_duration", "stop_hook_summary") and stream.steps and not stream.inputs:
            stream.ended = True


def _result_weight(content: str | list[dict[str, Any]]) -> float:
    each = CHARACTER_TOKENS["tool_result"]
    if isinstance(content, str):
        return len(content) * each
    return sum(len(part["text"]) * each if part.get("type") == "text" else PIECE_TOKENS["image"] for part in content)


def string(value: Any) -> str:
    """A text that must be there."""
    if type(value) is not str:
        raise TypeError(f"expected a string, found {type(value).__name__}")
    return value


def maybe_string(value: Any) -> str | None:
    """A text that may be absent."""
    return None if value is None else string(value)


def maybe_bool(value: Any) -> bool | None:
    """A yes or no that may be absent."""
    if value is not None and type(value) is not bool:
        raise TypeError(f"expected true or false, found {type(value).__name__}")
    return value


def tokens(value: Any) -> int:
    """A token count; absent is none."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < MOST_TOKENS:
        raise ValueError(f"expected a token count, found {value!r:.40}")
    return value


def time_ns(stamp: Any) -> int:
    """An ISO time as ns since 1970."""
    ns = round(datetime.fromisoformat(stamp).timestamp() * 1000) * 1_000_000
    if not 0 <= ns < LAST_NS:
        raise ValueError(f"expected a time after 1970, found {stamp!r:.40}")
    return ns


def usage(told: dict[str, Any]) -> Usage:
    """The account that a message's ``usage`` gives."""
    written = tokens(told.get("cache_creation_input_tokens"))
    by_ttl = told.get("cache_creation") or {}
    five, hour = (tokens(by_ttl.get(f"ephemeral_{ttl}_input_tokens")) for ttl in ("5m", "1h"))
    read = told.get("cache_read_input_tokens")
    read_told, write_told = read is not None, told.get("cache_creation_input_tokens") is not None
    other = max(written - five - hour, 0)
    return Usage(tokens(told["input_tokens"]), tokens(read), five, hour, other, read_told, write_told)
