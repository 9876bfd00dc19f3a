"""Inner optimisers as update maps: steps on a loss that can themselves be differentiated.

    GradientDescent   w' = w - step g                             g = grad_w loss(w, hparams, data)
    HeavyBall         w' = w - step g + momentum (w - previous)   Polyak 1964; previous' = w
    Momentum          v' = momentum v + g,   w' = w - step v'     as in torch.optim.SGD
    Nesterov          v' = momentum v + g,   w' = w - step (g + momentum v')      (Sutskever 2013)
    Adam              w' = w - step m_hat / (sqrt(v_hat) + eps)   Kingma and Ba 2015

An optimiser is called as optimizer(params, hparams) -> params, like all maps in methods.py. The
memory of an optimiser follows the parameters in the same list: start with
optimizer.get_opt_params(params). Names and arguments of the first three are HyperTorch's.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hypergradients.errors import HypergradientError
from hypergradients.linear_solvers import Vector
from hypergradients.update_maps import Tree, attached_scalar, frozen, other_leaves, vjp

Setting = float | Tensor | Callable[[Tree], float | Tensor]  # a number or a function of hparams

GRADIENTS = ("graph", "func")


class DifferentiableOptimizer:
    """The base class of these optimisers and of your own.

    A subclass defines either `update`, which the rest is built on, or `step`, using get_loss.
    Frozen parameters (nn.Parameters with requires_grad=False, unless all of them are) stay as they
    are. Raises HypergradientError for a loss that is not an attached scalar, for params that do not
    begin with get_opt_params, and if an iterator's data have ended.

    loss_f: (params, hparams) -> scalar, or (params, hparams, data) -> scalar if data are given.
    dim_mult: copies of the parameters in the list: the parameters and what is remembered of each.
    data_or_iter: the data of every step, or an iterator over the data of each step. Methods that
        run a map again need the same data again, and refuse other data: give them one optimiser
        per batch.
    gradient: how g is differentiated.
        graph  torch.autograd.grad with create_graph: fast if a step is multiplied many times
        func   torch.func.grad, for maps inside torch.func transforms
    settings: numbers, or functions from hparams to numbers, such as step_size.

    Attributes:
        curr_loss: the loss at the params of the last call. It is attached, and keeps its graph
            until the next call, if the step is attached; otherwise it is detached, and None if
            gradient is "func".
    """

    extra = 0  # tensors in the list, after the copies of the parameters

    def __init__(
        self,
        loss_f: Callable,
        dim_mult: int,
        data_or_iter: Any = None,
        gradient: str = "graph",
        **settings: Setting,
    ) -> None:
        if gradient not in GRADIENTS:
            raise HypergradientError(
                f"gradient {gradient!r} is unknown; choose from {', '.join(GRADIENTS)}"
            )
        self.loss_f, self.dim_mult = loss_f, dim_mult
        self.gradient, self.settings = gradient, settings
        self.data_iterator: Iterator | None = None
        if data_or_iter is not None:
            is_iterator = hasattr(data_or_iter, "__next__")
            self.data_iterator = data_or_iter if is_iterator else repeat(data_or_iter)
        self.curr_loss: Tensor | None = None

    def get_opt_params(self, params: Tree) -> list:
        """The list to start with: params, a list of tensors or trees, and an empty memory."""
        zeros = tree_map(torch.zeros_like, list(params))
        return [*params, *zeros * (self.dim_mult - 1)]

    def __call__(self, params: Tree, hparams: Tree, create_graph: bool = True) -> list:
        """The list after one step.

        It is detached without create_graph, or if nothing in the step requires a gradient.
        """
        self.curr_loss = None  # frees its graph before the next is built
        with torch.enable_grad():
            return self.step(params, hparams, create_graph)

    def get_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """The loss on the next data, attached; it becomes curr_loss."""
        self.curr_loss = self.loss_f(params, hparams, *self._next_data())
        return self.curr_loss

    def step(self, params: Tree, hparams: Tree, create_graph: bool) -> list:
        """The list after one step, which `update` computes from the gradient of the loss."""
        copies, extra, spec = self._divided(params)
        fixed = frozen(copies[0])
        w, *memory = ([t for t, f in zip(c, fixed, strict=True) if not f] for c in copies)
        data = self._next_data()

        def loss(leaves: list[Tensor], hparams: Tree) -> Tensor:
            tree = tree_unflatten(_merged(leaves, copies[0], fixed), spec)
            value = self.loss_f(tree, hparams, *data)
            self.curr_loss = None if self.gradient == "func" else value.detach()
            return value

        wanted = _want_gradient((params, hparams, list(self.settings.values())))
        if not create_graph:
            w = [t.detach() for t in w]
        if self.gradient != "func":
            w = [t if t.requires_grad else t.detach().requires_grad_() for t in w]
        g, attached = self._differentiated(loss, w, hparams, create_graph, wanted)
        with torch.set_grad_enabled(attached):
            values = {n: s(hparams) if callable(s) else s for n, s in self.settings.items()}
            new = self.update(w, g, *memory, *extra, **values)
        pairs = zip(new[: self.dim_mult], copies, strict=True)
        trees = [tree_unflatten(_merged(leaves, old, fixed), spec) for leaves, old in pairs]
        return [entry for tree in trees for entry in tree] + new[self.dim_mult :]

    def update(self, w: Vector, g: Vector, *memory, **settings: float | Tensor) -> list:
        """New parameters and memory from the old and the gradient, as flat lists of tensors."""
        raise NotImplementedError

    def _next_data(self) -> tuple:
        """The arguments of the loss after params and hparams."""
        if self.data_iterator is None:
            return ()
        try:
            return (next(self.data_iterator),)
        except StopIteration:
            raise HypergradientError(
                "the iterator's data have ended; give an entry for each step"
            ) from None

    def _divided(self, params: Tree) -> tuple[list[Vector], list, Any]:
        """Parameters and memory as flat lists, the extra entries, and the parameters' structure."""
        count, rest = divmod(len(params) - self.extra, self.dim_mult)
        if rest or count < 1:
            raise HypergradientError(
                f"{type(self).__name__} takes {self.dim_mult} entries per parameter and "
                f"{self.extra} besides, got {len(params)}; start with get_opt_params(params)"
            )
        chunks = [list(params[k * count : (k + 1) * count]) for k in range(self.dim_mult)]
        w, spec = tree_flatten(chunks[0])
        memory = [spec.flatten_up_to(chunk) for chunk in chunks[1:]]
        if any(a.shape != b.shape for leaves in memory for a, b in zip(w, leaves, strict=True)):
            raise HypergradientError(
                "what is remembered has not the shapes of the parameters; "
                "start with get_opt_params(params)"
            )
        return [w, *memory], list(params[self.dim_mult * count :]), spec

    def _differentiated(
        self, loss: Callable, w: Vector, hparams: Tree, create_graph: bool, wanted: bool
    ) -> tuple[Vector, bool]:
        """The gradient of the loss, and whether it is attached.

        wanted: whether an argument of the step requires a gradient.
        """
        if self.gradient == "func":
            return torch.func.grad(loss)(w, hparams), create_graph
        value = attached_scalar(loss(w, hparams), "the inner loss")
        attached = create_graph and (wanted or bool(other_leaves(value, w)))
        self.curr_loss = value if attached else value.detach()
        return vjp([value], w, [None], create_graph=attached), attached


