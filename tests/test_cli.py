"""The command line as a shell sees it: exit codes and streams, whatever the surroundings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "harness" / "demo.parquet"


def keepwarm(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A keepwarm command in a process of its own."""
    command = [sys.executable, "-m", "keepwarm.harness.cli", *arguments]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 60, **options}
    return subprocess.run(command, **given)  # type: ignore[call-overload, no-any-return]


def one_line(text: str) -> bool:
    return text.startswith("keepwarm: ") and text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    """What cannot be printed is told on stderr, exit code 2: not 1, which would say that a gate failed."""
    with Path("/dev/full").open("w") as full:
        done = keepwarm("gate", str(DEMO), "--require", "hit_rate >= 1%", stdout=full)
    assert done.returncode in (2, 141)
    assert "Traceback" not in done.stderr


def test_a_reader_that_went_away_is_no_failed_gate() -> None:
    """With its output's reader gone, a command ends as a signal would have ended it: 141."""
    read, write = os.pipe()
    os.close(read)
    done = keepwarm("inspect", str(DEMO), "--json", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_path_that_the_terminal_cannot_write_is_written_in_escapes(tmp_path: Path) -> None:
    """A report of a trace with a name outside the output's encoding is printed all the same."""
    named = tmp_path / "ünï ✓.parquet"
    shutil.copy(DEMO, named)
    done = keepwarm("report", str(named), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2713.parquet" in done.stdout


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    """A run under a name that is a file cannot be made: exit code 2."""
    (tmp_path / "file").write_text("")
    done = keepwarm("simulate", str(DEMO), "-o", str(tmp_path / "file" / "run"))
    assert done.returncode == 2
    assert one_line(done.stderr)


def test_a_transcript_is_not_overwritten_by_its_own_trace(tmp_path: Path) -> None:
    """Importing a log onto itself would lose it: refused before anything is read."""
    log = tmp_path / "s.jsonl"
    log.write_text("{}\n")
    done = keepwarm("import", "claude-code", str(log), "-o", str(tmp_path / "." / "s.jsonl"))
    assert (done.returncode, log.read_text()) == (2, "{}\n")
    assert "choose another output" in done.stderr


def test_an_empty_path_is_not_the_current_folder() -> None:
    """An unset variable in a script is told, not read as the folder one happens to be in."""
    done = keepwarm("import", "claude-code", "", "-o", "t.parquet")
    assert done.returncode == 2
    assert one_line(done.stderr)


@pytest.mark.parametrize(
    ("mistyped", "named"),
    [
        ("simulate --wrokers 2 t", "--wrokers"),
        ("simulate t --router nearest", "nearest"),
        ("serve --base-s 1 --hardware h100", "--hardware"),
        ("simulate", "TRACE"),
        ("import", "claude-code"),
        ("simulat t", "simulat"),
    ],
)
def test_a_mistyped_command_is_one_line(mistyped: str, named: str) -> None:
    """Wrong usage is told in one line that names what is wrong and where help is, exit code 2."""
    done = keepwarm(*mistyped.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr)
    assert named in done.stderr
    assert "--help)" in done.stderr


def test_no_command_at_all_is_the_help() -> None:
    """A bare name is a question: it is answered with the commands, as the usage error that it is."""
    done = keepwarm()
    assert done.returncode == 2
    assert "Commands:" in done.stderr
