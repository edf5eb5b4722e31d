"""Hearing is an answer as it comes in: what a connection tells of it, what its dialect's reader makes of that."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import orjson

from keepwarm.replayers.account import account
from keepwarm.replayers.address import hushed
from keepwarm.replayers.endpoint import Answer, Said
from keepwarm.replayers.sse import Events, Reader, failure, fault
from keepwarm.traces.model import STOP_REASONS

PASSING = (408, 409, 429)
"""What a server may say of a call that it would take later, besides errors of its own."""


class Hearing:
    """One answer. ``streamed`` says whether it was asked for as a stream; an error is told whole all the same."""

    def __init__(self, reader: Reader, *, streamed: bool) -> None:
        self.reader = reader
        self.status: int | None = None
        self.head_ns: int | None = None
        self.first_byte_ns: int | None = None
        self.retry_after_s: float | None = None
        self.told = ("", "")
        self._streamed = streamed
        self._events: Events | None = None
        self._chunks: list[bytes] = []
        self._broken = False

    def begin(self, status: int, headers: Sequence[tuple[bytes, bytes]], at_ns: int) -> None:
        """Its head is there."""
        self.status, self.head_ns = status, at_ns
        if status in PASSING or status >= 500:
            self.retry_after_s = _wait_s(headers)
        self._events = Events() if status == 200 and self._streamed else None

    def data(self, chunk: bytes, at_ns: int) -> None:
        """A piece of its body is there."""
        if self.first_byte_ns is None:
            self.first_byte_ns = at_ns
        if self._events is None:
            self._chunks.append(chunk)
            return
        try:
            for event in self._events.feed(chunk):
                self.reader.event(event, at_ns)
        except orjson.JSONDecodeError:
            self._broken = True

    def end(self) -> str | None:
        """It is over: the class of its error, if it is one."""
        heard, status = self.reader.heard, self.status or 0
        if status == 200 and self._streamed:
            if heard.fault:
                return failure(200, *heard.fault)
            return None if heard.finished else "other" if self._broken else "reset"
        data = b"".join(self._chunks)
        try:
            if status == 200:
                self.reader.whole(data)
                return None if heard.finished else "other"
            self.told = fault(orjson.loads(data))
        except orjson.JSONDecodeError:
            return "other" if status == 200 else failure(status, "", "")
        return failure(status, *self.told)

    def answer(
        self, dialect: str, sent_ns: int, done_ns: int, error: str | None, secrets: Mapping[str, str], writes_told: bool
    ) -> Answer:
        """All that came of it, a server's own words without the ``secrets`` that were sent. Without ``writes_told``
        what it says of cache writes is not taken for true.
        """
        heard = self.reader.heard
        usage = account(heard.usage, dialect)
        if not writes_told and usage["write_source"] == "reported":
            usage |= dict.fromkeys(("cache_write_5m", "cache_write_1h", "cache_write_other"))
            usage |= {"write_source": "inferred", "uncached": usage["prompt"] - usage["cache_read"]}
        if usage.get("usage_extra"):
            usage["usage_extra"] = hushed(usage["usage_extra"], secrets)
        stopped = heard.stop_reason
        return Answer(
            sent_ns,
            done_ns,
            first_byte_ns=self.first_byte_ns,
            first_token_ns=heard.token_ns[0] if heard.token_ns else None,
            last_token_ns=heard.token_ns[-1] if heard.token_ns else None,
            token_ns=tuple(heard.token_ns) or None,
            status=self.status,
            error=error,
            stop_reason=stopped if stopped is None or stopped in STOP_REASONS else "other",
            worker=heard.worker,
            said=_said(heard.text, usage),
            head_ns=self.head_ns,
            retry_after_s=self.retry_after_s,
            told=hushed(" ".join(heard.fault or self.told), secrets) or None,
            **usage,
        )


def _wait_s(headers: Sequence[tuple[bytes, bytes]]) -> float | None:
    """How long a server wants to be left alone, where it says so, in a number or as the time when that is over."""
    told = {name.lower(): value for name, value in headers}
    milliseconds, after = told.get(b"retry-after-ms"), told.get(b"retry-after", b"").decode("latin-1")
    with suppress(ValueError, OverflowError):
        try:
            seconds = float(milliseconds) / 1000 if milliseconds else float(after)
        except ValueError:
            seconds = parsedate_to_datetime(after).timestamp() - time()
        return seconds if 0 <= seconds < math.inf else None
    return None


def _said(text: list[str] | None, usage: dict[str, Any]) -> Said | None:
    """What was said, where it is kept, there is any, and its length is known: without what was thought."""
    said, output = "".join(text or ()), usage.get("output")
    if not said.strip() or not output:
        return None
    return Said(orjson.dumps(said)[1:-1], max(output - (usage["reasoning"] or 0), 1))
