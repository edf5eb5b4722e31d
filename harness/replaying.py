"""A replay over HTTP into a run's directory: what is said before, what is sent, what is said after."""

from __future__ import annotations

import asyncio
import gc
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from keepwarm.harness.counters import read_counters
from keepwarm.harness.planned import Planned
from keepwarm.harness.progress import progress
from keepwarm.replayers import run as runs
from keepwarm.replayers.address import Address, shown_url
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.endpoint import Endpoint
from keepwarm.replayers.hints import TELL_WORKER
from keepwarm.replayers.http import HttpEndpoint
from keepwarm.replayers.plain import KeepBlocks, Plain
from keepwarm.replayers.replay import Replay, run_replay
from keepwarm.replayers.router import Router
from keepwarm.replayers.run import Bound
from keepwarm.replayers.server import Learned, client, identify, isolates, known_words, learn
from keepwarm.replayers.simulate import simulate as in_virtual_time
from keepwarm.replayers.times import ServiceTimes
from keepwarm.replayers.tokens import Costs
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import Journal
from keepwarm.traces.model import Outcome

TIMES = ServiceTimes()
REPORTING = {"vllm": "--enable-prompt-tokens-details", "sglang": "--enable-cache-report"}
"""What makes a server tell cached tokens."""


class Came(NamedTuple):
    """What came of a replay: how many calls by error (None: answered), and whether it was interrupted."""

    counts: Counter[str | None]
    interrupted: bool

    def words(self) -> str:
        """It in one line."""
        parts = [f"{self.counts[None]:,} calls answered"]
        parts += [f"{count:,} {error}" for error, count in self.counts.items() if error is not None]
        return ", ".join(parts) + ("; interrupted, its results so far are kept" if self.interrupted else "")


class Asking(NamedTuple):
    """What is asked, and how: the address, what ``identify`` said of it, the dialect and model, and what preflight
    learned, None without it. ``frozen`` are the costs that prompts are written by where not by the endpoint's own.
    """

    address: Address
    server: dict[str, Any]
    dialect: str
    model: str
    learned: Learned | None = None
    frozen: Costs | None = None

    def endpoint(self, **options: Any) -> HttpEndpoint:
        """It, ready to be asked."""
        known = self.learned
        costs = self.frozen or (known.costs if known else Costs())
        if known is not None:
            options |= {"accepts": known.accepts, "writes_told": known.writes != "inferred"}
        if self.server["server"] == "dynamo":
            options["extra"] = {"nvext": TELL_WORKER}
        if self.frozen is None and "tools" not in options.get("accepts", {"tools"}):
            costs = costs._replace(tools=False)
        return HttpEndpoint(self.address, dialect=self.dialect, model=self.model, costs=costs, **options)


def asked_endpoint(
    address: Address,
    dialect: str = "messages",
    model: str | None = None,
    *,
    preflight: bool = True,
    tokenizer: str | None = None,
    frozen: Costs | None = None,
    stream: bool = True,
) -> Asking:
    """What listens at an address, and what one must know of it to measure. InputError where nothing could be."""
    server, words = identify(address), known_words(tokenizer)
    name = model or server["model"]
    if name is None:
        raise InputError(f"endpoint {shown_url(address.url)}: does not say which one model it serves: give --model")
    asking = Asking(address, server, dialect, name, frozen=frozen)
    if not preflight:
        return asking
    endpoint = asking.endpoint(clock=RunClock(), accepts=frozenset(), timeout_s=60.0, stream=stream)
    learned: Learned = asyncio.run(_then_close(learn(endpoint, words=words), endpoint))
    if learned.reads == "absent":
        flag = REPORTING.get(server["server"] or "")
        how = f"start it with {flag}" if flag else "no hit rate could be measured"
        raise InputError(
            f"endpoint {shown_url(address.url)}: does not tell cached tokens in the {dialect} dialect: {how} "
            "(--no-preflight replays all the same)"
        )
    if frozen is not None and frozen.tools and "tools" not in learned.accepts:
        raise InputError(f"endpoint {shown_url(address.url)}: refuses tools, which the prompts to repeat have")
    return asking._replace(learned=learned)


