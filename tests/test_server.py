"""What is learned of an endpoint before a replay: what it takes, what it tells, and why it cannot be measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from replays import about, call, keepwarm_, rows, write
from serving import cluster, running
from templated import Templated

from keepwarm.harness.serve import create_app
from keepwarm.replayers import server as servers
from keepwarm.replayers.address import Address
from keepwarm.replayers.http import HttpEndpoint
from keepwarm.replayers.server import Learned, isolates, known_words, learn
from keepwarm.replayers.text import WORDS
from keepwarm.replayers.tokens import Costs
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Segment

ALL = frozenset(("tools", "exact_output", "cache_key"))
Body = dict[str, Any]
Refusal = tuple[int, str] | None


def learned(server: Any, dialect: str = "chat") -> Learned:
    """What is learned of a server in memory."""
    handler = server.handler if isinstance(server, Templated) else server
    asked = HttpEndpoint(
        Address("http://test", {}),
        dialect=dialect,
        model="m",
        clock=time.monotonic_ns,
        accepts=frozenset(),
        stream=False,
        transport=lambda: httpx.MockTransport(handler),
    )
    return asyncio.run(learn(asked))


def without(*names: str) -> Callable[[Body], Refusal]:
    """A server that refuses some fields."""

    def refuses(body: Body) -> Refusal:
        found = [name for name in names if name in body]
        return (400, f"{found[0]}: Extra inputs are not permitted") if found else None

    return refuses


@pytest.mark.parametrize(
    ("refuses", "dialect", "expected"),
    [
        (without(), "chat", ALL | {"no_tool_call"}),
        (without(), "messages", ALL | {"no_tool_call"}),
        (without(), "responses", ALL | {"no_tool_call"}),
        (without("tools"), "chat", {"exact_output", "cache_key"}),
        (without("tool_choice"), "chat", ALL),
        (without("min_tokens"), "chat", {"tools", "no_tool_call", "cache_key"}),
        (without("ignore_eos"), "messages", {"tools", "no_tool_call", "cache_key"}),
        (without("prompt_cache_key"), "responses", {"tools", "no_tool_call", "exact_output"}),
        (without("min_tokens", "prompt_cache_key", "tools"), "messages", frozenset()),
    ],
)
def test_what_an_endpoint_refuses_is_not_asked_of_it(
    refuses: Callable[[Body], Refusal], dialect: str, expected: frozenset[str]
) -> None:
    """Tools, exact length and cache key are each tried, and only what is taken is used; costs are found anyway."""
    found = learned(Templated("with_ids", refuses=refuses), dialect)
    assert found.accepts == expected
    assert found.costs.tools == ("tools" in expected)
    assert (found.costs.off, found.reads) == (0.0, "reported")


def test_tools_that_are_taken_only_without_a_call_are_taken_so() -> None:
    """A server without a tool parser refuses tools unless none is called."""

    def refuses(body: Body) -> Refusal:
        wanted = "tools" in body and body.get("tool_choice") != "none"
        return (400, '"auto" tool choice requires --enable-auto-tool-choice') if wanted else None

    assert learned(Templated(refuses=refuses)).accepts == ALL | {"no_tool_call"}


def test_no_tool_call_is_not_asked_for_where_it_takes_the_tools_out_of_the_prompt() -> None:
    """A server that leaves tools out of the prompt when none may be called would have other prompts."""

    class Dropping(Templated):
        def tokens(self, dialect: str, body: Any) -> list[str]:
            return super().tokens(dialect, body if body.get("tool_choice") != "none" else {**body, "tools": []})

    assert learned(Dropping()).accepts == ALL


def test_the_limit_by_its_other_name() -> None:
    """A server that wants max_completion_tokens says so, and gets it with everything else."""

    def refuses(body: Body) -> Refusal:
        told = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        return (400, told) if "max_tokens" in body else None

    server = Templated(refuses=refuses)
    assert learned(server).accepts == ALL | {"no_tool_call", "max_completion_tokens"}
    assert sum(b'"max_tokens"' in body for body in server.asked) == 1


@pytest.mark.parametrize(
    ("usage", "dialect", "expected"),
    [
        ({"cache_creation_input_tokens": 0}, "messages", ("reported", "inferred")),
        ({"cache_creation_input_tokens": 7}, "messages", ("reported", "reported")),
        ({"prompt_tokens_details": {}}, "chat", ("absent", "absent")),
        ({"prompt_tokens_details": None}, "chat", ("absent", "absent")),
        ({}, "chat", ("reported", "inferred")),
        ({"prompt_tokens_details": {"cached_tokens": 1, "created_cache_tokens": 9}}, "chat", ("reported", "reported")),
    ],
)
def test_what_is_told_of_the_cache(usage: Body, dialect: str, expected: tuple[str, str]) -> None:
    """Reads and writes are reported, inferred or absent; zeros for writes where a later prompt reads are no report."""
    found = learned(Templated(usage=lambda told: told | usage), dialect)
    assert (found.reads, found.writes) == expected


def test_a_busy_endpoint_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overloaded and rate limited are tried three times in all; what stays so is told."""
    monkeypatch.setattr(servers, "AGAIN_S", 0.001)
    assert learned(Templated(first=(529, 429))).accepts == ALL | {"no_tool_call"}
    with pytest.raises(InputError, match="refuses a small prompt: overloaded, status 503: busy"):
        learned(Templated(first=(503, 503, 503)))


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(401, json={"error": {"message": "no"}}), r"refuses the API key, or wants one \(--key-env NAME"),
        (httpx.Response(404, json={}), "refuses a small prompt: other, status 404"),
        (httpx.Response(500, text="<p>"), "refuses a small prompt: other, status 500"),
        (
            httpx.Response(400, json={"error": {"message": "one\ntwo\tthree"}}),
            "bad_request, status 400: one two three$",
        ),
        (httpx.Response(200, json={"choices": [{"message": {}}]}), "answers without telling prompt tokens"),
        (httpx.Response(200, text="<p>"), "refuses a small prompt: other, status 200"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_one_line(response: httpx.Response, said: str) -> None:
    """A key that is wanted, an unknown dialect, a server's own words, no usage at all: each as what it is."""
    with pytest.raises(InputError, match=said) as caught:
        learned(lambda _: response)
    assert str(caught.value).startswith("endpoint chat: ")
    assert "\n" not in str(caught.value)


def test_a_shape_that_is_refused_later_is_told() -> None:
    """A server that takes a user's words and refuses results says which prompt it refused."""

    def refuses(body: Body) -> Refusal:
        return (400, "no tools here") if any(m["role"] == "tool" for m in body["messages"]) else None

    with pytest.raises(InputError, match=r"a prompt of user use result: refuses .* no tools here"):
        learned(Templated(refuses=refuses))


@pytest.mark.parametrize("honest", [True, False])
def test_another_cache_salt_is_cold_or_not(honest: bool) -> None:
    """Whether a server minds cache_salt is seen from what is read under one, and under another."""
    server = Templated()

    def handler(request: httpx.Request) -> httpx.Response:
        found = request.content if honest else request.content.replace(b'"cache_salt"', b'"another"')
        status, body = server.answer("POST", request.url.path, {}, found)
        return httpx.Response(status, json=body)

    options: dict[str, Any] = {"dialect": "chat", "model": "m", "clock": time.monotonic_ns, "stream": False}
    asked = HttpEndpoint(Address("http://t", {}), **options, transport=lambda: httpx.MockTransport(handler))
    assert asyncio.run(isolates(asked, Costs())) is honest


def test_words_are_chosen_by_a_tokenizers_file(tmp_path: Path) -> None:
    """Without a file all; a file that is not there, or the package that reads it, is one line."""
    assert known_words(None) == WORDS
    with pytest.raises(InputError, match=r"tokenizer\.json|pip install"):
        known_words(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("dialect", ["messages", "chat", "responses", "completions"])
def test_the_simulated_cluster_is_learned_to_the_token(
    dialect: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A replay against keepwarm serve has prompts of exactly the planned tokens in every dialect, and says in run.json
    what it learned.
    """
    calls = [call("s0", append=pieces(("lead", 100), ("user", 50)))]
    more = pieces(("answer", 40, "s0"), ("tool_result", 70))
    calls.append(call("s1", start_ns=1, prompt_parent="s0", keep=150, append=more))
    trace, run = write(tmp_path / "t.parquet", calls), tmp_path / "run"
    with running(create_app(cluster(), model="sim", cache={"rules": "engine", "ttl": "none"})) as url:
        code, _, err = keepwarm_(capsys, "replay", trace, "--endpoint", url, "-o", str(run), "--dialect", dialect)
    assert (code, err) == (0, "")
    assert {name: row["prompt"] for name, row in rows(run).items()} == {"s0": 150, "s1": 260}
    told = about(run)
    tools = set() if dialect == "completions" else {"tools"}
    assert set(told["endpoint"]["preflight"]["accepts"]) >= {"exact_output", "cache_key"} | tools
    assert (told["endpoint"]["preflight"]["reads"], told["fidelity"]["match"]) == ("reported", "tokens")
    assert told["fidelity"]["costs"]["off"] == (None if dialect == "completions" else 0)


def pieces(*parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Segments of so many tokens of some kinds."""
    return tuple(Segment(100 + tokens, tokens, kind, *rest) for kind, tokens, *rest in parts)
