"""A learned optimiser as a learning rule, whose hyperparameters are the weights of its network.

rule = LearnedRule(load_network("runs/sigmoid20/optimizer.json"))
params = rule.update(model, params, batch)     # theta' = theta + out_mul u
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from experiment.errors import NonFiniteError
from learned_optimizer import CoordinateNetwork
from learning_rules import LearningRule
from models_fully_local import Params

MEMORY = "optimizer_memory"  # the memory's name among a layer's parameters


class LearnedRule(LearningRule):
    """A learned optimiser as a rule: the network's weights are the hyperparameters.

    The gradient is detached: the result depends on the network's weights through its output and
    through the parameters that are passed on, but not through second derivatives of the loss. The
    memory of all n coordinates, [rows, n], is kept in the first layer that has parameters.

    loss: loss(model, params, batch) returns a scalar; by default model.loss(params, batch).
    """

    def __init__(
        self,
        network: CoordinateNetwork,
        loss: Callable[[nn.Module, Params, object], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss or _own_loss

    def update(self, model: nn.Module, params: Params, batch) -> Params:
        """New parameters and memory; raises NonFiniteError if the gradient is not finite."""
        memory = next((layer[MEMORY] for layer in params if MEMORY in layer), None)
        bare = [{n: t for n, t in layer.items() if n != MEMORY} for layer in params]
        leaves = [tensor for layer in bare for tensor in layer.values()]
        theta = torch.cat([tensor.flatten() for tensor in leaves])
        g = torch.cat([g.flatten() for g in self._gradient(model, bare, batch)])
        if not g.isfinite().all():
            raise NonFiniteError("the gradient is not finite: nothing was changed")
        if memory is None:
            memory = self.network.memory(len(theta), theta.detach())
        x, memory = self.network.observe(
            g, theta.detach(), memory, [tensor.numel() for tensor in leaves]
        )
        if torch.is_grad_enabled():
            u, memory = self.network(x, memory)
        else:
            memory = memory.clone()
            u = self.network.step_(x, memory)
        moved = torch.add(theta, u, alpha=self.network.out_mul)
        return _divided(moved, memory, bare)

    def _gradient(self, model: nn.Module, params: Params, batch) -> Sequence[Tensor]:
        with torch.enable_grad():
            leaf_params = [
                {n: t.detach().requires_grad_() for n, t in layer.items()} for layer in params
            ]
            leaves = [tensor for layer in leaf_params for tensor in layer.values()]
            loss = self.loss(model, leaf_params, batch)
            return torch.autograd.grad(loss, leaves, materialize_grads=True)


def _own_loss(model: nn.Module, params: Params, batch) -> Tensor:
    return model.loss(params, batch)


def _divided(flat: Tensor, memory: Tensor, like: Params) -> Params:
    """A vector as parameters of the shapes of `like`, with the memory in the first layer."""
    parts = iter(flat.split([tensor.numel() for layer in like for tensor in layer.values()]))
    new = [{n: next(parts).view_as(t) for n, t in layer.items()} for layer in like]
    first = next(layer for layer in new if layer)
    first[MEMORY] = memory
    return new
