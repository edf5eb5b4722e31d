"""The real Claude Code through a recorder to a scripted upstream: held against its own transcripts and the truth.

``keepwarm import claude-code`` of the same home under the same salt has to tell the same of every call, but for what
only one of the two can know, which each test here names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from real.recording import Files, files, recording
from real.scenes import BINARY, SECRET, Scene, Stage, all_scenes, bash
from real.upstream import Answered, Reply, running, steps, text

from keepwarm.harness.cli import cli
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import Call
from keepwarm.traces.store import read_calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no Claude Code: run tests/real/install.sh or set KEEPWARM_CLAUDE"),
]

MILLISECOND = 1_000_000
TIMES = {"start_ns", "end_ns", "session_start_ns", "gap_ns", "first_byte_ns", "first_token_ns"}
OF_THE_WIRE = {"origin", "stream", "status", "retries", "attempts", "reasoning"}
OF_PROMPTS = {"keep", "append", "breakpoints", "prefix_break", "output_est"}
LOOKED_INTO = {"after", "tools"}
ALIKE = set(Call._fields) - TIMES - OF_THE_WIRE - OF_PROMPTS - LOOKED_INTO
"""Columns in which a recording and a transcript say the same, as they stand."""
OF_A_FORK = {"session", "parent_agent", "prompt_parent", "gap_kind"}
"""Columns in which the first call of a forked session differs: see test_a_fork_is_a_session_of_its_own."""


class Told(NamedTuple):
    """A recording and an import of the same run, both by call, and what the upstream answered, by call too."""

    stage: Stage
    scenes: dict[str, Scene]
    files: Files
    journal: bytes
    proxy: dict[str, Call]
    transcript: dict[str, Call]
    truth: dict[str, Answered]

    def of(self, scene: str, agent: str | None = None) -> list[Call]:
        """The recorded calls that a scene's whole answers to one agent became, in their order."""
        outputs = self.scenes[scene].outputs(agent)
        return sorted((c for c in self.proxy.values() if c.output in outputs), key=lambda c: outputs.index(c.output))

    def both(self) -> list[tuple[Call, Call]]:
        """Each call that both have, as recorded and as the transcript tells it."""
        return [(call, self.transcript[name]) for name, call in self.proxy.items() if name in self.transcript]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Every scene played through one recorder, and its home imported."""
    root = tmp_path_factory.mktemp("recorded")
    made, imported = files(root), root / "imported.parquet"
    with running() as upstream, recording(made, upstream.url) as url:
        stage = Stage(root, upstream, url)
        scenes = all_scenes(stage)
        journal = made.journal.read_bytes()
    home = str(stage.home / ".claude/projects")
    done = CliRunner().invoke(cli, ["import", "claude-code", home, "-o", str(imported), "--salt-file", str(made.salt)])
    assert done.exit_code == 0, done.output
    identity = Identity(made.salt.read_bytes())
    truth = {identity.name("call", a.id): a for a in upstream.answered if a.reply.status == 200}
    proxy, transcript = ({call.call: call for call in read_calls(str(trace))} for trace in (made.trace, imported))
    yield Told(stage, scenes, made, journal, proxy, transcript, truth)


def test_every_answer_is_one_call(told: Told) -> None:
    """Each whole answer is a call by the id that its message has in a transcript, with the account that was sent."""
    known = {call: c for call, c in told.proxy.items() if c.error is None}
    assert known.keys() == told.truth.keys()
    for call, answered in told.truth.items():
        c, usage, asked = known[call], answered.reply.usage, [b["name"] for b in answered.reply.blocks if "name" in b]
        assert (c.uncached, c.cache_read, c.cache_write_5m, c.cache_write_1h, c.output) == usage
        assert (c.model, c.stop_reason, c.status) == (answered.request.body["model"], answered.reply.stop, 200)
        assert [tool.name for tool in c.tools] == asked
        assert (c.dialect, c.stream, c.origin, c.usage_source) == ("messages", True, "proxy", "reported")


def test_the_transcript_says_the_same(told: Told) -> None:
    """Of each call that the transcript holds the recording tells the same: whose, by whom, after what, at what cost."""
    fork = told.of("forked")[0]
    for recorded, read in told.both():
        unlike = {name for name in ALIKE if getattr(recorded, name) != getattr(read, name)}
        if recorded.session == fork.session:
            assert unlike <= OF_A_FORK
            continue
        assert unlike == set()
        summaries = {edge.call for edge in recorded.after if told.proxy[edge.call].role == "compaction"}
        edges = [(edge.call, edge.kind, edge.trigger) for edge in recorded.after if edge.call not in summaries]
        assert edges == [(edge.call, edge.kind, edge.trigger) for edge in read.after]
        asked = [(tool.name, tool.agent, tool.is_error) for tool in recorded.tools]
        assert asked == [(tool.name, tool.agent, tool.is_error) for tool in read.tools]


def test_the_order_is_the_same(told: Told) -> None:
    """Calls stand in the same order in both."""
    fork = told.of("forked")[0]
    both = [(recorded, read) for recorded, read in told.both() if recorded.session != fork.session]
    calls = [recorded.call for recorded, _ in both]
    assert calls == [call for call in told.transcript if call in set(calls)]


def test_what_the_transcript_lacks(told: Told) -> None:
    """Only the recording has the compaction's own call and the request that was refused; it lacks none."""
    lacking = [call for name, call in told.proxy.items() if name not in told.transcript]
    assert {(call.role, call.error) for call in lacking} == {("compaction", None), ("main", "bad_request")}
    assert len(lacking) == 2
    assert told.transcript.keys() < told.proxy.keys()


