"""The simulated worker over HTTP: both dialects, token accounts worked out by hand, errors in each API's own shape."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import PIPE
from typing import Any

import httpx
import orjson
import pytest

from keepwarm.harness.serve import create_app, running
from keepwarm.replayers.cache import PrefixCache
from keepwarm.replayers.worker import ServiceTimes, Worker
from keepwarm.traces.errors import InputError

AT_ONCE = ServiceTimes(base_s=0.0, prefill_tps=1e9, decode_tps=1e9)
HEADERS = {"authorization": "Bearer any", "x-api-key": "any", "anthropic-version": "2023-06-01"}


@contextmanager
def served(
    *,
    block: int = 16,
    capacity: int | None = None,
    managed: bool = False,
    ttl_s: float | str | None = None,
    speed: float = 1.0,
    service: ServiceTimes = AT_ONCE,
    **options: Any,
) -> Iterator[httpx.Client]:
    """A client of a simulated worker that is served for as long as the block runs."""
    cache = PrefixCache(block=block, capacity=capacity)
    worker = Worker(cache, managed=managed, ttl_s=ttl_s, service=service, speed=speed)
    app = create_app(worker, model="sim", speed=speed, ttl_s=ttl_s, **options)
    with running(app) as url, httpx.Client(base_url=url, headers=HEADERS, timeout=30, trust_env=False) as client:
        yield client


def text(first: int, count: int) -> str:
    """Words w<first>, w<first + 1>, …; two texts share a word only where they share its number."""
    return " ".join(f"w{number}" for number in range(first, first + count))


def said(role: str, content: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def ask(client: httpx.Client, *turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The answer of the Messages API to some turns, not streamed, one token long unless told otherwise."""
    body = {"model": "m", "max_tokens": 1, "messages": list(turns), **fields}
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def account(answer: dict[str, Any]) -> tuple[int, int, int]:
    """Uncached, read and written tokens."""
    usage = answer["usage"]
    return usage["input_tokens"], usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]


def test_engine_rules_count_whole_blocks() -> None:
    """40 words in blocks of 16: two written, then read; a prompt of whole blocks computes and writes its last again."""
    with served() as client:
        assert account(ask(client, said("user", text(0, 40)))) == (8, 0, 32)
        assert account(ask(client, said("user", text(0, 40)))) == (8, 32, 0)
        assert account(ask(client, said("user", text(0, 64)))) == (0, 32, 32)
        assert account(ask(client, said("user", text(0, 64)))) == (0, 48, 16)
        assert account(ask(client, said("user", text(0, 31) + " other " + text(32, 8)))) == (8, 16, 16)


def test_answer_sent_back_is_readable_under_engine_rules_only() -> None:
    """A prompt of 40 words and its answer of 24 are 64 readable ones; on a managed API only what was marked is."""
    mark = {"type": "ephemeral"}
    for managed, expected in ((False, (10, 64, 0)), (True, (0, 40, 34))):
        with served(block=16 if not managed else 1, managed=managed, ttl_s=300) as client:
            first = said("user", [{"type": "text", "text": text(0, 40), "cache_control": mark}])
            answer = ask(client, first, max_tokens=24)["content"][0]["text"]
            assert len(answer.split(" ")) == 24
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
    with served(block=1, managed=True, ttl_s="as-recorded") as client:
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
    with served(block=1, managed=True, ttl_s="as-recorded") as client:
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
        (everything(messages=[*TURNS[:2], said("user", text(200, 32) + " more")]), 36 + 16 + 16 + 32),
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
    with served(block=1, managed=True, ttl_s="as-recorded", speed=1000) as client:
        assert account(ask(client, said("user", blocks))) == (0, 0, 30)
        time.sleep(0.4)
        assert account(ask(client, said("user", blocks))) == (0, 20, 10)


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [orjson.loads(one) for one in data if one != "[DONE]"]


