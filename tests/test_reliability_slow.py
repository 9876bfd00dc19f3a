"""What docs/reliability.md promises: commands killed at random, damaged files, wrong lines.

python -m pytest -m slow -n 0 -s tests/test_reliability_slow.py      with the counts
"""

import contextlib
import csv
import importlib
import io
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from commands import LIBRARY_ERRORS, ROOT, outcome
from forked import Command

from experiment.command_line import NUMBERS, run_command

pytestmark = pytest.mark.slow

KILLS = 6  # of each command
DAMAGES = 3  # times each of four kinds, of each file
SILENT = ["--quiet", "--no_figures"]
DIGITS = ["--dataset", "mnist5k", "--threads", "1"]
LEARNING = [
    "4", *DIGITS, "--degree", "1", "--metasteps", "12", "--initial_inner_steps", "3",
    "--max_inner_steps", "3", "--batch_size", "64", "--evaluations", "1", "--probe_images", "300",
    "--beside",
]  # fmt: skip
COMMANDS = {  # RUN stands for a finished run of main.py
    "main.py": LEARNING,
    "find_oja.py": [*DIGITS, "--metasteps", "8", "--inner_steps", "4", "--pairs", "1"],
    "baseline_pca.py": [*DIGITS, "--components", "1", "2", "3", "4", "5"],
    "baseline_mlp.py": ["12", *DIGITS, "--metasteps", "20", "--probe_images", "200"],
    "baseline_vicreg.py": ["4", *DIGITS, "--epochs", "6", "--batch_size", "256"],
    "evaluate.py": ["RUN", *DIGITS, "--evaluations", "3", "--steps", "2", "4"],
    "prune_rule.py": [
        "RUN", *DIGITS, "--seeds", "1", "--trials", "1", "--inner_steps", "3", "--try_below", "0",
        "--terms", "6", "2",
    ],
    "train_krotov_hopfield.py": [
        *DIGITS, "--depth", "1", "--units", "12", "--train_images", "500", "--epochs", "3",
        "--round_batches", "4", "--classifier_epochs", "2",
    ],
    "tune_one_pass.py": [
        "-c", "configs/quadratic.yaml", "configs/ours_lr.yaml", "--threads", "1",
        "--total_step_limit", "400", "--log_every", "20",
    ],
    "learn_to_optimize.py": [
        "relu3", *DIGITS, "--hidden", "3", "--epochs", "3", "--runs_per_epoch", "2",
        "--inner_steps", "6", "--unroll", "3", "--validation_runs", "1", "--test_runs", "2",
        "--test_steps", "3", "--tuning_runs", "1",
    ],
}  # fmt: skip
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counts():
    """Prints what was done, when all is done."""
    yield
    print("\n" + ", ".join(f"{name}: {count}" for name, count in COUNTS.items()))


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A finished run of main.py."""
    out = tmp_path_factory.mktemp("learned") / "run"
    assert ended("main", *LEARNING, *SILENT, "--out", out) == (0, "")
    return out


def ended(command: str, *flags) -> tuple[int, str]:
    """Exit status of a command in this process, and what it said on stderr; tracebacks go on."""
    main = importlib.import_module(command).main
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run_command(main, [*map(str, flags)], wrong_input=LIBRARY_ERRORS)
            status = 0
        except SystemExit as end:
            status = end.code
    return status, said.getvalue()


# ---- kills ----


def goes_on(directory: Path, flags: list[str]) -> list:
    """How a command is started again: with --resume, unless it was killed before it began."""
    begun = (directory / "config.json").exists()
    return ["--resume", directory] if begun else [*flags, "--out", directory]


def kill_and_go_on(script: str, flags: list[str], directory: Path, seconds: float) -> None:
    """Kills a command KILLS times, each within so many seconds, then lets it come to its end."""
    draw, errors = random.Random(script), directory.with_suffix(".txt")
    for _ in range(KILLS):
        process = Command(script, *goes_on(directory, flags), *SILENT, stderr=errors)
        until = time.monotonic() + draw.uniform(0, seconds)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            COUNTS["kills"] += 1
        status = process.wait(60)
        assert status in (0, -signal.SIGKILL), errors.read_text()
    process = Command(script, *goes_on(directory, flags), *SILENT, stderr=errors)
    assert process.wait(120) == 0, errors.read_text()
    left = [path.name for path in directory.rglob("*") if ".new" in path.name]
    assert not left, "what was half written is still there"


@pytest.mark.parametrize("script", COMMANDS)
def test_a_command_killed_again_and_again_ends_as_one_never_killed(tmp_path, learned, script):
    flags = [str(learned) if flag == "RUN" else flag for flag in COMMANDS[script]]
    began = time.monotonic()
    process = Command(script, *flags, *SILENT, "--out", tmp_path / "whole")
    assert process.wait(120) == 0
    kill_and_go_on(script, flags, tmp_path / "killed", time.monotonic() - began)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_sweep_killed_again_and_again_ends_as_one_never_killed(tmp_path):
    trial = ["--", "main.py", *LEARNING, "--metasteps", "2"]
    flags = ["--search", "lr=log:1e-5:1e-3", "--trials", "2", "--metric", "test_accuracy_mean"]
    began = time.monotonic()
    assert Command("sweep.py", *flags, "--out", tmp_path / "whole", *SILENT, *trial).wait(120) == 0
    seconds, out = time.monotonic() - began, tmp_path / "killed"
    for number in range(KILLS // 2):
        _kill_sweep([*flags, "--out", out, *SILENT, *trial], number, seconds)
    assert Command("sweep.py", *flags, "--out", out, *SILENT, *trial).wait(120) == 0
    assert len(values_of(out)) == 2 and values_of(out) == values_of(tmp_path / "whole")


def values_of(sweep: Path) -> list[tuple[str, str]]:
    """The searched value and the metric of each trial that is done."""
    with (sweep / "trials.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "done"]
    return sorted((row["lr"], row["value"]) for row in rows)


def _kill_sweep(flags: list, number: int, seconds: float) -> None:
    process = Command("sweep.py", *flags)
    time.sleep(random.Random(number).uniform(0, seconds))
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        COUNTS["kills"] += 1
    process.wait(60)


# ---- damage ----


def damages(content: bytes, other: bytes, name: str) -> list[bytes]:
    """A file's content, another's in its place, and DAMAGES times cut off, changed, with junk."""
    draw, contents = random.Random(name), [b"", other]
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()] or [0]
    for _ in range(DAMAGES):
        place, number = draw.randrange(len(content)), draw.choice(digits)
        bit = bytes([content[place] ^ 1 << draw.randrange(8)])
        digit = b"3" if content[number : number + 1] == b"7" else b"7"
        contents += [
            content[:place],
            content[:place] + bit + content[place + 1 :],
            content[:number] + digit + content[number + 1 :],
            content + draw.randbytes(9),
        ]
    return contents


def read_or_refused(directory: Path, name: str, whole: tuple, *argv) -> None:
    """The command reads the files to the same numbers, or refuses them in one line."""
    status, said = ended(*argv)
    COUNTS[f"damaged files {'read' if status == 0 else 'refused'}"] += 1
    assert status in (0, 2), (name, said)
    if status == 2:
        assert said.count("\n") == 1, (name, said)
    elif directory.exists() and not said:
        assert outcome(directory) == whole, f"{name} was misread without a word"


BOUND = ["config.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt"]


@pytest.mark.parametrize("name", [*BOUND, "results.json", "environment.json", "lock", "log.txt"])
def test_a_resumed_run_misreads_no_damaged_file(tmp_path, learned, name):
    other, whole = tmp_path / "other", outcome(learned)
    assert ended("main", *LEARNING, *SILENT, "--seed", 1, "--out", other)[0] == 0
    content, foreign = (learned / name).read_bytes(), (other / name).read_bytes()
    for number, damaged in enumerate(damages(content, foreign, name)):
        directory = tmp_path / str(number)
        shutil.copytree(learned, directory)
        (directory / name).write_bytes(damaged)
        read_or_refused(directory, name, whole, "main", "--resume", directory, *SILENT)


READERS = {  # what reads which files of a finished run, beside the command itself
    "evaluate": ["config.json", "checkpoint.pt", "rule.json", "results.json", "metrics.csv"],
    "prune_rule": ["config.json", "rule.json", "results.json"],
    "plot": ["config.json", "metrics.csv", "parameters.npz", "results.json"],
}


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, names in READERS.items() for name in names]
)
def test_commands_that_read_a_run_read_or_refuse_each_damaged_file(
    tmp_path, learned, command, name
):
    content = (learned / name).read_bytes()
    for number, damaged in enumerate(damages(content, b"[1, 2]", command + name)):
        directory = tmp_path / f"{number}"
        shutil.copytree(learned, directory)
        (directory / name).write_bytes(damaged)
        out = ["--out", tmp_path / f"out-{number}", *SILENT]
        flags = {
            "evaluate": [directory, *DIGITS, "--evaluations", 1, "--steps", 1, *out],
            "prune_rule": [
                directory, *DIGITS, "--seeds", 1, "--trials", 1, "--inner_steps", 1, "--terms", 12,
                "--try_below", 0, *out,
            ],
            "plot": ["run", directory, "--quiet"],
        }  # fmt: skip
        read_or_refused(tmp_path / "none", name, (), command, *flags[command])


@pytest.mark.parametrize(
    ("script", "figure", "name"),
    [
        ("learn_to_optimize.py", "run", "comparison.npz"),
        ("learn_to_optimize.py", "run", "validation.npz"),
        ("learn_to_optimize.py", "losses", "results.json"),
        ("tune_one_pass.py", "one_pass", "draws.npz"),
        ("tune_one_pass.py", "one_pass", "config.json"),
    ],
)
def test_damaged_files_of_other_runs_are_drawn_or_refused(tmp_path, script, figure, name):
    run = tmp_path / "run"
    command = script.removesuffix(".py")
    assert ended(command, *COMMANDS[script], *SILENT, "--out", run)[0] == 0
    few = damages((run / name).read_bytes(), b"{}", command + name)[:6]  # all kinds, once
    for number, damaged in enumerate(few):
        directory = tmp_path / str(number)
        shutil.copytree(run, directory)
        (directory / name).write_bytes(damaged)
        out = [] if figure == "run" else ["--out", tmp_path / f"{number}.png"]
        argv = [figure, directory, "--quiet", *out]
        read_or_refused(tmp_path / "none", name, (), "plot", *argv)


def test_a_damaged_journal_is_refused_or_read_to_the_same_values(tmp_path):
    flags = ["--search", "lr=log:1e-5:1e-3", "--trials", 2, "--metric", "test_accuracy_mean"]
    last, sweep = ["--", "main.py", *LEARNING, "--metasteps", "1"], tmp_path / "sweep"
    assert ended("sweep", *flags, "--out", sweep, *SILENT, *last)[0] == 0
    values, content = values_of(sweep), (sweep / "study.journal").read_bytes()
    for number, damaged in enumerate(damages(content, b"5\n", "journal")):
        directory = tmp_path / str(number) / "sweep"
        shutil.copytree(sweep, directory)
        (directory / "study.journal").write_bytes(damaged)
        status, said = ended("sweep", "--resume", directory, *SILENT)
        COUNTS[f"damaged files {'read' if status == 0 else 'refused'}"] += 1
        assert status in (0, 2) and said.count("\n") <= 1, said
        assert {*values_of(directory)} <= {*values}  # one may count as still running here


# ---- wrong lines ----

WRONG = ["", "x", "nan", "-inf", "1e999", "\udcff"]


def wrong_lines(parser) -> list[list[str]]:
    """Lines that name a flag that there is not, lack a value, or give a wrong one."""
    lines = [["--no_such_flag"], ["--out"], ["--resume", "/nowhere"]]
    for action in parser._actions:
        flag = action.option_strings[-1] if action.option_strings else None
        if flag is None or action.nargs == 0:
            continue
        if action.nargs not in ("*", "?"):
            lines.append([flag])
        if action.choices is not None or action.type in NUMBERS:
            lines += [[f"{flag}={value}"] for value in WRONG]
    return lines


@pytest.mark.parametrize("script", [*COMMANDS, "sweep.py"])
def test_every_wrong_line_is_one_line_on_the_screen(tmp_path, monkeypatch, script):
    name = script.removesuffix(".py")
    parser = importlib.import_module(name).make_parser()
    monkeypatch.chdir(tmp_path)
    for line in wrong_lines(parser):
        status, said = ended(name, *line)
        assert (status, said.count("\n")) == (2, 1), (line, said)
        COUNTS["wrong lines"] += 1
    assert not [*tmp_path.iterdir()], "a folder was made"


# ---- streams ----


@pytest.mark.parametrize("redirection", [">&- 2>&- <&-", ">/dev/full", "2>/dev/full", "| head -1"])
def test_a_real_command_comes_to_its_end_whatever_its_streams_are(tmp_path, learned, redirection):
    words = " ".join(["main.py", *LEARNING, "--no_figures", "--out", str(tmp_path / "run")])
    environment = "PYTHONIOENCODING=ascii"
    line = f"cd {ROOT}; set -o pipefail; {environment} {sys.executable} {words} {redirection}"
    nowhere = subprocess.DEVNULL
    process = subprocess.run(["bash", "-c", line], stdout=nowhere, stderr=nowhere)
    assert process.returncode == 0
    assert outcome(tmp_path / "run") == outcome(learned)
    COUNTS["streams"] += 1
