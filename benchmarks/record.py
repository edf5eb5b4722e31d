"""What `keepwarm record` costs its clients, against the limit (a pair of protocols that only copy bytes) and peers.

    python benchmarks/record.py [--peers mitmproxy,litellm] [--rounds 3] [--quick]

Linux. A proxy has one core to itself; a scripted upstream (upstream.py) and the client (load.py) share another. Agents
send what Claude Code sends: 1 KB bodies, or 80 KB of system prompt, tools and messages that grow by each call.

- Added time to first token: 64 agents on kept-alive connections, staggered evenly, 97 streams a second of 16 writes,
  20 ms to the first and 40 ms between. Of each call: from the client's write to its reading of the first text delta,
  less what the upstream says it waited itself. Each round is direct, proxy, direct, the same number of calls both ways;
  its figure is the proxy's quantile less the direct ones'. The median of the rounds counts; proxies take turns.
- CPU of all the proxy's processes, after it has come to rest, over the calls: of 64 streams that begin together, and
  again as each ends, at the same pace; and of the staggered ones above, the dearest there can be: the proxy sleeps
  between any two writes. What is asked is judged by the first, as the figures were taken from which it was made (a bare
  pair takes 0.33 ms in them, and staggered streams have a column of their own).
- Requests a core: answers of one write, sent at once, as many as 64 connections can; requests over the proxy's CPU.
- 400 KB and 4 MB bodies: one call after the other, answers of two writes; the median time to first token likewise, of
  16 calls a round. Copying a body is the CPU that the pair takes for it; the pair adds less to the wall, for it copies
  while client and upstream, on their one core, do theirs.
- At the end: memory held (PSS), CPU that closing takes, and whether every call is in the trace.

Peers are installed from the package index, in exact versions, into ~/.cache/keepwarm/benchmarks, and started with an
empty environment. mitmproxy streams and stores bodies; LiteLLM records nothing. --quick: keepwarm and the limit, half a
minute; its figures are rough.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import orjson
import proxies
from proxies import Absent, Proxy

STREAMS, PERIOD = 64, 0.66
STREAMING, AT_ONCE, TWO_WRITES = "0.02/0.04/16", "0/0/1", "0.02/0.005/2"
SMALL, AGENT, LONG, HUGE = 1_000, 80_000, 400_000, 4_000_000


@dataclass
class Figures:
    """Of one proxy: what each round found, by body size."""

    p50_ms: dict[int, list[float]] = field(default_factory=dict)
    p99_ms: dict[int, list[float]] = field(default_factory=dict)
    cpu_ms: dict[int, list[float]] = field(default_factory=dict)  # a call, staggered
    together_ms: dict[int, list[float]] = field(default_factory=dict)  # a call, 64 at a time
    per_core: list[float] = field(default_factory=list)
    behind: float = 0.0  # streams a second, where it could not take all that were offered
    calls: int = 0
    pss_mb: float = 0.0
    closing_s: float = 0.0
    written_mb: float = 0.0
    recorded: int | None = None


class Bench:
    """The upstream and the client, and how a proxy between them is measured."""

    def __init__(self, core: int, scratch: Path) -> None:
        self.upstream = proxies.announced("upstream", proxies.script("upstream"), core, scratch)
        self.client = subprocess.Popen(
            proxies.script("load"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )

    def close(self) -> None:
        """End both."""
        self.client.kill()
        self.client.wait()
        self.upstream.kill()

    def pace(self, pace: str) -> None:
        """Set the upstream's pace."""
        connection = HTTPConnection(self.upstream.url.removeprefix("http://"))
        connection.request("PUT", f"/pace/{pace}")
        connection.getresponse().read()
        connection.close()

    def load(self, url: str, size: int, **order: float) -> SimpleNamespace:
        """Have the client do something; Absent where an answer is wrong."""
        assert self.client.stdin is not None and self.client.stdout is not None
        self.client.stdin.write(orjson.dumps({"url": url, "body_bytes": size, **order}) + b"\n")
        self.client.stdin.flush()
        tally = SimpleNamespace(**orjson.loads(self.client.stdout.readline()))
        if tally.wrong or not tally.ttft_ns:
            told = f"{tally.wrong} of {tally.right + tally.wrong} answers wrong: {tally.error[:200]!r}"
            raise Absent(told if tally.wrong else "too slow here for one call after the first of each agent")
        return tally

    def paired(self, proxy: Proxy, found: Figures, size: int, **order: float) -> None:
        """Direct, proxy, direct; half as long direct each time."""
        half = {name: order[name] / 2 if name == "seconds" else order[name] for name in order}
        direct = self.load(self.upstream.url, size, **half).ttft_ns
        used = proxy.cpu()
        through = self.load(proxy.url, size, **order)
        used = proxy.cpu() - used
        direct += self.load(self.upstream.url, size, **half).ttft_ns
        for quantile, into in ((0.5, found.p50_ms), (0.99, found.p99_ms)):
            added = at(through.ttft_ns, quantile) - at(direct, quantile)
            into.setdefault(size, []).append(added / 1e6)
        found.cpu_ms.setdefault(size, []).append(used / through.right * 1e3)
        found.calls += through.right
        if "period" in order and through.right / order["seconds"] < 0.85 * STREAMS / PERIOD:
            found.behind = through.right / through.seconds

    def together(self, proxy: Proxy, found: Figures, size: int, seconds: float) -> None:
        """CPU of streams that begin at the same time, and again as each ends."""
        used = proxy.cpu()
        tally = self.load(proxy.url, size, streams=STREAMS, seconds=seconds)
        found.together_ms.setdefault(size, []).append((proxy.cpu() - used) / tally.right * 1e3)
        found.calls += tally.right

    def saturated(self, proxy: Proxy, found: Figures, seconds: float) -> None:
        """As many short answers as the connections take."""
        self.pace(AT_ONCE)
        used = proxy.cpu()
        tally = self.load(proxy.url, SMALL, streams=STREAMS, seconds=seconds)
        found.per_core.append(tally.right / (proxy.cpu() - used))
        found.calls += tally.right

    def round(self, proxy: Proxy, found: Figures, seconds: float) -> None:
        """One of each; streams for so many seconds."""
        self.pace(STREAMING)
        for size in (SMALL, AGENT):
            self.paired(proxy, found, size, streams=STREAMS, period=PERIOD, seconds=seconds)
            self.together(proxy, found, size, seconds)
        self.saturated(proxy, found, min(seconds, 2))
        self.pace(TWO_WRITES)
        for size in (LONG, HUGE):
            self.paired(proxy, found, size, calls=16)

    def measure(self, running: dict[str, Proxy], rounds: int, seconds: float) -> dict[str, Figures]:
        """Rounds of all proxies in turn, so that what else the machine does falls on all of them."""
        found = {name: Figures() for name in running}
        for number in range(rounds + 1):
            for name in list(found):
                try:
                    if number:
                        self.round(running[name], found[name], seconds)
                    else:
                        self.warm(running[name], found[name])
                except Absent as why:
                    print(f"{name}: left out: {why}")
                    del found[name]
        return found

    def warm(self, proxy: Proxy, found: Figures) -> None:
        """The connections of all agents, and what is done once."""
        self.pace(AT_ONCE)
        self.load(self.upstream.url, SMALL, streams=STREAMS, calls=3)
        found.calls += self.load(proxy.url, SMALL, streams=STREAMS, calls=3).right


