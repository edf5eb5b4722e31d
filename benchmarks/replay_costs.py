"""The parts of replay.py that are about what a call costs: CPU, memory, time to the first one."""

from __future__ import annotations

import time
from statistics import median

import orjson
import proxies
from fastserver import Answered
from replay_clients import Client
from replay_traces import Shape, calls, write

SHORT_BYTES = 1_300
ROUNDS = 3


def bar(what: str, value: float, sign: str, asked: float, unit: str) -> str:
    """One line of judgement."""
    held = value <= asked if sign == "<=" else value >= asked
    return f"  {'PASS' if held else 'FAIL'} {what}: {value:,.4g} {unit} (asked: {sign} {asked:,.4g})"


def saying(what: str) -> str:
    """A line that judges nothing."""
    return f"  note {what}"


def each_more(
    client: Client, few: Shape, many: Shape, streams: int, rounds: int = ROUNDS
) -> tuple[float, list[float], float]:
    """CPU seconds that each call more takes, by runs of few and of many: start-up and all that is done once is in both.
    The median and all of some rounds, and the median of what it takes while calls are sent.
    """
    traces = [write(client.machine.scratch / f"{n}.parquet", calls(each)) for n, each in enumerate((few, many))]
    more = many.sessions * many.calls - few.sessions * few.calls
    found, sending = [], []
    for _ in range(rounds):
        runs = [client.replay(trace, "--sessions", str(streams)) for trace in traces]
        client.truth()
        told = [orjson.loads((run / "run.json").read_bytes())["client"][0]["cpu_s"] for _, run in runs]
        found.append((runs[1][0].cpu_s - runs[0][0].cpu_s) / more)
        sending.append((told[1] - told[0]) / more)
    return median(found), found, median(sending)


def cpu(client: Client) -> list[str]:
    """CPU a short request."""
    client.server.pace(0, 0)
    few, many = Shape(64, 2), Shape(64, 42)
    ours, rounds, sending = each_more(client, few, many, 64)
    bare = [client.bare(streams=64, calls=200, output=1, body_bytes=SHORT_BYTES) for _ in range(ROUNDS)]
    limit = median(each["cpu_s"] / each["answers"] for each in bare)
    print(
        f"a short request ({SHORT_BYTES:,} bytes, one token), 64 at a time, CPU us: keepwarm", micro(rounds), end=", "
    )
    print("bare Protocol", micro([each["cpu_s"] / each["answers"] for each in bare]))
    lines = [bar("CPU a short request over the bare Protocol's", ours / limit, "<=", 5, "x")]
    part = f"of it while calls are sent {sending * 1e6:.1f} us, {sending / limit:.1f} x"
    lines.append(saying(f"{part}: the rest is checking the trace before, bounds and Parquet after"))
    try:
        options = ("--concurrency", "64", "--output-tokens-mean", "1")
        first, _ = client.aiperf(128, *options)
        second, told = client.aiperf(2128, *options)
        theirs, whole = (second.cpu_s - first.cpu_s) / 2000, second.cpu_s / 2128
        print(
            f"  AIPerf {theirs * 1e6:,.0f} us beyond its start-up, {whole * 1e6:,.0f} with; {len(told):,} records,",
            end=" ",
        )
        print(f"{second.tree_mb:,.0f} MB; its start-up {first.cpu_s:.1f} s CPU, {first.wall_s:.1f} s wall")
        lines.append(bar("CPU a short request over AIPerf's, both without start-up", ours / theirs, "<=", 0.1, "x"))
    except proxies.Absent as why:
        lines.append(f"  ?    CPU a short request over AIPerf's: not measured: {why}")
    return lines


def chunks(client: Client) -> list[str]:
    """CPU a paced chunk: 160 streams of a token each 10 ms, no two at the same time."""
    client.server.pace(0.05, 0.01)
    apart = 1_062_500  # ns: the streams' phases are spread evenly over 10 ms
    few, many = Shape(160, 1, output=20, apart_ns=apart), Shape(160, 1, output=420, apart_ns=apart)
    traces = [write(client.machine.scratch / f"{n}.parquet", calls(each)) for n, each in enumerate((few, many))]
    found, rates = [], []
    for _ in range(ROUNDS):
        used = [client.replay(trace, recorded=True)[0].cpu_s for trace in traces]
        truth = [each for each in client.truth() if each.tokens == 420]
        found.append((used[1] - used[0]) / (160 * 400))
        rates.append(160 * 420 / (max(each.last_ns for each in truth) - min(each.first_ns for each in truth)) * 1e9)
    order = {"streams": 160, "calls": 1, "body_bytes": SHORT_BYTES, "apart_s": apart / 1e9}
    bare = [client.bare(**order, output=tokens)["cpu_s"] for tokens in (20, 420)]
    print(f"a paced chunk, 160 streams, {median(rates):,.0f} chunks/s, CPU us: keepwarm", micro(found), end=", ")
    print("bare Protocol", micro([(bare[1] - bare[0]) / (160 * 400)]))
    return [bar("paced chunks a second a core", 1 / median(found), ">=", 15_000, "")]


