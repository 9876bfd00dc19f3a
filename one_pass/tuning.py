"""Tuning SGD's own hyperparameters while it trains, by implicit differentiation, in one pass.

Source: Clarke, Oldewage, Hernandez-Lobato, "Scalable One-Pass Optimisation of High-Dimensional
Weight-Update Hyperparameters by Implicit Differentiation" (ICLR 2022, arXiv 2110.10461).

A weight step with learning rate eta, weight decay xi, momentum mu and training gradient g:

    b' = mu b + g + xi w        (the very first step: b' = g + xi w)
    w' = w - eta b'

After every T weight steps, the last of them is differentiated. With H the Hessian at w on that
step's batch, du/dw = eta (H + xi I), and v_0 the gradient of the validation loss at w':

    v_{j+1} = v_j - (du/dw)^T v_j,    p = v_0 + ... + v_{i-1}
    h_eta = -<p, b'>,    h_xi = -eta <p, w>,    h_mu = -eta <p, b>

Then Adam or SGD moves the raw hyperparameters (log10 eta, log10 xi, logit mu) against h, and
training continues. All functions compute D runs at once: weights are [D, P], hyperparameters
[D, 1], or [D, P] if every weight has its own.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from one_pass.errors import OnePassError
from one_pass.objectives import Batch, Buffers, Linearization, Objective
from one_pass.samples import Samples
from one_pass.seeds import seeded_generator
from one_pass.settings import NAMES, SMALLEST_POPULATION, Settings

LN10 = math.log(10)

# raw value -> hyperparameter; the inverse; the derivative, as a function of the hyperparameter
TRANSFORMS: dict[str, tuple[Callable, Callable, Callable]] = {
    "10^": (lambda raw: 10**raw, torch.log10, lambda value: LN10 * value),
    "exp": (torch.exp, torch.log, lambda value: value),
    "sigmoid": (torch.sigmoid, torch.logit, lambda value: value * (1 - value)),
}

POPULATION = 4  # the purpose of random numbers; tune_one_pass.py has others
CLIP_EPS = 1e-6
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
SOUND = 3.0  # a sound run's training loss stays below this times the first one
STEPPED_LR_BOUNDS = (1e-10, 1.0)  # of the natural learning rate


# ---- one weight step ----


@dataclass(frozen=True)
class WeightStep:
    """One step of SGD and everything its derivatives need; symbols as in the module's docstring.

    Attributes:
        batch: the training samples.
        before: weights w [D, P].
        buffers: the network's before the step, {name: [D, ...]}.
        momentum_buffer: b [D, P].
        fresh: whether b is ignored, as in the very first step.
        hyperparameters: natural values, {name: [D, 1] or [D, P]}.
        linearization: of the training loss at w.
        clip_norm: the largest norm that gradients are scaled down to; None: no limit.
        new_buffer: b' [D, P].
        after: w' [D, P].
    """

    batch: Batch
    before: Tensor
    buffers: Buffers
    momentum_buffer: Tensor
    fresh: bool
    hyperparameters: dict[str, Tensor]
    linearization: Linearization
    clip_norm: float | None
    new_buffer: Tensor
    after: Tensor

    def curvature_product(self, vectors: Tensor) -> Tensor:
        """(d(g + xi w)/dw)^T `vectors` with clipped g, [D, P]."""
        product = self.linearization.hessian_product(
            clip_product(self.linearization.gradient, self.clip_norm, vectors)
        )
        return product.addcmul_(self.hyperparameters["weight_decay"], vectors)


def weight_step(
    linearization: Linearization,
    batch: Batch,
    weights: Tensor,
    buffers: Buffers,
    momentum_buffer: Tensor,
    fresh: bool,
    hyperparameters: dict[str, Tensor],
    clip_norm: float | None,
) -> WeightStep:
    """One step of SGD with momentum and weight decay, in torch.optim.SGD's convention."""
    eta, xi, mu = (hyperparameters[name] for name in NAMES)
    gradient = clipped(linearization.gradient, clip_norm)
    new_buffer = torch.addcmul(gradient, xi, weights)
    if not fresh:
        new_buffer.addcmul_(mu, momentum_buffer)
    after = torch.addcmul(weights, eta, new_buffer, value=-1)
    return WeightStep(
        batch,
        weights,
        buffers,
        momentum_buffer,
        fresh,
        hyperparameters,
        linearization,
        clip_norm,
        new_buffer,
        after,
    )


