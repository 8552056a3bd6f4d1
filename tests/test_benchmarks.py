"""Benchmarks run, small: what they time is still there under its name. Their figures are not looked at."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

RUNS = {
    "decoding --crops 1": r"224 px, 4 crops\n.*stock / fast \d",
    "loader --count 256 --sizes 32 --rounds 1 --only ours": r"\| ours \| [\d,]+ \|",
    "packing --count 12 --work": r"\| keep \| [\d,]+ \|",
}


@pytest.mark.parametrize("command", RUNS)
def test_a_benchmark_runs(command):
    name, *arguments = command.split()
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.search(RUNS[command], result.stdout, re.DOTALL), result.stdout
