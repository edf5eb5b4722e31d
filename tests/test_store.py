"""Trace files: what is written is read back, and what is no whole trace of ours is said in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.harness.cli import main
from keepwarm.replayers.run import BOUNDS, Bound, write_bounds
from keepwarm.traces import schema, sink, store
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import (
    TRIGGERS,
    After,
    Attempt,
    Breakpoint,
    Call,
    Hints,
    Outcome,
    PrefixBreak,
    Segment,
    ToolUse,
)

FIXTURE = Path(__file__).parent / "fixtures" / "trace-v1.parquet"


def whole(bits: int) -> st.SearchStrategy[int]:
    """Integers that fit a signed column of that many bits."""
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


TIME = st.integers(0, 2**63 - 1)
NAME = st.text(max_size=8)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values, or unknown."""
    return st.none() | values


FIELDS: dict[str, st.SearchStrategy[object]] = {
    **dict.fromkeys(("session", "agent", "role", "origin", "usage_source", "write_source"), NAME),
    "call": st.uuids().map(str),
    "turn": whole(32),
    **dict.fromkeys(("start_ns", "end_ns", "keep"), TIME),
    "after": st.lists(st.builds(After, NAME, st.sampled_from(TRIGGERS), whole(64), NAME), max_size=3).map(tuple),
    "append": st.lists(
        st.builds(Segment, whole(64), whole(32), NAME, maybe(NAME), maybe(st.text(max_size=30))), max_size=3
    ).map(tuple),
    "breakpoints": st.lists(st.builds(Breakpoint, TIME, whole(32)), max_size=2).map(tuple),
    "tools": st.lists(
        st.builds(
            ToolUse, NAME, maybe(whole(64)), maybe(whole(64)), maybe(whole(32)), maybe(st.booleans()), maybe(NAME)
        ),
        max_size=2,
    ).map(tuple),
    "hints": maybe(
        st.builds(Hints, *[maybe(whole(32))] * 3, maybe(st.booleans()), maybe(whole(32))),
    ),
    "prefix_break": maybe(st.builds(PrefixBreak, TIME, whole(32), NAME, whole(32), NAME)),
    "attempts": st.lists(st.builds(Attempt, TIME, maybe(TIME), maybe(whole(16)), maybe(NAME)), max_size=2).map(tuple),
    **{name: maybe(whole(16)) for name in ("status", "retries")},
    **{name: maybe(st.booleans()) for name in ("stream", "completed")},
}


def of_column(field: pa.Field) -> st.SearchStrategy[object]:
    """Values for a column: the table's above, else whatever its type allows, None included."""
    if field.name in FIELDS:
        return FIELDS[field.name]
    return maybe(NAME if pa.types.is_string(field.type) else TIME)


def order(call: Call) -> tuple[int, str, int, str]:
    """The order of a trace."""
    return (call.session_start_ns or 0, call.session, call.start_ns, call.call)


CALLS = st.lists(
    st.builds(Call, **{field.name: of_column(field) for field in schema.TRACE}), max_size=8, unique_by=lambda c: c.call
).map(lambda calls: sorted(calls, key=order))


def plain(number: int = 0, **fields: object) -> Call:
    """A small call, the given fields changed."""
    known: dict[str, Any] = {"session": "s", "agent": "a", "call": f"c{number:04}", "role": "main", "turn": number}
    known |= {"start_ns": number * 10, "end_ns": number * 10 + 5, "keep": 0, "session_start_ns": 0}
    known |= {"usage_source": "reported", "write_source": "reported", "origin": "synthetic", "prompt": 100 + number}
    known |= {"append": (Segment(number * 7919, 100 + number, "user"),)}
    return Call(**(known | fields))


def write(path: Path | str, calls: list[Call]) -> str:
    """Write a trace; its digest."""
    with store.TraceWriter(str(path), producer="tests", version="0", tokens="exact") as writer:
        for call in calls:
            writer.add(call)
    return writer.digest


