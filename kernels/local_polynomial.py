"""Local polynomial sums and their gradients, factored into few matrix products.

    delta_ij = sum_k psi_k mean_b( prod_v p_v[b,j]^a_kv  prod_u q_u[b,i]^c_ku ) w_ij^e_k

p are presynaptic tensors [batch, in], q postsynaptic tensors [batch, out], w is the parameter
[out, in]. Terms with the same presynaptic powers a and the same parameter power e form a group:
their postsynaptic monomials are summed to one matrix T_ae [batch, out] before the product with p^a.

    delta = sum_e w^e * ( sum_a T_ae^T p^a  +  r_e 1^T  +  1 k_e^T )

For a = 0, only the sum r of the postsynaptic monomials over the batch is needed; for c = 0, only
the sum k of p^a. At total degree 3 the 35 terms of (x, s, y, w) need 3 products instead of 34.

Several sums, of different parameters, share their postsynaptic monomials. The backward pass
recomputes everything elementwise; the only products kept are those that multiply a power of w.

In a convolutional layer a sample is a position, and its input is the window around it. A monomial
of a window is the window of the image's monomial, so the products become convolutions and their
gradients, and windows are never cut out.

Several tasks are evaluated at once if every tensor has a leading dimension for them: coefficients
[tasks, terms], parameters [tasks, out, in], p and q [tasks, batch, ...]. Products are then batched.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from kernels.forward_mode import runs_forward
from kernels.own_precision import in_own_precision
from kernels.task_products import contracted

Exponents = tuple[int, ...]

BLOCK_BYTES = 2**22  # bytes of a presynaptic monomial that a CPU works on at a time


def samples(image: Tensor) -> Tensor:
    """Turn [batch, features, H, W] into one row per position, [batch * H * W, features].

    The result is a view if the channels are last in memory. [batch, features] is returned as it is.
    Images of several tasks have a leading dimension for them, and so has the result.
    """
    return image if image.dim() < 4 else image.movedim(-3, -1).flatten(-4, -2)


@dataclass(frozen=True)
class Rows:
    """The linear maps of the sums and their gradients if the input of a sample is a row of p.

    p is [batch, in], weights are [out, in]. Methods with a trailing _ add to `total`.
    """

    def blocks(self, inputs: Sequence[Tensor]) -> Iterator[slice]:
        """Slices of the samples, so small that a presynaptic monomial fits into a CPU's cache."""
        batch, features = inputs[0].shape
        size = batch
        if inputs[0].device.type == "cpu":
            size = max(64, BLOCK_BYTES // (features * inputs[0].element_size()))
        for start in range(0, batch, size):
            yield slice(start, start + size)

    def correlate_(self, total: Tensor, post: Tensor, p: Tensor) -> None:
        """Add sum_b post_bi p_bj to total [out, in]."""
        total.addmm_(post.t(), p)

    def project(self, p: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write sum_j p_bj weight_ij to out [batch, out]."""
        torch.mm(p, weight.t(), out=out)

    def spread_(self, total: Tensor, post: Tensor, weight: Tensor) -> None:
        """Add sum_i post_bi weight_ij to total [batch, in]."""
        total.addmm_(post, weight)

    def sum(self, p: Tensor) -> Tensor:
        """sum_b p_bj, [in]."""
        return p.sum(0)

    def spread_evenly(self, numbers: Tensor, like: Tensor) -> Tensor:
        """The gradient of numbers [in] . sum(p) by p, of the shape of `like`."""
        return numbers.expand_as(like)

    def count(self, p: Tensor) -> int:
        """The number of samples."""
        return len(p)

    def image(self, rows: Tensor, p: Tensor) -> Tensor:
        """Rows [samples, features] in the shape of a layer's output, which is the same here."""
        return rows


@dataclass(frozen=True)
class Windows:
    """The maps of Rows if the input of a sample is a window of images p [batch, in, H, W].

    There is one sample per image and position, in the order of `samples`; weights are
    [out, in * kh * kw].

    size: (kh, kw).
    """

    size: tuple[int, int]
    stride: int = 1
    padding: int = 0

    def convolve(self, p: Tensor, weight: Tensor) -> Tensor:
        """The convolution [batch, out, H', W'] of p with weight [out, in, kh, kw].

        Its channels are last in memory.
        """
        p, weight = (_channels_last(t) for t in (p, weight))
        return nn.functional.conv2d(p, weight, stride=self.stride, padding=self.padding)

    def rows(self, p: Tensor) -> Tensor:
        """The windows themselves, [samples, in * kh * kw]."""
        cut = nn.functional.unfold(p, self.size, stride=self.stride, padding=self.padding)
        return cut.movedim(1, 2).flatten(0, 1)

    def blocks(self, inputs: Sequence[Tensor]) -> Iterator[slice]:
        """One slice of all samples, because convolutions take care of the cache themselves."""
        yield slice(None)

    def correlate_(self, total: Tensor, post: Tensor, p: Tensor) -> None:
        """Add sum_b post_bi p_bj to total [out, in * kh * kw]."""
        shape = (len(total), p.shape[1], *self.size)
        total.add_(self._gradient(p, shape, self.image(post, p), of_weight=True).flatten(1))

    def project(self, p: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write sum_j p_bj weight_ij to out [samples, out]."""
        out.copy_(samples(self.convolve(p, self._kernels(weight))))

    def spread_(self, total: Tensor, post: Tensor, weight: Tensor) -> None:
        """Add sum_i post_bi weight_ij to total [batch, in, H, W]."""
        kernels = self._kernels(weight)
        total.add_(self._gradient(total, kernels, self.image(post, total), of_weight=False))

    def sum(self, p: Tensor) -> Tensor:
        """sum_b p_bj, [in * kh * kw]."""
        whole = p.sum(0, keepdim=True)
        ones = whole.new_ones(1, 1, *self._positions(p))
        return self._gradient(whole, (1, p.shape[1], *self.size), ones, of_weight=True).flatten()

    def spread_evenly(self, numbers: Tensor, like: Tensor) -> Tensor:
        """The gradient of numbers [in * kh * kw] . sum(p) by p, of the shape of `like`."""
        one = like[:1]
        ones = one.new_ones(1, 1, *self._positions(like))
        kernel = self._kernels(numbers.unsqueeze(0))
        return self._gradient(one, kernel, ones, of_weight=False).expand_as(like)

    def _kernels(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, *self.size))

    def fan_in(self, p: Tensor) -> int:
        """The number of inputs of a sample."""
        return p.shape[1] * math.prod(self.size)

    def count(self, p: Tensor) -> int:
        """The number of samples."""
        return len(p) * math.prod(self._positions(p))

    def _positions(self, p: Tensor) -> tuple[int, int]:
        sizes = zip(p.shape[2:], self.size, strict=True)
        return tuple((n + 2 * self.padding - k) // self.stride + 1 for n, k in sizes)

    def image(self, rows: Tensor, p: Tensor) -> Tensor:
        """Rows [samples, features] as a view [batch, features, H', W']."""
        return rows.view(len(p), *self._positions(p), -1).permute(0, 3, 1, 2)

    def _gradient(self, p, weight, grad: Tensor, of_weight: bool) -> Tensor:
        """The gradient of a convolution by its weight, given as a shape, or by its input p."""
        if of_weight:
            p, weight = _channels_last(p), grad.new_empty(weight)
        weight = _channels_last(weight)
        of_input, of_kernel, _ = torch.ops.aten.convolution_backward(
            grad, p, weight, None, (self.stride,) * 2, (self.padding,) * 2, (1, 1), False, (0, 0),
            1, (not of_weight, of_weight, False),
        )  # fmt: skip
        return of_kernel if of_weight else of_input


ROWS = Rows()


@dataclass(frozen=True)
class TaskRows:
    """The maps of Rows for several tasks: p is [tasks, batch, in], weights are [tasks, out, in]."""

    def blocks(self, inputs: Sequence[Tensor]) -> Iterator[slice]:
        """One slice, of all tasks and samples."""
        yield slice(None)

    def correlate_(self, total: Tensor, post: Tensor, p: Tensor) -> None:
        """Add sum_b post_tbi p_tbj to total [tasks, out, in]."""
        if p.device.type == "cpu":
            total.baddbmm_(post.mT, p)
        else:
            total.add_(contracted(post, p))

    def project(self, p: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write sum_j p_tbj weight_tij to out [tasks, batch, out]."""
        torch.bmm(p, weight.mT, out=out)

    def spread_(self, total: Tensor, post: Tensor, weight: Tensor) -> None:
        """Add sum_i post_tbi weight_tij to total [tasks, batch, in]."""
        total.baddbmm_(post, weight)

    def sum(self, p: Tensor) -> Tensor:
        """sum_b p_tbj, [tasks, in]."""
        return p.sum(1)

    def spread_evenly(self, numbers: Tensor, like: Tensor) -> Tensor:
        """The gradient of numbers [tasks, in] . sum(p) by p, of the shape of `like`."""
        return numbers.unsqueeze(1).expand_as(like)

    def fan_in(self, p: Tensor) -> int:
        """The number of inputs of a sample."""
        return p.shape[2]

    def count(self, p: Tensor) -> int:
        """The number of samples of a task."""
        return p.shape[1]

    def image(self, rows: Tensor, p: Tensor) -> Tensor:
        """Rows [tasks, samples, features] in the shape of a layer's output, the same here."""
        return rows


TASK_ROWS = TaskRows()


@dataclass(frozen=True)
class TaskWindows:
    """The maps of Windows for several tasks, p [tasks, batch, in, H, W], one after the other."""

    windows: Windows

    def blocks(self, inputs: Sequence[Tensor]) -> Iterator[slice]:
        """One slice, of all tasks and samples."""
        yield slice(None)

    def correlate_(self, total: Tensor, post: Tensor, p: Tensor) -> None:
        """Add sum_b post_tbi p_tbj to total [tasks, out, in * kh * kw]."""
        for of_task in zip(total, post, p, strict=True):
            self.windows.correlate_(*of_task)

    def project(self, p: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write sum_j p_tbj weight_tij to out [tasks, samples, out]."""
        for of_task in zip(p, weight, out, strict=True):
            self.windows.project(*of_task)

    def spread_(self, total: Tensor, post: Tensor, weight: Tensor) -> None:
        """Add sum_i post_tbi weight_tij to total [tasks, batch, in, H, W]."""
        for of_task in zip(total, post, weight, strict=True):
            self.windows.spread_(*of_task)

    def sum(self, p: Tensor) -> Tensor:
        """sum_b p_tbj, [tasks, in * kh * kw]."""
        return torch.stack([self.windows.sum(of_task) for of_task in p])

    def spread_evenly(self, numbers: Tensor, like: Tensor) -> Tensor:
        """The gradient of numbers [tasks, in * kh * kw] . sum(p) by p, of the shape of `like`."""
        each = zip(numbers, like, strict=True)
        return torch.stack([self.windows.spread_evenly(*of_task) for of_task in each])

    def fan_in(self, p: Tensor) -> int:
        """The number of inputs of a sample."""
        return self.windows.fan_in(p[0])

    def count(self, p: Tensor) -> int:
        """The number of samples of a task."""
        return self.windows.count(p[0])

    def image(self, rows: Tensor, p: Tensor) -> Tensor:
        """Rows [tasks, samples, features] as a view [tasks, batch, features, H', W']."""
        first = self.windows.image(rows[0], p[0])
        return rows.view(len(rows), len(first), *first.shape[2:], -1).movedim(-1, 2)


Place = Rows | Windows | TaskRows | TaskWindows


def place_of(inputs: Sequence[Tensor], windows: Windows | TaskWindows | None) -> Place:
    """The maps for these inputs: `windows` if they are images, else of rows, by their dimensions.

    inputs: [batch, in], [batch, channels, H, W], or with a dimension of tasks before these.
    """
    if windows is not None and inputs and inputs[0].dim() > 3:
        return windows
    return TASK_ROWS if inputs and inputs[0].dim() == 3 else ROWS


def with_samples(values: Tensor) -> Tensor:
    """Numbers [features] to go with every sample; [tasks, 1, features] from [tasks, features]."""
    return values if values.dim() == 1 else values.unsqueeze(-2)


def mixed(matrix: Tensor, stack: Tensor) -> Tensor:
    """sum_k matrix_gk stack_k: [groups, ...] from [groups, k] and [k, ...].

    Of several tasks, [groups, tasks, ...] from [tasks, groups, k] and [k, tasks, ...].
    """
    if stack.dim() == 2:
        return matrix @ stack
    if matrix.dim() == 2:
        return (matrix @ stack.flatten(1)).view(len(matrix), *stack.shape[1:])
    product = torch.bmm(matrix, _by_task(stack))
    return product.view(*product.shape[:2], *stack.shape[2:]).movedim(0, 1)


def inner_products(one: Tensor, other: Tensor, tasks: bool) -> Tensor:
    """The sums of one_g other_k over all other dimensions, [groups, k].

    Of several tasks, [tasks, groups, k] from [groups, tasks, ...] and [k, tasks, ...].
    """
    if tasks:
        return contracted(_by_task(one).mT, _by_task(other).mT)
    if one.dim() == 2:
        return one @ other.t()
    return one.flatten(1) @ other.flatten(1).t()


def _by_task(stack: Tensor) -> Tensor:
    """A stack [k, tasks, ...] as [tasks, k, numbers]."""
    return stack.movedim(0, 1).flatten(2)


def _channels_last(image: Tensor) -> Tensor:
    # `contiguous` would leave the strides of a single channel unchanged, and convolutions would use
    # the other layout, which is five times slower
    return image.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class LocalSum:
    """The structure of one sum over local terms.

    Attributes:
        exponents: one (a..., c..., e) per term, with c for all postsynaptic tensors.
        presynaptic: the indices of the tensors p among those given; possibly none.
    """

    exponents: tuple[Exponents, ...]
    presynaptic: tuple[int, ...] = ()


class LocalPolynomials:
    """Several sums with the same postsynaptic tensors, planned for their factored evaluation.

    sums: the structure of each.
    postsynaptic: the indices of the tensors q among those given; at least one.
    device: the device of the tensors.
    """

    def __init__(
        self, sums: Sequence[LocalSum], postsynaptic: Sequence[int], device: torch.device
    ) -> None:
        self.joint = _joint_plan(sums, tuple(postsynaptic), device)

    def __call__(
        self,
        psi: Sequence[Tensor],
        weights: Sequence[Tensor],
        tensors: Sequence[Tensor],
        windows: Windows | TaskWindows | None = None,
    ) -> tuple[Tensor, ...]:
        """delta [out, in] for each sum, differentiable once in every tensor, or forward.

        psi: the coefficients [terms] of each sum.
        weights: the parameter [out, in] of each sum.
        tensors: the presynaptic [batch, in] and postsynaptic [batch, out] tensors.
        windows: with them, presynaptic tensors may be images [images, channels, H, W], and `batch`
            counts the windows in them.
        """
        if torch.compiler.is_compiling() and windows is None and weights[0].dim() == 3:
            return written_out(self.joint, psi, weights, tensors)
        if runs_forward():
            rows = [windows.rows(t) if t.dim() == 4 else t for t in tensors]
            one_task = ([t.unsqueeze(0) for t in given] for given in (psi, weights, rows))
            return tuple(delta.squeeze(0) for delta in written_out(self.joint, *one_task))
        return _LocalPolynomials.apply(self.joint, windows, *psi, *weights, *tensors)


class _Monomials:
    """The nonconstant monomials of some variables, each a lower one times a variable."""

    def __init__(self, exponents: set[Exponents]) -> None:
        lower = (itertools.product(*(range(p + 1) for p in powers)) for powers in exponents)
        closed = {powers for powers in itertools.chain(*lower) if any(powers)}
        self.exponents = sorted(closed, key=lambda powers: (sum(powers), powers))
        self.row = {powers: k for k, powers in enumerate(self.exponents)}
        # (row, variable, power, row of the monomial divided by the variable or None)
        self.divisions = [
            (k, v, power, self.row.get(tuple(p - (u == v) for u, p in enumerate(powers))))
            for k, powers in enumerate(self.exponents)
            for v, power in enumerate(powers)
            if power
        ]
        self.recipe = {k: (v, lower) for k, v, _, lower in reversed(self.divisions)}

    def __len__(self) -> int:
        return len(self.exponents)

    def each(self, variables: Sequence[Tensor], rows: int) -> Iterator[Tensor]:
        """The first `rows` monomials one by one; variables are not copied."""
        values: list[Tensor] = []
        for k in range(rows):
            v, lower = self.recipe[k]
            values.append(variables[v] if lower is None else values[lower] * variables[v])
            yield values[-1]

    def stacked(self, variables: Sequence[Tensor], rows: int) -> Tensor:
        """The first `rows` monomials in one tensor [rows, batch, features]."""
        values = variables[0].new_empty(rows, *variables[0].shape)
        rows = values.unbind()
        for k, row in enumerate(rows):
            v, lower = self.recipe[k]
            if lower is None:
                row.copy_(variables[v])
            else:
                torch.mul(rows[lower], variables[v], out=row)
        return values

    def pull_back(
        self, grads: Sequence[Tensor], values: Sequence[Tensor], totals: Sequence[Tensor]
    ) -> None:
        """Add the gradient of each variable, from those of all monomials, to `totals`.

        totals: one tensor per variable, or None if its gradient is not needed.
        """
        for k, v, power, lower in self.divisions:
            if totals[v] is None:
                continue
            if lower is None:
                totals[v].add_(grads[k])
            else:
                totals[v].addcmul_(grads[k], values[lower], value=power)


@dataclass(frozen=True)
class _Plan:
    """One sum: its monomials, and where its coefficients are in the matrices of the joint plan."""

    presynaptic: _Monomials
    inputs: tuple[int, ...]  # indices of the presynaptic tensors
    powers: int  # 1 + the highest power of the parameter
    groups: tuple[tuple[int, ...], ...]  # for each presynaptic monomial, the e of its products
    product_rows: int  # only so many presynaptic monomials, the first ones, occur in products
    terms: tuple[tuple[int | None, int | None, int], ...]  # rows of p^a and q^c, if any, and e
    in_products: slice  # its groups among those of all sums
    in_rows: slice  # its powers among those of all sums


@dataclass(frozen=True)
class _JointPlan:
    """Several sums, whose coefficients are the entries of few matrices.

    Of all sums together, there are the coefficients of products [groups, postsynaptic monomials]
    and of sums of postsynaptic monomials [powers, 1 + monomials], the constant first; of each sum,
    those of sums of its presynaptic monomials [powers, monomials].
    """

    sums: tuple[_Plan, ...]
    outputs: tuple[int, ...]  # indices of the postsynaptic tensors
    postsynaptic: _Monomials
    multiplied: int  # only so many postsynaptic monomials, the first ones, occur in products
    needed_in_backward: int  # the number of postsynaptic monomials, the first ones, needed there
    shapes: tuple[tuple[int, int], ...]  # of the matrices
    places: Tensor  # of all coefficients in the flattened matrices, concatenated
    sources: Tensor  # of the entries of these, among all coefficients and a zero at the end

    def split(self, arguments: Sequence) -> tuple[Sequence, Sequence, Sequence]:
        """Split the arguments, or something with one entry for each, into psi, weights, tensors."""
        n = len(self.sums)
        return arguments[:n], arguments[n : 2 * n], arguments[2 * n :]

    def matrices(self, psi: Sequence[Tensor], batch: int) -> list[Tensor]:
        """The matrices for coefficients psi [terms] of each sum, divided by the batch."""
        sizes = [rows * columns for rows, columns in self.shapes]
        tasks = psi[0].shape[:-1]
        and_zero = torch.cat([*psi, psi[0].new_zeros(*tasks, 1)], -1).div_(batch)
        # not index_copy_, which is many kernels on a GPU where algorithms have to be deterministic
        flat = and_zero.index_select(-1, self.sources)
        parts = zip(flat.split(sizes, -1), self.shapes, strict=True)
        return [part.view(*tasks, *shape) for part, shape in parts]

    def collected(self, matrices: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
        """The entries of such matrices in the order of each sum's coefficients, [terms]."""
        flat = torch.cat([m.flatten(-2) for m in matrices], -1)
        counts = [len(plan.terms) for plan in self.sums]
        return flat.index_select(-1, self.places).div_(batch).split(counts, -1)


def _joint_plan(
    sums: Sequence[LocalSum], outputs: tuple[int, ...], device: torch.device
) -> _JointPlan:
    split = [
        [(t[: len(s.presynaptic)], t[len(s.presynaptic) : -1], t[-1]) for t in s.exponents]
        for s in sums
    ]
    post = _Monomials({c for terms in split for _, c, _ in terms})
    in_products = [post.row[c] for terms in split for a, c, _ in terms if any(a) and any(c)]
    multiplied = 1 + max(in_products, default=-1)
    plans: list[_Plan] = []
    for terms, of_sum in zip(split, sums, strict=True):
        before = plans[-1] if plans else None
        plans.append(_plan(terms, of_sum.presynaptic, post, before))
    shapes = (
        (plans[-1].in_products.stop, multiplied),
        (plans[-1].in_rows.stop, 1 + len(post)),
        *((plan.powers, len(plan.presynaptic)) for plan in plans),
    )
    factors = [1 + lower for *_, lower in post.divisions if lower is not None]
    places = _places(plans, shapes)
    sources = [len(places)] * sum(rows * columns for rows, columns in shapes)
    for coefficient, place in enumerate(places):
        sources[place] = coefficient
    return _JointPlan(
        sums=tuple(plans),
        outputs=outputs,
        postsynaptic=post,
        multiplied=multiplied,
        needed_in_backward=max([multiplied, *factors]),
        shapes=shapes,
        places=torch.tensor(places, dtype=torch.long, device=device),
        sources=torch.tensor(sources, dtype=torch.long, device=device),
    )


def _plan(
    terms: list[tuple], inputs: tuple[int, ...], post: _Monomials, before: _Plan | None
) -> _Plan:
    """The plan of a sum that follows the sum `before`."""
    pre = _Monomials({a for a, _, _ in terms})
    groups = sorted({(pre.row[a], e) for a, c, e in terms if any(a) and any(c)})
    powers = 1 + max((e for _, _, e in terms), default=0)
    first_group, first_row = (before.in_products.stop, before.in_rows.stop) if before else (0, 0)
    return _Plan(
        presynaptic=pre,
        inputs=inputs,
        powers=powers,
        groups=tuple(tuple(e for r, e in groups if r == row) for row in range(len(pre))),
        product_rows=1 + max((row for row, _ in groups), default=-1),
        terms=tuple((pre.row.get(a), post.row.get(c), e) for a, c, e in terms),
        in_products=slice(first_group, first_group + len(groups)),
        in_rows=slice(first_row, first_row + powers),
    )


def _places(plans: Sequence[_Plan], shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Where the coefficients of all sums are in the flattened matrices, concatenated."""
    starts = [0, *itertools.accumulate(rows * columns for rows, columns in shapes)]
    places = []
    for plan, start_of_columns in zip(plans, starts[2:-1], strict=True):
        groups = [(row, e) for row, powers in enumerate(plan.groups) for e in powers]
        for a, c, e in plan.terms:
            if a is not None and c is not None:
                group = plan.in_products.start + groups.index((a, e))
                places.append(group * shapes[0][1] + c)
            elif a is not None:
                places.append(start_of_columns + e * len(plan.presynaptic) + a)
            else:
                row = plan.in_rows.start + e
                places.append(starts[1] + row * shapes[1][1] + (0 if c is None else 1 + c))
    return places


class _LocalPolynomials(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint: _JointPlan, windows: Windows | None, *arguments):
        psi, weights, tensors = joint.split(arguments)
        outputs = [tensors[k] for k in joint.outputs]
        post = joint.postsynaptic.stacked(outputs, len(joint.postsynaptic))
        *tasks, batch, features = outputs[0].shape
        post_sums = torch.cat([post.new_full((1, *tasks, features), batch), post.sum(-2)])
        matrices = joint.matrices(psi, batch)
        products, rows, *columns = matrices
        combined, by_row = mixed(products, post[: joint.multiplied]), mixed(rows, post_sums)
        deltas, kept = [], []
        for plan, weight, of_sum in zip(joint.sums, weights, columns, strict=True):
            inputs = [tensors[k] for k in plan.inputs]
            correlations, pre_sums = _over_the_batch(
                plan, combined[plan.in_products], weight, inputs, place_of(inputs, windows)
            )
            by_column = mixed(of_sum, pre_sums) if len(pre_sums) else None
            factors = _factors(correlations, by_row[plan.in_rows], by_column)
            deltas.append(_horner(factors, weight))
            correlations.pop(0, None)  # the gradient doesn't need it, because it multiplies w^0
            kept.append((pre_sums, by_column, correlations))
        ctx.joint, ctx.windows = joint, windows
        flat, ctx.kept = tree_flatten(kept)
        ctx.save_for_backward(post_sums, by_row, *matrices, *weights, *tensors, *flat)
        return tuple(deltas)

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx, *grads):
        joint: _JointPlan = ctx.joint
        *_, needed = joint.split(ctx.needs_input_grad[2:])
        count = len(joint.shapes)
        post_sums, by_row, *saved = ctx.saved_tensors
        (products, rows, *columns), saved = saved[:count], saved[count:]
        _, weights, saved = joint.split([None] * len(joint.sums) + saved)
        tensors, kept = saved[: len(needed)], tree_unflatten(saved[len(needed) :], ctx.kept)
        outputs = [tensors[k] for k in joint.outputs]
        post = joint.postsynaptic.stacked(outputs, joint.needed_in_backward)
        multiplied = post[: joint.multiplied]
        grad_tensors = [
            torch.zeros_like(t) if need or k in joint.outputs else None
            for k, (t, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        grad_combined = post.new_empty(joint.shapes[0][0], *post.shape[1:])
        grad_rows = torch.empty_like(by_row)
        grad_columns, grad_weights = [], []
        of_sums = zip(joint.sums, weights, grads, columns, kept, strict=True)
        for plan, weight, grad, of_sum, (pre_sums, by_column, correlations) in of_sums:
            inputs = [tensors[k] for k in plan.inputs]
            backward = _SumBackward(plan, place_of(inputs, ctx.windows), inputs)
            factors = _factors(correlations, by_row[plan.in_rows], by_column, first=1)
            grad_powers = _times_powers(grad, weight, plan.powers)
            grad_weights.append(_through_parameter(grad_powers, factors))
            torch.sum(grad_powers, -1, out=grad_rows[plan.in_rows])
            backward.through_products(grad_powers, grad_combined[plan.in_products])
            if not len(pre_sums):
                continue
            grad_by_column = grad_powers.sum(-2)
            grad_columns.append((grad_by_column, pre_sums))
            grad_inputs = [grad_tensors[k] for k in plan.inputs]
            if any(g is not None for g in grad_inputs):
                combined = mixed(products[..., plan.in_products, :], multiplied)
                grad_pre_sums = mixed(of_sum.mT, grad_by_column)
                backward.through_inputs(grad_powers, combined, grad_pre_sums, grad_inputs)
        grad_post = mixed(products.mT, grad_combined)
        grad_post_sums = mixed(rows.mT, grad_rows)[1:]
        grad_monomials = [
            *grad_post.add_(grad_post_sums[: joint.multiplied].unsqueeze(-2)).unbind(),
            # the same for the whole batch
            *grad_post_sums[joint.multiplied :].unsqueeze(-2).unbind(),
        ]
        grad_outputs = [grad_tensors[k] for k in joint.outputs]
        joint.postsynaptic.pull_back(grad_monomials, post.unbind(), grad_outputs)
        has_tasks = products.dim() == 3
        pairs = [(grad_combined, multiplied), (grad_rows, post_sums), *grad_columns]
        grad_matrices = [inner_products(*pair, has_tasks) for pair in pairs]
        grad_psi = joint.collected(grad_matrices, post.shape[-2])
        return None, None, *grad_psi, *grad_weights, *grad_tensors


def written_out(
    joint: _JointPlan, psi: Sequence[Tensor], weights: Sequence[Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The sums of LocalPolynomials for several tasks in operations of torch alone.

    torch.compile joins them, and they have a forward mode.

    psi: [tasks, terms] of each sum; the other arguments have a dimension of tasks as well.
    """
    outputs = [tensors[k] for k in joint.outputs]
    post = list(joint.postsynaptic.each(outputs, len(joint.postsynaptic)))
    post_means = [q.mean(-2) for q in post]
    deltas = []
    for plan, coefficients, weight in zip(joint.sums, psi, weights, strict=True):
        inputs = [tensors[k] for k in plan.inputs]
        factors = _written_factors(plan, coefficients.unbind(-1), inputs, post, post_means)
        delta = torch.zeros_like(weight)
        for factor in reversed(factors):
            delta = delta * weight + factor
        deltas.append(delta)
    return tuple(deltas)


def _written_factors(plan: _Plan, psi, inputs, post, post_means) -> list[Tensor | float]:
    """The factor of w^e for each e, of each task."""
    pre = list(plan.presynaptic.each(inputs, len(plan.presynaptic)))
    pre_means = [p.mean(-2) for p in pre]
    factors: list[Tensor | float] = [0.0] * plan.powers
    combined: dict[int, dict[int, Tensor]] = {}
    for coefficient, (a, c, e) in zip(psi, plan.terms, strict=True):
        coefficient = coefficient.view(-1, 1, 1)
        if a is not None and c is not None:
            groups = combined.setdefault(a, {})
            groups[e] = groups.get(e, 0.0) + coefficient * post[c]
        elif a is not None:
            factors[e] = factors[e] + coefficient * pre_means[a].unsqueeze(-2)
        elif c is not None:
            factors[e] = factors[e] + coefficient * post_means[c].unsqueeze(-1)
        else:
            factors[e] = factors[e] + coefficient
    for a, groups in combined.items():
        # the groups side by side, so that the monomial is read once
        together = contracted(torch.cat([*groups.values()], -1), pre[a]) / pre[a].shape[-2]
        parts = together.chunk(len(groups), -2)
        for e, part in zip(groups, parts, strict=True):
            factors[e] = factors[e] + part
    return factors


@dataclass(frozen=True)
class _SumBackward:
    """The parts of the backward pass of one sum that go through all samples."""

    plan: _Plan
    place: Place
    inputs: Sequence[Tensor]

    def through_products(self, grad_powers: Tensor, grad_combined: Tensor) -> None:
        """Write the gradient of T_ae [groups, batch, out] to grad_combined."""
        plan = self.plan
        for block in self.place.blocks(self.inputs) if self.inputs else ():
            targets = iter(grad_combined[:, block])
            monomials = plan.presynaptic.each([p[block] for p in self.inputs], plan.product_rows)
            for powers, values in zip(plan.groups, monomials, strict=False):
                for e in powers:
                    self.place.project(values, grad_powers[e], out=next(targets))

    def through_inputs(
        self, grad_powers: Tensor, combined: Tensor, grad_pre_sums: Tensor, grad_inputs
    ) -> None:
        """Add the gradients of the presynaptic tensors to grad_inputs."""
        plan, combined = self.plan, iter(combined)
        pre = list(plan.presynaptic.each(self.inputs, len(plan.presynaptic)))
        grad_pre = []
        for of_sums, powers in zip(grad_pre_sums, plan.groups, strict=True):
            like = self.inputs[0]
            total = torch.empty_like(like).copy_(self.place.spread_evenly(of_sums, like))
            for e in powers:
                self.place.spread_(total, next(combined), grad_powers[e])
            grad_pre.append(total)
        plan.presynaptic.pull_back(grad_pre, pre, grad_inputs)


def _over_the_batch(
    plan: _Plan,
    combined: Tensor,
    weight: Tensor,
    inputs: Sequence[Tensor],
    place: Place,
) -> tuple[dict[int, Tensor], Tensor]:
    """sum_a T_ae^T p^a [out, in] for each e that has any, and sums of p^a, [monomials, in]."""
    used = sorted({e for powers in plan.groups for e in powers})
    correlations = {e: torch.zeros_like(weight) for e in used}
    sums: list[Tensor] = []
    for block in place.blocks(inputs) if inputs else ():
        combined_block = iter(combined[:, block])
        monomials = plan.presynaptic.each([p[block] for p in inputs], len(plan.presynaptic))
        for k, (powers, values) in enumerate(zip(plan.groups, monomials, strict=True)):
            for e in powers:
                place.correlate_(correlations[e], next(combined_block), values)
            of_block = place.sum(values)
            sums[k : k + 1] = [sums[k].add_(of_block) if k < len(sums) else of_block]
    if not sums:
        return correlations, weight.new_zeros(0, *weight.shape[:-2], weight.shape[-1])
    return correlations, torch.stack(sums)


def _factors(
    correlations: Mapping[int, Tensor], by_row: Tensor, by_column: Tensor | None, first: int = 0
) -> Tensor:
    """The factors [powers, out, in] of w^e, from e = `first` on."""
    factors = by_row[first:].unsqueeze(-1)
    if by_column is not None:
        factors = factors + by_column[first:].unsqueeze(-2)
    for e, correlation in correlations.items():
        factors[e - first].add_(correlation)
    return factors


def _horner(factors: Tensor, weight: Tensor) -> Tensor:
    """sum_e factors_e w^e, [out, in]."""
    *lower, total = factors.expand(-1, *weight.shape).unbind()
    for factor in reversed(lower):
        total = torch.addcmul(factor, total, weight)
    return total if lower else total.clone()


def _times_powers(grad: Tensor, weight: Tensor, powers: int) -> Tensor:
    """grad * w^e for each e below `powers`, [powers, out, in]."""
    values = grad.new_empty(powers, *grad.shape)
    values[0] = grad
    for e in range(1, powers):
        torch.mul(values[e - 1], weight, out=values[e])
    return values


def _through_parameter(grad_powers: Tensor, factors: Tensor) -> Tensor:
    """The gradient of the parameter w; factors: of w^e from e = 1 on."""
    if not len(factors):
        return torch.zeros_like(grad_powers[0])
    total = grad_powers[0] * factors[0]
    for e in range(1, len(factors)):
        total.addcmul_(grad_powers[e], factors[e], value=e + 1)
    return total
