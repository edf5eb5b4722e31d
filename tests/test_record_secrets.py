"""Nothing that could tell who, where or what is written by the recorder: it is planted everywhere and searched for."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import pyarrow.parquet as pq
import pytest
from dialects import DIALECTS, PATHS, Result, Said, Tokens, Use, assistant, request, user
from recording import Asked, Reply, recording, refuses, says, upstream

from keepwarm.traces.store import read_calls

TOOL = "mcp__acme_payroll__query"
HEADERS = {
    "authorization": "Bearer sk-proj-quokkaBearer0001",
    "x-api-key": "sk-ant-api03-quokkaKey0002",
    "cookie": "sid=quokkaCookie0003; theme=dark",
    "user-agent": "claude-cli/2.1.197 (external, quokkaAgent0004)",
    "x-claude-code-session-id": "5e551000-quokka-session-0005",
    "x-claude-code-agent-id": "aquokka0agent0006",
    "x-claude-code-parent-agent-id": "aquokka0parent0007",
    "session-id": "quokka-codex-session-0008",
    "thread-id": "quokka-codex-thread-0009",
    "x-codex-turn-metadata": json.dumps({"cwd": "/home/quokka/ledger0010", "agent_name": "quokkaName0011"}),
    "x-session-id": "quokka-opencode-0012",
    "x-quokka-header-0013": "anything",
    "openai-organization": "org-quokka0014",
}
USER_ID = {"device_id": "quokkaDevice0020", "account_uuid": "acc0-quokka-0021", "session_id": "quokkaSession0022"}
FIELDS: dict[str, Any] = {
    "model": "arn:aws:bedrock:eu-quokka-1:123456789012:application-inference-profile/quokkaprofile0023",
    "metadata": {"user_id": json.dumps(USER_ID), "email": "jane.quokka0024@example.org"},
    "prompt_cache_key": "quokka-cache-key-0025",
    "user": "user-quokka-0026",
    "nvext": {"agent_hints": {"priority": "quokkaPriority0027"}, "cache_control": {"ttl": "quokkaTtl0028"}},
    "quokka_field_0029": "quokkaValue0030",
}
QUERY = "?beta=true&key=quokkaQuery0031"
PREFIX = "/quokka-tenant-0032/v9"
TEXT = {
    "system": "Working directory: /home/quokka/acme-ledger0040. Mail jane@quokka0041.example.",
    "user": "My key is sk-ant-quokkaPrompt0042, <task-notification><task-id>quokkatask0043</task-id>",
    "given": "SELECT iban FROM staff0044 WHERE name = 'quokkaName0045'",
    "result": "DE89370400440532013000 quokkaResult0046",
    "agent": "Look through /srv/quokka/vault0047",
}
ANSWERED = {
    "id": "msg_quokkaAnswer0050",
    "use": "toolu_quokkaUse0051",
    "text": "The answer is quokkaSpoken0052.",
    "stop": "quokka_stop_secret",
    "type": "quokka-agent-type-0053",
    "miss": "quokka_miss_secret",
    "cookie": "srv=quokkaServed0054",
    "trailer": "quokkaTrailer0055",
    "host": "ip-10-20-30-40.quokka-internal0056.example",
    "kind": "quokka_error_kind",
}
TOLD = (
    "acme",
    "payroll",
    "123456789012",
    "eu-quokka-1",
    "inference-profile",
    "jane",
    "DE89370400440532013000",
    "staff0044",
)
"""Parts of what was planted that would tell something by themselves. Everything else has the word in it."""
WORD = "quokka"


def forms(secret: str) -> set[bytes]:
    """What a secret may look like on a disk: as it is, coded, in base64 at any offset, or hashed without salt."""
    raw = secret.encode()
    packed = {base64.b64encode(b"\0" * at + raw)[4 if at else 0 : -4] for at in range(3)}
    told = {raw, raw.lower(), raw.upper(), raw[::-1], quote(secret, safe="").encode(), raw.hex().encode()}
    hashed = {hashlib.new(name, raw).hexdigest()[:16].encode() for name in ("md5", "sha1", "sha256", "blake2b")}
    short = hashlib.blake2b(raw, digest_size=8).hexdigest().encode()
    utf16 = raw.decode().encode("utf-16-le")
    return {form for form in told | packed | hashed | {short, utf16, raw.hex().upper().encode()} if len(form) > 3}


def leaves(value: Any) -> Iterator[str]:
    """All strings in what was planted, and what is inside those that are JSON."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, str):
        yield value
        if value.startswith("{"):
            yield from leaves(json.loads(value))