def start(names: list[str], upstream: str, core: int, scratch: Path) -> dict[str, Proxy]:
    """The proxies that can be had here."""
    running = {}
    for name in names:
        home = scratch / name
        home.mkdir()
        try:
            running[name] = proxies.STARTERS[name](upstream, core, home)
        except Absent as why:
            print(f"{name}: absent: {why}")
    return running


def finish(proxy: Proxy, found: Figures) -> None:
    """Stop a proxy, and note what it holds and leaves."""
    found.pss_mb = proxy.pss_mb()
    found.closing_s = proxy.stop()
    found.written_mb = sum(file.stat().st_size for file in proxy.files if file.exists()) / 1e6
    if proxy.name == "keepwarm":
        found.recorded = recorded(proxy)


def at(values: list[int], quantile: float) -> int:
    """A quantile, the nearest rank."""
    return sorted(values)[round(quantile * (len(values) - 1))]


def recorded(proxy: Proxy) -> int:
    """Calls in the trace that were answered well."""
    from keepwarm.traces.store import read_sessions

    if proxy.process.returncode or not proxy.files[0].exists():
        print(f"keepwarm ended with {proxy.process.returncode}: {proxy.said()}", file=sys.stderr)
        return 0
    return sum(call.status == 200 for calls in read_sessions(str(proxy.files[0])) for call in calls)


def show(name: str, found: Figures) -> str:
    """A line of the table."""
    used = [figures[size] for figures in (found.together_ms, found.cpu_ms) for size in (SMALL, AGENT)]
    cells = [f"{median(each):.2f}" for each in used]
    for size in (SMALL, AGENT):
        p50, p99 = median(found.p50_ms[size]), median(found.p99_ms[size])
        cells.append(f"{p50:.0f} / {p99:.0f}" if found.behind else f"{p50:.2f} / {p99:.1f}")
    cells += [f"{median(found.per_core):,.0f}"]
    cells += [f"{median(found.p50_ms[size]):.1f}, {median(found.cpu_ms[size]):.1f}" for size in (LONG, HUGE)]
    return row(name, *cells, f"{found.pss_mb:.0f} MB")


