"""The real command on run directories that hold next to nothing."""

import json

import pytest
from PIL import Image

import plot
from experiment.command_line import run_command
from experiment.run_log import RunLog
from learning_rules import PerLayerRule, PolynomialRule, classical_rule
from rules import write_rule


def run_of(directory, *rules, effects=None, command="main"):
    """A run's directory with a rule and, if given, the effects of its terms."""
    with RunLog.create(directory, {"command": command}, quiet=True) as log:
        write_rule(log, PerLayerRule(rules))
        if effects is not None:
            log.write_json("results.json", {"term_effects": effects})
    return directory


def oja(rate=1.0):
    return classical_rule("oja", rate)


def draw(*flags):
    plot.main([*map(str, flags)])


def columns_of(monkeypatch, *flags):
    """What is drawn by `plot.py rules`, by the name of its column."""
    drawn = {}
    monkeypatch.setattr(plot, "plot_rules", lambda rules, path, what: drawn.update(rules, by=what))
    draw("rules", *flags)
    return drawn


def refused(capsys, *flags) -> str:
    """The one line on stderr with which the command ends, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(plot.main, [*map(str, flags)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_rules_of_runs_and_classical_ones_make_one_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [run_of(tmp_path / name, oja()) for name in ("a", "b")]
    draw("rules", *runs, "--classical", "oja", "foldiak", "anti-hebbian")
    drawn = tmp_path / "a" / "figures" / "rules.png"
    assert capsys.readouterr().out == f"{drawn}\n"
    with Image.open(drawn) as image:
        assert min(image.size) > 300
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_rows_that_are_not_those_of_the_checkpoint_are_not_drawn(tmp_path, capsys):
    with RunLog.create(tmp_path / "run", {"command": "main"}, quiet=True) as log:
        log.record(1, {"meta_loss": 0.5})
        log.save_checkpoint(1, {})
    draw("run", log.directory)
    log.path("metrics.csv").write_text("step,meta_loss\n1,0.6\n")
    assert "metrics.csv is damaged" in refused(capsys, "run", log.directory)


def test_figures_are_not_drawn_through_a_link(tmp_path, capsys):
    with RunLog.create(tmp_path / "run", {"command": "main"}, quiet=True) as log:
        log.record(1, {"meta_loss": 0.5})
    (tmp_path / "victim").mkdir()
    log.path("figures").symlink_to(tmp_path / "victim")
    assert "figures is a symbolic link" in refused(capsys, "run", log.directory)
    assert not [*(tmp_path / "victim").iterdir()]


def test_a_run_is_drawn_again(tmp_path, capsys):
    directories = [run_of(tmp_path / name, oja()) for name in ("a", "b")]
    for directory in directories:
        (directory / "metrics.csv").write_text("step,meta_loss\n1,0.5\n2,0.25\n")
    draw("run", *directories)
    expected = [directory / "figures" / "meta_loss.png" for directory in directories]
    assert capsys.readouterr().out.split() == [str(path) for path in expected]
    assert all(path.stat().st_size > 1000 for path in expected)
    draw("run", *directories, "--quiet")
    assert capsys.readouterr().out == ""


def test_columns_are_named_by_run_layer_and_where_names_repeat_by_path(tmp_path, monkeypatch):
    one = run_of(tmp_path / "one", oja(0.5))
    two = run_of(tmp_path / "two", oja(), classical_rule("instar", 2.0))
    other = run_of(tmp_path / "elsewhere" / "one", oja())
    drawn = columns_of(monkeypatch, one, two, "--classical", "hebb")
    assert list(drawn) == ["one", "two, layer 1", "two, layer 2", "hebb (classical)", "by"]
    assert drawn["one"] == {"w/x y": 0.5, "w/y^2 w": -0.5}
    assert drawn["two, layer 2"] == {"w/x y": 2.0, "w/y w": -2.0}
    assert drawn["by"] == "coefficient"
    assert str(other) in columns_of(monkeypatch, one, other)


def test_effects_have_the_signs_of_the_coefficients(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", oja(0.1), effects={"1/w/x y": 3.0, "1/w/y^2 w": 0.25})
    drawn = columns_of(monkeypatch, run)
    assert drawn == {"run": {"w/x y": 3.0, "w/y^2 w": -0.25}, "by": "effect"}
    assert columns_of(monkeypatch, run, "--by", "coefficient")["run"]["w/x y"] == pytest.approx(0.1)


def test_a_classical_rule_has_the_effects_that_its_terms_have_in_the_first_run_with_them(
    tmp_path, monkeypatch
):
    lacking = PolynomialRule({"w": [(0, 0, 0, 0)]})
    first = run_of(tmp_path / "first", lacking, effects={"1/w/1": 0.0})
    second = run_of(tmp_path / "second", oja(0.5), effects={"1/w/x y": 2.0, "1/w/y^2 w": 0.25})
    drawn = columns_of(monkeypatch, first, second, "--classical", "oja", "hebb")
    assert drawn["oja (classical)"] == {"w/x y": 4.0, "w/y^2 w": -0.5}
    assert drawn["hebb (classical)"] == {"w/x y": 4.0}


def test_coefficients_are_drawn_where_a_run_tells_no_effects(tmp_path, monkeypatch):
    effects = {"1/w/x y": 2.0, "1/w/y^2 w": 0.25}
    runs = run_of(tmp_path / "a", oja(), effects=effects), run_of(tmp_path / "b", oja())
    assert columns_of(monkeypatch, *runs)["by"] == "coefficient"


def test_wrong_input_is_refused_in_one_line(tmp_path, capsys):
    run, empty = run_of(tmp_path / "run", oja()), tmp_path / "empty"
    empty.mkdir()
    effects = {"1/w/x y": 2.0, "1/w/y^2 w": 0.25}
    told = run_of(tmp_path / "told", oja(), effects=effects)
    for flags, message in (
        ([], "FIGURE"),
        (["portrait"], "portrait"),
        (["rules"], "RUN"),
        (["run", empty], "not a run's directory"),
        (["run", tmp_path / "absent"], "not a run's directory"),
        (["rules", empty], "rule.json"),
        (["rules", run, "--classical", "ojas"], "choose from hebb, oja"),
        (["rules", run, "--by", "effect"], "--by coefficient"),
        (["rules", told, "--classical", "instar"], "--by coefficient"),
        (["rules", run, "--out", run / "config.json" / "rules.png"], "can't write"),
        (["rules", run, "--seed", "1"], "--seed"),
        (["rules", run, "--out", "rules.xyz"], "must end in .png, not 'rules.xyz'"),
    ):
        assert message in refused(capsys, *flags), flags
    assert not (empty / "figures").exists()


def test_a_run_of_a_command_without_figures_is_refused_and_none_is_drawn(tmp_path, capsys):
    known = run_of(tmp_path / "known", oja())
    (known / "metrics.csv").write_text("step,meta_loss\n1,0.5\n")
    for command in ("other", ["main"], None):
        other = run_of(tmp_path / str(command), oja(), command=command)
        line = refused(capsys, "run", known, other)
        assert f"is a run of {command}; there are figures of main, find_oja" in line
    assert not (known / "figures").exists()


def test_a_run_that_lacks_what_its_figures_show_is_one_line(tmp_path, capsys):
    for command in (
        "baseline_pca",
        "evaluate",
        "imaml",
        "logistic_regression",
        "omniglot",
        "train_krotov_hopfield",
        "tune_one_pass",
        "sweep",
    ):
        run = run_of(tmp_path / command, oja(), effects={}, command=command)
        assert command in refused(capsys, "run", run)


@pytest.mark.parametrize(
    ("results", "figure", "said"),
    [
        ({"term_effects": [1]}, "rules", "term_effects is no table"),
        ({"term_effects": {"1/w/x y": "large"}}, "rules", "term_effects of 1/w/x y"),
        ({"beside": [1]}, "run", "no whole run of main.py"),
        ({"beside": {"mnist5k": {"pca": ["a"]}}}, "run", "no whole run of main.py"),
        ({"pruning": [{"terms": "a"}]}, "run", "no whole run of main.py"),
    ],
)
def test_results_of_another_form_are_one_line(tmp_path, capsys, results, figure, said):
    run = run_of(tmp_path / "run", oja())
    (run / "results.json").write_text(json.dumps({"evaluations": []} | results))
    assert said in refused(capsys, figure, run)


def test_effects_that_were_not_finite_are_unknown(tmp_path, monkeypatch):
    for name, effects in (("none", None), ("some", {"1/w/x y": None, "1/w/y^2 w": None})):
        run = run_of(tmp_path / name, oja())
        (run / "results.json").write_text(json.dumps({"term_effects": effects}))
        assert columns_of(monkeypatch, run)["by"] == "coefficient"


def test_damaged_results_are_one_line(tmp_path, capsys):
    run = run_of(tmp_path / "run", oja())
    for content in ("{", "[]", 100_000 * "["):
        (run / "results.json").write_text(content)
        for figure in ("rules", "run"):
            assert "results.json is damaged" in refused(capsys, figure, run)
    (run / "results.json").write_text(json.dumps({"term_effects": {}}))
    draw("rules", run, "--out", tmp_path / "rules.png")


def test_rules_of_the_zoo_are_drawn_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path / "run", oja())
    assert {"polynomial-8", "run"} < columns_of(monkeypatch, "polynomial-8", run).keys()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    draw("rules", "mnist32")
    assert [path.name for path in tmp_path.glob("*.png")] == ["rules.png"]
    assert "take --by coefficient" in refused(capsys, "rules", "mnist32", "--by", "effect")
    line = refused(capsys, "rules", "mnist32", "oja")
    assert "there is no oja; rules of the zoo are competing" in line and "--classical" in line
