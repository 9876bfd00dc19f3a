"""Settings of Clarke et al.'s files, as those of tune_one_pass.py."""

import math

import pytest
from commands import ROOT, refused

import tune_one_pass
from comparison.published_settings import THEIR_KEYS, translated
from data_sets.choices import TABLES
from experiment.yaml_settings import SettingsError

# their problem files and their algorithm files, without what is the same in all
TRANSFORMS = {"lr": "10^", "weight_decay": "10^", "momentum": "sigmoid"}


def uci(name):
    rows, test_rows = TABLES[name].rows, TABLES[name].test_rows
    return {
        "config_dicts": {
            "model": {
                "class": "MultiLayerPerceptron",
                "layer_sizes": [TABLES[name].inputs, 50, 1],
                "activation_function": "ReLU",
            },
            "loss": {"class": "MSELoss"},
            "dataset": {
                "class": f"UCI_{name.capitalize()}",
                "normalise_inputs": True,
                "normalise_outputs": True,
            },
            "network_weight": {"class": "SGD", "lr": -3.0, "weight_decay": -16.0, "momentum": 0.5},
        },
        "network_weight_steps": 10,
        "hyperparameter_steps": 400,
        "validation_proportion": 0.2,
        "device": "cuda",
        "batch_size": rows - test_rows,
        "transformed_hyperparameters": TRANSFORMS,
        "hyperparameter_clipping": {"lr": [-10.0, 0.0]},
    }


def images(dataset, model, normalised, **others):
    return uci("boston") | {
        "config_dicts": {
            "model": model,
            "loss": {"class": "CrossEntropyLoss"},
            "dataset": {"class": dataset, "normalise_inputs": normalised},
            "network_weight": {"class": "SGD", "lr": -3.0, "weight_decay": -6.0, "momentum": 0.0},
        },
        **others,
    }


PERCEPTRON = {"class": "MultiLayerPerceptron", "activation_function": "ReLU"}
PROBLEMS = {name: uci(name) for name in TABLES} | {
    "fashion": images(
        "FashionMNIST", PERCEPTRON | {"layer_sizes": [784, 50, 10], "batch_norm": True}, True,
        batch_size=50,
    ),
    "cifar10": images(
        "CIFAR10", {"class": "resnet18", "num_classes": 10}, False, batch_size=100
    ),
    "ptb": images(
        "PennTreebank",
        {"class": "LSTMwithEmbedding", "num_tokens": 10000, "input_size": 650, "hidden_size": 650,
         "num_layers": 2},
        False, batch_size=70, network_weight_grad_clipping={"norm": 0.25},
        penn_treebank_validation_override=True, multi_batch_test_dataset_evaluations=True,
    ),
}  # fmt: skip
ADAM = {"class": "Adam", "lr": 0.05}
ALL = {"optimised_hyperparameters": ["lr", "weight_decay", "momentum"], "patch_optimiser": True}


def by(wrapper, hyperparameter=ADAM, **arguments):
    wrapper = {"class": wrapper, **arguments}
    return {"config_dicts": {"hyperparameter": hyperparameter, "hyperparameter_wrapper": wrapper}}


EXACT = by("ExactHypergradientOptimiser") | ALL
NEUMANN = by("NeumannHypergradientOptimiser", hyperparameter_rollback_distance=5)
ALGORITHMS = {
    "Random": ({"validation_proportion": 0, "patch_optimiser": False}, "fixed"),
    "Random_Validation": ({"full_batch_validation_evaluations": True}, "fixed"),
    "Random_SteppedLR": (
        {"config_dicts": {"network_weight": {"lr_multiplier": 0.99}}}, "stepped_lr"
    ),
    "Baydin": (
        by("BaydinHypergradientDescent", {"class": "SGD", "lr": 0.001})
        | {"optimised_hyperparameters": ["lr"], "validation_proportion": 0,
           "null_zero_validation_datasets": False, "force_single_network_weight_step": True},
        "successive_gradients",
    ),
    "Lorraine": (NEUMANN | {"optimised_hyperparameters": ["weight_decay"]}, "look_back"),
    "Ours_HDLR_Momentum": (
        NEUMANN | ALL | {"high_dimensional_hyperparameters": ["lr"]}, "look_back"
    ),
    "DiffThroughOpt": (EXACT | {"reset_loop_before_hyperparameter_step": 5}, "unrolled"),
    "LongDiffThroughOpt": (
        EXACT | {"reset_model_after_hyperparameter_update": True, "network_weight_steps": 4000,
                 "hyperparameter_steps": 30},
        "unrolled",
    ),
}  # fmt: skip


def written(folder, **tables):
    """Files of these tables, in YAML (JSON is that too)."""
    paths = []
    for name, content in tables.items():
        paths.append(folder / f"{name}.yaml")
        text = repr(content).replace("True", "true").replace("False", "false")
        paths[-1].write_text(text)
    return paths


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_problem_of_theirs_goes_with_every_algorithm_in_either_order(tmp_path, algorithm):
    content, method = ALGORITHMS[algorithm]
    for problem, table in PROBLEMS.items():
        files = written(tmp_path, problem=table, algorithm={"algorithm": algorithm, **content})
        for order in (files, files[::-1]):
            args, notes = tune_one_pass.parse_all(["-c", *map(str, order)])
            tune_one_pass.fill_in(args)
            assert (args.dataset, args.method) == (problem, method)
            assert f"algorithm {algorithm!r}: a label" in notes
            assert not {key.name for key in THEIR_KEYS} & vars(args).keys()


