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

from data_sets.augmentation import count_columns, jitter, warp
from data_sets.counted_numbers import drawn_key, fold_in
from data_sets.counted_orders import CountedOrder, next_batches
from data_sets.image_data import (
    ImageData,
    batch_indices,
    check_batch_size,
    device_of,
    pixel_sums,
    working_dtype,
)
from data_sets.number_sources import CountedNumbers, HostNumbers, Numbers
from experiment.choices import HOST
from experiment.view_strengths import GEOMETRIC, MIXED, ViewError, ViewStrengths

STRIDE = 0.3  # d log strength / d u, as for initial distributions: one learning rate suits all

Pair = tuple[Tensor, Tensor]
KIND = 2  # after a batch's keys 0 and 1 of its two views, that of mixed views' kind


class Views(nn.Module):
    """Endless pairs of batches, drawn with a CPU generator; serves as the `batches` of a Training.

    Raises ViewError for geometric views of features, and for strengths that cannot be learned.

    Attributes:
        data: training images, or features [N, D], for which there are only masks and noise.
        batch_size: images in a batch; a last incomplete batch of an epoch is dropped.
        start: how views are made, with the initial values of learned strengths.
        moved: the nn.Parameters u of the learned strengths, by name, initially 0.
        dtype: the type of the views.
        random_numbers: host or device.
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
        self.start, self.random_numbers = strengths, random_numbers
        self.moved = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in learn})
        self.shift, self.lost_value = self._means()

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
        if self.random_numbers == HOST:
            return PairStream(self, generator)
        return CountedPairs(self, generator)

    def pair(self, generators: Sequence[Generator], index: Tensor) -> Pair:
        """A pair of views of the rows `index`, an equal share of which goes with each generator.

        Several generators, those of several tasks, draw what each would draw alone. Mixed views
        take one.
        """
        geometric = self.start.kind == GEOMETRIC
        if self.start.kind == MIXED:
            drawn = torch.rand((), generator=generators[0], device="cpu")
            geometric = bool(drawn < self.start.geometric_share)
        x, numbers = self._rows(index), HostNumbers(generators)
        if not geometric:
            x = self._normalized(x)
        make = self._geometric if geometric else self._masked
        first, second = (make(x, numbers).to(self.dtype) for _ in range(2))
        return first, second

    def counted_pair(self, parts: tuple[Tensor, Tensor]) -> Pair:
        """A pair of views of some rows, [tasks, batch, ...] each, by numbers of the tasks' keys.

        It is made on the data's device, without waiting for the host, and can be recorded as a CUDA
        graph. Of mixed views both kinds are made, and each task takes one.

        parts: rows, int64 [tasks, batch], and keys, int64 [tasks], as from `next_batches`.
        """
        rows, keys = parts
        views = torch.arange(2, device=keys.device).unsqueeze(1)
        numbers = CountedNumbers(fold_in(keys, views).flatten())
        x, kind = self._stored(rows.expand(2, *rows.shape).flatten()), self.start.kind
        makers = [self._counted_geometric] if kind in (GEOMETRIC, MIXED) else []
        makers += [self._counted_masked] if kind != GEOMETRIC else []
        made = [make(x, numbers).unflatten(0, (2, *rows.shape)) for make in makers]
        if kind == MIXED:
            drawn = CountedNumbers(fold_in(keys, KIND)).uniforms(*[1] * x.dim())
            made = [torch.where(drawn < self.start.geometric_share, *made)]
        first, second = made[0].to(self.dtype)
        return first, second

    def _counted_geometric(self, stored: Tensor, numbers: Numbers) -> Tensor:
        """A view of images as bytes, normalised in one pass."""
        work = working_dtype(self.dtype)
        x = self._changed(stored / stored.new_full((), 255, dtype=work), numbers)
        return self._noisy(self.data.rescaled(x, work, minus=self.shift), numbers)

    def _counted_masked(self, stored: Tensor, numbers: Numbers) -> Tensor:
        """A view of images as bytes, or of features, normalised in one pass."""
        work = working_dtype(self.dtype)
        if isinstance(self.data, ImageData):
            x = self.data.rescaled(stored, work, 255.0, minus=self.shift)
        else:
            x = stored.to(work) if self.shift is None else stored - self.shift
        return self._masked(x, numbers)

    def _stored(self, index: Tensor) -> Tensor:
        """These rows, as bytes if they are images."""
        data = self.data if isinstance(self.data, Tensor) else self.data.images
        return data.index_select(0, index)

    def _rows(self, index: Tensor) -> Tensor:
        """The images in [0, 1], or the features, of these rows as floats."""
        x = self._stored(index).to(working_dtype(self.dtype))
        return x if isinstance(self.data, Tensor) else x.div_(255)

    def _normalized(self, x: Tensor, changed: bool = False) -> Tensor:
        """x normalised and centred; `changed`: x is a copy already and may be modified."""
        if isinstance(self.data, ImageData):
            x = self.data.normalize(x)
        if self.shift is None:
            return x
        # in place if autograd allows it, which saves writing the view twice
        fresh = changed and not x.requires_grad
        return x.sub_(self.shift) if fresh else x - self.shift

    def _geometric(self, x: Tensor, numbers: Numbers) -> Tensor:
        """A view of images x in [0, 1]."""
        changed = self.start.warps or self.start.jitters
        return self._noisy(self._normalized(self._changed(x, numbers), changed), numbers)

    def _changed(self, x: Tensor, numbers: Numbers) -> Tensor:
        """Images x in [0, 1], warped, brightness and contrast changed."""
        if not (self.start.warps or self.start.jitters):
            return x
        columns = count_columns(crops=self.start.crops, shifts=self.start.shift > 0)
        draws = numbers.uniforms(len(x) // numbers.tasks, columns).flatten(0, 1)
        if torch.is_grad_enabled() and any(name != "noise" for name in self.moved):
            # without it, the graphs of many batches would be kept, each seven times a view
            return checkpoint(self._warped, x, draws, use_reentrant=False, preserve_rng_state=False)
        return self._warped(x, draws)

    def _warped(self, x: Tensor, draws: Tensor) -> Tensor:
        start, strength = self.start, partial(self.strength, device=draws.device)
        if start.warps:
            scale, padding = (start.crop, start.crop_padding) if start.crops else (None, 0)
            x = warp(
                x, draws, degrees=strength("degrees"), scale=scale, ratio=start.crop_ratio,
                padding=padding, shift=start.shift,
            )  # fmt: skip
        if start.jitters:
            x = x if start.warps else x.clone()
            x = jitter(x, draws, strength("brightness"), strength("contrast"))
        return x

    def _masked(self, x: Tensor, numbers: Numbers) -> Tensor:
        """A view of normalised images or features x."""
        x = self._noisy(x, numbers)
        if not self.start.masks:
            return x
        count = len(x) // numbers.tasks
        shape = (count, 1, *x.shape[2:]) if x.dim() == 4 else (count, *x.shape[1:])
        kept = kept_pixels(shape, self.start.mask, numbers).flatten(0, 1).to(x.device)
        return x * kept if self.lost_value is None else torch.where(kept, x, self.lost_value)

    def _noisy(self, x: Tensor, numbers: Numbers) -> Tensor:
        if not self.start.noise:
            return x
        noise = numbers.normals(len(x) // numbers.tasks, *x.shape[1:], dtype=x.dtype)
        noise = noise.flatten(0, 1)
        return x + self.strength("noise", noise.device) * noise.to(x)

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
    """The endless pairs of `Views.forward`."""

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


class CountedPairs(Iterator[Pair]):
    """The same by counted numbers, whose key the generator draws."""

    def __init__(self, views: Views, generator: Generator) -> None:
        check_batch_size(views.data, views.batch_size)
        size, device = len(views.data), device_of(views.data)
        self.views = views
        self.order = CountedOrder(drawn_key(generator), size, views.batch_size, device)
        self._alone = self.parts_of_tasks([self])

    def __next__(self) -> Pair:
        first, second = self.make(next(self._alone))
        return first.squeeze(0), second.squeeze(0)

    def of_tasks(self, streams: Sequence["CountedPairs"]) -> Iterator[Pair]:
        """The next pairs of several streams of these views, stacked, [tasks, batch, ...] each."""
        return map(self.make, self.parts_of_tasks(streams))

    def parts_of_tasks(self, streams: Sequence["CountedPairs"]) -> Iterator[tuple[Tensor, Tensor]]:
        """The few numbers that `make` makes the next pairs of several streams from."""
        return next_batches([stream.order for stream in streams])

    @property
    def make(self) -> Callable[[tuple[Tensor, Tensor]], Pair]:
        """A function of tensors alone, unless strengths are learned."""
        return self.views.counted_pair


def kept_pixels(shape: Sequence[int], share: tuple[float, float], numbers: Numbers) -> Tensor:
    """Masks that are False for lost pixels, bool [tasks, *shape] with `shape` [B, ...].

    For each image the share p of lost pixels is uniform in `share` = [low, high]. One random byte
    is drawn for each pixel, which is lost if the byte is below 256 p. This threshold is rounded up
    or down at random, so that the mean share is exactly p, but at most 255 / 256.
    """
    low, high = share
    draws = numbers.uniforms(2, shape[0])
    threshold = (256 * (low + (high - low) * draws[:, 0]) + draws[:, 1]).floor().clamp(max=255)
    return numbers.bytes(*shape) >= threshold.byte().unflatten(1, (-1, *[1] * (len(shape) - 1)))
