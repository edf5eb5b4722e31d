"""``keepwarm doctor``: what it tells of simulated clusters, of servers that lack something, of what is no endpoint."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import orjson
import pytest
from serving import HEADERS, ask, cluster, running, said, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from keepwarm.harness.cli import main
from keepwarm.harness.doctor import held_back
from keepwarm.harness.script import Script
from keepwarm.harness.serve import create_app

KEY = "sk-planted-0123456789"
DIALECTS = ("messages", "chat", "responses", "completions")
Told = tuple[int, str, str]
Doctor = Callable[..., Told]


@pytest.fixture
def doctor(capsysbinary: pytest.CaptureFixture[bytes]) -> Doctor:
    """Runs the command: its exit code, its output, its errors. An idle connection is not waited for."""

    def run(url: str, *options: str) -> Told:
        with pytest.raises(SystemExit) as end:
            main(["doctor", url, "--keep-alive-wait", "0.1", *options])
        assert isinstance(end.value.code, int)
        out, err = capsysbinary.readouterr()
        return end.value.code, out.decode(), err.decode()

    return run


def report(told: Told, code: int = 0) -> dict[str, Any]:
    """The JSON that was told, on a clean output."""
    assert (told[0], told[2]) == (code, "")
    found: dict[str, Any] = orjson.loads(told[1])
    return found


def simulated(*, longest: int | None = None, **options: Any) -> Starlette:
    """A served cluster that says nothing of its cache."""
    about = {"rules": options.get("rules", "engine")}
    script = Script(longest=longest)
    return create_app(cluster(**options), model="sim", cache=about, script=script)


@contextmanager
def raw(answer: bytes | None) -> Iterator[str]:
    """A port on which everything is answered by the same bytes, or nothing ever is."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


