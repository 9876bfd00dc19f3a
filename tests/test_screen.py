"""What a person can't see costs no result: closed, full and narrow streams, names of any bytes."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from experiment.command_line import run_command
from experiment.files import write_whole
from experiment.run_log import RunLog
from experiment.screen import repair_streams, show
from figures.evaluation import plot_accuracy_over_steps
from figures.meta_learning import plot_rules
from figures.optimizers import plot_loss_grid
from figures.style import add_legend, label_axes, one_panel, save_figure


def status_in_a_child(streams: Callable[[], None], act: Callable[[], object]) -> int:
    """The exit status of a forked process whose streams are as `streams` leaves them."""
    child = os.fork()
    if child == 0:
        status = 99
        with suppress(BaseException):
            streams()
            try:
                act()
                status = 0
            except SystemExit as end:
                status = end.code
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def closed(*numbers: int) -> Callable[[], None]:
    """Streams as Python finds them where the shell has closed them."""

    def streams() -> None:
        for number in numbers:
            os.close(number)
            setattr(sys, {0: "stdin", 1: "stdout", 2: "stderr"}[number], None)

    return streams


def full() -> None:
    for name in ("stdout", "stderr"):
        setattr(sys, name, open("/dev/full", "w", encoding="utf-8"))  # noqa: SIM115


def ascii_only() -> None:
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def without_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = sys.stderr = open(writer, "w", encoding="utf-8")  # noqa: SIM115


STREAMS = [closed(1), closed(2), closed(0, 1, 2), full, ascii_only, without_reader]
NAMES = ["stdout", "stderr", "all", "full", "ascii", "without reader"]


@pytest.mark.parametrize("streams", STREAMS, ids=NAMES)
def test_a_run_comes_to_its_end_whatever_its_streams_are(tmp_path, streams):
    def run(_) -> None:
        with RunLog.create(tmp_path / "run", {}) as log, log.progress(20, 0, "step") as progress:
            for step in range(20):
                log.record(step, {"loss": 0.5})
                log.save_checkpoint(step, {"step": step})
                progress.advance({"Δ": 1.0})
            log.say("Δw = ± 1")
            log.warn("½")
            log.write_json("results.json", {"accuracy": 0.5})

    assert status_in_a_child(streams, lambda: run_command(run)) == 0
    assert (tmp_path / "run" / "log.txt").read_text(encoding="utf-8") == "Δw = ± 1\n½\n"
    assert (tmp_path / "run" / "results.json").read_text() == '{\n  "accuracy": 0.5\n}\n'
    assert (tmp_path / "run" / "lock").read_text().strip().isdigit()  # nothing else went there


@pytest.mark.parametrize("streams", [closed(2), full], ids=["closed", "full"])
def test_wrong_input_has_its_exit_status_where_nobody_can_be_told(streams):
    def wrong(_) -> None:
        raise OSError("no such file")

    assert status_in_a_child(streams, lambda: run_command(wrong)) == 2


def test_letters_that_a_stream_lacks_are_told_by_their_numbers(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="latin-1"))
    repair_streams()
    show("Δ ±", sys.stdout)
    assert content.getvalue() == b"\\u0394 \xb1\n"


def test_a_directory_may_have_any_bytes_as_its_name(tmp_path, capsys):
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    repair_streams()
    with RunLog.create(out, {"start_from": out}) as log:
        log.say(f"everything is in {out}")
        log.write_text("table.md", f"{out}\n")
    RunLog.reopen(out).close()
    for name in ("log.txt", "table.md"):
        assert r"run\udcff" in (out / name).read_text(encoding="utf-8")
    assert r"run\udcff" in capsys.readouterr().out
    write_whole(tmp_path / "plain", out.name)
    assert (tmp_path / "plain").read_bytes() == rb"run\udcff"


NAMED = "run_$a_$b"


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    path = tmp_path / "figure.png"
    plot_rules({NAMED: {"w/x y": 1.0}, "$\\frac$": {"w/x y": 0.5}}, path, "coefficient")
    plot_loss_grid({NAMED: {"relu$20$_$": 1.0}}, path)
    row = {"method": NAMED, "dataset": "mnist", "layers": "8", "inner_steps": 4, "finite": 1,
           "test_accuracy_mean": 0.5, "test_accuracy_standard_deviation": None}  # fmt: skip
    plot_accuracy_over_steps([row], path)
    figure, axes = one_panel()
    axes.plot(np.arange(3), label=NAMED)
    label_axes(axes, NAMED, NAMED, NAMED)
    add_legend(axes)
    save_figure(figure, path)
    assert axes.get_legend().get_texts()[0].get_text() == NAMED and path.stat().st_size > 1000
