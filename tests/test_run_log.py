"""What is on disk, and what can be read back, whatever happens to a run."""

import errno
import hashlib
import io
import itertools
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from experiment import checkpoints, tensorboard_events
from experiment.checkpoints import Checkpoint, refuse_changed_files
from experiment.errors import RunLogError
from experiment.files import plain
from experiment.run_log import RunLog
from experiment.run_reader import read_arrays, read_config, read_metrics, read_results


class Killed(BaseException):
    """Stands for the end of the process."""


def state_of(step: int) -> dict:
    return {"weights": torch.full((3,), float(step)), "steps": [step, (step, None, "text")]}


def new_run(tmp_path: Path, steps: int = 0) -> RunLog:
    """A run that has recorded and saved each of `steps` steps."""
    log = RunLog.create(tmp_path / "run", {"seed": 0}, quiet=True)
    for step in range(steps):
        log.record(step, {"loss": 1 / (step + 3)})
        log.save_checkpoint(step, state_of(step))
    return log


def loaded(directory: Path) -> tuple[int, dict] | None:
    with RunLog.reopen(directory, quiet=True) as log:
        return log.load_checkpoint()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- the directory ----


def test_a_new_run_describes_its_configuration_and_environment(tmp_path):
    config = {"seed": 3, "layers": (256, 32), "data_dir": Path("data"), "lr": 1e-5, "out": None}
    with RunLog.create(tmp_path / "a" / "run", config) as log:
        assert log.config == plain(config) == read_config(log.directory)
        assert log.config["layers"] == [256, 32] and log.config["data_dir"] == "data"
        entries = json.loads(log.path("environment.json").read_text())
    assert len(entries) == 1
    assert {"python", "torch", "numpy", "git_commit", "git_dirty", "cpu_count"} <= set(entries[0])
    with RunLog.reopen(tmp_path / "a" / "run") as log:
        assert len(json.loads(log.path("environment.json").read_text())) == 2


def test_an_occupied_directory_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "precious").write_text("1")
    with pytest.raises(RunLogError, match="not empty"):
        RunLog.create(tmp_path, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLogError, match="Not a directory"):
        RunLog.create(tmp_path / "file" / "run", {})
    with pytest.raises(RunLogError, match="is a file"):
        RunLog.create(tmp_path / "file", {})


def test_what_is_no_run_can_not_be_reopened(tmp_path):
    with pytest.raises(RunLogError, match="holds no config"):
        RunLog.reopen(tmp_path)
    for content in ("{half", 100_000 * "["):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(RunLogError, match="is damaged"):
            RunLog.reopen(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", "step,loss\nabc,1\n"),
        ("metrics.csv", "step,loss\nabc,1\n1,1\n"),
        ("metrics.csv", "\n\n"),
        ("environment.json", "5"),
        ("environment.json", "{}"),
    ],
)
def test_a_damaged_file_of_a_run_is_told_in_one_line_when_it_is_resumed(tmp_path, name, content):
    new_run(tmp_path, 2).close()
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(RunLogError, match=f"{name} is damaged: .+") as refusal:
        loaded(tmp_path / "run")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "said"), [("", "has no rows"), ("step,loss\n0,1.0\n", "ends at step 0")]
)
def test_lost_rows_are_told_when_a_run_is_resumed(tmp_path, capsys, content, said):
    new_run(tmp_path, 3).close()
    assert loaded(tmp_path / "run")[0] == 2 and capsys.readouterr().err == ""
    (tmp_path / "run" / "metrics.csv").write_text(content)
    assert loaded(tmp_path / "run")[0] == 2
    assert f"metrics.csv {said}, " in capsys.readouterr().err


def test_results_are_a_table_or_none(tmp_path):
    assert read_results(tmp_path) == {}
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    assert read_results(tmp_path) == {"accuracy": 1}
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(RunLogError, match="not a table"):
        read_results(tmp_path)


