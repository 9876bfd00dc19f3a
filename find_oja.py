"""Recovers Oja's rule, dw = x y - y^2 w, given only the direction that it should converge to.

    python find_oja.py
    python find_oja.py --metasteps 100 --threads 1

A linear neuron is trained by a rule with 27 terms x^a y^d w^e, a, d, e <= 2. The squared distance
of its weight from the first principal direction of the images (or its opposite, if that is nearer)
is differentiated through all updates, to improve the 27 coefficients. Many independent neurons with
different starts see the same batches; the loss is their mean distance. Starts come in opposite
pairs: since their distribution is symmetric, so is the sample, and a term that favours one sign (a
constant, y^2) gains nothing by chance. Source: Oja 1982.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from experiment.command_line import (
    common_parser,
    parse,
    positive_float,
    positive_int,
    run_command,
)
from experiment.meta_settings import MetaSettings
from experiment.settings import add_settings, settings_of

DEFAULTS = {  # defaults that differ from those of MetaSettings
    "metasteps": 500,
    "lr": 1e-4,
    "warmup_steps": 10,
    "clip_norm": 1000.0,
    "sparsify_from": 4,
    "inner_steps": 300,
}


def make_parser():
    """The command's flags."""
    parser = common_parser("Recover Oja's rule by hypergradient descent.", "find_oja")
    group = parser.add_argument_group("meta-learning")
    add_settings(group, MetaSettings, [*DEFAULTS, "memory"], **DEFAULTS)
    add = group.add_argument
    add("--l1_reg", type=positive_float, default=100.0,
        help="initial weight of the L1 penalty on the coefficients")  # fmt: skip
    add("--l1_end", type=positive_float, default=1.0,
        help="final weight of the L1 penalty, which falls geometrically")  # fmt: skip
    add = parser.add_argument_group("inner training").add_argument
    add("--pairs", type=positive_int, default=8,
        help="pairs of neurons with opposite starts, trained side by side")  # fmt: skip
    add("--batch_size", type=positive_int, default=256, help="images in a batch")
    add("--bound", type=positive_float, default=0.1,
        help="limit of a weight's change in an update (by tanh)")  # fmt: skip
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from comparison.principal_components import principal_components
from experiment.devices import set_up
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import EVALUATION, seeded_generator
from figures.meta_learning import plot_oja_run
from hypergradients import HypergradientError
from hypgraddesc import hypgraddesc
from initializers import FIXED, GaussianInitializer
from learning_rules import PerLayerRule, PolynomialRule, classical_rule
from mnist_datasets import batches, load_images, normalize_pixels
from models_fully_local import Activation, Params, lateral_mlp, over_tasks
from rules import write_rule
from train import Draw, Training, evaluate_training

OJA_RATES = [10**exponent for exponent in np.arange(-4, 0.01, 0.25)]
TERMS_SHOWN = 8


class DirectionLoss:
    """Squared distance of weights from the nearer of +- a direction [pixels], mean over neurons."""

    metrics = ("cosine",)

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    def __call__(self, model, params, generator) -> tuple[Tensor, dict[str, float]]:
        """The loss, attached to params, and the mean |cosine| between weights and direction."""
        w = params[-1]["w"]
        nearer = torch.where(w.detach() @ self.direction < 0, -1.0, 1.0).unsqueeze(1)
        loss = (w - nearer * self.direction).square().sum(1).mean()
        return loss, {"cosine": cosines(w, self.direction).mean().item()}


def cosines(w: Tensor, direction: Tensor) -> Tensor:
    """|cosine| [neurons] between weights [neurons, pixels] and a unit vector [pixels]."""
    w = w.detach()
    return (w @ direction).abs() / w.norm(dim=1)


def make_rule(bound: float) -> PerLayerRule:
    """The 27 terms (a, 0, d, e) with a, d, e <= 2 and coefficients 0; biases stay at 0."""
    terms = [(a, 0, d, e) for a, d, e in itertools.product(range(3), repeat=3)]
    return PerLayerRule([PolynomialRule({"w": terms}, bound="tanh", bound_size=bound)])


