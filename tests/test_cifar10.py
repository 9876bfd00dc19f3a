"""The loader on small files of the published formats; the real ones are never here."""

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sets import cifar10
from data_sets.cifar10 import BINARY, FILES, PYTHON
from data_sets.image_data import DataError
from mnist_datasets import load_images

COUNT = 20  # images in a file


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Files of 20 images, and no network."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", COUNT)

    def no_network(*_):
        raise DataError("no network")

    monkeypatch.setattr(cifar10, "run_with_torchvision", no_network)


def part(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [20, 3, 32, 32] of random bytes, and each class twice."""
    generator = np.random.default_rng(number)
    images = generator.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8)
    return images, generator.permutation(np.arange(COUNT, dtype=np.uint8) % 10)


def write_binary(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES):
        images, labels = part(number)
        records = b"".join(
            bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)
        )
        (folder / f"{name}.bin").write_bytes(records)


def write_python(folder: Path, monkeypatch, **more) -> None:
    """As the published ones: bytes as keys, labels a list, images rows of 3072 bytes."""
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES):
        images, labels = part(number)
        table = {b"data": images.reshape(COUNT, -1), b"labels": labels.tolist(), **more}
        content = pickle.dumps(table, protocol=2)
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cifar10.PYTHON_MD5, name, hashlib.md5(content).hexdigest())


def assert_are_the_parts(train, test) -> None:
    images, labels = (np.concatenate(a) for a in zip(*(part(n) for n in range(5)), strict=True))
    assert train.images.dtype == torch.uint8 and train.shape == (3, 32, 32) and train.classes == 10
    assert (train.images.numpy() == images).all() and (train.labels.numpy() == labels).all()
    assert (test.images.numpy() == part(5)[0]).all() and (test.labels.numpy() == part(5)[1]).all()
    assert "CIFAR-10: 100 + 20 images" in train.source


def test_the_binary_version_is_read(tmp_path):
    write_binary(tmp_path / BINARY)
    assert_are_the_parts(*load_images("cifar10", tmp_path))


def test_the_python_version_is_read(tmp_path, monkeypatch):
    write_python(tmp_path / PYTHON, monkeypatch)
    assert_are_the_parts(*load_images("cifar10", tmp_path))


def test_a_pickle_that_names_anything_but_arrays_is_refused_and_not_run(tmp_path, monkeypatch):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    write_python(tmp_path / PYTHON, monkeypatch, attack=Attack())
    with pytest.raises(DataError, match=r"data_batch_1: no batch of images \(it asks for posix"):
        load_images("cifar10", tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_python_file_without_the_published_checksum_is_not_even_opened(tmp_path, monkeypatch):
    write_python(tmp_path / PYTHON, monkeypatch)
    monkeypatch.setitem(cifar10.PYTHON_MD5, "test_batch", "0" * 32)
    with pytest.raises(DataError, match=r"test_batch: MD5 is \w{32}, that of the published"):
        load_images("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "61459 bytes, where 20 images take 61460"),
        (lambda content: b"\x0a" + content[1:], "label 10, where 0 to 9"),
        (lambda content: bytes([(content[0] + 1) % 10]) + content[1:], "not equally frequent"),
    ],
)
def test_a_damaged_binary_file_is_refused_with_its_name(tmp_path, damage, message):
    write_binary(tmp_path / BINARY)
    path = tmp_path / BINARY / "data_batch_3.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load_images("cifar10", tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write_binary(tmp_path / BINARY)
    (tmp_path / BINARY / "data_batch_2.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin: cannot be read"):
        load_images("cifar10", tmp_path)


def test_a_whole_python_version_is_read_where_the_binary_one_is_incomplete(tmp_path, monkeypatch):
    write_binary(tmp_path / BINARY)
    (tmp_path / BINARY / "test_batch.bin").unlink()
    write_python(tmp_path / PYTHON, monkeypatch)
    train, _ = load_images("cifar10", tmp_path)
    assert PYTHON in train.source


def test_without_files_and_network_the_message_says_what_would_be_right(tmp_path):
    with pytest.raises(DataError, match=r"\(no network\); put the folder cifar-10-batches-bin"):
        load_images("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_unpacked_whole_and_found_again(tmp_path, monkeypatch):
    def download(statement, arguments, directory):
        assert arguments[0].endswith("cifar-10-binary.tar.gz") and len(arguments[2]) == 32
        write_binary(directory / "made" / BINARY)
        with tarfile.open(directory / "archive", "w:gz") as archive:
            archive.add(directory / "made" / BINARY, BINARY)

    monkeypatch.setattr(cifar10, "run_with_torchvision", download)
    assert_are_the_parts(*load_images("cifar10", tmp_path / "data"))
    monkeypatch.setattr(cifar10, "run_with_torchvision", None)
    assert_are_the_parts(*load_images("cifar10", tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [BINARY]


def test_of_two_processes_that_download_at_once_the_slower_reads_what_the_faster_left(
    tmp_path, monkeypatch
):
    def download(statement, arguments, directory):
        write_binary(directory / "made" / BINARY)
        with tarfile.open(directory / "archive", "w:gz") as archive:
            archive.add(directory / "made" / BINARY, BINARY)
        write_binary(tmp_path / BINARY)  # the other process is ready

    monkeypatch.setattr(cifar10, "run_with_torchvision", download)
    assert_are_the_parts(*load_images("cifar10", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [BINARY]


def test_a_broken_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def half(statement, arguments, directory):
        (directory / "archive").write_bytes(b"half an archive")

    def of_folders(statement, arguments, directory):
        with tarfile.open(directory / "archive", "w:gz") as archive:
            for name in FILES:
                folder = tarfile.TarInfo(f"{BINARY}/{name}.bin")
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)

    for download in (half, of_folders):
        monkeypatch.setattr(cifar10, "run_with_torchvision", download)
        with pytest.raises(DataError, match="archive cannot be read"):
            load_images("cifar10", tmp_path)
        assert list(tmp_path.iterdir()) == []
