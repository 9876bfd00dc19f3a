"""Settings of the main job's units, rule and probe; importing it does not load torch."""

import argparse
from dataclasses import dataclass, fields

from experiment.choices import INHIBITION, PROBE_GRADIENTS, PROBES
from experiment.settings import setting

TERMS = ("x gain", "x gain y", "x gain y'", "x gain z", "x gain z'", "x gain r", "x gain r'",
         "x gain s", "x gain r_exact", "x gain z var^-1/2", "w")  # fmt: skip
LEARNED = ("eta", "eps", "tau", "exponents")


def term(text: str) -> str:
    """The type of a flag of terms: any text but whole numbers other than 1; parsed later."""
    if text.isdigit() and text != "1":
        raise argparse.ArgumentTypeError(f"must be a term, such as 'x gain y', not {text!r}")
    return text


@dataclass(frozen=True)
class UnitSettings:
    """How the units of a layer compete; see models_fully_local.py."""

    inhibition: str = setting(
        "lateral",
        "how units compete; l1, l2: y over its norm at each position, or over a whole image",
        choices=INHIBITION,
    )
    inh_steps: int = setting(10, "steps of the lateral dynamics", "nonnegative")
    inh_factor: float = setting(0.2, "size of such a step", "fraction")
    forbid_self_inhibition: bool = setting(False, "keep the diagonal of m at 0")
    forbid_excitation: bool = setting(False, "keep m <= 0")


UNIT_FLAGS = tuple(entry.name for entry in fields(UnitSettings))


@dataclass(frozen=True)
class StatisticsSettings:
    """A rule of unit statistics with its initial hyperparameters; see rules/unit_statistics.py."""

    terms: tuple[str, ...] = setting(
        TERMS, 'what it adds up, such as "x gain y"; rules/unit_statistics_terms.py has the names',
        metavar="TERM", type=term,
    )  # fmt: skip
    eta: float = setting(0.0054, "rate of its steps at first", "positive")
    eps: float = setting(0.1, "softness of their normalisation at first", "positive")
    tau: float = setting(
        500.0, "after so many the rate has fallen by half, at first", "positive", metavar="UPDATES"
    )
    spread: float = setting(0.167, "of the initial weights at first", "positive")
    learn: tuple[str, ...] = setting(
        ("eta",), f"learned beside coefficients and spread: some of {', '.join(LEARNED)}",
        choices=LEARNED, metavar="NUMBER", nargs="*",
    )  # fmt: skip


@dataclass(frozen=True)
class ProbeSettings:
    """The probe that judges a training, in meta-steps and at the end; see linear_probe.py."""

    C: float = setting(1000.0, "inverse penalty of the probe", "positive")
    probe: str = setting(
        "logistic",
        "of a meta-step: logistic regression; the same, fitted to and judged on drawn images; "
        "ridge regression, fitted to drawn ones, judged on others",
        choices=PROBES,
    )
    probe_images: int | None = setting(
        None, "for a meta-step (default: 16 million / features; sampled: 256 for each of them, at "
        "least 8192; ridge: 2000)", "positive",
        metavar="N",
    )  # fmt: skip
    probe_gradient: str = setting(
        "envelope", "implicit: exact, of images that the probe has not seen",
        choices=PROBE_GRADIENTS,
    )  # fmt: skip
    outer_images: int | None = setting(
        None,
        "of the outer loss (default: 4096; implicit 1024; with --probe ridge 2000)",
        "positive",
    )