class Plainest:
    """A server of two dialects that has no cache, or tells of none; its tokens are words. Prompts longer than ``limit``
    lose what is beyond it. On a reused connection the first data comes ``late_s`` after the headers. Chat is answered
    by the status ``refusal`` and the key it was sent, if there is one, completions by a 401 with a ``lock``.
    ``cached`` tokens are told if there are any; streams that are ``mute`` tell no usage.
    """

    def __init__(
        self,
        *,
        limit: int = 4000,
        late_s: float = 0.0,
        refusal: int | None = None,
        lock: bool = False,
        cached: int | None = None,
        mute: bool = False,
        **fields: Any,
    ) -> None:
        self.cached, self.mute = cached, mute
        self.limit, self.late_s, self.refusal, self.lock, self.fields = limit, late_s, refusal, lock, fields
        self.clients: set[Any] = set()
        self.methods: list[tuple[str, str]] = []
        models = {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": limit}]}
        self._app = Starlette(
            routes=[
                Route("/v1/models", lambda _: JSONResponse(models)),
                Route("/version", lambda _: JSONResponse({"version": "0.1"})),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.methods.append((scope["method"], scope["path"]))
        await self._app(scope, receive, send)

    async def chat(self, request: Request) -> Response:
        """Words of messages and tools."""
        if self.refusal is not None:
            sent = [request.headers.get(name) for name in ("authorization", "x-more")]
            error = {"message": f"not with {sent}", "type": "bad"}
            return JSONResponse({"error": error}, self.refusal)
        body = await request.json()
        return self._answer(request, body, len(str([body["messages"], body.get("tools")]).split()), "delta")

    async def completions(self, request: Request) -> Response:
        """Token ids."""
        if self.lock:
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.json()
        return self._answer(request, body, len(body["prompt"]), "text")

    def _answer(self, request: Request, body: dict[str, Any], tokens: int, name: str) -> Response:
        usage: dict[str, Any] = {"prompt_tokens": min(tokens, self.limit), "completion_tokens": body["max_tokens"]}
        if self.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        late, self.clients = request.client in self.clients, self.clients | {request.client}
        choice = {"finish_reason": "length", name: "a" if name == "text" else {"content": "a"}}
        told = {"choices": [choice], "usage": usage, **self.fields}
        if not body["stream"]:
            return JSONResponse(told)

        if self.mute:
            told.pop("usage")

        async def events() -> Any:
            yield b": \n\n"
            await asyncio.sleep(self.late_s if late else 0)
            yield b"data: " + orjson.dumps(told) + b"\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def without(app: ASGIApp, path: str) -> ASGIApp:
    """An application that says yes to requests of a path, and does nothing."""

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        idle = scope["path"] == path and scope["method"] == "POST"
        await (JSONResponse({}) if idle else app)(scope, receive, send)

    return asked


@pytest.mark.parametrize("block", [16, 64])
def test_a_served_cluster_is_known_through_and_through(doctor: Doctor, block: int) -> None:
    """Four dialects with all they tell; the block, which nothing names, is found by asking."""
    with running(simulated(block=block)) as url:
        found = report(doctor(url, "--json"))
    assert (found["server"], found["model"], found["context"]) == ("keepwarm serve", "sim", None)
    assert list(found["dialects"]) == list(DIALECTS)
    for name, row in found["dialects"].items():
        tools = name != "completions"
        assert [row[figure] for figure in ("answers", "streams", "usage", "tools")] == [True, True, True, tools]
        assert [row[figure] for figure in ("cached", "written", "exact_output", "why")] == [
            "reported",
            "reported",
            True,
            None,
        ]
        costs = {"words": 256, "of": 256, "word": 1.0, "off": 0.0, "turn": 2.0}
        assert row["calibration"] == (None if name == "completions" else costs)
    cache = found["cache"]
    assert (cache["block"], cache["found_by"], cache["dialect"]) == (block, "prefixes", "messages")
    assert cache["least"] == block
    assert (cache["salt"], cache["reset"], cache["cold_after_reset"]) == (True, "POST /reset_prefix_cache", None)
    assert (found["overflow"], found["delayed_ack"]["found"]) == (None, False)
    assert found["keep_alive"] == {"closed_s": None, "beyond_s": 0.1}
    assert found["counters"]["kind"] == "vllm"
    assert found["timings"]["field"] is None


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("openai", {"block": 128, "least": 1024, "found_by": "prefixes"}),
        ("anthropic", {"block": None, "least": 1060, "found_by": "marks"}),
    ],
)
def test_managed_rules_are_told_apart(doctor: Doctor, rules: str, expected: dict[str, Any]) -> None:
    """OpenAI's cache reads whole 128s from 1,024 tokens on, Anthropic's what was marked, if that is as long."""
    with running(simulated(rules=rules)) as url:
        found = report(doctor(url, "--json"))
        table = doctor(url)[1]
    assert {name: found["cache"][name] for name in expected} == expected
    assert ("to the token, from 1,060" if rules == "anthropic" else "128, from 1,024 tokens on") in table


def test_a_cache_is_emptied_only_if_asked(doctor: Doctor) -> None:
    """A stranger's warm prompt stays warm; with --try-reset it and doctor's own are cold."""
    turn = said("user", text(0, 100))
    with running(simulated()) as url, httpx.Client(base_url=url, headers=HEADERS, trust_env=False) as stranger:
        ask(stranger, turn)
        doctor(url)
        assert ask(stranger, turn)["usage"]["cache_read_input_tokens"] > 0
        assert report(doctor(url, "--json", "--try-reset"))["cache"]["cold_after_reset"] is True
        assert ask(stranger, turn)["usage"]["cache_read_input_tokens"] == 0


def test_a_reset_that_does_nothing_is_seen(doctor: Doctor) -> None:
    """It answers with 200, and the prompt is as warm as before."""
    with running(without(simulated(), "/reset_prefix_cache")) as url:
        told = doctor(url, "--try-reset")
    assert "but is not cold after it" in told[1]


def test_a_prompt_beyond_the_context_is_refused(doctor: Doctor) -> None:
    """The context is told, and what the server says to more; a context that is too small for the other probes is no
    reason to tell less of the dialects.
    """
    with running(simulated(longest=1500)) as url:
        found = report(doctor(url, "--json"))
    assert (found["context"], found["overflow"]["outcome"], found["overflow"]["status"]) == (1500, "refused", 400)
    assert {row["cached"] for row in found["dialects"].values()} == {"reported"}
    assert (found["cache"]["block"], found["cache"]["salt"]) == (16, None)


def test_usage_that_is_told_only_whole_is_enough_to_ask(doctor: Doctor) -> None:
    """What streams leave out is said; the rest is found out without streaming, but for late first tokens.
    A cache that never reads a thing has no block that one could know.
    """
    with running(Plainest(cached=0, mute=True)) as url:
        found = report(doctor(url, "--json"))
    chat = found["dialects"]["chat"]
    assert (chat["streams"], chat["usage"], chat["cached"], chat["written"]) == (True, False, "reported", "inferred")
    assert "only where it does not stream" in chat["why"]
    assert (found["cache"]["block"], found["cache"]["salt"], found["delayed_ack"]) == (None, False, None)


def test_what_is_not_told_is_null_and_how_it_would_be_is_said(doctor: Doctor) -> None:
    """A server like vLLM without its flags: no cached tokens in any dialect is exit code 1, with the flag; two dialects
    are missing; what is beyond its context it drops without a word.
    """
    with running(app := Plainest()) as url:
        found = report(doctor(url, "--json"), code=1)
        table = doctor(url)
    assert (found["server"], found["version"]) == ("vllm", "0.1")
    chat, missing = found["dialects"]["chat"], found["dialects"]["messages"]
    assert (chat["answers"], chat["usage"], chat["cached"], chat["written"]) == (True, True, "absent", "absent")
    assert "--enable-prompt-tokens-details" in chat["why"]
    assert missing["answers"] is False
    assert "404" in missing["why"]
    assert {missing[name] for name in ("streams", "usage", "cached", "written", "tools", "calibration")} == {None}
    assert {found["cache"][name] for name in ("block", "least", "dialect", "salt", "reset")} == {None}
    overflow = found["overflow"]
    assert (overflow["outcome"], overflow["prompt"]) == ("cut silently", 4000)
    assert overflow["sent"] > 4000
    assert (found["counters"], found["timings"]["flag"]) == (None, "--enable-per-request-metrics")
    assert table[0] == 1
    assert "start the server with --enable-prompt-tokens-details" in table[1]
    assert "4,000 prompt tokens reported of" in table[1]
    assert {path for method, path in app.methods if method == "OPTIONS"} >= {"/reset_prefix_cache", "/flush_cache"}
    assert not [path for method, path in app.methods if method != "OPTIONS" and ("reset" in path or "flush" in path)]


@pytest.mark.parametrize("late_s", [0.0, 0.06])
def test_late_data_on_reused_connections_is_found(doctor: Doctor, late_s: float) -> None:
    """As a packet held back for an acknowledgement; on new connections there is none."""
    with running(Plainest(late_s=late_s)) as url:
        found = report(doctor(url, "--json"), code=1)["delayed_ack"]
    assert found["found"] is (late_s > 0)


@pytest.mark.parametrize(
    "reused, found",
    [
        ([0.0] * 4 + [40.8, 41.0, 41.6, 41.9, 42.8, 43.5, 43.5, 43.5, 43.5, 43.6, 43.9], True),
        ([41.0] * 16, True),
        ([0.0] * 16, False),
        ([0.0] * 15 + [41.0], False),
        ([1.6] * 4 + [41.0] * 12, False),
        ([16.0] * 16, False),
    ],
    ids=["busy Dynamo", "Dynamo", "all together", "one late by chance", "a quarter in time", "as late as new ones"],
)
def test_first_tokens_that_came_with_their_heads_hide_nothing(reused: list[float], found: bool) -> None:
    """Times between head and first token of Dynamo on a machine with forty busy processes, and others; new connections
    took 11.8 ms in the median.
    """
    assert held_back([0.0] * 6 + [1.2, 11.8, 11.8, 15.3, 16.1, 17.0, 19.6, 20.0, 21.7, 43.2], reused) is found


def test_a_call_s_own_times_are_found(doctor: Doctor) -> None:
    """vLLM's metrics object, by the server's clock."""
    with running(Plainest(metrics={"time_to_first_token_ms": 1.5})) as url:
        timings = report(doctor(url, "--json"), code=1)["timings"]
    assert timings == {"field": "metrics", "clock": "server", "ahead_s": None, "flag": None}


def test_the_wall_clock_of_a_server_is_set_beside_ours(doctor: Doctor) -> None:
    """Dynamo tells when a request came: one that came in 1970 came long ago."""
    with running(Plainest(nvext={"timing": {"request_received_ms": 5000, "ttft_ms": 1.0}})) as url:
        timings = report(doctor(url, "--json"), code=1)["timings"]
    assert timings["field"] == "nvext.timing"
    assert timings["ahead_s"] < -1e9


def test_a_connection_that_is_closed_soon_is_seen(doctor: Doctor) -> None:
    """By a server that says ``connection: close`` to all."""

    async def closing(scope: Scope, receive: Receive, send: Send) -> None:
        async def more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await app(scope, receive, more)

    app = simulated()
    with running(closing) as url:
        idle = report(doctor(url, "--json", "--keep-alive-wait", "60"))["keep_alive"]
    assert idle["beyond_s"] is None
    assert idle["closed_s"] < 60


def html() -> Starlette:
    """A web server."""
    return Starlette(routes=[Route("/{path:path}", lambda _: HTMLResponse("<html>welcome</html>"))])


def locked() -> Starlette:
    """An endpoint that wants a key."""
    return Starlette(routes=[Route("/{path:path}", lambda _: JSONResponse({"error": "Unauthorized"}, 401))])


@pytest.mark.parametrize(
    ("app", "expected"),
    [(html, "text/html"), (locked, "--key-env NAME or --key-file FILE")],
)
def test_what_is_no_open_endpoint_is_one_line(doctor: Doctor, app: Callable[[], Starlette], expected: str) -> None:
    """A page, and a closed door."""
    with running(app()) as url:
        code, out, err = doctor(url)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


@pytest.mark.parametrize(
    ("answer", "expected"), [(None, "no answer within 5 s"), (b"SSH-2.0-OpenSSH_9.6\r\n", "no HTTP answer")]
)
def test_a_socket_that_speaks_no_http_is_one_line(doctor: Doctor, answer: bytes | None, expected: str) -> None:
    """One that never says a thing, and another protocol."""
    with raw(answer) as url:
        code, out, err = doctor(url, "--json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def test_a_port_with_nothing_is_one_line(doctor: Doctor) -> None:
    """As is a server of several models, of which none was named."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert doctor(f"http://127.0.0.1:{port}")[0::2] == (
        2,
        f"keepwarm: endpoint http://127.0.0.1:{port}: nothing answers there\n",
    )
    models = JSONResponse({"data": [{"id": "one"}, {"id": "two"}]})
    with running(Starlette(routes=[Route("/v1/models", lambda _: models)])) as url:
        code, _, err = doctor(url)
    assert code == 2
    assert "--model" in err


@pytest.mark.parametrize("lock", [False, True])
def test_a_key_that_a_server_repeats_is_in_no_output(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, lock: bool
) -> None:
    """In what a dialect says for itself, and in the one line where none is open."""
    monkeypatch.setitem(os.environ, "PLANTED", KEY)
    monkeypatch.setitem(os.environ, "ANOTHER", f"{KEY}-2")
    given = ("--key-env", "PLANTED", "--header", "x-more=ANOTHER")
    with running(Plainest(refusal=403 if lock else 400, lock=lock)) as url:
        told = [doctor(url, "--json", *given), doctor(url, *given)]
    for code, out, err in told:
        assert code == (2 if lock else 1)
        assert KEY not in out + err
        assert ("API key" in err) is lock
    if not lock:
        assert "not with" in report(told[0], code=1)["dialects"]["chat"]["why"]
