"""A sweep is one trace on a grid of simulated clusters: one row a cluster, on all cores."""

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from math import prod
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from keepwarm.harness.options import tell
from keepwarm.harness.progress import progress
from keepwarm.harness.simulated import make_cluster
from keepwarm.traces.errors import InputError

Point = dict[str, Any]
MOST_POINTS = 10_000


def grid(axes: tuple[str, ...], options: Point, known: Mapping[str, click.Parameter]) -> list[tuple[Point, Point]]:
    """Every point of a grid over the known options: what was asked of each axis, and the whole options. InputError
    where an axis is none, UsageError where a value or a point makes no sense.
    """
    named: dict[str, list[tuple[str, Any]]] = {}
    for axis in axes:
        name, equals, told = axis.partition("=")
        key = name.strip().lstrip("-").replace("-", "_")
        texts = told.split(",")
        if not equals or key not in known or key in named or len(set(texts)) < len(texts):
            names = ", ".join(sorted(option.replace("_", "-") for option in known))
            raise InputError(f"--sweep {axis!r}: expected OPTION=VALUE,VALUE, each once, with one of {names}")
        context = click.Context(click.Command("sweep"), info_name="keepwarm simulate")
        named[key] = [(text, known[key].type_cast_value(context, text)) for text in texts]
    number = prod(len(values) for values in named.values())
    if number > MOST_POINTS:
        raise InputError(f"--sweep: {number:,} points, expected at most {MOST_POINTS:,}")
    points = []
    for chosen in product(*named.values()):
        pairs = list(zip(named, chosen, strict=True))
        point = options | {key: value for key, (_, value) in pairs}
        make_cluster(**point)  # what contradicts itself is refused before any work
        points.append(({key: text for key, (text, _) in pairs}, point))
    return points


def sweep(trace: str, points: list[tuple[Point, Point]], output: Path | None, *, force: bool, as_json: bool) -> None:
    """Simulate every point and tell the figures, in the grid's order."""
    if output is not None:
        _check_free(output, force)
    rows: list[dict[str, Any]] = [{} for _ in points]
    with (
        progress("sweeping", len(points)) as told,
        ProcessPoolExecutor(min(os.cpu_count() or 1, len(points)), mp_context=get_context("spawn")) as pool,
    ):
        waiting = {pool.submit(_figures, trace, point): i for i, (_, point) in enumerate(points)}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                rows[waiting[future]] = points[waiting[future]][0] | future.result()
                told(done, None)
        except BrokenProcessPool as error:
            raise InputError("a process of the sweep died, perhaps for lack of memory") from error
    from keepwarm.reports.sweep import render_sweep, write_sweep

    tell(rows, as_json, partial(render_sweep, title=Path(trace).name))
    if output is not None:
        write_sweep(rows, output)
        click.echo(f"{output}: {len(rows):,} clusters", err=True)


def _check_free(output: Path, force: bool) -> None:
    """InputError where a table cannot be written, before any work."""
    if output.exists() and (output.is_dir() or not force):
        raise InputError(f"{output}: is there already: choose another file, or give --force")
    if not os.access(output.parent, os.W_OK) or not output.parent.is_dir():
        raise InputError(f"{output}: cannot be written there")


def _figures(trace: str, options: Point) -> dict[str, Any]:
    """One point's figures."""
    from keepwarm.harness.simulate_command import plan_of, simulate_to
    from keepwarm.reports.sweep import figures

    with TemporaryDirectory(prefix="keepwarm-") as scratch:
        simulate_to(plan_of(trace, options), Path(scratch), tell=lambda done, of: None, **options)
        return figures(scratch)
