"""Hypergradients: the derivatives of E(w(lambda), lambda) with respect to hyperparameters lambda.

    implicit   w = Phi(w, lambda):   (I - J^T) v = grad_w E,   J = dPhi/dw
               dE = grad_lambda E + (dPhi/dlambda)^T v
    reverse    w_{t+1} = Phi_t(w_t, lambda), t < T:   a_T = grad_w E,   a_t = (dPhi_t/dw)^T a_{t+1}
               dE = grad_lambda E + sum_t (dPhi_t/dlambda)^T a_{t+1}
    forward    Z_0 = 0,   Z_{t+1} = (dPhi_t/dw) Z_t + dPhi_t/dlambda
               dE = grad_lambda E + Z_T^T grad_w E

Franceschi et al. 2017 (arXiv 1703.01785), Lorraine et al. 2020 (1911.02590), Grazzi et al. 2020
(2006.16218) and 2022 (2202.03397), whose HyperTorch gave eight functions here their names and
signatures. Everywhere, params and hparams are lists or other pytrees of tensors, and every
hyperparameter has requires_grad; fp_map and the update maps take (params, hparams) to new params of
the same shapes, outer_loss takes them to a scalar. A method returns the hypergradient as a tree
like hparams, with zeros for hyperparameters that nothing depends on, and with set_grad also adds it
to each .grad.

Detached parts of a map count as constants. If its step size is attached but its inner gradient is
not (for lack of create_graph=True), it is a first-order map: this may be intended or an oversight,
and is not checked.

Solvers of the equations are in linear_solvers.py, methods without derivatives in strategies.py,
differentiable inner optimisers in inner_optimizers.py.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hypergradients.errors import DivergenceError, HypergradientError
from hypergradients.linear_solvers import (
    ON_DIVERGENCE,
    ConjugateGradient,
    FixedPoint,
    NormalEquations,
    NystromConjugateGradient,
    Optimizer,
    Solver,
    hopeless,
    norm,
    report_divergence,
)
from hypergradients.replays import Moment
from hypergradients.update_maps import (
    MapJacobian,
    OuterLoss,
    Point,
    Tree,
    UpdateMap,
    advance,
    attached_scalar,
    delivered,
    hyperparameters,
    require_dependence,
    vjp,
)

# ---- along a trajectory ----


def reverse_unroll(
    params: Tree, hparams: Tree, outer_loss: OuterLoss, set_grad: bool = True
) -> Tree:
    """Backpropagation through whatever computed params, which are attached to hparams.

    params: w_T, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    outer_loss: (params, hparams) -> scalar tensor.
    set_grad: whether to also add the result to each hyperparameter's .grad.

    Returns a tree like hparams. The graph is kept: other losses of the same params can be
    differentiated afterwards. Raises HypergradientError for invalid arguments, and if the loss
    depends on no hyperparameter. Memory: the graph of all updates. (Franceschi et al. 2017, arXiv
    1703.01785.)
    """
    leaves, spec = hyperparameters(hparams)
    loss = attached_scalar(outer_loss(params, hparams), "outer_loss")
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    if all(g is None for g in gradients):
        raise HypergradientError(
            "outer_loss depends on no hyperparameter; params must be attached to them"
        )
    pairs = zip(leaves, gradients, strict=True)
    gradient = [torch.zeros_like(h) if g is None else g for h, g in pairs]
    return delivered(gradient, leaves, spec, set_grad)


def reverse(
    params_history: Sequence[Tree],
    hparams: Tree,
    update_map_history: Sequence[UpdateMap],
    outer_loss: OuterLoss,
    set_grad: bool = True,
) -> Tree:
    """Reverse mode from stored states: each update runs once more, with only its graph in memory.

    params_history: w_0, ..., w_T, each a tree of tensors; or only the last k + 1 of them for
        truncated reverse mode, which ignores that w_{T-k} depends on hparams. A single state gives
        grad_lambda E.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    update_map_history: Phi_0, ..., Phi_{T-1}, of which the last k are used, each (params, hparams)
        -> params of the same shapes, differentiable.
    outer_loss: (params, hparams) -> scalar tensor.
    set_grad: whether to also add the result to each hyperparameter's .grad.

    Returns a tree like hparams. Raises HypergradientError for invalid arguments, if no map depends
    on a hyperparameter, and if a map does not lead from its state to the next (unless all states
    are the same), for example because it draws new random numbers or batches at each call.
    Memory: the states and the graph of one update. (Franceschi et al. 2017, arXiv 1703.01785.)
    """
    steps = len(params_history) - 1
    if steps < 0 or len(update_map_history) < steps:
        raise HypergradientError(
            f"the history is too short: {steps + 1} states need {max(0, steps)} update maps and "
            f"there are {len(update_map_history)}; give w_0 to w_T and Phi_0 to Phi_(T-1)"
        )
    point = Point(params_history[-1], hparams)
    adjoint, gradient = point.loss_gradients(outer_loss)
    first, depends, elsewhere = len(update_map_history) - steps, not steps, []
    for t in reversed(range(steps)):
        point = Point(params_history[t], hparams)
        mapped = point.apply(update_map_history[first + t])
        elsewhere.append(point.leads_elsewhere(mapped, params_history[t + 1]))
        depends = depends or point.depends_on_hparams(mapped)
        adjoint, indirect = point.vjp(mapped, adjoint)
        gradient = torch._foreach_add(gradient, indirect)
    require_dependence(depends)
    _check_repeated(elsewhere[::-1])
    return point.delivered(gradient, set_grad)


def checkpointed_reverse(
    params: Tree,
    hparams: Tree,
    update_maps: Sequence[UpdateMap],
    outer_loss: OuterLoss,
    segment_length: int | None = None,
    set_grad: bool = True,
) -> Tree:
    """Reverse mode from w_0 that stores one state per segment of the update maps.

    params: w_0, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    update_maps: Phi_0, ..., Phi_{T-1}, each (params, hparams) -> params of the same shapes,
        differentiable.
    outer_loss: (params, hparams) -> scalar tensor.
    segment_length: maps in a segment (default: about the square root of their number).
    set_grad: whether to also add the result to each hyperparameter's .grad.

    Returns a tree like hparams. The maps run twice: forward, then segment by segment with a graph,
    with the same random numbers from torch's global generators. Raises HypergradientError for
    invalid arguments, if no map depends on a hyperparameter, and if a segment leads elsewhere the
    second time, as with batches from an iterator. Memory: a state for each segment and the graph of
    one. (Griewank and Walther 2008, Evaluating Derivatives, ch. 12.)
    """
    _check_count("the number of update_maps", len(update_maps))
    length = math.isqrt(len(update_maps) - 1) + 1 if segment_length is None else segment_length
    _check_count("segment_length", length)
    segments = [update_maps[k : k + length] for k in range(0, len(update_maps), length)]
    return reverse(*_trajectory(params, hparams, segments), outer_loss, set_grad)


def truncated_reverse(
    params: Tree,
    hparams: Tree,
    K: int,
    update_maps: Sequence[UpdateMap],
    outer_loss: OuterLoss,
    set_grad: bool = True,
) -> Tree:
    """Reverse mode through the last K update maps only; the error falls as J's K-th power.

    params: w_0, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    K: the number of maps that are differentiated, from 1 to all.
    update_maps: Phi_0, ..., Phi_{T-1}, each (params, hparams) -> params of the same shapes,
        differentiable.
    outer_loss: (params, hparams) -> scalar tensor.
    set_grad: whether to also add the result to each hyperparameter's .grad.

    Returns a tree like hparams. The last K maps run twice, as in checkpointed_reverse, which raises
    the same errors. Memory: K states and the graph of one update. (Shaban et al. 2019, arXiv
    1810.10667.)
    """
    _check_count("K", K)
    if len(update_maps) < K:
        raise HypergradientError(f"K = {K} needs as many update_maps, got {len(update_maps)}")
    start = advance(params, hparams, update_maps[: len(update_maps) - K])
    last = update_maps[len(update_maps) - K :]
    trajectory = _trajectory(start, hparams, [[update] for update in last])
    return reverse(*trajectory, outer_loss, set_grad)


def neumann_lookback(
    params: Tree,
    hparams: Tree,
    K: int,
    update_maps: Sequence[UpdateMap],
    outer_loss: OuterLoss,
    set_grad: bool = True,
) -> Tree:
    """K terms of the Neumann series with the last maps of a trajectory, all at w_{T-1}.

        v_0 = grad_w E(w_T),   v_{j+1} = (dPhi_{T-1-j}/dw)^T v_j,   w_T = Phi_{T-1}(w_{T-1})
        dE = grad_lambda E + (dPhi_{T-1}/dlambda)^T (v_0 + ... + v_{K-1})

    params: w_{T-1}, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    K: the number of terms, at least 1.
    update_maps: the last K - 1 maps or more, oldest first, or the last one alone, which is then
        used for all; each (params, hparams) -> params of the same shapes, differentiable.
    outer_loss: (params, hparams) -> scalar tensor.
    set_grad: whether to also add the result to each hyperparameter's .grad.

    Returns a tree like hparams. This is truncated reverse mode as if params had not changed for K
    steps: w_{T-1} is the only state. It is a sum of K terms, not the solution of a system, so that
    divergence is not checked. Maps that draw random numbers draw new ones. Raises
    HypergradientError for invalid arguments, and if the last map depends on no hyperparameter.
    (Clarke et al. 2022, arXiv 2110.10461.)
    """
    _check_count("K", K)
    if not update_maps or 1 < len(update_maps) < K - 1:
        raise HypergradientError(
            f"the history is too short: {K} terms need the last {max(1, K - 1)} update maps, or "
            f"one that stands for all, got {len(update_maps)}"
        )
    point = Point(params, hparams)
    last = point.apply(update_maps[-1])
    require_dependence(point.depends_on_hparams(last))
    term, gradient = Point(point.tree(last), hparams).loss_gradients(outer_loss)
    total, mapped = term, last
    for j in range(K - 1):
        if j and len(update_maps) > 1:
            mapped = point.apply(update_maps[-1 - j])
        term = vjp(mapped, point.params, term, retain_graph=True)
        total = torch._foreach_add(total, term)
    gradient = torch._foreach_add(gradient, vjp(last, point.hparams, total))
    return point.delivered(gradient, set_grad)


def forward_mode(
    params: Tree,
    hparams: Tree,
    update_maps: Sequence[UpdateMap],
    outer_loss: OuterLoss,
    set_grad: bool = True,
    vectorize: bool = False,
) -> Tree:
    """Forward mode from w_0: the memory does not grow with the number of updates.

    params: w_0, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    update_maps: Phi_0, ..., Phi_{T-1}, each (params, hparams) -> params of the same shapes. They
        must use the hparams they are given, and every function in them must support forward mode.
    outer_loss: (params, hparams) -> scalar tensor.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    vectorize: push all n directions, one for each element of the hyperparameters, through
        torch.func.jvp at once, for which inner gradients must be torch.func.grad, not
        torch.autograd.grad. Otherwise each map runs n times, with the same random numbers from
        torch's global generators.

    Returns a tree like hparams. Time and memory grow with n: Z has n times as many elements as
    params. Raises HypergradientError for invalid arguments, if a map does not run in forward mode,
    if no map depends on the hparams that it is given, and if the runs of a map differ. (Franceschi
    et al. 2017, arXiv 1703.01785.)
    """
    _check_count("the number of update_maps", len(update_maps))
    point = Point(params, hparams)
    sizes = [t.numel() for t in point.hparams]
    unit = torch.eye(sum(sizes), dtype=point.hparams[0].dtype, device=point.hparams[0].device)
    directions = [
        columns.reshape(len(unit), *t.shape).to(t)
        for columns, t in zip(unit.split(sizes, dim=1), point.hparams, strict=True)
    ]
    tangents = None  # None until a map depends on a hyperparameter
    push = _pushed_at_once if vectorize else _pushed_one_by_one
    for update in update_maps:
        try:
            new, tangents = push(point, update, tangents, directions)
        except RuntimeError as problem:
            hint = ", or torch.autograd.grad in it: leave vectorize out" if vectorize else ""
            raise HypergradientError(
                f"the map does not run in forward mode, take reverse{hint} "
                f"({str(problem).splitlines()[0]})"
            ) from problem
        point = Point(point.tree(new), hparams)
    require_dependence(tangents is not None)
    grad_params, gradient = point.loss_gradients(outer_loss)
    total = sum(
        z.reshape(len(z), -1) @ g.reshape(-1) for z, g in zip(tangents, grad_params, strict=True)
    )
    pairs = zip(total.split(sizes), point.hparams, strict=True)
    indirect = [t.view_as(h).to(h) for t, h in pairs]
    return point.delivered(torch._foreach_add(gradient, indirect), set_grad)


def exact(
    opt_params_f: Callable[[Tree], Tree],
    hparams: Tree,
    outer_loss: OuterLoss,
    set_grad: bool = True,
) -> Tree:
    """Backpropagation through a closed form of the parameters.

    opt_params_f: hparams -> params, the minimum or fixed point itself, attached to hparams.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    outer_loss: (params, hparams) -> scalar tensor.
    set_grad: whether to also add the result to each hyperparameter's .grad.

    Returns a tree like hparams. Raises HypergradientError for invalid arguments, and if the loss
    depends on no hyperparameter. HyperTorch has this as a reference for the other methods.
    """
    return reverse_unroll(opt_params_f(hparams), hparams, outer_loss, set_grad)


# ---- at a fixed point ----


@dataclass(frozen=True)
class LinearSolve:
    """How (I - J^T) v = b was solved.

    Attributes:
        solution: v, a tree like params.
        residuals: |b - (I - J^T) v_k| of the iterates, the last of which is v. If fp_map is
            stochastic, each is that of one draw.
    """

    solution: Tree
    residuals: tuple[float, ...]

    @property
    def iterations(self) -> int:
        return len(self.residuals) - 1

    @property
    def residual(self) -> float:
        return self.residuals[-1]


def implicit(
    params: Tree,
    hparams: Tree,
    fp_map: UpdateMap,
    outer_loss: OuterLoss,
    solver: Solver,
    set_grad: bool = True,
    stochastic: bool = False,
    outer_draws: int = 1,
    map_draws: int = 1,
) -> tuple[Tree, LinearSolve]:
    """The hypergradient at a fixed point of fp_map, and how its linear system was solved.

    params: the fixed point w, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    fp_map: (params, hparams) -> params of the same shapes, differentiable: inner gradients in it
        with create_graph=True.
    outer_loss: (params, hparams) -> scalar tensor.
    solver: solves (I - J^T) v = grad_w E, see linear_solvers.py.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    stochastic: whether fp_map is random and drawn anew for every product.
    outer_draws, map_draws: the numbers of draws that the outer gradients and the last product are
        averaged over.

    Returns a tree like hparams, and the LinearSolve. All implicit methods are this function with
    their own solver. fp_map runs once (if stochastic, for every product). It is differentiated once
    per iteration and once at the end, for the hyperparameters and the residual; modules in it keep
    their buffers. The distance of params from a fixed point is not checked: the error grows with
    |fp_map(w) - w|. (Pedregosa 2016, arXiv 1602.02355; Grazzi et al. 2020, 2006.16218.)

    Raises HypergradientError for invalid arguments, and if fp_map depends on no hyperparameter.
    Raises DivergenceError if the solution is worse than v = 0 and getting worse (a solver with
    on_divergence="warn" makes this a DivergenceWarning), if it is not finite, or if I - J^T
    vanishes on it; and whatever the solver raises.
    """
    on_divergence = _check_solver(solver)
    _check_count("outer_draws", outer_draws)
    _check_count("map_draws", map_draws)
    point = Point(params, hparams)
    b, direct = _mean([point.loss_gradients(outer_loss) for _ in range(outer_draws)])
    if not math.isfinite(norm(b)):
        raise DivergenceError("the gradient of the outer loss in params is not finite")
    jacobian = MapJacobian(point, fp_map, stochastic)
    adjoint = [jacobian.jvp] if getattr(solver, "needs_adjoint", False) else []
    v, residuals = solver.solve(jacobian.vjp, b, *adjoint)
    transposed, indirect = _mean([jacobian.vjp_by_both(v) for _ in range(map_draws)])
    require_dependence(jacobian.depends_on_hparams)
    if len(residuals) > 1 and all(map(torch.equal, v, transposed)) and norm(v) > 0:
        raise DivergenceError(
            "the map's Jacobian is 1 along the solution, so that I - J^T vanishes; are its inner "
            "gradients made with create_graph=True?"
        )
    rest = [g - t + p for g, t, p in zip(b, v, transposed, strict=True)]
    residuals = (*residuals, norm(rest))
    start = max(norm(b), residuals[0])
    refuse = hopeless(residuals[-1], start) if stochastic else solver.diverges(residuals, start)
    if refuse or (isinstance(solver, FixedPoint) and _stays(residuals, b)):
        report_divergence(
            f"the linear system (I - J^T) v = b diverges: residual {residuals[-1]:.3g} after "
            f"{len(residuals) - 1} iterations, {start:.3g} at v = 0; fp_map must be a contraction "
            f"for fixed_point, I - J symmetric positive definite for CG, regular for CG_normaleq",
            on_divergence if math.isfinite(residuals[-1]) else "raise",
        )
    gradient = point.delivered(torch._foreach_add(direct, indirect), set_grad)
    return gradient, LinearSolve(point.tree(v), residuals)


def fixed_point(
    params: Tree,
    hparams: Tree,
    K: int,
    fp_map: UpdateMap,
    outer_loss: OuterLoss,
    tol: float = 1e-10,
    set_grad: bool = True,
    stochastic: bool = False,
    on_divergence: str = "raise",
) -> Tree:
    """The hypergradient at a fixed point, by K iterations v <- J^T v + grad_w E.

    params: the fixed point w, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    K: the largest number of iterations, of which the first, v = grad_w E, takes no product; 0
        leaves v = 0, which gives grad_lambda E alone.
    fp_map: (params, hparams) -> params of the same shapes, differentiable: inner gradients in it
        with create_graph=True. It must be a contraction.
    outer_loss: (params, hparams) -> scalar tensor.
    tol: stop earlier if v changes by less.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    stochastic: whether fp_map is random and drawn anew for every product.
    on_divergence: "raise" a DivergenceError if the linear system is seen to diverge, or "warn" by a
        DivergenceWarning and use the result of K iterations.

    Returns a tree like hparams. The error falls at the contraction's rate, like that of K steps of
    `reverse`. Raises HypergradientError for invalid arguments and if fp_map depends on no
    hyperparameter, DivergenceError if the residual shows that fp_map is not a contraction. (Grazzi
    et al. 2020, arXiv 2006.16218.)
    """
    solver = FixedPoint(K, tol, on_divergence)
    return implicit(params, hparams, fp_map, outer_loss, solver, set_grad, stochastic)[0]


def neumann(
    params: Tree,
    hparams: Tree,
    K: int,
    fp_map: UpdateMap,
    outer_loss: OuterLoss,
    tol: float = 1e-10,
    set_grad: bool = True,
    on_divergence: str = "raise",
) -> Tree:
    """The hypergradient at a fixed point, by K terms of the Neumann series beyond the first.

    params: the fixed point w, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    K: the number of terms beyond the first, at least 0; the same as fixed_point with K + 1
        iterations.
    fp_map: (params, hparams) -> params of the same shapes, differentiable: inner gradients in it
        with create_graph=True. It must be a contraction.
    outer_loss: (params, hparams) -> scalar tensor.
    tol: stop earlier if v changes by less.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    on_divergence: "raise" a DivergenceError if the linear system is seen to diverge, or "warn" by a
        DivergenceWarning and use the result of K iterations.

    Returns a tree like hparams. Raises HypergradientError for invalid arguments and if fp_map
    depends on no hyperparameter, DivergenceError if the residual shows that fp_map is not a
    contraction. (Lorraine et al. 2020, arXiv 1911.02590.)
    """
    _check_count("K", K, least=0)
    solver = FixedPoint(K + 1, tol, on_divergence)
    return implicit(params, hparams, fp_map, outer_loss, solver, set_grad)[0]


def CG(  # noqa: N802 - HyperTorch's name
    params: Tree,
    hparams: Tree,
    K: int,
    fp_map: UpdateMap,
    outer_loss: OuterLoss,
    tol: float = 1e-10,
    set_grad: bool = True,
    stochastic: bool = False,
    on_divergence: str = "raise",
) -> Tree:
    """The hypergradient at a fixed point, by conjugate gradients on its linear system.

    params: the fixed point w, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    K: the largest number of iterations; 0 leaves v = 0, which gives grad_lambda E alone.
    fp_map: (params, hparams) -> params of the same shapes, differentiable: inner gradients in it
        with create_graph=True. With J its Jacobian with respect to params, I - J must be symmetric
        positive definite, as for a gradient step on a convex loss.
    outer_loss: (params, hparams) -> scalar tensor.
    tol: stop earlier if the residual |grad_w E - (I - J^T) v| is less.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    stochastic: whether fp_map is random and drawn anew for every product. Symmetry is
        then assumed.
    on_divergence: "raise" a DivergenceError if the linear system is seen to diverge, or "warn" by a
        DivergenceWarning and use the result of K iterations.

    Returns a tree like hparams. The error falls as (1 - 2 / sqrt(cond))^K. Raises
    HypergradientError for invalid arguments, if fp_map depends on no hyperparameter, and, from the
    second iteration on, if I - J is seen not to be symmetric; DivergenceError if it is seen not to
    be positive definite. (Hestenes and Stiefel 1952; Grazzi et al. 2020, arXiv 2006.16218.)
    """
    solver = ConjugateGradient(K, tol, assume_symmetric=stochastic, on_divergence=on_divergence)
    return implicit(params, hparams, fp_map, outer_loss, solver, set_grad, stochastic)[0]


def CG_normaleq(  # noqa: N802 - HyperTorch's name
    params: Tree,
    hparams: Tree,
    K: int,
    fp_map: UpdateMap,
    outer_loss: OuterLoss,
    tol: float = 1e-10,
    set_grad: bool = True,
    on_divergence: str = "raise",
) -> Tree:
    """The hypergradient at a fixed point, by conjugate gradients on the normal equations.

    params: the fixed point w, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    K: the largest number of iterations; 0 leaves v = 0, which gives grad_lambda E alone.
    fp_map: (params, hparams) -> params of the same shapes, differentiable: inner gradients in it
        with create_graph=True. It must be differentiable twice, and I - J regular.
    outer_loss: (params, hparams) -> scalar tensor.
    tol: stop earlier if the residual of the normal equations is less.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    on_divergence: "raise" a DivergenceError if the linear system is seen to diverge, or "warn" by a
        DivergenceWarning and use the result of K iterations.

    Returns a tree like hparams. Each iteration takes a product with J and one with J^T; the error
    falls as (1 - 2 / cond)^K. Raises HypergradientError for invalid arguments, if fp_map depends on
    no hyperparameter, and if matvecs with J and J^T contradict each other; DivergenceError if I - J
    is seen to be singular. (Bjorck 1996, Numerical methods for least squares problems, 7.4; Grazzi
    et al. 2020, arXiv 2006.16218.)
    """
    solver = NormalEquations(K, tol, on_divergence)
    return implicit(params, hparams, fp_map, outer_loss, solver, set_grad)[0]


def nystrom(
    params: Tree,
    hparams: Tree,
    K: int,
    fp_map: UpdateMap,
    outer_loss: OuterLoss,
    tol: float = 1e-10,
    set_grad: bool = True,
    rank: int = 10,
    generator: torch.Generator | None = None,
) -> Tree:
    """CG preconditioned by a randomized Nystrom approximation of I - J.

    params: the fixed point w, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    K: the largest number of iterations; 0 leaves v = 0, which gives grad_lambda E alone.
    fp_map: (params, hparams) -> params of the same shapes, differentiable: inner gradients in it
        with create_graph=True. With J its Jacobian with respect to params, I - J must be symmetric
        positive definite.
    outer_loss: (params, hparams) -> scalar tensor.
    tol: stop earlier if the residual |grad_w E - (I - J^T) v| is less.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    rank: of the approximation, which takes as many additional matvecs.
    generator: draws its random test matrix (default: a fixed seed).

    Returns a tree like hparams. It helps if few eigenvalues of I - J are large. Raises the same as
    CG. (Frangella, Tropp, Udell 2021, arXiv 2110.02820; Hataya and Yamada 2023, arXiv
    2302.09726.)
    """
    solver = NystromConjugateGradient(K, tol, rank, generator)
    return implicit(params, hparams, fp_map, outer_loss, solver, set_grad)[0]


def stoch_AID(  # noqa: N802 - HyperTorch's name
    params: Tree,
    hparams: Tree,
    outer_loss: OuterLoss,
    K: int,
    J_inner: int = 1,
    J_outer: int = 1,
    fp_map: UpdateMap | None = None,
    inner_loss: OuterLoss | None = None,
    linsys_start: Tree | None = None,
    stoch_outer: bool = False,
    stoch_inner: bool = False,
    optim_build: Callable[..., tuple[torch.optim.Optimizer, Any]] | None = None,
    opt_params: dict | None = None,
    set_grad: bool = True,
    verbose: bool = True,
    on_divergence: str = "raise",
) -> tuple[Tree, Tree]:
    """The hypergradient at a fixed point, by K steps of a torch optimiser on the linear system.

    params: the fixed point w, a list or other pytree of floating-point tensors of any shapes.
    hparams: the hyperparameters, a list or other pytree of floating-point tensors of any shapes,
        each with requires_grad, none given twice.
    outer_loss: (params, hparams) -> scalar tensor.
    K: the number of steps; 0 leaves v at its start.
    J_inner, J_outer: the numbers of draws that the last product and the outer gradients are
        averaged over; they need stoch_inner and stoch_outer.
    fp_map: (params, hparams) -> params of the same shapes, differentiable: inner gradients in it
        with create_graph=True. None if inner_loss is given.
    inner_loss: (params, hparams) -> scalar tensor; fp_map is then a gradient step on it of rate 1.
    linsys_start: the start of v, a tree like params, for example v of the last hypergradient
        (default: grad_w E).
    stoch_outer, stoch_inner: whether outer_loss, and fp_map or inner_loss, are drawn anew at each
        use.
    optim_build: (v, **opt_params) -> (optimiser, scheduler or None) (default: SGD of rate 1).
    opt_params: keyword arguments of optim_build.
    set_grad: whether to also add the result to each hyperparameter's .grad.
    verbose: whether to print the residual of some steps.
    on_divergence: "raise" a DivergenceError if the linear system is seen to diverge, or "warn" by a
        DivergenceWarning and use the result of K steps.

    Returns a tree like hparams, and v, a tree like params. Raises HypergradientError for invalid
    arguments and if fp_map depends on no hyperparameter, DivergenceError if the residual shows
    divergence. (Grazzi et al. 2022, arXiv 2202.03397, algorithm 1.)
    """
    if fp_map is None and inner_loss is None:
        raise HypergradientError("give fp_map or inner_loss")
    if (J_inner != 1 and not stoch_inner) or (J_outer != 1 and not stoch_outer):
        raise HypergradientError("J_inner needs stoch_inner, J_outer needs stoch_outer")
    _check_count("J_inner and J_outer", min(J_inner, J_outer))
    start = None
    if linsys_start is not None:
        start = Point(params, hparams).matching(linsys_start, "linsys_start")

    def progress(k: int, residual: float) -> None:
        if verbose and (k % max(1, K // 5) == 0 or k == K - 1):
            print(f"k={k}: |v - J^T v - grad_w E| = {residual:.3e}")

    solver = Optimizer(K, optim_build, opt_params or {}, start, progress, on_divergence)
    gradient, solve = implicit(
        params, hparams, fp_map or functools.partial(_gradient_step, inner_loss), outer_loss,
        solver, set_grad, stoch_inner, J_outer, J_inner,
    )  # fmt: skip
    return gradient, solve.solution


# ---- in a graph ----


def differentiable_by(
    method: Callable[..., Tree], **options
) -> Callable[[Callable[[Tree, Tree], Tree]], Callable[[Tree, Tree], Tree]]:
    """Decorate a solver(params, hparams) -> params so that its result has a gradient in hparams.

        @differentiable_by(CG, K=20, fp_map=phi)
        def solve(params, hparams): ...

    The solver may work in any way. It gets detached params (leaves that require a gradient if the
    originals did) and detached hparams, and its result is detached. No graph leads to hparams;
    inner optimisers build none at all if params require no gradient or create_graph is False.

    The backward pass is any method of this module with its options. Methods with update_maps start
    again from the solver's params, with the same random numbers from torch's global generators; all
    others take its result as the fixed point. The initial params get no gradient, and there are no
    second derivatives. In the backward pass, HypergradientError is raised if update_maps lead
    elsewhere than the solver did, and whatever the method raises.
    """

    def decorate(solver: Callable[[Tree, Tree], Tree]) -> Callable[[Tree, Tree], Tree]:
        @functools.wraps(solver)
        def solve(params: Tree, hparams: Tree) -> Tree:
            moment = Moment([t for t in tree_flatten(params)[0] if isinstance(t, Tensor)])
            with torch.enable_grad():
                result = solver(tree_map(_leaf, params), tree_map(_detached, hparams))
            leaves, spec = tree_flatten(result)
            solution = [t.detach() if t.requires_grad else t for t in leaves]
            again = "update_maps" in options
            start = params if again else tree_unflatten(solution, spec)

            def adjoint(cotangents: Sequence[Tensor]) -> list[Tensor]:
                def outer_loss(w: Tree, _: Tree) -> Tensor:
                    leaves = tree_flatten(w)[0]
                    if again:
                        _check_same_end(tree_flatten(start)[0], leaves, solution)
                    return sum((t * c).sum() for t, c in zip(leaves, cotangents, strict=True))

                with moment.repeated() if again else contextlib.nullcontext():
                    gradient = method(
                        params=start, hparams=hparams, outer_loss=outer_loss, set_grad=False,
                        **options,
                    )  # fmt: skip
                return tree_flatten(gradient)[0]

            attached = _Attached.apply(adjoint, solution, *tree_flatten(hparams)[0])
            return tree_unflatten(attached, spec)

        return solve

    return decorate


def _detached(entry: Any) -> Any:
    return entry.detach() if isinstance(entry, Tensor) else entry


def _leaf(entry: Any) -> Any:
    """The entry without its graph; a tensor requires a gradient if it did before."""
    wants = isinstance(entry, Tensor) and entry.requires_grad
    return entry.detach().requires_grad_() if wants else entry


def _check_same_end(
    start: Sequence[Tensor], end: Sequence[Tensor], solution: Sequence[Tensor]
) -> None:
    """Raises HypergradientError if update_maps do not end at the solver's result."""
    for before, after, solved in zip(start, end, solution, strict=True):
        rounding = 100 * torch.finfo(solved.dtype).eps * solved.norm()
        if (after.detach() - solved).norm() > 1e-2 * (solved - before.detach()).norm() + rounding:
            raise HypergradientError(
                "update_maps lead elsewhere than the solver did: they must be its own steps, "
                "beginning at its params, each with its batch"
            )


