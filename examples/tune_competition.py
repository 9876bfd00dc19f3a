"""Tunes the learning rate and Delta of competing units: hypergradient descent or random search?

    python examples/tune_competition.py --dataset mnist5k
    python examples/tune_competition.py --gate soft --metasteps 40
    python examples/tune_competition.py --resume runs/tune_competition-...

Both begin with a random draw of the hyperparameters: the rate log-uniform in [1e-3, 1], Delta
uniform in [0, 0.4], the soft gate's inverse temperature log-uniform in [0.1, 10]. Hypergradient
descent goes on from there with Adam. Random search draws again and again, for as much processor
time, and keeps the draw of the lowest loss. What each ends with is judged by trainings from new
initial weights. All of that for several --searches.

Pixels are centred: otherwise what units unlearn from every image is the mean image, and rectified
they fall silent.
"""

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from command_line import (
    common_parser,
    open_run,
    parse,
    positive_float,
    positive_int,
    run_command,
    set_up,
)
from competition import GATES
from competition_figures import draw_searches_run
from hypgraddesc import HypergradientDescent, MetaSettings, evaluate
from initializers import FIXED, GaussianInitializer
from krotov_hopfield_rule import KrotovHopfieldRule
from learning_rules import PerLayerRule
from linear_probe import ProbeLoss
from mnist_datasets import batches, load_images, normalize_pixels
from models_fully_local import Activation, lateral_mlp
from run_log import RunLog, run_to_end
from seeds import EVALUATION, TRIAL, seeded_generator


def make_parser():
    """The command's flags."""
    parser = common_parser("Tune competing units in two ways, at equal cost.", "tune_competition")
    add = parser.add_argument
    add("--units", type=positive_int, default=32, help="units of the layer")
    add("--gate", choices=GATES, default="ranked", help="who learns from a sample")
    add("--inner_steps", type=positive_int, default=100, help="updates of a training")
    add("--batch_size", type=positive_int, default=256, help="images of an update")
    add("--metasteps", type=positive_int, default=25, help="of hypergradient descent")
    add("--lr", type=positive_float, default=0.1, help="of Adam, on log rate and Delta")
    add("--searches", type=positive_int, default=5, help="how often both are tried")
    add("--evaluations", type=positive_int, default=5, help="trainings that judge each")
    return parser


def draw_rule(args, generator: torch.Generator, dtype) -> PerLayerRule:
    """A rule with random hyperparameters."""
    rate, delta, temperature = torch.rand(3, generator=generator).tolist()
    rule = KrotovHopfieldRule(
        10 ** (3 * rate - 3),
        delta=0.4 * delta,
        inverse_temperature=10 ** (2 * temperature - 1),
        gate=args.gate,
    )
    return PerLayerRule([rule.to(dtype)])


def by_hypergradients(args, search: int, parts: dict, dtype) -> tuple[PerLayerRule, float]:
    """The rule that hypergradient descent ends with, and the processor time that it took."""
    begin = time.process_time()
    rule = draw_rule(args, seeded_generator(args.seed, search), dtype)
    settings = MetaSettings(
        args.metasteps, args.lr, decay="cosine", inner_steps=args.inner_steps,
        seed=args.seed + 1000 * search,
    )  # fmt: skip
    descent = HypergradientDescent(rule=rule, settings=settings, **parts)
    for _ in range(args.metasteps):
        descent.step()
    return rule, time.process_time() - begin


def by_random_search(
    args, search: int, parts: dict, dtype, seconds: float
) -> tuple[PerLayerRule, int]:
    """The best of the rules that can be tried in the time, the first in any case; how many."""
    begin, trials, best, lowest = time.process_time(), 0, None, math.inf
    generator = seeded_generator(args.seed, search)
    while best is None or time.process_time() - begin < seconds:
        rule = draw_rule(args, generator, dtype)
        try:
            key = (args.seed, TRIAL, search, trials)
            loss = evaluate(rule=rule, steps=args.inner_steps, draw=key, **parts)[0]["meta_loss"]
        except FloatingPointError:
            loss = math.inf
        if best is None or loss < lowest:
            best, lowest = rule, loss
        trials += 1
    return best, trials


