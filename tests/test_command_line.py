"""Flags, wrong input as one line and exit status 2, device, and what --resume takes over."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sets.image_data import DataError, ImageData
from experiment.command_line import (
    UserError,
    common_parser,
    computing_parser,
    fraction,
    new_directory,
    nonnegative_float,
    nonnegative_int,
    parse,
    positive_float,
    positive_int,
    run_command,
    run_parser,
)
from experiment.devices import find_device, set_up
from experiment.errors import RunLogError
from experiment.opening import open_run
from kernels.logistic_regression import ProbeError

IMAGES = ImageData(
    torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "two images"
)


def some_parser() -> argparse.ArgumentParser:
    parser = common_parser("Does something.", "some")
    parser.add_argument("layers", type=positive_int, nargs="+", help="units of each layer")
    parser.add_argument("--metasteps", type=positive_int, default=10, help="meta-steps")
    parser.add_argument("--lr", type=positive_float, default=1e-5, help="learning rate")
    parser.add_argument("--pair_inputs", action="store_true", help="pairs")
    return parser


def started(directory: Path, *flags: str) -> argparse.Namespace:
    """A run begun with these flags."""
    args = parse(some_parser(), ["32", "--out", str(directory), "--quiet", *flags])
    open_run(args, "some", IMAGES).close()
    return args


def resumed(directory: Path, *flags: str) -> argparse.Namespace:
    args = parse(some_parser(), [*flags, "--resume", str(directory), "--quiet"])
    open_run(args, "some", IMAGES).close()
    return args


def ended(main, capsys, argv: list[str] | None = None, wrong_input=()) -> tuple[int, str]:
    """Exit status and stderr of a command."""
    with pytest.raises(SystemExit) as end:
        run_command(main, argv, wrong_input=wrong_input)
    return end.value.code, capsys.readouterr().err


# ---- flags ----


def test_the_common_flags_have_their_defaults():
    args = parse(some_parser(), ["256", "32"])
    assert vars(args) == {
        "dataset": "mnist",
        "data_dir": Path("data"),
        "out": None,
        "resume": None,
        "seed": 0,
        "device": "auto",
        "threads": None,
        "dtype": "float32",
        "quiet": False,
        "no_figures": False,
        "layers": [256, 32],
        "metasteps": 10,
        "lr": 1e-5,
        "pair_inputs": False,
    }


def test_a_run_without_images_or_without_tensors_has_fewer_flags():
    of_a_run = {"out", "resume", "seed", "quiet", "no_figures"}
    assert set(vars(parse(run_parser("Does something.", "some"), []))) == of_a_run
    args = parse(computing_parser("Does something.", "some"), ["--threads", "2"])
    assert set(vars(args)) == of_a_run | {"device", "threads", "dtype"} and args.threads == 2


def test_a_flag_that_may_be_given_again_is_one_value_or_a_list(tmp_path, capsys):
    parser = common_parser("d", "demo", several_datasets=True)
    assert parse(parser, []).dataset is None
    flags = ["--dataset", "mnist", "--dataset", "fashion", "--dataset", "cifar10"]
    assert parse(parser, flags[:2]).dataset == "mnist"
    assert parse(parser, flags).dataset == ["mnist", "fashion", "cifar10"]
    for values, saved in ((flags, ["mnist", "fashion", "cifar10"]), (flags[:2], "mnist")):
        out = tmp_path / str(len(values))
        args = parse(parser, [*values, "--out", str(out)])
        open_run(args, "demo").close()
        assert json.loads((out / "config.json").read_text())["dataset"] == saved
        assert parse(parser, ["--resume", str(out)]).dataset == saved
    for wrong, said in ((["--dataset", "mnist"], "given twice"), (["--dataset", "x"], "known are")):
        with pytest.raises(SystemExit):
            parse(parser, [*flags, *wrong])
        assert said in capsys.readouterr().err


def test_where_one_data_set_is_taken_a_second_is_refused(tmp_path, capsys):
    parser = common_parser("d", "demo")
    assert parse(parser, []).dataset == "mnist"
    for second in ("mnist", "fashion"):
        with pytest.raises(SystemExit) as stop:
            parse(parser, ["--dataset", "mnist", "--dataset", second])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1
        assert "argument --dataset: taken once here, but given twice" in line
    args = parse(parser, ["--dataset", "fashion", "--out", str(tmp_path / "run")])
    open_run(args, "demo").close()
    assert parse(parser, ["--resume", str(tmp_path / "run")]).dataset == "fashion"


@pytest.mark.parametrize("text", ["-1", "-.5", "-1.", "-0.75", "-1e-3", "-2.5E+2", "-1_0", "-inf"])
def test_a_negative_number_is_no_flag(text):
    parser = some_parser()
    parser.add_argument("--power", type=float)
    assert parse(parser, ["32", "--power", text]).power == float(text)


def test_dashes_and_underscores_are_one():
    for flag in ("--data-dir", "--data_dir"):
        assert parse(some_parser(), ["1", flag, "elsewhere"]).data_dir == Path("elsewhere")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("32 --unknown", "unrecognized arguments: --unknown"),
        ("32 --metastep 3", "unrecognized arguments"),
        ("", "required: layers"),
        ("0", "layers: must be a whole number of at least 1, not '0'"),
        ("32 --metasteps 1.5", "--metasteps: must be a whole number of at least 1, not '1.5'"),
        ("32 --lr nan", "--lr: must be a number above 0, not 'nan'"),
        ("32 --lr -1", "--lr: must be a number above 0, not '-1'"),
        ("32 --lr", "--lr: expected one argument"),
        ("32 --seed -1", "--seed: must be a whole number of at least 0, not '-1'"),
        ("32 --seed x", "--seed: must be a whole number of at least 0, not 'x'"),
        ("32 --threads 0", "--threads: must be a whole number of at least 1, not '0'"),
        ("32 --dataset cats", "--dataset: unknown data set 'cats'; known are mnist"),
        ("32 --dtype float16", "--dtype: invalid choice: 'float16'"),
        ("32 --device gpu", "--device: must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
        ("32 --out a --resume b", "--resume: not allowed with argument --out"),
        ("--resume /nowhere", "--resume: /nowhere is not a run's directory"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_status_2(capsys, flags, said):
    status, error = ended(lambda argv: parse(some_parser(), argv), capsys, flags.split())
    assert status == 2
    assert error.count("\n") == 1 and error.startswith("some.py: error: ") and said in error


def test_help_shows_the_flags_and_the_defaults_that_tell_something(capsys):
    with pytest.raises(SystemExit) as end:
        parse(some_parser(), ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "layers [layers ...]" in text and "meta-steps (default: 10)" in text
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (positive_int, ["1", "99"], ["0", "-1", "1.0", "inf", ""]),
        (nonnegative_int, ["0", "7"], ["-1", "x"]),
        (positive_float, ["1e-5", "3", "1e30"], ["0", "-1", "nan", "inf", "x", "1e308"]),
        (nonnegative_float, ["0", "0.5"], ["-1e-9", "nan", "1e31"]),
        (fraction, ["0", "1", ".5"], ["1.01", "-0.1", "nan"]),
    ],
)
def test_numbers_are_taken_in_their_range_only(kind, right, wrong):
    assert [kind(text) for text in right] == [float(text) for text in right]
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="must be a"):
            kind(text)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["9" * 20], "layers: must be at most 1000000000, not 99999999999999999999"),
        (["32", "--metasteps", "1000000001"], "--metasteps: must be at most 1000000000"),
        (["32", "--degree", "11"], "--degree: must be at most 10, not 11"),
        (["32", "--metasteps", "9" * 400], "not one of more than 30 digits"),
    ],
)
def test_whole_numbers_have_limits(capsys, flags, said):
    def parsed(argv):
        parser = some_parser()
        parser.add_argument("--degree", type=positive_int)
        return parse(parser, argv)

    status, error = ended(parsed, capsys, flags)
    assert status == 2 and error.count("\n") == 1 and said in error
    largest = parsed([str(10**9), "--degree", "10", "--seed", "9" * 40])
    assert (largest.layers, largest.degree, largest.seed) == ([10**9], 10, 10**40 - 1)


def test_a_whole_number_may_be_larger_than_any_float():
    assert nonnegative_int(f"1{400 * '0'}") == 10**400


# ---- how a command ends ----


@pytest.mark.parametrize("kind", [UserError, RunLogError, DataError, ProbeError])
def test_wrong_input_ends_a_command_with_one_line_and_status_2(capsys, kind):
    def main(argv):
        raise kind("images are 32 x 32,\nexpected 28 x 28")

    assert ended(main, capsys) == (2, "error: images are 32 x 32, expected 28 x 28\n")


class LibraryError(RuntimeError):
    """What a library raises for wrong input."""


def raising(error):
    def main(argv):
        raise error

    return main


def test_wrong_input_is_also_what_a_command_says_its_libraries_raise_for_it(capsys):
    main = raising(LibraryError("take\nless"))
    assert ended(main, capsys, wrong_input=(LibraryError,)) == (2, "error: take less\n")
    with pytest.raises(LibraryError):
        run_command(main)


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytes(10**15)]
)
def test_memory_that_is_not_there_ends_a_command_with_one_line_and_status_2(capsys, allocate):
    said = "error: not enough memory: take smaller layers or batches\n"
    assert ended(lambda argv: allocate(), capsys) == (2, said)


def test_memory_that_a_device_does_not_have_ends_a_command_with_status_2(capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    assert ended(raising(error), capsys)[0] == 2


def test_an_error_that_merely_mentions_memory_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="ran out of memory"):
        run_command(raising(RuntimeError("the reviewer ran out of memory of the chapter")))


def test_an_interrupt_ends_a_command_with_status_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert ended(main, capsys) == (130, "interrupted\n")


def test_a_mistake_in_the_program_keeps_its_traceback():
    def main(argv):
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run_command(main)


def test_a_pipe_closed_by_its_reader_is_silent():
    program = (
        "from experiment.command_line import run_command; "
        "run_command(lambda _: print('x' * 100000))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


# ---- the device ----


@pytest.fixture
def torch_as_it_was():
    """Puts back what `set_up` sets for the whole process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_the_device_and_type_asked_for_are_returned(torch_as_it_was):
    args = parse(some_parser(), ["1", "--device", "cpu", "--dtype", "float64", "--threads", "1"])
    assert set_up(args) == (torch.device("cpu"), torch.float64)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device auto"):
        find_device(name)


