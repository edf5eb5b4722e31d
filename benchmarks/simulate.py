"""Time from start to report: `keepwarm simulate TRACE --cache-ttl as-recorded`, then `keepwarm report RUN --json`.

    python benchmarks/simulate.py TRACE

Whole processes, interpreter start included, five times; the median and the best count. Beside them the simulation
alone, in this process: plan, prompts, cache and service times, with the endless cache that gives the bound, without
reading and writing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from keepwarm.replayers.cache import PrefixCache
from keepwarm.replayers.plan import Schedule
from keepwarm.replayers.simulate import simulate
from keepwarm.replayers.worker import AS_RECORDED, Worker
from keepwarm.traces.store import read_sessions


def took(*arguments: str) -> float:
    """Seconds that a keepwarm command takes."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "keepwarm.harness.cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def alone(trace: str) -> tuple[float, int]:
    """Seconds that the simulation takes by itself, and how many calls it has."""
    sessions = list(read_sessions(trace))
    begun = time.perf_counter()
    worker = Worker(PrefixCache(), managed=True, ttl_s=AS_RECORDED)
    shadows = {"endless": Worker(PrefixCache(), managed=True)}
    calls = sum(1 for _ in simulate(Schedule(sessions), worker, shadows=shadows))
    return time.perf_counter() - begun, calls


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    trace = parser.parse_args().trace
    with tempfile.TemporaryDirectory() as scratch:
        run = str(Path(scratch) / "run")
        simulated = [took("simulate", trace, "-o", run, "--cache-ttl", "as-recorded") for _ in range(5)]
        reported = [took("report", run, "--json") for _ in range(5)]
    seconds, calls = min(alone(trace) for _ in range(3))
    whole = [one + other for one, other in zip(simulated, reported, strict=True)]
    print(f"{calls:,} calls: start to report {median(whole):.2f} s (best {min(whole):.2f}; asked: under 5)")
    print(f"  simulate {median(simulated):.2f} s, report {median(reported):.2f} s; simulation alone {seconds:.2f} s")


if __name__ == "__main__":
    main()
