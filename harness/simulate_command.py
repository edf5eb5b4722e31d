"""The simulate command: a trace in virtual time, on one cluster or on a grid of them."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from keepwarm.harness.options import options as options_given
from keepwarm.harness.planned import Planned
from keepwarm.harness.progress import Told, progress
from keepwarm.harness.run_commands import finish, run_directory
from keepwarm.harness.simulated import about_cache, about_cluster, cluster_options, make_cluster
from keepwarm.harness.sweep import grid, sweep
from keepwarm.replayers import run as runs
from keepwarm.replayers.arrivals import Law
from keepwarm.replayers.prompts import in_tree
from keepwarm.replayers.rules import AS_RECORDED, RULES
from keepwarm.replayers.run import Bound
from keepwarm.replayers.simulate import simulate as in_virtual_time
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import OUTCOMES, complete
from keepwarm.traces.model import Outcome
from keepwarm.traces.store import write_outcomes


@click.command()
@click.argument("trace")
@options_given("simulated", "force")
@cluster_options
@options_given("simulate", "json")
def simulate(
    trace: str, output: Path | None, force: bool, axes: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Replay a trace in virtual time against the simulated cluster; no sockets, nothing is waited for.

    Without -o the report is printed and the run forgotten. With --sweep a table is printed, and -o names its Parquet.

    Live answers are the cluster's own, whose tokens it finds again; recorded ones are what a replay sends. A bound is
    ttl_300s, capacity_1000 (blocks) or rules_anthropic. A sweep such as cache-ttl=0,300,3600 takes any of the options;
    several make a grid, on all cores.
    """
    if axes and options["bounds"]:
        raise click.UsageError("--bound and --sweep cannot both be given: a sweep tells no bounds")
    points = grid(axes, options, {str(p.name): p for p in simulate.params if p.name in options.keys() - {"bounds"}})
    planned = plan_of(trace, options)
    for _, point in points:
        _check_point(planned, point)
    if axes:
        sweep(trace, points, output, force=force, as_json=as_json)
        return
    if options["background_workers"] and "background" not in planned.flows:
        click.echo(f"{trace}: no call is known to be background: its workers stay idle (see import --flow)", err=True)
    with run_directory(output, "simulate", force=force) as path:
        with progress("simulating", planned.planned_calls) as tell:
            failed = simulate_to(planned, path, tell=tell, **options)
        if output is None:
            finish(path, output, "", as_json=as_json)
    if output is not None:
        finish(output, output, f"{planned.planned_calls:,} calls simulated", as_json=as_json)
    if planned.calls and failed == planned.planned_calls:
        raise SystemExit(3)


def plan_of(trace: str, options: dict[str, Any]) -> Planned:
    """The trace as the options would have it replayed."""
    law = options["arrivals"] or (None if options["sessions"] else "recorded")
    load = {name: options[name] for name in ("gap_cap", "repeat", "seed")}
    return Planned(trace, at_once=options["sessions"], law=law, **load)


def _check_point(planned: Planned, options: dict[str, Any]) -> None:
    """Rules that only marks drive need some, and a law of arrivals is one."""
    rules = RULES.get(options["rules"] or "")
    if not planned.marked and (options["cache_ttl"] == AS_RECORDED or (rules is not None and rules.ttl_s is None)):
        raise InputError(
            f"{planned.trace}: no call has breakpoints, so it has no TTLs as recorded: give --cache-ttl a duration "
            "and engine rules, or rules that need no marks"
        )
    if options["arrivals"] not in (None, "recorded"):
        Law.read(options["arrivals"])


def simulate_to(planned: Planned, path: Path, *, tell: Told, bounds: tuple[str, ...], **options: Any) -> int:
    """Simulate into a run's directory; how many calls failed, those of a failed session that were not sent included."""
    started = runs.now()
    cluster = make_cluster(bounds=("endless", *bounds), **options)
    results = in_virtual_time(planned.schedule(in_tree(cluster.tree)), cluster, live=options["assistant"] == "live")
    told: list[Bound] = []
    failed: Counter[tuple[str, int]] = Counter()

    def kept() -> Iterator[Outcome]:
        """The outcomes; what each call could have read, and whose calls failed, is kept."""
        for done, result in enumerate(results, 1):
            outcome = result.outcome
            told.extend(Bound(outcome.call.call, outcome.copy, name, read) for name, read in result.bounds.items())
            if outcome.error is not None:
                failed[outcome.call.session, outcome.copy] += 1
            tell(done, None)
            yield outcome

    try:
        write_outcomes(str(path / OUTCOMES), kept())
    except OverflowError as error:
        raise InputError(f"{planned.trace}: with these times the run takes longer than 292 years") from error
    if failed:
        complete(path, failed.keys())
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
    return sum(failed.values())