def test_two_runs_can_not_write_one_directory(tmp_path):
    with new_run(tmp_path) as log:
        with pytest.raises(RunLogError, match=f"being written by process {os.getpid()}"):
            RunLog.reopen(log.directory)
        assert log.path("lock").read_text() == f"{os.getpid()}\n"
    RunLog.reopen(log.directory).close()


def test_a_failed_start_gives_the_lock_back(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(RunLogError, match="No space"):
            RunLog.create(tmp_path / "run", {})
    RunLog.create(tmp_path / "run", {}).close()


def killed_in_the_child(act: Callable[[], object], allowed: int) -> bool:
    """Has a forked process act, and end by SIGKILL at its so many-th operation on the disk."""
    child = os.fork()
    if child == 0:
        calls = itertools.count()
        for name in ("mkdir", "fsync", "replace", "rmdir"):
            setattr(os, name, killing_with_sigkill(getattr(os, name), calls, allowed))
        with suppress(BaseException):
            act()
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def killing_with_sigkill(original, calls, allowed):
    def call(*arguments, **named):
        if next(calls) == allowed:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    return call


def test_a_run_killed_while_it_begins_can_be_started_or_gone_on_with(tmp_path):
    for allowed in itertools.count():
        directory = tmp_path / str(allowed) / "run"
        killed = killed_in_the_child(lambda place=directory: new_run(place.parent, 1), allowed)
        if (directory / "config.json").exists():
            loaded(directory)
        else:
            with RunLog.create(directory, {"seed": 0}, quiet=True):
                pass
        left = {path.name for path in directory.iterdir()}
        assert not [name for name in left if ".new" in name] and "environment.json" in left
        if not killed:
            break
    assert allowed > 10


# ---- links ----


@pytest.mark.parametrize(
    "name", ["lock", "log.txt", "metrics.csv", "figures", "config.json", "checkpoint.pt"]
)
def test_nothing_is_written_through_a_link_inside_a_run(tmp_path, name):
    new_run(tmp_path, 2).close()
    victim, path = tmp_path / "victim", tmp_path / "run" / name
    if path.exists():
        path.rename(victim)
    else:
        victim.mkdir()
    path.symlink_to(victim)
    before = victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())
    with pytest.raises(RunLogError, match=f"{name} is a symbolic link"):
        RunLog.reopen(tmp_path / "run")
    assert (victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())) == before


def test_a_new_run_does_not_take_a_link_for_its_lock(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RunLogError, match="lock is a symbolic link"):
        RunLog.create(tmp_path / "run", {})
    assert (tmp_path / "victim").read_text() == "precious"


def test_the_directory_itself_and_those_above_it_may_be_links(tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far")
    (tmp_path / "near" / "run").symlink_to(tmp_path / "far" / "away")
    new_run(tmp_path / "near", 1).close()
    assert loaded(tmp_path / "near" / "run")[0] == 0


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ""])
def test_a_runs_files_are_in_its_directory(tmp_path, name):
    with new_run(tmp_path) as log, pytest.raises(RunLogError, match="not the name of a file"):
        log.write_json(name, {})


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    new_run(tmp_path, 1).close()
    (tmp_path / "run" / "log.txt").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / "log.txt")
    with pytest.raises(RunLogError, match="no ordinary file"):
        RunLog.reopen(tmp_path / "run")


# ---- metrics ----


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(), st.floats(width=32)), min_size=1, max_size=8))
def test_every_float_reads_back_exactly(tmp_path_factory, rows):
    directory = tmp_path_factory.mktemp("metrics") / "run"
    with RunLog.create(directory, {}, quiet=True) as log:
        log._show = lambda *_: None
        for step, (a, b) in enumerate(rows):
            log.record(step, {"a": a, "b, with a comma": np.float32(b)})
    columns = read_metrics(directory)
    assert list(columns) == ["step", "a", "b, with a comma"]
    assert columns["step"].dtype == np.int64 and columns["step"].tolist() == [*range(len(rows))]
    for name, expected in zip(list(columns)[1:], zip(*rows, strict=True), strict=True):
        np.testing.assert_array_equal(columns[name], np.array(expected))
        assert np.signbit(columns[name][~np.isnan(columns[name])]).tolist() == [
            math.copysign(1, value) < 0 for value in expected if not math.isnan(value)
        ]


