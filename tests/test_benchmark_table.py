"""The columns of benchmarks/table.py, and the flags that all benchmarks share."""

import argparse
from pathlib import Path

import pytest
import torch
from commands import ROOT, refused

from benchmarks.table import (
    HEADINGS,
    Clock,
    Row,
    benchmark_parser,
    median_text,
    numbers_of_process,
    print_table,
    ratio_text,
    set_up,
)

CPU = Clock(torch.device("cpu"))


def test_a_row_has_medians_and_ratios_of_the_same_turn():
    row = Row("step", "8 x 8", ours=[1.0, 2.0, 4.0], obvious=[10.0, 10.0, 80.0], limit=[1, 1, 1])
    assert row.cells() == ["step", "8 x 8", "10.0", "2.00", "1.00", "10.00", "2.00", "3"]


def test_what_there_is_not_is_a_dash():
    assert Row("step", "8", ours=[0.5]).cells()[2:] == ["-", "0.500", "-", "-", "-", "1"]
    assert Row("nothing", "-", ours=None).cells()[2:] == ["-"] * 6
    assert ratio_text([1.0], None) == "-"


def test_medians_have_at_least_three_digits():
    texts = [median_text([value]) for value in (0.01234, 0.9, 12.34, 123.4, 26135.0, 0.0)]
    assert texts == ["0.0123", "0.900", "12.3", "123", "26135", "0"]


def test_ways_take_turns_after_one_call_that_is_not_counted():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = CPU.in_turns(ways, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2}


def test_only_one_thread_of_a_cpu_is_timed_by_the_processors_clock():
    assert CPU.reads_processor
    others = Clock(CPU.device, threads=2), Clock(CPU.device, wall=True), Clock(torch.device("cuda"))
    assert not any(clock.reads_processor for clock in others)


def test_a_table_has_the_same_columns_everywhere_and_then_its_own(capsys):
    rows = [Row("short", "1", [1.0], more={"MB": "7"}), Row("long", "2", [2.0], more={"MB": "8"})]
    print_table(rows, CPU, "all of them")
    first, headings, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("all of them; cpu, 1 thread(s), torch")
    words = " ".join(headings.split())
    assert words == " ".join([*HEADINGS, "MB"])
    assert [line.split()[0] for line in lines] == ["short", "long"]
    assert {len(line) for line in [headings, *lines]} == {len(headings)}


def test_every_benchmark_has_the_flags_and_refuses_a_device_that_makes_no_sense(capsys):
    arguments = benchmark_parser("Times it.", repeat=5).parse_args([])
    assert vars(arguments) == {"device": "auto", "repeat": 5, "threads": 1}

    def main(argv):
        set_up(benchmark_parser("Times it.", 5).parse_args(argv), only_on_cpu="it counts cores")

    assert "cuda: it counts cores; only --device cpu" in refused(capsys, main, "--device", "cuda")
    assert "at least 1" in refused(capsys, main, "--repeat", 0)
    assert set_up(argparse.Namespace(device="auto", threads=1), only_on_cpu="cores") == CPU


def test_a_process_tells_its_numbers_or_how_it_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(1.5, len(sys.argv)); sys.exit(int(sys.argv[1]))")
    assert numbers_of_process(str(script), ["0"]) == [1.5, 2.0]
    with pytest.raises(SystemExit) as stop:
        numbers_of_process(str(script), ["2"])
    assert stop.value.code == 2


def test_no_benchmark_has_the_name_of_a_folder_of_modules():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert not folders & {path.stem for path in Path(ROOT, "benchmarks").glob("*.py")}