NAMED = [value for value in leaves(HEADERS | FIELDS | ANSWERED) if value != "anything"]
HIDDEN = {form for value in [*NAMED, TOOL, QUERY, PREFIX] for form in forms(value)}
HIDDEN |= {form for value in TEXT.values() for form in forms(value)}
HIDDEN |= {form for part in (*TOLD, WORD, WORD.title(), WORD.upper()) for form in forms(part)}


def found(data: bytes, sought: set[bytes] = HIDDEN) -> set[bytes]:
    """What of the sought is in some bytes."""
    return {form for form in sought if form in data}


class Passed(NamedTuple):
    """What went through: everything that the upstream was asked, and the client was answered."""

    asked: bytearray
    answered: bytearray


def said(dialect: str) -> Said:
    """An answer with secrets in all that it says."""
    query = Use(ANSWERED["use"], TOOL, {"sql": TEXT["given"]})
    spawn = Use(ANSWERED["use"] + "b", "Agent", {"prompt": TEXT["agent"], "subagent_type": ANSWERED["type"]})
    return Said((ANSWERED["text"], query, spawn), Tokens(5000, 70, 0, 0), ANSWERED["stop"], ANSWERED["id"])


def planted(dialect: str, *, stream: bool) -> dict[str, Any]:
    """A request with secrets in all that it holds."""
    use = Use("toolu_quokka0060", TOOL, {"sql": TEXT["given"]})
    turns = [user(TEXT["user"]), assistant(use, ANSWERED["text"]), user(Result(use.id, TEXT["result"]))]
    return request(dialect, turns, system=TEXT["system"], tools=("Bash", TOOL), stream=stream, **FIELDS)


def answer(asked: Asked) -> Reply:
    """The upstream: an error where asked for, else an answer in the dialect of the path."""
    path = asked.path.partition("?")[0]
    dialect = next((name for name, end in PATHS.items() if path.endswith(end.removeprefix("/v1"))), None)
    headers = {"set-cookie": ANSWERED["cookie"], "request-id": "req_quokka0061", "x-served-by": ANSWERED["host"]}
    if dialect is None or "x-fail" in asked.headers:
        reply = refuses(int(asked.headers.get("x-fail", 200)), ANSWERED["kind"], f"upstream {ANSWERED['host']} failed")
    else:
        reply = says(dialect, said(dialect), stream="x-stream" in asked.headers, zipped="x-zip" in asked.headers)
        if "x-cut" in asked.headers:
            reply = reply._replace(pieces=[*reply.pieces][:3], cut=True)
    miss = json.dumps({"cache_miss_reason": {"type": ANSWERED["miss"]}}).encode()
    pieces = [piece.replace(b'"stop_reason"', b'"diagnostics": %b, "stop_reason"' % miss, 1) for piece in reply.pieces]
    return reply._replace(pieces=pieces, headers=reply.headers | headers, trailers={"x-sum": ANSWERED["trailer"]})


def talk(client: httpx.Client, passed: Passed) -> None:
    """Ask everything: all dialects, streamed or not, packed or not, failing, cut, malformed, large, and unrecorded."""

    def post(path: str, body: bytes, **headers: str) -> None:
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with client.stream("POST", path + QUERY, content=body, headers=HEADERS | more) as response:
                for name, value in response.headers.items():
                    passed.answered.extend(f"{name}: {value}\n".encode())
                for piece in response.iter_bytes():
                    passed.answered.extend(piece)
        except httpx.RemoteProtocolError:
            assert "x-cut" in more

    for dialect in DIALECTS:
        path = PATHS[dialect]
        for stream in (False, True):
            body, how = json.dumps(planted(dialect, stream=stream)).encode(), {"x_stream": "1"} if stream else {}
            post(path, body, **how)
            post(path, gzip.compress(body), content_encoding="gzip", x_zip="1", **how)
        post(path, body, x_cut="1", x_stream="1")
        for status in (400, 401, 429, 500, 529):
            post(path, body, x_fail=str(status))
        post(path, body[:-40])
        post(path, json.dumps({"messages": TEXT["user"], "input": {"a": TEXT["user"]}}).encode())
        post(path, json.dumps(planted(dialect, stream=False) | {"pad": "x" * 600_000}).encode())
    post("/v1/messages/count_tokens", body)
    post("/v1/files/quokka0062", body)
    passed.answered.extend(client.get(f"/v1/models/{FIELDS['model']}{QUERY}", headers=HEADERS).content)


