"""A short turn of tests/torture.py; the long one is a command."""

import os

import pytest

import torture
from conftest import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its tries are forked processes")
def test_nothing_is_lost_in_a_short_torture(tmp_path):
    """In a process of its own, since a fork needs one without threads."""
    import subprocess
    import sys
    run = subprocess.run(
        [sys.executable, torture.__file__, "--kills", "2", "--save_kills", "20", "--full_disks", "3", "--hostile", "250",
         "--folders", "0", "--nans", "4", "--signals", "3", "--output_dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
