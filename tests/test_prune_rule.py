"""Removals against least squares by torch, and the real command on a tiny run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import interrupt_at_row, kill_at_row, redraw, refused
from oracles import DOUBLE, normal

import main
import prune_rule
from comparison.learned_run import load_run
from experiment.run_log import RunLog
from experiment.run_reader import read_config
from learning_rules import PerLayerRule, PolynomialRule, term_grams
from models_fully_local import Activation, lateral_mlp
from rules import load_rule
from rules.unit_statistics import UnitStatisticsRule

ROOT = Path(__file__).resolve().parent.parent
FAST = [
    "--dataset", "mnist5k", "--seeds", "1", "--trials", "1", "--inner_steps", "3", "--candidates",
    "2", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A run of main.py with a rule of 5 + 3 + 5 terms."""
    out = tmp_path_factory.mktemp("learned") / "run"
    main.main([
        "4", "--degree", "1", "--dataset", "mnist5k", "--metasteps", "3", "--initial_inner_steps",
        "3", "--max_inner_steps", "3", "--batch_size", "64", "--evaluations", "1", "--lr", "1e-3",
        "--warmup_steps", "1", "--threads", "1", "--beside", "--quiet", "--no_figures",
        "--out", str(out),
    ])  # fmt: skip
    return out


def run(*flags) -> None:
    """The command without its figures, which take longer than all the rest."""
    run_with_figures(*flags, "--no_figures")


def run_with_figures(*flags) -> None:
    prune_rule.main([*map(str, flags)])


