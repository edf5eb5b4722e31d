"""Several runs side by side: one table, a column a run, the difference to the first where there are two."""

from collections.abc import Sequence
from typing import Any

from keepwarm.reports.about import value_at
from keepwarm.reports.render import NONE, TABLES, console, points, shown, table


def render_beside(reports: Sequence[dict[str, Any]]) -> None:
    """Print runs side by side: what differed between them, and their figures."""
    names = [report["path"].rstrip("/").rsplit("/", 1)[-1] for report in reports]
    change, rows = ["last - first"] if len(reports) == 2 else [], []
    for name, place in TABLES["beside"]["asked"].items():
        asked = [str(value_at(report["about"], place) or NONE) for report in reports]
        if len(set(asked)) > 1:
            rows.append([name, *(value[:24] for value in asked), *("" for _ in change)])
    for figure, how in TABLES["beside"]["figures"].items():
        values = [value_at(report, figure) for report in reports]
        if any(value is not None for value in values):
            rows.append([figure, *(shown(value, how) for value in values), *_difference(values, how)])
    table(console(), "Side by side", ("", *names, *change), rows)


def _difference(values: Sequence[Any], how: str) -> list[str]:
    """The second of two figures against the first: points of a rate, else per cent of it."""
    if len(values) != 2:
        return []
    first, last = values
    if how == "rate":
        return [points(last, first)]
    known = isinstance(first, int | float) and isinstance(last, int | float) and not isinstance(first, bool) and first
    return [f"{100 * (last / first - 1):+.1f} %" if known else ""]
