"""Threads tell whose a request is: which agent's, in which session, and what it shares with that agent's last one.

Agents that name themselves in headers are believed. Others are known by their messages: a request goes on with the
conversation whose messages it repeats, and one that begins with what a tool use asked of a new agent is that agent's.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from keepwarm.traces.breaks import change, common, tool_hashes, words
from keepwarm.traces.records import AnswerRecord, RequestRecord, whole
from keepwarm.traces.steps import Piece

MOST_THREADS = 4096
"""Conversations that are remembered; of those that nobody went on with, the one idle longest is forgotten first."""


class Who(NamedTuple):
    """What a request's headers say, in pseudonyms; ``session`` None where they say nothing."""

    session: str | None = None
    agent: str | None = None
    parent: str | None = None
    role: str = "main"
    compacts: bool = False


class Placed(NamedTuple):
    """Whose a request is. Its prompt begins with ``keep`` pieces of the ``origin`` thread's; ``broke`` says in words
    why it is not all of its own thread's.
    """

    thread: int
    origin: int | None
    keep: int
    session: str
    agent: str
    parent: str | None
    role: str
    broke: str | None


@dataclass(slots=True)
class _Thread:
    number: int
    session: str
    agent: str
    parent: str | None
    role: str
    pieces: Sequence[Piece] = ()
    asking: int = 0
    lost: bool = False
    answer: frozenset[int] = frozenset()
    calls: int = 0
    compacted: bool = False
    begun: int = 0


_Found = tuple[_Thread, _Thread | None]
"""Whose a request is, and the thread that its prompt grows from."""


