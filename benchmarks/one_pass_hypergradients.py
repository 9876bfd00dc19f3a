"""How far the look-back's hypergradients are from the exact ones, by T and i, on a UCI set.

    python benchmarks/one_pass_hypergradients.py --data-dir ./data       # two tables of medians
    python benchmarks/one_pass_hypergradients.py --dataset yacht --before 1000 --figure errors.png

Each cell is the median over draws of |h - h_exact| / |h_exact|, where h has i terms (one row for
each i) and h_exact is the derivative through the last T weight steps. Draws are first trained for
--before weight steps with their own fixed hyperparameters. Clarke et al. compare the first updates
of Adam instead, whose size does not depend on that of the hypergradient.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from comparison.one_pass_problems import FullBatches, Network, Problem, make_problem
from data_sets.choices import TABLES
from experiment.command_line import OneLineParser, positive_int, run_command
from experiment.tables import markdown
from figures.one_pass_report import plot_hypergradient_errors
from one_pass.tuning import (
    Settings,
    Tuning,
    WeightStep,
    initial_hyperparameters,
    initial_state,
    look_back_hypergradients,
    look_back_vector,
    unrolled_hypergradients,
)

STEPS, TERMS = (1, 2, 5, 10, 20, 50), (1, 2, 3, 5, 10, 20)  # T; i


def steps_of(problem: Problem, draws: int, before: int) -> list[WeightStep]:
    """The last weight steps of `draws` runs, as many as the longest window has."""
    generators = [torch.Generator().manual_seed(number) for number in range(2 * draws)]
    hyperparameters = initial_hyperparameters(generators[:draws])
    weights, buffers = problem.objective.initial(generators[draws:])
    settings = Settings("fixed")
    state = initial_state(weights, buffers, hyperparameters, settings)
    tuning = Tuning(problem.objective, FullBatches(*problem.training), None, settings, state)
    tuning.advance(before)
    return [tuning._weight_step() for _ in range(max(STEPS))]


def errors(problem: Problem, steps: list[WeightStep], name: str) -> Tensor:
    """Medians over draws of the relative error of one hyperparameter's h, [terms, T]."""
    last = steps[-1]
    after = FullBatches(*problem.validation).next()
    gradient = problem.objective.held_out(last.after, last.buffers, after).gradient
    close = [
        look_back_hypergradients(last, look_back_vector(last, gradient, terms))[name]
        for terms in TERMS
    ]
    found = torch.empty(len(TERMS), len(STEPS))
    for column, every in enumerate(STEPS):
        exact = unrolled_hypergradients(steps[-every:], gradient, problem.objective.linearize)
        whole = exact[name].sum(dim=1)
        for row, some in enumerate(close):
            relative = ((some.sum(dim=1) - whole) / whole).abs()
            found[row, column] = relative.nan_to_num(torch.inf).median()
    return found


def main(argv: list[str] | None = None) -> None:
    """Print a table for each hyperparameter, and draw them."""
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", choices=tuple(TABLES), default="energy", help="UCI data set")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="folder of the data sets")  # fmt: skip
    add("--draws", type=positive_int, default=50, help="number of runs")
    add("--before", type=positive_int, default=100, help="weight steps before the window")
    add("--figure", type=Path, metavar="FILE", help="also draw heat maps into this PNG file")
    args = parser.parse_args(argv)
    proportion = 0.11272 if args.dataset == "energy" else 0.2
    problem = make_problem(
        args.dataset, Network("mlp"), proportion, "published", args.data_dir, torch.float64,
        torch.device("cpu"),
    )  # fmt: skip
    steps = steps_of(problem, args.draws, args.before)
    found = {name: errors(problem, steps, name).numpy() for name in ("lr", "weight_decay")}
    for name, grid in found.items():
        rows = [
            [str(terms), *(f"{value:.1%}" for value in row)]
            for terms, row in zip(TERMS, grid.tolist(), strict=True)
        ]
        print(f"\n{name}, relative error of h; i down, T across\n")
        print(markdown([["i", *map(str, STEPS)], *rows], "---:"))
    if args.figure is not None:
        plot_hypergradient_errors(found, STEPS, TERMS, args.figure)


if __name__ == "__main__":
    run_command(main)
