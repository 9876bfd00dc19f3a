"""The rules of the zoo: whole, read strictly, judged and kept by evaluate.py."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from commands import refused

import evaluate
import main
from comparison.learned_run import command_text, load_run, zoo_entry
from experiment.view_strengths import ViewStrengths
from learning_rules import PerLayerRule, RuleError, classical_rule
from rules import choices, load_zoo, names, save_zoo
from rules.choices import run_path, zoo_path
from rules.classical import CLASSICAL
from rules.unit_statistics import preset
from rules.zoo import Recipe, ZooEntry

COMMON = ["--threads", "1", "--quiet", "--no_figures"]


@pytest.fixture
def a_zoo(tmp_path, monkeypatch):
    """An empty zoo."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    monkeypatch.setattr(choices, "FOLDER", folder)
    return folder


def entry(name: str = "mine") -> ZooEntry:
    rule = PerLayerRule([preset("latent-predictive", a=3.3).double()])
    recipe = Recipe(rule, initial={"spread_w": 0.2}, views=ViewStrengths("mixed"), batch_size=64)
    accuracy = {"dataset": "mnist", "layers": "4", "steps": 3, "mean": 0.5, "deviation": None}
    accuracy |= {"trainings": 1}
    return ZooEntry(name, recipe, (4,), 3, False, "mnist5k", "digits", "none", (accuracy,))


@pytest.mark.parametrize("name", names())
def test_every_rule_of_the_zoo_trains_a_network_and_says_where_it_is_from(name):
    kept = load_zoo(name)
    assert zoo_path(name).stat().st_size < 8192
    assert name not in CLASSICAL and kept.command and kept.data and kept.accuracies
    recipe = kept.recipe
    assert recipe.rule.formula()
    model = recipe.network((1, 28, 28), [4])
    layers = sum(bool(layer.parameter_shapes()) for layer in model.layers)
    assert len(recipe.rules(layers)) == layers


def test_an_entry_reads_back_as_it_was_written(a_zoo):
    save_zoo(entry(), a_zoo / "mine.json")
    assert names() == ["mine"]
    for again in (load_zoo("mine"), load_zoo(a_zoo / "mine.json")):
        assert again.to_dict() == entry().to_dict() and again.name == "mine"
        assert again.recipe.views == entry().recipe.views


DAMAGES = {
    "format is 2, expected 1": lambda d: d | {"format": 2},
    "format is None, expected 1": lambda d: {k: v for k, v in d.items() if k != "format"},
    "lacks steps": lambda d: {k: v for k, v in d.items() if k != "steps"},
    "has colour, which format 1": lambda d: d | {"colour": 1},
    "steps is 1000000000000": lambda d: d | {"steps": 10**12},
    "layers is 100000000": lambda d: d | {"layers": [10**8]},
    "layers is 3.5": lambda d: d | {"layers": [3.5]},
    "number of layers is 9": lambda d: d | {"layers": [1] * 9},
    "number of layers is 0": lambda d: d | {"layers": []},
    "recipe holds no table": lambda d: d | {"recipe": 3},
    "not the description of a learning rule": lambda d: _with(d, rule={"kind": "Nothing"}),
    "powers up to 16, got": lambda d: _with(d, rule=PerLayerRule([
        classical_rule("oja", 0.1)]).to_dict() | {"rules": [classical_rule("oja", 0.1).to_dict()
        | {"terms": {"w": [{"exponents": [0, 10**6, 0, 0]}], "b": [], "m": []}}]}),
    "rule is not one for each": lambda d: _with(d, rule=d["recipe"]["rule"]["rules"][0]),
    "views do not go with its rule": lambda d: _with(d, views=None),
    "views have no colour": lambda d: _with(d, views={"colour": 1}),
    "inhibition or centring is none of": lambda d: _with(d, centring="twice"),
    "initial lacks spread_w": lambda d: _with(d, initial={}),
    "parameters are w, b, m": lambda d: _with(d, initial={"spread_w": 1.0, "mean_v": 0}),
    "spread_w is '1', expected a number": lambda d: _with(d, initial={"spread_w": "1"}),
    "batch_size is True": lambda d: _with(d, batch_size=True),
    "activation 'step' is unknown": lambda d: _with(d, activation={"base": "step", "slope": 1}),
    "step/eta is inf, expected a number": lambda d: _with(d, rule=_overflown(d["recipe"]["rule"])),
    "start has speed, which is not understood": lambda d: _with(d, rule=_started(d, speed=1.0)),
    "rule, rules, terms, w, .* is true, expected a number": lambda d: _with(d, rule=_true_term(d)),
    "degrees is 1e\\+40, beyond 1e\\+30": lambda d: _with(
        d, views=d["recipe"]["views"] | {"degrees": 1e40}),
    "int too large": lambda d: _with(d, views=d["recipe"]["views"] | {"noise": 10**400}),
    "inh_factor is 1e\\+308, beyond": lambda d: _with(d, inh_factor=1e308),
    "forbid_excitation is 1": lambda d: _with(d, forbid_excitation=1),
}  # fmt: skip


def _overflown(rule: dict) -> dict:
    layer = rule["rules"][0]
    return rule | {"rules": [layer | {"moved": layer["moved"] | {"eta": 1e6}}]}


