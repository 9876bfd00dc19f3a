"""Optimisers side by side: learned ones, Adam, SGD with momentum and Lion on the same task.

    contenders = [Contender("learned", lambda leaves: LearnedOptimizer(leaves, network)), ...]
    curves = train_all(contender, task, steps=200, draws=[(0, 1, k) for k in range(10)])

Every optimiser gets the same initial parameters and batches. A tuned learning rate is the best of
RATES on separate draws. Sources: Kingma, Ba 2015; Chen et al. 2023 (arXiv 2302.06675) for Lion.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from data_sets.image_data import ImageData
from experiment.loop import Interrupt
from experiment.seeds import TEST, TUNING, seeded_generator
from learned_optimizer import (
    CoordinateNetwork,
    LearnedOptimizer,
    NonFiniteError,
    Symmetry,
    Task,
    covariance_size,
    mean_deviations,
    never_zero,
    tail_index,
)
from learned_optimizer.recorded import Record, RecordedCalls
from models_fully_local import Params

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
LENGTH = 10  # steps that are replayed together
LAST = 10  # the loss "at" a step is the mean of the last so many losses up to it
EDGES = torch.logspace(-8, 1, 91, dtype=torch.float64)  # bins of the histograms of |u|
BLOCKS = (2, 5, 10)  # block lengths m of the tail index
PUBLISHED = 200  # the step at which published losses were measured
GOAL = 0.5  # a training loss; the step that first reaches it measures the speed of the start


class Lion(torch.optim.Optimizer):
    """theta <- theta - lr sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g.

    torch.optim has no Lion, and these two lines are not worth another dependency.
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step; returns the loss of the closure if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.add_(m.lerp(p.grad, 1 - b1).sign_(), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - b2)
        return loss


class Mixed(torch.optim.Optimizer):
    """theta <- theta + sum_i share_i (step of optimiser i at theta); each keeps a state of its own.

    parts: (share, maker of an optimiser of these parameters), ....
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        parts: Sequence[tuple[float, Callable[[Sequence[Tensor]], torch.optim.Optimizer]]],
    ) -> None:
        params = list(params)
        super().__init__(params, {})
        self.parts = [(share, make(params)) for share, make in parts]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on the gradients at hand."""
        params = self.param_groups[0]["params"]
        before = [p.clone() for p in params]
        steps = [torch.zeros_like(p) for p in params]
        for share, part in self.parts:
            part.step()
            for p, start, step in zip(params, before, steps, strict=True):
                step.add_(p - start, alpha=share)
                p.copy_(start)
        torch._foreach_add_(params, steps)


def adam(leaves: Sequence[Tensor], lr: float) -> torch.optim.Adam:
    """Adam, which on a GPU counts its steps there, so that they can be recorded."""
    optimizer = torch.optim.Adam(leaves, lr, capturable=leaves[0].is_cuda)
    optimizer._warned_capturable_if_run_uncaptured = True  # some of its steps are not recorded
    return optimizer


# Constructors and default learning rates by name
BASELINES: dict[str, tuple[Callable, float]] = {
    "adam": (adam, 0.03),
    "sgd": (lambda leaves, lr: torch.optim.SGD(leaves, lr, momentum=0.9), 0.1),
    "lion": (Lion, 1e-4),
}


MIXED_RATES = (0.5, 0.005)  # of SGD, momentum .9, and of Lion, where their steps are mixed


@dataclass(frozen=True)
class HeldOut:
    """Inputs and targets of no training, on which the loss is told every so many steps.

    running: batch norm normalises the inputs by its running statistics of the training batches,
    else by the inputs' own, all at once.
    """

    inputs: Tensor
    targets: Tensor
    every: int
    running: bool = False