class Threads:
    """Places requests one after the other. ``name`` makes pseudonyms, as Identity does; ``agents`` is how many threads
    there have been, and the next one's number.
    """

    def __init__(self, name: Callable[..., str]) -> None:
        self._name = name
        self._threads: OrderedDict[int, _Thread] = OrderedDict()
        self._own: dict[tuple[str, str], _Thread] = {}
        self._beside: dict[tuple[str, str], list[_Thread]] = defaultdict(list)
        self._sessions: dict[str, str] = {}
        self._begun: dict[int, list[_Thread]] = {}
        self._spawning: OrderedDict[int, _Thread] = OrderedDict()
        self._spoke: OrderedDict[int, _Thread] = OrderedDict()
        self.agents = 0

    def recall(self, records: Iterable[RequestRecord | AnswerRecord]) -> None:
        """Remember what a recorder that was stopped had placed, and go on from there."""
        asked: dict[int, int] = {}
        for record in whole(records):
            if isinstance(record, AnswerRecord):
                self.answered(asked.get(record.number, -1), record)
                continue
            asked[record.number] = record.thread
            thread = self._threads.get(record.thread)
            if thread is None:
                thread = _Thread(record.thread, record.session, record.agent, record.parent, record.role)
                self.agents = max(self.agents, record.thread + 1)
            self._remember(thread, record.rest)
        for thread in self._threads.values():
            thread.asking = 0

    def _known(self, thread: _Thread) -> None:
        """Let a thread be found again by its name, or by how it begins."""
        unnamed = thread.agent == self._name("agent", thread.session, "thread", str(thread.number))
        if thread.role == "side":
            beside = self._beside[thread.session, thread.parent or ""]
            beside[:] = [*beside[-7:], thread]
        elif not unnamed:
            self._sessions[thread.agent] = thread.session
            self._own[thread.session, thread.agent] = thread
        elif thread.role != "compaction" and (said := _said(thread.pieces)):
            thread.begun = said[0].hash
            self._begun.setdefault(thread.begun, []).append(thread)

    def place(self, who: Who, pieces: Sequence[Piece]) -> Placed:
        """Say whose a request with these pieces is, and remember it."""
        thread, origin = self._named(who, pieces) if who.session else self._unnamed(who, pieces)
        old = origin.pieces if origin is not None else ()
        keep = common(old, pieces)
        broke = None
        if thread.calls and keep < len(thread.pieces) and origin is thread:
            how = change(old, pieces, keep)
            broke = words((pieces if how == "added" else old)[keep].kind, keep, keep, how)
        if origin is not None and origin.lost:
            origin, keep = None, 0
        thread.lost = thread.compacted = False
        self._remember(thread, pieces)
        number = origin.number if origin is not None else None
        return Placed(thread.number, number, keep, thread.session, thread.agent, thread.parent, thread.role, broke)

    def forget(self, number: int) -> None:
        """A thread's latest prompt could not be written down: what grows from it will be told whole."""
        self._threads[number].lost = True

    def answered(self, number: int, record: AnswerRecord) -> None:
        """A thread's request was answered, or failed."""
        thread = self._threads.get(number)
        if thread is None:
            return
        thread.asking -= 1
        thread.answer = frozenset(piece.hash for piece in record.said) if record.error is None else frozenset()
        self._spoke |= dict.fromkeys(thread.answer, thread)
        for asked in record.tools:
            if asked.prompt_hash is not None:
                self._spawning[asked.prompt_hash] = thread
        for known in (self._spawning, self._spoke):
            while len(known) > MOST_THREADS:
                known.popitem(last=False)

    def _new(self, session: str, agent: str | None, parent: str | None, role: str) -> _Thread:
        number = self.agents
        self.agents += 1
        return _Thread(number, session, agent or self._name("agent", session, "thread", str(number)), parent, role)

    def _remember(self, thread: _Thread, pieces: Iterable[Piece]) -> None:
        """A thread has a request with these pieces; the one that nobody went on with for longest may be forgotten."""
        thread.pieces = [piece if piece.text is None else piece._replace(text=None) for piece in pieces]
        thread.calls += 1
        thread.asking += 1
        if thread.calls == 1:
            self._known(thread)
        self._threads[thread.number] = thread
        self._threads.move_to_end(thread.number)
        if len(self._threads) > MOST_THREADS:
            _, old = self._threads.popitem(last=False)
            for named in (self._own, self._beside):
                named.pop((old.session, old.agent), None)
            if begun := [kept for kept in self._begun.pop(old.begun, ()) if kept is not old]:
                self._begun[old.begun] = begun

    def _named(self, who: Who, pieces: Sequence[Piece]) -> _Found:
        """The thread of an agent that said who it is, and the one its prompt grows from."""
        session = self._sessions.get(who.parent or "", who.session or "")
        agent = who.agent or self._name("agent", session, "")
        self._sessions[agent] = session
        own = self._own.get((session, agent))
        if who.compacts and own is not None:
            return self._new(session, None, own.agent, "compaction"), own
        if own is not None and _goes_on(own.pieces, pieces):
            return own, own
        if own is None and (who.role != "main" or any(piece.kind == "tools" for piece in pieces)):
            return self._new(session, agent, who.parent, who.role), None
        for thread in reversed(self._beside[session, agent]):  # a side call goes on with one only if it repeats it all
            if common(thread.pieces, pieces) == len(thread.pieces):
                return thread, thread
        return self._new(session, None, agent, "side"), None

    def _unnamed(self, who: Who, pieces: Sequence[Piece]) -> _Found:
        """The thread that a request without a name goes on with, or a new one."""
        said = _said(pieces)
        begun = self._begun.get(said[0].hash, []) if said else []
        heard = {piece.hash for piece in said if piece.kind == "answer"}
        known = [(bool(t.answer & heard), common(_said(t.pieces), said), t.number, t) for t in begun]
        spoke = (self._spoke.get(piece.hash) for piece in reversed(said) if piece.hash in heard)
        known += [(False, 0, 0, thread) for thread in spoke if thread is not None and _shared(thread.pieces, pieces)]
        best = max(known, key=lambda item: item[:3], default=(False, 0, 0, None))[-1]
        if best is not None and who.compacts:
            best.compacted = True
            return self._new(best.session, None, best.agent, "compaction"), best
        free = [one for one in known if not one[-1].asking and _continues(one[-1], said, heard)]
        if free:
            best = max(free, key=lambda item: item[:3])[-1]
            return best, best
        spawner = next((self._spawning[p.hash] for p in said[:8] if p.hash in self._spawning), None)
        if spawner is not None:
            return self._new(spawner.session, None, spawner.agent, "subagent"), None
        return self._new(self._name("session", "thread", str(self.agents)), None, None, "main"), None


def _said(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of the conversation: without tools and system prompt."""
    return [piece for piece in pieces if piece.kind not in ("tools", "system")]


def _goes_on(old: Sequence[Piece], new: Sequence[Piece]) -> bool:
    """Whether a request is of the same conversation as an earlier one, and no call beside it: it offers about the same
    tools, or repeats a message at its place.
    """
    offered, offers = tool_hashes(old), tool_hashes(new)
    return 2 * len(offered & offers) >= min(len(offered), len(offers)) > 0 or _alike(old, new)


def _alike(old: Sequence[Piece], new: Sequence[Piece]) -> bool:
    """Whether a request begins with an earlier one's first message and repeats half of the others, wherever: tool
    results that are cleared are the oldest.
    """
    return bool(common(_said(old)[:1], _said(new)[:1])) and _shared(old, new)


def _shared(old: Sequence[Piece], new: Sequence[Piece]) -> bool:
    one, other = _said(old), _said(new)
    shared = Counter(piece.hash for piece in one) & Counter(piece.hash for piece in other)
    return 2 * shared.total() >= len(one) > 0


def _continues(thread: _Thread, said: Sequence[Piece], heard: set[int]) -> bool:
    """Whether a conversation goes on with a thread's. Asked the same once more after an answer, or with other words in
    the place of the last ones, it is another one's: a shared beginning is no sign.
    """
    old = _said(thread.pieces)
    if thread.compacted and common(old[:1], said[:1]):
        return True
    return _shared(old, said) and (not thread.answer or bool(thread.answer & heard) or len(old) < len(said))
