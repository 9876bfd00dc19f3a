"""Pairs of views of each image, whose differences a rule should learn to ignore.

    views = Views(train_data, 512, ViewStrengths("mixed", mask=(0.0, 0.7)), learn=["degrees"])
    for x1, x2 in views(generator): ...          # each [512, C, H, W], endless

    geometric   normalize( jitter( warp(image) ) ) - mean + noise
    masks       (normalize(image) - mean + noise) without some pixels

normalize applies the data's own shift and scale. mean is that of each pixel over the normalised
data; it is subtracted if strengths.center is true. A lost pixel takes the mean's value, which is 0
after centring. For each image of each view, the share p of lost pixels is drawn uniformly from
strengths.mask, and each pixel, with all its channels, is lost with probability p.

A learned strength is its initial value times exp(0.3 u) with an nn.Parameter u. Draws do not depend
on u, so views are differentiable in it: rotations through the grid of the interpolation, the others
directly. The share of a mask and the sides of a crop act through comparisons and roundings, whose
derivatives are 0 almost everywhere; they can't be learned.

Random numbers are those of a CPU generator, or are counted from a key on the data's device
(random_numbers="device"), where the pairs of many tasks are then made at once.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_sets.augmentation import draw_numbers, jitter, warp
from data_sets.counted_numbers import drawn_key
from data_sets.counted_views import CountedPairs, PairMaker, thresholds
from data_sets.image_data import (
    ImageData,
    batch_indices,
    check_batch_size,
    pixel_sums,
    working_dtype,
)
from experiment.choices import HOST
from experiment.view_strengths import GEOMETRIC, MIXED, ViewError, ViewStrengths

STRIDE = 0.3  # d log strength / d u, as for initial distributions: one learning rate suits all

Pair = tuple[Tensor, Tensor]


class Views(nn.Module):
    """Endless pairs of batches, drawn with a CPU generator; serves as the `batches` of a Training.

    Raises ViewError for geometric views of features, and for strengths that cannot be learned.

    Attributes:
        data: training images, or features [N, D], for which there are only masks and noise.
        batch_size: images in a batch; a last incomplete batch of an epoch is dropped.
        start: how views are made, with the initial values of learned strengths.
        moved: the nn.Parameters u of the learned strengths, by name, initially 0.
        dtype: the type of the views.
        maker: makes pairs by counted numbers; None: numbers are those of generators.
    """

    def __init__(
        self,
        data: ImageData | Tensor,
        batch_size: int,
        strengths: ViewStrengths = ViewStrengths(),  # noqa: B008, it is frozen
        *,
        learn: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        random_numbers: str = HOST,
    ) -> None:
        super().__init__()
        if isinstance(data, Tensor) and strengths.kind in (GEOMETRIC, MIXED):
            raise ViewError(f"no {strengths.kind} views of features [N, D]: take masks, or noise")
        strengths.check_learnable(tuple(learn))
        self.data, self.batch_size, self.dtype = data, batch_size, dtype
        self.start = strengths
        self.moved = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in learn})
        self.shift, self.lost_value = self._means()
        self.maker = None if random_numbers == HOST else PairMaker(self)

    def _means(self) -> tuple[Tensor | None, Tensor | None]:
        """The mean to subtract and the value of lost pixels, each of an image's shape; None: 0."""
        if not (self.start.center or self.start.masks):
            return None, None
        if isinstance(self.data, Tensor):
            mean = self.data.double().mean(0)
        else:
            mean = pixel_sums(self.data.images)[0].double() / (255 * len(self.data))
            mean = self.data.normalize(mean.float().to(self.data.images.device))
        if not mean.any():
            return None, None
        mean = mean.to(working_dtype(self.dtype))
        return (mean, None) if self.start.center else (None, mean)

    def forward(self, generator: Generator) -> Iterator[Pair]:
        """Endless pairs (x1, x2), each [batch_size, ...]; every epoch has its own order.

        The same state of the generator gives the same pairs on every device, up to rounding; other
        pairs if it draws only the key of counted numbers. Raises DataError if the data are fewer
        than a batch.
        """
        if self.maker is None:
            return PairStream(self, generator)
        check_batch_size(self.data, self.batch_size)
        return CountedPairs(self.maker, drawn_key(generator))

    def pair(self, generators: Sequence[Generator], index: Tensor) -> Pair:
        """A pair of views of the rows `index`, an equal share of which goes with each generator.

        Several generators, those of several tasks, draw what each would draw alone. Mixed views
        take one.
        """
        geometric = self.start.kind == GEOMETRIC
        if self.start.kind == MIXED:
            drawn = torch.rand((), generator=generators[0], device="cpu")
            geometric = bool(drawn < self.start.geometric_share)
        x = self._rows(index)
        if not geometric:
            x = self._normalized(x)
        make = self._geometric if geometric else self._masked
        first, second = (make(x, generators).to(self.dtype) for _ in range(2))
        return first, second

    def _rows(self, index: Tensor) -> Tensor:
        """The images in [0, 1], or the features, of these rows as floats."""
        work = working_dtype(self.dtype)
        if isinstance(self.data, Tensor):
            return self.data.index_select(0, index).to(work)
        return self.data.images.index_select(0, index).to(work).div_(255)

    def _normalized(self, x: Tensor, changed: bool = False) -> Tensor:
        """x normalised and centred; `changed`: x is a copy already and may be modified."""
        if isinstance(self.data, ImageData):
            x = self.data.normalize(x)
        if self.shift is None:
            return x
        # in place if autograd allows it, which saves writing the view twice
        fresh = changed and not x.requires_grad
        return x.sub_(self.shift) if fresh else x - self.shift

    def _geometric(self, x: Tensor, generators: Sequence[Generator]) -> Tensor:
        """A view of images x in [0, 1]."""
        changed = self.start.warps or self.start.jitters
        if changed:
            crops, shifts = self.start.crops, self.start.shift > 0
            count = len(x) // len(generators)
            draws = _of_each(
                generators, lambda g: draw_numbers(count, g, crops=crops, shifts=shifts)
            )
            if torch.is_grad_enabled() and any(name != "noise" for name in self.moved):
                # without it, the graphs of many batches would be kept, each seven times a view
                x = checkpoint(
                    self._warped, x, draws, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._warped(x, draws)
        return self._noisy(self._normalized(x, changed), generators)

    def _warped(self, x: Tensor, draws: Tensor) -> Tensor:
        start = self.start
        if start.warps:
            scale, padding = (start.crop, start.crop_padding) if start.crops else (None, 0)
            x = warp(
                x, draws, degrees=self.strength("degrees"), scale=scale, ratio=start.crop_ratio,
                padding=padding, shift=start.shift,
            )  # fmt: skip
        if start.jitters:
            x = x if start.warps else x.clone()
            x = jitter(x, draws, self.strength("brightness"), self.strength("contrast"))
        return x

    def _masked(self, x: Tensor, generators: Sequence[Generator]) -> Tensor:
        """A view of normalised images or features x."""
        x = self._noisy(x, generators)
        if not self.start.masks:
            return x
        count = len(x) // len(generators)
        shape = (count, 1, *x.shape[2:]) if x.dim() == 4 else (count, *x.shape[1:])
        kept = _of_each(generators, lambda g: kept_pixels(shape, self.start.mask, g)).to(x.device)
        return x * kept if self.lost_value is None else torch.where(kept, x, self.lost_value)

    def _noisy(self, x: Tensor, generators: Sequence[Generator]) -> Tensor:
        if not self.start.noise:
            return x
        shape = (len(x) // len(generators), *x.shape[1:])
        noise = _of_each(generators, lambda g: torch.randn(shape, generator=g, device="cpu")).to(x)
        return x + self.strength("noise") * noise

    # ---- strengths ----

    def strength(self, name: str, device: torch.device | str = "cpu") -> float | Tensor:
        """The current value of a strength; if learned, a float64 scalar on the device of draws."""
        start = getattr(self.start, name)
        if name not in self.moved:
            return start
        return start * (STRIDE * self.moved[name].to(device, torch.float64)).exp()

    @torch.no_grad()
    def set_values(self, strengths: ViewStrengths) -> None:
        """Set the learned strengths to those given; raises ViewError if one of them is 0."""
        for name, u in self.moved.items():
            value = getattr(strengths, name)
            if not value > 0:
                raise ViewError(f"{name} is {value}: to be learned it must be above 0")
            u.fill_(math.log(value / getattr(self.start, name)) / STRIDE)

    def strengths(self) -> ViewStrengths:
        """All strengths with their current values, to be saved."""
        return replace(self.start, **self.effective())

    def effective(self) -> dict[str, float]:
        """The current values of the learned strengths."""
        return {name: self.strength(name).item() for name in self.moved}


class PairStream(Iterator[Pair]):
    """The endless pairs of `Views.forward` by numbers of a generator."""

    def __init__(self, views: Views, generator: Generator) -> None:
        self.views, self.generator = views, generator
        draw_order = partial(batch_indices, views.data, views.batch_size, generator)
        epochs = itertools.chain([draw_order()], (draw_order() for _ in itertools.count()))
        self.order = itertools.chain.from_iterable(epochs)

    def __next__(self) -> Pair:
        return self.views.pair([self.generator], next(self.order))

    @property
    def of_tasks(self) -> Callable[[Sequence["PairStream"]], Iterator[Pair]] | None:
        """The next pairs of several streams of these views, stacked, [tasks, batch, ...] each.

        None for mixed views, of which each task draws its own kind.
        """
        return None if self.views.start.kind == MIXED else self._of_tasks

    def _of_tasks(self, streams: Sequence["PairStream"]) -> Iterator[Pair]:
        generators = [stream.generator for stream in streams]
        while True:
            index = torch.cat([next(stream.order) for stream in streams])
            first, second = self.views.pair(generators, index)
            tasks = len(streams), -1
            yield first.unflatten(0, tasks), second.unflatten(0, tasks)


def _of_each(generators: Sequence[Generator], draw: Callable[[Generator], Tensor]) -> Tensor:
    """What is drawn with each generator, one after the other."""
    drawn = [draw(generator) for generator in generators]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def kept_pixels(shape: Sequence[int], share: tuple[float, float], generator: Generator) -> Tensor:
    """A mask that is False for lost pixels, bool of `shape` [B, ...], on the CPU.

    For each image the share p of lost pixels is uniform in `share` = [low, high]. One random byte
    is drawn for each pixel, which is lost if the byte is below 256 p. This threshold is rounded up
    or down at random, so that the mean share is exactly p, but at most 255 / 256.
    """
    draws = torch.rand(2, shape[0], generator=generator, dtype=torch.float64, device="cpu")
    threshold = thresholds(*draws, share)
    words = torch.empty(-(-torch.Size(shape).numel() // 8), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=generator)
    pixels = words.view(torch.uint8)[: torch.Size(shape).numel()].view(*shape)
    return pixels >= threshold.view(-1, *[1] * (len(shape) - 1))
