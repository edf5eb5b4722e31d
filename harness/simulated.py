"""The options that make a simulated worker, the same for every command that has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from keepwarm.harness.duration import LONGEST_S, Number, Ttl
from keepwarm.replayers.cache import PrefixCache
from keepwarm.replayers.worker import AS_RECORDED, ServiceTimes, Worker

ENGINE_BLOCK = 16
MOST = 1 << 40
LEAST_TPS = 1e-3
TIMES = ServiceTimes()

_OPTIONS = (
    click.option(
        "--cache-ttl",
        type=Ttl(),
        default="none",
        show_default=True,
        metavar="TTL",
        help="How long a prefix lives after the end of the last answer that used it: none, a duration, or as-recorded "
        "(each call's own cache marks).",
    ),
    click.option(
        "--rules",
        type=click.Choice(["engine", "managed"]),
        help="engine: full blocks, answers readable. managed: up to the call's last cache mark, answers not readable; "
        "the default with as-recorded.",
    ),
    click.option(
        "--block", type=click.IntRange(1, MOST), help="Tokens a block; 16 for engine rules, 1 for managed ones."
    ),
    click.option("--capacity", type=click.IntRange(0, MOST), metavar="BLOCKS", help="Blocks it holds; else endless."),
    click.option("--no-refresh", is_flag=True, help="A read does not renew the TTL of what it read."),
    click.option("--base-s", type=Number(0, LONGEST_S), default=TIMES.base_s, show_default=True, help="To any answer."),
    click.option(
        "--prefill-tps",
        type=Number(LEAST_TPS, 1e12),
        default=TIMES.prefill_tps,
        show_default=True,
        help="Uncached prompt tokens a second.",
    ),
    click.option(
        "--decode-tps",
        type=Number(LEAST_TPS, 1e12),
        default=TIMES.decode_tps,
        show_default=True,
        help="Answer tokens a second.",
    ),
)


def worker_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a simulated worker."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_worker(
    *,
    cache_ttl: float | str | None,
    rules: str | None,
    block: int | None,
    capacity: int | None,
    no_refresh: bool,
    base_s: float,
    prefill_tps: float,
    decode_tps: float,
    speed: float = 1.0,
) -> Worker:
    """The worker that the options ask for; UsageError where they contradict each other."""
    managed = rules == "managed" or (rules is None and cache_ttl == AS_RECORDED)
    if cache_ttl == AS_RECORDED and not managed:
        raise click.UsageError("--cache-ttl as-recorded needs --rules managed: engine rules know no cache marks")
    cache = PrefixCache(block=block or (1 if managed else ENGINE_BLOCK), capacity=capacity, refresh=not no_refresh)
    times = ServiceTimes(base_s, prefill_tps, decode_tps)
    return Worker(cache, managed=managed, ttl_s=cache_ttl, service=times, speed=speed)


def about_cache(worker: Worker, ttl: float | str | None) -> dict[str, Any]:
    """What run.json says of the worker's cache."""
    return {
        "state_at_start": "cold",
        "ttl": ttl,
        "block": worker.cache.block,
        "capacity": worker.cache.capacity,
        "rules": "managed" if worker.managed else "engine",
        "outputs_readable": worker.outputs_readable,
        "refresh": worker.cache.refresh,
    }
