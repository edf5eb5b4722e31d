"""What a replay refuses before it sends anything, and what it says of endpoints that do not stream, over TLS too."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest
from replays import about, call, keepwarm_, rows, write
from serving import cluster, running

from keepwarm.harness.serve import create_app
from keepwarm.traces.model import After, Segment


class Whole(BaseHTTPRequestHandler):
    """An endpoint of the chat dialect that never streams; its cache has all but the last word. What it tells for
    Prometheus is a cache's shape and no count.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(b'vllm:cache_config_info{engine="0",block_size="16",num_gpu_blocks="1000"} 1.0\n')
            return
        self._tell({"data": [{"id": "m"}]} if self.path == "/v1/models" else {"status": "ok"})

    def do_POST(self) -> None:
        body = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
        words = sum(len(str(message["content"]).split()) for message in body["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": words - 1}}
        self._tell({"choices": [{"message": {"content": "a"}, "finish_reason": "length"}], "usage": usage})

    def _tell(self, value: object) -> None:
        self._send(orjson.dumps(value))

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def whole(certificate: Path | None = None, handler: type[Whole] = Whole) -> Iterator[str]:
    """It listening, over TLS with a certificate and its key in one file; its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """One call."""
    return write(tmp_path / "t.parquet", [call("c", append=(Segment(1, 90, "user"),), output=1)])


def test_what_does_not_stream_is_asked_whole(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --no-stream nothing is asked as a stream, preflight included; without it the refusal names the option."""
    with whole() as url:
        command = ("replay", trace, "--endpoint", url, "--dialect", "chat", "-o", str(tmp_path / "run"))
        code, _, err = keepwarm_(capsys, *command)
        assert (code, err.count("\n"), "--no-stream" in err) == (2, 1, True)
        assert keepwarm_(capsys, *command, "--no-stream")[0] == 0
    row = rows(tmp_path / "run")["c"]
    assert (row["prompt"], row["cache_read"], row["first_token_ns"]) == (90, 89, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel tells it in /proc")
def test_the_table_of_open_files_is_large_before_the_first_call(trace: str, tmp_path: Path) -> None:
    """As large as the process may make it: to grow it while calls run would hold all of them up."""
    seen: list[str] = []
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000)); "
    program = limit + "from keepwarm.harness.cli import main; main(sys.argv[1:])"

    class Looks(Whole):
        def do_POST(self) -> None:
            seen.append(Path(f"/proc/{replay.pid}/status").read_text())
            super().do_POST()

    with whole(handler=Looks) as url:
        command = ("replay", trace, "--endpoint", url, "--dialect", "chat", "--no-stream", "-o", str(tmp_path / "run"))
        with subprocess.Popen([sys.executable, "-c", program, *command]) as replay:
            assert replay.wait(60) == 0
    sizes = [int(re.findall(r"FDSize:\s+(\d+)", told)[0]) for told in seen]
    assert sizes[-1] > 2048


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9?api-version=1", "http://me:api-version@127.0.0.1:9", "ftp://127.0.0.1", "http://"]
)
def test_an_endpoint_is_an_address_and_no_more(
    url: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A query or a user is not left out in silence, nor shown: it may be a key."""
    code, _, err = keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(tmp_path / "run"))
    assert (code, err.count("\n"), "expected http[s]://HOST[:PORT][/PATH] alone" in err) == (2, 1, True)
    assert "api-version" not in err


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("transport", ["own", "httpx"])
def test_a_certificate_is_verified_and_may_be_named(
    transport: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that nobody vouches for is refused in words that tell what to do; named by --ca it is trusted."""
    both = tmp_path / "both.pem"
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*made.split(), "-keyout", both, "-out", tmp_path / "cert.pem"], check=True, capture_output=True)
    both.write_bytes(both.read_bytes() + (tmp_path / "cert.pem").read_bytes())
    with whole(both) as url:
        command = ("replay", trace, "--endpoint", url, "--dialect", "chat", "--no-stream", "--transport", transport)
        code, _, err = keepwarm_(capsys, *command, "-o", str(tmp_path / "run"))
        assert (code, err.count("\n"), "its certificate is not trusted: --ca FILE" in err) == (2, 1, True)
        named = (*command, "--ca", str(tmp_path / "cert.pem"), "-o", str(tmp_path / "run"))
        assert keepwarm_(capsys, *named)[0] == 0
    assert rows(tmp_path / "run")["c"]["cache_read"] == 89
    assert about(tmp_path / "run")["clock"]["received"] == "process"


