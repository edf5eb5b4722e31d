"""The Arrow schemas of trace format v1 and of outcomes, their version, and the upgrades from older versions."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

VERSION = 1
TRACE_KEY = b"keepwarm.trace"
OUTCOMES_KEY = b"keepwarm.outcomes"

UPGRADES: dict[int, Callable[[pa.Table], pa.Table]] = {}
"""``UPGRADES[n]`` turns a table of version n into one of version n + 1. Version 1 is the first."""


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=True)


def _must(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


AFTER = pa.struct(
    [_must("call", pa.string()), _must("trigger", pa.string()), _must("gap_ns", pa.int64()), _must("kind", pa.string())]
)
SEGMENT = pa.struct(
    [
        _must("hash", pa.int64()),
        _must("tokens", pa.int32()),
        _must("kind", pa.string()),
        _field("answer_of", pa.string()),
        _field("text", pa.large_string()),
    ]
)
BREAKPOINT = pa.struct([_must("at", pa.int64()), _must("ttl_s", pa.int32())])
TOOL = pa.struct(
    [
        _must("name", pa.string()),
        _field("start_ns", pa.int64()),
        _field("duration_ns", pa.int64()),
        _field("result_tokens", pa.int32()),
        _field("is_error", pa.bool_()),
        _field("agent", pa.string()),
    ]
)
HINTS = pa.struct(
    [
        _field("priority", pa.int32()),
        _field("strict_priority", pa.int32()),
        _field("osl", pa.int32()),
        _field("speculative_prefill", pa.bool_()),
        _field("ttl_s", pa.int32()),
    ]
)
ATTEMPT = pa.struct(
    [
        _must("sent_ns", pa.int64()),
        _field("done_ns", pa.int64()),
        _field("status", pa.int16()),
        _field("error", pa.string()),
    ]
)
PREFIX_BREAK = pa.struct(
    [
        _must("at", pa.int64()),
        _must("position", pa.int32()),
        _must("kind", pa.string()),
        _must("tokens", pa.int32()),
        _must("change", pa.string()),
    ]
)


def _rows(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


TRACE = pa.schema(
    [
        _must("session", pa.string()),
        _must("agent", pa.string()),
        _must("call", pa.string()),
        _must("role", pa.string()),
        _must("turn", pa.int32()),
        _must("start_ns", pa.int64()),
        _must("end_ns", pa.int64()),
        _must("keep", pa.int64()),
        _must("usage_source", pa.string()),
        _must("write_source", pa.string()),
        _must("origin", pa.string()),
        _field("session_start_ns", pa.int64()),
        _field("agent_type", pa.string()),
        _field("parent_agent", pa.string()),
        _field("spawned_by", pa.string()),
        _field("flow", pa.string()),
        _must("after", _rows(AFTER)),
        _field("gap_ns", pa.int64()),
        _field("gap_kind", pa.string()),
        _field("first_token_ns", pa.int64()),
        _field("model", pa.string()),
        _field("dialect", pa.string()),
        _field("stream", pa.bool_()),
        _field("prompt_parent", pa.string()),
        _must("append", _rows(SEGMENT)),
        _field("prefix_change", pa.string()),
        _must("breakpoints", _rows(BREAKPOINT)),
        _field("prompt", pa.int64()),
        _field("uncached", pa.int64()),
        _field("cache_read", pa.int64()),
        _field("cache_write_5m", pa.int64()),
        _field("cache_write_1h", pa.int64()),
        _field("cache_write_other", pa.int64()),
        _field("output", pa.int64()),
        _field("output_est", pa.int64()),
        _field("reasoning", pa.int64()),
        _must("tools", _rows(TOOL)),
        _field("hints", HINTS),
        _field("miss_reason", pa.string()),
        _field("stop_reason", pa.string()),
        _field("status", pa.int16()),
        _field("error", pa.string()),
        _field("retries", pa.int16()),
        _field("completed", pa.bool_()),
        _field("first_byte_ns", pa.int64()),
        _field("prefix_break", PREFIX_BREAK),
        _field("attempts", _rows(ATTEMPT)),
    ]
)

DESCRIPTIVE = (
    *("session", "session_start_ns", "agent", "call", "role", "agent_type", "parent_agent", "spawned_by", "turn"),
    *("flow", "gap_ns", "gap_kind", "model", "dialect", "stream", "prefix_change", "origin"),
)
"""Trace columns that an outcome repeats as they are."""

RECORDED = (
    *("start_ns", "first_token_ns", "end_ns", "prompt", "uncached", "cache_read", "cache_write_5m", "cache_write_1h"),
    *("cache_write_other", "output", "output_est", "reasoning", "usage_source", "write_source", "miss_reason"),
    *("stop_reason", "status", "error", "retries", "completed"),
)
"""Trace columns that stand in an outcome as ``rec_<name>``."""

MEASURED = (
    _must("copy", pa.int32()),
    _field("due_ns", pa.int64()),
    _field("sent_ns", pa.int64()),
    _field("first_byte_ns", pa.int64()),
    _field("first_token_ns", pa.int64()),
    _field("last_token_ns", pa.int64()),
    _field("done_ns", pa.int64()),
    _field("token_ns", pa.list_(pa.int64())),
    _field("prompt", pa.int64()),
    _field("uncached", pa.int64()),
    _field("cache_read", pa.int64()),
    _field("cache_write_5m", pa.int64()),
    _field("cache_write_1h", pa.int64()),
    _field("cache_write_other", pa.int64()),
    _field("write_ttl_s", pa.int32()),
    _field("output", pa.int64()),
    _field("reasoning", pa.int64()),
    _must("usage_source", pa.string()),
    _must("write_source", pa.string()),
    _field("status", pa.int16()),
    _field("error", pa.string()),
    _field("stop_reason", pa.string()),
    _field("completed", pa.bool_()),
    _field("endpoint", pa.string()),
    _field("worker", pa.string()),
    _must("attempts", _rows(ATTEMPT)),
)

OUTCOMES = pa.schema(
    [
        *(TRACE.field(name) for name in DESCRIPTIVE),
        _must("planned_prompt", pa.int64()),
        _must("planned_keep", pa.int64()),
        *MEASURED,
        *(_field(f"rec_{name}", TRACE.field(name).type) for name in RECORDED),
    ]
)
"""Outcomes carry what the plan asked for (``planned_prompt``, and ``planned_keep``: how many of those tokens it shares
with the prompt it grew from), what was measured, and what was recorded."""
