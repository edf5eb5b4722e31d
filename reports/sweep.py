"""A sweep's table: one row a simulated cluster, what was asked of it and what it gave."""

from pathlib import Path
from typing import Any

import polars as pl

from keepwarm.reports.frame import collect, load
from keepwarm.reports.prices import load_prices
from keepwarm.reports.render import console, table
from keepwarm.reports.summary import summarise

FIGURES = (
    *("hit_rate", "warm_hit_rate", "read_write_ratio", "cost_per_completed_task", "gpu_cost_per_completed_task"),
    *("ttft_p50_s", "ttft_p99_s", "turn_drift", "failed"),
)
"""Times are from due, in seconds of the simulated clock; ``failed`` are calls without an answer, skipped ones too."""


def figures(run: str) -> dict[str, Any]:
    """FIGURES of a run, as its own report has them."""
    loaded = load(run)
    report, _ = summarise(loaded, load_prices(None))
    ttft = report["latency"]["ttft"] or {}
    failed = collect(loaded.scan.select(pl.col("error").count())).item()
    told = {"ttft_p50_s": ttft.get("p50"), "ttft_p99_s": ttft.get("p99"), "failed": failed}
    told |= report["cost"] | {name: report[name] for name in FIGURES if name in report}
    return {name: told[name] for name in FIGURES}


def write_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """The table as Parquet; what was asked is text."""
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)


def render_sweep(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table on standard output."""
    columns = [name if name in FIGURES else name.replace("_", "-") for name in rows[0]]
    table(console(), title, columns, [[_cell(value) for value in row.values()] for row in rows], words=0)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