@contextmanager
def recorder(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, Passed]]:
    """``keepwarm record`` as a process that can write only inside a folder, with a umask that hides nothing."""
    passed = Passed(bytearray(), bytearray())

    def script(asked: Asked) -> Reply:
        headers = "".join(f"{name}: {value}\n" for name, value in asked.headers.items())
        body = gzip.decompress(asked.body) if asked.headers.get("content-encoding") == "gzip" else asked.body
        passed.asked.extend(f"{asked.path}\n{headers}\n".encode() + body)
        return answer(asked)

    for name in ("home", "tmp", "out"):
        (folder / name).mkdir(exist_ok=True)
    env = os.environ | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    with upstream(script) as url, (folder / "stderr").open("w+") as errors:
        command = [sys.executable, "-m", "keepwarm.harness.cli", "record", "-o", "out/t.parquet", *options]
        command += ["--upstream", url + PREFIX]
        with subprocess.Popen(command, cwd=folder, env=env, umask=0, stderr=errors, text=True) as process:
            base = listening(folder / "stderr", process)
            try:
                with httpx.Client(base_url=base, trust_env=False, timeout=20) as client:
                    yield process, client, passed
            finally:
                process.kill()


def listening(errors: Path, process: subprocess.Popen[str]) -> str:
    """The URL that a recorder says it listens at."""
    while process.poll() is None:
        for line in errors.read_text().splitlines():
            if "listening on" in line:
                return line.rsplit(" ", 1)[-1]
    raise AssertionError(errors.read_text())


