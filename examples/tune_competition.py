"""Tunes the learning rate and Delta of competing units: hypergradients, random search or TPE?

    python examples/tune_competition.py --dataset mnist5k
    python examples/tune_competition.py --gate soft --metasteps 40
    python examples/tune_competition.py --trials 50        same seed, same numbers
    python examples/tune_competition.py --resume runs/tune_competition-...

All methods start from one random draw of the hyperparameters: the rate log-uniform in [1e-3, 1],
Delta uniform in [0, 0.4], the soft gate's inverse temperature log-uniform in [0.1, 10].
Hypergradient descent continues from there with Adam. Random search draws again and again, and TPE
(Optuna's) draws where losses were low, each for the same processor time; both keep the draw with
the lowest loss. The number of these draws, and hence the result, depends on the machine unless
--trials fixes it. The results of all methods are judged by trainings from new initial weights. All
of this is repeated for several --searches.

Pixels are centred: otherwise units unlearn mainly the mean image from every image, and rectified
units become silent.
"""

import argparse
import math
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.samplers import TPESampler

from experiment.command_line import common_parser, parse, positive_float, positive_int, run_command
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import EVALUATION, TRIAL, seeded_generator
from figures.competition import WAYS, plot_searches_run
from hypergradients import HypergradientError
from hypgraddesc import HypergradientDescent, MetaSettings
from initializers import FIXED, GaussianInitializer
from krotov_hopfield import ACTING, GATES, Competition, CompetitionError
from learning_rules import LearningRule, PerLayerRule
from linear_probe import ProbeLoss
from mnist_datasets import batches, load_images, normalize_pixels
from models_fully_local import Activation, lateral_mlp
from rules.competing_units import KrotovHopfieldRule
from train import Draw, Training, evaluate_training

RANGES = {
    "rate": FloatDistribution(1e-3, 1, log=True),
    "delta": FloatDistribution(0, 0.4),
    "inverse_temperature": FloatDistribution(0.1, 10, log=True),
}

Draws = Generator[dict[str, float], float | None, None]  # hyperparameters; receives their loss


def make_parser():
    """The command's flags."""
    parser = common_parser("Tune competing units in three ways, at equal cost.", "tune_competition")
    add = parser.add_argument
    add("--units", type=positive_int, default=32, help="units of the layer")
    add("--gate", choices=GATES, default="ranked", help="which units learn from a sample")
    add("--inner_steps", type=positive_int, default=100, help="updates of a training")
    add("--batch_size", type=positive_int, default=256, help="images in a batch")
    add("--metasteps", type=positive_int, default=25, help="meta-steps of hypergradients")
    add("--lr", type=positive_float, default=0.1, help="rate of Adam on log rate and Delta")
    add("--trials", type=positive_int, metavar="N",
        help="draws of random search and TPE (default: those in equal time)")  # fmt: skip
    add("--searches", type=positive_int, default=5, help="number of searches by each method")
    add("--evaluations", type=positive_int, default=5, help="trainings that judge a result")
    return parser


def make_rule(args, hyperparameters: dict[str, float], dtype) -> PerLayerRule:
    """The rule with these hyperparameters."""
    return PerLayerRule([KrotovHopfieldRule(gate=args.gate, **hyperparameters).to(dtype)])


def draw(generator: torch.Generator) -> dict[str, float]:
    """Random hyperparameters within RANGES."""
    rate, delta, temperature = torch.rand(3, generator=generator).tolist()
    return {
        "rate": 10 ** (3 * rate - 3),
        "delta": 0.4 * delta,
        "inverse_temperature": 10 ** (2 * temperature - 1),
    }


def first_draw(args, search: int) -> dict[str, float]:
    """The start of all methods in a search."""
    return draw(seeded_generator(args.seed, search))


def random_draws(args, search: int) -> Draws:
    """Random hyperparameters, endlessly."""
    generator = seeded_generator(args.seed, search)
    while True:
        yield draw(generator)


def tpe_draws(args, search: int) -> Draws:
    """Hyperparameters proposed by Optuna's TPE, endlessly."""
    seed = seeded_generator(args.seed, TRIAL, search).initial_seed() % 2**32
    study = optuna.create_study(sampler=TPESampler(seed=seed))
    first = first_draw(args, search)
    study.enqueue_trial(first)
    acting = {name: RANGES[name] for name in RANGES if name in ("rate", *ACTING[args.gate])}
    while True:
        trial = study.ask(acting)
        study.tell(trial, (yield first | trial.params))


def by_hypergradients(args, search: int, training: Training, dtype) -> tuple[PerLayerRule, float]:
    """The rule at the end of hypergradient descent, and the processor time in seconds."""
    begin = time.process_time()
    rule = make_rule(args, first_draw(args, search), dtype)
    settings = MetaSettings(
        args.metasteps, args.lr, decay="cosine", inner_steps=args.inner_steps,
        seed=args.seed + 1000 * search,
    )  # fmt: skip
    descent = HypergradientDescent(replace(training, rule=rule), settings)
    for _ in range(args.metasteps):
        descent.step()
    return rule, time.process_time() - begin


