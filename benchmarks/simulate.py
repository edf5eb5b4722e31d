"""Speed of the simulated cluster: calls a second of its cache and of its scheduler, and of Dynamo's offline replay.

    python benchmarks/simulate.py [TRACE] [--dynamo VENV]

The work is 64 conversations at once on one worker, block 16: a lead of 20,000 tokens that all share, 30,000 of their
own, then 896 new ones a call (208 of them the last answer) until 60 calls were made; 77,000 tokens a prompt on the
average. Times are CPU seconds of this process, the best of three runs. ``cache`` is the cache alone: a prompt is put
together from the call before it, looked up, computed, answered. ``scheduled`` is the batching engine in virtual time,
each conversation's next call 2 s after its last answer. ``thrash`` is a cache that holds less than the conversations
under way. Dynamo replays the same calls from a file, offline, with one worker; ours from a trace, reading included.
With a TRACE that has cache marks: from start to report, `keepwarm simulate --cache-ttl as-recorded` and `keepwarm
report --json` as whole processes, interpreter start included, five times.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from heapq import heapify, heappop, heappush
from pathlib import Path
from statistics import median

import orjson

from keepwarm.replayers.arrivals import arrivals
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.job import DONE, Job
from keepwarm.replayers.plan import Schedule
from keepwarm.replayers.prompts import in_tree
from keepwarm.replayers.router import Router
from keepwarm.replayers.simulate import simulate
from keepwarm.replayers.times import StepTimes
from keepwarm.replayers.tree import Node, PromptTree
from keepwarm.traces.model import After, Call, Segment
from keepwarm.traces.store import TraceWriter, read_sessions

AGENTS, TURNS, BLOCK = 64, 60, 16
LEAD, OWN, ANSWER, RESULT = 20_000, 30_000, 208, 688
GAP_NS = 2_000_000_000
ROOMY, TIGHT = 400_000, 300_000
"""Blocks: the conversations under way take about 340,000 at their longest, less what they share."""

Turn = tuple[int, bool, list[Piece], Piece]
"""A conversation's number, whether it begins, what its prompt adds, and the piece that its answer is."""


def turns(calls: int, own: int = OWN) -> Iterator[Turn]:
    """Calls of conversations that take turns; one that is over makes room for a new one."""
    ident, answers, counts = 1, [Piece(0, 0, "answer")] * AGENTS, [0] * AGENTS
    for number in range(calls):
        agent = number % AGENTS
        begins = counts[agent] % TURNS == 0
        counts[agent] += 1
        first = [Piece(1, LEAD, "lead"), Piece(ident + 1, own, "user")]
        said = answers[agent]
        answers[agent] = Piece(ident + 3, ANSWER, "answer")
        yield agent, begins, first if begins else [said, Piece(ident + 2, RESULT, "tool_result")], answers[agent]
        ident += 3


def cache_alone(calls: int, capacity: int | None, *, ahead: bool = True, own: int = OWN) -> tuple[float, float]:
    """Calls a second of the cache, and the hit rate. The calls are made up ``ahead``, or while it goes."""
    tree = PromptTree()
    cache, work = BlockCache(tree, block=BLOCK, capacity=capacity), turns(calls, own)
    work = iter(list(work)) if ahead else work
    prompts: list[Node] = [tree.root] * AGENTS
    read = prompt = 0
    begun = time.process_time()
    for now_ns, (agent, begins, pieces, answer) in enumerate(work):
        node = prompts[agent] = tree.extend(tree.root if begins else prompts[agent], pieces)
        lease = cache.acquire(node, now_ns)
        read, prompt = read + lease.room, prompt + node.end
        cache.grow_most(lease, node, node.end)
        upto = node.end + ANSWER - 1
        if cache.spend(lease, upto):
            cache.keep(lease, tree.extend(node, (answer,)))
        cache.release(lease, now_ns)
    return calls / (time.process_time() - begun), read / prompt


