"""The files of a folder of Claude Code transcripts, each folded on its own.

What comes out of a file is small and holds no text: its streams as bytes to be put aside, and what must be known of all
files before the first session can be built. This module imports nothing heavy: worker processes start with it.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import orjson

from keepwarm.traces.claude_lines import FileFold, Source, maybe_string
from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import Identity
from keepwarm.traces.steps import Stream

HEAD_BYTES = 1 << 16
"""Within this the lines of a file name their session."""
StreamKey = tuple[str, int, str]
"""Which stream: the file it stands in, how it stands there, and the agent."""

LeadKey = tuple[str, str, str, str]
"""Project, client version, model, role: those whose system prompt and tools are the same."""


class Heard(NamedTuple):
    """A stream as bytes, and what must be known of it before it is built: its session and its first step's start, its
    messages, its rank among those that tell the same ones, and of whose lead its first call read how much from cache.
    """

    stream: StreamKey
    session: str
    first_ns: int | None
    messages: tuple[str, ...]
    rank: tuple[int, bool, int]
    lead: tuple[LeadKey, int] | None
    pickled: bytes


class FoldedFile(NamedTuple):
    """What one file came to."""

    lines: int
    damaged: list[int]
    repeated: int
    streams: list[Heard]


def sources(path: Path) -> list[Source]:
    """The transcripts at a path, in a fixed order; InputError where there is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_file():
        beside = path.with_suffix("")
        files = [path, *(sorted(beside.rglob("agent-*.jsonl")) if beside.is_dir() else ()), *_flat_agents(path)]
    else:
        files = sorted(path.rglob("*.jsonl"))
    if not files:
        raise InputError(f"{path}: holds no .jsonl transcript")
    return [_source(file.absolute()) for file in files]


def _flat_agents(path: Path) -> list[Path]:
    """The sub-agents' files that older clients put beside a session's."""
    named = f'"sessionId":"{path.stem}"'.encode()
    beside = [file for file in sorted(path.parent.glob("agent-*.jsonl")) if file != path]
    return [file for file in beside if named in _head(file).replace(b'": "', b'":"')]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _source(path: Path) -> Source:
    agent = path.stem.removeprefix("agent-") if path.stem.startswith("agent-") else None
    parts = path.parts
    if "subagents" in parts:
        at = len(parts) - 1 - parts[::-1].index("subagents")
        return Source(path, parts[at - 2], parts[at - 1], agent)
    return Source(path, path.parent.name, None if agent else path.stem, agent)


def fold_file(salt: bytes, source: Source) -> FoldedFile:
    """Read and fold one file."""
    identity = Identity(salt)
    fold = FileFold(identity, source)
    with source.path.open("rb") as file:
        fold.take(file)
    if source.agent is not None:
        _add_meta(source, fold, identity)
    streams = [_heard(stream) for stream in fold.streams.values()]
    return FoldedFile(fold.lines, fold.damaged, len(fold.repeated), streams)


def _add_meta(source: Source, fold: FileFold, identity: Identity) -> None:
    """What the small file beside a sub-agent's transcript says for certain: what started it, and its type."""
    try:
        told = orjson.loads(source.path.with_suffix(".meta.json").read_bytes())
        tool_use, agent_type = maybe_string(told.get("toolUseId")), maybe_string(told.get("agentType"))
    except (OSError, ValueError, AttributeError, TypeError):
        return
    for stream in fold.streams.values():
        stream.spawn_tool = identity.name("use", tool_use) if tool_use else stream.spawn_tool
        stream.agent_type = identity.agent_type(agent_type) or stream.agent_type


def stream_key(stream: Stream) -> StreamKey:
    """What tells a stream from all others."""
    return stream.place, stream.source, stream.agent


def _heard(stream: Stream) -> Heard:
    """Of streams that hold the same message one tells it: the main agent's before a sub-agent's, an own file before
    progress lines before inline ones, one not known to be a copy, then the one that ended first.
    """
    rank = 0 if stream.role == "main" else 1 + stream.source, stream.copied, stream.last_ns
    messages = tuple(step.id for step in stream.steps)
    first = stream.steps[0] if stream.steps else None
    lead = None
    if first is not None and first.usage is not None and first.usage.cache_read:
        lead = (stream.project, first.version, first.model, stream.role), first.usage.cache_read
    first_ns = first.start_ns if first is not None else None
    pickled = pickle.dumps(stream, protocol=pickle.HIGHEST_PROTOCOL)
    return Heard(stream_key(stream), stream.session, first_ns, messages, rank, lead, pickled)
