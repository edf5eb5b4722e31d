"""The commands that ask a trace's calls again of an endpoint: replay, demo; and what they share with simulate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from keepwarm.harness.duration import Duration, Number
from keepwarm.harness.endpoint_options import DIALECT, choice, endpoint_options, take_address
from keepwarm.harness.planned import Planned
from keepwarm.replayers import run as runs
from keepwarm.replayers.hints import HINTING
from keepwarm.replayers.retry import RETRIES
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import FLOWS

DEMO_SPEED = 60.0
SESSIONS = 8
COUNT = click.IntRange(1, 1 << 40)
STARTS = ("salt", "cache-salt", "reset", "warm")
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


class CapOf(click.ParamType[Any]):
    """A cap of all calls, or of one flow's: N or FLOW=N."""

    name = "cap"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The flow, None for all, and the number."""
        flow, equals, number = str(value).rpartition("=")
        if (equals and flow not in FLOWS) or not number.isdecimal() or not 0 < int(number) < 1 << 40:
            self.fail(f"{value!r}: expected a whole number above 0, or one for a flow: {FLOWS[0]}=N", param, ctx)
        return flow or None, int(number)


def _cap(name: str, text: str) -> Callable[..., Any]:
    return click.option(name, type=CapOf(), multiple=True, metavar="[FLOW=]N", help=text)


@click.command()
@click.argument("trace")
@click.option("--endpoint", "url", required=True, metavar="URL", help="Base URL, with or without /v1.")
@OUTPUT
@DIALECT
@endpoint_options
@click.option("--speed", type=Number(LEAST_SPEED, MOST_SPEED), default=1.0, help="Divide every gap by this.")
@GAP_CAP
@click.option("--idle-cap", type=Duration(), metavar="TIME", help="Skip what is above this while nothing runs at all.")
@click.option(
    "--scale-tokens", type=Number(1e-6, 1), metavar="SHARE", help="Cut every prompt and answer to this share."
)
@click.option("--sessions", type=COUNT, metavar="N", help=f"Sessions at a time. [{SESSIONS}, with --arrivals no limit]")
@click.option(
    "--arrivals",
    metavar="LAW",
    help="When sessions begin: recorded, or poisson:0.2/s, constant:12/m, gamma:0.2/s:2.5 (with its CV).",
)
@click.option("--repeat", type=COUNT, metavar="N", help="The trace N times, each copy's prompts its own.")
@click.option("--duration", type=Duration(), metavar="TIME", help="Measure for so long, the load kept up to the end.")
@click.option("--warm-up", type=Duration(), metavar="TIME", default=0.0, help="Of the duration, not measured.")
@click.option("--seed", type=click.IntRange(0, 1 << 40), default=0, show_default=True, help="Of drawn arrivals.")
@_cap("--max-rate", "At most N calls a second, of one flow where it is named; repeatable.")
@_cap("--max-input-tokens-per-minute", "At most N prompt tokens a minute, likewise.")
@_cap("--max-concurrency", "At most N calls at a time, likewise.")
@click.option(
    "--max-retries", type=click.IntRange(0, 100), default=RETRIES, show_default=True, help="As the official SDKs try."
)
@click.option("--processes", type=click.IntRange(1, 1024), default=1, show_default=True, help="Shards of sessions.")
@click.option("--ray", metavar="ADDRESS", help="The shards as actors of this Ray cluster, or of a local one.")
@click.option("--resume", is_flag=False, metavar="RUN", help="Go on with a run that was cut off: whole sessions stay.")
@click.option("--no-stream", is_flag=True, help="Ask for whole answers: no first-token times then.")
@choice("--start", STARTS, "How the cache is cold: by other texts, the server's cache_salt, its reset; or warm.")
@choice(
    "--assistant",
    ("recorded", "live"),
    "Whose answers later prompts repeat: recorded ones, the same on every endpoint, or the endpoint's own.",
)
@click.option(
    "--hints", type=click.Choice(HINTING), default="recorded", show_default=True, help="Scheduling hints to send."
)
@choice(
    "--match", ("tokens", "bytes"), "Prompts of the planned tokens, or of bytes that do not depend on the endpoint."
)
@click.option(
    "--like", type=click.Path(path_type=Path), metavar="RUN", help="With --match bytes: the bytes that this run sent."
)
@click.option("--metrics", multiple=True, metavar="URL", help="A further server whose counters are read; repeatable.")
@click.option("--no-preflight", is_flag=True, help="Send without asking first what the endpoint can do.")
@FORCE
def replay(trace: str, url: str, output: Path | None, force: bool, **options: Any) -> None:
    """Replay a trace against an HTTP endpoint.

    Ctrl-C ends it with its results so far kept (exit code 130). Without -o the report is printed and the run forgotten.
    """
    from keepwarm.harness.asking import asked_endpoint, frozen_costs
    from keepwarm.harness.replaying import CAPS, replay_to
    from keepwarm.harness.resumed import resume

    if options["sessions"] is None and options["arrivals"] is None:
        options["sessions"] = SESSIONS
    _check_load(options, output is not None or force)
    take = options.pop
    names = ("speed", "gap_cap", "repeat", "duration", "warm_up", "seed")
    load = {name: take(name) for name in names}
    planned = Planned(trace, at_once=take("sessions"), scale=take("scale_tokens"), law=take("arrivals"), **load)
    options["caps"] = {name: told for name, option in CAPS.items() if (told := take(option))}
    like, match = take("like"), take("match")
    if like is not None and match != "bytes":
        raise click.UsageError("--like is for --match bytes")
    frozen, salt = None, None
    if match == "bytes":
        same = {"trace": planned.meta.digest, "assistant": options["assistant"]}
        frozen, salt = frozen_costs(like, options["start"], **same, scale_tokens=planned.options["scale_tokens"])
    dialect, preflight, ca = take("dialect"), not take("no_preflight"), options["ca"]
    address = take_address(url, dialect, options)
    how = {"preflight": preflight, "tokenizer": take("tokenizer"), "stream": not options["no_stream"]}
    asking = asked_endpoint(address, dialect, take("model"), frozen=frozen, **how)
    again = take("resume")
    resumed = None if again is None else resume(Path(again), planned)
    place = run_directory(output, "replay", force=force) if again is None else nullcontext(Path(again))
    with place as path:
        came = replay_to(path, planned, asking, salt=salt, ca=ca, resumed=resumed, **options)
        finish(path, output if again is None else path, came.words())
    if came.interrupted and not came.lost:
        raise SystemExit(130)
    if came.lost or not (came.answered or resumed):
        raise SystemExit(3)


def _check_load(options: dict[str, Any], placed: bool) -> None:
    """UsageError where options of the load contradict each other."""
    given = {name for name in ("resume", "duration", "idle_cap", "ray") if options[name] is not None}
    several = options["processes"] > 1 or "ray" in given
    wrong = {
        "--warm-up must be shorter than --duration": 0 < options["warm_up"] >= (options["duration"] or 0),
        "--resume goes on in its own RUN: without -o and --force": "resume" in given and placed,
        "--resume and --duration cannot both be given": {"resume", "duration"} <= given,
        "--idle-cap is for one process: others do not know whether all are idle": several and "idle_cap" in given,
        "--processes must not be above --sessions": options["processes"] > (options["sessions"] or 1 << 40),
    }
    for text, holds in wrong.items():
        if holds:
            raise click.UsageError(text)


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
    from keepwarm.harness.asking import asked_endpoint
    from keepwarm.harness.replaying import replay_to
    from keepwarm.harness.report_commands import report
    from keepwarm.replayers.address import Address

    with (
        as_file(files("keepwarm.harness") / "demo.parquet") as trace,
        _serving("--speed", str(speed), "--cache-ttl", "5m") as url,
        run_directory(output, "replay", force=force) as path,
    ):
        planned = Planned(str(trace), speed=speed, at_once=SESSIONS)
        if replay_to(path, planned, asked_endpoint(Address(url, {}))).interrupted:
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
