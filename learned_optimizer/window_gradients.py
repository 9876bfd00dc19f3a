"""Meta-gradients of a window of training by a learned optimiser.

    L = sum_t l_t(theta_t), or log of it;   theta_{t+1} = theta_t + m u_t,   t = 0 .. T-1
    d L / d u_t = m sum_{s > t} g_s                            g_s = d l_s / d theta_s

The second line is exact, because the network's inputs are detached; and the rollout computes these
gradients anyway as the network's inputs. So it suffices to roll out without an autograd graph and
store inputs and gradients, to sum the gradients up from the end (divided by L for the log), and to
differentiate the network once over the stored inputs. A penalty r(theta_t, v_t) on the updates
v_t = -m u_t adds its own terms: d r_t / d u_t, and d r_s / d theta_s to g_s. The window begins
after a loss and ends with one: the last update counts, and the gradient at the end of a window is
the first input of the next.

autograd_gradient computes the same by an autograd graph through all steps. strategies_gradient and
persistent_gradient don't differentiate (hypergradients/strategies.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from hypergradients import Pairs, evolution_strategies, persistent_evolution_strategies
from learned_optimizer.errors import OptimizerError
from learned_optimizer.networks import CoordinateNetwork
from learned_optimizer.optimizees import LabelledBatches, Optimizee
from learned_optimizer.recorded import RecordedCalls

AT_ONCE = RecordedCalls()
Penalty = Callable[[Tensor, Tensor], Tensor]  # of theta and v, both [n]: a scalar


@dataclass(frozen=True)
class Trainings:
    """K trainings of one optimizee, side by side, between two steps.

    Tensors are never changed in place.

    Attributes:
        theta: [K, n].
        memory: [rows, K n].
        gradient: [K, n], at theta on the latest batches.
        batches: for each training, the iterator of its next batches.
    """

    theta: Tensor
    memory: Tensor
    gradient: Tensor
    batches: Sequence[Iterator]


@dataclass(frozen=True)
class WindowLoss:
    """The loss of a window, as a mean over the K trainings.

    Attributes:
        log: take the log of the sum of a training's losses instead of the sum.
        penalty: added for each step's parameters and update.
    """

    log: bool = False
    penalty: Penalty | None = None

    def of_losses(self, losses: Tensor) -> Tensor:
        """The loss without penalty, a scalar, from losses [T, K]."""
        total = losses.sum(0)
        return (total.log() if self.log else total).mean()


@dataclass(frozen=True)
class WindowGradient:
    """The meta-gradient of a window and its other results.

    Attributes:
        gradient: one tensor per parameter of the network.
        loss: the window's, a scalar.
        losses: [T, K], after each update.
        end: the trainings at the end of the window.
    """

    gradient: list[Tensor]
    loss: Tensor
    losses: Tensor
    end: Trainings


@dataclass(frozen=True)
class Rollout:
    """A window without an autograd graph.

    Attributes:
        start, end: the trainings.
        inputs: [T, inputs, K n], of the network.
        u: [T, K n].
        losses, gradients: [T, K] and [T, K, n], after each update.
    """

    start: Trainings
    end: Trainings
    inputs: Tensor
    u: Tensor
    losses: Tensor
    gradients: Tensor


def start(
    network: CoordinateNetwork, optimizee: Optimizee, theta: Tensor, batches: Sequence[Iterator]
) -> tuple[Trainings, Tensor]:
    """K trainings before their first step, from theta [K, n], and their losses [K].

    Raises OptimizerError if an iterator of batches has ended.
    """
    losses, gradient = optimizee.gradients(theta, _next_of(batches))
    return Trainings(theta, network.memory(theta.numel(), theta), gradient, batches), losses


def steps_of_adam(optimizee: Optimizee, trainings: Trainings, steps: int, lr: float) -> Trainings:
    """The trainings after this many steps of Adam, which do not change the network's memory."""
    theta, g = trainings.theta.clone(), trainings.gradient
    adam = torch.optim.Adam([theta], lr)
    for _ in range(steps):
        theta.grad = g
        adam.step()
        _, g = optimizee.gradients(theta, _next_of(trainings.batches))
    return replace(trainings, theta=theta.detach(), gradient=g)


