"""The search space of a sweep: flags of a command, their ranges, and grids of them.

lr=log:1e-6:1e-1          uniform in the logarithm
momentum=0:1              uniform
k=int:2:10                whole numbers, both ends included
delta=step:0:0.4:0.005    0, 0.005, ..., 0.4
p=choice:2,3,4            any texts
p.1-4=int:2:8             the first four values of a flag with several; beside it, p.5=...
"""

import argparse
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from experiment.command_line import LARGEST, LARGEST_WHOLE

FORMS = {
    "log": "NAME=log:LOW:HIGH",
    "int": "NAME=int:LOW:HIGH",
    "step": "NAME=step:LOW:HIGH:STEP",
    "choice": "NAME=choice:A,B,...",
    "": "NAME=LOW:HIGH",
}

MOST_VALUES = 10**5  # the most steps of a flag, or points of a grid

Value = float | int | str


@dataclass(frozen=True)
class SearchedFlag:
    """A flag of the command, without its dashes, and the values it may take.

    Attributes:
        name: the flag, and after a dot which of its values, from 1, all of which are the same.
        range: the text after NAME=.
        kind: a key of FORMS.
        low, high: the smallest and the largest value; None for the kind "choice".
        choices: the texts of the kind "choice"; () for the others.
    """

    name: str
    range: str
    kind: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={self.range}"

    @property
    def flag(self) -> str:
        """The name of the command's flag."""
        return self.name.partition(".")[0]

    @property
    def places(self) -> range:
        """Which of the flag's values these are, from 1."""
        first, _, last = (self.name.partition(".")[2] or "1").partition("-")
        return range(int(first), int(last or first) + 1)

    def at(self, share: float) -> Value:
        """The value at the quantile `share` in [0, 1) of the flag's distribution."""
        values = self.values()
        if values is not None:
            return values[int(share * len(values))]
        if self.kind == "log":
            value = self.low * math.exp(share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(value, self.low), self.high)  # rounding may have left the range

    def values(self) -> Sequence[Value] | None:
        """All values in their order; None if they form a continuum."""
        if self.kind == "choice":
            return self.choices
        if self.kind == "int":
            return range(self.low, self.high + 1)
        if self.kind == "step":
            return [float(value) for value in _stepped(self.range)]
        return None

    def exact(self, value: Value) -> Value:
        """`value` without rounding errors: for the kind "step" the nearest of its values."""
        if self.kind == "step":
            return min(self.values(), key=lambda multiple: abs(multiple - value))
        return value


def searched_flag(text: str) -> SearchedFlag:
    """The flag described by a text in one of the FORMS; raises argparse.ArgumentTypeError."""
    name, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z][\w-]*(\.\d{1,3}(-\d{1,3})?)?", name):
        raise _malformed(text, f"must be one of {', '.join(FORMS.values())}")
    kind, colon, rest = values.partition(":")
    if kind not in FORMS or not colon:
        kind, rest = "", values
    try:
        return SearchedFlag(name, values, kind, **_limits(kind, rest))
    except (ValueError, InvalidOperation) as error:
        why = f" ({error})" if isinstance(error, _RangeError) else ""
        raise _malformed(text, f"must be {FORMS[kind]}{why}") from None


def grid(flags: Sequence[SearchedFlag]) -> Iterator[dict[str, Value]]:
    """All combinations, the last flag changing fastest. No flag's `values()` may be None."""
    for values in itertools.product(*(flag.values() for flag in flags)):
        yield {flag.name: value for flag, value in zip(flags, values, strict=True)}


class _RangeError(ValueError):
    """A range that is not allowed; the message says what would be."""


def _malformed(text: str, what: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{what}, not {text!r}")


def _limits(kind: str, text: str) -> dict[str, Any]:
    """The ends or choices in the text after the kind; raises ValueError or InvalidOperation."""
    if kind == "choice":
        choices = text.split(",")
        if "" in choices or len(set(choices)) < len(choices):
            raise _RangeError("choices are different and not empty")
        return {"choices": tuple(choices)}
    if kind == "step":
        values = _stepped(text)
        return {"low": float(values[0]), "high": float(values[-1])}
    low, high = map(int if kind == "int" else float, text.split(":"))
    _check_order(low, high)
    if kind == "int" and max(abs(low), abs(high)) > LARGEST_WHOLE:
        raise _RangeError(f"ends of at most {LARGEST_WHOLE}")
    if kind == "log" and low <= 0:
        raise _RangeError("LOW above 0")
    return {"low": low, "high": high}


def _stepped(text: str) -> list[Decimal]:
    """The values of [step:]LOW:HIGH:STEP as exact decimals."""
    low, high, step = map(Decimal, text.removeprefix("step:").split(":"))
    _check_order(low, high)
    if not 0 < step <= high - low:
        raise _RangeError("STEP above 0, at most HIGH - LOW")
    if high - low > MOST_VALUES * step:
        raise _RangeError(f"at most {MOST_VALUES} steps")
    return [low + i * step for i in range(int((high - low) / step) + 1)]


def _check_order(low, high) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise _RangeError("LOW below HIGH")
    if max(abs(low), abs(high)) > LARGEST:
        raise _RangeError(f"ends of at most {LARGEST:g}")
