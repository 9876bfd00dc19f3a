"""iMAML on Omniglot: initial weights from which a few steps learn characters of new alphabets.

    python examples/omniglot.py                                      5 ways, 1 shot
    python examples/omniglot.py --shots 5
    python examples/omniglot.py --ways 20 --tasks 16
    python examples/omniglot.py --method first_order                 to compare
    python examples/omniglot.py --resume runs/omniglot-...

Tasks, network and meta-batch are those of the original program (github.com/aravindr93/imaml_dev):
characters are turned by 0, 90, 180 or 270 degrees, which makes four classes of each, and a task has
no character twice; there are as many queries as shots; batch normalization takes the statistics of
the given points, at tests too. docs/hypergradients.md says what differs, and why. On a CUDA device
a meta-step is one recorded graph. Omniglot is looked for in --data-dir (data_sets/omniglot.py).
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Generator, Tensor

from comparison.few_shot import (
    DOWNSAMPLING,
    IMPLICIT,
    METHODS,
    Adaptation,
    ConvolutionalNetworks,
    MetaGradient,
    Points,
)
from data_sets.omniglot import Characters, load_omniglot
from experiment.command_line import (
    UserError,
    computing_parser,
    nonnegative_float,
    parse,
    positive_float,
    positive_int,
    refuse_idle_flags,
    run_command,
)
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import TEST, seeded_generator
from figures.examples import plot_imaml_run
from kernels.recorded_updates import CudaRecording, Recording, RecordingError

SAVE_EVERY = 50  # meta-steps
CONFIDENCE = 1.96  # standard errors to each side, of an interval of 95 %
TURNS = 4


# ---- tasks ----


class Tasks:
    """Tasks of turned characters: `draw` chooses them, `points` has their pictures.

    The pictures are kept on the device in all four orientations.
    """

    def __init__(
        self, characters: Characters, args, dtype: torch.dtype, device: torch.device
    ) -> None:
        images = characters.images.to(device)
        self.turned = torch.stack([images.rot90(turns, (-2, -1)) for turns in range(TURNS)])
        self.ways, self.shots, self.queries = args.ways, args.shots, args.queries
        self.dtype = dtype
        self.labels = torch.arange(self.ways, device=device)[:, None]

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Characters, turns and drawings, int64 [tasks, ways, 2 + shots + queries]."""
        _, characters, drawings = self.turned.shape[:3]
        shape = count, self.ways
        chosen = torch.rand(count, characters, generator=generator).argsort(1)[:, : self.ways]
        turns = torch.randint(TURNS, shape, generator=generator)
        order = torch.rand(*shape, drawings, generator=generator).argsort(2)
        drawn = torch.cat(
            [chosen[..., None], turns[..., None], order[..., : self.shots + self.queries]], dim=2
        )
        return drawn.to(self.turned.device, non_blocking=True)

    def points(self, drawn: Tensor) -> tuple[Points, Points]:
        """The support and the queries of tasks that `draw` has chosen."""
        chosen, turns, order = drawn[..., :1], drawn[..., 1:2], drawn[..., 2:]
        pictures = self.turned[turns, chosen, order].to(self.dtype) / 255

        def part(x: Tensor) -> Points:
            labels = self.labels.expand(self.ways, x.shape[2]).reshape(1, -1)
            return Points(x.flatten(1, 2), labels.expand(len(x), -1))

        return part(pictures[:, :, : self.shots]), part(pictures[:, :, self.shots :])


# ---- computations that are recorded on a CUDA device ----


