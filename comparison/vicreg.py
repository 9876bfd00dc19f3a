"""VICReg: trains features that agree on two views of an image without collapsing.

    loss = lambda s(Z1, Z2) + mu (v(Z1) + v(Z2)) + nu (c(Z1) + c(Z2))
    s = mean over images and features of (Z1 - Z2)^2
    v = mean over features of max(0, gamma - sqrt(C_ii + 1e-4))
    c = 1/D sum_{i != j} C_ij^2,      C = covariance of the columns of Z [B, D], over B - 1

Source: Bardes, Ponce, LeCun 2022, VICReg (arXiv 2105.04906), equations 1 to 6. There s sums over
the features; here it is their mean, as in the pseudo-code of its appendix. Up to a common factor,
the weights 250, 25, 1000 with gamma = 0.1 are the paper's 25, 25, 1 with gamma = 1 for features
divided by 0.1: a sigmoid unit's standard deviation is at most 1/2. There is no expander network;
the loss sees the features themselves.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from comparison.settings import VICRegSettings
from data_sets.counted_views import CountedPairs
from data_sets.image_data import DataError, ImageData
from data_sets.views import Views
from experiment.choices import HOST
from experiment.errors import NonFiniteError
from experiment.seeds import seeded_generator
from experiment.view_strengths import ViewStrengths
from kernels.recorded_training import AdamWState, Descent
from models_fully_local import Params

EPSILON = 1e-4  # under the square root of a variance: keeps its gradient finite
TERMS = ("invariance", "variance", "covariance")
DEFAULTS = VICRegSettings()
CPU = {"dtype": torch.float64, "device": "cpu"}  # for random draws, whatever the default device


def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance: float = VICRegSettings.invariance,
    variance: float = VICRegSettings.variance,
    covariance: float = VICRegSettings.covariance,
    hinge: float = VICRegSettings.hinge,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of features z1, z2 [B, D] of two views of B images, and its three terms.

    The terms are detached scalars, not yet weighted; the variance and covariance terms are summed
    over the two views. Raises ValueError for other shapes and for B < 2.

    invariance, variance, covariance: the weights lambda, mu, nu.
    hinge: gamma, the standard deviation above which a feature costs nothing.
    """
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(
            f"features have shapes {list(z1.shape)} and {list(z2.shape)}; "
            "expected the same [B, D] twice, B at least 2"
        )
    spread1, correlation1 = _spread_and_correlation(z1, hinge)
    spread2, correlation2 = _spread_and_correlation(z2, hinge)
    terms = ((z1 - z2).square().mean(), spread1 + spread2, correlation1 + correlation2)
    loss = invariance * terms[0] + variance * terms[1] + covariance * terms[2]
    return loss, {name: term.detach() for name, term in zip(TERMS, terms, strict=True)}


def _spread_and_correlation(z: Tensor, hinge: float) -> tuple[Tensor, Tensor]:
    """v and c of features [B, D], from one Gram matrix."""
    centred = z - z.mean(0)
    C = centred.T @ centred / (len(z) - 1)
    variances = C.diagonal()
    v = (hinge - (variances + EPSILON).sqrt()).relu().mean()
    c = (C - variances.diag_embed()).square().sum() / len(C)
    return v, c


