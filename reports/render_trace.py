"""Render, for traces: what inspect and reproduce print."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from keepwarm.reports import render
from keepwarm.reports.render import count, line, listed, rate, seconds, table, times
from keepwarm.reports.reproduce import band
from keepwarm.traces.breaks import words

TOP_BREAKS = 20


def shape(out: Console, report: dict[str, Any]) -> None:
    """How much is in the trace, how it fans out and grows."""
    fan, grown, used = report["fan_out"], report["growth"], report["tools"]
    calls, added = fan["calls_a_session"], grown["added_a_call"]
    agents = ", ".join(f"{sessions} have {number}" for number, sessions in fan["sessions_by_subagents"].items())
    first = ", ".join(f"{role} {count(p50)}" for role, p50 in grown["first_prompt_p50"].items())
    unread = count(report["uncached"])
    written = ", ".join(f"{kind} {count(report[f'cache_write_{kind}'])}" for kind in ("5m", "1h", "other"))
    output = f"{count(report['output'])} in the {count(report['output_calls'])} calls that tell it"
    named = ", ".join(f"{name} {uses:,}" for name, uses in used["by_name"].items())
    rows = [
        ("agents", f"{count(report['agents'])}, {count(report['subagents'])} of them sub-agents"),
        ("time", f"{seconds(report['span_s'])} from the first call to the last"),
        ("prompt", f"{count(report['prompt'])} = {unread} uncached + {count(report['cache_read'])} read"),
        ("", f"+ written {written}"),
        ("output", f"{output}; {count(report['output_est'])} estimated in the others"),
        ("calls a session", f"p50 {count(calls['p50'])}, p90 {count(calls['p90'])}, max {count(calls['max'])}"),
        ("sub-agents a session", f"{agents}; at most {count(fan['most_at_once'])} at once"),
        ("first prompt p50", f"{first}; longest prompt {count(grown['longest_prompt'])}"),
        ("added a call", ", ".join(f"{key} {count(added[key])}" for key in ("p50", "p90", "p99"))),
        ("shrinking prompts", count(grown["shrinking_calls"])),
        ("tool uses", f"{count(used['uses'])} in {count(used['calls_with_tools'])} calls; {named}"),
    ]
    table(out, "What is in it", ("", ""), rows, words=2)


def breaks(out: Console, report: dict[str, Any]) -> None:
    """Why prefixes broke, where the recording saw it."""
    told = report["breaks"][:TOP_BREAKS]
    differs = (words(row["kind"], row["first_position"], row["last_position"], row["change"]) for row in told)
    listed(out, "breaks", [row | {"differs": how} for row, how in zip(told, differs, strict=True)])
    if report["about"]["producer"] == "record" and not told:
        line(out, "")
        line(out, "No prefix broke: every prompt goes on from its agent's previous one")


def render_inspect(report: dict[str, Any], by: Sequence[str] = ("role", "model")) -> None:
    """Print an inspect_summary on standard output."""
    out = render.console()
    render.heading(out, report)
    shape(out, report)
    render.figures(out, report)
    render.groups(out, report, by)
    for name in ("failures", "losses"):
        listed(out, name, report[name])
    breaks(out, report)
    listed(out, "gaps", [{"kind": kind, **row} for kind, row in report["gaps"].items()])
    render.checks(out, report)


def render_reproduce(report: dict[str, Any]) -> None:
    """Print the claims, what was measured under each definition, and the verdicts."""
    out = render.console()
    render.path(out, report)
    size = ", ".join(f"{count(report[key])} {key}" for key in ("calls", "sessions", "subagents"))
    line(out, size)
    if not report["valid"]:
        line(out, f"not valid, because {'; '.join(report['because'])}", "red")
    for note in report["notes"]:
        line(out, note, "yellow")
    line(out, f"published: {report['source']}")
    rows, last = [], ""
    for row in report["results"]:
        show = times if row["metric"] == "read_write_ratio" else rate
        if row["claim"] != last:
            rows.append((row["claim"], "", "", ""))
        last = row["claim"]
        within = "" if row["measured"] is None else f" ({band(row['metric'], row['low'], row['high'])})"
        told = (count(row["calls"]), show(row["measured"]), row["verdict"] + within)
        rows.append(("  " + row["definition"], *told))
    table(out, "Claim, and what is measured under each definition", ("", "calls", "measured", "verdict (band)"), rows)
    line(out, "")
    line(out, report["contradiction"])
