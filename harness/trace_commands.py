"""The commands that make traces and look into them: import, synth, inspect."""

import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import orjson

from keepwarm.harness.options import options, tell
from keepwarm.harness.progress import progress
from keepwarm.reports.metrics import GROUPS
from keepwarm.traces.claude_code import Imported, default_path, import_claude_code
from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import new_salt, salt_from_file
from keepwarm.traces.joined import join_traces

DAMAGED_SHOWN = 20
MOST_PROCESSES = 4
"""Each costs some 70 MB; more of them wait for the one that writes."""


@click.command("import")
@click.argument("source", type=click.Choice(["claude-code"]), expose_value=False)
@click.argument("path", required=False)
@options("trace", "import", "logged", "joined", "json")
def import_(
    path: str | None,
    output: str,
    prefix_breaks: str,
    salt_file: Path | None,
    join: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Turn an agent's own logs into a trace.

    PATH is a folder laid out as ~/.claude/projects, one project of it, or one session's .jsonl file (its sub-agents'
    files beside it are taken along). Without PATH: your own folder.

    With recorded prefix breaks a prompt keeps of its predecessor's only what was read, where inside the TTL that was
    much less than the predecessor left. Such a trace is informed; figures from it are no prediction.

    The salt of identities and pseudonyms in a file, made now (mode 0600) if there is none, lets imports agree. Else it
    is forgotten. A joined recording keeps its calls and prompts, and gets the logs' tool times.
    """
    if path == "":
        raise InputError("PATH is empty: give a folder or a file, or leave it out for your own folder")
    if join is not None and (salt_file is None or not salt_file.exists()):
        raise click.UsageError("--join needs the recording's --salt-file: without it no identity agrees")
    if join is not None and Path(join) == Path(output):
        raise InputError(f"{output}: is the recording to be joined: give another output")
    salt = salt_from_file(salt_file) if salt_file else new_salt()
    informed = prefix_breaks == "recorded"
    with progress("reading") as told, TemporaryDirectory() as beside:
        imported = output if join is None else f"{beside}/logs.parquet"
        done = import_claude_code(
            Path(path) if path is not None else default_path(),
            imported,
            version=version("keepwarm"),
            salt=salt,
            informed=informed,
            **how,
            processes=min(os.cpu_count() or 1, MOST_PROCESSES),
            progress=told,
        )
        joined = None if join is None else join_traces(join, imported, output, version=version("keepwarm"))
    if joined is not None:
        calls, timed = joined
        click.echo(f"{output}: {calls:,} calls of {join}, {timed:,} of them with the logs' tool times", err=True)
    if as_json:
        click.echo(orjson.dumps(done._asdict(), option=orjson.OPT_INDENT_2))
    elif joined is None:
        _tell(done, output, informed)


def _tell(done: Imported, output: str, informed: bool) -> None:
    click.echo(f"{output}: {done.sessions:,} sessions, {done.calls:,} calls from {done.files:,} files")
    if informed:
        click.echo(f"informed: {done.recorded_breaks} calls' prefixes were cut to what was read; not a prediction")
    share, over = (tokens / max(done.new_tokens, 1) for tokens in (done.hidden, done.scaled))
    click.echo(
        f"prompts add up to the reported counts; {share:.1%} of their new tokens are in no visible block, "
        f"visible blocks were scaled down by {over:.1%}"
    )
    if done.duplicates:
        click.echo(f"{done.duplicates} copies of messages dropped")
    if done.negative_waits:
        click.echo(f"{done.negative_waits} negative waits set to 0")
    if done.damaged:
        click.echo(f"{len(done.damaged)} damaged lines passed over:", err=True)
        for name, number in done.damaged[:DAMAGED_SHOWN]:
            click.echo(f"  {name}: line {number}", err=True)
        if len(done.damaged) > DAMAGED_SHOWN:
            click.echo(f"  and {len(done.damaged) - DAMAGED_SHOWN} more (--json lists all)", err=True)


@click.command()
@click.argument("workload")
@options("trace", "synth")
def synth(workload: str, output: str, seed: int, sessions: int | None) -> None:
    """Make a synthetic trace fitted to published distributions.

    WORKLOAD is claude-code, agent-team or demo.
    """
    from keepwarm.traces.store import TraceWriter
    from keepwarm.traces.synthetic import synthesise

    calls = synthesise(workload, seed=seed, sessions=sessions)
    notes: dict[str, Any] = {"workload": workload, "seed": seed, "prefix_breaks": None}
    with TraceWriter(output, producer="synth", version=version("keepwarm"), tokens="exact", notes=notes) as writer:
        for call in calls:
            writer.add(call)
    click.echo(f"{output}: {writer.calls:,} calls, digest {writer.digest}")


@click.command("inspect")
@click.argument("trace")
@options("json", "by", group=click.Choice(list(GROUPS)))
def inspect_(trace: str, as_json: bool, by: tuple[str, ...]) -> None:
    """Say what is in a trace, and how warm its recording was."""
    from keepwarm.reports.recording import inspect_summary
    from keepwarm.reports.render_trace import render_inspect

    tell(inspect_summary(trace), as_json, partial(render_inspect, by=by or ("role", "model")))
