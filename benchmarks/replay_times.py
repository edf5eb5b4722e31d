"""The parts of replay.py about time: whether calls go out when due, and whether what is told of tokens is true."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import polars as pl
import proxies
from fastserver import Answered
from replay_clients import KEEPWARM, Client, Ran
from replay_costs import bar, saying
from replay_traces import MS, Shape, calls, write

from keepwarm.traces.store import read_outcome_table

SESSION = re.compile(r"(s\d{6})-0$")
RATE, SECONDS = 1000, 10
STREAMS, TTFT_MS, ITL_MS, TOKENS, ROUNDS = 256, 50, 10, 20, 8
TABLE = "  {:10} {:>24} {:>24} {:>24} {:>12}"


class Matched(NamedTuple):
    """A call as its client tells it and as the server saw it; ms but for the ns of ``row``."""

    row: dict[str, int | None]
    truth: Answered
    first: bool


def at(values: list[float], quantile: float) -> float:
    """A quantile, the nearest rank."""
    return sorted(values)[round(quantile * (len(values) - 1))] if values else float("nan")


def spread(values: list[float]) -> str:
    """Median, 99th percentile, most."""
    return f"{at(values, 0.5):.2f} / {at(values, 0.99):.2f} / {at(values, 1.0):.2f}"


def matched(run: Path, truth: list[Answered]) -> list[Matched]:
    """Our rows with the server's: those of a session in their order."""
    names = ["session", "due_ns", "sent_ns", "first_token_ns", "last_token_ns", "done_ns", "token_ns", "error"]
    rows = pl.DataFrame(read_outcome_table(str(run / "outcomes.parquet"), names))
    wrong = rows.filter(pl.col("error").is_not_null()).height
    if wrong:
        print(f"  {wrong} of {rows.height} calls failed")
    seen: dict[str, list[Answered]] = defaultdict(list)
    for each in truth:
        found = SESSION.search(each.who)
        if found:
            seen[found[1]].append(each)
    out = []
    for (name,), own in rows.filter(pl.col("error").is_null()).sort("sent_ns").group_by("session"):
        told = sorted(seen[str(name)], key=lambda each: each.arrived_ns)
        if len(told) == own.height:
            pairs = enumerate(zip(own.iter_rows(named=True), told, strict=True))
            out += [Matched(row, each, not number) for number, (row, each) in pairs]
    if len(out) + wrong < rows.height:
        print(f"  {rows.height - wrong - len(out)} of {rows.height} calls could not be matched with the server's")
    return out


def anchor(pairs: list[Matched]) -> int:
    """What the run's clock is behind the server's: the least that any request took to arrive."""
    return min(each.truth.arrived_ns - (each.row["sent_ns"] or 0) for each in pairs)


