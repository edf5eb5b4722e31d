"""``keepwarm replay``: what it sends under its options, the same bytes where it says so, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from replays import about, call, keepwarm_, rows, write
from serving import cluster, running
from templated import Templated, turns

from keepwarm.harness.serve import create_app
from keepwarm.traces.model import After, Call, Hints, Segment, ToolUse

Body = dict[str, Any]


def silent(usage: Body) -> Body:
    """The same account without a word of the cache."""
    return usage | {"prompt_tokens_details": None}


def agent(session: str = "s", **fields: Any) -> list[Call]:
    """Three calls of an agent: a task, a tool's result, another word of the user's."""
    calls = [
        call(f"{session}0", session=session, append=(Segment(1, 600, "system"), Segment(2, 300, "user")), output=20)
    ]
    for turn, kind in ((1, "tool_result"), (2, "user")):
        before = f"{session}{turn - 1}"
        append = (Segment(10 * turn, 200, "answer", before), Segment(10 * turn + 1, 250, kind))
        told = {"turn": turn, "start_ns": turn, "prompt_parent": before, "keep": 450 + 450 * turn, "output": 20}
        calls.append(call(f"{session}{turn}", After(before, "end", 0, "tool"), session=session, append=append, **told))
    return [one._replace(**fields) for one in calls]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """One such session."""
    return write(tmp_path / "t.parquet", agent())


def bodies(server: Templated, calls: int = 3) -> list[Body]:
    """The bodies of the replay itself, which come last."""
    return [orjson.loads(body) for body in server.asked[-calls:]]


def replay(capsys: pytest.CaptureFixture[str], trace: str, url: str, run: Path, *options: str) -> tuple[int, str, str]:
    """A replay in chat, unless told otherwise."""
    usual = () if "--dialect" in options else ("--dialect", "chat")
    return keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), *usual, *options)


def test_no_preflight_asks_nothing_and_says_so(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the trace's calls are sent; run.json has no preflight, where it usually says what was learned."""
    server = Templated()
    with running(server) as url:
        assert replay(capsys, trace, url, tmp_path / "with")[0] == 0
        asked = len(server.asked)
        assert asked > 3
        assert replay(capsys, trace, url, tmp_path / "without", "--no-preflight")[0] == 0
    assert len(server.asked) == asked + 3
    assert about(tmp_path / "without")["endpoint"]["preflight"] is None
    assert about(tmp_path / "with")["endpoint"]["preflight"]["reads"] == "reported"