class GradientDescent(DifferentiableOptimizer):
    """w' = w - step g."""

    def __init__(self, loss_f, step_size: Setting, data_or_iter=None, *, gradient="graph") -> None:
        super().__init__(loss_f, 1, data_or_iter, gradient, step_size=step_size)

    def update(self, w, g, *, step_size):
        return [_moved(w, g, step_size)]


class HeavyBall(DifferentiableOptimizer):
    """w' = w - step g + momentum (w - previous), previous' = w."""

    def __init__(
        self, loss_f, step_size: Setting, momentum: Setting, data_or_iter=None, *, gradient="graph"
    ) -> None:
        settings = {"step_size": step_size, "momentum": momentum}
        super().__init__(loss_f, 2, data_or_iter, gradient, **settings)

    def get_opt_params(self, params: Tree) -> list:
        """The list to start with, at rest: previous parameters equal the parameters."""
        return [*params, *params]

    def update(self, w, g, previous, *, step_size, momentum):
        moved = _moved(w, g, step_size)
        return [[m + momentum * (a - b) for m, a, b in zip(moved, w, previous, strict=True)], w]


class Momentum(DifferentiableOptimizer):
    """v' = momentum v + g, w' = w - step v'."""

    def __init__(
        self, loss_f, step_size: Setting, momentum: Setting, data_or_iter=None, *, gradient="graph"
    ) -> None:
        settings = {"step_size": step_size, "momentum": momentum}
        super().__init__(loss_f, 2, data_or_iter, gradient, **settings)

    def update(self, w, g, v, *, step_size, momentum):
        v = [momentum * a + b for a, b in zip(v, g, strict=True)]
        return [_moved(w, v, step_size), v]


