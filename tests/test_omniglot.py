"""The loader on small files of the published form; the real ones are never here."""

import pytest
import torch
from omniglot_files import SMALL, drawing, files, write_folder, write_small_sets, write_zip

from data_sets.image_data import DataError
from data_sets.omniglot import load_omniglot


def test_alphabets_are_divided_and_a_character_in_both_small_sets_is_taken_once(tmp_path):
    write_small_sets(tmp_path)
    data = load_omniglot(tmp_path)
    assert data.train.alphabets == ["a", "b", "c"] and data.test.alphabets == ["d"]
    assert data.train.images.shape == (7, 4, 1, 28, 28)
    assert data.test.images.shape == (3, 4, 1, 28, 28)
    assert len({*data.train.names, *data.test.names}) == 10
    assert "7 characters to learn from and 3 to judge by" in data.source


def test_ink_is_bright_and_drawings_keep_their_order(tmp_path):
    write_small_sets(tmp_path)
    images = load_omniglot(tmp_path).train.images
    assert images.dtype == torch.uint8
    for repeat in range(4):
        middle = images[1, repeat, 0, 15]  # below the bar of character 1
        assert int(images[1, repeat, 0, 5].min()) == 255
        assert int(middle[4 * repeat + 1]) == 255 and int(middle[4 * repeat + 3]) < 40


def test_folders_of_torchvision_give_what_zip_files_give(tmp_path):
    content = files({"a": 2, "b": 1, "c": 1, "d": 2}, 3)
    write_zip(tmp_path / "zipped" / "omniglot" / f"{SMALL[0]}.zip", SMALL[0], content)
    write_folder(tmp_path / "unpacked" / "omniglot-py" / SMALL[0], content)
    zipped, unpacked = (load_omniglot(tmp_path / name) for name in ("zipped", "unpacked"))
    assert torch.equal(zipped.train.images, unpacked.train.images)
    assert zipped.train.names == unpacked.train.names
    assert zipped.test.names == unpacked.test.names == (("d", "character00"), ("d", "character01"))
    assert zipped.fingerprint() == unpacked.fingerprint()


def test_where_there_is_an_evaluation_set_it_is_for_testing(tmp_path):
    place = tmp_path / "omniglot-py"
    write_folder(place / "images_background", files({"a": 2, "b": 2}, 3))
    write_folder(place / "images_evaluation", files({"b": 2, "e": 1}, 3))
    data = load_omniglot(tmp_path)
    assert data.train.alphabets == ["a"] and data.test.alphabets == ["b", "e"]


def test_the_pool_holds_all_drawings_labelled_by_character(tmp_path):
    write_small_sets(tmp_path)
    data = load_omniglot(tmp_path)
    pool = data.pooled()
    assert len(pool) == 40 and pool.labels.bincount().tolist() == [4] * 10
    assert torch.equal(pool.images[:4], data.train.images[0])
    assert torch.equal(pool.images[-4:], data.test.images[-1])


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    write_zip(tmp_path / "few" / f"{SMALL[0]}.zip", SMALL[0], files({"a": 2, "b": 2}, 2))
    write_zip(tmp_path / "empty" / f"{SMALL[0]}.zip", SMALL[0], {})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / f"{SMALL[0]}.zip").write_bytes(b"PK but no more")
    four = {"a": 1, "b": 1, "c": 1, "d": 1}
    unequal = files(four, 3)
    del unequal["b/character00/0000_02.png"]
    write_zip(tmp_path / "unequal" / f"{SMALL[0]}.zip", SMALL[0], unequal)
    cut = files(four, 2) | {"c/character00/0000_01.png": drawing(0, 1)[:60]}
    write_zip(tmp_path / "cut" / f"{SMALL[0]}.zip", SMALL[0], cut)
    for name, message in (
        ("nowhere", "Omniglot is not in"),
        ("few", "too few alphabets"),
        ("empty", "holds no alphabet/character"),
        ("damaged", "can't be read"),
        ("unequal", "b/character00 has 2 drawings, others have 3"),
        ("cut", "a drawing of c/character00 is damaged"),
    ):
        with pytest.raises(DataError, match=message) as error:
            load_omniglot(tmp_path / name)
        assert "\n" not in str(error.value), name
