"""Several runs side by side: one table, a column a run, the difference to the first where there are two."""

from collections.abc import Callable, Sequence
from typing import Any

from keepwarm.reports.about import value_at
from keepwarm.reports.render import NONE, console, count, dollars, points, rate, seconds, table, times

Show = Callable[[Any], str]
FIGURES: tuple[tuple[Show, str], ...] = (
    (rate, "hit_rate warm_hit_rate"),
    (times, "read_write_ratio"),
    (rate, "reconciliation.hit_rate.server predicted_hit_rate"),
    (seconds, "latency.ttft.p50 latency.ttft.p99 latency.latency.p50 latency.latency.p99 latency.itl.p50"),
    (seconds, "task_time.p50"),
    (times, "turn_drift"),
    (count, "prompt output"),
    (dollars, "cost.cost_per_completed_task cost.gpu_cost_per_completed_task"),
    (lambda valid: "yes" if valid else "NO", "valid"),
)
ASKED = {"endpoint": "endpoint.url", "dialect": "endpoint.dialect", "trace": "trace.digest", "start": "cache.how"}
ASKED |= {"cache": "cache.state_at_start"}
ASKED |= {name: f"options.{name}" for name in ("assistant", "hints", "speed", "sessions", "scale_tokens")}
"""What was asked of a run, and where it says so."""


def render_beside(reports: Sequence[dict[str, Any]]) -> None:
    """Print runs side by side: what differed between them, and their figures."""
    names = [report["path"].rstrip("/").rsplit("/", 1)[-1] for report in reports]
    change, rows = ["last - first"] if len(reports) == 2 else [], []
    for name, place in ASKED.items():
        asked = [str(value_at(report["about"], place) or NONE) for report in reports]
        if len(set(asked)) > 1:
            rows.append([name, *(value[:24] for value in asked), *("" for _ in change)])
    for show, figure in ((show, figure) for show, figures in FIGURES for figure in figures.split()):
        values = [value_at(report, figure) for report in reports]
        if any(value is not None for value in values):
            rows.append([figure, *map(show, values), *_difference(values, show)])
    table(console(), "Side by side", ("", *names, *change), rows)


def _difference(values: Sequence[Any], show: Show) -> list[str]:
    """The second of two figures against the first: points of a rate, else per cent of it."""
    if len(values) != 2:
        return []
    first, last = values
    if show is rate:
        return [points(last, first)]
    known = isinstance(first, int | float) and isinstance(last, int | float) and not isinstance(first, bool) and first
    return [f"{100 * (last / first - 1):+.1f} %" if known else ""]
