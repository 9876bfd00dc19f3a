"""Times one update of the polynomial rule, forward and backward, per inner step.

    python benchmarks/rule_update.py                  # one thread, about a minute
    python benchmarks/rule_update.py --threads 2 --repeat 9 --units 32 256 1024 --kinds single

obvious: one product per monomial, plain autograd, each step checkpointed (tests/oracles.py).
limit: only the matrix products that no formulation can avoid, on the same batches:
    forward  x w^T, one product with the x of each group of terms (those with the same powers of x
    and of w; 3 of them, 4 for pairs), J of y m^T, one product with the y of each group of lateral
    terms; backward twice those of m and y, and as many as forward with x, which needs no gradient.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracles

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_int, run_command
from learning_rules import PolynomialPairRule, PolynomialRule
from models_fully_local import Activation, lateral_mlp

INPUTS, BATCH, INH_STEPS = 784, 1024, 10
STEPS = {"obvious": 2, "ours": 10, "limit": 10}
KINDS = {"single": PolynomialRule, "pairs": PolynomialPairRule}


def unrolled(update, start, batches, rule, recompute: bool):
    """A function that runs `update` on each batch and differentiates the sum of squared results."""

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


def products_alone(units: int, rule: PolynomialRule, batches, device: torch.device):
    """A function that computes only the matrix products of `len(batches)` steps."""
    shapes = (units, INPUTS), (units, units), (BATCH, units)
    w, m, t = (torch.rand(shape, device=device) for shape in shapes)
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


def ways(kind: str, units: int, device: torch.device) -> dict:
    """The three functions to time, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device).requires_grad_()

    def batch():
        views = tuple(
            torch.rand(BATCH, INPUTS, generator=generator).to(device) for _ in range(rule.views)
        )
        return views if rule.views == 2 else views[0]

    model = lateral_mlp(INPUTS, [units], Activation("sigmoid", 4.0), inh_factor=0.2)
    rule = KINDS[kind].of_degree(3, bound="tanh", forward_weight_bound=1.0)
    for psi in rule.parameters():
        torch.nn.init.normal_(psi, std=1e-4, generator=generator)
    rule.to(device)
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
        "limit": products_alone(units, rule, some["limit"], device),
    }


def rows(kinds: Sequence[str], units: Sequence[int], repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each kind of rule and layer size."""
    for kind, count in itertools.product(kinds, units):
        times = clock.in_turns(ways(kind, count, clock.device), repeat)
        each = {name: [t / STEPS[name] for t in values] for name, values in times.items()}
        yield Row(f"update, {kind}", f"{count} units", **each)


def main(argv: list[str] | None = None) -> None:
    """Print one row per kind and layer size."""
    parser = benchmark_parser(__doc__, repeat=5)
    parser.add_argument("--units", type=positive_int, nargs="+", default=[32, 256])
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS))
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    lines = rows(arguments.kinds, arguments.units, arguments.repeat, clock)
    print_table(lines, clock, f"a step each, {INPUTS} inputs, batch {BATCH}, degree 3")


if __name__ == "__main__":
    run_command(main)