def scheduled(calls: int, capacity: int | None) -> tuple[float, float]:
    """Calls a second of the batching engine in virtual time, and the hit rate."""
    tree = PromptTree()
    engine = Engine(BlockCache(tree, block=BLOCK, capacity=capacity), times=StepTimes())
    cluster = Cluster(tree, [engine], Router("round_robin", block=BLOCK))
    waiting: list[list[Turn]] = [[] for _ in range(AGENTS)]
    for turn in turns(calls):
        waiting[turn[0]].append(turn)
    queues = [iter(each) for each in waiting]
    due = [(agent * GAP_NS // 16, agent) for agent in range(AGENTS)]
    heapify(due)
    prompts: list[Node] = [tree.root] * AGENTS
    read = prompt = 0
    begun = time.process_time()
    while due or cluster.next_ns() is not None:
        next_ns = cluster.next_ns()
        if next_ns is None or (due and due[0][0] < next_ns):
            now_ns, agent = heappop(due)
            coming = next(queues[agent], None)
            if coming is not None:
                _, begins, pieces, answer = coming
                node = prompts[agent] = tree.extend(tree.root if begins else prompts[agent], pieces)
                cluster.submit(Job(node, ANSWER, (answer,), session=str(agent)), now_ns)
            continue
        for event in cluster.advance(next_ns):
            if event.kind == DONE:
                job = event.running.job
                read, prompt = read + event.running.read, prompt + job.prompt.end
                heappush(due, (event.at_ns + GAP_NS, int(job.session or 0)))
    return calls / (time.process_time() - begun), read / prompt


def best(measure: Callable[[int, int | None], tuple[float, float]], calls: int, capacity: int | None) -> str:
    """The best of three runs, in words."""
    runs = [measure(calls, capacity) for _ in range(3)]
    rates = sorted(rate for rate, _ in runs)
    return f"{rates[-1]:,.0f} calls/s (worst of three {rates[0]:,.0f}), hit rate {runs[0][1]:.2%}"


def sessions(count: int, turns_each: int) -> Iterator[list[Call]]:
    """Conversations as sessions of a trace, half a second apart."""
    told = {"role": "main", "usage_source": "absent", "write_source": "absent", "origin": "synthetic", "end_ns": 0}
    for number in range(count):
        name, calls = f"s{number}", list[Call]()
        for turn in range(turns_each):
            ident = number * 1000 + turn
            pieces = [(1, LEAD), (10 + ident * 2, OWN)] if not turn else [(11 + ident * 2, ANSWER + RESULT)]
            before = calls[-1] if calls else None
            calls.append(
                Call(
                    **told,  # type: ignore[arg-type]
                    session=name,
                    agent=name,
                    call=f"{name}.{turn}",
                    turn=turn,
                    start_ns=turn,
                    session_start_ns=number * GAP_NS // 4,
                    keep=before.prompt_tokens if before else 0,
                    prompt_parent=before.call if before else None,
                    after=(After(before.call, "end", GAP_NS, "tool"),) if before else (),
                    append=tuple(Segment(hash_, tokens, "user") for hash_, tokens in pieces),
                    output=ANSWER,
                )
            )
        yield calls


def mooncake(path: Path, traced: list[list[Call]]) -> None:
    """The sessions in Mooncake's format, the blocks' numbers being their own identity."""
    with path.open("wb") as file:
        for number, calls in enumerate(traced):
            blocks, at = list(range(LEAD // BLOCK)), LEAD // BLOCK
            for turn, call in enumerate(calls):
                upto = call.prompt_tokens // BLOCK
                blocks += [(number + 1) * 1_000_000 + block for block in range(at, upto)]
                at = upto
                row = {"session_id": call.session, "input_length": call.prompt_tokens, "output_length": ANSWER}
                when = {"delay": GAP_NS / 1e6} if turn else {"timestamp": number * GAP_NS / 4e6}
                file.write(orjson.dumps(row | when | {"hash_ids": blocks}) + b"\n")


REPLAY = """
import json, sys, time
from dynamo.replay import run_trace_replay
blocks = int(sys.argv[2])
engine = {"backend": "vllm", "block_size": 16, "num_gpu_blocks": blocks, "max_num_seqs": 256,
          "max_num_batched_tokens": 8192, "timing_model": {"type": "polynomial"}}
begun = time.perf_counter(), time.process_time()
report = run_trace_replay(sys.argv[1], trace_format="mooncake", extra_engine_args={"engine": engine}, num_workers=1,
                          router_mode="round_robin", trace_block_size=16, replay_mode="offline")
print(json.dumps([time.perf_counter() - begun[0], time.process_time() - begun[1],
                  report.summary.get("prefix_cache_reused_ratio")]))
"""


def ours(path: Path, capacity: int) -> tuple[float, float, float]:
    """Seconds of wall time and CPU that a trace takes from its file, and the hit rate."""
    begun = time.perf_counter(), time.process_time()
    tree = PromptTree()
    engine = Engine(BlockCache(tree, block=BLOCK, capacity=capacity), times=StepTimes())
    cluster = Cluster(tree, [engine], Router("round_robin", block=BLOCK))
    read = prompt = 0
    schedule = Schedule(arrivals(lambda: read_sessions(str(path)), recorded=True), grow=in_tree(tree))
    for outcome, _ in simulate(schedule, cluster):
        read, prompt = read + (outcome.cache_read or 0), prompt + (outcome.prompt or 0)
    return time.perf_counter() - begun[0], time.process_time() - begun[1], read / prompt


def beside(venv: Path, count: int) -> None:
    """The same sessions replayed by Dynamo offline and by us."""
    traced = list(sessions(count, TURNS))
    calls = count * TURNS
    with tempfile.TemporaryDirectory() as scratch:
        theirs, trace = Path(scratch) / "trace.jsonl", Path(scratch) / "trace.parquet"
        mooncake(theirs, traced)
        with TraceWriter(str(trace), producer="benchmark", version="0", tokens="exact") as writer:
            for each in traced:
                for call in each:
                    writer.add(call)
        sizes = f"{theirs.stat().st_size >> 20} MB Mooncake, {trace.stat().st_size >> 10} KB trace"
        print(f"{calls:,} calls from a file ({sizes}), one worker, calls/s by CPU time (by wall time)")
        for capacity in (ROOMY, 100_000):
            command = [str(venv / "bin/python"), "-c", REPLAY, str(theirs), str(capacity)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            wall, cpu, rate = json.loads(told)
            mine = min(ours(trace, capacity) for _ in range(3))
            theirs_told = f"Dynamo {calls / cpu:,.0f} ({calls / wall:,.0f}), hit rate {rate:.2%}"
            ours_told = f"keepwarm {calls / mine[1]:,.0f} ({calls / mine[0]:,.0f}), {mine[2]:.2%}"
            print(f"  {capacity:,} blocks: {theirs_told}; {ours_told}; {cpu / mine[1]:.1f} times; asked 3")


def took(*arguments: str) -> float:
    """Seconds that a keepwarm command takes."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "keepwarm.harness.cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def start_to_report(trace: str) -> None:
    """The two commands one after the other."""
    with tempfile.TemporaryDirectory() as scratch:
        run = str(Path(scratch) / "run")
        simulated = [took("simulate", trace, "-o", run, "--cache-ttl", "as-recorded") for _ in range(5)]
        reported = [took("report", run, "--json") for _ in range(5)]
    whole = [one + other for one, other in zip(simulated, reported, strict=True)]
    print(f"start to report: {median(whole):.2f} s (best {min(whole):.2f}), asked 5;", end=" ")
    print(f"simulate {median(simulated):.2f} s, report {median(reported):.2f} s")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", nargs="?")
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--million", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dynamo", type=Path, metavar="VENV", help="where Dynamo 1.6.1 is installed")
    parser.add_argument("--sessions", type=int, default=50)
    args = parser.parse_args()
    if args.million:
        rate, hits = cache_alone(1_000_000, None, ahead=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"a million calls, nothing evicted: {rate:,.0f} calls/s, hit rate {hits:.2%}, {peak:,.0f} MB at most")
        return
    print(f"cache, nothing evicted: {best(cache_alone, args.calls, None)}; asked 50,000")
    longer = partial(cache_alone, own=OWN + 400_000)
    print(f"cache, prompts longer by 400,000 tokens: {best(longer, args.calls, None)}")
    print(f"cache, evicting {ROOMY:,} blocks: {best(cache_alone, args.calls, ROOMY)}; asked 20,000")
    print(f"cache, thrash {TIGHT:,} blocks: {best(cache_alone, args.calls, TIGHT)}")
    print(f"scheduled, nothing evicted: {best(scheduled, args.calls // 5, None)}; asked 4,000")
    print(f"scheduled, evicting: {best(scheduled, args.calls // 5, ROOMY)}; asked 4,000")
    print(f"scheduled, thrash: {best(scheduled, args.calls // 5, TIGHT)}")
    subprocess.run([sys.executable, __file__, "--million"], check=True)
    if args.trace:
        start_to_report(args.trace)
    if args.dynamo:
        beside(args.dynamo, args.sessions)


if __name__ == "__main__":
    main()
