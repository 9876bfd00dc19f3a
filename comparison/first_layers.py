"""First layers on images: windows to learn filters from, and what a probe makes of the filters.

    layer = FirstLayer(filters)                                      # [units, C, kernel, kernel]
    judged(layer, train_data, test_data, C=0.01)                     # accuracies

Every layer is judged behind one encoder, so that only the filters w_o, scaled to norm 1, differ:

    u_o = w_o * x,   relu(u_o - mean_o u_o)       (Triangle), averaged over a 4 x 4 grid

Source of the encoder: Coates, Lee, Ng 2011, AISTATS. `FilterLoss` judges filters that are being
learned in the same way, differentiably.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d
from torch.utils.checkpoint import checkpoint

from experiment.command_line import UserError
from kernels.logistic_regression import fit_logistic
from krotov_hopfield import Triangle
from linear_probe import ProbeError, extract_features, ridge_error
from mnist_datasets import ImageData, hold_out, load_images, normalize_pixels
from models_fully_local import Params

GRID = 4  # squares, in each direction, over which responses are averaged
IMAGES_AT_ONCE = 32  # their responses stay in the cache: 2.5 times as fast as with 500
TOLERANCE = 1e-6  # of the probe; the accuracy no longer changes below it
ENCODINGS = ("triangle", "own")
SILENT = 1e-12  # variance of a feature, far below that of any filter that responds

Batches = Callable[[Generator], Iterator[tuple[Tensor, ...]]]  # endless views of images
Response = Callable[[Tensor], Tensor]  # images [n, C, H, W] to [n, units, H', W']


# ---- images ----


def centred_images(args, device) -> tuple[ImageData, ImageData]:
    """Images to learn from and images to judge on, centred by the former's pixelwise mean.

    args: dataset, data_dir, and held_out and train_images, which may be None. Raises UserError if
        there are fewer training images than asked for.
    """
    train_data, test_data = load_images(args.dataset, args.data_dir)
    if args.held_out:
        train_data, test_data = hold_out(train_data, args.held_out)
    if args.train_images:
        if args.train_images > len(train_data):
            raise UserError(f"--train_images {args.train_images}: there are {len(train_data)}")
        train_data = train_data.subset(slice(args.train_images))
    both = normalize_pixels(train_data, test_data, unit_variance=False)
    return both[0].to(device), both[1].to(device)


# ---- filters and their features ----


def triangle_means(x: Tensor, filters: Tensor) -> Tensor:
    """The Triangle of filters [units, C, k, k] at norm 1 on images x [n, C, H, W], over the grid.

    [n, units * GRID^2], differentiable in the filters.
    """
    norms = torch.linalg.vector_norm(filters.flatten(1), dim=1).clamp_min(1e-12)
    u = conv2d(_channels_last(x), filters / norms.view(-1, 1, 1, 1))
    return adaptive_avg_pool2d(Triangle()(u), GRID).flatten(1)


@dataclass(frozen=True)
class FirstLayer:
    """Filters [units, C, kernel, kernel] of any norm, and the method's own response if any."""

    filters: Tensor
    own: Response | None = None

    def features(self, data: ImageData) -> list[Tensor]:
        """What the Triangle, and then `own`, make of all images, each [N, units * GRID^2]."""
        params = [{"w": self.filters}]
        both = extract_features(self._encode, params, data, batch_size=IMAGES_AT_ONCE)
        return list(both.split(len(self.filters) * GRID**2, 1))

    def _encode(self, x: Tensor, params: Params) -> Tensor:
        encoded = [triangle_means(x, params[0]["w"])]
        if self.own is not None:
            encoded.append(adaptive_avg_pool2d(self.own(_channels_last(x)), GRID).flatten(1))
        return torch.cat(encoded, 1)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ---- judgement ----


def columns() -> list[str]:
    """The names of the accuracies of a layer."""
    return [f"{encoding}/{part}_accuracy" for encoding in ENCODINGS for part in ("train", "test")]


def judged(
    layer: FirstLayer, train_data: ImageData, test_data: ImageData, C: float
) -> dict[str, float]:
    """Accuracies of a probe on the standardised features of each encoding, by `columns`."""
    sets, found = (train_data, test_data), {}
    features = [layer.features(data) for data in sets]
    for encoding, *of_sets in zip(ENCODINGS, *features, strict=False):
        seen, unseen = standardised(*of_sets)
        fit = fit_logistic(seen, train_data.labels, train_data.classes, C, tolerance=TOLERANCE)
        for part, x, data in zip(("train", "test"), (seen, unseen), sets, strict=True):
            right = fit.logits(x).argmax(1) == data.labels
            found[f"{encoding}/{part}_accuracy"] = right.double().mean().item()
    return found


