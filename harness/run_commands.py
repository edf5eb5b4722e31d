"""The commands that ask a trace's calls again of an endpoint: replay, demo; and what they share with simulate."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import click

from keepwarm.harness.options import options
from keepwarm.harness.planned import Planned
from keepwarm.replayers import run as runs
from keepwarm.replayers.caps import CAPS
from keepwarm.traces.errors import InputError

SESSIONS = 8
BUNDLED = Path(__file__).with_name("demo.parquet")
"""A trace to begin with."""


@contextmanager
def run_directory(output: Path | None, mode: str, *, force: bool) -> Iterator[Path]:
    """The directory to run in: the asked one, or one that is gone afterwards. What was there before a simulation stays
    until that is whole; a replay's place is its own at once, so that one that is killed is found there.
    """
    if output is None:
        with TemporaryDirectory(prefix="keepwarm-") as scratch:
            yield Path(scratch)
    elif mode == "simulate":
        with runs.staged_run(output, mode=mode, force=force) as path:
            yield path
    else:
        runs.open_run(output, mode=mode, force=force)
        yield output


def finish(path: Path, output: Path | None, what: str, *, as_json: bool = False) -> None:
    """Say what came of the run and where it is, or report it while it lasts."""
    if output is not None:
        click.echo(f"{output}: {what}; see it with: keepwarm report {quote(str(output))}", err=as_json)
    if output is None or as_json:
        from keepwarm.harness.report_commands import report

        report.main([str(path), *(["--json"] if as_json else [])], standalone_mode=False)


@click.command()
@click.argument("trace")
@options("replay", "endpoint", "load", "sent", "force")
def replay(trace: str, url: str, output: Path | None, force: bool, **given: Any) -> None:
    """Replay a trace against an HTTP endpoint.

    Ctrl-C ends it with its results so far kept (exit code 130). Without -o the report is printed and the run forgotten.
    """
    from keepwarm.harness.asking import asked_endpoint, frozen_costs
    from keepwarm.harness.replaying import replay_to
    from keepwarm.harness.resumed import resume
    from keepwarm.replayers.http import reach

    if given["sessions"] is None and given["arrivals"] is None:
        given["sessions"] = SESSIONS
    _check_load(given, output is not None or force)
    take = given.pop
    load = {name: take(name) for name in ("speed", "gap_cap", "repeat", "duration", "warm_up", "seed")}
    planned = Planned(trace, at_once=take("sessions"), scale=take("scale_tokens"), law=take("arrivals"), **load)
    given["caps"] = {name: told for name, option in CAPS.items() if (told := take(option))}
    like, match = take("like"), take("match")
    frozen, salt = None, None
    if match == "bytes":
        same = {"trace": planned.meta.digest, "assistant": given["assistant"]}
        frozen, salt = frozen_costs(like, given["start"], **same, scale_tokens=planned.options["scale_tokens"])
    dialect, preflight, ca = take("dialect"), not take("no_preflight"), take("ca")
    opening = {name: take(name) for name in ("key_env", "key_file", "header", "transport")}
    address = reach(url, dialect, ca=ca, **opening)
    how = {"preflight": preflight, "tokenizer": take("tokenizer"), "stream": not given["no_stream"]}
    asking = asked_endpoint(address, dialect, take("model"), frozen=frozen, **how)
    again = take("resume")
    place = run_directory(output, "replay", force=force) if again is None else nullcontext(Path(again))
    with place as path, runs.under_way(path):
        resumed = None if again is None else resume(path, planned)
        came = replay_to(path, planned, asking, salt=salt, ca=ca, resumed=resumed, **given)
        finish(path, output if again is None else path, came.words())
    if came.interrupted and not came.lost:
        raise SystemExit(130)
    if came.lost or not (came.answered or resumed):
        raise SystemExit(3)


def _check_load(options: dict[str, Any], placed: bool) -> None:
    """UsageError where options of the load contradict each other."""
    given = {name for name in ("resume", "duration", "idle_cap", "ray") if options[name] is not None}
    several = options["processes"] > 1 or "ray" in given
    most = min([options["sessions"] or 1 << 40, *(cap[1] for name in CAPS.values() for cap in options[name])])
    wrong = {
        "--timeout and --duration must be above 0": 0 in (options["timeout"], options["duration"]),
        "--warm-up needs a --duration that is longer": 0 < options["warm_up"] >= (options["duration"] or 0),
        "--resume goes on in its own RUN: without -o and --force": "resume" in given and placed,
        "--resume and --duration cannot both be given": {"resume", "duration"} <= given,
        "--idle-cap is for one process: others do not know whether all are idle": several and "idle_cap" in given,
        "--like is for --match bytes": options["like"] is not None and options["match"] != "bytes",
        "--processes must not be above --sessions or a cap: each has its share": options["processes"] > most,
    }
    for text, holds in wrong.items():
        if holds:
            raise click.UsageError(text)


@click.command()
@options("demo", "force")
def demo(output: Path | None, speed: float, force: bool) -> None:
    """The main job in seconds: the bundled trace, replayed over HTTP against the simulated cluster, reported.

    The cluster runs beside it with a five-minute TTL and its clock sped up like the trace's. No network.
    """
    place = ["-o", str(output), *(["--force"] if force else [])] if output else []
    with _serving("--speed", str(speed), "--cache-ttl", "5m") as url:
        replay.main([str(BUNDLED), "--endpoint", url, "--speed", str(speed), *place], standalone_mode=False)
    if output is not None:
        finish(output, None, "")


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
