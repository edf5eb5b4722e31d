"""The simulate command: a trace in virtual time, on one cluster or on a grid of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from keepwarm.harness.planned import Planned
from keepwarm.harness.progress import progress
from keepwarm.harness.run_commands import FORCE, GAP_CAP, OUTPUT, finish, run_directory
from keepwarm.harness.simulated import about_cache, about_cluster, cluster_options, make_cluster
from keepwarm.harness.sweep import grid, sweep
from keepwarm.replayers import run as runs
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.rules import AS_RECORDED, RULES
from keepwarm.replayers.run import Bound
from keepwarm.replayers.simulate import Simulated
from keepwarm.replayers.simulate import simulate as in_virtual_time
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import OUTCOMES, complete
from keepwarm.traces.store import write_outcomes


@click.command()
@click.argument("trace")
@OUTPUT
@FORCE
@cluster_options
@GAP_CAP
@click.option(
    "--sessions", type=click.IntRange(1, 1 << 40), metavar="N", help="Run N at a time, not when they were recorded."
)
@click.option(
    "--bound",
    "bounds",
    multiple=True,
    metavar="BOUND",
    help="Tell what else could have been read: ttl_300s, capacity_1000 (blocks), rules_anthropic; repeatable.",
)
@click.option(
    "--sweep",
    "axes",
    multiple=True,
    metavar="OPTION=A,B",
    help="Run once with each value of an option, such as cache-ttl=0,300,3600; repeatable for a grid, on all cores.",
)
@click.option("--json", "as_json", is_flag=True, help="With --sweep, print JSON on standard output, nothing else.")
def simulate(
    trace: str,
    output: Path | None,
    force: bool,
    gap_cap: float | None,
    sessions: int | None,
    bounds: tuple[str, ...],
    axes: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Replay a trace in virtual time against the simulated cluster; no sockets, nothing is waited for.

    Without -o the report is printed and the run forgotten. With --sweep a table is printed, and -o names its Parquet.
    """
    planned = Planned(trace, speed=1.0, gap_cap=gap_cap, at_once=sessions)
    if axes:
        if bounds:
            raise click.UsageError("--bound and --sweep cannot both be given: a sweep tells no bounds")
        points = grid(axes, options)
        for _, point in points:
            _check_marks(planned, point)
        sweep(planned, points, output, force=force, as_json=as_json)
        return
    _check_marks(planned, options)
    make_cluster(bounds=bounds, **options)  # what contradicts itself is refused before a place is made
    with run_directory(output, "simulate", force=force) as path:
        simulate_to(planned, path, bounds=bounds, **options)
        if output is None:
            finish(path, output, "")
    if output is not None:
        finish(output, output, f"{planned.calls:,} calls simulated")


def _check_marks(planned: Planned, options: dict[str, Any]) -> None:
    """Rules that only marks drive need some."""
    rules = RULES.get(options["rules"] or "")
    if not planned.marked and (options["cache_ttl"] == AS_RECORDED or (rules is not None and rules.ttl_s is None)):
        raise InputError(
            f"{planned.trace}: no call has breakpoints, so it has no TTLs as recorded: give --cache-ttl a duration "
            "and engine rules, or rules that need no marks"
        )


def simulate_to(
    planned: Planned, path: Path, *, bounds: tuple[str, ...] = (), quiet: bool = False, **options: Any
) -> None:
    """Simulate into a run's directory."""
    started = runs.now()
    cluster = make_cluster(bounds=("endless", *bounds), **options)
    told: list[Bound] = []
    failed: set[tuple[str, int]] = set()
    with progress("simulating", None if quiet else planned.calls) as tell:
        results = _kept(planned, cluster, told, failed, (lambda done, of: None) if quiet else tell)
        write_outcomes(str(path / OUTCOMES), (done.outcome for done in results))
    if failed:
        complete(path, failed)
    runs.write_bounds(path, told)
    cache = about_cache(options)
    about = {
        "endpoint": {"name": "simulated", "url": None, "dialect": None, "server": None, "clock_driven": True}
        | {"has_ttl": cache["ttl"] is not None},
        "cache": cache,
        "cluster": about_cluster(options),
        "clock": {"kind": "virtual", "anchor": None},
        "interrupted": False,
        "seed": options["seed"],
    }
    runs.write_about(path, planned.about("simulate", started, ended=runs.now(), **about))


def _kept(
    planned: Planned,
    cluster: Cluster,
    bounds: list[Bound],
    failed: set[tuple[str, int]],
    told: Callable[[int, int | None], None],
) -> Iterator[Simulated]:
    """Pass results on, keeping what each call could have read and which sessions were not completed."""
    results: Iterable[Simulated] = in_virtual_time(planned.schedule_in(cluster.tree), cluster)
    for done, result in enumerate(results, 1):
        outcome = result.outcome
        bounds += [Bound(outcome.call.call, outcome.copy, name, read) for name, read in result.bounds.items()]
        if outcome.error is not None:
            failed.add((outcome.call.session, outcome.copy))
        told(done, None)
        yield result