def test_messages_stream_tells_what_the_whole_answer_tells() -> None:
    """A stream's words, usage and stop reason are those of the same request not streamed, in the API's order."""
    body = {"model": "m", "max_tokens": 50, "messages": [said("user", text(0, 40))]}
    answers = []
    for stream in (False, True):
        with served(service=ServiceTimes(0.0, 1e9, 1000.0)) as client:
            answers.append(client.post("/v1/messages", json=body | {"stream": stream}))
    whole, stream_events = answers[0].json(), events(answers[1])
    kinds = [event["type"] for event in stream_events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_delta") > 5
    spoken = "".join(event["delta"]["text"] for event in stream_events if event["type"] == "content_block_delta")
    assert spoken == whole["content"][0]["text"]
    assert len(spoken.split(" ")) == 50
    assert stream_events[-2]["usage"] == whole["usage"]
    assert whole["usage"]["output_tokens"] == 50
    assert stream_events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "end_turn"
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
    assert told[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "stop"
    assert not any(event.get("usage") for event in events(answers[2]))


def test_answer_is_as_long_as_asked_unless_the_limit_is_none() -> None:
    """The limit is the length, up to what agents send as a formality or leave out."""
    with served(output_tokens=9) as client:
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


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_errors_have_each_apis_shape(path: str) -> None:
    """What cannot be answered is refused with the right status, and told in the dialect's own shape."""
    good = {"model": "m", "max_tokens": 1, "messages": [said("user", "hello")]}
    with served(body_bytes=10_000) as client:
        sends: list[tuple[int, Callable[[], httpx.Response]]] = [
            (400, lambda: client.post(path, content=b'{"model": ')),
            (400, lambda: client.post(path, content=b"[]")),
            (400, lambda: client.post(path, json={"model": "m", "max_tokens": 1})),
            (400, lambda: client.post(path, json=good | {"messages": []})),
            (400, lambda: client.post(path, json=good | {"messages": "hello"})),
            (400, lambda: client.post(path, json=good | {"messages": ["hello"]})),
            (400, lambda: client.post(path, json=good | {"messages": [said("user", 7)]})),
            (400, lambda: client.post(path, json=good | {"max_tokens": 0})),
            (400, lambda: client.post(path, json=good | {"max_tokens": "many"})),
            (404, lambda: client.post(path + "/nothing", json=good)),
            (405, lambda: client.get(path)),
            (413, lambda: client.post(path, json=good | {"system": text(0, 5000)})),
            (200, lambda: client.post(path + "?beta=true", json=good)),
        ]
        for status, send in sends:
            response = send()
            assert response.status_code == status, response.text
            if status != 200:
                body = response.json()
                assert isinstance(body["error"]["message"], str)
                assert isinstance(body["error"]["type"], str)
                assert (body.get("type") == "error") == (path == "/v1/messages")


def test_health_says_what_is_served() -> None:
    """A client learns that times are scaled, and under which rules the cache works."""
    with served(block=8, capacity=100, ttl_s=300, speed=60) as client:
        health = client.get("/health").json()
        assert health["server"] == "keepwarm serve"
        assert health["speed"] == 60
        assert health["cache"] == {"ttl": 300, "block": 8, "capacity": 100, "rules": "engine"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "sim"
        assert client.head("/").status_code == 200


def test_taken_port_is_told_in_one_line() -> None:
    """A port that something else listens on is bad input."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        app = create_app(Worker(PrefixCache()), model="sim", speed=1, ttl_s=None)
        with pytest.raises(InputError, match=f"127.0.0.1:{port}"), running(app, port=port):
            pass


def test_interrupt_ends_serving_quietly() -> None:
    """A process that serves until it is interrupted tells its address first and leaves without a word."""
    script = """
from keepwarm.harness.serve import create_app, serve_forever
from keepwarm.replayers.cache import PrefixCache
from keepwarm.replayers.worker import Worker

app = create_app(Worker(PrefixCache()), model="sim", speed=1, ttl_s=None)
serve_forever(app, "127.0.0.1", 0, told=lambda url: print(url, flush=True))
print("done", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script], stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.get(url + "/health", trust_env=False).json()["server"] == "keepwarm serve"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "done\n", "")
