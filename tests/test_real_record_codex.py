"""The real Codex through a recorder to a scripted upstream: held against the truth and the client's own rollouts."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow.parquet as pq
import pytest
from real.codex import BINARY, Scene, Stage, all_scenes, shell, tells
from real.recording import Files, files, recording
from real.responses import UNSEEN, Answered, Request, running, steps
from real.scenes import SECRET

from keepwarm.traces.identity import Identity
from keepwarm.traces.model import Call
from keepwarm.traces.store import read_calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no Codex: run tests/real/install.sh or set KEEPWARM_CODEX"),
]

KINDS = "input", "cached_input", "cache_write_input", "output", "reasoning_output"
"""Tokens that the client notes of an answer, named as it does."""
STEP = 128
"""The upstream's cache holds prompts in steps of so many tokens."""


class Told(NamedTuple):
    """A recording, and what the upstream answered; both by call. ``socket`` is the answer to one asked for."""

    stage: Stage
    scenes: dict[str, Scene]
    files: Files
    identity: Identity
    journal: bytes
    calls: dict[str, Call]
    truth: dict[str, Answered]
    socket: int

    def of(self, scene: str, agent: str | None = None) -> list[Call]:
        """The calls that a scene's answers to one agent became, in their order; those to a compaction are none."""
        turns = [a for a in self.scenes[scene].answered if a.request.agent == agent and a.request.kind == "turn"]
        return [self.calls[self.name(a)] for a in turns if a.reply.status == 200]

    def name(self, answered: Answered) -> str:
        """The pseudonym of an answer."""
        return self.identity.name("call", answered.id)

    def agent(self, request: Request) -> str:
        """The pseudonym of a request's thread."""
        return self.identity.name("agent", request.session, request.agent or "")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Every scene played through one recorder."""
    root = tmp_path_factory.mktemp("recorded")
    made = files(root)
    with running() as upstream, recording(made, upstream.url) as url:
        stage = Stage(root, upstream, url)
        scenes = all_scenes(stage)
        socket = _upgrade(url)
        journal = made.journal.read_bytes()
    assert upstream.sockets == 0
    identity = Identity(made.salt.read_bytes())
    truth = {identity.name("call", a.id): a for a in upstream.answered if a.reply.status == 200}
    calls = {call.call: call for call in read_calls(str(made.trace))}
    yield Told(stage, scenes, made, identity, journal, calls, truth, socket)


def _upgrade(url: str) -> int:
    """The status with which a WebSocket is answered."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/v1/responses", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    with connection.getresponse() as answer:
        connection.close()
        return answer.status


def test_every_answer_is_one_call(told: Told) -> None:
    """Each answer is a call by its own id, with the account, model and tools that were sent; a refusal has none."""
    assert {call.error for name, call in told.calls.items() if name not in told.truth} == {"bad_request"}
    assert len(told.calls) == len(told.truth) + 1
    for name, answered in told.truth.items():
        call, usage = told.calls[name], answered.reply.usage
        assert usage is not None
        account = call.prompt, call.cache_read, call.cache_write_other, call.output, call.reasoning
        assert account == (usage if answered.whole else (None,) * 5)
        assert (call.model, call.error) == (answered.request.body["model"], None if answered.whole else "reset")
        assert (call.status, call.dialect, call.stream, call.origin) == (200, "responses", True, "proxy")
        assert [tool.name for tool in call.tools] == [item["name"] for item in answered.reply.items if "name" in item]
        if answered.whole:
            assert call.uncached == usage.prompt - usage.read - usage.written
            assert call.prompt_tokens == call.prompt


def test_the_rollouts_say_the_same(told: Told) -> None:
    """Each account that the client noted is the call's of that response, in that thread, and the other way round."""
    noted = {}
    for path in told.stage.rollouts():
        for line in map(orjson.loads, path.read_bytes().splitlines()):
            if line["type"] == "token_usage_record":
                told_of = line["payload"]
                noted[told.identity.name("call", told_of["response_id"])] = told_of
    assert noted.keys() == {name for name, call in told.calls.items() if call.error is None}
    for name, record in noted.items():
        call, usage, session = told.calls[name], record["usage"], record["session_id"]
        assert call.session == told.identity.name("session", session)
        thread = "" if record["thread_id"] == session else record["thread_id"]
        own = call.parent_agent if call.role == "compaction" else call.agent
        assert own == told.identity.name("agent", session, thread)
        account = call.prompt, call.cache_read, call.cache_write_other, call.output, call.reasoning
        assert account == tuple(usage[f"{kind}_tokens"] for kind in KINDS)


