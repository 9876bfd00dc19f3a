"""Shortens a learned rule term by term: accuracy against the number of terms.

    python prune_rule.py runs/main-...
    python prune_rule.py runs/main-... --terms 20 10 5 --evaluations 10
    python prune_rule.py --resume runs/prune_rule-...

A change is linear in the coefficients. When a term goes, the other terms of its parameter take over
what they can of the change, c_k by term k, that the rule made in some trainings:

    minimise over a  |sum_k a_k c_k - sum_k c_k|^2;   psi_k <- a_k psi_k

This has a closed form for each term that may go (Hassibi, Stork 1993, Optimal brain surgeon). Down
to --try_below terms the one goes without which the least of the change is left unexplained. From
there on the first --candidates of this order are each left out of some trainings, and the one goes
without which the outer loss is smallest. Nothing is meta-learned, and test images choose nothing.
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
    parser.set_defaults(dataset=None)  # that of RUN
    parser.add_argument("run", type=run_path, metavar="RUN",
                        help="directory of main.py, or a name in the zoo")  # fmt: skip
    add = parser.add_argument_group("pruning").add_argument
    add("--terms", type=positive_int, nargs="+", default=TERMS, help="how many terms to judge")
    add("--try_below", type=nonnegative_int, default=20, metavar="TERMS",
        help="from so many terms on, try who may go")  # fmt: skip
    add("--candidates", type=positive_int, default=10, help="so many at each removal")
    add("--trials", type=positive_int, default=2, help="trainings that measure a change or a loss")
    add = parser.add_argument_group("judgement").add_argument
    add("--evaluations", "--seeds", dest="seeds", type=positive_int, default=3, metavar="N",
        help="trainings by each rule judged")  # fmt: skip
    add("--inner_steps", type=positive_int, help="updates of a training (default: as RUN's last)")
    add("--tolerance", type=nonnegative_float, default=0.005, metavar="FRACTION",
        help="the shortest rule may lose so much training accuracy")  # fmt: skip
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import numpy as np
import torch
from torch import Tensor

from comparison.learned_run import LearnedRun, load_run
from comparison.rule_comparison import Setting, learned, trajectory
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import EVALUATION, TRIAL, seeded_generator
from experiment.statistics import accuracy_text, mean_and_deviation
from figures.meta_learning import plot_run
from learning_rules import PerLayerRule, term_effects, term_grams
from mnist_datasets import load_images
from rules import rule_from_dict, write_rule
from train import Draw, Training

RIDGE = 1e-10  # of correlations between terms, which may be exactly dependent
TERMS_SHOWN = 8


# ---- who may go ----


@dataclass(frozen=True)
class Removal:
    """A term that may go.

    parameter: as "1/w"; index: of the term among those of the parameter.
    factors: float64 [terms], of their coefficients when it is gone; its own is 0.
    unexplained: squared difference to the change before, relative to that change.
    """

    parameter: str
    index: int
    factors: Tensor
    unexplained: float


def removals(grams: Mapping[str, Tensor]) -> list[Removal]:
    """One for each term, from `term_grams`; the least unexplained first."""
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
    """A copy of the rule without this term, the other coefficients adapted."""
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
    """What `without` makes of the Gram matrices, where the training stays as it was."""
    matrix = grams[removal.parameter] * torch.outer(removal.factors, removal.factors)
    stays = torch.arange(len(matrix)) != removal.index
    return {**grams, removal.parameter: matrix[stays][:, stays]}


class Trainings:
    """Trainings by one rule or another, of the network that a run was learned on.

    steps: updates of each. Draws are named (seed, TRIAL or EVALUATION, number).
    """

    def __init__(self, training: Training, steps: int, seed: int) -> None:
        self.training, self.steps, self.seed = training, steps, seed

    def outcomes(self, rule: PerLayerRule, kind: int, draws: int) -> list[dict[str, float]]:
        """The outer loss and its numbers after each; NaN where one is not finite."""
        training = replace(self.training, rule=rule)
        keys = ((self.seed, kind, draw) for draw in range(draws))
        return [trajectory(training, [self.steps], key)[0] for key in keys]

    def grams(self, rule: PerLayerRule, draws: int) -> dict[str, Tensor]:
        """The sum of `term_grams` over some; FloatingPointError where one is not finite."""
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
    """Which term goes, and numbers to record; trial_loss is NaN where none was tried."""
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
    """Removes term after term, and judges what is left at each of `sizes`; see `run_steps`.

    sizes: numbers of terms, falling, the whole rule's first.
    stages: what was judged, in plain values: a rule, its effects, and how well trainings by it do
        from new draws. A rule whose trainings are not finite ends it.
    """

    def __init__(
        self, rule: PerLayerRule, sizes: Sequence[int], trainings: Trainings, args, warn
    ) -> None:
        self.rule, self.sizes, self.trainings = rule, sizes, trainings
        self.args, self.warn = args, warn
        self.grams: dict[str, Tensor] = {}
        self.stages: list[dict] = []
        self.finished = False

    def step(self) -> dict[str, float]:
        """One term goes; numbers to record."""
        if not self.stages:
            self._judge()
        removal, numbers = choose(self.rule, self.grams, self.trainings, self.args)
        self.rule = without(self.rule, removal)
        self.grams = grams_without(self.grams, removal)
        if numbers["terms"] in self.sizes:
            self._judge_if_finite()
        self.finished |= numbers["terms"] == self.sizes[-1]
        return numbers

    def _judge_if_finite(self) -> None:
        try:
            self._judge()
        except FloatingPointError as problem:
            self.warn(f"{problem}: no shorter rule is looked for")
            self.finished = True

    def _judge(self) -> None:
        """Adds a stage, measured anew; FloatingPointError where it is not finite."""
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
        """All that a resumed run needs."""
        return {
            "rule": self.rule.to_dict(),
            "grams": self.grams,
            "stages": self.stages,
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` left it."""
        self.rule = rule_from_dict(state["rule"]).to(self.rule.rules[0].w)
        self.grams, self.stages = state["grams"], list(state["stages"])
        self.finished = state["finished"]


