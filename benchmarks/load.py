"""A light client of POST /v1/messages that keeps many connections busy, and the bodies that its agents send.

    python benchmarks/load.py

Reads one JSON object a line, the fields of `Order`; does it and answers with one, those of `Tally`: how many answers
came whole, how many wrong, how long it took, and the nanoseconds to the first tokens, less those the upstream waited.
Connections are kept from order to order. The first call of one, on which a proxy opens its own, is in the count but not
in the times.
"""

from __future__ import annotations

import asyncio
import gc
import random
import re
import sys
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter_ns
from typing import cast
from urllib.parse import urlsplit

import orjson

HELD = re.compile(rb"held (\d+) ")
END = b"\r\n0\r\n\r\n"
TOOLS = 24
TURNS = 12
"""An agent grows for so many calls and then begins again."""
WORDS = [start + end for start in ("path", "file", "read", "edit", "test", "call") for end in ("s", "er", "ing", "")]


@dataclass
class Order:
    """What a client is to do."""

    url: str
    body_bytes: int
    streams: int = 1
    period: float = 0.0  # seconds from a call of an agent to its next; 0: as soon as it is answered
    seconds: float = 0.0  # either so long ...
    calls: int = 0  # ... or so many calls of each agent


def text(chance: random.Random, size: int) -> str:
    """So many bytes of words."""
    words = " ".join(chance.choices(WORDS, k=size // 4 + 1))
    return words[:size]


def tool(chance: random.Random, number: int, size: int) -> dict[str, object]:
    """A tool's schema."""
    fields = {f"field_{i}": {"type": "string", "description": text(chance, size // 5)} for i in range(4)}
    schema = {"type": "object", "properties": fields, "required": ["field_0"], "additionalProperties": False}
    return {"name": f"Tool{number}", "description": text(chance, size // 5), "input_schema": schema}


class Agent:
    """Bodies of one agent's calls: the same system prompt and tools each time, and one exchange more."""

    def __init__(self, number: int, size: int) -> None:
        chance = random.Random(number)
        agent = size > 4096
        self.session = f"{chance.getrandbits(128):032x}"
        mark = {"cache_control": {"type": "ephemeral"}}
        request: dict[str, object] = {"model": "claude-opus-4-5-20251101", "max_tokens": 32000, "stream": True}
        request["metadata"] = {"user_id": f"user_0_account__session_{self.session}"}
        if agent:
            request["thinking"] = {"type": "enabled", "budget_tokens": 31999}
            request["tools"] = [tool(chance, i, min(size, 80_000) // 32) for i in range(TOOLS)]
        request["system"] = [{"type": "text", "text": text(chance, 6000 if agent else 400), **mark}]
        self.front = orjson.dumps(request)[:-1] + b',"messages":['
        room = max(size - len(self.front) - 150, 16)
        first = {"role": "user", "content": [{"type": "text", "text": text(chance, min(room, 9000))}]}
        rest = range(0, room - 9000, 9000)  # a long body is a long conversation
        self.messages = [orjson.dumps(first), *(self.exchange(chance, 9000) for _ in rest)]
        self.base = len(self.messages)
        self.grown = [self.exchange(chance, 700) for _ in range(TURNS if agent else 0)]
        self.called = 0

    def exchange(self, chance: random.Random, size: int) -> bytes:
        """A tool use and its result."""
        use = f"toolu_{chance.getrandbits(96):024x}"
        asked = {"type": "tool_use", "id": use, "name": "Tool1", "input": {"field_0": text(chance, 60)}}
        result = {"type": "tool_result", "tool_use_id": use, "content": text(chance, size - 400)}
        messages = [{"role": "assistant", "content": [asked]}, {"role": "user", "content": [result]}]
        return orjson.dumps(messages)[1:-1]

    def body(self) -> bytes:
        """The body of its next call."""
        turn = self.called % (len(self.grown) + 1)
        self.called += 1
        return self.front + b",".join(self.messages + self.grown[:turn]) + b"]}"

    def request(self, host: str) -> list[bytes]:
        """Head and body of its next call, with a real client's headers."""
        body = self.body()
        head = (
            f"POST /v1/messages?beta=true HTTP/1.1\r\nhost: {host}\r\naccept: application/json\r\n"
            f"content-type: application/json\r\nuser-agent: claude-cli/2.1.197 (external, cli)\r\nx-app: cli\r\n"
            f"x-api-key: dummy\r\nanthropic-version: 2023-06-01\r\nx-stainless-retry-count: 0\r\n"
            f"anthropic-beta: interleaved-thinking-2025-05-14,context-management-2025-06-27\r\n"
            f"x-stainless-lang: js\r\nx-stainless-runtime: node\r\nx-stainless-timeout: 600\r\n"
            f"x-claude-code-session-id: {self.session}\r\naccept-encoding: identity\r\n"
            f"connection: keep-alive\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return [head.encode(), body]


@dataclass
class Tally:
    """What came back."""

    ttft_ns: list[int] = field(default_factory=list)
    right: int = 0
    wrong: int = 0
    error: str = ""
    seconds: float = 0.0


class Connection(asyncio.Protocol):
    """One kept-alive connection and the answer it is waiting for."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.answered: asyncio.Future[None] | None = None
        self.warm = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()

    def ask(self, request: list[bytes]) -> asyncio.Future[None]:
        """Send a call; done when its answer is whole."""
        self.answered, self.begun, self.started, self.tail = self.loop.create_future(), perf_counter_ns(), False, b""
        self.transport.writelines(request)
        return self.answered

    def data_received(self, data: bytes) -> None:
        now = perf_counter_ns()
        self.tail += data
        if not self.started:
            held = HELD.search(self.tail)
            if held:
                self.started = True
                if self.warm:
                    self.tally.ttft_ns.append(now - self.begun - int(held[1]))
        if self.tail.endswith(END):
            self.whole()
        elif self.started:
            self.tail = self.tail[-80:]

    def whole(self) -> None:
        """The answer has ended, well or not."""
        if self.started and b'"message_stop"' in self.tail:
            self.tally.right += 1
            self.warm = True
        else:
            self.fail(self.tail[:300])
        if self.answered and not self.answered.done():
            self.answered.set_result(None)

    def fail(self, why: bytes) -> None:
        """Count an answer that came wrong."""
        self.tally.wrong += 1
        self.tally.error = self.tally.error or why.decode("latin-1")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answered and not self.answered.done():
            self.fail(b"connection lost: %a" % exc)
            self.answered.set_exception(ConnectionResetError())


async def connected(url: str, number: int, tally: Tally) -> Connection:
    """An agent's connection, the one it has had or a new one."""
    known = CONNECTIONS.get((url, number))
    if known is None or known.transport.is_closing():
        loop, parts = asyncio.get_running_loop(), urlsplit(url)
        _, known = await loop.create_connection(lambda: Connection(tally), parts.hostname or "", parts.port or 80)
        CONNECTIONS[url, number] = known
    known.tally = tally
    return known


async def agent_calls(order: Order, number: int, tally: Tally, start: float) -> None:
    """One agent's calls on one connection, evenly staggered against the other agents'."""
    loop, host, agent = asyncio.get_running_loop(), urlsplit(order.url).netloc, AGENTS[order.body_bytes][number]
    connection = await connected(order.url, number, tally)
    begin = start + order.period * number / order.streams
    try:
        for call in count():
            due = begin + call * order.period
            if call >= order.calls if order.calls else max(due, loop.time()) >= start + order.seconds:
                return
            request = agent.request(host)
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            async with asyncio.timeout(60):
                await connection.ask(request)
    except TimeoutError:
        connection.fail(b"no answer within a minute")
        connection.transport.abort()
    except ConnectionResetError:
        pass  # counted where it was noticed


async def carry_out(order: Order) -> Tally:
    """Do what is ordered."""
    await asyncio.sleep(0.02)  # to hear of connections that were closed meanwhile
    tally, start = Tally(), asyncio.get_running_loop().time() + 0.05
    await asyncio.gather(*(agent_calls(order, number, tally, start) for number in range(order.streams)))
    tally.seconds = asyncio.get_running_loop().time() - start
    return tally


AGENTS: dict[int, list[Agent]] = {}
CONNECTIONS: dict[tuple[str, int], Connection] = {}


def main() -> None:
    """Carry out orders until there are no more."""
    gc.disable()  # no pauses of its own in what it measures; nothing here is cyclic for long
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            order = Order(**orjson.loads(line))
            known = AGENTS.setdefault(order.body_bytes, [])
            known += [Agent(number, order.body_bytes) for number in range(len(known), order.streams)]
            print(orjson.dumps(runner.run(carry_out(order))).decode(), flush=True)


if __name__ == "__main__":
    main()