def test_bytes_of_another_replay_are_not_had_by_a_different_one(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another trace, share of tokens or source of answers than that of --like is one line."""
    other = write(tmp_path / "o.parquet", [call("d", append=(Segment(2, 90, "user"),), output=1)])
    run = tmp_path / "run"
    with running(create_app(cluster(), model="sim")) as url:
        usual = ("--endpoint", url, "--match", "bytes")
        assert keepwarm_(capsys, "replay", trace, *usual, "-o", str(run))[0] == 0
        like = (*usual, "--like", str(run), "-o", str(tmp_path / "again"))
        wrong = {"trace": (other,), "scale_tokens": (trace, "--scale-tokens", "0.5")}
        wrong["assistant"] = (trace, "--assistant", "live")
        for name, given in wrong.items():
            code, _, err = keepwarm_(capsys, "replay", *given, *like)
            assert (code, err.count("\n"), f"has the bytes of another {name}" in err) == (2, 1, True)


@pytest.mark.parametrize("metrics", ["http://127.0.0.1:9", "rubbish"])
def test_counters_that_were_named_must_be_there(
    metrics: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A --metrics URL that tells nothing is one line, before anything is sent."""
    with running(create_app(cluster(), model="sim")) as url:
        run = str(tmp_path / "run")
        code, _, err = keepwarm_(capsys, "replay", trace, "--endpoint", url, "--metrics", metrics, "-o", run)
    assert (code, err.count("\n"), metrics in err) == (2, 1, True)


@pytest.mark.parametrize(("start", "told"), [("salt", "cold"), ("warm", "warm")])
def test_a_report_says_how_the_cache_was_at_the_start(
    start: str, told: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its first lines."""
    with running(create_app(cluster(), model="sim")) as url:
        keepwarm_(capsys, "replay", trace, "--endpoint", url, "--start", start, "-o", str(tmp_path / "run"))
    out = " ".join(keepwarm_(capsys, "report", str(tmp_path / "run"))[1].split())
    assert f"cache {told} at the start ({start})" in out


def test_answers_are_set_beside_the_servers_counters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums of the rows, growth of the counters, the block rule and the prediction, each by its own name; nothing where
    the server counts nothing.
    """
    first = call("c0", append=(Segment(1, 90, "user"),), output=5)
    more = (Segment(2, 60, "answer", "c0"), Segment(3, 70, "user"))
    edge = After("c0", "end", 0, "tool")
    calls = [first, call("c1", edge, append=more, prompt_parent="c0", keep=90, turn=1, start_ns=1, output=7)]
    trace, run = write(tmp_path / "t.parquet", calls), str(tmp_path / "run")
    with running(create_app(cluster(block=16), model="sim")) as url, whole() as shape:
        assert keepwarm_(capsys, "replay", trace, "--endpoint", url, "--metrics", shape, "-o", run)[0] == 0
    told = orjson.loads(keepwarm_(capsys, "report", run, "--json")[1])["reconciliation"]
    found = rows(tmp_path / "run")
    sums = {name: found["c0"][name] + found["c1"][name] for name in ("prompt", "cache_read", "output")}
    assert (sums["prompt"], sums["output"], found["c1"]["cache_read"]) == (310, 12, 80)
    expected = {"requests": 2, "prompt_tokens": 310, "cached_tokens": sums["cache_read"], "output_tokens": 12}
    assert {row["figure"]: (row["client"], row["server"], row["residual"]) for row in told["rows"]} == {
        name: (value, value, 0) for name, value in expected.items()
    }
    rates = told["hit_rate"]
    assert rates["client"] == rates["server"] == rates["predicted"] == sums["cache_read"] / 310
    assert (rates["router"], told["as_predicted"]) == (None, 1.0)
    assert told["as_block_rule"] == {"block": 16, "calls": 1, "share": 1.0}
    with whole() as url:
        command = ("replay", trace, "--endpoint", url, "--dialect", "chat", "--no-stream", "--force", "-o", run)
        assert keepwarm_(capsys, *command)[0] == 0
    assert orjson.loads(keepwarm_(capsys, "report", run, "--json")[1])["reconciliation"] is None
