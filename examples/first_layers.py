"""First layers on images at equal width: which filters, learned without labels, are worth most?

    python examples/first_layers.py --dataset cifar10 --held_out 10000
    python examples/first_layers.py --methods softhebb transfer32 --evaluations 5
    python examples/first_layers.py --methods softhebb runs/filters/filters.json --windows 16
    python examples/first_layers.py --resume runs/first_layers-...

    random           normal
    k-means          centroids of contrast-normalised patches (Coates, Lee, Ng 2011, AISTATS),
                     without their whitening
    k-means-white    centroids of whitened patches, as filters of the patches before whitening
    PCA              the first directions of patches, each with both signs
    krotov-hopfield  ranked gates, BioPyTorch's constants (the recipe "deep")
    softhebb         soft gates (Journe et al. 2023; the recipe "softhebb")
    transfer32, ...  rules of unit statistics from rules/zoo, each with its views, or from a file
                     of that form, such as examples/learn_filters.py writes

With --whiten, rules see whitened windows, and their filters are those of windows before that.

All see the same images, centred pixel by pixel, and are judged by the one encoder of
comparison/first_layers.py and, where a method has another response, by this in the place of the
Triangle: sigmoid(4 s) of learned rules, the rectified currents of competing units. The probe is
logistic regression, on the test images or, to choose settings, on training images held out.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Generator, Tensor

from comparison.first_layers import (
    ENCODINGS,
    GRID,
    SILENT,
    Batches,
    FirstLayer,
    MappedWindows,
    RandomWindows,
    centred_images,
    columns,
    draw_patches,
    judged,
)
from data_sets.image_data import batch_indices
from data_sets.views import Views
from experiment.command_line import (
    UserError,
    common_parser,
    parse,
    positive_float,
    positive_int,
    refuse_idle_flags,
    run_command,
)
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.main_settings import UNIT_FLAGS
from experiment.opening import open_run
from experiment.run_log import RunLog
from experiment.seeds import EVALUATION, seeded_generator
from experiment.statistics import mean_and_deviation
from experiment.tables import aligned, markdown
from experiment.view_strengths import MASKS, ViewStrengths
from figures.examples import plot_first_layers_run
from initializers import fixed_initializer
from krotov_hopfield import (
    RECIPES,
    CompetitionError,
    KrotovHopfieldNetwork,
    learning_rate,
)
from learning_rules import RuleError
from mnist_datasets import ImageData
from models_fully_local import LateralConv2d, Sequential
from rules.zoo import Recipe, load_zoo
from train import check_finite, train

CONTRAST = 10 / 255**2  # added to the variance of a patch of pixels in [0, 1]; Coates's 10 of bytes
PATCHES_AT_ONCE = 1000  # of mini-batch k-means
COMPETING = {"krotov-hopfield": "deep", "softhebb": "softhebb"}  # recipes
LEARNED = ("transfer32", "mnist32", "fashion32", "latent-predictive")  # of rules/zoo
METHODS = ("random", "k-means", "PCA", *COMPETING, *LEARNED, "k-means-white")  # numbers of draws
WHITENING = 0.01  # added to each variance, relative to their mean


# ---- the methods ----


def first_layer(args, method: str, data: ImageData, key: tuple[int, ...], dtype) -> FirstLayer:
    """The layer that a method learns from images, with the draws of this key."""
    generator = seeded_generator(*key)
    shape = (args.units, data.shape[0], args.kernel, args.kernel)
    if method == "random":
        return FirstLayer(torch.randn(shape, generator=generator, dtype=dtype))
    if method in OF_PATCHES:
        patches = draw_patches(data, args.patches, args.kernel, generator)
        found = OF_PATCHES[method](patches, args.units, generator)
        return FirstLayer(found.view(shape).to(dtype))
    learn = competing if method in COMPETING else by_learned_rule
    return learn(args, method, data, generator, dtype)


def centroids(patches: Tensor, units: int, generator: Generator) -> Tensor:
    """Centroids [units, pixels] of patches whose mean is 0 and whose contrast is normalised."""
    x = patches - patches.mean(1, keepdim=True)
    return _k_means(x / (x.var(1, keepdim=True) + CONTRAST).sqrt(), units, generator)


def whitened_centroids(patches: Tensor, units: int, generator: Generator) -> Tensor:
    """Filters [units, pixels] whose responses are those of centroids of whitened patches."""
    whitening = whitening_of(patches, WHITENING)
    x = (patches.double() - patches.double().mean(0)) @ whitening
    return _k_means(x.float(), units, generator) @ whitening.float()


def whitening_of(patches: Tensor, added: float) -> Tensor:
    """The symmetric matrix, float64 [pixels, pixels], that makes patches [n, pixels] white.

    added: to each variance, relative to their mean; directions of less variance are left weak.
    """
    variances, directions = torch.linalg.eigh(patches.double().T.cov())
    scale = (variances + added * variances.mean()).clamp_min(SILENT).rsqrt()
    return (directions * scale) @ directions.T


def _k_means(x: Tensor, units: int, generator: Generator) -> Tensor:
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    means = MiniBatchKMeans(units, batch_size=PATCHES_AT_ONCE, n_init=1, random_state=seed)
    return torch.from_numpy(means.fit(x.numpy()).cluster_centers_)


def principal_directions(patches: Tensor, units: int, generator: Generator) -> Tensor:
    """The first units / 2 principal directions of patches, and then the negative of each."""
    directions = torch.linalg.eigh(patches.T.double().cov())[1].T.flip(0)
    half = (units + 1) // 2
    return torch.cat([directions[:half], -directions[: units - half]])


OF_PATCHES = {
    "k-means": centroids, "k-means-white": whitened_centroids, "PCA": principal_directions,
}  # fmt: skip


def competing_network(
    args, method: str, shape, generator: Generator, dtype
) -> KrotovHopfieldNetwork:
    """One layer of competing units as in the method's recipe, without padding and pooling."""
    recipe = RECIPES[COMPETING[method]](1)
    plan = replace(recipe.layers[0], units=args.units, kernel=args.kernel, padding=0, pool="")
    rate = {"krotov-hopfield": args.hopfield_lr, "softhebb": args.softhebb_lr}[method]
    plan = replace(plan, lr=rate or plan.lr)
    return KrotovHopfieldNetwork(shape, replace(recipe, layers=(plan,)), generator, dtype=dtype)


