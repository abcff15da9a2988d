"""Matrix products of the small numbers that indexes hold: which this machine has, and what takes their place.

Shape letters: n and c rows and columns, D embedding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from samer.config import InputError


def quantise_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) float tokens as int8 and a scale each, (n,), by which its largest component is 127."""
    scale = tokens.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (tokens / scale[:, None]).round().to(torch.int8), scale


class ReusedProduct:
    """A matrix product into memory that is used again: fresh pages for every block would cost half a product more."""

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> None:
        """`function` takes `out`; its results are of `dtype`, by default that of its operands."""
        self.function, self.dtype, self.memory = function, dtype, None

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """(n, D) times (D, c); valid until the next call."""
        size = len(left) * right.shape[1]
        if self.memory is None or len(self.memory) < size:
            self.memory = left.new_empty(size, dtype=self.dtype or left.dtype)
        return self.function(left, right, out=self.memory[:size].view(len(left), -1))


@functools.cache
def int8_product_works(device: torch.device) -> bool:
    """Whether torch's int8 product (a private function) is here and right, extremes included; asked once per device."""
    generator = torch.Generator().manual_seed(0)
    for rows, width, columns in ((64, 128, 32), (96, 64, 48), (1024, 128, 1024)):
        left, right = (
            torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            for shape in ((rows, width), (columns, width))
        )
        left[0], right[0] = 127, -127
        try:
            wide = as_columns(torch.cat([right, right]).to(device))
            product = ReusedProduct(torch._int_mm, torch.int32)(left.to(device), wide[:, columns:])
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):
            return False  # `float_product` takes its place
        if product.dtype != torch.int32 or not torch.equal(product.cpu(), left.int() @ right.int().t()):
            return False
    return True


def as_columns(rows: Tensor) -> Tensor:
    """(c, D) int8 as the right operand (D, c) of a product: column-major on a GPU, whose kernels are made for that."""
    return rows.t() if rows.is_cuda else rows.t().contiguous()


def int_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The int32 product by torch's int8 kernel, or in float32 where the kernel refuses these sizes."""
    try:
        return torch._int_mm(left, right, out=out)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return out.copy_(float_product(left, right))


def half_product(left: Tensor, right: Tensor) -> Tensor:
    """float32 product of bfloat16 or float16 operands on a GPU's tensor cores: products are exact, sums are float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


@functools.cache
def half_product_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies halves into float32, and rightly; asked once per device and dtype."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 128), (128, 64)))
    try:
        product = half_product(left.to(device), right.to(device))
    except (TypeError, RuntimeError, NotImplementedError):  # only CUDA has it
        return False
    return product.dtype == torch.float32 and torch.allclose(product.cpu(), left.float() @ right.float(), atol=1e-4)


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """The int32 product, by float32: exact, as |values| <= 127 keep every partial sum of D <= 1,040 below 2^24."""
    if left.shape[1] > 1040:
        raise InputError(f"int8 tokens of width {left.shape[1]}: without an int8 product at most 1,040 can be scored")
    return (left.float() @ right.float()).to(torch.int32)