class _Attached(torch.autograd.Function):
    """A solution whose backward pass is adjoint(cotangents), the hyperparameters' gradients."""

    @staticmethod
    def forward(ctx, adjoint, solution, *hparams):
        ctx.adjoint = adjoint
        ctx.save_for_backward(*hparams)
        return tuple(t.detach() for t in solution)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        _ = ctx.saved_tensors  # raises if a hyperparameter was changed in place since
        return None, None, *ctx.adjoint(cotangents)


# ---- helpers ----


def _check_count(what: str, count: int, least: int = 1) -> None:
    try:
        whole = operator.index(count)
    except TypeError:
        whole = -1
    if whole < least:
        raise HypergradientError(
            f"{what} must be a whole number of at least {least}, got {count!r}"
        )


def _check_solver(solver: Solver) -> str:
    """The solver's on_divergence; raises HypergradientError if one of its options is invalid."""
    _check_count("K", solver.iterations, least=0)
    _check_count("rank", getattr(solver, "rank", 1))
    if not getattr(solver, "tol", 0.0) >= 0:
        raise HypergradientError(f"tol must be at least 0, got {solver.tol}")
    on_divergence = getattr(solver, "on_divergence", "raise")
    if on_divergence not in ON_DIVERGENCE:
        raise HypergradientError(f"on_divergence is raise or warn, not {on_divergence!r}")
    return on_divergence


