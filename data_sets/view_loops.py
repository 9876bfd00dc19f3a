"""Warps and changes of brightness as compiled loops for the CPU, with the bits that torch gives.

What data_sets/augmentation.py does to views takes torch tens of small operations, and a grid twice
the size of the images. Here an image stays in the cache. Operations and their order are those of
the formulas there, rounded one by one, but for the products that grid_sample fuses with a sum. One
thread.
"""

import numpy as np
from numba import njit
from numba.extending import intrinsic

compiled = njit(cache=True, nogil=True, error_model="numpy")  # without fastmath: nothing is fused

BORDER = 2  # pixels of 0 around an image: what is further outside is looked for there


@intrinsic
def fused(typing_context, a, b, c):
    """a b + c, rounded once."""

    def code(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, a, a), code


@compiled
def warp(x, areas, aspects, positions, moves, cos, sin, padding, scale, fallback, warped):
    """Each image of x [N, C, H, W], rotated, cropped and shifted, to `warped`.

    areas [N, attempts], positions [N, 2]: uniform in [0, 1); aspects [N, attempts]: width / height;
    all of length 0 where there are no crops. moves [N, 2]: shifts in pixels of the view, or [0, 2].
    cos, sin [N]: of the angles. scale: of the area. fallback: the box where no attempt fits.
    """
    count, channels, height, width = x.shape
    row = width + 2 * BORDER
    padded = np.zeros((height + 2 * BORDER, row), dtype=x.dtype)
    inside = padded[BORDER : BORDER + height, BORDER : BORDER + width]
    east, south = np.empty(height * width, dtype=x.dtype), np.empty(height * width, dtype=x.dtype)
    index = np.empty(height * width, dtype=np.int32)
    centres = _centres(width, x), _centres(height, x)
    for n in range(count):
        box = (0.0, 0.0, float(height), float(width))
        if len(areas):
            box = _box(areas[n], aspects[n], positions[n], padding, scale, fallback, height, width)
        if len(moves):
            top, left, h, w = box
            box = (top + moves[n, 0] * (h / height), left + moves[n, 1] * (w / width), h, w)
        matrix = _matrix(box, cos[n], sin[n], padding, height, width, x)
        _look_up(matrix, centres, x.dtype.type(width / 2), x.dtype.type(height / 2), row,
                 east, south, index)  # fmt: skip
        for channel in range(channels):
            inside[:] = x[n, channel]
            view = warped[n, channel].reshape(-1)
            _interpolate(padded.reshape(-1), row, east, south, index, view)


@compiled
def _matrix(box, cos, sin, padding, height, width, like):
    """The affine map [2, 3] of _crop_grid."""
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


@compiled
def _look_up(matrix, centres, half_width, half_height, row, east, south, index):
    """Of each pixel of a view: the place of its upper left neighbour in the padded image, and how
    far it lies east and south of that one.
    """
    across, down = centres
    width, height = len(across), len(down)
    one, half = half_width / half_width, half_width / (half_width + half_width)
    first = -(one + one)
    x_across, y_across = matrix[0, 0] * across + matrix[0, 2], matrix[1, 0] * across + matrix[1, 2]
    x_down, y_down = matrix[0, 1] * down, matrix[1, 1] * down
    for i in range(height):
        for j in range(width):
            x = fused(x_across[j] + x_down[i] + one, half_width, -half)
            y = fused(y_across[j] + y_down[i] + one, half_height, -half)
            left, top = np.floor(x), np.floor(y)
            east[i * width + j], south[i * width + j] = x - left, y - top
            left = first if left < first else left
            left = half_width + half_width if left > half_width + half_width else left
            top = first if top < first else top
            top = half_height + half_height if top > half_height + half_height else top
            index[i * width + j] = (np.int32(top) + BORDER) * row + np.int32(left) + BORDER


@compiled
def _interpolate(padded, row, east, south, index, view):
    """view: of each pixel the weighted mean of its four neighbours."""
    for k in range(len(view)):
        place, e, s = np.uint32(index[k]), east[k], south[k]
        w, n = view.dtype.type(1) - e, view.dtype.type(1) - s
        value = padded[place] * (w * n)
        value = fused(padded[place + np.uint32(1)], e * n, value)
        value = fused(padded[place + np.uint32(row)], w * s, value)
        view[k] = fused(padded[place + np.uint32(row + 1)], e * s, value)


@compiled
def _centres(size, like):
    """Of so many pixels that fill [-1, 1]."""
    centres = np.empty(size, dtype=like.dtype)
    for j in range(size):
        centres[j] = like.dtype.type(2 * j + 1) / like.dtype.type(size) - like.dtype.type(1)
    return centres


@compiled
def _box(areas, aspects, position, padding, scale, fallback, height, width):
    """Top, left, height and width of the first attempt that fits into the padded image."""
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


@compiled
def change(draws, brightness, contrast, brightness_now, grey, x):
    """Brightness of some images x [N, pixels], contrast of the others, as _jitter has them.

    draws [2, N]: uniform in [0, 1), of brightness and contrast, whose factors lie between the two
    numbers given. brightness_now [N]: which of the two it is. grey [N]: the images' means.
    """
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for n in range(len(x)):
        low, high = brightness if brightness_now[n] else contrast
        factor = x.dtype.type(low + (high - low) * draws[0 if brightness_now[n] else 1, n])
        added = zero if brightness_now[n] else (one - factor) * grey[n]
        for j in range(x.shape[1]):
            value = x[n, j] * factor + added
            value = zero if value < zero else value
            x[n, j] = one if value > one else value
