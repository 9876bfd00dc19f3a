"""Local polynomial sums and their gradients, factored so that few matrix products are left.

    delta_ij = sum_k psi_k mean_b( prod_v p_v[b,j]^a_kv  prod_u q_u[b,i]^c_ku ) w_ij^e_k

p are presynaptic tensors [batch, in], q postsynaptic ones [batch, out], w the parameter [out, in].
Terms with the same presynaptic powers a and the same parameter power e are a group: their
postsynaptic monomials are added up to one [batch, out] matrix T_ae before the product with p^a.

    delta = sum_e w^e * ( sum_a T_ae^T p^a  +  r_e 1^T  +  1 k_e^T )

Where a = 0, only a sum r over the batch of the postsynaptic monomials is needed, where c = 0 only
one, k, of p^a. At total degree 3 the 35 terms of (x, s, y, w) become 3 products instead of 34.

Several such sums, of different parameters, share their postsynaptic monomials. The backward pass
recomputes all that is elementwise, and keeps no product but those that multiply a power of w.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Exponents = tuple[int, ...]

BLOCK_BYTES = 2**22  # of one presynaptic monomial worked on at a time, on a CPU


@dataclass(frozen=True)
class LocalSum:
    """One sum over local terms, without its numbers.

    Attributes:
        exponents: one (a..., c..., e) per term, c for all postsynaptic tensors.
        presynaptic: which of the tensors given are p, by their numbers; possibly none.
    """

    exponents: tuple[Exponents, ...]
    presynaptic: tuple[int, ...] = ()


class LocalPolynomials:
    """Several sums with the same postsynaptic tensors, laid out for their factored evaluation.

    Attributes:
        sums: what they are.
        postsynaptic: which of the tensors given are q, by their numbers; at least one.
        device: where the tensors are.
    """

    def __init__(
        self, sums: Sequence[LocalSum], postsynaptic: Sequence[int], device: torch.device
    ) -> None:
        self.joint = _joint_plan(sums, tuple(postsynaptic), device)

    def __call__(
        self, psi: Sequence[Tensor], weights: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """delta [out, in] for each sum, differentiable once in every tensor.

        psi: coefficients [terms] and weights: parameters [out, in], one per sum; tensors: what is
        pre- and postsynaptic, [batch, in] and [batch, out].
        """
        return _LocalPolynomials.apply(self.joint, *psi, *weights, *tensors)


class _Monomials:
    """The non-constant monomials of some variables, each a lower one times a variable."""

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
        """The first `rows` monomials one by one; the variables themselves are not copied."""
        values: list[Tensor] = []
        for k in range(rows):
            v, lower = self.recipe[k]
            values.append(variables[v] if lower is None else values[lower] * variables[v])
            yield values[-1]

    def stacked(self, variables: Sequence[Tensor], rows: int) -> Tensor:
        """The first `rows` monomials [rows, batch, features], so that sums of them are products."""
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
        """Adds to `totals`, one per variable or None, its gradient from all monomials'."""
        for k, v, power, lower in self.divisions:
            if totals[v] is None:
                continue
            if lower is None:
                totals[v].add_(grads[k])
            else:
                totals[v].addcmul_(grads[k], values[lower], value=power)


@dataclass(frozen=True)
class _Plan:
    """Where each coefficient of one sum goes in the three matrices of its factored form.

    The matrices hold the coefficients of products [groups, rows of postsynaptic], of sums of
    postsynaptic monomials [powers, 1 + rows], the constant first, and of sums of presynaptic ones
    [powers, rows of presynaptic].
    """

    presynaptic: _Monomials
    inputs: tuple[int, ...]  # which tensors are presynaptic
    powers: int  # 1 + the highest power of the parameter
    groups: tuple[tuple[int, ...], ...]  # per presynaptic monomial: the e of its products
    product_rows: int  # how many presynaptic monomials are in products, the first ones
    shapes: tuple[tuple[int, int], ...]  # of the three matrices
    places: Tensor  # of the coefficients, in the three matrices laid end to end

    def matrices(self, psi: Tensor) -> list[Tensor]:
        """The coefficients in their places."""
        sizes = [rows * columns for rows, columns in self.shapes]
        flat = psi.new_zeros(sum(sizes)).index_copy_(0, self.places, psi)
        return [m.view(s) for m, s in zip(flat.split(sizes), self.shapes, strict=True)]

    def collected(self, matrices: Sequence[Tensor]) -> Tensor:
        """The entries of three such matrices, back in the order of the coefficients."""
        return torch.cat([m.flatten() for m in matrices]).index_select(0, self.places)


