"""What is installed is what is here, the command line starts light, and every command is documented."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from keepwarm.harness.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
SETUPTOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LAYERS = ("traces", "replayers", "reports", "harness")


def test_every_package_of_the_tree_is_listed() -> None:
    """A folder with an __init__.py that pyproject does not list would work here and be missing from the wheel."""
    folders = {init.parent.relative_to(ROOT) for layer in LAYERS for init in (ROOT / layer).rglob("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == {f"keepwarm.{'.'.join(folder.parts)}" for folder in folders}
    assert SETUPTOOLS["package-dir"] == {f"keepwarm.{'.'.join(folder.parts)}": str(folder) for folder in folders}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_package_says_it_is_typed(layer: str) -> None:
    """Type checkers believe a package's annotations only beside a py.typed."""
    assert (ROOT / layer / "py.typed").exists()


def test_every_constraint_is_an_exact_pin() -> None:
    """constraints.txt pins every declared dependency to one version, and names no index."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {name.split(">=")[0].split("[")[0].lower().replace("_", "-") for name in declared} <= pinned
    assert all(line.count("==") == 1 and "/" not in line for line in lines)


def test_help_imports_nothing_heavy() -> None:
    """--help answers at once: none of the slow libraries is imported for it."""
    script = (
        "import json, sys\n"
        "from keepwarm.harness.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "keepwarm.harness.cli" in loaded and "Usage" in done.stdout
    assert loaded & {"pyarrow", "polars", "httpx", "rich", "uvicorn", "starlette", "orjson", "hdrh"} == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(name: str) -> None:
    """Each command answers --help with more than its options, and README.md shows it by its name."""
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    prose = result.output.partition("Options:")[0].strip().splitlines()[1:]
    assert any(line.strip() for line in prose)
    assert COMMANDS[name][1]
    assert f"keepwarm {name}" in (ROOT / "README.md").read_text()


def test_an_unknown_command_is_bad_usage() -> None:
    """A command that does not exist is exit code 2, not a traceback."""
    result = CliRunner().invoke(cli, ["nosuch"])
    assert result.exit_code == 2
    assert "nosuch" in result.output
