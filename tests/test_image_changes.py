"""Some classes of a data set, in grey, of another size."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_sets.image_changes import grey, of_classes, resized
from data_sets.image_data import DataError, ImageData


def colours(count: int = 12, size: int = 9) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator).to(torch.uint8)
    return ImageData(images, torch.arange(count) % 4, "noise")


def test_classes_keep_their_images_and_labels():
    data = colours()
    some = of_classes(data, [3, 1])
    assert some.labels.tolist() == [1, 3] * 3
    assert torch.equal(some.images, data.images[[1, 3, 5, 7, 9, 11]])
    assert some.source == "noise; 6 of classes 1, 3"
    with pytest.raises(DataError, match="no class 4: they are from 0 to 3"):
        of_classes(data, [1, 4])


def test_grey_is_the_mean_of_the_channels():
    data = colours()
    shade = grey(data)
    assert shade.shape == (1, 9, 9)
    difference = shade.images[:, 0].float() - data.images.float().mean(1)
    assert difference.abs().max() <= 0.5


@pytest.mark.parametrize("size", [5, 14])
def test_another_size_is_that_of_an_image_library(size):
    data = colours()
    small = resized(data, size)
    assert small.shape == (3, size, size) and small.source == f"noise; {size} x {size} pixels"
    for ours, image in zip(small.images, data.images, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1
