"""Files that were changed at random: read, or refused in one line; never anything else."""

import argparse
import contextlib
import gzip
import io
import json

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tune_one_pass
from data_sets import cifar10
from experiment.errors import RunLogError, WrongInputError
from experiment.run_log import RunLog
from experiment.run_reader import read_arrays, read_config, read_metrics
from experiment.yaml_settings import add_keys, parse_settings
from learned_optimizer import CoordinateLSTM, OptimizerError, load_network, network_to_dict
from learning_rules import PerLayerRule, classical_rule
from mnist_datasets import parse_idx, read_idx
from rules import load_rule, rule_from_dict

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)

RULE = PerLayerRule([classical_rule("oja", 0.1), classical_rule("foldiak", 0.1)]).to_dict()
OPTIMIZER = network_to_dict(CoordinateLSTM())


@st.composite
def changed(draw, tree):
    """`tree` with one of its values replaced, dropped or renamed, somewhere."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    key = draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
    if isinstance(tree, dict) and draw(st.booleans()):
        value = tree.pop(key)
        if draw(st.booleans()):
            tree[draw(st.text(max_size=5))] = value
    else:
        tree[key] = draw(changed(tree[key]))
    return tree


@st.composite
def damaged(draw, content):
    """`content` cut off, or with some of its bytes overwritten."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content) - 1))]
    place = draw(st.integers(0, len(content) - 1))
    return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + 4 :]


refused = contextlib.suppress(WrongInputError, OptimizerError)


@quick
@given(changed(RULE))
def test_a_changed_rule_is_read_or_refused(description):
    with refused:
        rule_from_dict(description)


@quick
@given(damaged(json.dumps(RULE).encode()))
def test_a_damaged_rule_file_is_read_or_refused(tmp_path, content):
    (tmp_path / "rule.json").write_bytes(content)
    with refused:
        load_rule(tmp_path / "rule.json")


@quick
@given(changed({**OPTIMIZER, "weights": {n: w[:1] for n, w in OPTIMIZER["weights"].items()}}))
def test_a_changed_learned_optimizer_is_refused(tmp_path, description):
    (tmp_path / "optimizer.json").write_text(json.dumps(description))
    with pytest.raises(OptimizerError):
        load_network(tmp_path / "optimizer.json")


SETTINGS = {
    "dataset": "energy",
    "batch_size": 5,
    "optimised_hyperparameters": ["lr"],
    "hyperparameter_clipping": {"lr": [-10, 0]},
    "chain_rule": True,
}


def read_settings(path):
    parser = argparse.ArgumentParser()
    add_keys(parser, tune_one_pass.KEYS)
    parse_settings(parser, tune_one_pass.KEYS, ["-c", str(path)])


@quick
@given(changed(SETTINGS).map(yaml.safe_dump).map(str.encode) | st.binary(max_size=40))
def test_changed_settings_are_read_or_refused(tmp_path, content):
    (tmp_path / "settings.yaml").write_bytes(content)
    with refused:
        read_settings(tmp_path / "settings.yaml")


IDX = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + bytes(range(24))


@quick
@given(damaged(IDX))
def test_a_damaged_idx_file_is_read_whole_or_refused(content):
    with refused:
        assert parse_idx(content).numel() == len(content) - 16 or content[3] != 3


@quick
@given(damaged(gzip.compress(IDX)))
def test_a_damaged_gzipped_idx_file_is_refused(tmp_path, content):
    (tmp_path / "images.gz").write_bytes(content)
    with refused:
        assert read_idx(tmp_path / "images.gz").shape == (2, 3, 4)


@quick
@given(damaged(bytes(3073 * 2)))
def test_a_damaged_file_of_colour_images_is_read_whole_or_refused(tmp_path, content):
    (tmp_path / "batch.bin").write_bytes(content)
    with refused:
        images, labels = cifar10.read_binary(tmp_path / "batch.bin")
        assert len(images) == len(labels) == len(content) // 3073


@quick
@given(damaged(b"step,loss\n0,1.5\n1,0.25\n2,inf\n"), damaged(b'{"command": "main"}'))
def test_a_damaged_run_is_read_or_refused(tmp_path, metrics, config):
    (tmp_path / "metrics.csv").write_bytes(metrics)
    (tmp_path / "config.json").write_bytes(config)
    with refused:
        read_metrics(tmp_path)
    with refused:
        read_config(tmp_path)


def npz(save, **arrays) -> bytes:
    content = io.BytesIO()
    save(content, **arrays)
    return content.getvalue()


NPZ = npz(np.savez, losses=np.arange(20.0), edges=np.ones((2, 3)))
COMPRESSED = npz(np.savez_compressed, losses=np.arange(20.0))


@quick
@given(damaged(NPZ) | damaged(COMPRESSED) | st.binary(max_size=40))
@example(b"")
@example(NPZ[:10])
@example(NPZ[30:])  # what numpy takes for an array, not for a file of several
def test_a_damaged_file_of_arrays_is_read_or_refused_in_one_line(tmp_path, content):
    (tmp_path / "draws.npz").write_bytes(content)
    try:
        read_arrays(tmp_path / "draws.npz")
    except RunLogError as error:
        assert "draws.npz is damaged: " in str(error) and "\n" not in str(error)


@quick
@given(st.data())
def test_a_damaged_checkpoint_is_never_half_read(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("run") / "run"
    with RunLog.create(directory, {}, quiet=True) as log:
        for step in range(2):
            log.record(step, {"loss": 1.0})
            log.save_checkpoint(step, {"values": list(range(20))})
    content = (directory / "checkpoint.pt").read_bytes()
    (directory / "checkpoint.pt").write_bytes(data.draw(damaged(content)))
    with RunLog.reopen(directory, quiet=True) as log:
        step, state = log.load_checkpoint()
    assert step in (0, 1) and state == {"values": list(range(20))}
    assert np.array_equal(read_metrics(directory)["step"], np.arange(step + 1))
