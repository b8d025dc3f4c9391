# SPDX-License-Identifier: Apache-2.0
"""Oracles of attention: whole maps and autograd, in float64 or as users write it.

``attention`` is the formula with whole maps of queries by keys; ``recipe`` is the code that
tokenops replaces, in the precision of its inputs. Nothing here depends on how tokenops computes.
"""

import math

import torch

import tokenops
from tokenops.testing import random_tokens

GRADIENTS = ("q", "k", "v", "policy", "size", "query_weight")


def valid_keys(k, size, key_padding_mask):
    """Bool [B, Nk]: keys that are neither padding nor of size 0."""
    valid = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    if key_padding_mask is not None:
        valid = valid & ~key_padding_mask
    if size is not None:
        valid = valid & (size.detach().reshape(valid.shape) > 0)
    return valid


def self_and_seen(q, k, size, key_padding_mask, query_position, is_causal):
    """Bool [B, 1, Nq, Nk] each: the key at the query's position; the keys that the query sees."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    position = torch.arange(queries) if query_position is None else query_position.long()
    position = position.to(q.device).expand(batch, queries)[:, None, :, None]
    key = torch.arange(keys, device=q.device)
    seen = valid_keys(k, size, key_padding_mask)[:, None, None].expand(batch, 1, queries, keys)
    return position == key, seen & (key <= position) if is_causal else seen


def policy_map(policy, is_self, shape, dtype, self_keep, policy_grad="exact"):
    """The policy of each query and key, [B, H, Nq, Nk]."""
    if policy is None:
        return torch.ones(shape, dtype=dtype, device=is_self.device)
    if policy.dim() == 3 and policy.shape[1:] == (shape[3], 1):
        policy = policy[..., 0]
    if policy_grad == "none":
        policy = policy.detach()
    elif policy_grad == "kept":
        policy = torch.where(policy > 0, policy, policy.detach())
    policy = policy.to(dtype)
    policy = policy[:, None, None] if policy.dim() == 2 else policy[:, :, None]
    policy = policy.expand(shape)
    return torch.where(is_self, 1, policy) if self_keep else policy


def maps(
    q, k, policy=None, *, size=None, key_padding_mask=None, query_position=None, self_keep=True,
    eps=0.0, is_causal=False, policy_grad="exact", scale=None, exclude_self=False,
):  # fmt: skip
    """Attention [B, H, Nq, Nk], lse, and their intermediate results by name; in float64."""
    q, k = q.double(), k.double()
    heads, width = q.shape[1], q.shape[3]
    scale = 1 / math.sqrt(max(width, 1)) if scale is None else scale
    is_self, seen = self_and_seen(q, k, size, key_padding_mask, query_position, is_causal)
    valid = valid_keys(k, size, key_padding_mask)
    k = torch.where(valid[:, None, :, None], k, 0).repeat_interleave(heads // k.shape[1], 1)
    s = scale * (q @ k.mT)  # [B, H, Nq, Nk]
    if s.numel() == 0:
        return s, s.sum(-1) - math.inf, {}
    policy = policy_map(policy, is_self, s.shape, s.dtype, self_keep, policy_grad)
    is_self, seen = is_self.expand(s.shape), seen.expand(s.shape)
    if size is not None:
        z = size.double().reshape(valid.shape)
        s = s + torch.where(valid, z, 1).log()[:, None, None]
    m, argmax = s.masked_fill(~seen, -math.inf).max(-1, keepdim=True)
    some = seen.any(-1, keepdim=True)
    # The shift cancels out. Without eps it is over kept keys, so that these do not underflow.
    counts = seen if eps > 0 else seen & (policy > 0)
    shift = s.detach().masked_fill(~counts, -math.inf).amax(-1, keepdim=True)
    shift = torch.where(shift.isfinite(), shift, 0)
    p = torch.where(seen, s - shift, -math.inf).exp()
    p_eps = 0 * shift
    if eps > 0:
        p_eps = torch.where(some, eps * (torch.where(some, m, 0) - shift).exp(), 0)
    total = (p * policy).sum(-1, keepdim=True) + p_eps
    empty = total == 0
    total = torch.where(empty, 1, total)
    p, p_eps = torch.where(empty, 0, p / total), p_eps / total
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    y = torch.where(empty, 0, p * policy + p_eps / count * seen)
    if exclude_self:
        y = torch.where(is_self, 0, y)
    lse = torch.where(empty, -math.inf, shift + total.log())[..., 0]
    parts = {
        "p": p, "policy": policy, "p_eps": p_eps, "is_self": is_self, "seen": seen, "scale": scale,
        "is_max": torch.arange(s.shape[3], device=s.device) == argmax, "self_keep": self_keep,
        "logits": scale * (q.abs() @ k.abs().mT), "valid": valid, "k": k,
    }  # fmt: skip
    return y, lse, parts


def attention(q, k, v, policy=None, **options):
    """Output [B, H, Nq, Dv] and lse [B, H, Nq] in float64."""
    y, lse, _ = maps(q, k, policy, **options)
    valid = valid_keys(k, options.get("size"), options.get("key_padding_mask"))
    v = torch.where(valid[:, None, :, None], v.double(), 0)
    return y @ v.repeat_interleave(q.shape[1] // k.shape[1], 1), lse


def take_rows(q, query_index):
    """Queries [B, H, R, D] by index, and their positions [B, R]."""
    index = torch.as_tensor(query_index, dtype=torch.int64, device=q.device)
    index = torch.where(index < 0, index + q.shape[2], index).expand(q.shape[0], -1)
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])), index


def scores(q, k, *, query_weight=None, query_index=None, head_reduce="mean", **options):
    """Attention received, [B, Nk] or [B, H, Nk], in float64."""
    if query_index is not None:
        q, options["query_position"] = take_rows(q, query_index)
    y, _, _ = maps(q, k, **options)
    if query_weight is not None:
        w = query_weight.double()
        w = w[:, None] if w.dim() == 2 else w
        y = y * w.expand(y.shape[:3])[..., None]
    received = y.sum(2)
    if head_reduce == "none":
        return received
    return received.mean(1) if head_reduce == "mean" else received.sum(1)


# ---- the code of users ----


def product(a, b):
    """A matrix product with sums in float32, rounded to the dtype of the inputs."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (a.to(wide) @ b.to(wide)).to(a.dtype)


