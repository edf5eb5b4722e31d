"""Claude Code's transcripts with damaged lines, at odd places, and full of what nobody may keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transcripts import SALT, Transcript, calls_of, stamp, take, task, text, tool, usage

from keepwarm.harness.cli import cli, main
from keepwarm.traces.claude_code import import_claude_code
from keepwarm.traces.errors import InputError
from keepwarm.traces.store import read_calls

MAIN, SUB = "p/s1.jsonl", "p/s1/subagents/agent-abc1234.jsonl"


def whole() -> dict[str, Transcript]:
    """A session with most kinds of line, and its sub-agent's file; seven calls, none damaged."""
    t, sub = Transcript(entrypoint="cli"), Transcript(agent="abc1234", entrypoint="cli")
    t.chainless("summary", summary="about", leafUuid="u")
    t.user(0, [text("look"), {"type": "image", "source": {"type": "base64", "data": "AAAA"}}])
    t.answer(5, "m1", text("I shall"), task("t1", "find it"), used=usage(w5=997, out=90), stop="tool_use")
    sub.user(5.1, "find it")
    sub.answer(8, "a1", tool("ta", "Read", path="x"), used=usage(w5=497))
    sub.result(9, "ta", [text("found")], is_error=False)
    sub.answer(12, "a2", used=usage(read=497, w1=300))
    t.finished(12.5, "t1", "abc1234")
    t.relay(sub, "abc1234", "t1")
    told = {"diagnostics": {"cache_miss_reason": {"type": "tools_changed"}}}
    t.answer(15, "m2", tool("t2", "TaskOutput"), used=usage(read=997, w5=1000), message=told)
    t.result(16, "t2", "all", toolUseResult={"task": {"task_id": "abc1234"}})
    t.api_error(17)
    t.answer(18, "m3", used=usage(read=1997, w5=500))
    t.compact(20)
    t.answer(25, "m4", used=usage(w5=1500))
    t.system(26, "microcompact_boundary", microcompactMetadata={"compactedToolIds": ["t2"]})
    t.user(27)
    t.answer(30, "m5", used=usage(w5=1400), stop="end_turn")
    t.system(31, "turn_duration", durationMs=9)
    return {MAIN: t, SUB: sub}


DAMAGED = {
    "no JSON": b'{"type":"assistant","message":\n',
    "no JSON at all": b"\xff\xfe\x00garbage\n",
    "a list": b"[1,2]\n",
    "a string": b'"assistant"\n',
    "a number": b"3\n",
    "null": b"null\n",
    "no message": orjson.dumps({"type": "assistant", "uuid": "u", "timestamp": stamp(50)}) + b"\n",
    "no time": orjson.dumps({"type": "user", "uuid": "u", "message": {"content": "x"}}) + b"\n",
    "a time that is none": orjson.dumps({"type": "user", "message": {"content": "x"}, "timestamp": "soon"}) + b"\n",
    "a time as a number": orjson.dumps({"type": "user", "message": {"content": "x"}, "timestamp": 5}) + b"\n",
    "content as a number": orjson.dumps({"type": "user", "message": {"content": 7}, "timestamp": stamp(50)}) + b"\n",
    "no agent": orjson.dumps({"type": "progress", "data": {"type": "agent_progress"}, "timestamp": stamp(50)}) + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_listed_and_passed_over(damage: str, tmp_path: Path) -> None:
    """It is told by its file and line, and the calls are those of the file without it."""
    files = whole()
    _, sound = take(tmp_path / "sound", whole())
    files[MAIN].lines.insert(4, DAMAGED[damage])
    files[MAIN].lines.append(DAMAGED[damage])
    done, calls = take(tmp_path / "damaged", files)
    assert done.damaged == [(MAIN, 5), (MAIN, len(files[MAIN].lines))]
    assert len(calls) == 7
    assert calls == sound


def test_a_last_line_cut_short_is_damaged(tmp_path: Path) -> None:
    """A file still being written ends in half a line: that line alone is passed over."""
    files = whole()
    lines = files[MAIN].lines
    lines[-2] = orjson.dumps(lines[-2])[:-40]
    del lines[-1]
    done, calls = take(tmp_path, files)
    assert done.damaged == [(MAIN, len(lines))]
    assert len(calls) == 6


def test_a_whole_last_line_without_an_end_is_sound(tmp_path: Path) -> None:
    """The last line needs no line end, empty lines are none, and a carriage return before the end does no harm."""
    files = whole()
    lines = files[MAIN].lines
    lines[3:4] = [b"\n", orjson.dumps(lines[3]) + b"\r\n"]
    lines[-1] = orjson.dumps(lines[-1])
    done, calls = take(tmp_path, files)
    assert (done.damaged, len(calls)) == ([], 7)


@pytest.mark.parametrize("field", ["message", "timestamp", "uuid", "parentUuid", "sessionId", "version", "requestId"])
def test_a_missing_field_costs_at_most_its_line(field: str, tmp_path: Path) -> None:
    """Every field of a line in turn is left out: the line may be damaged, the import goes on with the others."""
    for number in range(len(whole()[MAIN].lines)):
        files = whole()
        line = files[MAIN].lines[number]
        if isinstance(line, dict) and line.pop(field, None) is not None:
            done, calls = take(tmp_path / str(number), files)
            assert done.damaged in ([], [(MAIN, number + 1)])
            assert len(calls) in (6, 7)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


SPOTS = [
    (name, number, place)
    for name, transcript in whole().items()
    for number, line in enumerate(transcript.lines)
    for place in places(line)
]
JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, 5, -5, 1.5, 2**31, 2**62, 2**64 - 1, 1e300, "", "x", "\x00", [], [[]], ["x"], {}, {"x": {}}]
)


