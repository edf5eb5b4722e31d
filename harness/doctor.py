"""Doctor asks an endpoint what it is and does: how each dialect answers, how its cache works, what it does to times.

What it does not tell, and what could not be asked, is None.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from math import gcd
from statistics import median
from typing import Any, NamedTuple

import httpx

from keepwarm.harness.asking import REPORTING, Asking, model_of
from keepwarm.harness.counters import read_counters
from keepwarm.replayers.address import Address, base_url, shown_url
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.http import DIALECTS, HttpEndpoint
from keepwarm.replayers.server import client, greet, isolates, learn, refusal
from keepwarm.replayers.sse import part
from keepwarm.replayers.text import WORDS, PromptText
from keepwarm.traces.errors import InputError

LENGTHS = (18, 34, 66, 130, 260, 1060, 1200, 1337, 1471, 1640, 1793, 1951, 2080)
"""Words of prompts that begin alike: the greatest common divisor of what a cache reads of them is its block's size, and
the least of that a single block, if it has 16 to 256 tokens and none of them is left out.
"""
SMALL = 1000
"""Words of a prompt that is asked alone, lest a router send it to an idler worker."""
MOST_CONTEXT = 300_000
"""Tokens of the largest context that is overfilled."""
DELAY_MS = 20.0
"""Less than the 40 ms that a delayed acknowledgement takes."""
DELAY_CALLS, DELAY_S = 16, 2.0
MOST_WAIT_S = 30.0
"""For an answer."""
RESETS = ("reset_prefix_cache", "flush_cache")
TIMING = {"vllm": "--enable-per-request-metrics"}
"""What makes a server tell each call's times."""
TAKEN = ("tools", "exact_output", "cache_key")
"""Of what an endpoint takes: what is told of it."""
ASIDE = (None, "timeout", "reset", "rate_limit", "overloaded", "auth")
"""Errors, or none, that say nothing of a prompt's length."""


class Known(NamedTuple):
    """A dialect, how it is asked, streaming or not, and how long one waits."""

    asking: Asking
    stream: bool
    timeout_s: float

    def endpoint(self, **options: Any) -> aclosing[HttpEndpoint]:
        """It, ready to be asked for as long as a block runs."""
        options = {"clock": RunClock(), "stream": self.stream, "timeout_s": self.timeout_s} | options
        return aclosing(self.asking.endpoint(**options))

    def text(self) -> PromptText:
        """Words, or token ids, that nobody has asked for yet."""
        words = self.asking.learned.costs.words if self.asking.learned else WORDS
        return PromptText(salt=secrets.token_hex(4), words=words, ids=self.asking.dialect == "completions")


async def examine(
    addresses: Mapping[str, Address],
    server: dict[str, Any],
    *,
    model: str | None,
    words: Sequence[bytes],
    timeout: float,
    keep_alive_wait: float,
    try_reset: bool,
    told: Callable[[], object],
) -> dict[str, Any]:
    """All there is to know of the endpoint at ``addresses``, by dialects, that ``identify`` told to be ``server``.

    A connection is held idle for ``keep_alive_wait`` at most; ``told`` is called when a part is done. InputError where
    it serves many models and none is named, or no dialect takes the API key.
    """
    address, timeout_s = addresses["messages"], min(timeout, MOST_WAIT_S)
    name = model_of(address, server, model)

    async def noted(asked: Awaitable[Any]) -> Any:
        found = await asked
        told()
        return found

    async def of(known: Known | None, probe: Callable[..., Awaitable[Any]], *more: Any) -> Any:
        return None if known is None else await probe(known, *more)

    idle = asyncio.create_task(keep_alive(address, keep_alive_wait))
    askings = [Asking(addresses[dialect], server, dialect, name) for dialect in DIALECTS]
    tried = await asyncio.gather(*(noted(_dialect(one, words, timeout_s)) for one in askings))
    known = {one.asking.dialect: one for _, one in tried if one}
    closed = [row["why"] for row, _ in tried if row["error"] == "auth"]
    if closed and not known:
        raise InputError(f"endpoint {shown_url(address.url)}: {closed[0]}")
    cached = next((one for one in known.values() if one.asking.learned.reads == "reported"), None)
    exact, quick = (known.get(name) or next(iter(known.values()), None) for name in ("completions", "chat"))
    probes = (
        _cache(cached),
        of(cached, _salted),
        of(exact, _overfilled),
        asyncio.to_thread(_timings, known.get("chat")),
        asyncio.to_thread(read_counters, address),
        asyncio.to_thread(_reset_route, address),
    )
    cache, salted, overflow, timings, counters, route = await asyncio.gather(*map(noted, probes))
    delay = await noted(of(quick, _delay))
    cache |= {"dialect": cached and cached.asking.dialect, "salt": salted, "reset": route and f"POST /{route}"}
    return {
        "url": shown_url(address.url),
        **{name: server[name] for name in ("server", "version", "context")},
        "model": name,
        "dialects": {name: row for name, (row, _) in zip(DIALECTS, tried, strict=True)},
        "cache": cache | {"cold_after_reset": await of(cached, _emptied, route) if try_reset and route else None},
        "overflow": overflow,
        "keep_alive": await noted(idle),
        "delayed_ack": delay,
        "timings": timings,
        "counters": counters,
    }


