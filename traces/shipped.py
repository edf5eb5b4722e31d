"""Shipped is data that comes with the program, a TOML file beside the code that reads it."""

import tomllib
from importlib.resources import files
from typing import Any


def shipped(package: str, name: str) -> dict[str, Any]:
    """What a package's file of data holds."""
    return tomllib.loads(files(package).joinpath(name).read_text("utf-8"))
