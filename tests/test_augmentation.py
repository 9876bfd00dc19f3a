"""Random views of images against torchvision's transforms: the same maps and distributions."""

import pytest
import torch
from torch.testing import assert_close

from data_sets import augmentation
from data_sets.fetching import import_torchvision
from data_sets.image_data import ImageData
from mnist_datasets import load_images


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_data(count: int, channels: int = 1, size: int = 28) -> ImageData:
    images = torch.randint(256, (count, channels, size, size), generator=seeded())
    return ImageData(images.byte(), torch.zeros(count, dtype=torch.int64), "random")


@pytest.fixture(scope="module")
def digits() -> tuple[ImageData, ImageData]:
    return load_images("mnist5k")


def test_augment_is_determined_by_the_seed_and_leaves_its_input_alone():
    images = random_data(16, channels=3).images
    before = images.clone()
    x = augmentation.augment(images, seeded(5))
    assert torch.equal(x, augmentation.augment(images, seeded(5)))
    assert not torch.equal(x, augmentation.augment(images, seeded(6)))
    assert torch.equal(images, before)
    assert x.dtype == torch.float32 and x.shape == images.shape
    assert x.min() >= 0 and x.max() <= 1


def test_dtype_changes_the_precision_of_augment_but_not_its_draws():
    images = random_data(8).images
    x = augmentation.augment(images, seeded(), dtype=torch.float64)
    assert_close(augmentation.augment(images, seeded()), x.float(), rtol=0, atol=1e-4)
    assert_close(
        augmentation.augment(images, seeded(), dtype=torch.bfloat16).double(), x, rtol=0, atol=5e-3
    )


def test_augment_with_nothing_to_change_gives_the_image_back():
    images = random_data(8, channels=3, size=9).images
    still = {"padding": 0, "degrees": 0, "scale": (1, 1), "ratio": (1, 1)}
    x = augmentation.augment(
        images, seeded(), **still, brightness=0, contrast=0, dtype=torch.float64
    )
    assert_close(x, images.double() / 255, rtol=0, atol=1e-12)


def without_loops(monkeypatch) -> None:
    monkeypatch.setattr(augmentation, "_in_loops", lambda *tensors: False)


@pytest.mark.parametrize("channels, sides", [(1, (28, 28)), (3, (9, 14))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("geometry", [
    {"scale": (0.2, 1.0), "ratio": (0.75, 1.3333), "padding": 2},
    {"scale": (0.9, 1.0), "ratio": (3.0, 4.0)},  # few attempts fit
    {"scale": None, "shift": 3.0},
])  # fmt: skip
def test_loops_and_tensor_operations_make_the_same_views(
    channels, sides, dtype, tolerance, geometry, monkeypatch
):
    x = torch.rand(40, channels, *sides, generator=seeded(), dtype=torch.float64).to(dtype)
    draws = augmentation.draw_numbers(len(x), seeded(1), shifts=True)
    views = []
    for _ in range(2):
        warped = augmentation.warp(x, draws, degrees=100.0, **geometry)
        views += [warped, augmentation.jitter(x.clone(), draws, 0.5, 1.5)]
        without_loops(monkeypatch)
    assert_close(views[0], views[2], rtol=0, atol=tolerance)
    assert torch.equal(views[1], views[3])


def test_where_no_crop_fits_the_largest_centred_one_is_taken(torchvision):
    for (height, width), ratio in {(10, 30): (0.5, 2.0), (30, 10): (0.5, 2.0)}.items():
        crop = torchvision.transforms.RandomResizedCrop
        expected = crop.get_params(torch.zeros(1, height, width), (1.0, 1.0), ratio)
        draws = torch.rand(5, 22, dtype=torch.float64, generator=seeded())
        box = augmentation._random_boxes(
            draws[:, :10], draws[:, 10:20], draws[:, 20:], height, width, 0, (1.0, 1.0), ratio
        )
        assert box.tolist() == [list(map(float, expected))] * 5


@pytest.fixture(scope="module")
def torchvision():
    return import_torchvision()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 36)])
def test_the_warp_is_torchvisions_pad_rotation_and_crop(torchvision, height, width):
    functional = torchvision.transforms.functional
    across, down = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    smooth = torch.sin(across / 4.0 + 1) * torch.cos(down / 5.0) + 1  # interpolates well
    smooth = smooth.double()[None, None]
    box, angle, padding = [3, 1, height - 2, width - 1], 20.0, 2
    bilinear = functional.InterpolationMode.BILINEAR
    padded = functional.pad(smooth, padding)
    rotated = functional.rotate(padded, angle, bilinear)
    expected = functional.resized_crop(rotated, *box, [height, width], bilinear, antialias=False)
    box, angle = torch.tensor([box]).double(), torch.tensor([angle]).double().deg2rad()
    matrices = augmentation._crop_matrices(box, angle, height, width, padding)
    grid = augmentation._grid(matrices, height, width)
    x = augmentation.grid_sample(smooth, grid, align_corners=False)
    inside = (slice(None), slice(None), slice(9, -9), slice(9, -9))
    assert_close(x[inside], expected[inside], rtol=0, atol=0.03)
    assert (x - expected).abs().mean() < 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_in_the_order_of_each_image(torchvision, channels):
    functional = torchvision.transforms.functional
    x = random_data(6, channels).floats(dtype=torch.float64)
    b, c = (
        torch.tensor([0.5, 0.8, 1.0, 1.2, 1.4, 1.5]),
        torch.tensor([1.5, 0.6, 1.3, 1.0, 0.5, 1.1]),
    )
    brightness_first = torch.tensor([0, 1, 0, 1, 0, 1])
    expected = []
    for i in range(6):
        y = x[i]
        if brightness_first[i]:
            y = functional.adjust_brightness(y, b[i].item())
        y = functional.adjust_contrast(y, c[i].item())
        if not brightness_first[i]:
            y = functional.adjust_brightness(y, b[i].item())
        expected.append(y)
    column = (-1, 1, 1, 1)
    factors = (t.double().view(column) for t in (b, c, brightness_first))
    assert_close(
        augmentation._jitter(x.clone(), *factors), torch.stack(expected), rtol=0, atol=2e-3
    )


