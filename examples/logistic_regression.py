"""Hyperparameter optimization: an L2 weight for each feature of a logistic regression.

    python examples/logistic_regression.py                          1,000 points of 20 features
    python examples/logistic_regression.py --method CG              another hypergradient
    python examples/logistic_regression.py --data digits            4 and 9, a weight for each pixel
    python examples/logistic_regression.py --resume runs/logistic_regression-...

    w_T    from w_0 = 0 by gradient descent on BCE(X w, y) + sum_i l_i w_i^2 / 2
    l      from 1 by SGD with momentum on BCE(X_val w_T, y_val), never below 1e-8

The synthetic data, drawn with seed 1, and all defaults are those of HyperTorch's notebook, whose
validation losses are shown next to ours. First, the error of every method at l = 1 is computed in
float64 as a function of the number k of steps or iterations, together with the theoretical rates
(Grazzi et al. 2020, arXiv 2006.16218): powers of the map's contraction, or
((sqrt c - 1) / (sqrt c + 1))^k for conjugate gradients, where c is the condition number of I - J,
or its square for the normal equations. Implicit methods stop at their tolerance, 1e-10.
"""

import csv
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from experiment.command_line import (
    UserError,
    common_parser,
    fraction,
    nonnegative_int,
    parse,
    positive_float,
    positive_int,
    refuse_idle_flags,
    refuse_large_seed,
    run_command,
)
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from figures.examples import plot_logistic_run
from hypergradients import (
    CG,
    CG_normaleq,
    DivergenceError,
    GradientDescent,
    HypergradientError,
    advance,
    checkpointed_reverse,
    fixed_point,
    forward_mode,
    neumann,
    neumann_lookback,
    nystrom,
    reverse,
    stoch_AID,
    truncated_reverse,
)
from mnist_datasets import ImageData, load_images

# Validation losses in HyperTorch's notebook, for the defaults here
PUBLISHED = {0: 0.5744, 10: 0.5338, 20: 0.3615, 30: 0.3225, 40: 0.2988, 50: 0.2945, 60: 0.2906}
CURVE = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 85)  # k at which errors are computed
LEAST = 1e-8  # the smallest L2 weight
NEWTON_STEPS = 12
FORWARD_STEPS = 8000  # the largest k * features of forward_mode in the comparison
SAVE_EVERY = 10  # outer steps
RATES = {"synthetic": 1.0, "digits": 100.0}  # of hypergradient descent


@dataclass(frozen=True)
class Problem:
    """Logistic regression with an L2 weight for each feature; parameters [w], hyperparameters [l].

    Attributes:
        inputs: [points, features].
        targets: 0 or 1, [points].
        validation_inputs, validation_targets: likewise.
        start: w_0, [features].
        rate: of gradient descent.
    """

    inputs: Tensor
    targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor
    start: Tensor
    rate: float

    def to(self, *where) -> "Problem":
        """The same problem on another device or in another type."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **{name: t.to(*where) for name, t in tensors.items()})

    def all_ones(self) -> list[Tensor]:
        """The initial hyperparameters."""
        return [torch.ones_like(self.start).requires_grad_()]

    def inner_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        """Mean cross-entropy of the training points, plus the penalty."""
        fit = binary_cross_entropy_with_logits(self.inputs @ params[0], self.targets)
        return fit + (hparams[0] * params[0].square()).sum() / 2

    def outer_loss(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        """Mean cross-entropy of the validation points."""
        logits = self.validation_inputs @ params[0]
        return binary_cross_entropy_with_logits(logits, self.validation_targets)

    def accuracy(self, params: list[Tensor]) -> float:
        """The fraction of validation points that are classified correctly."""
        right = (self.validation_inputs @ params[0] > 0) == (self.validation_targets > 0.5)
        return float(right.double().mean())

    def step(self, gradient: str = "graph") -> GradientDescent:
        """The update map: gradient descent on the inner loss."""
        return GradientDescent(self.inner_loss, self.rate, gradient=gradient)

    def hessian(self, w: Tensor, l2: Tensor) -> Tensor:
        """Hessian of the inner loss, X^T diag(p (1 - p)) X / n + diag(l), [features, features]."""
        p = torch.sigmoid(self.inputs @ w)
        return self.inputs.T * (p * (1 - p)) @ self.inputs / len(self.inputs) + l2.diag()

    def solution(self, l2: Tensor) -> Tensor:
        """w*, by Newton's method, which needs no line search for l near 1."""
        w = torch.zeros_like(self.start)
        for _ in range(NEWTON_STEPS):
            residual = torch.sigmoid(self.inputs @ w) - self.targets
            gradient = self.inputs.T @ residual / len(self.inputs) + l2 * w
            w = w - torch.linalg.solve(self.hessian(w, l2), gradient)
        return w

    def hypergradient(self, w: Tensor, l2: Tensor) -> Tensor:
        """At w*: -w* H^-1 grad_w E, because l_i adds l_i w_i to entry i of the inner gradient."""
        residual = torch.sigmoid(self.validation_inputs @ w) - self.validation_targets
        gradient = self.validation_inputs.T @ residual / len(residual)
        return -w * torch.linalg.solve(self.hessian(w, l2), gradient)


