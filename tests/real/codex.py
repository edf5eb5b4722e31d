"""Scenes that the real Codex plays, offline, in one home and project, and what the upstream answered in each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
from real.responses import Answered, Reply, Request, Script, Upstream, says, steps, thinks, use
from real.scenes import SECRET


def binary() -> str | None:
    """The client: KEEPWARM_CODEX, one on the PATH, or what install.sh fetched; None if there is none."""
    cached = (Path(__file__).parent / ".cache/codex/node_modules/@openai").glob("codex-*/vendor/*/bin/codex")
    places = [os.environ.get("KEEPWARM_CODEX"), shutil.which("codex"), *map(str, cached)]
    return next((place for place in places if place and Path(place).is_file()), None)


BINARY = binary()
LIMIT = 12_000
"""Tokens of prompt from which a scene compacts; a first prompt has some 9,700."""


class Scene(NamedTuple):
    """One run of the client: its session id, its exit code, and the calls that the upstream answered meanwhile."""

    session: str
    code: int
    answered: list[Answered]

    def outputs(self, agent: str | None = None) -> list[int]:
        """The output counts by which the whole answers to the main agent, or to a sub-agent, are known."""
        return [a.reply.usage.output for a in self.answered if a.reply.usage and a.whole and a.request.agent == agent]

    @property
    def agents(self) -> list[str]:
        """The threads of its sub-agents, in the order of their first calls."""
        return list(dict.fromkeys(a.request.agent for a in self.answered if a.request.agent))


class Stage:
    """A home, a project and an upstream, in which scenes are played one after the other.

    The client calls ``url``, by default the upstream's own; it posts to ``url`` + ``/v1/responses``. ``before`` is the
    command that is to start it, and to tell it where to call.
    """

    def __init__(self, root: Path, upstream: Upstream, url: str | None = None, before: Sequence[str] = ()) -> None:
        self.home, self.project, self.upstream = root / f"{SECRET}-home", root / f"{SECRET}-project", upstream
        self.url, self.before = url or upstream.url, before
        (self.home / ".codex").mkdir(parents=True)
        self.project.mkdir()
        (self.project / "notes.txt").write_text(f"{SECRET} file\n" * 5)

    def play(self, script: Script, asked: str, *options: str, builtin: bool = False, resume: str = "") -> Scene:
        """Run the client once on a script, to its end; as its own provider, it asks for a WebSocket first."""
        first = len(self.upstream.answered)
        self.upstream.play(script)
        again = ["resume", resume] if resume else []
        command = [str(BINARY), "exec", *again, "--json", "--skip-git-repo-check", *self._provider(builtin), *options]
        keys = {
            "HOME": str(self.home),
            "CODEX_HOME": str(self.home / ".codex"),
            "USER": SECRET,
            "CODEX_API_KEY": "dummy",
        }
        done = subprocess.run(
            [*self.before, *command, asked],
            cwd=self.project,
            env={"PATH": os.environ["PATH"]} | keys,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        started = orjson.loads(done.stdout.partition(b"\n")[0])
        return Scene(started["thread_id"], done.returncode, self.upstream.answered[first:])

    def rollouts(self) -> list[Path]:
        """The transcripts that the client has written, one a thread."""
        return sorted((self.home / ".codex/sessions").rglob("rollout-*.jsonl"))

    def _provider(self, builtin: bool) -> list[str]:
        """Options that send the client to the url: by the built-in provider, or by one that knows no WebSocket."""
        base = f'"{self.url}/v1"'
        if builtin:
            return [] if self.before else ["-c", f"openai_base_url={base}"]
        told = f'{{name="{SECRET}",base_url={base},wire_api="responses",env_key="CODEX_API_KEY"}}'
        return ["-c", "model_provider=stage", "-c", f"model_providers.stage={told}", "-m", "any"]


def shell(command: str) -> Reply:
    """A reply that thinks, and asks for a command."""
    return Reply([thinks(f"{SECRET} thought"), use("exec_command", cmd=command)])


def tells(words: str) -> Reply:
    """A reply that ends the turn."""
    return Reply([says(words)])


def _team(spawned: Reply, waits: Callable[[Request], Reply | None]) -> Script:
    """A main agent that starts sub-agents, waits until nothing is left to wait for and ends; each of them works."""
    work = [shell(f"sleep 0.2; cat notes.txt; echo {SECRET}"), tells(f"Found a {SECRET}.")]
    main = [shell("cat notes.txt"), spawned]

    def script(request: Request) -> Reply:
        replies = work if request.agent else main
        if request.nth < len(replies):
            return replies[request.nth]
        return waits(request) or tells("Done.")

    return script


def _fan_out(stage: Stage) -> Scene:
    """Two sub-agents of blank history; the main agent is told their threads, and waits for one after the other."""
    tools = "multi_agent_v1"
    spawned = Reply([says("Help."), *(use("spawn_agent", tools, message=f"Look {way}") for way in ("left", "right"))])

    def waits(request: Request) -> Reply | None:
        told = [str(item.get("output", "")) for item in request.body["input"]]
        agents = [orjson.loads(output)["agent_id"] for output in told if "agent_id" in output]
        left = agents[request.nth - 2 :]
        return Reply([use("wait_agent", tools, targets=left[:1], timeout_ms=10_000)]) if left else None

    return stage.play(_team(spawned, waits), f"list the {SECRET} files")


def _forked(stage: Stage) -> Scene:
    """Two sub-agents that go on from the main agent's history, by the newer set of tools."""
    tools = "collaboration"
    spawned = Reply(
        [use("spawn_agent", tools, task_name=f"{SECRET}_{way}", message="Look") for way in ("left", "right")]
    )

    def waits(request: Request) -> Reply | None:
        found = [item for item in request.body["input"] if item["type"] == "agent_message"]
        return Reply([use("wait_agent", tools, timeout_ms=10_000)]) if len(found) < 2 else None

    return stage.play(_team(spawned, waits), "with all you know", "-c", "features.multi_agent_v2=true")


def _compacted(stage: Stage, builtin: bool, resume: str = "") -> Scene:
    """A long tool output fills the window; the client has its history summed up, and goes on."""
    summary = Reply([{"type": "compaction", "encrypted_content": "c3VtbWVk"}]) if builtin else tells(f"{SECRET}: all.")
    script = steps([shell("seq 1 4000"), shell("echo"), tells("Done.")], summary=summary)
    options = ["-c", f"model_auto_compact_token_limit={LIMIT}", *(["-m", "gpt-5.5"] if builtin else [])]
    return stage.play(script, "a long story", *options, builtin=builtin, resume=resume)


def all_scenes(stage: Stage) -> dict[str, Scene]:
    """Every scene, by name, in the order played."""
    first = stage.play(steps([shell("echo"), tells("Done.")]), "first question")
    return {
        "plain": first,
        "resumed": stage.play(steps([tells("Done.")]), "second question", resume=first.session),
        "fan_out": _fan_out(stage),
        "forked": _forked(stage),
        "compacted": _compacted(stage, builtin=False, resume=first.session),
        "sealed": _compacted(stage, builtin=True),
        "overloaded": stage.play(steps([Reply(status=529), tells("At last.")]), "a busy hour"),
        "dropped": stage.play(steps([shell("echo")._replace(cut=True), tells("Again.")]), "a bad line"),
        "refused": stage.play(steps([shell("echo"), Reply(status=400)]), "a bad request"),
    }
