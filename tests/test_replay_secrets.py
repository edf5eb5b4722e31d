"""A key that is planted in environment, file and headers is in nothing that replay and report write or say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from replays import about, write
from serving import running
from templated import Templated
from test_record_secrets import forms
from test_replaying import agent

KEY, FILED, TENANT = "sk-ant-wombatKey000000001", "sk-proj-wombatFile00000002", "Basic d29tYmF0LXRlbmFudDAwMDAwMDAwMw=="
SOUGHT = {form for secret in (KEY, FILED, TENANT, TENANT.split()[1]) for form in forms(secret)}
SOUGHT |= {form for form in forms("wombat") if len(form) > 5}
CRASH = """
import sys
from keepwarm.harness.cli import main
from keepwarm.replayers import hearing
def crash(*arguments):
    raise RuntimeError("planted")
if sys.argv.pop(1) == "crash":
    hearing.account = crash
main(sys.argv[1:])
"""


class Echo(Templated):
    """A server that says what it was sent wherever it can: in errors, in usage, as the reason it stopped for."""

    def answer(self, method: str, path: str, headers: Mapping[str, str], data: bytes) -> tuple[int, Any]:
        """The same answer with the headers in it."""
        status, body = super().answer(method, path, headers, data)
        said = " ".join(f"{name}: {value}" for name, value in headers.items())
        if "error" in body:
            body["error"] = {"type": said, "code": said, "message": f"{body['error']['message']}\n{said}"}
        elif "usage" in body:
            body["usage"] |= {"seen": said, "billed_to": {"key": headers.get("authorization")}}
            body |= {"id": said, "system_fingerprint": said}
            for choice in body.get("choices", ()):
                choice["finish_reason"] = said
            if "stop_reason" in body:
                body["stop_reason"] = said
        return status, body


def keepwarm(tmp_path: Path, *arguments: str, how: str = "run") -> tuple[int, bytes]:
    """Exit code and all that a command says, in a process that has the key in its environment."""
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    environment = {**os.environ, "WOMBAT_KEY": KEY, "OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY, "TENANT": TENANT}
    command = [sys.executable, "-X", "dev", str(script), how, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, cwd=tmp_path, timeout=300)
    return done.returncode, done.stdout + done.stderr


def found(said: bytes, *places: Path) -> set[tuple[str, bytes]]:
    """What of the sought was said, or is in a file of these places, by where it is."""
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    told = {"said": said, **{file.name: file.read_bytes() for file in files}}
    for file in files:
        if file.suffix == ".parquet":  # which is compressed
            told[file.name] += repr(pq.read_table(file).to_pylist()).encode()
    return {(name, form) for name, data in told.items() for form in SOUGHT if form in data}


def keys(tmp_path: Path, how: str) -> list[str]:
    """The options that give a key in one of the ways, and a header."""
    file = tmp_path / "keys" / "file"
    file.parent.mkdir(exist_ok=True)
    file.write_text(FILED + "\n")
    given = {"environment": ["--key-env", "WOMBAT_KEY"], "file": ["--key-file", str(file)], "header": []}[how]
    return [*given, "--header", "X-Tenant=TENANT", *(["--header", "Authorization=WOMBAT_KEY"] * (how == "header"))]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """A session of three calls."""
    (tmp_path / "traces").mkdir()
    return write(tmp_path / "traces" / "t.parquet", agent())


@pytest.mark.parametrize("dialect", ["messages", "chat"])
@pytest.mark.parametrize("how", ["environment", "file", "header"])
def test_a_key_is_in_no_run_and_no_report(how: str, dialect: str, trace: str, tmp_path: Path) -> None:
    """Sent with every request, echoed in every answer, and nowhere in what is written and said."""
    server, run = Echo(), tmp_path / "run"
    with running(server) as url:
        options = ("--endpoint", url, "--dialect", dialect, "-o", str(run), *keys(tmp_path, how))
        code, said = keepwarm(tmp_path, "replay", trace, *options)
    assert code == 0, said
    sent = server.headers[-1]
    assert sent["x-tenant"] == TENANT
    assert (FILED if how == "file" else KEY) in sent["authorization"]
    for command in (["report", str(run)], ["report", str(run), "--json"]):
        code, more = keepwarm(tmp_path, *command)
        assert code == 0
        said += more
    assert len(list(run.iterdir())) >= 3
    assert found(said, run) == set()


def test_a_key_that_a_refusal_echoes_is_not_said(trace: str, tmp_path: Path) -> None:
    """Refused at once, and refused when preflight is over: the words of the server come without it."""
    run = tmp_path / "run"
    for refuses in (lambda body: (400, "no, not you"), lambda body: (401, "not you")):
        with running(Echo(refuses=refuses)) as url:
            options = ("--endpoint", url, "--dialect", "chat", "-o", str(run), *keys(tmp_path, "environment"))
            code, said = keepwarm(tmp_path, "replay", trace, *options)
            assert code == 2
            assert said.count(b"\n") == 1
            assert found(said) == set()
    assert b"not you" in said or b"refuses the API key" in said
    refused = Echo(refuses=lambda body: (400, "late"))
    with running(refused) as url:
        options = ("--endpoint", url, "--dialect", "chat", "-o", str(run), "--no-preflight", *keys(tmp_path, "file"))
        code, said = keepwarm(tmp_path, "replay", trace, *options)
    assert code == 3
    assert refused.asked
    code, more = keepwarm(tmp_path, "report", str(run))
    assert found(said + more, run) == set()


def test_a_key_is_in_no_traceback(trace: str, tmp_path: Path) -> None:
    """A fault of keepwarm's own in mid-run: the traceback and the run that is left do not have it."""
    run = tmp_path / "run"
    with running(Echo()) as url:
        options = (
            "--endpoint",
            url,
            "--dialect",
            "chat",
            "-o",
            str(run),
            "--no-preflight",
            *keys(tmp_path, "environment"),
        )
        code, said = keepwarm(tmp_path, "replay", trace, *options, "--no-preflight", how="crash")
    assert code not in (0, 2)
    assert b"planted" in said
    assert about(run)["interrupted"] is True
    assert found(said, run) == set()


def test_a_key_that_cannot_be_sent_is_not_said(trace: str, tmp_path: Path) -> None:
    """A key with a letter that no header takes, a URL with user, password and query: told without what they hold."""
    (tmp_path / "bad").write_text("wombat-sécret")
    code, said = keepwarm(tmp_path, "replay", trace, "--endpoint", "http://127.0.0.1:9", "--key-file", "bad")
    assert (code, said.count(b"\n")) == (2, 1)
    assert found(said) == set()
    for url in ("http://wombat:wombat@127.0.0.1:9/?key=wombat", "ftp://wombat:wombat@127.0.0.1"):
        code, said = keepwarm(tmp_path, "replay", trace, "--endpoint", url)
        assert (code, said.count(b"\n")) == (2, 1)
        assert found(said) == set()


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """A key in a file is found, in any of its forms."""
    (tmp_path / "run.json").write_text(f'{{"key": "{KEY}"}}')
    assert found(b"", tmp_path)
    assert found(TENANT.encode())
    assert not found(b"nothing")
