"""What comes again is not read again, and what waits is done in turns: the recording is as if neither were so."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from wire import SALT, asking, post, refused, staged, streamed

from keepwarm.harness.recorder import GATHERED, Recorder
from keepwarm.traces.records import RequestRecord

MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
TOOLS = [{"name": "Bash", "input_schema": {"a": [1, 2.5, "ä\n"]}}, {"name": "Read", **MARK}]
OTHERS = [*TOOLS, {"name": "Edit"}]
TALK = {"messages": [{"role": "user", "content": "hi"}]}
DEEPER = {
    "messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "n", "input": {"tools": TOOLS}}]}]
}
BODIES = {
    "before the conversation": orjson.dumps({"tools": TOOLS, **TALK}),
    "behind it": orjson.dumps({**TALK, "tools": TOOLS}),
    "once more": orjson.dumps({**TALK, "tools": TOOLS, "model": "m"}),
    "a longer list": orjson.dumps({"tools": OTHERS, **TALK}),
    "the shorter one again": orjson.dumps({"tools": TOOLS, **TALK, **MARK}),
    "deeper, and then the list": orjson.dumps({**DEEPER, "tools": TOOLS}),
    "deeper, and another list": orjson.dumps({**DEEPER, "tools": OTHERS}),
    "deeper only": orjson.dumps(DEEPER),
    "with spaces": json.dumps({"tools": TOOLS, **TALK}, indent=1, ensure_ascii=False).encode(),
    "in a text": orjson.dumps({"messages": [{"role": "user", "content": '"tools":' + json.dumps(TOOLS)}]}),
    "twice": orjson.dumps({"tools": TOOLS, **TALK})[:-1] + b',"tools":[]}',
    "cut": orjson.dumps({"tools": TOOLS, **TALK})[:-1],
}


def recorded(folder: Path, bodies: list[bytes]) -> list[RequestRecord]:
    """What one recorder notes of requests with these bodies, each of a session of its own."""
    folder.mkdir()
    with staged(folder) as stage:

        async def play() -> None:
            for number, body in enumerate(bodies):
                line = await stage.line()
                await line.ask(post(body, f"x-session-id: {number}"))
                await line.got()
                await line.tell(streamed(f"msg_{number}"))
                await line.heard(len(streamed(f"msg_{number}")))

        stage.run(play())
        return [request for request, _ in stage.records()]


def test_tools_that_came_before_are_the_same_wherever_they_stand(tmp_path: Path) -> None:
    """A recorder that has seen them tells the same prompt and marks as one that has not."""

    def told(record: RequestRecord) -> tuple[Any, ...]:
        return record.rest, record.marks, record.model, [one[:3] for one in record.inputs]

    after = recorded(tmp_path / "after", list(BODIES.values()))
    assert len(after) == len(BODIES)
    for at, (name, body) in enumerate(BODIES.items()):
        (alone,) = recorded(tmp_path / str(at), [body])
        assert told(after[at]) == told(alone), name
    assert [len(record.rest) for record in after] == [3, 3, 3, 4, 3, 3, 4, 1, 3, 1, 1, 0]


def test_requests_of_one_connection_keep_each_its_own_head(tmp_path: Path) -> None:
    """Whether they are alike but for their length, or differ in a field, a path, a method or a token."""
    with staged(tmp_path, token="sesame") as stage:
        asked = [
            asking("x-keepwarm-token: sesame", "X-A: 1", "x-a: 2", text="hi"),
            asking("x-keepwarm-token: sesame", "X-A: 1", "x-a: 2", text="Good morning."),
            asking("x-keepwarm-token: sesame", "X-A: 1", "x-a: 3", text="Good morning."),
            asking("x-keepwarm-token: sesame", "X-A: 1", "x-a: 3", path="/v1/messages?beta=true"),
            b"DELETE /v1/messages?beta=true HTTP/1.1\r\nx-keepwarm-token: sesame\r\nhost: a\r\n\r\n",
        ]

        async def play() -> None:
            line = await stage.line()
            for one in asked:
                head, _, body = one.partition(b"\r\n\r\n")
                first, *fields = head.split(b"\r\n")
                names = [field.split(b": ")[0] for field in fields if not field.startswith((b"x-keepwarm", b"host"))]
                await line.ask(one)
                got = await line.got()
                assert b"%b %b HTTP/1.1" % (got.method, got.target) == first
                assert got.body == body
                assert [name for name, _ in got.headers if name != b"host"] == names
                assert all(b"%b: %b" % pair in fields for pair in got.headers if pair[0] != b"host")
                await line.tell(streamed())
                await line.heard(len(streamed()))
            await line.ask(asked[0].replace(b"sesame", b"wrong!"))
            assert refused(await line.rest()) == 401

        stage.run(play())
        assert len(stage.records()) == len(asked) - 1


@pytest.mark.parametrize("number", [3, GATHERED, 3 * GATHERED])
def test_others_have_their_turn_while_many_requests_are_taken_apart(number: int, tmp_path: Path) -> None:
    """Between any two that take their time; what waits is done in its order, and all of it where it must be."""
    recorder, done, others = Recorder(tmp_path / "j", SALT), list[int](), -1

    async def play() -> None:
        loop = asyncio.get_running_loop()

        def slow(at: int) -> None:
            time.sleep(0.002)
            done.append(at)
            if at == 0:
                loop.call_soon(another)

        def another() -> None:
            done.append(others)
            if number - 1 not in done:
                loop.call_soon(another)

        for at in range(number):
            recorder.soon(partial(slow, at))
        while number - 1 not in done:
            await asyncio.sleep(0.01)
        recorder.soon(partial(slow, number))
        recorder.soon(partial(slow, number + 1))
        recorder.catch_up()

    asyncio.run(play())
    recorder.close()
    assert [one for one in done if one != others] == list(range(number + 2))
    turns = done[: done.index(number - 1)]
    assert all(others in pair for pair in pairwise(turns))
    at = done.index(number)
    assert done[at : at + 2] == [number, number + 1]