def competing(args, method: str, data: ImageData, generator: Generator, dtype) -> FirstLayer:
    """Units that have competed for the images, in batches of the recipe's size."""
    network = competing_network(args, method, data.shape, generator, dtype).to(data.images.device)
    recipe, layer = network.recipe, network.blocks[0].layer
    per_epoch = len(data) // recipe.batch_size
    orders = (batch_indices(data, recipe.batch_size, generator) for _ in itertools.count())
    updates = max(1, round(args.epochs * per_epoch))
    batches = itertools.islice(itertools.chain.from_iterable(orders), updates)
    for done, index in enumerate(batches):
        rate = learning_rate(recipe.layers[0], recipe, done / per_epoch)
        layer.training_step(data.floats(index, dtype), rate)
    check_finite([{"w": layer.weight}], f"the filters of {method}")
    return FirstLayer(layer.weight.detach(), network)


def by_learned_rule(args, method: str, data: ImageData, generator: Generator, dtype) -> FirstLayer:
    """A convolution that the rule of the zoo's file has trained, with its units and views.

    Its updates see random windows of each image with --windows, else all; with --whiten they see
    these whitened, at the deviation that patches have.
    """
    recipe = load_zoo(method).recipe
    layer = LateralConv2d(
        data.shape[0], args.units, args.kernel, recipe.activation,
        **{name: getattr(recipe, name) for name in UNIT_FLAGS},
    )  # fmt: skip
    model, device = Sequential([layer]), data.images.device
    initializer = fixed_initializer(recipe.initial).to(device, dtype)
    rule = recipe.rule.to(device, dtype)
    inputs, whitening = inputs_of_rule(args, recipe, data, generator, dtype)
    params = initializer(model, generator)
    params = train(model, params, inputs(generator), rule, args.updates, grad=False)
    check_finite(params, f"the filters of {method} after {args.updates} updates")
    if whitening is not None:
        filters = params[0]["w"].flatten(1) @ whitening
        params = [params[0] | {"w": filters.view_as(params[0]["w"])}]
    return FirstLayer(params[0]["w"], lambda x: model(x, params))


