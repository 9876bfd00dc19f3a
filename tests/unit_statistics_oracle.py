"""The rules with unit statistics as plain as they are written: one product per term.

Every quantity is computed literally, for each view, and autograd gives the gradients: slow, and
obviously right. Terms are read from their texts by a few lines of their own.
"""

import math
import re

import torch
from oracles import SIGMAS, layer_response
from torch import Tensor

SENDING = ("x", "y_j", "c_j", "z_j")
VARYING = ("s", "y", "gain", "c", "z", "r", "r_cov", "r_exact", "r_cross", "share", "won",
           "signal")  # fmt: skip


def powers_of(text: str) -> list[tuple[str, float]]:
    powers = []
    for factor in text.split():
        name, _, power = factor.partition("^")
        top, _, bottom = power.partition("/")
        name = name.replace("_i", "")
        if name != "1":
            powers.append((name, float(top or 1) / float(bottom or 1)))
    return powers


def off(matrix: Tensor) -> Tensor:
    return matrix * (1 - torch.eye(len(matrix), dtype=matrix.dtype))


def running(rule, old, name: str, batch: Tensor, state: dict) -> Tensor:
    rho = rule.number(f"rho_{name}")
    new = old[name] + rho * (batch - old[name]) if name in old else batch
    state[name] = new
    return new


def statistics(rule, old, y, state) -> dict[str, Tensor]:
    """Pooled over batch and views; c, z per view are in the lists of these names."""
    both = torch.cat(list(y))
    count = len(both)
    mean = running(rule, old, "mean", both.mean(0), state)
    square = running(rule, old, "square", (both**2).mean(0), state)
    c = [v - mean for v in y]
    var = running(rule, old, "var", (torch.cat(c) ** 2).mean(0), state) + 1e-4
    z = [v / var.sqrt() for v in c]
    cov = running(rule, old, "cov", off(sum(v.T @ v for v in c) / count), state)
    corr = running(rule, old, "corr", off(sum(v.T @ v for v in z) / count), state)
    values = {"mean": mean, "square": square, "var": var, "c": c, "z": z, "cov": cov, "corr": corr}
    if len(y) == 2:
        across = off((z[0].T @ z[1] + z[1].T @ z[0]) / count)
        values["cross"] = running(rule, old, "cross", across, state)
    return values


def quantity(name: str, view: int, layer, x, s, y, known, signal) -> Tensor:
    if name.endswith("'"):
        return quantity(name[:-1], 1 - view, layer, x, s, y, known, signal)
    name = name.removesuffix("_j")
    if name in ("x", "s", "y"):
        return {"x": x, "s": s, "y": y}[name][view]
    if name == "signal":
        return signal
    if name == "gain":
        slope, base = layer.activation.slope, SIGMAS[layer.activation.base]
        (slopes,) = torch.autograd.grad(
            base(slope * s[view]).sum(), s[view], create_graph=True, allow_unused=True
        )
        return slopes
    if name in ("share", "won"):
        exponentials = (known["beta"] * s[view]).exp()
        share = exponentials / exponentials.sum(1, keepdim=True)
        largest = s[view] == s[view].max(1, keepdim=True).values
        return share if name == "share" else torch.where(largest, share, -share)
    c, z = known["c"][view], known["z"][view]
    if name in ("c", "z"):
        return {"c": c, "z": z}[name]
    if name == "r_cov":
        return known["lateral"] * (c @ known["cov"])
    if name == "r_cross":
        return known["lateral"] * (known["z"][1 - view] @ known["cross"])
    r = known["lateral"] * (z @ known["corr"])
    if name == "r":
        return r
    own = known["lateral"] * (known["corr"] ** 2).sum(1)
    return (r - z * own) / known["var"].sqrt()