def clipped(gradient: Tensor, norm: float | None) -> Tensor:
    """Each run's `gradient` [D, P] times min(1, norm / (|gradient| + 1e-6))."""
    if norm is None:
        return gradient
    length = gradient.norm(dim=1, keepdim=True)
    return gradient * (norm / (length + CLIP_EPS)).clamp_max(1)


def clip_product(gradient: Tensor, norm: float | None, vectors: Tensor) -> Tensor:
    """The product of `vectors` [D, P] with the (symmetric) Jacobian of `clipped` at `gradient`."""
    if norm is None:
        return vectors
    length = gradient.norm(dim=1, keepdim=True)
    factor = norm / (length + CLIP_EPS)
    along = (gradient * vectors).sum(dim=1, keepdim=True) / (length * (length + CLIP_EPS))
    return torch.where(factor < 1, factor * (vectors - along * gradient), vectors)


# ---- hypergradients, for the natural hyperparameters ----


def look_back_vector(step: WeightStep, validation_gradient: Tensor, terms: int) -> Tensor:
    """p [D, P]: `terms` terms of the Neumann series, from terms - 1 Hessian products."""
    eta = step.hyperparameters["lr"]
    vector, total = validation_gradient, validation_gradient.clone()
    for _ in range(terms - 1):
        # (du/dw)^T v = (H + xi I) (eta v); with a rate for each weight the order matters
        vector = vector - step.curvature_product(eta * vector)
        total += vector
    return total


def look_back_hypergradients(step: WeightStep, vector: Tensor) -> dict[str, Tensor]:
    """h of each hyperparameter, {name: [D, P]}; its sum over the weights if they share a value.

    vector: p.
    """
    scaled = step.hyperparameters["lr"] * vector
    buffer = torch.zeros_like(vector) if step.fresh else step.momentum_buffer
    return {
        "lr": -vector * step.new_buffer,
        "weight_decay": -scaled * step.before,
        "momentum": -scaled * buffer,
    }


def unrolled_hypergradients(
    steps: Sequence[WeightStep],
    validation_gradient: Tensor,
    linearize: Callable[[Tensor, Buffers, Batch], Linearization],
) -> dict[str, Tensor]:
    """Exact derivatives through the last `steps`, {name: [D, P]}, including momentum among them.

    Each step's batch is linearized again, so that only weights and buffers of a long window are
    stored. The network's buffers before a step (hidden states) count as constants.
    """
    weights_adjoint = validation_gradient
    buffer_adjoint = torch.zeros_like(validation_gradient)
    sums = {name: torch.zeros_like(validation_gradient) for name in NAMES}
    for step in reversed(steps):
        eta, mu = step.hyperparameters["lr"], step.hyperparameters["momentum"]
        sums["lr"].addcmul_(weights_adjoint, step.new_buffer, value=-1)
        buffer_adjoint = torch.addcmul(buffer_adjoint, eta, weights_adjoint, value=-1)
        sums["weight_decay"].addcmul_(buffer_adjoint, step.before)
        again = replace(step, linearization=linearize(step.before, step.buffers, step.batch))
        weights_adjoint = weights_adjoint + again.curvature_product(buffer_adjoint)
        if step.fresh:
            buffer_adjoint = torch.zeros_like(buffer_adjoint)
        else:
            sums["momentum"].addcmul_(buffer_adjoint, step.momentum_buffer)
            buffer_adjoint = mu * buffer_adjoint
    return sums