def by_trials(
    args, search: int, training: Training, dtype, draws: Draws, seconds: float
) -> tuple[PerLayerRule, int]:
    """The best rule of --trials draws, or of those that fit into the time, and their number."""
    begin, best, lowest, losses = time.process_time(), None, math.inf, [None]
    while best is None or (
        len(losses) <= args.trials if args.trials else time.process_time() - begin < seconds
    ):
        rule = make_rule(args, draws.send(losses[-1]), dtype)
        key = (args.seed, TRIAL, search, len(losses) - 1)
        losses.append(trained(args, rule, training, key)["meta_loss"])
        if best is None or losses[-1] < lowest:
            best, lowest = rule, losses[-1]
    return best, len(losses) - 1


def trained(args, rule: PerLayerRule, training: Training, key: tuple[int, ...]) -> dict[str, float]:
    """Loss and accuracy after a training with this key; inf and NaN if it diverges."""
    try:
        draw = Draw(key, args.inner_steps)
        return evaluate_training(replace(training, rule=rule), draw)[0]
    except FloatingPointError:
        return {"meta_loss": math.inf, "test_accuracy": math.nan}


def judged(args, rule: PerLayerRule, training: Training) -> dict[str, float]:
    """Means over trainings from new draws, which are the same for every rule."""
    rows = [
        trained(args, rule, training, (args.seed, EVALUATION, k)) for k in range(args.evaluations)
    ]
    return {n: float(np.mean([row[n] for row in rows])) for n in ("meta_loss", "test_accuracy")}


def searched(args, search: int, training: Training, dtype) -> dict[str, float]:
    """One search by all methods: hyperparameters, losses, accuracies and processor time."""
    tuned, seconds = by_hypergradients(args, search, training, dtype)
    rules = {"start": make_rule(args, first_draw(args, search), dtype), "hypergradients": tuned}
    row = {"processor_seconds": seconds}
    for way, draws in (("random", random_draws), ("tpe", tpe_draws)):
        rule_and_trials = by_trials(args, search, training, dtype, draws(args, search), seconds)
        rules[way], row[f"{way}/trials"] = rule_and_trials
    for way, rule in rules.items():
        row |= {f"{way}/{n.split('/')[-1]}": v for n, v in rule.coefficients().items()}
        row |= {f"{way}/{name}": v for name, v in judged(args, rule, training).items()}
    return row


def warm_up(args, training: Training, dtype) -> None:
    """Do a meta-step that is not counted, to exclude compilation from the cost of the searches."""
    by_hypergradients(argparse.Namespace(**vars(args) | {"metasteps": 1}), 0, training, dtype)


class Searches:
    """One search after the other, each by all methods; see `run_steps`."""

    def __init__(self, args, training: Training, dtype) -> None:
        self.args, self.training, self.dtype = args, training, dtype
        self.rows: list[dict[str, float]] = []
        self._warm = False

    @property
    def finished(self) -> bool:
        """Whether all searches are done."""
        return len(self.rows) >= self.args.searches

    def step(self) -> dict[str, float]:
        """Do the next search and return its numbers."""
        if not self._warm:
            warm_up(self.args, self.training, self.dtype)
            self._warm = True
        self.rows.append(searched(self.args, len(self.rows), self.training, self.dtype))
        return self.rows[-1]

    def state_dict(self) -> dict:
        """The results so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        """Resume from the result of `state_dict`."""
        self.rows = list(state["rows"])


def report(rows: list[dict[str, float]], source: str, log: RunLog) -> None:
    """Print and write means and standard deviations over the searches; draw the figure.

    Searches in which a method ended with a diverging training are left out for this method.
    """
    summary = {}
    for way in WAYS:
        names = ("meta_loss", "test_accuracy")
        finite = [row for row in rows if math.isfinite(row[f"{way}/meta_loss"])]
        values = {n: [row[f"{way}/{n}"] for row in finite] or [math.nan] for n in names}
        summary[way] = {n: [float(np.mean(v)), float(np.std(v))] for n, v in values.items()}
        summary[way]["diverged"] = len(rows) - len(finite)
    log.write_results({"data": source, "summary": summary, "searches": rows})
    log.plot(plot_searches_run)
    for way, found in summary.items():
        loss, accuracy = found["meta_loss"], found["test_accuracy"]
        lost = f"; {found['diverged']} of {len(rows)} diverged" if found["diverged"] else ""
        log.say(f"{way:>15}: loss {loss[0]:.4f} ± {loss[1]:.4f}, test accuracy "
                f"{accuracy[0]:.2%} ± {accuracy[1]:.2%}{lost}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Data; the training; the loop over searches; the report."""
    args = parse(make_parser(), argv)
    Competition(args.gate).check(args.units)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    device, dtype = set_up(args)
    train_data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    train_data, test_data = normalize_pixels(train_data, test_data, unit_variance=False)
    training = Training(
        lateral_mlp(
            math.prod(train_data.shape), [args.units], Activation("relu"), inhibition="none"
        ),
        LearningRule(),  # replaced by the rule of each search
        GaussianInitializer({}, {"w": FIXED}).to(device, dtype),
        lambda generator: batches(train_data, args.batch_size, generator, dtype),
        ProbeLoss(train_data, test_data, 1000.0),
    )
    next(training.batches(seeded_generator(0)))  # raises an error for a wrong batch size
    with open_run(args, "tune_competition", train_data) as log:
        log.say(train_data.source)
        searches = Searches(args, training, dtype)
        finished = run_steps(log, searches, "search", args.searches)
        report(searches.rows, train_data.source, log)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(CompetitionError, HypergradientError))
