"""The scheduling hints of a request: headers, and Dynamo's ``nvext``, whose objects take no field they do not know.

The fields and their types are those of Dynamo 1.6.1, and so is the wording of what it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from keepwarm.harness.refused import Refused
from keepwarm.replayers.sse import part
from keepwarm.traces.model import Hints

_RANGES = {"i32": (-(1 << 31), 1 << 31), "u32": (0, 1 << 32), "u64": (0, 1 << 64)}
_NAMES = {"bool": "a boolean", "str": "a string"}
_AGENT_HINTS = {
    "priority": "i32",
    "strict_priority": "u32",
    "osl": "u32",
    "speculative_prefill": "bool",
    "latency_sensitivity": "f64",
}
_FIELDS: dict[str, Any] = {
    "greed_sampling": "bool",
    "use_raw_prompt": "bool",
    "annotations": ["str"],
    "backend_instance_id": "u64",
    "token_data": ["u32"],
    "max_thinking_tokens": "u32",
    "cache_salt": "str",
    "extra_fields": ["str"],
    "metadata_upload": {"url": "str"},
    "prefill_worker_id": "u64",
    "decode_worker_id": "u64",
    "dp_rank": "u32",
    "prefill_dp_rank": "u32",
    "agent_hints": _AGENT_HINTS,
    "request_timestamp_ms": "f64",
    "routing_constraints": {"required_taints": "any", "preferred_taints": "any"},
    "router": {"ttft_target": "f64", "itl_target": "f64"},
}
_HEADERS = {"priority": "x-dynamo-request-priority", "strict_priority": "x-dynamo-request-strict-priority"}


def hints(body: Mapping[str, Any], headers: Mapping[str, str]) -> Hints | None:
    """What a request hints, a header's word before the body's; a header that is no such number says nothing."""
    _check(body.get("nvext"), _FIELDS, "")
    told = part(part(body, "nvext"), "agent_hints")
    found = {name: told.get(name) for name in Hints._fields if name in _AGENT_HINTS}
    for name, header in _HEADERS.items():
        low, high = _RANGES[_AGENT_HINTS[name]]
        try:
            number = int(headers[header])
        except (KeyError, ValueError):
            continue
        if low <= number < high:
            found[name] = number
    return Hints(**found) if any(value is not None for value in found.values()) else None


def salt(body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """What sets a request's cache apart from others; empty for the cache of all. vLLM has it outside of ``nvext``."""
    inner, outer = part(body, "nvext").get("cache_salt"), body.get("cache_salt")
    if outer is not None and not isinstance(outer, str):
        raise Refused(400, "cache_salt: expected a string")
    return headers.get("x-tenant-id", "").strip() or inner or outer or ""


def _check(value: Any, wanted: Any, path: str) -> None:
    """Refuse a value that is not what is wanted: a type's name, a list of one, or an object's fields."""
    if value is None or wanted == "any":
        return
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            raise _refused(path, f"invalid type: {_told(value)}, expected an object")
        for name, inner in value.items():
            if name not in wanted:
                known = [f"`{one}`" for one in wanted]
                expected = " or ".join(known) if len(known) < 3 else f"one of {', '.join(known)}"
                raise _refused(path, f"unknown field `{name}`, expected {expected}")
            _check(inner, wanted[name], f"{path}.{name}" if path else name)
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            raise _refused(path, f"invalid type: {_told(value)}, expected a sequence")
        for index, inner in enumerate(value):
            _check(() if inner is None else inner, wanted[0], f"{path}[{index}]")  # null is none of the wanted
    elif not _is(value, wanted):
        ranged = wanted in _RANGES and isinstance(value, int) and not isinstance(value, bool)
        kind = "value" if ranged else "type"
        raise _refused(path, f"invalid {kind}: {_told(value)}, expected {_NAMES.get(wanted, wanted)}")


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool) or wanted == "bool":
        return isinstance(value, bool) and wanted == "bool"
    if wanted == "str":
        return isinstance(value, str)
    if wanted == "f64":
        return isinstance(value, int | float)
    low, high = _RANGES[wanted]
    return isinstance(value, int) and low <= value < high


def _told(value: Any) -> str:
    """A value in the words of Dynamo's own parser."""
    if isinstance(value, bool):
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, str):
        return f"string {orjson.dumps(value).decode()}"
    if isinstance(value, int | float):
        return f"{'integer' if isinstance(value, int) else 'floating point'} `{value}`"
    return "map" if isinstance(value, dict) else "sequence" if isinstance(value, list) else "null"


def _refused(path: str, what: str) -> Refused:
    return Refused(400, f"invalid nvext: {path}{': ' if path else ''}{what}")
