"""Durations and TTLs as a user writes them on the command line."""

from __future__ import annotations

from math import isfinite
from typing import Any

import click

from keepwarm.replayers.rules import AS_RECORDED

NO_TTL = "none"
LONGEST_S = 4e9
"""Over a century: times are ns in 64 bits."""
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float | None:
    """The seconds that a text like 300, 250ms, 5m or 1h says; None if it says none."""
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    try:
        value = float(text.removesuffix(unit)) * UNITS.get(unit, 1.0)
    except ValueError:
        return None
    return value if 0 <= value <= LONGEST_S else None


class Number(click.FloatRange):
    """A number inside a range: neither infinite nor NaN, which a range alone lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        told = float(super().convert(value, param, ctx))
        if not isfinite(told):
            self.fail(f"{value!r}: expected a number", param, ctx)
        return told


class Duration(click.ParamType[float]):
    """Seconds, as a number or with a unit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds that a text says."""
        told = seconds(str(value).strip())
        if told is None:
            self.fail(f"{value!r}: expected seconds, or a number with ms, s, m, h or d", param, ctx)
        return told


class Ttl(click.ParamType[Any]):
    """A duration, or one of the words ``none`` and ``as-recorded``."""

    name = "ttl"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Seconds, or the word itself."""
        if value in (NO_TTL, AS_RECORDED):
            return value
        told = seconds(str(value).strip())
        if told is None:
            self.fail(f"{value!r}: expected as-recorded, none, or a duration such as 300, 5m or 1h", param, ctx)
        return int(told) if told == int(told) else told
