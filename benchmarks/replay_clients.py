"""The clients that replay.py compares, each started as a process of its own and watched from outside."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import proxies
from fastserver import Answered, FastServer, prefer

HERE = Path(__file__).parent
KEEPWARM = [sys.executable, "-m", "keepwarm.harness.cli"]
AIPERF, BESIDE = "aiperf==0.13.0", "tokenizers==0.23.3"
SUBREAPER = 36
"""Linux' PR_SET_CHILD_SUBREAPER: what AIPerf's main process leaves behind is ours to wait for, and so to count."""


Stop = Callable[[], bool]


class Ran(NamedTuple):
    """A process that has ended: CPU seconds of it and all that it started, its own peak (``rss_mb``) and its tree's
    (``tree_mb``, shared pages by their share), and how its CPU grew: (ns, CLOCK_MONOTONIC; CPU seconds).
    """

    code: int
    said: str
    began_ns: int
    wall_s: float
    cpu_s: float
    rss_mb: float
    tree_mb: float
    samples: list[tuple[int, float]]

    def cpu_at(self, ns: int) -> float:
        """CPU seconds used by some time."""
        return next((cpu for at, cpu in self.samples if at >= ns), self.cpu_s)

    def share(self, begin_ns: int, end_ns: int) -> float:
        """The share of a core used between two times."""
        return (self.cpu_at(end_ns) - self.cpu_at(begin_ns)) / max(end_ns - begin_ns, 1) * 1e9


class Machine(NamedTuple):
    """Where things run: the cores of client and server, how nice a client is, and a folder to work in."""

    client: int
    server: int
    nice: int
    scratch: Path
    peers: bool = True

    def settle(self, *, pinned: bool) -> None:
        """In a client's process, before its program."""
        if pinned:
            os.sched_setaffinity(0, {self.client})
        prefer(self.nice)


class Client:
    """Runs clients against the server."""

    def __init__(self, machine: Machine, server: FastServer) -> None:
        self.machine, self.server, self._runs = machine, server, 0

    def watch(
        self,
        command: list[str],
        *,
        stop: Stop | None = None,
        many: bool = False,
        pinned: bool = True,
        **more: Any,
    ) -> Ran:
        """Run a command to its end, or interrupt it when ``stop`` says so. ``many``: all its processes are counted."""
        log = self.machine.scratch / "said"
        settle = partial(self.machine.settle, pinned=pinned and not many)
        with log.open("wb") as out:
            began, before, samples, tree = time.monotonic_ns(), _children(), list[tuple[int, float]](), 0.0
            process = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=settle, **more)
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                pids = proxies.family(process.pid) if many else [process.pid]
                samples.append((time.monotonic_ns(), sum(map(proxies.cpu_clock, pids))))
                if many and len(samples) % 20 == 0:
                    tree = max(tree, _pss(pids))
                if stop is not None and stop():
                    process.send_signal(2)
                    stop = None
                time.sleep(0.05 if many else 0.02)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            cpu = used.ru_utime + used.ru_stime
            if many:
                _reap(self.server.process.pid)
                cpu = _children() - before
        wall, said = (time.monotonic_ns() - began) / 1e9, log.read_text(errors="replace")
        return Ran(process.returncode, said, began, wall, cpu, used.ru_maxrss / 1024, tree, samples)

    def replay(self, trace: str, *options: str, recorded: bool = False, **more: Any) -> tuple[Ran, Path]:
        """Our own; with ``recorded`` sessions begin when they were recorded to."""
        self._runs += 1
        run = self.machine.scratch / f"run{self._runs}"
        options += ("--arrivals", "recorded") if recorded else ()
        command = [*KEEPWARM, "replay", trace, "--endpoint", self.server.url, "-o", str(run), *options]
        ran = self.watch(command, **more)
        if ran.code not in (0, 130):
            raise RuntimeError(f"{' '.join(command)}: exit {ran.code}: {ran.said[-2000:]}")
        return ran, run

    def bare(self, **order: Any) -> dict[str, Any]:
        """The bare client."""
        ran = self.watch([sys.executable, str(HERE / "bareclient.py"), self.server.url, orjson.dumps(order).decode()])
        told: dict[str, Any] = orjson.loads(ran.said.splitlines()[-1])
        return told

    def aiperf(self, requests: int, *options: str) -> tuple[Ran, list[dict[str, Any]]]:
        """AIPerf with so many requests of 200 tokens; what it says of each. Absent where it cannot be had."""
        if not self.machine.peers:
            raise proxies.Absent("not wanted")
        place, self._runs = aiperf_place(), self._runs + 1
        told, words = self.machine.scratch / f"aiperf{self._runs}", self.machine.scratch / "words"
        if not words.exists():
            maker = HERE.parent / "tests" / "real" / "word_tokenizer.py"
            subprocess.run([place / "python", maker, words], check=True)
        command = [str(place / "aiperf"), "profile", "--streaming", "--model", "fast", "--tokenizer", str(words)]
        command += ["--url", self.server.url, "--endpoint-type", "chat", "--synthetic-input-tokens-mean", "200"]
        command += ["--request-count", str(requests), "--artifact-dir", str(told), "--ui", "none", *options]
        home = {"PATH": f"{place}:{os.environ.get('PATH', '')}", "HOME": str(self.machine.scratch), "LANG": "C.UTF-8"}
        ran = self.watch(command, many=True, env=home, cwd=self.machine.scratch)
        lines = list(told.glob("**/profile_export.jsonl"))
        if ran.code or not lines:
            raise proxies.Absent(f"AIPerf ended with {ran.code}: {ran.said[-400:]}")
        return ran, [orjson.loads(line) for line in lines[0].read_bytes().splitlines()]

    def truth(self) -> list[Answered]:
        """The server's truth of all calls but probes."""
        return [each for each in self.server.truth() if each.who != "-"]


def aiperf_place() -> Path:
    """The folder of AIPerf's programs: the tests' own installation, or one beside the proxies'."""
    ours = HERE.parent / "tests" / "real" / ".cache" / "aiperf"
    with suppress(OSError):
        if AIPERF in (ours / "version").read_text():
            return ours / "bin"
    proxies.PACKAGES["aiperf"] = (AIPERF, BESIDE)
    return proxies.installed("aiperf")


def adopt() -> None:
    """Make what processes leave behind ours."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reap(spare: int) -> None:
    """Wait for what was left behind; all but one child."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        left = [pid for pid in proxies.family(os.getpid())[1:] if pid != spare]
        if not left:
            return
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.1)


def _pss(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024
