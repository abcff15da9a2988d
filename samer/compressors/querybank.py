"""Merging in the space of queries (METHOD section 2b, ours): what is kept is what a bank of query tokens finds best.

An index has to keep the function q -> max_i q . v_i on the queries that people ask, not the tokens. The bank holds R
unit vectors u_r of query tokens with weights a_r. Per image, K tokens are picked greedily by sum_r a_r max_k u_r . v_k,
then three rounds of votes move them: every u_r goes to its best vector and votes there for the token it really wants.

Picks come in greedy order, so the picks of a smaller budget are the first of a larger one's. The votes are held anew
among the picks of each budget: the first K vectors of a larger result are not the result at K.

Shape letters: B images, N tokens, R bank vectors, K regions, D embedding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samer.compressors.base import Compressor
from samer.config import InputError
from samer.tokens import MergedTokens, VisualTokens, check_tensor

ROUNDS = 3
TIE = 1e-6  # gains, in mean similarity, that differ by less are equal, and the first token is taken: float32 sums do
CUDA_ELEMENTS = 2**27  # similarities B x R x N at a time on a GPU: 512 MB


class QueryBank(Compressor):
    """Greedy facility location over the bank, then votes; every vector is the weighted mean of the tokens voted for.

    `weights` of the result sum to 1 over the tokens of a vector, not over the vectors of a token: they are its votes,
    and a token that no query wants has none. A token's region is the vector to which most of its votes went, else the
    nearest vector. A pick that nobody ever voted for stays the token that it is.
    """

    needs_queries = True
    settings_used = ("num_regions", "bank_size")

    vectors: Tensor | None = None  # (R, D) of unit norm
    weights: Tensor | None = None  # (R,) positive

    def fit_queries(self, tokens: Tensor, weights: Tensor | None = None) -> None:
        """Takes at most `bank_size` of these query tokens as the bank, as `sample_queries` draws them."""
        rows, shares = sample_queries(tokens, weights, self.settings.bank_size)
        self.load_state({"vectors": tokens[rows].detach().float().cpu(), "weights": shares.float().cpu()})

    def state(self) -> dict[str, Tensor]:
        return {} if self.vectors is None else {"vectors": self.vectors, "weights": self.weights}

    def load_state(self, state: dict[str, Tensor]) -> None:
        check_bank(state["vectors"], state["weights"])
        self.vectors, self.weights = state["vectors"], state["weights"]

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        tokens, regions = visual.tokens, self.settings.num_regions
        bank, share = self._bank_for(tokens)
        votes, picks = _in_groups(tokens.detach(), bank, share, regions, visual.mask)
        total = votes.sum(2, keepdim=True)  # (B, K, 1)
        alone = F.one_hot(picks, tokens.shape[1]).to(votes.dtype)
        weights = torch.where(total > 0, votes / total.clamp(min=torch.finfo(torch.float64).tiny), alone).to(tokens)
        merged = F.normalize(weights @ tokens, dim=-1)  # (B, K, D)
        with torch.no_grad():
            nearest = _argmax(tokens.detach() @ merged.detach().transpose(1, 2))
            most, voted = votes.max(1)  # (B, N): the first of equals
            assignments = torch.where(most > 0, voted, nearest)
        if visual.mask is not None:
            assignments = assignments.masked_fill(~visual.mask, -1)
        full = torch.ones(merged.shape[:2], dtype=torch.bool, device=merged.device)
        return MergedTokens(merged, weights @ visual.coords, full, weights.transpose(1, 2), assignments)

    def _bank_for(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The bank as `tokens` are, and its weights, which sum to 1.

        Raises:
            InputError: there is none, or it is of another width.
        """
        if self.vectors is None:
            raise InputError("querybank has no bank of queries yet; call fit_queries, or give it one (scripts/bank.py)")
        if self.vectors.shape[1] != tokens.shape[2]:
            raise InputError(
                f"the query bank has {self.vectors.shape[1]} components, tokens have {tokens.shape[2]}; make a bank "
                "with this projector"
            )
        share = self.weights.double() / self.weights.double().sum()
        return self.vectors.to(tokens), share.to(tokens)


def check_bank(vectors: Tensor, weights: Tensor) -> None:
    """Refuses what can be no bank: vectors (R, D) of unit norm with positive weights (R,).

    Raises:
        InputError: says what is wrong.
    """
    check_tensor("bank vectors", vectors)
    check_tensor("bank weights", weights)
    if vectors.dim() != 2 or 0 in vectors.shape or weights.shape != vectors.shape[:1]:
        raise InputError(
            f"a query bank is vectors (R, D) and weights (R,), not {tuple(vectors.shape)} and {tuple(weights.shape)}"
        )
    if not bool(((torch.linalg.vector_norm(vectors.float(), dim=1) - 1).abs() < 0.05).all()):  # NaN is not below
        raise InputError("the query bank holds vectors that are not of unit length; make it anew (scripts/bank.py)")
    if not bool((weights.isfinite() & (weights > 0)).all()):
        raise InputError("the query bank holds weights that are not above 0; make it anew (scripts/bank.py)")


