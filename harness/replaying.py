"""A replay over HTTP into a run's directory: what is said before, what is sent, what is said after."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from keepwarm.harness.planned import Planned
from keepwarm.harness.progress import progress
from keepwarm.replayers import run as runs
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.endpoint import Endpoint
from keepwarm.replayers.http import HttpEndpoint, preflight
from keepwarm.replayers.plain import KeepBlocks, Plain
from keepwarm.replayers.replay import Replay, run_replay
from keepwarm.replayers.router import Router
from keepwarm.replayers.run import Bound
from keepwarm.replayers.simulate import simulate as in_virtual_time
from keepwarm.replayers.times import ServiceTimes
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import Journal
from keepwarm.traces.model import Outcome

TIMES = ServiceTimes()


class Came(NamedTuple):
    """What came of a replay: how many calls by error (None: answered), and whether it was interrupted."""

    counts: Counter[str | None]
    interrupted: bool

    def words(self) -> str:
        """It in one line."""
        parts = [f"{self.counts[None]:,} calls answered"]
        parts += [f"{count:,} {error}" for error, count in self.counts.items() if error is not None]
        return ", ".join(parts) + ("; interrupted, its results so far are kept" if self.interrupted else "")


def asked_endpoint(
    url: str, dialect: str = "messages", key_env: str | None = None, model: str | None = None
) -> dict[str, Any]:
    """What listens at a URL, and as ``model`` the one to ask for."""
    server = preflight(url, dialect=dialect, key_env=key_env)
    if model is None and server["model"] is None:
        raise InputError(f"endpoint {url}: does not say which one model it serves: give --model")
    return server | {"model": model or server["model"]}


def replay_to(
    path: Path,
    planned: Planned,
    url: str,
    server: dict[str, Any],
    *,
    dialect: str = "messages",
    key_env: str | None = None,
    max_rate: int | None = None,
    timeout: float = 600.0,
    no_stream: bool = False,
    warm: bool = False,
) -> Came:
    """Replay into a run's directory, and say what came of it.

    What can be said beforehand is written first: a run that is killed can be reported from its journal.
    """
    salt, started = "" if warm else secrets.token_hex(4), runs.now()
    runs.write_bounds(path, _endless(planned))
    about = _about_endpoint(planned, url, dialect, server, salt)
    about["options"] = planned.options | {"max_rate": max_rate, "timeout_s": timeout, "stream": not no_stream}
    runs.write_about(path, planned.about("replay", started, ended=None, interrupted=True, **about))
    clock = RunClock()
    endpoint = HttpEndpoint(
        url,
        dialect=dialect,
        model=server["model"],
        clock=clock,
        key_env=key_env,
        stream=not no_stream,
        timeout_s=timeout,
        salt=salt,
    )
    came = _replay(path, planned, endpoint, clock, server["model"], max_rate)
    runs.write_about(path, planned.about("replay", started, ended=runs.now(), interrupted=came.interrupted, **about))
    return came


def _replay(path: Path, planned: Planned, endpoint: Endpoint, clock: RunClock, name: str, max_rate: int | None) -> Came:
    """Send all calls, their outcomes into the run as they come."""
    counts: Counter[str | None] = Counter()
    with closing(Journal(path)) as journal, progress("replaying", planned.calls) as told:

        def emit(outcome: Outcome) -> None:
            journal.add(outcome)
            counts[outcome.error] += 1
            told(journal.rows, None)

        replay = Replay(planned.schedule(), endpoint, emit, clock=clock, name=name, max_rate=max_rate)
        clock.start()
        whole = asyncio.run(run_replay(replay, endpoint))
    return Came(counts, not whole)


def _about_endpoint(planned: Planned, url: str, dialect: str, server: dict[str, Any], salt: str) -> dict[str, Any]:
    driven = server["server"] is not None and server["speed"] == planned.speed
    has_ttl = None if server["ttl"] is None else server["ttl"] != "none"
    endpoint = {"name": "http", "url": runs.shown_url(url), "dialect": dialect, "server": server}
    return {
        "endpoint": endpoint | {"clock_driven": driven, "has_ttl": has_ttl},
        "cache": {"state_at_start": "cold" if salt else "warm", "salt": salt or None},
        "clock": {"kind": "monotonic", "anchor": None},
        "seed": None,
    }


def _endless(planned: Planned) -> list[Bound]:
    """What each call could have read from an endless cache that keeps prompts: answers sent back are the recorded ones,
    not those that the endpoint gave. InputError where a call cannot be replayed, before any was sent.
    """
    tree = PromptTree()
    speed = planned.speed
    times = ServiceTimes(TIMES.base_s / speed, TIMES.prefill_tps * speed, TIMES.decode_tps * speed)
    worker = Plain(KeepBlocks(BlockCache(tree, block=1), answers=False, at_once=True), times=times)
    cluster = Cluster(tree, [worker], Router("round_robin", block=1))
    bounds = []
    with progress("planning", planned.calls) as told:
        for outcome, _ in in_virtual_time(planned.schedule_in(tree), cluster):
            bounds.append(Bound(outcome.call.call, outcome.copy, "endless", outcome.cache_read or 0))
            told(len(bounds), None)
    return bounds