def synthetic_problem(seed: int, rate: float) -> Problem:
    """HyperTorch's problem: 1,000 points of 20 features, half of them for validation, float64."""
    random = np.random.RandomState(seed)  # gives the same numbers in every version of NumPy
    w, x = random.randn(20), random.randn(1000, 20)
    y = (x @ w + 0.1 * random.randn(1000) > 0).astype(float)
    x, x_val, y, y_val = map(
        torch.from_numpy, train_test_split(x, y, test_size=0.5, random_state=random)
    )
    return Problem(x, y, x_val, y_val, torch.zeros(20, dtype=x.dtype), rate)


def digits_problem(sets: Sequence[ImageData], classes: Sequence[int], rate: float) -> Problem:
    """Two classes of images, float64; the test images are used for validation.

    Raises UserError if there are no images of one of the classes.
    """
    parts = []
    for data in sets:
        rows = torch.isin(data.labels, torch.tensor(classes)).nonzero().squeeze(1)
        parts += [data.floats(rows, torch.float64).flatten(1)]
        parts += [(data.labels[rows] == classes[1]).double()]
    if any(part.unique().numel() < 2 for part in parts[1::2]):
        raise UserError(f"--classes {classes[0]} {classes[1]}: there are no images of both")
    return Problem(*parts, parts[0].new_zeros(parts[0].shape[1]), rate)


# ---- methods: (problem, hparams, steps, k) -> the hypergradient after these steps from w_0 ----

Method = Callable[[Problem, list[Tensor], int, int], list[Tensor]]


def with_all_states(problem: Problem, hparams: list[Tensor], steps: int, k: int) -> list[Tensor]:
    """`reverse` with all states stored; k is not used."""
    history, update = [[problem.start]], problem.step()
    for _ in range(steps):
        history.append(update(history[-1], hparams, create_graph=False))
    return reverse(history, hparams, [update] * steps, problem.outer_loss)


def with_checkpoints(problem: Problem, hparams: list[Tensor], steps: int, k: int) -> list[Tensor]:
    """`checkpointed_reverse`; k is not used."""
    updates = [problem.step()] * steps
    return checkpointed_reverse([problem.start], hparams, updates, problem.outer_loss)


def forwards(problem: Problem, hparams: list[Tensor], steps: int, k: int) -> list[Tensor]:
    """`forward_mode` in all directions at once; k is not used."""
    updates = [problem.step("func")] * steps
    return forward_mode([problem.start], hparams, updates, problem.outer_loss, vectorize=True)


def truncated(problem: Problem, hparams: list[Tensor], steps: int, k: int) -> list[Tensor]:
    """`truncated_reverse` through the last k steps."""
    updates = [problem.step()] * max(steps, k)
    return truncated_reverse([problem.start], hparams, k, updates, problem.outer_loss)


def looking_back(problem: Problem, hparams: list[Tensor], steps: int, k: int) -> list[Tensor]:
    """`neumann_lookback` with k terms at the last state but one."""
    update = problem.step()
    params = advance([problem.start], hparams, [update] * (steps - 1))
    return neumann_lookback(params, hparams, k, [update], problem.outer_loss)


def at_fixed_point(
    method: Callable, problem: Problem, hparams: list[Tensor], steps: int, k: int
) -> list[Tensor]:
    """An implicit method with K = k, which takes the last state as the fixed point."""
    update = problem.step()
    params = advance([problem.start], hparams, [update] * steps)
    return method(params, hparams, K=k, fp_map=update, outer_loss=problem.outer_loss)


def by_optimizer(*args, **options) -> list[Tensor]:
    """The hypergradient of `stoch_AID` with SGD of rate 1."""
    return stoch_AID(*args, **options, verbose=False)[0]


ALL_STEPS: dict[str, Method] = {
    "reverse": with_all_states,
    "checkpointed_reverse": with_checkpoints,
    "forward_mode": forwards,
}
LAST_STEPS: dict[str, Method] = {"truncated_reverse": truncated, "neumann_lookback": looking_back}
IMPLICIT: dict[str, Method] = {
    "fixed_point": partial(at_fixed_point, fixed_point),
    "neumann": partial(at_fixed_point, neumann),
    "stoch_AID": partial(at_fixed_point, by_optimizer),
    "CG": partial(at_fixed_point, CG),
    "CG_normaleq": partial(at_fixed_point, CG_normaleq),
    "nystrom": partial(at_fixed_point, nystrom),
}
METHODS = ALL_STEPS | LAST_STEPS | IMPLICIT