def test_a_run_without_rows_has_no_columns(tmp_path):
    with new_run(tmp_path) as log:
        assert read_metrics(log.directory) == {}


def test_rows_can_be_read_while_the_run_goes_on_and_a_half_written_line_is_left_out(tmp_path):
    with new_run(tmp_path) as log:
        log.record(4, {"loss": 0.5})
        with log.path("metrics.csv").open("a") as file:
            file.write("5,0.2")
        assert read_metrics(log.directory)["step"].tolist() == [4]


def test_a_row_with_other_columns_is_refused(tmp_path):
    with new_run(tmp_path, 1) as log:
        with pytest.raises(RunLogError, match=r"new \['accuracy'\], missing \['loss'\]"):
            log.record(1, {"accuracy": 1.0})
        log.record(1, {"loss": 1.0})


def test_steps_must_rise(tmp_path):
    with new_run(tmp_path, 2) as log:
        with pytest.raises(RunLogError, match="already reaches step 1"):
            log.record(1, {"loss": 1.0})
        assert read_metrics(log.directory)["step"].tolist() == [0, 1]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    with new_run(tmp_path, 2) as log:
        log.record(2, {"loss": 7.0})
    with RunLog.reopen(log.directory, quiet=True) as log:
        assert log.load_checkpoint()[0] == 1
        log.record(2, {"loss": 8.0})
    events = EventAccumulator(str(log.directory)).Reload().Scalars("loss")
    assert [(event.step, round(event.value, 3)) for event in events] == [
        (0, 0.333),
        (1, 0.25),
        (2, 8.0),
    ]


def test_tensorboard_shows_figures_parameters_and_the_settings_with_the_results(tmp_path):
    def draw(directory):
        (directory / "figures").mkdir()
        Image.new("RGB", (7, 5)).save(directory / "figures" / "features.png")

    with new_run(tmp_path, 2) as log:
        weights = torch.tensor([[1.0, 2.0, math.nan]])
        log.write_parameters([{}, {"w": weights, "b": torch.tensor([math.nan])}], (1, 1, 3))
        log.write_results({"accuracy": 0.5, "done": True, "rows": [1], "nothing": None})
        log.plot(draw)
    events = EventAccumulator(str(log.directory)).Reload()
    assert json.loads((log.directory / "results.json").read_text())["rows"] == [1]
    assert events.Tags()["scalars"] == ["loss", "results/accuracy"]
    assert events.Scalars("results/accuracy")[0].step == 1
    (image,) = events.Images("figures/features")
    assert (image.width, image.height) == (7, 5)
    (drawn,) = events.Histograms("parameters/1.w")
    assert (drawn.histogram_value.num, drawn.histogram_value.sum) == (2, 3.0)
    assert sum(drawn.histogram_value.bucket) == 2 and events.Tags()["histograms"] == [
        "parameters/1.w"
    ]
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    settings = HParamsPluginData.FromString(start.content).session_start_info.hparams
    assert settings["seed"].number_value == 0


def test_tensorboard_shows_the_last_values_also_after_the_clock_was_set_back(tmp_path, monkeypatch):
    for value, now in enumerate((2e9, 1e9, 1.5e9)):
        monkeypatch.setattr(tensorboard_events.time, "time", lambda now=now: now)
        log = RunLog.reopen(tmp_path / "run", quiet=True) if value else new_run(tmp_path)
        with log:
            log.load_checkpoint()
            for step in range(3):
                log.record(step, {"loss": float(value)})
    events = EventAccumulator(str(log.directory)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 2.0), (1, 2.0), (2, 2.0)]


# ---- checkpoints ----


def test_a_checkpoint_reads_back_as_it_was_saved(tmp_path):
    new_run(tmp_path, 3).close()
    step, state = loaded(tmp_path / "run")
    assert step == 2 and state["steps"] == [2, (2, None, "text")]
    assert torch.equal(state["weights"], torch.full((3,), 2.0))