def replaced(line: Any, place: tuple[Any, ...], junk: Any) -> None:
    """Put something else at a place of a line."""
    for key in place[:-1]:
        line = line[key]
    line[place[-1]] = junk


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SPOTS), JUNK)
def test_a_value_of_a_wrong_type_anywhere_breaks_no_import(spot: tuple[str, int, tuple[Any, ...]], junk: Any) -> None:
    """Whatever stands in one field, the import ends, lists no other line, and its prompts add up."""
    name, number, place = spot
    files = whole()
    replaced(files[name].lines[number], place, junk)
    with TemporaryDirectory() as folder:
        done, calls = take(Path(folder), files, informed=True)
    assert done.damaged in ([], [(name, number + 1)])
    assert all(call.prompt in (None, call.prompt_tokens) for call in calls)
    assert all(min(call.uncached or 0, call.cache_read or 0, call.output or 0) >= 0 for call in calls)


def test_strict_ends_at_the_first_damaged_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2, one line that names file and line, and no trace is left."""
    files = whole()
    files[MAIN].lines.insert(4, b"{\n")
    for name, transcript in files.items():
        transcript.write(tmp_path / "projects" / name)
    out = tmp_path / "t.parquet"
    with pytest.raises(SystemExit) as end:
        main(["import", "claude-code", str(tmp_path / "projects"), "-o", str(out), "--strict"])
    told = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(told) == 1
    assert MAIN in told[0]
    assert "line 5" in told[0]
    assert not out.exists()


def test_without_strict_the_command_lists_damaged_lines(tmp_path: Path) -> None:
    """The trace is written; how many lines were damaged, and where, stands on stderr, or in the JSON."""
    files = whole()
    files[SUB].lines.append(b"[]\n")
    for name, transcript in files.items():
        transcript.write(tmp_path / "projects" / name)
    arguments = ["import", "claude-code", str(tmp_path / "projects"), "-o", str(tmp_path / "t.parquet")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "1 damaged line" in done.stderr
    assert f"{SUB}: line {len(files[SUB].lines)}" in done.stderr
    told = orjson.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert told["damaged"] == [[SUB, len(files[SUB].lines)]]
    assert told["calls"] == 7


@pytest.mark.parametrize("what", ["missing", "empty folder", "no transcript", "a transcript's name but a folder"])
def test_a_path_without_transcripts(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and one line that names the path."""
    path = tmp_path / "projects"
    if what != "missing":
        path.mkdir()
    if what == "no transcript":
        (path / "notes.txt").write_text("x")
    if what == "a transcript's name but a folder":
        (path / "s1.jsonl").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["import", "claude-code", str(path), "-o", str(tmp_path / "t.parquet")])
    told = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(told) == 1
    assert str(path) in told[0]
    assert not (tmp_path / "t.parquet").exists()


