"""The commands that say what a run or a recording meant: report, gate, reproduce."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from importlib.resources import as_file, files
from typing import Any

import click
import orjson

from keepwarm.harness.options import options
from keepwarm.reports.frame import load
from keepwarm.reports.gate import check
from keepwarm.reports.latency import write_hlog
from keepwarm.reports.metrics import GROUPS
from keepwarm.reports.prices import Prices, load_prices
from keepwarm.reports.render import render_report
from keepwarm.reports.render_beside import render_beside
from keepwarm.reports.render_trace import render_reproduce
from keepwarm.reports.reproduce import reproduce as set_beside
from keepwarm.reports.summary import summarise
from keepwarm.traces.errors import InputError


def priced(command: Callable[..., None]) -> Any:
    """The options that say what things cost; the command gets them as ``prices``, a price table."""

    @wraps(command)
    def with_prices(prices: str | None, gpu_hour_price: float | None, gpus: int | None, **given: Any) -> None:
        command(prices=load_prices(prices, gpu_hour_price, gpus), **given)

    return options("priced")(with_prices)


def tell(reports: list[dict[str, Any]], as_json: bool, render: Callable[[dict[str, Any]], None]) -> None:
    """For people one after the other; as JSON one report as an object, several as an array of them."""
    if as_json:
        click.echo(orjson.dumps(reports[0] if len(reports) == 1 else reports, option=orjson.OPT_INDENT_2))
        return
    for number, told in enumerate(reports):
        if number:
            click.echo()
        render(told)


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@options("json", "by", group=click.Choice(list(GROUPS)))
@priced
def report(paths: tuple[str, ...], as_json: bool, by: tuple[str, ...], prices: Prices) -> None:
    """Say what a run meant: cache, latency, cost, validity.

    RUN is a run's directory, or a trace: its recording is then reported. Beside a run's outcomes latency.hlog is
    written, for HdrHistogram tools.
    """
    reports = []
    for path in paths:
        loaded = load(path)
        told, counts = summarise(loaded, prices)
        reports.append(told)
        if loaded.kind == "run":
            try:
                write_hlog(loaded, counts)
            except InputError as error:  # a run that cannot be written to is still reported
                click.echo(f"keepwarm: {error}", err=True)
    tell(reports, as_json, partial(render_report, by=by or ("role", "turn")))
    if len(reports) > 1 and not as_json:
        render_beside(reports)


@click.command()
@click.argument("path", metavar="RUN")
@options("gate")
@priced
def gate(path: str, requires: tuple[str, ...], baseline: str | None, across_traces: bool, prices: Prices) -> None:
    """Hold a run against required figures, or against a baseline: one line a check.

    Exit codes: 0 all passed; 1 one failed or was not measured; 2 bad input; 3 the run is not valid for what was asked.
    With --baseline and no requirement on it, warm_hit_rate, ttft.p99 and latency.p99 are held to it. It must be of the
    same trace.
    """
    against = load(baseline) if baseline else None
    lines, code = check(load(path), list(requires), prices, against, across_traces=across_traces)
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
    if paths:
        results = [set_beside(load(path)) for path in paths]
    else:
        with as_file(files("keepwarm.harness").joinpath("demo.parquet")) as bundled:
            results = [{**set_beside(load(str(bundled))), "path": "the bundled trace"}]
    tell(results, as_json, render_reproduce)
