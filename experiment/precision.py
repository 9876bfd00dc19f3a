"""Matrix products and convolutions of float32 tensors, in less than float32.

    with Products("bfloat16") as products:
        theta = train(...)                  # and its backward pass
        with products.exact():
            loss = probe(theta)             # in float32 itself, though not its backward pass

    float32    as they are
    tf32       factors rounded to 10 bits by the GPU's tensor cores; needs CUDA
    bfloat16   factors and products rounded to 7 bits; sums over a product's terms stay float32

Weights, updates, sums of products and everything elementwise remain float32: only what a product
multiplies is rounded. Hypergradients then differ by what benchmarks/precision.py measures.
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
_ADDED = {_aten.addmm: torch.mm, _aten.addmm_: torch.mm, _aten.baddbmm: torch.bmm}
_CONVOLUTIONS = (_aten.convolution, _aten.convolution_backward)


class PrecisionError(WrongInputError):
    """A precision that is unknown, or not to be had on this device."""


class Products:
    """While entered, products of float32 tensors are taken as `kind` says; in backward passes too.

    Raises PrecisionError for an unknown kind, and for tf32 without CUDA.
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
        """Products as they are, for a while."""
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
    """What CUDA does with factors in float32: "ieee" leaves them, "tf32" rounds them.

    torch's own default is tf32 in convolutions.
    """
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


class _Rounding(TorchDispatchMode):
    """Sees every operation below autograd: forward and backward passes, whoever wrote them."""

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
        out = total if kind is _aten.addmm_ else options.get("out")
        scaled = total if beta == 1 else beta * total
        return _into(out, torch.add(scaled, product, alpha=alpha))


def _rounded(value):
    """In bfloat16 if it is a tensor in float32."""
    floating = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.bfloat16() if floating else value


def _exactly_typed(result: Tensor | tuple) -> Tensor | tuple:
    """In float32 again."""
    if isinstance(result, tuple):
        return tuple(map(_exactly_typed, result))
    return result if result is None else result.float()


def _into(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)
