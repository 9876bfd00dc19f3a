"""Times the augmentation of a batch, and torchvision's transforms of one PIL image at a time.

    python benchmarks/augmentation.py                 # one thread, some seconds

Both pad, rotate, crop and stretch images, and change brightness and contrast, with the same
settings. tests/test_mnist_datasets.py compares the distributions of their results.

    images/s     of ours
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.table import Clock, Row, benchmark_parser, print_table, set_up
from experiment.command_line import positive_int, run_command
from mnist_datasets import augment, import_torchvision

AT_MOST = 256  # images in a turn of torchvision's; its time is scaled up to the batch


def per_image() -> Callable[[Tensor], Tensor]:
    """torchvision's pipeline, applied to one PIL image after the other."""
    transforms = import_torchvision().transforms
    pipeline = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Pad(2),
            transforms.RandomRotation(25),
            transforms.RandomResizedCrop(28, (0.7, 1.0), (0.75, 1.3333)),
            transforms.ColorJitter(0.5, 0.5),
            transforms.ToTensor(),
        ]
    )
    return lambda images: torch.stack([pipeline(image) for image in images])


def rows(batches: list[int], repeat: int, clock: Clock) -> Iterator[Row]:
    """One row for each batch size."""
    generator, slow = torch.Generator().manual_seed(0), per_image()
    for batch in batches:
        shape = batch, 1, 28, 28
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        few, moved = images[:AT_MOST], images.to(clock.device)
        ways = {
            "obvious": lambda few=few: slow(few),
            "ours": lambda moved=moved: augment(moved, generator),
        }
        times = clock.in_turns(ways, repeat)
        times["obvious"] = [t * batch / len(few) for t in times["obvious"]]
        rate = 1e3 * batch / statistics.median(times["ours"])
        yield Row("augmented batch", str(batch), **times, more={"images/s": f"{rate:.0f}"})


def main(argv: list[str] | None = None) -> None:
    """Print one row per batch size."""
    parser = benchmark_parser(__doc__, repeat=9)
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[256, 1024])
    arguments = parser.parse_args(argv)
    clock = set_up(arguments)
    print_table(rows(arguments.batches, arguments.repeat, clock), clock, "28 x 28 images")


if __name__ == "__main__":
    run_command(main)
