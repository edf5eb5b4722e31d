"""The options that make a simulated cluster, the same for every command that has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from keepwarm.harness.duration import NO_TTL, Duration, Number, Ttl
from keepwarm.replayers.cache import NEVER, BlockCache
from keepwarm.replayers.cluster import Cluster, Link, Worker
from keepwarm.replayers.engine import MAX_BATCHED, MAX_SEQS, Engine
from keepwarm.replayers.hardware import GPUS, HARDWARE, Hardware
from keepwarm.replayers.marked import MarkedCache
from keepwarm.replayers.plain import KeepBlocks, KeepMarked, Plain
from keepwarm.replayers.queues import QUEUES
from keepwarm.replayers.router import COSTS, ROUTERS, Router, Weights
from keepwarm.replayers.rules import AS_RECORDED, RULES
from keepwarm.replayers.times import SECOND, ServiceTimes, StepTimes, read_times
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.errors import InputError

ENGINE, ENGINE_BLOCK = "engine", 16
MOST = 1 << 40
LEAST_TPS, MOST_TPS, MOST_S = 0.1, 1e12, 86400
TIMES = ServiceTimes()
COUNT = click.IntRange(1, MOST)
TPS = Number(LEAST_TPS, MOST_TPS)
SHARE = Number(0, 1e6)

SERVICE = ("base_s", "prefill_tps", "decode_tps")
STEPS = ("hardware", "times", "max_seqs", "max_batched_tokens", "queue", "eviction", "decode_workers", "host_capacity")
"""Options that need the batching engine."""
BLOCKS = ("capacity", *STEPS, "workers", "router", "peer_tps", "background_workers")
"""Options that managed rules do not know."""
NEEDS = {
    **dict.fromkeys(
        ("router_temperature", "overlap_weight", "router_view"), ("router", "--router kv_aware or kv_classic")
    ),
    "no_refresh": ("rules", "rules other than engine"),
    "transfer_tps": ("decode_workers", "--decode-workers"),
    "host_tps": ("host_capacity", "--host-capacity"),
}
"""Options that need another, and how that is said."""


class Times(click.ParamType[Any]):
    """A file of step times, read at once."""

    name = "times"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The times in it."""
        del param, ctx
        return value if isinstance(value, StepTimes) else read_times(value)


def _option(name: str, kind: Any, text: str, *, metavar: str | None = None) -> Callable[..., Any]:
    return click.option(f"--{name}", type=kind, metavar=metavar, help=text)


_OPTIONS = (
    _option(
        "rules",
        click.Choice([ENGINE, *RULES]),
        "What is cached. engine: full blocks, answers too. managed: up to the call's last cache mark, as logs show; or "
        "what a vendor's documentation says. The default is engine, or managed with --cache-ttl as-recorded.",
    ),
    _option(
        "cache-ttl",
        Ttl(),
        "How long a prefix lives after the end of the last answer that used it: none, a duration, or as-recorded (each "
        "call's own cache marks). The default is none for engine rules, and the marks' own for the others.",
        metavar="TTL",
    ),
    _option("block", COUNT, f"Tokens a block; {ENGINE_BLOCK} for engine rules, the API's own for others."),
    _option("capacity", click.IntRange(0, MOST), "Blocks a worker holds; else endless.", metavar="BLOCKS"),
    click.option("--no-refresh", is_flag=True, help="A read does not renew the TTL of what it read."),
    _option("base-s", Number(0, MOST_S), f"Seconds to any answer, without --hardware or --times. [{TIMES.base_s}]"),
    _option("prefill-tps", TPS, f"Uncached prompt tokens a second, likewise. [{TIMES.prefill_tps:g}]"),
    _option("decode-tps", TPS, f"Answer tokens a second, likewise. [{TIMES.decode_tps:g}]"),
    _option(
        "hardware",
        click.Choice(list(HARDWARE)),
        "Workers that batch, with this machine's step times and capacity. Many of them are claims: docs/hardware.md.",
    ),
    _option("times", Times(), "Step times, as `calibrate` writes them.", metavar="FILE"),
    _option("max-seqs", COUNT, f"Calls in a batch. [{MAX_SEQS}]"),
    _option("max-batched-tokens", COUNT, f"Tokens of a step. [{MAX_BATCHED}]"),
    _option("queue", click.Choice(list(QUEUES)), "Who waits least: flow puts interactive calls first. [fcfs]"),
    _option("eviction", click.Choice(["lru", "priority"]), "priority keeps longer what important calls left. [lru]"),
    _option("workers", click.IntRange(1, 1024), "Workers behind the router. [1]"),
    _option("router", click.Choice(ROUTERS), "How a worker is chosen. [round_robin]"),
    _option("router-temperature", SHARE, "Above 0 a kv-aware router draws by softmax. [0]"),
    _option("overlap-weight", SHARE, "A cached block's credit in the router's cost. [1]"),
    _option("router-view", Duration(), "The router guesses caches: what it sent lives this long. Else it knows them."),
    _option("background-workers", COUNT, "The last N workers are for background calls alone."),
    _option("decode-workers", click.IntRange(1, 1024), "Workers that only generate; --workers then compute prompts."),
    _option("transfer-tps", TPS, "KV tokens a second from prompt workers to those that generate. [1e6]"),
    _option("peer-tps", TPS, "Move prefixes between workers at so many tokens a second, where that is faster."),
    _option("host-capacity", COUNT, "Blocks of a host tier below each worker's cache.", metavar="BLOCKS"),
    _option("host-tps", TPS, "Tokens a second from the host tier. [5e5]"),
    click.option("--seed", type=click.IntRange(0, MOST), default=0, show_default=True, help="Of random routing."),
)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a simulated cluster."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