@settings(deadline=None, max_examples=60)
@given(CALLS, st.integers(1, 4), st.sampled_from([1, sink.BYTES_PER_GROUP]))
def test_a_trace_read_back_is_equal(
    tmp_path_factory: pytest.TempPathFactory, calls: list[Call], batch: int, size: int
) -> None:
    """Any calls, whatever is unknown in them, come back equal, over any number of row groups, by path and by URI. A
    group has as many batches as its size allows.
    """
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    with mock.patch.object(store, "ROWS_PER_BATCH", batch), mock.patch.object(sink, "BYTES_PER_GROUP", size):
        digest = write(path, calls)
        assert list(store.read_calls(str(path))) == calls
    assert list(store.read_calls(path.as_uri())) == calls
    assert store.read_meta(str(path)).digest == digest
    assert pq.ParquetFile(path).num_row_groups == (-(-len(calls) // batch) if size == 1 else min(len(calls), 1))


def test_bounds_carry_the_checksum_too(tmp_path: Path) -> None:
    """Any other byte among the pages is seen, and a failed write leaves nothing."""
    path = tmp_path / BOUNDS
    write_bounds(tmp_path, [Bound("c", 0, "endless", 5)])
    assert sink.is_whole(str(path))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert sink.is_whole(str(path)) is False
    path.unlink()
    with pytest.raises(ZeroDivisionError):
        write_bounds(tmp_path, (Bound("c", 0, "endless", 1 // n) for n in (1, 0)))
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys
from pathlib import Path
from keepwarm.replayers.run import Bound, write_bounds
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
write_bounds(Path(sys.argv[1]), (Bound(str(n * 7919 % 10007), 0, "endless", n) for n in range(10007)))
"""


@pytest.mark.parametrize(("room", "said"), [(2000, "OSError"), (0, "bounds.parquet: cannot be written")])
def test_a_full_disk_leaves_nothing(tmp_path: Path, room: int, said: str) -> None:
    """The last rows are written when the file is closed: that they cannot be leaves no part of it, nor does a file that
    cannot be begun.
    """
    ran = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), str(room)], capture_output=True, text=True)
    assert said in ran.stderr
    assert not list(tmp_path.iterdir())


def test_columns_are_laid_down_as_the_docs_say(tmp_path: Path) -> None:
    """Times as differences, other flat columns with a dictionary, lists plain."""
    write(tmp_path / "t.parquet", [plain(number) for number in range(100)])
    group = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0)
    columns = {c.path_in_schema: set(c.encodings) for c in (group.column(i) for i in range(group.num_columns))}
    assert "DELTA_BINARY_PACKED" in columns["start_ns"]
    assert "RLE_DICTIONARY" in columns["call"]
    assert columns["append.list.element.tokens"] <= {"PLAIN", "RLE"}


@settings(deadline=None, max_examples=20)
@given(CALLS)
def test_a_directory_is_one_trace(tmp_path_factory: pytest.TempPathFactory, calls: list[Call]) -> None:
    """The files of a directory, in the order of their names, read as one trace; other files there are no part of it."""
    folder = tmp_path_factory.mktemp("trace")
    (folder / "notes.txt").write_text("not a trace")
    for name, part in (("b", calls[3:]), ("a", calls[:3])):
        write(folder / f"{name}.parquet", part)
    for path in (str(folder), str(folder) + "/", folder.as_uri()):
        assert list(store.read_calls(path)) == calls
    assert store.read_trace_table(str(folder), ["call"]).column("call").to_pylist() == [c.call for c in calls]


def test_a_relative_path_and_a_written_uri_name_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace written through a file URI, even one with a blank in it, is read through a relative path."""
    folder = tmp_path / "my traces"
    folder.mkdir()
    write((folder / "t.parquet").as_uri(), [plain()])
    monkeypatch.chdir(folder)
    assert list(store.read_calls("t.parquet")) == [plain()]


def test_sessions_come_whole(tmp_path: Path) -> None:
    """read_sessions gives each session as one list of its calls, in trace order."""
    calls = [plain(n, session=name) for name in ("s", "t") for n in (0, 1)]
    calls = [call._replace(call=f"{call.session}{call.turn}") for call in calls]
    write(tmp_path / "t.parquet", calls)
    assert list(store.read_sessions(str(tmp_path / "t.parquet"))) == [calls[:2], calls[2:]]


def test_sessions_of_a_directory_come_in_order_of_their_start(tmp_path: Path) -> None:
    """Two files whose sessions start by turns are read as one row of sessions; each stays whole."""
    starts = {"a.parquet": (0, 30, 40), "b.parquet": (10, 20, 50)}
    for name, at in starts.items():
        write(tmp_path / name, [plain(start, session=f"s{start:02}", session_start_ns=start) for start in at])
    read = [[call.session for call in calls] for calls in store.read_sessions(str(tmp_path))]
    assert read == [["s00"], ["s10"], ["s20"], ["s30"], ["s40"], ["s50"]]


def test_digest_names_the_content(tmp_path: Path) -> None:
    """Equal calls give equal digests whenever they are written; a change of any column gives another."""
    calls = [plain(0), plain(1)]
    digest = write(tmp_path / "a", calls)
    assert write(tmp_path / "b", calls) == digest
    changed: dict[str, object] = dict.fromkeys(("session", "agent", "call", "role", "model", "flow", "error"), "x")
    changed |= dict.fromkeys(("turn", "start_ns", "end_ns", "keep", "prompt", "cache_read", "output"), 77)
    changed |= {"after": (After("c0000", "end", 1, "tool"),), "append": (Segment(1, 101, "user"),), "stream": True}
    changed |= {"completed": False, "hints": Hints(osl=1), "tools": (ToolUse("Bash"),), "retries": 0}
    for name, value in changed.items():
        assert write(tmp_path / "c", [calls[0], calls[1]._replace(**{name: value})]) != digest, name
    assert write(tmp_path / "d", calls[:1]) != digest


def test_a_directory_has_one_digest_over_its_files(tmp_path: Path) -> None:
    """Several files give one digest, which changes with any of them."""
    write(tmp_path / "a.parquet", [plain(0)])
    write(tmp_path / "b.parquet", [plain(1)])
    first = store.read_meta(str(tmp_path)).digest
    write(tmp_path / "b.parquet", [plain(2)])
    assert len({first, store.read_meta(str(tmp_path)).digest, store.read_meta(str(tmp_path / "a.parquet")).digest}) == 3


def test_metadata_says_who_made_it(tmp_path: Path) -> None:
    """Version, producer, kind of token counts and notes come back; notes filled in before the end count."""
    path = str(tmp_path / "t")
    notes: dict[str, object] = {"lead": "warm"}
    with store.TraceWriter(path, producer="tests", version="9", tokens="estimated", notes=notes) as writer:
        writer.add(plain())
        notes["late"] = 3
    meta = store.read_meta(path)
    assert (meta.version, meta.producer, meta.producer_version, meta.tokens) == (1, "tests", "9", "estimated")
    assert meta.notes == {"lead": "warm", "late": 3}


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return [path.name for path in folder.iterdir()]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    """An exception inside the writer leaves no file, and an existing one as it was."""
    path = tmp_path / "t.parquet"

    def fail() -> None:
        with store.TraceWriter(str(path), producer="tests", version="0", tokens="exact") as writer:
            writer.add(plain(5))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []
    write(path, [plain(0)])
    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == ["t.parquet"]
    assert list(store.read_calls(str(path))) == [plain(0)]


def test_a_value_no_column_holds_leaves_nothing(tmp_path: Path) -> None:
    """A value that is found too large only when the file is closed fails, and nothing is left behind."""
    with pytest.raises((pa.ArrowInvalid, OverflowError)):
        write(tmp_path / "t", [plain(0, append=(Segment(1, 2**40, "user"),))])
    assert names(tmp_path) == []


@pytest.mark.parametrize("second", [plain(1), plain(0), plain(2, session="r"), plain(3, session_start_ns=None)])
def test_calls_must_come_in_trace_order(tmp_path: Path, second: Call) -> None:
    """A call that does not follow the last one is a ValueError naming both."""
    first = plain(1, session_start_ns=4)
    with pytest.raises(ValueError, match=f"{second.call} does not follow c0001"):
        write(tmp_path / "t", [first, second])


def test_outcomes_are_written_whole_or_not(tmp_path: Path) -> None:
    """Outcomes carry the plan, the measurement and the recording side by side; a failed write leaves nothing."""
    call = plain(1, cache_read=60, append=(Segment(3, 101, "user"),))
    path = str(tmp_path / "outcomes.parquet")
    outcome = Outcome(call, 0, 5, 6, prompt=101, cache_read=50, token_ns=(7, 8), attempts=(Attempt(6, 9, 200),))
    store.write_outcomes(path, [outcome, Outcome(call, 1, error="skipped")])
    rows = store.read_outcome_table(path).to_pylist()
    assert len(rows) == 2
    assert (rows[0]["call"], rows[0]["planned_prompt"], rows[0]["planned_keep"]) == ("c0001", 101, 0)
    assert (rows[0]["cache_read"], rows[0]["rec_cache_read"], rows[0]["token_ns"]) == (50, 60, [7, 8])
    assert rows[0]["attempts"] == [{"sent_ns": 6, "done_ns": 9, "status": 200, "error": None}]
    assert (rows[1]["copy"], rows[1]["error"], rows[1]["sent_ns"], rows[1]["rec_prompt"]) == (1, "skipped", None, 101)
    with pytest.raises(ZeroDivisionError):
        store.write_outcomes(str(tmp_path / "other"), (outcome._replace(due_ns=1 // n) for n in (1, 0)))
    assert names(tmp_path) == ["outcomes.parquet"]


def rewrite(source: Path, target: Path, change: Callable[[pa.Table], pa.Table], **meta: object) -> None:
    """Copy a trace with its table changed, its own metadata kept but for the given entries."""
    table = pq.read_table(source)
    known = orjson.loads(pq.ParquetFile(source).metadata.metadata[schema.TRACE_KEY])
    table = change(table).replace_schema_metadata({schema.TRACE_KEY: orjson.dumps(known | meta)})
    pq.write_table(table, target)


def nullable(table: pa.Table, name: str, values: list[object]) -> pa.Table:
    """A table with a column's values replaced, nulls allowed."""
    at = table.column_names.index(name)
    return table.set_column(at, pa.field(name, table.column(name).type), pa.array(values, table.column(name).type))


def flipped(good: bytes) -> bytes:
    """Bytes turned in the middle of a file."""
    middle = len(good) // 2
    return good[:middle] + bytes(b ^ 0x5A for b in good[middle : middle + 64]) + good[middle + 64 :]


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "damaged": (lambda a, b: b.write_bytes(flipped(a.read_bytes())), "not a readable trace file"),
    "truncated": (lambda a, b: b.write_bytes(a.read_bytes()[:-200]), "not a readable trace file"),
    "cut to nothing": (lambda a, b: b.write_bytes(b""), "not a readable trace file"),
    "text": (lambda a, b: b.write_text("hello, I am no trace\n" * 30), "not a readable trace file"),
    "foreign": (lambda a, b: pq.write_table(pa.table({"call": ["c"]}), b), "not a keepwarm trace"),
    "an outcome file": (lambda a, b: store.write_outcomes(str(b), [Outcome(plain())]), "not a keepwarm trace"),
    "newer": (lambda a, b: rewrite(a, b, lambda t: t, version=2), "format version 2 is newer than this program reads"),
    "older": (lambda a, b: rewrite(a, b, lambda t: t, version=0), "format version 0 is not one this program reads"),
    "no version": (lambda a, b: rewrite(a, b, lambda t: t, version="x"), "metadata is damaged"),
    "lost column": (lambda a, b: rewrite(a, b, lambda t: t.drop_columns("model")), "column 'model' was written"),
    "lost rows": (lambda a, b: rewrite(a, b, lambda t: t.slice(0, 7)), "10000 rows were written, 7 are there"),
    "missing column": (lambda a, b: rewrite(a, b, lambda t: t.drop_columns("keep"), columns=[]), "'keep' is missing"),
    "null": (
        lambda a, b: rewrite(a, b, lambda t: nullable(t, "agent", ["a"] * 9000 + [None] + ["a"] * 999)),
        "row 9000, column 'agent' is null, expected string",
    ),
    "wrong type": (
        lambda a, b: rewrite(a, b, lambda t: t.set_column(4, "turn", pa.array(["first"] * len(t)))),
        "column 'turn' is string, expected int32",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of two row groups."""
    path = tmp_path_factory.mktemp("good") / "good.parquet"
    write(path, [plain(n, call=f"c{n:06}") for n in range(10_000)])
    return path


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_whole_trace_is_one_clear_line(
    kind: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be trusted is one line with its name and what is wrong; inspect exits with 2 and no more."""
    path = tmp_path / "bad.parquet"
    breaking, message = BROKEN[kind]
    breaking(good, path)
    with pytest.raises(InputError) as caught:
        list(store.read_calls(str(path)))
    line = str(caught.value)
    assert str(path) in line
    assert message in line
    assert "\n" not in line
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(path)])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_flipped_bit_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whichever bit of a trace file turns, reading gives the same calls or an InputError: never others, never fewer."""
    calls = [plain(n) for n in range(3)]
    path = tmp_path_factory.mktemp("bit") / "t.parquet"
    write(path, calls)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        assert list(store.read_calls(str(path))) == calls
    except InputError as error:
        assert "\n" not in str(error)


SUM_SIZE = 20
"""The bytes of the checksum, and of what says that it is one, in front of a file's footer."""


def outcomes_file(path: Path) -> tuple[bytes, int]:
    """An outcome file's bytes, and where its footer begins."""
    store.write_outcomes(str(path), [Outcome(plain(n)) for n in range(3)])
    raw = path.read_bytes()
    return raw, len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_flipped_bit_of_outcomes_is_passed_over(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whichever bit of an outcome file turns, in what was asked for or not, in pages or footer, the file is refused;
    but where only its checksum no longer looks like one, all else is there.
    """
    path = tmp_path_factory.mktemp("bit") / "o.parquet"
    raw, footer = outcomes_file(path)
    good, at = store.read_outcome_table(str(path)), data.draw(st.integers(0, len(raw) - 1))
    assert store.check_outcomes(str(path), ["call"])
    bad = bytearray(raw)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bad)
    try:
        assert store.check_outcomes(str(path), ["call"])
        assert store.read_outcome_table(str(path)) == good
        assert footer - SUM_SIZE <= at < footer
    except InputError as error:
        assert "\n" not in str(error)


def test_outcomes_without_a_checksum_are_read_to_their_end(tmp_path: Path) -> None:
    """A file of an earlier version, or that other tools wrote again, is good; damaged in a page nobody asks for it is
    refused.
    """
    path = tmp_path / "o.parquet"
    raw, footer = outcomes_file(path)
    path.write_bytes(raw[: footer - SUM_SIZE] + raw[footer:])
    assert store.check_outcomes(str(path), ["call"])
    page = pq.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    path.write_bytes(flip_at(path.read_bytes(), page + 40))
    with pytest.raises(InputError, match="not a readable outcome file"):
        store.check_outcomes(str(path), ["call"])


def flip_at(good: bytes, at: int) -> bytes:
    """Bytes with one of them turned."""
    return good[:at] + bytes([good[at] ^ 0x5A]) + good[at + 1 :]


@pytest.mark.parametrize("missing", ["nothing-here", "empty", "nosuch://bucket/t", "a\0b"])
def test_a_trace_that_is_not_there_is_bad_input(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a directory without traces and an unknown scheme are one line with the name as it was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="^" + missing.replace("\0", ".")):
        list(store.read_calls(missing))


def test_a_trace_cannot_replace_a_directory(tmp_path: Path) -> None:
    """Writing to a directory's name, or into one that does not exist, is bad input before any work is done."""
    for path in (tmp_path, tmp_path / "nosuch" / "t.parquet"):
        with pytest.raises(InputError, match="t"):
            write(path, [plain()])
    assert names(tmp_path) == []


def test_unknown_columns_are_ignored_and_missing_ones_unknown(good: Path, tmp_path: Path) -> None:
    """A column of tomorrow is no obstacle; a nullable column of today that a file lacks reads as unknown."""

    def change(table: pa.Table) -> pa.Table:
        return table.drop_columns("prompt").append_column("tomorrow", pa.array([1] * len(table)))

    rewrite(good, tmp_path / "t", change, columns=[])
    calls = list(store.read_calls(str(tmp_path / "t")))
    assert calls == [call._replace(prompt=None) for call in store.read_calls(str(good))]
    assert store.read_trace_table(str(tmp_path / "t"), ["prompt"]).column("prompt").null_count == 10_000


def test_an_older_version_is_upgraded_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of version 1 passes through the upgrades to 2 and to 3, in that order, wherever it is read."""
    path = str(tmp_path / "t")
    write(path, [plain(0), plain(1)])

    def first(table: pa.Table) -> pa.Table:
        return nullable(table, "flow", ["interactive"] * len(table))

    def second(table: pa.Table) -> pa.Table:
        return nullable(table, "model", [f"{flow} model" for flow in table.column("flow").to_pylist()])

    monkeypatch.setattr(schema, "VERSION", 3)
    monkeypatch.setattr(schema, "UPGRADES", {1: first, 2: second})
    assert [call.model for call in store.read_calls(path)] == ["interactive model"] * 2
    assert store.read_trace_table(path, ["model"]).column("model").to_pylist() == ["interactive model"] * 2
    assert store.read_meta(path).version == 1
    monkeypatch.setattr(schema, "UPGRADES", {1: first})
    with pytest.raises(InputError, match="format version 2 is not one"):
        list(store.read_calls(path))


def test_a_file_of_version_1_still_reads() -> None:
    """The trace kept from version 1's first day reads as it did then."""
    meta = store.read_meta(str(FIXTURE))
    assert (meta.version, meta.producer, meta.tokens) == (1, "keepwarm tests", "reported")
    calls = list(store.read_calls(str(FIXTURE)))
    assert [(c.session, c.agent, c.call, c.role, c.turn) for c in calls] == [
        ("s-1", "a-1", "c-1", "main", 0),
        ("s-1", "a-2", "c-2", "subagent", 0),
        ("s-1", "a-1", "c-3", "main", 1),
    ]
    assert [c.prompt for c in calls] == [c.prompt_tokens for c in calls] == [9000, 7000, 9800]
    assert calls[1].spawned_by == "c-1"
    assert calls[1].breakpoints == (Breakpoint(6997, 300),)
    last = calls[2]
    assert last.after == (After("c-1", "end", 0, "tool"), After("c-2", "end", 50_000_000, "subagent"))
    assert last.append == (Segment(-5, 300, "answer", "c-1"), Segment(2**63 - 1, 500, "tool_result"))
    assert (last.uncached, last.cache_read, last.cache_write_5m, last.cache_write_1h) == (3, 8997, None, 800)
    assert (last.output, last.output_est, last.completed, last.hints) == (None, 41, True, Hints(priority=2, osl=64))
    assert calls[0].tools == (ToolUse("Task", 4_000_000_000, 5_950_000_000, 500, False, "a-2"),)
