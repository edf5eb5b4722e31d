"""The scheduling hints of a request: headers, and Dynamo's ``nvext``, whose objects take no field they do not know.

The fields and their types, in ``nvext.toml``, are those of Dynamo 1.6.1, and so is the wording of what it refuses.
"""

from collections.abc import Mapping
from contextlib import suppress
from types import NoneType
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from keepwarm.replayers.sse import part
from keepwarm.traces.model import Hints
from keepwarm.traces.shipped import shipped

_FIELDS = shipped("keepwarm.harness", "nvext.toml")
_HEADERS = {"priority": "x-dynamo-request-priority", "strict_priority": "x-dynamo-request-strict-priority"}
_RANGES = {"i32": range(-(1 << 31), 1 << 31), "u32": range(1 << 32), "u64": range(1 << 64)}
_SHAPES: dict[Any, str] = {dict: "object", list: "sequence"}
_NAMES = {"bool": "a boolean", "str": "a string", "object": "an object", "sequence": "a sequence"}
_TOLD = {bool: "boolean `{}`", str: "string {}", int: "integer `{}`", float: "floating point `{}`", NoneType: "null"}
_TOLD |= {dict: "map", list: "sequence"}
_TYPES = {"bool": (bool,), "str": (str,), "f64": (int, float), "object": (dict,), "sequence": (list,), "any": (*_TOLD,)}
_TYPES |= dict.fromkeys(_RANGES, (int,))


def hints(body: Mapping[str, Any], headers: Mapping[str, str]) -> Hints | None:
    """What a request hints, a header's word before the body's; a header that is no such number says nothing."""
    if body.get("nvext") is not None:
        _check(body["nvext"], _FIELDS, "")
    told = part(part(body, "nvext"), "agent_hints")
    found = {name: told.get(name) for name in Hints._fields}
    for name, header in _HEADERS.items():
        with suppress(KeyError, ValueError):
            number = int(headers[header])
            if number in _RANGES[_FIELDS["agent_hints"][name]]:
                found[name] = number
    return Hints(**found) if any(value is not None for value in found.values()) else None


def salt(body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """What sets a request's cache apart from others; empty for the cache of all. vLLM has it outside of ``nvext``."""
    inner, outer = part(body, "nvext").get("cache_salt"), body.get("cache_salt")
    if outer is not None and not isinstance(outer, str):
        raise HTTPException(400, "cache_salt: expected a string")
    return headers.get("x-tenant-id", "").strip() or inner or outer or ""


def _check(value: Any, wanted: Any, path: str) -> None:
    """Refuse a value that is not what is wanted: a type's name, a list of one, or an object's fields, each or null."""
    kind = _SHAPES.get(type(wanted), wanted)
    if type(value) not in _TYPES[kind]:
        raise _refused(path, f"invalid type: {_told(value)}, expected {_NAMES.get(kind, kind)}")
    if kind in _RANGES and value not in _RANGES[kind]:
        raise _refused(path, f"invalid value: {_told(value)}, expected {kind}")
    for index, inner in enumerate(value if kind == "sequence" else ()):
        _check(inner, wanted[0], f"{path}[{index}]")
    for name, inner in value.items() if kind == "object" else ():
        if name not in wanted:
            known = [f"`{one}`" for one in wanted]
            expected = " or ".join(known) if len(known) < 3 else f"one of {', '.join(known)}"
            raise _refused(path, f"unknown field `{name}`, expected {expected}")
        if inner is not None:
            _check(inner, wanted[name], f"{path}.{name}" if path else name)


def _told(value: Any) -> str:
    """A value in the words of Dynamo's own parser."""
    return _TOLD[type(value)].format(orjson.dumps(value).decode())


def _refused(path: str, what: str) -> HTTPException:
    return HTTPException(400, f"invalid nvext: {path}{': ' if path else ''}{what}")
