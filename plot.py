"""Draws figures from run directories alone.

    python plot.py run runs/main-...                       every figure of a run, drawn again
    python plot.py rules runs/a runs/b                     learned rules side by side
    python plot.py rules runs/a --classical oja foldiak    with classical rules
    python plot.py rules mnist32 transfer32                rules of the zoo, from rules/zoo
    python plot.py one_pass runs/a runs/b                  runs of tune_one_pass.py compared
    python plot.py losses runs/a runs/b                    learned optimisers on all optimizees

Each kind of figure has its flags in make_parser, and a function in PLOTS that returns the paths of
the files it has written.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiment.command_line import OneLineParser, UserError, run_command
from experiment.screen import repair_streams
from rules.choices import names as zoo_names
from rules.choices import run_path

EFFECT, COEFFICIENT = "effect", "coefficient"


def make_parser() -> argparse.ArgumentParser:
    """The command's flags, with one subcommand per kind of figure."""
    parser = OneLineParser(prog="plot.py", description="Figures from run directories alone.")
    figures = parser.add_subparsers(title="figures", dest="figure", metavar="FIGURE", required=True)

    def figure(name: str, what: str) -> Callable:
        subparser = figures.add_parser(name, help=what, description=what, allow_abbrev=False)
        subparser.add_argument("--quiet", action="store_true", help="print errors only")
        return subparser.add_argument

    add = figure("run", "the figures of a run's command, drawn again into its figures/")
    add("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")

    add = figure("rules", "learned rules beside each other and beside classical ones")
    add("runs", type=run_path, nargs="+", metavar="RUN",
        help="directories that hold a rule.json, or names in the zoo")  # fmt: skip
    add("--classical", nargs="+", default=[], metavar="NAME",
        help="classical rules, such as oja, hebb, foldiak")  # fmt: skip
    add("--by", choices=(EFFECT, COEFFICIENT),
        help="what a term's size shows (default: effect, if every RUN has it)")  # fmt: skip
    zoo = "rules.png if that is of the zoo"
    add("--out", type=png_file, metavar="FILE",
        help=f"PNG file (default: beside the first RUN's; {zoo})")  # fmt: skip

    add = figure("one_pass", "runs of tune_one_pass.py compared: a table and every figure")
    add("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")
    add("--out", type=Path, metavar="DIR",
        help="folder of table and figures (default: report/ in the first RUN)")  # fmt: skip
    add = figure("losses", "final losses of optimisers on the optimizees of their comparisons")
    add("runs", type=Path, nargs="+", metavar="RUN", help="directories of learn_to_optimize.py")
    add("--out", type=png_file, metavar="FILE", help="PNG file (default: beside the first RUN's)")
    return parser


def png_file(text: str) -> Path:
    """The type of a flag: a path that ends in .png."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, not {text!r}")
    return Path(text)


if __name__ == "__main__":
    repair_streams()
    make_parser().parse_args()  # answers --help and wrong flags before torch is loaded

from experiment.checkpoints import refuse_changed_files
from experiment.errors import WrongInputError
from experiment.files import write_whole
from experiment.own_code import refuse_own_rule
from experiment.run_reader import read_config, read_results, refuse_links, run_names
from experiment.tables import latex, markdown
from figures.baselines import plot_mlp_run, plot_pca_run, plot_vicreg_run
from figures.competition import plot_competition_run, plot_searches_run
from figures.evaluation import plot_evaluation_run
from figures.examples import (
    plot_equilibrium_run,
    plot_first_layers_run,
    plot_imaml_run,
    plot_logistic_run,
)
from figures.meta_learning import plot_oja_run, plot_rules, plot_run
from figures.one_pass_report import plot_one_pass_run, plot_report, read_runs, table
from figures.optimizers import (
    compared_optimizees,
    one_of_each_kind,
    plot_loss_grid,
    plot_optimizer_run,
)
from learning_rules import PerLayerRule, classical_rule
from rules import load_rule
from rules.zoo import load_zoo
from sweeps.report import plot_sweep_run

# The function that draws a run's figures, by command; the command itself calls the same one
DRAW: dict[str, Callable[[Path], list[Path]]] = {
    "main": plot_run,
    "find_oja": plot_oja_run,
    "prune_rule": plot_run,
    "evaluate": plot_evaluation_run,
    "baseline_pca": plot_pca_run,
    "baseline_mlp": plot_mlp_run,
    "baseline_vicreg": plot_vicreg_run,
    "train_krotov_hopfield": plot_competition_run,
    "tune_competition": plot_searches_run,
    "imaml": plot_imaml_run,
    "omniglot": plot_imaml_run,
    "equilibrium_network": plot_equilibrium_run,
    "first_layers": plot_first_layers_run,
    "learn_filters": plot_run,
    "logistic_regression": plot_logistic_run,
    "tune_one_pass": plot_one_pass_run,
    "learn_to_optimize": plot_optimizer_run,
    "sweep": plot_sweep_run,
}


# Errors of drawing a run whose files are not as its command wrote them
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def figures_again(args: argparse.Namespace) -> list[Path]:
    """Draw the figures that each run's own command draws at its end; return their paths."""
    commands = [plotting_command(directory) for directory in args.runs]
    for directory in args.runs:
        refuse_links(directory)  # because the figures are written into it
    drawn = []
    for directory, command in zip(args.runs, commands, strict=True):
        try:
            drawn += DRAW[command](directory)
        except WrongInputError:
            raise
        except (*DAMAGE, argparse.ArgumentTypeError) as problem:
            raise UserError(
                f"{directory} is no whole run of {command}.py: {problem!r}"
            ) from problem
    return drawn


