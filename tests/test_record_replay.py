"""A recording is a trace like any other: it replays as it was, and every command reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dialects import Result, Said, Tokens, Turn, Use, assistant, request, user
from recording import Asked, Recording, Reply, proxied, recording, says
from serving import cluster as simulated
from serving import running

from keepwarm.harness.cli import main
from keepwarm.harness.recorder import Recorder
from keepwarm.harness.serve import create_app
from keepwarm.traces.identity import new_salt
from keepwarm.traces.model import Call, Segment
from keepwarm.traces.recorded import close_journal
from keepwarm.traces.store import read_calls, read_outcome_table

TOOLS = "Bash", "Read", "Agent", "Grep"


def size(piece: Any) -> int:
    """The tokens of a piece of a prompt, by the scripted upstream's count."""
    return len(json.dumps(piece)) // 3


class Provider:
    """An upstream with an endless cache: it counts the prompt piece by piece, and has read what it has seen."""

    def __init__(self, dialect: str = "messages") -> None:
        self.dialect = dialect
        self.prompts: list[list[Any]] = []
        self.reads: list[int] = []
        self._said: dict[str, Said] = {}

    def script(self, asked: Asked) -> Reply:
        """Answer what was to be said, with the account."""
        body = asked.json()
        prompt = [*body["tools"], body["system"], *(one for m in body["messages"] for one in m["content"])]
        read = max((self._alike(prompt, other) for other in self.prompts), default=0)
        self.prompts.append(prompt)
        self.reads.append(read)
        tokens = Tokens(sum(map(size, prompt)), len(self.prompts) + 10, read, sum(map(size, prompt)) - read)
        return says(self.dialect, Said(self._said.pop(asked.headers["x-test-number"]).said, tokens), stream=True)

    @staticmethod
    def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
        shared = 0
        for mine, its in zip(one, other, strict=False):
            if mine != its:
                break
            shared += size(mine)
        return shared

    def ask(
        self, made: Recording, turns: Sequence[Turn], *said: str | Use, agent: str = "", system: str = "Lead."
    ) -> None:
        """Ask as Claude Code does, and be answered with ``said``."""
        number = str(len(self.prompts))
        self._said[number] = Said(said)
        headers = {
            "x-claude-code-session-id": "s",
            "x-test-number": number,
            "user-agent": "claude-cli/2 (external, cli)",
        }
        headers |= {"x-claude-code-agent-id": agent} if agent else {}
        made.ask(self.dialect, request(self.dialect, turns, system=system, tools=TOOLS, stream=True), headers)


class Played(NamedTuple):
    """A recorded conversation: where its trace is, its calls in order, and the upstream that it was had with."""

    path: Path
    calls: list[Call]
    provider: Provider


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A main agent starts two sub-agents, waits for them, reads a file and is told to go on; then the time gets into
    its system prompt, and breaks its prefix twice.
    """
    provider = Provider()
    with recording(tmp_path_factory.mktemp("played"), provider.script) as made:
        family(made, provider)
    return Played(made.path, made.calls, provider)


def family(made: Recording, provider: Provider) -> None:
    """Have the conversation."""
    sides = ("left", "right")
    uses = [Use(side, "Agent", {"prompt": f"Look {side}.", "subagent_type": "Explore"}) for side in sides]
    turns = [user("Do it. " + "Word. " * 200)]
    provider.ask(made, turns, *uses)
    for side in sides:
        below, use = [user(f"Look {side}.")], Use("b" + side, "Bash", {"command": f"ls {side}"})
        provider.ask(made, below, use, agent=side, system=f"Help {side}.")
        below += [assistant(use), user(Result(use.id, f"{side} file\n" * 200))]
        provider.ask(made, below, f"Found {side}.", agent=side, system=f"Help {side}.")
    turns += [assistant(*uses), user(*(Result(side, f"Found {side}.") for side in sides))]
    read = Use("r", "Read", {"file_path": "x"})
    provider.ask(made, turns, read)
    turns += [assistant(read), user(Result("r", "A line.\n" * 100))]
    provider.ask(made, turns, "Half done.")
    for minute in (1, 2):
        turns += [assistant("Half done."), user("Go on.")]
        provider.ask(made, turns, "More.", system=f"Lead. It is 12:0{minute}.")


def keepwarm_(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and standard output of a command."""
    said = BytesIO()
    out = TextIOWrapper(said, write_through=True)
    with redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0), said.getvalue().decode()


@pytest.fixture
def cluster() -> Any:
    """The URL of ``keepwarm serve``'s simulated worker: endless cache, blocks of one token, no waiting."""
    with running(create_app(simulated(block=1), model="sim", cache={"ttl": "none"})) as url:
        yield url


def alike(one: Sequence[Segment], other: Sequence[Segment]) -> int:
    """Tokens of the segments that two prompts begin with alike."""
    same = takewhile(lambda pair: pair[0][:2] == pair[1][:2], zip(one, other, strict=False))
    return sum(segment.tokens for segment, _ in same)


def rows(run: Path) -> dict[str, dict[str, Any]]:
    """A run's outcomes by call."""
    return {row["call"]: row for row in read_outcome_table(str(run / "outcomes.parquet")).to_pylist()}


