"""Your own images: a folder with one folder per class, a .npz file, arrays, or a torch Dataset.

    train, test = load_own_images(Path("photos"))       # photos/cat/1.png, photos/dog/7.jpg, ...
    train, test = load_own_images(Path("digits.npz"))   # arrays x_train, y_train, x_test, y_test
    data = image_data(images, labels)                   # NumPy arrays or tensors
    data = dataset_images(dataset)                      # a torch Dataset or DataLoader

If a folder has train/ and test/, the folders of the classes are in these. Without a test set, one
image in six of each class is split off as the test set, always the same images. Classes are
numbered in the order of their sorted names or labels. Files and folders that are hidden, that are
no images of these formats, or that do not lie in the folder of a class are left out, and counted
in what `source` says.
"""

import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data_sets.image_data import DataError, ImageData

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "valid", "validation")
ARRAYS = (  # names used by Keras and by MedMNIST, and those of a single set to be split
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train"),
    ("train_images", "train_labels"),
    ("images", "labels"),
    ("x", "y"),
)
NPZ_ERRORS = (
    OSError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile,
    zlib.error, tokenize.TokenError,
)  # fmt: skip
TEST_SHARE = 6  # one image in so many is for the test
MOST_CLASSES = 10_000
CHANNELS = (1, 3)  # numbers of them by which their axis is known

Arrays = tuple[np.ndarray, np.ndarray]  # images, and a label for each


def load_own_images(path: Path) -> tuple[ImageData, ImageData]:
    """Training and test images in a folder or a .npz file.

    Raises DataError if there are no images, they differ in size, they can't be read, or a test
    label does not occur in training.
    """
    left_out = 0
    if path.suffix.lower() == ".npz":
        train, test = _read_arrays(path)
    else:
        train, test, left_out = _read_folder(path)
    if test is None:
        train, test = _split(train)
    classes = _classes(train[1], f"{path}: training labels")
    if unknown := sorted({*test[1].tolist()} - {*classes.tolist()}):
        raise DataError(f"{path}: no training image has the test label {unknown[0]!r}")
    source = f"{path.name}: {len(train[0]):,} + {len(test[0]):,} images from {path}"
    source += f"; files left out: {left_out:,}" if left_out else ""
    sets = []
    for name, (images, labels) in (("training", train), ("test", test)):
        numbers = torch.from_numpy(np.searchsorted(classes, labels))
        sets.append(ImageData(_bytes(images, f"{path}: {name} images"), numbers, source))
    if sets[0].shape != sets[1].shape:
        raise DataError(
            f"{path}: training images are {sets[0].shape}, test images {sets[1].shape}: must agree"
        )
    return tuple(sets)


def image_data(
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | Sequence | None = None,
    source: str = "images in memory",
) -> ImageData:
    """Arrays or tensors as ImageData; raises DataError if they are not as described.

    images: [N, H, W], [N, C, H, W] or [N, H, W, C] with 1 or 3 channels: integers from 0 to 255,
        bool, or floats from 0 to 1, which are rounded to 256 levels.
    labels: N whole numbers from 0, the classes themselves; None: class 0 for all.
    """
    pixels = _bytes(_array(images, "images"), "images")
    if labels is None:
        return ImageData(pixels, torch.zeros(len(pixels), dtype=torch.int64), source)
    numbers = _labels(_array(labels, "labels"), "labels")
    if len(numbers) != len(pixels):
        raise DataError(f"{len(pixels)} images with {len(numbers)} labels: give one for each")
    if numbers.dtype.kind == "U" or not 0 <= numbers.min() <= numbers.max() < MOST_CLASSES:
        raise DataError(
            f"labels are {numbers.min()!s} to {numbers.max()!s}; give classes as numbers from 0, "
            f"below {MOST_CLASSES}, the same for training and test images"
        )
    return ImageData(pixels, torch.from_numpy(numbers), source)