async def _then_close(asked: Any, endpoint: HttpEndpoint) -> Any:
    try:
        return await asked
    finally:
        await endpoint.aclose()


def frozen_costs(run: Path | None, start: str, **same: Any) -> tuple[Costs, str | None]:
    """The costs and the salt that another run's texts were written by, so that these have the same bytes. ``same`` is
    what must be the same in it, by names of run.json.
    """
    if run is None:
        return Costs(), None
    try:
        about = orjson.loads((run / runs.ABOUT).read_bytes())
        costs, how, salt = Costs.read(about["fidelity"]["costs"]), about["cache"]["how"], about["cache"]["salt"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run / runs.ABOUT}: expected a replay's run.json with fidelity.costs") from error
    told = {"trace": (about.get("trace") or {}).get("digest"), **(about.get("options") or {})}
    for name, value in same.items():
        if told.get(name) != value:
            raise InputError(f"{run}: has the bytes of another {name}: {told.get(name)}, not {value}")
    if (how == "salt") != (start == "salt"):
        raise InputError(f"{run}: has the bytes of --start {how}, which a run of --start {start} has not")
    return costs, salt if how == "salt" else None


def replay_to(
    path: Path,
    planned: Planned,
    asking: Asking,
    *,
    start: str = "salt",
    salt: str | None = None,
    assistant: str = "recorded",
    hints: str = "recorded",
    max_rate: int | None = None,
    timeout: float = 600.0,
    no_stream: bool = False,
    metrics: Sequence[str] = (),
) -> Came:
    """Replay into a run's directory, and say what came of it.

    What can be said beforehand is written first: a run that is killed can be reported from its journal.
    """
    if assistant == "live" and asking.dialect == "completions":
        raise InputError("--assistant live: the completions dialect sends token ids, and gets text: use another")
    _start(asking, start)
    run_salt = (salt or secrets.token_hex(4)) if start in ("salt", "cache-salt") else ""
    started, clock = runs.now(), RunClock()
    endpoint = asking.endpoint(
        clock=clock,
        stream=not no_stream,
        timeout_s=timeout,
        salt=run_salt if start == "salt" else "",
        cache_salt=run_salt if start == "cache-salt" else None,
        live=assistant == "live",
        hints=hints,
    )
    before = read_counters(asking.address, metrics, must=True)
    runs.write_bounds(path, _bounds(planned, before, live=assistant == "live"))
    about = _about_endpoint(planned, asking, start, run_salt, repeated=salt is not None)
    options = {"max_rate": max_rate, "timeout_s": timeout, "stream": not no_stream}
    about["options"] = planned.options | options | {"assistant": assistant, "hints": hints}
    about["fidelity"] = {"match": "bytes" if asking.frozen else "tokens", "costs": endpoint.costs.told()}
    about["counters"] = {"before": before, "after": None}
    runs.write_about(path, planned.about("replay", started, ended=None, interrupted=True, **about))
    came = _replay(path, planned, endpoint, clock, asking.model, max_rate)
    about["counters"]["after"] = read_counters(asking.address, metrics)
    runs.write_about(path, planned.about("replay", started, ended=runs.now(), interrupted=came.interrupted, **about))
    return came


def _start(asking: Asking, start: str) -> None:
    """Make the cache cold where that is asked of the server, and see that it is."""
    where = f"endpoint {shown_url(asking.address.url)}"
    if start == "reset":
        with client(asking.address) as asked:
            status = asked.post("reset_prefix_cache").status_code
        if status != 200:
            hint = " (vLLM resets only with VLLM_SERVER_DEV_MODE=1)" if asking.server["server"] == "vllm" else ""
            raise InputError(f"{where}: POST /reset_prefix_cache gave status {status}, expected 200{hint}")
    if start == "cache-salt" and asking.learned is not None:
        endpoint = asking.endpoint(clock=RunClock())
        if not asyncio.run(_then_close(isolates(endpoint, asking.learned.costs), endpoint)):
            raise InputError(f"{where}: its cache is not cold under another cache_salt: use --start salt")