def test_each_agent_has_its_calls_in_order(told: Told) -> None:
    """Roles, agents, parents and turns are those of the client's threads, and calls stand as they came in."""
    turns: dict[str, int] = {}
    for name, answered in told.truth.items():
        call, request = told.calls[name], answered.request
        if request.kind == "compaction":
            continue
        agent = told.agent(request)
        root = told.identity.name("agent", request.session, "")
        role = ("subagent", root) if request.agent else ("main", None)
        assert (call.agent, call.role, call.parent_agent) == (agent, *role)
        assert (call.session, call.flow) == (told.identity.name("session", request.session), "background")
        assert call.turn == turns.get(agent, 0)
        turns[agent] = call.turn + 1
    session = told.calls[told.name(told.scenes["plain"].answered[0])].session
    order = [name for name, call in told.calls.items() if call.session != session and name in told.truth]
    assert order == [name for name in told.truth if name in set(order)]


@pytest.mark.parametrize("scene", ["fan_out", "forked"])
def test_sub_agents_run_beside_the_main_agent(told: Told, scene: str) -> None:
    """One call starts both, the main agent goes on at once, and waits for each where it is told of its end."""
    main, (left, right) = told.of(scene), (told.of(scene, agent) for agent in _sides(told, scene))
    start = main[1]
    assert [tool.agent for tool in start.tools] == [left[0].agent, right[0].agent]
    for calls in (left, right):
        assert {(c.spawned_by, c.parent_agent) for c in calls} == {(start.call, start.agent)}
        assert [(edge.call, edge.kind) for edge in calls[0].after] == [(start.call, "tool")]
        assert [(edge.call, edge.kind) for edge in calls[1].after] == [(calls[0].call, "tool")]
    assert [(edge.call, edge.kind) for edge in main[2].after] == [(start.call, "tool")]
    joined = {edge.call: call for call in main for edge in call.after if edge.kind == "subagent"}
    assert joined.keys() == {left[-1].call, right[-1].call}
    for call, waiting in joined.items():
        words = orjson.dumps(told.truth[waiting.call].request.body["input"])
        assert told.calls[call].end_ns <= waiting.start_ns
        assert f"Found a {SECRET}.".encode() in words


def _sides(told: Told, scene: str) -> list[str]:
    """The threads of the sub-agents that look left and right."""
    firsts = [a.request for a in told.scenes[scene].answered if a.request.agent and a.request.nth == 0]
    said = {request.agent or "": str(request.headers) + str(request.body["input"][-1]) for request in firsts}
    return [next(agent for agent, words in said.items() if way in words) for way in ("left", "right")]


def test_resumed_is_the_same_agent(told: Told) -> None:
    """A resumed session goes on as itself, after the user."""
    before, after = told.of("plain")[-1], told.of("resumed")[0]
    assert (after.session, after.agent, after.turn) == (before.session, before.agent, before.turn + 1)
    assert [(edge.call, edge.kind) for edge in after.after] == [(before.call, "human")]
    assert (after.prompt_parent, after.keep) == (before.call, before.prompt)


@pytest.mark.parametrize(("scene", "kept"), [("compacted", False), ("sealed", True)])
def test_compaction_is_a_call_of_its_own(told: Told, scene: str, kept: bool) -> None:
    """It grows from the main agent's prompt, all of it if it has the tools too, and the next call waits for it."""
    main = told.of(scene)
    (summary,) = [told.calls[told.name(a)] for a in told.scenes[scene].answered if a.request.kind == "compaction"]
    assert (summary.role, summary.parent_agent, summary.session) == ("compaction", main[0].agent, main[0].session)
    assert (summary.prompt_parent, summary.keep) == (main[0].call, main[0].prompt if kept else 0)
    assert [(edge.call, edge.kind) for edge in summary.after] == [(main[0].call, "tool")]
    assert {edge.call: edge.kind for edge in main[1].after} == {main[0].call: "tool", summary.call: "subagent"}
    assert [call.turn - main[0].turn for call in main] == [0, 1, 2]
    assert main[1].prefix_change == (None if kept else "compaction")


def test_a_retry_is_an_attempt(told: Told) -> None:
    """A request that was overloaded once is one call of two attempts; no other call has any."""
    (late,) = told.of("overloaded")
    assert [(one.status, one.error) for one in late.attempts] == [(529, "overloaded"), (200, None)]
    assert late.retries == 1
    assert {(call.retries, call.attempts) for call in told.calls.values() if call is not late} == {(0, ())}


def test_a_dropped_stream_is_a_call_whose_tools_were_run(told: Told) -> None:
    """What was said before the end came is known, its account is not; the next call goes on from there."""
    dropped, after = told.of("dropped")
    assert (dropped.error, dropped.prompt, dropped.usage_source) == ("reset", None, "absent")
    assert [tool.name for tool in dropped.tools] == ["exec_command"]
    assert [(edge.call, edge.kind) for edge in after.after] == [(dropped.call, "tool")]
    assert (after.prompt_parent, after.prefix_break, after.completed) == (dropped.call, None, True)


