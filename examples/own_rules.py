"""Two rules of your own for main.py: decorrelating Hebbian units, and a sliding threshold.

    python main.py 32 --rule examples/own_rules.py:Decorrelation --inhibition none \\
        --pixelwise_normalization mean --batch_size 100 --horizon 100 100 --probe ridge \\
        --tasks 1 --metasteps 150 --lr 3e-4 --warmup_steps 5 --evaluations 3 --beside --threads 1
    python main.py 32 --rule examples/own_rules.py:SlidingThreshold ...       with the same flags

    dw = eta mean_b( s x^T - (a diag(s s^T) + b tril(s s^T) + c s s^T) w )
    dw = eta mean_b( y (y - k theta) x^T );   theta <- theta + (mean_b(y^2) - theta) / (1 + span)

s are preactivations, y = sigma(s). With (a, b, c) = (1, 0, 0) the first is Oja's rule (1982) for
each unit, with (0, 1, 0) Sanger's (1989), with (0, 0, 1) Oja's subspace rule (1989). The second is
the rule of Bienenstock, Cooper and Munro (1982). Both begin as plain ones; what is learned are
eta, span and k as logarithms, and (a, b, c).
"""

import torch
from torch import Tensor, nn

from learning_rules import LearningRule

SIZE = 300.0  # a number moves by up to 300 times --lr in a meta-step, with the default by 0.03


class Decorrelation(LearningRule):
    """Hebbian units that take from each input what they, or the units before them, explain of it.

    For fully connected layers. Begins as Oja's rule, by which all units find the same direction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(-5.0))
        self.shares = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

    def step_sizes(self) -> dict[str, Tensor]:
        """The same size for all numbers."""
        return {name: torch.full_like(p, SIZE) for name, p in self.named_parameters()}

    def update_layer(self, layer, old, x, s, y) -> dict[str, Tensor]:
        """New parameters of a layer, of which only w has changed."""
        (x,), (s,), (a, b, c) = x, s, self.shares
        products = s.T @ s / len(s)
        explained = a * products.diag().diag() + b * products.tril() + c * products
        change = s.T @ x / len(x) - explained @ old["w"]
        return {**old, "w": old["w"] + self.log_rate.exp() * change}


class SlidingThreshold(LearningRule):
    """Units that learn what drives them above a threshold, and unlearn what does not reach it.

    For fully connected layers. Each unit remembers its threshold in the layer's dict, where there
    is none before the first update: it begins at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(-5.0))
        self.log_span = nn.Parameter(torch.tensor(2.0))
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def step_sizes(self) -> dict[str, Tensor]:
        """The same size for all numbers."""
        return {name: torch.full_like(p, SIZE) for name, p in self.named_parameters()}

    def update_layer(self, layer, old, x, s, y) -> dict[str, Tensor]:
        """New parameters of a layer, w and threshold [out]."""
        (x,), (y,) = x, y
        seen = y.square().mean(0)
        before = old.get("threshold", torch.zeros_like(seen))
        threshold = before + (seen - before) / (1 + self.log_span.exp())
        drive = y * (y - self.log_scale.exp() * threshold)
        change = self.log_rate.exp() * drive.T @ x / len(x)
        return {**old, "w": old["w"] + change, "threshold": threshold}