@dataclass
class Replayed:
    """A function of tensors, recorded at its first call; it is called itself if `record` is None.

    The results are valid until the next call.

    Attributes:
        say: shows a line if the function can't be recorded.
    """

    function: Callable[..., list[Tensor]]
    record: type[Recording] | None
    say: Callable[[str], None]
    recording: Callable[..., list[Tensor]] | None = None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        if self.recording is None:
            self.recording = self._first(tensors)
        return self.recording(*tensors)

    def _first(self, tensors: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
        if self.record is None:
            return self.function
        try:
            return self.record(self.function, tensors)
        except RecordingError as problem:
            self.say(f"each operation is launched by itself: {problem}")
            return self.function


def recording_on(device: torch.device) -> type[Recording] | None:
    """How computations are recorded on a device; None: not at all."""
    return CudaRecording if device.type == "cuda" else None


class MetaLearning:
    """Adam on theta; see `run_steps`."""

    def __init__(
        self, args, adaptation: Adaptation, tasks: Tasks, theta: Tensor, say: Callable[[str], None]
    ) -> None:
        self.args, self.tasks, self.theta = args, tasks, theta
        self.optimizer, self.done = torch.optim.Adam([theta], lr=args.lr), 0

        def gradient(theta: Tensor, drawn: Tensor) -> list[Tensor]:
            return [*adaptation.meta_gradient(theta, *tasks.points(drawn))]

        self.gradient = Replayed(gradient, recording_on(theta.device), say)

    @property
    def finished(self) -> bool:
        """Whether all meta-steps are done."""
        return self.done >= self.args.metasteps

    def step(self) -> dict[str, float]:
        """One meta-step. Raises FloatingPointError if the gradient is not finite."""
        random = seeded_generator(self.args.seed, self.done)
        drawn = self.tasks.draw(self.args.tasks, random)
        found = MetaGradient(*self.gradient(self.theta.detach(), drawn))
        self.theta.grad = found.gradient.clone()
        means = [found.gradient.norm(), *(of_tasks.mean() for of_tasks in found[1:])]
        norm, loss, accuracy, residual, early = torch.stack(means).tolist()
        self.done += 1
        if not math.isfinite(norm + loss):
            raise FloatingPointError(
                f"meta-step {self.done}: hypergradient not finite; take a smaller --lr"
            )
        self.optimizer.step()
        return {
            "meta_loss": loss,
            "accuracy": accuracy,
            "hypergradient_norm": norm,
            "residual": residual,
            "ended_early": early,
        }

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        state = {"done": self.done, "theta": self.theta.detach()}
        return state | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Resume from the result of `state_dict`."""
        self.done = state["done"]
        self.theta.data.copy_(state["theta"])
        self.optimizer.load_state_dict(state["optimizer"])


def test(
    args, adaptation: Adaptation, tasks: Tasks, theta: Sequence[Tensor], say: Callable[[str], None]
) -> list[np.ndarray]:
    """Accuracies [test tasks, steps + 1] from each theta, on the same tasks."""

    def accuracies(theta: Tensor, drawn: Tensor) -> list[Tensor]:
        return [adaptation.accuracies_over_steps(theta, *tasks.points(drawn))]

    replayed = Replayed(accuracies, recording_on(theta[0].device), say)
    found = [[] for _ in theta]
    for first in range(0, args.test_tasks, args.tasks):
        drawn = tasks.draw(args.tasks, seeded_generator(args.seed, TEST, first))
        for of_theta, start in zip(found, theta, strict=True):
            of_theta.append(replayed(start, drawn)[0].clone())
    return [torch.cat(parts)[: args.test_tasks].numpy(force=True) for parts in found]


# ---- the command ----


def make_parser():
    """The command's flags."""
    parser = computing_parser("Meta-learn initial weights on Omniglot.", "omniglot")
    add = parser.add_argument_group("tasks").add_argument
    add("--data-dir", "--data_dir", type=Path, default="data", metavar="DIR",
        help="folder of Omniglot")  # fmt: skip
    add("--ways", type=positive_int, default=5, help="characters of a task")
    add("--shots", type=positive_int, default=1, help="drawings of each to adapt to")
    add("--queries", type=positive_int, metavar="N",
        help="drawings of each to judge by (default: as many as shots)")  # fmt: skip
    add("--downsampling", choices=DOWNSAMPLING, default=DOWNSAMPLING[0],
        help="between layers: every second response, or the largest of four")  # fmt: skip
    add = parser.add_argument_group("adaptation").add_argument
    add("--pull", type=positive_float, default=2.0, metavar="LAMBDA",
        help="strength of the pull towards theta")  # fmt: skip
    add("--steps", type=positive_int, default=16, help="steps of gradient descent")
    add("--rate", type=positive_float, default=0.025, help="rate of gradient descent")
    add = parser.add_argument_group("meta-learning").add_argument
    add("--method", choices=METHODS, default=IMPLICIT, help="what theta learns from")
    add("--damping", type=nonnegative_float, default=22.0, metavar="D",
        help="added to LAMBDA in conjugate gradients; 22 as in the original")  # fmt: skip
    add("--K", type=positive_int, default=5, help="iterations of conjugate gradients")
    add("--tasks", type=positive_int, default=32, help="tasks of a meta-step")
    add("--metasteps", type=positive_int, default=500, help="number of meta-steps")
    add("--lr", type=positive_float, default=1e-3, help="learning rate of Adam")
    add("--test_tasks", type=positive_int, default=600, help="test tasks at the end")
    return parser


def check(args, characters: Sequence[Characters]) -> None:
    """Raise UserError if there are too few characters or drawings for the tasks."""
    fewest = min(len(part) for part in characters)
    for flag, least, why in (("ways", 2, "to tell apart"), ("test_tasks", 2, "for a deviation")):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)}: it takes {least} {why}")
    if args.ways > fewest:
        raise UserError(f"--ways {args.ways}: there are {fewest} characters for training or tests")
    drawings = characters[0].images.shape[1]
    if args.shots + args.queries > drawings:
        raise UserError(
            f"--shots {args.shots} --queries {args.queries}: there are {drawings} drawings of a "
            "character"
        )


