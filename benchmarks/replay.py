"""`keepwarm replay` against a fast server, the least that a client in Python costs, and AIPerf: cost, times, memory.

    python benchmarks/replay.py [--only cpu,chunks,...] [--no-peers] [--nice N] [--report-rows N]

Linux. The server (fastserver.c, which keeps its own truth) has one core, the client under test the other; AIPerf, which
is ten processes, has all. What is replayed goes the product's whole way, from a trace's file to a run's outcomes, as a
process of its own. Each part prints its figures, and PASS or FAIL against what is asked:

- cpu: CPU of a request of 1.3 KB answered by one token, 64 at a time. By two runs, of many calls and of few: what a
  call more takes; start-up is in both. Beside it an asyncio Protocol with httptools that knows nothing of traces, and
  AIPerf 0.13.0 with all its processes, its start-up left out in the same way. chunks: likewise, of 160 streams paced.
- start: from the process's start to its first call as the server saw it. memory: the process's peak, 256 agents with
  100k tokens each, all in flight.
- lag: an open schedule of 1,000 calls/s; due to sent by the client's word, and due to arrival as the server's kernel
  saw it (the two clocks laid over each other at the quickest call). ttft: what is told of times to the first token
  against the server's truth, call by call. overdrive: 20,000 calls/s asked; the report must call that not valid.
- bodies: CPU of a long prompt sent again with 1 KB more, by two runs of many calls and of few, and what a blocking
  socket takes to send as much. scale: 10,000 sessions planned and begun; peak memory beside that of 1,000.
- report (only with --report-rows N; 10000000 is what is asked): seconds and memory of `keepwarm report` on N rows.

Every CPU figure is the kernel's clock of the process, every ratio within one run. Where others keep the machine busy,
times say little: the load is printed, and --nice -15 (wants root) puts server and clients before the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import replay_costs
import replay_rows
import replay_times
from fastserver import FastServer
from replay_clients import Client, Machine, adopt

PARTS: dict[str, Callable[[Client], list[str]]] = {
    "cpu": replay_costs.cpu,
    "chunks": replay_costs.chunks,
    "start": replay_costs.start,
    "memory": replay_costs.memory,
    "lag": replay_times.lag,
    "ttft": replay_times.ttft,
    "overdrive": replay_times.overdrive,
    "bodies": replay_costs.bodies,
    "scale": replay_costs.scale,
}


def run_part(name: str, part: Callable[[Client], list[str]], client: Client) -> list[str]:
    """A part's judgements; a part that breaks has failed, and the others are still run."""
    print(f"\n[{name}] load average {os.getloadavg()[0]:.1f}", flush=True)
    client.server.truth()
    try:
        lines = part(client)
    except Exception:
        traceback.print_exc()
        lines = [f"  FAIL {name}: broke off"]
    print("\n".join(lines), flush=True)
    return lines


def main() -> int:
    """Run the parts; how many judgements failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, report")
    parser.add_argument("--no-peers", action="store_true", help="leave AIPerf out, which takes some minutes")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--report-rows", type=int, default=0, metavar="N")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    adopt()
    with tempfile.TemporaryDirectory(prefix="keepwarm-bench-") as scratch:
        machine = Machine(cores[0], cores[-1], args.nice, Path(scratch), peers=not args.no_peers)
        server = FastServer(Path(scratch), machine.server, args.nice)
        print(f"server in {server.kind}, {len(cores)} cores")
        client = Client(machine, server)
        parts = {name: PARTS[name] for name in args.only.split(",") if name in PARTS}
        if args.report_rows:
            parts["report"] = partial(replay_rows.report, rows=args.report_rows)
        try:
            judged = [line for name, part in parts.items() for line in run_part(name, part, client)]
        finally:
            server.stop()
    failed = [line for line in judged if line.startswith("  FAIL")]
    print(f"\n{len(failed)} of {sum('note' not in line[:7] for line in judged)} judgements failed")
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main())
