"""``keepwarm record`` as its user starts it: options, files, an agent behind it, TLS, a full disk, its end."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from recorders import answering, asked, closed, hear, recording
from wire import STREAM, asking, chunk, event, events, streamed

from keepwarm.harness.cli import main
from keepwarm.traces.records import RequestRecord, read_records
from keepwarm.traces.store import read_calls

pytestmark = pytest.mark.slow
MB = 1 << 20
CODEX = "session-id: s"
AGENT = """
import json, os, sys, urllib.request
told = {name: os.environ[name] for name in ("ANTHROPIC_BASE_URL", "OPENAI_BASE_URL")}
print(json.dumps(told), flush=True)
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
asked = urllib.request.Request(told["ANTHROPIC_BASE_URL"] + "/v1/messages", body, {"content-type": "application/json"})
assert b"message_stop" in urllib.request.urlopen(asked).read()
os.kill(os.getpid(), 15) if sys.argv[1] == "killed" else sys.exit(int(sys.argv[1]))
"""


def speak(sock: socket.socket) -> None:
    """An upstream that answers every call, each with an id of its own."""
    for number in count():
        if not asked(sock):
            return
        sock.sendall(streamed(f"msg_{sock.fileno()}_{number}"))


def talk(sock: socket.socket, *headers: str, text: str = "hi") -> bytes:
    """A call, and the whole of its answer."""
    sock.sendall(asking(*headers, text=text))
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        more = sock.recv(1 << 16)
        if not more:
            break
        got += more
    return got


def mode(path: Path) -> int:
    """Who may do what with a file."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--upstream", "ftp://a"], "expected an http or https URL"),
        (["--upstream", "a.test"], "expected an http or https URL"),
        (["--upstream", "prefix=http://a"], "expected a path that begins with /"),
        (["--upstream", "http://user:secret@a"], "credentials in a URL are not taken"),
        (["--upstream", "http://a:99999"], "Port out of range"),
        (["--upstream", "http://a", "--listen", "8080"], "expected HOST:PORT"),
        (["--upstream", "http://a", "--listen", "127.0.0.1:99999"], "expected HOST:PORT"),
        (["--upstream", "http://a", "--listen", "0.0.0.0:0"], "set --token-env"),
        (["--upstream", "http://a", "--listen", "[::]:0"], "set --token-env"),
        (["--upstream", "http://a", "--listen", "some.host:0"], "set --token-env"),
        (["--upstream", "http://a", "--token-env", "KEEPWARM_NOTHING"], "expected a token that fits in a URL"),
        (["--upstream", "http://a", "--ca-file", __file__], "expected certificates in PEM form"),
        (["--upstream", "http://a", "--run"], "--run needs a COMMAND"),
        (["--upstream", "http://a", "--run", "/nowhere/agent"], "cannot be run"),
        (["--upstream", "http://a", "--listen", "192.0.2.1:1", "--token-env", "KEEPWARM_TOKEN"], "cannot listen on"),
        (["--upstream", "http://a", "--token-env", "KEEPWARM_ODD"], "expected a token that fits in a URL"),
        (["--upstream", "http://a", "--upstream", "http://b"], "two take the same requests"),
        (["--upstream", "/x=http://a", "--upstream", "/y=http://b", "--run", "true"], "for ANTHROPIC_BASE_URL"),
        (["--upstream", "http://127.0.0.1:18999", "--listen", "127.0.0.1:18999"], "is this recorder itself"),
        ([], "--upstream is needed"),
    ],
)
def test_what_cannot_be_recorded_is_said_at_once(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2, a sentence, no secret in it, and nothing left behind."""
    monkeypatch.setenv("KEEPWARM_TOKEN", "t0ken")
    monkeypatch.setenv("KEEPWARM_ODD", "a/secret")
    with pytest.raises(SystemExit) as end:
        main(["record", "-o", str(tmp_path / "t.parquet"), *arguments])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert told in said
    assert "secret" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a recording was costs more than another name."""
    out = tmp_path / "t.parquet"
    out.write_bytes(b"mine")
    with pytest.raises(SystemExit) as end:
        main(["record", "-o", str(out), "--upstream", "http://a"])
    assert end.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize(("ending", "code"), [("0", 0), ("7", 7), ("killed", 128 + signal.SIGTERM)])
def test_an_agent_behind_it(tmp_path: Path, ending: str, code: int) -> None:
    """Its base URLs are the recorder's, whatever proxies its environment names; its exit code is passed on."""
    out = tmp_path / "made" / "t.parquet"
    out.parent.mkdir()
    proxies = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "example.test"}
    with answering(speak) as port:
        options = ["--upstream", f"http://127.0.0.1:{port}", "-o", str(out), "--run", sys.executable, "-c", AGENT]
        run = [sys.executable, "-m", "keepwarm.harness.cli", "record", *options, ending]
        done = subprocess.run(run, env=os.environ | proxies, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    told = json.loads(done.stdout)
    assert told["OPENAI_BASE_URL"] == told["ANTHROPIC_BASE_URL"] + "/v1"
    assert told["ANTHROPIC_BASE_URL"] in done.stderr
    assert len(list(read_calls(str(out)))) == 1
    assert mode(out) == 0o600
    assert [path.name for path in out.parent.iterdir()] == ["t.parquet"]


def test_an_agent_gets_the_token_in_its_base_url(tmp_path: Path) -> None:
    """On an address that asks for one."""
    out = tmp_path / "t.parquet"
    with answering(speak) as port:
        options = ["--upstream", f"http://127.0.0.1:{port}", "-o", str(out), "--token-env", "OURS", "--run"]
        run = [sys.executable, "-m", "keepwarm.harness.cli", "record", *options, sys.executable, "-c", AGENT, "0"]
        env = os.environ | {"OURS": "sesame"}
        done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["OPENAI_BASE_URL"].endswith("/sesame/v1")
    assert "sesame" not in done.stderr
    assert len(list(read_calls(str(out)))) == 1


def test_a_request_to_end_lets_answers_under_way_finish(tmp_path: Path) -> None:
    """The client gets its whole answer, and the trace has the call; the files are for the owner only."""
    out, salt = tmp_path / "t.parquet", tmp_path / "salt"

    def slowly(sock: socket.socket) -> None:
        asked(sock)
        sock.sendall(STREAM + chunk(events()[0]))
        began.send(b".")
        going.recv(1)
        sock.sendall(b"".join(map(chunk, events()[1:])) + b"0\r\n\r\n")

    began, begun = socket.socketpair()
    going, go = socket.socketpair()
    with began, begun, going, go, answering(slowly) as port:
        options = ["--upstream", f"http://127.0.0.1:{port}", "-o", out, "--salt-file", salt]
        with recording(*options) as recorder, recorder.connect() as client:
            client.sendall(asking())
            begun.recv(1)
            assert {mode(salt), mode(tmp_path / "t.parquet.journal")} == {0o600}
            recorder.process.send_signal(signal.SIGINT)
            assert recorder.process.stderr is not None
            assert "finishing answers under way" in recorder.process.stderr.readline()
            go.send(b".")
            assert hear(client, len(streamed())) == streamed()
            assert recorder.ended() == 0
    (call,) = read_calls(str(out))
    assert call.error is None
    assert {mode(path) for path in tmp_path.iterdir()} == {0o600}
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "salt"}


