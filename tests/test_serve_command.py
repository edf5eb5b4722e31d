"""``keepwarm serve`` as a command: what it refuses before it listens, and what its options do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from click.testing import CliRunner
from real.recording import KEEPWARM
from serving import account, ask, post, said, text

from keepwarm.harness.cli import cli


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--router", "nosuch"], "'nosuch' is not one of 'round_robin'"),
        (["--capacity", "-1"], "-1 is not in the range"),
        (["--workers", "0"], "0 is not in the range"),
        (["--block", "0"], "0 is not in the range"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--speed", "0"], "--speed"),
        (["--max-model-len", "0"], "0 is not in the range"),
        (["--tool-turns", "-1"], "-1 is not in the range"),
        (["--tool", "Bash"], "'Bash': expected NAME={...}"),
        (["--tool", "Bash={"], "expected NAME={...}"),
        (["--tool", "Bash=[1]"], "expected NAME={...}"),
        (["--tool", "={}"], "expected NAME={...}"),
        (["--hardware", "abacus"], "'abacus' is not one of"),
        (["--rules", "anthropic", "--capacity", "5"], "cannot both be given"),
        (["--rules", "engine", "--cache-ttl", "as-recorded"], "needs --rules managed"),
        (["--background-workers", "1"], "must be fewer than --workers"),
        (["--router-temperature", "1"], "--router-temperature needs --router kv_aware"),
        (["--nosuch"], "No such option"),
    ],
)
def test_wrong_options_are_told_in_one_line(options: list[str], told: str) -> None:
    """Exit code 2, and the last line says what is wrong."""
    done = CliRunner().invoke(cli, ["serve", "--port", "0", *options])
    assert done.exit_code == 2
    assert told in done.output.splitlines()[-1]


@contextmanager
def serving(*options: str) -> Iterator[httpx.Client]:
    """A client of the command as a process."""
    command = [*KEEPWARM, "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = re.search(r"http://\S+", server.stderr.readline())
            assert url is not None
            with httpx.Client(base_url=url[0], timeout=30, trust_env=False) as client:
                yield client
        finally:
            server.terminate()


def test_options_reach_the_cluster() -> None:
    """The model's name, blocks, workers, context, tools and how often they are called."""
    options = ["--model", "mine", "--block", "8", "--workers", "2", "--router", "kv_aware", "--base-s", "0"]
    options += [
        "--max-model-len",
        "500",
        "--tool",
        'Bash={"command": "ls"}',
        "--tool-turns",
        "0",
        "--decode-tps",
        "1e6",
    ]
    with serving(*options) as client:
        model = client.get("/v1/models").json()["data"][0]
        assert (model["id"], model["max_model_len"]) == ("mine", 500)
        reads = [account(ask(client, said("user", text(0, 30))))[1] for _ in range(3)]
        assert reads == [0, 24, 24]
        assert 'engine="1",model_name="mine"' in client.get("/metrics").text
        assert client.post("/v1/completions", json={"prompt": [1] * 501}).status_code == 400
        tools = [{"type": "function", "name": "Bash"}]
        assert post(client, "responses", {"input": "hello", "tools": tools})["output"][0]["type"] == "message"


@pytest.mark.parametrize(
    ("given", "told"), [(["--cache-ttl", "0"], 0), (["--cache-ttl", "none"], "none"), ([], "none")]
)
def test_health_tells_the_ttl(given: list[str], told: object) -> None:
    """None at all is another thing than one that lets nothing live."""
    with serving(*given) as client:
        assert client.get("/health").json()["cache"]["ttl"] == told


def test_a_vendors_rules_are_served() -> None:
    """Anthropic's: nothing is kept below the model's minimum, nor without a mark; OpenAI tells of no writes."""
    mark = {"type": "ephemeral"}
    with serving("--rules", "anthropic", "--base-s", "0", "--prefill-tps", "1e9") as client:
        assert client.get("/health").json()["cache"]["rules"] == "anthropic"
        for words, marks, expected in ((1023, mark, 0), (1024, mark, 1024), (1100, None, 0)):
            turn = said("user", text(10_000 * words, words))
            for _ in range(2):
                told = account(ask(client, turn, model="claude-sonnet-4-5", cache_control=marks))
            assert told[1] == expected
    with serving("--rules", "openai", "--base-s", "0", "--prefill-tps", "1e9") as client:
        asked = {"model": "gpt-5", "input": text(0, 1300), "max_output_tokens": 1}
        told_of = [post(client, "responses", asked)["usage"]["input_tokens_details"] for _ in range(2)]
        assert told_of == [{"cached_tokens": 0}, {"cached_tokens": 1280}]
