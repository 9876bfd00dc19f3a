"""Learned optimisers in use, as a torch.optim.Optimizer.

    network = load_network("runs/sigmoid20/optimizer.json")
    optimizer = LearnedOptimizer(model.parameters(), network)      # any model
    loss.backward(); optimizer.step()                              # theta + lr out_mul u

networks.py defines the networks, meta_training.py trains them.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from learned_optimizer.errors import NonFiniteError, OptimizerError
from learned_optimizer.networks import CoordinateNetwork, memory_dtype


class LearnedOptimizer(torch.optim.Optimizer):
    """A learned optimiser for the parameters of any model.

    Parameters that are empty or have no gradient are skipped. `state` holds the memory of each
    parameter, [rows, numel], under "memory", in the type of the network's weights, but at least
    float32, whatever the parameter's own type. Raises OptimizerError if there are no parameters, if
    they are complex or one is given twice in a group, if lr is negative or not finite, and for
    sparse gradients; NonFiniteError if a gradient is not finite in the type of the network's
    weights, before anything has changed.

    params: tensors, or dicts of groups of them.
    network: computes the steps; it is moved to the parameters' device.
    lr: multiplies the step out_mul u, in each group. The network was trained with 1; schedulers
        work as with every optimiser.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        network: CoordinateNetwork,
        lr: float = 1.0,
    ) -> None:
        params = list(params)
        if not params:
            raise OptimizerError("there are no parameters to optimise: the model has none")
        self.network = network
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; raises OptimizerError for a wrong lr or no, complex or double parameters."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate")
            super().add_param_group(param_group)
        group = self.param_groups[-1]
        problem = None
        if not 0 <= group["lr"] < float("inf"):
            problem = f"lr must be a number of at least 0, got {group['lr']}"
        elif not group["params"]:
            problem = "a group has no parameters: leave it out"
        elif any(p.is_complex() for p in group["params"]):
            problem = "complex parameters are not supported; take real ones"
        elif len(set(group["params"])) < len(group["params"]):
            problem = "a parameter is in its group twice, and would be moved twice; give each once"
        if problem:
            self.param_groups.pop()
            raise OptimizerError(problem)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step; returns the loss of the closure if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = self._moving()
        finite = _all_finite([g for _, _, g in moving])
        if finite is not None and not finite:
            raise NonFiniteError("a gradient is not finite: nothing was changed")
        for p, lr, g in moving:
            self._move(p, g, lr)
        return loss

    @torch.no_grad()
    def step_unchecked(self) -> Tensor:
        """One step also where a gradient is not finite; whether all are, a scalar on the device.

        Unlike in `step` the host does not wait for the device.
        """
        moving = self._moving()
        finite = _all_finite([g for _, _, g in moving])
        for p, lr, g in moving:
            self._move(p, g, lr)
        return finite

    def _moving(self) -> list[tuple[Tensor, float, Tensor]]:
        """Parameters that have a gradient, their learning rates, and the gradients, flat."""
        moving = [
            (p, group["lr"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and p.numel()
        ]
        if any(p.grad.is_sparse for p, _ in moving):
            raise OptimizerError("sparse gradients are not supported; take dense ones")
        dtype = next(self.network.parameters()).dtype  # a gradient may overflow in it
        return [(p, lr, p.grad.to(dtype).flatten()) for p, lr in moving]

    def _move(self, p: Tensor, g: Tensor, lr: float) -> None:
        weights, state = next(self.network.parameters()), self.state[p]
        if weights.device != p.device:
            weights = next(self.network.to(p.device).parameters())
        theta = p.flatten().to(weights.dtype)
        if state:
            memory = state["memory"].to(memory_dtype(weights.dtype))
        else:
            memory = self.network.memory(len(g), g)
        x, state["memory"] = self.network.observe(g, theta, memory, [len(g)])
        u = self.network.step_(x, state["memory"])
        p.add_(u.view_as(p), alpha=lr * self.network.out_mul)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch; raises OptimizerError for a state of another network or other tensors."""
        network = state_dict.get("network", self._described())  # missing in older states
        if network != self._described():
            raise OptimizerError(
                f"the saved state is not that of this network: it is of {network}, this is "
                f"{self._described()}"
            )
        rows, saved = self.network.state_rows + self.network.seen_rows, state_dict["state"]
        ours, numbers = (
            [p for group in groups for p in group["params"]]
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        pairs = zip(ours, numbers, strict=False)  # torch refuses another number of them below
        memories = {p: saved[number].get("memory") for p, number in pairs if number in saved}
        for p, memory in memories.items():
            if memory is None or memory.shape != (rows, p.numel()):
                shape = None if memory is None else list(memory.shape)
                raise OptimizerError(
                    f"the saved state is not that of this network and these parameters: expected "
                    f"memory of {rows} rows and {p.numel()} columns, got {shape}"
                )
        super().load_state_dict(state_dict)
        for p, memory in memories.items():  # torch has rounded these to the parameters' type
            self.state[p]["memory"] = memory.to(p.device, copy=True)

    def __getstate__(self) -> dict:
        """As in torch, with the network added: for copy.deepcopy, pickle and torch.save."""
        return super().__getstate__() | {"network": self.network}

    def state_dict(self) -> dict:
        """As in torch, with a description of the network that the memory belongs to."""
        return super().state_dict() | {"network": self._described()}

    def _described(self) -> str:
        """What the memory depends on: the network's kind and its settings except out_mul."""
        settings = {n: v for n, v in self.network.settings.items() if n != "out_mul"}
        return f"{self.network.kind} {settings}"


def _all_finite(gradients: Sequence[Tensor]) -> Tensor | None:
    """Whether all numbers are finite; None if there are none."""
    if not gradients:
        return None
    norms = torch._foreach_norm(gradients, float("inf"))
    return torch.stack([n.to(norms[0]) for n in norms]).isfinite().all()