class Nesterov(DifferentiableOptimizer):
    """v' = momentum v + g, w' = w - step (g + momentum v')."""

    def __init__(
        self, loss_f, step_size: Setting, momentum: Setting, data_or_iter=None, *, gradient="graph"
    ) -> None:
        settings = {"step_size": step_size, "momentum": momentum}
        super().__init__(loss_f, 2, data_or_iter, gradient, **settings)

    def update(self, w, g, v, *, step_size, momentum):
        v = [momentum * a + b for a, b in zip(v, g, strict=True)]
        return [_moved(w, [b + momentum * a for a, b in zip(v, g, strict=True)], step_size), v]


class Adam(DifferentiableOptimizer):
    """m' = beta1 m + (1 - beta1) g, v' = beta2 v + (1 - beta2) g^2, both divided by 1 - beta^t.

    If v is 0, as for an input that is always 0, the derivative of its root is taken to be 0.
    """

    extra = 1

    def __init__(
        self,
        loss_f,
        step_size: Setting,
        beta1: Setting = 0.9,
        beta2: Setting = 0.999,
        eps: Setting = 1e-8,
        data_or_iter=None,
        *,
        gradient="graph",
    ) -> None:
        settings = {"step_size": step_size, "beta1": beta1, "beta2": beta2, "eps": eps}
        super().__init__(loss_f, 3, data_or_iter, gradient, **settings)

    def get_opt_params(self, params: Tree) -> list:
        """The list to start with: params, zeros for both moments, and the number of steps.

        Raises HypergradientError if the type of params has less than 32 bits.
        """
        leaf = tree_flatten(params)[0][0]
        if torch.finfo(leaf.dtype).bits < 32:
            raise HypergradientError(
                f"params are {leaf.dtype}, which holds neither beta2 nor the squares of gradients: "
                "take float32, or Momentum"
            )
        return [*super().get_opt_params(params), leaf.new_zeros(())]

    def update(self, w, g, m, v, step, *, step_size, beta1, beta2, eps):
        step = step + 1
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
        v = [beta2 * a + (1 - beta2) * b.square() for a, b in zip(v, g, strict=True)]
        scale1, scale2 = 1 - beta1**step, 1 - beta2**step
        pairs = zip(m, v, strict=True)
        direction = [(a / scale1) / (_root(b / scale2) + eps) for a, b in pairs]
        return [_moved(w, direction, step_size), m, v, step]


def gd_step(
    params: Vector, loss: Tensor, step_size: float | Tensor, create_graph: bool = True
) -> list[Tensor]:
    """params - step_size d loss / d params, for a loss of these params. HyperTorch's name."""
    g = vjp([attached_scalar(loss, "loss")], params, [None], create_graph=create_graph)
    return _moved(params, g, step_size)


def _merged(moved: Vector, old: Vector, fixed: Sequence[bool]) -> list[Tensor]:
    """The old tensors if they are fixed, otherwise the moved ones, in the order of the old."""
    rest = iter(moved)
    return [t if f else next(rest) for t, f in zip(old, fixed, strict=True)]


def _want_gradient(tree: Tree) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in tree_flatten(tree)[0])


def _moved(w: Vector, direction: Vector, step: float | Tensor) -> list[Tensor]:
    """w - step direction, by the operations with the shortest backward pass."""
    if isinstance(step, Tensor):
        return [a + (-step) * b for a, b in zip(w, direction, strict=True)]
    return [torch.add(a, b, alpha=-step) for a, b in zip(w, direction, strict=True)]


def _root(v: Tensor) -> Tensor:
    positive = v > 0
    return torch.where(positive, v, 1.0).sqrt() * positive
