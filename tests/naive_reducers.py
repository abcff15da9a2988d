"""The reducers an image and a token at a time, as SYSTEMS sections 2 and 3 and ToMe's paper read."""

import math

import torch


def cosine(one, other):
    return float(one @ other / (one.norm() * other.norm()).clamp(min=1e-12))


def collect(x, weights, pairs):
    """What is left of one image's tokens (N, D), its source, and the weights: `pairs` holds (token, destination)."""
    into = dict(pairs)
    kept = [n for n in range(len(x)) if n not in into]
    out, sums = [], []
    for n in kept:
        group = [n, *(i for i, j in pairs if j == n)]
        total = sum(float(weights[i]) for i in group)
        if len(group) == 1:
            out.append(x[n])
        elif total == 0:
            out.append(sum(x[i] for i in group) / len(group))
        else:
            out.append(sum(float(weights[i]) * x[i] for i in group) / total)
        sums.append(total)
    return torch.stack(out), [kept.index(into.get(n, n)) for n in range(len(x))], sums


def tome(x, r, sizes, metric):
    edges = []
    for i in range(0, len(x), 2):
        found = [(cosine(metric[i], metric[j]), -j) for j in range(1, len(x), 2)]
        if found:
            value, place = max(found)
            edges.append((value, -i, -place))
    edges.sort(reverse=True)
    return collect(x, sizes, [(-i, j) for _, i, j in edges[:r]])


def salience(x):
    received = [0.0] * len(x)
    for i in range(len(x)):
        logits = [float(x[i] @ x[j]) for j in range(len(x))]
        top = max(logits)
        total = sum(math.exp(v - top) for v in logits)
        for j, v in enumerate(logits):
            received[j] += math.exp(v - top) / total
    low, high = min(received), max(received)
    return [(v - low) / (high - low) if high > low else 0.0 for v in received]


def adamerge(x, r, order="salient"):
    s, half = salience(x), len(x) // 2
    edges = []
    for i in range(half):
        value, place = max((cosine(x[i], x[j]), -j) for j in range(half, len(x)))
        edges.append(((s[i] if order == "salient" else 1 - s[i]) * value, -i, -place))
    edges.sort(reverse=True)
    y, source, _ = collect(x, s, [(-i, j) for _, i, j in edges[:r]])
    return y, source


def adamerge_similarity(x):
    s, half = salience(x), len(x) // 2
    return sum(max(s[i] * cosine(x[i], x[j]) for j in range(half, len(x))) for i in range(half)) / half


def cubist_row(x, r):
    """A row (N, D): what is left, and where each went."""
    choices = []
    for k in range(1, len(x), 2):
        left = cosine(x[k - 1], x[k])
        right = cosine(x[k], x[k + 1]) if k + 1 < len(x) else -math.inf
        choices.append((max(left, right), -k, k - 1 if left >= right else k + 1))
    choices.sort(reverse=True)
    into = {-k: to for _, k, to in choices[:r]}
    kept = [n for n in range(len(x)) if n not in into]
    out = []
    for n in kept:
        value = x[n].clone()
        for k in sorted(k for k, to in into.items() if to == n):
            for d in range(len(value)):
                if abs(x[k][d]) > abs(value[d]):
                    value[d] = x[k][d]
        out.append(value)
    return torch.stack(out), [kept.index(into.get(n, n)) for n in range(len(x))]


def cubist(x, rows, columns):
    """A grid (H, W, D): what is left, and the flat place of every cell."""
    height, width, _ = x.shape
    slim, across = zip(*(cubist_row(x[h], columns) for h in range(height)))
    slim = torch.stack(slim)
    low, down = zip(*(cubist_row(slim[:, w], rows) for w in range(width - columns)))
    y = torch.stack(low, dim=1)
    source = [down[across[h][w]][h] * (width - columns) + across[h][w] for h in range(height) for w in range(width)]
    return y, source
