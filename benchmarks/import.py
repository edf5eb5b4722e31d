"""Import speed and memory against the limit: reading the same files and calling orjson.loads on each line.

    python benchmarks/import.py [FOLDER] [--times 10]

FOLDER is laid out as ~/.claude/projects (the default). It is copied --times over with message ids made different, so
that nothing is dropped as a copy. Limit and import run in processes of their own, in turn, three times; the best of
each counts. Interpreter start and imports of modules are outside both times. The import uses all cores, as the command
does; its peak is that of all its processes together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

LIMIT = """
import sys, time, orjson
from pathlib import Path
files = sorted(Path(sys.argv[1]).rglob("*.jsonl"))
begun, lines, size = time.perf_counter(), 0, 0
for path in files:
    with path.open("rb") as file:
        for line in file:
            lines += 1
            size += len(line)
            try:
                orjson.loads(line)
            except ValueError:
                pass
print(time.perf_counter() - begun, lines, size)
"""

IMPORT = """
import os, sys, time
from pathlib import Path
from keepwarm.traces.claude_code import import_claude_code
from keepwarm.traces.identity import new_salt
if __name__ == "__main__":
    begun = time.perf_counter()
    out = str(Path(sys.argv[1]).parent / "t.parquet")
    done = import_claude_code(Path(sys.argv[1]), out, version="benchmark", salt=new_salt(), processes=os.cpu_count())
    print(time.perf_counter() - begun, done.calls, done.sessions)
"""


def multiplied(source: Path, target: Path, times: int) -> None:
    """Copy a folder of transcripts so many times, ids made different in each copy."""
    for path in sorted(source.rglob("*.jsonl")):
        text = path.read_bytes()
        for copy in range(times):
            to = target / f"{copy}{path.relative_to(source).parts[0]}" / Path(*path.relative_to(source).parts[1:])
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(text.replace(b'"msg_', b'"msg_%d' % copy).replace(b'"toolu_', b'"toolu_%d' % copy))


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [one for child in children.read_text().split() for one in family(int(child))]
    return found


def memory(pid: int) -> float:
    """MB that a process and all that it started hold together, shared pages counted once (PSS)."""
    total = 0
    for one in family(pid):
        with suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def run(code: str, folder: Path) -> tuple[list[float], float]:
    """What a program of its own printed (seconds, two counts), and the most memory that it held."""
    program = folder.parent / "program.py"
    program.write_text(code)
    with subprocess.Popen([sys.executable, str(program), str(folder)], stdout=subprocess.PIPE, text=True) as process:
        peak = 0.0
        while process.poll() is None:
            with suppress(OSError):
                peak = max(peak, memory(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        return [float(word) for word in process.stdout.read().split()], peak


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path.home() / ".claude" / "projects")
    parser.add_argument("--times", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "projects"
        multiplied(args.folder, folder, args.times)
        pairs = [(run(LIMIT, folder), run(IMPORT, folder)) for _ in range(3)]
    limit, _ = min(pair[0] for pair in pairs)
    done, _ = min(pair[1] for pair in pairs)
    peak = max(pair[1][1] for pair in pairs)
    print(f"{limit[2] / 1e6:,.0f} MB, {limit[1]:,.0f} lines, {done[2]:,.0f} sessions, {done[1]:,.0f} calls")
    print(f"read + orjson.loads a line: {limit[0]:.2f} s")
    print(f"keepwarm import:            {done[0]:.2f} s, peak {peak:.0f} MB in all its processes")
    print(f"import runs at {limit[0] / done[0]:.2f} of the limit's speed (asked: at least 0.33, under 300 MB)")


if __name__ == "__main__":
    main()
