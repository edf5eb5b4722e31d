"""Options of commands that stand as data, the types that they name, and the one that many have: to tell JSON."""

from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import click
import orjson

from keepwarm.replayers.rules import AS_RECORDED
from keepwarm.traces.model import DIALECTS, FLOWS
from keepwarm.traces.shipped import shipped

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


def cap(told: str) -> tuple[str | None, int]:
    """A cap of all calls, or of one flow's: N or FLOW=N; the flow, None for all, and the number."""
    flow, equals, number = told.rpartition("=")
    if (equals and flow not in FLOWS) or not number.isdecimal() or not 0 < int(number) < 1 << 40:
        raise click.BadParameter(f"{told!r}: expected a whole number above 0, or one for a flow: {FLOWS[0]}=N")
    return flow or None, int(number)


Type = click.ParamType[Any] | Callable[[str], Any]
"""As click takes it: a function reads a text."""
TYPES: dict[str, Type] = {
    "text": click.STRING,
    "whole": click.INT,
    "path": click.Path(path_type=Path),
    "directory": click.Path(path_type=Path, file_okay=False),
    "file": click.Path(path_type=Path, dir_okay=False),
    "duration": duration,
    "usd": Number(min=0),
    "cap": cap,
    "dialect": click.Choice(DIALECTS),
}
KEPT = ("metavar", "default", "multiple", "required", "help")


def options(*tables: str, **types: Type) -> Callable[[Any], Any]:
    """Gives a command the options of some tables of options.toml, which may name ``types`` of its own."""
    every = shipped("keepwarm.harness", "options.toml")
    return partial(with_options, [told for table in tables for told in every[table].items()], TYPES | types)


def with_options(named: list[tuple[str, dict[str, Any]]], types: dict[str, Type], command: Any) -> Any:
    """A command with options, each by its name with what is told of it."""
    for name, told in reversed(named):
        kind = {"type": _type(told["type"], types)} if "type" in told else {"is_flag": True}
        more = {key: told[key] for key in KEPT if key in told}
        flags = told.get("flags", [f"--{name.replace('_', '-')}"])
        command = click.option(*flags, show_default="default" in told, **kind, **more)(command)
    return command


def _type(told: Any, types: dict[str, Type]) -> Type:
    """A type by its name, of words to choose from, or of numbers between two."""
    if isinstance(told, str) or isinstance(told[0], str):
        return types[told] if isinstance(told, str) else click.Choice(told)
    return Number(*told) if isinstance(told[0], float) else click.IntRange(*told)


def tell(told: Any, as_json: bool, render: Callable[[Any], object]) -> None:
    """Print on standard output, as the option says: as JSON, or for people."""
    if as_json:
        click.echo(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    else:
        render(told)