def test_transcripts_without_a_call_are_no_input(tmp_path: Path) -> None:
    """Files without a message are no sessions; where there is nothing else no trace is made, beside others they change
    nothing.
    """
    with pytest.raises(InputError, match="holds no call"):
        take(tmp_path / "empty", {MAIN: Transcript()})
    assert not list((tmp_path / "empty").rglob("*.parquet*"))
    only = Transcript("s2")
    only.chainless("summary", summary="about", leafUuid="u")
    files = {**whole(), "p/s2.jsonl": only, "p/s3.jsonl": Transcript("s3"), "q/agent-1234567.jsonl": Transcript("s4")}
    done, calls = take(tmp_path / "beside", files)
    assert (done.sessions, done.calls, len(calls)) == (1, 7, 7)


def test_a_missing_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a path the user's own transcripts are read; where there are none, one line says so."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        main(["import", "claude-code", "-o", str(tmp_path / "t.parquet")])
    assert (end.value.code, len(capsys.readouterr().err.strip().splitlines())) == (2, 1)
    whole()[MAIN].write(tmp_path / ".claude" / "projects" / MAIN)
    assert CliRunner().invoke(cli, ["import", "claude-code", "-o", str(tmp_path / "t.parquet")]).exit_code == 0
    assert len(list(read_calls(str(tmp_path / "t.parquet")))) == 7


# --- identity


def wire(*, marks: bool) -> Transcript:
    """One conversation: as plain as can be, or with cache marks, other key orders, lists for strings and other ids."""
    t, use = Transcript(), "toolu_B" if marks else "toolu_A"
    mark = {"cache_control": {"type": "ephemeral"}} if marks else {}
    image = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
    t.user(0, [{**mark, "text": "hello there", "type": "text"}] if marks else "hello there")
    thinking = {"type": "thinking", "thinking": "hm", "signature": "sig"}
    given = {"b": [1, {"d": 1, "c": 2}], "a": "x"} if marks else {"a": "x", "b": [1, {"c": 2, "d": 1}]}
    asked = {"name": "Bash", "input": given, "type": "tool_use", "id": use, **mark}
    if marks:
        thinking, asked = dict(reversed(thinking.items())), asked | {"caller": {"type": "direct"}}
    t.answer(5, "m1", thinking, asked, used=usage(w5=997))
    t.result(6, use, [text("result") | mark] if marks else "result")
    t.user(7, [text("and"), dict(reversed(image.items())) | mark if marks else image])
    t.answer(9, "m2", used=usage(read=997, w5=3000))
    t.user(10, "more")
    t.answer(12, "m3", used=usage(read=3997, w5=100))
    return t


def identities(calls: list[Any]) -> list[tuple[int, int]]:
    """Hash and tokens of every segment of every call."""
    return [(segment.hash, segment.tokens) for call in calls for segment in call.append]


def test_what_no_model_sees_changes_no_identity(tmp_path: Path) -> None:
    """cache_control marks, key order, string or list, and tool ids: the same segments."""
    plain = calls_of(tmp_path / "plain", {MAIN: wire(marks=False)})
    marked = calls_of(tmp_path / "marked", {MAIN: wire(marks=True)})
    assert identities(plain) == identities(marked)
    assert len(set(identities(plain))) == len(identities(plain)) == 10


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hello there", "hello thera"),
        ('"name":"Bash"', '"name":"Bush"'),
        ('"a":"x"', '"a":"y"'),
        ('"c":2', '"c":3'),
        ('"content":"result"', '"content":"resolt"'),
        ("AAAA", "AAAB"),
        ('"thinking":"hm"', '"thinking":"ho"'),
    ],
)
def test_what_a_model_sees_changes_one_identity(old: str, new: str, tmp_path: Path) -> None:
    """Another text, tool, input, result, picture or thought of the same length: that one segment is another."""
    t = wire(marks=False)
    plain = identities(calls_of(tmp_path / "plain", {MAIN: t}))
    changed = b"".join(orjson.dumps(line) + b"\n" for line in t.lines).decode()
    assert old in changed
    t.lines = [changed.replace(old, new).encode()]
    other = identities(calls_of(tmp_path / "other", {MAIN: t}))
    assert sum(a != b for a, b in zip(plain, other, strict=True)) == 1


