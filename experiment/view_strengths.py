"""How the two views of each image are made, as plain numbers; data_sets/views.py makes the views.

    strengths = ViewStrengths(kind="mixed", mask=(0.0, 0.7), center=True)
    ViewStrengths.from_dict(strengths.to_dict()) == strengths

Flags derive from these fields (experiment/view_flags.py), and saved runs hold them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from experiment.errors import WrongInputError
from experiment.settings import setting

GEOMETRIC, MASKS, MIXED, NONE = KINDS = ("geometric", "masks", "mixed", "none")

# The strengths that a view depends on smoothly. It does not on the share of lost pixels, since each
# pixel is lost or not, nor on crops, whose sides are whole numbers of pixels.
LEARNABLE = ("degrees", "brightness", "contrast", "noise")


class ViewError(WrongInputError):
    """Strengths, or data, that no views can be made with; the message is one line."""


def _strength(default: Any, kinds: tuple[str, ...], text: str) -> Any:
    """A field with a default and a help text; `kinds`: the kinds of views it has an effect on."""
    ends = {"metavar": ("LOW", "HIGH")} if isinstance(default, tuple) else {}
    return setting(default, text, "nonnegative", kinds=kinds, **ends)


_WARPED, _MASKED = (GEOMETRIC, MIXED), (MASKS, MIXED)


@dataclass(frozen=True)
class ViewStrengths:
    """The strength of each step in making a view; a step of strength 0 is left out.

    Images are not cropped if crop and crop_ratio are both (1, 1). Raises ViewError for strengths
    out of range.

    kind: geometric (warped, brightness and contrast changed), masks (pixels replaced by means),
        mixed (one of the two, drawn for each batch) or none; noise is added to views of any kind.
    """

    kind: str = _strength(GEOMETRIC, KINDS, "how the two views of an image are made")
    geometric_share: float = _strength(
        0.5, (MIXED,), "share of batches with geometric views (mixed)"
    )
    degrees: float = _strength(25.0, _WARPED, "largest rotation of a view, in degrees")
    crop: tuple[float, float] = _strength(
        (0.7, 1.0), _WARPED, "share of the area that a view shows"
    )
    crop_ratio: tuple[float, float] = _strength((0.75, 1.3333), _WARPED, "width / height of a crop")
    crop_padding: int = _strength(2, _WARPED, "pixels of 0 around an image before it is cropped")
    shift: float = _strength(0.0, _WARPED, "largest shift of a view in each direction, in pixels")
    brightness: float = _strength(0.5, _WARPED, "change of brightness by a factor of 1 -+ this")
    contrast: float = _strength(0.5, _WARPED, "change of contrast by a factor of 1 -+ this")
    mask: tuple[float, float] = _strength((0.0, 0.7), _MASKED, "share of pixels replaced by means")
    noise: float = _strength(0.0, KINDS, "standard deviation of noise added to each pixel")
    center: bool = _strength(False, KINDS, "subtract each pixel's mean over the training images")

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ViewError(f"views {self.kind!r}: choose from {', '.join(KINDS)}")
        for name in ("degrees", "shift", "brightness", "contrast", "noise"):
            self._check(name, lambda x: 0 <= x < math.inf, "a number of at least 0")
        self._check("geometric_share", lambda x: 0 <= x <= 1, "a number from 0 to 1")
        self._check("crop_padding", lambda x: x >= 0 and x == int(x), "whole, of at least 0")
        self._check_range("mask", lambda low, high: 0 <= low <= high <= 1, "0 <= LOW <= HIGH <= 1")
        self._check_range("crop", lambda low, high: 0 < low <= high <= 1, "0 < LOW <= HIGH <= 1")
        self._check_range("crop_ratio", lambda low, high: 0 < low <= high < math.inf,
                          "0 < LOW <= HIGH")  # fmt: skip
        if not isinstance(self.center, bool):
            raise ViewError(f"center must be true or false, not {self.center!r}")

    def _check(self, name: str, right, expected: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not right(value):
            raise ViewError(f"{name} must be {expected}, not {value!r}")

    def _check_range(self, name: str, right, expected: str) -> None:
        value = getattr(self, name)
        pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))
        if not pair or not right(*value):
            raise ViewError(f"{name} must be LOW HIGH with {expected}, not {value!r}")
        object.__setattr__(self, name, tuple(value))  # JSON and flags give a list

    @property
    def crops(self) -> bool:
        """Whether geometric views are cropped."""
        return (self.crop, self.crop_ratio) != ((1, 1), (1, 1))

    @property
    def warps(self) -> bool:
        """Whether geometric views are cropped, rotated or shifted."""
        return self.crops or self.degrees > 0 or self.shift > 0

    @property
    def jitters(self) -> bool:
        """Whether geometric views change in brightness or contrast."""
        return self.brightness > 0 or self.contrast > 0

    @property
    def masks(self) -> bool:
        """Whether some views have lost pixels."""
        return self.matters("mask") and self.mask[1] > 0

    def matters(self, name: str) -> bool:
        """Whether views of this kind depend on the field of this name."""
        return self.kind in FIELDS[name].metadata["kinds"]

    def check_learnable(self, names: tuple[str, ...]) -> None:
        """Raise ViewError unless all of these can be learned, as factors of the given strengths."""
        for name in names:
            if name not in LEARNABLE:
                raise ViewError(f"{name!r} cannot be learned; choose from {', '.join(LEARNABLE)}")
            if not self.matters(name) or not getattr(self, name) > 0:
                kinds = " or ".join(FIELDS[name].metadata["kinds"])
                raise ViewError(f"to learn {name} needs views {kinds}, and a start above 0")

    def to_dict(self) -> dict[str, Any]:
        """The strengths as plain values, for JSON."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> "ViewStrengths":
        """The strengths that `to_dict` described; raises ViewError for anything else."""
        if unknown := set(description) - set(FIELDS):
            raise ViewError(f"views have no {sorted(unknown)[0]}: they have {', '.join(FIELDS)}")
        return cls(**description)


FIELDS = {entry.name: entry for entry in fields(ViewStrengths)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
