"""Tasks of one process: one after the other, or batched by torch.func.vmap.

    python benchmarks/tasks.py                   # one thread, under a minute
    python benchmarks/tasks.py --tasks 8 --units 8 32

One update of the polynomial rule, forward and backward, for several tasks with their own parameters
and batches and the same coefficients. Batching excludes hand-written code: the update must consist
of plain operations (as below: terms factored as in kernels/local_polynomial.py).

    vmap beside plain   ours is the plain update, all tasks at once; obvious: task by task
    ours beside vmap    ours is learning_rules.py, task by task, as `--tasks T`; obvious: vmap

Times are those of all tasks.
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.func import vmap

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_int, run_command
from learning_rules import PolynomialRule
from models_fully_local import Activation, lateral_mlp

INPUTS, INH_STEPS, INH_FACTOR, SLOPE = 784, 10, 0.2, 4.0


def factored_sum(exponents, psi: Tensor, p: Tensor, q, weight: Tensor) -> Tensor:
    """sum_k psi_k mean_b( p_bj^a_k prod_u q_u[b,i]^c_ku ) w_ij^e_k, one product for each (a, e)."""
    groups: dict[tuple[int, int], list] = defaultdict(list)
    for number, (a, *powers, e) in enumerate(exponents):
        groups[a, e].append((number, powers))
    total = torch.zeros_like(weight)
    for (a, e), terms in groups.items():
        combined = torch.zeros_like(q[0])
        for number, powers in terms:
            monomial = psi[number]
            for variable, power in zip(q, powers, strict=True):
                monomial = monomial * variable**power if power else monomial
            combined = combined + monomial
        total = total + combined.T @ p**a * weight**e / len(p)
    return total


def plain_update(rule: PolynomialRule, psi: dict[str, Tensor], w, b, m, x) -> tuple[Tensor, ...]:
    """The rule's update of one layer, bounded by tanh, in plain operations."""
    s = x @ w.T + b
    y = torch.sigmoid(SLOPE * s)
    for _ in range(INH_STEPS):
        y = y + INH_FACTOR * (torch.sigmoid(SLOPE * (s + y @ m.T)) - y)
    ones = torch.ones_like(x[:, :1])
    of_b = [(0, *term) for term in rule.exponents["b"]]
    changes = (
        factored_sum(rule.exponents["w"], psi["w"], x, (s, y), w),
        factored_sum(of_b, psi["b"], ones, (y,), b[:, None])[:, 0],
        factored_sum(rule.exponents["m"], psi["m"], y, (y,), m)
        + psi["diagonal"] * torch.eye(len(m), device=m.device),
    )
    size = rule.bound_size
    return tuple(t + size * torch.tanh(d / size) for t, d in zip((w, b, m), changes, strict=True))


def ways(tasks: int, units: int, batch: int, device: torch.device) -> dict:
    """The three functions to time, by name; each returns its new parameters."""
    generator = torch.Generator().manual_seed(0)
    rule = PolynomialRule.of_degree(3, bound="tanh")
    for p in rule.parameters():
        torch.nn.init.normal_(p, std=1e-4, generator=generator)
    rule.to(device)
    shapes = {"w": (units, INPUTS), "b": (units,), "m": (units, units)}
    start = {
        n: (0.05 * torch.randn(tasks, *s, generator=generator)).to(device).requires_grad_()
        for n, s in shapes.items()
    }
    x = torch.rand(tasks, batch, INPUTS, generator=generator).to(device)
    psi = dict(rule.named_parameters())
    model = lateral_mlp(
        INPUTS, [units], Activation("sigmoid", SLOPE), inh_steps=INH_STEPS, inh_factor=INH_FACTOR
    )

    def ours():
        news = [
            rule.update(model, [{}, {n: t[k] for n, t in start.items()}], x[k])[1]
            for k in range(tasks)
        ]
        return tuple(torch.stack([new[n] for new in news]) for n in shapes)

    def plain():
        news = [
            plain_update(rule, psi, *(t[k] for t in start.values()), x[k]) for k in range(tasks)
        ]
        return tuple(map(torch.stack, zip(*news, strict=True)))

    def batched():
        return vmap(lambda w, b, m, x: plain_update(rule, psi, w, b, m, x))(*start.values(), x)

    leaves = [*rule.parameters(), *start.values()]

    def with_gradient(update):
        def run() -> list[Tensor]:
            new = update()
            loss = sum(tensor.square().sum() for tensor in new)
            return [*new, *torch.autograd.grad(loss, leaves)]

        return run

    return {"plain": with_gradient(plain), "vmap": with_gradient(batched),
            "ours": with_gradient(ours)}  # fmt: skip


def refuse_differences(timed: dict) -> None:
    """Raise AssertionError if the results differ."""
    expected = timed["ours"]()
    for run in timed.values():
        for ours, theirs in zip(expected, run(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def rows(tasks: int, units: int, batch: int, repeat: int, clock: Clock) -> Iterator[Row]:
    """The rows of both comparisons at one size."""
    timed = ways(tasks, units, batch, clock.device)
    refuse_differences(timed)
    times = clock.in_turns(timed, repeat)
    sizes = f"{units} units x {batch}"
    yield Row("vmap beside plain", sizes, times["vmap"], times["plain"])
    yield Row("ours beside vmap", sizes, times["ours"], times["vmap"])


def main(argv: list[str] | None = None) -> None:
    """Print two rows per size."""
    parser = benchmark_parser(__doc__, repeat=5)
    parser.add_argument("--tasks", type=positive_int, default=4)
    parser.add_argument("--units", type=positive_int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--batch-sizes", type=positive_int, nargs="+", default=[64, 256])
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    lines = (
        rows(arguments.tasks, units, batch, arguments.repeat, clock)
        for units, batch in itertools.product(arguments.units, arguments.batch_sizes)
    )
    common = f"{arguments.tasks} tasks, {INPUTS} inputs, degree 3"
    print_table(itertools.chain.from_iterable(lines), clock, common)


if __name__ == "__main__":
    run_command(main)
