"""The calibrate command: the simulator's step times, fitted to a measured run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import orjson

from keepwarm.harness.options import options
from keepwarm.harness.progress import progress
from keepwarm.harness.simulated import COUNT
from keepwarm.replayers.engine import MAX_BATCHED
from keepwarm.traces.shipped import shipped

POOR = 0.2
"""A median error above which a model is none."""


@click.command()
@click.argument("run", metavar="RUN")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="TIMES.json")
@click.option("--max-batched-tokens", "batched", type=COUNT, default=MAX_BATCHED, show_default=True)
@options("json")
def calibrate(run: str, output: Path | None, batched: int, as_json: bool) -> None:
    """Fit the simulator's step times to a measured run.

    RUN is a run's directory. Every fifth call is left out of the fit and predicted by it. What the run does not tell
    (how calls slow each other down, where they never met) is null and said, not guessed.

    The step times are written to TIMES.json, for --times of simulate and serve. The batched tokens are those of prompts
    that the measured server computed in one step at most.
    """
    from keepwarm.reports.calibrate import calibrate as fitted

    with progress("fitting") as heard:
        told = fitted(run, batched, heard)
    text = orjson.dumps(told, option=orjson.OPT_INDENT_2)
    if output is not None:
        output.write_bytes(text + b"\n")
    if as_json:
        click.echo(text)
        return
    for line in _lines(told):
        click.echo(line)
    if output is not None:
        click.echo(f"{output}: step times; use them with: keepwarm simulate T --times {output}")


def _lines(told: dict[str, Any]) -> list[str]:
    """The model and how far it is off, for people."""
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
    return lines + [f"  {name}: {why}" for name, why in fitted["not_identified"].items()]
