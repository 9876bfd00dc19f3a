"""A learned rule with all that is needed to apply it, read from a run's directory or the zoo.

run = load_run("runs/main-...")
run.rule, run.start, run.steps
save_zoo(zoo_entry(run, "runs/main-...", "mnist32", accuracies), "rules/zoo/mnist32.json")
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiment.checkpoints import refuse_changed_files
from experiment.command_line import AT_MOST, LARGEST_WHOLE
from experiment.data_names import data_titles, is_path
from experiment.errors import RunLogError
from experiment.files import digest, displayable
from experiment.main_settings import UNIT_FLAGS
from experiment.own_code import OwnCode, is_own_code
from experiment.run_reader import (
    read_arrays,
    read_config,
    read_json,
    read_results,
    refuse_links,
)
from experiment.view_strengths import ViewStrengths
from hypgraddesc import rising_steps
from initializers import fixed_initializer
from learning_rules import LearningRule, PerLayerRule, RuleError
from models_fully_local import network_of_flags
from rules import load_rule
from rules.choices import names as zoo_names
from rules.zoo import IN_A_RUN, Recipe, ZooEntry, load_zoo, save_zoo

PROBE = {"C": 1000.0, "outer_images": 4096}  # the probe that judges rules of the zoo
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LEFT_OUT = ("--out", "--data-dir", "--resume")  # flags of a command that name places


@dataclass(frozen=True)
class LearnedRun:
    """The rule that a run of main.py learned, or what prune_rule.py has left of it.

    config: the flags of main.py.
    start: the initial distribution, as in GaussianInitializer.effective.
    steps: the number of updates after which the rule is judged, see steps_to_judge.
    views: how the two views of an image are made; None if the inputs are single images.
    """

    name: str
    config: dict[str, Any]
    rule: PerLayerRule
    start: dict[str, float]
    steps: int
    views: ViewStrengths | None

    @property
    def datasets(self) -> list[str]:
        """The names of the data sets that the rule was learned on."""
        return _datasets(self.config)

    def fingerprint(self) -> str:
        """A digest of the rule, its initial distribution and its views."""
        views = self.views and self.views.to_dict()
        return digest(json.dumps([self.rule.to_dict(), self.start, views]).encode())


def load_run(directory: str | Path, own_rule: OwnCode | None = None) -> LearnedRun:
    """The rule in a run's directory or in a file of the zoo.

    own_rule: the class of the rule, where it is of the user's own: what a run names is not run.
    Raises RunLogError or RuleError if there is no rule, or it is of a class that is not given.
    """
    directory = Path(directory).resolve()
    if directory.is_file():
        return _of_zoo(load_zoo(directory))
    if not directory.exists():
        raise RunLogError(f"there is no {directory}; rules of the zoo are {', '.join(zoo_names())}")
    refuse_links(directory)
    config = read_config(directory)
    refuse_changed_files(directory)
    command = config.get("command", "another program")
    if command not in ("main", "prune_rule"):
        raise RunLogError(f"{directory} is a run of {command}, expected one of main.py")
    for name in ("rule.json", "results.json"):
        if not (directory / name).exists():
            raise RunLogError(
                f"{directory} holds no {name}: it is not finished; "
                f"end it with {command}.py --resume {directory}"
            )
    rule = load_rule(directory / "rule.json", _own_class(directory, config, own_rule))
    if not isinstance(rule, PerLayerRule):
        raise RunLogError(f"{directory}/rule.json is one rule, expected one for each layer")
    results = read_results(directory)
    try:
        start = dict(results["initializer"])
        _check_all(start, math.isfinite, "must be a number")
        fixed_initializer(start)
        if command == "prune_rule":
            config, steps = (results["learned_from"][key] for key in ("config", "inner_steps"))
        else:
            steps = _steps_of_evaluations(results, config)
        # evaluations use this batch size, as those of the run itself did
        config = config | {
            "batch_size": config.get("evaluation_batch_size") or config["batch_size"]
        }
        _check_flags(config, steps)
        views = _views(results, rule)
        run = LearnedRun(displayable(directory.name), config, rule, start, steps, views)
        network_of_flags(config, _image_shape(directory, config), config["layers"])
    except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
        raise RunLogError(
            f"{directory} is not a whole run of {command}.py: {problem!r}"
        ) from problem
    return run


def _own_class(
    directory: Path, config: Mapping[str, Any], own_rule: OwnCode | None
) -> type[LearningRule] | None:
    """The class of a run's rule where it is of the user's own; RunLogError unless it is given."""
    name = config.get("rule")
    if not is_own_code(name):
        return None
    if own_rule is None:
        raise RunLogError(f"the rule of {directory} is of {name}, a program: give --rule "
                          f"{Path(name).name} to have it run")  # fmt: skip
    if config.get("code_found", {}).get("rule") != own_rule.digest:
        raise RunLogError(f"the rule of {directory} was learned with another version of {name}")
    return own_rule.value


def _views(results: Mapping[str, Any], rule: PerLayerRule) -> ViewStrengths | None:
    """The views at the end of a run; the default ones if an older run didn't save them.

    Raises ValueError if they don't fit the rule.
    """
    takes = rule.rules[0].views
    if "views" not in results:
        return ViewStrengths() if takes == 2 else None
    views = results["views"] and ViewStrengths.from_dict(results["views"])
    if (2 if views else 1) != takes:
        raise ValueError(f"views are {views}, of a rule that takes {takes} of each input")
    return views


def _image_shape(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape [C, H, W] of the images that a run has learned on; by default that of MNIST's."""
    if is_path(first := _datasets(config)[0]):
        shape = read_arrays(directory / "parameters.npz").get("input_shape", (1, 28, 28))
        return tuple(int(size) for size in shape)
    return (3, 32, 32) if first == "cifar10" else (1, 28, 28)


