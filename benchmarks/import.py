"""Import speed and memory against the limit: reading the same files and calling orjson.loads on each line.

    python benchmarks/import.py [FOLDER] [--times 10]

FOLDER is laid out as ~/.claude/projects (the default). It is copied --times over with message ids made different, so
that nothing is dropped as a copy. Limit and import run in processes of their own, in turn, three times; the best of
each counts. Interpreter start and imports of modules are outside both times. The import uses all cores, as the command
does; its peak is its own and its largest worker's together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = """
import sys, time, orjson, resource
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
print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, lines, size)
"""

IMPORT = """
import os, sys, time, resource
from pathlib import Path
from keepwarm.traces.claude_code import import_claude_code
from keepwarm.traces.identity import new_salt
begun = time.perf_counter()
out = str(Path(sys.argv[1]).parent / "t.parquet")
done = import_claude_code(Path(sys.argv[1]), out, version="benchmark", salt=new_salt(), processes=os.cpu_count())
took = time.perf_counter() - begun
peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
print(took, peak, done.calls, done.sessions)
"""


def multiplied(source: Path, target: Path, times: int) -> None:
    """Copy a folder of transcripts so many times, ids made different in each copy."""
    for path in sorted(source.rglob("*.jsonl")):
        text = path.read_bytes()
        for copy in range(times):
            to = target / f"{copy}{path.relative_to(source).parts[0]}" / Path(*path.relative_to(source).parts[1:])
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(text.replace(b'"msg_', b'"msg_%d' % copy).replace(b'"toolu_', b'"toolu_%d' % copy))


def run(code: str, folder: Path) -> list[float]:
    """What a process of its own printed: seconds, peak MB, two counts."""
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return [float(word) for word in out.stdout.split()]


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
    limit, done = min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
    print(f"{limit[3] / 1e6:,.0f} MB, {limit[2]:,.0f} lines, {done[3]:,.0f} sessions, {done[2]:,.0f} calls")
    print(f"read + orjson.loads a line: {limit[0]:.2f} s, peak {limit[1]:.0f} MB")
    print(f"keepwarm import:            {done[0]:.2f} s, peak {max(pair[1][1] for pair in pairs):.0f} MB")
    print(f"import runs at {limit[0] / done[0]:.2f} of the limit's speed (asked: at least 0.33, under 300 MB)")


if __name__ == "__main__":
    main()
