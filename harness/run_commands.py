"""The commands that ask a trace's calls again of an endpoint: replay, demo; and what they share with simulate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from keepwarm.harness.duration import Duration, Number
from keepwarm.harness.planned import Planned
from keepwarm.replayers import run as runs
from keepwarm.traces.errors import InputError

DEMO_SPEED = 60.0
LEAST_SPEED, MOST_SPEED = 1e-3, 1e6

OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), metavar="RUN")
GAP_CAP = click.option("--gap-cap", type=Duration(), metavar="TIME", help="Cut every gap to at most this.")
FORCE = click.option("--force", is_flag=True, help="Replace a run that is there.")


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
        click.echo(f"{output}: {what}; see it with: keepwarm report {output}", err=as_json)
    if output is None or as_json:
        from keepwarm.harness.report_commands import report

        report.main([str(path), *(["--json"] if as_json else [])], standalone_mode=False)


@click.command()
@click.argument("trace")
@click.option("--endpoint", "url", required=True, metavar="URL", help="Base URL, with or without /v1.")
@OUTPUT
@click.option("--dialect", type=click.Choice(["messages", "chat"]), default="messages", show_default=True)
@click.option("--model", help="The model to ask for; else the only one that the endpoint serves.")
@click.option("--key-env", metavar="NAME", help="Environment variable that holds the API key.")
@click.option("--speed", type=Number(LEAST_SPEED, MOST_SPEED), default=1.0, help="Divide every gap by this.")
@GAP_CAP
@click.option("--sessions", type=click.IntRange(1, 1 << 40), default=8, show_default=True, help="Sessions at a time.")
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
    from keepwarm.harness.replaying import asked_endpoint, replay_to

    planned = Planned(trace, speed=speed, gap_cap=gap_cap, at_once=sessions)
    server = asked_endpoint(url, options["dialect"], options["key_env"], options.pop("model"))
    with run_directory(output, "replay", force=force) as path:
        came = replay_to(path, planned, url, server, **options)
        finish(path, output, came.words())
    if came.interrupted:
        raise SystemExit(130)
    if not came.counts[None]:
        raise SystemExit(3)


@click.command()
@OUTPUT
@click.option(
    "--speed", type=Number(1, MOST_SPEED), default=DEMO_SPEED, show_default=True, help="Of trace and cluster."
)
@FORCE
def demo(output: Path | None, speed: float, force: bool) -> None:
    """The main job in seconds: the bundled trace, replayed over HTTP against the simulated cluster, reported.

    The cluster runs beside it with a five-minute TTL and its clock sped up like the trace's. No network.
    """
    from keepwarm.harness.replaying import asked_endpoint, replay_to
    from keepwarm.harness.report_commands import report

    with (
        as_file(files("keepwarm.harness") / "demo.parquet") as trace,
        _serving("--speed", str(speed), "--cache-ttl", "5m") as url,
        run_directory(output, "replay", force=force) as path,
    ):
        planned = Planned(str(trace), speed=speed, gap_cap=None, at_once=8)
        if replay_to(path, planned, url, asked_endpoint(url)).interrupted:
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