def standardised(seen: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of each column of `seen`, divided by its deviation, 1 where that is 0."""
    deviation, mean = torch.std_mean(seen, 0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return (seen - mean) / deviation, (unseen - mean) / deviation


class FilterLoss:
    """The outer loss of filters: squared error of ridge regression on their Triangle's means.

    The weights of the last layer with parameters are the filters. Features are standardised;
    regression is fitted to fit_images and judged on outer_images others, drawn anew at each call,
    and is differentiated through, in float64. Only IMAGES_AT_ONCE images' responses exist at a
    time: the backward pass computes them again. Raises ProbeError if there are too few images.

    penalty: of the squared weights, for each image of the fit.
    """

    metrics = ("train_accuracy", "held_out_accuracy")

    def __init__(
        self,
        data: ImageData,
        kernel: int,
        *,
        fit_images: int = 1500,
        outer_images: int = 500,
        penalty: float = 1.0,
    ) -> None:
        if min(fit_images, outer_images) < 2 or fit_images + outer_images > len(data):
            raise ProbeError(
                f"ridge regression on {fit_images} images, judged on {outer_images} others: "
                f"expected at least 2 of each, of {len(data)} training images"
            )
        self.data, self.penalty = data, penalty * fit_images
        self.shape = (-1, data.shape[0], kernel, kernel)
        self.sizes = [fit_images, outer_images]

    def __call__(
        self, model: nn.Module, params: Params, generator: Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss attached to params, and the accuracies on images of the fit and on others."""
        filters = [layer["w"] for layer in params if layer][-1].view(self.shape)
        order = torch.randperm(len(self.data), generator=generator, device="cpu")
        index = order[: sum(self.sizes)]
        parts = [self._features(rows, filters) for rows in index.split(IMAGES_AT_ONCE)]
        seen, unseen = torch.cat(parts).double().split(self.sizes)
        variance, mean = torch.var_mean(seen, 0)
        deviation = (variance + SILENT).sqrt()  # differentiable for filters that never respond
        seen, unseen = (seen - mean) / deviation, (unseen - mean) / deviation
        labels = self.data.labels[index.to(self.data.labels.device)].split(self.sizes)
        loss, numbers = ridge_error(seen, unseen, *labels, self.data.classes, self.penalty)
        return loss.to(filters.dtype), numbers

    def _features(self, rows: Tensor, filters: Tensor) -> Tensor:
        x = self.data.floats(rows, filters.dtype)
        return checkpoint(triangle_means, x, filters, use_reentrant=False, preserve_rng_state=False)


# ---- windows ----


@dataclass(frozen=True)
class RandomWindows:
    """Batches of windows from random places of images, the same places in every view.

    batches: (generator) -> iterator over tuples of views, each images [n, C, H, W].
    count: windows of each image.
    size: the side of a window, in pixels.
    """

    batches: Batches
    count: int
    size: int

    def __call__(self, generator: Generator) -> Iterator[tuple[Tensor, ...]]:
        """Endless tuples with windows [n * count, C, size, size] of each view."""
        for views in self.batches(generator):
            n, _, *sides = views[0].shape
            image = torch.arange(n).repeat_interleave(self.count)
            top, left = _corners(sides, self.size, len(image), generator)
            yield tuple(windows_at(view, image, top, left, self.size) for view in views)


@dataclass(frozen=True)
class MappedWindows:
    """Windows, each as a row of pixels times a matrix, such as one that whitens them.

    windows: (generator) -> iterator over tuples of views, each windows [n, C, size, size].
    matrix: [C * size * size, C * size * size].
    """

    windows: Batches
    matrix: Tensor

    def __call__(self, generator: Generator) -> Iterator[tuple[Tensor, ...]]:
        """Endless tuples of mapped windows of each view, of the same shapes."""
        for views in self.windows(generator):
            yield tuple((x.flatten(1) @ self.matrix).view_as(x) for x in views)


def windows_at(images: Tensor, image: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Windows [n, C, size, size] of images [N, C, H, W], given numbers and corners, each [n]."""
    sides, channels = torch.arange(size), torch.arange(images.shape[1])
    rows, columns = top[:, None] + sides, left[:, None] + sides
    return images[
        image.view(-1, 1, 1, 1),
        channels.view(1, -1, 1, 1),
        rows.view(-1, 1, size, 1),
        columns.view(-1, 1, 1, size),
    ]


def draw_patches(data: ImageData, count: int, kernel: int, generator: Generator) -> Tensor:
    """Squares of pixels in [0, 1] from random places of random images, float32 [count, pixels]."""
    images = data.images.cpu()
    image = torch.randint(len(images), (count,), generator=generator)
    top, left = _corners(images.shape[2:], kernel, count, generator)
    return windows_at(images, image, top, left, kernel).flatten(1).float() / 255


def _corners(
    sides: Sequence[int], size: int, count: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Row and column [count] of the corners of random windows in images with these sides."""
    top, left = (torch.randint(n - size + 1, (count,), generator=generator) for n in sides)
    return top, left
