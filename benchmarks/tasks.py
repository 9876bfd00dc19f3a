"""Tasks of one process: one after the other, or batched by torch.func.vmap.

    python benchmarks/tasks.py                   # one thread, under a minute
    python benchmarks/tasks.py --tasks 8 --units 8 32

One update of the polynomial rule, forward and backward, of several tasks, each with parameters and
batches of its own and the same coefficients. Batched means that nothing could be written by hand:
the update must be plain operations (as below: terms factored as in kernels/local_polynomial.py).

    plain    the plain update, task by task
    vmap     the same, all tasks at once
    ours     learning_rules.py, task by task: what `--tasks T` does

The three take turns; times are milliseconds of all tasks, ratios medians over the repetitions.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.func import vmap

from experiment.command_line import keep_freed_memory
from learning_rules import PolynomialRule
from models_fully_local import Activation, lateral_mlp

INPUTS, INH_STEPS, INH_FACTOR, SLOPE = 784, 10, 0.2, 4.0


def factored_sum(exponents, psi: Tensor, p: Tensor, q, weight: Tensor) -> Tensor:
    """sum_k psi_k mean_b( p_bj^a_k prod_u q_u[b,i]^c_ku ) w_ij^e_k, one product for each (a, e)."""
    groups: dict[tuple[int, int], list] = defaultdict(list)
    for number, (a, *powers, e) in enumerate(exponents):
        groups[a, e].append((number, powers))
    total = torch.zeros_like(weight)
    for (a, e), terms in groups.items():
        combined = torch.zeros_like(q[0])
        for number, powers in terms:
            monomial = psi[number]
            for variable, power in zip(q, powers, strict=True):
                monomial = monomial * variable**power if power else monomial
            combined = combined + monomial
        total = total + combined.T @ p**a * weight**e / len(p)
    return total


def plain_update(rule: PolynomialRule, psi: dict[str, Tensor], w, b, m, x) -> tuple[Tensor, ...]:
    """The rule's update of one layer in plain operations, tanh-bounded."""
    s = x @ w.T + b
    y = torch.sigmoid(SLOPE * s)
    for _ in range(INH_STEPS):
        y = y + INH_FACTOR * (torch.sigmoid(SLOPE * (s + y @ m.T)) - y)
    ones = torch.ones_like(x[:, :1])
    of_b = [(0, *term) for term in rule.exponents["b"]]
    changes = (
        factored_sum(rule.exponents["w"], psi["w"], x, (s, y), w),
        factored_sum(of_b, psi["b"], ones, (y,), b[:, None])[:, 0],
        factored_sum(rule.exponents["m"], psi["m"], y, (y,), m)
        + psi["diagonal"] * torch.eye(len(m)),
    )
    size = rule.bound_size
    return tuple(t + size * torch.tanh(d / size) for t, d in zip((w, b, m), changes, strict=True))


def ways(tasks: int, units: int, batch: int) -> dict:
    """The three things to time, by name; each returns its new parameters."""
    generator = torch.Generator().manual_seed(0)
    rule = PolynomialRule.of_degree(3, bound="tanh")
    for p in rule.parameters():
        torch.nn.init.normal_(p, std=1e-4, generator=generator)
    shapes = {"w": (units, INPUTS), "b": (units,), "m": (units, units)}
    start = {
        n: (0.05 * torch.randn(tasks, *s, generator=generator)).requires_grad_()
        for n, s in shapes.items()
    }
    x = torch.rand(tasks, batch, INPUTS, generator=generator)
    psi = dict(rule.named_parameters())
    model = lateral_mlp(
        INPUTS, [units], Activation("sigmoid", SLOPE), inh_steps=INH_STEPS, inh_factor=INH_FACTOR
    )

    def ours():
        news = [
            rule.update(model, [{}, {n: t[k] for n, t in start.items()}], x[k])[1]
            for k in range(tasks)
        ]
        return tuple(torch.stack([new[n] for new in news]) for n in shapes)

    def plain():
        news = [
            plain_update(rule, psi, *(t[k] for t in start.values()), x[k]) for k in range(tasks)
        ]
        return tuple(map(torch.stack, zip(*news, strict=True)))

    def batched():
        return vmap(lambda w, b, m, x: plain_update(rule, psi, w, b, m, x))(*start.values(), x)

    leaves = [*rule.parameters(), *start.values()]

    def with_gradient(update):
        def run() -> list[Tensor]:
            new = update()
            loss = sum(tensor.square().sum() for tensor in new)
            return [*new, *torch.autograd.grad(loss, leaves)]

        return run

    return {"plain": with_gradient(plain), "vmap": with_gradient(batched),
            "ours": with_gradient(ours)}  # fmt: skip


def milliseconds(run) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    """Prints one row per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--units", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"{arguments.tasks} tasks, {INPUTS} inputs, degree 3, {arguments.threads} thread(s), "
          f"median of {arguments.repeat}, torch {torch.__version__}")  # fmt: skip
    print(f"{'units':>6} {'batch':>6} {'plain':>8} {'vmap':>8} {'ours':>8} {'plain/vmap':>11} "
          f"{'vmap/ours':>10}")  # fmt: skip
    for units in arguments.units:
        for batch in arguments.batch_sizes:
            timed = ways(arguments.tasks, units, batch)
            expected = timed["ours"]()
            for run in timed.values():
                for ours, theirs in zip(expected, run(), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
            rows = [{n: milliseconds(run) for n, run in timed.items()}
                    for _ in range(arguments.repeat)]  # fmt: skip
            times = {n: statistics.median(row[n] for row in rows) for n in timed}
            gain = statistics.median(row["plain"] / row["vmap"] for row in rows)
            ahead = statistics.median(row["vmap"] / row["ours"] for row in rows)
            print(f"{units:6} {batch:6} " + " ".join(f"{t:8.2f}" for t in times.values())
                  + f" {gain:11.2f} {ahead:10.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
