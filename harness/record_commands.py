"""The command that records: a proxy before an agent's upstream, and the agent started behind it where asked."""

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
import httpx

from keepwarm.harness.options import options
from keepwarm.harness.proxy import Proxy
from keepwarm.harness.recorder import Recorder
from keepwarm.harness.routes import Route, all_routes
from keepwarm.replayers.address import trusting
from keepwarm.traces.errors import InputError
from keepwarm.traces.identity import new_salt, salt_from_file
from keepwarm.traces.recorded import close_journal
from keepwarm.traces.records import RecordJournal

LOOPBACK = ("localhost", "127.0.0.1", "::1")
GRACE_S = 30.0
PATIENCE_S = 5.0
LIVE_S = 0.5


@click.command(context_settings={"allow_interspersed_args": False})
@options("record", "logged", "recorded")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def record(
    upstream: tuple[str, ...],
    output: str,
    listen: str,
    token_env: str | None,
    ca_file: str | None,
    flow: str | None,
    salt_file: Path | None,
    keep_text: bool,
    run: bool,
    command: tuple[str, ...],
) -> None:
    """Record the calls of real agents, live: a reverse proxy that they do not notice.

    While it runs, what it saw lies in TRACE.journal: identities and counts, no text, readable by you only. Ctrl-C, or
    the end of COMMAND, makes the trace of it. A recorder that was killed goes on with its journal when started again.

    An upstream is a URL, /prefix=URL (the prefix is replaced by the URL's path) or header:value=URL. Without one, what
    a recorder that was killed left is closed.

    A token is needed to listen on anything but loopback. Clients show it as header x-keepwarm-token or as the first
    part of the path.

    The salt in a file, made now if there is none, lets the identities of several traces agree. Else it is forgotten.
    """
    if run != bool(command):
        raise click.UsageError("--run needs a COMMAND, and a COMMAND needs --run; options come before it")
    out = _place(output)
    if salt_file and (out != Path(output) or salt_file == out):
        raise click.UsageError("--salt-file needs a TRACE of its own: in a directory, sessions could lie in two files")
    journal = out.with_name(out.name + ".journal")
    if not upstream and not journal.exists():
        raise click.UsageError(f"--upstream is needed: there is no {journal} to close")
    code, recorder = 0, None
    if upstream:
        routes, address = all_routes(upstream), _address(listen)
        token = _token(token_env, address[0])
        bases = _bases(routes) if command else {}
        tls = trusting(ca_file) or httpx.create_ssl_context()
        salt = salt_from_file(salt_file) if salt_file else new_salt()
        recorder = Recorder(journal, salt, keep_text=keep_text, flow=flow)
        if salt_file and recorder.journal.salt != salt:
            raise InputError(f"{journal}: begun with another salt than {salt_file} has: close it first, with -o alone")
        proxy = Proxy(routes, recorder, token=token, tls=tls)
        code = _recorded(proxy, address, command, bases)
    with closing(recorder or RecordJournal(journal, new_salt())):
        _close(journal, out, flow, recorder is not None and not recorder.next)
    sys.exit(code)


def _bases(routes: Sequence[Route]) -> dict[str, str]:
    """Where a command that is run finds each API: under the prefix that has its name, or the only one that fits."""
    plain = [one.prefix for one in routes if not one.header]
    bases = {}
    for name, tail in (("anthropic", ""), ("openai", "/v1")):
        named = [prefix for prefix in plain if name in prefix] or ([""] if "" in plain else plain)
        if len(named) != 1:
            raise InputError(f"--run: which --upstream is for {name.upper()}_BASE_URL? Name its prefix /{name}")
        bases[f"{name.upper()}_BASE_URL"] = named[0] + tail
    return bases


def _recorded(proxy: Proxy, address: tuple[str, int], command: tuple[str, ...], bases: dict[str, str]) -> int:
    """Record until the end; the exit code. The journal is still held then; one in which nothing stands is not left."""
    recorder = proxy.recorder
    if recorder.found:
        path = recorder.journal.path
        click.echo(f"going on with {path}: {recorder.found:,} records of a recorder that was stopped", err=True)
    try:
        code = asyncio.run(_serve(proxy, *address, command, bases))
    except InputError:
        if not recorder.next:
            recorder.journal.path.unlink()
        raise
    if recorder.lost:
        click.echo(f"keepwarm: {recorder.lost:,} calls were not recorded: {recorder.why_lost}", err=True)
    return code or (2 if recorder.lost else 0)