def inputs_of_rule(
    args, recipe: Recipe, data: ImageData, generator: Generator, dtype
) -> tuple[Batches, Tensor | None]:
    """The batches of a rule's updates, and the matrix by which their windows are whitened."""
    masks = {"kind": MASKS, "mask": tuple(args.mask)} if args.mask else {}
    strengths = replace(recipe.views, center=False, **masks)
    views = Views(data, args.batch_size, strengths, dtype=dtype)
    if not args.windows:
        return views, None
    windows = RandomWindows(views, args.windows, args.kernel)
    if not args.whiten:
        return windows, None
    patches = draw_patches(data, args.patches, args.kernel, generator)
    whitening = whitening_of(patches, args.whiten) * patches.double().var(0).mean().sqrt()
    whitening = whitening.to(data.images.device, dtype)
    return MappedWindows(windows, whitening), whitening


# ---- the command ----


def make_parser():
    """The command's flags."""
    parser = common_parser("Compare first layers that learn without labels.", "first_layers")
    parser.set_defaults(dataset="cifar10")
    add = parser.add_argument_group("layers").add_argument
    add("--methods", nargs="+", type=method_name, default=METHODS, metavar="METHOD",
        help=f"{', '.join(METHODS)}, or the file of a rule in the form of rules/zoo")  # fmt: skip
    add("--units", type=positive_int, default=96, help="filters of each method")
    add("--kernel", type=positive_int, default=5, help="side of a filter, in pixels")
    add = parser.add_argument_group("learning").add_argument
    add("--patches", type=positive_int, default=100_000, help="of k-means, PCA and --whiten")
    add("--epochs", type=positive_float, default=1.0, help="of competing units; also part of one")
    add("--hopfield_lr", type=positive_float, help="first rate (default: the recipe's)")
    add("--softhebb_lr", type=positive_float, help="rate (default: the recipe's)")
    add("--updates", type=positive_int, default=300, help="of learned rules")
    add("--batch_size", type=positive_int, default=32, help="images of such an update")
    add("--windows", type=positive_int, metavar="N",
        help="random windows of each image in such an update (default: all)")  # fmt: skip
    add("--whiten", type=positive_float, metavar="ADDED",
        help="whiten these windows, with so much of the mean variance added to each")  # fmt: skip
    add("--mask", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="views without such a share of their pixels, in the place of the rule's")  # fmt: skip
    add = parser.add_argument_group("judgement").add_argument
    add("--C", type=positive_float, default=0.01, help="inverse penalty of the probe")
    add("--train_images", type=positive_int, metavar="N", help="use the first N (default: all)")
    add("--held_out", type=positive_int, metavar="IMAGES",
        help="judge on so many training images, held out (default: on test images)")  # fmt: skip
    add("--evaluations", type=positive_int, default=3, help="layers learned by each method")
    return parser


def method_name(text: str) -> str:
    """One of METHODS, or the absolute path of a rule's file."""
    if text in METHODS:
        return text
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"unknown method {text!r}: there is no such file, and "
                                         f"known are {', '.join(METHODS)}")  # fmt: skip
    try:
        recipe = load_zoo(text).recipe
    except RuleError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem
    if recipe.views is None:
        raise argparse.ArgumentTypeError(f"the rule in {text} takes no views")
    if (layers := len(recipe.rule.rules)) > 1:
        raise argparse.ArgumentTypeError(f"the rule in {text} is for {layers} layers, not for one")
    return str(Path(text).resolve())


