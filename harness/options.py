"""Options of commands that stand as data, and the types that they name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from keepwarm.harness.duration import Number, duration
from keepwarm.traces.model import DIALECTS, FLOWS
from keepwarm.traces.shipped import shipped


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