@dataclass(frozen=True)
class Contender:
    """A named optimiser; make(leaves) creates it for a list of parameters."""

    name: str
    make: Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Curves:
    """The trainings by one optimiser, and measurements along the first of them.

    losses: [runs, steps + 1], the loss of each batch before the step on it, and one after the last
        step; inf from the first loss on that is not finite.
    accuracies: [runs, steps + 1], likewise the share of inputs classified correctly; nan where
        targets are no classes, and after a training has ended early.
    test_losses, test_accuracies: [runs, tests], on a test set, at each of test_steps.
    norms: [steps, tensors], of each tensor's "parameter" (before the step), "gradient", "update".
    update, gradient: by a symmetry's label, the mean over units of the relative |deviation| of the
        parameters' change and of the gradient, [steps].
    histograms: [steps measured, bins], of |u|, the sizes of the parameters' changes.
    still: [steps measured], the number of |u| that are exactly 0.
    parameters: the number of parameters; those with |u| outside EDGES are in no bin.
    """

    losses: Tensor
    accuracies: Tensor
    test_losses: Tensor
    test_accuracies: Tensor
    test_steps: Tensor
    norms: dict[str, Tensor]
    update: dict[str, Tensor]
    gradient: dict[str, Tensor]
    histograms: Tensor
    still: Tensor
    parameters: int

    def at(self, step: int) -> Tensor:
        """The mean of the LAST losses up to a step, [runs]."""
        return self.losses[:, max(0, step - LAST + 1) : step + 1].mean(1)

    def summary(self) -> dict[str, float | list[float]]:
        """The loss at the last step (mean, deviation, all runs), and the step that reaches GOAL.

        That is the first step at which the mean loss is at most GOAL, or inf. Trainings longer than
        PUBLISHED steps also have the loss at that step; classifiers the accuracy as the loss; with
        a test set its last loss and accuracy.
        """
        steps = self.losses.shape[1] - 1
        last, reached = self.at(steps), (self.losses.mean(0) <= GOAL).nonzero()
        statistics = {
            "loss": last.mean().item(),
            "deviation": _deviation(last),
            "runs": last.tolist(),
            f"steps_to_{GOAL}": int(reached[0, 0]) if len(reached) else math.inf,
        }
        if not self.accuracies.isnan().all():
            accuracy = self.accuracies[:, max(0, steps - LAST + 1) :].mean().item()
            statistics["train_accuracy"] = accuracy
        if len(self.test_steps):
            statistics["test_loss"] = self.test_losses[:, -1].mean().item()
            statistics["test_accuracy"] = self.test_accuracies[:, -1].mean().item()
        if steps > PUBLISHED:
            early = self.at(PUBLISHED)
            statistics[f"loss_at_{PUBLISHED}"] = early.mean().item()
            statistics[f"deviation_at_{PUBLISHED}"] = _deviation(early)
        return statistics

    def arrays(self) -> dict[str, np.ndarray]:
        """All fields as arrays, under names such as "losses" and "update/rescale"."""
        by_label = {
            f"{name}/{label}": values.numpy()
            for name in ("update", "gradient")
            for label, values in getattr(self, name).items()
        }
        counts = {"still": self.still.numpy(), "parameters": np.array(self.parameters)}
        told = ("losses", "accuracies", "test_losses", "test_accuracies", "test_steps",
                "histograms")  # fmt: skip
        norms = {f"norms/{name}": values.numpy() for name, values in self.norms.items()}
        return {name: getattr(self, name).numpy() for name in told} | norms | counts | by_label


def _deviation(values: Tensor) -> float:
    return values.std().item() if len(values) > 1 else 0.0


def halves(data: ImageData) -> tuple[ImageData, ImageData]:
    """The first half of the images, to meta-train optimisers on, and the second, to judge them."""
    middle = len(data) // 2
    return data.subset(slice(middle)), data.subset(slice(middle, None))


def learned(name: str, network: CoordinateNetwork, lr: float = 1.0) -> Contender:
    """A learned optimiser as a contender; `lr` is a factor of its steps."""
    return Contender(name, lambda leaves: LearnedOptimizer(leaves, network, lr))


def baseline(name: str, lr: float | None = None) -> Contender:
    """One of BASELINES at a learning rate, by default its own."""
    make, default = BASELINES[name]
    rate = default if lr is None else lr
    return Contender(f"{name} {rate:g}", lambda leaves: make(leaves, lr=rate))