def micro(seconds: list[float]) -> str:
    """Microseconds: the median and all."""
    return f"{median(seconds) * 1e6:,.1f} ({', '.join(f'{each * 1e6:,.1f}' for each in seconds)})"


def start(client: Client) -> list[str]:
    """From a process's start to the first request that the server has."""
    client.server.pace(0, 0)
    trace = write(client.machine.scratch / "start.parquet", calls(Shape(8, 4)))
    firsts, probes, used = [], [], []
    for _ in range(5):
        client.server.truth()
        ran, _ = client.replay(trace)
        truth = client.server.truth()
        call = min(each.arrived_ns for each in truth if each.who != "-")
        firsts.append((call - ran.began_ns) / 1e9)
        probes.append((min(each.arrived_ns for each in truth) - ran.began_ns) / 1e9)
        used.append(ran.cpu_at(call))
    print(f"start to a first call {median(firsts):.2f} s (best {min(firsts):.2f}), to a first probe", end=" ")
    print(f"{median(probes):.2f} s; CPU until the first call {median(used):.2f} s")
    return [bar("from start to the first call, median of 5", median(firsts), "<=", 1.0, "s")]


def memory(client: Client) -> list[str]:
    """256 agents of 100k tokens, all in flight at once."""
    client.server.pace(2.0, 0.01)
    shape = Shape(256, 3, lead=30_000, blocks=(700,) * 100, adds=200, output=8)
    trace = write(client.machine.scratch / "memory.parquet", calls(shape))
    ran, _ = client.replay(trace, "--sessions", "256", "--timeout", "300")
    truth = client.truth()
    print(f"256 agents at 100,000 tokens, 30,000 shared: {ran.rss_mb:,.0f} MB at most, {len(truth)} calls,", end=" ")
    print(f"{ran.cpu_s:.1f} s CPU, {ran.wall_s:.1f} s")
    return [bar("memory", ran.rss_mb, "<=", 300, "MB")]


def bodies(client: Client) -> list[str]:
    """A long prompt sent again with 1 KB more."""
    client.server.pace(0, 0)
    found = {}
    for name, blocks in (("400 KB", (700,) * 100), ("4 MB", (700,) * 1126), ("4 MB, few blocks", (7882,) * 100)):
        shape = Shape(8, 60, lead=10_000, blocks=blocks, adds=180, output=1)
        ours, rounds, _ = each_more(client, shape._replace(calls=4), shape, 2)
        size = 5 * (10_000 + sum(blocks)) + 30_000
        order = {"calls": 60, "output": 1, "body_bytes": size, "copying": True}
        told = [client.bare(**order) for _ in range(ROUNDS)]
        copying = median(each["cpu_s"] / each["answers"] for each in told)
        found[name] = ours, copying
        print(f"  {name} ({size / 1e6:.2f} MB, {len(blocks)} blocks): keepwarm {ours * 1e3:.2f} ms", end=" ")
        print(f"({', '.join(f'{each * 1e3:.2f}' for each in rounds)}), copying alone {copying * 1e3:.2f} ms")
    lines = [bar("CPU to send 400 KB again with 1 KB more", found["400 KB"][0] * 1e3, "<=", 0.5, "ms")]
    for name in list(found)[1:]:
        ours, copying = found[name]
        lines.append(bar(f"CPU to send {name} again, less its copying", (ours - copying) * 1e3, "<=", 0.5, "ms"))
    return lines


def scale(client: Client) -> list[str]:
    """10,000 sessions of 40 calls, and a tenth of them: what is planned must not take memory."""
    peaks = {}
    for sessions in (1_000, 10_000):
        client.server.pace(0, 0)
        trace = write(client.machine.scratch / f"scale{sessions}.parquet", calls(Shape(sessions, 40)))
        begun = Begun(client, 20.0)
        ran, _ = client.replay(trace, "--sessions", "64", stop=begun)
        peaks[sessions] = ran.rss_mb
        first = begun.calls[0].arrived_ns - ran.began_ns
        print(f"  {sessions:,} sessions of 40 calls: first call after {first / 1e9:.1f} s; in 20 s", end=" ")
        print(f"{len(begun.calls):,} calls answered, then stopped; {ran.rss_mb:,.0f} MB at most,", end=" ")
        print(f"{ran.cpu_s:.1f} s CPU, {ran.wall_s:.1f} s in all")
    return [bar("memory of 10,000 sessions over that of 1,000", peaks[10_000] / peaks[1_000], "<=", 1.3, "x")]


class Begun:
    """Whether a replay's first call was answered so many seconds ago; looks twice a second."""

    def __init__(self, client: Client, seconds: float) -> None:
        self.calls: list[Answered] = []
        self._client, self._seconds, self._next = client, seconds, 0.0
        self._since = time.monotonic_ns()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 0.5
        self.calls += [each for each in self._client.truth() if each.arrived_ns > self._since]
        return bool(self.calls) and now > self.calls[0].arrived_ns / 1e9 + self._seconds
