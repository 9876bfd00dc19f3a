"""Networks as files: our own, and those of BioPyTorch."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from krotov_hopfield import (
    RECIPES,
    BioConv2d,
    Classifier,
    CompetitionError,
    KrotovHopfieldNetwork,
    classifying,
    load_network,
    network_to_dict,
    parameter_table,
)

PUBLISHED = {1: 195_370, 2: 302_122, 3: 386_986, 4: 804_394, 5: 1_475_554}  # by layers


def network_of(depth: int, preset: str = "deep", dtype=torch.float32) -> nn.Sequential:
    """The first layers of a preset, on 32 x 32 colours, with a classifier of ten classes."""
    start = torch.Generator().manual_seed(0)
    layers = KrotovHopfieldNetwork((3, 32, 32), RECIPES[preset](depth), start, dtype=dtype)
    features = layers(torch.zeros(1, 3, 32, 32, dtype=dtype)).shape[1:]
    norm = layers.recipe.feature_norm
    classifier = Classifier(features, 10, 0.1, start, feature_norm=norm, dtype=dtype)
    return classifying(layers, classifier, depth)


@pytest.mark.parametrize("depth", PUBLISHED)
def test_the_deep_networks_have_as_many_parameters_as_the_published_ones(depth):
    rows = parameter_table(network_of(depth))
    assert sum(count for _, _, count in rows) == PUBLISHED[depth]
    assert rows[0] == ("BioConv2d", [96, 3, 5, 5], 7200) and len(rows) == depth + 1


@pytest.mark.parametrize(("preset", "dtype"), [("deep", torch.float64), ("softhebb", None)])
def test_a_saved_network_answers_as_before(preset, dtype, tmp_path):
    network, x = network_of(2, preset, dtype or torch.float32), torch.rand(2, 3, 32, 32)
    torch.save(network_to_dict(network), tmp_path / "network.pt")
    assert torch.equal(load_network(tmp_path / "network.pt")(x.to(dtype)), network(x.to(dtype)))


def test_of_a_network_the_first_layers_may_be_kept():
    whole, start = network_of(3), torch.Generator()
    part = classifying(whole[0], Classifier((96, 14, 14), 10, 0.0, start), 1)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(part[0](x), whole[0].blocks[0](x)) and len(whole[0].blocks) == 3
    assert len(network_to_dict(part)["recipe"]["layers"]) == 1


# ---- BioPyTorch's: written by classes of BioPyTorch's names and attributes ----


class TheirConv2d(nn.Module):
    __module__, __qualname__ = "biopytorch.bioconv2d", "BioConv2d"

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = channels, units, 1
        self.kernel_size, self.stride, self.dilation = (3, 3), (1, 1), (1, 1)
        self.padding, self.padding_mode = 0, "zeros"
        self.F_padding, self.conv2d_padding, self.F_pad = (0, 0, 0, 0), (0, 0), False
        weight = torch.randn(units, channels, 3, 3)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lebesgue_p, self.ranking_param, self.delta = 3, 2, 0.25
        self.batch_norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x):
        weight = self.weight.sign() * self.weight.abs() ** 2
        return nn.functional.conv2d(self.batch_norm(x), weight)


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """A network in the form of BioPyTorch's files, and the file."""
    module = ModuleType(TheirConv2d.__module__)
    module.BioConv2d = TheirConv2d
    for name in ("biopytorch", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Sequential(TheirConv2d(3, 5), nn.ReLU(), nn.MaxPool2d(2))),
        nn.BatchNorm2d(5, affine=False), nn.Flatten(), nn.Dropout(0.3), nn.Linear(45, 10),
    )  # fmt: skip
    network(torch.rand(20, 3, 8, 8))  # running statistics
    network.eval()
    torch.save(network, tmp_path / "theirs.pt")
    return network, tmp_path / "theirs.pt"


def test_a_saved_network_answers_as_it_did(saved):
    theirs, path = saved
    ours, x = load_network(path), torch.rand(4, 3, 8, 8)
    layer = ours[0][0][0]
    assert isinstance(layer, BioConv2d) and (layer.delta, layer.ranking_param) == (0.25, 2)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_other_files_are_refused_and_nothing_in_them_is_run(tmp_path):
    for content in (torch.nn.GRU(2, 3), {"weight": torch.ones(2)}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CompetitionError, match="is no network of competing layers"):
            load_network(tmp_path / "other.pt")
    (tmp_path / "other.pt").write_bytes(b"nothing")
    for path in (tmp_path / "other.pt", tmp_path / "none.pt"):
        with pytest.raises(CompetitionError, match="is no network of competing layers"):
            load_network(path)