def test_one_salt_one_trace(tmp_path: Path) -> None:
    """The same salt gives the same digest again; another salt shares no pseudonym and no identity with it."""
    one, again = take(tmp_path / "1", whole()), take(tmp_path / "2", whole())
    other = take(tmp_path / "3", whole(), salt=b"another salt of thirty-two bytes")
    assert one[0].digest == again[0].digest != other[0].digest
    for name in ("session", "agent", "call"):
        assert not {getattr(call, name) for call in one[1]} & {getattr(call, name) for call in other[1]}
    assert not {hash_ for hash_, _ in identities(one[1])} & {hash_ for hash_, _ in identities(other[1])}
    assert [size for _, size in identities(one[1])] == [size for _, size in identities(other[1])]


def test_a_salt_file_makes_imports_agree(tmp_path: Path) -> None:
    """--salt-file is made for its owner alone and used again; without it every import has its own salt."""
    for name, transcript in whole().items():
        transcript.write(tmp_path / "projects" / name)

    def digest(*more: str) -> str:
        arguments = ["import", "claude-code", str(tmp_path / "projects"), "-o", str(tmp_path / "t"), "--json", *more]
        found: str = orjson.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)["digest"]
        return found

    salted = ("--salt-file", str(tmp_path / "salt"))
    assert digest(*salted) == digest(*salted)
    assert (tmp_path / "salt").stat().st_mode & 0o777 == 0o600
    assert digest() != digest()