NAMES = [str(option.name) for option in click.command()(cluster_options(lambda **_: None)).params]
"""What these options are called, in their order."""


def make_cluster(*, bounds: Iterable[str] = (), **options: Any) -> Cluster:
    """The cluster that the options ask for, with the caches of BOUNDS beside it; UsageError where options contradict
    each other. An endless bound forgets nothing, so its tree grows for ever.
    """
    told = _given(options)
    _check(told)
    tree = PromptTree()
    pool = [_worker(tree, told) for _ in range(told.get("workers", 1))]
    decoders = [_worker(tree, told, decodes=True) for _ in range(told.get("decode_workers", 0))]
    machine = _hardware(told)
    more: dict[str, Any] = {}
    if decoders:
        more["decode_router"] = _router(told, "least_loaded")
        more["handover"] = Link(told.get("transfer_tps") or (machine and machine.handover_tps) or 1e6)
    if "host_capacity" in told:
        more["tier"] = Link(told.get("host_tps") or (machine and machine.host_tps) or 5e5)
    if "peer_tps" in told:
        more["peers"] = Link(told["peer_tps"])
    if "router_view" in told:
        ttl_ns = round(told["router_view"] * SECOND)
        more["guesses"] = [BlockCache(tree, block=_block(told), ttl_ns=ttl_ns) for _ in pool]
    background = told.get("background_workers", 0)
    if background >= len(pool):
        raise click.UsageError("--background-workers must be fewer than --workers")
    shadows = {name: _bound(tree, name, told) for name in bounds}
    router = _router(told, told.get("router", "round_robin"))
    return Cluster(tree, pool, router, decoders=decoders, background=background, shadows=shadows, **more)


def rules_of(options: dict[str, Any]) -> str:
    """The rules that the options ask for."""
    default = "managed" if options.get("cache_ttl") == AS_RECORDED else ENGINE
    return str(options.get("rules") or default)


def about_cache(options: dict[str, Any]) -> dict[str, Any]:
    """What run.json and the face's health tell of the cache."""
    rules = rules_of(options)
    ttl = options.get("cache_ttl")
    if ttl is None and rules != ENGINE:
        ttl = AS_RECORDED if RULES[rules].ttl_s is None else RULES[rules].ttl_s
    machine = _hardware(options)
    blocks = None if machine is None else machine.capacity_tokens // _block(options)
    given = options.get("capacity")
    return {
        "state_at_start": "cold",
        "ttl": None if ttl == NO_TTL else ttl,
        "block": _block(options),
        "capacity": blocks if given is None else given,
        "rules": rules,
        "dated": None if rules == ENGINE else RULES[rules].dated,
        "outputs_readable": rules == ENGINE and options.get("assistant") != "recorded",
        "refresh": not options.get("no_refresh"),
    }


def about_cluster(options: dict[str, Any]) -> dict[str, Any]:
    """What run.json tells of the cluster: the options that were given, and where its times come from."""
    given = _given(options)
    told = {name: given[name]._asdict() if name == "times" else given[name] for name in NAMES if name in given}
    machine = _hardware(options)
    if machine is None:
        return told
    gpus = GPUS * (told.get("workers", 1) + (0 if machine.decode_times else told.get("decode_workers", 0)))
    hour = None if machine.hour_usd is None else machine.hour_usd / GPUS
    return told | {"source": machine.source, "claimed": machine.claimed, "gpus": gpus, "gpu_hour_usd": hour}


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, flags only where they are set; 0 is a value."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def _check(told: dict[str, Any]) -> None:
    """UsageError where two options contradict each other."""
    managed = rules_of(told) != ENGINE
    if told.get("cache_ttl") == AS_RECORDED and not managed:
        raise click.UsageError("--cache-ttl as-recorded needs --rules managed: engine rules know no cache marks")
    steps = [name for name in STEPS if name in told]
    pairs = [("rules", name) for name in BLOCKS if managed and name in told]
    pairs += [(name, steps[0]) for name in SERVICE if steps and name in told]
    pairs += [("hardware", "times")] if "hardware" in told and "times" in told else []
    if pairs:
        one, other = (name.replace("_", "-") for name in pairs[0])
        value = f" {rules_of(told)}" if one == "rules" else ""
        raise click.UsageError(f"--{one}{value} and --{other} cannot both be given")
    machine = _hardware(told)
    in_two = machine is not None and machine.decode_times is not None
    needs = NEEDS | {"hardware": NEEDS["transfer_tps"]} if in_two else NEEDS
    holds = {"router": told.get("router") in COSTS, "rules": managed}
    for name, (other, what) in needs.items():
        if name in told and not holds.get(other, other in told):
            raise click.UsageError(f"--{name.replace('_', '-')} needs {what}")