def successive_gradients(old: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Baydin et al.'s h of the learning rate, from two successive training gradients [D, P].

    Source: "Online learning rate adaptation with hypergradient descent" (ICLR 2018).
    """
    return {"lr": -new * old}


# ---- D runs, tuned as they go ----


@dataclass
class State:
    """The state of D runs: everything a resumed run needs except its settings and samples.

    Attributes:
        step: weight steps taken.
        weights, momentum_buffer: [D, P].
        buffers: the network's, {name: [D, ...]}.
        held_out_buffers: a recurrent network's while it reads the held-out samples.
        fresh: whether the momentum buffer is still ignored.
        raw: raw hyperparameters, {name: [D, 1] or [D, P]}.
        moments: Adam's two moments for each tuned hyperparameter, of the same shape.
        updates: hyperparameter steps that each run has taken, [D, 1]; Adam's count.
        begun: `updates` when the run started, which isn't 0 if it started from a saved state, [D,
            1].
        skipped: hyperparameter steps not taken because a hypergradient, or Adam's step with it,
            was not finite, [D, 1].
        factor: by which stepped_lr multiplies the learning rate, [D, 1].
        previous_gradient: [D, P] of the last weight step, for successive_gradients; None if there
            was none since the start, 0 for runs that have recovered since.
        start: weights and buffers to reset to.
        good: weights and buffers at the last hyperparameter step with a sound loss.
        sound_loss: the training loss below which a run is sound, [D]; None before the first step.
    """

    weights: Tensor
    buffers: Buffers
    held_out_buffers: Buffers
    raw: dict[str, Tensor]
    factor: Tensor
    step: int
    fresh: bool
    momentum_buffer: Tensor
    moments: dict[str, tuple[Tensor, Tensor]]
    updates: Tensor
    begun: Tensor
    skipped: Tensor
    previous_gradient: Tensor | None
    start: tuple[Tensor, Buffers]
    good: tuple[Tensor, Buffers]
    sound_loss: Tensor | None


def initial_hyperparameters(generators: Sequence[Generator]) -> dict[str, Tensor]:
    """Random natural hyperparameters and the `factor` of stepped_lr for each run, float64 [D, 1].

    log10 lr is U(-6, -1), log10 weight decay U(-7, -2), momentum U(0, 1) and the factor
    U(.995, 1.001).
    """
    uniform = torch.stack(
        [torch.rand(4, generator=g, dtype=torch.float64, device=g.device) for g in generators]
    )
    lr, decay, momentum, factor = uniform.split(1, dim=1)
    return {
        "lr": 10 ** (-6 + 5 * lr),
        "weight_decay": 10 ** (-7 + 5 * decay),
        "momentum": momentum,
        "factor": 0.995 + 0.006 * factor,
    }


def initial_state(
    weights: Tensor, buffers: Buffers, hyperparameters: dict[str, Tensor], settings: Settings
) -> State:
    """D runs before their first step.

    hyperparameters: as from `initial_hyperparameters`.
    """
    raw = {}
    for name in NAMES:
        _, inverse, _ = TRANSFORMS[settings.transforms[name]]
        values = inverse(hyperparameters[name]).to(weights)
        raw[name] = (
            values.expand_as(weights).clone() if name in settings.high_dimensional else values
        )
    count = torch.zeros_like(weights[:, :1])
    start = weights.clone(), {name: buffer.clone() for name, buffer in buffers.items()}
    return State(
        weights=weights,
        buffers=buffers,
        held_out_buffers=start[1],
        raw=raw,
        factor=hyperparameters["factor"].to(weights),
        step=0,
        fresh=True,
        momentum_buffer=torch.zeros_like(weights),
        moments={
            n: (torch.zeros_like(raw[n]), torch.zeros_like(raw[n])) for n in settings.optimised
        },
        updates=count,
        begun=count.clone(),
        skipped=count.clone(),
        previous_gradient=None,
        start=start,
        good=start,
        sound_loss=None,
    )


def check_start(state: State, settings: Settings) -> None:
    """Raises OnePassError if an initial raw value is NaN, or infinite and to be tuned."""
    for name, raw in state.raw.items():
        tuned = name in settings.optimised
        wrong = raw[~raw.isfinite() if tuned else raw.isnan()]
        if len(wrong):
            raise OnePassError(
                f"{name} begins with the raw value {wrong[0].item():g} under "
                f"{settings.transforms[name]}: it can't be {'tuned' if tuned else 'used'}"
            )


class Tuning:
    """D runs of SGD whose hyperparameters are tuned while they train.

    tuning = Tuning(objective, training, validation, settings, state)
    tuning.advance(100)    # weight steps, and the hyperparameter steps among them
    """

    def __init__(
        self,
        objective: Objective,
        training: Samples,
        validation: Samples | None,
        settings: Settings,
        state: State,
    ) -> None:
        self.objective, self.training, self.validation = objective, training, validation
        self.settings = settings
        self.restore(state)

    def restore(self, state: State) -> None:
        """Continue from `state`."""
        self.state, self.hyperparameters = state, natural(state.raw, self.settings)

    def advance(self, steps: int) -> None:
        """Take `steps` weight steps, and the hyperparameter steps that are due among them.

        Raises OnePassError if the method is unrolled and this does not begin after a multiple of
        `every` weight steps: the steps to differentiate through would be missing.
        """
        settings, state = self.settings, self.state
        if settings.method == "unrolled" and state.step % settings.every:
            raise OnePassError(
                f"unrolled steps begin after a multiple of every = {settings.every} weight steps, "
                f"not after {state.step}"
            )
        window: deque[WeightStep] = deque(maxlen=settings.look_back)
        for _ in range(steps):
            step = self._weight_step()
            if settings.method == "unrolled":
                window.append(replace(step, linearization=None))
            if settings.recover and state.sound_loss is None:
                state.sound_loss = SOUND * step.linearization.loss
            if settings.method != "fixed" and state.step % settings.every == 0:
                _METHODS[settings.method](self, step, window)
                self.hyperparameters = natural(state.raw, settings)
                window.clear()
                if self._reset_is_due():
                    self._reset_or_renew()

    def _weight_step(self) -> WeightStep:
        state = self.state
        batch = self.training.next()
        linearization = self.objective.linearize(state.weights, state.buffers, batch)
        step = weight_step(
            linearization,
            batch,
            state.weights,
            state.buffers,
            state.momentum_buffer,
            state.fresh,
            self.hyperparameters,
            self.settings.clip_norm,
        )
        state.weights, state.momentum_buffer = step.after, step.new_buffer
        state.buffers, state.fresh = linearization.buffers, False
        state.step += 1
        return step

    def _validation_gradient(self) -> Tensor:
        state, recurrent = self.state, self.objective.recurrent
        entering = state.held_out_buffers if recurrent else state.buffers
        held_out = self.objective.held_out(state.weights, entering, self.validation.next())
        if recurrent:
            state.held_out_buffers = held_out.buffers
        return held_out.gradient

    def _recover(self, step: WeightStep) -> Tensor:
        """Put runs whose training loss before the step is unsound back to their last good weights.

        Their momentum is cleared and their learning rate divided by 3. Returns which runs these
        are, [D, 1].
        """
        state = self.state
        failed = ~(step.linearization.loss <= state.sound_loss)[:, None]
        weights, buffers = state.good

        def chosen(good: Tensor, now: Tensor) -> Tensor:
            return torch.where(failed.view(-1, *[1] * (now.dim() - 1)), good, now)

        def all_chosen(good: Buffers, now: Buffers) -> Buffers:
            return {name: chosen(good[name], buffer) for name, buffer in now.items()}

        state.weights = chosen(weights, state.weights)
        state.buffers = all_chosen(buffers, state.buffers)
        state.held_out_buffers = all_chosen(state.start[1], state.held_out_buffers)
        state.good = chosen(weights, step.before), state.buffers
        state.momentum_buffer = torch.where(failed, 0, state.momentum_buffer)
        if state.previous_gradient is not None:
            state.previous_gradient = torch.where(failed, 0, state.previous_gradient)
        forward, inverse, _ = TRANSFORMS[self.settings.transforms["lr"]]
        slower = self._bounded("lr", inverse(forward(state.raw["lr"]) / 3))
        state.raw["lr"] = torch.where(failed, slower, state.raw["lr"])
        return failed

    def _bounded(self, name: str, raw: Tensor) -> Tensor:
        """Raw values of the hyperparameter `name`, within its bounds."""
        lowest, highest = self.settings.bounds.get(name, (-math.inf, math.inf))
        return raw.clamp(lowest, highest)

    def _look_back(self, step: WeightStep, window: deque[WeightStep]) -> None:
        vector = look_back_vector(step, self._validation_gradient(), self.settings.look_back)
        self._descend(look_back_hypergradients(step, vector), step)

    def _unroll(self, step: WeightStep, window: deque[WeightStep]) -> None:
        gradient = self._validation_gradient()
        self._descend(unrolled_hypergradients(window, gradient, self.objective.linearize), step)

    def _compare_gradients(self, step: WeightStep, window: deque[WeightStep]) -> None:
        new, old = step.linearization.gradient, self.state.previous_gradient
        self.state.previous_gradient = new
        if old is not None:
            self._descend(successive_gradients(old, new), step)

    def _multiply_rate(self, step: WeightStep, window: deque[WeightStep]) -> None:
        forward, inverse, _ = TRANSFORMS[self.settings.transforms["lr"]]
        raw = self.state.raw
        stepped = inverse((forward(raw["lr"]) * self.state.factor).clamp(*STEPPED_LR_BOUNDS))
        raw["lr"] = self._bounded("lr", stepped)

    def _exploit(self, *_) -> None:
        """Population-based training: the worst fifth continues from the best, slightly changed.

        Source: Jaderberg et al., "Population based training of neural networks" (2017).
        """
        state = self.state
        evaluation = self.objective.evaluate(
            state.weights, state.buffers, self.validation.inputs, self.validation.targets
        )
        order = evaluation.loss.nan_to_num(nan=math.inf, posinf=math.inf).argsort(stable=True)
        count = len(order) // SMALLEST_POPULATION
        best, worst = order[:count], order[len(order) - count :]
        generator = seeded_generator(self.settings.seed, POPULATION, state.step)
        for tensor in (state.weights, state.momentum_buffer, *state.buffers.values()):
            tensor[worst] = tensor[best]
        for name in self.settings.optimised:
            factors = state.weights.new_tensor([0.8, 1.25])
            draws = torch.randint(2, (count, 1), generator=generator, device=generator.device)
            chosen = factors[draws.to(factors.device)]
            forward, inverse, _ = TRANSFORMS[self.settings.transforms[name]]
            value = forward(state.raw[name][best]) * chosen
            if name == "momentum":
                value = value.clamp_max(1 - 1e-3)
            state.raw[name][worst] = self._bounded(name, inverse(value))

    def _descend(self, hypergradients: dict[str, Tensor], step: WeightStep) -> None:
        """One optimizer step on the raw values of every run for which all results are finite.

        A finite gradient isn't enough: its square may overflow in Adam's second moment.
        """
        settings, state = self.settings, self.state
        failed = self._recover(step) if settings.recover else torch.zeros_like(state.updates).bool()
        count, lr = state.updates + 1, self._hyperparameter_lr()
        proposed, finite = {}, torch.ones_like(failed)
        for name in settings.optimised:
            gradient = self._raw_gradient(name, hypergradients[name])
            if settings.optimizer == "sgd":
                moved, moments = state.raw[name] - lr * gradient, state.moments[name]
            else:
                moved, moments = adam(state.raw[name], gradient, state.moments[name], count, lr)
            proposed[name] = moved, *moments
            for values in (gradient, *proposed[name]):
                finite = finite & values.isfinite().all(dim=1, keepdim=True)
        taken = finite & ~failed
        state.skipped = state.skipped + (~finite).to(state.skipped.dtype)
        state.updates = state.updates + taken.to(state.updates.dtype)
        for name, (moved, *moments) in proposed.items():
            state.raw[name] = torch.where(taken, self._bounded(name, moved), state.raw[name])
            state.moments[name] = tuple(
                torch.where(taken, new, old)
                for new, old in zip(moments, state.moments[name], strict=True)
            )

    def _raw_gradient(self, name: str, hypergradient: Tensor) -> Tensor:
        """The gradient for raw values, of their shape, from h [D, P]."""
        settings = self.settings
        if name not in settings.high_dimensional:
            hypergradient = hypergradient.sum(dim=1, keepdim=True)
        if settings.chain_rule:
            derivative = TRANSFORMS[settings.transforms[name]][2]
            hypergradient = hypergradient * derivative(self.hyperparameters[name])
        return hypergradient

    def _hyperparameter_lr(self) -> Tensor:
        """The optimizer's rate for each run's next step, [D, 1]; geometric from lr to final_lr."""
        settings, state = self.settings, self.state
        done = ((state.updates - state.begun) / max(settings.updates - 1, 1)).clamp(0, 1)
        return settings.lr * (settings.final_lr / settings.lr) ** done

    def _reset_is_due(self) -> bool:
        settings = self.settings
        return settings.reset and self.state.step < settings.updates * settings.every

    def _reset_or_renew(self) -> None:
        """Reset weights and buffers to the start, and ignore momentum and the last gradient.

        If a renewal is due, make the current weights and buffers the new start instead.
        """
        settings, state = self.settings, self.state
        if settings.renew and state.step % (settings.renew * settings.every) == 0:
            buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
            state.start = state.weights.clone(), buffers
            return
        weights, buffers = state.start
        self.state.weights = weights.clone()
        self.state.buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        self.state.held_out_buffers = self.state.start[1]
        self.state.fresh, self.state.previous_gradient = True, None


_METHODS = {
    "look_back": Tuning._look_back,
    "unrolled": Tuning._unroll,
    "successive_gradients": Tuning._compare_gradients,
    "stepped_lr": Tuning._multiply_rate,
    "population": Tuning._exploit,
}


def natural(raw: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The hyperparameters from their raw values, in the same shapes."""
    return {name: TRANSFORMS[settings.transforms[name]][0](raw[name]) for name in NAMES}


def adam(
    values: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], count: Tensor, lr: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of Adam (betas .9 and .999) for D runs: the new values and moments.

    count: steps including this one, [D, 1].
    lr: [D, 1].
    """
    first = torch.lerp(moments[0], gradient, 1 - ADAM_BETAS[0])
    second = torch.lerp(moments[1], gradient.square(), 1 - ADAM_BETAS[1])
    unbiased = first / (1 - ADAM_BETAS[0] ** count)
    scale = (second / (1 - ADAM_BETAS[1] ** count)).sqrt() + ADAM_EPS
    return values - lr * unbiased / scale, (first, second)
