"""Shortens a learned rule term by term: accuracy against the number of terms.

    python prune_rule.py runs/main-...
    python prune_rule.py runs/main-... --terms 20 10 5 --evaluations 10
    python prune_rule.py --resume runs/prune_rule-...

The change of a parameter is linear in the coefficients. When a term is removed, the other terms of
its parameter are rescaled so as to best reproduce the change, c_k by term k, that the rule made in
some trainings:

    minimise over a  |sum_k a_k c_k - sum_k c_k|^2;   psi_k <- a_k psi_k

This has a closed form for each term that may be removed (Hassibi, Stork 1993, Optimal brain
surgeon). Down to --try_below terms, the term is removed without which the smallest part of the
change remains unexplained. Below that, trainings are made without each of the first --candidates in
this order, and the one without which the outer loss is smallest is removed. Nothing is
meta-learned, and test images are not used for any choice.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from experiment.command_line import (
    UserError,
    common_parser,
    nonnegative_float,
    nonnegative_int,
    parse,
    positive_int,
    run_command,
    save_whole_paths,
)
from rules.choices import run_path

TERMS = (40, 30, 20, 15, 12, 10, 9, 8, 7, 6, 5, 4)


def make_parser():
    """The command's flags."""
    parser = common_parser("Shorten a learned rule, term by term.", "prune_rule")
    parser.set_defaults(dataset=None)  # None: that of RUN
    parser.add_argument("run", type=run_path, metavar="RUN",
                        help="directory of a run of main.py, or a name in the zoo")  # fmt: skip
    add = parser.add_argument_group("pruning").add_argument
    add("--terms", type=positive_int, nargs="+", default=TERMS, help="numbers of terms to judge")
    add("--try_below", type=nonnegative_int, default=20, metavar="TERMS",
        help="from this number of terms on, try which term to remove")  # fmt: skip
    add("--candidates", type=positive_int, default=10, help="terms to try at each removal")
    add("--trials", type=positive_int, default=2,
        help="trainings that measure a loss or the effects")  # fmt: skip
    add = parser.add_argument_group("judgement").add_argument
    add("--evaluations", "--seeds", dest="seeds", type=positive_int, default=3, metavar="N",
        help="trainings with each rule that is judged")  # fmt: skip
    add("--inner_steps", type=positive_int, help="updates of a training (default: as at RUN's end)")
    add("--tolerance", type=nonnegative_float, default=0.005, metavar="FRACTION",
        help="training accuracy that the shortest rule may lose")  # fmt: skip
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import numpy as np
import torch
from torch import Tensor

from comparison.learned_run import LearnedRun, load_run, write_for_use
from comparison.rule_comparison import Setting, learned, trajectory
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.own_code import refuse_own_rule
from experiment.run_log import RunLog
from experiment.run_reader import read_config
from experiment.seeds import EVALUATION, TRIAL, seeded_generator
from experiment.statistics import accuracy_text, counted_trainings, mean_and_deviation
from figures.meta_learning import plot_run
from learning_rules import PerLayerRule, term_effects, term_grams
from mnist_datasets import load_images
from rules import rule_from_dict, write_rule
from train import Draw, Training

RIDGE = 1e-10  # added to correlations between terms, which may be exactly dependent
TERMS_SHOWN = 8


# ---- removing a term ----


@dataclass(frozen=True)
class Removal:
    """The removal of a term.

    parameter: the parameter that it belongs to, such as "1/w".
    index: its index among the terms of the parameter.
    factors: float64 [terms], by which the coefficients are multiplied; 0 for the term itself.
    unexplained: the squared difference from the change before, relative to that change squared.
    """

    parameter: str
    index: int
    factors: Tensor
    unexplained: float


def removals(grams: Mapping[str, Tensor]) -> list[Removal]:
    """The removal of each term, given the result of `term_grams`; least unexplained first."""
    candidates = []
    for parameter, matrix in grams.items():
        size = matrix.diagonal().sqrt()
        safe = torch.where(size > 0, size, 1.0)  # terms without any change
        correlation = matrix / safe / safe.unsqueeze(1)
        inverse = torch.linalg.inv(correlation + RIDGE * torch.eye(len(matrix)).to(matrix))
        whole = max(float(matrix.sum()), torch.finfo(matrix.dtype).tiny)
        for k, column in enumerate(inverse.unbind(1)):
            factors = 1 - column / column[k] * size[k] / safe
            factors[k] = 0
            candidates.append(
                Removal(parameter, k, factors, float(size[k] ** 2 / column[k]) / whole)
            )
    return sorted(candidates, key=lambda removal: removal.unexplained)


def without(rule: PerLayerRule, removal: Removal) -> PerLayerRule:
    """A copy of the rule without this term, with the other coefficients rescaled."""
    layer, group = removal.parameter.split("/")
    stays = torch.arange(len(removal.factors)) != removal.index
    shorter = copy.deepcopy(rule)
    of_layer = shorter.rules[int(layer) - 1]
    names = (group, "diagonal") if group == "m" and hasattr(of_layer, "diagonal") else (group,)
    sizes = [len(getattr(of_layer, name)) for name in names]
    with torch.no_grad():
        for name, factors in zip(names, removal.factors.split(sizes), strict=True):
            getattr(of_layer, name).mul_(factors.to(getattr(of_layer, name)))
    of_layer.keep(dict(zip(names, stays.split(sizes), strict=True)))
    return shorter


