"""Records are what a recorder saw of requests and answers, without a word of their text, and the journal they wait in.

The journal is a file of JSON lines, readable by its owner only. Its first line holds the salt, so that a recorder that
was killed can be gone on with; a last line that was cut is no record.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import SALT_BYTES
from keepwarm.traces.model import Hints
from keepwarm.traces.steps import Asked, Input, Piece, Usage

JOURNAL_VERSION = 1


class RequestRecord(NamedTuple):
    """A request as it came in, at ``at_ns`` since 1970. Its prompt is the first ``keep`` pieces of the latest request
    of the ``origin`` thread, and then ``rest``; ``inputs`` are what the client put into it (their times are ``at_ns``).
    ``role``, ``agent``, ``parent`` and ``session`` are whose it is; ``marks`` as in Wire.
    """

    number: int
    at_ns: int
    thread: int
    origin: int | None
    keep: int
    session: str
    agent: str
    parent: str | None
    role: str
    rest: list[Piece]
    inputs: list[Input]
    model: str
    dialect: str
    stream: bool | None
    flow: str | None
    marks: tuple[tuple[int, int], ...]
    hints: Hints | None


class AnswerRecord(NamedTuple):
    """The answer to a request of that ``number``, or its failure; times are since 1970, None where it never came.

    ``call`` is the pseudonym of the answer's own id; ``said`` are its pieces, ``tools`` the tool uses it asked for.
    """

    number: int
    end_ns: int
    first_byte_ns: int | None = None
    first_token_ns: int | None = None
    status: int | None = None
    error: str | None = None
    call: str | None = None
    usage: Usage | None = None
    write_source: str = "absent"
    output: int | None = None
    reasoning: int | None = None
    stop_reason: str | None = None
    miss_reason: str | None = None
    said: tuple[Piece, ...] = ()
    tools: tuple[Asked, ...] = ()


_PARTS = {"rest": Piece, "inputs": Input, "hints": Hints, "usage": Usage, "said": Piece, "tools": Asked}
"""What the values are that are lists of their fields, or lists of such."""
_RECORDS: dict[str, Any] = {"q": RequestRecord, "a": AnswerRecord}


class RecordJournal:
    """Appends records to a journal; what was appended survives the program.

    A journal that is there is gone on with, under its own salt. InputError if another recorder has it, or it is none.
    """

    def __init__(self, path: Path, salt: bytes) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another recorder is writing it") from error
        self.salt = salt
        self.found: list[RequestRecord | AnswerRecord] = []
        if os.fstat(self._file).st_size:
            self.salt = journal_salt(path)
            self.found = list(read_records(path))
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        else:
            try:
                self._append({"keepwarm.journal": JOURNAL_VERSION, "salt": salt.hex()})
            except OSError:
                path.unlink()
                raise

    def add(self, record: RequestRecord | AnswerRecord) -> None:
        """Append a record. OSError where the disk refuses it; the journal is then as it was."""
        self._append(["q" if isinstance(record, RequestRecord) else "a", record])

    def _append(self, value: Any) -> None:
        line = orjson.dumps(value, default=tuple) + b"\n"
        written = os.write(self._file, line)
        if written < len(line):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(28, "No space left on device", str(self.path))

    def close(self) -> None:
        """Let others have it."""
        os.close(self._file)


def journal_salt(path: Path) -> bytes:
    """The salt of a journal; InputError if it is none."""
    try:
        with path.open("rb") as file:
            head = orjson.loads(file.readline())
        version, salt = head["keepwarm.journal"], bytes.fromhex(head["salt"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: line 1 is not the head of a recorder's journal") from error
    if version != JOURNAL_VERSION or len(salt) != SALT_BYTES:
        raise InputError(f"{path}: line 1: a journal of version {version}, expected {JOURNAL_VERSION}")
    return salt


def read_records(path: Path) -> Iterator[RequestRecord | AnswerRecord]:
    """The records of a journal; a last line that was cut is left out. InputError at any other damage."""
    with path.open("rb") as file:
        file.readline()
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                return
            try:
                kind, values = orjson.loads(line)
                yield _record(kind, values)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: line {number} is damaged, expected a recorder's record") from error


def whole(records: Iterable[RequestRecord | AnswerRecord]) -> Iterator[RequestRecord | AnswerRecord]:
    """The records, each request's ``rest`` its whole prompt."""
    prompts: dict[int | None, list[Piece]] = {}
    for record in records:
        if isinstance(record, RequestRecord):
            pieces = prompts[record.thread] = [*prompts.get(record.origin, [])[: record.keep], *record.rest]
            record = record._replace(keep=0, rest=pieces)
        yield record


def _record(kind: str, values: list[Any]) -> RequestRecord | AnswerRecord:
    record: RequestRecord | AnswerRecord = _RECORDS[kind](*values)
    fields = record._asdict()
    for name, make in _PARTS.items():
        if told := fields.get(name):
            fields[name] = [make(*item) for item in told] if isinstance(told[0], list) else make(*told)
    return type(record)(**fields)