@dataclass(frozen=True)
class _JointPlan:
    sums: tuple[_Plan, ...]
    outputs: tuple[int, ...]  # which tensors are postsynaptic
    postsynaptic: _Monomials
    needed_in_backward: int  # how many of the postsynaptic monomials, the first ones

    def split(self, arguments: Sequence) -> tuple[Sequence, Sequence, Sequence]:
        """psi, weights and tensors."""
        n = len(self.sums)
        return arguments[:n], arguments[n : 2 * n], arguments[2 * n :]


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
    plans = [
        _plan(terms, s.presynaptic, post, multiplied, device)
        for terms, s in zip(split, sums, strict=True)
    ]
    factors = [1 + lower for *_, lower in post.divisions if lower is not None]
    return _JointPlan(tuple(plans), outputs, post, max([multiplied, *factors]))


def _plan(
    terms: list[tuple],
    inputs: tuple[int, ...],
    post: _Monomials,
    multiplied: int,
    device: torch.device,
) -> _Plan:
    pre = _Monomials({a for a, _, _ in terms})
    groups = sorted({(pre.row[a], e) for a, c, e in terms if any(a) and any(c)})
    powers = 1 + max((e for _, _, e in terms), default=0)
    shapes = ((len(groups), multiplied), (powers, 1 + len(post)), (powers, len(pre)))
    start = (0, math.prod(shapes[0]), math.prod(shapes[0]) + math.prod(shapes[1]))
    places = []
    for a, c, e in terms:
        if any(a) and any(c):
            places.append(groups.index((pre.row[a], e)) * multiplied + post.row[c])
        elif any(a):
            places.append(start[2] + e * len(pre) + pre.row[a])
        else:
            places.append(start[1] + e * (1 + len(post)) + (1 + post.row[c] if any(c) else 0))
    return _Plan(
        presynaptic=pre,
        inputs=inputs,
        powers=powers,
        groups=tuple(tuple(e for r, e in groups if r == row) for row in range(len(pre))),
        product_rows=1 + max((row for row, _ in groups), default=-1),
        shapes=shapes,
        places=torch.tensor(places, dtype=torch.long, device=device),
    )