def test_compaction_is_a_call_of_its_own(told: Told) -> None:
    """It grows from the main agent's prompt, is no turn of it, and the main agent's next call waits for it."""
    before, after = told.of("continued")[-1], told.of("after")[0]
    (summary,) = told.of("compacted")
    assert (summary.role, summary.parent_agent, summary.prompt_parent) == ("compaction", before.agent, before.call)
    assert summary.agent != before.agent
    assert (summary.session, summary.keep > 0) == (before.session, True)
    assert {edge.call for edge in after.after} == {before.call, summary.call}
    assert (after.prefix_change, after.turn, after.prompt_parent) == ("compaction", before.turn + 1, before.call)


def test_a_fork_is_a_session_of_its_own(told: Told) -> None:
    """On the wire a forked session is a new one that says nothing of its origin; the agent is as the transcript has."""
    forked, origin = told.of("forked"), told.of("resumed")[0]
    assert {(call.session == origin.session, call.parent_agent) for call in forked} == {(False, None)}
    assert (forked[0].prompt_parent, forked[0].after) == (None, ())
    assert {told.transcript[call.call].session for call in forked} == {origin.session}


def test_a_retry_is_an_attempt(told: Told) -> None:
    """A request that was overloaded once is one call of two attempts; no other call has any."""
    (late,) = told.of("overloaded")
    first, second = late.attempts
    assert (late.retries, first.status, first.error) == (1, 529, "overloaded")
    assert (second.status, second.error) == (200, None)
    assert (
        late.start_ns == first.sent_ns < (first.done_ns or 0) <= second.sent_ns < (second.done_ns or 0) == late.end_ns
    )
    assert {(call.retries, call.attempts) for call in told.proxy.values() if call is not late} == {(0, ())}


def test_a_refusal_is_a_call_that_failed(told: Told) -> None:
    """It has a row without an account, after the call before it."""
    (refused,) = [call for call in told.proxy.values() if call.error]
    (before,) = told.of("refused")
    assert (refused.error, refused.status, refused.turn) == ("bad_request", 400, 1)
    assert (refused.prompt, refused.output, refused.usage_source) == (None, None, "absent")
    assert [edge.call for edge in refused.after] == [before.call]
    assert (refused.agent, refused.completed) == (before.agent, False)


def test_tools_took_until_the_next_request(told: Told) -> None:
    """A tool ends when its result comes in: with the agent's next request, so no sooner than the client noted it."""
    asked = 0
    for recorded, read in told.both():
        for tool, known in zip(recorded.tools, read.tools, strict=True):
            assert tool.duration_ns is not None
            assert known.duration_ns is not None
            assert tool.duration_ns >= known.duration_ns - 2 * MILLISECOND  # the client notes whole milliseconds
            assert recorded.start_ns <= (tool.start_ns or 0) <= recorded.end_ns
            asked += 1
    assert asked > len(told.scenes)
    commands = [told.of("fan_out")[1], *(told.of("fan_out", agent)[0] for agent in told.scenes["fan_out"].agents)]
    assert [
        (c.tools[0].duration_ns or 0) > slept * 100 * MILLISECOND for c, slept in zip(commands, (3, 2, 2), strict=True)
    ]