def _hardware(options: dict[str, Any]) -> Hardware | None:
    return HARDWARE.get(options.get("hardware") or "")


def _batches(told: dict[str, Any]) -> bool:
    """Whether the workers are batching engines."""
    return any(name in told for name in STEPS)


def _block(options: dict[str, Any]) -> int:
    rules = rules_of(options)
    return options.get("block") or (ENGINE_BLOCK if rules == ENGINE else RULES[rules].unit)


def _worker(tree: PromptTree, told: dict[str, Any], *, decodes: bool = False) -> Worker:
    if rules_of(told) != ENGINE:
        return Plain(KeepMarked(_marked(tree, told)), times=_service(told))
    block, machine, ttl = _block(told), _hardware(told), told.get("cache_ttl")
    capacity = told.get("capacity")
    if capacity is None and machine is not None:
        tokens = (machine.decode_capacity_tokens if decodes else None) or machine.capacity_tokens
        capacity = tokens // block
    ttl_ns = None if ttl in (None, NO_TTL) else round(ttl * SECOND)
    cache = BlockCache(tree, block=block, capacity=capacity, ttl_ns=ttl_ns)
    if not _batches(told):
        return Plain(KeepBlocks(cache), times=_service(told))
    times = told.get("times", StepTimes())
    if machine is not None:
        times = (machine.decode_times if decodes else None) or machine.times
    return Engine(
        cache,
        times=times,
        max_seqs=told.get("max_seqs", MAX_SEQS),
        max_batched=told.get("max_batched_tokens", MAX_BATCHED),
        queue=told.get("queue", "fcfs"),
        priorities=told.get("eviction") == "priority",
        host=BlockCache(tree, block=block, capacity=told["host_capacity"]) if "host_capacity" in told else None,
    )


def _service(told: dict[str, Any]) -> ServiceTimes:
    return TIMES._replace(**{name: told[name] for name in SERVICE if name in told})


def _router(told: dict[str, Any], name: str) -> Router:
    weights = Weights(overlap=told.get("overlap_weight", 1.0), temperature=told.get("router_temperature", 0.0))
    return Router(name, block=_block(told), weights=weights, seed=told.get("seed", 0))


def _marked(tree: PromptTree, told: dict[str, Any]) -> MarkedCache:
    rules = RULES[rules_of(told)]._replace(unit=_block(told))
    ttl = told.get("cache_ttl")
    ttl_ns = NEVER if ttl == NO_TTL else None if ttl in (None, AS_RECORDED) else round(ttl * SECOND)
    return MarkedCache(tree, rules, ttl_ns=ttl_ns, refresh=not told.get("no_refresh"))


def _bound(tree: PromptTree, name: str, told: dict[str, Any]) -> KeepBlocks | KeepMarked:
    """The cache that a bound speaks of: endless, ttl_300s, capacity_1000, rules_anthropic."""
    kind, _, value = name.partition("_")
    managed = rules_of(told) != ENGINE
    if kind == "rules" and value in RULES:
        return KeepMarked(_marked(tree, {"rules": value}))
    if managed and kind == "capacity":
        raise click.UsageError(f"--bound {name}: --rules {rules_of(told)} know no capacity")
    number = value.removesuffix("s") if kind == "ttl" else value
    sized = kind in ("ttl", "capacity") and number.isdecimal() and number.isascii() and len(number) < 13
    if not sized and name != "endless":
        known = f"ttl_300s, capacity_1000, or rules_ with one of {', '.join(RULES)}"
        raise InputError(f"--bound {name!r}: expected {known}")
    size = int(number) if sized else None
    if managed:
        return KeepMarked(_marked(tree, {"rules": rules_of(told), "cache_ttl": NO_TTL if size is None else size}))
    kept = {} if size is None else {"ttl_ns": size * SECOND} if kind == "ttl" else {"capacity": size}
    return KeepBlocks(BlockCache(tree, block=_block(told), **kept), at_once=_batches(told))
