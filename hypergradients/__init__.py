"""Hypergradients of any update maps: HyperTorch's functions and more, solvers, inner optimisers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {  # the public names of each module, which is loaded when one of them is first used
    "errors": "DivergenceError DivergenceWarning HypergradientError",
    "inner_optimizers": (
        "Adam DifferentiableOptimizer GradientDescent HeavyBall Momentum Nesterov gd_step"
    ),
    "linear_solvers": (
        "ConjugateGradient FixedPoint NormalEquations NystromConjugateGradient Optimizer Solver"
    ),
    "methods": (
        "CG CG_normaleq LinearSolve checkpointed_reverse differentiable_by exact fixed_point "
        "forward_mode implicit neumann neumann_lookback nystrom reverse reverse_unroll stoch_AID "
        "truncated_reverse"
    ),
    "strategies": "Pairs evolution_strategies persistent_evolution_strategies",
    "update_maps": "OuterLoss UpdateMap advance jvp update_tensor_grads",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)

if TYPE_CHECKING:  # the same names for type checkers
    from hypergradients.errors import DivergenceError as DivergenceError
    from hypergradients.errors import DivergenceWarning as DivergenceWarning
    from hypergradients.errors import HypergradientError as HypergradientError
    from hypergradients.inner_optimizers import Adam as Adam
    from hypergradients.inner_optimizers import DifferentiableOptimizer as DifferentiableOptimizer
    from hypergradients.inner_optimizers import GradientDescent as GradientDescent
    from hypergradients.inner_optimizers import HeavyBall as HeavyBall
    from hypergradients.inner_optimizers import Momentum as Momentum
    from hypergradients.inner_optimizers import Nesterov as Nesterov
    from hypergradients.inner_optimizers import gd_step as gd_step
    from hypergradients.linear_solvers import ConjugateGradient as ConjugateGradient
    from hypergradients.linear_solvers import FixedPoint as FixedPoint
    from hypergradients.linear_solvers import NormalEquations as NormalEquations
    from hypergradients.linear_solvers import NystromConjugateGradient as NystromConjugateGradient
    from hypergradients.linear_solvers import Optimizer as Optimizer
    from hypergradients.linear_solvers import Solver as Solver
    from hypergradients.methods import CG as CG
    from hypergradients.methods import CG_normaleq as CG_normaleq
    from hypergradients.methods import LinearSolve as LinearSolve
    from hypergradients.methods import checkpointed_reverse as checkpointed_reverse
    from hypergradients.methods import differentiable_by as differentiable_by
    from hypergradients.methods import exact as exact
    from hypergradients.methods import fixed_point as fixed_point
    from hypergradients.methods import forward_mode as forward_mode
    from hypergradients.methods import implicit as implicit
    from hypergradients.methods import neumann as neumann
    from hypergradients.methods import neumann_lookback as neumann_lookback
    from hypergradients.methods import nystrom as nystrom
    from hypergradients.methods import reverse as reverse
    from hypergradients.methods import reverse_unroll as reverse_unroll
    from hypergradients.methods import stoch_AID as stoch_AID
    from hypergradients.methods import truncated_reverse as truncated_reverse
    from hypergradients.strategies import Pairs as Pairs
    from hypergradients.strategies import evolution_strategies as evolution_strategies
    from hypergradients.strategies import (
        persistent_evolution_strategies as persistent_evolution_strategies,
    )
    from hypergradients.update_maps import OuterLoss as OuterLoss
    from hypergradients.update_maps import UpdateMap as UpdateMap
    from hypergradients.update_maps import advance as advance
    from hypergradients.update_maps import jvp as jvp
    from hypergradients.update_maps import update_tensor_grads as update_tensor_grads
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
