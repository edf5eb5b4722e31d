"""Import of Claude Code's own transcripts: a folder laid out as ~/.claude/projects, one project of it, or one file.

Two passes. The first reads every file once and folds it into streams of steps, which wait in a temporary file without
any text; it learns which messages stand in several files, and how large each group's shared lead is. The second builds
the sessions in order of their start and writes them. Memory holds one file, one session, and some bytes a message.
"""

import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from keepwarm.traces.claude_files import FoldedFile, Heard, LeadKey, StreamKey, fold_file, sources, stream_key
from keepwarm.traces.claude_prompts import AgentPrompt
from keepwarm.traces.columns import Packed, pack
from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import Call
from keepwarm.traces.pool import ordered_map
from keepwarm.traces.sessions import SessionBuilder
from keepwarm.traces.steps import Step, Stream
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


NOTICED = set(Imported._fields) - {"files", "calls", "damaged", "digest"}
"""What is counted on the way."""


class Waiting(NamedTuple):
    """A session to be built: its pseudonym, its start since the trace's, and its streams, pickled."""

    session: str
    start_ns: int
    streams: Sequence[bytes]


class _Streams:
    """What the first pass learns of all files, and their streams, which lie in a file between the two passes.
    ``tellers`` says of the messages that several streams hold which of them tells each.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._spooled: list[tuple[str, int | None, int, int]] = []
        self._merged: dict[str, str] = {}
        self._told: dict[str, Heard] = {}
        self._reads: dict[str, tuple[LeadKey, int]] = {}
        self.tellers: dict[str, StreamKey] = {}
        self.damaged: list[tuple[str, int]] = []
        self.noticed: Counter[str] = Counter()

    def take(self, name: str, folded: FoldedFile, strict: bool) -> None:
        """Take in a file, by the name that a user knows it by."""
        if strict and folded.damaged:
            raise InputError(f"{name}: line {folded.damaged[0]} is damaged, expected one JSON object of a known shape")
        self.damaged += [(name, number) for number in folded.damaged]
        self.noticed.update(lines=folded.lines, duplicates=folded.repeated)
        for heard in folded.streams:
            self._add(heard)

    def _add(self, heard: Heard) -> None:
        """Put a stream aside, and settle which stream tells its messages."""
        at, size = self._file.tell(), self._file.write(heard.pickled)
        self._spooled.append((heard.session, heard.first_ns, at, size))
        heard = heard._replace(pickled=b"")
        for message in heard.messages:
            teller = self._told.setdefault(message, heard)
            if teller is not heard:
                self.noticed["duplicates"] += 1
                origin, copy = sorted((teller, heard), key=lambda one: one.rank)
                self._told[message], self.tellers[message] = origin, origin.stream
                self._merge(origin.session, copy.session)
        if heard.lead is not None:
            self._reads.setdefault(heard.messages[0], heard.lead)

    def _root(self, session: str) -> str:
        while session in self._merged:
            session = self._merged[session]
        return session

    def _merge(self, origin: str, copy: str) -> None:
        """Two sessions are one: the one copied the other's history, and goes by its name."""
        origin, copy = self._root(origin), self._root(copy)
        if origin != copy:
            self._merged[copy] = origin

    def leads(self) -> dict[LeadKey, int]:
        """What first calls read by whom they share a lead with: each group's most common, the smallest of several."""
        counts: dict[LeadKey, Counter[int]] = defaultdict(Counter)
        for key, read in self._reads.values():
            counts[key][read] += 1
        return {key: max(sorted(reads), key=reads.__getitem__) for key, reads in counts.items()}

    def sessions(self) -> Iterator[tuple[int, Waiting]]:
        """Every session with a step, in trace order, and in which lot: one that is worth a process's while."""
        starts: dict[str, int] = {}
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for session, first_ns, at, size in self._spooled:
            root = self._root(session)
            places[root].append((at, size))
            if first_ns is not None:
                starts[root] = min(first_ns, starts.get(root, first_ns))
        order = sorted((start, session) for session, start in starts.items())
        seen = 0
        for start, session in order:
            seen += sum(size for _, size in places[session])
            waiting = Waiting(session, start - order[0][0], [self._read(*place) for place in places[session]])
            yield seen // LOT_BYTES, waiting

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)


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
    size = sum(source.path.stat().st_size for source in files if os.access(source.path, os.R_OK))
    parallel = processes if size >= PARALLEL_BYTES else 1
    with TemporaryFile() as file, ordered_map(min(parallel, len(files))) as mapped:
        streams = _Streams(file)
        for done, (source, folded) in enumerate(zip(files, mapped(partial(fold_file, salt), files), strict=True), 1):
            streams.take(os.path.relpath(source.path, path if path.is_dir() else path.parent), folded, strict)
            progress(done, len(files))
        agreed = partial(build_sessions, salt=salt, leads=streams.leads(), tellers=streams.tellers)
        build = partial(agreed, informed=informed, flow=flow)
        notes: dict[str, Any] = {"prefix_breaks": "recorded" if informed else "blind"}
        with TraceWriter(out, producer="claude-code", version=version, tokens="reported", notes=notes) as writer:
            lots = groupby(streams.sessions(), itemgetter(0))
            for packed, counted in mapped(build, ([waiting for _, waiting in lot] for _, lot in lots)):
                streams.noticed.update(counted)
                if packed is not None:
                    writer.add_packed(packed)
            if not writer.calls:
                told = f"{streams.noticed['lines']} lines in {len(files)} files, {len(streams.damaged)} of them damaged"
                raise InputError(f"{path}: holds no call: {told}")
            notes |= {name: streams.noticed[name] for name in ("recorded_breaks", "negative_waits")}
    counts = {name: streams.noticed[name] for name in NOTICED}
    return Imported(files=len(files), calls=writer.calls, damaged=streams.damaged, digest=writer.digest, **counts)


def build_sessions(
    sessions: Sequence[Waiting],
    *,
    salt: bytes,
    leads: Mapping[LeadKey, int],
    tellers: Mapping[str, StreamKey],
    informed: bool,
    flow: str | None,
) -> tuple[Packed | None, Counter[str]]:
    """Build some sessions that follow one another in trace order; None for a pack without a call, and what was noticed.
    This is what worker processes do in the second pass, so it takes and gives plain values. ``tellers`` names the
    stream that tells a message, where several hold it.
    """
    calls: list[Call] = []
    noticed: Counter[str] = Counter()

    def owns(stream: Stream, step: Step) -> bool:
        teller = tellers.get(step.id)
        return teller is None or teller == stream_key(stream)

    prompts = partial(AgentPrompt, Identity(salt), leads, informed, noticed)
    for session, start_ns, pickled in sessions:
        builder = SessionBuilder(session, owns, prompts, flow, "transcript", noticed)
        built = builder.build(list(map(pickle.loads, pickled)), start_ns)
        noticed["sessions"] += bool(built)
        calls += built
    noticed["new_tokens"] = sum(segment.tokens for call in calls for segment in call.append)
    return pack(calls) if calls else None, noticed


def default_path() -> Path:
    """Where Claude Code keeps the user's own transcripts."""
    places = [Path.home() / ".claude" / "projects", Path.home() / ".config" / "claude" / "projects"]
    return next((place for place in places if place.is_dir()), places[0])
