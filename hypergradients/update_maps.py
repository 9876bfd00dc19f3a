"""Update maps and outer losses at one point: their checks, and their vjp and jvp.

    mapped = Phi(params, hparams);   vjp J^T v,   jvp J v,   J = d mapped / d params

Params and hparams are any pytrees of tensors to the outside, flat lists of tensors inside. A vjp
sums over all outputs, and is zero where an output does not depend on an input.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hypergradients.errors import HypergradientError

Tree = Any  # a list, or any other pytree, of tensors
UpdateMap = Callable[[Tree, Tree], Tree]
OuterLoss = Callable[[Tree, Tree], Tensor]


class Point:
    """Detached params, and hparams, as flat lists: where maps and losses are differentiated.

    Raises HypergradientError where they are not trees of floating point tensors, or where a
    hyperparameter has no requires_grad.
    """

    def __init__(self, params: Tree, hparams: Tree) -> None:
        leaves, self._spec = _tensors(params, "params")
        self.params = [t.detach().requires_grad_() for t in leaves]
        self.hparams, self._hparams_spec = hyperparameters(hparams)
        self._hparams = hparams

    def tree(self, leaves: Sequence[Tensor]) -> Tree:
        """A tree like params."""
        return tree_unflatten(leaves, self._spec)

    def hparams_tree(self, leaves: Sequence[Tensor]) -> Tree:
        """A tree like hparams."""
        return tree_unflatten(leaves, self._hparams_spec)

    def matching(self, tree: Tree, what: str) -> list[Tensor]:
        """The tensors of a tree that must be like params."""
        if isinstance(tree, (list, tuple)) and self._spec.type in (list, tuple):
            tree = self._spec.type(tree)
        try:
            leaves = self._spec.flatten_up_to(tree)
        except ValueError as problem:
            raise HypergradientError(f"{what} is not a tree like params: {problem}") from problem
        for number, (leaf, p) in enumerate(zip(leaves, self.params, strict=True)):
            got = (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
            if got != (tuple(p.shape), p.dtype):
                raise HypergradientError(
                    f"tensor {number} of {what} must be {tuple(p.shape)}, {p.dtype}, as in "
                    f"params, got {got}"
                )
        return leaves

    def mapped(self, update: UpdateMap) -> list[Tensor]:
        """The update's result, attached or not."""
        with torch.enable_grad():
            result = update(self.tree(self.params), self._hparams)
        return self.matching(result, "the map's result")

    def apply(self, update: UpdateMap) -> list[Tensor]:
        """The update's result, attached to params or hparams."""
        leaves = self.mapped(update)
        if not any(leaf.requires_grad for leaf in leaves):
            raise HypergradientError(
                "the map's result is detached; compute it from the params and hparams it is given, "
                "inner gradients with create_graph=True"
            )
        return leaves

    def loss_gradients(self, outer_loss: OuterLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the outer loss by params and by hparams, of one backward pass."""
        with torch.enable_grad():
            value = outer_loss(self.tree(self.params), self._hparams)
        loss = attached_scalar(value, "outer_loss")
        return self._divided(vjp([loss], [*self.params, *self.hparams], [None]))

    def vjp(
        self, mapped: Sequence[Tensor], v: Sequence[Tensor], retain_graph: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(dPhi/dw)^T v and (dPhi/dlambda)^T v of a result of `apply`, of one backward pass."""
        inputs = [*self.params, *self.hparams]
        return self._divided(vjp(mapped, inputs, v, retain_graph=retain_graph))

    def _divided(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tensors[: len(self.params)], tensors[len(self.params) :]

    def delivered(self, gradient: Sequence[Tensor], set_grad: bool) -> Tree:
        """A tree like hparams, also added to their .grad on request."""
        return delivered(gradient, self.hparams, self._hparams_spec, set_grad)


def advance(params: Tree, hparams: Tree, update_maps: Sequence[UpdateMap]) -> Tree:
    """The params after these updates, without a graph."""
    for update in update_maps:
        point = Point(params, hparams)
        params = point.tree([t.detach() for t in point.mapped(update)])
    return params


class MapJacobian:
    """The Jacobian J of a map at a point, by its products with vectors, from one graph of the map.

    stochastic: the map is drawn anew for each product.
    """

    def __init__(self, point: Point, fp_map: UpdateMap, stochastic: bool) -> None:
        self._point, self._map, self._stochastic = point, fp_map, stochastic
        self._kept = None if stochastic else point.apply(fp_map)
        self._linear = None  # J^T u as a function of u

    def _mapped(self) -> list[Tensor]:
        return self._point.apply(self._map) if self._stochastic else self._kept

    def vjp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J^T v."""
        return vjp(self._mapped(), self._point.params, v, retain_graph=True)

    def jvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J v, the derivative of u -> J^T u."""
        if self._linear is None:
            u = [torch.zeros_like(t, requires_grad=True) for t in v]
            self._linear = u, vjp(self._kept, self._point.params, u, create_graph=True)
        u, product = self._linear
        return vjp(product, u, v, retain_graph=True)

    def vjp_by_both(self, v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """J^T v and (dPhi/dlambda)^T v."""
        return self._point.vjp(self._mapped(), v, retain_graph=True)


def vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    **options,
) -> list[Tensor]:
    """sum (d output / d input)^T cotangent for each input, zero where nothing depends on it."""
    attached = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not attached:
        return [torch.zeros_like(t) for t in inputs]
    outputs, cotangents = zip(*attached, strict=True)
    gradients = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, **options)
    pairs = zip(gradients, inputs, strict=True)
    return [torch.zeros_like(t) if g is None else g for g, t in pairs]


def _tensors(tree: Tree, what: str) -> tuple[list[Tensor], Any]:
    leaves, spec = tree_flatten(tree)
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise HypergradientError(
                f"{what} must be a list or tree of floating point tensors, entry {number} is {kind}"
            )
    if not leaves:
        raise HypergradientError(f"{what} holds no tensors")
    return leaves, spec


def hyperparameters(hparams: Tree) -> tuple[list[Tensor], Any]:
    """The tensors of a tree, all with requires_grad, and its structure."""
    leaves, spec = _tensors(hparams, "hparams")
    for number, leaf in enumerate(leaves):
        if not leaf.requires_grad:
            raise HypergradientError(
                f"hyperparameter {number} has requires_grad=False; call requires_grad_() on it"
            )
    return leaves, spec


def attached_scalar(loss: Tensor, what: str) -> Tensor:
    """The loss itself, which must be a scalar with a graph."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise HypergradientError(
            f"{what} must be a scalar attached to params or hparams, got {got}"
            + (", detached" if isinstance(loss, Tensor) and not loss.requires_grad else "")
        )
    return loss


def delivered(
    gradient: Sequence[Tensor], hparams: Sequence[Tensor], spec: Any, set_grad: bool
) -> Tree:
    """A tree of the structure `spec`, also added to the hyperparameters' .grad on request."""
    if set_grad:
        for h, g in zip(hparams, gradient, strict=True):
            h.grad = g.clone() if h.grad is None else h.grad.add_(g)
    return tree_unflatten(gradient, spec)
