"""Imports point one way, and each outside library has its layer."""

from __future__ import annotations

import ast
import tokenize
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "traces": {"traces"},
    "replayers": {"traces", "replayers"},
    "reports": {"traces", "reports"},
    "harness": {"traces", "replayers", "reports", "harness"},
}
OUTSIDE = {
    "click": {"harness"},
    "starlette": {"harness"},
    "uvicorn": {"harness"},
    "polars": {"reports"},
    "hdrh": {"reports"},
    "httpx": {"replayers", "harness"},
    "asyncio_throttle": {"replayers", "harness"},
}


def imported(source: str) -> set[str]:
    """Dotted names a module imports, those inside functions too; ``from a import b`` counts as a and as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def offences(layer: str, source: str) -> set[str]:
    """What a module of that layer imports and may not."""
    bad = set()
    for name in imported(source):
        top, _, rest = name.partition(".")
        inner = rest.partition(".")[0]
        if top == "keepwarm" and inner and inner not in LAYERS[layer]:
            bad.add(name)
        if not top or top in LAYERS or layer not in OUTSIDE.get(top, {layer}):
            bad.add(name)
    return bad


BUDGET = 12_000
"""Lines of code of the whole product."""


def code_lines(source: str) -> int:
    """Lines that hold code: neither blank nor comment nor docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_the_product_is_small_enough_to_read() -> None:
    """Within its budget, which is of lines of code (by ``wc``, blank lines and docstrings too, it is more): what comes
    in takes something else's place. No file is above 350 lines of any kind.
    """
    files = [file for layer in LAYERS for file in (ROOT / layer).rglob("*.py")]
    assert sum(code_lines(file.read_text()) for file in files) <= BUDGET
    assert [file.name for file in files if file.read_text().count("\n") > 350] == []


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_only_what_lies_below_it(layer: str) -> None:
    """No module of a layer imports a layer above or beside it, or a library that belongs to another layer."""
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    assert {f.name: bad for f in files if (bad := offences(layer, f.read_text()))} == {}


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("traces", "from keepwarm import reports"),
        ("traces", "import keepwarm.replayers.cache"),
        ("replayers", "def f():\n    from keepwarm.reports.metrics import table"),
        ("reports", "import httpx"),
        ("traces", "from click import echo"),
        ("replayers", "import polars as pl"),
        ("harness", "from traces.model import Call"),
        ("reports", "from . import metrics"),
    ],
)
def test_every_way_to_break_the_rule_is_seen(layer: str, line: str) -> None:
    """The rule catches an upward import however it is spelt, late imports and bare or relative names included."""
    assert offences(layer, line)
    assert not offences("harness", "import click\nfrom keepwarm.reports import metrics\nimport keepwarm.traces")
