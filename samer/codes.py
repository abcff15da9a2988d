"""Codes of 1, 2 or 4 bits a component: each byte of a stored vector names an entry of a learned table.

An image is its base, the mean of its vectors in int8 with a scale, and a code per vector for what is left of it. Codes
are of product quantisation (Jegou, Douze and Schmid 2011): the D components stand in G groups of W, and each group has
a table of 256 entries, learned by k-means. Before that vectors are turned so that the groups have equal shares of the
variance (Ge, He, Ke and Sun 2013, their starting point; rounds of their alternation gained nothing here), in a space
where distances count as products with queries do: with C the second moment of query tokens and C = L L', a vector v
becomes v L R and a query token q becomes q L^-T R, whose product is that of v and q, and errors of all of v L R cost
what they cost a score. Entries are int8 with one scale, so stored vectors are int8 and products with int8 queries are
exact in int32.

Shape letters: n images, K vectors of each, G bytes of a vector, W components that a byte stands for, D = G W; T query
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from samer.config import InputError
from samer.products import quantise_rows

COMPONENTS = {"1bit": 8, "2bit": 4, "4bit": 2}  # W, by the name of the code
ENTRIES = 256  # that a byte tells apart
ROUNDS = 16  # of k-means
ENOUGH = 2**16  # vectors to learn from
FLOOR = 0.05  # of the second moment's mean, added to its diagonal: no direction is free
_ROWS = 4096  # of a product with a table: what fits a cache
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # W bytes as one number


@dataclass(frozen=True)
class Codes:
    """Images as codes: `codes` (n, K, G) uint8, `bases` (n, D) int8 and `scales` (n,) float32, base = int8 * scale."""

    codes: Tensor
    bases: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Codebook:
    """Learned tables.

    Attributes:
        tables: (G, 256, W) int8.
        scale: what an entry's 1 is worth.
        images: (D, D) float32: a vector v is coded as v @ images.
        queries: (D, D) float32: a query token q is multiplied as q @ queries; images @ queries.T is the identity.
    """

    tables: Tensor
    scale: float
    images: Tensor
    queries: Tensor

    @property
    def width(self) -> int:
        """D."""
        return len(self.images)

    @property
    def code_bytes(self) -> int:
        """G."""
        return len(self.tables)

    def to(self, device: torch.device | str) -> Codebook:
        """The same on a device."""
        if self.tables.device == torch.device(device):
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in ("tables", "images", "queries")})

    @cached_property
    def _words(self) -> Tensor:
        """(G * 256,), each table entry as one number."""
        return self.tables.contiguous().view(_WORDS[self.tables.shape[2]]).flatten()

    @cached_property
    def _starts(self) -> Tensor:
        return torch.arange(self.code_bytes, dtype=torch.int32, device=self.tables.device) * ENTRIES

    def decode(self, codes: Tensor) -> Tensor:
        """(..., G) uint8 as (..., D) int8, what a vector has beside its image's base, in units of `scale`."""
        words = self._words.index_select(0, (codes.int() + self._starts).flatten())
        return words.view(torch.int8).view(*codes.shape[:-1], self.width)

    def encode(self, tokens: Tensor, mask: Tensor, bases: tuple[Tensor, Tensor] | None = None) -> Codes:
        """Images as codes: in each group the nearest entry.

        Args:
            tokens: (n, K, D).
            mask: (n, K) bool; the code of a missing vector is 0.
            bases: (n, D) int8 and (n,) float32 of the images, where they are known; None: of these vectors' mean.
        """
        turned = tokens.float() @ self.images
        whole, scales = bases or quantise_rows(_means(turned, mask))
        rest = (turned - (whole * scales[:, None])[:, None]).flatten(0, 1) / self.scale
        own = rest.unflatten(1, (self.code_bytes, -1)).unbind(1)
        found = [nearest(part, table.float()) for part, table in zip(own, self.tables)]
        codes = torch.stack(found, dim=1).to(torch.uint8).view(*mask.shape, -1)
        return Codes(codes * mask[..., None], whole, scales)

    def vectors(self, images: Codes, mask: Tensor) -> Tensor:
        """(n, K, D) float32, what is stored of images, in the space of their vectors; 0 where `mask` is False."""
        bases = images.bases * images.scales[:, None]
        turned = self.decode(images.codes).float() * self.scale + bases[:, None]
        return (turned @ self.queries.t()) * mask[..., None]


