"""Numbers, durations and TTLs as a user writes them on the command line."""

from __future__ import annotations

from math import isfinite
from typing import Any

import click

from keepwarm.replayers.rules import AS_RECORDED

NO_TTL = "none"
LONGEST_S = 4e9
"""Over a century: times are ns in 64 bits."""
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Number(click.FloatRange):
    """A number inside a range: neither infinite nor NaN, which a range alone lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        told = float(super().convert(value, param, ctx))
        if not isfinite(told):
            self.fail(f"{value!r}: expected a number", param, ctx)
        return told


def duration(told: Any, expected: str = "seconds, or a number with ms, s, m, h or d") -> float:
    """The seconds that a text like 300, 250ms, 5m or 1h says."""
    text = str(told).strip()
    unit = next((unit for unit in UNITS if text.endswith(unit)), "s")
    try:
        seconds = float(text.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_S:
        raise click.BadParameter(f"{told!r}: expected {expected}")
    return seconds


def cache_ttl(told: Any) -> Any:
    """Seconds, or one of the words ``none`` and ``as-recorded``."""
    if told in (NO_TTL, AS_RECORDED):
        return told
    seconds = duration(told, "as-recorded, none, or a duration such as 300, 5m or 1h")
    return int(seconds) if seconds == int(seconds) else seconds
