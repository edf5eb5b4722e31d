"""Options of commands that stand as data, and the types that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from keepwarm.harness.duration import Duration, Number
from keepwarm.traces.model import DIALECTS, FLOWS
from keepwarm.traces.shipped import shipped


class Cap(click.ParamType[Any]):
    """A cap of all calls, or of one flow's: N or FLOW=N."""

    name = "cap"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The flow, None for all, and the number."""
        flow, equals, number = str(value).rpartition("=")
        if (equals and flow not in FLOWS) or not number.isdecimal() or not 0 < int(number) < 1 << 40:
            self.fail(f"{value!r}: expected a whole number above 0, or one for a flow: {FLOWS[0]}=N", param, ctx)
        return flow or None, int(number)


TYPES: dict[str, click.ParamType[Any]] = {
    "text": click.STRING,
    "whole": click.INT,
    "path": click.Path(path_type=Path),
    "file": click.Path(path_type=Path, dir_okay=False),
    "duration": Duration(),
    "usd": Number(min=0),
    "cap": Cap(),
    "dialect": click.Choice(DIALECTS),
}
KEPT = ("metavar", "default", "multiple", "required", "help")


def options(*tables: str, **types: click.ParamType[Any]) -> Callable[..., Any]:
    """Gives a command the options of some tables of options.toml, which may name ``types`` of its own."""
    every = shipped("keepwarm.harness", "options.toml")
    return options_of([told for table in tables for told in every[table].items()], TYPES | types)


def options_of(named: list[tuple[str, dict[str, Any]]], types: dict[str, click.ParamType[Any]]) -> Callable[..., Any]:
    """Gives a command options, each by its name with what is told of it."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, told in reversed(named):
            kind = {"type": _type(told["type"], types)} if "type" in told else {"is_flag": True}
            more = {key: told[key] for key in KEPT if key in told}
            flags = told.get("flags", [f"--{name.replace('_', '-')}"])
            command = click.option(*flags, show_default="default" in told, **kind, **more)(command)
        return command

    return give


def _type(told: Any, types: dict[str, click.ParamType[Any]]) -> click.ParamType[Any]:
    """A type by its name, of words to choose from, or of numbers between two."""
    if isinstance(told, str) or isinstance(told[0], str):
        return types[told] if isinstance(told, str) else click.Choice(told)
    return Number(*told) if isinstance(told[0], float) else click.IntRange(*told)
