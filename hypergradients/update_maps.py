"""Update maps and outer losses at one point: checks, vjp and jvp.

    mapped = Phi(params, hparams);   vjp J^T v,   jvp J v,   J = d mapped / d params

Callers pass params and hparams as any pytrees of tensors; inside they are flat lists. A vjp sums
over all outputs, and is zero if no output depends on an input.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from hypergradients.errors import HypergradientError
from hypergradients.replays import another_result, buffers_kept

Tree = Any  # a list, or any other pytree, of tensors
UpdateMap = Callable[[Tree, Tree], Tree]
OuterLoss = Callable[[Tree, Tree], Tensor]


class Point:
    """Detached params, and hparams, as flat lists: where maps and losses are differentiated.

    Frozen params (see `frozen`) are constants. Raises HypergradientError if these are not trees of
    floating-point tensors, or if a hyperparameter lacks requires_grad or is given twice.
    """

    def __init__(self, params: Tree, hparams: Tree) -> None:
        leaves, self._spec = _tensors(params, "params")
        self._frozen = frozen(leaves)
        pairs = zip(leaves, self._frozen, strict=True)
        self.params = [t if fixed else t.detach().requires_grad_() for t, fixed in pairs]
        self.hparams, self._hparams_spec = hyperparameters(hparams)
        self._hparams = hparams

    def tree(self, leaves: Sequence[Tensor]) -> Tree:
        """A tree like params."""
        return tree_unflatten(leaves, self._spec)

    def hparams_tree(self, leaves: Sequence[Tensor]) -> Tree:
        """A tree like hparams."""
        return tree_unflatten(leaves, self._hparams_spec)

    def matching(self, tree: Tree, what: str) -> list[Tensor]:
        """The tensors of a tree; raises HypergradientError if it isn't like params.

        what: a name of the tree, for the message.
        """
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
        """The update's result, attached or not.

        Raises HypergradientError if it is not like params, or if frozen params have moved.
        """
        with torch.enable_grad():
            result = update(self.tree(self.params), self._hparams)
        leaves = self.matching(result, "the map's result")
        for number, (leaf, fixed) in enumerate(zip(leaves, self._frozen, strict=True)):
            if fixed and leaf.requires_grad:
                raise HypergradientError(
                    f"the map moves tensor {number} of params, a frozen nn.Parameter; call "
                    "requires_grad_() on it, or let the map return it as it is"
                )
        return leaves

    def detached(self, mapped: Sequence[Tensor]) -> list[Tensor]:
        """A result without its graph, with the frozen params themselves."""
        triples = zip(mapped, self.params, self._frozen, strict=True)
        return [p if fixed else t.detach() for t, p, fixed in triples]

    def with_frozen(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """These leaves, with the frozen params in their places."""
        triples = zip(leaves, self.params, self._frozen, strict=True)
        return [p if fixed else t for t, p, fixed in triples]

    def apply(self, update: UpdateMap) -> list[Tensor]:
        """The update's result, attached to params or hparams.

        It is made for differentiation and is not a step of a training: modules keep their buffers.
        Raises HypergradientError if it is detached.
        """
        with buffers_kept():
            leaves = self.mapped(update)
        if not any(leaf.requires_grad for leaf in leaves):
            raise HypergradientError(
                "the map's result is detached; compute it from the params and hparams it is given, "
                "inner gradients with create_graph=True"
            )
        return leaves

    def leads_elsewhere(self, mapped: Sequence[Tensor], following: Tree) -> Tensor:
        """Whether a result differs from the params that follow these, a scalar tensor.

        It is False if these params follow themselves, as when a fixed point stands for a history.
        """
        before = [p.detach() for p in self.params]
        after = [t.detach() for t in self.matching(following, "the history")]
        if all(map(torch.equal, before, after)):
            return torch.tensor(False, device="cpu")
        return another_result(before, [t.detach() for t in mapped], after)

    def loss_gradients(self, outer_loss: OuterLoss) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the outer loss with respect to params and hparams, in one backward pass."""
        with torch.enable_grad():
            value = outer_loss(self.tree(self.params), self._hparams)
        loss = attached_scalar(value, "outer_loss")
        return self._divided(vjp([loss], [*self.params, *self.hparams], [None]))

    def vjp(
        self, mapped: Sequence[Tensor], v: Sequence[Tensor], retain_graph: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(dPhi/dw)^T v and (dPhi/dlambda)^T v for a result of `apply`, in one backward pass."""
        inputs = [*self.params, *self.hparams]
        return self._divided(vjp(mapped, inputs, v, retain_graph=retain_graph))

    def depends_on_hparams(self, mapped: Sequence[Tensor]) -> bool:
        """Whether the graph of a result leads to any hyperparameter."""
        return depends(mapped, self.hparams)

    def _divided(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tensors[: len(self.params)], tensors[len(self.params) :]

    def delivered(self, gradient: Sequence[Tensor], set_grad: bool) -> Tree:
        """A tree like hparams, which is also added to their .grad if set_grad."""
        return delivered(gradient, self.hparams, self._hparams_spec, set_grad)


def advance(params: Tree, hparams: Tree, update_maps: Sequence[UpdateMap]) -> Tree:
    """The params after these updates, without a graph."""
    for update in update_maps:
        point = Point(params, hparams)
        params = point.tree(point.detached(point.mapped(update)))
    return params


class MapJacobian:
    """Products of the Jacobian J of a map at a point with vectors, from one graph of the map.

    stochastic: whether the map is drawn anew for each product.
    """

    def __init__(self, point: Point, fp_map: UpdateMap, stochastic: bool) -> None:
        self._point, self._map, self._stochastic = point, fp_map, stochastic
        self._linear = None  # J^T u as a function of u
        self.depends_on_hparams = False  # whether any draw does
        if not stochastic:
            self._kept = self._drawn()
            require_dependence(self.depends_on_hparams)

    def _drawn(self) -> list[Tensor]:
        mapped = self._point.apply(self._map)
        self.depends_on_hparams = self.depends_on_hparams or self._point.depends_on_hparams(mapped)
        return mapped

    def _mapped(self) -> list[Tensor]:
        return self._drawn() if self._stochastic else self._kept

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
    """sum (d output / d input)^T cotangent for each input; zero if no output depends on it."""
    attached = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    by = [t for t in inputs if t.requires_grad]
    gradients = [None] * len(by)
    if attached and by:
        outputs, cotangents = zip(*attached, strict=True)
        gradients = torch.autograd.grad(outputs, by, cotangents, allow_unused=True, **options)
    each = iter(gradients)
    gradients = [next(each) if t.requires_grad else None for t in inputs]
    pairs = zip(gradients, inputs, strict=True)
    return [torch.zeros_like(t) if g is None else g for g, t in pairs]


def jvp(fp_map: Callable[[Tree], Tree], params: Tree, vs: Tree) -> Tree:
    """J v, the derivative of u -> J^T u, where J is the Jacobian of params -> fp_map(params).

    The result is a tree like params, attached to everything that fp_map uses and that requires a
    gradient. Maps may contain torch.autograd.grad with create_graph=True. HyperTorch's name.

    params, vs: trees of tensors of the same shapes.
    """
    point, spec = tree_flatten(params)
    point = [t if t.requires_grad else t.detach().requires_grad_() for t in point]
    with torch.enable_grad():
        mapped = spec.flatten_up_to(fp_map(tree_unflatten(point, spec)))
        u = [torch.zeros_like(t, requires_grad=True) for t in mapped]
        transposed = vjp(mapped, point, u, create_graph=True)
        return tree_unflatten(vjp(transposed, u, tree_flatten(vs)[0], create_graph=True), spec)


def update_tensor_grads(hparams: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add each gradient, with None for 0, to its hyperparameter's .grad. HyperTorch's name."""
    for h, g in zip(hparams, grads, strict=True):
        g = torch.zeros_like(h) if g is None else g
        h.grad = g.clone() if h.grad is None else h.grad.add_(g)


def frozen(leaves: Sequence[Tensor]) -> list[bool]:
    """Which params are not moved: nn.Parameters with requires_grad=False.

    Other tensors are values to start from, whether they require a gradient or not; and if all
    params are such nn.Parameters, so are these.
    """
    fixed = [isinstance(t, nn.Parameter) and not t.requires_grad for t in leaves]
    return [False] * len(fixed) if all(fixed) else fixed


def depends(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether the graph of any output leads to any of the inputs."""
    wanted = {get_gradient_edge(t).node for t in inputs}
    return any(node in wanted for node in _nodes(outputs))


def other_leaves(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves other than the inputs that the graph of an output leads to."""
    known = {id(t) for t in inputs}
    leaves = (getattr(node, "variable", None) for node in _nodes([output]))
    return [t for t in leaves if t is not None and id(t) not in known]


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of the outputs' graph, each once."""
    nodes = [get_gradient_edge(t).node for t in outputs if t.requires_grad]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        nodes.extend(new)


def require_dependence(depends: bool) -> None:
    """Raises HypergradientError if no map depends on a hyperparameter: the gradient would be 0."""
    if not depends:
        raise HypergradientError(
            "the map's result depends on no hyperparameter; compute it from the hparams it is "
            "given, inner gradients with create_graph=True"
        )


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
    """The tensors of a tree and its structure.

    Raises HypergradientError if a tensor lacks requires_grad or is given twice.
    """
    leaves, spec = _tensors(hparams, "hparams")
    first: dict[int, int] = {}
    for number, leaf in enumerate(leaves):
        if not leaf.requires_grad:
            raise HypergradientError(
                f"hyperparameter {number} has requires_grad=False; call requires_grad_() on it"
            )
        if first.setdefault(id(leaf), number) != number:
            raise HypergradientError(
                f"hyperparameter {number} is hyperparameter {first[id(leaf)]} again; give each once"
            )
    return leaves, spec


def attached_scalar(loss: Tensor, what: str) -> Tensor:
    """The loss; raises HypergradientError if it isn't a scalar with a graph."""
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
    """A tree of the structure `spec`; with set_grad it is also added to the hparams' .grad."""
    if set_grad:
        update_tensor_grads(hparams, gradient)
    return tree_unflatten(gradient, spec)
