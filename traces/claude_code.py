"""Import of Claude Code's own transcripts: a folder laid out as ~/.claude/projects, one project of it, or one file.

Two passes. The first reads every file once and folds it into streams of steps, which wait in a temporary file without
any text; it learns which messages stand in several files, and how large each group's shared lead is. The second builds
the sessions in order of their start and writes them. Memory holds one file, one session, and some bytes a message.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from keepwarm.traces.claude_lines import FileFold, Step, Stream
from keepwarm.traces.claude_sessions import LeadKey, SessionBuilder, lead_key
from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import Identity
from keepwarm.traces.store import TraceWriter

SessionKey = tuple[str, str]


class Source(NamedTuple):
    """A transcript file and what its place says: project, session and agent; the last two None if the lines say."""

    path: Path
    project: str
    session: str | None
    agent: str | None


class Imported(NamedTuple):
    """What an import did. ``damaged`` lists (file, line number); token counts are of prompts as they were put together:
    ``new_tokens`` in all, ``hidden`` that no visible block explains, ``scaled`` that visible blocks had too many.
    """

    files: int
    lines: int
    sessions: int
    calls: int
    damaged: list[tuple[str, int]]
    duplicates: int
    negative_waits: int
    recorded_breaks: int
    new_tokens: int
    hidden: int
    scaled: int
    digest: str


def sources(path: Path) -> list[Source]:
    """The transcripts at a path, in a fixed order; InputError where there is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_file():
        beside = path.with_suffix("")
        files = [path, *(sorted(beside.rglob("agent-*.jsonl")) if beside.is_dir() else ())]
    else:
        files = sorted(path.rglob("*.jsonl"))
    if not files:
        raise InputError(f"{path}: holds no .jsonl transcript")
    return [_source(file.absolute()) for file in files]


def _source(path: Path) -> Source:
    agent = path.stem.removeprefix("agent-") if path.stem.startswith("agent-") else None
    parts = path.parts
    if "subagents" in parts:
        at = len(parts) - 1 - parts[::-1].index("subagents")
        return Source(path, parts[at - 2], parts[at - 1], agent)
    return Source(path, path.parent.name, None if agent else path.stem, agent)


class _Spool:
    """Streams on disk between the two passes, and where each session's lie."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at: dict[SessionKey, list[int]] = {}
        self._merged: dict[SessionKey, SessionKey] = {}
        self.starts: dict[SessionKey, int] = {}

    def add(self, key: SessionKey, streams: list[Stream]) -> None:
        self._at.setdefault(key, []).append(self._file.seek(0, 2))
        pickle.dump(streams, self._file, protocol=pickle.HIGHEST_PROTOCOL)
        first = min((s.steps[0].start_ns for s in streams if s.steps), default=None)
        if first is not None:
            self.starts[key] = min(first, self.starts.get(key, first))

    def root(self, key: SessionKey) -> SessionKey:
        while key in self._merged:
            key = self._merged[key]
        return key

    def merge(self, one: SessionKey, other: SessionKey) -> None:
        """Two sessions are one: the one copied the other's history."""
        one, other = self.root(one), self.root(other)
        if one != other:
            self._merged[max(one, other)] = min(one, other)

    def sessions(self) -> list[tuple[int, SessionKey, list[int]]]:
        """(first start, key, offsets) of every session with a step, in order of start."""
        starts: dict[SessionKey, int] = {}
        offsets: dict[SessionKey, list[int]] = {}
        for key, at in self._at.items():
            root = self.root(key)
            offsets.setdefault(root, []).extend(at)
            if key in self.starts:
                starts[root] = min(self.starts[key], starts.get(root, self.starts[key]))
        return sorted((start, key, offsets[key]) for key, start in starts.items())

    def load(self, offsets: list[int]) -> list[Stream]:
        streams: list[Stream] = []
        for offset in offsets:
            self._file.seek(offset)
            streams.extend(pickle.load(self._file))
        return streams


class _Tellers:
    """Which stream tells a message that several hold: not a sidechain before one, an own file before progress lines
    before inline ones, then the session that ended first."""

    def __init__(self, spool: _Spool) -> None:
        self._spool = spool
        self._best: dict[str, tuple[tuple[bool, int, int], SessionKey, str | None, int]] = {}
        self.duplicates = 0

    def hear(self, key: SessionKey, stream: Stream) -> None:
        for step in stream.steps:
            rank = (step.sidechain and stream.agent is None, stream.source, stream.last_ns)
            mine = (rank, key, stream.agent, stream.source)
            held = self._best.get(step.id)
            if held is not None:
                self.duplicates += 1
                if held[1] != key:
                    self._spool.merge(held[1], key)
            if held is None or rank < held[0]:
                self._best[step.id] = mine

    def tells(self, stream: Stream, step: Step) -> bool:
        _, key, agent, source = self._best[step.id]
        return (key[1], agent, source) == (stream.session, stream.agent, stream.source)


