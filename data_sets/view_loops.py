"""Warps and changes of brightness as compiled loops for the CPU, with the same bits as in torch.

The functions of data_sets/augmentation.py need tens of small torch operations, and a grid twice the
size of the images. Here an image stays in the cache. To give the same bits, operations and their
order are those of the formulas there, each rounded by itself, except for the products that
grid_sample fuses with a sum. The loops run in one thread.
"""

import numpy as np
from numba.extending import intrinsic

from experiment.compiling import compiled

loop = compiled(nogil=True, error_model="numpy")  # without fastmath, so that nothing is fused

BORDER = 2  # pixels of 0 around an image; positions further outside are clamped to it


@intrinsic
def fused(typing_context, a, b, c):
    """The fused multiply-add a b + c, rounded once."""

    def code(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, a, a), code


@loop
def warp(x, areas, aspects, positions, moves, cos, sin, padding, scale, fallback, warped):
    """Rotate, crop and shift each image of x [N, C, H, W] into `warped` of the same shape.

    areas, aspects: [N, attempts], the areas' draws, uniform in [0, 1), and widths / heights.
    positions: [N, 2], draws, uniform in [0, 1). Without crops these three have length 0.
    moves: [N, 2], shifts in pixels of the view; [0, 2] without shifts.
    cos, sin: [N], of the angles.
    padding: pixels on each side.
    scale: the range of the crop's share of the padded area.
    fallback: the box (top, left, height, width) if no attempt fits.
    """
    count, channels, height, width = x.shape
    row = width + 2 * BORDER
    padded = np.zeros((height + 2 * BORDER, row), dtype=warped.dtype)
    inside = padded[BORDER : BORDER + height, BORDER : BORDER + width]
    east, south = np.empty((height, width), warped.dtype), np.empty((height, width), warped.dtype)
    index = np.empty((height, width), dtype=np.int32)
    across, down = _centres(width, warped), _centres(height, warped)
    for n in range(count):
        box = (0.0, 0.0, float(height), float(width))
        if len(areas):
            box = _box(areas[n], aspects[n], positions[n], padding, scale, fallback, height, width)
        if len(moves):
            top, left, h, w = box
            box = (top + moves[n, 0] * (h / height), left + moves[n, 1] * (w / width), h, w)
        matrix = _matrix(box, cos[n], sin[n], padding, height, width, warped)
        index[:] = BORDER * (row + 1)
        _look_up(matrix[0], across, down, width, np.int32(1), east, index)
        _look_up(matrix[1], across, down, height, np.int32(row), south, index)
        for channel in range(channels):
            for i in range(height):
                for j in range(width):
                    inside[i, j] = x[n, channel, i, j]
            _interpolate(padded.reshape(-1), row, east, south, index, warped[n, channel])


@loop
def _matrix(box, cos, sin, padding, height, width, like):
    """The affine map [2, 3] of augmentation._crop_matrices."""
    top, left, h, w = box
    x, y = left + w / 2 - (width / 2 + padding), top + h / 2 - (height / 2 + padding)
    matrix = np.empty((2, 3), dtype=like.dtype)
    matrix[0, 0] = cos * w / 2 * (2 / width)
    matrix[0, 1] = -sin * h / 2 * (2 / width)
    matrix[0, 2] = (cos * x - sin * y) * (2 / width)
    matrix[1, 0] = sin * w / 2 * (2 / height)
    matrix[1, 1] = cos * h / 2 * (2 / height)
    matrix[1, 2] = (sin * x + cos * y) * (2 / height)
    return matrix


@loop
def _look_up(matrix, across, down, size, stride, beyond, index):
    """Find, along one dimension, the neighbour before the position of each pixel of a view.

    Its number times `stride` is added to `index`, and the distance from it is written to `beyond`;
    both are [H, W].
    """
    half = matrix.dtype.type(size / 2)
    one, shift, first = matrix.dtype.type(1), matrix.dtype.type(-0.5), matrix.dtype.type(-BORDER)
    last = matrix.dtype.type(size)
    along = matrix[0] * across + matrix[2]
    for i in range(len(down)):
        offset = matrix[1] * down[i]
        for j in range(len(across)):
            place = fused(along[j] + offset + one, half, shift)
            before = np.floor(place)
            beyond[i, j] = place - before
            before = first if before < first else before
            before = last if before > last else before
            index[i, j] += np.int32(before) * stride


@loop
def _interpolate(padded, row, east, south, index, view):
    """Write the bilinear mean of the four neighbours of each pixel to `view` [H, W]."""
    one = view.dtype.type(1)
    for i in range(view.shape[0]):
        for j in range(view.shape[1]):
            place, e, s = np.uint32(index[i, j]), east[i, j], south[i, j]
            w, n = one - e, one - s
            value = padded[place] * (w * n)
            value = fused(padded[place + np.uint32(1)], e * n, value)
            value = fused(padded[place + np.uint32(row)], w * s, value)
            view[i, j] = fused(padded[place + np.uint32(row + 1)], e * s, value)


@loop
def _centres(size, like):
    """The centres of `size` pixels that fill [-1, 1]."""
    centres = np.empty(size, dtype=like.dtype)
    for j in range(size):
        centres[j] = like.dtype.type(2 * j + 1) / like.dtype.type(size) - like.dtype.type(1)
    return centres


@loop
def _box(areas, aspects, position, padding, scale, fallback, height, width):
    """Top, left, height, width of the first attempt that fits the padded image, or `fallback`."""
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    for attempt in range(len(areas)):
        area = padded_height * padded_width * (scale[0] + (scale[1] - scale[0]) * areas[attempt])
        w = np.rint(np.sqrt(area * aspects[attempt]))
        h = np.rint(np.sqrt(area / aspects[attempt]))
        if 0 < w <= padded_width and 0 < h <= padded_height:
            top = np.floor(position[0] * (padded_height - h + 1))
            left = np.floor(position[1] * (padded_width - w + 1))
            return top, left, h, w
    return fallback


@loop
def change(draws, brightness, contrast, first, grey, x):
    """Take one of the two steps of augmentation._jitter, in place: brightness or contrast.

    draws: [N, 3], uniform in [0, 1), for the factor of brightness, that of contrast, and the order.
    brightness, contrast: the ranges of the factors.
    first: whether this is the first step.
    grey: [N], the mean grey values.
    x: [N, pixels].
    """
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for n in range(len(x)):
        of_brightness = (draws[n, 2] < 0.5) == first
        low, high = brightness if of_brightness else contrast
        factor = x.dtype.type(low + (high - low) * draws[n, 0 if of_brightness else 1])
        added = zero if of_brightness else (one - factor) * grey[n]
        for j in range(x.shape[1]):
            value = x[n, j] * factor + added
            value = zero if value < zero else value
            x[n, j] = one if value > one else value
