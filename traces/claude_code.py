"""Import of Claude Code's own transcripts: a folder laid out as ~/.claude/projects, one project of it, or one file.

Two passes. The first reads every file once and folds it into streams of steps, which wait in a temporary file without
any text; it learns which messages stand in several files, and how large each group's shared lead is. The second builds
the sessions in order of their start and writes them. Memory holds one file, one session, and some bytes a message.
"""

from __future__ import annotations

import gc
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from keepwarm.traces.claude_files import Folded, FoldedFile, Heard, LeadKey, fold_files, sources
from keepwarm.traces.claude_sessions import SessionBuilder
from keepwarm.traces.claude_steps import Step, Stream
from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import Identity
from keepwarm.traces.store import TraceWriter

SessionKey = tuple[str, str]
"""Project and session id."""

TOTALS = ("negative_waits", "recorded_breaks", "new_tokens", "hidden", "scaled")


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


class _Spool:
    """Streams on disk between the two passes, and where each session's lie."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at: dict[SessionKey, list[int]] = {}
        self._starts: dict[SessionKey, int] = {}
        self._merged: dict[SessionKey, SessionKey] = {}

    def add(self, key: SessionKey, folded: Folded) -> None:
        self._at.setdefault(key, []).append(self._file.tell())
        self._file.write(folded.streams)
        if folded.first_ns is not None:
            self._starts[key] = min(folded.first_ns, self._starts.get(key, folded.first_ns))

    def _root(self, key: SessionKey) -> SessionKey:
        while key in self._merged:
            key = self._merged[key]
        return key

    def merge(self, one: SessionKey, other: SessionKey) -> None:
        """Two sessions are one: the one copied the other's history."""
        one, other = self._root(one), self._root(other)
        if one != other:
            self._merged[max(one, other)] = min(one, other)

    def sessions(self, name: Callable[[SessionKey], str]) -> list[tuple[int, str, SessionKey, list[int]]]:
        """(first start, pseudonym, key, offsets) of every session with a step, in trace order."""
        starts: dict[SessionKey, int] = {}
        offsets: dict[SessionKey, list[int]] = {}
        for key, at in self._at.items():
            root = self._root(key)
            offsets.setdefault(root, []).extend(at)
            if key in self._starts:
                starts[root] = min(self._starts[key], starts.get(root, self._starts[key]))
        return sorted((start, name(key), key, offsets[key]) for key, start in starts.items())

    def load(self, offsets: list[int]) -> list[Stream]:
        streams: list[Stream] = []
        for offset in offsets:
            self._file.seek(offset)
            streams.extend(pickle.load(self._file))
        return streams


class _Tellers:
    """Which stream tells a message that several hold: the main agent's before a sub-agent's, an own file before
    progress lines before inline ones, one not known to be a copy, then the one that ended first.
    """

    def __init__(self, merge: Callable[[SessionKey, SessionKey], None]) -> None:
        self._merge = merge
        self._ranks: list[tuple[int, bool, int]] = []
        self._keys: list[SessionKey] = []
        self._numbers: dict[tuple[str, str, str | None, int], int] = {}
        self._best: dict[str, int] = {}
        self.duplicates = 0

    def hear(self, key: SessionKey, heard: Heard) -> None:
        number = len(self._ranks)
        self._numbers[*key, heard.agent, heard.source] = number
        self._ranks.append((0 if heard.agent is None else 1 + heard.source, heard.copied, heard.last_ns))
        self._keys.append(key)
        for message in heard.messages:
            held = self._best.setdefault(message, number)
            if held != number:
                self.duplicates += 1
                if self._keys[held] != key:
                    self._merge(self._keys[held], key)
                if self._ranks[number] < self._ranks[held]:
                    self._best[message] = number

    def tells(self, stream: Stream, step: Step) -> bool:
        return self._best[step.id] == self._numbers[stream.project, stream.session, stream.agent, stream.source]


class _Leads:
    """What first calls read, by whom they share a lead with."""

    def __init__(self) -> None:
        self._reads: dict[str, tuple[LeadKey, int]] = {}

    def hear(self, heard: Heard) -> None:
        if heard.lead is not None:
            self._reads.setdefault(heard.messages[0], (heard.lead, heard.first_read))

    def modes(self) -> dict[LeadKey, int]:
        """Each group's most common read; of equally common ones the smallest."""
        counts: dict[LeadKey, Counter[int]] = {}
        for key, read in self._reads.values():
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
    processes: int = 1,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Imported:
    """Write a trace of the transcripts at ``path``. With ``strict`` the first damaged line is an InputError.

    With ``processes`` above 1 a large folder is read in worker processes, which import the caller's main module.
    ``progress`` is told (files read, files in all).
    """
    files = sources(path)
    identity = Identity(salt)
    with TemporaryFile() as file, _no_collector():
        spool = _Spool(file)
        tellers, leads = _Tellers(spool.merge), _Leads()
        damaged: list[tuple[str, int]] = []
        lines = 0
        for done, (source, folded) in enumerate(zip(files, fold_files(files, salt, processes), strict=True), 1):
            lines += folded.lines
            tellers.duplicates += folded.repeated
            damaged += _damaged(_shown(source.path, path), folded, strict)
            for part in folded.sessions:
                spool.add((source.project, part.session), part)
                for heard in part.heard:
                    tellers.hear((source.project, part.session), heard)
                    leads.hear(heard)
            progress(done, len(files))
        notes: dict[str, Any] = {"prefix_breaks": "recorded" if informed else "blind"}
        with TraceWriter(out, producer="claude-code", version=version, tokens="reported", notes=notes) as writer:
            totals = _write(writer, spool, tellers, identity, leads.modes(), informed, flow)
            notes |= {"recorded_breaks": totals["recorded_breaks"], "negative_waits": totals["negative_waits"]}
    counts = {"files": len(files), "lines": lines, "calls": writer.calls, "duplicates": tellers.duplicates}
    return Imported(damaged=damaged, digest=writer.digest, **counts, **totals)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without Python's cyclic garbage collector: an import makes millions of objects and no cycles, and the collector
    would look through them again and again.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _damaged(name: str, folded: FoldedFile, strict: bool) -> list[tuple[str, int]]:
    if strict and folded.damaged:
        raise InputError(f"{name}: line {folded.damaged[0]} is damaged, expected one JSON object of a known shape")
    return [(name, number) for number in folded.damaged]


def _write(
    writer: TraceWriter,
    spool: _Spool,
    tellers: _Tellers,
    identity: Identity,
    leads: Mapping[LeadKey, int],
    informed: bool,
    flow: str | None,
) -> dict[str, int]:
    totals = dict.fromkeys(("sessions", *TOTALS), 0)
    sessions = spool.sessions(lambda key: identity.name("session", *key))
    for start, name, key, offsets in sessions:
        builder = SessionBuilder(identity, name, key, owns=tellers.tells, leads=leads, informed=informed, flow=flow)
        built = builder.build(spool.load(offsets), start - sessions[0][0])
        for call in built.calls:
            writer.add(call)
        totals["sessions"] += bool(built.calls)
        for total in TOTALS:
            totals[total] += getattr(built, total)
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
