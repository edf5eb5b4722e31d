"""The proxies that are compared: how each is installed, started and stopped, and what it takes of the machine."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keepwarm" / "benchmarks"
LISTENING = re.compile(r"listening on (http://[\d.]+:\d+)")
# Exact versions, wheels where there are any: nobody's machine runs what was released to the index this morning.
PACKAGES = {
    "mitmproxy": ("mitmproxy==11.0.2", "--no-binary=pyperclip"),
    "litellm": ("litellm[proxy]==1.106.0",),
}
LITELLM = """
model_list:
  - model_name: "*"
    litellm_params: {{model: "anthropic/*", api_base: "{upstream}", api_key: dummy}}
litellm_settings: {{telemetry: false}}
"""
# What the option store_streamed_bodies does, which the newest version for Python 3.11 does not have yet.
STORE = """
def keep(message):
    pieces = []
    def stream(data):
        if data:
            pieces.append(data)
            return data
        message.raw_content = b"".join(pieces)
        return []
    message.stream = stream

def requestheaders(flow):
    keep(flow.request)

def responseheaders(flow):
    keep(flow.response)
"""


class Absent(Exception):
    """A proxy cannot be measured; says why."""


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [one for child in children.read_text().split() for one in family(int(child))]
    return found


def cpu_clock(pid: int) -> float:
    """CPU seconds of all threads of a process; the kernel's clock, for the ticks in /proc/PID/stat are 10 ms."""
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0


@dataclass
class Proxy:
    """A running process, pinned to a core."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    files: list[Path] = field(default_factory=list)  # what it records

    def cpu(self) -> float:
        """CPU seconds that it and its children have used, once it has come to rest."""
        used = -1.0
        for _ in range(30):
            before, used = used, sum(map(cpu_clock, family(self.process.pid)))
            if used - before < 0.003:
                break
            time.sleep(0.1)
        return used

    def pss_mb(self) -> float:
        """MB held, shared pages by their share."""
        total = 0
        for one in family(self.process.pid):
            with suppress(OSError):
                lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def stop(self) -> float:
        """Interrupt it; CPU seconds that it took to end."""
        used, before = self.cpu(), resource.getrusage(resource.RUSAGE_CHILDREN)
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.kill()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - used

    def kill(self) -> None:
        """End it and what it started; nothing where it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace").strip()[-300:]


def launch(name: str, command: list[str], core: int, scratch: Path, env: dict[str, str] | None = None) -> Proxy:
    """Start a process on a core, with an empty home."""
    home = {"PATH": os.environ.get("PATH", ""), "HOME": str(scratch), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    log = scratch / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={**home, **(env or {})},
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    return Proxy(name, process, log)


def wait_until(ready: Callable[[], bool], proxy: Proxy, seconds: float) -> None:
    """Wait for a process to be ready; Absent where it ends or is not in time."""
    until = time.monotonic() + seconds
    while not ready():
        if proxy.process.poll() is not None or time.monotonic() > until:
            proxy.kill()
            raise Absent(f"{proxy.name} did not start: {proxy.said()}")
        time.sleep(0.05)


def announced(name: str, command: list[str], core: int, scratch: Path) -> Proxy:
    """Start a process that says where it listens."""
    proxy = launch(name, command, core, scratch)
    wait_until(lambda: LISTENING.search(proxy.log.read_text()) is not None, proxy, 30)
    found = LISTENING.search(proxy.log.read_text())
    assert found is not None
    proxy.url = found[1]
    return proxy


def script(name: str, *arguments: str) -> list[str]:
    """The command of a script that stands beside this one."""
    return [sys.executable, str(HERE / f"{name}.py"), *arguments]


def bare(upstream: str, core: int, scratch: Path) -> Proxy:
    """The limit."""
    return announced("bare pair", script("pair", "--upstream", upstream), core, scratch)


def keepwarm(upstream: str, core: int, scratch: Path) -> Proxy:
    """`keepwarm record`."""
    command = [sys.executable, "-m", "keepwarm.harness.cli", "record"]
    if subprocess.run([*command, "--help"], capture_output=True, check=False).returncode:
        raise Absent("keepwarm has no command `record` here")
    trace = scratch / "t.parquet"
    command += ["--upstream", upstream, "-o", str(trace), "--listen", "127.0.0.1:0"]
    proxy = announced("keepwarm", command, core, scratch)
    proxy.files.append(trace)
    return proxy


def installed(peer: str) -> Path:
    """The folder of a peer's programs, installed from the package index where it is not yet."""
    place = CACHE / f"{re.sub('[^a-z0-9.]+', '-', PACKAGES[peer][0])}-{sys.implementation.cache_tag}"
    if not (place / "done").exists():
        print(f"installing {PACKAGES[peer][0]} (once)", file=sys.stderr)
        try:
            venv.create(place, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Absent(f"no virtual environment can be made: {error}") from error
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", "--only-binary=:all:"]
        done = subprocess.run([*pip, *reversed(PACKAGES[peer])], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Absent(f"{PACKAGES[peer][0]} cannot be installed: {done.stderr.strip()[-200:]}")
        (place / "done").touch()
    return place / "bin"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def reachable(port: int) -> bool:
    """Whether somebody listens."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def mitmproxy(upstream: str, core: int, scratch: Path) -> Proxy:
    """mitmdump as a reverse proxy: streaming, and bodies stored in a flow file."""
    port, flows, store = free_port(), scratch / "flows", scratch / "store.py"
    store.write_text(STORE)
    command = [str(installed("mitmproxy") / "mitmdump"), "-q", "--mode", f"reverse:{upstream}@127.0.0.1:{port}"]
    command += ["-s", str(store), "-w", str(flows)]
    proxy = launch("mitmproxy", command, core, scratch)
    wait_until(lambda: reachable(port), proxy, 60)
    proxy.url, proxy.files = f"http://127.0.0.1:{port}", [flows]
    return proxy


def litellm(upstream: str, core: int, scratch: Path) -> Proxy:
    """LiteLLM's proxy with one worker, every model led to the upstream; it records nothing."""
    port, options = free_port(), scratch / "litellm.yaml"
    options.write_text(LITELLM.format(upstream=upstream))
    command = [str(installed("litellm") / "litellm"), "--config", str(options), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
    # No key to check is less work for it; it is on loopback, and there is nothing behind it but a script.
    env["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
    proxy = launch("litellm", command, core, scratch, env)
    wait_until(lambda: reachable(port), proxy, 120)
    proxy.url = f"http://127.0.0.1:{port}"
    return proxy


STARTERS = {"bare pair": bare, "keepwarm": keepwarm, "mitmproxy": mitmproxy, "litellm": litellm}