def plotting_command(directory: Path) -> str:
    """The command whose run this is; raises UserError if there are no figures for it."""
    command = str(read_config(directory).get("command", "an unknown command"))
    if command not in DRAW:
        known = ", ".join(DRAW)
        raise UserError(f"{directory} is a run of {command}; there are figures of {known}")
    return command


def plot_losses(args: argparse.Namespace) -> list[Path]:
    """Draw final losses, in a row per learned optimiser and per baseline at its tuned rate.

    The name of a learned optimiser is its run's. Columns are optimizees, separately for each data
    set and number of steps. The loss of a baseline is the mean over the runs that have it.
    """
    tuned = [tuned_losses(directory) for directory in args.runs]
    several = len({steps for losses in tuned for _, steps in losses}) > 1
    grid: dict[str, dict[str, list[float]]] = {}
    for run_name, losses in zip(run_names(args.runs), tuned, strict=True):
        for (optimizee, steps), by_kind in losses.items():
            column = f"{optimizee}, step {steps}" if several else optimizee
            for kind, loss in by_kind.items():
                row = grid.setdefault(run_name if kind == "learned" else f"{kind}, tuned rate", {})
                row.setdefault(column, []).append(loss)
    means = {
        row: {column: fmean(values) for column, values in columns.items()}
        for row, columns in grid.items()
    }
    plot_loss_grid(means, args.out)
    return [args.out]


