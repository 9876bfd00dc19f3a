"""Rows in a seeded or a given order, in three parts."""

import pytest
import torch

from data_sets.image_data import DataError
from data_sets.splits import read_order, split_rows


def test_a_given_order_has_the_training_rows_first_and_the_test_rows_last():
    order = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    training, validation, test = split_rows(10, 2, 0.25, order)
    assert training.tolist() == [9, 8, 7, 6, 5, 4]
    assert validation.tolist() == [3, 2] and test.tolist() == [1, 0]


def test_a_seed_draws_every_row_once_the_test_rows_first():
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    training, validation, test = split_rows(10, 2, 0.25, 3)
    assert test.equal(drawn[:2]) and validation.equal(drawn[2:4]) and training.equal(drawn[4:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\nx\n", "can't read the rows' order in .*invalid literal"),
        ("0\n1\n3\n", "holds row 3: there are 0 to 2"),
        ("0\n1\n", "orders 2 rows, the data have 3"),
        (None, "can't read the rows' order in .*No such file"),
    ],
)
def test_a_file_that_is_no_order_of_the_rows_is_refused(tmp_path, text, message):
    path = tmp_path / "order.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_order(path, 3)
