"""The README's first screen is true: its sample is what the demo prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
FIXED = (
    *("hit_rate", "warm_hit_rate", "warm_hit_range", "read_write_ratio", "cold_write_share", "compaction", "ttl"),
    *("achievable_hit_rate[endless]", "cost_per_completed_task"),
)


def squeezed(text: str) -> set[str]:
    return {" ".join(line.split()) for line in text.splitlines()}


def test_the_sample_is_what_the_demo_prints() -> None:
    """Every line of the sample that does not depend on the machine stands in the demo's output."""
    command = [sys.executable, "-m", "keepwarm.harness.cli", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    sample = squeezed(README.read_text().split("```")[1])
    fixed = {line for line in sample if line.split(" ")[0] in FIXED}
    assert len(fixed) == len(FIXED)
    assert fixed <= squeezed(done.stdout)
