"""Which rows are for training, validation and test: drawn by a seed, or in an order that is given.

training, validation, test = split_rows(len(rows), test_rows, 0.2, seed)
order = read_order("order.txt", len(rows))   # training rows, then validation, the test last
"""

from pathlib import Path

import torch
from torch import Tensor

from data_sets.image_data import DataError


def split_rows(
    count: int, test_rows: int, validation_proportion: float, split: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the training, the validation and the test rows, out of `count`.

    split: the seed of a permutation, or an order [count]: training rows first, the test last.
    `validation_proportion` is that of the rows that are not for the test.
    """
    held_out = round(validation_proportion * (count - test_rows))
    sizes = [count - test_rows - held_out, held_out, test_rows]
    if isinstance(split, Tensor):
        return split.split(sizes)
    generator = torch.Generator().manual_seed(split)
    order = torch.randperm(count, generator=generator, device="cpu")
    return order.split(sizes[::-1])[::-1]


def read_order(path: Path, count: int) -> Tensor:
    """The row numbers [count] in a file, one a line, from 0; DataError where they are none."""
    try:
        numbers = [int(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"can't read the rows' order in {path}: {reason}") from error
    wrong = next((number for number in numbers if not 0 <= number < count), None)
    if wrong is not None:
        raise DataError(f"{path} holds row {wrong}: there are 0 to {count - 1}")
    if len(numbers) != count:
        raise DataError(f"{path} orders {len(numbers)} rows, the data have {count}")
    return torch.tensor(numbers)