def sizes_of(rule: PerLayerRule, wanted: Sequence[int]) -> list[int]:
    """The whole rule's number of terms and those wanted below it, falling."""
    whole = len(rule.term_coefficients())
    sizes = sorted({n for n in wanted if n < whole} | {whole}, reverse=True)
    if len(sizes) == 1:
        raise UserError(f"the rule has {whole} terms: give smaller numbers as --terms")
    return sizes


# ---- results ----


def stage_text(stage: dict) -> str:
    """A line of the table."""
    if stage["test_accuracy_mean"] is None:
        return f"{stage['terms']:>5} terms: not finite"
    trainings = len(stage["evaluations"])
    return f"{stage['terms']:>5} terms: {accuracy_text(stage)} over {trainings} trainings"


def shortest(stages: Sequence[dict], tolerance: float) -> dict:
    """The one with the fewest terms, of those that lose no more training accuracy than this."""
    accuracies = [stage["train_accuracy_mean"] or 0.0 for stage in stages]
    good = [s for s, a in zip(stages, accuracies, strict=True) if a >= accuracies[0] - tolerance]
    return min(good, key=lambda stage: stage["terms"])


def report(args, log: RunLog, run: LearnedRun, steps: int, source: str, stages: list[dict]) -> None:
    """Every rule judged as a file, the table as results.json and a figure, the shortest rule."""
    for stage in stages:
        log.write_json(f"rule-{stage['terms']}.json", stage["rule"])
    best = shortest(stages, args.tolerance)
    rule = rule_from_dict(best["rule"])
    write_rule(log, rule, best["term_effects"])
    log.write_json("results.json", {
        "data": source,
        "learned_from": {"run": str(args.run), "config": run.config, "inner_steps": steps},
        "initializer": run.start,
        "views": run.views and run.views.to_dict(),
        "shortest": best["terms"],
        "term_effects": best["term_effects"],
        "pruning": stages,
    })  # fmt: skip
    log.plot(plot_run)
    for stage in stages:
        log.say(stage_text(stage))
    log.say(
        f"shortest rule that loses no more than {args.tolerance:.1%} of the training images: "
        f"{best['terms']} terms (in brackets: size relative to the whole change)"
    )
    log.say(rule.formula(best["term_effects"], max_terms=TERMS_SHOWN))


def main(argv: list[str] | None = None) -> None:
    """Data; the run's training; the loop of removals; the report."""
    args = parse(make_parser(), argv)
    save_whole_paths(args, "run")
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
    next(training.batches(seeded_generator(0)))  # refuses a wrong batch size
    trainings = Trainings(training, args.inner_steps or run.steps, args.seed)
    with open_run(args, "prune_rule", train_data) as log:
        log.say(train_data.source)
        pruning = Pruning(training.rule, sizes, trainings, args, log.warn)
        finished = run_steps(log, pruning, "removal", sizes[0] - sizes[-1])
        report(args, log, run, trainings.steps, train_data.source, pruning.stages)
        log.say(f"everything is in {log.directory}")
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
