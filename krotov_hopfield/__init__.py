"""Layers of competing hidden units, the compiled loops of their update, networks, and training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {  # the public names of each module, which is loaded when one of them is first used
    "biopytorch": "bio_train same_padding",
    "choices": "ACTING AUGMENTATIONS FEATURE_NORMS GATES NORMALIZATIONS SCHEDULES gate_needs",
    "competition": "Competition",
    "errors": "CompetitionError NonFiniteError",
    "network": "Block Classifier KrotovHopfieldNetwork",
    "layers": "BioConv2d BioLinear Triangle",
    "layerwise_training": "LayerwiseTraining split_validation",
    "recipes": "DEEPEST RECIPES LayerPlan Recipe exponential_rate learning_rate",
    "saved_networks": "classifying load_network network_to_dict parameter_table",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)

if TYPE_CHECKING:  # the same names for type checkers
    from krotov_hopfield.biopytorch import bio_train as bio_train
    from krotov_hopfield.biopytorch import same_padding as same_padding
    from krotov_hopfield.choices import ACTING as ACTING
    from krotov_hopfield.choices import AUGMENTATIONS as AUGMENTATIONS
    from krotov_hopfield.choices import FEATURE_NORMS as FEATURE_NORMS
    from krotov_hopfield.choices import GATES as GATES
    from krotov_hopfield.choices import NORMALIZATIONS as NORMALIZATIONS
    from krotov_hopfield.choices import SCHEDULES as SCHEDULES
    from krotov_hopfield.choices import gate_needs as gate_needs
    from krotov_hopfield.competition import Competition as Competition
    from krotov_hopfield.errors import CompetitionError as CompetitionError
    from krotov_hopfield.errors import NonFiniteError as NonFiniteError
    from krotov_hopfield.layers import BioConv2d as BioConv2d
    from krotov_hopfield.layers import BioLinear as BioLinear
    from krotov_hopfield.layers import Triangle as Triangle
    from krotov_hopfield.layerwise_training import LayerwiseTraining as LayerwiseTraining
    from krotov_hopfield.layerwise_training import split_validation as split_validation
    from krotov_hopfield.network import Block as Block
    from krotov_hopfield.network import Classifier as Classifier
    from krotov_hopfield.network import KrotovHopfieldNetwork as KrotovHopfieldNetwork
    from krotov_hopfield.recipes import DEEPEST as DEEPEST
    from krotov_hopfield.recipes import RECIPES as RECIPES
    from krotov_hopfield.recipes import LayerPlan as LayerPlan
    from krotov_hopfield.recipes import Recipe as Recipe
    from krotov_hopfield.recipes import exponential_rate as exponential_rate
    from krotov_hopfield.recipes import learning_rate as learning_rate
    from krotov_hopfield.saved_networks import classifying as classifying
    from krotov_hopfield.saved_networks import load_network as load_network
    from krotov_hopfield.saved_networks import network_to_dict as network_to_dict
    from krotov_hopfield.saved_networks import parameter_table as parameter_table
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