def change(terms, psi, own, one_sent, layer, x, s, y, known, signal) -> Tensor:
    """sum_k psi_k mean_b(term_k, both views) of a parameter own [out, in].

    one_sent: the parameter is a weight of a constant input 1.
    """
    total, batch = 0 * own, len(y[0])
    for coefficient, text in zip(psi, terms, strict=True):
        powers = powers_of(text)
        factor = torch.ones_like(own)
        for name, power in powers:
            if name in ("mean", "square", "var"):
                factor = factor * (known[name] ** power)[:, None]
            elif name in ("w", "b", "m"):
                factor = factor * own**power
        varying = [(n, p) for n, p in powers if n.rstrip("'") in VARYING or n in SENDING]
        mean = torch.ones_like(own)
        if varying:
            mean = torch.zeros_like(own)
            for view in range(len(y)):
                sending = torch.ones(batch, own.shape[1], dtype=own.dtype)
                receiving = torch.ones(batch, own.shape[0], dtype=own.dtype)
                for name, power in varying:
                    if name in SENDING and one_sent:
                        continue
                    value = quantity(name, view, layer, x, s, y, known, signal) ** power
                    if name in SENDING:
                        sending = sending * value
                    else:
                        receiving = receiving * value
                mean = mean + torch.einsum("bi,bj->ij", receiving, sending) / batch
        total = total + coefficient * factor * mean
    return total


def scaled(rule, group: str, units: int) -> Tensor:
    psi = getattr(rule, group)
    return psi * (units / 32) ** rule.exponents[group] if group in rule.exponents else psi


def changes(rule, layer, old, x, s, y, state) -> dict[str, Tensor]:
    known = statistics(rule, old, y, state) | {"beta": rule.number("beta")}
    known["lateral"] = (len(old["b"]) / 32) ** rule.start["lateral_power"]
    signal = rule.signal(x).reshape(-1, 1) if rule.signal else None
    seen = (layer, x, s, y, known, signal)
    units, texts = len(old["b"]), {g: list(map(str, terms)) for g, terms in rule.terms.items()}
    of_w, of_b = scaled(rule, "w", units), scaled(rule, "b", units)
    delta = {"w": change(texts["w"], of_w, old["w"], False, *seen)}
    bias = old["b"][:, None]
    if rule.bias_like_w:
        with_x = [k for k, text in enumerate(texts["w"]) if text.split()[0][0] == "x"]
        terms = [re.sub(r"\bw\b", "b", texts["w"][k]) for k in with_x]
        delta["b"] = change(terms, of_w[with_x], bias, True, *seen)[:, 0]
    else:
        delta["b"] = change(texts["b"], of_b, bias, False, *seen)[:, 0]
    if "m" in old and texts["m"]:
        delta["m"] = change(texts["m"], scaled(rule, "m", units), old["m"], False, *seen)
    return delta


def layer_update(rule, layer, old, x, s, y) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    delta = changes(rule, layer, old, x, s, y, state)
    t = old.get("updates", torch.zeros((), dtype=old["w"].dtype))
    rate = rule.number("eta") / (1 + t / rule.number("tau"))
    if rule.exponents:
        units, fan_in = old["w"].shape
        rate = rate * (units / 32) ** rule.exponents["units"]
        rate = rate * (fan_in / 784) ** rule.exponents["fan_in"]
    new = dict(old)
    for group, change_of_group in delta.items():
        by = delta["m"] if group == "m" else delta["w"]
        divisor = torch.ones(len(by), dtype=by.dtype)
        if rule.step == "rms":
            divisor = ((by**2).mean(1) + rule.number("eps") ** 2).sqrt()
        step = change_of_group / (divisor if group == "b" else divisor[:, None])
        decay = 0 if group == "b" else rule.number("decay")
        new[group] = old[group] + rate * step - rate * decay * old[group]
    if "m" in delta:
        new["m"] = layer.constrain(new["m"])
    if math.isfinite(rule.start["tau"]):
        new["updates"] = t + 1
    kept = [name for name in state if rule.start[f"rho_{name}"] < 1]
    return new | {name: state[name] for name in kept}


def update(rule, model, params, batch) -> list[dict[str, Tensor]]:
    """One update of a whole model by a rule that its layers share."""
    views, new = list(batch) if isinstance(batch, tuple) else [batch], []
    for layer, old in zip(model.layers, params, strict=True):
        if not old:
            views = [layer(view, old) for view in views]
            new.append({})
            continue
        s, y = zip(*(layer_response(layer, old, view) for view in views), strict=True)
        new.append(layer_update(rule, layer, old, views, s, y))
        views = list(y)
    return new
