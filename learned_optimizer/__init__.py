"""Learned optimisers: networks, meta-training, the optimizees they train on, broken symmetries."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {  # the public names of each module, which is loaded when one of them is first used
    "errors": "NonFiniteError OptimizerError",
    "meta_training": "MetaTraining Team Validation",
    "networks": "CoordinateLSTM CoordinateMLP CoordinateNetwork make_network",
    "optimizees": "Optimizee Task image_optimizee make_task",
    "optimizer": "LearnedOptimizer",
    "saved_optimizers": "load_network network_to_dict save_network",
    "settings": (
        "BATCH_SIZE CONTROL ESTIMATORS EXTRA_INPUTS NETWORK_KINDS SELECTIONS SMALL_STEPS "
        "SYMMETRY_KINDS MetaTrainingSettings"
    ),
    "symmetries": (
        "Symmetry covariance_size find_symmetries mean_deviations never_zero symmetry_penalty "
        "tail_index"
    ),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)

if TYPE_CHECKING:  # the same names for type checkers
    from learned_optimizer.errors import NonFiniteError as NonFiniteError
    from learned_optimizer.errors import OptimizerError as OptimizerError
    from learned_optimizer.meta_training import MetaTraining as MetaTraining
    from learned_optimizer.meta_training import Team as Team
    from learned_optimizer.meta_training import Validation as Validation
    from learned_optimizer.networks import CoordinateLSTM as CoordinateLSTM
    from learned_optimizer.networks import CoordinateMLP as CoordinateMLP
    from learned_optimizer.networks import CoordinateNetwork as CoordinateNetwork
    from learned_optimizer.networks import make_network as make_network
    from learned_optimizer.optimizees import Optimizee as Optimizee
    from learned_optimizer.optimizees import Task as Task
    from learned_optimizer.optimizees import image_optimizee as image_optimizee
    from learned_optimizer.optimizees import make_task as make_task
    from learned_optimizer.optimizer import LearnedOptimizer as LearnedOptimizer
    from learned_optimizer.saved_optimizers import load_network as load_network
    from learned_optimizer.saved_optimizers import network_to_dict as network_to_dict
    from learned_optimizer.saved_optimizers import save_network as save_network
    from learned_optimizer.settings import BATCH_SIZE as BATCH_SIZE
    from learned_optimizer.settings import CONTROL as CONTROL
    from learned_optimizer.settings import ESTIMATORS as ESTIMATORS
    from learned_optimizer.settings import EXTRA_INPUTS as EXTRA_INPUTS
    from learned_optimizer.settings import NETWORK_KINDS as NETWORK_KINDS
    from learned_optimizer.settings import SELECTIONS as SELECTIONS
    from learned_optimizer.settings import SMALL_STEPS as SMALL_STEPS
    from learned_optimizer.settings import SYMMETRY_KINDS as SYMMETRY_KINDS
    from learned_optimizer.settings import MetaTrainingSettings as MetaTrainingSettings
    from learned_optimizer.symmetries import Symmetry as Symmetry
    from learned_optimizer.symmetries import covariance_size as covariance_size
    from learned_optimizer.symmetries import find_symmetries as find_symmetries
    from learned_optimizer.symmetries import mean_deviations as mean_deviations
    from learned_optimizer.symmetries import never_zero as never_zero
    from learned_optimizer.symmetries import symmetry_penalty as symmetry_penalty
    from learned_optimizer.symmetries import tail_index as tail_index
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
