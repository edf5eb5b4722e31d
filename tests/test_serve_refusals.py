"""What the simulated cluster refuses: the right status, one clear line, in the shape of the API that was asked."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import count
from typing import Any

import httpx
import pytest
from serving import ask, cluster, post, running, said, served, text

from keepwarm.harness.script import Script
from keepwarm.harness.serve import create_app
from keepwarm.replayers.times import ServiceTimes, StepTimes

GOOD: dict[str, dict[str, Any]] = {
    "messages": {"model": "m", "max_tokens": 1, "messages": [said("user", "hello")]},
    "chat/completions": {"model": "m", "max_tokens": 1, "messages": [said("user", "hello")]},
    "responses": {"model": "m", "max_output_tokens": 1, "input": "hello"},
    "completions": {"model": "m", "max_tokens": 1, "prompt": "hello"},
}


def told(response: httpx.Response, status: int) -> str:
    """The message of an error, which has this status and its dialect's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    ours = response.request.url.path.startswith("/v1/messages")
    assert set(body) == ({"type", "error"} if ours else {"error"})
    assert body.get("type", "error") == "error"
    assert isinstance(body["error"]["type"], str)
    assert "\n" not in body["error"]["message"]
    message: str = body["error"]["message"]
    return message


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A client of a cluster that takes only small bodies."""
    with served(body_bytes=10_000) as client:
        yield client


@pytest.mark.parametrize("path", GOOD)
def test_errors_have_each_apis_shape(client: httpx.Client, path: str) -> None:
    """What is no request at all, or too large, or of another type."""
    url, good = f"/v1/{path}", GOOD[path]
    json = {"content-type": "application/json"}
    assert "not JSON" in told(client.post(url, content=b'{"model": ', headers=json), 400)
    assert "not JSON" in told(client.post(url, content=b"\xff", headers=json), 400)
    assert "object" in told(client.post(url, content=b"[]", headers=json), 400)
    assert "10000" in told(client.post(url, json=good | {"user": text(0, 5000)}), 413)
    assert "json" in told(client.post(url, content=b"{}", headers={"content-type": "text/plain"}), 415)
    assert "encoding" in told(client.post(url, content=b"{}", headers={**json, "content-encoding": "gzip"}), 415)
    told(client.post(url + "/nothing", json=good), 404)
    assert told(client.get(url), 405)
    assert client.post(url + "?beta=true", json=good).status_code == 200


@pytest.mark.parametrize(
    ("path", "wrong", "words"),
    [
        ("messages", {"messages": None}, "messages: at least one"),
        ("messages", {"messages": []}, "messages: at least one"),
        ("messages", {"messages": "hello"}, "messages: expected a list"),
        ("messages", {"messages": ["hello"]}, "messages: expected a list of objects"),
        ("messages", {"messages": [said("user", 7)]}, "content: expected"),
        ("messages", {"messages": [said("wizard", "hello")]}, "messages.0.role"),
        ("messages", {"messages": [{"role": "user"}]}, "'content'"),
        ("messages", {"messages": [said("user", "")]}, "prompt is empty"),
        ("messages", {"max_tokens": 0}, "max_tokens: expected"),
        ("messages", {"max_tokens": "many"}, "max_tokens: expected"),
        ("messages", {"max_tokens": True}, "max_tokens: expected"),
        ("messages", {"tools": ["Bash"]}, "tools: expected a list of objects"),
        ("chat/completions", {"messages": [said("user", [7])]}, "content: expected"),
        ("chat/completions", {"messages": [said("assistant", "") | {"tool_calls": [{"id": "x"}]}]}, "'function'"),
        ("chat/completions", {"n": 2}, "n: only one"),
        ("chat/completions", {"max_completion_tokens": -1}, "max_completion_tokens: expected"),
        ("responses", {"input": None}, "input: expected"),
        ("responses", {"input": [{"type": "message", "role": "user"}]}, "'content'"),
        ("responses", {"input": [7]}, "of its type"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id: not supported"),
        ("responses", {"background": True}, "background: not supported"),
        ("completions", {"prompt": None}, "prompt: expected"),
        ("completions", {"prompt": ["a", "b"]}, "prompt: expected"),
        ("completions", {"prompt": [1, -2]}, "prompt: expected"),
        ("completions", {"prompt": [1, True]}, "prompt: expected"),
        ("completions", {"prompt": []}, "prompt is empty"),
        ("messages", {"cache_salt": 7}, "cache_salt: expected"),
    ],
)
def test_what_is_no_request_of_the_dialect_is_refused(
    client: httpx.Client, path: str, wrong: dict[str, Any], words: str
) -> None:
    """The message names what is wrong."""
    assert words in told(client.post(f"/v1/{path}", json=GOOD[path] | wrong), 400)


TOOL = {"type": "function", "function": {"name": "f"}, "name": "f"}
USE = {"id": "c", "type": "tool_use", "name": "f", "input": {"a": 1}, "cache_control": {"type": "ephemeral"}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "x"}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WHOLE: dict[str, dict[str, Any]] = {
    "messages": {"messages": [said("assistant", [USE]), said("user", [RESULT])], "tools": [TOOL], "system": [{}]},
    "chat/completions": {
        "messages": [{"role": "assistant", "tool_calls": [CALL]}, said("tool", ["x"])],
        "tools": [TOOL],
    },
    "responses": {
        "input": [
            said("user", [{"type": "input_text", "text": "x"}]),
            {"type": "function_call", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "output": "x"},
            {"type": "additional_tools", "tools": [TOOL]},
        ],
        "tools": [TOOL],
        "metadata": {"user_id": "{}"},
    },
    "completions": {"prompt": [[1, 2]]},
}
ODD = [None, True, 7, 1 << 40, "a\0b", [], {}, [7], [[]], [{}], {"type": []}, {"type": "tool_result", "content": [7]}]


def places(value: Any, *above: Any) -> Iterator[tuple[Any, ...]]:
    """The ways to all that stands in a value."""
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*above, name)
        yield from places(value[name], *above, name)


@pytest.mark.parametrize("path", GOOD)
def test_anything_in_a_fields_place_is_answered_or_refused(client: httpx.Client, path: str) -> None:
    """No body, however odd, is a fault of the server's; what is told of it is one line."""
    whole = GOOD[path] | WHOLE[path] | {"nvext": {"agent_hints": {"osl": 1}}, "tool_choice": "auto", "stream": False}
    for *above, name in places(whole):
        for odd in ODD:
            body = deepcopy(whole)
            inner: Any = body
            for step in above:
                inner = inner[step]
            inner[name] = odd
            response = client.post(f"/v1/{path}", json=body)
            if response.status_code != 200:
                told(response, 400)