def test_a_journal_is_one_recorders_only(tmp_path: Path) -> None:
    """Another one is refused, and so is closing it, while the first goes on undisturbed."""
    out = tmp_path / "t.parquet"
    with answering(speak) as port:
        upstream = ["--upstream", f"http://127.0.0.1:{port}"]
        with recording(*upstream, "-o", out) as recorder, recorder.connect() as client:
            talk(client)
            for options in ([*upstream, "-o", out], ["-o", out]):
                refused = closed(*options)
                assert refused.returncode == 2
                assert "another recorder is writing it" in refused.stderr
            talk(client)
            client.close()
            assert recorder.stop() == 0
    assert len(list(read_calls(str(out)))) == 2


def test_a_closing_that_was_cut_off_before_its_last_step_is_done_again(tmp_path: Path) -> None:
    """Trace and journal are both there: then the journal is the one that the trace was made of."""
    out, journal = tmp_path / "t.parquet", tmp_path / "t.parquet.journal"
    with answering(speak) as port, recording("--upstream", f"http://127.0.0.1:{port}", "-o", out) as recorder:
        with recorder.connect() as client:
            talk(client)
        kept = journal.read_bytes()
        assert recorder.stop() == 0
    made = list(read_calls(str(out)))
    journal.write_bytes(kept)
    (tmp_path / "t.parquet.part").write_bytes(b"half")
    assert closed("-o", out).returncode == 0
    assert list(read_calls(str(out))) == made
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_a_disk_that_is_full_stops_no_agent(tmp_path: Path) -> None:
    """The traffic goes on; what was not recorded is counted, the exit code is 2, and what was is in the trace."""
    out, journal = tmp_path / "t.parquet", tmp_path / "t.parquet.journal"
    with answering(speak) as port, recording("--upstream", f"http://127.0.0.1:{port}", "-o", out) as recorder:
        pid = recorder.process.pid
        with recorder.connect() as client:
            for number in range(9):
                if number == 3:
                    full = journal.stat().st_size + 100
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
                if number == 7:
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                assert talk(client, CODEX, text=f"call {number}").endswith(b"0\r\n\r\n")
        assert len([one for one in read_records(journal) if isinstance(one, RequestRecord)]) == 5
        assert recorder.stop() == 2
    assert "4 calls were not recorded: " in recorder.said
    assert len(list(read_calls(str(out)))) == 5


