"""Values taken out of a transcript's lines, of the type they must have: TypeError or ValueError where they have not."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from keepwarm.traces.steps import Usage

MOST_TOKENS = 1 << 31
LAST_NS = 1 << 62


def string(value: Any) -> str:
    """A text that must be there."""
    if type(value) is not str:
        raise TypeError(f"expected a string, found {type(value).__name__}")
    return value


def maybe_string(value: Any) -> str | None:
    """A text that may be absent."""
    return None if value is None else string(value)


def maybe_bool(value: Any) -> bool | None:
    """A yes or no that may be absent."""
    if value is not None and type(value) is not bool:
        raise TypeError(f"expected true or false, found {type(value).__name__}")
    return value


def tokens(value: Any) -> int:
    """A token count; absent is none."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < MOST_TOKENS:
        raise ValueError(f"expected a token count, found {value!r:.40}")
    return value


def time_ns(stamp: Any) -> int:
    """An ISO time as ns since 1970."""
    ns = round(datetime.fromisoformat(stamp).timestamp() * 1000) * 1_000_000
    if not 0 <= ns < LAST_NS:
        raise ValueError(f"expected a time after 1970, found {stamp!r:.40}")
    return ns


def usage(told: dict[str, Any]) -> Usage:
    """The account that a message's ``usage`` gives."""
    written = tokens(told.get("cache_creation_input_tokens"))
    by_ttl = told.get("cache_creation") or {}
    five, hour = (tokens(by_ttl.get(f"ephemeral_{ttl}_input_tokens")) for ttl in ("5m", "1h"))
    read = told.get("cache_read_input_tokens")
    read_told, write_told = read is not None, told.get("cache_creation_input_tokens") is not None
    other = max(written - five - hour, 0)
    return Usage(tokens(told["input_tokens"]), tokens(read), five, hour, other, read_told, write_told)
