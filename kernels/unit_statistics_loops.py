"""The parts of a whole update, except its products, as compiled loops for the CPU.

An update of few units consists of ten products and more than a hundred small operations, each of
which costs more to call than to compute. Here these are eight calls. Formulas, names and shapes are
those of kernels/gated_update.py; sums over samples and inputs are accumulated in float64. The loops
run in one thread.

    slope_of: (p0, p1, p2, p3, 2 p2) with base'(u) = p0 + p1 y + p2 y^2 + p3 [y > 0], y = base(u)
    layout: the numbers of views, rows, factors, weights of s and weights of w; the first rows of c,
        r, r_cov, r_cross and 1, or -1 for kinds that don't occur
    codes: the factors, as indices into FACTORS
    weights, grad_weights: split by `split`
    small: numbers for each unit or pair of units, split by `per_unit` and `per_row`
    sums [3, units]: the gradients of db, of the constant and of the mean

In each function the arguments that are read come first, those that are written come last. No slice
is assigned from an array: to compile the messages about its shape takes three seconds.
"""

import numpy as np

from experiment.compiling import compiled

# Sums may be reordered, and divisions by a common divisor shared; nan stays nan
LOOSE = {"reassoc", "contract", "nsz", "arcp"}
loop = compiled(nogil=True, fastmath=LOOSE, error_model="numpy")


@loop
def split(layout, weights):
    """The weights of the rows [rows, factors], of s and of w; of length 0 if there are none."""
    rows, factors, of_s = layout[1], layout[2], layout[3]
    end = rows * factors
    return weights[:end].reshape(rows, factors), weights[end : end + of_s], weights[end + of_s :]


@loop
def per_unit(small, units):
    """mean, d, root, factor of the step and db, each [units], and the rest of `small`."""
    mean, d, root = small[:units], small[units : 2 * units], small[2 * units : 3 * units]
    scale, db = small[3 * units : 4 * units], small[4 * units : 5 * units]
    return mean, d, root, scale, db, small[5 * units :]


@loop
def per_row(layout, rest, units):
    """factors [factors, units], a [rows, units], cov [units, units], across (see `_square`)."""
    of_factors, of_rows = layout[2] * units, layout[1] * units
    factors = rest[:of_factors].reshape(layout[2], units)
    a = rest[of_factors : of_factors + of_rows].reshape(layout[1], units)
    rest = rest[of_factors + of_rows :]
    return factors, a, rest[: units**2].reshape(units, units), _square(rest[units**2 :], units)


