"""The Arrow schemas of trace format v1 and of outcomes, their version, and the upgrades from older versions."""

from collections.abc import Callable
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pyarrow as pa

from keepwarm.traces.model import Call, Outcome

VERSION = 1
TRACE_KEY = b"keepwarm.trace"
OUTCOMES_KEY = b"keepwarm.outcomes"

UPGRADES: dict[int, Callable[[pa.Table], pa.Table]] = {}
"""``UPGRADES[n]`` turns a table of version n into one of version n + 1. Version 1 is the first."""

_KINDS = {int: pa.int64(), str: pa.string(), bool: pa.bool_()}
_KINDS_BY_NAME = {
    **dict.fromkeys(("turn", "copy", "tokens", "result_tokens", "position"), pa.int32()),
    **dict.fromkeys(("ttl_s", "write_ttl_s", "priority", "strict_priority", "osl"), pa.int32()),
    **dict.fromkeys(("status", "retries"), pa.int16()),
    "text": pa.large_string(),
}
"""The types of values that are not their Python type's own, wherever a field of that name stands."""


def struct_of(row: type) -> pa.StructType:
    """A named tuple's fields with their Arrow types; those that may be None are nullable."""
    return pa.struct([_field(name, hint) for name, hint in get_type_hints(row).items()])


def _field(name: str, hint: Any) -> pa.Field:
    nullable = isinstance(hint, UnionType)
    return pa.field(name, _kind(name, get_args(hint)[0] if nullable else hint), nullable)


def _kind(name: str, hint: Any) -> pa.DataType:
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return pa.list_(pa.field("item", _kind("", item), nullable=item is int))
    return struct_of(hint) if hasattr(hint, "_fields") else _KINDS_BY_NAME.get(name) or _KINDS[hint]


LATER = ("attempts",)
"""Lists that files of version 1 did not have at first, and may lack."""

TRACE = pa.schema([field.with_nullable(field.nullable or field.name in LATER) for field in struct_of(Call)])

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

MEASURED = tuple(_field(name, hint) for name, hint in get_type_hints(Outcome).items() if name != "call")
"""What a run measures: an Outcome's own fields."""

OUTCOMES = pa.schema(
    [
        *(TRACE.field(name) for name in DESCRIPTIVE),
        *(_field(name, int) for name in ("planned_prompt", "planned_keep")),
        *MEASURED,
        *(pa.field(f"rec_{name}", TRACE.field(name).type) for name in RECORDED),
    ]
)
"""Outcomes carry what the plan asked for (``planned_prompt``, and ``planned_keep``: how many of those tokens it shares
with the prompt it grew from), what was measured, and what was recorded."""
