"""Other images of a data set: some classes of it, in grey, of another size; again as bytes."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from data_sets.image_data import DataError, ImageData

AT_ONCE = 1024  # images


def of_classes(data: ImageData, classes: Sequence[int]) -> ImageData:
    """The images of these classes, with the labels that they have; DataError where one is none."""
    wanted = torch.tensor(sorted({*classes}))
    present = data.labels.unique().cpu()
    if missing := [c for c in wanted.tolist() if c not in present]:
        raise DataError(f"there is no class {missing[0]}: they are from 0 to {data.classes - 1}")
    chosen = torch.isin(data.labels, wanted.to(data.labels.device)).nonzero()[:, 0]
    kept = f"{len(chosen):,} of classes {', '.join(map(str, wanted.tolist()))}"
    return replace(data.subset(chosen), source=f"{data.source}; {kept}")


def grey(data: ImageData) -> ImageData:
    """The mean of the channels of each image, [N, 1, H, W], rounded to bytes."""
    parts = [part.float().mean(1, keepdim=True) for part in data.images.split(AT_ONCE)]
    return replace(data, images=_bytes(parts), source=f"{data.source}; grey")


def resized(data: ImageData, size: int) -> ImageData:
    """Squares of so many pixels, bilinear, smoothed where they get smaller, rounded to bytes."""
    shape = {"size": (size, size), "mode": "bilinear", "antialias": True}
    parts = [functional.interpolate(p.float(), **shape) for p in data.images.split(AT_ONCE)]
    return replace(data, images=_bytes(parts), source=f"{data.source}; {size} x {size} pixels")


def _bytes(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