# ---- the error of each method ----


def error_curves(problem: Problem, ks: Sequence[int], progress) -> dict[str, list[float]]:
    """Relative errors of each method at l = 1, for each k; nan if a method reports divergence.

    Methods that follow all steps take k steps from w_0; all others start at w*, where the error is
    only their own. forward_mode is left out, with nan, if it would take long.
    """
    hparams = problem.all_ones()
    l2 = hparams[0].detach()
    solution = problem.solution(l2)
    exact = problem.hypergradient(solution, l2)
    at_solution = replace(problem, start=solution)
    curves = {}
    for name, method in METHODS.items():
        begin, follows = (problem, True) if name in ALL_STEPS else (at_solution, False)
        curves[name] = []
        for k in ks:
            estimate = torch.full_like(exact, math.nan)
            if name != "forward_mode" or k * len(exact) <= FORWARD_STEPS:
                with suppress(DivergenceError):
                    estimate = method(begin, hparams, k if follows else 1, k)[0]
            curves[name].append(float((estimate - exact).norm() / exact.norm()))
        progress.advance()
    return curves


def theoretical_rates(problem: Problem) -> dict[str, float]:
    """The factors by which an iteration reduces the error, at w* for l = 1. (Grazzi et al. 2020.)

    Conjugate gradients: (sqrt c - 1) / (sqrt c + 1), with c of I - J, or of its square.
    """
    l2 = torch.ones_like(problem.start)
    eigenvalues = torch.linalg.eigvalsh(problem.hessian(problem.solution(l2), l2))
    condition = float(eigenvalues[-1] / eigenvalues[0])
    root = math.sqrt(condition)
    return {
        "contraction": float((1 - problem.rate * eigenvalues).abs().max()),
        "CG": (root - 1) / (root + 1),
        "CG_normaleq": (condition - 1) / (condition + 1),
    }


def compare_methods(problem: Problem, log: RunLog) -> None:
    """Write the errors and rates to errors.csv, errors.npz and rates.json; print some."""
    with log.progress(len(METHODS), description="method") as progress:
        curves = error_curves(problem, CURVE, progress)
    rates = theoretical_rates(problem)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["k", *curves])
    writer.writerows(zip(CURVE, *curves.values(), strict=True))
    log.write_text("errors.csv", table.getvalue())
    log.write_arrays("errors.npz", {"k": np.array(CURVE), **curves})
    log.write_json("rates.json", rates)
    shown = [k for k in (1, 4, 11, 27, 85) if k in CURVE]
    log.say("relative error of the hypergradient at l = 1, float64; contraction "
            f"{rates['contraction']:.3f}, rate of CG {rates['CG']:.3f}")  # fmt: skip
    log.say(f"{'k':>20}" + "".join(f"{k:>10}" for k in shown))
    for name, errors in curves.items():
        log.say(f"{name:>20}" + "".join(f"{errors[CURVE.index(k)]:10.1e}" for k in shown))


# ---- optimisation of the L2 weights ----


