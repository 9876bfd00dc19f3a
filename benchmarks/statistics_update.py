"""Times one update of a rule with unit statistics, forward and backward, per inner step.

    python benchmarks/statistics_update.py                  # one thread, about a minute
    python benchmarks/statistics_update.py --threads 2 --repeat 9 --units 32 --kinds pairs

obvious: one product per term, every quantity as it is written, plain autograd
    (tests/unit_statistics_oracle.py).
limit: only the products with the inputs x, which no formulation can avoid, on the same batches:
    forward x w^T and h^T x, and both once more backward; x needs no gradient.

    with units     ms of these products and those between units that statistics need: moments
                   c^T c and lateral currents c K; backward, one for the moments and two for the
                   currents
    ours/those     ours relative to these
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import unit_statistics_oracle

from benchmarks.table import (
    Clock,
    Row,
    benchmark_parser,
    median_text,
    print_table,
    ratio_text,
    set_up,
)
from experiment.command_line import positive_int, run_command
from models_fully_local import Activation, lateral_mlp
from rules.unit_statistics import DEFAULT, UnitStatisticsRule

INPUTS = 784
STEPS = {"obvious": 2, "ours": 10, "limit": 10, "with_units": 10}
VIEWS = {"single": 1, "pairs": 2}


def unrolled(update, start, batches, rule):
    """A function that runs `update` on each batch and differentiates the sum of squared results."""

    numbers = [number for number in rule.parameters() if number.requires_grad]

    def run() -> None:
        params = start
        for batch in batches:
            params = update(params, batch)
        loss = sum(params[1][name].square().sum() for name in ("w", "b"))
        torch.autograd.grad(loss, [*numbers, *start[1].values()])

    return run


def products_alone(units: int, batches, lateral: bool, device: torch.device):
    """A function that computes only the matrix products of `len(batches)` steps."""
    shapes = (units, INPUTS), (units, units), (len(batches[0][0]), units)
    w, k, h = (torch.rand(shape, device=device) for shape in shapes)

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


def ways(kind: str, units: int, size: int, device: torch.device) -> dict:
    """The functions to time, by name."""
    views, generator = VIEWS[kind], torch.Generator().manual_seed(0)
    model = lateral_mlp(INPUTS, [units], Activation("sigmoid", 4.0), inhibition="none")
    terms = [text for text in DEFAULT if views == 2 or "'" not in text]
    rule = UnitStatisticsRule.of_terms(terms, views=views, learn=("eta", "eps"))
    torch.nn.init.normal_(rule.w, generator=generator)
    rule.to(device)
    w = torch.randn(units, INPUTS, generator=generator) * 0.167 / INPUTS**0.5
    layer = {"w": w.to(device), "b": torch.zeros(units, device=device)}
    start = [{}, {name: tensor.requires_grad_() for name, tensor in layer.items()}]
    batches = [
        tuple(torch.randn(size, INPUTS, generator=generator).to(device) for _ in range(views))
        for _ in range(max(STEPS.values()))
    ]

    def ours(params, batch):
        return rule.update(model, params, batch)

    def obvious(params, batch):
        return unit_statistics_oracle.update(rule, model, params, batch)

    return {
        "obvious": unrolled(obvious, start, batches[: STEPS["obvious"]], rule),
        "ours": unrolled(ours, start, batches, rule),
        "limit": products_alone(units, batches, False, device),
        "with_units": products_alone(units, batches, True, device),
    }


def rows(
    kinds: Sequence[str], units: Sequence[int], batches: Sequence[int], repeat: int, clock: Clock
) -> Iterator[Row]:
    """One row for each kind of input, layer size and batch."""
    for kind, count, size in itertools.product(kinds, units, batches):
        times = clock.in_turns(ways(kind, count, size, clock.device), repeat)
        each = {name: [t / STEPS[name] for t in values] for name, values in times.items()}
        with_units = each.pop("with_units")
        more = {
            "with units": median_text(with_units),
            "ours/those": ratio_text(each["ours"], with_units),
        }
        yield Row(f"update, {kind}", f"{count} units x {size}", **each, more=more)


def main(argv: list[str] | None = None) -> None:
    """Print one row per kind of input, layer size and batch."""
    parser = benchmark_parser(__doc__, repeat=3)
    parser.add_argument("--units", type=positive_int, nargs="+", default=[32, 256])
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[256, 1024])
    parser.add_argument("--kinds", choices=list(VIEWS), nargs="+", default=list(VIEWS))
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    lines = rows(arguments.kinds, arguments.units, arguments.batch, arguments.repeat, clock)
    print_table(lines, clock, f"a step each, {INPUTS} inputs, terms of the default form")


if __name__ == "__main__":
    run_command(main)
