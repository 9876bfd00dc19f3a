"""Times the augmentation of a batch against torchvision's transforms of one PIL image at a time.

    python benchmarks/augmentation.py                 # one thread, some seconds

Both pad, rotate, crop and stretch, and change brightness and contrast, with the same settings. The
ways take turns; medians over the repetitions.
tests/test_mnist_datasets.py compares the distributions of their results.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from mnist_datasets import augment, import_torchvision

LIMIT = 256  # images of one repetition of the slow way


def per_image() -> Callable[[Tensor], Tensor]:
    """torchvision's pipeline on PIL images, one after the other."""
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


def rate(way: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Images per CPU second."""
    begin = time.process_time()
    way(images)
    return len(images) / (time.process_time() - begin)


def main() -> None:
    """Prints one row per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator, slow = torch.Generator().manual_seed(0), per_image()
    print(f"28 x 28 images, {arguments.threads} thread(s), torch {torch.__version__}")
    print(f"{'batch':>6} {'per image, images/s':>20} {'batch, images/s':>16} {'ratio':>6}")
    for batch in arguments.batches:
        shape = batch, 1, 28, 28
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        augment(images, generator)
        rounds = [
            (rate(slow, images[:LIMIT]), rate(lambda x: augment(x, generator), images))
            for _ in range(arguments.repeat)
        ]
        theirs, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"{batch:6d} {theirs:20.0f} {ours:16.0f} {ratio:6.1f}")


if __name__ == "__main__":
    main()