def test_auto_is_a_device_that_is_there():
    assert torch.zeros(1, device=find_device("auto")).item() == 0


# ---- the run ----


def test_a_new_run_is_named_by_command_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse(some_parser(), ["1", "--quiet"])
    with open_run(args, "some", IMAGES) as first, open_run(args, "some", IMAGES) as second:
        assert first.directory != second.directory
        assert first.directory.parent == Path("runs") and first.directory.name.startswith("some-2")


def test_processes_that_start_in_the_same_second_get_directories_of_their_own(tmp_path):
    made = [new_directory("some", tmp_path / "runs") for _ in range(3)]
    assert len(set(made)) == 3 and all(path.is_dir() for path in made)


def test_the_configuration_holds_what_is_in_effect(tmp_path):
    args = parse(some_parser(), ["1", "--out", str(tmp_path / "run"), "--device", "auto"])
    with open_run(args, "some", IMAGES) as log:
        assert log.config["command"] == "some" and log.config["device"] == str(find_device("auto"))
        assert log.config["threads"] == torch.get_num_threads()
        assert not {"out", "resume", "quiet", "no_figures"} & set(log.config)


@pytest.mark.parametrize("flags", [[], ["--no_figures"]])
def test_figures_can_be_left_out(tmp_path, flags):
    drawn = []
    for flag in ("--out", "--resume"):
        args = parse(some_parser(), ["1", flag, str(tmp_path / "run"), "--quiet", *flags])
        with open_run(args, "some", IMAGES) as log:
            log.plot(drawn.append)
    assert drawn == ([] if flags else [tmp_path / "run"] * 2)