def grams_without(grams: Mapping[str, Tensor], removal: Removal) -> dict[str, Tensor]:
    """The Gram matrices after `without`, provided that the training does not change."""
    matrix = grams[removal.parameter] * torch.outer(removal.factors, removal.factors)
    stays = torch.arange(len(matrix)) != removal.index
    return {**grams, removal.parameter: matrix[stays][:, stays]}


class Trainings:
    """Trainings of a run's network by various rules.

    The keys of draws are (seed, TRIAL or EVALUATION, number).

    steps: the number of updates of each training.
    """

    def __init__(self, training: Training, steps: int, seed: int) -> None:
        self.training, self.steps, self.seed = training, steps, seed

    def outcomes(self, rule: PerLayerRule, kind: int, draws: int) -> list[dict[str, float]]:
        """The outer loss and its metrics after each training; nan if it is not finite."""
        training = replace(self.training, rule=rule)
        keys = ((self.seed, kind, draw) for draw in range(draws))
        return [trajectory(training, [self.steps], key)[0] for key in keys]

    def grams(self, rule: PerLayerRule, draws: int) -> dict[str, Tensor]:
        """The sum of `term_grams` over trainings; raises FloatingPointError if it is not finite."""
        total: dict[str, Tensor] = {}
        for number in range(draws):
            draw = Draw((self.seed, TRIAL, number), self.steps)
            params, batches = self.training.begin(draw)
            grams = term_grams(rule, self.training.model, params, batches, steps=self.steps)
            total = {name: total.get(name, 0) + matrix.cpu() for name, matrix in grams.items()}
        if not all(matrix.isfinite().all() for matrix in total.values()):
            count = len(rule.term_coefficients())
            raise FloatingPointError(f"a training by the rule of {count} terms is not finite")
        return total


def choose(
    rule: PerLayerRule, grams: Mapping[str, Tensor], trainings: Trainings, args
) -> tuple[Removal, dict[str, float]]:
    """The removal to make, and numbers to record; trial_loss is nan if none was tried."""
    ranked = removals(grams)
    chosen, loss = ranked[0], math.nan
    if len(ranked) <= args.try_below:
        losses = []
        for removal in ranked[: args.candidates]:
            rows = trainings.outcomes(without(rule, removal), TRIAL, args.trials)
            losses.append(np.mean([row["meta_loss"] for row in rows]))
        if np.isfinite(losses).any():
            chosen, loss = ranked[np.nanargmin(losses)], np.nanmin(losses)
    numbers = {
        "terms": len(ranked) - 1,
        "unexplained": chosen.unexplained,
        "trial_loss": loss,
    }
    return chosen, numbers


# ---- from the whole rule to the shortest ----