def sgd_and_lion(share: float) -> Contender:
    """SGD with momentum and Lion mixed, so much of Lion."""
    makers = BASELINES["sgd"][0], BASELINES["lion"][0]
    shares = (1 - share, share)
    parts = [
        (part, partial(make, lr=rate))
        for part, make, rate in zip(shares, makers, MIXED_RATES, strict=True)
    ]
    return Contender(f"sgd-lion {share:g}", lambda leaves: Mixed(leaves, parts))


@dataclass(frozen=True)
class OptimizerComparison:
    """A comparison of optimisers by `runs` trainings of `steps` steps, from the same draws.

    tuning_runs: the number of trainings that judge a learning rate.
    weights: any tensor of the dtype and device that the parameters are to have.
    lion_shares: the shares of Lion where SGD and Lion are mixed, beside BASELINES.
    record: makes recordings of steps; see `train_all`.
    """

    seed: int
    steps: int
    runs: int
    tuning_runs: int
    weights: Tensor
    lion_shares: Sequence[float] = ()
    record: Record | None = None

    @property
    def names(self) -> list[str]:
        """What `contenders` takes, in the order in which it is told."""
        return ["learned", *BASELINES, *(["sgd-lion"] if self.lion_shares else [])]

    def contenders(
        self, name: str, network: CoordinateNetwork, task: Task, interrupt: Interrupt
    ) -> tuple[list[Contender], dict[str, float]]:
        """The contenders for a name, and losses by rate.

        For one of BASELINES they are those of `at_default_and_best_rate`; for "sgd-lion" a mixture
        for each of lion_shares; for another name the learned optimiser of `network`. The latter
        two have no losses by rate. Both are empty if interrupted.
        """
        if name in BASELINES:
            return self.at_default_and_best_rate(name, task, interrupt)
        if interrupt.requested:
            return [], {}
        if name == "sgd-lion":
            return [*map(sgd_and_lion, self.lion_shares)], {}
        return [learned(name, network)], {}

    def at_default_and_best_rate(
        self, name: str, task: Task, interrupt: Interrupt
    ) -> tuple[list[Contender], dict[str, float]]:
        """A baseline at its default rate and, if another is better, also at the best of RATES.

        The second result is the mean loss at the last step by rate. Both are empty if interrupted.
        """
        draws = [(self.seed, TUNING, k) for k in range(self.tuning_runs)]
        losses = {}
        for rate in sorted({*RATES, BASELINES[name][1]}):
            if interrupt.requested:
                return [], {}
            curves = train_all(
                baseline(name, rate), task, self.steps, draws, self.weights, record=self.record
            )
            losses[rate] = curves.at(self.steps).mean().item()
        best = min(losses, key=losses.get)
        rates = dict.fromkeys([BASELINES[name][1], best])
        return [baseline(name, rate) for rate in rates], {f"{r:g}": v for r, v in losses.items()}

    def curves(
        self,
        contender: Contender,
        task: Task,
        symmetries: Sequence[Symmetry],
        histogram_steps: Sequence[int],
        test: HeldOut | None = None,
    ) -> Curves:
        """The trainings by which a contender is judged; for the arguments see `train_all`."""
        draws = [(self.seed, TEST, k) for k in range(self.runs)]
        return train_all(
            contender, task, self.steps, draws, self.weights, symmetries, histogram_steps, test,
            self.record,
        )  # fmt: skip


def train_all(
    contender: Contender,
    task: Task,
    steps: int,
    draws: Sequence[tuple[int, ...]],
    weights: Tensor,
    symmetries: Sequence[Symmetry] = (),
    histogram_steps: Sequence[int] = (),
    test: HeldOut | None = None,
    record: Record | None = None,
) -> Curves:
    """One training from each draw; symmetries, norms and |u| are measured along the first.

    draws: keys of `seeded_generator`.
    weights: any tensor of the dtype and device that the parameters are to have.
    histogram_steps: the steps, counted from 1, whose |u| are counted in histograms.
    record: makes recordings of steps, which are replayed in trainings where nothing else is
        measured or learned; None: there are none.
    """
    runs, measured = [], _Measurements(symmetries, histogram_steps)
    calls = RecordedCalls(record)
    for number, draw in enumerate(draws):
        run = _Training(contender, task, draw, weights, test)
        wanted = None if number or not (symmetries or histogram_steps) else measured
        if record is None or wanted or run.statistics:
            run.advance(steps, measured if number == 0 else None)
        else:
            run.replay(steps, calls)
        runs.append(run.curves(steps))
    return Curves(*map(torch.stack, zip(*runs, strict=True)), steps_of_tests(steps, test),
                  **measured.tensors())  # fmt: skip