def results_of(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


# ---- removals ----


def changes_and_grams(terms: int, seed: int = 0):
    """What terms change [synapses, terms], and the inner products of it."""
    changes = normal(seed, 50, terms).detach()
    return changes, {"1/w": changes.T @ changes}


def test_a_removal_is_the_least_squares_fit_of_the_terms_that_stay():
    changes, grams = changes_and_grams(6)
    whole = changes.sum(1)
    found = prune_rule.removals(grams)
    assert sorted(removal.index for removal in found) == list(range(6))
    for removal in found:
        stays = torch.arange(6) != removal.index
        fit = torch.linalg.lstsq(changes[:, stays], whole[:, None])
        error = (changes[:, stays] @ fit.solution[:, 0] - whole).square().sum()
        assert torch.allclose(removal.factors[stays], fit.solution[:, 0], atol=1e-6)
        assert removal.factors[removal.index] == 0
        assert removal.unexplained == pytest.approx(float(error / whole.square().sum()), rel=1e-6)


def test_removals_come_in_the_order_of_what_they_leave_unexplained():
    _, grams = changes_and_grams(5)
    grams["1/b"] = changes_and_grams(3, seed=1)[1]["1/w"]
    found = [removal.unexplained for removal in prune_rule.removals(grams)]
    assert len(found) == 8 and found == sorted(found)


def test_a_term_that_others_make_up_for_goes_first_and_costs_nothing():
    changes, _ = changes_and_grams(4)
    changes[:, 2] = changes[:, 0] + changes[:, 3]
    first = prune_rule.removals({"2/m": changes.T @ changes})[0]
    assert first.index in (0, 2, 3) and abs(first.unexplained) < 1e-8
    kept = changes @ first.factors
    assert torch.allclose(kept, changes.sum(1), atol=1e-3)


def test_a_term_without_any_change_goes_first_and_leaves_the_others_alone():
    changes, _ = changes_and_grams(4)
    changes[:, 1] = 0
    first = prune_rule.removals({"1/w": changes.T @ changes})[0]
    assert (first.index, first.unexplained) == (1, 0)
    assert first.factors.tolist() == [1, 0, 1, 1]


def test_grams_after_removals_are_those_of_the_terms_that_stay():
    changes, grams = changes_and_grams(6)
    for _ in range(3):
        removal = prune_rule.removals(grams)[0]
        grams = prune_rule.grams_without(grams, removal)
        stays = torch.arange(len(removal.factors)) != removal.index
        changes = (changes * removal.factors)[:, stays]
        assert torch.allclose(grams["1/w"], changes.T @ changes, atol=1e-5)


def random_rule(layers: int) -> PerLayerRule:
    rule = PerLayerRule([PolynomialRule.of_degree(2) for _ in range(layers)]).double()
    with torch.no_grad():
        for k, p in enumerate(rule.parameters()):
            p.copy_(normal(k, *p.shape, scale=0.1))
    return rule


def test_a_shortened_rule_makes_nearly_the_same_change_as_the_whole_one():
    rule, model = random_rule(2), lateral_mlp(7, [5, 3], Activation("sigmoid", 2.0))
    params = [
        {n: normal(10 * k, *shape).detach() for n, shape in layer.parameter_shapes().items()}
        for k, layer in enumerate(model.layers)
    ]
    x = normal(99, 30, 7).detach()
    grams = term_grams(rule, model, params, iter([x]))
    for removal in prune_rule.removals(grams)[:12]:
        shorter = prune_rule.without(rule, removal)
        assert len(shorter.coefficients()) == len(rule.coefficients()) - 1
        assert set(shorter.coefficients()) < set(rule.coefficients())
        layer, group = removal.parameter.split("/")
        old, whole, left = (
            p[int(layer)][group]
            for p in (params, rule.update(model, params, x), shorter.update(model, params, x))
        )
        error = (left - whole).square().sum() / (whole - old).square().sum()
        assert error.item() == pytest.approx(removal.unexplained, rel=1e-4, abs=1e-9)
    assert len(rule.coefficients()) == 2 * (15 + 6 + 10 + 1)


def test_the_diagonal_of_the_lateral_weights_can_go():
    rule = random_rule(1)
    last = prune_rule.Removal("1/m", 10, torch.tensor([2.0] * 10 + [0.0], dtype=DOUBLE), 0.0)
    shorter = prune_rule.without(rule, last)
    assert "1/m/diagonal" not in shorter.coefficients()
    for name, value in shorter.coefficients().items():
        assert value == rule.coefficients()[name] * (2 if name.startswith("1/m") else 1)


def test_a_rule_with_unit_statistics_is_shortened_alike():
    texts = ["x gain", "x gain y", "x gain s", "x gain r", "w"]
    rule = UnitStatisticsRule.of_terms(texts, views=1, step="plain", learn=("exponents",)).double()
    with torch.no_grad():
        rule.w.copy_(normal(0, len(rule.w)))
    rule, model = PerLayerRule([rule]), lateral_mlp(7, [5], Activation("sigmoid", 2.0))
    shapes = model.layers[1].parameter_shapes()
    params = [{}, {n: normal(k, *shape).detach() for k, (n, shape) in enumerate(shapes.items())}]
    x = normal(99, 30, 7).detach()
    grams = term_grams(rule, model, params, iter([x]))
    for removal in prune_rule.removals(grams):
        shorter = prune_rule.without(rule, removal)
        assert len(shorter.term_coefficients()) == 4 == len(shorter.rules[0].exponents["w"])
        whole, left = (r.update(model, params, x)[1]["w"] for r in (rule, shorter))
        error = (left - whole).square().sum() / (whole - params[1]["w"]).square().sum()
        assert error.item() == pytest.approx(removal.unexplained, rel=1e-4, abs=1e-9)


# ---- the command ----


def test_a_run_leaves_rules_a_table_and_a_figure(tmp_path, learned, capsys):
    out = tmp_path / "run"
    run_with_figures(learned, *FAST, "--terms", 9, 5, 2, 40, "--try_below", 4, "--out", out)
    assert read_config(out)["run"] == str(learned)
    stages = results_of(out)["pruning"]
    assert [stage["terms"] for stage in stages] == [13, 9, 5, 2]
    for stage in stages:
        rule = load_rule(out / f"rule-{stage['terms']}.json")
        assert list(rule.coefficients()) == list(stage["term_effects"])
        assert len(rule.coefficients()) == stage["terms"] and len(stage["evaluations"]) == 1
    shown = capsys.readouterr().out
    assert "13 terms: 1 + 1 trainings of 3 updates" in shown
    assert "from 4 terms on, up to 2 trainings choose each removal" in shown
    assert shown.count("test accuracy") == 4 and "Δw" in shown
    best = results_of(out)["shortest"]
    assert len(load_rule(out / "rule.json").coefficients()) == best
    assert (out / "figures" / "pruning.png").stat().st_size > 1000
    redraw(out)


def test_the_whole_rule_does_as_well_as_in_its_own_run(tmp_path, learned):
    run(learned, *FAST, "--terms", 12, "--quiet", "--out", tmp_path / "run")
    whole = results_of(tmp_path / "run")["pruning"][0]["evaluations"][0]
    own = json.loads((learned / "results.json").read_text())["evaluations"][0]
    assert whole == pytest.approx({name: own[name] for name in whole})


def test_the_term_goes_without_which_the_loss_of_trials_is_smallest(tmp_path, learned):
    losses = {}
    for candidates in (1, 13):
        out = tmp_path / str(candidates)
        flags = [*FAST, "--try_below", 13, "--candidates", candidates, "--terms", 12, "--quiet"]
        run(learned, *flags, "--out", out)
        losses[candidates] = float((out / "metrics.csv").read_text().split(",")[-1])
    assert losses[13] <= losses[1]


def test_a_run_killed_and_resumed_ends_as_one_never_killed(tmp_path, learned):
    flags = [str(learned), *FAST, "--terms", "7", "2", "--try_below", "13", "--quiet"]
    run(*flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    kill_at_row(3, "prune_rule.py", *flags, "--out", out)
    run("--resume", tmp_path / "killed", "--quiet")
    for name in ("metrics.csv", "results.json", "rule.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_run_does_not_go_on_with_another_rule(tmp_path, learned, capsys):
    copy, out = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(learned, copy)
    run(copy, *FAST, "--terms", 12, "--try_below", 0, "--quiet", "--out", out)
    results = results_of(copy)
    results["initializer"]["spread_w"] *= 2
    (copy / "results.json").write_text(json.dumps(results))
    assert "run_found" in refused(capsys, prune_rule.main, "--resume", out, "--quiet")


def test_an_interrupted_run_reports_what_it_has_with_status_130(tmp_path, learned):
    flags = ["--terms", 12, 2, "--try_below", 13, "--candidates", 13, "--trials", 2, "--quiet"]
    out = tmp_path / "run"
    interrupt_at_row(1, prune_rule.main, learned, *FAST, *flags, "--out", out)
    assert results_of(tmp_path / "run")["pruning"][0]["terms"] == 13


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--terms", 0], "at least 1"),
        (["--terms", 13, 70], "13 terms"),
        (["--tolerance", -1], "at least 0"),
        (["--batch_size", 64], "unrecognized"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, tmp_path, learned, flags, message):
    flags = [*FAST, *flags, "--out", tmp_path / "run"]
    assert message in refused(capsys, prune_rule.main, learned, *flags)
    assert not (tmp_path / "run").exists()


def test_what_is_no_finished_run_of_main_is_refused(capsys, tmp_path, learned):
    assert "not a run's directory" in refused(capsys, prune_rule.main, tmp_path, *FAST)
    with RunLog.create(tmp_path / "other", {"command": "baseline_pca"}, quiet=True) as log:
        assert "main.py" in refused(capsys, prune_rule.main, log.directory, *FAST)


def test_a_shortened_rule_can_be_shortened_further(tmp_path, learned):
    run(learned, *FAST, "--terms", 12, "--quiet", "--out", tmp_path / "pruned")
    run(tmp_path / "pruned", *FAST, "--terms", 5, "--quiet", "--out", tmp_path / "again")
    assert results_of(tmp_path / "again")["shortest"] == 5


def test_the_shortest_rule_can_be_judged_and_keeps_the_images_it_was_learned_on(tmp_path, learned):
    out = tmp_path / "run"
    flags = [flag for flag in FAST if flag not in ("--dataset", "mnist5k")]
    run(learned, *flags, "--terms", 6, "--quiet", "--out", out)
    assert read_config(out)["dataset"] == "mnist5k"
    short = load_run(out)
    assert short.steps == 3 and short.config["layers"] == [4]
    assert short.rule.coefficients() == load_rule(out / "rule.json").coefficients()