class VICReg:
    """The state of a training run on pairs of augmented views; `train_epoch` is one pass.

        training = VICReg(model, data, seed=0)
        while training.epoch < 100:
            training.train_epoch()
        features = model(x, training.params)

    The optimiser is AdamW (Loshchilov, Hutter 2019) with a constant learning rate. Raises DataError
    for a batch size below 2 or above the number of images.

    model: called as model(x, params) on float [B, C, H, W], returns [B, D].
    views: how the two views of an image are made.
    random_numbers: of the views, from a generator on the host or counted on the data's device.
    params: a list with one dict of tensors per layer, on the data's device, changed in place.
    epoch: the number of passes done. Each pass has its own generator, seeded with (seed, epoch), so
        that a resumed run needs no generator's state.
    record: makes recordings of steps, which are then replayed and not awaited; None: the host waits
        for each step.
    """

    record: Callable | None = None

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        seed: int = 0,
        settings: VICRegSettings = DEFAULTS,
        *,
        views: ViewStrengths = ViewStrengths(),  # noqa: B008, it is frozen
        dtype: torch.dtype = torch.float32,
        random_numbers: str = HOST,
    ) -> None:
        if not 2 <= settings.batch_size <= len(data):
            raise DataError(
                f"batch size {settings.batch_size} must be from 2, for a variance, to {len(data)}"
            )
        self.model, self.data, self.seed = model, data, seed
        self.batch_size, self.dtype = settings.batch_size, dtype
        self.views = Views(data, self.batch_size, views, dtype=dtype, random_numbers=random_numbers)
        weights = {name: getattr(settings, name) for name in (*TERMS, "hinge")}
        self.loss = partial(vicreg_loss, **weights)
        drawn = uniform_parameters(model, seeded_generator(seed, 0, 0))
        self.params = [
            {name: t.to(data.images.device, dtype).requires_grad_() for name, t in layer.items()}
            for layer in drawn
        ]
        self.optimizer = torch.optim.AdamW(
            self._leaves(), settings.lr, weight_decay=settings.weight_decay
        )
        self.epoch, self._descents = 0, {}

    def _leaves(self) -> list[Tensor]:
        return [tensor for layer in self.params for tensor in layer.values()]

    def train_epoch(self) -> dict[str, float]:
        """Make one pass over the images in a new order; return means over its steps, and seconds.

        A last incomplete batch is dropped. Raises NonFiniteError if the loss or its gradient is not
        finite, before the step is taken.
        """
        begin = time.perf_counter()
        generator = seeded_generator(self.seed, self.epoch, 1)
        rows = self.train_on(self.views(generator), len(self.data) // self.batch_size)
        self.epoch += 1
        means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return means | {"seconds": time.perf_counter() - begin}

    def train_on(
        self, pairs: Iterator[tuple[Tensor, Tensor]], steps: int
    ) -> list[dict[str, float]]:
        """So many steps, each on a pair of batches; returns their numbers. Raises as `train_epoch`.

        pairs: of `views`, or of any tensors.
        """
        if self.record is None:
            return [self._step(*pair) for pair in itertools.islice(pairs, steps)]
        if isinstance(pairs, CountedPairs):  # made within the recordings, from few numbers
            pairs = pairs.parts_of_tasks([pairs])
        return self._replay([*itertools.islice(pairs, steps)])

    def _step(self, x1: Tensor, x2: Tensor) -> dict[str, float]:
        loss, terms = self.loss(self.model(x1, self.params), self.model(x2, self.params))
        gradient = torch.autograd.grad(loss, self._leaves())
        norm = torch.nn.utils.get_total_norm(gradient)
        # everything the host needs in one transfer, because each transfer waits for the device
        values = torch.stack([t.detach() for t in (norm, loss, *terms.values())]).tolist()
        numbers = self._checked(values, terms)
        for tensor, slope in zip(self._leaves(), gradient, strict=True):
            tensor.grad = slope
        self.optimizer.step()
        return numbers

    def _checked(self, values: Sequence[float], terms: Iterable[str]) -> dict[str, float]:
        """The numbers of a step by name, from its gradient's norm, its loss and its terms."""
        if not all(map(math.isfinite, values[:2])):
            raise NonFiniteError(
                f"epoch {self.epoch + 1}, loss {values[1]:g} with a gradient of norm "
                f"{values[0]:g}: not finite"
            )
        return dict(zip(("loss", *terms), values[1:], strict=True))

    def _replay(self, batches: Sequence[tuple | dict]) -> list[dict[str, float]]:
        """The same steps from recordings; the host waits once, after the last.

        batches: pairs, or the numbers that a maker makes them from, by name.
        """
        names = tuple(batches[0]) if isinstance(batches[0], dict) else None
        if names not in self._descents:
            group, loss = self.optimizer.param_groups[0], partial(self._loss_of_flat, names)
            rates = group["lr"], group["weight_decay"]
            self._descents[names] = Descent(loss, *rates, self.record)
        given = [[batch[n] for n in names] for batch in batches] if names else batches
        state, values = self._descents[names](self._adamw_state(), given)
        self._take_up(state)
        return [self._checked(row, TERMS) for row in values.tolist()]

    def _loss_of_flat(
        self, names: Sequence[str] | None, theta: list[Tensor], pair: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        if names is not None:
            made = self.views.maker.make(dict(zip(names, pair, strict=True)))
            pair = [x.squeeze(0) for x in made]
        parts = iter(theta)
        params = [{name: next(parts) for name in layer} for layer in self.params]
        loss, terms = self.loss(*(self.model(x, params) for x in pair))
        return loss, [*terms.values()]

    def _adamw_state(self) -> AdamWState:
        """The parameters and the optimiser's state, in tensors of their own."""
        leaves, saved = self._leaves(), self.optimizer.state
        moments = [
            [saved[t][name].clone() if t in saved else torch.zeros_like(t) for t in leaves]
            for name in ("exp_avg", "exp_avg_sq")
        ]
        count = float(saved[leaves[0]]["step"]) if saved else 0.0
        device = leaves[0].device
        return AdamWState(
            [t.detach().clone() for t in leaves],
            *([m.detach() for m in some] for some in moments),
            torch.tensor(count, dtype=torch.float64, device=device),
            torch.tensor(True, device=device),
        )

    @torch.no_grad()
    def _take_up(self, state: AdamWState) -> None:
        """Write a state into the parameters and the optimiser."""
        count = state.count.float().cpu()  # as the optimiser has it
        leaves = self._leaves()
        for t, new, first, second in zip(
            leaves, state.theta, state.first, state.second, strict=True
        ):
            t.copy_(new)
            self.optimizer.state[t] = {
                "step": count.clone(), "exp_avg": first, "exp_avg_sq": second
            }  # fmt: skip

    def state_dict(self) -> dict:
        """Everything that a resumed run needs, in plain containers of tensors."""
        return {
            "epoch": self.epoch,
            "params": [{n: t.detach() for n, t in layer.items()} for layer in self.params],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state returned by `state_dict`."""
        self.epoch = state["epoch"]
        with torch.no_grad():
            for layer, saved in zip(self.params, state["params"], strict=True):
                for name, tensor in layer.items():
                    tensor.copy_(saved[name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def uniform_parameters(model: nn.Module, generator: torch.Generator) -> Params:
    """Initial parameters in float64, uniform within +-1/sqrt(fan-in), as those of torch.nn.Linear.

    generator: a generator on the CPU.
    """
    params = []
    for layer in model.layers:
        shapes = layer.parameter_shapes()
        params.append({
            name: (2 * torch.rand(shape, generator=generator, **CPU) - 1)
            / math.sqrt(math.prod(shapes["w"][1:]))
            for name, shape in shapes.items()
        })  # fmt: skip
    return params
