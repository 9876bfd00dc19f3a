"""Which rules the zoo has, for parsers: no torch is loaded with it."""

from pathlib import Path

FOLDER = Path(__file__).parent / "zoo"


def names() -> list[str]:
    """Those of the rules in the zoo."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def zoo_path(name: str) -> Path:
    """Where the file of a rule of this name is, or is to be."""
    return FOLDER / f"{name}.json"


def run_path(text: str) -> Path:
    """A run's directory, or else the file of the zoo's rule of this name; for argparse."""
    path = Path(text)
    return zoo_path(text) if not path.exists() and text in names() else path
