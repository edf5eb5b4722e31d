"""A run in shards: the same replayer in many processes, here or as Ray actors, each with its part of the sessions.

All have one zero of time. Each writes its own outcomes, which are merged in the end; what a lost one had not written
comes out as interrupted.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from socket import create_connection
from tempfile import TemporaryDirectory
from threading import Thread
from time import time_ns
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from keepwarm.harness.asking import Asking
from keepwarm.harness.planned import Planned
from keepwarm.harness.sending import Came, Counts, Sending, made_ready, send_all
from keepwarm.replayers.address import trusting
from keepwarm.replayers.replay import Replay
from keepwarm.replayers.run import under_way
from keepwarm.traces.columns import outcomes_to_batch
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import KEPT, OUTCOMES, completed_but, written
from keepwarm.traces.model import NOT_ANSWERED, Outcome
from keepwarm.traces.place import first_line
from keepwarm.traces.store import ROWS_PER_BATCH, read_outcome_table, write_batches

RAY_S = 5.0
LEAD_NS = 200_000_000
"""All begin so long after the last is ready."""
LOST = NOT_ANSWERED[1]


class Shard:
    """One part of a run, made ready in a process of its own. ``ca`` is what TLS trusts, which cannot be passed on."""

    def __init__(self, planned: Planned, asking: Asking, sending: Sending, ca: str | None) -> None:
        address = asking.address._replace(tls=trusting(ca))
        self._what = planned, asking._replace(address=address), sending
        self._ready = made_ready(planned, sending)
        self._replay: Replay | None = None
        self._stopped = False

    def run(self, at_ns: int, path: Path) -> Came:
        """Send its calls from this time of day on, the outcomes into a directory."""
        path.mkdir(parents=True, exist_ok=True)
        with under_way(path):
            return send_all(path, *self._what, ready=self._ready, at_ns=at_ns, begun=self._begun)

    def stop(self) -> None:
        """Interrupt it, while it runs in another thread or before."""
        self._stopped = True
        if self._replay is not None:
            self._replay.stop()

    def _begun(self, replay: Replay) -> None:
        self._replay = replay
        if self._stopped:
            replay.stop()

    def run_away(self, at_ns: int) -> tuple[Came, bytes]:
        """The same where the directory would be another machine's: its outcomes as a file's bytes."""
        with TemporaryDirectory(prefix="keepwarm-") as scratch:
            came = self.run(at_ns, Path(scratch))
            return came, (Path(scratch) / OUTCOMES).read_bytes()


def part(planned: Planned, number: int, of: int) -> Planned:
    """One of so many parts of a plan."""
    mine = copy(planned)
    mine.shard = number, of
    return mine


Parts = tuple[Planned, Asking, Sending, str | None]
"""What a shard is made of."""


def parts(planned: Planned, asking: Asking, sending: Sending, ca: str | None, of: int) -> list[Parts]:
    """What each of so many shards is made of."""
    away = asking._replace(address=asking.address._replace(tls=None))
    return [(part(planned, number, of), away, sending.part(number, of), ca) for number in range(of)]


def _work(pipe: Any, path: Path, *made_of: Any) -> None:
    """A process of its own, until it is done, told to stop, or left alone."""
    shard = Shard(*made_of)
    pipe.send(True)
    with suppress(EOFError, OSError):
        at_ns = pipe.recv()
        Thread(target=_stopped, args=(pipe, shard), daemon=True).start()
        pipe.send(shard.run(at_ns, path))


def _stopped(pipe: Any, shard: Shard) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()
    shard.stop()


def in_processes(path: Path, made_of: Sequence[Parts]) -> list[Came | None]:
    """Send by so many processes; what came of each, None of one that was lost. An interrupt is passed on to them, and
    they tell what they have.
    """
    context = get_context("spawn")
    pipes, theirs = zip(*(context.Pipe() for _ in made_of), strict=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # theirs for good: a terminal interrupts them too
    try:
        for number, (their, each) in enumerate(zip(theirs, made_of, strict=True)):
            context.Process(target=_work, args=(their, path / f"shard-{number}", *each), daemon=True).start()
            their.close()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    ready = [_told(pipe) for pipe in pipes]
    at_ns = time_ns() + LEAD_NS
    for pipe, is_ready in zip(pipes, ready, strict=True):
        if is_ready:
            pipe.send(at_ns)
    return [_passing_on(pipe, pipes) for pipe in pipes]


def _told(pipe: Any) -> Any:
    with suppress(EOFError, OSError):
        return pipe.recv()


def _passing_on(pipe: Any, pipes: Sequence[Any]) -> Any:
    """What a process tells in the end. An interrupt meanwhile stops all."""
    while True:
        try:
            return _told(pipe)
        except KeyboardInterrupt:
            for each in pipes:
                with suppress(OSError):
                    each.send(None)


def in_ray(path: Path, made_of: Sequence[Parts], address: str) -> list[Came | None]:
    """Send by so many Ray actors; what came of each, None of one that was lost."""
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise InputError("--ray needs the extra: pip install 'keepwarm[ray]'") from error
    where = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if where.port is not None:
            create_connection((where.hostname, where.port), RAY_S).close()  # Ray itself tries for minutes
        ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError) as error:
        raise InputError(f"--ray {address}: no Ray cluster answers there: {first_line(error)}") from error
    if len(made_of) > (cores := ray.cluster_resources().get("CPU", 0)):
        ray.shutdown()
        raise InputError(f"--processes {len(made_of)}: the Ray cluster at {address} has {cores:g} CPUs, one for each")
    made = ray.remote(num_cpus=1, max_restarts=0, max_concurrency=2)(Shard)
    actors = [made.remote(*each) for each in made_of]

    def got(ref: Any) -> Any:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError:
            return None
        except KeyboardInterrupt:
            for actor in actors:
                actor.stop.remote()
            return got(ref)

    try:
        ready = [got(actor.__ray_ready__.remote()) for actor in actors]
        at_ns = time_ns() + LEAD_NS
        refs = [there and actor.run_away.remote(at_ns) for actor, there in zip(actors, ready, strict=True)]
        came: list[Came | None] = []
        for number, ref in enumerate(refs):
            told = got(ref) if ref is not None else None
            if told is not None:
                (path / f"shard-{number}").mkdir()
                (path / f"shard-{number}" / OUTCOMES).write_bytes(told[1])
            came.append(told and told[0])
    finally:
        ray.shutdown()
    return came


def gather(path: Path, planned: Planned, model: str, came: list[Came | None]) -> Came:
    """Make one run of its shards: their rows, and those of calls that a lost one had not written."""
    whole = Came(Counts(), False, [])

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal whole
        if (path / KEPT).exists():
            yield from read_outcome_table(str(path / KEPT)).to_batches()
        for number, told in enumerate(came):
            shard = path / f"shard-{number}"
            if told is not None:
                yield from read_outcome_table(str(shard / OUTCOMES)).to_batches()
                whole += told
                continue
            found, mine = written(shard), part(planned, number, len(came))
            missing = list(_missing(mine, found, model))
            failed = found.filter(pc.is_valid(found.column("error"))).select(["session", "copy"]).to_pylist()
            broken = {(row["session"], row["copy"]) for row in failed} | {(o.call.session, o.copy) for o in missing}
            yield from (found if mine.window else completed_but(found, broken)).to_batches()
            for at in range(0, len(missing), ROWS_PER_BATCH):
                yield outcomes_to_batch(missing[at : at + ROWS_PER_BATCH])
            errors = Counts(zip(*(found.column(name).to_pylist() for name in ("phase", "error")), strict=True))
            whole += Came(errors + Counts({(None, LOST): len(missing)}), True, [], lost=1)

    write_batches(str(path / OUTCOMES), batches())
    (path / KEPT).unlink(missing_ok=True)
    for number in range(len(came)):
        rmtree(path / f"shard-{number}", ignore_errors=True)
    return whole


def _missing(mine: Planned, found: pa.Table, model: str) -> Iterator[Outcome]:
    """What a lost process had not written of the calls that were planned, where a number was."""
    known = set(zip(*(found.column(name).to_pylist() for name in ("call", "copy")), strict=True))
    for arrival in () if mine.window else mine.arrivals():
        for call in arrival.calls:
            if (call.call, arrival.copy) not in known:
                yield Outcome(call, arrival.copy, endpoint=model, error=LOST, completed=False)
