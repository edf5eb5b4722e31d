"""Import of Claude Code's own transcripts: a folder laid out as ~/.claude/projects, one project of it, or one file.

Two passes. The first reads every file once and folds it into streams of steps, which wait in a temporary file without
any text; it learns which messages stand in several files, and how large each group's shared lead is. The second builds
the sessions in order of their start and writes them. Memory holds one file, one session, and some bytes a message.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from keepwarm.traces.claude_build import Common, Waiting, build_sessions
from keepwarm.traces.claude_files import (
    Folded,
    FoldedFile,
    Heard,
    LeadKey,
    Source,
    StreamKey,
    fold_file,
    sizes,
    sources,
)
from keepwarm.traces.errors import InputError
from keepwarm.traces.pool import ordered_map
from keepwarm.traces.sessions import Totals
from keepwarm.traces.store import TraceWriter

PARALLEL_BYTES = 64 << 20
"""Below this, starting processes costs more than they save."""
LOT_BYTES = 1 << 20
"""How much of the streams' bytes one task of the second pass has, about."""


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
        self._at: dict[str, list[tuple[int, int]]] = {}
        self._starts: dict[str, int] = {}
        self._merged: dict[str, str] = {}

    def add(self, key: str, folded: Folded) -> None:
        self._at.setdefault(key, []).append((self._file.tell(), len(folded.streams)))
        self._file.write(folded.streams)
        if folded.first_ns is not None:
            self._starts[key] = min(folded.first_ns, self._starts.get(key, folded.first_ns))

    def _root(self, key: str) -> str:
        while key in self._merged:
            key = self._merged[key]
        return key

    def merge(self, origin: str, copy: str) -> None:
        """Two sessions are one: the one copied the other's history, and goes by its name."""
        origin, copy = self._root(origin), self._root(copy)
        if origin != copy:
            self._merged[copy] = origin

    def sessions(self) -> Iterator[Waiting]:
        """Every session with a step, in trace order."""
        starts: dict[str, int] = {}
        places: dict[str, list[tuple[int, int]]] = {}
        for key, at in self._at.items():
            root = self._root(key)
            places.setdefault(root, []).extend(at)
            if key in self._starts:
                starts[root] = min(self._starts[key], starts.get(root, self._starts[key]))
        order = sorted((start, session) for session, start in starts.items())
        for start, session in order:
            yield Waiting(session, start - order[0][0], [self._read(*place) for place in places[session]])

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


class _Tellers:
    """Which stream tells a message that several hold: the main agent's before a sub-agent's, an own file before
    progress lines before inline ones, one not known to be a copy, then the one that ended first.
    """

    def __init__(self, merge: Callable[[str, str], None]) -> None:
        self._merge = merge
        self._streams: list[tuple[tuple[int, bool, int], str, StreamKey]] = []
        self._best: dict[str, int] = {}
        self._contested: set[str] = set()
        self.duplicates = 0

    def hear(self, key: str, heard: Heard) -> None:
        _, source, _ = heard.stream
        number, rank = len(self._streams), (0 if heard.main else 1 + source, heard.copied, heard.last_ns)
        self._streams.append((rank, key, heard.stream))
        for message in heard.messages:
            held = self._best.setdefault(message, number)
            if held != number:
                self.duplicates += 1
                self._contested.add(message)
                told, teller, _ = self._streams[held]
                self._merge(*((key, teller) if rank < told else (teller, key)))
                if rank < told:
                    self._best[message] = number

    def contested(self) -> dict[str, StreamKey]:
        """The messages that several streams hold, and which of them tells each."""
        return {message: self._streams[self._best[message]][2] for message in self._contested}


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
    if "://" not in out and any(Path(out).resolve() == source.path.resolve() for source in files):
        raise InputError(f"{out}: is one of the transcripts to be imported: choose another output")
    parallel = processes if sizes(files) >= PARALLEL_BYTES else 1
    with TemporaryFile() as file, _no_collector(), ordered_map(min(parallel, len(files))) as mapped:
        first = _First(file)
        for done, (source, folded) in enumerate(zip(files, mapped(partial(fold_file, salt), files), strict=True), 1):
            first.take(source, _shown(source.path, path), folded, strict)
            progress(done, len(files))
        common = Common(salt, first.leads(), first.tellers.contested(), informed, flow)
        notes: dict[str, Any] = {"prefix_breaks": "recorded" if informed else "blind"}
        with TraceWriter(out, producer="claude-code", version=version, tokens="reported", notes=notes) as writer:
            totals = Totals()
            waiting = first.spool.sessions()
            for packed, counted in mapped(partial(build_sessions, common), _lots(waiting)):
                totals = totals.plus(counted)
                if packed is not None:
                    writer.add_packed(packed)
            if not writer.calls:
                told = f"{first.lines} lines in {len(files)} files, {len(first.damaged)} of them damaged"
                raise InputError(f"{path}: holds no call: {told}")
            notes |= {"recorded_breaks": totals.recorded_breaks, "negative_waits": totals.negative_waits}
    counts = {"files": len(files), "lines": first.lines, "calls": writer.calls, "duplicates": first.tellers.duplicates}
    return Imported(damaged=first.damaged, digest=writer.digest, **counts, **totals._asdict())


class _First:
    """What the first pass learns of all files."""

    def __init__(self, file: IO[bytes]) -> None:
        self.spool = _Spool(file)
        self.tellers = _Tellers(self.spool.merge)
        self._reads: dict[str, tuple[LeadKey, int]] = {}
        self.damaged: list[tuple[str, int]] = []
        self.lines = 0

    def take(self, source: Source, name: str, folded: FoldedFile, strict: bool) -> None:
        if strict and folded.damaged:
            raise InputError(f"{name}: line {folded.damaged[0]} is damaged, expected one JSON object of a known shape")
        self.damaged += [(name, number) for number in folded.damaged]
        self.lines += folded.lines
        self.tellers.duplicates += folded.repeated
        for part in folded.sessions:
            self.spool.add(part.session, part)
            for heard in part.heard:
                self.tellers.hear(part.session, heard)
                if heard.lead is not None:
                    self._reads.setdefault(heard.messages[0], (heard.lead, heard.first_read))

    def leads(self) -> dict[LeadKey, int]:
        """What first calls read by whom they share a lead with: each group's most common, the smallest of several."""
        counts: dict[LeadKey, Counter[int]] = defaultdict(Counter)
        for key, read in self._reads.values():
            counts[key][read] += 1
        return {key: max(sorted(reads), key=reads.__getitem__) for key, reads in counts.items()}


def _lots(sessions: Iterable[Waiting]) -> Iterator[list[Waiting]]:
    """Sessions in lots of some size, so that each is worth a process's while."""
    lot: list[Waiting] = []
    size = 0
    for session in sessions:
        lot.append(session)
        size += sum(map(len, session.streams))
        if size >= LOT_BYTES:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot


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


def _shown(path: Path, root: Path) -> str:
    """A file as a user knows it: relative to what was asked for."""
    try:
        return str(path.relative_to(root.absolute() if root.is_dir() else root.absolute().parent))
    except ValueError:
        return path.name


def default_path() -> Path:
    """Where Claude Code keeps the user's own transcripts."""
    places = [Path.home() / ".claude" / "projects", Path.home() / ".config" / "claude" / "projects"]
    return next((place for place in places if place.is_dir()), places[0])