async def _dialect(asking: Asking, words: Sequence[bytes], timeout_s: float) -> tuple[dict[str, Any], Known | None]:
    """What a dialect is like, and how to ask in it if it answers and tells its usage."""
    async with (
        Known(asking, True, timeout_s).endpoint(accepts=frozenset()) as streamed,
        Known(asking, False, timeout_s).endpoint(accepts=frozenset()) as whole,
    ):
        first, other = await asyncio.gather(greet(streamed), greet(whole))
        row = dict.fromkeys(("answers", "error", "why", "streams", "usage", "cached", "written", *TAKEN, "calibration"))
        if first.error is not None and other.error is not None:
            return row | {"answers": False, "error": other.error, "why": refusal(other)}, None
        streams = first.error is None
        row |= {"answers": True, "streams": streams, "usage": (first if streams else other).prompt is not None}
        stream = streams and (row["usage"] or other.prompt is None)
        try:
            learned = await learn(streamed if stream else whole, words=words)
        except InputError as error:
            return row | {"why": str(error).partition(": ")[2]}, None
    flag = REPORTING.get(asking.server["server"] or "")
    if learned.reads == "absent":
        row["why"] = "does not tell cached tokens" + (f": start the server with {flag}" if flag else "")
    elif streams and not stream:
        row["why"] = "tells usage only where it does not stream"
    row |= {name: name in learned.accepts for name in TAKEN}
    row |= {"cached": learned.reads, "written": learned.writes}
    if asking.dialect != "completions":
        costs = learned.costs
        told = {"words": len(costs.words), "of": len(words), "word": costs.word}
        row["calibration"] = told | {"turn": costs.step(0), "off": costs.off}
    return row, Known(asking._replace(learned=learned), stream, timeout_s)


async def _cache(known: Known | None) -> dict[str, Any]:
    """The cache's block, from what it reads of prompts that begin alike. Where it reads nothing of those, but of
    repeated ones, it keeps what was marked, to the token.
    """
    nothing: dict[str, Any] = dict.fromkeys(("block", "least", "found_by"))
    if known is None:
        return nothing
    text, room = known.text(), known.asking.server["context"] or 1 << 30
    async with known.endpoint() as endpoint:
        word = endpoint.costs.word

        async def read(length: int, number: int = 0) -> int:
            end = Block("user", text.fragment(number or length, 4))
            return (await endpoint.ask([Block("user", text.fragment(0, length), ttl_s=300), end])).cache_read or 0

        lengths = [length for length in LENGTHS if (length + 64) * word < room]
        if len(lengths) < 2:
            return nothing
        *cuts, whole = lengths
        await asyncio.gather(read(whole, 1), read(whole, 2))  # to each of two workers
        if marks := not await read(cuts[-1]):
            await asyncio.gather(*map(read, lengths))
            reads = await asyncio.gather(*(read(length, -length) for length in lengths))
            marks = len({got - round(length * word) for got, length in zip(reads, lengths, strict=True) if got}) == 1
        else:
            reads = await asyncio.gather(*(read(length, -length) for length in cuts if length > SMALL))
            reads += [await read(length) for length in cuts if length < SMALL]
    found = [tokens for tokens in reads if tokens]
    told = {"block": None if marks else gcd(*found), "found_by": "marks" if marks else "prefixes"}
    return {**told, "least": min(found)} if found else nothing


async def _salted(known: Known) -> bool | None:
    """Whether another ``cache_salt`` is cold; None where the context is too small to see."""
    async with known.endpoint() as endpoint:
        if LENGTHS[-1] * endpoint.costs.word * 1.1 > (known.asking.server["context"] or 1 << 30):
            return None
        return await isolates(endpoint, endpoint.costs)


