"""A short turn of tests/torture.py; the long one is a command."""

import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="it uses fork, /proc and tmpfs")
def test_nothing_is_lost_in_a_short_torture(tmp_path):
    """In a process of its own, since only one without threads can be forked. Signals and losses
    that are no numbers have tests in test_resume.py."""
    few = dict(kills=1, save_kills=5, full_disks=2, hostile=10, folders=0, nans=0, signals=0)
    flags = [word for name, count in few.items() for word in (f"--{name}", str(count))]
    run = subprocess.run([sys.executable, ROOT / "tests" / "torture.py", *flags,
                          "--patience", "60", "--output_dir", tmp_path],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