def _place(output: str) -> Path:
    """The file to write; in a directory a new one. InputError if it is there already."""
    path = Path(output)
    if path.is_dir() or output.endswith("/"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        left = sorted(path.glob("*.parquet.journal"))
        named = f"recorded-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.parquet"
        return left[0].with_suffix("") if left else path / named
    if path.exists() and not path.with_name(path.name + ".journal").exists():  # else its closing was cut off
        raise InputError(f"{output}: is there already: give another name, or a directory to add to")
    return path


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--listen {listen!r}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _token(name: str | None, host: str) -> str | None:
    """The token clients must show; InputError where one is needed and there is none."""
    if name is None:
        if host not in LOOPBACK:
            raise InputError(f"--listen {host}: anyone who reaches it could use it: set --token-env")
        return None
    token = os.environ.get(name, "")
    if not re.fullmatch(r"[\w.~-]+", token, re.ASCII):
        raise InputError(f"environment variable {name}: expected a token that fits in a URL: letters, digits, ._~-")
    return token


async def _serve(proxy: Proxy, host: str, port: int, command: tuple[str, ...], bases: dict[str, str]) -> int:
    """Serve until a signal, or the command's end; the exit code."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    if any(one.port == port and (one.host == host or {one.host, host} <= {*LOOPBACK}) for one in proxy.routes):
        raise InputError(f"upstream {host}:{port}: is this recorder itself")
    try:
        server = await loop.create_server(proxy.client, host, port, backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
    bound = server.sockets[0].getsockname()[1]
    shown = f"http://{f'[{host}]' if ':' in host else host}:{bound}"
    click.echo(f"keepwarm record: listening on {shown}", err=True)
    live = loop.create_task(_live(proxy.recorder)) if sys.stderr.isatty() and not command else None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    code = 0
    try:
        if command:
            base = f"{shown}/{proxy.token}" if proxy.token else shown
            code = await _run(command, {name: base + path for name, path in bases.items()}, stop)
        else:
            await stop.wait()
    finally:
        server.close()
    stop.clear()
    await _drained(proxy, stop)
    if live is not None:
        live.cancel()
        click.echo(err=True)
    for client in list(proxy.clients):
        client.transport.abort()
    await asyncio.sleep(0)
    await loop.run_in_executor(proxy.recorder.beside, int)  # requests still being taken apart
    await asyncio.sleep(0)
    return code


async def _run(command: tuple[str, ...], bases: dict[str, str], stop: asyncio.Event) -> int:
    """Run an agent to its end; a signal reaches most by itself, and is passed on a while later."""
    told = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = dict.fromkeys(("no_proxy", "NO_PROXY"), f"{told},127.0.0.1,localhost".strip(","))
    env = os.environ | direct | bases
    if Path(command[0]).name == "codex":  # it takes no base URL from the environment
        command = (command[0], "-c", f'openai_base_url="{bases["OPENAI_BASE_URL"]}"', *command[1:])
    try:
        child = await asyncio.create_subprocess_exec(*command, env=env)
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run: {error.strerror}") from error
    ended, asked = asyncio.ensure_future(child.wait()), asyncio.ensure_future(stop.wait())
    await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    for end in (child.terminate, child.kill):
        await asyncio.wait((ended,), timeout=PATIENCE_S)
        if not ended.done():
            end()
    code = await ended
    return code if code >= 0 else 128 - code


async def _drained(proxy: Proxy, stop: asyncio.Event) -> None:
    """Wait for answers under way, some time, or until asked again."""
    loop = asyncio.get_running_loop()
    until = loop.time() + GRACE_S
    if any(client.exchanges for client in proxy.clients):
        click.echo("finishing answers under way; once more to stop at once", err=True)
    while any(client.exchanges for client in proxy.clients) and not stop.is_set() and loop.time() < until:
        await asyncio.sleep(0.02)


async def _live(recorder: Recorder) -> None:
    while True:
        told = live_line(recorder)[: shutil.get_terminal_size().columns - 1]
        click.echo(f"\r\x1b[2K{told}", err=True, nl=False)
        await asyncio.sleep(LIVE_S)


def live_line(recorder: Recorder) -> str:
    """What there is so far, in one line."""
    rate = recorder.read / recorder.prompt if recorder.prompt else None
    parts = [f"{recorder.calls:,} calls", f"{recorder.threads.agents:,} agents"]
    parts.append("warm_hit_rate unknown" if rate is None else f"warm_hit_rate {rate:.2%}")
    if recorder.failed:
        parts.append(f"{recorder.failed:,} failed")
    if recorder.lost:
        parts.append(f"{recorder.lost:,} NOT RECORDED: {recorder.why_lost}")
    return " · ".join([*parts, f"last break: {recorder.broke or 'none'}"])


def _close(journal: Path, out: Path, flow: str | None, empty: bool) -> None:
    """Make the trace, for its owner's eyes, and destroy the journal with its salt."""
    if empty:
        journal.unlink()
        click.echo("no call was recorded: no trace is written", err=True)
        return
    before = os.umask(0o077)
    try:
        closed = close_journal(journal, str(out), version=version("keepwarm"), flow=flow)
    finally:
        os.umask(before)
    journal.unlink()
    unanswered = f"; {closed.unanswered:,} requests had no answer when it ended" if closed.unanswered else ""
    click.echo(f"{out}: {closed.sessions:,} sessions, {closed.calls:,} calls{unanswered}", err=True)