class _LocalPolynomials(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint: _JointPlan, *arguments):
        psi, weights, tensors = joint.split(arguments)
        outputs = [tensors[k] for k in joint.outputs]
        post = joint.postsynaptic.stacked(outputs, len(joint.postsynaptic))
        batch, features = outputs[0].shape
        post_sums = torch.cat([post.new_full((1, features), batch), post.sum(1)])
        deltas, kept = [], []
        for plan, coefficients, weight in zip(joint.sums, psi, weights, strict=True):
            products, rows, columns = matrices = plan.matrices(coefficients / batch)
            combined, inputs = _combined(products, post), [tensors[k] for k in plan.inputs]
            correlations, pre_sums = _over_the_batch(plan, combined, weight, inputs)
            delta = torch.zeros_like(weight)
            for factor in reversed(_factors(correlations, rows @ post_sums, columns @ pre_sums)):
                delta.mul_(weight).add_(factor)
            deltas.append(delta)
            correlations[0] = None  # it multiplies w^0: the gradient does not need it
            kept += [*matrices, pre_sums, *correlations]
        ctx.joint = joint
        ctx.save_for_backward(post_sums, *weights, *tensors, *kept)
        return tuple(deltas)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        joint: _JointPlan = ctx.joint
        *_, needed = joint.split(ctx.needs_input_grad[1:])
        post_sums, *saved = ctx.saved_tensors
        weights, saved = saved[: len(joint.sums)], saved[len(joint.sums) :]
        tensors, kept = saved[: len(needed)], saved[len(needed) :]
        outputs = [tensors[k] for k in joint.outputs]
        post = joint.postsynaptic.stacked(outputs, joint.needed_in_backward)
        grad_post, grad_post_sums = torch.zeros_like(post), torch.zeros_like(post_sums)
        grad_tensors = [
            torch.zeros_like(t) if need or k in joint.outputs else None
            for k, (t, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        grad_psi, grad_weights = [], []
        for plan, weight, grad in zip(joint.sums, weights, grads, strict=True):
            inputs = [tensors[k] for k in plan.inputs]
            kept_of_sum, kept = kept[: 4 + plan.powers], kept[4 + plan.powers :]
            backward = _SumBackward(plan, weight, inputs, post, post_sums, kept_of_sum)
            grad_inputs = [grad_tensors[k] for k in plan.inputs]
            of_psi, of_weight = backward.run(grad, grad_post, grad_post_sums, grad_inputs)
            grad_psi.append(of_psi)
            grad_weights.append(of_weight)
        grad_monomials = [
            *grad_post.add_(grad_post_sums[1 : 1 + len(post)].unsqueeze(1)).unbind(),
            *grad_post_sums[1 + len(post) :].unbind(),  # the same for the whole batch
        ]
        grad_outputs = [grad_tensors[k] for k in joint.outputs]
        joint.postsynaptic.pull_back(grad_monomials, post.unbind(), grad_outputs)
        return None, *grad_psi, *grad_weights, *grad_tensors


class _SumBackward:
    """The backward pass of one sum; names as in the module's formula."""

    def __init__(self, plan: _Plan, weight, inputs, post, post_sums, kept) -> None:
        self.plan, self.weight, self.inputs = plan, weight, inputs
        self.post, self.post_sums = post, post_sums
        self.products, self.rows, self.columns, self.pre_sums, *self.correlations = kept

    def run(self, grad, grad_post, grad_post_sums, grad_inputs) -> tuple[Tensor, Tensor]:
        """Gradients of psi and weight; adds to those of monomials, their sums, and inputs."""
        grad_weight, grad_powers = self._through_parameter(grad)
        grad_rows = torch.stack([g.sum(1) for g in grad_powers])
        grad_columns = torch.stack([g.sum(0) for g in grad_powers])
        grad_combined = self._through_products(grad_powers)
        multiplied = self.products.shape[1]
        flat = grad_combined.flatten(1)
        grad_post[:multiplied].flatten(1).addmm_(self.products.t(), flat)
        grad_post_sums.addmm_(self.rows.t(), grad_rows)
        if any(g is not None for g in grad_inputs):
            grad_pre_sums = self.columns.t() @ grad_columns
            self._through_inputs(grad_powers, grad_pre_sums, grad_inputs)
        grad_matrices = (
            flat @ self.post[:multiplied].flatten(1).t(),
            grad_rows @ self.post_sums.t(),
            grad_columns @ self.pre_sums.t(),
        )
        grad_psi = self.plan.collected(grad_matrices).div_(self.post.shape[1])
        return grad_psi, grad_weight

    def _through_parameter(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the parameter w, and grad * w^e for each e."""
        by_row, by_column = self.rows @ self.post_sums, self.columns @ self.pre_sums
        factors = _factors(self.correlations, by_row, by_column)
        grad_weight, grad_powers = torch.zeros_like(grad), [grad]
        for e in range(1, self.plan.powers):
            grad_weight.addcmul_(grad_powers[-1], factors[e], value=e)
            grad_powers.append(grad_powers[-1] * self.weight)
        return grad_weight, grad_powers

    def _through_products(self, grad_powers: list[Tensor]) -> Tensor:
        """Gradient of T_ae [groups, batch, out]."""
        plan = self.plan
        grad_combined = self.post.new_empty(len(self.products), *self.post.shape[1:])
        for block in _blocks(self.inputs):
            targets = iter(grad_combined[:, block])
            monomials = plan.presynaptic.each([p[block] for p in self.inputs], plan.product_rows)
            for powers, values in zip(plan.groups, monomials, strict=False):
                for e in powers:
                    torch.mm(values, grad_powers[e].t(), out=next(targets))
        return grad_combined

    def _through_inputs(self, grad_powers, grad_pre_sums: Tensor, grad_inputs) -> None:
        plan = self.plan
        combined = iter(_combined(self.products, self.post))
        pre = list(plan.presynaptic.each(self.inputs, len(plan.presynaptic)))
        grad_pre = grad_pre_sums.unsqueeze(1).repeat(1, len(self.inputs[0]), 1)
        for row, powers in zip(grad_pre, plan.groups, strict=True):
            for e in powers:
                row.addmm_(next(combined), grad_powers[e])
        plan.presynaptic.pull_back(grad_pre.unbind(), pre, grad_inputs)


def _combined(products: Tensor, post: Tensor) -> Tensor:
    """T_ae [groups, batch, out]."""
    groups, rows = products.shape
    return (products @ post[:rows].flatten(1)).view(groups, *post.shape[1:])


def _over_the_batch(
    plan: _Plan, combined: Tensor, weight: Tensor, inputs: Sequence[Tensor]
) -> tuple[list[Tensor | None], Tensor]:
    """sum_a T_ae^T p^a [out, in] for each e (None: no such term), and sums of p^a [rows, in]."""
    used = {e for powers in plan.groups for e in powers}
    correlations = [torch.zeros_like(weight) if e in used else None for e in range(plan.powers)]
    pre_sums = weight.new_zeros(len(plan.presynaptic), weight.shape[1])
    for block in _blocks(inputs):
        combined_block = iter(combined[:, block])
        monomials = plan.presynaptic.each([p[block] for p in inputs], len(plan.presynaptic))
        for powers, total, values in zip(plan.groups, pre_sums, monomials, strict=True):
            for e in powers:
                correlations[e].addmm_(next(combined_block).t(), values)
            total.add_(values.sum(0))
    return correlations, pre_sums


def _blocks(inputs: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of the batch in which a presynaptic monomial fits into the cache."""
    if not inputs:
        return
    batch, features = inputs[0].shape
    size = batch
    if inputs[0].device.type == "cpu":
        size = max(64, BLOCK_BYTES // (features * inputs[0].element_size()))
    for start in range(0, batch, size):
        yield slice(start, start + size)


def _factors(
    correlations: Sequence[Tensor | None], by_row: Tensor, by_column: Tensor
) -> list[Tensor]:
    """What multiplies w^e, for each e: [out, in]."""
    factors = []
    for correlation, row, column in zip(correlations, by_row, by_column, strict=True):
        sums = row.unsqueeze(1) + column
        factors.append(sums if correlation is None else sums.add_(correlation))
    return factors
