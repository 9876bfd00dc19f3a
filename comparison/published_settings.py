"""Settings of Clarke et al.'s program, from its files and flags, as those of tune_one_pass.py.

    settings, notes = translated({"config_dicts": {...}, "network_weight_steps": 10})

Source: github.com/rmclarke/OptimisingWeightUpdateHyperparameters, config.py and train.py. What has
the same name and meaning there and here (batch_size, hyperparameter_steps, ...) is taken as it is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from data_sets.choices import TABLES
from experiment.yaml_settings import Key, SettingsError, mapping, truth

# keys that they have and we do not
THEIR_KEYS = (
    Key("algorithm", str, None, "a label without effect"),
    Key("config_dicts", mapping, None, "table of model, loss, data set and optimisers"),
    Key(
        "reset_loop_before_hyperparameter_step", int, None, "window of exact derivatives, in steps"
    ),
    Key("force_single_network_weight_step", truth, None, "take T = 1, for as many weight steps"),
    Key("patch_optimiser", truth, None, "has no effect here"),
    Key("null_zero_validation_datasets", truth, None, "has no effect here"),
    Key("full_batch_validation_evaluations", truth, None, "has no effect here: it is always done"),
    Key(
        "multi_batch_test_dataset_evaluations", truth, None, "has no effect here: it is always done"
    ),
    Key("penn_treebank_validation_override", truth, None, "has no effect here: it is always done"),
)

# keys of the same name here, which mean what they mean together with the others
SHARED_KEYS = (
    "batch_size", "network_weight_steps", "hyperparameter_steps", "validation_proportion",
    "optimised_hyperparameters", "transformed_hyperparameters", "hyperparameter_clipping",
)  # fmt: skip

DATASETS = {f"UCI_{name.capitalize()}": name for name in TABLES} | {
    "FashionMNIST": "fashion", "CIFAR10": "cifar10", "PennTreebank": "ptb",
}  # fmt: skip
NATURAL: dict[str, Callable[[float], float]] = {
    "10^": lambda raw: 10**raw,
    "exp": math.exp,
    "sigmoid": lambda raw: 1 / (1 + math.exp(-raw)),
}
WRAPPERS = {
    "NeumannHypergradientOptimiser": "look_back",
    "ExactHypergradientOptimiser": "unrolled",
    "BaydinHypergradientDescent": "successive_gradients",
}
STREAMS, WINDOW = 40, 70  # of Penn Treebank, here as there
OF_NO_EFFECT = {
    "algorithm": "a label",
    "patch_optimiser": "none is needed: derivatives are in closed form",
    "null_zero_validation_datasets": "successive gradients are those of training batches",
    "full_batch_validation_evaluations": "every loss is that of all samples",
    "multi_batch_test_dataset_evaluations": "every loss is that of all samples",
    "penn_treebank_validation_override": "every loss is that of all samples",
}


class _Translation:
    """What has been taken so far: settings of ours, and a line for each of their keys."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        theirs = {key.name for key in THEIR_KEYS}
        self.theirs = {name: value for name, value in given.items() if name in theirs}
        self.ours = {name: value for name, value in given.items() if name not in theirs}
        self.notes: list[str] = []

    def take(self, key: str, value: Any, reason: str = "", **settings: Any) -> None:
        """Note that their `key` is these settings of ours."""
        self.ours |= settings
        meant = ", ".join(f"{name} {setting!r}" for name, setting in settings.items())
        self.notes.append(f"{key} {value!r}: {', '.join(filter(None, (meant, reason)))}")

    def part(self, name: str) -> dict[str, Any]:
        """A table of config_dicts; {} where there is none."""
        value = self.theirs.get("config_dicts", {}).get(name, {})
        if not isinstance(value, dict):
            raise SettingsError(f"config_dicts: {name} must be a table, not {value!r}")
        if not isinstance(value.get("class", ""), str):
            raise SettingsError(f"config_dicts.{name}: class must be a name")
        return dict(value)


