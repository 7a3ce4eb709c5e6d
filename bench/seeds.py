"""What several benches say of their seeds, and of where a figure comes from."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by the number of seeds


def interval(values: Sequence[float]) -> list[float] | None:
    """95 % of the mean over seeds; None below two values or above five."""
    if len(values) not in T95:
        return None
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return [statistics.mean(values) - half, statistics.mean(values) + half]


def commit() -> str:
    """Of the tree that this file lies in."""
    run = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def command() -> str:
    """The one that runs, for a result file."""
    name = f"bench/{Path(sys.argv[0]).name}"
    return shlex.join(["python", name, *sys.argv[1:]]).replace(str(Path.home()), "~")