def test_a_disk_that_is_full_at_the_end_leaves_the_journal(tmp_path: Path) -> None:
    """The trace is made when there is room again."""
    out = tmp_path / "t.parquet"
    with answering(speak) as port, recording("--upstream", f"http://127.0.0.1:{port}", "-o", out) as recorder:
        with recorder.connect() as client:
            talk(client)
        resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        assert recorder.stop() == 2
    assert "Traceback" not in recorder.said
    assert not out.exists()
    assert closed("-o", out).returncode == 0
    assert len(list(read_calls(str(out)))) == 1


@pytest.mark.parametrize(("path", "most"), [("/v1/messages", 100 * MB), ("/file", 16 * MB)])
def test_memory_stays_bounded_where_a_client_reads_slowly(tmp_path: Path, path: str, most: int) -> None:
    """50 MB that nobody reads wait at the upstream; read at last, they are whole. A call's text is held to its end."""
    delta = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "x" * 20}) * 4000
    pieces = [STREAM, chunk(b"".join(events()[:2])), *[chunk(delta)] * (50 * MB // len(delta))]
    answer = b"".join([*pieces, chunk(b"".join(events()[-3:])), b"0\r\n\r\n"])
    begun, began = socket.socketpair()

    def flood(sock: socket.socket) -> None:
        sock.settimeout(0.5)
        asked(sock)
        sent, view = 0, memoryview(answer)
        try:
            while sent < len(answer):
                sent += sock.send(view[sent : sent + MB])
        except TimeoutError:
            began.send(b"%9d" % sent)
        sock.settimeout(30)
        sock.sendall(view[sent:])

    options = ["-o", tmp_path / "t.parquet", "--upstream"]
    with begun, began, answering(flood) as port, recording(*options, f"http://127.0.0.1:{port}") as recorder:
        with recorder.connect() as client:
            before = recorder.rss()
            client.sendall(asking(path=path))
            assert int(begun.recv(9)) < 40 * MB
            assert recorder.rss() - before < 16 * MB
            assert hear(client, len(answer)) == answer
            assert recorder.rss() - before < most
        assert recorder.stop() == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a certificate for localhost that nobody has signed, and of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    request = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    subprocess.run(["openssl", "req", *request, *name, *made], capture_output=True, check=True)
    return folder


@pytest.mark.parametrize(
    ("host", "trusted", "status"), [("localhost", True, 200), ("localhost", False, 502), ("127.0.0.1", True, 502)]
)
def test_an_upstream_behind_tls_is_verified(
    tmp_path: Path, certificate: Path, host: str, trusted: bool, status: int
) -> None:
    """Who signed it, and whose it is: what does not fit is a 502, and nothing is asked there."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
    with answering(speak, tls) as port:
        options = ["--upstream", f"https://{host}:{port}", "-o", tmp_path / "t.parquet"]
        with recording(*options, *(["--ca-file", certificate / "certificate.pem"] if trusted else [])) as recorder:
            with recorder.connect() as client:
                answer = talk(client)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert (b"certificate" in answer) == (status == 502)
            assert recorder.stop() == 0
    (call,) = read_calls(str(tmp_path / "t.parquet"))
    assert call.error == (None if status == 200 else "reset")
