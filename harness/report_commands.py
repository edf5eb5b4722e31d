"""The commands that say what a run or a recording meant: report, gate, reproduce, calibrate."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import orjson

from keepwarm.harness.options import options, tell
from keepwarm.harness.progress import progress
from keepwarm.harness.run_commands import BUNDLED
from keepwarm.reports.calibrate import calibrate as fitted
from keepwarm.reports.frame import load
from keepwarm.reports.gate import check
from keepwarm.reports.latency import write_hlog
from keepwarm.reports.metrics import GROUPS
from keepwarm.reports.prices import load_prices
from keepwarm.reports.render import render_report
from keepwarm.reports.render_beside import render_beside
from keepwarm.reports.render_trace import render_reproduce
from keepwarm.reports.reproduce import reproduce as set_beside
from keepwarm.reports.summary import summarise
from keepwarm.traces.errors import InputError
from keepwarm.traces.shipped import shipped

POOR = 0.2
"""A median error above which a model is none."""


def tell_all(reports: list[dict[str, Any]], as_json: bool, render: Callable[[dict[str, Any]], None]) -> None:
    """For people one after the other; as JSON one report as an object, several as an array of them."""
    if as_json:
        tell(reports[0] if len(reports) == 1 else reports, as_json, render)
        return
    for number, told in enumerate(reports):
        if number:
            click.echo()
        render(told)


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@options("json", "by", "priced", group=click.Choice(list(GROUPS)))
def report(paths: tuple[str, ...], as_json: bool, by: tuple[str, ...], **priced: Any) -> None:
    """Say what a run meant: cache, latency, cost, validity.

    RUN is a run's directory, or a trace: its recording is then reported. Beside a run's outcomes latency.hlog is
    written, for HdrHistogram tools.
    """
    reports, prices = [], load_prices(**priced)
    for path in paths:
        loaded = load(path)
        told, counts = summarise(loaded, prices)
        reports.append(told)
        if loaded.kind == "run":
            try:
                write_hlog(loaded, counts)
            except InputError as error:  # a run that cannot be written to is still reported
                click.echo(f"keepwarm: {error}", err=True)
    tell_all(reports, as_json, partial(render_report, by=by or ("role", "turn")))
    if len(reports) > 1 and not as_json:
        render_beside(reports)


@click.command()
@click.argument("run", metavar="RUN")
@options("gate", "priced")
def gate(run: str, requires: tuple[str, ...], baseline: str | None, across_traces: bool, **priced: Any) -> None:
    """Hold a run against required figures, or against a baseline: one line a check.

    Exit codes: 0 all passed; 1 one failed or was not measured; 2 bad input; 3 the run is not valid for what was asked.
    With --baseline and no requirement on it, warm_hit_rate, ttft.p99 and latency.p99 are held to it. It must be of the
    same trace.
    """
    against = load(baseline) if baseline else None
    lines, code = check(load(run), list(requires), load_prices(**priced), against, across_traces=across_traces)
    for line in lines:
        click.echo(line)
    raise SystemExit(code)


@click.command()
@click.argument("paths", nargs=-1, metavar="[T]...")
@options("json")
def reproduce(paths: tuple[str, ...], as_json: bool) -> None:
    """Set the published cache-reuse figures beside what a trace shows.

    T is a trace or a run; the bundled trace where none is given. Each claim is measured under every definition it can
    be read under, and gets a verdict for each.
    """
    results = [set_beside(load(path)) for path in paths or (str(BUNDLED),)]
    if not paths:
        results[0]["path"] = "the bundled trace"
    tell_all(results, as_json, render_reproduce)


@click.command()
@click.argument("run", metavar="RUN")
@options("calibrate", "json")
def calibrate(run: str, output: Path | None, batched: int, as_json: bool) -> None:
    """Fit the simulator's step times to a measured run.

    RUN is a run's directory. Every fifth call is left out of the fit and predicted by it. What the run does not tell
    (how calls slow each other down, where they never met) is null and said, not guessed.

    The step times are written to TIMES.json, for --times of simulate and serve. The batched tokens are those of prompts
    that the measured server computed in one step at most.
    """
    with progress("fitting") as heard:
        told = fitted(run, batched, heard)
    if output is not None:
        output.write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2) + b"\n")
    tell(told, as_json, _show)
    if output is not None and not as_json:
        click.echo(f"{output}: step times; use them with: keepwarm simulate T --times {output}")


def _show(told: dict[str, Any]) -> None:
    """Print the model and how far it is off."""
    fitted = told["fitted"]
    lines = [f"{fitted['run']}: {fitted['calls']:,} calls, {fitted['workers']} worker(s), every fifth call held out"]
    for name, part in shipped("keepwarm.reports", "step_times.toml")["parts"].items():
        value = "not identified" if told[name] is None else f"{told[name]:.3g} s"
        lines.append(f"  {name:<10}{value:<16}{part['of']}")
    for kind, what in (("itl", "calls that decoded"), ("ttft", "calls that found their worker idle")):
        of = fitted[kind]
        error = "not measured" if of["error_p50"] is None else f"{of['error_p50']:.1%} p50, {of['error_p90']:.1%} p90"
        lines.append(f"  error of {kind:<5}{error} on {of['held_out']} held-out {what} ({of['used']} used)")
        if (of["error_p50"] or 0.0) > POOR:
            lines.append(f"  {kind} is not explained: something else than these times made it; do not plan with them")
    lines += [f"  {name}: {why}" for name, why in fitted["not_identified"].items()]
    click.echo("\n".join(lines))
