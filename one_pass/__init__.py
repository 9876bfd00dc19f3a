"""SGD that tunes its own hyperparameters in one pass, and the objectives that it trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {  # the public names of each module, which is loaded when one of them is first used
    "compiled_mlp": "CompiledMLPObjective",
    "errors": "OnePassError",
    "objectives": (
        "Batch Buffers Evaluation HeldOut Linearization MLPObjective ModuleObjective Objective"
    ),
    "replayed": "ReplayedTuning",
    "settings": "DEFAULT_TRANSFORMS METHODS NAMES SMALLEST_POPULATION TRANSFORM_KINDS Settings",
    "samples": "FullBatches Samples SequentialBatches ShuffledBatches",
    "tuning": "State Tuning check_start initial_hyperparameters initial_state",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)

if TYPE_CHECKING:  # the same names for type checkers
    from one_pass.compiled_mlp import CompiledMLPObjective as CompiledMLPObjective
    from one_pass.errors import OnePassError as OnePassError
    from one_pass.objectives import Batch as Batch
    from one_pass.objectives import Buffers as Buffers
    from one_pass.objectives import Evaluation as Evaluation
    from one_pass.objectives import HeldOut as HeldOut
    from one_pass.objectives import Linearization as Linearization
    from one_pass.objectives import MLPObjective as MLPObjective
    from one_pass.objectives import ModuleObjective as ModuleObjective
    from one_pass.objectives import Objective as Objective
    from one_pass.replayed import ReplayedTuning as ReplayedTuning
    from one_pass.samples import FullBatches as FullBatches
    from one_pass.samples import Samples as Samples
    from one_pass.samples import SequentialBatches as SequentialBatches
    from one_pass.samples import ShuffledBatches as ShuffledBatches
    from one_pass.settings import DEFAULT_TRANSFORMS as DEFAULT_TRANSFORMS
    from one_pass.settings import METHODS as METHODS
    from one_pass.settings import NAMES as NAMES
    from one_pass.settings import SMALLEST_POPULATION as SMALLEST_POPULATION
    from one_pass.settings import TRANSFORM_KINDS as TRANSFORM_KINDS
    from one_pass.settings import Settings as Settings
    from one_pass.tuning import State as State
    from one_pass.tuning import Tuning as Tuning
    from one_pass.tuning import check_start as check_start
    from one_pass.tuning import initial_hyperparameters as initial_hyperparameters
    from one_pass.tuning import initial_state as initial_state
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
