"""Real engines as processes on this machine: vLLM on the CPU, and NVIDIA Dynamo with its KV router and mock workers."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
VLLM = OFFLINE | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
VLLM |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
VLLM |= {"VLLM_SERVER_DEV_MODE": "1"}  # lets its cache be reset
LOCAL = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_SYSTEM_HOST")
DYNAMO = OFFLINE | dict.fromkeys(LOCAL, "127.0.0.1") | {"DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "tcp"}
DYNAMO |= {"DYN_EVENT_PLANE": "zmq", "DYN_LOG": os.environ.get("DYN_LOG", "warn")}


class Engine(NamedTuple):
    """A running engine: where it answers, and the name of its model."""

    url: str
    model: str


class Heard(NamedTuple):
    """What an engine said of a call: prompt tokens, those it had cached, the answer's tokens, and who answered."""

    prompt: int
    cached: int
    answer: list[int]
    worker: str


@contextmanager
def vllm(venv: Path, port: int, *, block: int, blocks: int, length: int, flags: list[str]) -> Iterator[Engine]:
    """vLLM with one worker; the model lies in VENV/model1."""
    command = [venv / "bin/vllm", "serve", venv / "model1", "--served-model-name=tiny", "--host=127.0.0.1"]
    command += [f"--port={port}", f"--max-model-len={length}", f"--block-size={block}", "--max-num-seqs=16"]
    command += [f"--num-gpu-blocks-override={blocks}", "--max-num-batched-tokens=4096", "--dtype=bfloat16"]
    command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--enforce-eager", *flags]
    with _running([(command, VLLM)], venv, port) as ready:
        yield ready(Engine(f"http://127.0.0.1:{port}", "tiny"))


@contextmanager
def dynamo(
    venv: Path,
    port: int,
    *,
    block: int,
    blocks: int,
    length: int,
    workers: int,
    speedup: float,
    flags: list[str],
    replies: Path | None = None,
) -> Iterator[Engine]:
    """Dynamo's frontend and mock workers; the model lies in VENV/model. ``flags`` are the frontend's. The workers give
    the answers of the file ``replies`` to calls that name them, else random ones that their cache does not know.
    """
    python = venv / "bin/python"
    with TemporaryDirectory() as known:
        env = DYNAMO | {"DYN_FILE_KV": known}
        front = [python, "-m", "dynamo.frontend", "--http-host=127.0.0.1", f"--http-port={port}", "--router-mode=kv"]
        front.append(f"--router-min-initial-workers={workers}")
        mock = [python, "-m", "dynamo.mocker", "--model-path", venv / "model", "--model-name=tiny"]
        mock += [f"--block-size={block}", f"--num-gpu-blocks-override={blocks}", f"--max-model-len={length}"]
        mock += ["--kv-bytes-per-token=114688", f"--speedup-ratio={speedup}"]
        mock += ["--max-num-seqs=16", "--max-num-batched-tokens=4096"]
        mock += ["--response-replay-trace-path", replies] if replies else []
        ports = range(port + 1, port + 1 + workers)
        mocks = [(mock, env | {"DYN_SYSTEM_PORT": str(each)}) for each in ports]
        with _running([([*front, *flags], env), *mocks], venv, port) as ready:
            yield ready(Engine(f"http://127.0.0.1:{port}", "tiny"))


async def ask(
    client: httpx.AsyncClient, engine: Engine, prompt: list[int], output: int, reply: str | None = None
) -> Heard:
    """One call by token ids, answered with exactly so many tokens: those that are known as ``reply``."""
    body: dict[str, Any] = {"model": engine.model, "prompt": prompt, "max_tokens": output, "ignore_eos": True}
    if client.headers.get("x-engine") == "dynamo":
        body["nvext"] = {"extra_fields": ["worker_id", "completion_token_ids"]}
        body["nvext"]["annotations"] = [f"output_replay_id:{reply}"] if reply else []
    else:
        body["return_token_ids"] = True
    response = await client.post(f"{engine.url}/v1/completions", json=body)
    assert response.status_code == 200, response.text[:500]
    said = response.json()
    extra, usage = said.get("nvext") or {}, said["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    answer = extra.get("completion_token_ids") or said["choices"][0].get("token_ids") or []
    worker = (extra.get("worker_id") or {}).get("decode_worker_id", 0)
    return Heard(usage["prompt_tokens"], cached, answer, str(worker))


@contextmanager
def _running(
    commands: list[tuple[list[Any], dict[str, str]]], venv: Path, port: int
) -> Iterator[Callable[[Engine], Engine]]:
    """The commands as processes, ended together, with what they say in VENV/engine*.log; what waits for them."""
    started: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        for number, (command, env) in enumerate(commands):
            path = venv / f"engine-{port}-{number}.log"
            with path.open("wb") as log:
                texts = [str(part) for part in command]
                started[path] = subprocess.Popen(texts, stdout=log, stderr=log, env=os.environ | env)
        yield partial(_ready, started=started)
    finally:
        for process in reversed(started.values()):
            process.terminate()
        for process in started.values():
            process.wait(60)


def _ready(engine: Engine, started: Mapping[Path, subprocess.Popen[bytes]]) -> Engine:
    """The engine, once it lists its model."""
    for _ in range(600):
        ended = [path for path, process in started.items() if process.poll() is not None]
        if ended:
            raise ChildProcessError(f"{ended[0]} ends with:\n{ended[0].read_text('utf-8', 'replace')[-2000:]}")
        try:
            models = httpx.get(f"{engine.url}/v1/models", trust_env=False).json()["data"]
        except (httpx.TransportError, ValueError, KeyError):
            models = []
        if models:
            return engine
        time.sleep(0.5)
    raise TimeoutError(f"{engine.url} lists no model")