def _next_of(iterators: Sequence[Iterator]) -> list:
    """The next batch of each training. Raises OptimizerError if an iterator has ended."""
    try:
        return [next(batches) for batches in iterators]
    except StopIteration:
        raise OptimizerError(
            "a training's batches have ended; give an iterator that goes on"
        ) from None


@torch.no_grad()
def roll_out(
    network: CoordinateNetwork, optimizee: Optimizee, trainings: Trainings, steps: int
) -> Rollout:
    """Make `steps` updates of all trainings."""
    theta, g = trainings.theta, trainings.gradient
    memory, sizes = trainings.memory.clone(), optimizee.sizes() * len(theta)
    inputs, updates, losses, gradients = [], [], [], []
    for _ in range(steps):
        x, memory = network.observe(g.flatten(), theta.flatten(), memory, sizes)
        u = network.step_(x, memory)
        theta = torch.add(theta, u.view_as(theta), alpha=network.out_mul)
        loss, g = optimizee.gradients(theta, _next_of(trainings.batches))
        for kept, value in zip((inputs, updates, losses, gradients), (x, u, loss, g), strict=True):
            kept.append(value)
    end = replace(trainings, theta=theta, memory=memory, gradient=g)
    return Rollout(trainings, end, *map(torch.stack, (inputs, updates, losses, gradients)))


