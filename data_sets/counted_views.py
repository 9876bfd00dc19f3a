"""Pairs of views by counted numbers, those of many tasks and updates in few operations.

    maker.parts(keys)      # a few numbers for each view of many batches: maps, factors, thresholds
    maker.make(parts)      # the pair of one batch, a function of tensors that can be recorded

A GPU makes views faster than the host can ask for operations one by one, so what is small is
computed for many batches at once, and a pair costs some fifteen operations on all its pixels. They
are the views of data_sets/views.py, normalised in one pass, up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.utils.checkpoint import checkpoint

from data_sets.augmentation import (
    affine_matrices,
    count_columns,
    grey_mean,
    jitter_factors,
    pixel_centres,
)
from data_sets.counted_numbers import counted, fold_in, normals, starts, uniforms, words
from data_sets.counted_orders import CountedOrder, next_batches
from data_sets.image_data import ImageData, device_of, working_dtype
from experiment.view_strengths import GEOMETRIC, MIXED, ViewStrengths

Parts = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
KIND = 2  # after a batch's keys 0 and 1 of its two views, that of mixed views' kind
MASK, NOISE, SHARE = range(3)  # purposes of a view's key, beside its geometry
VIEWS_AT_ONCE, BATCHES_AT_ONCE = 1 << 20, 16  # whose parts are computed together


class ViewsOfData(Protocol):
    """What a maker needs to know of Views."""

    data: ImageData | Tensor
    batch_size: int
    start: ViewStrengths
    shift: Tensor | None
    lost_value: Tensor | None
    dtype: torch.dtype
    moved: dict

    def strength(self, name: str, device: torch.device) -> float | Tensor:
        """The current value of a strength."""


class PairMaker:
    """Makes the pairs of `views`, on the device of its data, without waiting for the host."""

    def __init__(self, views: ViewsOfData) -> None:
        self.views, self.data, self.dtype = views, views.data, working_dtype(views.dtype)
        self.geometric = views.start.kind in (GEOMETRIC, MIXED)
        self.masked = views.start.kind != GEOMETRIC
        if isinstance(self.data, ImageData):
            jitters = self.geometric and views.start.jitters  # whose factors are for bytes
            self.affine = {
                unit: self.data.affine(self.dtype, unit, views.shift) for unit in (1.0, 255.0)
            }
            self.geometric_unit = 1.0 if jitters else 255.0
            like = self.affine[1.0][0]
            self.across, self.down = (pixel_centres(n, like) for n in self.data.shape[:0:-1])

    # ---- what is small ----

    def parts(self, keys: Tensor) -> Parts:
        """The numbers of batches with these keys, int64 [batches, tasks].

        Of views they are [batches, 2, tasks, ...], so that each view of a batch is contiguous; of
        tasks [batches, tasks].
        """
        start, size = self.views.start, self.views.batch_size
        of_views = fold_in(keys.unsqueeze(1), torch.arange(2, device=keys.device).unsqueeze(1))
        parts = {}
        if self.geometric and (start.warps or start.jitters):
            columns = count_columns(crops=start.crops, shifts=start.shift > 0)
            drawn = uniforms(words(of_views, size * columns))
            parts |= self._geometry(drawn.view(-1, columns), (*of_views.shape, size))
        if self.masked and start.masks:
            drawn = uniforms(words(fold_in(of_views, SHARE), 2 * size)).unflatten(-1, (2, size))
            parts["thresholds"] = thresholds(*drawn.unbind(-2), start.mask)
            parts["mask"] = starts(fold_in(of_views, MASK)).movedim(0, -1)
        if start.noise:
            parts["noise"] = starts(fold_in(of_views, NOISE)).movedim(0, -1)
        if start.kind == MIXED:
            drawn = uniforms(words(fold_in(keys, KIND), 1)).squeeze(-1)
            parts["geometric"] = drawn < start.geometric_share
        return parts

    def _geometry(self, draws: Tensor, shape: Sequence[int]) -> Parts:
        """Affine maps, and the factors of brightness and contrast, of each view of each image."""
        start, parts = self.views.start, {}
        degrees, brightness, contrast = (
            self.views.strength(name, draws.device)
            for name in ("degrees", "brightness", "contrast")
        )
        if start.warps:
            scale, padding = (start.crop, start.crop_padding) if start.crops else (None, 0)
            matrices = affine_matrices(
                draws, self.data.shape[1:], degrees=degrees, scale=scale, ratio=start.crop_ratio,
                padding=padding, shift=start.shift,
            )  # fmt: skip
            parts["maps"] = matrices.to(self.dtype).unflatten(0, shape)
        if start.jitters:
            b, c, first = jitter_factors(draws, brightness, contrast)
            factors = [
                term / unit
                for now, unit in ((first, 255.0), (1 - first, 1.0))
                for term in (torch.lerp(c, b, now), (1 - now) * (1 - c))
            ]
            parts["factors"] = torch.stack(factors, 1).to(self.dtype).unflatten(0, shape)
        return parts

    # ---- what has as many numbers as there are pixels ----

    def make(self, parts: Parts) -> Pair:
        """A pair of views [tasks, batch, ...] each; of mixed views, each task takes one kind.

        parts: the numbers of one batch, and its "rows", int64 [tasks, batch].
        """
        rows = parts["rows"].expand(2, *parts["rows"].shape)
        data = self.data if isinstance(self.data, Tensor) else self.data.images
        stored = data.index_select(0, rows.flatten())
        made = [self._geometric(stored, parts)] if self.geometric else []
        made += [self._masked(stored, parts)] if self.masked else []
        if len(made) == 2:
            chosen = parts["geometric"].view(-1, *[1] * stored.dim())
            made = [torch.where(chosen, *(x.unflatten(0, rows.shape) for x in made)).flatten(0, 2)]
        first, second = made[0].to(self.views.dtype).unflatten(0, rows.shape)
        return first, second

    def _geometric(self, stored: Tensor, parts: Parts) -> Tensor:
        """A view of images as bytes."""
        learned = any(name != "noise" for name in self.views.moved)
        if learned and torch.is_grad_enabled():  # else the graphs of many batches would be kept
            x = checkpoint(
                self._changed, stored, parts, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x = self._changed(stored, parts)
        offset, factor = self.affine[self.geometric_unit]
        return self._noisy(torch.addcmul(offset, x, factor), parts)

    def _changed(self, stored: Tensor, parts: Parts) -> Tensor:
        """Bytes as floats, warped; in [0, 1] if brightness and contrast are changed."""
        x = stored.to(self.dtype)
        if "maps" in parts:
            a, b, c = parts["maps"].view(-1, 2, 3).unsqueeze(2).unbind(-1)  # each [N, 2, 1]
            row = torch.addcmul(c, a, self.across).unsqueeze(2)
            grid = torch.addcmul(row, b.unsqueeze(3), self.down.view(-1, 1))  # [N, 2, H, W]
            x = grid_sample(x, grid.permute(0, 2, 3, 1), align_corners=False)
        if "factors" in parts:
            factors = parts["factors"].view(-1, 4, 1, 1, 1).unbind(1)
            for factor, towards in (factors[:2], factors[2:]):
                x = torch.addcmul(towards * grey_mean(x), x, factor).clamp_(0, 1)
        return x

    def _masked(self, stored: Tensor, parts: Parts) -> Tensor:
        """A view of images as bytes, or of features."""
        views = self.views
        if isinstance(self.data, ImageData):
            offset, factor = self.affine[255.0]
            x = torch.addcmul(offset, stored, factor)
        else:
            x = stored.to(self.dtype) if views.shift is None else stored - views.shift
        x = self._noisy(x, parts)
        if "mask" not in parts:
            return x
        lost = parts["thresholds"].flatten().view(-1, *[1] * (x.dim() - 1))
        shape = (len(x), 1, *x.shape[2:]) if x.dim() == 4 else x.shape
        drawn = _words_of_views(parts["mask"], torch.Size(shape), of_word=8)
        kept = _fitted(drawn.view(torch.uint8), shape) >= lost
        return x * kept if views.lost_value is None else torch.where(kept, x, views.lost_value)

    def _noisy(self, x: Tensor, parts: Parts) -> Tensor:
        if "noise" not in parts:
            return x
        drawn = _words_of_views(parts["noise"], x.shape, of_word=2)
        noise = _fitted(normals(drawn, self.dtype), x.shape)
        return x + self.views.strength("noise", x.device) * noise


class CountedPairs(Iterator[Pair]):
    """Endless pairs of a maker by numbers counted from a key."""

    def __init__(self, maker: PairMaker, key: int) -> None:
        data, size = maker.data, maker.views.batch_size
        self.maker, self.order = maker, CountedOrder(key, len(data), size, device_of(data))
        self._alone = self.parts_of_tasks([self])

    def __next__(self) -> Pair:
        first, second = self.make(next(self._alone))
        return first.squeeze(0), second.squeeze(0)

    def of_tasks(self, streams: Sequence["CountedPairs"]) -> Iterator[Pair]:
        """The next pairs of several streams of this maker, stacked, [tasks, batch, ...] each."""
        return map(self.make, self.parts_of_tasks(streams))

    def parts_of_tasks(self, streams: Sequence["CountedPairs"]) -> Iterator[Parts]:
        """The numbers that `make` makes the next pairs of several streams from."""
        most = VIEWS_AT_ONCE // (2 * len(streams) * self.order.batch_size)
        # learned strengths may change, and gradients be wanted, from batch to batch
        at_once = 1 if self.maker.views.moved else max(1, min(most, BATCHES_AT_ONCE))
        return next_batches([stream.order for stream in streams], self.maker.parts, at_once)

    @property
    def make(self) -> Callable[[Parts], Pair]:
        """The maker's function, the same for all its streams."""
        return self.maker.make


def thresholds(low_to_high: Tensor, rounding: Tensor, share: tuple[float, float]) -> Tensor:
    """Bytes below which a random byte loses its pixel, uint8, from uniform numbers.

    A byte is 256 times a share of lost pixels uniform in `share`, rounded up or down at random, so
    that the mean share is exactly that, but at most 255 / 256.
    """
    low, high = share
    return (256 * (low + (high - low) * low_to_high) + rounding).floor().clamp(max=255).byte()


def _words_of_views(begun: Tensor, shape: torch.Size, of_word: int) -> Tensor:
    """Words [views, words] for the numbers of all views together, of which a word has so many.

    begun: states and gammas, int64 [2, tasks, 2].
    """
    of_views = begun.flatten(0, 1)
    return counted(of_views.T, -(-shape.numel() // len(of_views) // of_word))


def _fitted(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """The first numbers of each view, as many as there are in this shape of all views."""
    return numbers[:, : torch.Size(shape).numel() // len(numbers)].reshape(shape)
