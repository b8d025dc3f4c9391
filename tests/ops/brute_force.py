# SPDX-License-Identifier: Apache-2.0
"""Independent implementations of the operators: loops in Python, and dense masks in float64."""

import math

import torch

# ---- matching, one image at a time, in loops over Python floats ----


def similarity(a, b, kind):
    """Similarity of two rows of floats; NaN counts as -inf."""
    value = sum(p * q for p, q in zip(a, b, strict=True))
    if kind == "cosine":
        lengths = [math.sqrt(sum(p * p for p in row)) for row in (a, b)]
        if 0.0 not in lengths:
            value = value / lengths[0] / lengths[1]
    return -math.inf if math.isnan(value) else float(value)


def mean_over_heads(metric):
    """Convert [B, N, D] or [B, H, N, D] to nested lists [B][N][D]."""
    metric = metric.double()
    return (metric.mean(1) if metric.dim() == 4 else metric).tolist()


def nearest_image(a, b, a_mask, b_mask, kind):
    """Score and index of the best row of b for each row of a."""
    candidates = [j for j in range(len(b)) if b_mask is None or b_mask[j]]
    scores, indices = [], []
    for i, row in enumerate(a):
        best, at = -math.inf, -1
        if a_mask is None or a_mask[i]:
            for j in candidates:
                value = similarity(row, b[j], kind)
                if at < 0 or value > best:
                    best, at = value, j
        scores.append(best)
        indices.append(at)
    return scores, indices


def match_image(rows, r, src, dst, *, prefix=0, protected=(), threshold=None, order, kind):
    """Output token of each token, and the number of output tokens."""
    tokens = range(len(rows))
    if r == 0:
        return list(tokens), len(rows)
    free = [n >= prefix and n not in protected for n in tokens]
    receiving = sorted(d for d in dst if free[d])
    best = {}
    for s in src:
        values = [(-similarity(rows[s], rows[d], kind), d) for d in receiving]
        best[s] = min(values, default=(math.inf, min(dst, default=None)))
    ranked = sorted((best[s][0], s) for s in src if free[s])
    merging = [s for _, s in ranked]
    if threshold is None:
        merging += sorted(s for s in src if not free[s] and s >= prefix)  # the last resort
    else:
        merging = [s for s in merging if receiving and -best[s][0] >= threshold]
    merging = merging[:r] if len(dst) > 0 else []

    group = {n: {n} for n in tokens if n not in merging}
    for s in merging:
        group[best[s][1]].add(s)
    if order == "position":
        leaders = sorted(group, key=lambda n: min(group[n]))
    else:
        listed = {*src, *dst}
        kept = [s for s in group if s in src and s >= prefix]
        if prefix == 0:
            kept.sort(key=lambda s: (best[s][0] if free[s] else math.inf, s))
        leaders = [
            *range(prefix),
            *(n for n in tokens if n >= prefix and n not in listed),
            *kept,
            *(d for d in dst if d >= prefix),
        ]
    output = {n: m for m, leader in enumerate(leaders) for n in group[leader]}
    return [output[n] for n in tokens], len(leaders)


# ---- merging, as products with the dense matrix of sources ----


def membership(assign, num_tokens):
    """Bool [B, M, N]: whether output token m has member n."""
    return assign[:, None, :] == torch.arange(num_tokens, device=assign.device)[None, :, None]


def merge(x, assign, num_tokens, reduce, weight=None):
    """[B, N, C] -> [B, M, C] in the dtype of x, differentiable to any order."""
    member = membership(assign, num_tokens)  # [B, M, N]
    weight = x.new_ones(x.shape[:2]) if weight is None else weight.reshape(x.shape[:2])
    if reduce == "mean":
        return merge_wavg(x, assign, num_tokens, weight=weight)[0]
    if reduce == "sum":
        return member.to(x.dtype) @ (x * weight[..., None])
    values = (x * weight[..., None])[:, None]  # [B, 1, N, C]
    neutral = {"amax": -math.inf, "amin": math.inf, "prod": 1.0}[reduce]
    values = torch.where(member[..., None], values, neutral)  # [B, M, N, C]
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], num_tokens, x.shape[2])
    if reduce == "prod":
        out = values.prod(2)
    else:
        out = values.amax(2) if reduce == "amax" else values.amin(2)
    return torch.where(member.any(2)[..., None], out, 0)


def merge_wavg(x, assign, num_tokens, size=None, weight=None):
    """Means [B, M, C] and sizes [B, M, 1]."""
    member = membership(assign, num_tokens).to(x.dtype)
    ones = x.new_ones(*x.shape[:2], 1)
    size = ones if size is None else size.reshape(ones.shape)
    share = size if weight is None else size * weight.reshape(ones.shape)
    total = member @ share
    empty = total == 0
    mean = (member @ (x * share)) / torch.where(empty, 1, total)
    return torch.where(empty, 0, mean), member @ size


def unmerge(y, assign, residual=None):
    """[B, M, C] -> [B, N, C]."""
    out = membership(assign, y.shape[1]).to(y.dtype).mT @ y
    return out if residual is None else out + residual