def judged(args, rule: PerLayerRule, parts: dict) -> dict[str, float]:
    """Means over trainings from new draws, the same for every rule."""
    rows = [
        evaluate(rule=rule, steps=args.inner_steps, draw=(args.seed, EVALUATION, k), **parts)[0]
        for k in range(args.evaluations)
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def searched(args, search: int, parts: dict, dtype) -> dict[str, float]:
    """One search in both ways: hyperparameters, losses and accuracies, and what it cost."""
    start = draw_rule(args, seeded_generator(args.seed, search), dtype)
    tuned, seconds = by_hypergradients(args, search, parts, dtype)
    found, trials = by_random_search(args, search, parts, dtype, seconds)
    row = {"processor_seconds": seconds, "trials": trials}
    for way, rule in (("start", start), ("hypergradients", tuned), ("random", found)):
        row |= {f"{way}/{n.split('/')[-1]}": v for n, v in rule.coefficients().items()}
        numbers = judged(args, rule, parts)
        row |= {f"{way}/{name}": numbers[name] for name in ("meta_loss", "test_accuracy")}
    return row


def search(args, parts: dict, dtype, log: RunLog) -> tuple[list[dict[str, float]], bool]:
    """The rows of all searches, recorded one by one; False beside them where Ctrl-C ended it."""
    saved = log.load_checkpoint()
    rows = saved[1]["rows"] if saved else []

    def step(number: int) -> tuple[dict[str, float], dict[str, float]]:
        rows.append(searched(args, number - 1, parts, dtype))
        return rows[-1], rows[-1]

    left = range(len(rows) + 1, args.searches + 1)
    with log.progress(args.searches, len(rows), "search") as progress:
        return rows, run_to_end(log, progress, left, step, lambda: {"rows": rows})


def report(rows: list[dict[str, float]], source: str, log: RunLog) -> None:
    """Means and standard deviations over the searches, on the screen and as a file; the figure."""
    summary = {}
    for way in ("start", "hypergradients", "random"):
        values = {n: [row[f"{way}/{n}"] for row in rows] for n in ("meta_loss", "test_accuracy")}
        summary[way] = {n: [float(np.mean(v)), float(np.std(v))] for n, v in values.items()}
        loss, accuracy = summary[way]["meta_loss"], summary[way]["test_accuracy"]
        log.say(f"{way:>15}: loss {loss[0]:.4f} ± {loss[1]:.4f}, test accuracy "
                f"{accuracy[0]:.2%} ± {accuracy[1]:.2%}")  # fmt: skip
    log.write_json("results.json", {"data": source, "summary": summary, "searches": rows})
    log.draw(draw_searches_run)


def main(argv: list[str] | None = None) -> None:
    """Parse, build, search, report."""
    args = parse(make_parser(), argv)
    device, dtype = set_up(args)
    train_data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    train_data, test_data = normalize_pixels(train_data, test_data, unit_variance=False)
    parts = {
        "make_model": lambda: lateral_mlp(
            math.prod(train_data.shape), [args.units], Activation("relu"), inhibition="none"
        ),
        "initializer": GaussianInitializer({}, {"w": FIXED}).to(device, dtype),
        "make_batches": lambda g: batches(train_data, args.batch_size, g, dtype),
        "outer_loss": ProbeLoss(train_data, test_data, 1000.0),
    }  # fmt: skip
    next(parts["make_batches"](seeded_generator(0)))  # refuses a wrong batch size
    with open_run(args, "tune_competition", train_data) as log:
        log.say(train_data.source)
        rows, finished = search(args, parts, dtype, log)
        report(rows, train_data.source, log)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
