"""Labelled images, stored as one uint8 tensor and turned into floats batch by batch."""

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from experiment.errors import WrongInputError


class DataError(WrongInputError):
    """Data that cannot be used; the message is one line."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images, kept as bytes and turned into floats batch by batch.

    Raises DataError for tensors of another type or shape.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        source: where the images come from and how many there are, for logs and results.
        shift: float [C, H, W], subtracted from images / 255; None: 0.
        scale: float [C, H, W], the divisor of the result; None: 1.
    """

    images: Tensor
    labels: Tensor
    source: str
    shift: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise DataError(
                "images must be uint8 [N, C, H, W], "
                f"not {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 [{len(self.images)}], one for each image, "
                f"not {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return tuple(self.images.shape[1:])

    @property
    def classes(self) -> int:
        """The number of classes: the largest label plus one, or 0 without images."""
        return int(self.labels.max()) + 1 if len(self) else 0

    def fingerprint(self) -> str:
        """The number of images and a digest of their pixels, as a text."""
        pixels = self.images.contiguous().numpy(force=True)
        return f"{len(self)}, sha256 {hashlib.sha256(pixels).hexdigest()[:16]}"

    def subset(self, rows: slice | Tensor) -> "ImageData":
        """The images and labels of these rows; as in lists, a slice may extend beyond the end."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def floats(
        self, index: slice | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The normalised images of `index`, by default all, as floats [n, C, H, W].

        Without shift and scale the values are in [0, 1]. For types of fewer than 32 bits the
        arithmetic is done in float32 and rounded once.
        """
        images = self.images
        if isinstance(index, Tensor):
            images = images.index_select(0, index.to(images.device))
        elif index is not None:
            images = images[index]
        x = images.to(working_dtype(dtype)).div_(255)
        if self.shift is not None:
            x.sub_(self.shift.to(x.dtype))
        if self.scale is not None:
            x.div_(self.scale.to(x.dtype))
        return x.to(dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """(x - shift) / scale for x in [0, 1], float [..., C, H, W]."""
        if self.shift is not None:
            x = x - self.shift.to(x.dtype)
        if self.scale is not None:
            x = x / self.scale.to(x.dtype)
        return x

    def affine(
        self, dtype: torch.dtype, unit: float, minus: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """offset and factor, so that offset + factor x = (x / unit - shift) / scale - minus.

        dtype: their type and that of `minus`.
        """
        one = self.images.new_ones((), dtype=dtype)
        scale = one if self.scale is None else self.scale.to(dtype)
        offset = torch.zeros_like(one) if self.shift is None else -self.shift.to(dtype) / scale
        return offset if minus is None else offset - minus, 1 / (unit * scale)

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data with all tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            shift=None if self.shift is None else self.shift.to(device),
            scale=None if self.scale is None else self.scale.to(device),
        )


@dataclass(frozen=True)
class ImagesOfRows:
    """Makes the images of rows, a function of tensors that does not wait for a GPU."""

    data: ImageData
    dtype: torch.dtype
    affine: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "affine", self.data.affine(working_dtype(self.dtype), 255.0))

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalised images of rows [...], as floats [..., C, H, W]; up to rounding as `floats`."""
        images = self.data.images.index_select(0, rows.flatten())
        offset, factor = self.affine
        return torch.addcmul(offset, images, factor).to(self.dtype).unflatten(0, rows.shape)


def pixel_sums(images: Tensor) -> tuple[Tensor, Tensor]:
    """The exact sums of each pixel and its square over uint8 images, int64 [C, H, W] on the CPU."""
    total = torch.zeros(images.shape[1:], dtype=torch.int64, device=images.device)
    total_of_squares = total.clone()
    for chunk in images.split(2048):
        x = chunk.to(torch.int32)
        total += x.sum(0)
        total_of_squares += x.square_().sum(0)
    return total.cpu(), total_of_squares.cpu()


def batch_indices(
    data: ImageData | Tensor, batch_size: int, generator: torch.Generator
) -> list[Tensor]:
    """The rows of each batch of one epoch, [batch_size] on the data's device, in random order.

    A last incomplete batch is dropped. Raises DataError if there isn't one whole batch.

    generator: a generator on the CPU.
    """
    check_batch_size(data, batch_size)
    order = torch.randperm(len(data), generator=generator, device="cpu").to(device_of(data))
    return [index for index in order.split(batch_size) if len(index) == batch_size]


def check_batch_size(data: ImageData | Tensor, batch_size: int) -> None:
    """Raise DataError if there isn't one whole batch."""
    if not 1 <= batch_size <= len(data):
        raise DataError(
            f"batch size {batch_size} must be from 1 to {len(data)}, the number of images"
        )


def device_of(data: ImageData | Tensor) -> torch.device:
    """The device that the images, or features, are on."""
    return data.device if isinstance(data, Tensor) else data.images.device


@dataclass(frozen=True)
class ImageSets:
    """The data sets of a run that has several."""

    sets: tuple[ImageData, ...]

    def fingerprint(self) -> str:
        """The fingerprints of all sets, as one text."""
        return "; ".join(data.fingerprint() for data in self.sets)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: at least float32, as with less a pixel would lose some of its 8 bits.

    Raises DataError if `dtype` is not a floating-point type.
    """
    if not dtype.is_floating_point:
        raise DataError(f"dtype {dtype} is not a floating point type; use torch.float32")
    return torch.promote_types(dtype, torch.float32)
