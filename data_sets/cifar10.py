"""CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 pixels in ten classes, read from its files.

They are looked for in the data directory, in this order, and otherwise downloaded by torchvision:

    cifar-10-batches-bin/data_batch_1.bin ... 5.bin, test_batch.bin     the binary version
    cifar-10-batches-py/data_batch_1 ... 5, test_batch                  the python version

A record of the binary version is a label and 3,072 pixels: planes of 32 x 32 for red, green and
blue. The python version is pickled: a file is read only if its MD5 is the published one, and by an
unpickler that accepts nothing but arrays. For the binary files only the digest of the archive is
published, which is checked after the download; whenever they are read, sizes and classes are.
Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
"""

import hashlib
import io
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

from data_sets.fetching import ARCHIVE_ERRORS, member, one_line, run_with_torchvision
from data_sets.image_data import DataError, ImageData
from experiment.files import write_durably

IMAGES_PER_FILE, CLASSES = 10_000, 10
SHAPE = (3, 32, 32)
ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
PYTHON_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
FILES = tuple(PYTHON_MD5)
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
PICKLED_ARRAYS = {  # all names that the published files refer to
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}

Part = tuple[np.ndarray, np.ndarray]  # images [n, 3, 32, 32] and labels [n], both uint8


def load_cifar10(data_dir: Path) -> tuple[ImageData, ImageData]:
    """Training and test set, uint8 [N, 3, 32, 32].

    Raises DataError if a file is damaged, or if the files are missing and can't be downloaded.
    """
    folders = [data_dir / name for name in READERS if (data_dir / name).is_dir()]
    whole = [folder for folder in folders if all(path.exists() for path in _paths(folder))]
    for folder in whole or folders:  # of an incomplete folder, to report the missing file
        return _as_data([READERS[folder.name](path) for path in _paths(folder)], folder)
    try:
        fetch(data_dir)
    except (DataError, OSError) as error:
        raise DataError(
            f"CIFAR-10 is not in {data_dir} and could not be fetched ({one_line(error)}); put the "
            f"folder {BINARY} there, out of cifar-10-binary.tar.gz"
        ) from error
    return load_cifar10(data_dir)


def read_binary(path: Path) -> Part:
    """The images and labels in a file of the binary version; raises DataError if it isn't one."""
    content, record = _contents(path), 1 + int(np.prod(SHAPE))
    if len(content) != IMAGES_PER_FILE * record:
        raise DataError(
            f"{path}: {len(content)} bytes, where {IMAGES_PER_FILE} images take "
            f"{IMAGES_PER_FILE * record}; replace it by the published file"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _checked(records[:, 1:].reshape(-1, *SHAPE), records[:, 0], path)


def read_python(path: Path) -> Part:
    """The images and labels in a file of the python version; raises DataError if it isn't one."""
    content = _contents(path)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != PYTHON_MD5[path.name]:
        raise DataError(
            f"{path}: MD5 is {digest}, that of the published file {PYTHON_MD5[path.name]}; "
            "replace it by that file"
        )
    try:
        table = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = np.asarray(table[b"data"]), np.array(table[b"labels"], dtype=np.uint8)
        return _checked(images.reshape(-1, *SHAPE), labels, path)
    except (pickle.UnpicklingError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no batch of images ({one_line(error)})") from error


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler of plain values and NumPy arrays that refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PICKLED_ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def fetch(data_dir: Path) -> None:
    """Download the binary version; its folder appears complete or not at all.

    Raises DataError or OSError if that fails.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".fetching-") as temporary:
        directory = Path(temporary)
        download = (
            "from torchvision.datasets.utils import download_url;"
            "download_url(sys.argv[2], sys.argv[3], 'archive', sys.argv[4])"
        )
        arguments = [ADDRESS, str(directory.resolve()), ARCHIVE_MD5]
        run_with_torchvision(download, arguments, directory)
        whole = directory / BINARY
        whole.mkdir()
        try:
            with tarfile.open(directory / "archive") as archive:
                for path in _paths(whole):
                    write_durably(path, member(archive, f"{BINARY}/{path.name}"))
        except ARCHIVE_ERRORS as error:
            raise DataError(f"its archive cannot be read ({one_line(error)})") from error
        try:
            whole.rename(data_dir / BINARY)
        except OSError:
            if not (data_dir / BINARY).is_dir():  # otherwise another process was faster
                raise


READERS = {BINARY: read_binary, PYTHON: read_python}


def _paths(folder: Path) -> list[Path]:
    ending = ".bin" if folder.name == BINARY else ""
    return [folder / f"{name}{ending}" for name in FILES]


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def _checked(images: np.ndarray, labels: np.ndarray, path: Path) -> Part:
    if images.dtype != np.uint8 or len(images) != IMAGES_PER_FILE or len(labels) != len(images):
        raise DataError(f"{path}: {len(images)} images of {images.dtype}, {len(labels)} labels")
    if labels.max() >= CLASSES:
        raise DataError(f"{path}: label {labels.max()}, where 0 to {CLASSES - 1} are classes")
    return images, labels


def _as_data(parts: list[Part], folder: Path) -> tuple[ImageData, ImageData]:
    """Training and test set; raises DataError unless all classes are equally frequent."""
    sets = parts[:-1], parts[-1:]
    count = [len(part) * IMAGES_PER_FILE for part in sets]
    source = f"CIFAR-10: {count[0]:,} + {count[1]:,} images from {folder}"
    data = []
    for part in sets:
        images, labels = (np.concatenate(arrays) for arrays in zip(*part, strict=True))
        if len(set(np.bincount(labels, minlength=CLASSES))) != 1:
            raise DataError(
                f"{folder}: the classes are not equally frequent; these are other files"
            )
        data.append(ImageData(torch.from_numpy(images), torch.from_numpy(labels).long(), source))
    return tuple(data)
