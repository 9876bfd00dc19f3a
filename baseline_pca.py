"""Baseline: the accuracy of a linear probe on the first k principal components of the images.

    python baseline_pca.py                               k = 1, 2, 4, ..., all pixels
    python baseline_pca.py --components 1 2 5 10 20      other k
    python baseline_pca.py --resume runs/baseline_pca-...

The images are projected onto the components but not whitened: the probe's penalty weighs as it does
on pixels, and the probe on all components is the probe on pixels. Nothing is random here: --seed
has no effect.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property

from experiment.command_line import (
    UserError,
    common_parser,
    parse,
    positive_float,
    positive_int,
    run_command,
)


def make_parser():
    """The command's flags."""
    parser = common_parser("Probe the principal components of the images.", "baseline_pca")
    add = parser.add_argument_group("principal components").add_argument
    add("--components", type=positive_int, nargs="+", metavar="K",
        help="numbers of components (default: powers of two, and all)")  # fmt: skip
    add("--pixelwise_normalization", action="store_true",
        help="give each pixel mean 0 and variance 1")  # fmt: skip
    add("--C", type=positive_float, default=1000.0, help="inverse strength of the probe's penalty")
    return parser


if __name__ == "__main__":
    parse(make_parser())  # answers --help and wrong flags before torch is loaded

import torch

from comparison.principal_components import PrincipalComponents, principal_components, projection
from experiment.devices import set_up
from experiment.loop import run_steps
from experiment.opening import open_run
from experiment.run_log import RunLog
from figures.baselines import plot_pca_run
from figures.meta_learning import ACCURACIES
from linear_probe import linear_probe
from mnist_datasets import ImageData, load_images, normalize_pixels


def numbers_of_components(wanted: Sequence[int] | None, pixels: int) -> list[int]:
    """The wanted numbers, sorted and without repetition; by default the powers of two, and all.

    Raises UserError if there are fewer pixels.
    """
    if wanted is None:
        return [2**i for i in range((pixels - 1).bit_length())] + [pixels]
    if max(wanted) > pixels:
        raise UserError(
            f"--components {max(wanted)}: images of {pixels} pixels have no more than {pixels}"
        )
    return sorted(set(wanted))


class ProbedComponents:
    """Probes the first k principal components, for one k after the other; see `run_steps`.

    warn: called with a message for each probe that stops before its optimum.
    """

    def __init__(
        self,
        ks: Sequence[int],
        train_data: ImageData,
        test_data: ImageData,
        C: float,
        dtype: torch.dtype,
        warn: Callable[[str], None],
    ) -> None:
        self.left, self.data, self.C, self.dtype = list(ks), (train_data, test_data), C, dtype
        self.warn = warn
        self.table: list[dict[str, float]] = []

    @property
    def finished(self) -> bool:
        """Whether no k is left."""
        return not self.left

    @cached_property
    def principal(self) -> PrincipalComponents:
        """The principal components of the training images."""
        return principal_components(self.data[0])

    def step(self) -> dict[str, float]:
        """The numbers of the probe on the next k components, and their share of the variance."""
        begin, k = time.perf_counter(), self.left.pop(0)
        result = linear_probe(*projection(self.principal, k, self.dtype), *self.data, self.C)
        if not result.fit.converged:
            self.warn(f"{k} components: the probe stopped before its optimum")
        variances = self.principal.variances
        numbers = {
            "variance_share": float(variances[:k].sum() / variances.sum()),
            **{name: getattr(result, name) for name in ACCURACIES},
        }
        self.table.append({"components": k, **numbers})
        return numbers | {"seconds": time.perf_counter() - begin}

    def state_dict(self) -> dict:
        """The numbers of components that are left, and the results so far."""
        return {"left": self.left, "table": self.table}

    def load_state_dict(self, state: dict) -> None:
        """Continue from the result of `state_dict`."""
        self.left, self.table = list(state["left"]), list(state["table"])


def report(args, log: RunLog, source: str, table: list[dict[str, float]]) -> None:
    """Print and write the table; draw its figure."""
    log.write_results({"data": source, "C": args.C, "table": table})
    log.plot(plot_pca_run)
    log.say(f"{'components':>10}  {'variance':>9}  {'training':>9}  {'test':>9}")
    for row in table:
        k, *shares = row.values()
        log.say(f"{k:10d}" + "".join(f"  {value:9.2%}" for value in shares))
    log.say(f"everything is in {log.directory}")


def main(argv: list[str] | None = None) -> None:
    """Data; the loop over numbers of components; the report."""
    args = parse(make_parser(), argv)
    device, dtype = set_up(args)
    train_data, test_data = (d.to(device) for d in load_images(args.dataset, args.data_dir))
    if args.pixelwise_normalization:
        train_data, test_data = normalize_pixels(train_data, test_data)
    ks = numbers_of_components(args.components, math.prod(train_data.shape))
    with open_run(args, "baseline_pca", train_data) as log:
        log.say(train_data.source)
        probed = ProbedComponents(ks, train_data, test_data, args.C, dtype, log.warn)
        finished = run_steps(log, probed, "components", len(ks), numbers=ks, shown=ACCURACIES)
        report(args, log, train_data.source, probed.table)
    if not finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