def _stays(residuals: Sequence[float], b: Sequence[Tensor]) -> bool:
    """Whether the residual has stopped falling, at a level that is not a rounding error."""
    resolution = max(1e-9, *(8 * torch.finfo(t.dtype).eps for t in b))
    last = residuals[-3:]
    level = max(last) > 1e-3 * residuals[0]
    return len(residuals) > 4 and level and max(last) - min(last) <= resolution * max(last)


def _mean(draws: list[tuple[list[Tensor], list[Tensor]]]) -> list[list[Tensor]]:
    """The means over draws of both lists of tensors."""
    if len(draws) == 1:
        return list(draws[0])
    return [
        [sum(tensors) / len(draws) for tensors in zip(*lists, strict=True)]
        for lists in zip(*draws, strict=True)
    ]


def _trajectory(
    params: Tree, hparams: Tree, segments: Sequence[Sequence[UpdateMap]]
) -> tuple[list[Tree], Tree, list[UpdateMap]]:
    """The params at the start and after each segment, hparams, and each segment as one map."""
    history, chains = [params], []
    for segment in segments:
        moment = Moment(Point(params, hparams).params)
        chains.append(functools.partial(_repeated, segment, moment))
        history.append(advance(history[-1], hparams, segment))
    return history, hparams, chains