class _Leads:
    """What first calls read, by whom they share a lead with."""

    def __init__(self) -> None:
        self._reads: list[tuple[LeadKey, int, str]] = []

    def hear(self, project: str, stream: Stream) -> None:
        first = stream.steps[0] if stream.steps else None
        if first is not None and first.usage is not None and first.usage.cache_read:
            self._reads.append((lead_key(project, stream, first), first.usage.cache_read, first.id))

    def modes(self) -> dict[LeadKey, int]:
        """Each group's most common read; of equally common ones the smallest. A message is heard once."""
        counts: dict[LeadKey, Counter[int]] = {}
        heard: set[str] = set()
        for key, read, message in self._reads:
            if message not in heard:
                heard.add(message)
                counts.setdefault(key, Counter())[read] += 1
        return {key: max(sorted(reads), key=reads.__getitem__) for key, reads in counts.items()}


def import_claude_code(
    path: Path,
    out: str,
    *,
    version: str,
    salt: bytes,
    informed: bool = False,
    flow: str | None = None,
    strict: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Imported:
    """Write a trace of the transcripts at ``path``. With ``strict`` the first damaged line is an InputError.

    ``progress`` is told (files read, files in all).
    """
    files = sources(path)
    identity = Identity(salt)
    with TemporaryFile() as file:
        spool = _Spool(file)
        tellers, leads = _Tellers(spool), _Leads()
        damaged: list[tuple[str, int]] = []
        lines = 0
        for done, source in enumerate(files):
            progress(done, len(files))
            fold = _read(source, identity)
            lines += fold.lines
            name = _shown(source.path, path)
            if strict and fold.damaged:
                raise InputError(
                    f"{name}: line {fold.damaged[0]} is damaged, expected one JSON object of a known shape"
                )
            damaged += [(name, number) for number in fold.damaged]
            _keep(source, fold, spool, tellers, leads)
        progress(len(files), len(files))
        notes: dict[str, Any] = {"prefix_breaks": "recorded" if informed else "blind"}
        with TraceWriter(out, producer="claude-code", version=version, tokens="reported", notes=notes) as writer:
            totals = _write(writer, spool, tellers, identity, leads.modes(), informed, flow)
            notes |= {"recorded_breaks": totals["recorded_breaks"], "negative_waits": totals["negative_waits"]}
    counts = {"files": len(files), "lines": lines, "calls": writer.calls, "duplicates": tellers.duplicates}
    return Imported(damaged=damaged, digest=writer.digest, **counts, **totals)


def _read(source: Source, identity: Identity) -> FileFold:
    fold = FileFold(identity, source.session, source.agent)
    try:
        with source.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                fold.line(number, line)
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read: {error.strerror}") from error
    return fold


def _keep(source: Source, fold: FileFold, spool: _Spool, tellers: _Tellers, leads: _Leads) -> None:
    by_session: dict[SessionKey, list[Stream]] = {}
    for stream in fold.streams.values():
        by_session.setdefault((source.project, stream.session), []).append(stream)
    for key, streams in by_session.items():
        for stream in streams:
            tellers.hear(key, stream)
            leads.hear(source.project, stream)
        spool.add(key, streams)


def _write(
    writer: TraceWriter,
    spool: _Spool,
    tellers: _Tellers,
    identity: Identity,
    leads: Mapping[LeadKey, int],
    informed: bool,
    flow: str | None,
) -> dict[str, int]:
    totals = dict.fromkeys(("sessions", "negative_waits", "recorded_breaks", "new_tokens", "hidden", "scaled"), 0)
    sessions = spool.sessions()
    for start, (project, _), offsets in sessions:
        builder = SessionBuilder(identity, project, owns=tellers.tells, leads=leads, informed=informed, flow=flow)
        built = builder.build(spool.load(offsets))
        for call in built.calls:
            writer.add(call._replace(session_start_ns=start - sessions[0][0]))
        totals["sessions"] += bool(built.calls)
        for name in totals.keys() - {"sessions"}:
            totals[name] += getattr(built, name)
    return totals


def _shown(path: Path, root: Path) -> str:
    """A file as a user knows it: relative to what was asked for."""
    try:
        return str(path.relative_to(root.absolute()))
    except ValueError:
        return path.name


def default_path() -> Path:
    """Where Claude Code keeps the user's own transcripts."""
    places = [Path.home() / ".claude" / "projects", Path.home() / ".config" / "claude" / "projects"]
    return next((place for place in places if place.is_dir()), places[0])