def is_learned(method: str) -> bool:
    """Whether a method is a rule in the form of rules/zoo."""
    return method in LEARNED or method not in METHODS


def flag_needs(args) -> list[tuple[str, bool, str]]:
    """The argument `needs` of `refuse_idle_flags`."""
    methods = args.methods
    of_patches = bool(args.whiten) or not OF_PATCHES.keys().isdisjoint(methods)
    users = {
        "epochs": (*COMPETING,), "hopfield_lr": ("krotov-hopfield",), "softhebb_lr": ("softhebb",)
    }  # fmt: skip
    return [
        *((flags, not {*of_flags}.isdisjoint(methods), f"--methods {' or '.join(of_flags)}")
          for flags, of_flags in users.items()),
        ("patches", of_patches, f"--methods {' or '.join(OF_PATCHES)}, or --whiten"),
        ("whiten", args.windows is not None, "--windows"),
        ("updates batch_size windows whiten mask", any(map(is_learned, methods)),
         f"--methods {' or '.join(LEARNED)}, or a rule's file"),
    ]  # fmt: skip


def check(args, data: ImageData, dtype) -> None:
    """Refuse, before anything is written, what a method cannot do with images of this shape."""
    channels, *sides = data.shape
    if len(set(args.methods)) < len(args.methods):
        raise UserError("--methods names a method twice; name each once")
    titles = [title(method) for method in args.methods]
    if shared := [name for name in titles if titles.count(name) > 1]:
        raise UserError(f"--methods has two files that tables would call {shared[0]}: rename one, "
                        "or its folder")  # fmt: skip
    if min(sides) < args.kernel + GRID - 1:
        raise UserError(f"--kernel {args.kernel}: images of {sides} pixels are too small for "
                        f"{GRID} x {GRID} squares of its responses")  # fmt: skip
    directions = 2 * channels * args.kernel**2
    if "PCA" in args.methods and args.units > directions:
        raise UserError(f"--units {args.units}: PCA has {directions} filters here; take no "
                        "more, or leave it out of --methods")  # fmt: skip
    if args.mask:
        ViewStrengths(MASKS, mask=tuple(args.mask))  # raises ViewError
    if args.patches < 2 and (args.whiten or not OF_PATCHES.keys().isdisjoint(args.methods)):
        raise UserError("--patches 1: one patch has no covariance, take at least 2")
    centres = {"k-means", "k-means-white"}
    if not centres.isdisjoint(args.methods) and args.units > args.patches:
        raise UserError(
            f"--patches {args.patches}: k-means needs at least {args.units}, one a unit"
        )
    sizes = [args.batch_size] * any(map(is_learned, args.methods))
    for method in filter(COMPETING.get, args.methods):
        network = competing_network(args, method, data.shape, seeded_generator(0), dtype)
        network.blocks[0].layer.competition.check(args.units)
        sizes.append(network.recipe.batch_size)
    if sizes and max(sizes) > len(data):
        raise UserError(f"{len(data)} training images; batches of {max(sizes)} need as many")