def replayed_roll_out(
    network: CoordinateNetwork,
    optimizee: Optimizee,
    trainings: Trainings,
    steps: int,
    calls: RecordedCalls,
) -> Rollout:
    """`roll_out` at once or from a recording, as `calls` does."""
    if calls.record is None:
        return roll_out(network, optimizee, trainings, steps)

    def whole(tensors: list[Tensor], drawn: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        window = roll_out(network, optimizee, _of_tensors(tensors, drawn, steps), steps)
        return _tensors(window.end), [window.inputs, window.u, window.losses, window.gradients]

    arguments = _tensors(trainings), _drawn(trainings, steps)
    end, curves = calls(("roll_out", steps), whole, arguments)
    return Rollout(trainings, Trainings(*end, trainings.batches), *curves)


def _replayed(
    calls: RecordedCalls,
    estimate: Callable[..., WindowGradient],
    trainings: Trainings,
    steps: int,
) -> WindowGradient:
    """estimate(trainings=trainings) from a recording of a window of `steps` steps."""

    def whole(tensors: list[Tensor], drawn: list[Tensor]) -> tuple:
        found = estimate(trainings=_of_tensors(tensors, drawn, steps))
        return found.gradient, found.loss, found.losses, _tensors(found.end)

    arguments = _tensors(trainings), _drawn(trainings, steps)
    *found, end = calls(("window", steps), whole, arguments)
    return WindowGradient(*found, Trainings(*end, trainings.batches))


def _tensors(trainings: Trainings) -> list[Tensor]:
    return [trainings.theta, trainings.memory, trainings.gradient]


def _drawn(trainings: Trainings, steps: int) -> list[Tensor]:
    """The parts, such as inputs and targets, of the next batches: [steps * K, ...] each."""
    first = trainings.batches[0]
    if isinstance(first, LabelledBatches):  # of one task, so that images and labels are the same
        each = [batches.next_indices(steps) for batches in trainings.batches]
        index = torch.stack(each, dim=1)
        return [part.unflatten(0, (-1, index.shape[2])) for part in first.of(index.flatten())]
    batches = [batch for _ in range(steps) for batch in _next_of(trainings.batches)]
    return [torch.stack(part) for part in zip(*batches, strict=True)]


def _of_tensors(tensors: Sequence[Tensor], drawn: Sequence[Tensor], steps: int) -> Trainings:
    """Trainings from what `_tensors` and `_drawn` return."""
    batches = list(zip(*drawn, strict=True))
    count = len(batches) // steps
    return Trainings(*tensors, [iter(batches[k::count]) for k in range(count)])


def suffix_sum_gradient(
    network: CoordinateNetwork,
    optimizee: Optimizee,
    trainings: Trainings,
    steps: int,
    window_loss: WindowLoss,
    *,
    coordinates: int | None = None,
    generator: torch.Generator | None = None,
    calls: RecordedCalls = AT_ONCE,
) -> WindowGradient:
    """The meta-gradient without an autograd graph through the window.

    coordinates: about how many columns enter the pass over the network. They are drawn with
        probabilities in proportion to the norms of their d L / d u and weighted by the inverse
        probability, so that the gradient is unbiased; None: all columns with d L / d u != 0, or
        those with 0 too where the window is recorded, whose shapes do not depend on numbers.
    generator: draws the columns.
    calls: calls the window at once, or from a recording; so in the other estimators.
    """
    if calls.record is not None and coordinates is None:
        whole = partial(_all_columns, network, optimizee, steps=steps, window_loss=window_loss)
        return _replayed(calls, whole, trainings, steps)
    window = replayed_roll_out(network, optimizee, trainings, steps, calls)
    du, loss = _loss_by_updates(network.out_mul, window, window_loss)
    norms = du.norm(dim=0)
    if coordinates is None:
        chosen = norms.nonzero()[:, 0]
        du = du[:, chosen]
    else:
        likely = inclusion_probabilities(norms, coordinates)
        device = "cpu" if generator is None else generator.device
        draws = torch.rand(likely.shape, generator=generator, dtype=likely.dtype, device=device)
        chosen = (draws.to(likely) < likely).nonzero()[:, 0]
        du = du[:, chosen] / likely[chosen]
    gradient = network.sequence_gradient(
        window.inputs[:, :, chosen], window.start.memory[:, chosen], du
    )
    return WindowGradient(gradient, loss, window.losses, window.end)


def _all_columns(
    network: CoordinateNetwork,
    optimizee: Optimizee,
    trainings: Trainings,
    steps: int,
    window_loss: WindowLoss,
) -> WindowGradient:
    window = roll_out(network, optimizee, trainings, steps)
    du, loss = _loss_by_updates(network.out_mul, window, window_loss)
    gradient = network.sequence_gradient(window.inputs, window.start.memory, du)
    return WindowGradient(gradient, loss, window.losses, window.end)


def inclusion_probabilities(norms: Tensor, expected: int) -> Tensor:
    """min(1, c norms) [n], with c such that they sum to `expected`.

    If at most that many norms are above 0, the probability is 1 for each of these. If norms are not
    finite, exactly these have probability 1, because the gradient isn't finite either.
    """
    infinite = ~norms.isfinite()
    if infinite.any():
        return infinite.to(norms)
    if int((norms > 0).sum()) <= expected:
        return (norms > 0).to(norms)
    ordered = norms.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # the sum of each and all smaller ones
    free = expected - torch.arange(len(norms), device=norms.device)
    # If the k largest have probability 1, c = (expected - k) / (sum of the others); k is the first
    # number for which the largest of the others has a probability of at most 1.
    fits = (free > 0) & (free * ordered <= rest)
    k = int(fits.to(torch.int8).argmax())
    return (norms / rest[k] * free[k]).clamp(max=1)  # this order also works for tiny norms


def _loss_by_updates(
    out_mul: float, window: Rollout, window_loss: WindowLoss
) -> tuple[Tensor, Tensor]:
    """d L / d u [T, K n], and L."""
    K = window.losses.shape[1]
    scale = (
        1 / (window.losses.sum(0) * K) if window_loss.log else window.losses.new_full((K,), 1 / K)
    )
    by_theta = window.gradients * scale[:, None]
    loss, by_u = window_loss.of_losses(window.losses), 0
    if window_loss.penalty is not None:
        penalty, of_theta, by_u = _penalty_gradients(out_mul, window, window_loss.penalty)
        loss = loss + penalty
        by_theta[:-1] += of_theta[1:]  # by_theta[t] is at the parameters after update t
    later = by_theta.flatten(1).flip(0).cumsum(0).flip(0)
    return out_mul * later + by_u, loss


def _penalty_gradients(
    out_mul: float, window: Rollout, penalty: Penalty
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty, and its direct gradients with respect to theta_t [T, K, n] and u_t [T, K n]."""
    by_theta, by_u, total = [], [], 0
    for theta, update in _penalised(out_mul, window):
        at, v = theta.clone().requires_grad_(), update.requires_grad_()
        with torch.enable_grad():
            value = sum(map(penalty, at, v)) / len(at)
        # A translation's direction does not depend on theta: its gradient there is 0
        of_theta, of_v = torch.autograd.grad(value, [at, v], materialize_grads=True)
        by_theta.append(of_theta)
        by_u.append(-out_mul * of_v.flatten())
        total = total + value.detach()
    return total, torch.stack(by_theta), torch.stack(by_u)


def _penalised(out_mul: float, window: Rollout) -> Iterator[tuple[Tensor, Tensor]]:
    """theta_t and v_t = -m u_t for each step, both [K, n]."""
    theta = window.start.theta
    for u in window.u.view_as(window.gradients):
        yield theta, -out_mul * u
        theta = torch.add(theta, u, alpha=out_mul)


def autograd_gradient(
    network: CoordinateNetwork,
    optimizee: Optimizee,
    trainings: Trainings,
    steps: int,
    window_loss: WindowLoss,
    calls: RecordedCalls = AT_ONCE,
) -> WindowGradient:
    """The meta-gradient by a backward pass through all updates of the window."""
    if calls.record is not None:
        whole = partial(autograd_gradient, network, optimizee, steps=steps, window_loss=window_loss)
        return _replayed(calls, whole, trainings, steps)
    theta, memory, g = trainings.theta, trainings.memory, trainings.gradient
    sizes, losses, penalty = optimizee.sizes() * len(theta), [], 0
    for _ in range(steps):
        x, memory = network.observe(g.flatten(), theta.detach().flatten(), memory, sizes)
        u, memory = network(x, memory)
        step = network.out_mul * u.view_as(theta)
        if window_loss.penalty is not None:
            penalty = penalty + sum(map(window_loss.penalty, theta, -step)) / len(theta)
        theta = theta + step
        batches = _next_of(trainings.batches)
        pairs = zip(theta, batches, strict=True)
        loss = torch.stack(
            [optimizee.loss(optimizee.unflat(vector), batch) for vector, batch in pairs]
        )
        (g,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True)
        losses.append(loss)
    losses = torch.stack(losses)
    loss = window_loss.of_losses(losses) + penalty
    gradient = list(torch.autograd.grad(loss, list(network.parameters())))
    end = replace(trainings, theta=theta.detach(), memory=memory.detach(), gradient=g)
    return WindowGradient(gradient, loss.detach(), losses.detach(), end)


def strategies_gradient(
    network: CoordinateNetwork,
    optimizee: Optimizee,
    trainings: Trainings,
    steps: int,
    window_loss: WindowLoss,
    *,
    sigma: float,
    pairs: int,
    generator: torch.Generator,
    calls: RecordedCalls = AT_ONCE,
) -> WindowGradient:
    """The meta-gradient by truncated evolution strategies, with all windows from the same start.

    sigma: the standard deviation of the perturbations of the weights.
    pairs: the number of pairs of opposite perturbations.
    """
    window = _Window(network, optimizee, trainings, steps, window_loss, calls)
    gradient = evolution_strategies(
        window.tree(), window.weights, window.maps(), window.loss, sigma, pairs, generator,
        set_grad=False,
    )  # fmt: skip
    return window.result(gradient)


def persistent_gradient(
    network: CoordinateNetwork,
    optimizee: Optimizee,
    trainings: Trainings,
    steps: int,
    window_loss: WindowLoss,
    persistent: Pairs | None,
    *,
    sigma: float,
    pairs: int,
    generator: torch.Generator,
    calls: RecordedCalls = AT_ONCE,
) -> tuple[WindowGradient, Pairs]:
    """The meta-gradient by persistent evolution strategies, and the pairs for the next window.

    persistent: the pairs from the window before; None in the first window.
    sigma, pairs: as in `strategies_gradient`.
    """
    window = _Window(network, optimizee, trainings, steps, window_loss, calls)
    if persistent is None:
        persistent = Pairs.start(window.tree(), window.weights, pairs)
    gradient, after = persistent_evolution_strategies(
        persistent, window.weights, window.maps(), window.loss, sigma, generator, set_grad=False
    )
    above, below = ([_emptied(tree) for tree in trees] for trees in (after.above, after.below))
    return window.result(gradient), replace(after, above=above, below=below)


class _Window:
    """A window as update maps; each step's batches are drawn once, because it runs several times.

    The params of the maps are [theta, memory, gradient, sum of losses [K], sum of penalties []].
    """

    def __init__(
        self,
        network: CoordinateNetwork,
        optimizee: Optimizee,
        trainings: Trainings,
        steps: int,
        window_loss: WindowLoss,
        calls: RecordedCalls,
    ) -> None:
        self.network, self.optimizee, self.trainings = network, optimizee, trainings
        self.window_loss, self.weights = window_loss, list(network.parameters())
        self.calls = calls
        self.batches = [_next_of(trainings.batches) for _ in range(steps)]

    def tree(self) -> list[Tensor]:
        trainings = self.trainings
        zeros = trainings.theta.new_zeros(len(trainings.theta))
        return [trainings.theta, trainings.memory, trainings.gradient, zeros, zeros[0]]

    def maps(self) -> list[Callable]:
        return [partial(self._called, batches) for batches in self.batches]

    def _called(self, batches: Sequence, tree: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        return self.calls("update", self._update, (list(batches), tree, weights))

    @torch.no_grad()
    def _update(self, batches: Sequence, tree: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        theta, memory, g, losses, penalty = tree
        sizes = self.optimizee.sizes() * len(theta)
        x, memory = self.network.observe(g.flatten(), theta.flatten(), memory, sizes)
        names = (name for name, _ in self.network.named_parameters())
        perturbed = dict(zip(names, weights, strict=True))
        u, memory = functional_call(self.network, perturbed, (x, memory))
        step = self.network.out_mul * u.view_as(theta)
        if self.window_loss.penalty is not None:
            penalty = penalty + sum(map(self.window_loss.penalty, theta, -step)) / len(theta)
        loss, g = self.optimizee.gradients(theta + step, batches)
        return [theta + step, memory, g, losses + loss, penalty]

    def loss(self, tree: list[Tensor], weights: list[Tensor]) -> Tensor:
        return self.window_loss.of_losses(tree[3][None]) + tree[4]

    def result(self, gradient: Sequence[Tensor]) -> WindowGradient:
        """The gradient, and the results of the window with unperturbed weights."""
        drawn = [iter(batches) for batches in zip(*self.batches, strict=True)]
        start = replace(self.trainings, batches=drawn)
        steps = len(self.batches)
        window = replayed_roll_out(self.network, self.optimizee, start, steps, self.calls)
        loss, penalty = self.window_loss.of_losses(window.losses), self.window_loss.penalty
        if penalty is not None:
            steps = _penalised(self.network.out_mul, window)
            loss = loss + sum(sum(map(penalty, at, v)) / len(at) for at, v in steps)
        end = replace(window.end, batches=self.trainings.batches)
        return WindowGradient(list(gradient), loss, window.losses, end)


def _emptied(tree: list[Tensor]) -> list[Tensor]:
    """The end of a window as the beginning of the next, with the sums set to 0."""
    return [*tree[:3], *map(torch.zeros_like, tree[3:])]