HINTS = ["priority", "strict_priority", "osl", "speculative_prefill", "latency_sensitivity"]
REFUSED = [
    ({"session_control": {}}, "unknown field `session_control`, expected one of `greed_sampling`, `use_raw_prompt`,"),
    ({"agent_context": {}}, "unknown field `agent_context`"),
    ({"cache_control": {"ttl": "1h"}}, "unknown field `cache_control`"),
    ({"session_id": "s"}, "unknown field `session_id`"),
    ({"priority": 1}, "unknown field `priority`"),
    (
        {"agent_hints": {"predicted_osl": 1}},
        "unknown field `predicted_osl`, expected one of " + ", ".join(f"`{name}`" for name in HINTS),
    ),
    ({"router": {"x": 1}}, "unknown field `x`, expected `ttft_target` or `itl_target`"),
    ({"metadata_upload": {"x": 1}}, "unknown field `x`, expected `url`"),
    ({"agent_hints": {"priority": "high"}}, 'priority: invalid type: string "high", expected i32'),
    ({"agent_hints": {"priority": 1.5}}, "invalid type: floating point `1.5`, expected i32"),
    ({"agent_hints": {"priority": 1 << 31}}, "invalid value: integer `2147483648`, expected i32"),
    ({"agent_hints": {"strict_priority": -1}}, "invalid value: integer `-1`, expected u32"),
    ({"agent_hints": {"osl": True}}, "invalid type: boolean `true`, expected u32"),
    ({"agent_hints": {"speculative_prefill": 1}}, "invalid type: integer `1`, expected a boolean"),
    ({"agent_hints": [1]}, "invalid type: sequence"),
    ({"annotations": "x"}, 'invalid type: string "x", expected a sequence'),
    ({"annotations": [None]}, "annotations[0]: invalid type: null, expected a string"),
    ({"cache_salt": {}}, "invalid type: map, expected a string"),
    ({"token_data": [1, 1 << 32]}, "token_data[1]: invalid value: integer `4294967296`, expected u32"),
    ("x", 'invalid type: string "x"'),
]


@pytest.mark.parametrize(("nvext", "words"), REFUSED)
@pytest.mark.parametrize("path", ["messages", "responses"])
def test_nvext_knows_its_fields_and_no_others(client: httpx.Client, path: str, nvext: Any, words: str) -> None:
    """What Dynamo 1.6.1 refuses is refused in its words."""
    message = told(client.post(f"/v1/{path}", json=GOOD[path] | {"nvext": nvext}), 400)
    assert message.startswith("invalid nvext: ")
    assert words in message


