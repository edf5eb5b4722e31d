"""The commands that ask a trace's calls again: simulate, replay, serve, demo."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from keepwarm.harness.duration import Duration
from keepwarm.harness.progress import progress
from keepwarm.harness.simulated import about_cache, make_worker, worker_options
from keepwarm.replayers import run as runs
from keepwarm.replayers.cache import PrefixCache
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.endpoint import Endpoint
from keepwarm.replayers.plan import Schedule
from keepwarm.replayers.run import Bound
from keepwarm.replayers.simulate import Simulated
from keepwarm.replayers.simulate import simulate as in_virtual_time
from keepwarm.replayers.worker import AS_RECORDED, SECOND, Worker
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import OUTCOMES, Journal
from keepwarm.traces.model import Outcome
from keepwarm.traces.store import read_meta, read_sessions, read_trace_table, write_outcomes

DEMO_SPEED = 60.0

OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), metavar="RUN")
GAP_CAP = click.option("--gap-cap", type=Duration(), metavar="TIME", help="Cut every gap to at most this.")
FORCE = click.option("--force", is_flag=True, help="Replace a run that is there.")


class _Planned:
    """A trace about to be replayed: what it is, and fresh schedules of it."""

    def __init__(self, trace: str, *, speed: float, gap_cap: float | None, at_once: int | None) -> None:
        self.trace = trace
        self.speed = speed
        self._options: dict[str, Any] = {
            "speed": speed,
            "gap_cap_ns": None if gap_cap is None else round(gap_cap * SECOND),
            "at_once": at_once,
        }
        table = read_trace_table(trace, ["session", "breakpoints"])
        self.calls = table.num_rows
        self.sessions = len(table.column("session").unique())
        self.marked = len(table.column("breakpoints").combine_chunks().flatten()) > 0
        self.meta = read_meta(trace)
        self.options = {"speed": speed, "gap_cap_s": gap_cap, "sessions": at_once}

    def schedule(self) -> Schedule:
        return Schedule(read_sessions(self.trace), **self._options)

    def about(self, mode: str, started: str, *, ended: str | None, **more: Any) -> dict[str, Any]:
        trace = runs.about_trace(self.trace, self.meta, self.calls, self.sessions)
        counts = {"planned_calls": self.calls, "planned_sessions": self.sessions}
        about = {"format": 1, "mode": mode, "trace": trace, "options": self.options, **counts, **more}
        return about | {"started": started, "ended": ended, **runs.about_machine()}


@click.command()
@click.argument("trace")
@OUTPUT
@FORCE
@worker_options
@GAP_CAP
@click.option(
    "--sessions", type=click.IntRange(min=1), metavar="N", help="Run N at a time, not when they were recorded."
)
def simulate(
    trace: str, output: Path | None, force: bool, gap_cap: float | None, sessions: int | None, **options: Any
) -> None:
    """Replay a trace in virtual time against a simulated worker; no sockets, nothing is waited for.

    Without -o the report is printed and the run forgotten.
    """
    planned = _Planned(trace, speed=1.0, gap_cap=gap_cap, at_once=sessions)
    if options["cache_ttl"] == AS_RECORDED and not planned.marked:
        raise InputError(
            f"{trace}: no call has breakpoints, so it has no TTLs as recorded: give --cache-ttl a duration"
        )
    worker = make_worker(**options)
    with _run_directory(output, "simulate", force=force) as path:
        _simulate(planned, path, worker, **options)
        _finish(path, output)


def _simulate(planned: _Planned, path: Path, worker: Worker, **options: Any) -> None:
    started = runs.now()
    endless = Worker(
        PrefixCache(block=worker.cache.block), managed=worker.managed, outputs_readable=worker.outputs_readable
    )
    bounds: list[Bound] = []
    with progress("simulating", planned.calls) as told:
        results = in_virtual_time(planned.schedule(), worker, shadows={"endless": endless})
        write_outcomes(str(path / OUTCOMES), (done.outcome for done in _bounded(results, bounds, told)))
    runs.write_bounds(path, bounds)
    ttl = options["cache_ttl"]
    about = {
        "endpoint": {"name": "simulated", "url": None, "dialect": None, "server": None, "clock_driven": True}
        | {"has_ttl": ttl is not None},
        "cache": about_cache(worker, ttl),
        "clock": {"kind": "virtual", "anchor": None},
        "interrupted": False,
        "seed": None,
    }
    service = {name: options[name] for name in ("base_s", "prefill_tps", "decode_tps")}
    runs.write_about(path, planned.about("simulate", started, ended=runs.now(), **about) | {"service": service})


def _bounded(
    results: Iterable[Simulated], bounds: list[Bound], told: Callable[[int, int | None], None]
) -> Iterator[Simulated]:
    """Pass results on, keeping what each call could have read."""
    for done, result in enumerate(results, 1):
        outcome = result.outcome
        bounds += [Bound(outcome.call.call, outcome.copy, name, read) for name, read in result.bounds.items()]
        told(done, None)
        yield result


@contextmanager
def _run_directory(output: Path | None, mode: str, *, force: bool) -> Iterator[Path]:
    """The directory to run in: the asked one, or one that is gone afterwards."""
    if output is not None:
        runs.open_run(output, mode=mode, force=force)
        yield output
        return
    with TemporaryDirectory(prefix="keepwarm-") as scratch:
        path = Path(scratch) / "run"
        runs.open_run(path, mode=mode, force=False)
        yield path


def _finish(path: Path, output: Path | None, *, whole: bool = True) -> None:
    """Say where the run is, or report it while it lasts."""
    if output is not None:
        state = "run is whole" if whole else "run was interrupted, its results so far are kept"
        click.echo(f"{output}: {state}; see it with: keepwarm report {output}")
        return
    from keepwarm.harness.report_commands import report

    report.main([str(path)], standalone_mode=False)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--model", default="keepwarm-simulated", show_default=True, help="The name it serves under.")
@click.option(
    "--speed", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Divide TTLs and service times."
)
@worker_options
def serve(host: str, port: int, model: str, speed: float, **options: Any) -> None:
    """Run the simulated cluster as an HTTP endpoint: /v1/messages and /v1/chat/completions, streaming or not."""
    from keepwarm.harness.serve import create_app, serve_forever

    app = create_app(make_worker(speed=speed, **options), model=model, speed=speed, ttl_s=options["cache_ttl"])
    serve_forever(app, host, port, told=lambda url: click.echo(f"serving {model} at {url}", err=True))


@click.command()
@click.argument("trace")
@click.option("--endpoint", "url", required=True, metavar="URL", help="Base URL, with or without /v1.")
@OUTPUT
@click.option("--dialect", type=click.Choice(["messages", "chat"]), default="messages", show_default=True)
@click.option("--model", help="The model to ask for; else the only one that the endpoint serves.")
@click.option("--key-env", metavar="NAME", help="Environment variable that holds the API key.")
@click.option("--speed", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Divide every gap by this.")
@GAP_CAP
@click.option("--sessions", type=click.IntRange(min=1), default=8, show_default=True, help="Sessions at a time.")
@click.option("--max-rate", type=click.IntRange(min=1), metavar="N", help="At most N calls a second.")
@click.option("--timeout", type=Duration(), default=600.0, show_default=True, help="For one whole call.")
@click.option("--no-stream", is_flag=True, help="Ask for whole answers: no first-token times then.")
@click.option("--warm", is_flag=True, help="Send prompts without a run salt: what an earlier run left may be read.")
@FORCE
def replay(trace: str, url: str, output: Path | None, force: bool, **options: Any) -> None:
    """Replay a trace against an HTTP endpoint.

    Ctrl-C ends it with its results so far kept (exit code 130). Without -o the report is printed and the run forgotten.
    """
    speed, gap_cap, sessions = options.pop("speed"), options.pop("gap_cap"), options.pop("sessions")
    planned = _Planned(trace, speed=speed, gap_cap=gap_cap, at_once=sessions)
    server = _preflight(url, options["dialect"], options["key_env"], options.pop("model"))
    with _run_directory(output, "replay", force=force) as path:
        whole = replay_to(path, planned, url, server, **options)
        _finish(path, output, whole=whole)
    if not whole:
        raise SystemExit(130)


def _preflight(
    url: str, dialect: str = "messages", key_env: str | None = None, model: str | None = None
) -> dict[str, Any]:
    """What listens at a URL, and as ``model`` the one to ask for."""
    from keepwarm.replayers.http import preflight

    server = preflight(url, dialect=dialect, key_env=key_env)
    if model is None and server["model"] is None:
        raise InputError(f"endpoint {url}: does not say which one model it serves: give --model")
    return server | {"model": model or server["model"]}


def replay_to(
    path: Path,
    planned: _Planned,
    url: str,
    server: dict[str, Any],
    *,
    dialect: str = "messages",
    key_env: str | None = None,
    max_rate: int | None = None,
    timeout: float = 600.0,
    no_stream: bool = False,
    warm: bool = False,
) -> bool:
    """Replay into a run's directory; False if it was interrupted, its results so far kept.

    What can be said beforehand is written first: a run that is killed can be reported from its journal.
    """
    from keepwarm.replayers.http import HttpEndpoint

    salt, started = "" if warm else secrets.token_hex(4), runs.now()
    runs.write_bounds(path, _endless(planned))
    about = _about_endpoint(planned, url, dialect, server, salt)
    about["options"] = planned.options | {"max_rate": max_rate, "timeout_s": timeout, "stream": not no_stream}
    runs.write_about(path, planned.about("replay", started, ended=None, interrupted=True, **about))
    clock = RunClock()
    endpoint = HttpEndpoint(
        url,
        dialect=dialect,
        model=server["model"],
        clock=clock,
        key_env=key_env,
        stream=not no_stream,
        timeout_s=timeout,
        salt=salt,
    )
    whole = _replay(path, planned, endpoint, clock, server["model"], max_rate)
    runs.write_about(path, planned.about("replay", started, ended=runs.now(), interrupted=not whole, **about))
    return whole


def _replay(
    path: Path, planned: _Planned, endpoint: Endpoint, clock: RunClock, name: str, max_rate: int | None
) -> bool:
    """Send all calls, their outcomes into the run as they come; False if it was interrupted."""
    from keepwarm.replayers.replay import Replay, run_replay

    with closing(Journal(path)) as journal, progress("replaying", planned.calls) as told:

        def emit(outcome: Outcome) -> None:
            journal.add(outcome)
            told(journal.rows, None)

        replay = Replay(planned.schedule(), endpoint, emit, clock=clock, name=name, max_rate=max_rate)
        clock.start()
        return asyncio.run(run_replay(replay, endpoint))


def _about_endpoint(planned: _Planned, url: str, dialect: str, server: dict[str, Any], salt: str) -> dict[str, Any]:
    driven = server["server"] is not None and server["speed"] == planned.speed
    has_ttl = None if server["ttl"] is None else server["ttl"] != "none"
    endpoint = {"name": "http", "url": runs.shown_url(url), "dialect": dialect, "server": server}
    return {
        "endpoint": endpoint | {"clock_driven": driven, "has_ttl": has_ttl},
        "cache": {"state_at_start": "cold" if salt else "warm", "salt": salt or None},
        "clock": {"kind": "monotonic", "anchor": None},
        "seed": None,
    }


def _endless(planned: _Planned) -> list[Bound]:
    """What each call could have read from an endless cache that keeps prompts: answers sent back are the recorded ones,
    not those that the endpoint gave. InputError where a call cannot be replayed, before any was sent.
    """
    worker = Worker(PrefixCache(), outputs_readable=False, speed=planned.speed)
    bounds = []
    with progress("planning", planned.calls) as told:
        for outcome, _ in in_virtual_time(planned.schedule(), worker):
            bounds.append(Bound(outcome.call.call, outcome.copy, "endless", outcome.cache_read or 0))
            told(len(bounds), None)
    return bounds


@click.command()
@OUTPUT
@click.option(
    "--speed", type=click.FloatRange(min=1), default=DEMO_SPEED, show_default=True, help="Of trace and cluster."
)
def demo(output: Path | None, speed: float) -> None:
    """The main job in seconds: the bundled trace, replayed over HTTP against the simulated cluster, reported.

    The cluster runs beside it with a five-minute TTL and its clock sped up like the trace's. No network.
    """
    from keepwarm.harness.report_commands import report

    with (
        as_file(files("keepwarm.harness") / "demo.parquet") as trace,
        _serving("--speed", str(speed), "--cache-ttl", "5m") as url,
        _run_directory(output, "replay", force=True) as path,
    ):
        planned = _Planned(str(trace), speed=speed, gap_cap=None, at_once=8)
        if not replay_to(path, planned, url, _preflight(url)):
            raise SystemExit(130)
        report.main([str(path)], standalone_mode=False)


@contextmanager
def _serving(*options: str) -> Iterator[str]:
    """`keepwarm serve` as a process of its own on a free port, so that it and the client have a core each; its URL."""
    command = [sys.executable, "-m", "keepwarm.harness.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            told = server.stderr.readline()
            if " at http" not in told:
                raise InputError(f"keepwarm serve did not start: {told.strip()}")
            yield told.rsplit(" ", 1)[-1].strip()
        finally:
            server.terminate()
