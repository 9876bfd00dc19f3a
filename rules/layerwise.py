"""Layers trained one after the other, each on the centred output of those before it.

    params = train_layerwise(model, params, batches, rules, [250, 250], inputs)

Layer 1 is trained by its number of updates and then fixed; a Centre behind it subtracts the mean of
its output over the training images; then layer 2 is trained, and so on. A Centre in front of the
first layer does the same to the images. Views go through the fixed layers.

    training = LayerwiseTraining(
        model, LayerwiseRule(rules), initializer, batches, outer_loss, inputs=inputs
    )

learns the rule of the last layer: each draw trains the layers below anew, without a graph.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from experiment.seeds import BELOW
from learning_rules import LearningRule, PerLayerRule, RuleError
from models_fully_local import Centre, Params, Sequential, has_weights
from train import BATCHES, POOL, Draw, Training, TrainingError, check_finite, detached, train

Inputs = Callable[[], Iterable[Tensor]]  # the training images, in chunks [n, ...]


class LayerwiseRule(PerLayerRule):
    """One rule per layer; an update changes the last layer and leaves the others as they are.

    Attributes:
        rules: as in PerLayerRule; those before the last are copies that are not learned.
    """

    def __init__(self, rules: Sequence[LearningRule]) -> None:
        below = [copy.deepcopy(rule).requires_grad_(False) for rule in rules[:-1]]
        super().__init__([*below, *rules[-1:]])

    def update(self, model: nn.Module, params: Params, batch) -> Params:
        """New parameters; raises RuleError unless there is a rule for each layer with weights."""
        layers = _with_weights(params)
        if len(layers) != len(self.rules):
            raise RuleError(
                f"expected a rule for each layer with weights, {len(layers)}, got {len(self.rules)}"
            )
        return _LayerRule(self.rules[-1], layers[-1]).update(model, params, batch)

    def to_dict(self) -> dict:
        """The description of a PerLayerRule; the run says how its layers were trained."""
        return super().to_dict() | {"kind": PerLayerRule.__name__}


class _LayerRule(LearningRule):
    """A rule that changes only the layer of this number, from the output of those before it."""

    def __init__(self, rule: LearningRule, number: int) -> None:
        super().__init__()
        self.rule, self.number = rule, number

    def update(self, model: nn.Module, params: Params, batch) -> Params:
        k, alone = self.number, Sequential([model.layers[self.number]])
        if isinstance(batch, tuple | list):
            seen = tuple(_output(model, params[:k], x) for x in batch)
        else:
            seen = _output(model, params[:k], batch)
        new = self.rule.update(alone, [params[k]], seen)
        return [*params[:k], *new, *params[k + 1 :]]


def train_layerwise(
    model: nn.Module,
    params: Params,
    batches: Iterator,
    rules: Sequence[LearningRule],
    steps: Sequence[int],
    inputs: Inputs,
) -> Params:
    """Parameters whose first layers are trained one after the other, without a graph.

    Every Centre in front of the first layer that is not trained is set. Raises RuleError for more
    rules than layers, and NonFiniteError if parameters are not finite after training.

    rules, steps: for the layers with weights, from the first on; layers without a rule keep their
        parameters, with any graph that these have.
    inputs: the images over which means are taken.
    """
    layers = len(_with_weights(params))
    if len(rules) > layers:
        raise RuleError(
            f"expected at most a rule for each layer with weights, {layers}, got {len(rules)}"
        )
    new, todo = list(params), list(zip(rules, steps, strict=True))
    for k, layer in enumerate(model.layers):
        if isinstance(layer, Centre):
            new[k] = {"input_mean": mean_output(model, new[:k], inputs()).to(_like(new))}
        elif has_weights(new[k]):
            if not todo:
                break
            rule, count = todo.pop(0)
            of_layer = _LayerRule(rule, k)
            new[k] = train(model, new, batches, of_layer, count, grad=False)[k]
            check_finite([new[k]], f"layer {len(rules) - len(todo)} after {count} updates")
    return new


@torch.no_grad()
def mean_output(model: nn.Module, params: Params, inputs: Iterable[Tensor]) -> Tensor:
    """The mean output, in float64, of the first layers over all inputs; of one output's shape.

    params: the parameters of these layers; the model may have more.
    """
    total, count = torch.zeros(()), 0
    for x in inputs:
        y = _output(model, params, x)
        total, count = total.to(y.device) + y.sum(0, dtype=torch.float64), count + len(y)
    return total / count


@dataclass(frozen=True, kw_only=True)
class LayerwiseTraining(Training):
    """A Training of the last layer, on layers that are trained before it in each draw.

    The model has a Centre in front of each layer (`lateral_network` with centred_layers).

    rule: a LayerwiseRule.
    inputs: as in `train_layerwise`.
    steps_below: the number of updates of each layer before the last; (): as many as in the draw.
    trainings_below: each draw takes the layers before the last from one of so many trainings, which
        are made when first needed and kept; None: each draw trains them anew. Needs steps_below.
    """

    inputs: Inputs
    steps_below: Sequence[int] = field(default=())
    trainings_below: int | None = None
    _trained: dict[tuple[int, ...], Params] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.trainings_below and not self.steps_below:
            raise TrainingError("trainings_below needs steps_below, the same for all draws")

    def initial(self, draw: Draw, batches: Iterator) -> Params:
        """Initial parameters: the last layer drawn by the initializer, those below trained.

        Raises NonFiniteError if those are not finite.
        """
        if self.trainings_below is None:
            return self._trained_below(draw, batches)
        drawn = super().initial(draw, batches)
        last, below = _with_weights(drawn)[-1], self._one_of_the_trainings(draw)
        return [*below[:last], *drawn[last:]]

    def _trained_below(self, draw: Draw, batches: Iterator) -> Params:
        drawn, below = super().initial(draw, batches), self.rule.rules[:-1]
        steps = self.steps_below or [draw.steps] * len(below)
        return train_layerwise(self.model, drawn, batches, below, steps, self.inputs)

    def _one_of_the_trainings(self, draw: Draw) -> Params:
        """The parameters of one of `trainings_below`; those of the last layer are not needed."""
        generator = draw.generator(POOL)
        number = int(torch.randint(self.trainings_below, (), generator=generator))
        key = (draw.key[0], BELOW, number)
        if key not in self._trained:
            alone = Draw(key, draw.steps)
            batches = self.batches(alone.generator(BATCHES))
            self._trained[key] = detached(self._trained_below(alone, batches))
        return self._trained[key]

    @property
    def follows_the_draw(self) -> bool:
        """Whether the layers below the last train for as many updates as the draw."""
        return len(self.rule.rules) > 1 and not self.steps_below

    def drawn_anew(self, begun: Params, drawn: Params) -> Params:
        """As in Training; layers below the last do not depend on the hyperparameters."""
        last = _with_weights(begun)[-1]
        return [*begun[:last], drawn[last], *begun[last + 1 :]]


def image_inputs(data, dtype: torch.dtype, at_once: int = 4096) -> Inputs:
    """The normalised images of an ImageData as the `inputs` of `train_layerwise`."""
    starts = range(0, len(data), at_once)
    return lambda: (data.floats(slice(k, k + at_once), dtype) for k in starts)


def _output(model: nn.Module, params: Params, x: Tensor) -> Tensor:
    """The output of the first layers, as many as there are in `params`."""
    for layer, of_layer in zip(model.layers, params, strict=False):
        x = layer(x, of_layer)
    return x


def _with_weights(params: Params) -> list[int]:
    """The indices of the layers that have weights."""
    return [k for k, of_layer in enumerate(params) if has_weights(of_layer)]


def _like(params: Params) -> Tensor:
    return next(of_layer["w"] for of_layer in params if has_weights(of_layer))