def test_an_out_that_can_not_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = parse(some_parser(), ["1", "--out", str(tmp_path / "file" / "run")])
    status, error = ended(lambda _: open_run(args, "some", IMAGES), capsys)
    assert status == 2 and error.count("\n") == 1 and "Not a directory" in error


def test_resume_takes_the_flags_of_the_run(tmp_path):
    there = str(tmp_path / "there")
    started(tmp_path / "run", "--lr", "3e-5", "--pair_inputs", "--data-dir", there, "--seed", "4")
    assert resumed(tmp_path / "run").data_dir == Path("data"), "no folder is made for a stranger"
    Path(there).mkdir()
    args = resumed(tmp_path / "run")
    assert args.layers == [32] and args.lr == 3e-5 and args.pair_inputs and args.seed == 4
    assert args.data_dir == Path(there) and args.metasteps == 10
    assert args.resume == tmp_path / "run" and args.out is None and args.quiet


def test_resume_takes_equal_flags_and_another_data_dir(tmp_path):
    started(tmp_path / "run", "--lr", "3e-5")
    args = resumed(tmp_path / "run", "32", "--lr", "0.00003", "--data-dir", "elsewhere")
    assert args.data_dir == Path("elsewhere")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("32 --lr 1e-5", "lr 3e-05 there, 1e-05 now"),  # the default, but given
        ("32 --seed 5", "seed 0 there, 5 now"),
        ("256 32", r"layers \[32\] there, \[256, 32\] now"),
        ("32 --pair_inputs", "pair_inputs False there, True now"),
        ("32 --threads 99", r"threads \d+ there, 99 now"),
    ],
)
def test_resume_refuses_other_flags_and_names_them(tmp_path, flags, said):
    started(tmp_path / "run", "--lr", "3e-5")
    with pytest.raises(UserError, match=said) as refusal:
        resumed(tmp_path / "run", *flags.split())
    assert str(refusal.value).count(" there, ") == 1