@loop
def _square(numbers, units):
    """The numbers as a matrix [units, units], or [0, units] if there are none."""
    return numbers.reshape(len(numbers) // units, units)


@loop
def centre(y, c, small):
    """Write the mean [units], and the centred sum and difference c [views, samples, units]."""
    views, samples, units = c.shape
    mean, y0, y1 = per_unit(small, units)[0], y[0], y[views - 1]
    total = np.zeros(units)
    for n in range(samples):
        for i in range(units):
            total[i] += y0[n, i] + y1[n, i] if views == 2 else y0[n, i]
    for i in range(units):
        mean[i] = total[i] / (samples * views)
    for n in range(samples):
        if views == 2:
            for i in range(units):
                c[0, n, i] = (y0[n, i] - mean[i]) + (y1[n, i] - mean[i])
                c[1, n, i] = y0[n, i] - y1[n, i]
        else:
            for i in range(units):
                c[0, n, i] = y0[n, i] - mean[i]


@loop
def squared_correlations(cov, d, i):
    """sum_{k != i} (cov_ik d_k)^2."""
    total = 0.0
    for k in range(len(d)):
        total += (cov[i, k] * d[k]) ** 2 if k != i else 0
    return total


@loop
def mix(layout, codes, counts, gram, weights, small, k):
    """Write factors, a, d, cov, across and k.

    gram: c^T c [views, units, units].
    counts: the factor from c^T c to the moments, and what is added to variances.
    """
    views, units, _ = gram.shape
    (inverse_count, floor), at, rows = counts, layout[5:], split(layout, weights)[0]
    mean, d, _, _, _, rest = per_unit(small, units)
    factors, a, cov, across = per_row(layout, rest, units)
    for j in range(units):
        for i in range(units):
            both = gram[0, j, i] + gram[1, j, i] if views == 2 else gram[0, j, i]
            cov[j, i] = both * inverse_count
        if at[3] >= 0:
            for i in range(units):
                across[j, i] = (gram[0, j, i] - gram[1, j, i]) * inverse_count
    for i in range(units):
        d[i] = 1 / np.sqrt(cov[i, i] + floor)
    for i in range(units):
        for f in range(len(codes)):
            code = codes[f]
            factors[f, i] = 1 if code == 0 else mean[i] if code == 1 else d[i]
            if code == 3:
                factors[f, i] *= d[i]
            if code == 4:
                factors[f, i] = d[i] ** 4 * squared_correlations(cov, d, i)
    a[:] = 0
    for row in range(len(a)):
        for f in range(len(codes)):
            for i in range(units):
                a[row, i] += rows[row, f] * factors[f, i]
    scaled, plain, other = np.zeros_like(d), np.zeros_like(d), np.zeros_like(d)
    for v in range(views):
        for i in range(units):
            scaled[i] = d[i] * a[at[1] + v, i] if at[1] >= 0 else 0
            plain[i] = a[at[2] + v, i] if at[2] >= 0 else 0
            other[i] = d[i] * a[at[3] + v, i] if at[3] >= 0 else 0
        for j in range(units):
            e = d[j] * d[j]
            for i in range(units):
                k[v, j, i] = cov[j, i] * (e * scaled[i] + plain[i])
            if at[3] >= 0:
                for i in range(units):
                    k[v, j, i] += across[j, i] * e * other[i]
            k[v, j, j] = a[at[0] + v, j] if at[0] >= 0 else 0


@loop
def gate(layout, slope_of, weights, s, y, small, total, h):
    """Turn c K in `total` into l in place; write h = base' l, and its sum db [units]."""
    views, samples, units = total.shape
    of_s, summed, rest = split(layout, weights)[1], *per_unit(small, units)[4:]
    a, last = per_row(layout, rest, units)[1], views - 1
    s0, s1, y0, y1 = s[0], s[last], y[0], y[last]
    p0, p1, p2, p3, _ = slope_of
    sums, shift = np.zeros(units), np.zeros_like(summed)
    if layout[9] >= 0:
        for i in range(units):
            shift[i] = a[layout[9], i]
    zero = p0 - p0
    same_view = of_s[0] if len(of_s) else zero
    cross = of_s[1] if len(of_s) > 1 else zero
    for n in range(samples):
        for i in range(units):
            total[0, n, i] += shift[i]
        if views == 2:
            for i in range(units):
                first, second = total[0, n, i], total[1, n, i]
                total[0, n, i], total[1, n, i] = first + second, first - second
        if len(of_s):
            for i in range(units):
                total[0, n, i] += same_view * s0[n, i]
        if len(of_s) > 1:
            for i in range(units):
                total[0, n, i] += cross * s1[n, i]
                total[1, n, i] += same_view * s1[n, i] + cross * s0[n, i]
        for i in range(units):
            y = y0[n, i]
            slope = p0 + y * (p1 + p2 * y) + (p3 if y > 0 else zero)
            h[0, n, i] = total[0, n, i] * slope
            sums[i] += h[0, n, i]
        if views == 2:
            for i in range(units):
                y = y1[n, i]
                slope = p0 + y * (p1 + p2 * y) + (p3 if y > 0 else zero)
                h[1, n, i] = total[1, n, i] * slope
                sums[i] += h[1, n, i]
    for i in range(units):
        summed[i] = sums[i]


@loop
def step(layout, weights, w, b, rate, eps, dw, small, new_w, new_b):
    """Add (weight of w) w to dw in place, then take the step."""
    units, inputs = w.shape
    of_w, (_, _, root, factor, db, _) = split(layout, weights)[2], per_unit(small, units)
    for i in range(units):
        square = 0.0
        if len(of_w):
            weight = of_w[0]
            for j in range(inputs):
                dw[i, j] += weight * w[i, j]
        for j in range(inputs):
            square += dw[i, j] * dw[i, j]
        root[i] = 1 / np.sqrt(square / inputs + eps.item() * eps.item())
        factor[i] = rate.item() * root[i]
        scale = factor[i]
        for j in range(inputs):
            new_w[i, j] = w[i, j] + scale * dw[i, j]
        new_b[i] = b[i] + scale * db[i]


@loop
def through_step(
    layout, weights, grad_w, grad_b, w, dw, eps, small, grad_dw, grad_old, grad_numbers,
    grad_weights, sums,
):  # fmt: skip
    """Write the gradients of dw, db, the old w, the weight of w, rate and eps (grad_numbers)."""
    units, inputs = w.shape
    of_w, grad_of_w = split(layout, weights)[2], split(layout, grad_weights)[2]
    (_, _, root, factor, db, _), grad_db = per_unit(small, units), sums[0]
    of_rate, of_eps, of_term = 0.0, 0.0, 0.0
    for i in range(units):
        of_factor = 0.0
        for j in range(inputs):
            of_factor += grad_w[i, j] * dw[i, j]
        of_factor += grad_b[i] * db[i]
        shrink = of_factor * factor[i] * root[i] * root[i]
        of_rate += of_factor * root[i]
        of_eps -= shrink * eps.item()
        scale = factor[i]
        grad_numbers[0] = shrink / inputs  # rounds to the dtype of the tensors
        back = grad_numbers[0]
        for j in range(inputs):
            grad_dw[i, j] = grad_w[i, j] * scale - dw[i, j] * back
        if len(of_w):
            weight = of_w[0]
            for j in range(inputs):
                of_term += grad_dw[i, j] * w[i, j]
            for j in range(inputs):
                grad_old[i, j] = grad_w[i, j] + weight * grad_dw[i, j]
        else:
            for j in range(inputs):
                grad_old[i, j] = grad_w[i, j]
        grad_db[i] = grad_b[i] * scale
    grad_numbers[0], grad_numbers[1] = of_rate, of_eps
    grad_of_w[:] = of_term


@loop
def through_gate(
    layout, slope_of, weights, s, y, total, grad, grad_y, grad_s, grad_weights, sums
):  # fmt: skip
    """Turn the gradient of h in `grad` into that of c K in place.

    Writes the gradients of y through the gain, of s, of its weights and of the constant.
    """
    views, samples, units = total.shape
    of_s, grad_of_s = split(layout, weights)[1], split(layout, grad_weights)[1]
    grad_sum, grad_const, last = sums[0], sums[1], views - 1
    s0, s1, y0, y1 = s[0], s[last], y[0], y[last]
    p0, p1, p2, p3, curve = slope_of
    zero = p0 - p0
    sums, of_own, of_cross = np.zeros(units), np.zeros(units), np.zeros(units)
    same_view = of_s[0] if len(of_s) else zero
    cross = of_s[1] if len(of_s) > 1 else zero
    for n in range(samples):
        for v in range(views):
            y_of_view = y0 if v == 0 else y1
            for i in range(units):
                y, g = y_of_view[n, i], grad[v, n, i] + grad_sum[i]
                slope = p0 + y * (p1 + p2 * y) + (p3 if y > 0 else zero)
                grad_y[v, n, i] = g * total[v, n, i] * (p1 + curve * y)
                grad[v, n, i] = g * slope
        if len(of_s) == 0:
            grad_s[:, n] = 0
        if len(of_s) == 1:
            for i in range(units):
                grad_s[0, n, i] = same_view * grad[0, n, i]
                of_own[i] += grad[0, n, i] * s0[n, i]
        if len(of_s) > 1:
            for i in range(units):
                first, second = grad[0, n, i], grad[1, n, i]
                grad_s[0, n, i] = same_view * first + cross * second
                grad_s[1, n, i] = same_view * second + cross * first
                of_own[i] += first * s0[n, i] + second * s1[n, i]
                of_cross[i] += first * s1[n, i] + second * s0[n, i]
        if views == 2:
            for i in range(units):
                first, second = grad[0, n, i], grad[1, n, i]
                grad[0, n, i], grad[1, n, i] = first + second, first - second
        for i in range(units):
            sums[i] += grad[0, n, i]
    for i in range(units):
        grad_const[i] = sums[i]
    if len(of_s):
        grad_of_s[0] = of_own.sum()
    if len(of_s) > 1:
        grad_of_s[1] = of_cross.sum()


@loop
def through_squared_correlations(grad, cov, d, i, grad_cov, grad_d):
    """Add the gradients of covariance and d, for d_i^4 squared_correlations(cov, d, i)."""
    grad_d[i] += 4 * d[i] ** 3 * grad * squared_correlations(cov, d, i)
    each = 2 * d[i] ** 4 * grad
    for k in range(len(d)):
        if k != i:
            grad_cov[i, k] += each * cov[i, k] * d[k] * d[k]
            grad_d[k] += each * cov[i, k] * cov[i, k] * d[k]


@loop
def through_mix(layout, codes, counts, weights, small, grad_k, grad_weights, sums, both):
    """Write the gradients of rows and mean, and `both` [views, units, units].

    c @ both is the gradient of c through its moments.
    """
    views, units, _ = grad_k.shape
    at, inverse_count, grad_const, grad_mean = layout[5:], counts[0], sums[1], sums[2]
    rows, grad_rows = split(layout, weights)[0], split(layout, grad_weights)[0]
    _, d, _, _, _, rest = per_unit(small, units)
    factors, a, cov, across = per_row(layout, rest, units)
    grad_a, grad_d = np.zeros_like(a), np.zeros(units)
    grad_cov = np.zeros_like(cov)
    grad_across = np.zeros_like(across)
    scaled, plain, other = np.zeros_like(d), np.zeros_like(d), np.zeros_like(d)
    of_r, of_cov, of_cross = np.zeros_like(d), np.zeros_like(d), np.zeros_like(d)
    for v in range(views):
        for i in range(units):
            scaled[i] = d[i] * a[at[1] + v, i] if at[1] >= 0 else 0
            plain[i] = a[at[2] + v, i] if at[2] >= 0 else 0
            other[i] = d[i] * a[at[3] + v, i] if at[3] >= 0 else 0
        of_r[:] = 0
        of_cov[:] = 0
        of_cross[:] = 0
        for j in range(units):
            if at[0] >= 0:
                grad_a[at[0] + v, j] = grad_k[v, j, j]
            grad_k[v, j, j] = 0
            e, of_e = d[j] * d[j], 0.0
            for i in range(units):
                g = grad_k[v, j, i]
                of_r[i] += g * cov[j, i] * e
                of_cov[i] += g * cov[j, i]
                of_e += g * cov[j, i] * scaled[i]
                grad_cov[j, i] += g * (e * scaled[i] + plain[i])
            if at[3] >= 0:
                for i in range(units):
                    g = grad_k[v, j, i]
                    of_cross[i] += g * across[j, i] * e
                    of_e += g * across[j, i] * other[i]
                    grad_across[j, i] += g * e * other[i]
            grad_d[j] += 2 * d[j] * of_e
        for i in range(units):
            if at[1] >= 0:
                grad_a[at[1] + v, i] = of_r[i] * d[i]
                grad_d[i] += of_r[i] * a[at[1] + v, i]
            if at[2] >= 0:
                grad_a[at[2] + v, i] = of_cov[i]
            if at[3] >= 0:
                grad_a[at[3] + v, i] = of_cross[i] * d[i]
                grad_d[i] += of_cross[i] * a[at[3] + v, i]
    if at[4] >= 0:
        for i in range(units):
            grad_a[at[4], i] = grad_const[i]
    grad_mean[:] = 0
    for f in range(len(codes)):
        for row in range(len(a)):
            total = 0.0
            for i in range(units):
                total += grad_a[row, i] * factors[f, i]
            grad_rows[row, f] = total
        for i in range(units):
            of_factor = 0.0
            for row in range(len(a)):
                of_factor += rows[row, f] * grad_a[row, i]
            if codes[f] == 1:
                grad_mean[i] += of_factor
            if codes[f] == 2:
                grad_d[i] += of_factor
            if codes[f] == 3:
                grad_d[i] += 2 * d[i] * of_factor
            if codes[f] == 4:
                through_squared_correlations(of_factor, cov, d, i, grad_cov, grad_d)
    for i in range(units):
        grad_cov[i, i] -= grad_d[i] * d[i] * d[i] * d[i] / 2
    for j in range(units):
        for i in range(units):
            both[0, j, i] = (grad_cov[j, i] + grad_cov[i, j]) * inverse_count
            if views == 2:
                both[1, j, i] = both[0, j, i]
            if at[3] >= 0:
                difference = (grad_across[j, i] + grad_across[i, j]) * inverse_count
                both[0, j, i] += difference
                both[1, j, i] -= difference


@loop
def through_centre(slope_of, slope, grad, sums, y, grad_y, grad_b, grad_s, through_b):
    """Add the gradient through y to grad_s, and write grad_b plus the sum of grad_s to through_b.

    The gradient of y is grad_y, which is overwritten, plus that through c (`grad`) and the mean.
    """
    views, samples, units = grad.shape
    p0, p1, p2, p3, _ = slope_of
    zero = p0 - p0
    total, shift = np.zeros(units), np.zeros_like(grad_b)
    for n in range(samples):
        for i in range(units):
            total[i] += grad[0, n, i]
    for i in range(units):
        shift[i] = (sums[2, i] / views - total[i]) / samples
        total[i] = grad_b[i]
    for n in range(samples):
        if views == 2:
            for i in range(units):
                first, second = grad[0, n, i] + shift[i], grad[1, n, i]
                grad_y[0, n, i] += first + second
                grad_y[1, n, i] += first - second
        else:
            for i in range(units):
                grad_y[0, n, i] += grad[0, n, i] + shift[i]
        for v in range(views):
            for i in range(units):
                output = y[v, n, i]
                derivative = p0 + output * (p1 + p2 * output) + (p3 if output > 0 else zero)
                grad_s[v, n, i] += grad_y[v, n, i] * derivative * slope
                total[i] += grad_s[v, n, i]
    for i in range(units):
        through_b[i] = total[i]
