"""References for a learned rule: other features of as many units, judged in the same way.

accuracies = beside(["random", "pca", "oja"], training, setting, draws=3, steps=250, seed=0)

random              the initial network of the learned rule, untrained
pca                 as many principal components
oja, sanger         these rules, at the best of a few rates on held-out training images
latent-predictive   the fixed rule of unit statistics with the constants of its authors' model

With fewer images than a batch of the fixed rule, all of them are its batch. All but the random
features are the same for every learned rule, and kept for later runs (kept_references.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from comparison.kept_references import KeptReferences
from comparison.learned_run import load_run
from comparison.rule_comparison import (
    Method,
    RuleComparison,
    Setting,
    classical,
    learned,
    pca_features,
)
from rules.choices import zoo_path
from train import Training

RANDOM = "random"
FIXED_RULE = "latent-predictive"  # its name in the zoo
RATES = {"oja": (1e-3, 3e-3, 1e-2), "sanger": (1e-2, 3e-2, 1e-1)}  # per batch, of centred pixels


def beside(
    names: Sequence[str],
    training: Training,
    setting: Setting,
    *,
    draws: int,
    steps: int,
    seed: int,
    kept: KeptReferences | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """The test accuracies of each reference, one for each draw that stayed finite.

    training: the training of the learned rule; the random features are its initial ones, judged by
        its outer loss.
    setting: the images, without normalisation, the layers and the probe for all other references.
    draws: the number of trainings of each reference.
    steps: the number of updates of the references that are trained.
    kept: what earlier runs have found for this setting, draws, steps and seed; is added to.
    advance: called after each training, also where its result was kept.
    """
    shared = [name for name in names if name != RANDOM] if kept else []
    found = {name: kept.read(name) for name in shared}
    found = {name: values for name, values in found.items() if values is not None}
    for _ in range(trainings(list(found), draws)):
        advance()
    methods = {name: _method(name, training) for name in names if name not in found}
    comparison = RuleComparison(methods, [setting], [steps], draws, seed)
    for _ in comparison.run():
        advance()
    judged = [row for row in comparison.rows if not row["held_out"]]
    for name in methods:
        found[name] = [
            row["test_accuracy"] for row in judged
            if row["method"] == name and row["test_accuracy"] == row["test_accuracy"]
        ]  # fmt: skip
        if name in shared:
            kept.write(name, found[name])
    return {name: found[name] for name in names}


def trainings(names: Sequence[str], draws: int) -> int:
    """The number of trainings that `beside` makes, including those that choose a rate."""
    return sum(draws + len(RATES.get(name, ())) for name in names)


def _method(name: str, training: Training) -> Method:
    if name == RANDOM:
        return Method(lambda setting: replace(training), has_steps=False)
    if name == "pca":
        return Method(pca_features, has_steps=False)
    if name == FIXED_RULE:
        return Method(_by_fixed_rule)
    return Method(partial(classical, name), RATES[name])


def _by_fixed_rule(setting: Setting) -> Training:
    run = load_run(zoo_path(FIXED_RULE))
    batch_size = min(run.config["batch_size"], len(setting.train))
    return learned(replace(run, config=run.config | {"batch_size": batch_size}), setting)
