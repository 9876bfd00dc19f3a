"""Times views of each kind relative to pairs of the default ones, in turns.

    python benchmarks/views.py                        # one thread, some seconds
    python benchmarks/views.py --batches 512 --size 32 --channels 3

A row is one pair of batches. "obvious" draws a uniform float for each pixel of a masked view; the
limit makes both views by a product with existing masks.

    of pairs     time relative to that of a pair of default views in the same turn
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Generator, Tensor

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from data_sets.image_data import ImageData
from data_sets.views import Views
from experiment.command_line import positive_int, run_command
from experiment.view_strengths import LEARNABLE, ViewStrengths
from mnist_datasets import normalize_pixels

KINDS = {  # strengths, and which of them are learned
    "pairs": (ViewStrengths(), ()),
    "pairs, learned": (ViewStrengths(noise=0.1), LEARNABLE),
    "rotations alone": (ViewStrengths(crop=(1, 1), crop_ratio=(1, 1), brightness=0, contrast=0),
                        ()),
    "masks": (ViewStrengths("masks"), ()),
    "masks and noise": (ViewStrengths("masks", noise=0.1), ()),
    "mixed": (ViewStrengths("mixed"), ()),
    "none": (ViewStrengths("none"), ()),
}  # fmt: skip


def masked_obviously(x: Tensor, generator: Generator) -> Tensor:
    """x with a share of the pixels of each image set to 0; the share is uniform in 0 to 0.7."""
    share = 0.7 * torch.rand(len(x), 1, 1, 1, generator=generator)
    lost = torch.rand(len(x), 1, *x.shape[2:], generator=generator) < share
    return x.masked_fill(lost.to(x.device), 0)


def masked_views(data: ImageData, batch: int) -> dict[str, Callable[[], object]]:
    """The obvious way to make a pair of masked views, and the limit."""
    generator, rows = torch.Generator().manual_seed(0), torch.arange(batch)
    kept = torch.rand(batch, 1, *data.shape[1:], generator=generator).to(data.images.device) > 0.35

    def limit() -> list[Tensor]:
        x = data.floats(rows)
        return [x * kept for _ in range(2)]

    return {
        "obvious": lambda: [masked_obviously(data.floats(rows), generator) for _ in range(2)],
        "limit": limit,
    }


def rows(data: ImageData, batches: list[int], repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each kind of views and batch size."""
    for batch in batches:
        streams = {
            name: Views(data, batch, strengths, learn=learn)(torch.Generator().manual_seed(0))
            for name, (strengths, learn) in KINDS.items()
        }
        ways = {name: lambda stream=stream: next(stream) for name, stream in streams.items()}
        times = clock.in_turns(ways | masked_views(data, batch), repeat)
        for name in KINDS:
            other = {way: times[way] for way in ("obvious", "limit") if name == "masks"}
            turns = zip(times[name], times["pairs"], strict=True)
            share = statistics.median(ours / pairs for ours, pairs in turns)
            yield Row(name, str(batch), times[name], **other, more={"of pairs": f"{share:.2f}"})


def main(argv: list[str] | None = None) -> None:
    """Print one row per kind of views and batch size."""
    parser = benchmark_parser(__doc__, repeat=25)
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[512])
    parser.add_argument("--size", type=positive_int, default=28, help="side of the images")
    parser.add_argument("--channels", type=positive_int, default=1)
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    shape = (4 * max(arguments.batches), arguments.channels, arguments.size, arguments.size)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
    data = ImageData(images, torch.zeros(len(images), dtype=torch.int64), "random")
    data, _ = normalize_pixels(data, data, unit_variance=False)
    common = f"{arguments.channels} x {arguments.size} x {arguments.size} images, centred"
    print_table(
        rows(data.to(clock.device), arguments.batches, arguments.repeat, clock), clock, common
    )


if __name__ == "__main__":
    run_command(main)
