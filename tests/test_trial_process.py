"""Which trials are ended at a rung, and which number is read from a run's results."""

import json
import math
from collections import defaultdict

import numpy as np
import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner

from sweeps.trial import RefusedCommand, Rungs, Worker, read_value


def write_metrics(directory, losses) -> None:
    rows = [f"{step},{loss!r}" for step, loss in enumerate(losses, 1)]
    (directory / "metrics.csv").write_text("\n".join(["step,loss", *rows, "9"]))  # half a row


def new_study(rungs: Rungs, direction: str = "minimize") -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = SuccessiveHalvingPruner(rungs.first, reduction_factor=rungs.reduction)
    return optuna.create_study(pruner=pruner, direction=direction)


def a_worker(study, directory) -> Worker:
    return Worker(study.ask(), None, None, directory, 0.0)


def ended_at(rungs: Rungs, worker: Worker, losses) -> int | None:
    """The step at which a trial is ended whose metrics are looked at after each row."""
    for step in range(1, len(losses) + 1):
        write_metrics(worker.directory, losses[:step])
        if rungs.compare(worker):
            return step
    return None


def expected_ends(rungs: Rungs, trials, better) -> list[int | None]:
    """By the rule itself: at each rung, the best 1 / reduction of those seen there go on."""
    seen, ends = defaultdict(list), []
    for losses in trials:
        end = None
        for step in (rungs.first * rungs.reduction**i for i in range(20)):
            if step > len(losses):
                break
            seen[step].append(losses[step - 1])
            kept = max(1, len(seen[step]) // rungs.reduction)
            if losses[step - 1] not in sorted(seen[step], reverse=better == "maximize")[:kept]:
                end = step
                break
        ends.append(end)
    return ends


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("rungs", [Rungs("loss", 1, 2), Rungs("loss", 3, 4)], ids=str)
def test_trials_are_ended_as_the_rule_of_successive_halving_says(tmp_path, rungs, direction):
    trials = np.random.default_rng(0).random((25, 16)).tolist()
    study = new_study(rungs, direction)
    ends = [ended_at(rungs, a_worker(study, tmp_path), losses) for losses in trials]
    assert ends == expected_ends(rungs, trials, direction)
    assert None in ends and len(set(ends)) > 2


def test_rungs_passed_between_two_looks_are_made_up_for(tmp_path):
    rungs = Rungs("loss", 1, 2)
    trials = np.random.default_rng(1).random((20, 8)).tolist()
    study, ended = new_study(rungs), []
    for losses in trials:
        write_metrics(tmp_path, losses)
        ended.append(rungs.compare(a_worker(study, tmp_path)))
    assert ended == [end is not None for end in expected_ends(rungs, trials, "minimize")]


def test_a_value_that_was_not_measured_waits_for_the_next(tmp_path):
    rungs = Rungs("loss", 1, 2)
    study = new_study(rungs)
    assert ended_at(rungs, a_worker(study, tmp_path), [0.5, 0.5, 0.5]) is None
    assert ended_at(rungs, a_worker(study, tmp_path), [math.nan, math.nan, 0.7]) == 3


def test_a_value_that_is_infinite_is_worse_than_any_other(tmp_path):
    rungs = Rungs("loss", 1, 2)
    study = new_study(rungs)
    assert ended_at(rungs, a_worker(study, tmp_path), [0.5, 0.5, 0.5]) is None
    assert ended_at(rungs, a_worker(study, tmp_path), [math.inf, math.inf]) == 1


def test_a_trial_that_has_written_nothing_yet_goes_on_and_a_wrong_column_is_refused(tmp_path):
    worker = a_worker(new_study(Rungs("loss", 1, 2)), tmp_path)
    assert not Rungs("loss", 1, 2).compare(worker)
    write_metrics(tmp_path, [1.0])
    with pytest.raises(RefusedCommand, match=r"--watch accuracy: metrics\.csv has loss"):
        Rungs("accuracy", 1, 2).compare(worker)


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("a", 1.0, ""),
        ("b.c.1", 3.0, ""),
        ("b.c.7", None, "has no b.c.7"),
        ("b.d", None, "has no b.d: it has c"),
        ("a.b", None, "has no a.b"),
        ("text", None, "'low', not a number"),
        ("yes", None, "True, not a number"),
        ("none", math.nan, "none is null"),
        ("infinite", math.inf, "infinite is inf"),
    ],
)
def test_a_dotted_key_names_a_number_of_the_results(tmp_path, metric, value, said):
    results = {"a": 1, "b": {"c": [2, 3.0]}, "text": "low", "yes": True, "none": None}
    (tmp_path / "results.json").write_text(json.dumps(results | {"infinite": math.inf}))
    found, error = read_value(tmp_path, metric)
    assert found == value or (math.isnan(value) and math.isnan(found))
    assert said in error and bool(said) == bool(error)


def test_results_that_are_not_there_or_damaged_are_told(tmp_path):
    assert "can't read" in read_value(tmp_path, "a")[1]
    (tmp_path / "results.json").write_text('{"a": 1')
    assert "damaged" in read_value(tmp_path, "a")[1]
