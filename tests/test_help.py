"""What the commands answer before they load what takes seconds."""

import subprocess
import sys

import pytest
from commands import ROOT
from test_house import COMMANDS

HEAVY = ("torch", "numba", "scipy", "sklearn", "optuna", "matplotlib", "pandas")
PROGRAM = f"""
import contextlib, io, runpy, sys
sys.argv = [sys.argv[1] + ".py", "--help"]
sys.path.insert(0, "")
help = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(help):
    runpy.run_path(sys.argv[0], run_name="__main__")
assert help.getvalue().startswith("usage: " + sys.argv[0])
print(*[name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_there_before_anything_heavy_is_loaded(command):
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, command], cwd=ROOT, capture_output=True, text=True
    )
    assert (answer.stdout.split(), answer.stderr) == ([], "")
