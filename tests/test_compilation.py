"""One line tells of a compilation that takes long."""

import time

import pytest
from numba.core import event

from experiment import compilation
from experiment.compilation import MESSAGE, compilation_told
from experiment.progress import shown_progress


def compile_for(seconds: float, inside: int = 0) -> None:
    """What numba announces while it compiles a function, and those that it calls."""
    with event.trigger_event("numba:compile"):
        for _ in range(inside):
            compile_for(0)
        time.sleep(seconds)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(compilation, "SILENT", 0.2)


def test_short_compilations_are_not_told_long_ones_once():
    told = []
    with compilation_told(told.append):
        compile_for(0.01, inside=2)
        assert told == []
        compile_for(0.4, inside=1)
        compile_for(0.4)
    assert told == [MESSAGE]
    compile_for(0.4)
    assert told == [MESSAGE]


def test_many_short_compilations_are_a_long_one():
    told = []
    with compilation_told(told.append):
        for _ in range(6):
            compile_for(0.05)
    assert told == [MESSAGE]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_tells_it_on_stderr_unless_quiet(capsys, quiet):
    with shown_progress(1, quiet=quiet):
        compile_for(0.4)
    assert (MESSAGE in capsys.readouterr().err) != quiet