class Comparison:
    """One training of one method after the other, draw by draw: see `run_steps`."""

    def __init__(self, args, train_data: ImageData, test_data: ImageData, dtype) -> None:
        self.args, self.data, self.dtype = args, (train_data, test_data), dtype
        self.rows: list[dict] = []
        self.filters: dict[str, Tensor] = {}  # of each method's first layer

    @property
    def finished(self) -> bool:
        """Whether every method has been judged in every draw."""
        return len(self.rows) >= self.args.evaluations * len(self.args.methods)

    def step(self) -> dict[str, float]:
        """The next layer: learned, and judged in each encoding."""
        draw, number = divmod(len(self.rows), len(self.args.methods))
        method, begin = self.args.methods[number], time.process_time()
        key = (self.args.seed, EVALUATION, draw, self.number(method))
        layer = first_layer(self.args, method, self.data[0], key, self.dtype)
        layer = replace(layer, filters=layer.filters.to(self.data[0].images.device))
        seconds = time.process_time() - begin
        self.filters.setdefault(title(method), layer.filters.cpu())
        accuracies = judged(layer, *self.data, self.args.C)
        self.rows.append({"method": title(method), "draw": draw, "seconds": seconds, **accuracies})
        blank = dict.fromkeys(columns(), float("nan"))
        return {"method": self.number(method), "draw": draw, **blank, **accuracies}

    def number(self, method: str) -> int:
        """The number of a method in METHODS; rules' files follow in the order in which given."""
        return [*METHODS, *(m for m in self.args.methods if m not in METHODS)].index(method)

    def state_dict(self) -> dict:
        """All that a resumed run needs."""
        return {"rows": self.rows, "filters": self.filters}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` left it."""
        self.rows, self.filters = list(state["rows"]), dict(state["filters"])


def title(method: str) -> str:
    """A method's name in tables: of a file, the run's and its own, such as filters/filters."""
    return method if method in METHODS else f"{Path(method).parent.name}/{Path(method).stem}"


def summary(rows: Sequence[Mapping]) -> dict[str, dict]:
    """By method: mean and sample deviation of the accuracies, how many, and seconds of learning."""
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        found[method] = {
            "trainings": len(of_method),
            **mean_and_deviation("seconds", [row["seconds"] for row in of_method]),
        }
        for name in (name for name in columns() if name in of_method[0]):
            found[method] |= mean_and_deviation(name, [row[name] for row in of_method])
    return found


def table(found: Mapping[str, Mapping], held_out: bool) -> list[list[str]]:
    """The cells of a table of `summary`; accuracies in percent."""
    kind = "held-out" if held_out else "test"
    heading = ["filters", f"Triangle, {kind}", "training", f"own response, {kind}", "training",
               "n", "seconds"]  # fmt: skip
    cells = [heading]
    for method, of_method in found.items():
        values = [percent(of_method, f"{encoding}/{part}_accuracy")
                  for encoding in ENCODINGS for part in ("test", "train")]  # fmt: skip
        seconds = f"{of_method['seconds_mean']:.1f}"
        cells.append([method, *values, str(of_method["trainings"]), seconds])
    return cells


def percent(values: Mapping[str, float | None], name: str) -> str:
    """Mean and deviation of a fraction as text, nothing where there is none."""
    mean, deviation = (values.get(f"{name}_{part}") for part in ("mean", "standard_deviation"))
    if mean is None:
        return ""
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def report(args, log: RunLog, comparison: Comparison) -> None:
    """The table on the screen and in Markdown, the numbers and filters as files, the figures."""
    found, source = summary(comparison.rows), comparison.data[0].source
    cells = table(found, bool(args.held_out))
    log.write_arrays("filters.npz", {n: w.numpy() for n, w in comparison.filters.items()})
    log.write_json("results.json", {
        "data": source, "judged_on": "held-out training images" if args.held_out else "test images",
        "summary": found, "trainings": comparison.rows,
    })  # fmt: skip
    log.write_text("table.md", markdown(cells))
    log.plot(plot_first_layers_run)
    for line in aligned(cells):
        log.say(line)
    log.say(f"everything is in {log.directory}")


def main(argv: list[str] | None = None) -> None:
    """Parse, load, compare, report."""
    parser = make_parser()
    args = parse(parser, argv)
    refuse_idle_flags(args, parser, flag_needs(args))
    device, dtype = set_up(args)
    train_data, test_data = centred_images(args, device)
    check(args, train_data, dtype)
    with open_run(args, "first_layers", train_data) as log:
        log.say(f"{len(train_data):,} images to learn from; {train_data.source}")
        comparison = Comparison(args, train_data, test_data, dtype)
        total = args.evaluations * len(args.methods)
        finished = run_steps(log, comparison, "layer", total, shown=columns()[1::2])
        report(args, log, comparison)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main, wrong_input=(CompetitionError,))
