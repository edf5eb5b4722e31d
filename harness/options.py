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
    "path": click.Path(path_type=Path),
    "duration": Duration(),
    "cap": Cap(),
}
DIALECT = click.option("--dialect", type=click.Choice(DIALECTS), default="messages", show_default=True)


def options(*tables: str) -> Callable[..., Any]:
    """Gives a command the options of some tables of options.toml."""
    every = shipped("keepwarm.harness", "options.toml")
    return options_of([(name, told) for table in tables for name, told in every[table].items()], TYPES)


def options_of(named: list[tuple[str, dict[str, Any]]], types: dict[str, click.ParamType[Any]]) -> Callable[..., Any]:
    """Gives a command options, each by its name with what is told of it."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, told in reversed(named):
            kind = {"type": _type(told["type"], types)} if "type" in told else {"is_flag": True}
            more = {key: told[key] for key in ("metavar", "default", "multiple", "help") if key in told}
            shown = "default" in told
            command = click.option(f"--{name.replace('_', '-')}", show_default=shown, **kind, **more)(command)
        return command

    return give


def choice(name: str, choices: list[str] | tuple[str, ...], text: str) -> Callable[..., Any]:
    """An option that is one of some words, the first unless it is given."""
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=text)


def _type(told: Any, types: dict[str, click.ParamType[Any]]) -> click.ParamType[Any]:
    """A type by its name, of words to choose from, or of numbers between two."""
    if isinstance(told, str) or isinstance(told[0], str):
        return types[told] if isinstance(told, str) else click.Choice(told)
    return Number(*told) if isinstance(told[0], float) else click.IntRange(*told)