def _replay(path: Path, planned: Planned, endpoint: Endpoint, clock: RunClock, name: str, max_rate: int | None) -> Came:
    """Send all calls, their outcomes into the run as they come."""
    counts: Counter[str | None] = Counter()
    with closing(Journal(path)) as journal, progress("replaying", planned.calls) as told:

        def emit(outcome: Outcome) -> None:
            journal.add(outcome)
            counts[outcome.error] += 1
            told(journal.rows, None)

        replay = Replay(planned.schedule(), endpoint, emit, clock=clock, name=name, max_rate=max_rate)
        gc.collect()
        gc.freeze()
        before = gc.get_threshold()
        gc.set_threshold(before[0], before[1], 1 << 30)  # a full collection would hold up calls for 0.1 s
        clock.start()
        try:
            whole = asyncio.run(run_replay(replay, endpoint))
        finally:
            gc.set_threshold(*before)
            gc.unfreeze()
    return Came(counts, not whole)


def _about_endpoint(planned: Planned, asking: Asking, start: str, salt: str, *, repeated: bool) -> dict[str, Any]:
    server = asking.server
    driven = server["speed"] is not None and server["speed"] == planned.speed
    has_ttl = None if server["ttl"] is None else server["ttl"] != "none"
    learned = asking.learned and {name: told for name, told in asking.learned.told().items() if name != "costs"}
    endpoint: dict[str, Any] = {"name": "http", "url": shown_url(asking.address.url), "dialect": asking.dialect}
    endpoint |= {"server": server | {"model": asking.model}, "preflight": learned}
    state = "warm" if start == "warm" else "as the same bytes left it" if repeated else "cold"
    plain = asking.address.url.startswith("http:") and asking.address.transport == "own" and sys.platform == "linux"
    return {
        "endpoint": endpoint | {"clock_driven": driven, "has_ttl": has_ttl},
        "cache": {"state_at_start": state, "how": start, "salt": salt or None},
        "clock": {"kind": "monotonic", "anchor": None, "received": "kernel" if plain else "process"},
        "seed": None,
    }


def _bounds(planned: Planned, counters: dict[str, Any] | None, *, live: bool) -> list[Bound]:
    """What each call could have read from an endless cache that keeps prompts, and what the simulated engine of the
    server's block and capacity reads, where it tells them. InputError where a call cannot be replayed.
    """
    bounds = _simulated(planned, "endless", {"block": 1}, live=live, at_once=True)
    if counters and counters.get("block"):
        bounds += _simulated(planned, "predicted", counters, live=live)
    return bounds


def _simulated(
    planned: Planned, name: str, server: dict[str, Any], *, live: bool, at_once: bool = False
) -> list[Bound]:
    """What each call reads from a cluster of a server's workers, routed by caches where its router counts hits."""
    tree, speed = PromptTree(), planned.speed
    times = ServiceTimes(TIMES.base_s / speed, TIMES.prefill_tps * speed, TIMES.decode_tps * speed)
    router = "kv_aware" if "router_cached_tokens" in server.get("counters", ()) else "round_robin"
    block = server["block"]
    caches = [BlockCache(tree, block=block, capacity=server.get("blocks")) for _ in range(server.get("workers") or 1)]
    workers = [Plain(KeepBlocks(cache, answers=live, at_once=at_once), times=times) for cache in caches]
    cluster = Cluster(tree, workers, Router(router, block=block))
    bounds = []
    with progress("planning", planned.calls) as told:
        for outcome, _ in in_virtual_time(planned.schedule_in(tree), cluster, live=live):
            bounds.append(Bound(outcome.call.call, outcome.copy, name, outcome.cache_read or 0))
            told(len(bounds), None)
    return bounds
