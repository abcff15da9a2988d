"""Matrix products of the small numbers that indexes hold: which this machine has, and what takes their place.

Shape letters: n and c rows and columns, D embedding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from samer.config import InputError

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # bytes as one number


def quantise_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) float tokens as int8 and a scale each, (n,), by which its largest component is 127."""
    scale = tokens.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (tokens / scale[:, None]).round().to(torch.int8), scale


@functools.cache
def sign_table(device: torch.device) -> Tensor:
    """The eight signs, +1 or -1 as int8, of every byte: (256,) int64, eight int8 each."""
    signs = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.int8) * 2 - 1
    return signs.contiguous().view(torch.int64).flatten().to(device)


def unpack_signs(packed: Tensor) -> Tensor:
    """(..., D / 8) uint8 as (..., D) int8 of +1 and -1."""
    return sign_lookup(packed)(packed)


def sign_lookup(packed: Tensor) -> Lookup:
    """What unpacks signs (..., D / 8)."""
    return Lookup(sign_table(packed.device), torch.zeros(packed.shape[-1], dtype=torch.int32, device=packed.device))


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


class Lookup:
    """What bytes stand for, looked up into memory that is used again."""

    def __init__(self, words: Tensor, starts: Tensor) -> None:
        """`words`, integers of W bytes; byte g of a vector stands for the one `starts[g]` + its value, (G,) int32."""
        self.words, self.starts = words, starts
        self.places, self.found = starts.new_empty(0), words.new_empty(0)

    def __call__(self, codes: Tensor) -> Tensor:
        """(..., G) uint8 as (..., G * W) int8; valid until the next call."""
        if len(self.places) < codes.numel():
            self.places, self.found = (each.new_empty(codes.numel()) for each in (self.places, self.found))
        places, found = self.places[: codes.numel()], self.found[: codes.numel()]
        torch.add(codes.reshape(-1, len(self.starts)), self.starts, out=places.view(-1, len(self.starts)))
        torch.index_select(self.words, 0, places, out=found)
        return found.view(torch.int8).view(*codes.shape[:-1], -1)


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


def fused_scan_works(device: torch.device, dtype: torch.dtype, width: int, code_bytes: int, regions: int) -> bool:
    """Whether `samer.kernels` scans images stored so, `regions` vectors of each, rightly. It needs CUDA and Triton."""
    if device.type != "cuda" or dtype == torch.float64:
        return False
    try:
        from samer.kernels import VECTORS
    except ImportError:
        return False
    return _scan_works(device, dtype, width, code_bytes, 3 if regions <= VECTORS else VECTORS + 3)


@functools.cache
def _scan_works(device: torch.device, dtype: torch.dtype, width: int, code_bytes: int, regions: int) -> bool:
    """Whether a trial succeeds, which needs as much of a GPU's shared memory as any search; made once."""
    from samer.kernels import ROWS, fits, scan

    try:
        if not fits(width, code_bytes):
            return False
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randint(-127, 128, shape, generator=generator)
        lengths = torch.tensor([ROWS + 5, 3])
        asked, mask = draw(int(lengths.sum()), width), draw(5, regions) % 3 > 0
        mask[:, 1] = True
        whole, words = draw(5, regions, width), None
        stored = whole.to(dtype)
        if code_bytes:
            tables = draw(code_bytes, 256, width // code_bytes).to(torch.int8)
            stored = (draw(5, regions, code_bytes) + 127).to(torch.uint8)
            whole = torch.stack([table[stored[..., k].long()] for k, table in enumerate(tables)], dim=2).flatten(2)
            words = tables.flatten(0, 1).view(WORDS[width // code_bytes]).flatten().to(device)
        asked = asked.to(torch.float32 if dtype.is_floating_point else torch.int8)
        found = scan(asked, torch.ones(len(asked)), lengths, stored.to(device), mask.to(device), words)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # Triton has many kinds of errors where a GPU is not for it: torch takes its place
        return False
    best = torch.einsum("nd,ikd->nik", asked.double(), whole.double()).masked_fill(~mask, -torch.inf).amax(2)
    expected = torch.stack([own.sum(0) for own in best.split(lengths.tolist())])
    return bool(((found.cpu() - expected).abs() <= 1e-5 * expected.abs().amax()).all())


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """The int32 product, by float32: exact, as |values| <= 127 keep every partial sum of D <= 1,040 below 2^24."""
    if left.shape[1] > 1040:
        raise InputError(f"int8 tokens of width {left.shape[1]}: without an int8 product at most 1,040 can be scored")
    return (left.float() @ right.float()).to(torch.int32)


class Int8Queries:
    """Query tokens in int8, and their products with images' vectors in int8."""

    def __init__(self, tokens: Tensor, most: int) -> None:
        """(n, D) float32, of which `most` are multiplied at once."""
        whole, self.scales = quantise_rows(tokens)
        self.count, self.width = whole.shape
        self.fast = int8_product_works(whole.device) and self.width % 8 == 0
        self.product = ReusedProduct(int_product, torch.int32) if self.fast else float_product
        # the products' second operand has a multiple of 8 columns, as some kernels want
        self.columns = -(-self.count // 8) * 8
        right = torch.zeros(self.columns, self.width, dtype=torch.int8, device=whole.device)
        right[: self.count] = whole
        self.right = as_columns(right)
        self.wide = min(self.columns, most)

    def best(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """(b, n) float32, each token's best product with an image's vectors (b, K, D) int8; exact below 2^24."""
        left = images.reshape(-1, self.width)
        if len(left) <= 16 and self.fast:  # CUDA's kernel wants more rows than 16
            left = torch.cat([left, left.new_zeros(17 - len(left), self.width)])
        best = []
        for start in range(0, self.columns, self.wide):
            found = self.product(left, self.right[:, start : start + self.wide])[: images.shape[0] * images.shape[1]]
            found = found.view(images.shape[0], images.shape[1], -1)
            if mask is not None:
                found = found.masked_fill_(~mask[..., None], torch.iinfo(torch.int32).min)
            best.append(found.amax(1))
        return (best[0] if len(best) == 1 else torch.cat(best, dim=1))[:, : self.count].float()