def sample_queries(tokens: Tensor, weights: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Which of many query tokens stand for all: equal ones once, with their weights together, and at most `size`.

    Seeded sampling, not clusters: tokens that were asked stay what they are, so the sum over the bank is an unbiased
    estimate of the sum over all (means of clusters would underrate a maximum, which is convex), and a projector that
    changes moves the same tokens. Drawn by priority: each gets weight / (uniform number), the largest stay, and each
    counts its weight or the first priority left out, whichever is more (Duffield, Lund and Thorup 2007).

    Args:
        tokens: (T, D) of unit norm.
        weights: (T,), how often each was asked; None: once.
        size: of the bank at most.

    Returns:
        Row numbers (R,) long, rising, and their weights (R,) float64, both on the CPU.
    """
    weights = torch.ones(len(tokens)) if weights is None else weights
    check_bank(tokens, weights)
    # equal to 4 digits: the same text in another batch differs in the last ones
    _, group = torch.unique((tokens.detach().float().cpu() * 1e4).round(), dim=0, return_inverse=True)
    count = int(group.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, group, weights.detach().double().cpu())
    first = torch.full((count,), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), "amin")
    rows, order = first.sort()
    total = total[order]
    numbers = torch.from_numpy(np.random.default_rng(0).random(len(tokens)))[rows]  # a token's own, whatever is merged
    kept, shares = draw(total, numbers, size)
    return rows[kept], shares


def draw(weights: Tensor, numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Priority sampling: which of many stay, (R,) long, rising, and what each counts for, (R,) float64.

    Args:
        weights: (T,) float64, positive.
        numbers: (T,) float64 in [0, 1), uniform.
        size: R at most.
    """
    if len(weights) <= size:
        return torch.arange(len(weights)), weights
    priority, order = (weights / (1 - numbers)).sort(descending=True, stable=True)
    kept = order[:size].sort().values
    return kept, weights[kept].clamp(min=float(priority[size]))


@torch.no_grad()
def _in_groups(tokens: Tensor, bank: Tensor, share: Tensor, regions: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Votes (B, K, N) float64 and picks (B, K); of an image with at most K valid tokens they mean nothing.

    On a CPU image by image: what an image needs fits its cache, and its padding is left out.
    """
    batch, count, _ = tokens.shape
    votes = torch.zeros(batch, regions, count, dtype=torch.float64, device=tokens.device)
    picks = torch.zeros(batch, regions, dtype=torch.long, device=tokens.device)
    if tokens.device.type != "cpu":
        many = max(1, CUDA_ELEMENTS // (count * len(bank)))
        for own in (slice(start, start + many) for start in range(0, batch, many)):
            picks[own], wanted = pick_batch(tokens[own], bank, share, regions, None if mask is None else mask[own])
            votes[own] = vote(tokens[own], bank, share, picks[own], wanted)
        return votes, picks
    room = tokens.new_empty(2, len(bank), count)
    for row, image in enumerate(tokens):
        places = torch.arange(count) if mask is None else mask[row].nonzero()[:, 0]
        if len(places) > regions:
            own = image if mask is None else image[places]
            chosen, wanted = pick_one(own, bank, share, regions, room)
            found = vote(own[None], bank, share, chosen[None], wanted[None])
            picks[row] = places[chosen]
            votes[row].index_copy_(1, places, found[0])
    return votes, picks


@torch.no_grad()
def keep_best(tokens: Tensor, mask: Tensor, bank: Tensor, weights: Tensor, count: int) -> Tensor:
    """Which of each image's vectors a bank of queries would miss most, as `pick_one` picks them.

    Args:
        tokens: (B, N, D) on the CPU.
        mask: (B, N) bool.
        bank: (R, D).
        weights: (R,) positive.
        count: K, how many to keep.

    Returns:
        (B, min(K, N)) long, row numbers in the order of picks; an image with at most K vectors keeps all, in their
        order, and -1 stands after its last.

    Source: METHOD section 2b (ours), its picks alone.
    """
    bank, share = bank.to(tokens), (weights.double() / weights.double().sum()).to(tokens)
    room = tokens.new_empty(2, len(bank), tokens.shape[1])
    kept = torch.full((len(tokens), min(count, tokens.shape[1])), -1)
    for row, (image, valid) in enumerate(zip(tokens, mask)):
        places = valid.nonzero()[:, 0]
        if len(places) > count:
            places = places[pick_one(image[places], bank, share, count, room)[0]]
        kept[row, : len(places)] = places
    return kept


def pick_one(tokens: Tensor, bank: Tensor, share: Tensor, regions: int, room: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy picks of one image, on the CPU.

    A pick j changes only bank vectors that it is better for than all before, from similarity a to b; what they add to
    a token i falls by the part of u . v_i between a and b. That is some R / k rows at the k-th pick, so all K picks
    cost a few passes over the R x N similarities, where each alone would cost one.

    Args:
        tokens: (N, D), more than `regions`.
        bank: (R, D).
        share: (R,), sums to 1.
        regions: K.
        room: (2, R, >= N) to work in.

    Returns:
        Picks (K,) in order, and (R,) the token that each bank vector likes best; of equals the first.
    """
    count = len(tokens)
    scores, work = (part.view(-1)[: len(bank) * count].view(-1, count) for part in room)  # (R, N)
    torch.mm(bank, tokens.T, out=scores)
    similar, shares = scores.numpy(), share.numpy()  # numpy for what is small, at a fraction of a call's cost
    wanted = similar.argmax(1)
    start = (tokens @ (share @ bank)).double().numpy()
    picks = [int((start >= start.max() - TIE).argmax())]
    best = similar[:, picks[0]].copy()  # (R,)
    torch.maximum(scores, torch.from_numpy(best)[:, None], out=work)
    gain = torch.mv(work.T, share).double().numpy() - float(shares @ best)  # (N,)
    gain[picks[0]] = -1
    while len(picks) < regions:
        pick = int((gain >= gain.max() - TIE).argmax())
        own = similar[:, pick]
        rows = np.flatnonzero(own > best)
        if len(rows):
            before, after, weight = best[rows], own[rows], shares[rows]
            part = torch.index_select(scores, 0, torch.from_numpy(rows), out=work[: len(rows)])
            torch.maximum(part, torch.from_numpy(before)[:, None], out=part)
            torch.minimum(part, torch.from_numpy(after)[:, None], out=part)
            gain -= torch.mv(part.T, torch.from_numpy(weight)).numpy() - float(weight @ before)
            best[rows] = after
        gain[pick] = -1  # others are 0 at least
        picks.append(pick)
    return torch.tensor(picks), torch.from_numpy(wanted)


def pick_batch(tokens: Tensor, bank: Tensor, share: Tensor, regions: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `pick_one` of a batch (B, N, D), K passes over all similarities, without waiting for the device.

    Returns:
        Picks (B, K) and wanted tokens (B, R); those of an image with at most K valid tokens mean nothing.
    """
    scores = bank @ tokens.transpose(1, 2)  # (B, R, N)
    hidden = torch.zeros_like(tokens[..., 0], dtype=torch.bool) if mask is None else ~mask
    wanted = scores.masked_fill(hidden[:, None], -2).argmax(2)
    rows = torch.arange(len(tokens), device=tokens.device)
    gain = (tokens @ (share @ bank)[:, None])[..., 0]  # of the first pick, up to what is the same for all
    best = torch.full_like(scores[..., 0], -1)  # (B, R)
    picks = []
    for _ in range(regions):
        gain = gain.masked_fill(hidden, -2)
        pick = (gain >= gain.amax(1, keepdim=True) - TIE).to(torch.uint8).argmax(1)
        picks.append(pick)
        hidden = hidden.scatter(1, pick[:, None], True)
        best = torch.maximum(best, scores[rows, :, pick])
        gain = share @ torch.maximum(scores, best[..., None]) - (best @ share)[:, None]  # (B, N)
    return torch.stack(picks, dim=1), wanted


def vote(tokens: Tensor, bank: Tensor, share: Tensor, picks: Tensor, wanted: Tensor) -> Tensor:
    """Votes (B, K, N) float64 after `ROUNDS` rounds; a vector that loses its voters keeps its votes of before.

    Args:
        tokens: (B, N, D).
        bank, share: (R, D), (R,).
        picks: (B, K), where the vectors start; a pick without a voter in any round has no votes.
        wanted: (B, R), the token that each bank vector votes for.
    """
    batch, count, _ = tokens.shape
    regions = picks.shape[1]
    merged = tokens.gather(1, picks[..., None].expand(-1, -1, tokens.shape[2]))  # (B, K, D)
    votes = torch.zeros(batch, regions, count, dtype=torch.float64, device=tokens.device)
    weight = share.double().expand(batch, -1)
    for _ in range(ROUNDS):
        place = _argmax(bank @ merged.transpose(1, 2)) * count + wanted  # (B, R): of (vector, token)
        # float64 sums of float32 weights are exact (of 2,048, where none weighs 2^18 times another), so their order,
        # which a GPU does not keep, does not matter
        cast = torch.zeros_like(votes).view(batch, -1).scatter_add_(1, place, weight).view_as(votes)
        there = cast.sum(2, keepdim=True) > 0
        votes = torch.where(there, cast, votes)
        merged = torch.where(there, F.normalize(cast.to(tokens) @ tokens, dim=-1), merged)
    return votes


def _argmax(values: Tensor) -> Tensor:
    """Of the last dimension, the first of equals; numpy's takes a tenth of torch's time on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().argmax(-1))
    return values.argmax(-1)