def report(args, log: RunLog, source: str, scores: Mapping[str, np.ndarray]) -> None:
    """Print and write the accuracies with their confidence; draw the figure."""
    results = {"data": source, "score": "accuracy", "chance": 1 / args.ways}
    for name, values in scores.items():
        width = CONFIDENCE * values.std(0, ddof=1) / math.sqrt(len(values))
        results[name] = {
            "tasks": len(values),
            "mean": float(values[:, -1].mean()),
            "confidence": float(width[-1]),
            "unadapted": float(values[:, 0].mean()),
            "over_steps": values.mean(0).tolist(),
        }
    log.write_results(results)
    log.write_arrays("scores.npz", scores)
    log.plot(plot_imaml_run)
    for name in scores:
        found = {key: 100 * results[name][key] for key in ("mean", "confidence", "unadapted")}
        log.say(
            f"from {name} weights {found['mean']:.2f} ± {found['confidence']:.2f} % "
            f"(95 % confidence, {args.test_tasks} tasks of new alphabets), without adaptation "
            f"{found['unadapted']:.2f} %, chance {100 / args.ways:.2f} %"
        )
    log.say(f"everything is in {log.directory}")


def main(argv: list[str] | None = None) -> None:
    """Parse, load, meta-learn, test, report."""
    parser = make_parser()
    args = parse(parser, argv)
    refuse_idle_flags(args, parser, [("K damping", args.method == IMPLICIT, "--method implicit")])
    args.queries = args.queries or args.shots
    device, dtype = set_up(args)
    data = load_omniglot(args.data_dir)
    check(args, (data.train, data.test))
    tasks, test_tasks = (Tasks(part, args, dtype, device) for part in (data.train, data.test))
    network = ConvolutionalNetworks(args.ways, args.downsampling)
    adaptation = Adaptation(
        network, args.steps, args.rate, args.pull, args.damping, args.K, args.method
    )
    initial = network.initial(seeded_generator(args.seed)).to(device, dtype)
    theta = initial.clone().requires_grad_()
    with open_run(args, "omniglot", data) as log:
        log.say(data.source)
        learning = MetaLearning(args, adaptation, tasks, theta, log.say)
        finished = run_steps(
            log, learning, "meta-step", args.metasteps, shown=("meta_loss", "accuracy"),
            checkpoint_every=SAVE_EVERY,
        )  # fmt: skip
        scores = test(args, adaptation, test_tasks, [initial, theta.detach()], log.say)
        report(args, log, data.source, dict(zip(("initial", "learned"), scores, strict=True)))
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=())
