"""Pairs of two images of one class, in the place of two views of one image.

first, second = next(ClassPairs(views)(generator))

They tell a rule of pairs what images of a class have in common, by labels that no views know: what
it reaches with them is to be compared with what it reaches with views.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from data_sets.views import Pair, Views


@dataclass(frozen=True)
class ClassPairs:
    """Endless pairs: a view of an image, and a view of another image of its class.

    An image's partner is always the same. First views are those that `views` makes.

    views: of labelled images, by numbers of generators; no strength is learned.
    """

    views: Views

    def __call__(self, generator: Generator) -> Iterator[Pair]:
        """Pairs (x1, x2), each [batch_size, C, H, W]."""
        views, twin = self.views, generator.clone_state()
        data = views.data
        partners = data.subset(partners_within_classes(data.labels, Generator().manual_seed(0)))
        others = Views(partners, views.batch_size, views.start, dtype=views.dtype)
        for (first, _), (_, second) in zip(views(generator), others(twin), strict=True):
            yield first, second


def partners_within_classes(labels: Tensor, generator: Generator) -> Tensor:
    """For each of `labels` [n], the index of another of the same class, int64 [n].

    A random cycle through each class: only the one image of a class is its own partner.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    order = order[labels[order].argsort(stable=True)]
    partners = torch.empty_like(order)
    for of_class in order.split(torch.bincount(labels).tolist()):
        partners[of_class] = of_class.roll(1)
    return partners
