"""The real vLLM and Dynamo as the tests start them: what they say of tokens is what each is known to cache.

``tests/real/install.sh dynamo vllm`` fetches them; the test of an absent one skips.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from real import started

pytestmark = pytest.mark.slow
Told = tuple[int, int, int]


def counted(url: str, *names: str) -> Told:
    """The server's own counters of prompt, cached and answered tokens, over all labels."""
    page = httpx.get(f"{url}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    prompt, cached, answered = (int(sum(s.value for s in samples if s.name == name)) for name in names)
    return prompt, cached, answered


def session(engine: started.Engine, *outputs: int) -> list[Told]:
    """Prompt, cached and answered tokens of one user's calls, in which the server's own answers come back."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "You name things. " * 50}]
    told = []
    for output in outputs:
        messages.append({"role": "user", "content": "and now import the next module"})
        body: dict[str, Any] = {"model": engine.model, "messages": messages, "max_tokens": output}
        response = httpx.post(f"{engine.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        said, usage = response.json()["choices"][0]["message"], response.json()["usage"]
        messages.append({"role": "assistant", "content": said["content"]})
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        told.append((usage["prompt_tokens"], cached, usage["completion_tokens"]))
    return told


def test_vllm() -> None:
    """Answers are as long as asked for, and come back as the tokens that they were: cached are the whole blocks of the
    last call's prompt and answer, without the answer's last token. The counters say the same.
    """
    with started.vllm("--enable-per-request-metrics", length=4096, blocks=257) as engine:
        told = session(engine, 40, 70, 30, 1)
        counters = counted(
            engine.url, "vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total", "vllm:generation_tokens_total"
        )
        reset = httpx.post(f"{engine.url}/reset_prefix_cache", trust_env=False)
        again = session(engine, 1)
    assert [answered for _, _, answered in told] == [40, 70, 30, 1]
    assert [cached for _, cached, _ in told] == [0, *((prompt + out - 1) // 32 * 32 for prompt, _, out in told[:-1])]
    assert counters == tuple(map(sum, zip(*told, strict=True)))
    assert reset.status_code == 200 and again == [(told[0][0], 0, 1)]


@pytest.mark.parametrize("router", ["kv", "round-robin"])
def test_dynamo(router: str) -> None:
    """The router that knows the caches sends a session to the worker that has its prefix; round robin sends the second
    of two calls to the other worker, which has nothing. The frontend's counters say what the calls were told.
    """
    with started.dynamo(router_mode=router) as engine:
        told = session(engine, 20, 30, 10)
        names = ("input_sequence_tokens_sum", "cached_tokens_sum", "output_tokens_total")
        counters = counted(engine.url, *(f"dynamo_frontend_{name}" for name in names))
    whole = [prompt // 16 * 16 for prompt, _, _ in told]
    cached = [cached for _, cached, _ in told]
    assert [answered for _, _, answered in told] == [20, 30, 10]
    assert cached[0] == 0 and cached[2] >= whole[0]
    assert cached[1] >= whole[0] if router == "kv" else cached[1] == 0
    assert counters == tuple(map(sum, zip(*told, strict=True)))
