"""Codes of 1, 2 or 4 bits a component: each byte of a stored vector names an entry of a learned table.

An image is its base, the mean of its vectors in int8 with a scale, and a code per vector for what is left of it. Codes
are of product quantisation (Jegou, Douze and Schmid 2011): the D components stand in G groups of W, and each group has
a table of 256 entries, learned by k-means. Before that what is left is turned so that the groups have equal shares of
the variance (Ge, He, Ke and Sun 2013, their starting point; rounds of their alternation gained nothing here), in a
space where distances count as products with queries do: with C the second moment of query tokens and C = L L', a rest r
becomes r L R and a query token q becomes q L^-T R, whose product is that of r and q; an error in r L R costs a score
the same in every direction. Entries are int8 with one scale, so what is stored is int8, and products with int8 queries
are exact in int32. So that each component fills the range of int8, they are divided by `costs`, and those of queries
multiplied.

Shape letters: n images, K vectors of each, G bytes of a vector, W components that a byte stands for, D = G W; T query
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from samer.config import InputError
from samer.products import WORDS, Lookup, quantise_rows

COMPONENTS = {"1bit": 8, "2bit": 4, "4bit": 2}  # W, by the name of the code
TENSORS = ("tables", "images", "queries", "costs")  # of a `Codebook`
ENTRIES = 256  # that a byte tells apart
ROUNDS = 16  # of k-means
ENOUGH = 2**16  # vectors to learn from
FLOOR = 0.05  # of the second moment's mean, added to its diagonal: no direction is free
_STARTS = 2**14  # vectors that tables begin with some of
_ROWS = 4096  # of a product with a table: what fits a cache


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
        images: (D, D) float32: what a vector v has beside its image's base, r, is coded as r @ images.
        queries: (D, D) float32: a query token q is multiplied as q @ queries; images @ queries.T is the identity.
        costs: (D,) float32, what an error in a component costs.
    """

    tables: Tensor
    scale: float
    images: Tensor
    queries: Tensor
    costs: Tensor

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
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    @cached_property
    def words(self) -> Tensor:
        """(G * 256,), each table entry as one number."""
        return self.tables.contiguous().view(WORDS[self.tables.shape[2]]).flatten()

    def lookup(self) -> Lookup:
        """What looks codes up, (..., G) uint8 as (..., D) int8: what vectors have beside their base, in `scale`s."""
        starts = torch.arange(self.code_bytes, dtype=torch.int32, device=self.tables.device) * ENTRIES
        return Lookup(self.words, starts)

    def decode(self, codes: Tensor) -> Tensor:
        """(..., G) uint8 as (..., D) int8, what a vector has beside its image's base, in units of `scale`."""
        return self.lookup()(codes)

    def encode(self, tokens: Tensor, mask: Tensor, bases: tuple[Tensor, Tensor] | None = None) -> Codes:
        """Images as codes: in each group the nearest entry.

        Args:
            tokens: (n, K, D).
            mask: (n, K) bool; the code of a missing vector is 0.
            bases: (n, D) int8 and (n,) float32 of the images, where they are known; None: of these vectors' mean.
        """
        whole, scales = bases or quantise_rows(_means(tokens.float(), mask))
        rest = (tokens.float() - (whole * scales[:, None])[:, None]).flatten(0, 1) @ (self.images * self.costs)
        own = (rest / self.scale).unflatten(1, (self.code_bytes, -1)).unbind(1)
        tables = self.tables * self.costs.view(self.code_bytes, 1, -1)
        found = [nearest(part, table) for part, table in zip(own, tables)]
        codes = torch.stack(found, dim=1).to(torch.uint8).view(*mask.shape, -1)
        return Codes(codes * mask[..., None], whole, scales)

    def vectors(self, images: Codes, mask: Tensor) -> Tensor:
        """(n, K, D) float32, what is stored of images, in the space of their vectors; 0 where `mask` is False."""
        bases = images.bases * images.scales[:, None]
        rest = (self.decode(images.codes).float() * self.scale) @ self.queries.t()
        return (rest + bases[:, None]) * mask[..., None]


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
def learn(
    kind: str,
    tokens: Tensor,
    mask: Tensor,
    moment: Tensor | None = None,
    levels: Sequence[tuple[Tensor, Tensor]] = (),
) -> Codebook:
    """Tables for images like these.

    Args:
        kind: a name in `COMPONENTS`.
        tokens: (n, K, D) of a sample of images; `ENOUGH` vectors are looked at.
        mask: (n, K) bool.
        moment: (D, D), the second moment of query tokens; None: of these vectors, in whose space queries are.
        levels: vectors (n, B, D) and masks (n, B) of the same images at smaller budgets, if they are to be coded, too.

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
    whole, scales = quantise_rows(_means(tokens.float(), mask))
    bases = (whole * scales[:, None])[:, None]
    rest = torch.cat([(own - bases)[here] for own, here in ((tokens, mask), *levels)])
    rest = rest[torch.randperm(len(rest), generator=generator)[:ENOUGH]].double() @ lower
    turn = _balanced(rest.t() @ rest, group)
    rest = rest @ turn
    found = [_k_means(part, generator) for part in rest.float().unflatten(1, (-1, group)).unbind(1)]
    tables = torch.stack(found)
    # queries bear rounding better than images, whose entries are rounded once for all: each component fills its range
    sizes = tables.abs().amax(1).flatten().double()
    costs = (sizes / sizes.max().clamp(min=1e-12)).clamp(min=1e-3)
    tables = tables / costs.float().view(len(tables), 1, -1)
    scale = float(tables.abs().max() / 127) or 1.0
    images, queries = lower @ turn / costs, torch.linalg.inv(lower).t() @ turn * costs
    return Codebook((tables / scale).round().to(torch.int8), scale, images.float(), queries.float(), costs.float())


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


def _spread(rows: Tensor, generator: torch.Generator) -> Tensor:
    """(256, W) of (rows, W) to begin with, each drawn by its squared distance from those before (k-means++).

    What is far from most is what a query's maximum often looks at: drawn evenly, entries would leave it out.
    """
    found = [rows[0]]
    distance = (rows - rows[0]).square().sum(1)
    drawn = torch.rand(ENTRIES - 1, generator=generator, dtype=torch.float64)
    for share in drawn:
        sums = distance.double().cumsum(0)
        place = int(torch.searchsorted(sums, share * sums[-1])) if sums[-1] > 0 else 0
        found.append(rows[min(place, len(rows) - 1)])
        distance = torch.minimum(distance, (rows - found[-1]).square().sum(1))
    return torch.stack(found)


def _k_means(rows: Tensor, generator: torch.Generator) -> Tensor:
    """(256, W): means of a partition of (rows, W), after `ROUNDS`; one that loses its rows goes on as a row drawn."""
    table = _spread(rows[torch.randperm(len(rows), generator=generator)[:_STARTS]], generator)
    for _ in range(ROUNDS):
        own = nearest(rows, table)
        count = torch.bincount(own, minlength=ENTRIES)[:, None]
        sums = torch.zeros_like(table).index_add_(0, own, rows)
        drawn = rows[torch.randint(len(rows), (ENTRIES,), generator=generator)]
        table = torch.where(count > 0, sums / count.clamp(min=1), drawn)
    return table
