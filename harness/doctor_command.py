"""The doctor command: what an endpoint is and can do, as a table or as JSON."""

import asyncio
from collections.abc import Iterator
from itertools import count
from typing import Any

import click

from keepwarm.harness.options import options, tell

PARTS = 12
"""Of an examination."""


@click.command()
@click.argument("url")
@options("endpoint", "doctor", "json")
def doctor(url: str, as_json: bool, **given: Any) -> None:
    """Say what an endpoint is and can do: its dialects, what it tells of its cache, what it does to times.

    It is asked some hundred small prompts. Exit code 0 if cached tokens are
    told in any dialect, 1 if in none, 2 if there is no endpoint that could be asked.
    """
    from keepwarm.harness.doctor import examine
    from keepwarm.harness.progress import progress
    from keepwarm.replayers.http import DIALECTS, reach
    from keepwarm.replayers.server import identify, known_words

    opening = {name: given.pop(name) for name in ("key_env", "key_file", "header", "ca", "transport")}
    addresses = {name: reach(url, name, **opening) for name in DIALECTS}
    server, words = identify(addresses["messages"]), known_words(given.pop("tokenizer"))
    with progress("asking", PARTS) as told:
        done = count(1)
        report = asyncio.run(examine(addresses, server, words=words, **given, told=lambda: told(next(done), None)))
    tell(report, as_json, _show)
    if not any(row["cached"] == "reported" for row in report["dialects"].values()):
        raise SystemExit(1)


FIGURES = ("answers", "streams", "usage", "cached", "written", "tools", "exact_output", "cache_key")


def _show(report: dict[str, Any]) -> None:
    """Print a report on standard output."""
    from keepwarm.reports.render import console, line, table

    out = console()
    rows = report["dialects"].items()
    table(out, report["url"], ("", ""), _findings(report), words=2)
    told = ([name, *(_word(row[figure]) for figure in FIGURES)] for name, row in rows)
    columns = ("dialect", *(figure.replace("_", " ") for figure in FIGURES))
    table(out, "What each dialect tells, and takes", columns, told, words=9)
    for name, row in rows:
        if row["why"]:
            line(out, f"{name}: {row['why']}", "yellow")
    columns = ("dialect", "words", "of", "tokens a word", "a turn takes", "check was off")
    table(out, "Prompts", columns, ([name, *_prompts(row["calibration"])] for name, row in rows if row["calibration"]))


def _word(value: Any) -> str:
    return "-" if value is None else {True: "yes", False: "no"}.get(value, str(value))


def _prompts(told: dict[str, Any]) -> list[str]:
    off = "-" if told["off"] is None else f"{100 * told['off']:.2f} %"
    return [str(told["words"]), str(told["of"]), f"{told['word']:.3g}", f"{told['turn']:g}", off]


def _findings(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was found, each by its name, in words."""
    cache, counters = report["cache"], report["counters"] or {}
    yield "server", " ".join(filter(None, (report["server"], report["version"]))) or "not told"
    yield "model", report["model"]
    yield "context limit", "not told" if report["context"] is None else f"{report['context']:,} tokens"
    yield "longer prompts", _overflow(report["overflow"] or {"outcome": None})
    yield "cache block", _block(cache)
    yield "cache_salt", {True: "another one is cold", False: "no effect seen"}.get(cache["salt"], "not known")
    emptied = {True: ", and is cold after it", False: ", but is not cold after it"}.get(cache["cold_after_reset"], "")
    yield "cache reset", (cache["reset"] + emptied) if cache["reset"] else "not found"
    idle = report["keep_alive"]
    kept = "not known" if idle["beyond_s"] is None else f"kept longer than {idle['beyond_s']:g} s"
    yield "idle connection", kept if idle["closed_s"] is None else f"closed after {idle['closed_s']:.1f} s"
    yield "delayed first token", _delay(report["delayed_ack"])
    yield "each call's times", _timings(report["timings"])
    shape = [f"{name} {counters[name]:,}" for name in ("block", "blocks") if counters.get(name)]
    yield "counters", ", ".join([f"/metrics in {counters['kind']}'s names", *shape]) if counters else "not told"


def _overflow(told: dict[str, Any]) -> str:
    if told["outcome"] is None:
        return "not known"
    if told["outcome"] == "refused":
        words = (told["told"] or "").partition(". ")[0][:80]
        return f"refused: status {told['status']}: {words}".rstrip(": ")
    return f"{told['outcome']}: {told['prompt']:,} prompt tokens reported of {told['sent']:,} sent"


def _block(cache: dict[str, Any]) -> str:
    if cache["found_by"] is None:
        return "not known"
    size = "none: keeps what is marked, to the token" if cache["block"] is None else f"{cache['block']:,}"
    return f"{size}, from {cache['least']:,} tokens on, asked in {cache['dialect']}"


def _delay(told: dict[str, Any] | None) -> str:
    if told is None:
        return "not known"
    found = "FOUND (Nagle, delayed ACK)" if told["found"] else "not found"
    return f"{found}: {told['reused_ms']:g} ms after headers if reused, {told['new_ms']:g} ms if new"


def _timings(told: dict[str, Any]) -> str:
    if told["field"] is None:
        return "not told" + (f": start the server with {told['flag']}" if told["flag"] else "")
    ahead = told["ahead_s"]
    wall = "" if ahead is None else f", which is {ahead:+.3f} s from ours" if ahead else ", which agrees with ours"
    return f"in {told['field']}, by the server's own clock{wall}"
