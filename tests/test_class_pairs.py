"""Pairs of two images of one class: who is whose partner, and what the views are."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from data_sets.class_pairs import ClassPairs, partners_within_classes
from data_sets.image_data import ImageData
from data_sets.views import Views
from experiment.view_strengths import ViewStrengths


def images(count: int = 40) -> ImageData:
    """Images that say which they are, of three classes."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return ImageData(pixels.contiguous(), torch.arange(count) % 3, "here")


def generator(seed: int = 3) -> Generator:
    return Generator().manual_seed(seed)


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 99))
def test_a_partner_is_another_image_of_the_class(labels, seed):
    labels = torch.tensor(labels, dtype=torch.int64)
    partners = partners_within_classes(labels, generator(seed))
    assert partners.sort().values.equal(torch.arange(len(labels)))
    assert labels[partners].equal(labels)
    alone = torch.bincount(labels, minlength=1)[labels] == 1 if len(labels) else labels == 0
    assert (partners == torch.arange(len(labels))).equal(alone)


def test_unchanged_views_are_an_image_and_its_partner():
    data = images()
    partner = partners_within_classes(data.labels, generator(0))
    first, second = next(ClassPairs(Views(data, 8, ViewStrengths("none")))(generator()))
    number = (first[:, 0, 0, 0] * 255).round().long()
    assert (second[:, 0, 0, 0] * 255).round().long().equal(partner[number])


def test_first_views_and_the_numbers_of_second_ones_are_those_of_ordinary_pairs():
    data = images()
    partner = partners_within_classes(data.labels, generator(0))
    for kind in ("geometric", "masks", "mixed"):
        views = Views(data, 8, ViewStrengths(kind, center=True))
        others = Views(data.subset(partner), 8, views.start)
        streams = [make(generator()) for make in (ClassPairs(views), views, others)]
        for _ in range(8):
            (first, second), ordinary, other = map(next, streams)
            assert first.equal(ordinary[0]) and second.equal(other[1])
            assert not second.equal(ordinary[1])
