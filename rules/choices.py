"""The names of the rules in the zoo and of quantities; importing it does not load torch."""

from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "zoo"
COMPETING = {"share", "won"}  # the quantities of terms that have an inverse temperature
LATERAL = {  # those that are sums over the other units, and the matrix of each
    "r": "corr", "r_cov": "cov", "r_exact": "corr", "r_cross": "cross",
}  # fmt: skip


def names() -> list[str]:
    """The names of the rules in the zoo."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def zoo_path(name: str) -> Path:
    """The path of the zoo's file for a rule of this name, whether it exists or not."""
    return FOLDER / f"{name}.json"


def run_path(text: str) -> Path:
    """The type of a flag: the path of a run, or else of the file of the zoo's rule of this name."""
    path = Path(text)
    return zoo_path(text) if not path.exists() and text in names() else path


def compete(terms: Iterable[str]) -> bool:
    """Whether a term of unit statistics, as a text, has a unit's share in the competition."""
    return not COMPETING.isdisjoint(_names(terms))


def have_currents(terms: Iterable[str]) -> bool:
    """Whether a term of unit statistics, as a text, has a lateral current."""
    return not LATERAL.keys().isdisjoint(_names(terms))


def _names(terms: Iterable[str]) -> Iterator[str]:
    """The names of the quantities in these texts, without primes and the index of a unit."""
    for text in terms:
        for factor in text.split():
            yield factor.partition("^")[0].replace("_i", "").rstrip("'")
