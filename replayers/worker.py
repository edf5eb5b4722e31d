"""Worker is one simulated engine, sans-IO: calls begin and end, time is passed in, token accounts come out.

Two sets of cache rules. *Engine* rules are those of a server that hashes full blocks: the last token of a prompt is
always computed, generated tokens are readable by the next call. *Managed* rules are those of an API that caches up to
cache_control marks: each mark's TTL holds for the tokens it covers, nothing past the last mark is cached, answers are
not readable. Under both, what a call wrote is readable once its first token is out, and lives from its last use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from keepwarm.replayers.cache import NEVER, Lease, PrefixCache, Write
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.prompts import cut
from keepwarm.traces.model import Breakpoint

SECOND = 1_000_000_000
AS_RECORDED = "as-recorded"


class ServiceTimes(NamedTuple):
    """How long a call takes: ``base_s``, then the prompt's uncached tokens, then the answer's, at tokens a second.

    The defaults are round figures of the size that real logs of a managed API show (a few seconds to the first block,
    about 60 answer tokens a second); they are a model to be replaced by a measured one.
    """

    base_s: float = 0.5
    prefill_tps: float = 8000.0
    decode_tps: float = 60.0

    def first_token_ns(self, uncached: int) -> int:
        """From the call's start to its first token."""
        return round((self.base_s + uncached / self.prefill_tps) * SECOND)

    def decode_ns(self, output: int) -> int:
        """From the first token to the last."""
        return round(max(output - 1, 0) / self.decode_tps * SECOND)


DEFAULT_TIMES = ServiceTimes()


class Service(NamedTuple):
    """A running call: its token account, and when its first and last tokens are due (absolute ns).

    ``prompt`` is what of the prompt's ``prompt_tokens`` the cache may know. ``writes`` are what will be cached;
    ``write_tokens`` those of them that were not read, by their TTL in seconds (None: no TTL).
    """

    lease: Lease
    prompt: tuple[Piece, ...]
    answer: tuple[Piece, ...]
    writes: tuple[Write, ...]
    prompt_tokens: int
    read: int
    write_tokens: dict[int | None, int]
    output: int
    first_token_ns: int
    done_ns: int


class Worker:
    """One simulated engine without a limit on how many calls run at once.

    ``ttl_s`` is a number of seconds or None for no TTL; ``as-recorded`` takes the TTL of each call's own marks, which
    only managed rules have. With ``speed`` X its TTLs and service times are X times shorter than they say.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        managed: bool = False,
        ttl_s: float | str | None = None,
        outputs_readable: bool = True,
        service: ServiceTimes = DEFAULT_TIMES,
        speed: float = 1.0,
    ) -> None:
        if ttl_s == AS_RECORDED and not managed:
            raise ValueError("only managed rules have recorded TTLs")
        self.cache = cache
        self.managed = managed
        self.outputs_readable = outputs_readable and not managed
        self.service = service
        self._ttl_s = ttl_s
        self._speed = speed

    def begin(
        self,
        prompt: tuple[Piece, ...],
        output: int,
        now_ns: int,
        *,
        marks: Sequence[Breakpoint] = (),
        answer: tuple[Piece, ...] = (),
    ) -> Service:
        """A call arrives: what of its prompt is readable now, and when it will answer."""
        total = sum(part.tokens for part in prompt)
        writes = self._writes(total, marks)
        block = self.cache.block
        limit = max((w.upto for w in writes), default=0) if self.managed else max(total - 1, 0)
        if self.managed:
            prompt = tuple(cut(prompt, limit))
        lease = self.cache.acquire(prompt, now_ns)
        read = min(lease.tokens, limit) // block * block
        first = now_ns + round(self.service.first_token_ns(total - read) / self._speed)
        done = first + round(self.service.decode_ns(output) / self._speed)
        written = self._written(writes, read)
        return Service(lease, prompt, answer, writes, total, read, written, output, first, done)

    def first_token(self, service: Service, now_ns: int) -> None:
        """The prompt is computed: what it writes is readable from now on."""
        self.cache.store(service.lease, service.prompt, service.writes, now_ns)

    def end(self, service: Service, now_ns: int) -> None:
        """The last token is out: the call's hold ends, and the TTLs of all it used run from now."""
        if service.answer and self.outputs_readable:
            whole = service.prompt + service.answer
            write = Write(sum(part.tokens for part in whole), service.writes[-1].ttl_ns)
            self.cache.store(service.lease, whole, (write,), now_ns)
        self.cache.release(service.lease, now_ns)

    def _ttl_ns(self, mark_ttl_s: float) -> int:
        ttl_s = mark_ttl_s if isinstance(self._ttl_s, str) else self._ttl_s
        return NEVER if ttl_s is None else round(ttl_s * SECOND / self._speed)

    def _writes(self, total: int, marks: Sequence[Breakpoint]) -> tuple[Write, ...]:
        if self.managed:
            return tuple(Write(min(mark.at, total), self._ttl_ns(mark.ttl_s)) for mark in sorted(marks))
        return (Write(total, self._ttl_ns(0)),)

    def _written(self, writes: Sequence[Write], read: int) -> dict[int | None, int]:
        """Tokens newly cached, by TTL; whole blocks only."""
        tokens: dict[int | None, int] = {}
        block = self.cache.block
        for write in writes:
            upto = write.upto // block * block
            if upto > read:
                ttl = None if write.ttl_ns >= NEVER else round(write.ttl_ns * self._speed / SECOND)
                tokens[ttl] = tokens.get(ttl, 0) + upto - read
                read = upto
        return tokens


def account(service: Service) -> dict[str, Any]:
    """The token account of a running call in the columns of an outcome; parts are disjoint and add up to the prompt.

    Writes with the TTLs that the managed APIs sell stand under their names, all others under ``cache_write_other``.
    """
    writes = dict(service.write_tokens)
    ttls = [ttl for ttl, tokens in writes.items() if tokens and ttl is not None]
    return {
        "prompt": service.prompt_tokens,
        "uncached": service.prompt_tokens - service.read - sum(writes.values()),
        "cache_read": service.read,
        "cache_write_5m": writes.pop(300, 0),
        "cache_write_1h": writes.pop(3600, 0),
        "cache_write_other": sum(writes.values()),
        "write_ttl_s": max(ttls) if ttls else None,
        "output": service.output,
        "usage_source": "reported",
        "write_source": "reported",
    }