@pytest.mark.parametrize("dialect", ["messages", "chat", "responses"])
def test_calibrated_prompts_have_the_planned_tokens(
    dialect: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Streamed over HTTP, from a template of its own with tools: to the token as the trace has it."""
    with running(Templated("merged")) as url:
        assert replay(capsys, trace, url, tmp_path / "run", "--dialect", dialect)[0] == 0
    found = rows(tmp_path / "run")
    assert [found[name]["prompt"] for name in ("s0", "s1", "s2")] == [900, 1350, 1800]
    assert all(row["completed"] and row["planned_output"] == 20 for row in found.values())


def prompts_of(server: Templated, calls: int = 3) -> list[bytes]:
    """The bytes of the replay's prompts, without the parameters before them."""
    return [body[body.index(b'"tools"') :] for body in server.asked[-calls:]]


def test_bytes_that_do_not_depend_on_the_endpoint(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two servers with other templates get other bytes by tokens, and the same by bytes: those of none's costs, or of
    the first one's as its run says. What starts otherwise than that run cannot have its bytes.
    """
    plain, framed = Templated("plain"), Templated("with_ids")
    run, again = tmp_path / "run", tmp_path / "again"
    with running(plain) as one, running(framed) as other:
        for match in ("tokens", "bytes"):
            for url in (one, other):
                assert replay(capsys, trace, url, run, "--force", "--match", match, "--start", "warm")[0] == 0
            assert (prompts_of(plain) == prompts_of(framed)) == (match == "bytes")
        assert replay(capsys, trace, one, run, "--force")[0] == 0
        code, _, err = replay(capsys, trace, other, again, "--match", "bytes", "--like", str(run))
        assert (code, err) == (0, "")
        assert prompts_of(plain) == prompts_of(framed)
        assert about(again)["fidelity"] == {**about(run)["fidelity"], "match": "bytes"}
        assert about(again)["cache"]["salt"] == about(run)["cache"]["salt"]
        assert [rows(run)[name]["prompt"] for name in ("s0", "s1", "s2")] == [900, 1350, 1800]
        assert all(rows(again)[name]["prompt"] != 1800 for name in ("s2",))
        for start in ("warm", "reset", "cache-salt"):
            command = ("--force", "--match", "bytes", "--like", str(run), "--start", start)
            code, _, err = replay(capsys, trace, other, again, *command)
            assert (code, err.count("\n")) == (2, 1)
            assert "--start salt" in err


def test_a_warm_runs_bytes_are_had_by_a_warm_run(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Like a run without a salt is a run without one."""
    server = Templated()
    run, again = tmp_path / "run", tmp_path / "again"
    with running(server) as url:
        assert replay(capsys, trace, url, run, "--start", "warm")[0] == 0
        first = prompts_of(server)
        assert replay(capsys, trace, url, again, "--start", "warm", "--match", "bytes", "--like", str(run))[0] == 0
    assert prompts_of(server) == first
    assert [row["cache_read"] for row in rows(again).values()] == [900, 1350, 1800]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "run.json: expected the run.json of a replay, with fidelity.costs"),
        (b"{}", "fidelity.costs"),
        (b"[]", "fidelity.costs"),
        (b"{", "expected"),
    ],
)
def test_like_wants_a_replays_run(
    text: bytes | None, said: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory that is no run, or no replay, is one line; --like goes with bytes alone."""
    if text is not None:
        (tmp_path / "run.json").write_bytes(text)
    with running(Templated()) as url:
        command = ("--match", "bytes", "--like", str(tmp_path))
        code, out, err = replay(capsys, trace, url, tmp_path / "o", *command)
        assert (code, out, err.count("\n"), said in err) == (2, "", 1, True)
        assert replay(capsys, trace, url, tmp_path / "o", "--like", str(tmp_path))[0] == 2


@contextmanager
def worker(**options: Any) -> Iterator[str]:
    """keepwarm serve, blocks of one token."""
    with running(create_app(cluster(block=1, **options), model="sim", cache={"ttl": "none", "rules": "engine"})) as url:
        yield url


@pytest.mark.parametrize("dialect", ["messages", "chat", "responses"])
def test_live_answers_are_repeated_and_found_again(
    dialect: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the endpoint's own answers the simulated engine reads what it generated too; with recorded ones it reads
    the prompt before and no more than the first word that all texts share.
    """
    run = tmp_path / "run"
    with worker() as url:
        for assistant in ("recorded", "live"):
            command = ("--force", "--dialect", dialect, "--assistant", assistant, "--speed", "1000")
            code, _, err = replay(capsys, trace, url, run, *command)
            assert (code, err) == (0, "")
            found = [rows(run)[name] for name in ("s0", "s1", "s2")]
            assert [row["prompt"] for row in found] == [900, 1350, 1800]
            extra = [row["cache_read"] - before["prompt"] for before, row in pairwise(found)]
            low, high = (19, 21) if assistant == "live" else (0, 2)
            assert all(low <= more <= high for more in extra), extra
            assert about(run)["options"]["assistant"] == assistant


def test_a_live_answer_stands_in_the_next_prompt(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was answered is what the assistant has said, word for word, in place of the recorded answer."""
    server = Templated()
    with running(server) as url:
        assert replay(capsys, trace, url, tmp_path / "run", "--assistant", "live")[0] == 0
    said = [part.text for _, parts in turns("chat", bodies(server)[2]) for part in parts if part.kind == "text"]
    assert said.count(" ".join(["yes"] * 20)) == 2
    with running(server) as url:
        code, _, err = replay(capsys, trace, url, tmp_path / "r", "--assistant", "live", "--dialect", "completions")
    assert (code, err.count("\n")) == (2, 1)


def test_the_cache_is_cold_or_warm_as_asked(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first call of a second run reads nothing under a salt, another cache_salt or after a reset, and all when
    warm; what was chosen stands in run.json.
    """
    run = tmp_path / "run"
    with worker() as url:
        assert replay(capsys, trace, url, run, "--start", "warm")[0] == 0
        reads = {}
        for start in ("warm", "salt", "cache-salt", "reset"):
            assert replay(capsys, trace, url, run, "--force", "--start", start)[0] == 0, start
            reads[start] = rows(run)["s0"]["cache_read"]
            told = about(run)["cache"]
            state = "warm" if start == "warm" else "cold"
            assert (told["state_at_start"], told["how"]) == (state, start)
            assert (told["salt"] is not None) == (start in ("salt", "cache-salt"))
    assert reads["warm"] == 899  # the last token is always computed
    assert max(reads["salt"], reads["cache-salt"], reads["reset"]) <= 5, reads


def test_a_start_that_the_server_cannot_make_is_refused(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No reset, or a cache_salt that is not minded: one line, exit code 2, nothing sent of the trace."""

    class Careless(Templated):
        def _usage(self, dialect: str, prompt: list[str], body: Any, output: int) -> Body:
            return super()._usage(dialect, prompt, {}, output)

    with running(Careless()) as url:
        for start, said in (("reset", "POST /reset_prefix_cache gave status 404"), ("cache-salt", "use --start salt")):
            code, out, err = replay(capsys, trace, url, tmp_path / start, "--start", start)
            assert (code, out, err.count("\n"), said in err) == (2, "", 1, True)
            assert not (tmp_path / start / "run.json").exists()


@pytest.mark.parametrize(
    ("hinting", "expected"),
    [
        ("off", [None, None]),
        ("recorded", [{"priority": -2, "osl": 700}, None]),
        ("derived", [{"priority": 0, "osl": 20, "speculative_prefill": True}, {"priority": 10, "osl": 2}]),
    ],
)
def test_hints_are_sent_as_asked(
    hinting: str, expected: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Off, as they were recorded, or by flow, length and tools."""
    hints = Hints(priority=-2, osl=700, ttl_s=60)
    one = call("a", hints=hints, flow="background", output=20, tools=(ToolUse("read"),))
    other = call("b", After("a", "end", 0, "tool"), start_ns=1, flow="interactive")
    trace, server = write(tmp_path / "h.parquet", [one, other]), Templated()
    with running(server) as url:
        assert replay(capsys, trace, url, tmp_path / "run", "--hints", hinting)[0] == 0
    assert [body.get("nvext", {}).get("agent_hints") for body in bodies(server, 2)] == expected
    assert about(tmp_path / "run")["options"]["hints"] == hinting


@pytest.mark.parametrize(
    ("dialect", "session", "inner"),
    [
        ("messages", "x-claude-code-session-id", "x-claude-code-agent-id"),
        ("chat", "x-dynamo-parent-session-id", "x-dynamo-session-id"),
    ],
)
def test_sessions_and_agents_are_told_in_headers(
    dialect: str, session: str, inner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Main agent and sub-agent share a session, the latter has a name besides; another run has other names, and none is
    a name of the trace's alone.
    """
    calls = [call("a"), call("b", After("a", "start", 0, "subagent"), agent="inner", role="subagent", start_ns=1)]
    trace, server = write(tmp_path / "h.parquet", calls), Templated()
    seen: set[str] = set()
    with running(server) as url:
        for name in ("one", "two"):
            assert replay(capsys, trace, url, tmp_path / name, "--dialect", dialect)[0] == 0
            headers = sorted(server.headers[-2:], key=lambda told: inner in told and session in told)
            main = headers[0][session if dialect == "messages" else inner]
            assert headers[1][session] == main
            assert headers[1][inner] not in (main, "inner")
            assert (inner in headers[0]) == (dialect != "messages")
            seen |= {main, headers[1][inner]}
    assert len(seen) == 4
    assert not seen & {"s", "s-0", "s-0-inner"}


def test_scaled_prompts_are_a_share_as_long(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every segment and answer is cut to the share, and what is kept of a prompt with it."""
    with worker() as url:
        assert replay(capsys, trace, url, tmp_path / "run", "--scale-tokens", "0.5")[0] == 0
    found = [rows(tmp_path / "run")[name] for name in ("s0", "s1", "s2")]
    assert [row["prompt"] for row in found] == [450, 675, 900]
    assert [row["output"] for row in found] == [10, 10, 10]
    assert [row["cache_read"] >= before["prompt"] for before, row in pairwise(found)] == [
        True,
        True,
    ]
    assert about(tmp_path / "run")["options"]["scale_tokens"] == 0.5


@pytest.mark.parametrize(
    ("server", "options", "said"),
    [
        (
            Templated(usage=silent),
            (),
            "does not tell cached tokens in the chat",
        ),
        (Templated(usage=lambda told: {}), (), "answers without telling prompt tokens"),
        (Templated(first=(401,)), (), "refuses the API key, or wants one"),
        (
            Templated(refuses=lambda body: (400, "out\nof order")),
            (),
            "bad_request, status 400: invalid_request_error out of",
        ),
        (Templated(), ("--key-env", "NO_SUCH"), "environment variable NO_SUCH: expected an API key"),
        (Templated(), ("--header", "nothing"), "expected NAME=VARIABLE"),
        (Templated(), ("--ca", "none.pem"), "none.pem: expected certificates"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    server: Templated,
    options: tuple[str, ...],
    said: str,
    trace: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, nothing on standard output, one line on standard error, and no run."""
    with running(server) as url:
        code, out, err = replay(capsys, trace, url, tmp_path / "run", *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert not (tmp_path / "run" / "run.json").exists()


def test_without_preflight_what_tells_nothing_is_replayed(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that tells no cached tokens: the accounts say that they do not know, and not zero."""
    with running(Templated(usage=silent)) as url:
        assert replay(capsys, trace, url, tmp_path / "run", "--no-preflight")[0] == 0
    assert {row["cache_read"] for row in rows(tmp_path / "run").values()} == {None}
    assert {row["uncached"] for row in rows(tmp_path / "run").values()} == {None}


def test_zeros_for_writes_that_are_no_report_are_not_taken(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from Dynamo: what was written is unknown, and what was not read is uncached."""
    with running(Templated()) as url:
        assert replay(capsys, trace, url, tmp_path / "run", "--dialect", "messages")[0] == 0
    for row in rows(tmp_path / "run").values():
        assert (row["write_source"], row["cache_write_other"], row["cache_write_5m"]) == ("inferred", None, None)
        assert row["uncached"] == row["prompt"] - row["cache_read"]
    assert httpx.URL(about(tmp_path / "run")["endpoint"]["url"]).host == "127.0.0.1"
