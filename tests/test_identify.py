"""What listens at a URL: an endpoint, which one, or what it is instead."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import orjson
import pytest
from serving import cluster, running

from keepwarm.harness.script import Script
from keepwarm.harness.serve import create_app
from keepwarm.replayers.address import Address
from keepwarm.replayers.http import reach
from keepwarm.replayers.server import identify
from keepwarm.traces.errors import InputError


def test_the_simulated_cluster_says_who_it_is() -> None:
    """Its speed, rules, model, cache and context, each as it was started with."""
    cache = {"ttl": "none", "block": 16, "capacity": 9, "rules": "engine"}
    with running(create_app(cluster(), model="sim", cache=cache, script=Script(longest=4096), speed=3.0)) as url:
        told = identify(Address(url, {}))
    assert told.pop("version") is not None
    assert told == {"server": "keepwarm serve", "speed": 3, "model": "sim", "context": 4096, **cache}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://127.0.0.1", "127.0.0.1:8000", "http://", "http://[", ""])
def test_identify_refuses_what_is_no_endpoint(url: str) -> None:
    """Nobody listening, or no http address, is one line that names the endpoint."""
    with pytest.raises(InputError, match="endpoint") as caught:
        identify(Address(url, {}))
    assert "\n" not in str(caught.value)


@contextmanager
def answering(data: bytes, hold: bool = False) -> Iterator[str]:
    """A listener that gives every connection these bytes and closes it, or holds it open; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with ExitStack() as taken, suppress(OSError):
            while True:
                one = taken.enter_context(listener.accept()[0])
                if not hold:
                    one.recv(65536)
                    one.sendall(data)
                    one.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def http(status: str, kind: str, body: bytes) -> bytes:
    """An answer as it goes over the wire."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (http("500 No", "text/plain", b"oh"), "is no endpoint: GET /v1/models gave status 500, GET /health status 500"),
        (http("200 OK", "text/html", b"<p>"), "is no endpoint: GET /v1/models gave text/html that is no JSON object"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what listens there gave no HTTP answer"),
        (b"", "what listens there gave no HTTP answer"),
    ],
)
def test_identify_says_what_it_found_instead_of_an_endpoint(data: bytes, said: str) -> None:
    """A server's error or a page for everything, another protocol, a closed connection: each is told as what it is."""
    with answering(data) as url, pytest.raises(InputError) as caught:
        identify(Address(url, {}))
    assert str(caught.value).startswith(f"endpoint {url}: {said}")


def test_identify_tells_silence_from_nobody() -> None:
    """What takes a connection and says nothing did not answer in time."""
    with answering(b"", hold=True) as url, pytest.raises(InputError, match=r"no answer within 0\.2 s"):
        identify(Address(url, {}), timeout_s=0.2)
    with pytest.raises(InputError, match="nothing answers there"):
        identify(Address("http://127.0.0.1:9", {}))


@pytest.mark.parametrize("status", ["404 Not Found", "501 Unsupported method"])
def test_an_endpoint_need_not_say_who_it_is(status: str) -> None:
    """One that knows neither path may know calls all the same: it only does not say its model."""
    with answering(http(status, "text/html", b"<p>")) as url:
        assert identify(Address(url, {}))["model"] is None


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_an_endpoint_that_wants_a_key_says_so(status: str) -> None:
    """What lists no models without a key is told apart from what does not know them."""
    with answering(http(status, "application/json", b"{}")) as url, pytest.raises(InputError) as caught:
        identify(Address(url, {}))
    assert "refuses the API key, or wants one (--key-env NAME or --key-file FILE)" in str(caught.value)


class Answering:
    """A server that has these answers by path, 404 for others, and remembers the headers it saw."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.seen: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        self.seen.append(dict(scope["headers"]))
        found = self.answers.get(scope["path"].rsplit("/", 1)[-1])
        start = {"type": "http.response.start", "status": 404 if found is None else 200}
        await send(start | {"headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": orjson.dumps(found)})


def model(name: str = "m", **told: Any) -> dict[str, Any]:
    """A model as servers list it."""
    return {"id": name, "object": "model", **told}


@pytest.mark.parametrize(
    ("answers", "server", "version", "served", "context"),
    [
        (
            {"version": {"version": "0.32.0"}, "models": [model(owned_by="vllm", max_model_len=9)]},
            "vllm",
            "0.32.0",
            "m",
            9,
        ),
        ({"models": [model(owned_by="nvidia", context_window=8)]}, "dynamo", None, "m", 8),
        ({"models": [model(owned_by="sglang", max_model_len=7)]}, "sglang", None, "m", 7),
        ({"version": {"version": "0.9"}, "models": [model()]}, "vllm", "0.9", "m", None),
        ({"models": [model(owned_by="system"), model("n")]}, None, None, None, None),
        ({"models": []}, None, None, None, None),
        ({"models": ["m", 7, {"id": 7}, model("good")]}, None, None, "good", None),
        ({"models": {"m": 1}}, None, None, None, None),
    ],
)
def test_other_servers_are_known_by_how_they_list_their_models(
    answers: dict[str, Any], server: str | None, version: str | None, served: str | None, context: int | None
) -> None:
    """vLLM, Dynamo and SGLang sign their models; one model alone is the one that is asked for; rubbish is passed by."""
    answers["models"] = {"object": "list", "data": answers["models"]}
    app = Answering(**answers)
    with running(app) as url:
        told = identify(Address(url, {"x-api-key": "k"}))
    assert [told[name] for name in ("server", "version", "model", "context")] == [server, version, served, context]
    assert {seen[b"x-api-key"] for seen in app.seen} == {b"k"}


def test_a_certificate_of_an_unknown_authority_is_told(tmp_path: Any) -> None:
    """A file that is no certificate is one line with its name; what speaks no TLS is told as that."""
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    for ca in (str(file), str(tmp_path / "none.pem")):
        with pytest.raises(InputError, match=r"\.pem: expected certificates in PEM form"):
            reach("https://test", "chat", ca=ca)
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as url, pytest.raises(InputError, match="does not speak TLS"):
        identify(Address(url.replace("http:", "https:"), {}))
