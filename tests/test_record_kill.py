"""kill -9 on the recorder, under load and while it makes the trace: what clients have whole is never lost.

Twenty kills, or as many as KEEPWARM_KILLS says, at moments drawn with the seed KEEPWARM_SEED.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import orjson
import pytest
from recorders import answering, asked, closed, command, recording
from wire import CALL, LAST, PATIENCE_S, STREAM, Stage, asking, chunk, events, post, staged

from keepwarm.traces.identity import Identity
from keepwarm.traces.records import AnswerRecord, read_records
from keepwarm.traces.store import read_calls

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KEEPWARM_KILLS", "20"))
SEED = int(os.environ.get("KEEPWARM_SEED", "0")) or time.time_ns()
CLIENTS = 4
EACH_TRACE = 5
"""After so many kills a trace is made of the journal, and its making is killed too."""
IDENT = re.compile(rb"\r\nx-ident: (\S+)\r\n")


def upstream(sock: socket.socket) -> None:
    """Streams an answer to each call, under the id that its request names."""
    while data := asked(sock):
        told = IDENT.search(data)
        assert told is not None
        first, *more = events(f"msg_{told[1].decode()}")
        sock.sendall(STREAM + chunk(first))
        sock.sendall(b"".join(map(chunk, more)))
        sock.sendall(LAST)


class Load:
    """Agents that ask and ask until the recorder is gone. ``seen`` are the calls whose answers they have whole."""

    def __init__(self, port: int, name: str) -> None:
        self.seen: list[str] = []
        self.going = threading.Event()
        self._port = port
        self._threads = [threading.Thread(target=self._ask, args=(f"{name}-{at}", at)) for at in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, name: str, at: int) -> None:
        messages: list[dict[str, str]] = []
        number = 0
        try:
            with socket.create_connection(("127.0.0.1", self._port)) as sock:
                while True:
                    number += 1
                    messages.append({"role": "user", "content": f"{name} asks {number}"})
                    body = orjson.dumps(CALL | {"messages": messages[-20:], "tools": [{"name": "Bash"}]})
                    ident = f"{name}-{number}"
                    sock.sendall(post(body, f"x-claude-code-session-id: s{at}", f"x-ident: {ident}"))
                    got = b""
                    while not got.endswith(LAST):
                        more = sock.recv(1 << 16)
                        if not more:
                            return
                        got += more
                    self.seen.append(ident)
                    self.going.set()
        except OSError:
            return

    def join(self) -> list[str]:
        """What was seen, when nobody asks any more."""
        for thread in self._threads:
            thread.join()
        return self.seen


def kill_under_load(options: list[object], moment: Random, name: str) -> list[str]:
    """Start a recorder, load it, kill it; the calls that were seen whole."""
    with recording(*options) as recorder:
        load = Load(int(recorder.url.rpartition(":")[2]), name)
        assert load.going.wait(30)
        time.sleep(moment.uniform(0, 0.15))
        recorder.process.kill()
        seen = load.join()
        assert recorder.ended() == -9
    return seen


def kill_while_closing(out: Path, moment: Random) -> None:
    """Start to make the trace, and kill that: at some moment, or as soon as one of its files is there."""
    part = out.with_name(out.name + ".part")
    until = time.monotonic() + moment.uniform(0.2, 0.5)
    ways: list[Callable[[], bool]] = [lambda: time.monotonic() > until, part.exists, out.exists]
    way = moment.choice(ways)
    with subprocess.Popen(command("-o", out), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not way():
            pass
        process.kill()


def missing(seen: list[str], found: set[str | None], identity: Identity) -> list[str]:
    """The calls that a client has whole and the recorder has not."""
    return [ident for ident in seen if identity.name("call", f"msg_{ident}") not in found]


def test_kill_9_at_any_moment_loses_no_call_that_its_client_has_whole(tmp_path: Path) -> None:
    """Every journal and every trace is readable, and the same command goes on with what is there."""
    print(f"KEEPWARM_SEED={SEED}", file=sys.stderr)
    moment, salt = Random(SEED), tmp_path / "salt"
    total = 0
    with answering(upstream) as port:
        for trace in range(-(-KILLS // EACH_TRACE)):
            out = tmp_path / f"t{trace}.parquet"
            journal = out.with_name(out.name + ".journal")
            options = ["--upstream", f"http://127.0.0.1:{port}", "-o", out, "--salt-file", salt]
            seen: list[str] = []
            for kill in range(min(EACH_TRACE, KILLS - trace * EACH_TRACE)):
                seen += kill_under_load(options, moment, f"{trace}-{kill}")
                identity = Identity(salt.read_bytes())
                records = [one for one in read_records(journal) if isinstance(one, AnswerRecord)]
                whole = {one.call for one in records if one.error is None and one.usage is not None}
                assert missing(seen, whole, identity) == []
            kill_while_closing(out, moment)
            if journal.exists():
                done = closed("-o", out)
                assert done.returncode == 0, done.stderr
            calls = list(read_calls(str(out)))
            assert missing(seen, {one.call for one in calls if one.error is None}, identity) == []
            assert len({one.call for one in calls}) == len(calls)
            assert not journal.exists()
            total += len(seen)
    print(f"{KILLS} kills, {total} calls seen whole, none lost", file=sys.stderr)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".parquet", ""}


@pytest.mark.parametrize("cut", [1, 2, 30, 300])
def test_a_record_that_was_cut_is_none(tmp_path: Path, cut: int) -> None:
    """The machine stopped within a write: what stands before it is whole, and what comes goes on after it."""
    out, salt = tmp_path / "t.parquet", tmp_path / "salt"
    journal = tmp_path / "t.parquet.journal"
    with answering(upstream) as port:
        options = ["--upstream", f"http://127.0.0.1:{port}", "-o", out, "--salt-file", salt]
        first = kill_under_load(options, Random(cut), "first")
        journal.write_bytes(journal.read_bytes()[:-cut])
        assert len(list(read_records(journal))) > 1
        second = kill_under_load(options, Random(cut), "second")
    assert closed("-o", out).returncode == 0
    found = {one.call for one in read_calls(str(out))}
    identity = Identity(salt.read_bytes())
    assert len(missing(first, found, identity)) <= 2
    assert missing(second, found, identity) == []


def test_a_journal_keeps_its_salt(tmp_path: Path) -> None:
    """To go on with it under another one is refused: an import with that would agree with nothing."""
    out, salt = tmp_path / "t.parquet", tmp_path / "salt"
    with answering(upstream) as port:
        options: list[object] = ["--upstream", f"http://127.0.0.1:{port}", "-o", out]
        seen = kill_under_load(options, Random(1), "salted")
        told = closed(*options, "--salt-file", salt)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "another salt" in told.stderr
    assert closed("-o", out).returncode == 0
    assert len(list(read_calls(str(out)))) >= len(seen)


def test_an_empty_journal_is_closed_and_gone_on_with(tmp_path: Path) -> None:
    """Killed before it wrote its first line."""
    out = tmp_path / "t.parquet"
    journal = tmp_path / "t.parquet.journal"
    journal.touch()
    done = closed("-o", out)
    assert done.returncode == 0, done.stderr
    assert list(read_calls(str(out))) == []
    assert not journal.exists()


def test_a_request_is_on_disk_while_its_answer_is_awaited(tmp_path: Path) -> None:
    """A recorder that is killed then still knows that it was asked."""

    async def play(stage: Stage) -> None:
        line = await stage.line()
        await line.ask(asking())
        while not stage.records():
            await asyncio.sleep(0.01)
        assert len(stage.records()) == 1

    with staged(tmp_path) as stage:
        stage.run(asyncio.wait_for(play(stage), PATIENCE_S))
