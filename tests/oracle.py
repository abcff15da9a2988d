"""What tests compare with: merge and labels of METHOD sections 2-3 as plain loops over one image, search by sorting."""

import numpy as np
import torch
from torch.nn.functional import normalize

from samer.tokens import QueryTokens


def _normalise(v):
    return v / v.norm().clamp(min=1e-12)


def naive_merge(tokens, coords, config, labels=None, views=None):
    """One image: tokens (N, D), coords (N, 2), labels and views (N,) or None -> the fields of `MergedTokens`."""
    n = len(tokens)
    k_max = config.num_regions
    if n <= k_max:
        return tokens, coords, torch.eye(n, dtype=tokens.dtype), torch.arange(n)
    v0, p0 = tokens.detach(), coords.detach()
    if config.center_init == "raster":
        start = np.unique(np.round(np.linspace(0, n - 1, k_max)).astype(int)).tolist()
    else:
        mean = _normalise(v0.mean(0))
        start = [int((v0 @ mean).argmax())]
        while len(start) < k_max:
            best, best_distance = -1, -1.0
            for i in range(n):
                distance = min(
                    float(1 - v0[i] @ v0[j] + config.spatial_weight * (p0[i] - p0[j]).square().sum()) for j in start
                )
                if distance > best_distance:
                    best, best_distance = i, distance
            start.append(best)
    mu = [v0[i].clone() for i in start]
    s = [p0[i].clone() for i in start]

    views = [False] * n if views is None or config.global_view == "joined" else views.tolist()
    kinds = [views[i] for i in start]

    def distances(v, p):
        rows = []
        for k in range(len(mu)):
            rows.append((1 - (v * mu[k]).sum(-1)) + config.spatial_weight * (p - s[k]).square().sum(-1))
            astray = torch.tensor([view in kinds and view != kinds[k] for view in views])
            rows[-1] = torch.where(astray, float("inf"), rows[-1])
        return torch.stack(rows, dim=1)  # (N, K)

    for _ in range(config.cluster_iters):
        c = distances(v0, p0).argmin(1)
        for k in range(len(mu)):
            members = [i for i in range(n) if c[i] == k]
            if members:
                mu[k] = _normalise(v0[members].mean(0))
                s[k] = p0[members].mean(0)
    d = distances(tokens, coords)
    if labels is not None:
        penalty = torch.ones_like(d)
        for k in range(len(mu)):
            size = int((c == k).sum())
            for i in range(n):
                share = int(((c == k) & (labels == labels[i])).sum()) / (size + 1e-6)
                penalty[i, k] = 1 - share
        d = d + config.object_penalty * penalty
    w = torch.softmax(-d / config.assignment_temperature, dim=1)
    merged = []
    places = []
    for k in range(len(mu)):
        mass = w[:, k].sum()
        merged.append(_normalise((w[:, k, None] * tokens).sum(0) / mass))
        places.append((w[:, k, None] * coords).sum(0) / mass)
    return torch.stack(merged), torch.stack(places), w, c


def naive_labels(caption, objects):
    """METHOD section 3 as loops: tokens of an 8 x 8 grid and 6 prompt tokens."""
    boxes, seen = [], set()
    for number, one in enumerate(caption.phrases):
        if one.chain_id not in seen:
            seen.add(one.chain_id)
            boxes += [(number, box, (box[2] - box[0]) * (box[3] - box[1])) for box in one.boxes]
    boxes = [entry for entry in boxes if objects.min_area <= entry[2] <= objects.max_area]
    largest = {number: max(area for n, _, area in boxes if n == number) for number, _, _ in boxes}
    kept = sorted(largest, key=lambda number: -largest[number])[: objects.max_phrases]
    boxes = [entry for entry in boxes if entry[0] in kept]
    labels = []
    for x, y in [(x / 7, y / 7) for y in range(8) for x in range(8)] + [(0.5, 0.5)] * 6:
        inside = [k for k, (_, b, _) in enumerate(boxes) if b[0] <= x <= b[2] and b[1] <= y <= b[3]]
        labels.append(1 + min(inside, key=lambda k: boxes[k][2]) if inside else 0)
    return labels


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def ask(count=5, tokens=4, width=16, seed=0):
    """Ragged random queries; some have their padding first."""
    mask = torch.rand(count, tokens, generator=torch.Generator().manual_seed(seed + 1)) > 0.4
    mask[:, -1] = True
    return QueryTokens(unit(count, tokens, width, seed=seed + 2), mask)


def best_of(scores, ids, top, live=None):
    """Brute force: every score sorted, ties by id."""
    shown = [k for k in range(len(ids)) if live is None or live[k]]
    return [[(ids[k], row[k]) for k in sorted(shown, key=lambda k: (-row[k], ids[k]))][:top] for row in scores.tolist()]


def same_answers(ours, theirs):
    """Whether two searches for all images agree: the same ids, best first, and scores but for their last bits.

    On some processors a product's last bits depend on how many rows it has, so on how an index is cut into shards.
    """
    for one, other in zip(ours, theirs, strict=True):
        scores, own = [score for _, score in one], dict(other)
        right = {name for name, _ in one} == own.keys() and scores == sorted(scores, reverse=True)
        if not right or any(abs(score - own[name]) > 1e-5 for name, score in one):
            return False
    return True
