"""What stands behind the HTTP face: hints, sessions, caches of several workers, time, clients that leave, metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import account, ask, events, post, said, served, text

from keepwarm.harness.script import Script
from keepwarm.replayers.times import ServiceTimes, StepTimes

LABELS = {"engine", "model_name"}
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "num_preemptions",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_decode_time_seconds",
    "e2e_request_latency_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
}


class Seen:
    """The metrics page."""

    def __init__(self, client: httpx.Client) -> None:
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        self.families = {one.name: one for one in text_string_to_metric_families(response.text)}

    def value(self, name: str, **labels: str) -> float:
        """The sum of a sample over the labels that are not given."""
        samples = [sample for family in self.families.values() for sample in family.samples]
        found = [one for one in samples if one.name == f"vllm:{name}" and labels.items() <= one.labels.items()]
        return sum(one.value for one in found)


def test_metrics_have_vllms_names_and_add_up() -> None:
    """Counters are the sums of the accounts, histograms count every call; types and labels are those of vLLM 0.32."""
    with served(service=ServiceTimes(0.02, 1e9, 100.0), workers=2) as client:
        first = ask(client, said("user", text(0, 40)), max_tokens=5)
        ask(client, said("user", text(500, 40)), max_tokens=32_000)
        again = ask(client, said("user", text(0, 40)), max_tokens=5)
        seen = Seen(client)
    for names, kind in ((GAUGES - {"kv_cache_usage_perc"}, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        assert {name: seen.families[f"vllm:{name}"].type for name in names} == dict.fromkeys(names, kind)
    assert {frozenset(s.labels) for s in seen.families["vllm:prompt_tokens"].samples} == {frozenset(LABELS)}
    assert {s.labels["engine"] for s in seen.families["vllm:prompt_tokens"].samples} == {"0", "1"}
    assert account(first) == (8, 0, 32)
    assert account(again) == (8, 32, 0)
    assert seen.value("prefix_cache_queries_total") == seen.value("prompt_tokens_total") == 120
    assert seen.value("prefix_cache_hits_total", engine="0", model_name="sim") == 32
    assert seen.value("prompt_tokens_by_source_total", source="local_cache_hit") == 32
    assert seen.value("prompt_tokens_by_source_total", source="local_compute") == 88
    assert seen.value("generation_tokens_total") == 5 + 128 + 5
    assert seen.value("request_success_total", finished_reason="length") == 2
    assert seen.value("request_success_total", finished_reason="stop") == 1
    assert {seen.value(f"{name}_count") for name in HISTOGRAMS - {"inter_token_latency_seconds"}} == {3}
    assert seen.value("inter_token_latency_seconds_count") == 4 + 127 + 4
    assert seen.value("inter_token_latency_seconds_sum") == pytest.approx(1.35)
    assert seen.value("time_to_first_token_seconds_bucket", le="0.01") == 0
    assert seen.value("time_to_first_token_seconds_bucket", le="0.025") == 3
    assert seen.value("request_prompt_tokens_sum") == 120


def test_metrics_are_the_wall_clocks() -> None:
    """A cluster ten times as fast as its times say has a tenth of its latencies."""
    with served(service=ServiceTimes(0.3, 1e9, 1e9), speed=10) as client:
        ask(client, said("user", "hello"))
        assert Seen(client).value("time_to_first_token_seconds_sum") == pytest.approx(0.03)


def test_a_batching_workers_state_is_told() -> None:
    """While a call decodes it runs, and its blocks are in use; then neither."""
    with served(batching=StepTimes(fixed_s=0.01), capacity=100) as client:
        body = {"model": "m", "max_tokens": 1000, "stream": True, "messages": [said("user", text(0, 160))]}
        with client.stream("POST", "/v1/messages", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            seen = Seen(client)
            assert seen.value("num_requests_running") == 1
            assert 0.1 <= seen.value("kv_cache_usage_perc") < 0.5
        assert _comes(lambda: Seen(client).value("num_requests_running") == 0)
        assert Seen(client).value("kv_cache_usage_perc") == 0


def _comes(holds: Any) -> bool:
    """Whether something comes to hold."""
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(holds())


def test_resetting_forgets_everything() -> None:
    """The same request is cold again after a reset, and then warm."""
    with served() as client:
        reads = []
        for _ in range(2):
            assert client.post("/reset_prefix_cache").json() == {"success": True}
            reads += [account(ask(client, said("user", text(0, 40))))[1] for _ in range(2)]
    assert reads == [0, 32, 0, 32]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_call(stream: bool) -> None:
    """Nothing runs any more, and the call is counted as aborted."""
    with served(service=ServiceTimes(0.0, 1e9, 10.0)) as client:
        body = {"model": "m", "max_tokens": 30_000, "stream": stream, "messages": [said("user", "hello")]}
        if stream:
            with client.stream("POST", "/v1/messages", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/messages", json=body, timeout=0.3)
        assert _comes(lambda: Seen(client).value("request_success_total", finished_reason="abort") == 1)
        assert Seen(client).value("num_requests_running") == 0


WHOSE = [
    {"x-dynamo-session-id": "{}"},
    {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "{}"},
    {"x-claude-code-session-id": "{}"},
    {"session-id": "{}"},
    {"x-session-id": "{}"},
]


@pytest.mark.parametrize("headers", WHOSE)
def test_a_session_is_known_by_its_clients_header(headers: dict[str, str]) -> None:
    """A sticky router keeps each of four sessions on one of two workers, though their calls take turns."""
    names = "abcd"
    with served(workers=2, router="sticky") as client:
        where: dict[str, set[str]] = {name: set() for name in names}
        for name in names * 3:
            before = _calls(client)
            post(client, "responses", {"input": "hello"}, **{key: v.format(name) for key, v in headers.items()})
            where[name] |= {engine for engine, calls in _calls(client).items() if calls > before[engine]}
    assert [len(engines) for engines in where.values()] == [1] * 4


def test_a_cache_key_is_a_session_too() -> None:
    """OpenAI's prompt_cache_key keeps calls together where no header does."""
    with served(workers=2, router="sticky") as client:
        for _ in range(4):
            post(client, "responses", {"input": "hello", "prompt_cache_key": "k"})
        assert sorted(_calls(client).values()) == [0, 4]


