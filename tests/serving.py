"""A simulated cluster of one worker behind its HTTP face, and a client of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import orjson
from starlette.types import ASGIApp

from keepwarm.harness.serve import create_app, listen
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.marked import MarkedCache
from keepwarm.replayers.plain import KeepBlocks, Plain
from keepwarm.replayers.router import Router
from keepwarm.replayers.rules import RULES
from keepwarm.replayers.times import ServiceTimes, StepTimes
from keepwarm.replayers.tree import PromptTree

AT_ONCE = ServiceTimes(base_s=0.0, prefill_tps=1e9, decode_tps=1e9)
HEADERS = {"authorization": "Bearer any", "x-api-key": "any", "anthropic-version": "2023-06-01"}
SECOND = 1_000_000_000


@contextmanager
def running(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve an application in a thread of its own; its base URL. Port 0 takes a free one. InputError if it is taken."""
    server, sock = listen(app, host, port)
    bound = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="keepwarm serve", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.001)
    try:
        yield f"http://{host}:{bound}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def cluster(
    *,
    block: int = 16,
    capacity: int | None = None,
    rules: str = "engine",
    ttl_s: float | None = None,
    service: ServiceTimes = AT_ONCE,
    batching: StepTimes | None = None,
    workers: int = 1,
    router: str = "round_robin",
    **engine: Any,
) -> Cluster:
    """Workers that take ``service``, or that batch."""
    tree = PromptTree()
    ttl_ns = None if ttl_s is None else round(ttl_s * SECOND)

    def worker() -> Engine | Plain:
        if rules != "engine":
            return Plain(MarkedCache(tree, RULES[rules], ttl_ns=ttl_ns), times=service)
        cache = BlockCache(tree, block=block, capacity=capacity, ttl_ns=ttl_ns)
        return Plain(KeepBlocks(cache), times=service) if batching is None else Engine(cache, times=batching, **engine)

    return Cluster(tree, [worker() for _ in range(workers)], Router(router, block=block))


@contextmanager
def served(
    *, speed: float = 1.0, script: Any = None, body_bytes: int = 64 << 20, **options: Any
) -> Iterator[httpx.Client]:
    """A client of a cluster that is served for as long as the block runs."""
    cache = {name: options.get(name) for name in ("ttl_s", "block", "capacity")}
    cache["rules"] = options.get("rules", "engine")
    app = create_app(cluster(**options), model="sim", speed=speed, cache=cache, script=script, body_bytes=body_bytes)
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
    return post(client, "messages", {"model": "m", "max_tokens": 1, "messages": list(turns), **fields})


def post(client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    """A whole answer."""
    response = client.post(f"/v1/{path}", json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def account(answer: dict[str, Any]) -> tuple[int, int, int]:
    """Uncached, read and written tokens, in any dialect's fields."""
    usage = answer["usage"]
    if "cache_read_input_tokens" in usage:
        return usage["input_tokens"], usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    name = "prompt" if "prompt_tokens" in usage else "input"
    details = usage[f"{name}_tokens_details"]
    written = details.get("created_cache_tokens", details.get("cache_write_tokens", 0))
    read: int = details["cached_tokens"]
    return usage[f"{name}_tokens"] - read - written, read, written


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [orjson.loads(one) for one in data if one != "[DONE]"]