def dataset_images(dataset: Iterable, source: str = "a torch Dataset") -> ImageData:
    """A torch Dataset of pairs (image, label), or a DataLoader of batches of these, as ImageData.

    Raises DataError if it is empty, holds no pairs or images of several sizes, and as `image_data`.

    dataset: its images are tensors or arrays as for `image_data`, without N, or PIL images.
    """
    batched = isinstance(dataset, DataLoader) and dataset.batch_size is not None
    by_place = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    items = (dataset[k] for k in range(len(dataset))) if by_place else iter(dataset)
    images, labels = [], []
    for item in items:
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise DataError(f"{source} must hold pairs (image, label), not {type(item).__name__}")
        image, label = _array(item[0], source), _array(item[1], source)
        images.append(_bytes(image if batched else image[None], source))
        labels.append(label if batched else label[None])
    if not images:
        raise DataError(f"{source} is empty: there is no image to learn from")
    shapes = {tuple(part.shape[2:]) for part in images}
    if len(shapes) > 1:
        raise DataError(f"{source}: images are of {_two(shapes)}: resize them to one size")
    return image_data(torch.cat(images), np.concatenate(labels), source)


def _array(value: Any, what: str) -> np.ndarray:
    """A tensor, PIL image, array or nested list as an array; raises DataError for others."""
    try:
        if isinstance(value, Tensor):
            value = value.float() if value.dtype == torch.bfloat16 else value
            return value.numpy(force=True)
        if hasattr(value, "convert") and hasattr(value, "mode"):  # of PIL
            return np.asarray(value.convert(_mode(value, what)))
        return np.asarray(value)
    except DataError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what}: {' '.join(str(error).split())}; give an array") from error


def _bytes(images: np.ndarray, what: str) -> Tensor:
    """Images as for `image_data`, as uint8 [N, C, H, W]; raises DataError for any others."""
    if not images.size:
        raise DataError(f"{what}: there are none")
    if images.ndim == 2:
        raise DataError(f"{what} are a table {list(images.shape)}: reshape its rows to [N, H, W]")
    if images.ndim == 3:
        images = images[:, None]
    elif channels_are_last(images.shape):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in CHANNELS:
        raise DataError(
            f"{what} are {list(images.shape)}; give [N, H, W], [N, C, H, W] or [N, H, W, C] "
            "with 1 or 3 channels"
        )
    return torch.from_numpy(np.ascontiguousarray(_levels(images, what)))


def channels_are_last(shape: Sequence[int]) -> bool:
    """Whether images of this shape are [N, H, W, C], with 1 or 3 channels, not [N, C, H, W]."""
    return len(shape) == 4 and shape[1] not in CHANNELS and shape[3] in CHANNELS


def _levels(images: np.ndarray, what: str) -> np.ndarray:
    """Pixels as bytes; floats and bools from 0 to 1 become 0 to 255."""
    if images.dtype == bool:
        return images.astype(np.uint8) * np.uint8(255)
    if images.dtype.kind == "f":
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):  # also true if a pixel is nan
            raise DataError(
                f"{what} are floats from {low:.4g} to {high:.4g}; give floats from 0 to 1, or "
                "uint8 from 0 to 255"
            )
        return np.rint(255 * images).astype(np.uint8)
    if images.dtype.kind in "iu" and images.min() >= 0 and images.max() <= 255:
        if images.max() == 1:
            raise DataError(f"{what} are 0 and 1 of 255; give booleans, or 0 to 255")
        return images.astype(np.uint8)
    raise DataError(f"{what} are {images.dtype}; give uint8 from 0 to 255, or floats from 0 to 1")


def _labels(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels [N] from whole numbers or strings [N] or [N, 1]; raises DataError for any others."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = labels.dtype.kind in "iubf" and bool(
        (np.abs(labels.astype(np.float64)) < 2**53).all() and (labels == np.rint(labels)).all()
    )
    if labels.ndim != 1 or not len(labels) or not (whole or labels.dtype.kind == "U"):
        raise DataError(
            f"{what} are {labels.dtype} {list(labels.shape)}; give one whole number or string for "
            "each image"
        )
    return labels.astype(np.int64) if whole else labels


def _classes(labels: np.ndarray, what: str) -> np.ndarray:
    """The distinct labels, sorted."""
    classes = np.unique(labels)
    if len(classes) > MOST_CLASSES:
        raise DataError(f"{what} are {len(classes):,} different ones; at most {MOST_CLASSES:,}")
    return classes


