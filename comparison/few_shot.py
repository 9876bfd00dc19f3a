"""Few-shot learning of many tasks at once: networks, adaptation, and gradients through it.

    w_i = argmin_w L_i(w, support) + lambda / 2 |w - theta|^2       by gradient descent from theta
    d L_i(w_i, queries) / d theta = (I + H_i / lambda)^-1 grad L_i(w_i, queries)

H_i is the Hessian of L_i(., support) at w_i. With damping D the system is I + H_i / (lambda + D),
which a few conjugate gradients solve. theta is one vector [weights], the w_i are the rows of a
matrix [tasks, weights]. Nothing here waits for the device, so that it can be recorded
(kernels/recorded_updates.py). Source: Rajeswaran, Finn, Kakade, Levine 2019, arXiv 1909.04630;
their program (github.com/aravindr93/imaml_dev) solves (1 + 1) I + H_i / (lambda + 10), which is
twice the system with D = 22 for lambda = 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import batch_norm, conv2d, cross_entropy, pad

LAYERS, CHANNELS, KERNEL, SIDE = 4, 64, 3, 28
STRIDE, POOL = DOWNSAMPLING = ("stride", "pool")
IMPLICIT, FIRST_ORDER = METHODS = ("implicit", "first_order")


class Points(NamedTuple):
    """Pictures [tasks, points, 1, 28, 28], and labels int64 [tasks, points]."""

    x: Tensor
    labels: Tensor


# ---- networks of tasks ----


@dataclass(frozen=True)
class ConvolutionalNetworks:
    """Four layers of 64 filters of 3 x 3, normalized over the given points, and a linear layer.

    Attributes:
        ways: the number of classes.
        downsampling: "stride": every second response; "pool": the largest of 2 x 2 responses.
    """

    ways: int
    downsampling: str = STRIDE

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of filters, gains and shifts of each layer, and of the linear layer."""
        side, shapes = SIDE, []
        for inputs in (1, *(CHANNELS,) * (LAYERS - 1)):
            shapes += [(CHANNELS, inputs * KERNEL**2), (CHANNELS,), (CHANNELS,)]
            side = side // 2 if self.downsampling == POOL else (side + 1) // 2
        return [*shapes, (self.ways, CHANNELS * side**2), (self.ways,)]

    def initial(self, generator: Generator) -> Tensor:
        """Initial weights [weights]: filters of variance 2 / fan-in, gains 1, all else 0."""
        parts, layers = [], self.shapes[:-2]
        for filters, gain, shift in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
            drawn = torch.randn(filters, generator=generator) * (2 / filters[1]) ** 0.5
            parts += [drawn, torch.ones(gain), torch.zeros(shift)]
        parts += [torch.zeros(shape) for shape in self.shapes[-2:]]
        return torch.cat([part.flatten() for part in parts])

    def logits(self, w: Tensor, x: Tensor) -> Tensor:
        """Logits [tasks, points, ways] of pictures [tasks, points, 1, 28, 28]."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = [
            part.unflatten(1, shape)
            for part, shape in zip(w.split(sizes, dim=1), self.shapes, strict=True)
        ]
        x, layers = x.transpose(1, 2), parts[:-2]
        for filters, gain, shift in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
            pooled = self.downsampling == POOL
            x = normalized(convolved(x, filters, 1 if pooled else 2), gain, shift)
            x = torch.relu(largest_of_squares(x) if pooled else x)
        features = x.transpose(1, 2).flatten(2)
        return torch.baddbmm(parts[-1][:, None], features, parts[-2].transpose(1, 2))


def convolved(x: Tensor, filters: Tensor, stride: int) -> Tensor:
    """Each task's points [tasks, channels, points, H, W] by its filters [tasks, out, channels * 9].

    Zeros around the points. On a CUDA device as products with patches, because there the second
    derivatives of grouped convolutions run group by group; elsewhere as grouped convolutions, which
    take a third of the time.
    """
    return (by_patches if x.is_cuda else by_groups)(x, filters, stride)


def by_patches(x: Tensor, filters: Tensor, stride: int) -> Tensor:
    """`convolved`, as products of matrices."""
    patches = pad(x, (1, 1, 1, 1)).unfold(3, KERNEL, stride).unfold(4, KERNEL, stride)
    columns = patches.permute(0, 1, 5, 6, 2, 3, 4).reshape(len(x), filters.shape[2], -1)
    return torch.bmm(filters, columns).unflatten(2, patches.shape[2:5])


def by_groups(x: Tensor, filters: Tensor, stride: int) -> Tensor:
    """`convolved`, with a group of channels for each task."""
    tasks, channels = x.shape[:2]
    kernels = filters.reshape(-1, channels, KERNEL, KERNEL)
    y = conv2d(x.permute(2, 0, 1, 3, 4).flatten(1, 2), kernels, None, stride, 1, groups=tasks)
    return y.unflatten(1, (tasks, -1)).permute(1, 2, 0, 3, 4)


def normalized(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """[tasks, channels, points, H, W] with mean `shift` and deviation `gain` of each channel."""
    rows = x.reshape(1, x.shape[0] * x.shape[1], -1)
    return batch_norm(rows, None, None, gain.flatten(), shift.flatten(), True).view(x.shape)


def largest_of_squares(x: Tensor) -> Tensor:
    """The largest of 2 x 2 neighbours, [..., H / 2, W / 2]; a last odd row or column is left out.

    max_pool2d, but for its backward pass, which is not deterministic on a CUDA device.
    """
    height, width = (side // 2 for side in x.shape[-2:])
    squares = x[..., : 2 * height, : 2 * width].unflatten(-1, (width, 2)).unflatten(-3, (height, 2))
    return squares.amax((-3, -1))


# ---- adaptation, and gradients through it ----


class MetaGradient(NamedTuple):
    """A gradient of theta [weights], and of the adapted weights [tasks] each:

    query losses, accuracies, the relative residual of the solution, and whether conjugate gradients
    ended early, at a direction without positive curvature.
    """

    gradient: Tensor
    losses: Tensor
    accuracies: Tensor
    residuals: Tensor
    ended_early: Tensor


@dataclass(frozen=True)
class Adaptation:
    """Gradient descent on the support points of each task, and what theta learns from its result.

    Attributes:
        steps, rate: of gradient descent.
        pull: lambda, the weight of the squared distance from theta.
        damping, iterations: of conjugate gradients.
        method: "implicit"; "first_order": the gradient of the query losses at w_i (Finn, Abbeel,
            Levine 2017, arXiv 1703.03400, section 5.2).
    """

    network: ConvolutionalNetworks
    steps: int
    rate: float
    pull: float
    damping: float = 0.0
    iterations: int = 5
    method: str = IMPLICIT

    def losses(self, w: Tensor, points: Points) -> Tensor:
        """The mean cross-entropy of each task's points, [tasks]."""
        logits = self.network.logits(w, points.x).flatten(0, 1)
        losses = cross_entropy(logits, points.labels.flatten(), reduction="none")
        return losses.view(points.labels.shape).mean(1)

    @torch.no_grad()
    def accuracies(self, w: Tensor, points: Points) -> Tensor:
        """The fraction of right answers, [tasks]."""
        answers = self.network.logits(w, points.x).argmax(-1)
        return (answers == points.labels).to(w.dtype).mean(1)

    def gradient(self, w: Tensor, points: Points) -> tuple[Tensor, Tensor]:
        """The gradients of the tasks' losses [tasks, weights], and the losses [tasks]."""
        w = w.detach().requires_grad_()
        losses = self.losses(w, points)
        return torch.autograd.grad(losses.sum(), w)[0], losses.detach()

    def step(self, w: Tensor, theta: Tensor, support: Points) -> Tensor:
        """One step of gradient descent."""
        slope = self.gradient(w, support)[0].add_(w - theta, alpha=self.pull)
        return w - self.rate * slope

    def adapted(self, theta: Tensor, support: Points) -> Tensor:
        """The weights of each task after all steps, [tasks, weights]."""
        w = theta.expand(len(support.x), -1)
        for _ in range(self.steps):
            w = self.step(w, theta, support)
        return w

    def accuracies_over_steps(self, theta: Tensor, support: Points, queries: Points) -> Tensor:
        """Accuracies of the queries before and after each step, [tasks, steps + 1]."""
        w = theta.expand(len(support.x), -1)
        found = [self.accuracies(w, queries)]
        for _ in range(self.steps):
            w = self.step(w, theta, support)
            found.append(self.accuracies(w, queries))
        return torch.stack(found, dim=1)

    def meta_gradient(self, theta: Tensor, support: Points, queries: Points) -> MetaGradient:
        """The gradient of theta, a mean over tasks."""
        w = self.adapted(theta, support)
        slope, losses = self.gradient(w, queries)
        none = torch.zeros_like(losses)
        solution = Solution(slope, none, none)
        if self.method == IMPLICIT:
            solution = conjugate_gradients(self._system(w, support), slope, self.iterations)
        accuracies = self.accuracies(w, queries)
        return MetaGradient(solution.x.mean(0), losses, accuracies, *solution[1:])

    def _system(self, w: Tensor, support: Points) -> Callable[[Tensor], Tensor]:
        """v -> (I + H / (lambda + D)) v for each task's v, the rows of [tasks, weights]."""
        w = w.detach().requires_grad_()
        slope = torch.autograd.grad(self.losses(w, support).sum(), w, create_graph=True)[0]

        def product(v: Tensor) -> Tensor:
            bent = torch.autograd.grad(slope, w, v, retain_graph=True)[0]
            return v + bent / (self.pull + self.damping)

        return product


