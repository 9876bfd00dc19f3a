"""Networks of competing layers with their classifier, saved to and loaded from files.

    torch.save(network_to_dict(network, classifier), "classifier_2.pt")
    network = load_network("classifier_2.pt")     # or BioPyTorch's layers2.pt
    logits = network(images)                      # [batch, C, H, W], in [0, 1]

Loading a file runs no code from it: our files hold plain values and tensors, BioPyTorch's may refer
to the layers listed in _KNOWN only.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn

from krotov_hopfield.errors import CompetitionError
from krotov_hopfield.layers import BioConv2d, BioLinear
from krotov_hopfield.network import Classifier, KrotovHopfieldNetwork
from krotov_hopfield.recipes import LayerPlan, Recipe

# errors raised by reading a file that holds no network
_UNREADABLE = (
    OSError, EOFError, UnpicklingError, RuntimeError, AttributeError, TypeError, LookupError,
)  # fmt: skip


def classifying(
    network: KrotovHopfieldNetwork, classifier: Classifier, depth: int
) -> nn.Sequential:
    """A copy of the first `depth` layers followed by the classifier, in evaluation mode."""
    first = copy.deepcopy(network)
    first.blocks = first.blocks[:depth]
    first.recipe = replace(network.recipe, layers=network.recipe.layers[:depth])
    return nn.Sequential(first, copy.deepcopy(classifier)).eval()


def network_to_dict(network: nn.Sequential) -> dict[str, Any]:
    """The result of `classifying` as plain values and tensors."""
    layers, classifier = network
    return {
        "recipe": asdict(layers.recipe),
        "input_shape": list(layers.input_shape),
        "classes": classifier.linear.out_features,
        "state": network.state_dict(),
    }


def load_network(path: Path | str) -> nn.Sequential:
    """The network in a file, on the CPU and in evaluation mode.

    Raises CompetitionError if the file holds none.
    """
    try:
        with torch.serialization.safe_globals(_KNOWN):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, nn.Sequential):
            return _with_our_layers(content).eval()
        return _from_dict(content)
    except CompetitionError as problem:
        raise CompetitionError(f"{path}: {problem}") from problem
    except _UNREADABLE as problem:
        reason = str(problem).strip().split("\n")[0]
        raise CompetitionError(
            f"{path} is no network of competing layers, ours or BioPyTorch's: {reason}"
        ) from problem


def _from_dict(content: dict[str, Any]) -> nn.Sequential:
    plans = tuple(LayerPlan(**plan) for plan in content["recipe"]["layers"])
    recipe, state = Recipe(**content["recipe"] | {"layers": plans}), content["state"]
    dtype, start = state["1.linear.weight"].dtype, torch.Generator()
    layers = KrotovHopfieldNetwork(content["input_shape"], recipe, start, dtype=dtype)
    features = layers(torch.zeros(1, *content["input_shape"], dtype=dtype)).shape[1:]
    classifier = Classifier(
        features, content["classes"], recipe.dropout, start, feature_norm=recipe.feature_norm,
        dtype=dtype,
    )  # fmt: skip
    network = nn.Sequential(layers, classifier)
    network.load_state_dict(state)
    return network.eval()


def parameter_table(network: nn.Module) -> list[tuple[str, Sequence[int], int]]:
    """Name, shape of the weights and number of parameters of each layer that has weights."""
    rows = []
    for layer in network.modules():
        if getattr(layer, "weight", None) is not None:
            count = sum(p.numel() for p in layer.parameters(recurse=False))
            rows.append((type(layer).__name__, list(layer.weight.shape), count))
    return rows


# ---- BioPyTorch's files ----


class _SavedConv2d(nn.Module):
    """Takes the place of BioPyTorch's BioConv2d, with the attributes it has in the file."""

    def ours(self) -> BioConv2d:
        return BioConv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.lebesgue_p,
            self.ranking_param, float(self.delta), self.stride, self.padding, self.dilation,
            self.groups,
            padding_mode={"constant": "zeros"}.get(self.padding_mode, self.padding_mode),
            dtype=self.weight.dtype,
        )  # fmt: skip


class _SavedLinear(nn.Module):
    """Takes the place of BioPyTorch's BioLinear, with the attributes it has in the file."""

    def ours(self) -> BioLinear:
        if self.bias is not None:
            raise CompetitionError("its BioLinear has a bias, which responds otherwise here")
        return BioLinear(
            int(self.in_features), self.out_features, False, float(self.delta), self.ranking_param,
            self.lebesgue_p, dtype=self.weight.dtype,
        )  # fmt: skip


_KNOWN = [  # the only objects that files may refer to
    nn.Sequential, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU, nn.Dropout, nn.Linear,
    nn.Flatten,
    (_SavedConv2d, "biopytorch.bioconv2d.BioConv2d"),
    (_SavedLinear, "biopytorch.biolinear.BioLinear"),
    np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.float64)),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
]  # fmt: skip


def _with_our_layers(module: nn.Module) -> nn.Module:
    if isinstance(module, _SavedConv2d | _SavedLinear):
        layer = module.ours()
        layer.load_state_dict(module.state_dict())
        return layer
    for name, child in module.named_children():
        module.add_module(name, _with_our_layers(child))
    return module
