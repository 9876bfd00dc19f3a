"""Times one update of a rule with unit statistics, forward and backward, per inner step.

    python benchmarks/statistics_update.py                  # one thread, about two minutes
    python benchmarks/statistics_update.py --threads 2 --repeat 9 --units 32 --kinds pairs

obvious: one product per term, every quantity as it is written, plain autograd
    (tests/unit_statistics_oracle.py).
limit: nothing but the products with the inputs x, which no formulation can avoid, on the same
    batches: forward x w^T and h^T x, backward both once more; x needs no gradient.
with_units: these and the products between units that the statistics take: moments c^T c, lateral
    currents c K, backward one for the moments and two for the currents.
All take turns; processor times, and medians over the repetitions.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import unit_statistics_oracle

from experiment.command_line import keep_freed_memory
from models_fully_local import Activation, lateral_mlp
from rules.unit_statistics import DEFAULT, UnitStatisticsRule

INPUTS = 784
STEPS = {"obvious": 2, "ours": 10, "limit": 10, "with_units": 10}
VIEWS = {"single": 1, "pairs": 2}


def unrolled(update, start, batches, rule):
    """Runs `update` on each batch and differentiates the sum of squares of what comes out."""

    numbers = [number for number in rule.parameters() if number.requires_grad]

    def run() -> None:
        params = start
        for batch in batches:
            params = update(params, batch)
        loss = sum(params[1][name].square().sum() for name in ("w", "b"))
        torch.autograd.grad(loss, [*numbers, *start[1].values()])

    return run


def products_alone(units: int, batches, lateral: bool):
    """The matrix products of `len(batches)` steps and no more."""
    w, k = torch.rand(units, INPUTS), torch.rand(units, units)
    h = torch.rand(len(batches[0][0]), units)

    def run() -> None:
        for batch in batches:
            for x in batch:
                for _ in range(2):
                    torch.mm(x, w.t())
                    torch.mm(h.t(), x)
                if lateral:
                    for _ in range(2):
                        torch.mm(h.t(), h)
                    for _ in range(3):
                        torch.mm(h, k)

    return run


def ways(kind: str, units: int, size: int) -> dict:
    """The things to time, by name."""
    views, generator = VIEWS[kind], torch.Generator().manual_seed(0)
    model = lateral_mlp(INPUTS, [units], Activation("sigmoid", 4.0), inhibition="none")
    terms = [text for text in DEFAULT if views == 2 or "'" not in text]
    rule = UnitStatisticsRule.of_terms(terms, views=views, learn=("eta", "eps"))
    torch.nn.init.normal_(rule.w, generator=generator)
    w = torch.randn(units, INPUTS, generator=generator) * 0.167 / INPUTS**0.5
    start = [{}, {"w": w.requires_grad_(), "b": torch.zeros(units).requires_grad_()}]
    batches = [
        tuple(torch.randn(size, INPUTS, generator=generator) for _ in range(views))
        for _ in range(max(STEPS.values()))
    ]

    def ours(params, batch):
        return rule.update(model, params, batch)

    def obvious(params, batch):
        return unit_statistics_oracle.update(rule, model, params, batch)

    return {
        "obvious": unrolled(obvious, start, batches[: STEPS["obvious"]], rule),
        "ours": unrolled(ours, start, batches, rule),
        "limit": products_alone(units, batches, lateral=False),
        "with_units": products_alone(units, batches, lateral=True),
    }


def main() -> None:
    """Prints one row per kind of input, layer size and batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--kinds", choices=list(VIEWS), nargs="+", default=list(VIEWS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(
        f"ms of processor time per step, {INPUTS} inputs, terms of the default form, "
        f"{args.threads} thread(s), median of {args.repeat}"
    )
    print(
        f"{'kind':>6} {'units':>6} {'batch':>6} {'obvious':>9} {'ours':>8} {'limit':>8} "
        f"{'with_units':>11} {'obvious/ours':>13} {'ours/limit':>11} {'ours/with_units':>16}"
    )
    for kind, units, size in itertools.product(args.kinds, args.units, args.batch):
        timed = ways(kind, units, size)
        for run in timed.values():
            run()
        rows = [{n: _milliseconds(run) / STEPS[n] for n, run in timed.items()}
                for _ in range(args.repeat)]  # fmt: skip
        middle = {n: statistics.median(row[n] for row in rows) for n in STEPS}
        ratios = [
            statistics.median(row[a] / row[b] for row in rows)
            for a, b in (("obvious", "ours"), ("ours", "limit"), ("ours", "with_units"))
        ]
        print(f"{kind:>6} {units:6} {size:6} {middle['obvious']:9.1f} {middle['ours']:8.2f} "
              f"{middle['limit']:8.2f} {middle['with_units']:11.2f} {ratios[0]:13.1f} "
              f"{ratios[1]:11.2f} {ratios[2]:16.2f}")  # fmt: skip


def _milliseconds(run) -> float:
    begin = time.process_time()
    run()
    return 1e3 * (time.process_time() - begin)


if __name__ == "__main__":
    main()