class Solution(NamedTuple):
    """Solutions [systems, n]; of each the relative residual, and whether it ended early."""

    x: Tensor
    residuals: Tensor
    ended_early: Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int
) -> Solution:
    """Solutions of A_i x_i = b_i after so many iterations, for symmetric A_i.

    A system without positive curvature along its next direction keeps the solution that it has, and
    b_i if it has none yet: a Hessian of a network may have negative eigenvalues.

    product: the rows v_i to A_i v_i.
    b: the right sides, [systems, n].
    """
    x, r, p = torch.zeros_like(b), b, b
    squares = start = inner(b, b)
    goes_on = torch.ones_like(start, dtype=torch.bool)
    early = moved = ~goes_on
    for _ in range(iterations):
        q = product(p)
        curvature = inner(p, q)
        early = early | (goes_on & (curvature < 0))
        goes_on = goes_on & (curvature > 0)  # it is 0 once a residual is
        moved = moved | goes_on
        length = (squares / curvature).masked_fill(~goes_on, 0.0)
        x, r = x + length * p, r - length * q
        before, squares = squares, inner(r, r)
        p = r + (squares / before).masked_fill(~goes_on, 0.0) * p
    relative = (squares / start).sqrt()
    return Solution(torch.where(moved, x, b), relative[:, 0], early[:, 0].to(b.dtype))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row, [rows, 1]."""
    return (a * b).sum(1, keepdim=True)