def _calls(client: httpx.Client) -> dict[str, float]:
    """Calls by worker."""
    seen = Seen(client)
    return {engine: seen.value("request_prompt_tokens_count", engine=engine) for engine in "01"}


def _finished(client: httpx.Client, asked: list[dict[str, Any]]) -> Iterator[int]:
    """The numbers of requests sent one after the other, in the order in which they are answered."""
    done: list[int] = []

    def send(number: int, headers: dict[str, str], fields: dict[str, Any]) -> None:
        ask_with = {"model": "m", "max_tokens": 1, "messages": [said("user", f"number {number}")], **fields}
        post(client, "messages", ask_with, **headers)
        done.append(number)

    with ThreadPoolExecutor(len(asked)) as pool:
        for number, one in enumerate(asked):
            pool.submit(send, number, one.get("headers", {}), {k: v for k, v in one.items() if k != "headers"})
            assert _comes(lambda: _waiting(client) >= number + 1)  # noqa: B023
    yield from done


def _waiting(client: httpx.Client) -> float:
    seen = Seen(client)
    return seen.value("num_requests_running") + seen.value("num_requests_waiting")


def test_hints_decide_who_waits() -> None:
    """One call at a time: strict priority first, then priority, by body or by header, whose word counts more."""
    low = {"nvext": {"agent_hints": {"priority": -5}}}
    asked: list[dict[str, Any]] = [
        {"max_tokens": 15},
        {},
        low,
        {"nvext": {"agent_hints": {"priority": 5}}},
        {**low, "headers": {"x-dynamo-request-priority": "7"}},
        {"headers": {"x-dynamo-request-strict-priority": "1"}},
    ]
    with served(batching=StepTimes(fixed_s=0.15), max_seqs=1, queue="priority") as client:
        assert list(_finished(client, asked)) == [0, 5, 4, 3, 1, 2]


def test_a_stream_keeps_the_models_pace() -> None:
    """60 tokens at 100 a second: about as many events, none of them ahead of its time."""
    with served(service=ServiceTimes(0.0, 1e9, 100.0)) as client:
        body = {"model": "m", "max_tokens": 60, "stream": True, "messages": [said("user", "hello")]}
        heard: list[tuple[float, int]] = []
        begun = time.monotonic()
        with client.stream("POST", "/v1/messages", json=body) as response:
            for line in response.iter_lines():
                if '"text_delta"' in line:
                    words = line.partition('"text":"')[2].partition('"')[0].split()
                    heard.append((time.monotonic() - begun, len(words) + (heard[-1][1] if heard else 0)))
    assert heard[-1][1] == 60
    assert all(at >= (words - 1) * 0.01 - 0.001 for at, words in heard)
    assert all(later > sooner for (_, sooner), (_, later) in pairwise(heard))


def test_vendors_tell_blocks_apart() -> None:
    """Anthropic's rules look 20 content blocks back for what was cached: 20 are near enough, 21 are too many."""
    words = [{"type": "text", "text": text(100 * i, 60)} for i in range(60)]
    mark = {"cache_control": {"type": "ephemeral"}}
    reads = []
    for further in (18, 19, 20, 21):
        with served(rules="anthropic", script=Script()) as client:
            for upto in (20, 20 + further):
                blocks = [*words[: upto - 1], words[upto - 1] | mark]
                answer = ask(client, said("user", blocks), model="claude-sonnet-4-5")
            reads.append(account(answer)[1])
    assert reads == [1200, 1200, 0, 0]


@pytest.mark.parametrize(("rules", "writes"), [("openai", None), ("openai-priced", 1280)])
def test_openai_rules_answer_in_their_vendors_fields(rules: str, writes: int | None) -> None:
    """Tokens written stand under OpenAI's name where it prices them, and nowhere where it does not."""
    with served(rules=rules) as client:
        body = {"model": "gpt-5", "max_tokens": 1, "messages": [said("user", text(0, 1280))]}
        details = post(client, "chat/completions", body)["usage"]["prompt_tokens_details"]
        assert details == {"cached_tokens": 0} | ({} if writes is None else {"cache_write_tokens": writes})
        again = client.post(
            "/v1/chat/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
        )
        assert events(again)[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 1280