@pytest.mark.parametrize("path", GOOD)
def test_nvext_as_dynamo_takes_it_is_taken(client: httpx.Client, path: str) -> None:
    """Every field that Dynamo knows, and null in any field's place."""
    hints = {"priority": -5, "strict_priority": 4, "osl": 100, "speculative_prefill": True, "latency_sensitivity": 1}
    nvext = {
        "greed_sampling": True,
        "annotations": ["query"],
        "backend_instance_id": 1 << 63,
        "token_data": [1, 2],
        "extra_fields": ["timing"],
        "routing_constraints": {"required_taints": ["a"], "preferred_taints": {"a": 1.0}},
        "router": {"ttft_target": 1, "itl_target": None},
        "request_timestamp_ms": 1.5,
        "agent_hints": hints,
    }
    for told_of in (nvext, dict.fromkeys(nvext), None, {}):
        post(client, path, GOOD[path] | {"nvext": told_of})
    post(client, path, GOOD[path], **{"x-dynamo-request-priority": "high"})


def test_what_does_not_fit_the_context_is_refused() -> None:
    """Prompt, or prompt and limit together, in the words of vLLM and of Anthropic; never is anything cut off."""
    vllm = "This model's maximum context length is 100 tokens. However, "
    with served(script=Script(longest=100, output=30)) as client:
        for path, limit in (("chat/completions", "max_tokens"), ("responses", "max_output_tokens")):

            def send(words: int, most: int | None, path: str = path, limit: str = limit) -> httpx.Response:
                field = (
                    {"input": text(0, words)} if path == "responses" else {"messages": [said("user", text(0, words))]}
                )
                return client.post(f"/v1/{path}", json={"model": "m", limit: most, **field})

            assert told(send(101, None), 400).startswith(vllm + "your prompt contains at least 101 input tokens.")
            wanted = vllm + "you requested 40 output tokens and your prompt contains at least 61 input tokens, for a "
            assert told(send(61, 40), 400).startswith(wanted + "total of at least 101 tokens.")
            assert told(send(50, 32_000), 400).startswith(vllm + "you requested 32000 output tokens")
            assert send(60, 40).status_code == 200
            assert told(send(100, None), 400).startswith(vllm)
        prompt = {"messages": [said("user", text(0, 101))]}
        too_long = told(client.post("/v1/messages", json=prompt | {"max_tokens": 32_000}), 400)
        assert too_long == "prompt is too long: 101 tokens > 100 maximum"
        prompt = {"messages": [said("user", text(0, 90))]}
        both = told(client.post("/v1/messages", json=prompt | {"max_tokens": 11}), 400)
        assert both.startswith("input length and `max_tokens` exceed context limit: 90 + 11 > 100")
        cut = ask(client, *prompt["messages"], max_tokens=64_000)
        assert (cut["usage"]["output_tokens"], cut["stop_reason"]) == (10, "model_context_window_exceeded")


def test_what_no_worker_can_hold_is_refused() -> None:
    """A prompt larger than a batching worker's cache is an overflow, not a wait without end."""
    with served(batching=StepTimes(fixed_s=0.0), capacity=2) as client:
        assert "overflow" in told(client.post("/v1/messages", json=GOOD["messages"] | {"system": text(0, 64)}), 400)
        assert post(client, "messages", GOOD["messages"])["usage"]["output_tokens"] == 1


def test_a_websocket_is_declined_at_once() -> None:
    """Codex tries one first, and posts when it is told that there is none."""
    with served() as client:
        headers = {
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-key": "x",
            "sec-websocket-version": "13",
        }
        assert client.get("/v1/responses", headers=headers).status_code == 426
        assert client.get("/v1/responses").headers["allow"] == "POST"


def test_a_fault_in_the_cluster_is_told_to_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits when it strikes does not hang."""
    broken = cluster(service=ServiceTimes(base_s=0.05))
    sound, advanced = broken.advance, count()

    def advance(now_ns: int) -> Any:
        if next(advanced) == 2:
            raise RuntimeError("out of blocks")
        return sound(now_ns)

    monkeypatch.setattr(broken, "advance", advance)
    app = create_app(broken, model="sim")
    with running(app) as url, httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        message = told(client.post("/v1/messages", json=GOOD["messages"]), 500)
    assert "out of blocks" in message