def settings(problem, algorithm):
    table, (other, _) = PROBLEMS[problem], ALGORITHMS[algorithm]
    both = table["config_dicts"] | other.get("config_dicts", {})
    return translated(table | other | {"config_dicts": both})[0]


def test_raw_values_become_natural_ones_and_the_rows_are_the_published():
    found = settings("energy", "DiffThroughOpt")
    assert found["lr"] == 1e-3 and found["weight_decay"] == 1e-16
    assert found["momentum"] == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert found["split"] == "published" and "batch_size" not in found
    assert (found["network_weight_steps"], found["look_back"]) == (10, 5)
    assert found["device"] == "auto" and found["hidden_sizes"] == [50]


def test_what_is_special_in_a_problem_or_an_algorithm_is_kept():
    baydin = settings("energy", "Baydin")
    assert (baydin["network_weight_steps"], baydin["hyperparameter_steps"]) == (1, 4000)
    assert not baydin["chain_rule"] and baydin["hyperparameter_optimiser"] == "sgd"
    full = settings("energy", "LongDiffThroughOpt")
    assert (full["look_back"], full["hyperparameter_steps"]) == (4000, 30)
    assert settings("fashion", "Random")["model"] == "mlp_batch_norm"
    cifar = settings("cifar10", "Random")
    assert (cifar["model"], cifar["standardise"]) == ("resnet18_unmodified", "channels")
    assert settings("ptb", "Random")["hidden_sizes"] == [650, 650]
    assert "batch_size" not in settings("ptb", "Random")


def test_their_flags_are_taken_and_ours_win(tmp_path):
    files = written(tmp_path, problem=PROBLEMS["energy"])
    args, notes = tune_one_pass.parse_all([
        "-c", *map(str, files), "--config_dicts", "{network_weight: {lr: -2.0}}",
        "--momentum", "0.25", "--run_group_name", "some", "--run_name", "one",
    ])  # fmt: skip
    assert (args.lr, args.momentum, args.group, args.name) == (0.01, 0.25, "some", "one")
    assert "config_dicts.network_weight.lr -2.0: lr 0.01" in notes
    ours = tune_one_pass.parse_all(["-c", str(ROOT / "configs" / "energy.yaml")])
    assert ours[1] == []


def test_flags_that_both_have_mean_what_they_mean_there(tmp_path):
    def args_of(algorithm, *flags):
        files = written(tmp_path, problem=PROBLEMS["yacht"], algorithm=ALGORITHMS[algorithm][0])
        args, _ = tune_one_pass.parse_all(["-c", *map(str, files), *flags])
        tune_one_pass.fill_in(args)
        return args

    assert args_of("Random", "--batch_size", "277").batch_size is None  # all rows
    assert args_of("Random", "--batch_size", "50").batch_size == 50
    steps = "--hyperparameter_steps", "20"
    assert args_of("Baydin", *steps).steps == 200 and args_of("Lorraine", *steps).steps == 200
    assert args_of("LongDiffThroughOpt", "--network_weight_steps", "100").look_back == 100
    clipped = tune_one_pass.make_settings(args_of("Ours_HDLR_Momentum"))
    assert clipped.bounds == {"lr": (-10, 0)}
    free = args_of("Ours_HDLR_Momentum", "--hyperparameter_clipping", "{}")
    assert tune_one_pass.make_settings(free).bounds == {}
    assert args_of("Random", "--hyperparameter_clipping", "{}").method == "fixed"


def test_a_run_that_is_gone_on_with_takes_no_flag_of_theirs(tmp_path, capsys):
    out, tiny = tmp_path / "run", ("--total_step_limit", "10", "--threads", "1", "--no_figures")
    flags = ("--dataset", "boston", "--data-dir", str(tmp_path), "--out", str(out), "--quiet")
    tune_one_pass.main([*flags, *tiny])
    message = refused(capsys, tune_one_pass.main, "--resume", out, "--algorithm", "Random")
    assert "--algorithm: a run that is gone on with has its settings already" in message


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("dataset", {"class": "Titanic"}, "class is one of UCI_Boston"),
        ("dataset", {"class": "UCI_Yacht", "normalise_outputs": False}, "is True here"),
        ("model", {"class": "Transformer"}, "MultiLayerPerceptron, resnet18, LSTMwith"),
        ("model", PERCEPTRON | {"layer_sizes": 3}, "three numbers or more, not 3"),
        ("loss", {"class": "SumLoss"}, "'SumLoss' is not the loss"),
        ("network_weight", {"class": "CurvatureTransformingSGD"}, "class is SGD"),
        ("network_weight", {"lr": "fast"}, "lr must be a number, not 'fast'"),
        ("network_weight", {"lr": 1e9}, r"is too large for 10\^"),
        ("network_weight", {"dampening": 0.1}, "'dampening' has no equal here"),
        ("hyperparameter", {"class": "LBFGS"}, "class is Adam or SGD"),
        ("hyperparameter_wrapper", {"class": "Other"}, "class is one of Neumann"),
        ("scheduler", {}, "config_dicts: 'scheduler' has no equal here"),
        ("dataset", 3, "dataset must be a table, not 3"),
        ("dataset", {"class": ["UCI_Yacht"]}, "config_dicts.dataset: class must be a name"),
    ],
)
def test_what_has_no_equal_here_is_refused(part, value, message):
    table = PROBLEMS["yacht"]
    with pytest.raises(SettingsError, match=message):
        translated(table | {"config_dicts": table["config_dicts"] | {part: value}})
