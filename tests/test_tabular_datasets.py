"""The UCI sets: read, refused where damaged, split as published."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_sets import tabular_datasets
from data_sets.image_data import DataError
from data_sets.tabular_datasets import (
    TABLES,
    Table,
    load_table,
    order_from_file,
    published_order,
    split_table,
)

SPLITS = {
    "boston": (364, 91, 51),
    "concrete": (742, 185, 103),
    "energy": (614, 78, 76),
    "kin8nm": (5898, 1475, 819),
    "naval": (8593, 2148, 1193),
    "power": (6889, 1722, 957),
    "wine": (1151, 288, 160),
    "yacht": (222, 55, 31),
}


def write(folder, name, rows):
    (folder / "uci").mkdir(exist_ok=True)
    np.savetxt(folder / "uci" / f"{name}.txt", rows)


def random_rows(name, extra=1):
    return np.random.default_rng(0).normal(size=(TABLES[name].rows, TABLES[name].inputs + extra))


def table_of(name, rows):
    return Table(rows[:, :-1], rows[:, -1:], TABLES[name].test_rows, "random")


@pytest.mark.parametrize("name", list(SPLITS))
def test_the_rows_are_split_as_published(name):
    rows = torch.from_numpy(random_rows(name))
    proportion = 0.11272 if name == "energy" else 0.2
    split = split_table(table_of(name, rows), proportion)
    assert tuple(len(p[0]) for p in (split.training, split.validation, split.test)) == SPLITS[name]


def test_another_seed_gives_other_test_rows():
    rows = torch.from_numpy(random_rows("yacht"))
    table = table_of("yacht", rows)
    same, other = split_table(table, 0.2, 1), split_table(table, 0.2, 2)
    assert torch.equal(split_table(table, 0.2).test[0], same.test[0])
    assert not torch.equal(same.test[0], other.test[0])


def test_all_but_the_test_rows_are_standardised():
    rows = torch.from_numpy(random_rows("yacht")) * 5 + 3
    split = split_table(table_of("yacht", rows), 0.2)
    for column in range(2):
        known = torch.cat([split.training[column], split.validation[column]])
        assert torch.allclose(known.mean(dim=0), torch.zeros(1).double(), atol=1e-12)
        assert torch.allclose(known.std(dim=0), torch.ones(1).double())
    assert split.target_variance == pytest.approx(25, rel=0.3)


def test_a_file_under_the_data_directory_is_read(tmp_path):
    rows = random_rows("yacht")
    write(tmp_path, "yacht", rows)
    table = load_table("yacht", tmp_path)
    assert torch.allclose(table.inputs, torch.from_numpy(rows[:, :-1]))
    assert "308 rows" in table.source and table.fingerprint().startswith("308, sha256 ")


def test_the_second_target_of_naval_is_dropped(tmp_path):
    rows = random_rows("naval", extra=2)
    write(tmp_path, "naval", rows)
    assert torch.allclose(
        load_table("naval", tmp_path).targets[:, 0], torch.from_numpy(rows[:, 16])
    )


@pytest.mark.parametrize(
    "damage", [lambda rows: rows[:-1], lambda rows: rows[:, :-1], lambda rows: rows * np.nan]
)
def test_a_file_of_another_shape_or_without_numbers_is_refused(tmp_path, damage):
    write(tmp_path, "yacht", damage(random_rows("yacht")))
    with pytest.raises(DataError, match=r"yacht\.txt holds"):
        load_table("yacht", tmp_path)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    write(tmp_path, "yacht", random_rows("yacht"))
    (tmp_path / "uci" / "yacht.txt").write_text("1 2\n3\n")
    with pytest.raises(DataError, match="damaged"):
        load_table("yacht", tmp_path)


def test_boston_needs_no_network_and_is_kept(tmp_path):
    table = load_table("boston", tmp_path)
    again = load_table("boston", tmp_path)
    assert "mlxtend" in table.source and "boston.txt" in again.source
    assert table.fingerprint() == again.fingerprint()


def test_a_table_that_is_fetched_where_nothing_can_be_kept_is_used(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tabular_datasets, "in_place", refuse)
    assert "mlxtend" in load_table("boston", tmp_path).source
    (tmp_path / "file").write_text("")
    assert "mlxtend" in load_table("boston", tmp_path / "file").source


def test_a_table_of_any_size_says_how_many_rows_are_for_the_test():
    rows = torch.randn(20, 3, dtype=torch.float64)
    split = split_table(Table(rows[:, :-1], rows[:, -1:], 5, "own"), 0.2)
    assert [len(part[0]) for part in (split.training, split.validation, split.test)] == [12, 3, 5]


def test_data_that_cannot_be_fetched_are_looked_for_beside_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(tabular_datasets, "_fetchers", lambda name: [("a site", lambda: 1 / 0)])
    write(tmp_path, "yacht", random_rows("yacht"))
    monkeypatch.setattr(tabular_datasets, "SHARED", tmp_path)
    assert str(tmp_path / "uci" / "yacht.txt") in load_table("yacht", tmp_path / "empty").source


def test_data_that_is_nowhere_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(tabular_datasets, "_fetchers", lambda name: [("a site", lambda: 1 / 0)])
    monkeypatch.setattr(tabular_datasets, "SHARED", tmp_path / "shared")
    with pytest.raises(DataError, match=r"no energy data: put it at .*energy\.txt.*a site"):
        load_table("energy", tmp_path)


def test_an_unknown_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="known are boston"):
        load_table("titanic", tmp_path)


# ---- a given order ----


@pytest.fixture
def yacht_in_order(tmp_path, monkeypatch):
    """Rows and an order of them that is taken for the published one, not to be downloaded."""
    rows, order = random_rows("yacht"), np.random.default_rng(1).permutation(308)
    digest = hashlib.sha256(rows[order]).hexdigest()[:32]
    monkeypatch.setitem(TABLES, "yacht", replace(TABLES["yacht"], published=digest))
    monkeypatch.setattr(tabular_datasets, "SHARED", tmp_path / "shared")
    monkeypatch.setattr(tabular_datasets, "_download", lambda address: b"<html>sign in</html>")
    write(tmp_path, "yacht", rows)
    (tmp_path / "uci_permutations").mkdir()
    return tmp_path, rows, order


def test_the_published_order_is_read_where_its_rows_are_the_published_ones(yacht_in_order):
    folder, rows, order = yacht_in_order
    np.savetxt(folder / "uci_permutations" / "yacht.txt", order, fmt="%d")
    table = load_table("yacht", folder)
    found = published_order("yacht", table, folder)
    assert found.tolist() == order.tolist()
    split = split_table(table, 0.2, found)
    rest = rows[order[:277]]
    test = (rows[order[277:], -1:] - rest[:, -1:].mean()) / rest[:, -1:].std(ddof=1)
    assert torch.allclose(split.test[1], torch.from_numpy(test))
    write(folder, "yacht", rows[::-1])
    with pytest.raises(DataError, match=r"are not those of https.*yacht/data/data\.txt"):
        published_order("yacht", load_table("yacht", folder), folder)


def test_a_downloaded_order_is_kept_and_what_is_none_is_not(yacht_in_order, monkeypatch):
    folder, _, order = yacht_in_order
    table, path = load_table("yacht", folder), folder / "uci_permutations" / "yacht.txt"
    with pytest.raises(DataError, match=r"the rows' order in .*yacht\.txt: No such file"):
        published_order("yacht", table, folder)
    text = "".join(f"{number}\n" for number in order).encode()
    monkeypatch.setattr(tabular_datasets, "_download", lambda address: text)
    assert published_order("yacht", table, folder).tolist() == order.tolist()
    assert path.read_bytes() == text


def test_an_order_may_name_one_of_two_equal_rows_twice_but_leave_none_out(tmp_path):
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    table, path = Table(rows[:, :1], rows[:, 1:], 1, "own"), tmp_path / "order.txt"
    path.write_text("2\n0\n0\n")
    assert order_from_file(path, table).tolist() == [2, 0, 0]
    path.write_text("2\n2\n0\n")
    with pytest.raises(DataError, match="must hold each row number once"):
        order_from_file(path, table)
