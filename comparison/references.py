"""What a learned rule is told beside: other features of as many units, judged alike.

accuracies = beside(["random", "pca", "oja"], training, setting, draws=3, steps=250, seed=0)

random              the network as the learned rule finds it
pca                 as many principal components
oja, sanger         these rules, at the best of a few rates on held-out training images
latent-predictive   the fixed rule of unit statistics with the constants of its authors' model
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

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
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Test accuracies of each reference, one for each draw that ended in finite numbers.

    training: of the learned rule, whose outer loss judges the random features.
    setting: images without normalisation, layers and probe of all others.
    steps: updates of those that are trained. advance() is called after each training.
    """
    comparison = RuleComparison(
        {name: _method(name, training) for name in names}, [setting], [steps], draws, seed
    )
    for _ in comparison.run():
        advance()
    judged = [row for row in comparison.rows if not row["held_out"]]
    return {
        name: [row["test_accuracy"] for row in judged
               if row["method"] == name and row["test_accuracy"] == row["test_accuracy"]]
        for name in names
    }  # fmt: skip


def trainings(names: Sequence[str], draws: int) -> int:
    """How many `beside` makes, those that choose a rate among them."""
    return sum(draws + len(RATES.get(name, ())) for name in names)


def _method(name: str, training: Training) -> Method:
    if name == "random":
        return Method(lambda setting: replace(training), has_steps=False)
    if name == "pca":
        return Method(pca_features, has_steps=False)
    if name == FIXED_RULE:
        return Method(partial(learned, load_run(zoo_path(FIXED_RULE))))
    return Method(partial(classical, name), RATES[name])