def lag(client: Client) -> list[str]:
    """1,000 calls a second for ten seconds, open loop."""
    shape = Shape(200, RATE * SECONDS // 200, every_ns=200 * 1000 * MS // RATE, apart_ns=1000 * MS // RATE)
    client.server.pace(0, 0)
    trace = write(client.machine.scratch / "lag.parquet", calls(shape))
    ran, run = client.replay(trace, recorded=True)
    truth = client.truth()
    pairs = matched(run, truth)
    base = anchor(pairs)
    told = [((each.row["sent_ns"] or 0) - (each.row["due_ns"] or 0)) / MS for each in pairs]
    seen = [(each.truth.arrived_ns - base - (each.row["due_ns"] or 0)) / MS for each in pairs]
    share = ran.share(truth[0].arrived_ns, truth[-1].arrived_ns)
    print(f"send lag at {RATE:,} calls/s, ms: p50 / p99 / most, and how much of a core the client used")
    print(TABLE.format("", "the client tells", "the server saw", "", "core"))
    print(TABLE.format("keepwarm", spread(told), spread(seen), "", f"{share:.0%}"))
    asleep = client.bare(sleeping=3000)["late_ms"]
    print(TABLE.format("(sleeping)", spread(asleep), "", "", ""))
    lines = [
        saying(f"the client used {share:.0%} of a core: what is asked holds below 80 %") if share >= 0.8 else "",
        bar(f"send lag p99 at {RATE:,} calls/s, by the client's word", at(told, 0.99), "<=", 2.0, "ms"),
        bar("and as the server saw it", at(seen, 0.99), "<=", 2.0, "ms"),
    ]
    try:
        count = RATE * SECONDS // 2
        client.server.pace(0, 0)
        options = ("--request-rate", str(RATE), "--arrival-pattern", "constant", "--output-tokens-mean", "1")
        client.aiperf(count, *options)
        arrived = sorted(each.arrived_ns for each in client.truth())
        late = [(each - arrived[0]) / MS - number * 1000 / RATE for number, each in enumerate(arrived)]
        print(TABLE.format("AIPerf", "not told", spread(late), f"{len(late):,} requests", ""))
    except proxies.Absent as why:
        print(f"  AIPerf: not measured: {why}")
    return [line for line in lines if line]


def first_token(pairs: list[Matched]) -> list[float]:
    """By how much the times to first token that we tell are off, ms."""
    told = [((each.row["first_token_ns"] or 0) - (each.row["sent_ns"] or 0)) / MS for each in pairs]
    true = [(each.truth.first_ns - each.truth.arrived_ns) / MS for each in pairs]
    return [abs(ours - theirs) for ours, theirs in zip(told, true, strict=True)]


def between(pairs: list[Matched]) -> list[float]:
    """The times between two tokens that we tell, ms."""
    times: list[Any] = [each.row["token_ns"] or () for each in pairs]
    return [(two - one) / MS for own in times for one, two in pairwise(own)]


def ttft(client: Client) -> list[str]:
    """256 streams at once, each call after the one before."""
    apart = (TTFT_MS + ITL_MS * TOKENS) * MS // STREAMS
    shape = Shape(STREAMS, ROUNDS, output=TOKENS, apart_ns=apart)
    client.server.pace(TTFT_MS / 1000, ITL_MS / 1000)
    trace = write(client.machine.scratch / "ttft.parquet", calls(shape))
    ran, run = client.replay(trace, recorded=True)
    truth = client.truth()
    pairs = matched(run, truth)
    kept = [each for each in pairs if not each.first]
    off, gaps = first_token(kept), between(kept)
    true = [(each.truth.first_ns - each.truth.arrived_ns) / MS for each in kept]
    share = ran.share(truth[0].arrived_ns, truth[-1].arrived_ns)
    true_gaps = [(each.truth.last_ns - each.truth.first_ns) / MS / (each.truth.tokens - 1) for each in kept]
    print(f"{STREAMS} streams, TTFT {TTFT_MS} ms, ITL {ITL_MS} ms, {TOKENS} tokens; p50 / p99 / most, ms")
    print(TABLE.format("", "TTFT told", "true TTFT", "off by", "core"))
    told = [((each.row["first_token_ns"] or 0) - (each.row["sent_ns"] or 0)) / MS for each in kept]
    print(TABLE.format("keepwarm", spread(told), spread(true), spread(off), f"{share:.0%}"))
    bunched = sum(gap < ITL_MS / 10 for gap in gaps) / max(len(gaps), 1)
    low, middle, high = (at(gaps, quantile) for quantile in (0.01, 0.5, 0.99))
    print(
        f"  ITL told p1 / p50 / p99 {low:.2f} / {middle:.2f} / {high:.2f} ms, true mean {at(true_gaps, 0.5):.2f} ms;",
        end=" ",
    )
    print(
        f"{bunched:.1%} of gaps read as under {ITL_MS / 10:.0f} ms; TTFT off by on calls that connect first:", end=" "
    )
    print(spread(first_token([each for each in pairs if each.first])))
    lines = [
        bar(f"TTFT off by, p50, {STREAMS} streams", at(off, 0.5), "<=", 0.3, "ms"),
        bar(f"TTFT off by, p99, {STREAMS} streams", at(off, 0.99), "<=", 3.0, "ms"),
    ]
    try:
        print(TABLE.format("AIPerf", *map(spread, aiperf_ttft(client)), ""))
    except proxies.Absent as why:
        print(f"  AIPerf: not measured: {why}")
    return lines


def aiperf_ttft(client: Client) -> tuple[list[float], list[float], list[float]]:
    """AIPerf's times to first token on the same pace, the true ones, and by how much they differ."""
    client.server.pace(TTFT_MS / 1000, ITL_MS / 1000)
    options = ("--concurrency", str(STREAMS), "--output-tokens-mean", str(TOKENS))
    _, records = client.aiperf(STREAMS * ROUNDS, *options)
    truth = {each.who: (each.first_ns - each.arrived_ns) / MS for each in client.truth()}
    told, true = [], []
    for record in records:
        who, first = record["metadata"].get("x_request_id"), record["metrics"].get("time_to_first_token")
        if who in truth and first:
            told.append(float(first["value"]))
            true.append(truth[who])
    return told, true, [abs(one - other) for one, other in zip(told, true, strict=True)]


def verdict(client: Client, run: Path) -> dict[str, object]:
    """What the report says of a run's validity."""
    ran: Ran = client.watch([*KEEPWARM, "report", str(run), "--json"])
    told: dict[str, object] = orjson.loads(ran.said[ran.said.index("{") :])
    return told


def overdrive(client: Client) -> list[str]:
    """More than any client in Python can send: the report must say that it is not valid."""
    client.server.pace(0, 0)
    shape = Shape(200, 60, every_ns=10 * MS, apart_ns=MS // 20)
    trace = write(client.machine.scratch / "over.parquet", calls(shape))
    ran, run = client.replay(trace, recorded=True)
    truth = client.truth()
    said = verdict(client, run)
    rate = len(truth) / (truth[-1].arrived_ns - truth[0].arrived_ns) * 1e9
    share = ran.share(truth[0].arrived_ns, truth[-1].arrived_ns)
    print(f"overdriven: 20,000 calls/s asked, {rate:,.0f} sent, {share:.0%} of a core; valid: {said['valid']}", end=" ")
    print(f"because {said['because']}")
    return [bar("a saturated client's run is called valid", float(bool(said["valid"])), "<=", 0, "")]