def tuned_losses(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The losses of "learned", "adam", ... by (optimizee, number of steps)."""
    compared = compared_optimizees(directory)
    if not compared:
        raise UserError(f"{directory} is not a run of learn_to_optimize.py: it compares nothing")
    config = read_config(directory)
    try:
        data, steps = config["dataset"], config["test_steps"]
        prefix = "" if data == "mnist" else f"{data}: "
        return {
            (prefix + optimizee, steps): {
                name.split()[0]: float(summary["loss"])
                for name, summary in one_of_each_kind(results["optimizers"]).items()
            }
            for optimizee, results in compared.items()
        }
    except DAMAGE as problem:
        raise UserError(
            f"{directory} is no whole run of learn_to_optimize.py: {problem!r}"
        ) from problem


def rules_side_by_side(args: argparse.Namespace) -> list[Path]:
    """Draw each layer's rule as a column, then the classical rules."""
    learned = {}
    names = run_names([run.with_suffix("") if run.is_file() else run for run in args.runs])
    for run, name in zip(args.runs, names, strict=True):
        learned |= rules_of_run(run, name)
    by = args.by or (EFFECT if all(rule.effects for rule in learned.values()) else COEFFICIENT)
    classical = {name: classical_rule(name, 1.0).coefficients() for name in args.classical}
    if by == EFFECT:
        for name, rule in learned.items():
            if not rule.effects:
                raise UserError(f"{name} tells no effects of its terms: take --by coefficient")
        classical = {
            name: effects_of_classical(name, coefficients, list(learned.values()))
            for name, coefficients in classical.items()
        }
    sizes = {n: rule.signed() if by == EFFECT else rule.coefficients for n, rule in learned.items()}
    plot_rules(sizes | {f"{n} (classical)": v for n, v in classical.items()}, args.out, by)
    return [args.out]


def plot_one_pass(args: argparse.Namespace) -> list[Path]:
    """Write and show the table, also in LaTeX, and draw the figures."""
    runs = read_runs(args.runs)
    cells = table(runs)
    text, tables = markdown(cells, "---"), [args.out / f"table.{kind}" for kind in ("md", "tex")]
    args.out.mkdir(parents=True, exist_ok=True)
    for path, content in zip(tables, (text, latex(cells)), strict=True):
        write_whole(path, content)
    drawn = plot_report(runs, args.out)
    if not args.quiet:
        print(text)
    return [*tables, *drawn]


@dataclass(frozen=True)
class LayerRule:
    """The rule of one layer, with terms named like "w/x y".

    effects: from `term_effects`; {} if they are unknown.
    """

    coefficients: dict[str, float]
    effects: dict[str, float]

    def signed(self) -> dict[str, float]:
        """The effects with the signs of the coefficients."""
        return {n: e if self.coefficients[n] > 0 else -e for n, e in self.effects.items()}


def rules_of_run(run: Path, name: str) -> dict[str, LayerRule]:
    """The rule of each layer, by the run's name and, if there are several, the layer's number.

    run: a run's directory, or a file of the zoo, which tells no effects.
    """
    if not run.exists():
        raise UserError(f"there is no {run}; rules of the zoo are {', '.join(zoo_names())}; "
                        "classical ones stand behind --classical")  # fmt: skip
    if run.is_file():
        rule, effects = load_zoo(run).recipe.rule, {}
    else:
        config = read_config(run) if (run / "config.json").exists() else {}
        refuse_own_rule(run, config, "drawn term by term; plot.py run draws its curves")
        rule, effects = load_rule(run / "rule.json"), effects_of_run(run)
    if not isinstance(rule, PerLayerRule):
        return {name: LayerRule(rule.coefficients(), effects)}
    layers = {}
    for number, of_layer in enumerate(rule.rules, 1):
        label = f"{name}, layer {number}" if len(rule.rules) > 1 else name
        names = of_layer.coefficients()
        layer_effects = {n: effects[f"{number}/{n}"] for n in names if f"{number}/{n}" in effects}
        layers[label] = LayerRule(names, layer_effects)
    return layers


def effects_of_run(directory: Path) -> dict[str, float]:
    """The effects in a run's results.json, without those that are null, which were not finite."""
    effects = read_results(directory).get("term_effects") or {}
    if not isinstance(effects, dict):
        raise UserError(f"{directory}/results.json is damaged: term_effects is no table")
    known = {name: effect for name, effect in effects.items() if effect is not None}
    if wrong := [name for name, e in known.items() if not isinstance(e, int | float)]:
        raise UserError(f"{directory}/results.json is damaged: term_effects of {wrong[0]}")
    return known


def effects_of_classical(
    name: str, coefficients: Mapping[str, float], learned: Sequence[LayerRule]
) -> dict[str, float]:
    """The effects of a classical rule's terms in a network that a learned rule has trained.

    Since an effect is proportional to the coefficient, they follow, up to one factor for each
    parameter, from the first learned rule that has the same terms. Raises UserError if none has.
    """
    for rule in learned:
        if all(rule.coefficients.get(t) and t in rule.effects for t in coefficients):
            return {
                term: value * rule.effects[term] / abs(rule.coefficients[term])
                for term, value in coefficients.items()
            }
    terms = ", ".join(term.replace("/", ": ", 1) for term in coefficients)
    raise UserError(
        f"no RUN tells the effects of all terms of {name} ({terms}): take --by coefficient"
    )


PLOTS = {
    "run": figures_again,
    "rules": rules_side_by_side,
    "one_pass": plot_one_pass,
    "losses": plot_losses,
}


DEFAULT_PLACES = {
    "rules": "figures/rules.png",
    "losses": "figures/losses.png",
    "one_pass": "report",
}


def main(argv: list[str] | None = None) -> None:
    """Parse, plot, and print the paths of the files."""
    args = make_parser().parse_args(argv)
    if args.figure in DEFAULT_PLACES and args.out is None:
        first, place = args.runs[0], Path(DEFAULT_PLACES[args.figure])
        args.out = Path(place.name) if first.is_file() else first / place
    for directory in args.runs:
        refuse_changed_files(directory)
    for path in PLOTS[args.figure](args):
        if not args.quiet:
            print(path)


if __name__ == "__main__":
    run_command(main)
