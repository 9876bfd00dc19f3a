"""A file is the old one or the new one, whichever way its writing ends."""

import json
import math
import os
import threading
from pathlib import Path

import pytest

from experiment.files import finite_or_null, in_place, json_text, write_whole


def test_a_file_is_replaced_whole_with_the_usual_permissions(tmp_path):
    usual, written = tmp_path / "usual", tmp_path / "written"
    usual.write_text("")
    write_whole(written, "±1\n")
    write_whole(written, b"\xc2\xb12\n")
    assert written.read_text(encoding="utf-8") == "±2\n"
    assert written.stat().st_mode == usual.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [usual, written]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_breaks_off_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "table"
    path.write_text("old")

    def write() -> None:
        with in_place(path) as new:
            new.write_text("half a ta")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_place_that_cannot_be_written_is_told_by_the_name_that_was_asked_for(tmp_path):
    with pytest.raises(OSError) as refusal:
        write_whole(tmp_path / "nowhere" / "table", "new")
    assert refusal.value.filename == str(tmp_path / "nowhere" / "table")


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def full(_):
        raise OSError("No space left on device")

    (tmp_path / "table").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "table", "new")
    assert (tmp_path / "table").read_text() == "old" and len([*tmp_path.iterdir()]) == 1


def test_writers_at_the_same_moment_leave_one_of_their_files(tmp_path):
    texts = [letter * 100_000 for letter in "abcd"]
    writers = [
        threading.Thread(target=write_whole, args=(tmp_path / "table", text)) for text in texts
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "table").read_text() in texts and len([*tmp_path.iterdir()]) == 1


def test_json_takes_what_it_does_not_know_as_text():
    assert json.loads(json_text({"where": Path("x"), "n": 1})) == {"where": "x", "n": 1}


def test_numbers_that_json_has_no_word_for_are_null():
    value = {"a": [1.5, math.inf], "b": {"c": (-math.inf, math.nan)}, "d": None, "n": 2}
    text = json_text(finite_or_null(value))
    expected = {"a": [1.5, None], "b": {"c": [None, None]}, "d": None, "n": 2}
    assert json.loads(text, parse_constant=pytest.fail) == expected
