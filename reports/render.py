"""Render turns the dicts of summary, recording and reproduce into terminal tables of at most 100 columns."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from keepwarm.reports import latency
from keepwarm.reports.frame import clock_told
from keepwarm.reports.validity import figure
from keepwarm.traces.shipped import shipped

WIDTH = 100
FOLDED = 24
"""Columns that a column of words gets at least, if it has so many."""
NONE = "-"
TABLES = shipped("keepwarm.reports", "tables.toml")


def console() -> Console:
    """Standard output, 100 columns at most; colours only on a terminal."""
    out = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    out.width = min(WIDTH, out.width) if out.is_terminal else WIDTH
    return out


def rate(value: float | None) -> str:
    """A fraction as per cent."""
    return NONE if value is None else f"{100 * value:.2f} %"


def times(value: float | None) -> str:
    """A ratio."""
    return NONE if value is None else f"{value:.1f}x" if value < 1000 else f"{value:,.0f}x"


def count(value: float | None) -> str:
    """A whole number."""
    return NONE if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """A time in the unit it is best read in."""
    if value is None:
        return NONE
    if value < 1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.2f} s" if value < 600 else f"{value / 60:,.0f} min" if value < 36_000 else f"{value / 3600:,.0f} h"


def dollars(value: float | None) -> str:
    """Money."""
    return NONE if value is None else f"${value:,.2f}" if value >= 1 else f"${value:.4f}"


def truth(value: bool) -> str:
    """What should be so."""
    return "yes" if value else "NO"


SHOWN: dict[str, Callable[[Any], str]] = {each.__name__: each for each in (rate, times, count, seconds, dollars, truth)}


def shown(value: Any, how: str) -> str:
    """A value as one of SHOWN tells it, or in a format of Python's."""
    if value is None:
        return NONE
    return SHOWN[how](value) if how in SHOWN else format(value, how)


def table(out: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> None:
    """Print a table under a title; the first ``words`` columns hold words, the others figures. Nothing if empty.

    Words are broken over lines where they must be, and off a terminal only in a last column; figures never are: a
    table is rather wider than the console.
    """
    cells, last = [columns, *rows], len(columns) - 1
    if len(cells) == 1:
        return
    folds = {last} & {*range(words)} | ({0} if out.is_terminal else set())
    need = [2 + max(cell_len(row[index]) for row in cells) for index in range(len(columns))]
    least = sum(min(width, FOLDED) if index in folds else width for index, width in enumerate(need))
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=any(columns))
    for index, name in enumerate(columns):
        justify: JustifyMethod = "left" if index < words else "right"
        shown.add_column(name, justify=justify, no_wrap=index not in folds, overflow="fold")
    for row in cells[1:]:
        shown.add_row(*(Text(cell) for cell in row))
    out.print()
    out.print(Text(title, style="bold"))
    width, out.width = out.width, max(out.width, least)
    out.print(shown)
    out.width = width