def test_times_are_those_of_the_wire(told: Told) -> None:
    """Some one moment is the trace's zero: by it every call began before the upstream had it, and ended after that."""
    latest, earliest = [], []
    for name, answered in told.truth.items():
        call = told.proxy[name]
        zero = call.session_start_ns or 0
        sent = call.attempts[-1].sent_ns if call.attempts else call.start_ns
        assert sent < (call.first_byte_ns or 0) <= (call.first_token_ns or 0) <= call.end_ns
        latest.append(answered.start_ns - zero - sent)
        earliest.append(answered.end_ns - zero - (call.first_byte_ns or 0))
    assert max(earliest) <= min(latest)


def test_a_prefix_breaks_where_the_bodies_differ(told: Told) -> None:
    """What a call kept of its agent's last prompt is what the two bodies have in common, block by block."""
    last: dict[tuple[str, str], tuple[Call, list[Any]]] = {}
    broken = 0
    for name, call in told.proxy.items():
        if name not in told.truth or call.role == "compaction":
            continue
        blocks = _blocks(told.truth[name].request.body)
        before, old = last.get((call.session, call.agent), (None, []))
        last[call.session, call.agent] = call, blocks
        if before is None or before.model != call.model:
            assert call.prefix_break is None
            continue
        alike = next((at for at, pair in enumerate(zip(old, blocks, strict=False)) if pair[0] != pair[1]), len(old))
        assert (call.prefix_break.position if call.prefix_break else len(old)) == alike
        assert call.keep == (call.prefix_break.at if call.prefix_break else before.prompt)
        broken += call.prefix_break is not None
    assert broken > 0


def _blocks(body: dict[str, Any]) -> list[Any]:
    """A request's blocks in the order in which they are cached, without the marks."""
    said = [m["content"] if isinstance(m["content"], list) else [text(m["content"])] for m in body["messages"]]
    blocks = [*body.get("tools", ()), *body["system"], *(block for content in said for block in content)]
    return [{key: value for key, value in block.items() if key != "cache_control"} for block in blocks]


def test_prompts_add_up(told: Told) -> None:
    """Kept and appended segments make up the reported prompt, and no mark lies past its end."""
    whole = [call for call in told.proxy.values() if call.error is None]
    assert [call.call for call in whole if call.prompt_tokens != call.prompt] == []
    assert {len(call.breakpoints) > 0 for call in whole} == {True}
    assert [call.call for call in whole if max(mark.at for mark in call.breakpoints) > (call.prompt or 0)] == []


def test_nothing_private_is_kept(told: Told) -> None:
    """No path, name, prompt, output or id of the client is in the trace or was in the journal, its owner's only."""
    table = pq.read_table(told.files.trace)
    kept = told.files.trace.read_bytes() + repr(table.to_pylist()).encode() + repr(table.schema.metadata).encode()
    ids = {scene.session for scene in told.scenes.values()} | {a for s in told.scenes.values() for a in s.agents}
    private = [SECRET, "Look left", "first question", "toolu_", "msg_0", "req_", "notes.txt", "dummy", "127.0.0.1"]
    assert told.journal.count(b"\n") > 2 * len(told.proxy)
    for held in (kept, told.journal):
        assert [word for word in (*private, str(told.stage.home), *ids) if word.encode() in held] == []
    assert not told.files.journal.exists()
    assert told.files.trace.stat().st_mode & 0o077 == 0


def test_run_starts_the_client_and_ends_with_it(tmp_path: Path) -> None:
    """``--run`` tells the client where to call, gives its exit code, and makes the trace."""
    made = files(tmp_path)
    with running() as upstream:
        nowhere = "http://127.0.0.1:9"
        stage = Stage(tmp_path, upstream, nowhere, [*made.command(upstream.url), "--run"])
        script = steps([bash("echo"), Reply(status=400, error="invalid_request_error")])
        scene = stage.play(script, "a bad request")
    assert scene.code == 1
    assert [(call.output, call.error) for call in read_calls(str(made.trace))] == [(101, None), (None, "bad_request")]
    assert not made.journal.exists()