def translated(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of ours for `given`, theirs and ours mixed; and a line for each of their keys.

    SettingsError for what has no equal here.
    """
    translation = _Translation(given)
    parts = {
        "dataset",
        "model",
        "loss",
        "network_weight",
        "hyperparameter",
        "hyperparameter_wrapper",
    }
    _refuse_others("config_dicts", translation.theirs.get("config_dicts", {}), parts)
    _dataset(translation)
    _model(translation)
    _start(translation)
    _hyperparameter_optimiser(translation)
    _steps(translation)
    _clipping(translation)
    for name, reason in OF_NO_EFFECT.items():
        if name in translation.theirs:
            translation.take(name, translation.theirs[name], reason)
    return translation.ours, translation.notes


def _refuse_others(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    for name in table:
        if name not in known:
            raise SettingsError(f"{where}: {name!r} has no equal here")


def _dataset(to: _Translation) -> None:
    part = to.part("dataset")
    _refuse_others(
        "config_dicts.dataset", part,
        {"class", "normalise_inputs", "normalise_outputs", "parallel_sequences"},
    )  # fmt: skip
    if "class" not in part:
        return
    if part["class"] not in DATASETS:
        known = ", ".join(DATASETS)
        raise SettingsError(f"config_dicts.dataset: class is one of {known}, not {part['class']!r}")
    name = DATASETS[part["class"]]
    beside, reason = {} if name == "ptb" else {"split": "published"}, ""
    if name == "cifar10":
        beside["standardise"] = "channels"
        reason = "pixels are 0 to 1 here, as its means are; there 0 to 255"
    to.take("config_dicts.dataset.class", part["class"], reason, dataset=name, **beside)
    standardised = name not in ("cifar10", "ptb")
    for key, here in (
        ("normalise_inputs", standardised), ("normalise_outputs", name in TABLES),
        ("parallel_sequences", STREAMS),
    ):  # fmt: skip
        if key not in part:
            continue
        if part[key] != here:
            raise SettingsError(f"config_dicts.dataset: {key} is {here} here, not {part[key]}")
        to.take(f"config_dicts.dataset.{key}", part[key], "as here")
    if to.ours.get("device") == "cuda":
        to.take("device", "cuda", "a GPU where there is one", device="auto")
    _batches(to, name)


def _batches(to: _Translation, name: str) -> None:
    """Full batches are no batch_size here; a text has windows and validation words of its own."""
    size, proportion = to.ours.get("batch_size"), to.ours.get("validation_proportion", 0)
    if name == "ptb":
        if size not in (None, WINDOW):
            raise SettingsError(f"batch_size: windows of text are {WINDOW} words, not {size}")
        for key in ("batch_size", "validation_proportion"):
            if key in to.ours:
                reason = "windows and validation words are those of the text"
                to.take(key, to.ours.pop(key), reason)
    elif name in TABLES and size is not None:
        rest = TABLES[name].rows - TABLES[name].test_rows
        if size >= rest - round(proportion * rest):
            to.take("batch_size", to.ours.pop("batch_size"), "full batches")


def _model(to: _Translation) -> None:
    part = to.part("model")
    kind = part.pop("class", None)
    if kind is None:
        return
    where = "config_dicts.model"
    if kind == "MultiLayerPerceptron":
        _refuse_others(where, part, {"layer_sizes", "activation_function", "batch_norm"})
        model = "mlp_batch_norm" if part.get("batch_norm") else "mlp"
        sizes = part.get("layer_sizes")
        if not isinstance(sizes, list) or len(sizes) < 3:
            raise SettingsError(f"{where}: layer_sizes are three numbers or more, not {sizes!r}")
        to.take(f"{where}.class", kind, model=model)
        to.take(f"{where}.layer_sizes", sizes, "ends follow from the data",
                hidden_sizes=sizes[1:-1])  # fmt: skip
        to.take(f"{where}.activation_function", part.get("activation_function"),
                activation=part.get("activation_function"))  # fmt: skip
        if "batch_norm" in part:
            to.take(f"{where}.batch_norm", part["batch_norm"], model=model)
    elif kind == "resnet18":
        _refuse_others(where, part, {"num_classes"})
        to.take(f"{where}.class", kind, model="resnet18_unmodified")
    elif kind == "LSTMwithEmbedding":
        _refuse_others(where, part, {"num_tokens", "input_size", "hidden_size", "num_layers"})
        units, layers = part.get("hidden_size"), part.get("num_layers", 1)
        if part.get("input_size") != units:
            raise SettingsError(f"{where}: input_size is hidden_size here, {units!r}")
        if not isinstance(layers, int):
            raise SettingsError(f"{where}: num_layers must be a number, not {layers!r}")
        to.take(f"{where}.class", kind, model="lstm")
        to.take(f"{where}.hidden_size", units, hidden_sizes=[units] * layers)
        to.take(f"{where}.num_layers", layers, "so many hidden_sizes")
    else:
        raise SettingsError(
            f"{where}: class is one of MultiLayerPerceptron, resnet18, LSTMwithEmbedding, "
            f"not {kind!r}"
        )
    for name in ("num_classes", "num_tokens", "input_size"):
        if name in part:
            to.take(f"{where}.{name}", part[name], "follows from the data and hidden_size")
    loss = to.part("loss").get("class")
    if loss is not None:
        regression = to.ours.get("dataset") in TABLES
        if loss != ("MSELoss" if regression else "CrossEntropyLoss"):
            raise SettingsError(f"config_dicts.loss: {loss!r} is not the loss of these data here")
        to.take("config_dicts.loss.class", loss, "follows from the data")


def _start(to: _Translation) -> None:
    """The natural values of their raw ones; a factor of the learning rate is a method here."""
    part, where = to.part("network_weight"), "config_dicts.network_weight"
    _refuse_others(where, part, {"class", "lr", "weight_decay", "momentum", "lr_multiplier"})
    if part.get("class", "SGD") != "SGD":
        raise SettingsError(f"{where}: class is SGD, not {part['class']!r}")
    if "class" in part:
        to.take(f"{where}.class", "SGD", "as here")
    transforms = to.ours.get("transformed_hyperparameters", {})
    for name in ("lr", "weight_decay", "momentum"):
        if name not in part:
            continue
        kind, raw = transforms.get(name), part[name]
        if kind not in NATURAL and name in to.ours.get("optimised_hyperparameters", []):
            raise SettingsError(
                f"{where}: {name} is tuned, and needs one of transformed_hyperparameters "
                f"{', '.join(NATURAL)}"
            )
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise SettingsError(f"{where}: {name} must be a number, not {raw!r}")
        try:
            value = NATURAL[kind](raw) if kind in NATURAL else raw
        except OverflowError:
            raise SettingsError(f"{where}: {name} {raw} is too large for {kind}") from None
        to.take(f"{where}.{name}", raw, **{name: value})
    if "lr_multiplier" in part:
        if "hyperparameter" in to.theirs.get("config_dicts", {}):
            raise SettingsError(f"{where}: lr_multiplier needs hyperparameters that are not tuned")
        factor = part["lr_multiplier"]
        to.take(f"{where}.lr_multiplier", factor, method="stepped_lr", lr_multiplier=factor)


def _hyperparameter_optimiser(to: _Translation) -> None:
    part, wrapper = to.part("hyperparameter"), to.part("hyperparameter_wrapper")
    where = "config_dicts.hyperparameter"
    _refuse_others(where, part, {"class", "lr"})
    if part:
        names = {"Adam": "adam", "SGD": "sgd"}
        if part.get("class") not in names:
            raise SettingsError(f"{where}: class is Adam or SGD, not {part.get('class')!r}")
        to.take(f"{where}.class", part["class"], hyperparameter_optimiser=names[part["class"]])
        rate = part.get("lr", 0.001)  # Adam's there
        to.take(f"{where}.lr", rate, hyperparameter_lr=rate)
    where += "_wrapper"
    kind = wrapper.pop("class", None)
    if kind is None:
        return
    if kind not in WRAPPERS:
        raise SettingsError(f"{where}: class is one of {', '.join(WRAPPERS)}, not {kind!r}")
    unscaled = {"chain_rule": False} if kind == "BaydinHypergradientDescent" else {}
    to.take(f"{where}.class", kind, method=WRAPPERS[kind], **unscaled)
    _refuse_others(where, wrapper, {"hyperparameter_rollback_distance"})
    if "hyperparameter_rollback_distance" in wrapper:
        terms = wrapper["hyperparameter_rollback_distance"]
        to.take(f"{where}.hyperparameter_rollback_distance", terms, look_back=terms)


def _steps(to: _Translation) -> None:
    name = "force_single_network_weight_step"
    if to.theirs.get(name):
        steps = to.ours.get("network_weight_steps", 1) * to.ours.get("hyperparameter_steps", 1)
        to.take(name, True, network_weight_steps=1, hyperparameter_steps=steps)
    elif name in to.theirs:
        to.take(name, False, "as here")
    name, every = "reset_loop_before_hyperparameter_step", to.ours.get("network_weight_steps", 10)
    window = to.theirs.get(name, -1)
    if to.ours.get("method") == "unrolled":
        steps = every if window == -1 else min(window, every)
        to.take(name, window, look_back=steps)
    elif name in to.theirs:
        to.take(name, window, "there is no window to reset")


def _clipping(to: _Translation) -> None:
    """A table without lr leaves the rate free there; here its bounds stay, unless they are null."""
    name = "hyperparameter_clipping"
    bounds = to.ours.get(name)
    if bounds is None or "lr" in bounds:
        return
    if "method" in to.ours:
        to.take(name, bounds, **{name: bounds | {"lr": None}})
    else:
        to.take(name, to.ours.pop(name), "nothing is tuned")
