"""Real engines for tests, on free ports: vLLM on the CPU, and Dynamo with mock workers. ``install.sh`` fetches them.

KEEPWARM_VLLM and KEEPWARM_DYNAMO name other places where they are. Without one its tests skip, and say what to run.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import randrange

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import served
from served import Engine

TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
"""What vLLM is to be told before it takes calls with tools."""


@contextmanager
def vllm(*flags: str, block: int = 32, blocks: int = 8193, length: int = 65_536) -> Iterator[Engine]:
    """vLLM, which takes a minute to start. It has one block less to give than ``blocks``. The test that asks skips
    where KEEPWARM_REAL does not say that there is time for it.
    """
    if not os.environ.get("KEEPWARM_REAL"):
        pytest.skip("NOT RUN AGAINST THE REAL VLLM, which takes minutes: run make test-real, or set KEEPWARM_REAL=1")
    venv = _place("vllm", "bin/vllm", "model1")
    with served.vllm(venv, _port(1), block=block, blocks=blocks, length=length, flags=[*TOOLS, *flags]) as engine:
        yield engine


@contextmanager
def dynamo(
    *flags: str,
    workers: int = 2,
    router_mode: str = "kv",
    block: int = 16,
    blocks: int = 8192,
    length: int = 65_536,
    speedup: float = 10.0,
) -> Iterator[Engine]:
    """Dynamo in all four dialects; its router is ``kv`` or ``round-robin``, for one. ``flags`` are the frontend's.

    The workers' own metrics are at the ports behind the frontend's.
    """
    venv, port = _place("dynamo", "bin/python", "model"), _port(1 + workers)
    shape = {"block": block, "blocks": blocks, "length": length, "workers": workers}
    told = [f"--router-mode={router_mode}", "--enable-anthropic-api", *flags]
    with served.dynamo(venv, port, **shape, speedup=speedup, flags=told) as engine:
        yield engine


def _place(name: str, *parts: str) -> Path:
    """Where an engine is. The test that asks skips if it is nowhere."""
    place = Path(os.environ.get(f"KEEPWARM_{name.upper()}") or Path(__file__).parent / ".cache" / name)
    if not all((place / part).exists() for part in parts):
        told = f"run tests/real/install.sh {name}, or set KEEPWARM_{name.upper()}"
        pytest.skip(f"NOT RUN AGAINST THE REAL {name.upper()}, which is not in {place}: {told}")
    return place


def _port(count: int) -> int:
    """The first of so many ports in a row that are free. Dynamo's workers take none above 32,767."""
    while True:
        port = randrange(20_000, 32_767 - count)
        try:
            for each in range(port, port + count):
                socket.create_server(("127.0.0.1", each)).close()
        except OSError:
            continue
        return port
