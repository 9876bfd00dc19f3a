"""Matrix products and convolutions of float32 tensors, computed with reduced precision.

    with Products("bfloat16") as products:
        theta = train(...)                  # reduced, and so is its backward pass
        with products.exact():
            loss = probe(theta)             # in float32, but its backward pass is reduced

    float32    not reduced
    tf32       the GPU's tensor cores round factors to 10 bits of mantissa; needs CUDA
    bfloat16   factors and results are rounded to 7 bits of mantissa, sums are taken in float32

Only products are reduced: weights, updates and all elementwise operations remain float32.
benchmarks/precision.py measures how much the hypergradients change.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiment.choices import PRODUCTS
from experiment.errors import WrongInputError

_aten = torch.ops.aten
_PLAIN = {_aten.mm: torch.mm, _aten.bmm: torch.bmm}
_ADDED = {
    _aten.addmm: torch.mm, _aten.addmm_: torch.mm,
    _aten.baddbmm: torch.bmm, _aten.baddbmm_: torch.bmm,
}  # fmt: skip
_CONVOLUTIONS = (_aten.convolution, _aten.convolution_backward)


class PrecisionError(WrongInputError):
    """A precision that is unknown or not available on this machine."""


class Products:
    """A context in which products of float32 tensors have the precision `kind`, backward too.

    Raises PrecisionError for an unknown kind, and for tf32 without CUDA.

    kind: float32, tf32 or bfloat16.
    """

    def __init__(self, kind: str) -> None:
        if kind not in PRODUCTS:
            raise PrecisionError(f"products in {kind!r}: choose from {', '.join(PRODUCTS)}")
        if kind == "tf32" and not torch.cuda.is_available():
            raise PrecisionError("products in tf32 need a CUDA device: take float32 or bfloat16")
        self.kind = kind
        self._rounding = _Rounding()

    def __enter__(self) -> "Products":
        if self.kind == "bfloat16":
            self._rounding.__enter__()
        elif self.kind == "tf32":
            set_tensor_cores("tf32")
        return self

    def __exit__(self, *error) -> None:
        if self.kind == "bfloat16":
            self._rounding.__exit__(*error)
        elif self.kind == "tf32":
            set_tensor_cores("ieee")

    @contextmanager
    def exact(self) -> Iterator[None]:
        """A context within it in which products are taken in float32."""
        self._rounding.resting = True
        if self.kind == "tf32":
            set_tensor_cores("ieee")
        try:
            yield
        finally:
            self._rounding.resting = False
            if self.kind == "tf32":
                set_tensor_cores("tf32")


def set_tensor_cores(precision: str) -> None:
    """Whether CUDA rounds the float32 factors of products: "tf32" does, "ieee" does not.

    torch's own default is tf32 in convolutions.
    """
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


class _Rounding(TorchDispatchMode):
    """Intercepts products below autograd, so that backward passes of any origin are covered."""

    def __init__(self) -> None:
        super().__init__()
        self.resting = False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, kind = options or {}, function.overloadpacket
        known = kind in _PLAIN or kind in _ADDED or kind in _CONVOLUTIONS
        if self.resting or not known or arguments[0].dtype != torch.float32:
            return function(*arguments, **options)
        if kind in _CONVOLUTIONS:
            return _exactly_typed(function(*map(_rounded, arguments), **options))
        if kind in _PLAIN:
            product = _PLAIN[kind](*map(_rounded, arguments[:2]))
            return _into(options.get("out"), product.float())
        total, *factors = arguments
        product = _ADDED[kind](*map(_rounded, factors))
        beta, alpha = options.get("beta", 1), options.get("alpha", 1)
        in_place = kind in (_aten.addmm_, _aten.baddbmm_)
        out = total if in_place else options.get("out")
        scaled = total if beta == 1 else beta * total
        return _into(out, torch.add(scaled, product, alpha=alpha))


def _rounded(value):
    """`value` in bfloat16 if it is a float32 tensor, else unchanged."""
    floating = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.bfloat16() if floating else value


def _exactly_typed(result: Tensor | tuple) -> Tensor | tuple:
    """One result or a tuple of them, converted back to float32."""
    if isinstance(result, tuple):
        return tuple(map(_exactly_typed, result))
    return result if result is None else result.float()


def _into(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)
