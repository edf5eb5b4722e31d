"""The options that make a simulated cluster, the same for every command that has one."""

import re
from collections.abc import Iterable
from typing import Any

import click

from keepwarm.harness.options import NO_TTL, TYPES, Type, cache_ttl, with_options
from keepwarm.replayers.cache import NEVER, BlockCache
from keepwarm.replayers.cluster import Cluster, Worker
from keepwarm.replayers.engine import MAX_BATCHED, MAX_SEQS, Engine
from keepwarm.replayers.hardware import GPUS, HARDWARE, Hardware
from keepwarm.replayers.marked import MarkedCache
from keepwarm.replayers.plain import KeepBlocks, Keeping, Plain
from keepwarm.replayers.queues import QUEUES
from keepwarm.replayers.router import COSTS, ROUTERS, Router, Weights
from keepwarm.replayers.rules import AS_RECORDED, RULES
from keepwarm.replayers.times import SECOND, ServiceTimes, StepTimes, read_times
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.errors import InputError
from keepwarm.traces.shipped import shipped

ENGINE, ENGINE_BLOCK = "engine", 16
TIMES = ServiceTimes()

OPTIONS = shipped("keepwarm.harness", "simulated.toml")
"""By name, in their order."""
SERVICE, STEPS = ([name for name, told in OPTIONS.items() if told.get("for") == kind] for kind in ("service", "steps"))
BLOCKS = [name for name, told in OPTIONS.items() if told.get("for") in ("blocks", "steps")]
KNOWN = "|".join(RULES)
BOUND = re.compile(
    rf"endless|ttl_(?P<ttl>\d{{1,12}})s?|capacity_(?P<capacity>\d{{1,12}})|rules_(?P<rules>{KNOWN})", re.A
)
NEEDS = {name: told["needs"] for name, told in OPTIONS.items() if "needs" in told}
_TYPES: dict[str, Type] = {
    "rules": click.Choice([ENGINE, *RULES]),
    "hardware": click.Choice(list(HARDWARE)),
    "queue": click.Choice(list(QUEUES)),
    "router": click.Choice(ROUTERS),
    "times": read_times,
    "ttl": cache_ttl,
}


def cluster_options(command: Any) -> Any:
    """Give a command the options of a simulated cluster."""
    own = {"block": ENGINE_BLOCK, "max_seqs": MAX_SEQS, "max_batched_tokens": MAX_BATCHED, **TIMES._asdict()}
    told = [(name, told | {"help": told["help"].format_map(own)}) for name, told in OPTIONS.items()]
    return with_options(told, TYPES | _TYPES, command)


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
        more["handover"] = told.get("transfer_tps") or (machine and machine.handover_tps) or 1e6
    if "host_capacity" in told:
        more["tier"] = told.get("host_tps") or (machine and machine.host_tps) or 5e5
    if "peer_tps" in told:
        more["peers"] = told["peer_tps"]
    if "router_view" in told:
        ttl_ns = round(told["router_view"] * SECOND)
        more["guesses"] = [BlockCache(tree, block=_block(told), ttl_ns=ttl_ns) for _ in pool]
    background = told.get("background_workers", 0)
    if background >= len(pool):
        raise click.UsageError("--background-workers must be fewer than --workers")
    shadows = {name: _bound(tree, name, told) for name in bounds}
    weights = Weights(overlap=told.get("overlap_weight", 1.0), temperature=told.get("router_temperature", 0.0))
    kind, seed = told.get("router", "round_robin"), told.get("seed", 0)
    router = Router(kind, block=_block(told), weights=weights, seed=seed)
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
    return {
        "state_at_start": "cold",
        "ttl": None if ttl == NO_TTL else ttl,
        "block": _block(options),
        "capacity": _capacity(options),
        "rules": rules,
        "dated": None if rules == ENGINE else RULES[rules].dated,
        "outputs_readable": rules == ENGINE and options.get("assistant") != "recorded",
        "refresh": not options.get("no_refresh"),
    }


def about_cluster(options: dict[str, Any]) -> dict[str, Any]:
    """What run.json tells of the cluster: the options that were given, and where its times come from."""
    given = _given(options)
    told = {name: given[name]._asdict() if name == "times" else given[name] for name in OPTIONS if name in given}
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


def _capacity(told: dict[str, Any], *, decodes: bool = False) -> int | None:
    """Blocks that a worker holds; None where it holds all."""
    given, machine = told.get("capacity"), _hardware(told)
    if given is not None or machine is None:
        return given
    return ((machine.decode_capacity_tokens if decodes else None) or machine.capacity_tokens) // _block(told)


def _ttl_ns(told: dict[str, Any]) -> int | None:
    """The TTL that was asked for; None where it is the rules' own, or the marks'."""
    ttl = told.get("cache_ttl")
    if ttl in (None, AS_RECORDED):
        return None
    return NEVER if ttl == NO_TTL else round(ttl * SECOND)


def _worker(tree: PromptTree, told: dict[str, Any], *, decodes: bool = False) -> Worker:
    if rules_of(told) != ENGINE:
        return Plain(_marked(tree, told), times=_service(told))
    block, machine = _block(told), _hardware(told)
    cache = BlockCache(tree, block=block, capacity=_capacity(told, decodes=decodes), ttl_ns=_ttl_ns(told))
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


def _marked(tree: PromptTree, told: dict[str, Any]) -> MarkedCache:
    rules = RULES[rules_of(told)]._replace(unit=_block(told))
    return MarkedCache(tree, rules, ttl_ns=_ttl_ns(told), refresh=not told.get("no_refresh"))


def _bound(tree: PromptTree, name: str, told: dict[str, Any]) -> Keeping:
    """The cache that a bound speaks of: endless, ttl_300s, capacity_1000, rules_anthropic."""
    found = BOUND.fullmatch(name)
    if not found:
        known = ", ".join(RULES)
        raise InputError(f"--bound {name!r}: expected ttl_300s, capacity_1000, or rules_ with one of {known}")
    if found["rules"]:
        return _marked(tree, {"rules": found["rules"]})
    ttl, capacity = (int(size) if size else None for size in found.group("ttl", "capacity"))
    if rules_of(told) == ENGINE:
        cache = BlockCache(tree, block=_block(told), capacity=capacity, ttl_ns=_ttl_ns({"cache_ttl": ttl}))
        return KeepBlocks(cache, at_once=_batches(told))
    if capacity is not None:
        raise click.UsageError(f"--bound {name}: --rules {rules_of(told)} know no capacity")
    return _marked(tree, {"rules": rules_of(told), "cache_ttl": NO_TTL if ttl is None else ttl})