def written(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, its name and content; of Parquet also all that is packed in it."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in files if name.endswith(".parquet")]:
        with pq.ParquetFile(folder / name) as file:
            files[name + " metadata"] = repr((file.metadata, file.schema_arrow, file.schema_arrow.metadata)).encode()
            files[name + " values"] = repr(file.read().to_pylist()).encode()
    return {name: name.encode() + b"\n" + data for name, data in files.items()}


def modes(folder: Path) -> dict[str, int]:
    """The permissions of what lies in the output's place."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder / "out").iterdir()}


def interrupted(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def killed(process: subprocess.Popen[str]) -> None:
    """kill -9, and the trace made afterwards."""
    process.kill()
    process.wait(30)


def test_the_search_finds_what_it_looks_for() -> None:
    """Each form of a secret is found in bytes that hold it; in those that do not, nothing is."""
    for secret in (HEADERS["x-api-key"], WORD, "123456789012"):
        raw = secret.encode()
        for data in (raw, raw.hex().encode(), *(base64.b64encode(b"-" * at + raw + b"----") for at in range(3))):
            assert found(b"... " + data + b" ..."), data
        assert found(hashlib.sha256(raw).hexdigest().encode())
    assert not found(b"tool:0123456789abcdef claude-opus-4-8 overloaded")


@pytest.mark.parametrize("end", [interrupted, killed], ids=["stopped", "kill -9"])
def test_nothing_secret_is_written(end: Callable[[subprocess.Popen[str]], None], tmp_path: Path) -> None:
    """Neither while it runs, nor when it was killed, nor in the trace, its metadata, stderr or any other file; all is
    for the owner only, and the journal with the salt goes when the trace is made.
    """
    with recorder(tmp_path) as (process, client, passed):
        talk(client, passed)
        assert modes(tmp_path) == {"t.parquet.journal": 0o600}
        assert {name: found(data) for name, data in written(tmp_path).items() if found(data)} == {}
        end(process)
    assert {name: found(data) for name, data in written(tmp_path).items() if found(data)} == {}
    if end is killed:
        assert modes(tmp_path) == {"t.parquet.journal": 0o600}
        command = [sys.executable, "-m", "keepwarm.harness.cli", "record", "-o", str(tmp_path / "out/t.parquet")]
        done = subprocess.run(command, capture_output=True, check=True, umask=0)
        assert not found(done.stdout + done.stderr)
    files = written(tmp_path)
    assert {name: found(data) for name, data in files.items() if found(data)} == {}
    assert modes(tmp_path) == {"t.parquet": 0o600}
    assert set(files) == {"stderr", *(f"out/t.parquet{part}" for part in ("", " metadata", " values"))}
    went = passed.asked.decode("utf-8", "replace")
    missing = [one for one in leaves(HEADERS | FIELDS | TEXT) if one not in went and json.dumps(one)[1:-1] not in went]
    assert missing == [TEXT["agent"]]
    assert TEXT["agent"].encode() in passed.answered
    assert [value for value in ANSWERED.values() if value.encode() not in passed.answered] == [ANSWERED["trailer"]]
    calls = list(read_calls(str(tmp_path / "out/t.parquet")))
    assert {call.dialect for call in calls} == set(DIALECTS)
    tries = [tried.error for call in calls for tried in (call, *call.attempts)]
    assert set(tries) == {None, "bad_request", "auth", "rate_limit", "other", "overloaded", "reset"}
    assert {tool.name[:4] for call in calls for tool in call.tools} == {"mcp:", "Agen"}
    assert {call.stop_reason for call in calls if call.error is None} == {"other"}


def test_text_is_kept_in_its_column_only(tmp_path: Path) -> None:
    """With --keep-text the prompt's words are in segment.text and nowhere else; keys, headers, ids and answers that
    nobody sent back are nowhere. A trace of the same traffic under another salt shares no identity with it.
    """
    for name, options in (("kept", ["--keep-text"]), ("bare", [])):
        (tmp_path / name).mkdir()
        with recorder(tmp_path / name, *options) as (process, client, passed):
            talk(client, passed)
            interrupted(process)
    kept = tmp_path / "kept/out/t.parquet"
    calls = list(read_calls(str(kept)))
    texts = "\n".join(segment.text or "" for call in calls for segment in call.append)
    assert [words for words in TEXT.values() if words not in texts] == [TEXT["agent"]]
    assert TOOL in texts
    assert "\0" not in texts
    assert all(segment.text for call in calls for segment in call.append if segment.kind in ("tools", "tool_result"))
    named = [value for value in NAMED if value != ANSWERED["text"]]
    never = {form for value in [*named, QUERY, PREFIX, TEXT["agent"], "toolu_quokka0060"] for form in forms(value)}
    for name, data in written(tmp_path / "kept").items():
        assert found(data, never) == set(), name
    bare = [call._replace(append=tuple(one._replace(text=None) for one in call.append)) for call in calls]
    assert found(repr(bare).encode()) == set()
    assert found((tmp_path / "kept/stderr").read_bytes()) == set()
    other = list(read_calls(str(tmp_path / "bare/out/t.parquet")))
    assert len(other) == len(calls)
    assert not identities(calls) & identities(other)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("claude-opus-4-8", "claude-opus-4-8"),
        ("eu.anthropic.claude-opus-4-8-v1:0", "claude-opus-4-8"),
        ("projects/quokka/locations/eu/models/claude-opus-4-8@20260101", "claude-opus-4-8-20260101"),
        ("gpt-5.1", "gpt-5.1"),
        ("quokka/secret-model", None),
        ("ft:gpt-4o:quokka-corp::abc123", None),
        ("jane@quokka.example", None),
        ("/home/quokka/weights.gguf", None),
    ],
)
def test_a_model_is_told_by_its_bare_id_or_not_at_all(sent: str, told: str | None, tmp_path: Path) -> None:
    """What stands around a model's id is left out; what is left is a pseudonym where it could tell whose it is."""
    with recording(tmp_path, lambda _: says("chat", Said())) as made:
        made.ask("chat", request("chat", [user("Hello.")], model=sent))
    model = made.call.model or ""
    assert model == told if told else model.startswith("model:") and not found(model.encode())


def identities(calls: list[Any]) -> set[Any]:
    """All names and hashes in a trace."""
    names = {name for call in calls for name in (call.session, call.agent, call.call, call.model)}
    return (names | {segment.hash for call in calls for segment in call.append}) - {None}
