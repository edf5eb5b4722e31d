"""Transcripts written as Claude Code writes them: one line a content block, each with the message's id and usage.

Times are seconds after the first of January 2026; every line of a transcript names the line before it as its parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

from keepwarm.traces.claude_code import Imported, import_claude_code
from keepwarm.traces.model import Call
from keepwarm.traces.store import read_calls

START = datetime(2026, 1, 1, tzinfo=UTC)

Line = dict[str, Any]


def stamp(at: float) -> str:
    """A time as transcripts have it: UTC, milliseconds."""
    return (START + timedelta(seconds=at)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def usage(*, new: int = 3, read: int = 0, w5: int = 0, w1: int = 0, out: int = 2) -> Line:
    """An account of uncached, read, written for 5 minutes, written for an hour, and output tokens."""
    return {
        "input_tokens": new,
        "cache_creation_input_tokens": w5 + w1,
        "cache_read_input_tokens": read,
        "cache_creation": {"ephemeral_5m_input_tokens": w5, "ephemeral_1h_input_tokens": w1},
        "output_tokens": out,
        "service_tier": "standard",
    }


def text(content: str) -> Line:
    """A text block."""
    return {"type": "text", "text": content}


def tool(use: str, name: str = "Bash", **given: Any) -> Line:
    """A tool use with the id ``use``."""
    return {"type": "tool_use", "id": use, "name": name, "input": given}


def task(use: str, prompt: str, kind: str = "Explore") -> Line:
    """The tool use that starts a sub-agent."""
    return tool(use, "Task", description="look", prompt=prompt, subagent_type=kind)


class Transcript:
    """The lines of one file: objects, or bytes as they are. ``agent`` makes them a sub-agent's, with its id."""

    def __init__(self, session: str = "s1", *, agent: str | None = None, **envelope: Any) -> None:
        self.lines: list[Any] = []
        self._session = session
        self._last: str | None = None
        self._envelope = {
            "isSidechain": agent is not None,
            "userType": "external",
            "cwd": "/home/someone/work",
            "sessionId": session,
            "version": "2.1.38",
            "gitBranch": "main",
            **({"agentId": agent} if agent else {}),
            **envelope,
        }

    def add(self, kind: str, at: float, **fields: Any) -> str:
        """A line of any type in the common envelope; its uuid. A field of value ... is left out."""
        uuid = f"{self._session}-{self._envelope.get('agentId', '')}-{len(self.lines)}"
        line = {
            "parentUuid": self._last,
            **self._envelope,
            "type": kind,
            "uuid": uuid,
            "timestamp": stamp(at),
            **fields,
        }
        kept = {key: value for key, value in line.items() if value is not ...}
        self.lines.append(orjson.loads(orjson.dumps(kept)))
        self._last = line["uuid"] if isinstance(line["uuid"], str) else uuid
        return self._last

    def user(self, at: float, content: str | list[Any] = "x" * 100, **fields: Any) -> str:
        """What a user typed, or the client put there in the user's name."""
        return self.add("user", at, message={"role": "user", "content": content}, **fields)

    def answer(
        self,
        at: float,
        name: str,
        *blocks: Line,
        used: Line,
        stop: str | None = None,
        model: str = "claude-opus-4-6",
        message: Line | None = None,
        **fields: Any,
    ) -> None:
        """An API message: one line a block (a text of 100 characters if none is given), all at the same time.

        The last line has the stop reason and the final output; the others have 1 as a placeholder.
        """
        for number, block in enumerate(blocks or (text("y" * 100),), 1):
            last = stop is not None and number == max(len(blocks), 1)
            told = {
                "model": model,
                "id": name,
                "type": "message",
                "role": "assistant",
                "content": [block],
                "stop_reason": stop if last else None,
                "stop_sequence": None,
                "usage": used if last or stop is None else used | {"output_tokens": 1},
                **(message or {}),
            }
            told = {key: value for key, value in told.items() if value is not ...}
            self.add("assistant", at, message=told, **{"requestId": f"req_{name}", **fields})

    def result(
        self, at: float, use: str, content: Any = "r" * 1000, *, is_error: bool | None = None, **fields: Any
    ) -> str:
        """A tool's result, by itself on a line."""
        block = {"tool_use_id": use, "type": "tool_result", "content": content}
        if is_error is not None:
            block["is_error"] = is_error
        return self.add("user", at, message={"role": "user", "content": [block]}, **fields)

    def finished(self, at: float, use: str, agent: str, **told: Any) -> str:
        """The result of the tool use that started a sub-agent, once that has finished."""
        about = {"status": "completed", "agentId": agent, "totalTokens": 9, "content": [text("done")], **told}
        return self.result(at, use, [text("d" * 1000)], toolUseResult=about)

    def relay(self, other: Transcript, agent: str, use: str) -> None:
        """A sub-agent's lines as progress lines, as versions 2.1.12 to 2.1.81 have them."""
        for line in other.lines:
            kept = ("type", "timestamp", "uuid", "requestId", "message")
            inner = {key: line[key] for key in kept if key in line}
            data = {
                "type": "agent_progress",
                "agentId": agent,
                "prompt": "",
                "message": inner,
                "normalizedMessages": [],
            }
            self.add("progress", 0, timestamp=line["timestamp"], data=data, parentToolUseID=use, toolUseID=f"m_{use}")

    def system(self, at: float, subtype: str, **fields: Any) -> str:
        """A line of the client's own."""
        return self.add("system", at, subtype=subtype, content="", isMeta=False, level="info", **fields)

    def compact(self, at: float, summary: str = "z" * 1000) -> None:
        """A compaction: the boundary starts a chain of its own, the summary stands in the user's name."""
        before = self._last
        told = {"trigger": "auto", "preTokens": 155_000}
        self.system(at, "compact_boundary", parentUuid=None, logicalParentUuid=before, compactMetadata=told)
        self.user(at, summary, isCompactSummary=True, isVisibleInTranscriptOnly=True)

    def api_error(self, at: float, attempt: int = 1) -> None:
        """An attempt that the provider refused and the client will repeat."""
        error = {"status": 529, "headers": {"request-id": "req_x"}, "error": {"type": "error"}}
        self.system(at, "api_error", error=error, retryInMs=500.0, retryAttempt=attempt, maxRetries=10)

    def chainless(self, kind: str, **fields: Any) -> None:
        """A line without uuid, parent or session, such as a summary or a file-history-snapshot."""
        self.lines.append({"type": kind, **fields})

    def write(self, path: Path) -> None:
        """Put the lines into a file; a line given as bytes stands there as it is, also without a line end."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(x if isinstance(x, bytes) else orjson.dumps(x) + b"\n" for x in self.lines))


SALT = bytes(range(32))


def take(place: Path, files: Mapping[str, Transcript], **options: Any) -> tuple[Imported, list[Call]]:
    """Write transcripts under a folder of projects, import that folder, and read the trace back."""
    for name, transcript in files.items():
        transcript.write(place / "projects" / name)
    trace = str(place / "trace.parquet")
    done = import_claude_code(place / "projects", trace, **{"version": "0", "salt": SALT, **options})
    return done, list(read_calls(trace))


def calls_of(place: Path, files: Mapping[str, Transcript], **options: Any) -> list[Call]:
    """The calls of ``take``, in the trace's order."""
    return take(place, files, **options)[1]


def ns(seconds: float) -> int:
    """Nanoseconds."""
    return round(seconds * 1000) * 1_000_000


def pieces(call: Call) -> list[tuple[str, int]]:
    """What a call's prompt appends: kind and tokens of each segment."""
    return [(segment.kind, segment.tokens) for segment in call.append]
