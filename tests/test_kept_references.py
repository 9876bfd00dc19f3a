"""References kept on disk: the same numbers, never those of anything else, no trust in files."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from comparison import kept_references
from comparison.kept_references import KeptReferences
from comparison.references import beside
from comparison.rule_comparison import Setting
from mnist_datasets import image_data

AMOUNT = {"draws": 2, "steps": 2, "seed": 0}


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Setting:
    """Small images, and a folder of one's own for what is kept."""
    monkeypatch.setattr(kept_references, "FOLDER", tmp_path / "kept")
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, 256, dtype=torch.uint8, generator=generator)
    train, test = (
        image_data(draw((count, 3, 3)), [*range(3)] * (count // 3)) for count in (60, 30)
    )
    return Setting("noise", train, test, layers=(2,), C=10.0, outer_images=20, batch_size=20)


def count_and_judge(setting, names=("oja", "pca"), **amount) -> tuple[int, dict]:
    """How many calls of advance there were, and the accuracies."""
    calls, amount = [], AMOUNT | amount
    kept = KeptReferences(setting, **amount)
    found = beside(names, None, setting, **amount, kept=kept, advance=lambda: calls.append(1))
    return len(calls), found


def test_what_was_kept_is_what_would_be_computed(setting, monkeypatch):
    computed = beside(["oja", "pca"], None, setting, **AMOUNT)
    assert count_and_judge(setting) == (7, computed)  # three rates of oja, and two draws of each
    assert len([*kept_references.FOLDER.iterdir()]) == 2
    monkeypatch.setattr("comparison.references._method", None)  # nothing is computed again
    assert count_and_judge(setting) == (7, computed)
    assert [*count_and_judge(setting, ["pca", "oja"])[1]] == ["pca", "oja"]


def test_whatever_the_numbers_depend_on_changes_the_file(setting, monkeypatch):
    def file(setting=setting, name="oja", **amount):
        return KeptReferences(setting, **AMOUNT | amount).path(name)

    def with_one_changed(data, attribute):
        tensor = getattr(data, attribute).clone()
        tensor.view(-1)[7] = (tensor.view(-1)[7] + 1) % 3
        return replace(data, **{attribute: tensor})

    files = [file(), file(name="pca"), file(draws=3), file(steps=3), file(seed=1)]
    for part in ("train", "test"):
        data = getattr(setting, part)
        for attribute in ("images", "labels"):
            files.append(file(replace(setting, **{part: with_one_changed(data, attribute)})))
        files.append(file(replace(setting, **{part: replace(data, scale=torch.tensor(2.0))})))
    for changed in ({"layers": (3,)}, {"C": 1.0}, {"outer_images": 19}, {"batch_size": 19},
                    {"dtype": torch.float64}, {"layerwise": True}):  # fmt: skip
        files.append(file(replace(setting, **changed)))
    for target, value in (
        ("comparison.kept_references.SOURCES", "other"), ("torch.__version__", "1.0"),
        ("comparison.kept_references.version", lambda name: "1.0"),
        ("comparison.kept_references._processor", lambda: "another"),
        ("torch.get_num_threads", lambda: 17),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            files.append(file())
    assert len({*files}) == len(files)
    assert file(replace(setting, dataset="another title")) == files[0] == file()


@pytest.mark.parametrize("content", [
    b"", b"[0.5", b"\xff", b"{}", b"null", b"[1, 0]", b"[true]", b"[NaN]", b"[0.5, 1.5]",
    b"[0.5, 0.5, 0.5]", b'["0.5"]', b"[" * 100_000,
])  # fmt: skip
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(setting, content):
    computed = count_and_judge(setting, ["pca"])
    (file,) = kept_references.FOLDER.iterdir()
    file.write_bytes(content)
    assert KeptReferences(setting, **AMOUNT).read("pca") is None
    assert count_and_judge(setting, ["pca"]) == computed
    assert json.loads(file.read_text()) == computed[1]["pca"]


def test_where_nothing_can_be_written_everything_is_computed(setting, tmp_path):
    (tmp_path / "kept").write_text("a file in the place of the folder")
    assert count_and_judge(setting) == count_and_judge(setting)


def test_sources_that_changed_during_a_run_keep_and_give_nothing(setting, monkeypatch):
    count_and_judge(setting, ["pca"])
    monkeypatch.setattr(kept_references, "_sources", lambda: "edited")
    assert KeptReferences(setting, **AMOUNT).read("pca") is None
    count_and_judge(setting, ["oja"])
    assert len([*kept_references.FOLDER.iterdir()]) == 1


def test_a_change_of_any_source_or_saved_rule_changes_the_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_references, "ROOT", tmp_path)
    seen = [kept_references._sources()]
    for name in ("train.py", "kernels/sums.py", "rules/zoo/latent-predictive.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for content in ("a = 1", "a = 2"):
            (tmp_path / name).write_text(content)
            seen.append(kept_references._sources())
    assert len({*seen}) == 7
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_train.py").write_text("")
    (tmp_path / ".#train.py").symlink_to("nowhere")  # as editors leave it while they edit
    assert kept_references._sources() == seen[-1]
