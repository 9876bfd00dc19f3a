"""The rule against the layers' own update, its gradient against differences, its commands."""

import json
import math
from pathlib import Path

import pytest
import torch
from commands import outcome, refused, rows
from forked import Command

import evaluate
import main
import prune_rule
from experiment.command_line import run_command
from initializers import FIXED, GaussianInitializer
from krotov_hopfield import BioConv2d, BioLinear
from learning_rules import PerLayerRule, RuleError
from meta_gradients import METHODS, Forward, LookBack, Reverse, Truncated
from models_fully_local import Activation, LateralConv2d, lateral_mlp, lateral_network
from rules import load_rule, rule_from_dict, save_rule
from rules.competing_units import KrotovHopfieldRule
from train import MEMORY, Draw, Training, train

GATES = ("ranked", "losers", "soft", "winner")
LINEAR = Activation("identity")
TINY = [
    "--dataset", "mnist5k", "--metasteps", "3", "--initial_inner_steps", "4", "--max_inner_steps",
    "4", "--batch_size", "64", "--evaluations", "1", "--warmup_steps", "1", "--lr", "0.1",
    "--threads", "1", "--beside", "--quiet", "--rule", "krotov_hopfield",
]  # fmt: skip


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rule_with(gate: str, p: float = 2, normalization: str = "matrix", **options):
    return KrotovHopfieldRule(
        0.07, delta=0.3, inverse_temperature=1.5, gate=gate, ranking_param=3, lebesgue_p=p,
        normalization=normalization, **options,
    ).double()  # fmt: skip


def layer_options(gate: str, p: float, normalization: str) -> dict:
    return {
        "bias": True, "delta": 0.3, "ranking_param": 3, "lebesgue_p": p, "gate": gate,
        "normalization": normalization, "inverse_temperature": 1.5, "batch_norm": False,
        "dtype": torch.float64,
    }  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("normalization", ["matrix", "filter", "clamp"])