def _split(data: Arrays) -> tuple[Arrays, Arrays]:
    """Split off one image in TEST_SHARE of each class; each class keeps at least one image.

    Raises DataError if no class has enough images for that.
    """
    images, labels = data
    test = np.zeros(len(labels), bool)
    draws = np.random.RandomState(0)  # its stream is the same in every version of NumPy
    for label in np.unique(labels):
        rows = draws.permutation(np.flatnonzero(labels == label))
        test[rows[: len(rows) // TEST_SHARE]] = True
    if not test.any():
        raise DataError(
            f"{len(labels)} images of {len(np.unique(labels))} classes: six of a class are needed "
            "to judge by one; give a test set, or more images"
        )
    return (images[~test], labels[~test]), (images[test], labels[test])


# .npz ------------------------------------------------------------------------------------------


def _read_arrays(path: Path) -> tuple[Arrays, Arrays | None]:
    """Training and test arrays; the latter are None if the file has a single set."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {*file.files}
            names = next((names for names in ARRAYS if {*names} <= found), ())
            arrays = [np.asarray(file[name]) for name in names]
    except NPZ_ERRORS as error:
        raise DataError(f"{path} cannot be read as .npz: {' '.join(str(error).split())}") from error
    if not names:
        has = ", ".join(sorted(found)) or "no array"
        raise DataError(f"{path} has {has}; it needs {_alternatives()}")
    sets = []
    for name, images, labels in zip(names[::2], arrays[::2], arrays[1::2], strict=True):
        labels = _labels(labels, f"{path}: labels of {name}")
        if images.ndim == 0 or len(images) != len(labels):
            raise DataError(f"{path}: {name} {list(images.shape)} has {len(labels)} labels")
        sets.append((images, labels))
    return sets[0], sets[1] if len(sets) > 1 else None


def _alternatives() -> str:
    return ", or ".join(" and ".join(names) for names in ARRAYS)


# folders ---------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> tuple[Arrays, Arrays | None, int]:
    """Training and test images from train/ and test/, and the number of files left out.

    Without train/, all images; without a test folder, None for its images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is neither a folder of images by class nor a .npz file")
    test = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    train = folder / "train" if (folder / "train").is_dir() else folder
    folders = [train] if train == folder or test is None else [train, test]
    sets = _decoded(folders)
    visible = (path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    left_out = sum(1 for _ in visible) - sum(len(labels) for _, labels in sets)
    return sets[0], sets[1] if len(sets) > 1 else None, left_out


def _hidden(path: Path, folder: Path) -> bool:
    """Whether a file, or a folder on the way to it, is hidden or of macOS's archives."""
    parts = path.relative_to(folder).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _decoded(folders: Sequence[Path]) -> list[Arrays]:
    """The images in the subfolders of each folder, all grey or all in colour, and their classes."""
    files = [_image_files(folder) for folder in folders]
    modes = {_mode_of_file(path) for paths in files for path in paths}
    mode = "L" if modes == {"L"} else "RGB"
    sets = []
    for paths in files:
        images = [_pixels(path, mode) for path in paths]
        shapes = {image.shape[:2] for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"{paths[0].parent.parent}: images are of {_two(shapes)} pixels: resize them to "
                "one size"
            )
        sets.append((np.stack(images), np.array([path.parent.name for path in paths])))
    return sets


def _image_files(folder: Path) -> list[Path]:
    """The paths of all images in the subfolders of a folder, sorted."""
    files = sorted(
        path
        for path in folder.glob("*/*")
        if path.suffix.lower() in SUFFIXES and not _hidden(path, folder)
    )
    if not files:
        raise DataError(
            f"{folder} has no images by class: put them into one folder per class, such as "
            f"{folder.name}/cat/1.png"
        )
    return files


def _mode(image: Any, what: str) -> str:
    """The mode to convert a PIL image to: L if it is grey, else RGB."""
    if image.mode[0] in "IF":
        raise DataError(f"{what} has more than 8 bits for a pixel; convert it to 8 bits")
    return "L" if image.mode in ("1", "L", "LA") else "RGB"


def _mode_of_file(path: Path) -> str:
    with _opened(path) as image:
        return _mode(image, str(path))


def _pixels(path: Path, mode: str) -> np.ndarray:
    """The pixels of an image, uint8 [H, W] for the mode L or [H, W, 3] for RGB."""
    from PIL import ImageOps

    with _opened(path) as image:
        try:
            return np.asarray(ImageOps.exif_transpose(image).convert(mode))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path}: damaged ({' '.join(str(error).split())})") from error


def _opened(path: Path):
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"{path}: no image that can be read ({what})") from error


def _two(shapes: Iterable[tuple[int, ...]]) -> str:
    """The smallest two of these sizes, for a message."""
    first, second, *_ = sorted(shapes)
    return f"{' x '.join(map(str, first))} and {' x '.join(map(str, second))}"