def listed(out: Console, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Print objects, each a row, as the table of that name in tables.toml."""
    told = TABLES[name]
    cells = [[shown(row[key], how) for _, key, how in told["columns"]] for row in rows]
    table(out, told["title"], [head for head, _, _ in told["columns"]], cells, told.get("words", 1))


def line(out: Console, text: str, style: str = "") -> None:
    """Print one line of plain text."""
    out.print(Text(text, style=style))


def path(out: Console, report: dict[str, Any]) -> None:
    """Where a report is from, unbroken however long the path."""
    out.print(Text(f"{report['kind']} {report['path']}", style="bold"), soft_wrap=True)


def heading(out: Console, report: dict[str, Any]) -> None:
    """The first lines: what this is, whether it is valid, how its trace was imported, what was done to time."""
    path(out, report)
    line(out, what(report))
    reasons = "; ".join(report["because"])
    line(out, "valid" if report["valid"] else f"not valid, because {reasons}", "green" if report["valid"] else "red")
    breaks = report["prefix_breaks"]
    if breaks == "recorded":
        line(out, informed(report))
    elif breaks == "blind":
        line(out, "blind: no prefix was cut by what the recording read")
    for note in report["notes"]:
        line(out, note, "yellow")
    scale = (report.get("latency") or {}).get("time_scale", 1.0)
    if scale != 1.0:
        line(out, f"{clock_told(scale)}: times below are as measured, not scaled back")


def informed(report: dict[str, Any]) -> str:
    """What an informed import took from the recording; its figures are no prediction, and this says so."""
    marked, every = report["informed_calls"], report["recorded_breaks"]
    if every is None or every <= marked:
        every, how = marked, "prefix_change = recorded_break"
    else:
        how = f"{count(marked)} as recorded_break"
    return f"informed: {count(every)} calls' prefixes cut to what was read ({how}), not a prediction"


def what(report: dict[str, Any]) -> str:
    """What was run, on what, or what the recording is, in a few words."""
    about = report["about"]
    size = f"{count(report['calls'])} calls, {count(report['sessions'])} sessions"
    if report["kind"] == "recording":
        return f"{size}, from {about['producer']}, token counts {about['tokens']}"
    trace, endpoint, options = (about.get(key) or {} for key in ("trace", "endpoint", "options"))
    told = [about.get("mode") or "run", "of", trace.get("name") or "an unnamed trace", "on"]
    told.append(endpoint.get("url") or endpoint.get("name") or "an unnamed endpoint")
    if (options.get("speed") or 1.0) != 1.0:
        told.append(f"at speed {options['speed']:g}")
    if options.get("gap_cap_s") is not None:
        told.append(f"with gaps cut to {options['gap_cap_s']:g} s")
    cache = about.get("cache") or {}
    if cache.get("state_at_start"):
        told[-1] += ","
        how = f" ({cache['how']})" if cache.get("how") else ""
        told.append(f"cache {cache['state_at_start']} at the start{how}")
    return f"{size}; {' '.join(told)}"


def figures(out: Console, report: dict[str, Any]) -> None:
    """The cache figures of the whole run, each by its name, with what it is a share of."""
    spread, kept = report["warm_hit_range"], report["retention"]
    warm = f"of {count(report['warm_prompt'])} in {count(report['warm_calls'])} calls with turn > 0"
    wide = f"p5 .. p95 of {count(spread['calls'])} warm calls; p50 {rate(spread['p50'])}"
    written = f"{count(report['written'])} written ({report['write_source']})"
    rows = [
        ("hit_rate", rate(report["hit_rate"]), f"of {count(report['rate_prompt'])} prompt tokens"),
        ("warm_hit_rate", rate(report["warm_hit_rate"]), warm),
        ("warm_hit_range", f"{rate(spread['p5'])} .. {rate(spread['p95'])}", wide),
        ("", rate(spread["inside_85_97"]), "of those calls lie inside 85-97 %"),
        ("hit_rate_macro", rate(report["hit_rate_macro"]), f"mean of {count(report['agents'])} agents"),
        ("hit_rate_excluding_writes", rate(report["hit_rate_excluding_writes"]), "of tokens read or uncached"),
        ("read_write_ratio", times(report["read_write_ratio"]), f"{count(report['cache_read'])} read / {written}"),
        ("retention", rate(kept["of_tokens"]), f"of the previous prompts' tokens, over {count(kept['calls'])} calls"),
        ("cold_write_share", rate(report["cold_write_share"]), f"of {written}"),
    ]
    for bound, value in (report["achievable_hit_rate"] or {}).items():
        share = (report["efficiency"] or {}).get(bound)
        rows.append((f"achievable_hit_rate[{bound}]", rate(value), f"efficiency {rate(share)} = hit_rate / this"))
    missing = report["calls_without_cache_report"]
    if missing:
        rows.append(("without cache report", count(missing), f"of {count(report['calls'])} calls: in no rate above"))
    table(out, "Cache", ("figure", "value", "of what"), rows, words=3)


def groups(out: Console, report: dict[str, Any], by: Sequence[str]) -> None:
    """The figures by each of the asked groups; with ttft where it was measured, else latency."""
    for name in by:
        slow = (report.get("latency") or {}).get(f"by_{name}", {})
        metric = "ttft" if any(row["ttft"] for row in slow.values()) else "latency"
        columns = (name, "sessions", "agents", "calls", "prompt", "hit_rate", "warm", "r/w")
        rows = []
        for value, row in report[f"by_{name}"].items():
            cells = [value, *(count(row[key]) for key in ("sessions", "agents", "calls", "prompt"))]
            cells += [rate(row["hit_rate"]), rate(row["warm_hit_rate"]), times(row["read_write_ratio"])]
            took = (slow.get(value) or {}).get(metric) or {}
            rows.append([*cells, *((seconds(took.get(key)) for key in ("p50", "p99")) if slow else ())])
        table(out, f"By {name}", (*columns, *((f"{metric} p50", "p99") if slow else ())), rows)


def latencies(out: Console, report: dict[str, Any]) -> None:
    """Times from due and from sent."""
    percents = [key for key in latency.STATISTICS if key != "calls"]
    rows = []
    for name, words in TABLES["latency"].items():
        row = report["latency"][name] or {}
        values = count(row["calls"]) if row else "not measured"
        rows.append([words, values, *(seconds(row.get(key)) for key in percents)])
    table(out, "Latency", ("time", "values", *percents), rows)
    spent, text = report["task_time"], ""
    if report["stretch"]:
        text += f"; stretch p50 {times(report['stretch']['p50'])}"
    if report["turn_drift"]:
        text += f"; turn_drift {times(report['turn_drift'])} (ttft p50, turns 50+ / 2-5)"
    line(out, f"task_time p50 {seconds(spent['p50'])}, max {seconds(spent['max'])}{text}")


def reconciled(out: Console, report: dict[str, Any]) -> None:
    """What clients were told beside what the server counted, and what was predicted."""
    beside = report["reconciliation"]
    if not beside:
        return
    rows = [(row["figure"], *(count(row[side]) for side in ("client", "server", "residual"))) for row in beside["rows"]]
    rates = beside["hit_rate"]
    away = points(rates["server"], rates["client"])
    rows.append(("hit_rate", rate(rates["client"]), rate(rates["server"]), away))
    table(out, f"Beside the server's own counters ({beside['kind']})", ("figure", "client", "server", "residual"), rows)
    if rates["router"] is not None:
        line(out, f"router's own view of hits {rate(rates['router'])}")
    if rates["predicted"] is not None:
        same = rate(beside["as_predicted"])
        away = points(rates["client"], rates["predicted"])
        line(out, f"predicted by the simulator {rate(rates['predicted'])} ({away}); {same} of calls to the token")
    rule = beside["as_block_rule"]
    if rule and rule["share"] is not None:
        grown = f"{count(rule['calls'])} grown prompts"
        line(out, f"{rate(rule['share'])} of {grown} read their whole blocks of {rule['block']}")


def points(one: float | None, other: float | None) -> str:
    """A difference of rates."""
    return NONE if one is None or other is None else f"{100 * (one - other):+.3f} points"


def costs(out: Console, report: dict[str, Any]) -> None:
    """Cost per completed task, what it is made of, and what is missing from it."""
    cost = report["cost"]
    line(out, "")
    line(out, f"cost_per_completed_task {dollars(cost['cost_per_completed_task'])}", "bold")
    known = f"{count(cost['sessions_completed'])} completed, of {count(cost['sessions_known'])}"
    estimated = rate(cost["output_est_share"])
    line(out, f"  completed = {cost['completed_means']}")
    line(out, f"  {dollars(cost['money'])} / {known} with known outcome; {estimated} of it from estimated outputs")
    line(out, f"  {dollars(cost['money_of_priced_calls'])} over all priced calls; prices of {cost['prices_date']}")
    if cost["models_without_price"]:
        line(out, f"  no price for {', '.join(cost['models_without_price'])}: give one with --prices", "yellow")
    if cost["calls_without_cost"]:
        missing = TABLES["unpriced"]
        why = ", ".join(f"{missing.get(name, name)} in {count(calls)}" for name, calls in cost["unpriced"].items())
        line(out, f"  {count(cost['calls_without_cost'])} calls have no known cost: no price for {why}", "yellow")
    if cost["gpu_hours"] is not None:
        each, hours = dollars(cost["gpu_cost_per_completed_task"]), f"{cost['gpu_hours']:.3f} GPU-hours"
        line(out, f"gpu_cost_per_completed_task {each}: {hours}, {dollars(cost['gpu_money'])}")


def checks(out: Console, report: dict[str, Any]) -> None:
    """The validity section: every check with its figure and its limit."""
    words = {True: "good", False: "NOT GOOD", None: ""}
    rows = []
    for check in report["checks"]:
        limit = NONE
        if check["limit"] is not None:
            limit = f"{'>=' if check['least'] else '<='} {figure(check['limit'], check['unit'])}"
        rows.append((check["check"], words[check["good"]], figure(check["value"], check["unit"]), limit))
    table(out, "Validity", ("check", "", "figure", "limit"), rows, words=2)


def recorded(out: Console, report: dict[str, Any]) -> None:
    """A run's reads beside the recorded ones, and what explains the rest."""
    beside = report["recorded"]
    if not beside:
        return
    points = beside["difference_points"]
    sessions = beside["sessions"]
    line(out, "")
    line(out, "Beside the recording", "bold")
    rates = f"warm_hit_rate {rate(beside['warm_hit_rate'])}, recorded {rate(beside['recorded_warm_hit_rate'])}"
    apart = "" if points is None else f": {points:+.3f} points"
    line(out, f"{rates}{apart}, over {count(beside['warm_calls'])} calls that have both")
    steps = (0.5, 1.0, 1.5, 2.0) if sessions["sessions"] else ()
    within = ", ".join(f"{100 * sessions[f'within_{p:g}']:.1f} % within {p:g}" for p in steps)
    most = NONE if sessions["max"] is None else f"{sessions['max']:.2f}"
    line(out, f"{count(sessions['sessions'])} sessions, points away: {within}, at most {most}")
    line(out, f"{rate(beside['warm_calls_within_32_tokens'])} of warm calls within 32 tokens")
    listed(out, "explained", beside["explained"])


def render_report(report: dict[str, Any], by: Sequence[str] = ("role", "turn")) -> None:
    """Print a summary on standard output."""
    out = console()
    heading(out, report)
    figures(out, report)
    groups(out, report, by)
    listed(out, "losses", report["losses"])
    for part in (recorded, reconciled, latencies, costs):
        part(out, report)
    listed(out, "failures", report["failures"])
    checks(out, report)