def _repeated(
    update_maps: Sequence[UpdateMap], moment: Moment, params: Tree, hparams: Tree
) -> Tree:
    """The params after these updates, run with the random numbers and precision of that moment."""
    with moment.repeated():
        for update in update_maps:
            params = update(params, hparams)
    return params


def _check_repeated(elsewhere: Sequence[Tensor]) -> None:
    """Raises HypergradientError if any of these updates, in order, has led elsewhere."""
    steps = [number for number, step in enumerate(elsewhere) if bool(step)]
    if steps:
        raise HypergradientError(
            f"update {steps[0]} leads from its state to another than the next one: what runs "
            "again must do the same, each map with its batch, not an iterator, and without random "
            "numbers of its own"
        )


def _gradient_step(loss: OuterLoss, params: Tree, hparams: Tree) -> Tree:
    leaves, spec = tree_flatten(params)
    gradient = vjp([loss(params, hparams)], leaves, [None], create_graph=True)
    return tree_unflatten(torch._foreach_sub(leaves, gradient), spec)


def _pushed_one_by_one(
    point: Point, update: UpdateMap, tangents: list[Tensor] | None, directions: list[Tensor]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The update's result and its derivatives along directions [n, ...], by dual numbers.

    tangents: of params, [n, ...] each; None if they depend on no hyperparameter.
    """
    moment, results, pushed = Moment(point.params), [], []
    for k in range(len(directions[0])):
        again = moment.repeated() if results else contextlib.nullcontext()
        with again, forward_ad.dual_level(), torch.enable_grad():
            params, hparams = point.params, [h.detach() for h in point.hparams]
            if tangents is not None:
                params = point.with_frozen(_duals(params, tangents, k))
            result = update(point.tree(params), point.hparams_tree(_duals(hparams, directions, k)))
            moved = [forward_ad.unpack_dual(t) for t in point.matching(result, "the map's result")]
            results.append(point.detached([primal for primal, _ in moved]))
            pushed.append([None if z is None else z.detach() for _, z in moved])
    _check_repeated([point.leads_elsewhere(results[-1], point.tree(results[0]))])
    if all(z is None for along in pushed for z in along):
        return results[0], None
    columns = [
        torch.stack([torch.zeros_like(p) if z is None else z for z in column])
        for p, column in zip(results[0], zip(*pushed, strict=True), strict=True)
    ]
    return results[0], columns


def _duals(leaves: Sequence[Tensor], tangents: Sequence[Tensor], k: int) -> list[Tensor]:
    pairs = zip(leaves, tangents, strict=True)
    return [forward_ad.make_dual(t, tangent[k]) for t, tangent in pairs]


def _pushed_at_once(
    point: Point, update: UpdateMap, tangents: list[Tensor] | None, directions: list[Tensor]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The same as `_pushed_one_by_one`, by a vectorized torch.func.jvp."""
    primals = [t.detach() for t in point.params], [t.detach() for t in point.hparams]
    zeros = [p.new_zeros(len(directions[0]), *p.shape) for p in point.params]

    def function(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        result = update(point.tree(point.with_frozen(params)), point.hparams_tree(hparams))
        return point.matching(result, "the map's result")

    push = torch.func.vmap(
        lambda z, d: torch.func.jvp(function, primals, (z, d)),
        out_dims=(None, 0),
        randomness="same",
    )
    new, pushed = push(zeros if tangents is None else tangents, directions)
    if tangents is None and not any(bool(z.any()) for z in pushed):  # at this point, or at all
        one = [d[:1] for d in directions]
        if _pushed_one_by_one(point, update, None, one)[1] is None:
            return point.detached(new), None
    return point.detached(new), pushed