def test_corners_move_as_far_as_in_torchvisions_pipeline(torchvision, monkeypatch):
    """Quantiles of where the corners of the view come from, in pixels of the original."""
    count, transforms = 3000, torchvision.transforms
    grids = []

    def recording(images, grid, align_corners):
        grids.append(grid)
        return images

    without_loops(monkeypatch)
    monkeypatch.setattr(augmentation, "grid_sample", recording)
    augmentation.augment(torch.zeros(count, 1, 28, 28, dtype=torch.uint8), seeded())
    ours = (grids[0][:, ::27, ::27].reshape(count, 8) + 1) * 14

    torch.manual_seed(0)
    padded = torch.zeros(1, 32, 32)
    theirs = torch.empty(count, 8)
    corners = torch.tensor([[0.5, 0.5], [27.5, 0.5], [0.5, 27.5], [27.5, 27.5]]) / 28
    for i in range(count):
        angle = torch.tensor(transforms.RandomRotation.get_params([-25.0, 25.0])).deg2rad()
        top, left, h, w = transforms.RandomResizedCrop.get_params(
            padded, (0.7, 1.0), (0.75, 1.3333)
        )
        p = corners * torch.tensor([w, h]) + torch.tensor([left, top]) - 16
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        theirs[i] = (p @ turn.T + 14).flatten()
    quantiles = torch.tensor([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    assert_close(ours.quantile(quantiles, 0), theirs.quantile(quantiles, 0), rtol=0, atol=0.4)


def test_crops_are_distributed_as_torchvisions(torchvision):
    count, scale, ratio = 3000, (0.7, 1.0), (0.75, 1.3333)
    draws = torch.rand(count, 22, dtype=torch.float64, generator=seeded())
    ours = augmentation._random_boxes(
        draws[:, :10], draws[:, 10:20], draws[:, 20:], 28, 28, 2, scale, ratio
    )
    torch.manual_seed(0)
    padded, crop = torch.zeros(1, 32, 32), torchvision.transforms.RandomResizedCrop
    theirs = torch.tensor([crop.get_params(padded, scale, ratio) for _ in range(count)]).double()
    assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.15)
    assert_close(ours.std(0), theirs.std(0), rtol=0, atol=0.1)
    for measure in (lambda h, w: (w / h).log(), lambda h, w: h * w / 1024):
        a, b = (measure(box[:, 2], box[:, 3]) for box in (ours, theirs))
        assert_close(a.mean(), b.mean(), rtol=0, atol=0.02)
        assert_close(a.std(), b.std(), rtol=0.05, atol=0)


def test_jitter_factors_are_uniform_independent_and_in_either_order(monkeypatch):
    seen = []
    without_loops(monkeypatch)
    monkeypatch.setattr(augmentation, "_jitter", lambda x, *factors: seen.append(factors) or x)
    augmentation.augment(torch.zeros(3000, 1, 2, 2, dtype=torch.uint8), seeded(), brightness=0.3)
    b, c, brightness_first = (factor.flatten() for factor in seen[0])
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert_close(b.quantile(quantiles), 0.7 + 0.6 * quantiles, rtol=0, atol=0.02)
    assert_close(c.quantile(quantiles), 0.5 + 1.0 * quantiles, rtol=0, atol=0.04)
    assert set(brightness_first.tolist()) == {0, 1}
    correlation = torch.corrcoef(torch.stack([b, c, brightness_first]))
    assert_close(correlation, torch.eye(3), rtol=0, atol=0.07)
    assert abs(brightness_first.mean() - 0.5) < 0.04


def test_views_have_the_mean_and_variance_of_torchvisions_pipeline(torchvision, digits):
    transforms = torchvision.transforms
    pipeline = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Pad(2),
            transforms.RandomRotation(25),
            transforms.RandomResizedCrop(28, (0.7, 1.0), (0.75, 1.3333)),
            transforms.ColorJitter(0.5, 0.5),
            transforms.ToTensor(),
        ]
    )
    images = digits[0].images[:1500]
    torch.manual_seed(0)
    theirs = torch.stack([pipeline(image) for image in images])
    ours = augmentation.augment(images, seeded())
    assert (ours.mean(0) - theirs.mean(0)).abs().mean() < 0.01
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 0.05
    # torchvision interpolates twice and averages where it shrinks: strokes are a little softer.
    assert 0.97 < (ours.var(0).sum() / theirs.var(0).sum()) < 1.1
    assert (ours.var(0) - theirs.var(0)).abs().max() < 0.03
    brightness = [
        x.mean((1, 2, 3)).quantile(torch.tensor([0.05, 0.5, 0.95])) for x in (ours, theirs)
    ]
    assert_close(*brightness, rtol=0.07, atol=0)
