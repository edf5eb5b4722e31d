"""A sweep's table: one row a simulated cluster, what was asked of it and what it gave."""

from pathlib import Path
from typing import Any

import polars as pl

from keepwarm.reports.about import value_at
from keepwarm.reports.frame import load
from keepwarm.reports.prices import load_prices
from keepwarm.reports.render import TABLES, console, shown, table
from keepwarm.reports.summary import summarise

FIGURES = TABLES["sweep"]["figures"]
"""Times are from due, in seconds of the simulated clock; ``failed`` are calls without an answer, skipped ones too."""


def figures(run: str) -> dict[str, Any]:
    """FIGURES of a run, as its own report has them."""
    report, _ = summarise(load(run), load_prices())
    report["failed"] = sum(row["calls"] for row in report["failures"])
    return {name: value_at(report, place) for name, place in FIGURES.items()}


def write_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """The table as Parquet; what was asked is text."""
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)


def render_sweep(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table on standard output."""
    columns = [name if name in FIGURES else name.replace("_", "-") for name in rows[0]]
    cells = [[shown(value, ".4g" if isinstance(value, float) else "") for value in row.values()] for row in rows]
    table(console(), title, columns, cells, words=0)