def test_a_checkpoint_is_one_for_torch_too_and_may_be_of_an_older_version(tmp_path):
    new_run(tmp_path, 3).close()
    path = tmp_path / "run" / "checkpoint.pt"
    assert torch.load(path, weights_only=True)["step"] == 2
    content = path.read_bytes()
    path.write_bytes(content[-32:] + content[:-32])  # where the digest was once
    assert loaded(tmp_path / "run")[0] == 2


def test_a_run_may_take_the_place_of_another_where_that_is_asked_for(tmp_path):
    with new_run(tmp_path, 3) as log:
        log.path("figures").mkdir()
        (log.path("figures") / "x.png").write_text("x")
        with pytest.raises(RunLogError, match="is being written by process"):
            RunLog.create(log.directory, {}, overwrite=True)
    with RunLog.create(log.directory, {"seed": 1}, quiet=True, overwrite=True) as log:
        assert log.load_checkpoint() is None and read_metrics(log.directory) == {}
        assert {path.name for path in log.directory.iterdir()} == {
            "config.json", "environment.json", "lock",
        }  # fmt: skip
    (log.directory / "figures").mkdir()
    for name in ("notes.md", "figures/own.txt"):
        (log.directory / name).write_text("mine")
        with pytest.raises(RunLogError, match=f"{name} is not of a run: move it"):
            RunLog.create(log.directory, {}, overwrite=True)
        (log.directory / name).unlink()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(RunLogError, match="is not of a run"):
        RunLog.create(tmp_path / "model", {}, overwrite=True)
    assert (tmp_path / "model" / "config.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunLogError, match="is not empty"):
        RunLog.create(tmp_path / "mine", {}, overwrite=True)
    with pytest.raises(RunLogError, match="is not empty"):
        RunLog.create(log.directory, {})


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    with new_run(tmp_path) as log:
        log.record(0, {"loss": 1.0})
    with RunLog.reopen(log.directory, quiet=True) as log:
        assert log.load_checkpoint() is None
        log.record(0, {"loss": 2.0, "another": 3.0})
    assert read_metrics(log.directory)["loss"].tolist() == [2.0]


@pytest.mark.parametrize("saved_before", [0, 1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_a_good_checkpoint_is_there_wherever_saving_is_killed(
    tmp_path, monkeypatch, saved_before, after
):
    for allowed in itertools.count():
        log = new_run(tmp_path / str(allowed), saved_before)
        log.record(saved_before, {"loss": 0.0})
        with monkeypatch.context() as patch:
            kill_at(patch, ("replace", "fsync", "open"), allowed, after)
            with suppress(Killed):
                log.save_checkpoint(saved_before, state_of(saved_before))
                break
        log.close()
        step, state = loaded(log.directory) or (-1, state_of(-1))
        assert step in (saved_before - 1, saved_before)
        assert state["steps"] == state_of(step)["steps"]
        rows = read_metrics(log.directory).get("step", np.array([]))
        assert rows.tolist() == [*range(step + 1)]
    assert allowed == (5 if saved_before == 0 else 6)  # every operation has had its turn


def kill_at(patch: pytest.MonkeyPatch, names: tuple[str, ...], allowed: int, after: bool) -> None:
    """Let `allowed` calls of these functions of os pass; the next is killed, before or after."""
    calls = itertools.count()

    def killing(original):
        def call(*arguments, **named):
            number = next(calls)
            result = original(*arguments, **named) if after or number != allowed else None
            if number >= allowed:
                raise Killed
            return result

        return call

    for name in names:
        patch.setattr(os, name, killing(getattr(os, name)))


def test_a_half_written_new_checkpoint_is_of_no_consequence(tmp_path):
    new_run(tmp_path, 2).close()
    half = (tmp_path / "run" / "checkpoint.pt").read_bytes()[:200]
    (tmp_path / "run" / "checkpoint.pt.new").write_bytes(half)
    assert loaded(tmp_path / "run")[0] == 1


@pytest.mark.parametrize("harm", ["flipped bit", "cut short", "empty"])
def test_the_previous_checkpoint_is_used_where_the_last_is_damaged(tmp_path, capsys, harm):
    new_run(tmp_path, 3).close()
    path = tmp_path / "run" / "checkpoint.pt"
    if harm == "flipped bit":
        damage(path)
    else:
        path.write_bytes(path.read_bytes()[:100] if harm == "cut short" else b"")
    step, state = loaded(tmp_path / "run")
    assert step == 1 and state["weights"].tolist() == [1.0] * 3
    assert read_metrics(tmp_path / "run")["step"].tolist() == [0, 1]
    said = capsys.readouterr().err
    assert "checkpoint.pt is damaged" in said and "of step 1" in said
    assert "is damaged" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("content", [{"steps": 3}, [1, 2], {"format": 1, "step": "x"}, None])
def test_a_checkpoint_with_a_right_checksum_and_other_content_is_damaged(tmp_path, content):
    new_run(tmp_path, 3).close()
    buffer = io.BytesIO(b"no checkpoint")
    if content is not None:
        torch.save(content, buffer)
    payload = buffer.getvalue()
    whole = payload + hashlib.sha256(payload).digest()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole)
    assert loaded(tmp_path / "run")[0] == 1


def test_saving_after_a_damaged_checkpoint_never_gives_up_the_good_one(tmp_path, monkeypatch):
    new_run(tmp_path, 3).close()
    damage(tmp_path / "run" / "checkpoint.pt")
    with RunLog.reopen(tmp_path / "run", quiet=True) as log:
        assert log.load_checkpoint()[0] == 1
        with monkeypatch.context() as patch:
            kill_at(patch, ("replace",), 0, after=True)
            with pytest.raises(Killed):
                log.save_checkpoint(2, state_of(2))
    assert loaded(tmp_path / "run")[0] == 2
    assert (tmp_path / "run" / "checkpoint.previous.pt").exists()


def test_a_run_with_damaged_checkpoints_only_is_refused(tmp_path):
    new_run(tmp_path, 3).close()
    damage(tmp_path / "run" / "checkpoint.pt")
    damage(tmp_path / "run" / "checkpoint.previous.pt")
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(RunLogError, match="no good checkpoint"):
        loaded(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    with new_run(tmp_path, 1) as log:
        with pytest.raises(TypeError, match="tensors and plain values"):
            log.save_checkpoint(1, {"generator": random.Random(0)})
        assert not log.path("checkpoint.pt.new").exists()
    assert loaded(log.directory)[0] == 0


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with new_run(tmp_path, 1) as log, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunLogError, match=r"checkpoint.pt: No space left on device$"):
            log.save_checkpoint(1, state_of(1))
    assert loaded(log.directory)[0] == 0


# ---- files of different runs ----


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def test_a_checkpoint_goes_with_its_configuration_only(tmp_path, capsys):
    new_run(tmp_path, 2).close()
    directory = tmp_path / "run"
    change(directory / "config.json", b'"seed": 0', b'"seed": 1')
    with pytest.raises(RunLogError, match=r"no good checkpoint.*of another run") as refusal:
        loaded(directory)
    assert "\n" not in str(refusal.value) and capsys.readouterr().err == ""
    change(directory / "config.json", b'"seed": 1', b'"data_dir": "x", "seed": 0')
    assert loaded(directory)[0] == 1


def test_the_checkpoint_of_another_run_gives_way_to_the_one_before_it(tmp_path, capsys):
    new_run(tmp_path, 3).close()
    with RunLog.create(tmp_path / "other", {"seed": 5}, quiet=True) as log:
        log.record(0, {"loss": 1.0})
        log.save_checkpoint(0, state_of(0))
    (tmp_path / "other" / "checkpoint.pt").replace(tmp_path / "run" / "checkpoint.pt")
    assert loaded(tmp_path / "run")[0] == 1
    assert "of another run" in capsys.readouterr().err
    assert loaded(tmp_path / "run")[0] == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"0.25", b"0.26"),
        (b"step,loss", b"step,lose"),
        (b"step,loss", b"step,a"),
        (b"step,loss\n", b""),
        (b"1,0.25\n", b""),
        (b"\n1,", b"\n-1,"),
        (b"0.25", b"nan"),
        (b"0.25", b"\xff"),
        (b"0.25", b"0.250000"),
    ],
)
def test_rows_that_were_changed_are_refused(tmp_path, old, new):
    new_run(tmp_path, 3).close()
    change(tmp_path / "run" / "metrics.csv", old, new)
    content = (tmp_path / "run" / "metrics.csv").read_bytes()
    for read in (loaded, refuse_changed_files):
        with pytest.raises(RunLogError, match=r"metrics\.csv is damaged: ") as refusal:
            read(tmp_path / "run")
        assert "\n" not in str(refusal.value)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == content
    (tmp_path / "run" / "metrics.csv").unlink()
    refuse_changed_files(tmp_path / "run")
    assert loaded(tmp_path / "run")[0] == 2