def row(name: str, *cells: str) -> str:
    """Cells in columns."""
    return f"{name:10}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


WIDTHS = (7, 7, 7, 7, 15, 15, 12, 13, 13, 9)
HEADS = (
    f"{'':10}{'CPU ms a stream':>28}{'ms to first token':>30}{'requests/s':>12}{'it adds ms, CPU ms':>26}{'memory':>9}",
    f"{'':10}{'together':>14}{'staggered':>14}{'added, p50 / p99':>30}{'a core':>12}",
    row("", "1 KB", "80 KB", "1 KB", "80 KB", "1 KB", "80 KB", "", "400 KB", "4 MB", "PSS"),
)


def bars(found: dict[str, Figures]) -> list[str]:
    """What is asked of keepwarm, and whether it is so."""
    if "keepwarm" not in found:
        return ["keepwarm: absent, nothing to judge"]
    ours, limit = found["keepwarm"], found["bare pair"]
    lines = []
    for size, name in ((SMALL, "1 KB"), (AGENT, "80 KB")):
        lines.append(bar(f"p50 added, {name} bodies", median(ours.p50_ms[size]), "<=", 1.0, "ms"))
        lines.append(bar(f"p99 added, {name} bodies", median(ours.p99_ms[size]), "<=", 5.0, "ms"))
        lines.append(bar(f"CPU a stream, 64 together, {name} bodies", median(ours.together_ms[size]), "<=", 1.2, "ms"))
        lines.append(f"  note staggered, the dearest there can be: {median(ours.cpu_ms[size]):.4g} ms")
    for peer, times in (("mitmproxy", 8), ("litellm", 50)):
        if peer in found:
            ratio = median(a / b for a, b in zip(ours.per_core, found[peer].per_core, strict=True))  # round by round
            lines.append(bar(f"requests/s a core over {peer}'s", ratio, ">=", times, "x"))
        else:
            lines.append(f"  ?    requests/s a core over {peer}'s: not measured here")
    copying = median(limit.cpu_ms[HUGE])
    lines.append(bar("4 MB body adds; its copying takes what is asked", median(ours.p50_ms[HUGE]), "<=", copying, "ms"))
    missing = ours.calls - (ours.recorded or 0)
    return [*lines, bar(f"calls missing in the trace, of {ours.calls:,}", missing, "<=", 0, "")]


def bar(what: str, value: float, sign: str, asked: float, unit: str) -> str:
    """One line of judgement."""
    held = value <= asked if sign == "<=" else value >= asked
    return f"  {'pass' if held else 'FAIL'} {what}: {value:.4g} {unit} (asked: {sign} {asked:.4g})"


def notes(found: dict[str, Figures]) -> list[str]:
    """How far the rounds lie apart, who could not keep up, and what is left for the end by those that write."""
    lines = []
    for name, one in found.items():
        used = [figures[size] for figures in (one.together_ms, one.cpu_ms) for size in (SMALL, AGENT)]
        spans = [f"{min(each):.2f} to {max(each):.2f}" for each in used]
        line = f"{name}: CPU ms a stream over the rounds {', '.join(spans)}"
        if one.behind:
            line += f"; took {one.behind:.0f} of {STREAMS / PERIOD:.0f} streams/s, so they queued"
        if one.written_mb:
            each = one.closing_s / one.calls * 1e3
            line += f"; {one.calls:,} calls, {one.written_mb:.1f} MB written, {each:.2f} ms CPU a call to close"
        lines.append(line)
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default="mitmproxy,litellm", help="of mitmproxy, litellm; or nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    peers = [] if args.quick else [peer for peer in args.peers.split(",") if peer]
    rounds, seconds = (1, 1.3) if args.quick else (args.rounds, 4.0)
    cores = sorted(os.sched_getaffinity(0))
    print(f"proxies on core {cores[0]}, upstream and client on core {cores[-1]}; load {os.getloadavg()[0]:.2f} before")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(cores[-1], Path(scratch))
        running = start(["bare pair", "keepwarm", *peers], bench.upstream.url, cores[0], Path(scratch))
        try:
            found = bench.measure(running, rounds, seconds)
            for name in found:
                finish(running[name], found[name])
        finally:
            for proxy in running.values():
                proxy.kill()
            bench.close()
    lines = [show(name, one) for name, one in found.items()]
    print("\n".join([*HEADS, *lines, f"load {os.getloadavg()[0]:.2f} after", *notes(found), *bars(found)]))


if __name__ == "__main__":
    main()
