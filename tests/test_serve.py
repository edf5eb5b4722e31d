"""The simulated cluster over HTTP: token accounts worked out by hand, streams, and what makes a prompt another one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import httpx
import pytest
from serving import account, ask, cluster, events, running, said, served, text

from keepwarm.harness.script import Script
from keepwarm.harness.serve import create_app
from keepwarm.replayers.times import ServiceTimes
from keepwarm.traces.errors import InputError


def test_engine_rules_count_whole_blocks() -> None:
    """40 words in blocks of 16: two written, then read; a prompt of whole blocks computes and writes its last again."""
    with served() as client:
        assert account(ask(client, said("user", text(0, 40)))) == (8, 0, 32)
        assert account(ask(client, said("user", text(0, 40)))) == (8, 32, 0)
        assert account(ask(client, said("user", text(0, 64)))) == (0, 32, 32)
        assert account(ask(client, said("user", text(0, 64)))) == (0, 48, 16)
        assert account(ask(client, said("user", text(0, 31) + " other " + text(32, 8)))) == (8, 16, 16)


def test_answer_sent_back_is_readable_under_engine_rules_only() -> None:
    """Of 40 words of prompt and 25 of answer all but the last are readable; on a managed API what was marked."""
    mark = {"type": "ephemeral"}
    for managed, expected in ((False, (11, 64, 0)), (True, (0, 40, 35))):
        with served(rules="managed" if managed else "engine", ttl_s=300) as client:
            first = said("user", [{"type": "text", "text": text(0, 40), "cache_control": mark}])
            answer = ask(client, first, max_tokens=25)["content"][0]["text"]
            assert len(answer.split(" ")) == 25
            more = said("user", [{"type": "text", "text": text(100, 10), "cache_control": mark}])
            second = ask(client, first, said("assistant", answer), more)
            assert account(second) == expected


def test_marks_decide_what_a_managed_api_caches() -> None:
    """Writes go up to the last mark, each mark's TTL holds for the words it covers, and unmarked prompts write none."""
    hour, usual = {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral"}
    system = [{"type": "text", "text": text(0, 30), "cache_control": hour}]
    turn = said(
        "user",
        [{"type": "text", "text": text(50, 12), "cache_control": usual}, {"type": "text", "text": text(80, 5)}],
    )
    with served(rules="managed") as client:
        assert account(ask(client, said("user", text(500, 20)))) == (20, 0, 0)
        assert account(ask(client, said("user", text(500, 20)))) == (20, 0, 0)
        first = ask(client, turn, system=system)
        assert account(first) == (5, 0, 42)
        split = {"ephemeral_5m_input_tokens": 12, "ephemeral_1h_input_tokens": 30}
        assert first["usage"]["cache_creation"] == split
        assert account(ask(client, turn, system=system)) == (5, 42, 0)
        assert account(ask(client, said("user", text(900, 4)), system=system, cache_control=usual)) == (0, 30, 4)


def test_chat_prompt_is_marked_whole_under_managed_rules() -> None:
    """The chat dialect has no marks, so a managed worker caches each prompt to its end."""
    with served(rules="managed") as client:
        body = {"model": "m", "max_tokens": 1, "messages": [said("user", text(0, 20))]}
        client.post("/v1/chat/completions", json=body)
        usage = client.post("/v1/chat/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 20, "created_cache_tokens": 0}


TOOL = {"name": "Bash", "description": text(0, 20), "input_schema": {"type": "object", "properties": {}}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": text(100, 16), "timeout": 5}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": text(200, 32)}
TURNS = [said("user", text(300, 16)), said("assistant", [USE]), said("user", [RESULT])]


def everything(**changed: Any) -> dict[str, Any]:
    """A body with tools, system and every kind of block; ``changed`` fields replace it."""
    return {"model": "m", "max_tokens": 1, "tools": [TOOL], "system": text(400, 16), "messages": TURNS, **changed}


@pytest.mark.parametrize(
    "same",
    [
        everything(system=[{"type": "text", "text": text(400, 16), "cache_control": {"type": "ephemeral"}}]),
        everything(system=[{"type": "text", "text": text(400, 9)}, {"type": "text", "text": text(409, 7)}]),
        everything(system="  " + text(400, 16).replace(" ", "\n\t  ")),
        everything(tools=[dict(reversed(TOOL.items()), cache_control={"type": "ephemeral"})]),
        everything(messages=[TURNS[0], said("assistant", [USE | {"id": "toolu_2"}]), TURNS[2]]),
        everything(
            messages=[*TURNS[:2], said("user", [RESULT | {"content": [{"type": "text", "text": text(200, 32)}]}])]
        ),
        dict(reversed(everything(metadata={"user_id": "u"}, temperature=0.5).items())),
    ],
    ids=["mark and list", "two blocks", "white space", "key order", "ids", "result as list", "parameters"],
)
def test_what_no_model_sees_changes_nothing(same: dict[str, Any]) -> None:
    """Marks, shapes, key order, ids and parameters leave a prompt what it is: all but its last word is read."""
    with served(block=1) as client:
        total = sum(account(client.post("/v1/messages", json=everything()).json()))
        assert account(client.post("/v1/messages", json=same).json()) == (0, total - 1, 1)


@pytest.mark.parametrize(
    ("other", "read"),
    [
        (everything(messages=[said("user", text(999, 1)), *TURNS[1:]]), 36),
        (everything(messages=[said("system", text(300, 16)), *TURNS[1:]]), 36),
        (everything(system=text(999, 16)), 20),
        (everything(tools=[TOOL | {"name": "Zsh"}]), 19),
        (
            everything(messages=[*TURNS[:2], said("user", [RESULT | {"content": text(200, 32) + " more"}])]),
            36 + 16 + 16 + 32,
        ),
    ],
    ids=["text", "role", "system", "tool", "grown"],
)
def test_what_a_model_sees_changes_the_prompt_from_there_on(other: dict[str, Any], read: int) -> None:
    """Another word, role, system text or tool is read up to where it differs; the tool list here is 20 words of JSON,
    its name between the last two."""
    with served(block=1) as client:
        ask(client, *everything()["messages"], **{name: everything()[name] for name in ("tools", "system")})
        assert account(client.post("/v1/messages", json=other).json())[1] == read


def test_ttl_runs_as_many_times_faster_as_the_worker() -> None:
    """300 s at speed 30,000 are 10 ms: gone after 50 ms; at speed 1 they are not."""
    for speed, read in ((30_000.0, 0), (1.0, 32)):
        with served(ttl_s=300, speed=speed) as client:
            ask(client, said("user", text(0, 40)))
            time.sleep(0.05)
            assert account(ask(client, said("user", text(0, 40))))[1] == read


def test_an_hours_mark_outlives_a_usual_one() -> None:
    """At speed 1,000 marks last 0.3 s and 3.6 s: after 0.4 s what the longer one covers is read and the rest is not."""
    blocks = [
        {"type": "text", "text": text(0, 20), "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"type": "text", "text": text(20, 10), "cache_control": {"type": "ephemeral"}},
    ]
    with served(rules="managed", speed=1000) as client:
        assert account(ask(client, said("user", blocks))) == (0, 0, 30)
        time.sleep(0.4)
        assert account(ask(client, said("user", blocks))) == (0, 20, 10)


def test_messages_stream_tells_what_the_whole_answer_tells() -> None:
    """A stream's words, usage and stop reason are those of the same request not streamed, in the API's order."""
    body = {"model": "m", "max_tokens": 50, "messages": [said("user", text(0, 40))]}
    answers = []
    for stream in (False, True):
        with served(service=ServiceTimes(0.0, 1e9, 200.0)) as client:
            answers.append(client.post("/v1/messages", json=body | {"stream": stream}))
    whole, stream_events = answers[0].json(), events(answers[1])
    kinds = [event["type"] for event in stream_events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_delta") > 1
    spoken = "".join(event["delta"]["text"] for event in stream_events if event["type"] == "content_block_delta")
    assert spoken == whole["content"][0]["text"]
    assert len(spoken.split(" ")) == 50
    assert stream_events[-2]["usage"] == whole["usage"]
    assert whole["usage"]["output_tokens"] == 50
    assert stream_events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "max_tokens"
    assert stream_events[0]["message"]["usage"] == whole["usage"] | {"output_tokens": 0}


def test_chat_stream_tells_what_the_whole_answer_tells() -> None:
    """The same for the chat dialect; a stream tells its usage only if asked to."""
    body = {"model": "m", "max_completion_tokens": 50, "messages": [said("user", text(0, 40))]}
    answers = []
    for extra in ({}, {"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}):
        with served() as client:
            answers.append(client.post("/v1/chat/completions", json=body | extra))
    whole, told = answers[0].json(), events(answers[1])
    assert answers[1].text.endswith("data: [DONE]\n\n")
    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    spoken = "".join(event["choices"][0]["delta"].get("content", "") for event in told if event["choices"])
    assert spoken == whole["choices"][0]["message"]["content"]
    assert len(spoken.split(" ")) == 50
    assert told[-1]["usage"] == whole["usage"]
    assert whole["usage"] == {
        "prompt_tokens": 40,
        "completion_tokens": 50,
        "total_tokens": 90,
        "prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": 32},
    }
    assert told[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert not any(event.get("usage") for event in events(answers[2]))


def test_answer_is_as_long_as_asked_unless_the_limit_is_none() -> None:
    """The limit is the length, up to what agents send as a formality or leave out."""
    with served(script=Script(output=9)) as client:
        for limit, length in ((1, 1), (2, 2), (7, 7), (31_999, 31_999), (32_000, 9), (64_000, 9), (None, 9)):
            answer = ask(client, said("user", "hello"), max_tokens=limit)
            assert answer["usage"]["output_tokens"] == len(answer["content"][0]["text"].split(" ")) == length


def test_client_that_leaves_lets_go_of_the_cache() -> None:
    """While a call runs its two blocks fill the cache of two; once its client has left, another prompt finds room."""

    def reads_again(client: httpx.Client) -> bool:
        ask(client, said("user", text(1000, 33)))
        return account(ask(client, said("user", text(1000, 33))))[1] == 32

    slow = {"model": "m", "max_tokens": 30_000, "stream": True, "messages": [said("user", text(0, 33))]}
    with served(capacity=2, service=ServiceTimes(0.0, 1e9, 10.0)) as client:
        with client.stream("POST", "/v1/messages", json=slow) as response:
            lines = response.iter_lines()
            next(lines)
            assert not reads_again(client)
        assert any(reads_again(client) for _ in range(50))


def test_health_says_what_is_served() -> None:
    """A client learns that times are scaled, and under which rules the cache works."""
    with served(block=8, capacity=100, ttl_s=300, speed=60) as client:
        health = client.get("/health").json()
        assert health["server"] == "keepwarm serve"
        assert health["speed"] == 60
        assert health["cache"] == {"ttl_s": 300, "block": 8, "capacity": 100, "rules": "engine"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "sim"
        assert client.head("/").status_code == 200


def test_taken_port_is_told_in_one_line() -> None:
    """A port that something else listens on is bad input."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        app = create_app(cluster(), model="sim")
        with pytest.raises(InputError, match=f"127.0.0.1:{port}"), running(app, port=port):
            pass


def test_interrupt_ends_serving_quietly() -> None:
    """A process that serves until it is interrupted tells its address first and leaves without a word."""
    script = """
from keepwarm.harness.serve import create_app, serve_forever
from serving import cluster

app = create_app(cluster(), model="sim")
serve_forever(app, "127.0.0.1", 0, told=lambda url: print(url, flush=True))
print("done", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script], stdout=PIPE, stderr=PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.get(url + "/health", trust_env=False).json()["server"] == "keepwarm serve"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "done\n", "")