def make_neurons(inputs: int, pairs: int) -> nn.Module:
    """Pairs of linear units on flattened images, which do not interact."""
    return lateral_mlp(inputs, [2 * pairs], Activation("identity"), inhibition="none")


class OppositeStarts(GaussianInitializer):
    """w_0 ~ N(0, 1) / sqrt(fan-in) for the first half of the units, the opposite for the second."""

    def __init__(self) -> None:
        super().__init__({}, {"w": FIXED})

    def forward(self, model: nn.Module, generator: torch.Generator | None = None) -> Params:
        """One draw of the starts, in the last layer, which is the only one with parameters."""
        *others, last = super().forward(model, generator)
        half = last["w"][: len(last["w"]) // 2]
        return [*others, last | {"w": torch.cat([half, -half])}]


def make_settings(args) -> MetaSettings:
    """The meta-loop's settings from the flags; --pairs are neurons, not perturbed trainings."""
    fall = args.l1_end / args.l1_reg
    return settings_of(
        args,
        MetaSettings,
        l1=lambda metastep: args.l1_reg * fall ** (metastep / args.metasteps),
        pairs=MetaSettings.pairs,
    )


def coefficients(rule: PerLayerRule) -> dict[str, float]:
    """The coefficients as columns of metrics.csv."""
    return {f"coefficient/{name}": value for name, value in rule.coefficients().items()}


def compare_with_oja(args, training: Training, log: RunLog) -> dict:
    """Cosines and a weight of the learned rule, and of Oja's rule at the best of many rates.

    Both are trained from the same draw of starts and batches. The cosines are lists [neurons], the
    weights tensors [pixels].
    """
    direction, draw = (
        training.outer_loss.direction,
        Draw((args.seed, EVALUATION, 0), args.inner_steps),
    )

    def trained(rule: PerLayerRule) -> tuple[Tensor, Tensor]:
        _, params = evaluate_training(replace(training, rule=rule), draw)
        return cosines(params[-1]["w"], direction), params[-1]["w"][0]

    rules = [
        PerLayerRule([classical_rule("oja", rate, bound="tanh", bound_size=args.bound)])
        for rate in OJA_RATES
    ]
    rules = [rule.to(direction) for rule in rules]
    learned, learned_weight = trained(training.rule)
    best, oja_rate, oja_weight = torch.zeros_like(learned), math.nan, direction
    ends = together(training, rules, draw) if direction.is_cuda else None
    with log.progress(len(OJA_RATES), description="Oja's rule at each rate") as progress:
        for number, (rate, rule) in enumerate(zip(OJA_RATES, rules, strict=True)):
            if ends is None:
                values, weight = trained(rule)
            else:
                values, weight = cosines(ends[number], direction), ends[number][0]
            if values.mean() > best.mean():
                best, oja_rate, oja_weight = values, rate, weight
            progress.advance()
    return {
        "learned": learned.tolist(),
        "learned_weight": learned_weight,
        "oja": best.tolist(),
        "oja_weight": oja_weight,
        "oja_rate": oja_rate,
    }


@torch.no_grad()
def together(training: Training, rules: Sequence[PerLayerRule], draw: Draw) -> Tensor:
    """The weights [rules, neurons, pixels] after the same training by each of several rules.

    All are updated at once, in the same terms with coefficients [rules, ...].
    """
    start, batches = training.begin(draw)
    model, count = over_tasks(training.model), len(rules)
    psi = {
        name: torch.stack([rule.get_parameter(name) for rule in rules])
        for name, _ in rules[0].named_parameters()
    }
    params = [{n: t.expand(count, *t.shape) for n, t in layer.items()} for layer in start]
    for batch in itertools.islice(batches, draw.steps):
        given = model, params, batch.expand(count, *batch.shape)
        params = functional_call(rules[0], psi, given)
    return params[-1]["w"]


def verdict(coefficients: dict[str, float]) -> tuple[bool, list[str]]:
    """Whether the coefficients are those of Oja's rule, and a table as a list of lines.

    They are if the two largest are those of x y, positive, and y^2 w, negative, their sizes differ
    by less than a fifth of the larger, and all others are below a tenth of both.
    """
    ranked = sorted(coefficients.items(), key=lambda item: -abs(item[1]))
    largest = max((abs(value) for value in coefficients.values()), default=0.0) or 1.0
    lines = [f"{'term':>14}  {'coefficient':>12}  relative"]
    for name, value in ranked[:TERMS_SHOWN]:
        lines.append(f"{name.split('/')[-1]:>14}  {value:12.3e}  {value / largest:+8.3f}")
    nothing = ("", 0.0)  # in place of removed terms
    (first, a), (second, b), (_, third), *_ = [*ranked, nothing, nothing, nothing]
    signs = {first.split("/")[-1]: a > 0, second.split("/")[-1]: b > 0}
    is_oja = (
        signs == {"x y": True, "y^2 w": False}
        and abs(a + b) < 0.2 * largest
        and abs(third) < 0.1 * min(abs(a), abs(b))
    )
    return is_oja, lines


def report(args, log: RunLog, rule: PerLayerRule, comparison: dict, data, direction) -> None:
    """Print the table, the cosines and the verdict, and write them to files."""
    is_oja, lines = verdict(rule.coefficients())
    learned, oja = np.mean(comparison["learned"]), np.mean(comparison["oja"])
    weights = torch.stack([comparison["learned_weight"], comparison["oja_weight"], direction])
    weights = weights.numpy(force=True)
    weights *= np.sign(weights @ weights[2])[:, None]
    shape = np.array(data.shape)
    log.write_arrays("parameters.npz", {"1.w": weights[:1], "input_shape": shape})
    log.write_arrays("directions.npz", {"weights": weights, "input_shape": shape})
    log.write_results({
        "data": data.source,
        "is_oja": is_oja,
        "coefficients": rule.coefficients(),
        "cosine_learned": comparison["learned"],
        "cosine_oja": comparison["oja"],
        "oja_rate": comparison["oja_rate"],
    })  # fmt: skip
    log.plot(plot_oja_run)
    for line in lines:
        log.say(line)
    log.say(f"cosine with the first principal direction, {args.inner_steps} steps, mean over "
            f"{2 * args.pairs} starts:")  # fmt: skip
    log.say(f"  learned rule {learned:.4f}")
    log.say(f"  Oja's rule   {oja:.4f}  (at its best rate, {comparison['oja_rate']:.2g})")
    log.say("this is Oja's rule" if is_oja else "this is not Oja's rule (yet)")


def main(argv: list[str] | None = None) -> None:
    """Data; neurons, rule and loss; the loop; the comparison with Oja's rule; the report."""
    args = parse(make_parser(), argv)
    device, dtype = set_up(args)
    data, _ = normalize_pixels(*load_images(args.dataset, args.data_dir), unit_variance=False)
    data = data.to(device)
    direction = principal_components(data).components[0].to(dtype)
    training = Training(
        make_neurons(math.prod(data.shape), args.pairs),
        make_rule(args.bound).to(device, dtype),
        OppositeStarts().to(device, dtype),
        lambda generator: batches(data, args.batch_size, generator, dtype),
        DirectionLoss(direction),
    )
    next(training.batches(seeded_generator(0)))  # raises an error for a wrong batch size
    with open_run(args, "find_oja", data) as log:
        log.say(data.source)
        history = hypgraddesc(
            training, make_settings(args), log, hyperparameters=lambda: coefficients(training.rule)
        )
        write_rule(log, training.rule)
        comparison = compare_with_oja(args, training, log)
        report(args, log, training.rule, comparison, data, direction)
        log.say(f"everything is in {log.directory}")
    if not history.finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(HypergradientError,))