class OuterSteps:
    """SGD with momentum on the L2 weights; see `run_steps`."""

    def __init__(self, args, problem: Problem) -> None:
        self.args, self.problem, self.done = args, problem, 0
        self.rows: list[dict[str, float]] = []
        self.hparams = problem.all_ones()
        self.optimizer = torch.optim.SGD(self.hparams, lr=args.lr, momentum=args.momentum)

    @property
    def finished(self) -> bool:
        """Whether all outer steps are done."""
        return self.done >= self.args.outer_steps

    def step(self) -> dict[str, float]:
        """One outer step."""
        row = outer_step(self.args, self.problem, self.hparams, self.optimizer)
        self.rows.append(row)
        self.done += 1
        return row

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        l2 = self.hparams[0].detach()
        return {
            "done": self.done,
            "rows": self.rows,
            "l2": l2,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume from the result of `state_dict`."""
        self.done, self.rows = state["done"], list(state["rows"])
        self.hparams[0].data.copy_(state["l2"])
        self.optimizer.load_state_dict(state["optimizer"])


def outer_step(args, problem: Problem, hparams: list[Tensor], optimizer) -> dict[str, float]:
    """Move the L2 weights; returns the numbers before the step.

    Raises FloatingPointError if a number is not finite.
    """
    params = advance([problem.start], hparams, [problem.step()] * args.steps)
    row = {
        "validation_loss": float(problem.outer_loss(params, hparams)),
        "validation_accuracy": problem.accuracy(params),
        "least_l2": float(hparams[0].detach().min()),
        "largest_l2": float(hparams[0].detach().max()),
    }
    optimizer.zero_grad()
    gradient = METHODS[args.method](problem, hparams, args.steps, args.K)
    row["hypergradient_norm"] = float(gradient[0].norm())
    if not all(math.isfinite(value) for value in row.values()):
        raise FloatingPointError(f"not finite any more: {row}; take a smaller --lr or --rate")
    optimizer.step()
    hparams[0].data.clamp_(min=LEAST)
    return row


def report(args, log: RunLog, source: str, rows: Sequence[Mapping[str, float]]) -> None:
    """Print and write the table of validation losses; draw the figures.

    rows: of all outer steps.
    """
    published = PUBLISHED if is_published(args) else {}
    table = []
    for step, row in enumerate(rows):
        if step % 10 == 0 or step + 1 == len(rows):
            shown = {name: row[name] for name in ("validation_loss", "validation_accuracy")}
            told = {"published_loss": published[step]} if step in published else {}
            table.append({"step": step, **shown, **told})
    log.write_results({"data": source, "method": args.method, "table": table,
                                    "published": published})  # fmt: skip
    log.plot(plot_logistic_run)
    log.say(
        f"{'outer step':>10}{'loss':>10}{'accuracy':>10}" + "  published loss" * bool(published)
    )
    for row in table:
        step, loss, accuracy, *told = row.values()
        log.say(f"{step:>10}{loss:10.4f}{accuracy:10.2%}" + "".join(f"{x:12.4f}" for x in told))
    log.say(f"everything is in {log.directory}")


def is_published(args) -> bool:
    """Whether the run has the settings of the published numbers."""
    defaults = make_parser().parse_args([])
    defaults.lr = RATES[defaults.data]
    names = ("data", "method", "steps", "K", "rate", "lr", "momentum", "seed")
    return all(getattr(args, name) == getattr(defaults, name) for name in names)


# ---- the command ----


def make_parser():
    """The command's flags."""
    parser = common_parser("Optimise an L2 weight for each feature.", "logistic_regression")
    parser.set_defaults(dataset="mnist5k", seed=1)
    add = parser.add_argument_group("problem").add_argument
    add("--data", choices=("synthetic", "digits"), default="synthetic",
        help="points drawn with --seed, or two classes of --dataset")  # fmt: skip
    add("--classes", type=nonnegative_int, nargs=2, default=[4, 9], help="the two classes")
    add("--steps", type=positive_int, default=100, help="steps of gradient descent, T")
    add("--rate", type=positive_float, default=0.1, help="rate of gradient descent")
    add = parser.add_argument_group("hypergradient descent").add_argument
    add("--method", choices=list(METHODS), default="truncated_reverse",
        help="how the hypergradient is computed")  # fmt: skip
    add("--K", type=positive_int, default=10, help="steps, terms or iterations of the method")
    add("--outer_steps", type=positive_int, default=100, help="steps of SGD on l")
    add("--lr", type=positive_float, help="rate of SGD on l (default: 1, for digits 100)")
    add("--momentum", type=fraction, default=0.9, help="momentum of SGD on l")
    return parser


def make_problem(args) -> tuple[Problem, ImageData | None, str]:
    """The problem in float64, the images it is made of (None if synthetic), and its source."""
    if args.data == "synthetic":
        source = f"1,000 synthetic points of 20 features, seed {args.seed}"
        return synthetic_problem(args.seed, args.rate), None, source
    sets = load_images(args.dataset, args.data_dir)
    problem = digits_problem(sets, args.classes, args.rate)
    counts = f"{len(problem.targets):,} + {len(problem.validation_targets):,}"
    source = f"{counts} images of {args.classes[0]} and {args.classes[1]}; {sets[0].source}"
    return problem, sets[0], source


def main(argv: list[str] | None = None) -> None:
    """Parse, build, compare the methods, optimise, report."""
    parser = make_parser()
    args = parse(parser, argv)
    refuse_large_seed(args, 32)
    digits = args.data == "digits"
    refuse_idle_flags(args, parser, [("dataset classes", digits, "--data digits")])
    if args.lr is None:
        args.lr = RATES[args.data]
    device, dtype = set_up(args)
    problem, data, source = make_problem(args)
    problem = problem.to(device)
    with open_run(args, "logistic_regression", data) as log:
        log.say(source)
        compare_methods(problem, log)
        outer = OuterSteps(args, problem.to(dtype))
        finished = run_steps(
            log, outer, "outer step", args.outer_steps,
            numbers=range(args.outer_steps), checkpoint_every=SAVE_EVERY,
        )  # fmt: skip
        report(args, log, source, outer.rows)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(HypergradientError,))
