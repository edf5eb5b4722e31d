"""The options that say which endpoint, and what opens it: of replay and doctor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from keepwarm.harness.duration import Duration
from keepwarm.traces.model import DIALECTS

if TYPE_CHECKING:
    from keepwarm.replayers.address import Address


def choice(name: str, choices: Sequence[str], text: str) -> Callable[..., Any]:
    """An option that is one of some words, the first unless it is given."""
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=text)


OPTIONS = (
    click.option("--model", help="The model to ask for; else the only one that the endpoint serves."),
    click.option("--key-env", metavar="NAME", help="Environment variable that holds the API key."),
    click.option("--key-file", metavar="FILE", help="File whose first line is the API key."),
    click.option(
        "--header", multiple=True, metavar="NAME=VARIABLE", help="A header, its value from the environment; repeatable."
    ),
    click.option("--ca", metavar="FILE", help="Certificates (PEM) to trust besides the usual ones."),
    choice("--transport", ["own", "httpx"], "httpx's: for HTTP/2 and for proxies as the environment says; slower."),
    click.option("--tokenizer", metavar="FILE", help="The model's tokenizer.json: prompts of words it knows."),
    click.option("--timeout", type=Duration(), default=600.0, show_default=True, help="For one whole call."),
)
DIALECT = click.option("--dialect", type=click.Choice(DIALECTS), default="messages", show_default=True)


def endpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def take_address(url: str, dialect: str, options: dict[str, Any]) -> Address:
    """The address that the options say, taken out of them."""
    from keepwarm.replayers.http import reach

    names = ("key_env", "key_file", "header", "ca", "transport")
    return reach(url, dialect, **{name: options.pop(name) for name in names})