def _datasets(config: Mapping[str, Any]) -> list[str]:
    names = config["dataset"]
    return names if isinstance(names, list) else [names]


def _check_flags(config: Mapping[str, Any], steps: int) -> None:
    """Raise KeyError or ValueError unless the flags that a comparison needs are as main.py saves.

    Flags that only concern the network are checked when it is built.
    """
    names = ("batch_size", "outer_images", "initial_inner_steps")
    whole = {name: config[name] for name in names} | {"inner_steps": steps}
    whole |= {f"layers {k}": units for k, units in enumerate(config["layers"], 1)}
    for k, (channels, kernel) in enumerate(config.get("conv", ()), 1):
        whole |= {f"conv {k}": channels, f"kernel {k}": kernel}
    whole["pool"] = config.get("pool", 2)
    _check_all(whole, _is_count, f"must be a whole number from 1 to {LARGEST_WHOLE}")
    _check_all({"C": config["C"]}, lambda C: math.isfinite(C) and C > 0, "must be a number above 0")
    dynamics = {name: config[name] for name in ("inh_steps", "inh_factor")}
    most = AT_MOST["inh_steps"]
    _check_all(dynamics, lambda value: 0 <= value <= most, f"must be a number from 0 to {most}")
    switches = ("pixelwise_normalization", "forbid_self_inhibition", "forbid_excitation")
    flags = {name: config[name] for name in switches} | {"center": config.get("center", False)}
    _check_all(flags, lambda value: type(value) is bool, "must be true or false")
    if not config["layers"] and not config.get("conv"):
        raise ValueError("the network has no layer")


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_WHOLE


def _check_all(values: Mapping[str, Any], right: Callable[[Any], bool], expected: str) -> None:
    for name, value in values.items():
        if not right(value):
            raise ValueError(f"{name} {expected}, not {value!r}")


def steps_to_judge(config: Mapping[str, Any], metasteps: int) -> int:
    """The number of updates after which the rule of a run is judged.

    It is --evaluation_steps if given; else, if meta-steps are windows of one training (pes), the
    length of that training; else, if each task draws its horizon, the longest possible; else the
    number of updates in the last meta-step.

    metasteps: the number of meta-steps of the run.
    """
    if config.get("evaluation_steps"):
        return config["evaluation_steps"]
    if config.get("method") == "pes":
        return config["initial_inner_steps"]
    if config.get("horizon"):
        return config["horizon"][1]
    return rising_steps(
        config["initial_inner_steps"],
        config["raise_by"],
        config["raise_every"],
        config["max_inner_steps"],
    )(max(metasteps - 1, 0), None)