def test_a_recording_tells_what_was_played(played: Played) -> None:
    """Nine calls of three agents, with the upstream's own counts."""
    assert [call.prompt for call in played.calls] == [sum(map(size, prompt)) for prompt in played.provider.prompts]
    assert [call.cache_read for call in played.calls] == played.provider.reads
    assert [call.role for call in played.calls] == ["main"] + ["subagent"] * 4 + ["main"] * 4
    assert [call.prefix_break.change for call in played.calls if call.prefix_break] == ["changed", "numbers"]
    assert {(call.completed, call.flow, call.error) for call in played.calls} == {(True, "interactive", None)}


def test_a_recording_replays_as_it_was(played: Played, cluster: str, tmp_path: Path) -> None:
    """Exit code 0, valid; each prompt as long as recorded; what is read is what its predecessors leave: all that a
    prompt keeps (and the answer before it), no more than that where its prefix broke, the shared tools where it is
    new. The run's hit rate is the highest that the trace allows.
    """
    code, told = keepwarm_("replay", played.path, "--endpoint", cluster, "-o", tmp_path / "run")
    assert (code, "9 calls answered" in told) == (0, True)
    found = rows(tmp_path / "run")
    assert [found[call.call]["prompt"] for call in played.calls] == [call.prompt for call in played.calls]
    begun: list[Call] = []
    outputs = {call.call: call.output or 0 for call in played.calls}
    tools = sum(segment.tokens for segment in played.calls[0].append if segment.kind == "tools")
    for call in played.calls:
        read = found[call.call]["cache_read"]
        if call.turn == 0:
            shared = max((alike(call.append, other.append) for other in begun), default=0)
            assert 0 <= read - shared <= 2 * bool(begun)  # the first word of all texts is the same
            begun.append(call)
        elif call.prefix_break:
            assert call.keep == tools
            assert 0 <= read - call.keep <= 2  # and the next one may be by chance
        else:
            assert call.keep <= read <= call.keep + outputs[call.prompt_parent or ""]
    code, told = keepwarm_("report", tmp_path / "run", "--json")
    report = json.loads(told)
    assert (code, report["valid"], report["because"]) == (0, True, [])
    words = 2 * len(played.calls) / sum(call.prompt or 0 for call in played.calls)
    assert 0 <= report["hit_rate"] - report["achievable_hit_rate"]["endless"] <= words


def test_a_replay_is_recorded_as_what_it_replays(played: Played, cluster: str, tmp_path: Path) -> None:
    """The replay goes through a recorder in its turn: the same prompts in the same order, grown by as much, broken at
    the same calls; an agent's calls are known as one agent's by nothing but their prompts.
    """
    journal, trace = tmp_path / "j", tmp_path / "t.parquet"
    recorder = Recorder(journal, new_salt())
    with proxied(cluster, recorder) as (front, _):
        command = ("replay", played.path, "--endpoint", front, "-o", tmp_path / "run", "--no-preflight")
        assert keepwarm_(*command)[0] == 0
    recorder.close()
    close_journal(journal, str(trace), version="0")
    again = {call.prompt: call for call in read_calls(str(trace))}
    agents: dict[str, set[str]] = {}
    for call in played.calls:
        its = again[call.prompt]
        agents.setdefault(call.agent, set()).add(its.agent)
        assert (its.turn, its.output, its.error) == (call.turn, call.output, None)
        assert (its.prefix_break is None) == (call.prefix_break is None)
        assert its.keep == call.keep or call.prefix_break
    assert len(again) == len(played.calls)
    assert [len(names) for names in agents.values()] == [1, 1, 1]


def test_every_command_reads_a_recording(played: Played, tmp_path: Path) -> None:
    """inspect tells what is in it and why prefixes broke, report what it cost and how long it took, simulate replays
    it, gate holds it to figures: with the numbers that the upstream told.
    """
    prompt, read = sum(map(size, [one for p in played.provider.prompts for one in p])), sum(played.provider.reads)
    code, told = keepwarm_("inspect", played.path)
    assert code == 0
    for line in (
        "9 calls, 1 sessions, from record, token counts reported",
        "3, 2 of them sub-agents",
        f"{prompt:,} = 0 uncached + {read:,} read",
        f"{read / prompt:.2%}".replace("%", " %"),
        "system at position 4: only digits differ: a date, a counter or an id",
        "system at position 4: changed, the rest is as it was",
        "5 in 4 calls; Agent 2, Bash 2, Read 1",
        "prompt_changed",
    ):
        assert line in told
    figures = json.loads(keepwarm_("inspect", played.path, "--json")[1])
    assert (figures["kind"], figures["prompt"], figures["cache_read"]) == ("recording", prompt, read)
    assert (figures["calls"], figures["agents"], figures["subagents"], figures["valid"]) == (9, 3, 2, True)
    code, told = keepwarm_("report", played.path)
    assert (code, "cost_per_completed_task $" in told, "ttft" in told) == (0, True, True)
    rate = f"warm_hit_rate >= {figures['warm_hit_rate'] - 0.001:.2%}"
    assert keepwarm_("gate", played.path, "--require", rate, "--require", "cost_per_completed_task <= 1")[0] == 0
    assert keepwarm_("gate", played.path, "--require", "warm_hit_rate >= 85%")[0] == 1
    assert keepwarm_("simulate", played.path, "-o", tmp_path / "sim")[0] == 0
    found = rows(tmp_path / "sim")
    assert {name: row["prompt"] for name, row in found.items()} == {call.call: call.prompt for call in played.calls}
    assert keepwarm_("report", tmp_path / "sim")[0] == 0