async def _overfilled(known: Known) -> dict[str, Any] | None:
    """What becomes of a prompt of an eighth more than the context; None where that is not known, or large."""
    limit = known.asking.server["context"]
    if not limit or limit > MOST_CONTEXT:
        return None
    async with known.endpoint() as endpoint:
        count = round((limit + limit // 8 + 64) / endpoint.costs.word)
        answer = await endpoint.ask([Block("user", known.text().fragment(0, count))])
        sent = round(endpoint.costs.overhead("", "user") + (count - 1) * endpoint.costs.word)
    outcome = None if answer.error in ASIDE else "refused"
    if answer.prompt is not None and answer.error is None:
        outcome = "cut silently" if answer.prompt < 0.95 * sent else "taken whole"
    return {"outcome": outcome, "sent": sent, "prompt": answer.prompt, "status": answer.status, "told": answer.told}


async def keep_alive(address: Address, wait_s: float) -> dict[str, Any]:
    """How long an endpoint keeps an idle connection: ``closed_s``, or ``beyond_s`` where it outlasts the wait."""
    url = base_url(address.url).join("v1/models")
    tls = (address.tls or httpx.create_ssl_context()) if url.scheme == "https" else None
    fields = {"host": url.netloc.decode(), "accept": "*/*", **address.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    found: dict[str, Any] = {"closed_s": None, "beyond_s": None}
    last, writer = None, None
    with suppress(OSError):
        try:
            reader, writer = await asyncio.open_connection(url.host, url.port or (443 if tls else 80), ssl=tls)
            writer.write(f"GET {url.raw_path.decode()} HTTP/1.1\r\n{head}\r\n".encode())
            while await asyncio.wait_for(reader.read(1 << 16), wait_s):
                last = time.monotonic()
        except TimeoutError:
            return found | {"beyond_s": last and wait_s}
        finally:
            if writer is not None:
                writer.close()
                await writer.wait_closed()
    return found | {"closed_s": last and round(time.monotonic() - last, 1)}


async def _delay(known: Known) -> dict[str, Any] | None:
    """Whether first tokens come late on reused connections: a server's small packet waits for an acknowledgement that
    the client's kernel delays, but not on a new connection.
    """
    prompt = [Block("user", known.text().fragment(0, 1))]

    async def late(reuse: bool) -> list[float]:
        clock, found = RunClock(), list[float]()
        async with known.endpoint(clock=clock) as endpoint:
            for call in range(DELAY_CALLS):
                answer = await endpoint.ask(prompt, output=3, agent=("", "", 0 if reuse else call))
                if answer.first_token_ns and answer.head_ns and (call or not reuse):
                    found.append((answer.first_token_ns - answer.head_ns) / 1e6)
                if clock() > DELAY_S * 1e9 and found:
                    break
        return found

    new, reused = await asyncio.gather(late(False), late(True))
    if not (new and reused and known.stream):
        return None
    return {"found": held_back(new, reused), "new_ms": round(median(new), 1), "reused_ms": round(median(reused), 1)}


def held_back(new: Sequence[float], reused: Sequence[float]) -> bool:
    """Whether first tokens wait for acknowledgements, from the milliseconds between head and first token on new and on
    reused connections: nearly all are late then, not some by chance. Those that came with their head, as a busy server
    sends some, had nothing to wait for.
    """
    apart = sorted(filter(None, reused))
    return 2 * len(apart) > len(reused) and apart[len(apart) // 8] - median(new) > DELAY_MS


def _timings(known: Known | None) -> dict[str, Any]:
    """In which field an endpoint tells a call's times, and how far its wall clock is ahead of ours at least."""
    server = known and known.asking.server["server"]
    told: dict[str, Any] = {"field": None, "clock": None, "ahead_s": None, "flag": TIMING.get(server or "")}
    if known is None:
        return told
    prompt = [{"role": "user", "content": WORDS[0].decode()}]
    asks = {"model": known.asking.model, "max_tokens": 1, "stream": False, "messages": prompt}
    asks |= {"nvext": {"extra_fields": ["timing"]}} if server == "dynamo" else {}
    said, sent = None, 0.0
    with suppress(httpx.RequestError, ValueError), client(known.asking.address, known.timeout_s) as asked:
        sent = time.time()
        said = asked.post("v1/chat/completions", json=asks).json()
    timing = part(part(said, "nvext"), "timing")
    if isinstance(received := timing.get("request_received_ms"), int | float):
        now = time.time()
        told["ahead_s"] = round(received / 1000 - min(max(received / 1000, sent), now), 3)
    if field := "nvext.timing" if timing else "metrics" if part(said, "metrics") else None:
        told |= {"field": field, "clock": "server", "flag": None}
    return told


def _reset_route(address: Address) -> str | None:
    """Where a cache could be emptied, found by asking what is allowed there: a GET might do it."""
    with suppress(httpx.RequestError), client(address) as asked:
        nowhere, *there = (asked.options(path).status_code for path in ("keepwarm-no-such-path", *RESETS))
        for path, status in zip(RESETS, there, strict=True):
            if status != nowhere and (status == 405 or 200 <= status < 300):
                return path
    return None


async def _emptied(known: Known, route: str) -> bool | None:
    """Whether a reset makes a warm prompt cold; None where the prompt was not warm before."""
    prompt = [Block("user", known.text().fragment(0, LENGTHS[-1]), ttl_s=300)]
    async with known.endpoint() as endpoint:
        if not [await endpoint.ask(prompt) for _ in range(2)][1].cache_read:
            return None
        with suppress(httpx.RequestError), client(known.asking.address) as asked:
            await asyncio.to_thread(asked.post, route)
        return (await endpoint.ask(prompt)).cache_read == 0