def _steps_of_evaluations(results: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """The run's own `steps_to_judge`; older results have it only in the rows of evaluations."""
    if "inner_steps" in results:
        return results["inner_steps"]
    if results["evaluations"]:
        return results["evaluations"][0]["inner_steps"]
    return steps_to_judge(config, config["metasteps"] + config["finetune_steps"])


# ---- entries of the zoo ----


def _of_zoo(entry: ZooEntry) -> LearnedRun:
    """An entry of the zoo as a run of main.py with the corresponding flags."""
    recipe = entry.recipe
    config = {
        **{name: getattr(recipe, name) for name in (*UNIT_FLAGS, "conv", "pool", "batch_size")},
        **PROBE,
        "activation": {"base": recipe.activation.base, "slope": recipe.activation.slope},
        "pixelwise_normalization": recipe.centring == "standardised",
        "center": recipe.centring == "mean",
        "layers": list(entry.layers),
        "dataset": entry.dataset,
        "layerwise": entry.layerwise,
        "steps_below": [],
    }
    start = dict(recipe.initial)
    return LearnedRun(entry.name, config, recipe.rule, start, entry.steps, recipe.views)


def zoo_entry(
    run: LearnedRun, path: str | Path, name: str, accuracies: Sequence[Mapping[str, Any]]
) -> ZooEntry:
    """A learned rule as an entry of the zoo.

    Raises RunLogError or RuleError if the files at `path` can't be read.

    path: the run's directory or the file of the zoo that `load_run` read.
    accuracies: as in ZooEntry.
    """
    config, path = run.config, Path(path)
    if path.is_file():
        return replace(load_zoo(path), name=name, accuracies=tuple(accuracies))
    first, *_ = read_json(path / "environment.json")  # one entry for each start or resumption
    standardised, centred = config["pixelwise_normalization"], config.get("center")
    recipe = Recipe(
        run.rule,
        **{name: config[name] for name in UNIT_FLAGS},
        conv=tuple(map(tuple, config.get("conv", ()))),
        pool=config.get("pool", 2),
        initial=run.start,
        centring="standardised" if standardised else "mean" if centred else "none",
        views=run.views,
        batch_size=config["batch_size"],
    )
    return ZooEntry(
        name=name,
        recipe=recipe,
        layers=tuple(config["layers"]),
        steps=run.steps,
        layerwise=config.get("layerwise", False),
        dataset=data_titles(_datasets(config))[0],
        data=re.sub(r" from /.*", "", str(read_results(path).get("data", ""))),  # without its path
        command=command_text(first["command_line"]),
        accuracies=tuple(accuracies),
    )


def write_for_use(directory: Path) -> str:
    """Write the rule of an ended run as a file of the zoo into its directory; why not, or "".

    A rule of a class of your own is left out without a word. Raises RunLogError if the run's files
    can't be read.
    """
    if is_own_code(read_config(directory).get("rule")):
        return ""
    try:
        entry = zoo_entry(load_run(directory), directory, directory.name, ())
        save_zoo(entry, directory / IN_A_RUN)
    except RuleError as problem:
        return str(problem)
    return ""


def command_text(command_line: Sequence[str]) -> str:
    """The text of a command without the flags that name places, as typed in this program's folder.

    command_line: as in sys.argv, from anywhere.
    """
    program, *words = command_line
    name = Path(program).name
    script = f"{EXAMPLES.name}/{name}" if (EXAMPLES / name).is_file() else name
    kept = []
    for before, word in zip(["", *words], words, strict=False):
        if word not in LEFT_OUT and before not in LEFT_OUT:
            kept.append(Path(word).name if word.startswith("/") else word)
    return shlex.join(["python", script, *kept])