def _started(description: dict, **start) -> dict:
    rule = description["recipe"]["rule"]
    layer = rule["rules"][0]
    return rule | {"rules": [layer | {"start": layer["start"] | start}]}


def _true_term(description: dict) -> dict:
    rule = description["recipe"]["rule"]
    layer = rule["rules"][0]
    w = dict.fromkeys(layer["terms"]["w"], True)
    return rule | {"rules": [layer | {"terms": layer["terms"] | {"w": w}}]}


def _with(description: dict, **recipe) -> dict:
    return description | {"recipe": description["recipe"] | recipe}


@pytest.mark.parametrize("expected", DAMAGES)
def test_damage_is_one_line(expected, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(DAMAGES[expected](json.loads(json.dumps(entry().to_dict())))))
    with pytest.raises(RuleError, match=expected) as problem:
        load_zoo(path)
    assert "\n" not in str(problem.value) and str(path) in str(problem.value)


@pytest.mark.parametrize(("text", "expected"), [
    ("", "Expecting value"), ("[1]", "holds no table"), ("[" * 10**5, "nested too deeply"),
    ('{"format": NaN}', "NaN is no finite number"), ('{"format": 1e999}', "no finite number"),
    ('{"format": "' + "1" * 2**18 + '"}', "larger than 262144 bytes"), ("\xff", "decode|Expecting"),
])  # fmt: skip
def test_what_is_no_json_is_one_line(text, expected, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RuleError, match=expected):
        load_zoo(path)


def test_an_unknown_name_is_refused_with_those_there_are(a_zoo):
    save_zoo(entry(), a_zoo / "mine.json")
    with pytest.raises(RuleError, match="no rule is called 'yours'; choose from mine"):
        load_zoo("yours")
    spoilt = {**vars(entry()), "steps": 0}
    with pytest.raises(RuleError, match="not to be kept in the zoo: steps is 0"):
        save_zoo(ZooEntry(**spoilt), a_zoo / "spoilt.json")
    assert names() == ["mine"]


def test_evaluate_takes_a_name_and_keeps_what_it_has_measured(a_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_zoo(entry(), a_zoo / "mine.json")
    flags = ["--evaluations", "3", "--steps", "2", "--to_zoo", "again"]
    evaluate.main(["mine", *flags, *COMMON, "--out", "out"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    values = [row["test_accuracy"] for row in results["trainings"]]
    assert results["methods"] == ["mine"]
    (kept,) = load_zoo("again").accuracies
    assert kept == {"dataset": "mnist5k", "layers": "4", "steps": 2, "trainings": 3,
                    "mean": pytest.approx(statistics.mean(values)),
                    "deviation": pytest.approx(statistics.stdev(values))}  # fmt: skip
    assert load_zoo("again").recipe.rule.to_dict() == entry().recipe.rule.to_dict()


def test_a_run_is_kept_with_its_command_and_wins_over_a_name(a_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_zoo(entry("run"), a_zoo / "run.json")
    assert run_path("run") == a_zoo / "run.json"
    line = ["5", "--dataset", "mnist5k", "--metasteps", "1", "--initial_inner_steps", "2",
            "--max_inner_steps", "2", "--batch_size", "64", "--views", "masks", "--center",
            "--inhibition", "none", "--evaluations", "1", "--beside", "--out", "run"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["/somewhere/main.py", *line])
    main.main([*line, *COMMON])
    assert run_path("run") == Path("run")
    run = load_run("run")
    kept = zoo_entry(run, "run", "kept", [])
    save_zoo(kept, a_zoo / "kept.json")
    again = load_zoo("kept")
    assert again.command.startswith("python main.py 5 --dataset mnist5k --metasteps 1")
    assert "run" not in again.command.split() and "embedded" in again.data
    assert again.recipe.views.kind == "masks" and again.recipe.centring == "mean"
    by_name = load_run(a_zoo / "kept.json")
    assert (by_name.start, by_name.steps, by_name.views) == (run.start, run.steps, run.views)
    shared = by_name.config.keys() & run.config.keys()
    assert {"center", "layers", "inhibition", "batch_size", "dataset", "layerwise"} <= shared
    for name in shared - {"conv"}:
        assert by_name.config[name] == run.config[name], name
    for p, q in zip(by_name.rule.parameters(), run.rule.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("folder", ["", "examples/", "./examples/", "/somewhere/"])
def test_a_command_is_told_as_it_is_typed_in_this_programs_folder(folder):
    line = [f"{folder}learn_filters.py", "--out", "a", "--dataset", "/home/me/my photos"]
    told = "python examples/learn_filters.py --dataset 'my photos'"
    assert command_text(line) == told
    assert command_text([f"{folder}main.py", "32"]) == "python main.py 32"


def test_what_is_not_for_the_zoo_is_refused(a_zoo, capsys):
    save_zoo(entry(), a_zoo / "mine.json")
    save_zoo(entry(), a_zoo / "other.json")
    assert "give one RUN, not 2" in refused(capsys, evaluate.main, "mine", "other", "--to_zoo", "x")
    assert "take a name of" in refused(capsys, evaluate.main, "mine", "--to_zoo", "../x")
