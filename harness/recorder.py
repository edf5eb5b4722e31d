"""The recorder: takes in requests and answers as they pass by, and keeps of them what a trace needs, in a journal."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import inf
from pathlib import Path

from keepwarm.harness.answers import Answer, decoded
from keepwarm.harness.bodies import Body, Offer, Pieces, opened
from keepwarm.harness.who import Headers, client, flow, who
from keepwarm.replayers.sse import string
from keepwarm.traces.identity import Identity
from keepwarm.traces.records import AnswerRecord, RecordJournal, RequestRecord
from keepwarm.traces.steps import Piece
from keepwarm.traces.threads import Placed, Threads

INLINE_BYTES = 1 << 18
"""Larger requests, and compressed ones, are taken apart beside the event loop, so that no other stream waits for it."""
GATHER_S, GATHERED = 0.2, 16
"""What comes within this time, up to this number, is done together: each alone finds nothing in the processor's caches.
"""
HOLD_NS = 500_000
"""Then so much of it is done at a time that no stream waits for long."""
MOST_BYTES = 64 << 20
MOST_STORED = 1024
RECENT = 128

_DIALECTS = (("/messages", "messages"), ("/chat/completions", "chat"), ("/responses", "responses"))
WALL_NS = time.time_ns() - time.monotonic_ns()
"""What the monotonic clock, which never steps, is behind the time since 1970."""


def now() -> int:
    """Ns since 1970."""
    return time.monotonic_ns() + WALL_NS


def dialect_of(path: str) -> str | None:
    """The dialect of the calls that are posted to a path; None for any other path."""
    bare = path.partition("?")[0]
    return next((name for end, name in _DIALECTS if bare.endswith(end)), None)


class Recorder:
    """Keeps what passes by in a journal, and counts it: ``lost`` calls could not be written, ``read`` and ``prompt``
    are tokens of calls that were not their agent's first. ``stored`` are conversations up to answers that the provider
    may keep, for requests that name them.
    """

    def __init__(self, journal: Path, salt: bytes, *, keep_text: bool = False, flow: str | None = None) -> None:
        self.journal = RecordJournal(journal, salt)
        self.identity = Identity(self.journal.salt)
        self.keep_text = keep_text
        self.flow = flow
        self.found = len(self.journal.found)
        self.threads = Threads(self.identity.name)
        self.threads.recall(self.journal.found)
        self.next = 1 + max((record.number for record in self.journal.found), default=-1)
        self.journal.found.clear()
        self.offers: deque[Offer] = deque(maxlen=RECENT)
        self.stored: OrderedDict[str, Sequence[Piece]] = OrderedDict()
        self.beside = ThreadPoolExecutor(1, "keepwarm record")
        self.calls = self.failed = self.lost = 0
        self.why_lost = ""
        self.read = self.prompt = 0
        self.broke: str | None = None
        self._waiting: deque[Callable[[], None]] = deque()

    def passing(self, dialect: str, headers: Headers) -> "Passing":
        """A call that begins to pass by."""
        return Passing(self, dialect, headers, now())

    def soon(self, what: Callable[[], None]) -> None:
        """Do something in its turn, a moment later and together with what else comes until then."""
        self._waiting.append(what)
        after_s = {1: GATHER_S, GATHERED: 0}.get(len(self._waiting))
        if after_s is not None:
            asyncio.get_running_loop().call_later(after_s, self._go_on)

    def _go_on(self) -> None:
        """Do what waits, for a moment, and the rest when all others have had their turn."""
        self.catch_up(time.monotonic_ns() + HOLD_NS)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._go_on)

    def catch_up(self, until_ns: float = inf) -> None:
        """Do now what waits, as much as can be begun until then."""
        while self._waiting and time.monotonic_ns() < until_ns:
            self._waiting.popleft()()

    def write(self, record: RequestRecord | AnswerRecord) -> bool:
        """Append to the journal. Where the disk refuses, the traffic goes on and the call is counted as lost."""
        try:
            self.journal.add(record)
        except OSError as error:
            self.lost += 1
            self.why_lost = error.strerror or str(error)
            return False
        return True

    def close(self) -> None:
        """No more calls."""
        self.beside.shutdown()
        self.journal.close()


class Passing:
    """One call on its way: the request's body, then the answer, then its end. ``coming`` is what has come of the answer
    and waits to be read, before the pieces the time when they came.
    """

    def __init__(self, recorder: Recorder, dialect: str, headers: Headers, at_ns: int) -> None:
        self._recorder = recorder
        self._dialect = dialect
        self._headers = headers
        self._at_ns = at_ns
        self._body: list[bytes] = []
        self._size = 0
        self._client = client(headers, {})
        self._placed: Placed | None = None
        self._pieces: Sequence[Piece] = ()
        self._number = -1
        self._taking: Future[Body | None] | None = None
        self._answer: Answer | None = None
        self._first_byte_ns: int | None = None
        self.coming: list[int | bytes] = []

    def request(self, data: bytes) -> None:
        """A piece of the request's body. What is larger than the bound is not kept: its prompt stays unknown."""
        self._size += len(data)
        if self._size <= MOST_BYTES:
            self._body.append(data)
        else:
            self._body.clear()

    def asked(self) -> None:
        """The request is whole."""
        body, self._body = b"".join(self._body), []
        if self._size <= INLINE_BYTES and "content-encoding" not in self._headers:
            self._place(self._take(body))
            return
        self._taking = self._recorder.beside.submit(self._take, body)

    def ready(self, then: Callable[[], None]) -> bool:
        """Whether the request has been taken apart; if not, ``then`` is called in this event loop once it has."""
        if self._placed is None:
            self._recorder.catch_up()
        if self._taking is None:
            return True
        taking, loop = self._taking, asyncio.get_running_loop()
        if not taking.done():
            taking.add_done_callback(lambda _: loop.call_soon_threadsafe(then))
            return False
        self._taking = None
        self._place(taking.result())
        return True

    def _take(self, body: bytes) -> Body | None:
        """The request's body taken apart; None where it is no request of its dialect."""
        try:
            recorder = self._recorder
            body = decoded(body, self._headers.get("content-encoding", ""), MOST_BYTES)
            told, offer = opened(body, tuple(recorder.offers))
            self._client = client(self._headers, told)
            before = recorder.stored.get(string(told.get("previous_response_id")) or "", ())
            whose = recorder.identity, self._at_ns, self._client.session
            pieces = Pieces(*whose, recorder.keep_text, offer, before)
            found = pieces.body(self._dialect, told)
            if offer is None and pieces.offer is not None and pieces.offer.raw in body:
                recorder.offers.appendleft(pieces.offer)
            return found
        except Exception:  # whatever is wrong with it, it passes by
            return None

    def _place(self, body: Body | None) -> None:
        """Say whose the request is, and write it down."""
        recorder, threads = self._recorder, self._recorder.threads
        body = body or Body()
        self._pieces = body.pieces[body.front :]
        told = who(self._client, recorder.identity, compacts=body.compacts)
        placed = self._placed = threads.place(told, body.pieces)
        self._number, recorder.next = recorder.next, recorder.next + 1
        recorder.broke = placed.broke or recorder.broke
        given = [one for piece, one in body.inputs if piece >= placed.keep]
        if any(one.tool_use for one in given):
            given = [one._replace(human=False) for one in given]
        record = RequestRecord(
            self._number,
            self._at_ns,
            *placed[:7],
            rest=list(body.pieces[placed.keep :]),
            inputs=given,
            model=body.model,
            dialect=self._dialect,
            stream=body.stream,
            flow=recorder.flow or flow(self._headers),
            marks=body.marks,
            hints=body.hints,
        )
        if not recorder.write(record):
            threads.forget(placed.thread)
            self._number = -1

    def answering(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        """The answer's head is there."""
        self._first_byte_ns = int(self.coming[-1])
        kind = headers.get(b"content-type", b"").decode("latin-1")
        encoding = headers.get(b"content-encoding", b"").decode("latin-1")
        self._answer = Answer(self._dialect, status, kind, encoding, MOST_BYTES)

    def read(self) -> None:
        """Read what has come of the answer."""
        if self._answer is not None:
            self._answer.read(self.coming)
        self.coming.clear()

    def ended(self, error: str | None = None) -> None:
        """The exchange is over; ``error`` where that was not by the answer's end."""
        if not self.ready(lambda: self.ended(error)) or self._placed is None:
            return  # the client left before its request was whole, or it was over already
        placed, self._placed = self._placed, None
        recorder, end_ns = self._recorder, now()
        self.read()
        if error == "cancelled" and self._answer is not None and self._answer.reader.heard.finished:
            error = None  # Codex leaves at the final event
        if self._answer is None:
            record = AnswerRecord(self._number, end_ns, error=error or "reset")
        else:
            whose = recorder.identity, self._client.session
            record = self._answer.record(self._number, *whose, self._first_byte_ns, end_ns, error)
            if self._dialect == "responses" and self._answer.reader.ident:
                recorder.stored[self._answer.reader.ident] = (*self._pieces, *record.said)
                if len(recorder.stored) > MOST_STORED:
                    recorder.stored.popitem(last=False)
        recorder.soon(partial(recorder.threads.answered, placed.thread, record))
        if self._number < 0 or not recorder.write(record):
            return
        recorder.calls += 1
        recorder.failed += record.error is not None
        if placed.origin == placed.thread and record.usage is not None and record.usage.read_told:
            recorder.read += record.usage.cache_read
            recorder.prompt += record.usage.prompt