def test_what_follows_the_rows_of_a_checkpoint_is_cut_off_whatever_it_is(tmp_path):
    new_run(tmp_path, 2).close()
    path = tmp_path / "run" / "metrics.csv"
    whole = path.read_bytes()
    for junk in (b"2,0.5\n3,", b"\0" * 99, b"1,7.0\n", b"\xff\n\xff\n"):
        path.write_bytes(whole + junk)
        refuse_changed_files(tmp_path / "run")
        assert loaded(tmp_path / "run")[0] == 1
        assert path.read_bytes() == whole


def test_a_checkpoint_of_before_there_were_digests_is_taken_without_them(tmp_path):
    log = new_run(tmp_path)
    for step in range(2):
        log.record(step, {"loss": 1.0})
    checkpoints.save_checkpoint(log.directory, Checkpoint(1, state_of(1), 1))
    log.record(2, {"loss": 3.0})
    log.close()
    change(log.path("config.json"), b'"seed": 0', b'"seed": 1')
    change(log.path("metrics.csv"), b"1,1.0", b"1,2.0")
    refuse_changed_files(log.directory)
    assert loaded(log.directory)[0] == 1
    assert log.path("metrics.csv").read_bytes() == b"step,loss\n0,1.0\n1,2.0\n"


# ---- resuming ----


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 40))
def test_a_resumed_run_leaves_the_rows_of_an_uninterrupted_one(
    tmp_path_factory, killed, every, cut
):
    place = tmp_path_factory.mktemp("runs")

    def go_on(log: RunLog, end: int) -> None:
        log._show = lambda *_: None
        last, state = log.load_checkpoint() or (-1, {"x": torch.zeros(())})
        x = state["x"]
        for step in range(last + 1, end):
            x = torch.cos(x + step)
            log.record(step, {"x": x.item(), "nan": math.nan})
            if step % every == 0:
                log.save_checkpoint(step, {"x": x})

    for name, ends in (("whole", [10]), ("resumed", [killed, 10])):
        for number, end in enumerate(ends):
            directory = place / name
            start = RunLog.reopen if number else RunLog.create
            arguments = () if number else ({},)
            with start(directory, *arguments, quiet=True) as log:
                go_on(log, end)
            if end == killed and name == "resumed":
                with (directory / "metrics.csv").open("ab") as file:
                    file.write(b"9,0.123456789,nan\n10,0.987654321,nan\n"[:cut])
    whole, resumed = ((place / name / "metrics.csv").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


PROGRAM = """
import os, signal, sys, torch
from experiment.run_log import RunLog
directory, killed = sys.argv[1], int(sys.argv[2])
new = not os.path.exists(directory)
with RunLog.create(directory, {}, True) if new else RunLog.reopen(directory, True) as log:
    last, state = log.load_checkpoint() or (-1, {"x": torch.zeros(())})
    x = state["x"]
    for step in range(last + 1, 8):
        x = torch.cos(x + step)
        log.record(step, {"x": x.item()})
        if step % 3 == 0:
            log.save_checkpoint(step, {"x": x})
        if new and step == killed:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_with_sigkill_can_be_resumed_at_once(tmp_path):
    def run(name: str, killed: int) -> int:
        return Command(script, tmp_path / name, killed).wait(60)

    script = tmp_path / "program.py"
    script.write_text(PROGRAM)

    assert run("killed", 5) == -signal.SIGKILL
    assert read_metrics(tmp_path / "killed")["step"][-1] == 5
    assert run("killed", 5) == 0
    log = RunLog.create(tmp_path / "whole", {}, quiet=True)
    x = torch.zeros(())
    for step in range(8):
        x = torch.cos(x + step)
        log.record(step, {"x": x.item()})
    log.close()
    files = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]


# ---- what the user sees ----


def test_say_prints_unless_quiet_and_always_logs(tmp_path, capsys):
    with new_run(tmp_path) as log:
        log.say("not on the screen")
    with RunLog.reopen(log.directory) as log:
        log.say("on the screen: 90 %")
    assert capsys.readouterr().out == "on the screen: 90 %\n"
    assert log.path("log.txt").read_text() == "not on the screen\non the screen: 90 %\n"


def test_progress_off_a_terminal_is_a_line_at_every_tenth(tmp_path, capsys):
    with RunLog.create(tmp_path / "run", {}) as log, log.progress(200, 100, "meta-step") as bar:
        for step in range(100, 200):
            bar.advance({"loss": step / 7})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("meta-step 120/200  loss 17")


def test_progress_off_a_terminal_is_a_line_in_a_minute_at_least(tmp_path, monkeypatch, capsys):
    clock = itertools.count(step=25)
    monkeypatch.setattr("experiment.progress.time.monotonic", lambda: next(clock))
    with RunLog.create(tmp_path / "run", {}) as log, log.progress(1000) as bar:
        for _ in range(9):
            bar.advance()
    steps = [line.split("/")[0] for line in capsys.readouterr().err.splitlines()]
    assert steps[:2] == ["3", "5"]  # the clock is read once more for each line


def test_progress_on_a_terminal_is_a_bar_with_the_numbers(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with RunLog.create(tmp_path / "run", {}) as log, log.progress(3, 0, "meta-step") as bar:
        for _ in range(3):
            bar.advance({"loss": 0.25})
            log.say("")
    assert "meta-step: 100%" in sys.stderr.getvalue() and "loss 0.25" in sys.stderr.getvalue()


def test_progress_is_silent_when_quiet(tmp_path, capsys):
    with new_run(tmp_path) as log, log.progress(10) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")


def test_a_file_of_what_is_no_number_is_not_loaded_and_nobody_is_told_how(tmp_path):
    np.savez(tmp_path / "parameters.npz", w=np.array([{}]))
    with pytest.raises(RunLogError, match="not a file of arrays of numbers"):
        read_arrays(tmp_path / "parameters.npz")


def test_arrays_are_written_whole(tmp_path):
    with new_run(tmp_path) as log:
        log.write_arrays("parameters.npz", {"1.w": np.eye(2)})
        log.write_json("results.json", {"accuracy": 0.5, "where": Path("x")})
        with np.load(log.path("parameters.npz")) as arrays:
            assert arrays["1.w"].tolist() == [[1, 0], [0, 1]]
        mean = {"input_mean": torch.zeros(2)}
        log.write_parameters([{}, {"w": torch.eye(2)}, mean, {"b": torch.ones(1)}], (1, 2))
        with np.load(log.path("parameters.npz")) as arrays:
            assert [*arrays] == ["1.w", "2.input_mean", "2.b", "input_shape"]
            assert arrays["1.w"].tolist() == [[1, 0], [0, 1]]
            assert arrays["input_shape"].tolist() == [1, 2]
        assert json.loads(log.path("results.json").read_text()) == {"accuracy": 0.5, "where": "x"}
        assert not [entry for entry in log.directory.iterdir() if ".new" in entry.name]
