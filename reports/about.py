"""About is what a run says of itself in run.json: what was run, on what, with which options; checked as it is read."""

from typing import Any

import orjson

from keepwarm.traces.errors import InputError
from keepwarm.traces.place import first_line, locate
from keepwarm.traces.shipped import shipped

FORMAT = 1
"""The newest form of run.json that this program reads; one that does not say is of the first."""

FIELDS: dict[str, dict[str, str]] = shipped("keepwarm.reports", "about.toml")
KINDS: dict[str, Any] = {"object": dict, "whole": int, "truth": bool, "text": str, "number": (int, float)}


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
    for name, expected in FIELDS.items():
        for field in expected["fields"].split():
            value, kind = value_at(about, field), KINDS[name]
            if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise InputError(f"{path}: field {field!r} is {value!r:.40}, expected {expected['told']}")
    version = about.get("format") or FORMAT
    if version > FORMAT:
        raise InputError(f"{path}: format {version} is newer than this program reads ({FORMAT}): upgrade keepwarm")
    return about


def value_at(told: Any, place: str) -> Any:
    """What stands at a place, such as ``endpoint.url``, in objects that lie in one another; None where nothing does."""
    for name in place.split("."):
        told = told.get(name) if isinstance(told, dict) else None
    return told