def test_the_rule_makes_the_step_of_a_fully_connected_layer(gate, p, normalization):
    model = lateral_mlp(7, [5], LINEAR, inhibition="none")
    layer = BioLinear(7, 5, **layer_options(gate, p, normalization))
    layer.reset_parameters(torch.Generator().manual_seed(1))
    params = [{}, {"w": layer.weight.clone(), "b": layer.bias.clone()}]
    x = noise(6, 7)
    new = rule_with(gate, p, normalization).update(model, params, x)[1]
    layer.training_step(x, 0.07)
    torch.testing.assert_close(new["w"], layer.weight, rtol=1e-6, atol=1e-8)  # rate is exp(float)
    torch.testing.assert_close(new["b"], layer.bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_the_rule_makes_the_step_of_a_convolution(gate, stride, padding):
    place = {"stride": stride, "padding": padding}
    layer = BioConv2d(2, 5, 3, **place, **layer_options(gate, 3, "filter"))
    layer.reset_parameters(torch.Generator().manual_seed(1))
    params = [{"w": layer.weight.clone(), "b": layer.bias.clone()}]
    model = torch.nn.Module()
    model.layers = [LateralConv2d(2, 5, 3, LINEAR, inhibition="none", **place)]
    x = noise(4, 2, 6, 5)
    new = rule_with(gate, 3, "filter").update(model, params, x)[0]
    layer.training_step(x, 0.07)
    torch.testing.assert_close(new["w"], layer.weight.contiguous(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(new["b"], layer.bias, rtol=1e-6, atol=1e-8)


def two_layers():
    model = lateral_network((1, 6, 6), [4], Activation("sigmoid"), convolutions=[(4, 3)])
    initializer = GaussianInitializer({}, dict.fromkeys("wbm", FIXED), {"b": 1, "m": 1}).double()
    return model, initializer(model, torch.Generator().manual_seed(2))


def test_lateral_weights_and_the_parameters_given_stay_as_they_are():
    model, params = two_layers()
    before = [{name: t.clone() for name, t in layer.items()} for layer in params]
    new = rule_with("ranked").update(model, params, noise(3, 1, 6, 6))
    for layer, old, fresh in zip(params, before, new, strict=True):
        assert all(torch.equal(layer[name], old[name]) for name in old)
        if old:
            assert torch.equal(fresh["m"], old["m"]) and not torch.equal(fresh["w"], old["w"])


def loss_after(rule, memory: str = "keep", steps: int = 3) -> torch.Tensor:
    model, params = two_layers()
    batches = iter([noise(5, 1, 6, 6, seed=seed) for seed in range(steps)])
    new = train(model, params, batches, rule, steps, memory=memory)
    return model(noise(5, 1, 6, 6, seed=9), new).square().sum()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("p", [2, 3])
def test_the_gradient_through_a_training_is_that_of_finite_differences(gate, p):
    rule = rule_with(gate, p)
    trained = [q for q in rule.parameters() if q.requires_grad]
    gradient = torch.autograd.grad(loss_after(rule), trained)
    for parameter, slope in zip(trained, gradient, strict=True):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6
                losses.append(loss_after(rule).item())
                parameter -= sign * 1e-6
        assert slope.item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("gate", ["ranked", "soft"])
def test_every_memory_policy_gives_the_same_gradient(gate):
    rule = rule_with(gate)
    trained = [q for q in rule.parameters() if q.requires_grad]
    kept = torch.autograd.grad(loss_after(rule, "keep", 5), trained)
    for memory in MEMORY:
        again = torch.autograd.grad(loss_after(rule, memory, 5), trained)
        torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [Forward(), Truncated(K=4), LookBack(K=2)])
def test_other_methods_take_the_rule_and_those_that_are_exact_agree(method):
    model = lateral_mlp(6, [4], LINEAR, inhibition="none")
    initializer = GaussianInitializer({}, {"w": FIXED}).double()

    def gradient(way) -> list[torch.Tensor]:
        training = Training(
            model,
            PerLayerRule([rule_with("ranked")]),
            initializer,
            lambda generator: iter([noise(5, 6, seed=seed) for seed in range(4)]),
            lambda model, params, generator: (params[1]["w"].square().sum(), {}),
        )
        return way(training, Draw((1,), 4)).gradient

    found = gradient(method)
    assert all(g.isfinite().all() for g in found)
    if not isinstance(method, LookBack):
        torch.testing.assert_close(found, gradient(Reverse()), rtol=1e-9, atol=1e-12)


def test_only_parameters_that_the_gate_depends_on_are_learned():
    learned = {
        gate: {name for name, q in rule_with(gate).named_parameters() if q.requires_grad}
        for gate in GATES
    }
    assert learned == {
        "ranked": {"log_rate", "delta"},
        "losers": {"log_rate", "delta"},
        "soft": {"log_rate", "log_inverse_temperature"},
        "winner": {"log_rate"},
    }
    assert rule_with("soft").coefficients() == {
        "w/rate": pytest.approx(0.07), "w/inverse_temperature": pytest.approx(1.5),
    }  # fmt: skip


def test_a_saved_rule_is_read_as_it_was(tmp_path):
    rule = PerLayerRule([rule_with("soft", 3, "filter"), rule_with("ranked")])
    save_rule(rule, tmp_path / "rule.json")
    other = load_rule(tmp_path / "rule.json")
    assert other.to_dict() == rule.to_dict() and other.formula() == rule.formula()
    other.rules[0].start_from(rule.rules[0])
    with pytest.raises(RuleError, match="the same gate"):
        other.rules[0].start_from(rule.rules[1])
    with pytest.raises(RuleError, match="not the description"):
        rule_from_dict({"kind": "KrotovHopfieldRule", "gate": "ranked"})


def test_the_formula_says_all_that_the_rule_is():
    text, tex = rule_with("ranked", 3).formula(), rule_with("ranked", 3).tex()
    assert "D_oi / (max_oi |D_oi| + 1e-5)" in text and "|w_oi|^(p-1) x_bi" in text
    assert "-delta for the k-th largest" in text and "k = 3, p = 3; rate 0.07, delta 0.3" in text
    assert r"\text{gate ranked}, k = 3, p = 3, \eta = \text{0.07}" in tex
    soft = rule_with("soft", 2, "clamp")
    for shown in (soft.formula(), soft.tex()):
        assert "k = " not in shown and "delta" not in shown.replace("\\Delta", "")
    assert "max(max_oi |D_oi|, 1e-30)" in soft.formula() and r"\beta = \text{1.5}" in soft.tex()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0: it must be a finite number above 0"),
        ({"inverse_temperature": math.nan}, "finite number above 0"),
        ({"delta": math.inf}, "delta is inf: it must be a finite number"),
        ({"gate": "loud"}, "choose from ranked"),
        ({"ranking_param": 1}, "from 2"),
        ({"lebesgue_p": 0.5}, "at least 1"),
        ({"normalization": "none"}, "choose from matrix"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(RuleError, match=message):
        KrotovHopfieldRule(**{"rate": 0.1} | options)


def test_fewer_units_than_the_rule_ranks_are_refused():
    model = lateral_mlp(6, [2], LINEAR, inhibition="none")
    params = [{}, {"w": noise(2, 6), "b": noise(2)}]
    with pytest.raises(RuleError, match="from 2, the runner-up, to 2"):
        rule_with("ranked").update(model, params, noise(3, 6))


# ---- the commands ----


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A run of main.py that tunes the rule of six units."""
    out = tmp_path_factory.mktemp("learned") / "run"
    main.main([*TINY, "6", "--out", str(out)])
    return out


def test_main_learns_rate_and_delta_and_writes_the_rule(learned):
    table = rows(learned)
    for name in ("rate", "delta"):
        values = [float(row[f"coefficient/1/w/{name}"]) for row in table]
        assert len(set(values)) == 3 and all(map(math.isfinite, values))
    assert json.loads((learned / "rule.json").read_text())["rules"][0]["gate"] == "ranked"
    assert "gate ranked, k = 2, p = 2; rate" in (learned / "rule.txt").read_text()
    assert (learned / "figures" / "coefficients.png").exists()


def test_main_goes_on_with_such_a_run_as_if_never_left_and_starts_from_it(learned, tmp_path):
    short = [flag if flag != "3" else "1" for flag in TINY]
    main.main([*short, "6", "--no_figures", "--out", str(tmp_path / "run")])
    assert rows(tmp_path / "run") == rows(learned)[:1]
    main.main(["--resume", str(learned), "--quiet", "--no_figures"])
    assert len(outcome(learned)[0]) == 3
    main.main(
        [*short, "5", "--no_figures", "--start_from", str(learned), "--out", str(tmp_path / "next")]
    )
    started = rows(tmp_path / "next")[0]
    rule = load_rule(learned / "rule.json").rules[0]
    assert float(started["coefficient/1/w/delta"]) == pytest.approx(rule.delta.item())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"reverse"}))
def test_main_takes_the_rule_with_every_method(method, tmp_path):
    flags = ["4", "--method", method, "--gate", "soft", "--inhibition", "none"]
    main.main([*TINY, *flags, "--no_figures", "--out", str(tmp_path / "run")])
    values = [float(row["coefficient/1/w/inverse_temperature"]) for row in rows(tmp_path / "run")]
    assert all(map(math.isfinite, values))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pair_inputs"], "needs --rule polynomial"),
        (["--sparsify"], "needs --rule polynomial"),
        (["--l1_reg", "1"], "needs --rule polynomial"),
        (["--compile"], "needs --rule polynomial"),
        (["--ranking_param", "5"], "to 4, the number of units"),
        (["--ranking_param", "4", "--conv", "3x5"], "to 3, the number of units"),
        (["--ranking_param", "4", "--units_range", "3", "9"], "to 3, the number of units"),
        (["--lebesgue_p", "0.5"], "at least 1"),
        (["--gate", "winner", "--delta", "0.1"], "--delta needs --gate ranked or losers"),
        (["--inverse_temperature", "2"], "--inverse_temperature needs --gate soft"),
        (["--gate", "soft", "--ranking_param", "4"], "--ranking_param needs --gate ranked"),
    ],
)
def test_main_refuses_what_the_rule_does_not_take(capsys, tmp_path, flags, message):
    line = refused(capsys, main.main, *TINY, 4, *flags, "--out", tmp_path / "run")
    assert message in line and not (tmp_path / "run").exists()


def test_evaluate_compares_with_the_rule_and_judges_a_learned_one(learned, tmp_path):
    out = tmp_path / "evaluated"
    flags = [learned, "--steps", 4, "--seeds", 1, "--rules", "krotov_hopfield", "oja", "--quiet",
             "--threads", 1, "--out", out]  # fmt: skip
    run_command(evaluate.main, [*map(str, flags)])
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert {row["method"] for row in summary} == {"run", "krotov_hopfield", "oja"}
    assert all(row["finite"] == 1 for row in summary)


def test_plot_shows_such_a_rule_beside_a_classical_one(learned, tmp_path):
    out = tmp_path / "rules.png"
    process = Command("plot.py", "rules", learned, "--classical", "oja", "--quiet", "--out", out)
    assert process.wait(120) == 0 and out.stat().st_size > 1000  # alone: nothing else imports it


def test_pruning_such_a_run_is_refused(capsys, learned, tmp_path):
    line = refused(capsys, prune_rule.main, learned, "--out", tmp_path / "pruned")
    assert "no terms to remove" in line