def test_a_salt_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of another length is refused in one line, and left alone."""
    whole()[MAIN].write(tmp_path / "s1.jsonl")
    (tmp_path / "salt").write_bytes(b"short")
    with pytest.raises(SystemExit) as end:
        main(["import", "claude-code", str(tmp_path), "-o", str(tmp_path / "t"), "--salt-file", str(tmp_path / "salt")])
    assert (end.value.code, len(capsys.readouterr().err.strip().splitlines())) == (2, 1)
    assert (tmp_path / "salt").read_bytes() == b"short"


# --- privacy

SECRETS = (
    "sk-ant-api03-PLANTED",
    "jane.doe@acme.example",
    "/home/jdoe/payroll",
    "feature/secret-merger",
    "5d41402a-bc4b-2a76-b971-9d911017c592",
    "acme_payroll",
    "acme-auditor",
    "req_PLANTED",
    "msg_PLANTED",
    "toolu_PLANTED",
    "fedcba987654321",
    "123456789012",
    "org-PLANTED",
    "acme-host.internal",
)


def planted() -> dict[str, Transcript]:
    """A session with something secret at every place that can hold it."""
    session, agent = "5d41402a-bc4b-2a76-b971-9d911017c592", "fedcba987654321"
    about = {"cwd": "/home/jdoe/payroll", "gitBranch": "feature/secret-merger", "slug": "acme-auditor-slug"}
    arn = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.anthropic.claude-opus-4-6-v1"
    t, sub = Transcript(session, **about), Transcript(session, agent=agent, **about)
    t.chainless("summary", summary="sk-ant-api03-PLANTED", leafUuid="x")
    t.user(0, "my key is sk-ant-api03-PLANTED, write to jane.doe@acme.example")
    query = tool("toolu_PLANTED1", "mcp__acme_payroll__query", path="/home/jdoe/payroll")
    own = task("toolu_PLANTED2", "ask jane.doe@acme.example", "acme-auditor")
    t.answer(5, "msg_PLANTED1", query, own, used=usage(w5=997), requestId="req_PLANTED1", model=arn)
    t.result(6, "toolu_PLANTED1", "sk-ant-api03-PLANTED", toolUseResult={"stdout": "jane.doe@acme.example"})
    sub.user(5.5, "ask jane.doe@acme.example")
    sub.answer(8, "msg_PLANTED2", used=usage(w5=500), requestId="req_PLANTED2")
    t.finished(9, "toolu_PLANTED2", agent, agentType="acme-auditor")
    error = {"status": 529, "headers": {"anthropic-organization-id": "org-PLANTED", "host": "acme-host.internal"}}
    t.system(10, "api_error", error=error, retryAttempt=1)
    miss = {"diagnostics": {"cache_miss_reason": {"type": "acme_payroll changed"}}}
    t.answer(12, "msg_PLANTED3", used=usage(read=997, w5=900), message=miss)
    folder = "-home-jdoe-payroll"
    return {f"{folder}/{session}.jsonl": t, f"{folder}/{session}/subagents/agent-{agent}.jsonl": sub}


def test_nothing_secret_is_in_the_trace(tmp_path: Path) -> None:
    """Keys, addresses, paths, branches, ids, custom tools' and agents' names: in no byte, no value, no metadata."""
    _, calls = take(tmp_path, planted())
    path = tmp_path / "trace.parquet"
    file = pq.ParquetFile(path)
    told = (repr(file.read().to_pylist()) + repr(file.metadata.metadata) + repr(file.schema_arrow)).encode()
    for secret in (*SECRETS, "-home-jdoe", str(tmp_path)):
        assert secret.encode() not in told
        assert secret.encode() not in path.read_bytes()
    assert len(calls) == 3
    assert [use.name.partition(":")[0] for use in calls[0].tools] == ["mcp", "Task"]
    assert {call.agent_type for call in calls if call.role == "subagent"} != {None}


def test_a_cloud_model_is_known_by_its_bare_id(tmp_path: Path) -> None:
    """An inference profile's address holds an account number: only the model's own id is kept."""
    _, calls = take(tmp_path, planted())
    assert calls[0].model is not None
    assert "claude-opus-4-6" in calls[0].model
    assert "arn:" not in calls[0].model


def test_the_same_custom_name_has_one_pseudonym(tmp_path: Path) -> None:
    """A tool outside the shipped list is told apart from others, not named; the list's names are kept."""
    t = Transcript()
    t.user(0)
    names = ("mcp__acme__a", "mcp__acme__a", "mcp__acme__b", "AcmeTool", "Bash")
    t.answer(5, "m1", *(tool(f"t{n}", name) for n, name in enumerate(names)), used=usage(w5=997))
    one, same, other, custom, known = (use.name for use in calls_of(tmp_path, {MAIN: t})[0].tools)
    assert one == same != other
    assert [name.partition(":")[0] for name in (one, other, custom)] == ["mcp", "mcp", "tool"]
    assert known == "Bash"


def test_a_trace_beside_its_transcripts_is_not_read_as_one(tmp_path: Path) -> None:
    """An import into the folder that it reads does not change what is imported the next time."""
    for name, transcript in whole().items():
        transcript.write(tmp_path / name)
    counts = [
        import_claude_code(tmp_path, str(tmp_path / "p" / "t.parquet"), version="0", salt=SALT).files for _ in range(2)
    ]
    assert counts == [2, 2]


@pytest.mark.parametrize("link", ["s2.jsonl", "agent-1234567.jsonl"])
@pytest.mark.parametrize("given", [".", MAIN])
def test_a_transcript_that_cannot_be_read(
    link: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dangling link among the transcripts is told in one line as bad input, or is none of the file's asked for."""
    whole()[MAIN].write(tmp_path / MAIN)
    (tmp_path / "p" / link).symlink_to(tmp_path / "gone")
    with pytest.raises(SystemExit) as end:
        main(["import", "claude-code", str(tmp_path / given), "-o", str(tmp_path / "t")])
    told = capsys.readouterr().err.strip().splitlines()
    if given == MAIN and end.value.code == 0:
        assert told == []
    else:
        assert (end.value.code, len(told)) == (2, 1)
        assert link in told[0]
