"""Times one update of the polynomial rule, forward and backward, per inner step.

    python benchmarks/rule_update.py                  # one thread, about a minute
    python benchmarks/rule_update.py --threads 2 --repeat 9 --units 32 256 1024 --kinds single

obvious: one product per monomial, plain autograd, each step checkpointed (tests/oracles.py).
limit: nothing but the matrix products that no formulation can avoid, on the same batches:
    forward  x w^T, one product with the x of each group of terms (those with the same powers of x
    and of w; 3 of them, 4 for pairs), J of y m^T, one product with the y of each group of lateral
    terms; backward twice those of m and y, and as many as forward with x, which needs no gradient.
The three take turns; times and ratios are medians over the repetitions.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracles

from experiment.command_line import keep_freed_memory
from learning_rules import PolynomialPairRule, PolynomialRule
from models_fully_local import Activation, lateral_mlp

INPUTS, BATCH, INH_STEPS = 784, 1024, 10
STEPS = {"obvious": 2, "ours": 10, "limit": 10}
KINDS = {"single": PolynomialRule, "pairs": PolynomialPairRule}


def unrolled(update, start, batches, rule, recompute: bool):
    """Runs `update` on each batch and differentiates the sum of squares of what comes out."""

    def run() -> None:
        params = start
        for batch in batches:
            if recompute:
                params = checkpoint(update, params, batch, use_reentrant=False)
            else:
                params = update(params, batch)
        loss = sum(p.square().sum() for p in params[1].values())
        torch.autograd.grad(loss, [*rule.parameters(), *start[1].values()], allow_unused=True)

    return run


def products_alone(units: int, rule: PolynomialRule, batches):
    """The matrix products of `len(batches)` steps and no more."""
    w, m = torch.rand(units, INPUTS), torch.rand(units, units)
    t = torch.rand(BATCH, units)
    groups = {"w": set(), "m": set()}
    for name, sending in (("w", 1), ("m", 1)):
        for term in rule.exponents[name]:
            per_view = len(term) // rule.views
            views = [term[v * per_view :][:per_view] for v in range(rule.views)]
            incoming = tuple(view[:sending] for view in views)
            if any(map(any, incoming)) and any(any(view[sending:per_view]) for view in views):
                groups[name].add((incoming, term[-1]))
    with_x, with_y = rule.views + len(groups["w"]), len(groups["m"])

    def run() -> None:
        for x in batches:
            x = x if rule.views == 1 else x[0]
            for _ in range(with_x):
                torch.mm(x, w.t())
                torch.mm(t.t(), x)
            for _ in range(2 * INH_STEPS * rule.views + 2 * with_y):
                torch.mm(t, m)
            for _ in range(INH_STEPS * rule.views + with_y):
                torch.mm(t.t(), t)

    return run


def ways(kind: str, units: int) -> dict:
    """The three things to time, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    def batch():
        views = tuple(torch.rand(BATCH, INPUTS, generator=generator) for _ in range(rule.views))
        return views if rule.views == 2 else views[0]

    model = lateral_mlp(INPUTS, [units], Activation("sigmoid", 4.0), inh_factor=0.2)
    rule = KINDS[kind].of_degree(3, bound="tanh", forward_weight_bound=1.0)
    for psi in rule.parameters():
        torch.nn.init.normal_(psi, std=1e-4, generator=generator)
    layer = {"w": normal(units, INPUTS, scale=INPUTS**-0.5), "b": normal(units, scale=0.1)}
    start = [{}, layer | {"m": normal(units, units, scale=0.01)}]
    batches = [batch() for _ in range(max(STEPS.values()))]

    def ours(params, batch):
        return rule.update(model, params, batch)

    def obvious(params, batch):
        return oracles.update([rule], model, params, batch)

    some = {name: batches[:steps] for name, steps in STEPS.items()}
    return {
        "obvious": unrolled(obvious, start, some["obvious"], rule, recompute=True),
        "ours": unrolled(ours, start, some["ours"], rule, recompute=False),
        "limit": products_alone(units, rule, some["limit"]),
    }


def main() -> None:
    """Prints one row per layer size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"ms per step, {INPUTS} inputs, batch {BATCH}, degree 3, {args.threads} thread(s), "
          f"median of {args.repeat}")  # fmt: skip
    print(f"{'kind':>6} {'units':>6} {'obvious':>9} {'ours':>8} {'limit':>8} {'obvious/ours':>13} "
          f"{'ours/limit':>11}")  # fmt: skip
    for kind, units in itertools.product(args.kinds, args.units):
        timed = ways(kind, units)
        for run in timed.values():
            run()
        rows = [{n: _milliseconds(run) / STEPS[n] for n, run in timed.items()}
                for _ in range(args.repeat)]  # fmt: skip
        obvious, ours, limit = (statistics.median(r[n] for r in rows) for n in STEPS)
        faster = statistics.median(r["obvious"] / r["ours"] for r in rows)
        above = statistics.median(r["ours"] / r["limit"] for r in rows)
        print(f"{kind:>6} {units:6} {obvious:9.1f} {ours:8.2f} {limit:8.2f} {faster:13.1f} "
              f"{above:11.2f}")  # fmt: skip


def _milliseconds(run) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