def test_a_refusal_is_a_call_that_failed(told: Told) -> None:
    """It has a row without an account, and its session is not completed."""
    (refused,) = [call for name, call in told.calls.items() if name not in told.truth]
    (before,) = told.of("refused")
    assert (refused.status, refused.prompt, refused.usage_source, refused.turn) == (400, None, "absent", 1)
    assert (refused.agent, [edge.call for edge in refused.after]) == (before.agent, [before.call])
    assert {call.session for call in told.calls.values() if not call.completed} == {before.session}


def test_what_is_kept_is_what_prompts_have_in_common(told: Told) -> None:
    """A prompt keeps of its parent's what the two bodies begin with alike, and so what a cache would have held."""
    grown = 0
    for name, answered in told.truth.items():
        call = told.calls[name]
        if call.prompt_parent is None:
            assert (call.keep, call.prefix_break) == (0, None)
            continue
        old, new = (_blocks(one.request) for one in (told.truth[call.prompt_parent], answered))
        alike = next((at for at, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), len(old))
        assert (call.prefix_break.position if call.prefix_break else len(old)) == alike
        read = call.cache_read or 0
        assert read <= call.keep <= read + STEP + 1
        grown += 1
    agents = {call.agent for call in told.calls.values() if call.role != "compaction"}
    assert grown == len(told.truth) - len(agents)


def _blocks(request: Request) -> list[Any]:
    """A request's blocks in the order of its prompt: its tools, then what each item of the input holds."""
    blocks = list(request.body.get("tools") or ())
    for item in request.body["input"]:
        seen = {key: value for key, value in item.items() if key not in UNSEEN}
        blocks += [(item["role"], part) for part in seen["content"]] if item["type"] == "message" else [seen]
    return blocks


def test_times_are_those_of_the_wire(told: Told) -> None:
    """Some one moment is the trace's zero: by it every call began before the upstream had it, and ended after that."""
    latest, earliest = [], []
    for name, answered in told.truth.items():
        call = told.calls[name]
        zero = call.session_start_ns or 0
        sent = call.attempts[-1].sent_ns if call.attempts else call.start_ns
        assert sent < (call.first_byte_ns or 0) <= (call.first_token_ns or call.end_ns) <= call.end_ns
        latest.append(answered.start_ns - zero - sent)
        earliest.append(answered.end_ns - zero - (call.first_byte_ns or 0))
    assert max(earliest) <= min(latest)
    assert [c.call for c in told.calls.values() for t in c.tools if t.duration_ns is None and c.completed] == []


def test_nothing_private_is_kept(told: Told) -> None:
    """No path, name, prompt, output or id of the client is in the trace or was in the journal."""
    table = pq.read_table(told.files.trace)
    kept = told.files.trace.read_bytes() + repr(table.to_pylist()).encode() + repr(table.schema.metadata).encode()
    ids = {scene.session for scene in told.scenes.values()} | {a for s in told.scenes.values() for a in s.agents}
    private = [SECRET, "Look", "/root", "first question", "call_0", "resp_0", "fu_0", "notes.txt", "dummy", "127.0.0.1"]
    assert told.journal.count(b"\n") > 2 * len(told.calls)
    for held in (kept, told.journal):
        assert [word for word in (*private, str(told.stage.home), *ids) if word.encode() in held] == []


def test_run_starts_the_client_over_http(tmp_path: Path) -> None:
    """``--run codex`` tells the client where to call; the WebSocket that it asks for first gets no further."""
    made = files(tmp_path)
    script = steps([shell("echo"), tells("Done.")])
    (tmp_path / "direct").mkdir()
    with running() as upstream:
        Stage(tmp_path / "direct", upstream).play(script, "first question", "-m", "gpt-5.5", builtin=True)
        asked = upstream.sockets
        stage = Stage(tmp_path, upstream, before=[*made.command(upstream.url), "--run"])
        scene = stage.play(script, "first question", "-m", "gpt-5.5", builtin=True)
        assert (scene.code, upstream.sockets) == (0, asked)
    assert asked > 0
    identity = Identity(made.salt.read_bytes())
    assert [c.call for c in read_calls(str(made.trace))] == [identity.name("call", a.id) for a in scene.answered]


def test_a_websocket_is_refused(told: Told) -> None:
    """The recorder itself says that calls go over HTTP, at which the client posts at once."""
    assert told.socket == 426
    assert told.scenes["sealed"].code == 0
