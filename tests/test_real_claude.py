"""The real Claude Code, run offline against a scripted upstream, and what the importer makes of its transcripts.

The upstream knows the truth: every call's account, agent, session and times. Each scripted answer has its own output
count, by which a call is known again. ``tests/real/install.sh`` fetches the client; without it these tests skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from real.scenes import BINARY, SECRET, Scene, Stage, all_scenes
from real.upstream import Answered, running

from keepwarm.harness.cli import cli
from keepwarm.traces.model import Call
from keepwarm.traces.store import read_calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no Claude Code: run tests/real/install.sh or set KEEPWARM_CLAUDE"),
]


class Real(NamedTuple):
    """All scenes, and the trace made of their transcripts."""

    stage: Stage
    scenes: dict[str, Scene]
    trace: Path
    summary: dict[str, Any]
    calls: list[Call]
    by_output: dict[int | None, Call]

    def of(self, scene: str, agent: str | None = None) -> list[Call]:
        """The calls that a scene's answers to one agent became."""
        return [self.by_output[output] for output in self.scenes[scene].outputs(agent)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """Every scene played in one home, then imported."""
    root = tmp_path_factory.mktemp("real")
    with running() as upstream:
        stage = Stage(root, upstream)
        scenes = all_scenes(stage)
    trace = root / "t.parquet"
    command = ["import", "claude-code", str(stage.home / ".claude/projects"), "-o", str(trace), "--json"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    calls = list(read_calls(str(trace)))
    yield Real(stage, scenes, trace, orjson.loads(done.stdout), calls, {call.output: call for call in calls})


def _whole(real: Real) -> list[Answered]:
    """What the upstream answered, but for failures and for the compaction's own call, which no transcript holds."""
    summary = real.scenes["compacted"].answered
    return [a for scene in real.scenes.values() for a in scene.answered if a.reply.status == 200 and a not in summary]


def test_every_answer_is_one_call(real: Real) -> None:
    """Each answered message is one call, however many lines and files hold it, with the account that was sent."""
    truth = {}
    for answered in _whole(real):
        usage, asked = answered.reply.usage, [b["name"] for b in answered.reply.blocks if "name" in b]
        truth[usage.output] = (answered.request.body["model"], *usage[:4], answered.reply.stop, asked)
    told = {
        c.output: (
            *(c.model, c.uncached, c.cache_read, c.cache_write_5m, c.cache_write_1h, c.stop_reason),
            [tool.name for tool in c.tools],
        )
        for c in real.calls
    }
    assert told == truth
    assert len(real.calls) == len(truth)
    assert real.summary["damaged"] == []
    assert {c.cache_write_other for c in real.calls} == {0}


def test_prompts_add_up_and_rows_refer_backwards(real: Real) -> None:
    """Kept and appended segments make up the reported prompt; parents and edges are earlier rows of their session."""
    seen: dict[str, str] = {}
    for call in real.calls:
        assert call.prompt_tokens == call.prompt
        others = [call.prompt_parent, call.spawned_by, *(edge.call for edge in call.after)]
        assert {seen.get(other) for other in others if other} <= {call.session}
        seen[call.call] = call.session


def test_no_call_waits_for_one_that_had_not_ended(real: Real) -> None:
    """Each edge is true on the wire: the call waited for was answered before the waiting one came in."""
    truth = {a.reply.usage.output: a for a in _whole(real)}
    outputs = {call.call: call.output for call in real.calls}
    late = []
    for call in real.calls:
        for edge in call.after:
            wrong = truth[outputs[edge.call]].end_ns > truth[call.output].start_ns and edge.trigger == "end"
            # An answer's first tool may start before its last block is there.
            if wrong and edge.call != call.spawned_by:
                late.append((outputs[edge.call], call.output, edge.kind))
    assert late == []


def test_parallel_sub_agents(real: Real) -> None:
    """Two sub-agents are started by one call, and the next call of the main agent waits for both."""
    scene = real.scenes["fan_out"]
    main = real.of("fan_out")
    left, right = ([real.by_output[output] for output in scene.outputs(agent)] for agent in scene.agents)
    assert [call.turn for call in main] == [0, 1, 2, 3]
    assert {call.role for call in main} == {"main"}
    assert {calls[0].agent_type for calls in (left, right)} == {"general-purpose", "explore"}
    for calls in (left, right):
        assert [call.turn for call in calls] == [0, 1, 2]
        assert {(c.role, c.parent_agent, c.spawned_by) for c in calls} == {("subagent", main[0].agent, main[0].call)}
        assert [edge.call for edge in calls[0].after] == [main[0].call]
        assert [tool.name for tool in calls[0].tools] == ["Bash"]
        assert (calls[0].tools[0].duration_ns or 0) >= 200_000_000
    joins = {edge.call for edge in main[1].after if edge.kind == "subagent"}
    assert joins == {left[-1].call, right[-1].call}
    assert {tool.agent for tool in main[0].tools} == {left[0].agent, right[0].agent}
    assert [(edge.call, edge.kind) for edge in main[2].after] == [(main[1].call, "tool")]
    assert (main[2].gap_ns or 0) >= 300_000_000
    assert main[3].completed is True


def test_a_sub_agent_of_a_sub_agent(real: Real) -> None:
    """The inner agent's parent is the outer one, which waits for it."""
    outer, inner = (real.of("nested", agent) for agent in real.scenes["nested"].agents)
    assert (inner[0].parent_agent, inner[0].spawned_by) == (outer[0].agent, outer[0].call)
    assert inner[-1].call in {edge.call for edge in outer[1].after if edge.kind == "subagent"}
    assert outer[-1].call in {edge.call for edge in real.of("nested")[1].after if edge.kind == "subagent"}


@pytest.mark.parametrize("scene", ["behind", "outlives"])
def test_a_background_agent_is_joined_where_it_reports(real: Real, scene: str) -> None:
    """The main agent goes on when a background agent is launched; it waits for it where it is told of its end."""
    main, agent = real.of(scene), real.of(scene, real.scenes[scene].agents[0])
    assert agent[0].spawned_by == main[0].call
    assert [edge.call for edge in main[1].after] == [main[0].call]
    assert {edge.call for edge in main[2].after if edge.kind == "subagent"} == {agent[-1].call}
    assert {edge.kind for edge in main[2].after} <= {"tool", "subagent", "unknown"}


def test_a_message_sends_a_finished_agent_on(real: Real) -> None:
    """A sub-agent that gets a message goes on as itself, after the call that sent it."""
    main, agent = real.of("messaged"), real.of("messaged", real.scenes["messaged"].agents[0])
    assert [call.turn for call in agent] == [0, 1]
    assert agent[0].spawned_by == agent[1].spawned_by == main[0].call
    assert main[1].call in {edge.call for edge in agent[1].after}
    assert agent[1].call in {edge.call for edge in main[3].after}


def test_resumed_is_the_same_agent(real: Real) -> None:
    """A session resumed or continued is one agent whose turns go on, each prompt grown from the last one's."""
    scenes = ("first", "resumed", "went_on", "continued", "after", "switched")
    calls = [call for scene in scenes for call in real.of(scene)]
    before = calls[:4]
    assert len({call.agent for call in before}) == 1
    assert [call.turn for call in before] == [0, 1, 2, 3]
    assert [call.prompt_parent for call in before[1:]] == [call.call for call in before[:-1]]
    assert before[2].gap_kind == "human"
    assert len({call.session for call in calls}) == 1
    assert len({call.agent for call in calls[4:]}) == 1


def test_a_fork_is_another_agent(real: Real) -> None:
    """Of two branches the fork is a new agent, and the first prompt of each holds all of the common history's last."""
    origin, forked = real.of("resumed")[-1], real.of("forked")
    went_on = real.of("went_on")
    assert went_on[0].agent == origin.agent
    assert (went_on[0].turn, went_on[0].prompt_parent, went_on[0].keep) == (4, origin.call, origin.prompt)
    assert forked[0].agent != origin.agent
    assert (forked[0].session, forked[0].parent_agent) == (origin.session, origin.agent)
    assert (forked[0].turn, forked[0].prompt_parent, forked[0].keep) == (0, origin.call, origin.prompt)


def test_compaction_and_model_switch_are_told(real: Real) -> None:
    """The prompt after /compact keeps less than its parent had, another model's keeps nothing, and both say why."""
    before, after, switched = real.of("continued")[-1], real.of("after"), real.of("switched")
    assert (after[0].prefix_change, after[0].prompt_parent) == ("compaction", before.call)
    assert after[0].keep < (before.prompt or 0)
    assert "user" in {segment.kind for segment in after[0].append}
    assert (switched[0].prefix_change, switched[0].keep) == ("model_switch", 0)
    others = [c for c in real.calls if c.call not in (after[0].call, switched[0].call)]
    assert {call.prefix_change for call in others} == {None}


def test_retries_are_not_denied(real: Real) -> None:
    """One attempt was refused; this client's transcript does not say so, and the trace does not say there was none."""
    assert [a.reply.status for a in real.scenes["overloaded"].answered] == [529, 200]
    assert real.of("overloaded")[0].retries in (None, 1)


def test_completed(real: Real) -> None:
    """A session that an error ended is not completed; every other one is."""
    refused = real.of("refused")[0].session
    assert real.scenes["refused"].code == 1
    assert {call.completed for call in real.calls if call.session == refused} == {False}
    assert {call.completed for call in real.calls if call.session != refused} == {True}


def test_nothing_private_is_kept(real: Real) -> None:
    """No path, name, prompt, output or id of the client is anywhere in the trace, its metadata included."""
    table = pq.read_table(real.trace)
    kept = real.trace.read_bytes() + repr(table.to_pylist()).encode() + repr(table.schema.metadata).encode()
    ids = {scene.session for scene in real.scenes.values()} | {a for s in real.scenes.values() for a in s.agents}
    told = [SECRET, "Look left", "first question", "toolu_", "msg_0", "req_", "notes.txt", str(real.stage.home)]
    assert [word for word in (*told, *ids) if word.encode() in kept] == []
