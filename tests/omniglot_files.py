"""Small files of Omniglot's form, made up: bars whose place tells the character."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = ("images_background_small1", "images_background_small2")


def drawing(number: int, repeat: int) -> bytes:
    """A PNG of 105 x 105 pixels: a bar at row 15 * number, and one that tells the repeat."""
    ink = np.full((105, 105), 255, dtype=np.uint8)
    ink[15 * number : 15 * number + 15] = 0
    ink[:, 15 * repeat : 15 * repeat + 8] = 0
    file = io.BytesIO()
    Image.fromarray(ink).convert("1").save(file, "png")
    return file.getvalue()


def files(alphabets: dict[str, int], repeats: int) -> dict[str, bytes]:
    """Drawings by alphabet/character/file, of so many characters of each alphabet."""
    return {
        f"{alphabet}/character{number:02}/{number:04}_{repeat:02}.png": drawing(number, repeat)
        for alphabet, count in alphabets.items()
        for number in range(count)
        for repeat in range(repeats)
    }


def write_zip(path: Path, part: str, content: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{part}/", b"")
        for name, data in content.items():
            archive.writestr(f"{part}/{name}", data)


def write_folder(path: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def write_small_sets(folder: Path, repeats: int = 4) -> None:
    """Zip files of alphabets a, b, c and c, d: c is in both, as Latin and Greek are."""
    parts = {"a": 2, "b": 3, "c": 2}, {"c": 2, "d": 3}
    for name, alphabets in zip(SMALL, parts, strict=True):
        write_zip(folder / f"{name}.zip", name, files(alphabets, repeats))
