"""About is what a run says of itself in run.json: what was run, on what, with which options; checked as it is read."""

from __future__ import annotations

from typing import Any

import orjson

from keepwarm.traces.errors import InputError
from keepwarm.traces.place import first_line, locate

FORMAT = 1
"""The newest form of run.json that this program reads; one that does not say is of the first."""

NUMBER = (int, float)
KINDS: dict[type | tuple[type, ...], str] = {
    int: "a whole number",
    bool: "true or false",
    str: "text",
    dict: "a JSON object",
    NUMBER: "a number",
}
FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "planned_calls": int,
    "interrupted": bool,
    "options": dict,
    "options.speed": NUMBER,
    "options.gap_cap_s": NUMBER,
    "endpoint": dict,
    "endpoint.clock_driven": bool,
    "endpoint.has_ttl": bool,
    "trace": dict,
    "trace.recorded_breaks": int,
    "clock": dict,
    "cluster": dict,
    "cluster.gpu_hour_usd": NUMBER,
    "cluster.gpus": int,
    **dict.fromkeys(("fidelity", "endpoint.preflight", "counters", "counters.before", "counters.after"), dict),
    **dict.fromkeys(
        ("name", "mode", "fidelity.match", "endpoint.url", "endpoint.name", "trace.name", "trace.digest"), str
    ),
}
"""What reports read of run.json and what it must be, unless it is null or not there; an object before its fields."""


def read_about(path: str) -> dict[str, Any]:
    """What a run.json holds. InputError names the file, and the field that is not what it must be."""
    system, inner = locate(path)
    try:
        with system.open_input_file(inner) as source:
            about = orjson.loads(source.read())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, expected beside outcomes.parquet") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON: {first_line(error)}") from error
    if not isinstance(about, dict):
        raise InputError(f"{path}: expected a JSON object")
    for field, kind in FIELDS.items():
        _check(path, field, _value(about, field), kind)
    version = about.get("format") or FORMAT
    if version > FORMAT:
        raise InputError(f"{path}: format {version} is newer than this program reads ({FORMAT}): upgrade keepwarm")
    return about


def _value(about: dict[str, Any], field: str) -> Any:
    outer, _, inner = field.rpartition(".")
    return (about.get(outer) or {}).get(inner) if outer else about.get(inner)


def _check(path: str, field: str, value: Any, kind: type | tuple[type, ...]) -> None:
    number = isinstance(value, bool) and kind is not bool
    if value is not None and (number or not isinstance(value, kind)):
        raise InputError(f"{path}: field {field!r} is {value!r:.40}, expected {KINDS[kind]}")
