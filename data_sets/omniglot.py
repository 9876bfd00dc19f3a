"""Omniglot: characters of many alphabets, each drawn by twenty people, read from its files.

    load_omniglot(data_dir)        training and test characters, whose alphabets differ

The parts are looked for in the data directory, in omniglot/ and in omniglot-py/ (torchvision's) in
it, each as a folder alphabet/character/*.png or as the published zip file of that folder:

    images_background, images_evaluation                     964 and 659 characters
    images_background_small1, images_background_small2       242 characters of 8 alphabets together

Where images_evaluation is, it is the test set, and the other parts are for training. Otherwise
every fourth alphabet, in the order of their names, is for testing. The small sets hold some
alphabets twice; each character is taken once.
Source: Lake, Salakhutdinov, Tenenbaum 2015, Science 350, 1332.
"""

import io
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_sets.fetching import one_line
from data_sets.image_data import DataError, ImageData

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
SMALL = ("images_background_small1", "images_background_small2")
FOLDERS = ("", "omniglot", "omniglot-py")
SIDE = 28
TEST_EVERY = 4  # alphabets, where there is no evaluation set

Drawings = dict[tuple[str, str], list[bytes]]  # PNG files by alphabet and character


@dataclass(frozen=True, eq=False)
class Characters:
    """Drawings of characters.

    Attributes:
        images: uint8 [characters, drawings, 1, 28, 28]; ink is bright, as in MNIST.
        names: alphabet and character of each.
    """

    images: Tensor
    names: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def alphabets(self) -> list[str]:
        """The names of their alphabets, in order."""
        return sorted({alphabet for alphabet, _ in self.names})


@dataclass(frozen=True, eq=False)
class Omniglot:
    """Characters to learn from, others of other alphabets to judge by, and where they come from."""

    train: Characters
    test: Characters
    source: str

    def fingerprint(self) -> str:
        """The number of drawings and a digest of them; see `ImageData.fingerprint`."""
        return self.pooled().fingerprint()

    def pooled(self) -> ImageData:
        """All drawings, those for training first, labelled by character."""
        images = torch.cat([self.train.images.flatten(0, 1), self.test.images.flatten(0, 1)])
        drawings = self.train.images.shape[1]
        labels = torch.arange(len(images) // drawings).repeat_interleave(drawings)
        return ImageData(images, labels, self.source)


def load_omniglot(data_dir: str | Path) -> Omniglot:
    """Training and test characters.

    Raises DataError if there are no parts to learn from, a file is damaged, numbers of drawings
    differ, or there are too few alphabets to divide.
    """
    data_dir = Path(data_dir).expanduser()
    found = _find(data_dir, BACKGROUND) or _find(data_dir, *SMALL)
    if not found:
        raise DataError(
            f"Omniglot is not in {data_dir}: put {BACKGROUND}.zip, or {SMALL[0]}.zip and "
            f"{SMALL[1]}.zip, there, from github.com/brendenlake/omniglot, or have torchvision's "
            "datasets.Omniglot download it there"
        )
    train, held_out = _read(found), _find(data_dir, EVALUATION)
    test = _read(held_out)
    if not held_out:
        alphabets = sorted({alphabet for alphabet, _ in train})
        chosen = {*alphabets[TEST_EVERY - 1 :: TEST_EVERY]}
        test = {name: files for name, files in train.items() if name[0] in chosen}
    seen = {alphabet for alphabet, _ in test}
    train = {name: files for name, files in train.items() if name[0] not in seen}
    if not train or not test:
        raise DataError(
            f"Omniglot in {data_dir}: too few alphabets for training and testing; it takes "
            f"{TEST_EVERY}, or {EVALUATION}"
        )
    _refuse_unequal(data_dir, train | test)
    names = ", ".join(path.name for path in [*found, *held_out])
    source = f"Omniglot, {len(train)} characters to learn from and {len(test)} to judge by, of "
    return Omniglot(_characters(train), _characters(test), f"{source}{names} in {data_dir}")


def _find(data_dir: Path, *parts: str) -> list[Path]:
    """The folders, or else the zip files, of those of these parts that are there."""
    found = []
    for part in parts:
        folders = [data_dir / place / part for place in FOLDERS]
        files = [data_dir / place / f"{part}.zip" for place in FOLDERS]
        there = [path for path in folders if path.is_dir()] + [p for p in files if p.is_file()]
        found += there[:1]
    return found


def _read(parts: Iterable[Path]) -> Drawings:
    """The PNG files of all parts by alphabet and character, in the order of their names."""
    drawings: Drawings = {}
    for part in parts:
        files: Drawings = {}
        for path, content in sorted(_files_of(part).items()):
            files.setdefault(path[-3:-1], []).append(content)
        drawings |= files
    return dict(sorted(drawings.items()))


def _files_of(part: Path) -> dict[tuple[str, ...], bytes]:
    """The PNG files of a folder or zip file, by their path's names.

    Raises DataError if they can't be read.
    """
    try:
        if part.is_dir():
            found = {path.parts: path.read_bytes() for path in part.glob("*/*/*.png")}
        else:
            with zipfile.ZipFile(part) as archive:
                paths = [PurePosixPath(name) for name in archive.namelist()]
                pictures = [p for p in paths if p.suffix == ".png" and len(p.parts) == 4]
                found = {path.parts: archive.read(str(path)) for path in pictures}
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{part} can't be read: {one_line(error)}") from error
    if not found:
        raise DataError(f"{part} holds no alphabet/character/*.png")
    return found


def _refuse_unequal(data_dir: Path, drawings: Drawings) -> None:
    """Raise DataError if some characters have fewer drawings than others."""
    most = max(len(files) for files in drawings.values())
    for (alphabet, character), files in drawings.items():
        if len(files) < most:
            raise DataError(
                f"Omniglot in {data_dir}: {alphabet}/{character} has {len(files)} drawings, others "
                f"have {most}"
            )


def _characters(drawings: Drawings) -> Characters:
    images = torch.stack(
        [torch.stack([_picture(f, "/".join(n)) for f in files]) for n, files in drawings.items()]
    )
    return Characters(images, tuple(drawings))


def _picture(content: bytes, name: str) -> Tensor:
    """uint8 [1, 28, 28] from a PNG file with black ink on white, by means over areas.

    Raises DataError if it is damaged.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"a drawing of {name} is damaged: {one_line(error)}") from error
    return torch.from_numpy(255 - np.array(small))[None]