def _means(tokens: Tensor, mask: Tensor) -> Tensor:
    """(n, D), the mean of each image's vectors."""
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def nearest(rows: Tensor, table: Tensor) -> Tensor:
    """(rows,) long, the entry (256, W) nearest to each of (rows, W); of equals the first."""
    half = table.square().sum(1) / 2
    return torch.cat([(part @ table.t() - half).argmax(1) for part in rows.split(_ROWS)])


def second_moment(tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """(D, D) float64, the weighted mean of t t' over (T, D)."""
    tokens = tokens.double()
    weights = torch.ones(len(tokens), dtype=torch.float64) if weights is None else weights.double()
    return tokens.t() @ (tokens * (weights / weights.sum())[:, None])


@torch.no_grad()
def learn(kind: str, tokens: Tensor, mask: Tensor, moment: Tensor | None = None) -> Codebook:
    """Tables for images like these.

    Args:
        kind: a name in `COMPONENTS`.
        tokens: (n, K, D) of a sample of images; `ENOUGH` vectors are looked at.
        mask: (n, K) bool.
        moment: (D, D), the second moment of query tokens; None: of these vectors, in whose space queries are.

    Raises:
        InputError: a width that the code can't divide, or fewer vectors than a table has entries.
    """
    width, group = tokens.shape[2], COMPONENTS[kind]
    if width % 8:
        raise InputError(f"{kind} needs a width divisible by 8; it is {width}")
    if int(mask.sum()) < ENTRIES:
        raise InputError(f"{kind} learns tables of {ENTRIES} entries, and there are only {int(mask.sum())} vectors")
    generator = torch.Generator().manual_seed(0)
    moment = second_moment(tokens[mask]) if moment is None else moment.double()
    moment = moment * (width / moment.trace()) + FLOOR * torch.eye(width, dtype=torch.float64)
    lower = torch.linalg.cholesky(moment)
    spread = tokens.double() @ lower
    rest = (spread - _means(spread, mask)[:, None])[mask]
    turn = _balanced(rest.t() @ rest, group)
    images, queries = lower @ turn, torch.linalg.inv(lower).t() @ turn
    turned = tokens.float() @ images.float()
    whole, scales = quantise_rows(_means(turned, mask))
    rest = (turned - (whole * scales[:, None])[:, None])[mask]
    rest = rest[torch.randperm(len(rest), generator=generator)[:ENOUGH]]
    found = [_k_means(part, generator) for part in rest.unflatten(1, (-1, group)).unbind(1)]
    tables = torch.stack(found)
    scale = float(tables.abs().max() / 127) or 1.0
    return Codebook((tables / scale).round().to(torch.int8), scale, images.float(), queries.float())


def _balanced(scatter: Tensor, group: int) -> Tensor:
    """(D, D) float64 orthogonal: the principal axes, dealt out so that the products of variances in groups are even.

    Args:
        scatter: (D, D) float64.
        group: W, how many axes a group has.
    """
    values, axes = torch.linalg.eigh(scatter)  # rising
    values = (values / values[-1].clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=1e-12)
    loads = [(0.0, number, []) for number in range(len(values) // group)]
    for axis in range(len(values) - 1, -1, -1):
        load, number, own = min(each for each in loads if len(each[2]) < group)
        loads[number] = load + math.log(float(values[axis])) + 30, number, [*own, axis]
    return axes[:, [axis for _, _, own in loads for axis in own]]


def _k_means(rows: Tensor, generator: torch.Generator) -> Tensor:
    """(256, W): means of a partition of (rows, W), after `ROUNDS`; one that loses its rows goes on as a row drawn."""
    table = rows[torch.randperm(len(rows), generator=generator)[:ENTRIES]].clone()
    for _ in range(ROUNDS):
        own = nearest(rows, table)
        count = torch.bincount(own, minlength=ENTRIES)[:, None]
        sums = torch.zeros_like(table).index_add_(0, own, rows)
        drawn = rows[torch.randint(len(rows), (ENTRIES,), generator=generator)]
        table = torch.where(count > 0, sums / count.clamp(min=1), drawn)
    return table
