"""Scenes that the real Claude Code plays, offline, in one home and project, and what the upstream answered in each."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from real.upstream import Answered, Reply, Request, Script, Upstream, Usage, steps, text, use

SETTINGS = ["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_TELEMETRY", "DISABLE_AUTOUPDATER", "IS_SANDBOX"]
SECRET = "quokka"
"""A word in the user's name, paths, prompts, files and tool output: nothing of it may reach a trace."""


def binary() -> str | None:
    """The client: KEEPWARM_CLAUDE, one on the PATH, or what install.sh fetched; None if there is none."""
    cached = (Path(__file__).parent / ".cache/node_modules/@anthropic-ai").glob("claude-code-*/claude")
    places = [os.environ.get("KEEPWARM_CLAUDE"), shutil.which("claude"), *map(str, cached)]
    return next((place for place in places if place and Path(place).is_file()), None)


BINARY = binary()


class Scene(NamedTuple):
    """One run of the client: its session id, its exit code, and the calls that the upstream answered meanwhile."""

    session: str
    code: int
    answered: list[Answered]

    def outputs(self, agent: str | None = None) -> list[int]:
        """The output counts by which the whole answers to the main agent, or to a sub-agent, are known."""
        return [a.reply.usage.output for a in self.answered if a.reply.status == 200 and a.request.agent == agent]

    @property
    def agents(self) -> list[str]:
        """The ids of its sub-agents, in the order of their first calls."""
        return list(dict.fromkeys(a.request.agent for a in self.answered if a.request.agent))


class Stage:
    """A home, a project and an upstream, in which scenes are played one after the other.

    The client calls ``url``, by default the upstream's own; ``before`` is the command that is to start it.
    """

    def __init__(self, root: Path, upstream: Upstream, url: str | None = None, before: Sequence[str] = ()) -> None:
        self.home, self.project, self.upstream = root / f"{SECRET}-home", root / f"{SECRET}-project", upstream
        self.url, self.before = url or upstream.url, before
        self.home.mkdir()
        self.project.mkdir()
        (self.project / "notes.txt").write_text(f"{SECRET} file\n" * 5)
        self._numbers = itertools.count(101)
        self._left: dict[tuple[str, str | None, str], int] = {}

    def play(self, script: Script, asked: str, *options: str) -> Scene:
        """Run the client once on a script, to its end."""
        first = len(self.upstream.answered)
        self.upstream.play(lambda request: self._accounted(request, script(request)))
        settings = dict.fromkeys(SETTINGS, "1")
        keys = {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": "dummy", "USER": SECRET}
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home)} | settings | keys
        tools = ["--permission-mode", "acceptEdits", "--allowedTools", "Bash,Read,Agent,SendMessage"]
        command = [*self.before, str(BINARY), "-p", asked, *options, *tools, "--output-format", "json"]
        done = subprocess.run(
            command, cwd=self.project, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        return Scene(orjson.loads(done.stdout)["session_id"], done.returncode, self.upstream.answered[first:])

    def _accounted(self, request: Request, reply: Reply) -> Reply:
        """The reply with an account like a managed API's: what the last call left is read, the rest written."""
        if reply.status != 200:
            return reply
        key = request.session, request.agent, request.body["model"]
        prompt = (9000 if request.agent else 20000) + 500 * len(request.body["messages"])
        read = self._left.get(key, 0)
        read = read if read < prompt else 15000
        hour = min(200, prompt - 3 - read) if read else prompt - 103
        self._left[key] = prompt - 3
        usage = Usage(3, read, prompt - 3 - read - hour, hour, next(self._numbers))
        return reply._replace(usage=usage)


def bash(command: str) -> Reply:
    """A reply that asks for a command."""
    return Reply([use("Bash", command=command, description=f"{SECRET} command")])


def says(words: str) -> Reply:
    """A reply that ends the turn."""
    return Reply([text(words)])


def spawns(*agents: tuple[str, str], **more: Any) -> Reply:
    """A reply that starts sub-agents, told by type and prompt."""
    uses = [use("Agent", description="help", prompt=prompt, subagent_type=kind, **more) for kind, prompt in agents]
    return Reply([text("I'll get help."), *uses])


def _reads(stage: Stage) -> Reply:
    return Reply([use("Read", file_path=str(stage.project / "notes.txt"))])


def _fan_out(stage: Stage) -> Scene:
    work = [bash("sleep 0.2"), _reads(stage), says("Found.")]
    main = [spawns(("general-purpose", "Look left"), ("Explore", "Look right")), bash("sleep 0.3"), _reads(stage)]
    return stage.play(steps([*main, says("Done.")], work), f"list the {SECRET} files")


def _overloaded(stage: Stage) -> Scene:
    main = [Reply(status=529, error="overloaded_error"), says("At last.")]
    return stage.play(steps(main), "a busy hour")


def _refused(stage: Stage) -> Scene:
    return stage.play(steps([bash("echo"), Reply(status=400, error="invalid_request_error")]), "a bad request")


def _behind(stage: Stage) -> Scene:
    """A background agent ends while the main agent is at a tool, another one when its turn is over."""
    main = [spawns(("general-purpose", "Work behind"), run_in_background=True), bash("sleep 1.2")]
    return stage.play(steps([*main, says("Meanwhile.")], [bash("sleep 0.3"), says("Found.")]), "in the background")


def _outlives(stage: Stage) -> Scene:
    main = [spawns(("general-purpose", "Work longer"), run_in_background=True), says("Turn over."), says("Noted.")]
    return stage.play(steps(main, [bash("sleep 0.8"), says("Found.")]), "and leave it running")


def _messaged(stage: Stage) -> Scene:
    """A sub-agent that has finished is sent on by a message."""
    agents: list[str] = []

    def script(request: Request) -> Reply:
        if request.agent:
            agents.append(request.agent)
            return says("Found.")
        main = [spawns(("general-purpose", "Help")), None, bash("sleep 0.8"), says("Done.")]
        sent = use("SendMessage", to=agents[0], message="go on", summary="go on") if agents else None
        return Reply([sent]) if request.nth == 1 else main[request.nth]

    return stage.play(script, "and then more")


def _nested(stage: Stage) -> Scene:
    def script(request: Request) -> Reply:
        if request.agent is None:
            return spawns(("general-purpose", "Outer work")) if request.nth == 0 else says("Done.")
        if "Outer work" not in str(request.body["messages"][0]):
            return says("Inner done.")
        return spawns(("Explore", "Inner work")) if request.nth == 0 else says("Outer done.")

    return stage.play(script, "in depth")


def all_scenes(stage: Stage) -> dict[str, Scene]:
    one = steps([bash("echo"), says("Done.")])
    first = stage.play(one, "first question")
    again = "--resume", first.session
    return {
        "fan_out": _fan_out(stage),
        "first": first,
        "resumed": stage.play(one, "second question", *again),
        "forked": stage.play(one, "another way", *again, "--fork-session"),
        "went_on": stage.play(one, "third question", *again),
        "continued": stage.play(steps([says("Done.")]), "fourth question", "--continue"),
        "compacted": stage.play(steps([says("<summary>All of it.</summary>")]), "/compact", *again),
        "after": stage.play(one, "fifth question", *again),
        "switched": stage.play(one, "sixth question", *again, "--model", "claude-sonnet-4-6"),
        "overloaded": _overloaded(stage),
        "refused": _refused(stage),
        "behind": _behind(stage),
        "outlives": _outlives(stage),
        "messaged": _messaged(stage),
        "nested": _nested(stage),
    }
