"""A recorder between a real agent and its scripted upstream, run as its users run it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

KEEPWARM = [sys.executable, "-m", "keepwarm.harness.cli"]


class Files(NamedTuple):
    """What a recorder writes, and the salt that it keeps."""

    trace: Path
    salt: Path

    @property
    def journal(self) -> Path:
        """Where it keeps what it saw until the trace is made."""
        return self.trace.with_name(self.trace.name + ".journal")

    def command(self, upstream: str) -> list[str]:
        """The command that records before that upstream."""
        return [*KEEPWARM, "record", "--upstream", upstream, "-o", str(self.trace), "--salt-file", str(self.salt)]


def files(root: Path) -> Files:
    """Names of a recorder's files in a directory."""
    return Files(root / "recorded.parquet", root / "salt")


@contextmanager
def recording(made: Files, upstream: str) -> Iterator[str]:
    """A recorder that listens at the address it gives; at the end it is interrupted, and makes its trace."""
    with subprocess.Popen(made.command(upstream), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        listening = re.search(r"http://\S+", process.stderr.readline())
        assert listening is not None
        try:
            yield listening[0]
        finally:
            process.send_signal(signal.SIGINT)
            told = process.stderr.read()
        assert process.wait() == 0, told
