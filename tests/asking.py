"""An endpoint being asked over HTTP: requests for prompts of pieces, and what a scripted server may answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import httpx
import orjson
from hypothesis import strategies as st

from keepwarm.replayers.blocks import Block
from keepwarm.replayers.endpoint import Answer, Piece, Request, Said
from keepwarm.replayers.http import DIALECTS, HttpEndpoint, reach
from keepwarm.replayers.prompts import cut
from keepwarm.replayers.tokens import Costs
from keepwarm.replayers.writer import Writer, body, marked
from keepwarm.traces.model import Breakpoint, Call

REACHED = ("key_env", "key_file", "header", "ca")
NO_TOOLS = Costs(tools=False)


def call(**fields: Any) -> Call:
    """A call of which only what is given matters."""
    told: dict[str, Any] = {"session": "s", "agent": "a", "call": "c", "role": "main", "turn": 0, "keep": 0}
    told |= {"start_ns": 0, "end_ns": 0, "usage_source": "absent", "write_source": "absent", "origin": "synthetic"}
    return Call(**(told | fields))


def request(
    *pieces: Piece, output: int | None = 3, marks: Sequence[Breakpoint] = (), said: Any = None, **fields: Any
) -> Request:
    """A request for a prompt; of its call only agent and marks matter, if nothing else is given."""
    kept = None if said is None else {"said": said}
    return Request(call(breakpoints=tuple(marks), **fields), pieces, output, kept=kept)


def send(url: str, *requests: Request, dialect: str = "messages", **options: Any) -> list[Answer]:
    """The answers to requests sent one after the other by one endpoint."""
    address = reach(url, dialect, **{name: options.pop(name) for name in REACHED if name in options})

    async def all_of_them() -> list[Answer]:
        endpoint = HttpEndpoint(address, **{"dialect": dialect, "model": "sim", "clock": time.monotonic_ns, **options})
        try:
            return [await endpoint.send(one) for one in requests]
        finally:
            await endpoint.aclose()

    return asyncio.run(all_of_them())


def against(handler: Callable[[httpx.Request], Any], **options: Any) -> Answer:
    """The answer when the transport does as the handler says."""
    made = partial(httpx.MockTransport, handler)
    (answer,) = send("http://test", request(Piece(1, 9, "user")), transport=made, **options)
    return answer


def blocks_of(
    prompt: Sequence[Piece],
    costs: Costs | None = None,
    marks: Sequence[Breakpoint] = (),
    said: dict[str, Said] | None = None,
    **options: Any,
) -> list[Block]:
    """A prompt's blocks, without salt."""
    written = Writer(Costs() if costs is None else costs, **options).write(prompt, said)
    ttls = marked(written.ends, marks)
    return [block._replace(ttl_s=ttls.get(index)) for index, block in enumerate(written.blocks)]


def body_of(dialect: str, blocks: Sequence[Block], **head: Any) -> bytes:
    """A body in a dialect."""
    return body(DIALECTS[dialect], orjson.dumps({"model": "m", **head}), blocks)


def stream_of(*events: dict[str, Any] | str) -> bytes:
    """Server-sent events."""
    data = [event if isinstance(event, str) else orjson.dumps(event).decode() for event in events]
    return "".join(f"data: {one}\n\n" for one in data).encode()


KINDS = ("tools", "system", "user", "answer", "tool_result", "lead", "hidden")
"""All kinds of segments."""


def steps(*kinds: str, most: int = 60) -> Any:
    """Hypothesis's prompts of an agent: what share of the last is kept, more pieces, the tokens of the user's last."""
    piece = st.tuples(st.sampled_from(kinds), st.integers(1, most))
    return st.lists(
        st.tuples(st.floats(0, 1), st.lists(piece, max_size=6), st.integers(1, most)), min_size=1, max_size=5
    )


def prompts(steps: list[tuple[float, list[tuple[str, int]], int]]) -> list[tuple[Piece, ...]]:
    """Prompts of which each keeps some share of the one before, cut anywhere, and goes on with pieces of its own."""
    idents, found = count(1), [()]
    for share, kinds, last in steps:
        kept = cut(found[-1], round(share * sum(piece.tokens for piece in found[-1])))
        more = [Piece(next(idents), tokens, kind) for kind, tokens in (*kinds, ("user", last))]
        found.append((*kept, *more))
    return found[1:]