def steps_of_tests(steps: int, test: HeldOut | None) -> Tensor:
    """Before which steps the test set is looked at; of the last it is after it."""
    return torch.arange(0) if test is None else torch.arange(0, steps + 1, test.every)


class _Training:
    """One training, and its numbers so far; they are read at its end, lest each step wait."""

    def __init__(
        self,
        contender: Contender,
        task: Task,
        draw: tuple[int, ...],
        weights: Tensor,
        test: HeldOut | None,
    ) -> None:
        self.optimizee, self.test = task.optimizee, test
        self.params = self.optimizee.initial(
            seeded_generator(*draw, 0), weights.dtype, weights.device
        )
        self.leaves = [t.requires_grad_() for layer in self.params for t in layer.values()]
        self.optimizer, self.make = contender.make(self.leaves), contender.make
        self.batches = task.batches(seeded_generator(*draw, 1))
        self.seen: list[tuple[Tensor, Tensor]] = []  # loss and accuracy of each batch
        self.tested: list[tuple[Tensor, Tensor]] = []
        running = test is not None and test.running
        self.statistics = RunningStatistics(self.optimizee.layers) if running else None

    def advance(self, steps: int, measured: "_Measurements | None") -> None:
        """So many steps and a loss after them; it ends early where a gradient is not finite."""
        if self._take(0, steps, measured):
            self._see(steps)

    def replay(self, steps: int, calls: RecordedCalls) -> None:
        """The same without measurements; a few steps at a time are one of the calls.

        calls: of this contender on this task. The first step, which makes the optimiser's state, is
            none of them.
        """
        if not self._take(0, 1, None):
            return
        tensors, done = self._state_of(self.optimizer, self.leaves), 1
        sound = torch.ones_like(self.leaves[0].flatten()[0], dtype=torch.bool)
        while done < steps:
            every = LENGTH if self.test is None else self.test.every
            count = min(LENGTH, steps - done, every - done % every)
            self._look_at_test(done)
            batches = [next(self.batches) for _ in range(count)]
            arguments = [leaf.detach() for leaf in self.leaves], tensors, sound, batches
            leaves, tensors, sound, losses, accuracies = calls("steps", self._steps, arguments)
            self.seen += zip(losses, accuracies, strict=True)
            with torch.no_grad():
                torch._foreach_copy_(self.leaves, leaves)
            done += count
        self._see(steps)

    def _take(self, first: int, last: int, measured: "_Measurements | None") -> bool:
        """The steps from first to last - 1; whether all gradients were finite."""
        for step in range(first, last):
            loss = self._see(step)
            _set_gradients(loss, self.leaves)
            before = _copied(self.params) if measured else None
            try:
                self.optimizer.step()
            except NonFiniteError:
                return False
            if measured:
                measured.add(step + 1, before, self.params)
        return True

    def _see(self, step: int) -> Tensor:
        """The loss of the next batch before a step; it is recorded, with that of the test set."""
        with self.statistics.learned() if self.statistics else nullcontext():
            loss, accuracy = self._judged(*next(self.batches))
        self.seen.append((loss.detach(), accuracy))
        self._look_at_test(step)
        return loss

    def _steps(
        self, leaves: list[Tensor], state: list, sound: Tensor, batches: list
    ) -> tuple[list[Tensor], list, Tensor, list[Tensor], list[Tensor]]:
        """A step for each batch, as a function: parameters, state, losses and accuracies.

        From the first gradient on that the optimiser would refuse, losses are infinite.
        """
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        optimizer, parts = self.make(leaves), iter(leaves)
        for part, of_part in zip(_parts(optimizer), state, strict=True):
            for leaf, of_leaf in zip(leaves, of_part, strict=True):
                part.state[leaf] = {name: t.clone() for name, t in of_leaf.items()}
        params = [{name: next(parts) for name in layer} for layer in self.params]
        losses, accuracies = [], []
        for batch in batches:
            loss, accuracy = self._judged(*batch, params)
            losses.append(torch.where(sound, loss.detach(), math.inf))
            accuracies.append(accuracy)
            _set_gradients(loss, leaves)
            if isinstance(optimizer, LearnedOptimizer):
                sound = sound & optimizer.step_unchecked()
            else:
                optimizer.step()
        after = self._state_of(optimizer, leaves)
        return [t.detach() for t in leaves], after, sound, losses, accuracies

    @staticmethod
    def _state_of(optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor]) -> list:
        return [[dict(part.state[leaf]) for leaf in leaves] for part in _parts(optimizer)]

    def _judged(
        self, inputs: Tensor, targets: Tensor, params: Params | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the share of inputs that are classified as they should, or nan."""
        outputs = self.optimizee(inputs, self.params if params is None else params)
        loss = self.optimizee.loss_of(outputs, targets)
        if targets.is_floating_point():
            return loss, loss.new_full((), math.nan)
        return loss, (outputs.argmax(1) == targets).to(loss.dtype).mean()

    @torch.no_grad()
    def _look_at_test(self, step: int) -> None:
        if self.test is not None and step % self.test.every == 0:
            with self.statistics.used() if self.statistics else nullcontext():
                self.tested.append(self._judged(self.test.inputs, self.test.targets))

    def curves(self, steps: int) -> list[Tensor]:
        """Losses and accuracies of batches [steps + 1] and of the test set [tests]."""
        count = len(steps_of_tests(steps, self.test))
        return [*_padded(self.seen, steps + 1), *_padded(self.tested, count)]


def _set_gradients(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    for leaf, g in zip(leaves, gradients, strict=True):
        leaf.grad = g


def _parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimisers that keep a state: this one, or those that it mixes."""
    return [part for _, part in optimizer.parts] if isinstance(optimizer, Mixed) else [optimizer]


class RunningStatistics:
    """Running means and variances of what batch norm layers see, as torch has them.

    They stand beside the layers, which keep none of a training. Momentum: the layers' own.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, _BatchNorm)]
        self.of: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def learned(self) -> AbstractContextManager:
        """While it is open, statistics of each batch enter."""
        return self._hooked(self._learn)

    def used(self) -> AbstractContextManager:
        """While it is open, layers normalise by the statistics so far."""
        return self._hooked(self._normalise)

    @contextmanager
    def _hooked(self, hook: Callable) -> Iterator[None]:
        hooks = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()

    @torch.no_grad()
    def _learn(self, layer: _BatchNorm, inputs: tuple[Tensor], _: Tensor) -> None:
        (x,) = inputs
        zeros = x.new_zeros(x.shape[1])
        mean, variance = self.of.get(layer, (zeros, zeros + 1))
        mean, variance = mean.clone(), variance.clone()
        functional.batch_norm(x, mean, variance, training=True, momentum=layer.momentum)
        self.of[layer] = mean, variance

    def _normalise(self, layer: _BatchNorm, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        mean, variance = self.of[layer]
        return functional.batch_norm(
            inputs[0], mean, variance, layer.weight, layer.bias, eps=layer.eps
        )


def _padded(rows: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Losses [count], inf from the first that is not finite on, and accuracies, then nan."""
    losses = torch.full((count,), math.inf, dtype=torch.float64)
    accuracies = torch.full((count,), math.nan, dtype=torch.float64)
    if rows:
        seen = torch.stack([torch.stack(row) for row in rows]).double().cpu()
        losses[: len(rows)], accuracies[: len(rows)] = seen.T
    left = (~losses.isfinite()).cumsum(0) > 0
    return losses.where(~left, math.inf), accuracies.where(~left, math.nan)


class _Measurements:
    """Deviations from symmetries, and histograms of |u|, along one training."""

    def __init__(self, symmetries: Sequence[Symmetry], histogram_steps: Sequence[int]) -> None:
        self.symmetries, self.histogram_steps = symmetries, histogram_steps
        self.found: dict[str, dict[str, list[Tensor]]] = {"update": {}, "gradient": {}, "norms": {}}
        self.histograms: list[Tensor] = []
        self.still: list[int] = []
        self.parameters = 0

    @torch.no_grad()
    def add(self, step: int, before: Params, after: Params) -> None:
        """Measure one step from the parameters before and after it.

        The .grad of those after is the gradient that the step was made with.
        """
        update = [
            {n: t - layer[n] for n, t in old.items()}
            for old, layer in zip(before, after, strict=True)
        ]
        gradient = [{n: t.grad for n, t in layer.items()} for layer in after]
        for name, v in (("update", update), ("gradient", gradient)):
            for label, size in mean_deviations(self.symmetries, v, before).items():
                self.found[name].setdefault(label, []).append(size)
        for name, v in (("parameter", before), ("gradient", gradient), ("update", update)):
            norms = torch._foreach_norm([t for layer in v for t in layer.values()])
            self.found["norms"].setdefault(name, []).append(torch.stack(norms))
        if step in self.histogram_steps:
            sizes = torch.cat([t.flatten() for layer in update for t in layer.values()]).abs()
            self.histograms.append(torch.histogram(sizes.double().cpu(), EDGES).hist)
            self.still.append(int((sizes == 0).sum()))
            self.parameters = len(sizes)

    def tensors(self) -> dict:
        """The keyword arguments of Curves."""
        curves = {
            name: {label: torch.stack(sizes).cpu() for label, sizes in of_labels.items()}
            for name, of_labels in self.found.items()
        }
        empty = torch.zeros(0, len(EDGES) - 1, dtype=torch.float64)
        histograms = torch.stack(self.histograms) if self.histograms else empty
        counts = {"still": torch.tensor(self.still), "parameters": self.parameters}
        return {**curves, "histograms": histograms, **counts}


def noise_statistics(
    network: CoordinateNetwork,
    task: Task,
    steps: int,
    minibatches: int,
    draw: tuple[int, ...],
    weights: Tensor,
) -> dict[str, dict]:
    """Statistics of minibatch noise after `steps` steps of the learned optimiser.

    From that point, gradients and updates are computed for many minibatches. For both, and for each
    layer that has parameters: the tail index of the differences between minibatches for each m of
    BLOCKS; the share of coordinates that it is estimated from, those whose differences are never 0;
    trace and largest eigenvalue of the covariance over minibatches.

    minibatches: the number of minibatches.
    draw, weights: as in `train_all`.
    """
    optimizee = task.optimizee
    params = optimizee.initial(seeded_generator(*draw, 0), weights.dtype, weights.device)
    theta, batches = optimizee.flat(params), task.batches(seeded_generator(*draw, 1))
    memory, sizes = network.memory(len(theta), theta), optimizee.sizes()

    def answer(theta: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = optimizee.gradients(theta[None], [next(batches)])[1][0]
        x, memory = network.observe(g, theta, memory.clone(), sizes)
        return g, network.out_mul * network.step_(x, memory), memory

    for _ in range(steps):
        _, update, memory = answer(theta, memory)
        theta = theta + update
    gradients, updates, _ = zip(*(answer(theta, memory) for _ in range(minibatches)), strict=True)
    samples = {"gradient": torch.stack(gradients), "update": torch.stack(updates)}
    return {name: _by_layer(optimizee.sizes_by_layer(), s) for name, s in samples.items()}


def _by_layer(sizes: Sequence[int], samples: Tensor) -> dict[str, list]:
    parts = [part for part in samples.split(list(sizes), 1) if part.shape[1]]
    # differences of two independent draws are symmetric, have mean 0, and the same tail index
    symmetric = [part[: len(part) // 2 * 2 : 2] - part[1::2] for part in parts]
    trace, largest = zip(*map(covariance_size, parts), strict=True)
    return {
        "tail_index": {m: [tail_index(part, m) for part in symmetric] for m in BLOCKS},
        "tail_index_share": [never_zero(part).double().mean().item() for part in symmetric],
        "trace": list(trace),
        "largest_eigenvalue": list(largest),
    }


def _copied(params: Params) -> Params:
    return [{n: t.detach().clone() for n, t in layer.items()} for layer in params]
