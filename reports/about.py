"""About is what a run says of itself in run.json: what was run, on what, with which options; checked as it is read."""

from __future__ import annotations

from typing import Any

import orjson

from keepwarm.traces.errors import InputError
from keepwarm.traces.place import first_line, locate

FORMAT = 1
"""The newest form of run.json that this program reads; one that does not say is of the first."""

OBJECTS = "options endpoint trace clock cluster fidelity counters"
FIELDS: dict[type | tuple[type, ...], tuple[str, str]] = {
    dict: ("a JSON object", f"{OBJECTS} endpoint.preflight counters.before counters.after"),
    int: ("a whole number", "format planned_calls trace.recorded_breaks cluster.gpus"),
    bool: ("true or false", "interrupted endpoint.clock_driven endpoint.has_ttl"),
    str: ("text", "name mode fidelity.match endpoint.url endpoint.name trace.name trace.digest"),
    (int, float): ("a number", "options.speed options.gap_cap_s cluster.gpu_hour_usd"),
}
"""What reports read of run.json, by what it must be unless it is null or not there; objects before their fields."""


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
    for kind, (expected, fields) in FIELDS.items():
        for field in fields.split():
            value = _value(about, field)
            if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise InputError(f"{path}: field {field!r} is {value!r:.40}, expected {expected}")
    version = about.get("format") or FORMAT
    if version > FORMAT:
        raise InputError(f"{path}: format {version} is newer than this program reads ({FORMAT}): upgrade keepwarm")
    return about


def _value(about: dict[str, Any], field: str) -> Any:
    outer, _, inner = field.rpartition(".")
    return (about.get(outer) or {}).get(inner) if outer else about.get(inner)