def recipe_maps(
    q, k, policy=None, *, size=None, key_padding_mask=None, query_position=None, self_keep=True,
    eps=0.0, is_causal=False, policy_grad="exact", scale=None, exclude_self=False,
):  # fmt: skip
    """softmax_with_policy with sizes and masks: logits in the dtype of q, exp in float32."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    is_self, seen = self_and_seen(q, k, size, key_padding_mask, query_position, is_causal)
    valid = valid_keys(k, size, key_padding_mask)
    k = k.masked_fill(~valid[:, None, :, None], 0).repeat_interleave(q.shape[1] // k.shape[1], 1)
    attn = product(q, k.mT) * scale
    if size is not None:
        z = size.reshape(valid.shape)
        attn = attn + torch.where(valid, z, 1).log()[:, None, None].to(attn.dtype)
    policy = policy_map(policy, is_self, attn.shape, wide, self_keep, policy_grad)
    attn = attn.masked_fill(~seen, -math.inf)
    m = attn.amax(-1, keepdim=True)
    weights = (attn - m).to(wide).exp()
    total = (weights * policy).sum(-1, keepdim=True) + eps
    count = seen.sum(-1, keepdim=True)
    y = (weights * policy + eps / count * seen) / total
    if exclude_self:
        y = y.masked_fill(is_self, 0)
    return y, (m.to(wide) + total.log())[..., 0]


def recipe(q, k, v, policy=None, **options):
    """Output and lse of eager code, in the dtype of q. Every row must see a kept key."""
    y, lse = recipe_maps(q, k, policy, **options)
    valid = valid_keys(k, options.get("size"), options.get("key_padding_mask"))
    v = v.masked_fill(~valid[:, None, :, None], 0)
    return product(y.to(q.dtype), v.repeat_interleave(q.shape[1] // k.shape[1], 1)), lse


def recipe_scores(q, k, *, query_weight=None, query_index=None, head_reduce="mean", **options):
    if query_index is not None:
        q, options["query_position"] = take_rows(q, query_index)
    y, _ = recipe_maps(q, k, **options)
    y = y.to(q.dtype).to(y.dtype)
    if query_weight is not None:
        w = query_weight[:, None] if query_weight.dim() == 2 else query_weight
        y = y * w.expand(y.shape[:3])[..., None]
    received = y.sum(2)
    if head_reduce == "none":
        return received
    return received.mean(1) if head_reduce == "mean" else received.sum(1)


# ---- magnitudes of sums, which bound rounding errors ----


@torch.no_grad()
def magnitudes(q, k, v, policy=None, *, grad, grad_lse=None, **options):
    """Sums of the absolute values of the terms of each result and gradient, by name."""
    y, lse, parts = maps(q, k, policy, **options)
    size = options.get("size")
    g, groups = grad.double().abs(), k.shape[1]
    if y.numel() == 0:
        shapes = {"out": g, "lse": lse, "q": q, "k": k, "v": v, "policy": policy, "size": size}
        return {n: t.new_zeros(t.shape).double() for n, t in shapes.items() if t is not None}
    values = v.double().masked_fill(~parts["valid"][:, None, :, None], 0).abs()
    values = values.repeat_interleave(q.shape[1] // groups, 1)
    dp = g @ values.mT  # [B, H, Nq, Nk]
    delta = (y * dp).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta + grad_lse.double().abs()[..., None]
    dpolicy = parts["p"] * (dp + delta)
    ds = parts["policy"] * dpolicy
    if options.get("eps", 0) > 0:
        seen = parts["seen"]
        mean = (dp * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
        ds = ds + parts["p_eps"] * (mean + delta) * parts["is_max"]
    if parts["self_keep"]:
        dpolicy = dpolicy.masked_fill(parts["is_self"], 0)
    dpolicy = dpolicy.sum(2)

    def per_group(x):
        return x.unflatten(1, (groups, -1)).sum(2)

    logits = parts["logits"].masked_fill(~parts["seen"], 0).amax(-1)
    sums = {
        "out": y @ values,
        "lse": logits + torch.where(lse.isfinite(), lse, 0).abs(),
        "q": parts["scale"] * (ds @ parts["k"].abs()),
        "k": per_group(parts["scale"] * (ds.mT @ q.double().abs())),
        "v": per_group(y.mT @ g),
    }
    if policy is not None:
        by_head = policy.dim() == 3 and policy.shape[1:] != (k.shape[2], 1)
        sums["policy"] = dpolicy if by_head else dpolicy.sum(1).reshape(policy.shape)
    if size is not None:
        z = size.double().reshape(parts["valid"].shape)
        dsize = torch.where(parts["valid"], ds.sum((1, 2)) / torch.where(z > 0, z, 1), 0)
        sums["size"] = dsize.reshape(size.shape)
    return sums


@torch.no_grad()
def score_magnitudes(
    q, k, policy=None, *, grad, query_weight=None, query_index=None, head_reduce="mean", **options
):
    """Magnitudes for scores, from attention whose values are the gradients of the scores."""
    batch, heads, _, width = q.shape
    groups, rows = k.shape[1], q
    if query_index is not None:
        rows, options["query_position"] = take_rows(q, query_index)
    w = torch.ones(rows.shape[:3], dtype=torch.float64, device=q.device)
    if query_weight is not None:
        given = query_weight[:, None] if query_weight.dim() == 2 else query_weight
        w = given.double().abs().expand(w.shape)
    values = grad[:, None] if grad.dim() == 2 else grad
    values = values.double().expand(batch, heads, -1)[..., None]
    values = values / heads if head_reduce == "mean" else values
    keys = k.repeat_interleave(heads // groups, 1)
    sums = magnitudes(rows, keys, values, policy, grad=w[..., None], **options)
    received = (maps(rows, k, policy, **options)[0] * w[..., None]).sum(2)
    sums["score"] = received if head_reduce == "none" else received.sum(1)
    if head_reduce == "mean":
        sums["score"] = sums["score"] / heads
    sums["k"] = sums["k"].unflatten(1, (groups, -1)).sum(2)
    if query_index is not None:
        index = options["query_position"][:, None, :, None].expand(-1, heads, -1, width)
        sums["q"] = q.new_zeros(q.shape).double().scatter_add(2, index, sums["q"])
    if query_weight is not None:
        of_rows = sums["out"][..., 0]  # does not depend on the weights
        of_rows = of_rows if query_weight.dim() == 3 else of_rows.sum(1)
        sums["query_weight"] = of_rows.sum(0) if query_weight.dim() == 1 else of_rows
    return sums


# ---- results and gradients by name ----


def attend(**arguments):
    return tokenops.policy_attention(**arguments, return_lse=True)


def check_exactly(inputs, options, grad=None, grad_lse=None):
    """Results and gradients in float64 are off by at most 1e-10 of the sum of their terms."""
    grads = cotangents(inputs) if grad is None else (grad, grad_lse)
    got, truth = (results(f, inputs, *grads, **options) for f in (attend, attention))
    sums = magnitudes(**inputs, grad=grads[0], grad_lse=grads[1], **options)
    assert_exact(got, truth, sums)
    return got


def results(function, inputs, grad, grad_lse=None, **options):
    """Output, lse and gradients of all floating-point inputs of an attention function, by name."""
    leaves = {
        name: t.detach().requires_grad_(t.is_floating_point() and name in GRADIENTS)
        for name, t in inputs.items()
        if t is not None
    }
    out, lse = function(**leaves, **options)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    outputs, cotangents = [out], [grad.to(out.dtype)]
    if grad_lse is not None:
        outputs.append(lse)
        cotangents.append(grad_lse.to(lse.dtype))
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    named = dict(zip(wanted, gradients, strict=True))
    for name, t in wanted.items():
        # The gradient of an input that has no effect is zero.
        if named[name] is None and (name != "policy" or options.get("policy_grad") != "none"):
            named[name] = torch.zeros_like(t)
    return {"out": out.detach(), "lse": lse.detach(), **named}


def cotangents(inputs, seed=7):
    """Gradients of the output and of lse; a third of the gradients of lse are 0."""
    q, v = inputs["q"], inputs["v"]
    shape = (*q.shape[:3], v.shape[3])
    # Rounded to the dtype of q, so that the oracle gets the same gradient as the kernel.
    grad = random_tokens(*shape, dtype=q.dtype, seed=seed).to(q.device)
    grad_lse = random_tokens(*shape[:3], 1, dtype=torch.float32, seed=seed + 1)[..., 0].double()
    grad_lse[..., ::3] = 0
    return grad, grad_lse.to(q.device)


def assert_exact(got, truth, sums, tolerance=1e-10):
    """Results in float64 are off by at most the tolerance times the sum of their terms."""
    wrong = []
    for name, expected in truth.items():
        if (got[name] is None) != (expected is None):
            wrong.append(f"{name}: {got[name]}, must be {expected}")
            continue
        if expected is None:
            continue
        assert got[name].shape == expected.shape, name
        assert got[name].dtype == torch.float64, name
        same = got[name] == expected
        off = (got[name] - expected).abs() / (sums[name] + 1e-280)
        off = torch.where(same, 0, off).nan_to_num(nan=math.inf)
        if off.numel() > 0 and off.max() > tolerance:
            at = tuple(int(i) for i in (off == off.max()).nonzero()[0])
            wrong.append(
                f"{name}: off by {off.max():.2g} of its terms at {list(at)} of "
                f"{list(expected.shape)} ({(off > tolerance).sum()} of {off.numel()} are), "
                f"got {got[name][at].item()!r}, must be {expected[at].item()!r}"
            )
    assert not wrong, "\n".join(wrong)
