"""Settings of the main job's units, rule and probe; importing it does not load torch."""

import argparse
from dataclasses import dataclass, fields

from experiment.choices import INHIBITION, PROBE_GRADIENTS, PROBES
from experiment.command_line import UserError, refuse_idle_flags
from experiment.settings import setting

TERMS = ("x gain", "x gain y", "x gain y'", "x gain z", "x gain z'", "x gain r", "x gain r'",
         "x gain s", "x gain r_exact", "x gain z var^-1/2", "w")  # fmt: skip
LEARNED = ("eta", "eps", "tau", "beta", "exponents")


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
        "how units inhibit each other; l1 and l2 divide their outputs by a norm",
        choices=INHIBITION,
    )
    inh_steps: int = setting(10, "steps of the lateral dynamics", "nonnegative")
    inh_factor: float = setting(0.2, "size of a step of the lateral dynamics", "fraction")
    forbid_self_inhibition: bool = setting(False, "keep the diagonal of the lateral weights m at 0")
    forbid_excitation: bool = setting(False, "keep the lateral weights m at or below 0")


UNIT_FLAGS = tuple(entry.name for entry in fields(UnitSettings))


@dataclass(frozen=True)
class StatisticsSettings:
    """A rule of unit statistics with its initial hyperparameters; see rules/unit_statistics.py."""

    terms: tuple[str, ...] = setting(
        TERMS, 'terms of the rule, such as "x gain y" (see rules/unit_statistics_terms.py)',
        metavar="TERM", type=term,
    )  # fmt: skip
    eta: float = setting(0.0054, "initial rate of the rule's steps", "positive")
    eps: float = setting(
        0.1, "initial softness of the normalization of the rule's steps", "positive"
    )
    tau: float = setting(
        500.0,
        "initial number of updates after which the rule's rate is halved",
        "positive",
        metavar="UPDATES",
    )
    beta: float = setting(
        10.0, "initial inverse temperature of competition, in terms with share or won", "positive"
    )
    lateral_power: float = setting(
        0.0, "lateral currents are multiplied by (units / 32) to this power, from -16 to 16"
    )
    spread: float = setting(
        0.167, "spread of the initial weights, before it is learned", "positive"
    )
    learn: tuple[str, ...] = setting(
        ("eta",), f"numbers to learn besides coefficients and spread: {', '.join(LEARNED)}",
        choices=LEARNED, metavar="NUMBER", nargs="*",
    )  # fmt: skip


def refuse_idle_temperature(
    args: argparse.Namespace, parser: argparse.ArgumentParser, compete: bool
) -> None:
    """Raise UserError for --beta and --learn beta where no term of the rule competes."""
    needs = "a term with share or won"
    refuse_idle_flags(args, parser, [("beta", compete, needs)])
    if "beta" in args.learn and not compete:
        raise UserError(f"--learn beta needs {needs}: give one, or --learn without beta")


@dataclass(frozen=True)
class ProbeSettings:
    """The probe that judges a training, in meta-steps and at the end; see linear_probe.py."""

    C: float = setting(1000.0, "inverse strength of the probe's penalty", "positive")
    probe: str = setting(
        "logistic",
        "probe of a meta-step: logistic, the same on drawn images (sampled), or ridge",
        choices=PROBES,
    )
    probe_images: int | None = setting(
        None, "images that a meta-step's probe is fitted to (default: chosen for --probe)",
        "positive",
        metavar="N",
    )  # fmt: skip
    probe_gradient: str = setting(
        "envelope", "gradient of the logistic probe; implicit: exact, on images not fitted to",
        choices=PROBE_GRADIENTS,
    )  # fmt: skip
    outer_images: int | None = setting(
        None,
        "images of the outer loss (default: 4096; implicit, sampled 1024; ridge 2000)",
        "positive",
    )