def test_resume_refuses_a_run_of_another_command(tmp_path, capsys):
    started(tmp_path / "run", "--lr", "3e-5")
    other, argv = common_parser("Does another thing.", "other"), ["--resume", str(tmp_path / "run")]
    other.add_argument("--lr", choices=("slow", "fast"))
    status, error = ended(lambda argv: parse(other, argv), capsys, argv)
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("other.py: error: argument --resume: ")
    assert "is a run of some.py, not of other.py" in error


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr", "abc", "lr must be a number above 0, not 'abc'"),
        ("lr", -1, "lr must be a number above 0, not '-1'"),
        ("lr", [1.0], "lr must be a number above 0"),
        ("lr", None, "lr must be a number above 0, not 'None'"),
        ("seed", 1.5, "seed must be a whole number of at least 0, not '1.5'"),
        ("layers", "abc", "layers must be a list, not 'abc'"),
        ("layers", [32, 0], "layers must be a whole number of at least 1, not '0'"),
        ("layers", [10**20], f"layers must be at most 1000000000, not {10**20}"),
        ("device", {}, "device must be auto, cpu, cuda, cuda:N or mps, not '{}'"),
        ("dtype", "float16", "dtype must be one of float32, float64, not 'float16'"),
        ("dtype", {}, "dtype must be one of float32, float64, not {}"),
        ("pair_inputs", "yes", "pair_inputs must be true or false, not 'yes'"),
    ],
)
def test_resume_refuses_a_value_that_its_flag_would_not_take(tmp_path, capsys, name, value, said):
    started(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    argv = ["--resume", str(tmp_path / "run")]
    status, error = ended(lambda argv: parse(some_parser(), argv), capsys, argv)
    assert status == 2 and error.count("\n") == 1
    assert f"config.json is damaged: {said}" in error


def test_resume_says_when_the_device_of_the_run_is_gone(tmp_path):
    started(tmp_path / "run", "--device", "cpu")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"cpu"', '"cuda:99"'))
    args = parse(some_parser(), ["--resume", str(tmp_path / "run")])
    with pytest.raises(UserError, match="no device cuda:99"):
        set_up(args)


def test_resume_refuses_a_damaged_configuration_in_one_line(tmp_path, capsys):
    started(tmp_path / "run")
    os.truncate(tmp_path / "run" / "config.json", 20)
    argv = ["--resume", str(tmp_path / "run")]
    status, error = ended(lambda argv: parse(some_parser(), argv), capsys, argv)
    assert status == 2 and error.count("\n") == 1 and "is damaged" in error


def test_two_dashes_are_no_value(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(some_parser(), ["1", "--seed=--"])
    assert stop.value.code == 2 and "--seed: expected a value" in capsys.readouterr().err
