"""Random views of images: rotated, cropped and stretched, brightness and contrast changed.

    x = augment(images, generator)               # uint8 [B, C, H, W] -> float [B, C, H, W]

    draws = draw_numbers(len(x), generator)      # the same step by step, with separate strengths
    x = warp(x, draws, degrees=25.0, scale=(0.7, 1.0), ratio=(0.75, 1.3333), padding=2)
    x = jitter(x, draws, brightness=0.5, contrast=0.5)

The geometric steps are combined in one affine warp. Degrees, brightness and contrast may be
tensors; with the draws fixed, views are differentiable in them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from data_sets.image_data import DataError, working_dtype

# Columns of the draws: those that every view needs, then those of crops (ten attempts), then those
# of shifts
ANGLE, POSITION, BRIGHTNESS, CONTRAST, ORDER = 0, slice(1, 3), 3, 4, 5
AREAS, RATIOS, SHIFT = slice(6, 16), slice(16, 26), slice(-2, None)


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    padding: int = 2,
    degrees: float = 25.0,
    scale: tuple[float, float] = (0.7, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333),
    brightness: float = 0.5,
    contrast: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random views: uint8 [B, C, H, W] -> float [B, C, H, W] in [0, 1], on the images' device.

    Each image is zero-padded, rotated by up to +-`degrees`, and cropped to a random part (share of
    the area in `scale`, width / height in `ratio`) that is stretched to the original size. Then
    brightness and contrast are multiplied by factors in [1 - strength, 1 + strength], in random
    order. The distributions are those of torchvision's Pad, RandomRotation, RandomResizedCrop (with
    its ten attempts) and ColorJitter, but there is only one bilinear interpolation, and nothing is
    rounded to bytes between the steps. `generator` is on the CPU and gives B rows of 26 numbers.

    Raises DataError for images of another type or shape.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise DataError(
            f"images must be uint8 [B, C, H, W], not {images.dtype} {list(images.shape)}"
        )
    draws = draw_numbers(len(images), generator)
    x = images.to(working_dtype(dtype)).div_(255)
    x = warp(x, draws, degrees=degrees, scale=scale, ratio=ratio, padding=padding)
    return jitter(x, draws, brightness, contrast).to(dtype)


def draw_numbers(
    count: int, generator: torch.Generator, *, crops: bool = True, shifts: bool = False
) -> Tensor:
    """The random numbers of views: float64 [count, columns], uniform in [0, 1), on the CPU."""
    columns = count_columns(crops=crops, shifts=shifts)
    return torch.rand(count, columns, generator=generator, dtype=torch.float64, device="cpu")


def count_columns(*, crops: bool, shifts: bool) -> int:
    """The random numbers that the view of an image takes."""
    return 6 + 20 * crops + 2 * shifts


def warp(
    x: Tensor,
    draws: Tensor,
    *,
    degrees: float | Tensor,
    scale: tuple[float, float] | None,
    ratio: tuple[float, float] = (1.0, 1.0),
    padding: int = 0,
    shift: float = 0.0,
) -> Tensor:
    """Rotate, crop and shift each image of x [B, C, H, W] by one bilinear interpolation.

    Pixels from outside the image are 0.

    draws: as from `draw_numbers`, with columns for crops and shifts if they are used; on the CPU or
        on the device of x.
    degrees: the largest angle, in either direction.
    scale: the range of the crop's share of the padded image's area; None: no crops.
    ratio: the range of the crop's width / height.
    padding: pixels on each side.
    shift: the largest shift in pixels of the view, in both dimensions and directions.
    """
    if _in_loops(x, degrees):
        return _warp_in_loops(x, draws, float(degrees), scale, ratio, padding, shift)
    matrix = affine_matrices(
        draws, x.shape[2:], degrees=degrees, scale=scale, ratio=ratio, padding=padding, shift=shift
    )
    return grid_sample(x, _grid(matrix.to(x.device, x.dtype), *x.shape[2:]), align_corners=False)


def affine_matrices(
    draws: Tensor,
    size: Sequence[int],
    *,
    degrees: float | Tensor,
    scale: tuple[float, float] | None,
    ratio: tuple[float, float],
    padding: int,
    shift: float,
) -> Tensor:
    """From positions in a view to those in its image, both in [-1, 1]^2: float64 [B, 2, 3].

    size: height and width of the images. The other arguments are those of `warp`.
    """
    height, width = size
    if scale is None:
        box = _rows_of(draws, len(draws), (0.0, 0.0, height, width))
    else:
        box = _random_boxes(
            draws[:, AREAS], draws[:, RATIOS], draws[:, POSITION],
            height, width, padding, scale, ratio,
        )  # fmt: skip
    if shift:
        sides = box[:, 2:] / _rows_of(box, 1, (height, width))  # the sides of a pixel of the view
        moved = (2 * draws[:, SHIFT] - 1) * shift * sides
        box = torch.cat([box[:, :2] + moved, box[:, 2:]], 1)
    angle = (2 * draws[:, ANGLE] - 1) * (degrees * (math.pi / 180))
    return _crop_matrices(box, angle, height, width, padding)


def jitter(
    x: Tensor, draws: Tensor, brightness: float | Tensor, contrast: float | Tensor
) -> Tensor:
    """Multiply brightness and contrast of each image by random factors, in random order.

    x: [B, C, H, W], changed in place.
    draws: as for `warp`.
    brightness, contrast: factors are uniform in [1 - strength, 1 + strength], and at least 0.
    """
    if _in_loops(x, brightness, contrast) and x.is_contiguous():
        return _jitter_in_loops(x, draws, float(brightness), float(contrast))
    factors = jitter_factors(draws, brightness, contrast).to(x)
    return _jitter(x, *factors.view(3, -1, 1, 1, 1))


def jitter_factors(draws: Tensor, brightness: float | Tensor, contrast: float | Tensor) -> Tensor:
    """Factors of brightness and contrast, and 1 where brightness is first, else 0: [3, B]."""
    b, c = (
        _between(draws[:, column], _at_least_0(1 - strength), 1 + strength)
        for column, strength in ((BRIGHTNESS, brightness), (CONTRAST, contrast))
    )
    return torch.stack([b, c, (draws[:, ORDER] < 0.5).double()])


def _random_boxes(
    area_draws: Tensor,
    ratio_draws: Tensor,
    position_draws: Tensor,
    height: int,
    width: int,
    padding: int,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> Tensor:
    """Crops (top, left, height, width) [B, 4] of the padded image, drawn as by RandomResizedCrop.

    The first attempt that fits is taken or, if none does, the largest centred crop whose ratio is
    allowed.

    area_draws, ratio_draws: [B, attempts], uniform in [0, 1).
    position_draws: [B, 2], likewise.
    """
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    area = padded_height * padded_width * _between(area_draws, *scale)
    aspect = _between(ratio_draws, math.log(ratio[0]), math.log(ratio[1])).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= padded_width) & (h > 0) & (h <= padded_height)

    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    w, h = w.gather(1, first).squeeze(1), h.gather(1, first).squeeze(1)
    top = (position_draws[:, 0] * (padded_height - h + 1)).floor()
    left = (position_draws[:, 1] * (padded_width - w + 1)).floor()
    fallback = _rows_of(area, 1, _fallback(padded_height, padded_width, ratio))
    return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, h, w], 1), fallback)


def _fallback(
    padded_height: int, padded_width: int, ratio: Sequence[float]
) -> tuple[float, float, float, float]:
    """The largest centred crop whose ratio is allowed: top, left, height, width."""
    whole = padded_width / padded_height
    w = round(padded_height * ratio[1]) if whole > ratio[1] else padded_width
    h = round(padded_width / ratio[0]) if whole < ratio[0] else padded_height
    box = (padded_height - h) // 2, (padded_width - w) // 2, h, w
    return tuple(float(number) for number in box)


def _crop_matrices(box: Tensor, angle: Tensor, height: int, width: int, padding: int) -> Tensor:
    """The affine maps of `affine_matrices` for boxes [B, 4] and angles [B].

    For the position u in [-1, 1]^2 in the crop, p = centre of the box + u * half its sides is the
    position in the rotated image, relative to its centre, and R(angle)^-1 p the position in the
    original image. R turns counter-clockwise on the screen (rows count downwards). Padding only
    enlarges the range of boxes, because everything outside the image is zero anyway.
    """
    top, left, h, w = box.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    x, y = left + w / 2 - (width / 2 + padding), top + h / 2 - (height / 2 + padding)
    half = _rows_of(angle, 1, (2 / width, 2 / height))  # from pixels to grid_sample's [-1, 1]
    return torch.stack(
        [cos * w / 2, -sin * h / 2, cos * x - sin * y, sin * w / 2, cos * h / 2, sin * x + cos * y],
        1,
    ).view(-1, 2, 3) * half.view(1, 2, 1)


def _grid(matrix: Tensor, height: int, width: int) -> Tensor:
    """The position in the original image of each pixel of a view, for grid_sample: [B, H, W, 2].

    The map is affine, so the grid is the sum of a column and a row; F.affine_grid gives the same
    but takes several times as long as the interpolation itself.
    """
    a, b, c = matrix.unsqueeze(-2).unbind(-1)  # each [B, 2, 1]
    across, down = (pixel_centres(size, matrix) for size in (width, height))
    grid = (a * across + c).unsqueeze(2) + (b * down).unsqueeze(3)  # [B, 2, H, W]
    return grid.permute(0, 2, 3, 1)


def pixel_centres(size: int, like: Tensor) -> Tensor:
    """The positions of `size` pixels in [-1, 1], of the type and device of `like`."""
    return (torch.arange(size, device=like.device, dtype=like.dtype) * 2 + 1) / size - 1


def _jitter(x: Tensor, b: Tensor, c: Tensor, brightness_first: Tensor) -> Tensor:
    """Brightness x -> b x and contrast x -> c x + (1 - c) grey mean, clamped to [0, 1] after each.

    Since brightness is a contrast towards black, both steps have the same form, and each image can
    have its own order.

    x: float [B, C, H, W], changed in place.
    b, c, brightness_first (0 or 1): [B, 1, 1, 1].
    """
    for now_brightness in (brightness_first, 1 - brightness_first):
        factor = torch.lerp(c, b, now_brightness)
        towards = (1 - now_brightness) * (1 - c) * grey_mean(x)
        x.mul_(factor).add_(towards).clamp_(0, 1)
    return x


def grey_mean(x: Tensor) -> Tensor:
    """Mean grey value of each image [B, 1, 1, 1]; for three channels the ITU-R 601 luma."""
    means = x.mean((2, 3), keepdim=True)
    if x.shape[1] == 3:
        means = means * _rows_of(means, 1, (0.299, 0.587, 0.114)).view(3, 1, 1) * 3
    return means if x.shape[1] == 1 else means.mean(1, keepdim=True)


def _in_loops(x: Tensor, *strengths: float | Tensor) -> bool:
    """Whether the compiled loops can be used: on the CPU, if no gradient is needed."""
    tensors = [x, *(s for s in strengths if isinstance(s, Tensor))]
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return x.device.type == "cpu" and not needed


def _warp_in_loops(
    x: Tensor,
    draws: Tensor,
    degrees: float,
    scale: tuple[float, float] | None,
    ratio: tuple[float, float],
    padding: int,
    shift: float,
) -> Tensor:
    """`warp` in compiled loops; exp, cos and sin are torch's, as others differ in the last bit."""
    from data_sets import view_loops

    height, width = x.shape[2:]
    none = draws.new_empty(0, 2)
    areas, aspects, positions, moves = none, none, none, none
    if scale is not None:
        aspects = _between(draws[:, RATIOS], math.log(ratio[0]), math.log(ratio[1])).exp()
        # in one layout: a loop is compiled for each
        areas, positions = draws[:, AREAS].contiguous(), draws[:, POSITION].contiguous()
    if shift:
        moves = (2 * draws[:, SHIFT] - 1) * shift
    angle = (2 * draws[:, ANGLE] - 1) * (degrees * (math.pi / 180))
    fallback = _fallback(height + 2 * padding, width + 2 * padding, ratio)
    warped = x.new_empty(x.shape)
    view_loops.warp(
        x.detach().numpy(), areas.numpy(), aspects.numpy(), positions.numpy(), moves.numpy(),
        angle.cos().numpy(), angle.sin().numpy(), padding, scale or (0.0, 0.0), fallback,
        warped.numpy(),
    )  # fmt: skip
    return warped


def _jitter_in_loops(x: Tensor, draws: Tensor, brightness: float, contrast: float) -> Tensor:
    from data_sets import view_loops

    ranges = [(max(0.0, 1 - strength), 1 + strength) for strength in (brightness, contrast)]
    used = draws[:, BRIGHTNESS : ORDER + 1].contiguous().numpy()
    pixels = x.view(len(x), -1).numpy()
    for first in (True, False):
        view_loops.change(used, *ranges, first, grey_mean(x).view(-1).numpy(), pixels)
    return x


def _rows_of(like: Tensor, count: int, values: Sequence[float]) -> Tensor:
    """[count, values], filled on the device: a copy from the host would wait for it."""
    return torch.stack([like.new_full((count,), value) for value in values], 1)


def _between(draw: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return low + (high - low) * draw


def _at_least_0(value: float | Tensor) -> float | Tensor:
    return value.clamp(min=0) if isinstance(value, Tensor) else max(0.0, value)
