"""Names of image sets on the command line: a known name or a path. Does not load torch.

--dataset mnist, --dataset photos/ (a folder of images by class), --dataset digits.npz
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

DATASETS = ("mnist", "fashion", "cifar10", "mnist5k")
OWN = "a folder of images by class, or a .npz file"


def is_path(name: str) -> bool:
    """Whether a name is that of a folder or file; a known data set's name never is."""
    looks_like_one = os.sep in name or name.lower().endswith(".npz") or Path(name).is_dir()
    return looks_like_one and name not in DATASETS


def data_name(text: str, known: Sequence[str] = DATASETS) -> str:
    """The type of --dataset: a known name unchanged, or a path made absolute.

    Raises ArgumentTypeError for anything else, and for a path that doesn't exist.
    """
    if text in known:
        return text
    if not text:
        raise argparse.ArgumentTypeError(f"the name is empty; known are {', '.join(known)}, {OWN}")
    path = Path(text).expanduser()
    if not is_path(str(path)):
        raise argparse.ArgumentTypeError(
            f"unknown data set {text!r}; known are {', '.join(known)}, {OWN}"
        )
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} is not there; give {OWN}")
    return str(path.resolve())


def data_titles(names: Sequence[str]) -> list[str]:
    """The names of data sets in tables and figures: for paths their stems, unless titles agree."""
    titles = [Path(name).stem if is_path(name) else name for name in names]
    return titles if len({*titles}) == len(titles) else [*names]
