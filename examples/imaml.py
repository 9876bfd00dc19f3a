"""Few-shot learning: initial weights that a few steps adapt to a task, by implicit gradients.

    python examples/imaml.py                                5 ways, 1 shot: digits and clothes
    python examples/imaml.py --dataset omniglot             if it is in --data-dir
    python examples/imaml.py --problem sinusoid             regression of sine waves
    python examples/imaml.py --resume runs/imaml-...

    w*(theta) = argmin_w  task loss(w, support) + lambda / 2 |w - theta|^2
    theta     by Adam on the mean over tasks of  task loss(w*, queries)

w* is approximated by gradient descent from theta, its hypergradient by conjugate gradients on
I - J, the Hessian, for all tasks of a meta-step at once. (iMAML; Rajeswaran et al. 2019, arXiv
1909.04630.) The Hessian of a network need not be positive definite: if conjugate gradients meet
negative curvature, they stop one iteration earlier.

Classes are pictures of one kind, turned by 0, 90, 180 or 270 degrees. Test classes are made of
kinds never seen in training: labels 7, 8, 9 of each data set, or other alphabets of Omniglot. The
example compares adaptation from the learned and from the initial theta on the same tasks.
examples/omniglot.py has Omniglot as it was published, and is fast on a GPU.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import conv2d, cross_entropy, linear, mse_loss

from data_sets.image_data import ImageData
from data_sets.omniglot import load_omniglot
from experiment.command_line import (
    UserError,
    common_parser,
    parse,
    positive_float,
    positive_int,
    refuse_idle_flags,
    refuse_large_seed,
    run_command,
)
from experiment.data_names import DATASETS, data_name
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from figures.examples import plot_imaml_run
from hypergradients import (
    ConjugateGradient,
    DivergenceError,
    FixedPoint,
    GradientDescent,
    HypergradientError,
    NormalEquations,
    implicit,
)
from mnist_datasets import load_images

METHODS = {
    "CG": ConjugateGradient,
    "CG_normaleq": NormalEquations,
    "fixed_point": FixedPoint,
}
FIRST_HELD_OUT = 7  # the first label of each data set that is kept for testing
TASKS_AT_ONCE = 16  # when testing
FEATURE_SCALE = 0.5  # keeps the inner loss's curvature below 2 / rate, so that steps don't diverge
NO_IMAGES = torch.zeros(0, 1, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
TRAINING, TESTING = range(2)  # streams of random numbers


@dataclass(frozen=True)
class Batch:
    """Tasks, [tasks, points, ...]: inputs and targets to adapt to, and others to judge by."""

    support: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PictureTasks:
    """Tasks of `ways` classes, made of kinds (uint8 [n, 1, H, W] each) in four orientations.

    Attributes:
        shots, queries: pictures of each class to adapt to, and to judge by.
    """

    kinds: Sequence[Tensor]
    ways: int
    shots: int
    queries: int
    dtype: torch.dtype
    device: torch.device

    score = "accuracy"

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Tasks with inputs float [tasks, points, 1, H, W] and labels int64 [tasks, points]."""
        x = torch.stack([self._pictures(generator) for _ in range(count)])
        x = x.to(self.device, self.dtype) / 255
        y = torch.arange(self.ways, device=self.device)[:, None]

        def part(rows: slice, number: int) -> tuple[Tensor, Tensor]:
            labels = y.expand(self.ways, number).reshape(1, -1)
            return x[:, :, rows].flatten(1, 2), labels.expand(count, -1)

        return Batch(
            part(slice(self.shots), self.shots), part(slice(self.shots, None), self.queries)
        )

    def _pictures(self, generator: torch.Generator) -> Tensor:
        """Different pictures of each class, uint8 [ways, shots + queries, 1, H, W]."""
        drawn = []
        for number in torch.randperm(4 * len(self.kinds), generator=generator)[: self.ways]:
            kind, turns = self.kinds[number // 4], int(number % 4)
            rows = torch.randperm(len(kind), generator=generator)[: self.shots + self.queries]
            drawn.append(kind[rows].rot90(turns, (2, 3)))
        return torch.stack(drawn)

    def initial(self, generator: torch.Generator) -> list[Tensor]:
        """Initial weights: three layers of 3 x 3 filters with stride 2, and a linear layer of 0."""
        height = math.ceil(self.kinds[0].shape[-1] / 8)
        shapes = [(16, 1, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (self.ways, 32 * height**2)]
        return drawn_weights(shapes, generator)

    def outputs(self, params: list[Tensor], x: Tensor) -> Tensor:
        """Logits [points, ways]; each filter's response is normalized over all given points."""
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            response = conv2d(x, weight, stride=2, padding=1)
            mean = response.mean((0, 2, 3), keepdim=True)
            variance = (response - mean).square().mean((0, 2, 3), keepdim=True)
            x = torch.relu((response - mean) * torch.rsqrt(variance + 1e-5) + bias.view(-1, 1, 1))
        return linear(x.flatten(1) * FEATURE_SCALE, params[-2], params[-1])

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return cross_entropy(outputs, labels)

    def judged(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The fraction of right answers, [tasks]."""
        return (outputs.argmax(-1) == labels).double().mean(-1)


@dataclass(frozen=True)
class SinusoidTasks:
    """a sin(x + p) with a in [0.1, 5], p in [0, pi], seen at `shots` points x in [-5, 5].

    Source: Finn, Abbeel, Levine 2017, arXiv 1703.03400, section 5.1.
    """

    shots: int
    queries: int
    dtype: torch.dtype
    device: torch.device

    score = "mean squared error"

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Tasks with inputs and targets [tasks, points, 1]."""
        a, p = torch.rand(2, count, 1, 1, generator=generator, dtype=torch.float64)
        x = 10 * torch.rand(count, self.shots + self.queries, 1, generator=generator) - 5
        y = (0.1 + 4.9 * a) * torch.sin(x + math.pi * p)
        x, y = (t.to(self.device, self.dtype) for t in (x, y))
        n = self.shots
        return Batch((x[:, :n], y[:, :n]), (x[:, n:], y[:, n:]))

    def initial(self, generator: torch.Generator) -> list[Tensor]:
        """Initial weights of 1-40-40-1 units, the first spread over the interval, the last layer 0.

        The units are smooth: at a kink gradient descent would not come to rest, and there would be
            no
        Hessian.
        """
        params = drawn_weights([(40, 1), (40, 40), (1, 40)], generator)
        params[1].copy_(2 * torch.rand(40, generator=generator) - 1)
        return params

    def outputs(self, params: list[Tensor], x: Tensor) -> Tensor:
        """Predictions [points, 1]."""
        x = x / 5
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = torch.tanh(linear(x, weight, bias))
        return linear(x, params[-2], params[-1])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return mse_loss(outputs, targets)

    def judged(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared errors, [tasks]."""
        return (outputs - targets).square().double().mean((-2, -1))


Tasks = PictureTasks | SinusoidTasks


def drawn_weights(shapes: Sequence[tuple], generator: torch.Generator) -> list[Tensor]:
    """Weights of variance 2 / fan-in and biases 0 for each layer; the last layer is 0."""
    params = []
    for shape in shapes:
        weight = torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
        params += [weight, torch.zeros(shape[0])]
    params[-2].zero_()
    return params


# ---- the two levels; params are lists of tensors [tasks, ...], hparams lists of tensors [...]


class TwoLevels:
    """The inner and the outer loss of a batch of tasks.

    pull: lambda, the weight of the squared distance from theta.
    """

    def __init__(self, tasks: Tasks, batch: Batch, pull: float) -> None:
        self.tasks, self.batch, self.pull = tasks, batch, pull

    def losses(self, params: list[Tensor], points: tuple[Tensor, Tensor]) -> Tensor:
        """The task loss of each task, [tasks]."""
        return vmap(lambda w, x, y: self.tasks.loss(self.tasks.outputs(w, x), y))(params, *points)

    def inner(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        """The inner loss, summed over tasks, so that the gradients of tasks are independent."""
        distance = sum((w - theta).square().sum() for w, theta in zip(params, hparams, strict=True))
        return self.losses(params, self.batch.support).sum() + self.pull / 2 * distance

    def outer(self, params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        """The outer loss, a mean over tasks."""
        return self.losses(params, self.batch.queries).mean()

    def adapted(self, hparams: list[Tensor], steps: int, rate: float) -> list[list[Tensor]]:
        """The params of all tasks at theta and after each step of gradient descent."""
        count, step = len(self.batch.support[0]), GradientDescent(self.inner, rate)
        history = [[h.detach().expand(count, *h.shape).clone() for h in hparams]]
        for _ in range(steps):
            history.append(step(history[-1], hparams, create_graph=False))
        return history

    @torch.no_grad()
    def scores(self, params: list[Tensor]) -> Tensor:
        """The scores of the queries, [tasks]."""
        x, y = self.batch.queries
        return self.tasks.judged(vmap(self.tasks.outputs)(params, x), y)


def meta_step(args, tasks: Tasks, hparams: list[Tensor], optimizer, number: int) -> dict:
    """Move theta; returns the numbers before the step.

    Raises FloatingPointError if the loss is not finite.
    """
    levels = TwoLevels(
        tasks, tasks.draw(args.tasks, generator(args, TRAINING, number - 1)), args.pull
    )
    params = levels.adapted(hparams, args.steps, args.rate)[-1]
    row = {"meta_loss": float(levels.outer(params, hparams).detach())}
    row["score"] = float(levels.scores(params).mean())
    if not math.isfinite(row["meta_loss"]):
        raise FloatingPointError(f"meta-step {number}: loss not finite; take a smaller --lr")
    optimizer.zero_grad()
    solve = hypergradient(args, levels, params, hparams)
    squares = sum(float(h.grad.square().sum()) for h in hparams)
    optimizer.step()
    return row | {
        "hypergradient_norm": math.sqrt(squares),
        "iterations": solve.iterations,
        "residual": solve.residual,
    }


def hypergradient(args, levels: TwoLevels, params: list[Tensor], hparams: list[Tensor]):
    """Add the hypergradient to .grad; returns the LinearSolve.

    For conjugate gradients the map is a gradient step of rate 1, for which I - J is the Hessian;
    for the fixed-point iteration, which needs a contraction, it is the inner step.
    """
    rate = args.rate if args.method == "fixed_point" else 1.0
    step = GradientDescent(levels.inner, rate)
    for iterations in range(args.K, 0, -1):
        solver = METHODS[args.method](iterations)
        try:
            return implicit(params, hparams, step, levels.outer, solver)[1]
        except DivergenceError:
            if iterations == 1 or args.method != "CG":
                raise
    raise AssertionError


def generator(args, *stream: int) -> torch.Generator:
    """A generator of its own for each purpose."""
    seed = np.random.SeedSequence((args.seed, *stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


class MetaLearning:
    """Adam on the meta-parameters; see `run_steps`."""

    def __init__(self, args, tasks: Tasks, hparams: list[Tensor]) -> None:
        self.args, self.tasks, self.hparams = args, tasks, hparams
        self.optimizer, self.done = torch.optim.Adam(hparams, lr=args.lr), 0

    @property
    def finished(self) -> bool:
        """Whether all meta-steps are done."""
        return self.done >= self.args.metasteps

    def step(self) -> dict[str, float]:
        """One meta-step."""
        self.done += 1
        return meta_step(self.args, self.tasks, self.hparams, self.optimizer, self.done)

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        theta = [h.detach() for h in self.hparams]
        return {"done": self.done, "theta": theta, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Resume from the result of `state_dict`."""
        self.done = state["done"]
        for h, value in zip(self.hparams, state["theta"], strict=True):
            h.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def test(args, tasks: Tasks, hparams: list[Tensor]) -> np.ndarray:
    """Scores [tasks, steps + 1] on the queries of test tasks, which are the same for each theta."""
    scores, random = [], generator(args, TESTING)
    for begin in range(0, args.test_tasks, TASKS_AT_ONCE):
        count = min(TASKS_AT_ONCE, args.test_tasks - begin)
        levels = TwoLevels(tasks, tasks.draw(count, random), args.pull)
        history = levels.adapted(hparams, args.steps, args.rate)
        scores.append(torch.stack([levels.scores(params) for params in history], dim=1))
    return torch.cat(scores).numpy(force=True)


# ---- pictures ----


def load_kinds(args) -> tuple[list[Tensor], list[Tensor], ImageData]:
    """Kinds of pictures, uint8 [n, 1, 28, 28] each, for training and for testing; and all of them.

    Raises UserError if Omniglot is combined with other data sets.
    """
    if "omniglot" in args.dataset:
        if len(args.dataset) > 1:
            raise UserError("--dataset omniglot stands alone, its characters are divided already")
        found = load_omniglot(args.data_dir)
        return [*found.train.images], [*found.test.images], found.pooled()
    sets = [load_images(name, args.data_dir)[0] for name in args.dataset]
    train, test = (
        [data.images[data.labels == label] for data in sets for label in labels]
        for labels in (range(FIRST_HELD_OUT), range(FIRST_HELD_OUT, 10))
    )
    kinds = [*train, *test]
    sizes = torch.tensor([len(kind) for kind in kinds])
    labels = torch.arange(len(kinds)).repeat_interleave(sizes)
    source = "; ".join(data.source for data in sets)
    return train, test, ImageData(torch.cat(kinds), labels, source)


# ---- the command ----


def make_parser():
    """The command's flags."""
    parser = common_parser("Meta-learn initial weights by implicit gradients.", "imaml")
    for action in parser._actions:
        if action.dest == "dataset":  # of the common flags; here several may be put together
            action.nargs, action.type = "+", partial(data_name, known=(*DATASETS, "omniglot"))
            action.help = "data sets of pictures; several are combined"
    parser.set_defaults(dataset=["mnist", "fashion"])
    add = parser.add_argument_group("tasks").add_argument
    add("--problem", choices=("pictures", "sinusoid"), default="pictures", help="kind of tasks")
    add("--ways", type=positive_int, default=5, help="number of classes of a task")
    add("--shots", type=positive_int, metavar="N",
        help="points per class to adapt to (default: 1; of a sine wave 10)")  # fmt: skip
    add("--queries", type=positive_int, default=15, help="points per class to judge by")
    add = parser.add_argument_group("adaptation").add_argument
    add("--pull", type=positive_float, metavar="LAMBDA",
        help="strength of the pull towards theta (default: 2; for sine waves 0.5)")  # fmt: skip
    add("--steps", type=positive_int, default=16, help="steps of gradient descent")
    add("--rate", type=positive_float, metavar="RATE",
        help="rate of gradient descent (default: 0.1; for sine waves 0.02)")  # fmt: skip
    add = parser.add_argument_group("meta-learning").add_argument
    add("--method", choices=list(METHODS), default="CG", help="solver of the hypergradient")
    add("--K", type=positive_int, default=5, help="iterations of the solver")
    add("--tasks", type=positive_int, default=16, help="tasks of a meta-step")
    add("--metasteps", type=positive_int, metavar="N",
        help="number of meta-steps (default: 60; for sine waves 500)")  # fmt: skip
    add("--lr", type=positive_float, default=3e-3, help="learning rate of Adam")
    add("--test_tasks", type=positive_int, default=200, help="test tasks at the end")
    return parser


DEFAULTS = {
    "pictures": {"shots": 1, "pull": 2.0, "rate": 0.1, "metasteps": 60},
    "sinusoid": {"shots": 10, "pull": 0.5, "rate": 0.02, "metasteps": 500},
}


def make_tasks(args, dtype: torch.dtype, device: torch.device) -> tuple[Tasks, Tasks, ImageData]:
    """Tasks for training and for testing, and all pictures (none for sine waves).

    Raises UserError if there are too few classes or pictures.
    """
    sizes = {"shots": args.shots, "queries": args.queries, "dtype": dtype, "device": device}
    if args.problem == "sinusoid":
        tasks = SinusoidTasks(**sizes)
        return tasks, tasks, ImageData(*NO_IMAGES, f"sine waves, seed {args.seed}")
    *parts, data = load_kinds(args)
    least, fewest = (
        min(len(k) for kinds in parts for k in kinds),
        min(len(kinds) for kinds in parts),
    )
    if args.ways > 4 * fewest:
        raise UserError(f"--ways {args.ways}: there are {4 * fewest} classes for testing")
    if args.shots + args.queries > least:
        raise UserError(f"--shots and --queries together may be {least}, the least of a class")
    train, held_out = (PictureTasks(kinds, args.ways, **sizes) for kinds in parts)
    return train, held_out, data


def report(args, tasks: Tasks, log: RunLog, source: str, scores: Mapping[str, np.ndarray]) -> None:
    """Print and write the scores with their spread; draw the figure."""
    results = {"data": source, "problem": args.problem, "score": tasks.score}
    for name, values in scores.items():
        last = values[:, -1]
        results[name] = {
            "mean": float(last.mean()),
            "standard_deviation": float(last.std(ddof=1)),
            "standard_error": float(last.std(ddof=1) / math.sqrt(len(last))),
            "over_steps": values.mean(0).tolist(),
        }
    log.write_results(results)
    log.write_arrays("scores.npz", scores)
    log.plot(plot_imaml_run)
    for name, values in scores.items():
        found = results[name]
        log.say(f"{tasks.score} after {args.steps} steps from {name} weights: {found['mean']:.4f}, "
                f"standard deviation over {len(values)} tasks {found['standard_deviation']:.4f}, "
                f"standard error {found['standard_error']:.4f}")  # fmt: skip
    log.say(f"everything is in {log.directory}")


def main(argv: list[str] | None = None) -> None:
    """Parse, build, meta-learn, test, report."""
    parser = make_parser()
    args = parse(parser, argv)
    refuse_large_seed(args, 63)
    pictures = args.problem == "pictures"
    refuse_idle_flags(args, parser, [("dataset ways", pictures, "--problem pictures")])
    for name, value in DEFAULTS[args.problem].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device, dtype = set_up(args)
    tasks, test_tasks, data = make_tasks(args, dtype, device)
    initial = [t.to(device, dtype) for t in tasks.initial(torch.Generator().manual_seed(args.seed))]
    hparams = [t.clone().requires_grad_() for t in initial]
    with open_run(args, "imaml", data) as log:
        log.say(data.source)
        learning = MetaLearning(args, tasks, hparams)
        finished = run_steps(
            log, learning, "meta-step", args.metasteps, shown=("meta_loss", "score")
        )
        starts = {"initial": [t.requires_grad_() for t in initial], "learned": hparams}
        scores = {name: test(args, test_tasks, theta) for name, theta in starts.items()}
        report(args, tasks, log, data.source, scores)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(HypergradientError,))
