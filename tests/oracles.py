"""The formulas of the learning rules and of the lateral dynamics, as plain as they are written.

    dw_ij = sum_{(a,c,d,e) in E_w} psi_acde * mean_b( x_bj^a s_bi^c y_bi^d ) * w_ij^e
    db_i  = sum_{(d,e) in E_b}     psi_de   * mean_b( y_bi^d ) * b_i^e
    dm_ij = sum_{(d1,d2,e) in E_m} psi      * mean_b( y_bj^d1 y_bi^d2 ) * m_ij^e + psi_diag [i = j]
    new   = old + bound(delta) - l2 * old

One product per monomial, one line per term, autograd for the gradients: slow, and obviously right.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from hypergradients import strategies

DOUBLE = torch.float64


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal noise of its own for each seed, float64, that asks for its gradient."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=DOUBLE)
    return (scale * noise).requires_grad_()


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    """Equal shapes, and no entry off by more than `relative` of the largest one expected."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        scale = expected.detach().abs().max().item()
        error = (actual - expected).detach().abs().max().item()
        assert error <= relative * max(scale, 1e-3), f"off by {error:.3g} of {scale:.3g}"


def gradients(value: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar, 0 where it does not depend on a variable."""
    found = torch.autograd.grad(value, list(variables), allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)]


def weighted_sum(tensors: Sequence[Tensor], seed: int = 7) -> Tensor:
    """A scalar whose gradient with respect to each entry of the tensors is a number of its own."""
    return sum((normal(seed + k, *t.shape).detach().to(t) * t).sum() for k, t in enumerate(tensors))


def perturb_in_all_directions(
    patch: pytest.MonkeyPatch, hparams: Sequence[Tensor], unrolls: int = 1
) -> int:
    """Has evolution strategies perturb by orthogonal directions; returns how many pairs these are.

    Over all of them the mean of e e^T is sigma^2 I, as it is for normal noise in expectation: an
    estimate is then the mean of all estimates, up to O(sigma^2), with hardly any pairs. Each row of
    an orthogonal matrix is one pair's perturbations, one unroll after the other.
    """
    sizes = [h.numel() for h in hparams]
    pairs = unrolls * sum(sizes)
    rows = torch.linalg.qr(normal(0, pairs, pairs).detach())[0] * pairs**0.5
    of_unrolls = rows.split(sum(sizes), 1)
    noise = iter([part for rows in of_unrolls for row in rows for part in row.split(sizes)])
    patch.setattr(
        strategies, "_normal", lambda like, sigma, generator: sigma * next(noise).view(like.shape)
    )
    return pairs


# ---- sums of monomials ----


def monomial_sum(exponents, psi, weight, presynaptic, postsynaptic) -> Tensor:
    """sum_k psi_k mean_b( prod_v p_v[b,j]^a_kv  prod_u q_u[b,i]^c_ku ) w_ij^e_k."""
    batch = len(postsynaptic[0])
    delta = 0 * weight
    for coefficient, term in zip(psi, exponents, strict=True):
        sending = weight.new_ones(batch, weight.shape[1])
        receiving = weight.new_ones(batch, weight.shape[0])
        for p, power in zip(presynaptic, term[: len(presynaptic)], strict=True):
            sending = sending * p**power
        for q, power in zip(postsynaptic, term[len(presynaptic) : -1], strict=True):
            receiving = receiving * q**power
        mean = torch.einsum("bj,bi->ij", sending, receiving) / batch
        delta = delta + coefficient * mean * weight ** term[-1]
    return delta


def delta_w(terms, psi, x, s, y, w) -> Tensor:
    delta = 0 * w
    for coefficient, (a, c, d, e) in zip(psi, terms, strict=True):
        delta = delta + coefficient * _mean_of_products(x**a, s**c * y**d) * w**e
    return delta


def delta_b(terms, psi, y, b) -> Tensor:
    delta = 0 * b
    for coefficient, (d, e) in zip(psi, terms, strict=True):
        delta = delta + coefficient * (y**d).mean(0) * b**e
    return delta


def delta_m(terms, psi, diagonal, y, m) -> Tensor:
    delta = 0 * m
    for coefficient, (d1, d2, e) in zip(psi, terms, strict=True):
        delta = delta + coefficient * _mean_of_products(y**d1, y**d2) * m**e
    return delta + sum(diagonal) * torch.eye(len(m), dtype=m.dtype, device=m.device)


def pair_delta_w(terms, psi, x, s, y, w) -> Tensor:
    delta = 0 * w
    for coefficient, (a1, c1, d1, a2, c2, d2, e) in zip(psi, terms, strict=True):
        sending = x[0] ** a1 * x[1] ** a2
        receiving = s[0] ** c1 * y[0] ** d1 * s[1] ** c2 * y[1] ** d2
        delta = delta + coefficient * _mean_of_products(sending, receiving) * w**e
    return delta


def pair_delta_b(terms, psi, y, b) -> Tensor:
    delta = 0 * b
    for coefficient, (d1, d2, e) in zip(psi, terms, strict=True):
        delta = delta + coefficient * (y[0] ** d1 * y[1] ** d2).mean(0) * b**e
    return delta


def pair_delta_m(terms, psi, diagonal, y, m) -> Tensor:
    delta = 0 * m
    for coefficient, (j1, i1, j2, i2, e) in zip(psi, terms, strict=True):
        sending, receiving = y[0] ** j1 * y[1] ** j2, y[0] ** i1 * y[1] ** i2
        delta = delta + coefficient * _mean_of_products(sending, receiving) * m**e
    return delta + sum(diagonal) * torch.eye(len(m), dtype=m.dtype, device=m.device)


def _mean_of_products(sending: Tensor, receiving: Tensor) -> Tensor:
    """[out, in]: the mean over the batch of receiving_bi sending_bj."""
    return torch.einsum("bi,bj->ij", receiving, sending) / len(sending)


# ---- layers ----

SIGMAS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda u: u,
}


def lateral_loop(s, m, sigma, steps: int, factor: float) -> Tensor:
    """y_0 = sigma(s);  y_{j+1} = y_j + f (sigma(s + y_j m^T) - y_j)."""
    y = sigma(s)
    for _ in range(steps):
        y = y + factor * (sigma(s + y @ m.T) - y)
    return y


def layer_response(layer, params, x) -> tuple[Tensor, Tensor]:
    """s and y of one layer."""
    base, slope = SIGMAS[layer.activation.base], layer.activation.slope
    s = x @ params["w"].T + params["b"]
    if layer.inhibition == "lateral":
        return s, lateral_loop(
            s, params["m"], lambda u: base(slope * u), layer.inh_steps, layer.inh_factor
        )
    y = base(slope * s)
    if layer.inhibition == "l1":
        y = y / (1e-6 + y.abs().sum(1, keepdim=True))
    if layer.inhibition == "l2":
        y = y / (1e-6 + y.square().sum(1, keepdim=True).sqrt())
    return s, y


# ---- a rule's update ----


def bounded_step(rule, old: Tensor, delta: Tensor) -> Tensor:
    c = rule.bound_size
    if rule.bound == "tanh":
        delta = c * torch.tanh(delta / c)
    elif rule.bound == "clamp":
        delta = torch.clamp(delta, -c, c)
    return old + delta - rule.l2 * old


def layer_update(rule, layer, old, x, s, y) -> dict[str, Tensor]:
    """New parameters of one layer; x, s, y are tensors, or pairs of them for a pair rule."""
    of_w, of_b, of_m = (
        (delta_w, delta_b, delta_m)
        if rule.views == 1
        else (pair_delta_w, pair_delta_b, pair_delta_m)
    )
    w = bounded_step(rule, old["w"], of_w(rule.exponents["w"], rule.w, x, s, y, old["w"]))
    new = {
        "w": torch.clamp(w, -rule.forward_weight_bound, rule.forward_weight_bound),
        "b": bounded_step(rule, old["b"], of_b(rule.exponents["b"], rule.b, y, old["b"])),
    }
    if "m" in old:
        delta = of_m(rule.exponents["m"], rule.m, rule.diagonal, y, old["m"])
        m = bounded_step(rule, old["m"], delta)
        if layer.forbid_self_inhibition:
            m = m * (1 - torch.eye(len(m), dtype=m.dtype, device=m.device))
        if layer.forbid_excitation:
            m = torch.clamp(m, max=0)
        new["m"] = m
    return new


def update(rules, model, params, batch) -> list[dict[str, Tensor]]:
    """One update of a whole model: every layer sees what it saw with the old parameters."""
    paired = isinstance(batch, tuple)
    views, rules, new = list(batch) if paired else [batch], iter(rules), []
    for layer, old in zip(model.layers, params, strict=True):
        if not old:
            views = [layer(view, old) for view in views]
            new.append({})
            continue
        s, y = zip(*(layer_response(layer, old, view) for view in views), strict=True)
        x = views
        seen = (x, s, y) if paired else (x[0], s[0], y[0])
        new.append(layer_update(next(rules), layer, old, *seen))
        views = list(y)
    return new