class Pruning:
    """Removes term after term, and judges the rule at each of `sizes`; an Algorithm of `run_steps`.

    It ends early if the trainings by a shortened rule are not finite.

    sizes: numbers of terms, decreasing, beginning with that of the whole rule.
    log: is told what the first step takes, and of warnings.
    stages: for each rule judged, its description, the effects of its terms, and the results of
        trainings from new draws, in plain values.
    """

    def __init__(
        self, rule: PerLayerRule, sizes: Sequence[int], trainings: Trainings, args, log: RunLog
    ) -> None:
        self.rule, self.sizes, self.trainings = rule, sizes, trainings
        self.args, self.log = args, log
        self.grams: dict[str, Tensor] = {}
        self.stages: list[dict] = []
        self.finished = False

    def step(self) -> dict[str, float]:
        """Remove one term; returns numbers to record."""
        if not self.stages:
            self._announce()
            self._judge()
        removal, numbers = choose(self.rule, self.grams, self.trainings, self.args)
        self.rule = without(self.rule, removal)
        self.grams = grams_without(self.grams, removal)
        if numbers["terms"] in self.sizes:
            self._judge_if_finite()
        self.finished |= numbers["terms"] == self.sizes[-1]
        return numbers

    def _announce(self) -> None:
        """Say what the first step does, because it may take a minute until its row is there."""
        args, terms = self.args, self.sizes[0]
        self.log.say(
            f"{terms} terms: {args.trials} + {args.seeds} trainings of {self.trainings.steps} "
            "updates measure their effects and judge the rule"
        )
        if (below := min(terms, args.try_below)) > self.sizes[-1]:
            tried = min(args.candidates, below)
            self.log.say(
                f"from {below} terms on, up to {tried * args.trials} trainings choose each removal"
            )

    def _judge_if_finite(self) -> None:
        try:
            self._judge()
        except FloatingPointError as problem:
            self.log.warn(f"{problem}: no shorter rule is looked for")
            self.finished = True

    def _judge(self) -> None:
        """Measure and judge the current rule; raises FloatingPointError if it is not finite."""
        self.grams = self.trainings.grams(self.rule, self.args.trials)
        effects = term_effects(self.rule, self.grams)
        rows = self.trainings.outcomes(self.rule, EVALUATION, self.args.seeds)
        rows = [row for row in rows if all(map(math.isfinite, row.values()))]
        stage = {"terms": len(effects), "rule": self.rule.to_dict(), "term_effects": effects}
        stage["evaluations"] = rows
        for name in ("train_accuracy", "test_accuracy"):
            stage |= mean_and_deviation(name, [row[name] for row in rows])
        self.stages.append(stage)

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        return {
            "rule": self.rule.to_dict(),
            "grams": self.grams,
            "stages": self.stages,
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state returned by `state_dict`."""
        self.rule = rule_from_dict(state["rule"]).to(self.rule.rules[0].w)
        self.grams, self.stages = state["grams"], list(state["stages"])
        self.finished = state["finished"]


def sizes_of(rule: PerLayerRule, wanted: Sequence[int]) -> list[int]:
    """The number of terms of the whole rule, and the wanted numbers below it, decreasing.

    Raises UserError if no wanted number is below it.
    """
    whole = len(rule.term_coefficients())
    sizes = sorted({n for n in wanted if n < whole} | {whole}, reverse=True)
    if len(sizes) == 1:
        raise UserError(f"the rule has {whole} terms: give smaller numbers as --terms")
    return sizes


# ---- results ----


def stage_text(stage: dict) -> str:
    """A stage as a line of the table."""
    if stage["test_accuracy_mean"] is None:
        return f"{stage['terms']:>5} terms: not finite"
    count = counted_trainings(len(stage["evaluations"]))
    return f"{stage['terms']:>5} terms: {accuracy_text(stage)} over {count}"


def shortest(stages: Sequence[dict], tolerance: float) -> dict:
    """The stage with the fewest terms among those that lose at most `tolerance`.

    tolerance: of training accuracy, a fraction, relative to the first stage.
    """
    accuracies = [stage["train_accuracy_mean"] or 0.0 for stage in stages]
    good = [s for s, a in zip(stages, accuracies, strict=True) if a >= accuracies[0] - tolerance]
    return min(good, key=lambda stage: stage["terms"])


def report(args, log: RunLog, run: LearnedRun, steps: int, source: str, stages: list[dict]) -> None:
    """Write the judged rules, the shortest one, results.json and figures; show the table."""
    for stage in stages:
        log.write_json(f"rule-{stage['terms']}.json", stage["rule"])
    best = shortest(stages, args.tolerance)
    rule = rule_from_dict(best["rule"])
    write_rule(log, rule, best["term_effects"])
    log.write_results({
        "data": source,
        "learned_from": {"run": str(args.run), "config": run.config, "inner_steps": steps},
        "initializer": run.start,
        "views": run.views and run.views.to_dict(),
        "shortest": best["terms"],
        "term_effects": best["term_effects"],
        "pruning": stages,
    })  # fmt: skip
    if why := write_for_use(log.directory):
        log.say(why)
    log.plot(plot_run)
    for stage in stages:
        log.say(stage_text(stage))
    log.say(
        f"shortest rule that loses no more than {args.tolerance:.1%} of the training images: "
        f"{best['terms']} terms (in brackets: size relative to the whole change)"
    )
    log.say(rule.formula(best["term_effects"], max_terms=TERMS_SHOWN))


def main(argv: list[str] | None = None) -> None:
    """Read run and data, make the run's training, remove terms, report."""
    args = parse(make_parser(), argv)
    save_whole_paths(args, "run")
    if args.run.is_dir():
        refuse_own_rule(args.run, read_config(args.run), "pruned")
    device, dtype = set_up(args)
    run = load_run(args.run)
    args.run_found = run.fingerprint()
    args.dataset = args.dataset or run.datasets[0]
    if not all(rule.term_coefficients() for rule in run.rule.rules):
        raise UserError(f"{args.run} learned no sum of terms: there are no terms to remove")
    sizes = sizes_of(run.rule, args.terms)
    train_data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    setting = Setting(
        dataset=args.dataset,
        train=train_data,
        test=test_data,
        layers=tuple(run.config["layers"]),
        C=run.config["C"],
        outer_images=run.config["outer_images"],
        batch_size=run.config["batch_size"],
        dtype=dtype,
    )
    training = learned(run, setting)
    next(training.batches(seeded_generator(0)))  # raises DataError now if the batch size is wrong
    trainings = Trainings(training, args.inner_steps or run.steps, args.seed)
    with open_run(args, "prune_rule", train_data) as log:
        log.say(train_data.source)
        pruning = Pruning(training.rule, sizes, trainings, args, log)
        finished = run_steps(log, pruning, "removal", sizes[0] - sizes[-1])
        report(args, log, run, trainings.steps, train_data.source, pruning.stages)
        log.say(f"everything is in {log.directory}")
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
